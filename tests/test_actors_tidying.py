"""``tidy_drafts``: what dead workers and ended emails have left in the mailboxes goes, and never the mail itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import support
from support import LEASE, SENDER, Fleet, email_row, rows, sending, store, table
from test_actors_drafts import (
    LARGE,
    SMALL,
    attached,
    calls,
    draft_recorded,
    expected,
    file,
    half_uploaded,
    killed_after,
    make_draft,
)

import models
import operations
import runtime
from actors.budgets import keep_counts
from actors.tidying import tidy_drafts
from crash_points import CrashPoint
from graph_client import GraphClient
from models import dead_letters, holds, leftovers

OTHER = "other@contoso.example"

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure, limit = support.configure, support.limit


def later() -> None:
    """Let the retention of drafts have passed."""
    rows("UPDATE incoming_emails SET updated_at = updated_at - interval '2 days'")
    rows("UPDATE incoming_emails SET drafts_looked_at = drafts_looked_at - interval '2 days'")


def drafts_left(fleet: Fleet, mailbox: str = SENDER) -> int:
    return len(fleet.graph.messages(mailbox, "drafts"))


def failed_with_a_draft(fleet: Fleet, name: str = "order-1", mailbox: str = SENDER) -> str:
    """A mail whose second file cannot be had, so that its draft stays."""
    before = drafts_left(fleet, mailbox)
    attachments = [file(fleet, "small", SMALL), file(fleet, "gone", SMALL, fail=404)]
    id = store(publisher_message_id=name, attachments=attachments, **{"from": mailbox})
    assert fleet.send() == ["dead-lettered"]
    assert drafts_left(fleet, mailbox) == before + 1
    return id


def two_drafts(email: models.ClaimedEmail) -> None:
    """The worker dies between the draft and its record, twice: the second did not see the first."""
    make_draft(email)
    draft_recorded(email)


def test_a_draft_that_was_left_beside_the_one_that_was_sent_is_deleted(fleet: Fleet) -> None:
    # Given
    id = store(attachments=[file(fleet, "small", SMALL)])
    killed_after(fleet, id, two_drafts)
    fleet.settle(id)
    assert (sending(id), fleet.mails(id), drafts_left(fleet)) == ("sent", 1, 1)
    # When
    later()
    tidy_drafts()
    # Then the mail is where it was
    assert (drafts_left(fleet), email_row(id)["drafts_clean"]) == (0, True)
    assert [mail["isDraft"] for mail in fleet.graph.messages(SENDER, "sentitems")] == [False]


def test_a_mail_that_was_sent_at_its_first_attempt_costs_no_request(fleet: Fleet) -> None:
    store(attachments=[file(fleet, "small", SMALL)])
    fleet.send()
    before = len(fleet.graph.requests())
    later()
    tidy_drafts()
    assert len(fleet.graph.requests()) == before


def test_the_draft_of_a_mail_that_failed_is_kept_for_its_replay_and_then_deleted(fleet: Fleet) -> None:
    id = failed_with_a_draft(fleet)
    tidy_drafts()
    assert (drafts_left(fleet), email_row(id)["draft_id"] is None) == (1, False)
    later()
    tidy_drafts()
    assert (drafts_left(fleet), email_row(id)["draft_id"]) == (0, None)


def test_a_mail_whose_draft_was_deleted_is_sent_by_its_replay(fleet: Fleet) -> None:
    # Given
    id = failed_with_a_draft(fleet)
    later()
    tidy_drafts()
    # When its file is there after all
    rows("UPDATE incoming_emails SET payload = replace(payload::text, '&fail=404', '')::json")
    (letter,) = table("dlq")
    assert dead_letters.resolve(letter["id"], replayed=True, who="test")
    fleet.settle(id)
    # Then
    assert (sending(id), fleet.mails(id)) == ("sent", 1)
    # And what this attempt may have left is looked for again
    assert email_row(id)["drafts_clean"] is False


def test_a_mail_in_doubt_keeps_its_draft(fleet: Fleet) -> None:
    id = failed_with_a_draft(fleet)
    rows(
        "INSERT INTO sent_emails (id, incoming_email_id, status, intent_at) VALUES (%(id)s, %(id)s, 'in_doubt', now())",
        {"id": id},
    )
    later()
    tidy_drafts()
    assert drafts_left(fleet) == 1


def test_a_draft_that_is_all_there_is_of_a_sent_mail_is_left_alone(fleet: Fleet) -> None:
    # Given a mail that Graph has accepted and kept in Drafts, and that took two attempts
    fleet.graph.keep_in_drafts(operation="send_draft")
    id = store(attachments=[file(fleet, "small", SMALL)])
    killed_after(fleet, id, draft_recorded)
    fleet.settle(id)
    assert (sending(id), drafts_left(fleet)) == ("sent", 1)
    # When
    later()
    tidy_drafts()
    # Then
    assert drafts_left(fleet) == 1


def test_a_mail_that_is_replayed_as_its_draft_is_about_to_be_deleted_keeps_it(fleet: Fleet) -> None:
    # Given
    id = failed_with_a_draft(fleet)
    later()
    (leftover,) = leftovers.due(timedelta(days=1), 10)
    # When it is replayed after it was found
    (letter,) = table("dlq")
    assert dead_letters.resolve(letter["id"], replayed=True, who="test")
    # Then nothing is changed any more
    assert leftovers.let_go(leftover) == []
    assert not leftovers.is_unchanged(leftover)
    leftovers.record_look(leftover, clean=True)
    assert email_row(id)["drafts_clean"] is False


def half_uploaded_and_cancelled(fleet: Fleet) -> str:
    """A mail that ended in the middle of an upload: its draft and how far it came are there."""
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "large", LARGE)])
    killed_after(fleet, id, half_uploaded)
    rows("UPDATE incoming_emails SET status = 'cancelled', next_attempt_at = NULL")
    later()
    return id


def test_the_draft_of_a_mail_on_hold_and_how_far_its_uploads_came_stay_until_it_is_released(fleet: Fleet) -> None:
    # Given
    id = half_uploaded_and_cancelled(fleet)
    operations.hold(id, reason="a suit", who="cli:ann")
    before, requests = (email_row(id), table("file_uploads")), len(fleet.graph.requests())
    # When
    tidy_drafts()
    # Then it is not even asked for
    assert ((email_row(id), table("file_uploads")), len(fleet.graph.requests())) == (before, requests)
    assert drafts_left(fleet) == 1
    # And once it is released it goes
    operations.release(id, who="cli:ann")
    tidy_drafts()
    assert drafts_left(fleet) == 0


def test_a_hold_that_comes_once_a_mail_was_found_keeps_its_draft_and_how_far_its_uploads_came(fleet: Fleet) -> None:
    # Given
    id = half_uploaded_and_cancelled(fleet)
    (leftover,) = leftovers.due(timedelta(days=1), 10)
    before = table("file_uploads")
    # When
    operations.hold(id, reason=None, who="cli:ann")
    # Then
    assert leftovers.let_go(leftover) == []
    assert not leftovers.is_unchanged(leftover)
    assert (email_row(id)["draft_id"] is None, table("file_uploads")) == (False, before)


def test_a_hold_that_comes_before_a_draft_is_deleted_keeps_it(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    id = half_uploaded_and_cancelled(fleet)

    def hold(point: CrashPoint) -> None:
        if point is CrashPoint.TIDYING_LET_GO:
            operations.hold(id, reason=None, who="cli:ann")

    monkeypatch.setattr(runtime, "crash_point", hold)
    tidy_drafts()
    assert (drafts_left(fleet), email_row(id)["drafts_clean"]) == (1, False)


def test_whoever_lets_a_draft_go_waits_for_a_hold_that_is_being_placed(fleet: Fleet) -> None:
    # Given a hold that is not committed
    id = half_uploaded_and_cancelled(fleet)
    (leftover,) = leftovers.due(timedelta(days=1), 10)

    def let_go() -> None:
        leftovers.let_go(leftover)
        models.disconnect()

    thread = threading.Thread(target=let_go)
    with models.transaction():
        holds.place(id, reason=None, who="cli:ann")
        # When
        thread.start()
        support.wait_until("it waits", lambda: rows("SELECT 1 FROM pg_locks WHERE NOT granted"))
    thread.join()
    # Then
    assert email_row(id)["draft_id"] is not None


def test_a_draft_is_there_for_the_replay_that_comes_between_the_look_and_the_deletion(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    id = failed_with_a_draft(fleet)
    later()

    def replay(point: CrashPoint) -> None:
        if point is CrashPoint.TIDYING_LET_GO:
            (letter,) = table("dlq")
            assert dead_letters.resolve(letter["id"], replayed=True, who="test")

    # When
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "crash_point", replay)
        tidy_drafts()
    # Then
    assert (drafts_left(fleet), email_row(id)["drafts_clean"]) == (1, False)
    assert len(fleet.graph.requests(operation="find")) == 1
    assert fleet.graph.requests(operation="delete_message") == []


def test_a_replayed_mail_keeps_no_other_mail_of_its_mailbox_waiting(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given two mails of one mailbox, the first of which is replayed as the turn looks at it
    first, second = failed_with_a_draft(fleet), failed_with_a_draft(fleet, "second")
    later()
    rows("UPDATE incoming_emails SET updated_at = updated_at - interval '1 day' WHERE id = %(id)s", {"id": first})
    letter = next(row for row in table("dlq") if str(row["incoming_email_id"]) == first)

    def replay(point: CrashPoint) -> None:
        if point is CrashPoint.TIDYING_LET_GO:
            dead_letters.resolve(letter["id"], replayed=True, who="test")

    # When
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "crash_point", replay)
        tidy_drafts()
    # Then
    assert (drafts_left(fleet), email_row(second)["drafts_clean"]) == (1, True)


def test_an_upload_session_of_a_mail_that_is_given_up_is_ended_and_its_address_forgotten(fleet: Fleet) -> None:
    # Given
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "large", LARGE)])
    killed_after(fleet, id, half_uploaded)
    rows("UPDATE incoming_emails SET status = 'cancelled', next_attempt_at = NULL")
    # When
    later()
    tidy_drafts()
    # Then
    cancelled = [each["status"] for each in fleet.graph.requests(operation="cancel_upload_session")]
    assert cancelled == ["204"]
    assert {row["upload_session_info"] for row in table("file_uploads")} == {None}
    assert drafts_left(fleet) == 0


def test_the_address_of_a_session_that_has_ended_is_forgotten_whatever_its_mail_does(fleet: Fleet) -> None:
    # Given
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "large", LARGE)])
    fleet.graph.unavailable(operation="upload_range")
    fleet.send()
    ended = {"url": "https://graph.example/secret", "expires_at": "2020-01-01T00:00:00Z"}
    rows(
        "UPDATE file_uploads SET upload_session_info = %(ended)s WHERE filename = 'large'", {"ended": json.dumps(ended)}
    )
    # When
    tidy_drafts()
    assert {row["upload_session_info"] for row in table("file_uploads")} == {None}
    # Then the mail goes on with its draft, and with what is up
    before = calls(fleet)
    fleet.settle(id)
    assert attached(fleet, id) == expected(small=SMALL, large=LARGE)
    again = calls(fleet) - before
    assert (again["create_draft"], again["attach"], again["create_upload_session"]) == (0, 0, 1)


class Died(Exception):
    """Raised in the place of a death of the process."""


@pytest.mark.parametrize("line", [point for point in CrashPoint if point.startswith("tidying.")])
def test_whoever_dies_while_tidying_leaves_the_rest_to_the_next_turn_and_nothing_for_ever(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, line: CrashPoint
) -> None:
    # Given a draft beside one with an open session, of a mail that ended without being sent
    id = store(attachments=[file(fleet, "small", SMALL), file(fleet, "large", LARGE)])
    killed_after(fleet, id, make_draft)
    killed_after(fleet, id, half_uploaded)
    rows("UPDATE incoming_emails SET status = 'cancelled', next_attempt_at = NULL")
    later()
    assert drafts_left(fleet) == 2

    def die(point: CrashPoint) -> None:
        if point is line:
            raise Died

    # When
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "crash_point", die)
        with pytest.raises(Died):
            tidy_drafts()
    assert email_row(id)["drafts_clean"] is (line is CrashPoint.TIDYING_RECORDED)
    tidy_drafts()
    # Then
    assert (drafts_left(fleet), email_row(id)["drafts_clean"], email_row(id)["draft_id"]) == (0, True, None)
    assert {row["upload_session_info"] for row in table("file_uploads")} == {None}
    ended = len(fleet.graph.requests(operation="cancel_upload_session"))
    assert ended == (0 if line is CrashPoint.TIDYING_LET_GO else 1)


def test_a_refusal_that_nobody_foresaw_is_no_clean_mailbox_and_is_not_asked_for_ever(fleet: Fleet) -> None:
    # Given
    id = failed_with_a_draft(fleet)
    later()
    fleet.graph.fail(403, code="ErrorMessageSizeExceeded", operation="find")
    # When
    tidy_drafts()
    # Then it is looked for once more
    assert (drafts_left(fleet), email_row(id)["drafts_clean"]) == (1, False)
    later()
    tidy_drafts()
    assert (drafts_left(fleet), email_row(id)["drafts_clean"]) == (0, True)


@pytest.mark.parametrize(("status", "code"), [(403, "ErrorMessageSizeExceeded"), (404, "ErrorInvalidUser")])
def test_what_is_refused_again_and_again_is_given_up(fleet: Fleet, status: int, code: str) -> None:
    # Given
    id = failed_with_a_draft(fleet)
    later()
    fleet.graph.fail(status, code=code, operation="find", times=None)
    # When
    for _ in range(10):
        tidy_drafts()
        rows("UPDATE incoming_emails SET drafts_looked_at = drafts_looked_at - interval '2 days'")
        rows("UPDATE incoming_emails SET updated_at = updated_at - interval '1 day'")
    asked = len(fleet.graph.requests(operation="find"))
    # Then
    tidy_drafts()
    assert email_row(id)["drafts_clean"] is True
    assert len(fleet.graph.requests(operation="find")) == asked <= 10


def test_a_mailbox_without_a_slot_is_asked_by_the_next_turn(fleet: Fleet) -> None:
    # Given
    first, second = failed_with_a_draft(fleet), failed_with_a_draft(fleet, "second")
    later()
    slots = [runtime.limiter.acquire(SENDER) for _ in range(runtime.configuration.mailbox_concurrency)]
    # When
    tidy_drafts()
    assert drafts_left(fleet) == 2
    # Then
    for slot in slots:
        runtime.limiter.release(slot)
    tidy_drafts()
    assert (drafts_left(fleet), email_row(first)["drafts_clean"], email_row(second)["drafts_clean"]) == (0, True, True)


def test_a_mailbox_that_refuses_is_asked_once_in_a_turn_and_the_others_all_the_same(fleet: Fleet) -> None:
    # Given
    failed_with_a_draft(fleet), failed_with_a_draft(fleet, "second")
    other = failed_with_a_draft(fleet, "third", OTHER)
    later()
    fleet.graph.fail(403, code="ErrorAccessDenied", mailbox=SENDER, operation="find", times=None)
    # When
    tidy_drafts()
    # Then
    assert (len(fleet.graph.requests(SENDER, operation="find")), drafts_left(fleet, OTHER)) == (1, 0)
    assert email_row(other)["drafts_clean"] is True
    tidy_drafts()
    assert len(fleet.graph.requests(SENDER, operation="find")) == 1


def test_a_turn_ends_where_graph_is_out_of_reach(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given
    first, second = failed_with_a_draft(fleet), failed_with_a_draft(fleet, "second", OTHER)
    later()
    tried: list[str] = []
    out_of_reach = GraphClient(
        "https://127.0.0.1:1/v1.0", runtime.tokens, timeout=timedelta(seconds=2), tag_id=runtime.TAG
    )
    # When
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "graph", out_of_reach)
        patched.setattr(runtime, "crash_point", tried.append)
        tidy_drafts()
    # Then
    assert [point for point in tried if point.startswith("tidying.")] == [CrashPoint.TIDYING_LET_GO]
    tidy_drafts()
    assert (email_row(first)["drafts_clean"], email_row(second)["drafts_clean"]) == (True, True)


REFUSALS: dict[str, Callable[[Fleet], None]] = {
    "throttled": lambda fleet: fleet.graph.throttle(operation="find", retry_after="30"),
    "unavailable": lambda fleet: fleet.graph.unavailable(operation="find"),
    "paused": lambda fleet: runtime.limiter.pause(SENDER, LEASE) and None,
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_mailbox_that_refuses_for_now_is_looked_into_again(fleet: Fleet, refusal: str) -> None:
    # Given
    id = failed_with_a_draft(fleet)
    later()
    REFUSALS[refusal](fleet)
    # When
    tidy_drafts()
    assert (drafts_left(fleet), email_row(id)["drafts_clean"]) == (1, False)
    # Then
    rows("UPDATE mailboxes SET paused_until = NULL")
    runtime.redis.flushdb()
    keep_counts()
    later()
    tidy_drafts()
    assert (drafts_left(fleet), email_row(id)["drafts_clean"]) == (0, True)


def test_a_throttled_look_pauses_the_mailbox_for_everyone(fleet: Fleet) -> None:
    failed_with_a_draft(fleet)
    later()
    REFUSALS["throttled"](fleet)
    tidy_drafts()
    assert runtime.limiter.paused_until(SENDER) is not None
