"""Reading for people: everything that is known of one email, and how much of what is waiting."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from models.database import reading, rows
from models.ids import as_uuid
from models.tables import (
    DeadLetter,
    EmailBackup,
    FileUpload,
    Hold,
    IncomingEmail,
    OutboxEvent,
    SentEmail,
    WorkerReceipt,
)
from models.turns import READY, TO_SEND


class KnownAs(NamedTuple):
    """The ids by which others know an email."""

    publisher_message_id: str | None = None
    correlation_id: str | None = None
    traceparent: str | None = None


def known_as(incoming_email_id: str | None) -> KnownAs:
    """Return by which ids others know an email; nothing if there is none."""
    found = rows(
        "SELECT publisher_message_id, correlation_id, traceparent FROM incoming_emails WHERE id = %(id)s",
        {"id": incoming_email_id},
    )
    return KnownAs(*found[0]) if found else KnownAs()


# Not one condition with an OR: that would read a whole index.
_FIND = """
    SELECT id::text FROM (
        SELECT id, 1 AS place FROM incoming_emails WHERE id = %(uuid)s
        UNION ALL
        SELECT id, 2 FROM incoming_emails WHERE publisher_message_id = %(id)s
    ) AS found ORDER BY place LIMIT 1
"""


def find_email(id: str) -> str | None:
    """Return the email's id, given that or the publisher's: a publisher may have named its mail after another's id."""
    found = rows(_FIND, {"id": id, "uuid": as_uuid(id)})
    return found[0][0] if found else None


def everything_about(incoming_email_id: str) -> dict[str, Any]:
    """Return what every table knows of an email, without its content: plain values, instants as datetimes."""
    with reading():
        email = IncomingEmail.get_by_id(incoming_email_id)
        sent = SentEmail.get_or_none(SentEmail.incoming_email == incoming_email_id)
        return {
            "incoming_email_id": incoming_email_id,
            **_fields(
                email,
                "publisher_message_id status route mailbox tenant recipient_count correlation_id attempt_count"
                " next_attempt_at expires_at lease_until last_error created_at updated_at",
            ),
            "payload_purged_at": email.payload_purged_at,
            "hold": _hold(incoming_email_id),
            "sending": _sending(sent) if sent else None,
            "uploads": _each(FileUpload, incoming_email_id, "filename size uploaded_bytes status updated_at"),
            "receipts": _each(WorkerReceipt, incoming_email_id, "attempt received_at acknowledged_at"),
            "events": _each(OutboxEvent, incoming_email_id, "type created_at published_at"),
            "backups": _each(
                EmailBackup,
                incoming_email_id,
                "id graph_message_id size compressed_size checksum created_at expires_at",
            ),
            "dead_letters": _each(
                DeadLetter, incoming_email_id, "id status queue_name reason attempts last_error created_at resolved_by"
            ),
        }


def _hold(incoming_email_id: str) -> dict[str, Any] | None:
    held = Hold.get_or_none(Hold.incoming_email == incoming_email_id)
    return _fields(held, "reason placed_by placed_at") if held else None


def _sending(sent: SentEmail) -> dict[str, Any]:
    names = "status graph_message_id intent_at sent_at backup_due_at backup_attempt_count backup_error backup_purged_at"
    return {**_fields(sent, names), "evidence": sent.response_metadata.get("evidence", [])}


def _each(table: Any, incoming_email_id: str, names: str) -> list[dict[str, Any]]:
    columns = [getattr(table, name) for name in names.split()]
    order = table.created_at if hasattr(table, "created_at") else table.received_at
    found = table.select(*columns).where(table.incoming_email == incoming_email_id).order_by(order)
    return [_fields(row, names) for row in found]


def _fields(row: Any, names: str) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names.split()}


#: So many rows are counted in a tenth of a second. Of more mail that waits PostgreSQL's own estimate is told, which it
#: makes anew whenever a tenth has changed; of anything else it is enough to know that they are many.
COUNTED = 100_000
#: So many lanes are looked at for the oldest mail, also in a tenth of a second.
_LANES = 10_000


class Backlog(NamedTuple):
    """How much is waiting, in the whole fleet; ages are None where nothing waits.

    ``oldest_waiting`` is when the oldest that could go out now was made. Of anything `COUNTED` are counted at most.
    """

    by_status: dict[str, int]
    oldest_waiting: datetime | None
    #: By route, and ``backup``.
    in_flight: dict[str, int]
    uploads_in_hand: int
    uploaded_bytes_in_hand: int
    remaining_bytes_in_hand: int
    dead_letters_by_reason: dict[str, int]
    in_doubt: int
    oldest_doubt: datetime | None
    unpublished_events: int
    oldest_event: datetime | None
    open_dead_letters: int
    undelivered_notices: int
    backups_due: int
    oldest_backup_due: datetime | None
    mailboxes_refusing: int
    mailboxes_full: int
    mailboxes_paused: int


