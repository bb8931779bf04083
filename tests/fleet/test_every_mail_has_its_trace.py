"""A fleet whose every mail is traced: each trace is one mail's whole life, whatever it met, and nobody else's."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
from fleet_support import (
    ADDRESS_MARK,
    BODY_MARK,
    SUBJECT_MARK,
    Fate,
    a_mailbox,
    an_attachment,
    an_email,
    emails,
    plain_send,
    settled,
)
from otlp_receiver import Received, Receiver
from worlds import Worlds

from sandbox.world import ROOT, World

SENDS = {"send_plain", "send_attached"}
TOGETHER = 8


class Traced(NamedTuple):
    """One mail with the ids that its publisher gave its trace, and what was told of it."""

    email: dict[str, Any]
    fate: Fate
    trace_id: str
    publishers_span: str
    spans: list[Received]

    def named(self, *names: str) -> list[Received]:
        return [span for span in self.spans if span.name in names]

    def calls(self, parent: Received) -> list[Received]:
        return [span for span in self.spans if span.parent_id == parent.id and span.name.startswith("graph ")]


class Lives(NamedTuple):
    """Mails by what they meet."""

    plain: list[dict[str, Any]]
    late: list[dict[str, Any]]
    attached: dict[str, Any]
    retried: dict[str, Any]
    throttled: dict[str, Any]
    doubted: dict[str, Any]
    refused: dict[str, Any]
    unarchived: dict[str, Any]

    @property
    def all(self) -> list[dict[str, Any]]:
        return [*self.plain, *self.late, *self[2:]]


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with closing(Receiver()) as started:
        yield started


@pytest.fixture(scope="module")
def world(worlds: Worlds, receiver: Receiver) -> World:
    traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "TRACES_SAMPLED": 1, "OTEL_BSP_SCHEDULE_DELAY": 200}
    return worlds.get({**traced, "BACKUP_DELAY_SECONDS": 3})


@pytest.fixture(scope="module")
def lives(world: World) -> Lives:
    simulator, send = world.simulator, plain_send(world)
    attached = [an_attachment(simulator, 3_500_000), an_attachment(simulator, 3_500_000), an_attachment(simulator, 10)]
    found = Lives(
        emails(TOGETHER, a_mailbox("together")),
        emails(2, a_mailbox("late")),
        an_email(a_mailbox("attached"), attachments=attached),
        an_email(a_mailbox("retried"), attachments=[an_attachment(simulator, 10)]),
        *(an_email(a_mailbox(name)) for name in ("throttled", "doubted", "refused", "unarchived")),
    )
    simulator.fail(500, mailbox=found.retried["from"], operation="create_draft", message=BODY_MARK)
    simulator.throttle(mailbox=found.throttled["from"], operation=send, retry_after="1")
    simulator.lose_next_answer(found.doubted["from"], send)
    simulator.fail(400, "ErrorInvalidRecipients", mailbox=found.refused["from"], operation=send, message=ADDRESS_MARK)
    for operation in ("find", "mime"):
        simulator.fail(500, mailbox=found.late[0]["from"], operation=operation, message=BODY_MARK)
    simulator.break_mime(found.unarchived["from"], times=None)
    return found


@pytest.fixture(scope="module")
def traced(world: World, receiver: Receiver, lives: Lives) -> dict[str, Traced]:
    """Every mail once its life is over, the refused one once it was replayed, by the publisher's id."""
    parents = {email["publisher_message_id"]: (secrets.token_hex(16), secrets.token_hex(8)) for email in lives.all}
    for email in lives.all:
        trace_id, span = parents[email["publisher_message_id"]]
        world.publish(email, headers={"traceparent": f"00-{trace_id}-{span}-01"}, correlation_id="c-1")
    settled(world, lives.all)
    subprocess.run(
        [str(ROOT / ".venv/bin/mailfleet"), "dlq", "replay", "--mailbox", lives.refused["from"]],
        env=world.environment,
        check=True,
        capture_output=True,
    )
    fates = world.wait_until(
        "the refused one is sent and archived",
        lambda: (found := settled(world, lives.all))[lives.refused["publisher_message_id"]].archived and found,
    )
    # A span is told a moment after it has ended; the last of a life is a copy that is made, or given up.
    last = {parents[id][0] for id, fate in fates.items() if fate.archived}
    world.wait_until(
        "the last spans are told",
        lambda: last <= {span.trace_id for span in receiver.spans if span.name == "backup" and not span.failed},
        timedelta(seconds=20),
    )
    return {
        id: Traced(email, fates[id], *parents[id], [s for s in receiver.spans if s.trace_id == parents[id][0]])
        for email in lives.all
        for id in [email["publisher_message_id"]]
    }


