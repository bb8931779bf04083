"""What is to be sent from each mailbox, as the tables know it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import support
from support import LEASE, SENDER, claim, dispatch, rows, store, store_many

from models import Route, mailboxes, workload
from models.database import database as connection
from models.turns import EVERY
from models.workload import Waiting

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")

SMALL, RANGE, JSON = 3_000_000, 3_932_160, 1_000


def waiting(**bounds: int) -> list[Waiting]:
    return workload.waiting(small_bytes=SMALL, attach_json_bytes=JSON, range_bytes=RANGE, **bounds)


def only() -> Waiting:
    (found,) = waiting()
    return found


def a_file(size: int) -> dict[str, Any]:
    return {"name": "file.bin", "size": size, "urlOrId": "https://files.example.com/1"}


def test_nothing_waits() -> None:
    assert waiting() == []


def test_emails_are_counted_by_mailbox_and_route_the_mailbox_with_most_first() -> None:
    store_many(3, **{"from": "zoe@example.com"})
    store(publisher_message_id="a")
    store(publisher_message_id="b", attachments=[a_file(1)])
    assert [(each.mailbox, each.plain, each.attached) for each in waiting()] == [
        ("zoe@example.com", 3, 0),
        (SENDER, 1, 1),
    ]
    assert [each.mailbox for each in waiting(most_mailboxes=1)] == ["zoe@example.com"]


def test_recipients_count_as_external_unless_it_is_known_better() -> None:
    store(publisher_message_id="a", to=["b@x.example", "c@x.example"])
    store(publisher_message_id="b", to=["b@x.example", "c@x.example", "d@y.example"])
    rows("UPDATE incoming_emails SET external_recipient_count = 1 WHERE publisher_message_id = 'b'")
    assert (only().recipients, only().external_recipients) == (5, 3)


def test_files_cost_their_bytes_and_the_requests_that_bring_them_up() -> None:
    without = store(publisher_message_id="a")
    (payload_bytes,) = rows(
        "SELECT octet_length(payload::text) FROM incoming_emails WHERE id = %(id)s", {"id": without}
    )[0]
    assert (only().upload_bytes, only().attach_requests) == (payload_bytes, 0)
    files = [a_file(size) for size in (0, SMALL, SMALL + 1, RANGE, RANGE + 1)]
    store(publisher_message_id="b", attachments=files)
    # One, one, session and range, session and range, session and two ranges.
    assert only().attach_requests == 1 + 1 + 2 + 2 + 3
    in_base64 = JSON + JSON + SMALL // 3 * 4
    assert 0 < only().upload_bytes - in_base64 - sum(file["size"] for file in files[2:]) - payload_bytes < 2000


def test_mail_that_is_not_due_is_told_with_its_first_mean_and_last_instant() -> None:
    now = datetime.now(UTC)
    for hours in (1, 2, 9):
        store(publisher_message_id=str(hours), send_at=(now + timedelta(hours=hours)).isoformat())
    store(publisher_message_id="now")
    found = only()
    assert (found.plain, found.later) == (4, 3)
    assert found.due_in is not None
    for due_in, hours in zip(found.due_in, (1, 4, 9), strict=True):
        assert abs(due_in - timedelta(hours=hours)) < timedelta(minutes=1)


def test_what_is_reserved_or_over_or_in_doubt_is_not_to_be_sent() -> None:
    ids = [store(publisher_message_id=str(number)) for number in range(5)]
    # Given one that is sent, one that failed, one in doubt, and one that is on its way
    claim(ids[0]).record_sent(backup_delay=LEASE, publish_within=LEASE)
    claim(ids[1]).mark_in_doubt(look_again_in=LEASE, evidence={"asked": "send", "seen": "nothing"})
    rows("UPDATE incoming_emails SET status = 'failed', lease_until = NULL WHERE id = %(id)s", {"id": ids[2]})
    rows("UPDATE incoming_emails SET reserved_at = now() WHERE id = %(id)s", {"id": ids[3]})
    # Then one is left, whether it was dispatched or not
    assert only().plain == 1


def test_files_of_mail_in_flight_are_still_to_go_up() -> None:
    store(attachments=[a_file(10)])
    dispatch(Route.ATTACHED)
    rows("UPDATE incoming_emails SET reserved_at = now()")
    assert (only().attached, only().attach_requests) == (1, 1)


def test_a_pause_by_hand_holds_mail_and_one_with_an_end_delays_it() -> None:
    store_many(2)
    mailboxes.pause(SENDER, timedelta(hours=1), why="Graph asked to wait")
    assert timedelta(minutes=59) < only().paused_for < timedelta(minutes=61)
    assert (only().plain, only().paused) == (2, 0)
    mailboxes.pause_by_hand(SENDER, why="holiday", who="tests")
    assert (only().plain, only().recipients, only().paused) == (0, 0, 2)
    mailboxes.resume(SENDER)
    assert (only().plain, only().paused, only().paused_for) == (2, 0, timedelta())
    mailboxes.pause_by_hand(EVERY, why="everything", who="tests")
    assert (only().plain, only().paused, only().paused_for) == (0, 2, timedelta())


def test_a_paused_route_holds_its_mail_alone() -> None:
    store(publisher_message_id="a")
    store(publisher_message_id="b", attachments=[a_file(1)])
    mailboxes.pause_route(Route.ATTACHED, why="a tunnel", who="tests")
    assert (only().plain, only().attached, only().paused, only().attach_requests) == (1, 0, 1, 0)


def test_a_route_that_is_paused_for_a_while_delays_its_mail() -> None:
    store(attachments=[a_file(1)])
    mailboxes.pause_route(Route.ATTACHED, why="a tunnel", who="tests", wait=timedelta(hours=1))
    assert (only().attached, only().paused) == (1, 0)
    assert timedelta(minutes=59) < only().paused_for < timedelta(minutes=61)


def test_from_a_sample_the_rest_is_taken_to_be_alike() -> None:
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    store_many(40, to=["b@x.example", "c@x.example"], attachments=[a_file(100)])
    for number in range(40):
        store(publisher_message_id=f"later-{number}", to=["b@x.example", "c@x.example"], send_at=later)
    (found,) = waiting(sample=4)
    assert (found.plain, found.attached, found.later, found.recipients) == (40, 40, 40, 160)
    assert found.attach_requests == 40


def test_how_long_a_send_takes_is_the_median_of_the_latest() -> None:
    assert workload.send_duration() is None
    for number, seconds in enumerate((1, 2, 60)):
        id = store(publisher_message_id=str(number))
        claim(id).record_sent(backup_delay=LEASE, publish_within=LEASE)
        rows(
            "UPDATE sent_emails SET sent_at = intent_at + %(took)s WHERE incoming_email_id = %(id)s",
            {"id": id, "took": timedelta(seconds=seconds)},
        )
    assert workload.send_duration() == timedelta(seconds=2)


# The cost


@pytest.fixture
def backlog(database: str) -> None:
    """10,000 ready emails of 100 mailboxes, half as many that are not due, and 185,000 that are done."""
    rows(
        """
        INSERT INTO incoming_emails (id, publisher_message_id, payload, content_hash, status, route, mailbox,
                                     recipient_count, next_attempt_at)
        SELECT gen_random_uuid(), n::text, '{}', '', CASE WHEN n > 15000 THEN 'processed' ELSE 'received' END,
               'no-attachment', 'm' || mod(n, 100) || '@example.com', 1,
               CASE WHEN n <= 5000 THEN now() + interval '1 hour' END
        FROM generate_series(1, 200000) AS n
        """
    )
    rows("ANALYZE")


@contextmanager
def explained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the plans of what is executed in the block."""
    plans: list[str] = []
    execute = connection.execute_sql

    def explain(sql: str, parameters: object = None) -> object:
        if "incoming_emails" in sql:
            plans.append("\n".join(line for (line,) in execute("EXPLAIN " + sql, parameters).fetchall()))
        return execute(sql, parameters)

    with monkeypatch.context() as patch:
        patch.setattr(connection, "execute_sql", explain)
        yield plans


def test_what_is_done_costs_nothing(backlog: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with explained(monkeypatch) as plans:
        found = waiting(sample=500)
    assert (len(found), sum(each.plain for each in found), sum(each.later for each in found)) == (100, 15_000, 5_000)
    assert "Seq Scan on incoming_emails" not in plans[0]
    for index in ("incoming_emails_lanes", "incoming_emails_due", "incoming_emails_leased"):
        assert index in plans[0]