# Each condition is that of an index that leaves out what is settled, which may be millions of rows; no mail meets two.
# What is met is bounded, for what waits may be millions too.
_WAITING = f"""
    SELECT status, sum(CASE WHEN count < %(counted)s OR index IS NULL THEN count ELSE greatest(count, (
               SELECT reltuples FROM pg_class WHERE oid = index::regclass)) END)::bigint
    FROM (
        SELECT 'received' AS status, count(*) AS count, 'incoming_emails_lanes' AS index
        FROM (SELECT 1 FROM incoming_emails WHERE {TO_SEND} LIMIT %(counted)s) AS ready
        UNION ALL
        SELECT status, count(*), NULL
        FROM (SELECT status FROM incoming_emails WHERE status = 'processing' AND {READY} LIMIT %(counted)s) AS doubted
        GROUP BY status
        UNION ALL
        SELECT status, count(*), 'incoming_emails_due'
        FROM (SELECT status FROM incoming_emails WHERE next_attempt_at IS NOT NULL LIMIT %(counted)s) AS later
        GROUP BY status
        UNION ALL
        SELECT status, count(*), NULL
        FROM (SELECT status FROM incoming_emails WHERE lease_until IS NOT NULL AND next_attempt_at IS NULL
              LIMIT %(counted)s) AS leased
        GROUP BY status
    ) AS unsettled
    GROUP BY status
"""

_LANE = "route, mailbox, coalesce(tenant, ''), priority"
_OF_E = "e.route, e.mailbox, coalesce(e.tenant, ''), e.priority"
# The first of each lane, whose ids grow with time: a step in the index for each instead of one for each mail.
_OLDEST = f"""
    WITH RECURSIVE lanes (route, mailbox, tenant, priority, created_at, number) AS (
        (SELECT {_LANE}, created_at, 1 FROM incoming_emails WHERE {TO_SEND} ORDER BY {_LANE}, id LIMIT 1)
        UNION ALL
        SELECT following.*, number + 1 FROM lanes, LATERAL (
            SELECT {_OF_E}, e.created_at FROM incoming_emails e
            WHERE {TO_SEND} AND ({_OF_E}) > (lanes.route, lanes.mailbox, lanes.tenant, lanes.priority)
            ORDER BY {_OF_E}, e.id LIMIT 1
        ) AS following WHERE number < {_LANES}
    )
    SELECT least(
        (SELECT min(created_at) FROM lanes),
        (SELECT min(created_at) FROM (
            SELECT created_at FROM incoming_emails
            WHERE next_attempt_at <= now() AND status = 'received' LIMIT %(counted)s) AS due)
    )
"""

# Each condition is that of a partial index here, too.
_UNFINISHED = """
    SELECT (SELECT count(*) FROM sent_emails WHERE status = 'in_doubt'),
           (SELECT min(intent_at) FROM sent_emails WHERE status = 'in_doubt'),
           (SELECT count(*) FROM (SELECT 1 FROM outbox_events WHERE published_at IS NULL LIMIT %(counted)s) AS events),
           (SELECT min(created_at) FROM
                (SELECT created_at FROM outbox_events WHERE published_at IS NULL LIMIT %(counted)s) AS events),
           (SELECT count(*) FROM (SELECT 1 FROM dlq WHERE status = 'open' LIMIT %(counted)s) AS letters),
           (SELECT count(*) FROM dead_letter_notices WHERE deliver_at IS NOT NULL),
           (SELECT count(*) FROM (
               SELECT 1 FROM sent_emails WHERE backup_due_at <= now() AND backup_lease_until IS NULL LIMIT %(counted)s
           ) AS due),
           (SELECT min(backup_due_at) FROM sent_emails WHERE backup_due_at <= now() AND backup_lease_until IS NULL),
           (SELECT count(*) FROM mailboxes WHERE refusal_count > 0),
           (SELECT count(*) FROM mailboxes WHERE full_until > now()),
           (SELECT count(*) FROM mailboxes WHERE paused_until > now())
"""

_IN_FLIGHT = """
    SELECT route, count(*) FROM incoming_emails WHERE lease_until IS NOT NULL GROUP BY route
    UNION ALL SELECT 'backup', count(*) FROM sent_emails WHERE backup_lease_until IS NOT NULL
"""

_UPLOADS = """
    SELECT count(*) FILTER (WHERE u.status <> 'uploaded'), coalesce(sum(u.uploaded_bytes), 0)::bigint,
           coalesce(sum(u.size - u.uploaded_bytes), 0)::bigint
    FROM incoming_emails e JOIN file_uploads u ON u.incoming_email_id = e.id WHERE e.lease_until IS NOT NULL
"""

_REASONS = """
    SELECT reason, count(*) FROM (SELECT reason FROM dlq WHERE status = 'open' LIMIT %(counted)s) AS letters
    GROUP BY reason
"""


def backlog(counted: int = COUNTED) -> Backlog:
    """Count what has not come to its end. What has is not counted: its number only grows.

    Args:
        counted: No more than so many of anything.
    """
    bound = {"counted": counted}
    by_status, oldest = dict(rows(_WAITING, bound)), rows(_OLDEST, bound)[0][0]
    in_flight, reasons = dict(rows(_IN_FLIGHT)), dict(rows(_REASONS, bound))
    return Backlog._make([by_status, oldest, in_flight, *rows(_UPLOADS)[0], reasons, *rows(_UNFINISHED, bound)[0]])
