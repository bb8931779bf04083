"""What is deleted when its retention has ended, a bounded batch at a time.

Of an email the row stays for good, without its content: its ``publisher_message_id`` must stay known, or a delivery
that comes late would be sent a second time. Nothing of an email on hold is touched, nor of one that is not settled.

A batch is one transaction: find what is past its retention, lock the emails it belongs to (see `models.holds`), delete
what is still not held, and write into the audit log how much that was. Rows that somebody has in hand are left to the
next batch.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

from models import audit
from models.database import rows, transaction
from models.holds import NOT_HELD
from models.ids import first_id

#: Rows of a batch.
BATCH = 1000
#: Sealed bytes of a batch of backups: PostgreSQL keeps a large one in thousands of pieces.
BATCH_BYTES = 256_000_000


class Kind(StrEnum):
    """What has a retention of its own kind."""

    BACKUPS = "backups"
    PAYLOADS = "payloads"
    EVENTS = "events"
    RECEIPTS = "receipts"
    DEAD_LETTERS = "dead_letters"
    MAILBOXES = "mailboxes"
    AUDIT = "audit"


class Purged(NamedTuple):
    """What a batch has deleted, and whether there may be more that is due."""

    rows: int
    more: bool


class _Statements(NamedTuple):
    """Of a kind: what is due, as keys with the sizes and the emails that they belong to; and its deletion by key."""

    due: str
    delete: str


_SETTLED = "e.status IN ('processed', 'failed', 'cancelled', 'expired')"

_OF = {
    Kind.BACKUPS: _Statements(
        f"""
        SELECT b.id::text, b.compressed_size, b.incoming_email_id::text FROM email_backups b
        WHERE b.expires_at <= now() AND {NOT_HELD.format(id="b.incoming_email_id")}
        ORDER BY b.expires_at LIMIT %(batch)s
        """,
        f"""
        WITH gone AS (
            DELETE FROM email_backups b
            WHERE b.id = ANY(%(keys)s::uuid[]) AND {NOT_HELD.format(id="b.incoming_email_id")}
            RETURNING b.incoming_email_id
        ), noted AS (
            UPDATE sent_emails SET backup_purged_at = now() FROM gone
            WHERE sent_emails.incoming_email_id = gone.incoming_email_id
        )
        SELECT 1 FROM gone
        """,
    ),
    # A mail that failed keeps its content as long as its dead letter may be replayed.
    Kind.PAYLOADS: _Statements(
        f"""
        SELECT e.id::text, 0, e.id::text FROM incoming_emails e
        WHERE {_SETTLED} AND e.payload_purged_at IS NULL AND e.updated_at < now() - %(retention)s
          AND {NOT_HELD.format(id="e.id")}
          AND NOT EXISTS (SELECT 1 FROM dlq d WHERE d.incoming_email_id = e.id AND d.status = 'open'
                                                AND d.queue_name <> 'backup')
        ORDER BY e.updated_at LIMIT %(batch)s
        """,
        f"""
        WITH emptied AS (
            UPDATE incoming_emails e SET payload = '{{"purged": true}}', payload_purged_at = now()
            WHERE e.id = ANY(%(keys)s::uuid[]) AND {_SETTLED} AND {NOT_HELD.format(id="e.id")} RETURNING e.id
        ), files AS (
            DELETE FROM file_uploads f USING emptied WHERE f.incoming_email_id = emptied.id
        )
        SELECT 1 FROM emptied
        """,
    ),
    # An event's id, as a receipt's, is as old as its email's.
    Kind.EVENTS: _Statements(
        f"""
        SELECT o.id::text, 0, e.id::text FROM outbox_events o JOIN incoming_emails e ON e.id = o.incoming_email_id
        WHERE o.id < %(oldest)s AND o.published_at < now() - %(retention)s AND {_SETTLED}
          AND {NOT_HELD.format(id="e.id")}
        ORDER BY o.id LIMIT %(batch)s
        """,
        f"""
        DELETE FROM outbox_events o WHERE o.id = ANY(%(keys)s::uuid[]) AND {NOT_HELD.format(id="o.incoming_email_id")}
        RETURNING 1
        """,
    ),
    Kind.RECEIPTS: _Statements(
        f"""
        SELECT r.incoming_email_id::text, 0, e.id::text
        FROM worker_receipts r JOIN incoming_emails e ON e.id = r.incoming_email_id
        WHERE r.incoming_email_id < %(oldest)s AND e.updated_at < now() - %(retention)s AND {_SETTLED}
          AND {NOT_HELD.format(id="e.id")}
        ORDER BY r.incoming_email_id LIMIT %(batch)s
        """,
        f"""
        DELETE FROM worker_receipts r
        WHERE r.incoming_email_id = ANY(%(keys)s::uuid[]) AND {NOT_HELD.format(id="r.incoming_email_id")} RETURNING 1
        """,
    ),
    # An open one is work that waits for an operator.
    Kind.DEAD_LETTERS: _Statements(
        f"""
        SELECT d.id::text, 0, d.incoming_email_id::text FROM dlq d
        WHERE d.status <> 'open' AND d.resolved_at < now() - %(retention)s
          AND {NOT_HELD.format(id="d.incoming_email_id")}
        ORDER BY d.resolved_at LIMIT %(batch)s
        """,
        f"""
        DELETE FROM dlq d WHERE d.id = ANY(%(keys)s::uuid[]) AND d.status <> 'open'
                            AND {NOT_HELD.format(id="d.incoming_email_id")}
        RETURNING 1
        """,
    ),
    # What says nothing that would not be so without it.
    Kind.MAILBOXES: _Statements(
        """
        SELECT mailbox, 0, NULL FROM mailboxes
        WHERE updated_at < now() - %(retention)s AND mailbox <> '*' AND limits = '{}' AND refusal_count = 0
          AND coalesce(paused_until <= now(), true) AND coalesce(full_until <= now(), true)
        ORDER BY mailbox LIMIT %(batch)s FOR UPDATE SKIP LOCKED
        """,
        "DELETE FROM mailboxes WHERE mailbox = ANY(%(keys)s) RETURNING 1",
    ),
    # What was done to an email on hold, or read of it, is part of what is held.
    Kind.AUDIT: _Statements(
        """
        SELECT a.id::text, 0, NULL FROM audit_log a
        WHERE a.at < now() - %(retention)s AND NOT EXISTS (
            SELECT 1 FROM holds
            WHERE holds.incoming_email_id::text IN (a.subject, a.detail->>'incoming_email_id'))
        ORDER BY a.at LIMIT %(batch)s
        """,
        "DELETE FROM audit_log WHERE id = ANY(%(keys)s::uuid[]) RETURNING 1",
    ),
}


def purge(kind: Kind, *, retention: timedelta, who: str, batch: int = BATCH) -> Purged:
    """Delete a batch of what is past its retention, with a word in the audit log. Safe to repeat, and to run twice.

    Args:
        retention: Not asked of backups: each has its own end, from when it was stored.
    """
    with transaction():
        due = _within_bytes(rows(_OF[kind].due, _due(retention, batch)))
        if not due:
            return Purged(0, more=False)
        keys = _lock(due)
        count = len(rows(_OF[kind].delete, {"keys": keys}))
        if count:
            audit.record(who, "purge", kind, count=count)
    return Purged(count, more=count > 0)


def count_due(kind: Kind, *, retention: timedelta, most: int) -> int:
    """Return how much is past its retention, at most ``most``."""
    return len(rows(_OF[kind].due, _due(retention, most)))


def _due(retention: timedelta, batch: int) -> dict[str, object]:
    return {"retention": retention, "oldest": first_id(datetime.now(UTC) - retention), "batch": batch}


def _within_bytes(due: list[tuple[str, int, str | None]]) -> list[tuple[str, str | None]]:
    taken: list[tuple[str, str | None]] = []
    total = 0
    for key, size, incoming_email_id in due:
        total += size
        if taken and total > BATCH_BYTES:
            break
        taken.append((key, incoming_email_id))
    return taken


def _lock(due: list[tuple[str, str | None]]) -> list[str]:
    """Lock the emails against holds; return the keys of those that nobody else has in hand and of what has no email."""
    ids = sorted({incoming_email_id for _, incoming_email_id in due if incoming_email_id})
    locked = {None} | {
        id
        for (id,) in rows(
            "SELECT e.id::text FROM incoming_emails e WHERE e.id = ANY(%(ids)s::uuid[]) ORDER BY e.id"
            " FOR UPDATE SKIP LOCKED",
            {"ids": ids},
        )
    }
    return [key for key, incoming_email_id in due if incoming_email_id in locked]
