"""Finding emails a page at a time: what is read for it is bounded, whatever is asked for and however many there are."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import support
from operator_support import give_up
from support import rows

from models import finding, transaction
from models.finding import EmailFilter
from models.ids import first_id, new_id
from models.states import Status

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")


def found(**filter: Any) -> list[str]:
    return [email.incoming_email_id for email in finding.emails(EmailFilter(**filter), limit=100).emails]


def processed(count: int) -> None:
    """Emails of another mailbox that are sent and settled, and newer than those before."""
    rows(
        """
        INSERT INTO incoming_emails (id, publisher_message_id, payload, content_hash, status, route, mailbox,
                                     recipient_count)
        SELECT ('ffffffff-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'processed ' || n, '{}', '', 'processed',
               'no-attachment', 'bo@example.com', 1
        FROM generate_series(1, %(count)s) AS n
        """,
        {"count": count},
    )


def test_an_id_of_an_instant_lies_between_those_of_before_and_after() -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    assert first_id(before) < new_id() < first_id(datetime.now(UTC) + timedelta(milliseconds=1))
    assert first_id(datetime(1, 1, 1, tzinfo=UTC)) < first_id(before) < first_id(datetime(9999, 12, 31, tzinfo=UTC))


def test_a_page_ends_after_what_it_may_look_through_and_the_next_goes_on() -> None:
    # Given
    ids = [support.store(publisher_message_id=f"mine-{n}") for n in range(2)]
    processed(9)
    # When
    pages, before = [], None
    while True:
        page = finding.emails(EmailFilter(mailbox="ann@example.com"), limit=100, before=before, look_through=4)
        pages.append([email.incoming_email_id for email in page.emails])
        if (before := page.more_before) is None:
            break
    # Then
    assert pages == [[], [], ids[::-1]]


def test_an_email_in_flight_is_found_by_its_status_before_and_after_its_claim() -> None:
    id = support.store()
    support.dispatch()
    assert (found(status=Status.DISPATCHED), found(status=Status.PROCESSING)) == ([id], [])
    support.claim(id)
    assert (found(status=Status.DISPATCHED), found(status=Status.PROCESSING)) == ([], [id])


_READ = """
    SELECT relname, pg_stat_get_xact_tuples_returned(oid) FROM pg_class
    WHERE relname ~ '^incoming_emails' AND relkind IN ('r', 'i')
"""


def read_for(filter: EmailFilter) -> dict[str, int]:
    """How many entries of each index of emails, or rows of their table, are read to find what is asked for."""
    with transaction():
        before = dict(rows(_READ))
        finding.emails(filter, limit=10, look_through=100)
        return {name: read - before[name] for name, read in rows(_READ) if read > before[name]}


@pytest.mark.parametrize("analyzed", [False, True], ids=["never analyzed", "analyzed"])
def test_each_filter_reads_a_bounded_part_of_an_index(analyzed: bool) -> None:
    # Given
    give_up()
    doubted = support.store(publisher_message_id="doubted")
    support.claim(doubted).mark_in_doubt(look_again_in=support.WITHIN, evidence={})
    support.store(publisher_message_id="dispatched")
    support.dispatch()
    processed(1000)
    if analyzed:
        rows("ANALYZE incoming_emails, sent_emails")
    # Then
    # What may be looked through is read twice. Entries of rows that are gone are read, and planning looks at the ends.
    few, looked_through = 40, 210
    for filter, indexes, most in (
        (EmailFilter(), {"pkey"}, looked_through),
        (EmailFilter(mailbox="ann@example.com", error="none"), {"pkey"}, looked_through),
        (EmailFilter(since=datetime(2999, 1, 1, tzinfo=UTC)), {"pkey"}, few),
        (EmailFilter(publisher_message_id="order-1"), {"publisher_message_id_key", "pkey"}, few),
        (EmailFilter(status=Status.FAILED), {"outcomes", "pkey"}, few),
        (EmailFilter(status=Status.FAILED, mailbox="ann@example.com"), {"outcomes", "pkey"}, few),
        (EmailFilter(status=Status.DISPATCHED), {"leased", "pkey"}, few),
        (EmailFilter(status=Status.PROCESSING), {"leased", "pkey"}, few),
        (EmailFilter(status=Status.PROCESSED), {"pkey"}, looked_through),
        (EmailFilter(in_doubt=True), {"pkey"}, few),
    ):
        read = read_for(filter)
        assert {name.removeprefix("incoming_emails_") for name in read} <= indexes, filter
        assert sum(read.values()) <= most, (filter, read)
