"""An email in a worker's hands: who holds it, and what each outcome changes, all at once or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

import orjson
import pytest
import support
from support import (
    LEASE,
    NOW,
    WITHIN,
    claim,
    dispatch,
    email_row,
    everything,
    lapse,
    make_due,
    seconds_until,
    sending,
    store,
    table,
)

import models
from models import ClaimedEmail, LeaseLost, Route, claims, rows, scheduling, uploads
from models.claims import MAX_ERROR_CHARACTERS

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")

MINUTE = timedelta(minutes=1)
FILE = {"name": "a.pdf", "size": 5, "urlOrId": "https://files.example/a.pdf"}


def record_sent(email: ClaimedEmail, **given: Any) -> Any:
    return email.record_sent(backup_delay=MINUTE, publish_within=WITHIN, **given)


def fail(email: ClaimedEmail, **given: Any) -> Any:
    letter = {"message_id": str(uuid.uuid4()), "queue_name": "send_plain", "actor_name": "send_plain"}
    return email.fail(**{"reason": "invalid_recipient", "error": "400", "publish_within": WITHIN, **letter, **given})


OUTCOMES: dict[str, Callable[[ClaimedEmail], Any]] = {
    "renew": lambda email: email.renew(LEASE),
    "record_draft": lambda email: email.record_draft("draft-1"),
    "start_over": lambda email: email.start_over("another"),
    "record_intent": lambda email: email.record_intent(LEASE, "draft-1"),
    "record_sent": lambda email: record_sent(email),
    "mark_in_doubt": lambda email: email.mark_in_doubt(look_again_in=MINUTE, evidence={"seen": "timeout"}),
    "settle_as_not_sent": lambda email: email.settle_as_not_sent({"seen": "nothing"}),
    "snooze": lambda email: email.snooze(MINUTE, "busy"),
    "retry": lambda email: email.retry(MINUTE, "503"),
    "fail": lambda email: fail(email),
}


# Claiming


def test_a_claim_takes_the_lease_writes_one_receipt_and_tells_the_worker_everything() -> None:
    # Given
    id = store(cc=["carl@example.org"], subject="Hello")
    # When
    email = claim(id, intent=False)
    # Then
    assert (email.id, email.publisher_message_id, email.mailbox) == (id, "order-1", "ann@example.com")
    assert (email.recipient_count, email.attempt, email.in_doubt_for, email.intended) == (2, 1, None, False)
    assert email.payload["subject"] == "Hello"
    row = email_row(id)
    assert row["status"] == "processing"
    assert 110 < seconds_until("incoming_emails", "lease_until", "id", id) <= 120
    assert [(r["incoming_email_id"], r["attempt"], r["acknowledged_at"]) for r in table("worker_receipts")] == [
        (id, 1, None)
    ]
    assert row["lease_token"] not in repr(email)


def test_a_second_claimant_gets_nothing_and_changes_nothing() -> None:
    id = store()
    claim(id)
    before = everything()
    assert ClaimedEmail.claim(id, 1, route=Route.PLAIN, lease=LEASE, intent=True) is None
    assert everything() == before


@pytest.mark.parametrize("attempt", [0, 1, 3])
def test_a_dispatch_of_another_attempt_claims_nothing(attempt: int) -> None:
    # Given an email in its second attempt
    id = store()
    claim(id).retry(NOW, "503")
    make_due(id)
    with scheduling.sweep():
        scheduling.wake_due()
    dispatch()
    before = everything()
    # Then
    assert ClaimedEmail.claim(id, attempt, route=Route.PLAIN, lease=LEASE, intent=True) is None
    assert everything() == before
    assert ClaimedEmail.claim(id, 2, route=Route.PLAIN, lease=LEASE, intent=True) is not None


def test_what_was_not_dispatched_or_does_not_exist_cannot_be_claimed() -> None:
    assert ClaimedEmail.claim(store(), 0, route=Route.PLAIN, lease=LEASE, intent=True) is None
    assert ClaimedEmail.claim(str(uuid.uuid4()), 1, route=Route.PLAIN, lease=LEASE, intent=True) is None


def test_a_dispatch_that_came_to_another_routes_queue_claims_nothing() -> None:
    id = store()
    dispatch()
    assert ClaimedEmail.claim(id, 1, route=Route.ATTACHED, lease=LEASE, intent=False) is None
    assert email_row(id)["status"] == "dispatched"


def test_a_receipt_is_written_once_even_if_a_snoozed_attempt_is_claimed_again() -> None:
    id = store()
    claim(id).snooze(NOW, "busy")
    make_due(id)
    with scheduling.sweep():
        scheduling.wake_due()
    claim(id)
    scheduling.acknowledge_receipts([(id, 1), (id, 7)])
    scheduling.acknowledge_receipts([(id, 1)])
    (receipt,) = table("worker_receipts")
    assert receipt["attempt"] == 1
    assert receipt["acknowledged_at"] is not None


def test_the_intent_is_committed_with_the_claim_only_where_asked_for() -> None:
    first, second = store(publisher_message_id="a"), store(publisher_message_id="b")
    claim(first, intent=True)
    assert ClaimedEmail.claim(second, 1, route=Route.PLAIN, lease=LEASE, intent=False) is not None
    assert (sending(first), sending(second)) == ("sending", None)


# The lease


@pytest.mark.parametrize("outcome", sorted(OUTCOMES))
def test_a_worker_that_lost_its_lease_changes_nothing(outcome: str) -> None:
    # Given a worker whose lease ran out, and another that took the email over
    id = store(attachments=[FILE])
    late = claim(id, intent=False)
    uploads.plan(late, late.payload["attachments"])
    lapse(id)
    current = claim(id, intent=False)
    before = everything()
    # When
    with pytest.raises(LeaseLost, match=id):
        OUTCOMES[outcome](late)
    # Then
    assert everything() == before
    OUTCOMES["record_intent"](current)
    record_sent(current)
    assert sending(id) == "sent"


@pytest.mark.parametrize("outcome", sorted(OUTCOMES))
def test_a_worker_whose_lease_was_taken_back_changes_nothing_although_nobody_took_over(outcome: str) -> None:
    id = store()
    late = claim(id)
    lapse(id)
    before = everything()
    with pytest.raises(LeaseLost):
        OUTCOMES[outcome](late)
    assert everything() == before


@pytest.mark.parametrize("outcome", ["record_sent", "mark_in_doubt", "settle_as_not_sent", "snooze", "retry", "fail"])
def test_an_outcome_ends_the_lease_so_that_only_one_can_be_recorded(outcome: str) -> None:
    id = store()
    email = claim(id)
    OUTCOMES[outcome](email)
    before = everything()
    assert (email_row(id)["lease_token"], email_row(id)["lease_until"]) == (None, None)
    for other in OUTCOMES.values():
        with pytest.raises(LeaseLost):
            other(email)
    assert everything() == before


@pytest.mark.parametrize("outcome", sorted(OUTCOMES))
def test_each_change_is_one_statement(outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a database that counts transactions
    id = store()
    email = claim(id, intent=outcome != "record_intent")
    statements: list[str] = []
    execute = models.database.execute_sql

    def counted(sql: str, *parameters: Any) -> Any:
        if not sql.startswith("PREPARE"):  # once for each connection, and changes nothing
            statements.append(sql)
        return execute(sql, *parameters)

    monkeypatch.setattr(models.database, "execute_sql", counted)
    # When
    OUTCOMES[outcome](email)
    # Then
    assert len(statements) == 1


def test_renewing_keeps_the_email_for_another_lease() -> None:
    id = store()
    email = claim(id, lease=timedelta(seconds=5))
    email.renew(timedelta(minutes=10))
    assert seconds_until("incoming_emails", "lease_until", "id", id) > 590


# Outcomes


def test_a_sent_email_is_processed_with_its_event_and_its_backup_due() -> None:
    # Given
    id = store()
    at = datetime(2026, 2, 13, 12, 0, tzinfo=UTC)
    # When
    (event,) = record_sent(claim(id), graph_message_id="m-1", sent_at=at, evidence={"seen": "202"})
    # Then
    row, (sent,) = email_row(id), table("sent_emails")
    assert (row["status"], row["last_error"], row["attempt_count"]) == ("processed", None, 1)
    assert (sent["status"], sent["graph_message_id"]) == ("sent", "m-1")
    assert datetime.fromisoformat(sent["sent_at"]) == at
    assert sent["response_metadata"]["evidence"][0]["seen"] == "202"
    assert 55 < seconds_until("sent_emails", "backup_due_at", "incoming_email_id", id) <= 90
    (stored,) = [row for row in table("outbox_events") if row["type"] == "SendEmailSent"]
    assert stored["id"] == event.id
    assert stored["published_at"] is None
    assert orjson.loads(event.body) == stored["body"]
    assert stored["body"]["status"] == "sent"


def test_a_retry_spends_an_attempt_and_a_snooze_gives_it_back() -> None:
    for outcome, attempts in (("snooze", 0), ("retry", 1)):
        id = store(publisher_message_id=outcome)
        OUTCOMES[outcome](claim(id))
        row = email_row(id)
        assert (row["status"], row["attempt_count"]) == ("received", attempts)
        assert 55 < seconds_until("incoming_emails", "next_attempt_at", "id", id) <= 60
        assert row["last_error"]


@pytest.mark.parametrize("outcome", ["snooze", "retry", "fail"])
def test_an_intent_is_withdrawn_where_it_is_proven_that_nothing_was_sent(outcome: str) -> None:
    id = store()
    OUTCOMES[outcome](claim(id))
    assert sending(id) is None


@pytest.mark.parametrize(("outcome", "status"), [("snooze", "processing"), ("retry", "processing"), ("fail", "failed")])
def test_an_email_in_doubt_stays_in_doubt_whatever_the_look_up_ended_with(outcome: str, status: str) -> None:
    # Given
    id = in_doubt()
    email = claim(id)
    assert email.in_doubt_for is not None
    # When
    OUTCOMES[outcome](email)
    # Then
    assert (sending(id), email_row(id)["status"]) == ("in_doubt", status)


def test_being_in_doubt_costs_no_attempt_and_keeps_every_evidence() -> None:
    id = in_doubt()
    for n in range(3):
        make_due(id)
        with scheduling.sweep():
            scheduling.wake_due()
        claim(id).mark_in_doubt(look_again_in=MINUTE, evidence={"seen": f"look {n}"})
    (sent,) = table("sent_emails")
    assert [entry["seen"] for entry in sent["response_metadata"]["evidence"]] == [
        "timeout",
        "look 0",
        "look 1",
        "look 2",
    ]
    assert email_row(id)["attempt_count"] == 1


def test_an_email_found_absent_is_ready_at_once_and_a_new_intent_keeps_the_evidence() -> None:
    # Given
    id = in_doubt()
    claim(id).settle_as_not_sent({"seen": "0 sent, 0 drafts"})
    assert (sending(id), email_row(id)["next_attempt_at"]) == ("not_sent", None)
    # When it is claimed to be sent again, and refused by the limiter
    email = claim(id)
    assert (email.in_doubt_for, email.attempt, sending(id)) == (None, 2, "sending")
    email.snooze(MINUTE, "busy")
    # Then it may be sent again, and what was seen of the first send is still known
    (sent,) = table("sent_emails")
    assert sent["status"] == "not_sent"
    assert [entry["seen"] for entry in sent["response_metadata"]["evidence"]] == ["timeout", "0 sent, 0 drafts"]
    make_due(id)
    with scheduling.sweep():
        scheduling.wake_due()
    assert claim(id).in_doubt_for is None


def test_a_failed_email_has_exactly_one_dead_letter_and_one_event() -> None:
    # Given
    id = store()
    email = claim(id)
    # When
    (event,) = fail(email, message_id="message-1")
    # Then
    assert email_row(id)["status"] == "failed"
    (letter,) = table("dlq")
    assert (letter["incoming_email_id"], letter["reason"], letter["attempts"]) == (id, "invalid_recipient", 1)
    assert (letter["status"], letter["mailbox"], letter["message_id"]) == ("open", "ann@example.com", "message-1")
    failed = [row for row in table("outbox_events") if row["type"] == "SendEmailFailed"]
    assert [row["id"] for row in failed] == [event.id]
    assert failed[0]["body"]["reason"] == "invalid_recipient"


def test_a_dead_letter_that_rabbitmq_told_of_first_is_completed_instead_of_repeated() -> None:
    from models import dead_letters

    id = store()
    email = claim(id)
    copy = dead_letters.Copy("message-1", "send_plain", "send_plain", id, "actor_failed", "given up", b"{}")
    assert dead_letters.mirror([copy]) == [copy]
    fail(email, message_id="message-1")
    assert dead_letters.mirror([copy]) == []
    (letter,) = table("dlq")
    assert (letter["reason"], letter["attempts"], letter["body"]) == ("invalid_recipient", 1, "\\x7b7d")


def test_a_long_error_is_cut() -> None:
    id = store()
    claim(id).retry(NOW, "x" * 5000)
    assert len(email_row(id)["last_error"]) == MAX_ERROR_CHARACTERS


def test_a_send_is_dated_by_postgresqls_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Behind(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) - timedelta(minutes=5)

    email = claim(store())
    monkeypatch.setattr(claims, "datetime", Behind)
    email.record_sent(backup_delay=NOW, publish_within=WITHIN)
    assert rows("SELECT now() - sent_at < interval '1 minute' FROM sent_emails") == [(True,)]


def test_a_sent_email_ends_the_refusals_of_its_mailbox() -> None:
    from models import mailboxes

    mailboxes.refuse("ann@example.com", why="403", first_wait=NOW, longest_wait=NOW)
    id = store()
    record_sent(claim(id))
    assert table("mailboxes")[0]["refusal_count"] == 0


def test_a_replay_frees_an_email_in_doubt_and_no_later_doubt_of_it() -> None:
    from models import dead_letters

    # Given an email that was given up in doubt, and replayed
    id = in_doubt()
    fail(claim(id))
    dead_letters.resolve(table("dlq")[0]["id"], replayed=True, who="olga")
    email = claim(id)
    assert (email.replayed_for is not None, email.attempt) == (True, 1)
    # When its send is begun once more and is in doubt again
    email.repeat_intent(LEASE, "draft-1", evidence={"seen": "0 sent, 1 drafts"})
    email.mark_in_doubt(look_again_in=NOW, evidence={"seen": "timeout"})
    # Then that doubt is held like any other
    scheduling.wake_due()
    assert claim(id).replayed_for is None


def test_a_send_that_is_begun_again_is_as_fresh_a_doubt() -> None:
    id = in_doubt()
    rows("UPDATE sent_emails SET intent_at = now() - interval '1 hour'")
    email = claim(id)
    assert email.in_doubt_for is not None
    assert email.in_doubt_for > timedelta(minutes=59)
    email.repeat_intent(LEASE, "draft-1", evidence={"seen": "0 sent, 1 drafts"})
    email.mark_in_doubt(look_again_in=NOW, evidence={"seen": "timeout"})
    scheduling.wake_due()
    again = claim(id).in_doubt_for
    assert again is not None
    assert again < timedelta(minutes=1)


def test_a_send_that_is_begun_again_by_a_worker_that_dies_is_in_doubt_from_the_end_of_its_lease() -> None:
    id = in_doubt()
    claim(id).repeat_intent(LEASE, "draft-1", evidence={"seen": "0 sent, 1 drafts"})
    lapse(id)
    again = claim(id).in_doubt_for
    assert again is not None
    assert -LEASE <= again < -LEASE + timedelta(minutes=1)


def test_the_doubt_begins_with_the_lost_answer_however_long_the_call_took() -> None:
    id = store()
    email = claim(id, intent=True)
    rows("UPDATE sent_emails SET intent_at = now() - interval '1 hour'")
    email.mark_in_doubt(look_again_in=NOW, evidence={"seen": "timeout"})
    scheduling.wake_due()
    found = claim(id).in_doubt_for
    assert found is not None
    assert found < timedelta(minutes=1)


def test_of_endless_looks_the_send_and_the_newest_are_kept() -> None:
    id = in_doubt()
    for n in range(models.claims.MAX_EVIDENCE + 5):
        make_due(id)
        scheduling.wake_due()
        claim(id).mark_in_doubt(look_again_in=MINUTE, evidence={"seen": f"look {n}"})
    (sent,) = table("sent_emails")
    seen = [entry["seen"] for entry in sent["response_metadata"]["evidence"]]
    assert len(seen) == models.claims.MAX_EVIDENCE
    assert (seen[0], seen[1], seen[-1]) == ("timeout", "look 6", f"look {models.claims.MAX_EVIDENCE + 4}")


def test_a_send_whose_worker_died_can_be_traced_at_graph_by_its_id() -> None:
    id = store()
    email = claim(id, intent=True)
    lapse(id)
    (sent,) = table("sent_emails")
    (seen,) = sent["response_metadata"]["evidence"]
    assert (seen["client_request_id"], seen["asked"]) == (email.send_id, "send")


def test_an_email_that_is_given_up_again_after_a_replay_is_told_of_once() -> None:
    from models import dead_letters

    id = store()
    (event,) = fail(claim(id), message_id="message-1")
    dead_letters.resolve(table("dlq")[0]["id"], replayed=True, who="olga")
    assert fail(claim(id), message_id="message-2") == []
    assert [row["id"] for row in table("outbox_events") if row["type"] == "SendEmailFailed"] == [event.id]


def test_an_email_that_came_too_late_is_expired_and_told_once() -> None:
    id = store(expires_at="2030-01-01T00:00:00Z")
    (event,) = claim(id).expire(WITHIN)
    assert (email_row(id)["status"], sending(id), event.type) == ("expired", None, "SendEmailExpired")
    assert [row["type"] for row in table("outbox_events")].count("SendEmailExpired") == 1


# Recovery points


def test_a_draft_that_is_forgotten_takes_its_uploads_along() -> None:
    id = store(attachments=[FILE])
    email = claim(id, intent=False)
    email.record_draft("draft-1")
    (upload,) = uploads.plan(email, [FILE])
    upload.session_url, upload.uploaded_bytes = "https://graph.example/session", 3
    uploads.record_progress(email, upload, lease=LEASE)
    lapse(id)
    again = claim(id, intent=False)
    assert again.draft_id == "draft-1"
    (known,) = uploads.plan(again, [FILE])
    assert (known.session_url, known.uploaded_bytes, known.uploaded) == ("https://graph.example/session", 3, False)
    again.start_over(None)
    assert (email_row(id)["draft_id"], table("file_uploads")) == (None, [])


def test_progress_of_an_upload_renews_the_lease_and_obeys_it() -> None:
    # Given
    id = store(attachments=[FILE])
    email = claim(id, intent=False, lease=timedelta(seconds=5))
    (upload,) = uploads.plan(email, [FILE])
    # When
    upload.uploaded, upload.uploaded_bytes, upload.session_url = True, 5, "https://graph.example/secret"
    uploads.record_progress(email, upload, lease=LEASE)
    # Then
    assert seconds_until("incoming_emails", "lease_until", "id", id) > 100
    assert table("file_uploads")[0]["upload_session_info"] is None
    # When the lease is lost
    lapse(id)
    before = everything()
    with pytest.raises(LeaseLost):
        uploads.record_progress(email, upload, lease=LEASE)
    assert everything() == before


def test_planning_uploads_twice_makes_each_row_once_in_order() -> None:
    files = [FILE, FILE | {"name": "b.pdf", "size": 7}]
    email = claim(store(attachments=files), intent=False)
    assert uploads.plan(email, files) == uploads.plan(email, files)
    assert [(row["position"], row["filename"], row["size"]) for row in rows_of_uploads()] == [
        (0, "a.pdf", 5),
        (1, "b.pdf", 7),
    ]


def rows_of_uploads() -> list[dict[str, Any]]:
    return sorted(table("file_uploads"), key=lambda row: row["position"])


# Leases that ran out


@pytest.mark.parametrize(
    ("state", "status", "attempts", "sending_status"),
    [
        ("dispatched", "received", 0, None),
        ("processing without intent", "received", 1, None),
        ("processing with intent", "processing", 1, "in_doubt"),
        ("in doubt and dispatched again", "processing", 1, "in_doubt"),
        ("in doubt and claimed again", "processing", 1, "in_doubt"),
    ],
)
def test_what_a_dead_worker_held_is_taken_back(
    state: str, status: str, attempts: int, sending_status: str | None
) -> None:
    # Given
    if state.startswith("in doubt"):
        id = in_doubt()
        dispatch()
        if "claimed" in state:
            claim(id)
    else:
        id = store()
        dispatch()
        if state.startswith("processing"):
            claim(id, intent=state.endswith("with intent"))
    # When
    lapse(id)
    # Then
    row = email_row(id)
    assert (row["status"], row["attempt_count"], sending(id)) == (status, attempts, sending_status)
    assert (row["lease_until"], row["lease_token"], row["next_attempt_at"]) == (None, None, None)
    assert [claimed.incoming_email_id for claimed in dispatch()] == [id]


def test_a_lease_that_runs_is_left_alone() -> None:
    id = store()
    claim(id)
    before = everything()
    with scheduling.sweep():
        assert scheduling.expire_leases() == []
    assert everything() == before


def in_doubt() -> str:
    """An email whose send got no answer and whose look-up is due."""
    id = store()
    claim(id).mark_in_doubt(look_again_in=NOW, evidence={"asked": "send", "seen": "timeout"})
    make_due(id)
    with scheduling.sweep():
        scheduling.wake_due()
    return id
