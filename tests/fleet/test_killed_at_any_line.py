"""Every line at which a process can die between two steps is tried on a real process, with a real SIGKILL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fleet_support import a_mailbox, an_attachment, an_email

from crash_points import CrashPoint
from sandbox.world import Overdue, World

#: Many leases run out one after the other: an email may meet several of the lines.
PATIENCE = timedelta(seconds=150)


class Aftermath(NamedTuple):
    """What was seen once every line had killed a process and everything was settled."""

    world: World
    never_reached: set[str]
    to_be_sent: set[str]
    to_fail: set[str]


@pytest.fixture(scope="module")
def aftermath(worlds: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    """A fleet in which every line was armed once, after mail of every kind went through it."""
    armed = tmp_path_factory.mktemp("armed")
    world = worlds.get({"CRASH_DIRECTORY": str(armed), "MAX_ATTEMPTS": 8}, supervise=True)
    refused = a_mailbox("refused")
    to_be_sent, to_fail = _publish_every_kind(world, armed, refused)
    # The worker that died over a failure may have had all of them in hand: then none is left to be dead-lettered.
    with suppress(Overdue):
        world.wait_until("a failure was met", lambda: not (armed / CrashPoint.FAILURE_RECORDED).exists(), PATIENCE)
    late = an_email(refused)
    world.publish(late)
    to_fail.add(late["publisher_message_id"])
    with suppress(Overdue):  # which lines were not reached is for the test to say
        world.wait_until("every line was reached", lambda: not any(armed.iterdir()), PATIENCE)
    world.wait_until_settled(len(to_be_sent) + len(to_fail), PATIENCE)
    yield Aftermath(world, {path.name for path in armed.iterdir()}, to_be_sent, to_fail)
    worlds.close()


def _publish_every_kind(world: World, armed: Path, refused: str) -> tuple[set[str], set[str]]:
    simulator = world.simulator
    simulator.fail(400, code="ErrorInvalidRecipients", mailbox=refused, operation="send_mail", times=None)
    doubtful = a_mailbox("doubtful")
    simulator.lose_next_answer(mailbox=doubtful, times=4)
    mailboxes = [a_mailbox() for _ in range(6)]
    good = [an_email(mailbox) for mailbox in mailboxes * 5] + [an_email(doubtful) for _ in range(4)]
    for mailbox in mailboxes:
        attachments = [an_attachment(simulator, size) for size in (20_000, 5_000_000)]
        good.append(an_email(mailbox, attachments=attachments))
    bad = [an_email(refused) for _ in range(4)]
    for point in CrashPoint:
        (armed / point).touch()
    for email in good + bad:
        world.publish(email)  # one by one: the bridge, too, meets its lines at different moments
    return {email["publisher_message_id"] for email in good}, {email["publisher_message_id"] for email in bad}


@pytest.mark.parametrize("point", CrashPoint)
def test_a_process_was_killed_at(point: CrashPoint, aftermath: Aftermath) -> None:
    # Then the line was reached, and the process that reached it died there
    assert point not in aftermath.never_reached


def test_each_email_was_sent_exactly_once(aftermath: Aftermath) -> None:
    deliveries = aftermath.world.simulator.delivery_counts_by_tag()
    sent = {
        publisher_id: deliveries.get(id, 0)
        for id, publisher_id in aftermath.world.rows("SELECT id::text, publisher_message_id FROM incoming_emails")
        if publisher_id in aftermath.to_be_sent
    }
    assert sent == dict.fromkeys(aftermath.to_be_sent, 1)


def test_each_email_was_archived_exactly_once(aftermath: Aftermath) -> None:
    backups = aftermath.world.rows(
        """
        SELECT e.publisher_message_id, count(b.id) FROM incoming_emails e
        LEFT JOIN email_backups b ON b.incoming_email_id = e.id WHERE e.status = 'processed' GROUP BY 1
        """
    )
    assert dict(backups) == dict.fromkeys(aftermath.to_be_sent, 1)


def test_every_attachment_is_on_its_mail_once(aftermath: Aftermath) -> None:
    attached = [
        sorted(attachment["bytes"] for attachment in delivery["attachments"])
        for delivery in aftermath.world.simulator.deliveries()
        if delivery["attachments"]
    ]
    assert attached == [[20_000, 5_000_000]] * 6


@pytest.mark.parametrize("type", ["SendEmailReceived", "SendEmailSent"])
def test_each_event_was_published_and_a_repeat_keeps_its_id(type: str, aftermath: Aftermath) -> None:
    # Given that a process died between the confirmation and the mark, once for each publisher of events
    world = aftermath.world
    wanted = aftermath.to_be_sent | (aftermath.to_fail if type == "SendEmailReceived" else set())

    def told() -> set[str]:
        return {event.body["publisher_message_id"] for event in world.events(type)}

    # Then every email has its event
    world.wait_until(f"every {type} has arrived", lambda: told() == wanted, timedelta(seconds=60))
    # And whatever came again came under the same id
    ids = {event.body["publisher_message_id"]: event.message_id for event in world.events(type)}
    assert all(ids[event.body["publisher_message_id"]] == event.message_id for event in world.events(type))


def test_each_email_that_was_given_up_is_one_dead_letter(aftermath: Aftermath) -> None:
    letters = aftermath.world.rows(
        "SELECT e.publisher_message_id FROM dlq d JOIN incoming_emails e ON e.id = d.incoming_email_id"
    )
    assert Counter(row[0] for row in letters) == dict.fromkeys(aftermath.to_fail, 1)
