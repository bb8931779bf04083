"""Every line at which a process can die between two steps is tried on a real process, with a real SIGKILL.

One fleet meets them all, each once, while mail of every kind goes through it. A process tells its log at which line,
and with which mail in hand, it is about to die; so it can be seen what the next process made of that mail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import dramatiq
import pytest
import redis
from fleet_support import Fate, a_mailbox, an_attachment, an_email, fates, now, put, settled_one

from crash_points import CrashPoint
from sandbox.world import QUEUES, Overdue, World

#: Many leases run out one after the other: an email may meet several of the lines.
PATIENCE = timedelta(seconds=240)
#: The consumers of these queues pass the lines around an ACK, each for itself.
_CONSUMED = [queue for queue in QUEUES if queue != "ingest"]
_OF_EACH_QUEUE = (CrashPoint.MESSAGE_DONE, CrashPoint.MESSAGE_ACKNOWLEDGED)
LINES = [point for point in CrashPoint if point not in _OF_EACH_QUEUE] + [
    f"{point}.{queue}" for point in _OF_EACH_QUEUE for queue in _CONSUMED
]
TIDYING = [point for point in CrashPoint if point.startswith("tidying.")]

#: How many of each kind are published.
KINDS = {
    "plain": 24,
    "attached": 12,
    "answer lost": 4,
    "lost unsent": 4,
    "throttled": 3,
    "too late": 2,
    "no copy": 2,
    "refused": 6,
}
LAPSED = "the worker's lease ran out during the send"
FOUND, ABSENT = "1 sent, 0 drafts", "0 sent, 0 drafts"


class Story(NamedTuple):
    """What became of one email."""

    kind: str
    email: dict[str, Any]
    fate: Fate
    #: At which lines a process died with it in hand.
    deaths: list[str]
    #: How often Graph was asked for what.
    asked: Counter[str]
    left: int
    letters: int

    @property
    def seen(self) -> list[str]:
        return [entry["seen"] for entry in self.fate.evidence]

    @property
    def sends(self) -> int:
        return self.asked["send_mail"] + self.asked["send_draft"]


class Aftermath(NamedTuple):
    """What was seen once every line had killed a process and everything was settled."""

    world: World
    never_reached: set[str]
    stories: list[Story]
    #: Mails that were given up before, with a draft and an open upload session each.
    left_behind: list[dict[str, Any]]

    def of(self, *kinds: str) -> list[Story]:
        return [story for story in self.stories if story.kind in kinds]


@pytest.fixture(scope="module")
def aftermath(worlds: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    """A fleet in which every line was armed once, after mail of every kind went through it."""
    armed = tmp_path_factory.mktemp("armed")
    # Sent at once, a mail without attachments can be found absent; the others are drafts.
    settings = {"CRASH_DIRECTORY": str(armed), "MAX_ATTEMPTS": 8, "SEND_PLAIN_VIA": "sendmail"}
    # A process has one mail in hand, so that no other dies with it.
    settings |= dict.fromkeys(("SEND_PLAIN_THREADS", "SEND_ATTACHED_THREADS", "BACKUP_THREADS"), 1)
    world = worlds.get(settings, supervise=True)
    _leave_something_to_purge(world)
    left_behind = _leave_something_to_tidy(world)
    _die_while_tidying(world, armed, left_behind)
    published = _publish_every_kind(world, armed)
    put(world, "maintenance", _message("maintenance", "purge_expired"))
    _wait_until_all_were_met(world, armed)
    with suppress(Overdue):  # what did not come to its end is for the tests to say
        world.wait_until(
            "all is settled",
            lambda: (
                sum(fate.over for fate in fates(world, [email for _, email in published]).values()) == len(published)
            ),
            PATIENCE,
        )
    yield Aftermath(world, {path.name for path in armed.iterdir()}, _stories(world, published), left_behind)
    worlds.close()


def _leave_something_to_purge(world: World) -> None:
    email = an_email(a_mailbox("old"))
    world.publish(email)
    settled_one(world, email)
    world.rows("UPDATE email_backups SET expires_at = now()")


def _leave_something_to_tidy(world: World) -> list[dict[str, Any]]:
    """Leave drafts and sessions of two mails: whoever dies over the first may leave no session of it."""
    left_behind = []
    for _ in range(2):
        shorter = an_attachment(world.simulator, 5_000_000)
        email = an_email(a_mailbox("given-up"), attachments=[shorter | {"size": 5_000_001}])
        world.publish(email)
        settled_one(world, email)
        assert [draft["isDraft"] for draft in world.simulator.messages(email["from"], "drafts")] == [True]
        left_behind.append(email)
    world.rows("UPDATE incoming_emails SET updated_at = updated_at - interval '2 days' WHERE status = 'failed'")
    return left_behind


def _die_while_tidying(world: World, armed: Path, left_behind: list[dict[str, Any]]) -> None:
    """Have it over before any budget has to be restored: a mailbox that is refused a slot is tidied a day later."""
    for line in TIDYING:
        (armed / line).touch()
    put(world, "maintenance", _message("maintenance", "tidy_drafts"))
    with suppress(Overdue):  # which line was not met is for the tests to say
        world.wait_until("all is tidied", lambda: not _untidy(world, left_behind))


def _untidy(world: World, left_behind: list[dict[str, Any]]) -> list[Any]:
    return world.rows(
        """
        SELECT publisher_message_id, drafts_clean, draft_id
        FROM incoming_emails e LEFT JOIN file_uploads u ON u.incoming_email_id = e.id
        WHERE publisher_message_id = ANY(%(ids)s)
          AND (drafts_clean IS NOT TRUE OR draft_id IS NOT NULL OR upload_session_info IS NOT NULL)
        """,
        {"ids": [email["publisher_message_id"] for email in left_behind]},
    )


def _publish_every_kind(world: World, armed: Path) -> list[tuple[str, dict[str, Any]]]:
    graph, published = world.simulator, []
    for kind, count in KINDS.items():
        for _ in range(count):
            mailbox, changes = a_mailbox(kind.split()[0]), {}
            if kind == "attached":
                changes["attachments"] = [an_attachment(graph, size) for size in (20_000, 5_000_000)]
            elif kind == "answer lost":
                graph.lose_next_answer(mailbox=mailbox)
                graph.lose_next_answer(mailbox=mailbox, operation="send_draft")
            elif kind == "lost unsent":
                graph.fail(504, mailbox=mailbox, operation="send_mail")
                graph.fail(504, mailbox=mailbox, operation="send_draft")
            elif kind == "throttled":
                graph.throttle(mailbox, "1")
            elif kind == "too late":
                changes = _too_late()
            elif kind == "no copy":
                graph.break_mime(mailbox, how="truncated", times=None)
            elif kind == "refused":
                for operation in ("send_mail", "send_draft"):
                    graph.fail(400, code="ErrorInvalidRecipients", mailbox=mailbox, operation=operation, times=None)
            published.append((kind, an_email(mailbox, **changes)))
    for line in LINES:
        if line not in TIDYING:
            (armed / line).touch()
    for _, email in published:
        world.publish(email)  # one by one: the bridge, too, meets its lines at different moments
    return published


def _wait_until_all_were_met(world: World, armed: Path) -> None:
    """Wait, and keep such coming as are few: a process that dies over one may have had all of them in hand."""
    deadline = now() + PATIENCE
    while (left := {path.name for path in armed.iterdir()}) and now() < deadline:
        put(world, "send_plain", b"no message at all")
        world.publish(an_email(a_mailbox("late"), **_too_late()))
        if CrashPoint.BUDGET_RESTORING in left:
            redis.Redis.from_url(world.environment["REDIS_URL"]).flushdb()
        with suppress(Overdue):
            world.wait_until(
                "another was met", lambda left=left: {*armed.iterdir()} < {*map(armed.joinpath, left)}, _A_WHILE
            )


_A_WHILE = timedelta(seconds=3)


def _too_late() -> dict[str, Any]:
    """The fields of an email that is due when it must not be sent any more."""
    due_at = now() + timedelta(seconds=2)
    return {"send_at": due_at.isoformat(), "expires_at": (due_at + timedelta(milliseconds=1)).isoformat()}


def _message(queue: str, actor: str) -> bytes:
    return bytes(dramatiq.Message(queue_name=queue, actor_name=actor, args=(), kwargs={}, options={}).encode())


def _stories(world: World, published: list[tuple[str, dict[str, Any]]]) -> list[Story]:
    known = fates(world, [email for _, email in published])
    left = world.simulator.delivery_counts_by_tag()
    asked: dict[str, Counter[str]] = {}
    for request in world.simulator.requests():
        asked.setdefault(request["mailbox"], Counter())[request["operation"]] += 1
    letters = Counter(id for (id,) in world.rows("SELECT incoming_email_id::text FROM dlq"))
    deaths = _deaths(world)
    return [
        Story(
            kind,
            email,
            fate := known[email["publisher_message_id"]],
            deaths.get(fate.id, []),
            asked.get(email["from"], Counter()),
            left.get(fate.id, 0),
            letters[fate.id],
        )
        for kind, email in published
    ]


def _deaths(world: World) -> dict[str | None, list[str]]:
    """Return at which lines processes have died, by the email that they had in hand."""
    deaths: dict[str | None, list[str]] = {}
    for name in world.fleet.logs:
        for line in world.log_lines(name):
            if line["event"].startswith("killed at "):
                deaths.setdefault(line.get("incoming_email_id"), []).append(line["event"].removeprefix("killed at "))
    return deaths


@pytest.mark.parametrize("line", LINES)
def test_a_process_was_killed_at(line: str, aftermath: Aftermath) -> None:
    # Then the line was reached, and the process that reached it died there
    assert line not in aftermath.never_reached


#: What the next process made of the mail that the dead one had in hand.
OUTCOMES: dict[CrashPoint, Callable[[Story], bool]] = {
    # The intent of a mail that is sent at once stands from the claim on; it was looked up before it was sent.
    CrashPoint.SEND_CLAIMED: lambda mail: mail.asked["create_draft"] > 0 or {LAPSED, ABSENT} <= {*mail.seen},
    CrashPoint.DRAFT_CREATED: lambda mail: mail.asked["create_draft"] == 1,
    CrashPoint.DRAFT_RECORDED: lambda mail: mail.asked["create_draft"] == 1,
    # When the lease has run out the grace has, too: what was asked for takes effect no more, and the draft is kept.
    CrashPoint.ATTACHMENT_BEGUN: lambda mail: (mail.asked["create_draft"], mail.asked["attach"]) == (1, 1),
    CrashPoint.ATTACHMENT_ATTACHED: lambda mail: mail.asked["attach"] == 1,
    CrashPoint.SESSION_CREATED: lambda mail: mail.asked["create_upload_session"] > 1,
    CrashPoint.SESSION_RECORDED: lambda mail: (
        mail.asked["create_upload_session"] == 1 + _times(mail, "session.created")
    ),
    # Graph refuses the range that it has, and may not say where to go on: then the file begins anew.
    CrashPoint.RANGE_UPLOADED: lambda mail: mail.asked["create_upload_session"] <= 2 + _times(mail, "session.created"),
    CrashPoint.RANGE_RECORDED: lambda mail: mail.asked["create_upload_session"] == 1 + _times(mail, "session.created"),
    CrashPoint.UPLOAD_RECORDED: lambda mail: mail.asked["attach"] == 1,
    CrashPoint.SEND_INTENDED: lambda mail: {*_seen_after(mail, LAPSED)} - {FOUND},
    CrashPoint.SEND_ANSWERED: lambda mail: FOUND in _seen_after(mail, LAPSED),
    CrashPoint.SEND_RECORDED: lambda mail: mail.fate.status == "processed",
    # A doubt that was recorded needs no lease to run out; where the same mail died at another line, one did.
    CrashPoint.DOUBT_RECORDED: lambda mail: (
        mail.fate.status == "processed" and mail.seen.count(LAPSED) <= _times(mail, *_DIED_SENDING)
    ),
    CrashPoint.RETRY_RECORDED: lambda mail: mail.fate.status in ("processed", "expired"),
    CrashPoint.SETTLE_FOUND: lambda mail: mail.asked["find"] > 1 and mail.fate.status == "processed",
    CrashPoint.SETTLE_RECORDED: lambda mail: ABSENT in mail.seen and mail.seen[-1] in ("202", FOUND),
    CrashPoint.BACKUP_CLAIMED: lambda mail: mail.letters == 1 or mail.fate.archived,
    CrashPoint.BACKUP_FETCHED: lambda mail: mail.fate.archived and mail.asked["mime"] > 1,
    CrashPoint.BACKUP_STORED: lambda mail: mail.fate.archived,
    CrashPoint.BACKUP_POSTPONED: lambda mail: mail.letters == 1 or mail.fate.archived,
    CrashPoint.FAILURE_RECORDED: lambda mail: (mail.fate.status, mail.letters) == ("failed", 1),
    CrashPoint.BACKUP_FAILURE_RECORDED: lambda mail: (mail.fate.status, mail.letters) == ("processed", 1),
}


#: Between the claim of a mail that is sent at once and the record of the answer.
_DIED_SENDING = ("send.claimed", "send.intended", "send.answered")


def _seen_after(mail: Story, seen: str) -> list[str]:
    """Return what was seen next, each time that this was seen."""
    return [following for before, following in pairwise(mail.seen) if before == seen]


def _times(mail: Story, *lines: str) -> int:
    return sum(mail.deaths.count(line) for line in lines)


@pytest.mark.parametrize("line", OUTCOMES)
def test_what_became_of_the_mail_in_hand_at(line: CrashPoint, aftermath: Aftermath) -> None:
    (mail,) = [story for story in aftermath.stories if line in story.deaths]
    assert OUTCOMES[line](mail), mail


def test_what_mails_that_ended_had_left_is_gone_whoever_died_over_it(aftermath: Aftermath) -> None:
    assert len(aftermath.left_behind) == 2
    assert _untidy(aftermath.world, aftermath.left_behind) == []
    for email in aftermath.left_behind:
        assert aftermath.world.simulator.messages(email["from"], "drafts") == []


def test_each_email_was_sent_exactly_once(aftermath: Aftermath) -> None:
    counts = {(story.kind, story.fate.status): story.left for story in aftermath.stories}
    assert counts == {
        (kind, status): left
        for kind in KINDS
        for status, left in [
            ("failed", 0) if kind == "refused" else ("expired", 0) if kind == "too late" else ("processed", 1)
        ]
    }
    assert {story.left for story in aftermath.stories if story.fate.status == "processed"} == {1}


def test_graph_was_asked_once_for_each_send_that_it_did(aftermath: Aftermath) -> None:
    # Given that one answer of these said that nothing was sent
    for story in aftermath.of("lost unsent"):
        assert story.sends == 2, story
    # Then nothing was ever asked for that had been done
    for story in aftermath.of("plain", "attached", "answer lost", "no copy"):
        assert story.sends == 1, story


def test_each_email_was_archived_exactly_once(aftermath: Aftermath) -> None:
    backups = Counter(id for (id,) in aftermath.world.rows("SELECT incoming_email_id::text FROM email_backups"))
    sent = [
        story.fate.id for story in aftermath.stories if story.fate.status == "processed" and story.kind != "no copy"
    ]
    assert backups == Counter(sent)


def test_every_attachment_is_on_its_mail_once(aftermath: Aftermath) -> None:
    attached = [
        sorted(attachment["bytes"] for attachment in delivery["attachments"])
        for delivery in aftermath.world.simulator.deliveries()
        if delivery["attachments"]
    ]
    assert attached == [[20_000, 5_000_000]] * KINDS["attached"]


@pytest.mark.parametrize("type", ["SendEmailReceived", "SendEmailSent", "SendEmailFailed", "SendEmailExpired"])
def test_each_event_was_published_and_a_repeat_keeps_its_id(type: str, aftermath: Aftermath) -> None:
    # Given that a process died between the confirmation and the mark, once for each publisher of events
    world = aftermath.world
    status = {"SendEmailSent": "processed", "SendEmailFailed": "failed", "SendEmailExpired": "expired"}.get(type)
    wanted = {story.fate.id for story in aftermath.stories if status in (None, story.fate.status)}

    def told() -> dict[str, set[str]]:
        ids: dict[str, set[str]] = {}
        for event in world.events(type):
            ids.setdefault(event.body["incoming_email_id"], set()).add(event.message_id)
        return ids

    # Then every email has its event
    world.wait_until(f"every {type} has arrived", lambda: told().keys() >= wanted)
    # And whatever came again came under the same id
    assert {len(ids) for ids in told().values()} == {1}


def test_each_email_that_was_given_up_is_one_dead_letter(aftermath: Aftermath) -> None:
    letters = {story.fate.id: story.letters for story in aftermath.stories if story.letters}
    assert letters == {story.fate.id: 1 for story in aftermath.of("refused", "no copy")}