def test_each_trace_begins_at_its_publisher_and_every_span_of_it_has_its_place(traced: dict[str, Traced]) -> None:
    for mail in traced.values():
        (receive,) = mail.named("receive")
        assert receive.parent_id == mail.publishers_span
        dispatches, sends, backups = mail.named("dispatch"), mail.named(*SENDS), mail.named("backup")
        assert {span.parent_id for span in (*dispatches, *backups)} == {receive.id}
        assert sorted(span.parent_id for span in sends) == sorted(span.id for span in dispatches)
        calls = [span for span in mail.spans if span.name.startswith("graph ")]
        assert {span.parent_id for span in calls} <= {span.id for span in (*sends, *backups)}
        assert len(mail.spans) == 1 + len(dispatches) + len(sends) + len(backups) + len(calls)
        assert len({span.id for span in mail.spans}) == len(mail.spans)


def test_each_span_of_a_mail_has_its_ids_and_the_attempt_of_its_dispatch(traced: dict[str, Traced]) -> None:
    for mail in traced.values():
        dispatched = {span.id: span.attributes["mailfleet.attempt"] for span in mail.named("dispatch")}
        for span in mail.named("receive", "dispatch", *SENDS, "backup"):
            assert span.attributes["mailfleet.incoming_email_id"] == mail.fate.id, span.name
            assert span.attributes["mailfleet.publisher_message_id"] == mail.email["publisher_message_id"]
            assert span.attributes["mailfleet.correlation_id"] == "c-1"
        for span in mail.named(*SENDS):
            assert span.attributes["mailfleet.attempt"] == dispatched[span.parent_id]


def test_nothing_is_told_of_anything_but_these_mails(traced: dict[str, Traced], receiver: Receiver) -> None:
    assert {span.trace_id for span in receiver.spans} == {mail.trace_id for mail in traced.values()}


def test_mails_that_are_archived_together_have_a_span_each_with_its_own_copy(
    traced: dict[str, Traced], lives: Lives, world: World
) -> None:
    if world.environment["SEND_PLAIN_VIA"] == "draft":
        pytest.skip("what was a draft is archived alone")
    assert 1 <= len(world.simulator.requests(lives.plain[0]["from"], "find")) < TOGETHER
    for email in lives.plain:
        mail = traced[email["publisher_message_id"]]
        (backup,) = mail.named("backup")
        assert sorted(span.name for span in mail.calls(backup)) == ["graph fetch_mime", "graph find_by_tag"]
        assert mail.fate.archived


def test_a_mail_with_files_has_every_call_of_every_uploader(traced: dict[str, Traced], lives: Lives) -> None:
    mail = traced[lives.attached["publisher_message_id"]]
    (send,) = mail.named("send_attached")
    calls = [span.name for span in mail.calls(send)]
    assert {name: calls.count(name) for name in ("graph create_draft", "graph attach", "graph send_draft")} == {
        "graph create_draft": 1,
        "graph attach": 1,
        "graph send_draft": 1,
    }
    assert calls.count("graph create_upload_session") == 2
    assert calls.count("graph upload_range") >= 2


def test_each_attempt_is_a_span_that_says_how_it_ended(traced: dict[str, Traced], lives: Lives) -> None:
    def ends(email: dict[str, Any], *names: str) -> list[Any]:
        return [span.attributes.get("error.type") for span in traced[email["publisher_message_id"]].named(*names)]

    assert ends(lives.retried, "send_attached") == ["ServerUnavailable", None]
    assert ends(lives.throttled, "send_plain") == ["Throttled", None]
    assert ends(lives.refused, "send_plain") == ["InvalidRecipient", None]
    assert ends(lives.doubted, "send_plain")[0] is not None
    assert ends(lives.doubted, "send_plain")[-1] is None


def test_a_backup_says_that_it_failed_unless_it_has_made_a_copy(traced: dict[str, Traced], lives: Lives) -> None:
    for mail in traced.values():
        made = [
            any(call.name == "graph fetch_mime" and not call.failed for call in mail.calls(backup))
            for backup in mail.named("backup")
        ]
        assert [not backup.failed for backup in mail.named("backup")] == made
        assert made.count(True) == mail.fate.archived
    # Given one whose message cannot be read, and two of which the first look failed, or the first fetch
    assert not traced[lives.unarchived["publisher_message_id"]].fate.archived
    late = [span for email in lives.late for span in traced[email["publisher_message_id"]].named("backup")]
    assert {span.attributes.get("error.type") for span in late} == {"ServerUnavailable", None}


def test_no_span_tells_what_people_write_or_who_they_are(traced: dict[str, Traced], receiver: Receiver) -> None:
    told = b"".join(receiver.bodies).lower()
    for planted in (BODY_MARK, SUBJECT_MARK, ADDRESS_MARK, ".example", "https://", "demo-secret", "bearer"):
        assert planted.lower().encode() not in told, planted
