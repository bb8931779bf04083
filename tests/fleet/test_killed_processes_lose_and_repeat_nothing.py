"""SIGKILL for every process type in turn, in the middle of its work, under a supervisor that starts it again."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
from fleet_support import Fate, a_mailbox, an_attachment, an_email, assert_each_left_once, attached_sha256, emails
from fleet_support import settled as settle
from worlds import Worlds

from sandbox.world import World

#: Whom to kill, by the way in which plain mail is sent; only few notice which that is.
TYPES = {
    "sendmail": ("bridge", "scheduler", "send_plain", "send_attached", "backup", "clock", "maintenance"),
    "draft": ("send_plain", "scheduler", "backup"),
}


class Survivors(NamedTuple):
    world: World
    emails: dict[str, dict[str, Any]]
    fates: dict[str, Fate]


@pytest.fixture(scope="module")
def survivors(worlds: Worlds, way: str) -> Survivors:
    """What was published around the kills, and what became of it."""
    # A mail may lose its worker several times; each costs it an attempt.
    world = worlds.get({"SEND_PLAIN_VIA": way, "MAX_ATTEMPTS": 8}, supervise=True)
    world.simulator.set_latency(0.1)
    mailboxes = [a_mailbox("killed") for _ in range(10)]
    given = [_killed_halfway_through_an_upload(world)]
    for type in TYPES[way]:
        batch = [email for mailbox in mailboxes for email in emails(3, mailbox)]
        batch += [an_email(each, attachments=[an_attachment(world.simulator, 3_500_000)]) for each in mailboxes[:2]]
        given += batch
        before = len(world.simulator.deliveries())
        world.publish(*batch)
        world.wait_until("some have left", lambda before=before: len(world.simulator.deliveries()) > before + 5)
        world.fleet.kill(type)
    world.simulator.set_latency(0)
    by_id = {email["publisher_message_id"]: email for email in given}
    return Survivors(world, by_id, settle(world, given, 90))


def _killed_halfway_through_an_upload(world: World) -> dict[str, Any]:
    world.simulator.set_latency(0.5, "upload_range")
    email = an_email(a_mailbox("halfway"), attachments=[an_attachment(world.simulator, 15_000_000)])
    world.publish(email)
    halfway = "SELECT count(*) FROM file_uploads WHERE status = 'uploading' AND uploaded_bytes > 0"
    world.wait_until("a part of it is up", lambda: world.count(halfway))
    world.fleet.kill("send_attached")
    world.simulator.set_latency(0.1, "upload_range")
    return email


def test_every_email_leaves_once(survivors: Survivors) -> None:
    assert Counter(fate.status for fate in survivors.fates.values()) == {"processed": len(survivors.emails)}
    assert_each_left_once(survivors.world, survivors.fates.values())


def test_attachments_are_whole(survivors: Survivors) -> None:
    for id, email in survivors.emails.items():
        [delivery] = survivors.world.simulator.deliveries(tag=survivors.fates[id].id)
        arrived = sorted(each["sha256"] for each in delivery["attachments"])
        assert arrived == sorted(attached_sha256(each) for each in email.get("attachments", []))


def test_every_email_is_archived_once(survivors: Survivors) -> None:
    archived = Counter(id for (id,) in survivors.world.rows("SELECT incoming_email_id::text FROM email_backups"))
    assert archived == Counter(fate.id for fate in survivors.fates.values())


@pytest.mark.parametrize("type", ["SendEmailReceived", "SendEmailSent"])
def test_publishers_can_tell_every_repeat_of_an_event(survivors: Survivors, type: str) -> None:
    world, ids = survivors.world, {fate.id for fate in survivors.fates.values()}
    told = "SELECT count(*) FROM outbox_events WHERE published_at IS NULL"
    world.wait_until("all events are published", lambda: world.count(told) == 0)
    world.wait_until("all events have come", lambda: {e.body["incoming_email_id"] for e in world.events(type)} >= ids)
    assert len({event.message_id for event in world.events(type)}) == len(ids)


def test_no_lease_is_left_behind(survivors: Survivors) -> None:
    assert survivors.world.count("SELECT count(*) FROM incoming_emails WHERE lease_until IS NOT NULL") == 0
    assert survivors.world.count("SELECT count(*) FROM sent_emails WHERE status <> 'sent'") == 0
