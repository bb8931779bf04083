"""Finding emails, dead letters and backups a page at a time, however many there are.

A page begins behind the last row of the page before, by an order that never changes: what is added or settled meanwhile
neither repeats a row nor hides one. Emails and backups come newest first, by their ids, which grow with time.

A filter that has an index is looked up in it. The others would cost every email an entry for each of its writes, so
rows are looked through instead, and a page ends after `LOOKED_THROUGH` of them, full or not. The next goes on there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from models.backups import LISTED, StoredBackup
from models.database import rows
from models.ids import first_id
from models.states import Sending, Status

#: Rows that one page may cost: a few hundredths of a second.
LOOKED_THROUGH = 10_000
_FIRST, _LAST = "00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"


@dataclass(frozen=True, slots=True)
class EmailFilter:
    """Which emails an operator means. Empty fields do not narrow.

    Attributes:
        in_doubt: Only those whose send may or may not have happened.
        error: A part of the last error, in any case.
        since: Taken in at this instant or later, by the clock of the bridge,
        until: and before this one.
    """

    status: Status | None = None
    in_doubt: bool = False
    mailbox: str | None = None
    tenant: str | None = None
    publisher_message_id: str | None = None
    error: str | None = None
    since: datetime | None = None
    until: datetime | None = None


class ListedEmail(NamedTuple):
    """An email in a list: what is known of it besides is told by `inspection.everything_about`."""

    incoming_email_id: str
    publisher_message_id: str
    status: str
    in_doubt: bool
    route: str
    mailbox: str
    tenant: str | None
    attempt_count: int
    next_attempt_at: datetime | None
    last_error: str | None
    created_at: datetime
    updated_at: datetime


class EmailPage(NamedTuple):
    """Emails, and the id before which the next page begins; None: there are no more."""

    emails: list[ListedEmail]
    more_before: str | None


class BackupPage(NamedTuple):
    """Backups, else as `EmailPage`."""

    backups: list[StoredBackup]
    more_before: str | None


_IN_FLIGHT = "SELECT id FROM incoming_emails WHERE lease_until IS NOT NULL"
_UNCERTAIN = "SELECT incoming_email_id FROM sent_emails WHERE status IN ('sending', 'in_doubt')"
_OF_STATUS = {
    Status.DISPATCHED: f"e.id = ANY(ARRAY({_IN_FLIGHT}))",
    Status.PROCESSING: f"e.id = ANY(ARRAY({_IN_FLIGHT} UNION ALL {_UNCERTAIN}))",
    **{outcome: f"e.status = '{outcome}'" for outcome in (Status.FAILED, Status.CANCELLED, Status.EXPIRED)},
}
_IN_DOUBT = f"e.id = ANY(ARRAY(SELECT incoming_email_id FROM sent_emails WHERE status = '{Sending.IN_DOUBT}'))"

# Compared directly, an order by id would have every email read that came later.
_NAMED = "e.id = ANY(ARRAY(SELECT id FROM incoming_emails WHERE publisher_message_id = %(publisher_message_id)s))"

_EMAILS = """
    SELECT e.id::text, e.publisher_message_id, e.status,
           EXISTS (SELECT FROM sent_emails s WHERE s.incoming_email_id = e.id AND s.status = 'in_doubt'),
           e.route, e.mailbox, e.tenant, e.attempt_count, e.next_attempt_at, e.last_error, e.created_at, e.updated_at
    FROM incoming_emails e
"""
_NARROWED = """
      AND (%(status)s::text IS NULL OR e.status = %(status)s)
      AND (%(mailbox)s::text IS NULL OR e.mailbox = %(mailbox)s)
      AND (%(tenant)s::text IS NULL OR e.tenant = %(tenant)s)
      AND (%(error)s::text IS NULL OR position(%(error)s IN lower(e.last_error)) > 0)
"""
_RANGE = "{id} >= %(first)s::uuid AND {id} < %(before)s::uuid"
_EMAIL_RANGE, _BACKUP_RANGE = _RANGE.format(id="e.id"), _RANGE.format(id="b.id")


def emails(
    filter: EmailFilter, *, limit: int, before: str | None = None, look_through: int = LOOKED_THROUGH
) -> EmailPage:
    """Return at most ``limit`` emails that match, newest first; fewer are not the last as long as there is more.

    Args:
        before: Where the page before has ended.
    """
    first = first_id(filter.since) if filter.since else _FIRST
    last = first_id(filter.until) if filter.until else _LAST
    parameters = {
        "status": filter.status,
        "mailbox": filter.mailbox.lower() if filter.mailbox else None,
        "tenant": filter.tenant,
        "error": filter.error.lower() if filter.error else None,
        "publisher_message_id": filter.publisher_message_id,
        "first": first,
        "before": min(before or _LAST, last),
        "limit": limit,
    }
    source = f"WHERE {_source(filter)} AND {_EMAIL_RANGE}"
    narrowed = any(parameters[name] is not None for name in ("status", "mailbox", "tenant", "error"))
    end = _look("incoming_emails e", "e.id", source, parameters, look_through) if narrowed else None
    statement = f"{_EMAILS} {source} {_NARROWED} ORDER BY e.id DESC LIMIT %(limit)s"
    found = [ListedEmail(*row) for row in rows(statement, {**parameters, "first": end or first})]
    return EmailPage(found, found[-1].incoming_email_id if len(found) == limit else end)


def _source(filter: EmailFilter) -> str:
    """Return the condition that an index answers."""
    if filter.publisher_message_id is not None:
        return _NAMED
    if filter.in_doubt:
        return _IN_DOUBT
    return _OF_STATUS.get(filter.status, "true") if filter.status else "true"


def backups(*, mailbox: str | None, limit: int, before: str | None = None) -> BackupPage:
    """Return at most ``limit`` backups, of one mailbox or of all, else as `emails`."""
    parameters = {
        "mailbox": mailbox.lower() if mailbox else None,
        "first": _FIRST,
        "before": before or _LAST,
        "limit": limit,
    }
    source = f"WHERE {_BACKUP_RANGE}"
    end = _look("email_backups b", "b.id", source, parameters, LOOKED_THROUGH) if mailbox else None
    statement = f"""
        {LISTED} {source} AND (%(mailbox)s::text IS NULL OR e.mailbox = %(mailbox)s)
        ORDER BY b.id DESC LIMIT %(limit)s
    """
    found = [StoredBackup(*row) for row in rows(statement, {**parameters, "first": end or _FIRST})]
    return BackupPage(found, found[-1].id if len(found) == limit else end)


def _look(table: str, id: str, source: str, parameters: Mapping[str, Any], count: int) -> str | None:
    """Return the id of the last row that is looked at for this page; None: there are not that many."""
    statement = f"SELECT {id}::text FROM {table} {source} ORDER BY {id} DESC OFFSET %(look)s LIMIT 1"
    found = rows(statement, {**parameters, "look": count - 1})
    return found[0][0] if found else None
