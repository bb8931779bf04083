"""Reading for people: everything that is known of one email, and how much of what is waiting."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from models.database import reading, rows
from models.ids import as_uuid
from models.states import Sending
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


def find_email(id: str) -> str | None:
    """Return the email's id, given that or the publisher's."""
    found = rows(
        "SELECT id::text FROM incoming_emails WHERE id = %(uuid)s OR publisher_message_id = %(id)s",
        {"id": id, "uuid": as_uuid(id)},
    )
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


class Backlog(NamedTuple):
    """How much is waiting, in the whole fleet; ``oldest_waiting``: when the oldest that could go out now was made."""

    by_status: dict[str, int]
    oldest_waiting: datetime | None
    in_doubt: int
    unpublished_events: int
    open_dead_letters: int
    backups_due: int
    mailboxes_refusing: int
    mailboxes_full: int


# Each condition is that of an index that leaves out what is settled, which may be millions of rows; no mail meets two.
_WAITING = f"""
    SELECT status, count(*), min(created_at) FILTER (
               WHERE status = 'received' AND (next_attempt_at IS NULL OR next_attempt_at <= now())
           )
    FROM (
        SELECT status, created_at, next_attempt_at FROM incoming_emails WHERE {TO_SEND}
        UNION ALL
        SELECT status, created_at, next_attempt_at FROM incoming_emails WHERE status = 'processing' AND {READY}
        UNION ALL
        SELECT status, created_at, next_attempt_at FROM incoming_emails WHERE next_attempt_at IS NOT NULL
        UNION ALL
        SELECT status, created_at, next_attempt_at FROM incoming_emails
        WHERE lease_until IS NOT NULL AND next_attempt_at IS NULL
    ) unsettled
    GROUP BY status
"""

# Each condition is that of a partial index here, too.
_UNFINISHED = """
    SELECT (SELECT count(*) FROM sent_emails WHERE status = %(in_doubt)s),
           (SELECT count(*) FROM outbox_events WHERE published_at IS NULL),
           (SELECT count(*) FROM dlq WHERE status = 'open'),
           (SELECT count(*) FROM sent_emails WHERE backup_due_at <= now() AND backup_lease_until IS NULL),
           (SELECT count(*) FROM mailboxes WHERE refusal_count > 0),
           (SELECT count(*) FROM mailboxes WHERE full_until > now())
"""


def backlog() -> Backlog:
    """Count what has not come to its end. What has is not counted: its number only grows."""
    waiting = rows(_WAITING)
    found = rows(_UNFINISHED, {"in_doubt": Sending.IN_DOUBT})
    by_status = {status: count for status, count, _ in waiting}
    oldest = min((created_at for *_, created_at in waiting if created_at), default=None)
    return Backlog(by_status, oldest, *found[0])
