"""Storing emails: once per publisher's id, with the event that says so."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import psycopg2
import pytest
import support
from support import WITHIN, arrival, everything, rows, seconds_until, send_email, store_many, table

import models
from contracts import EventType, event_id
from models import Arrival, Reception

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")


def store(*arrivals: Arrival) -> list[models.ingest.Stored]:
    return models.store(arrivals, publish_within=WITHIN)


def test_a_new_email_is_stored_with_its_event() -> None:
    # Given
    given = arrival(cc=["carl@example.org"], metadata={"tenant": "acme"}, priority="high")
    # When
    ((reception, id, event),) = store(given._replace(correlation_id="c-1", reply_to="answers", traceparent="00-a-b-01"))
    # Then
    (row,) = table("incoming_emails")
    assert reception is Reception.STORED
    assert (row["id"], row["status"], row["attempt_count"]) == (id, "received", 0)
    assert (row["mailbox"], row["tenant"], row["priority"]) == ("ann@example.com", "acme", 0)
    assert (row["recipient_count"], row["route"], row["next_attempt_at"]) == (2, "no-attachment", None)
    assert row["payload"] == send_email(cc=["carl@example.org"], metadata={"tenant": "acme"}, priority="high")
    assert event is not None
    assert (event.id, event.type) == (event_id(EventType.RECEIVED, id), "SendEmailReceived")
    assert (event.correlation_id, event.reply_to, event.traceparent) == ("c-1", "answers", "00-a-b-01")
    (stored,) = table("outbox_events")
    assert (stored["id"], stored["body"], stored["published_at"]) == (event.id, orjson.loads(event.body), None)
    assert 25 < seconds_until("outbox_events", "claimed_until", "id", event.id) <= 30


def test_storing_again_finds_the_rows_of_the_first_and_has_nothing_to_publish() -> None:
    (first,) = store(arrival())
    before = everything()
    (second,) = store(arrival())
    assert (second.reception, second.incoming_email_id, second.event) == (
        Reception.DUPLICATE,
        first.incoming_email_id,
        None,
    )
    assert everything() == before


def test_the_same_id_with_other_content_is_a_conflict_and_overwrites_nothing() -> None:
    (first,) = store(arrival())
    before = everything()
    (second,) = store(arrival(subject="Another"))
    assert (second.reception, second.incoming_email_id, second.event) == (
        Reception.CONFLICT,
        first.incoming_email_id,
        None,
    )
    assert everything() == before


def test_one_batch_may_hold_repeats_and_conflicts_and_is_answered_in_order() -> None:
    store(arrival(publisher_message_id="known"))
    results = store(
        arrival(publisher_message_id="new"),
        arrival(publisher_message_id="known"),
        arrival(publisher_message_id="new"),
        arrival(publisher_message_id="new", subject="Another"),
        arrival(publisher_message_id="known", subject="Another"),
        arrival(publisher_message_id="other"),
    )
    assert [result.reception.value for result in results] == [
        "stored",
        "duplicate",
        "duplicate",
        "conflict",
        "conflict",
        "stored",
    ]
    assert [result.event is not None for result in results] == [True, False, False, False, False, True]
    assert len({results[n].incoming_email_id for n in (0, 2, 3)}) == 1
    assert len(table("incoming_emails")) == len(table("outbox_events")) == 3


def test_an_email_without_an_id_is_known_by_its_content() -> None:
    first, second = store(arrival(publisher_message_id=None), arrival(publisher_message_id=None))
    assert (first.reception, second.reception) == (Reception.STORED, Reception.DUPLICATE)
    assert table("incoming_emails")[0]["publisher_message_id"].startswith("sha256:")


@pytest.mark.parametrize(("hours", "waits"), [(1, True), (-1, False)])
def test_mail_for_later_waits_and_mail_for_earlier_does_not(hours: int, waits: bool) -> None:
    store(arrival(send_at=(datetime.now(UTC) + timedelta(hours=hours)).isoformat()))
    assert (table("incoming_emails")[0]["next_attempt_at"] is not None) is waits


def test_overlapping_batches_in_opposite_order_neither_deadlock_nor_store_twice(tables: str) -> None:
    # Given two batches of the same emails in opposite order, which both have to wait for a third writer in the middle
    batch = [arrival(publisher_message_id=f"order-{n:02}") for n in range(20)]
    third = psycopg2.connect(tables)
    third.cursor().execute(
        """
        INSERT INTO incoming_emails (id, publisher_message_id, payload, content_hash, route, mailbox, recipient_count)
        VALUES (gen_random_uuid(), 'order-10', '{}', '', 'attachment', 'ann@example.com', 1)
        """
    )
    with ThreadPoolExecutor(2) as threads:
        stored = [threads.submit(store_in_a_thread, arrivals) for arrivals in (batch, batch[::-1])]
        support.wait_until("both wait", lambda: len(rows("SELECT 1 FROM pg_locks WHERE NOT granted")) == 2)
        # When
        third.rollback()
        third.close()
        results = [future.result(timeout=20) for future in stored]
    # Then
    assert sorted(results) == [["duplicate"] * 20, ["stored"] * 20]
    assert len(table("incoming_emails")) == len(table("outbox_events")) == 20


def store_in_a_thread(arrivals: list[Arrival]) -> list[str]:
    try:
        return [result.reception.value for result in store(*arrivals)]
    finally:
        models.disconnect()


def test_a_batch_is_stored_whole_or_not_at_all() -> None:
    # Given a batch of which one email cannot be stored
    unstorable = arrival(publisher_message_id="b")._replace(traceparent="\x00")
    # When
    with pytest.raises(ValueError, match="NUL"):
        store(arrival(publisher_message_id="a"), unstorable)
    # Then
    assert table("incoming_emails") == table("outbox_events") == []


def test_ids_grow_with_time() -> None:
    ids = [result.incoming_email_id for result in store_many(50)]
    later = [result.incoming_email_id for result in store(arrival(publisher_message_id="later"))]
    assert max(ids) < later[0]
    assert len(set(ids)) == 50


# Events


def claimed() -> list[Any]:
    return models.claim_unpublished(WITHIN)


def test_an_event_is_its_writers_until_its_time_is_over_and_then_one_sweeps() -> None:
    ((_, _, event),) = store(arrival()._replace(correlation_id="c-1"))
    assert claimed() == []
    rows("UPDATE outbox_events SET claimed_until = now()")
    (found,) = claimed()
    assert found._replace(body=b"") == event._replace(body=b"", type="SendEmailReceived")
    assert orjson.loads(found.body) == orjson.loads(event.body)
    assert claimed() == []


def test_a_published_event_is_claimed_by_nobody_and_keeps_the_first_time() -> None:
    ((_, _, event),) = store(arrival())
    models.mark_published([event.id])
    before = table("outbox_events")
    models.mark_published([event.id])
    rows("UPDATE outbox_events SET claimed_until = now()")
    assert claimed() == []
    assert table("outbox_events")[0]["published_at"] == before[0]["published_at"]


def test_an_event_that_exists_is_not_replaced() -> None:
    ((_, _, event),) = store(arrival())
    before = table("outbox_events")
    models.events.append([event._replace(body=b'{"other": 1}')], support.WITHIN)
    assert table("outbox_events") == before
