"""Cancelling: who wins when an operator and a worker want the same email, and what the one who loses is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
import support
from operator_support import give_up
from support import LEASE, WITHIN, claim, dispatch, email_row, everything, make_due, rows, sending, store, table

import models
from models import ClaimedEmail, Route, cancelling, scheduling
from models.cancelling import Cancelled, NotCancellable
from models.scheduling import Pick

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")

HOUR = timedelta(hours=1)


def cancel(id: str) -> Cancelled | None:
    return cancelling.cancel(id, publish_within=WITHIN)


def in_an_hour() -> str:
    return (datetime.now(UTC) + HOUR).isoformat()


def found_absent(id: str) -> None:
    claim(id).mark_in_doubt(look_again_in=support.NOW, evidence={"seen": "timeout"})
    look_up_due(id)
    claim(id).settle_as_not_sent({"seen": "nothing"})


def look_up_due(id: str) -> None:
    make_due(id)
    with scheduling.sweep():
        scheduling.wake_due()


def dispatched_for_a_look_up(id: str) -> None:
    claim(id).mark_in_doubt(look_again_in=support.NOW, evidence={"seen": "timeout"})
    look_up_due(id)
    assert [dispatched.incoming_email_id for dispatched in dispatch()] == [id]


def expire(id: str) -> None:
    rows("UPDATE incoming_emails SET expires_at = now() WHERE id = %(id)s", {"id": id})
    with scheduling.sweep():
        scheduling.expire_overdue(WITHIN)


WAITING: dict[str, Callable[[str], Any]] = {
    "ready": lambda id: None,
    "snoozed": lambda id: claim(id).snooze(HOUR, "429"),
    "to be retried": lambda id: claim(id).retry(HOUR, "503"),
    "dispatched": lambda id: dispatch(),
    "dispatched, and nobody took it up": lambda id: (dispatch(), make_due(id)),
    "found absent": found_absent,
}
OUT_OF_REACH: dict[str, tuple[Callable[[str], Any], str]] = {
    "in a worker's hands": (claim, "a worker has it in hand"),
    "in a dead worker's hands": (lambda id: (claim(id), make_due(id)), "a worker has it in hand"),
    "in doubt": (
        lambda id: claim(id).mark_in_doubt(look_again_in=HOUR, evidence={"seen": "timeout"}),
        "may have been sent",
    ),
    "dispatched for a look-up": (dispatched_for_a_look_up, "may have been sent"),
    "sent": (lambda id: claim(id).record_sent(backup_delay=HOUR, publish_within=WITHIN), "it is sent"),
    "expired": (expire, "it has expired"),
}


@pytest.mark.parametrize("state", WAITING)
def test_what_waits_is_cancelled_its_publisher_told_and_never_dispatched_again(state: str) -> None:
    # Given
    id = store()
    WAITING[state](id)
    # When
    cancelled = cancel(id)
    # Then
    assert cancelled is not None
    event = cancelled.event
    assert (event.type, event.incoming_email_id) == ("SendEmailCancelled", id)
    told = orjson.loads(event.body)
    assert (told["publisher_message_id"], told["status"], "cancelled_at" in told) == ("order-1", "cancelled", True)
    assert [row["type"] for row in table("outbox_events") if row["published_at"] is None].count(event.type) == 1
    row = email_row(id)
    assert [row[name] for name in ("status", "lease_token", "lease_until", "next_attempt_at")] == [
        "cancelled",
        None,
        None,
        None,
    ]
    look_up_due(id)
    assert dispatch() == []


def test_mail_that_is_not_to_be_sent_yet_is_cancelled_before_its_time() -> None:
    id = store(send_at=in_an_hour())
    assert cancel(id)
    assert (email_row(id)["status"], email_row(id)["next_attempt_at"]) == ("cancelled", None)


def test_a_dispatch_that_comes_late_claims_nothing() -> None:
    id = store()
    dispatch()
    cancel(id)
    before = everything()
    assert ClaimedEmail.claim(id, 1, route=Route.PLAIN, lease=LEASE, intent=True) is None
    assert everything() == before


def test_the_send_budget_of_a_dispatch_is_told_so_that_it_can_be_given_back() -> None:
    id = store(cc=["carl@example.org"])
    with scheduling.sweep():
        scheduling.claim(Route.PLAIN, [Pick(id, support.SENDER, 1_760_000_000_123)], capacity=1, lease=LEASE)
    cancelled = cancel(id)
    assert cancelled is not None
    assert cancelled[1:] == (support.SENDER, 2, 2, 1_760_000_000_123)


def test_what_a_former_dispatch_had_reserved_is_not_given_back_twice() -> None:
    id = store()
    with scheduling.sweep():
        scheduling.claim(Route.PLAIN, [Pick(id, support.SENDER, 1_760_000_000_123)], capacity=1, lease=LEASE)
    support.lapse(id)
    cancelled = cancel(id)
    assert cancelled is not None
    assert cancelled.reserved_at_ms is None


def test_a_look_back_at_an_absent_mail_stays_as_evidence_and_its_draft_in_the_mailbox() -> None:
    id = store()
    claim(id, intent=False).record_draft("draft-1")
    support.lapse(id)
    cancel(id)
    assert email_row(id)["draft_id"] == "draft-1"
    other = store(publisher_message_id="order-2")
    found_absent(other)
    cancel(other)
    assert sending(other) == "not_sent"


@pytest.mark.parametrize("state", OUT_OF_REACH)
def test_what_is_or_may_be_sent_or_has_ended_is_refused_with_the_reason_and_left_alone(state: str) -> None:
    prepare, reason = OUT_OF_REACH[state]
    id = store()
    prepare(id)
    before = everything()
    with pytest.raises(NotCancellable, match=reason):
        cancel(id)
    assert everything() == before


def test_a_failed_email_is_discarded_by_its_dead_letter_instead() -> None:
    id = give_up()
    with pytest.raises(NotCancellable, match="discard that"):
        cancel(id)


def test_cancelling_twice_tells_the_publisher_once() -> None:
    id = store()
    assert cancel(id)
    before = everything()
    assert cancel(id) is None
    assert everything() == before


# Races


def test_of_a_worker_and_an_operator_exactly_one_gets_the_email() -> None:
    winners = []
    with ThreadPoolExecutor(2) as threads:
        for number in range(60):
            id = store(publisher_message_id=f"order-{number}")
            dispatch()
            start = threading.Barrier(2)
            claimed = threads.submit(_after, start, _claim, id)
            cancelled = threads.submit(_after, start, _cancel, id)
            worker, operator = claimed.result(), cancelled.result()
            assert worker != operator
            assert email_row(id)["status"] == ("processing" if worker else "cancelled")
            assert sending(id) == ("sending" if worker else None)
            winners.append(worker)
    types = [row["type"] for row in table("outbox_events")]
    assert types.count("SendEmailCancelled") == winners.count(False)


def _after(start: threading.Barrier, act: Callable[[str], bool], id: str) -> bool:
    start.wait()
    return act(id)


def _claim(id: str) -> bool:
    return ClaimedEmail.claim(id, 1, route=Route.PLAIN, lease=LEASE, intent=True) is not None


def _cancel(id: str) -> bool:
    try:
        return cancel(id) is not None
    except NotCancellable:
        return False


def test_of_two_operators_exactly_one_cancels() -> None:
    with ThreadPoolExecutor(2) as threads:
        for number in range(30):
            id = store(publisher_message_id=f"order-{number}")
            start = threading.Barrier(2)
            both = [threads.submit(_after, start, _cancel, id) for _ in range(2)]
            assert sorted(each.result() for each in both) == [False, True]
    assert [row["type"] for row in table("outbox_events")].count("SendEmailCancelled") == 30


def test_an_email_that_is_cancelled_while_it_is_dispatched_goes_to_no_worker() -> None:
    with ThreadPoolExecutor(2) as threads:
        for number in range(30):
            id = store(publisher_message_id=f"order-{number}")
            start = threading.Barrier(2)
            dispatched = threads.submit(_after, start, lambda _: bool(dispatch()), id)
            cancelled = threads.submit(_after, start, _cancel, id)
            dispatched.result()
            assert cancelled.result()
            assert (email_row(id)["status"], email_row(id)["lease_until"]) == ("cancelled", None)
            assert not _claim(id)


def test_what_came_into_doubt_while_the_operator_waited_for_it_is_refused() -> None:
    """The operator's statement began before there was a sending, and gets the row when there is one in doubt."""
    # Given
    id = store()
    dispatch()
    with ThreadPoolExecutor(1) as threads:
        # When a worker claims the email, loses the answer and has it dispatched for the look-up, all in front of him
        with models.transaction():
            claimed = ClaimedEmail.claim(id, 1, route=Route.PLAIN, lease=LEASE, intent=True)
            assert claimed is not None
            cancelled = threads.submit(cancel, id)
            support.wait_until("the operator waits", _somebody_waits_for_a_lock)
            claimed.mark_in_doubt(look_again_in=support.NOW, evidence={"seen": "timeout"})
            rows("UPDATE incoming_emails SET status = 'dispatched', lease_until = now(), next_attempt_at = NULL")
        # Then
        with pytest.raises(NotCancellable, match="may have been sent"):
            cancelled.result()


def _somebody_waits_for_a_lock() -> bool:
    waiting = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    rows("SELECT pg_stat_clear_snapshot()")
    return bool(rows(waiting))
