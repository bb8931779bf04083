"""The archive's rows: due, leased, stored once per Graph message.

The bytes arrive sealed. A backup that is repeated finds the row of the first and leaves it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from models.database import rows
from models.dead_letters import RECORD
from models.ids import as_uuid, new_id


class Sealed(NamedTuple):
    """A sealed MIME message with its measures: sizes in bytes, ``checksum`` the SHA-256 of the plain MIME in hex."""

    blob: bytes
    compression: str
    size: int
    compressed_size: int
    checksum: str
    key_id: str


@dataclass(frozen=True, slots=True)
class ClaimedBackup:
    """A sent email whose archive copy this worker is to make."""

    incoming_email_id: str
    publisher_message_id: str
    mailbox: str
    graph_message_id: str | None
    received_at: datetime
    attempt: int

    @classmethod
    def claim(cls, incoming_email_id: str, attempt: int, *, lease: timedelta) -> ClaimedBackup | None:
        """Take a dispatched backup: the attempt begins. None if it is stored, given up or another attempt's."""
        found = rows(
            """
            UPDATE sent_emails s
            SET backup_attempt_count = %(attempt)s, backup_lease_until = now() + %(lease)s, updated_at = now()
            FROM incoming_emails e
            WHERE s.incoming_email_id = %(id)s AND e.id = s.incoming_email_id AND s.backup_due_at IS NOT NULL
              AND s.backup_attempt_count = %(attempt)s - 1 AND s.backup_lease_until IS NOT NULL
            RETURNING e.id::text, e.publisher_message_id, e.mailbox, s.graph_message_id, e.created_at,
                      s.backup_attempt_count
            """,
            {"id": incoming_email_id, "attempt": attempt, "lease": lease},
            prepared=True,
        )
        return cls(*found[0]) if found else None

    def store(self, graph_message_id: str, sealed: Sealed, *, retention: timedelta) -> bool:
        """Keep the copy until ``retention`` has passed; the first one counts, whoever made it.

        Returns:
            Whether it was wanted. A worker that was frozen may come with a second one, under another of Graph's ids: it
            changes nothing.
        """
        wanted = rows(
            """
            WITH wanted AS (
                UPDATE sent_emails
                SET graph_message_id = %(graph_message_id)s, backup_due_at = NULL, backup_lease_until = NULL,
                    backup_error = NULL, updated_at = now()
                WHERE incoming_email_id = %(id)s AND backup_due_at IS NOT NULL RETURNING incoming_email_id
            ), answering AS (
                UPDATE mailboxes SET refusal_count = 0 WHERE mailbox = %(mailbox)s AND refusal_count > 0
            ), stored AS (
                INSERT INTO email_backups (id, graph_message_id, incoming_email_id, compressed_blob, compression, size,
                                           compressed_size, checksum, key_id, expires_at)
                SELECT %(backup_id)s, %(graph_message_id)s, incoming_email_id, %(blob)s, %(compression)s, %(size)s,
                       %(compressed_size)s, %(checksum)s, %(key_id)s, now() + %(retention)s
                FROM wanted ON CONFLICT (graph_message_id) DO NOTHING
            )
            SELECT 1 FROM wanted
            """,
            {
                "backup_id": new_id(),
                "id": self.incoming_email_id,
                "mailbox": self.mailbox,
                "graph_message_id": graph_message_id,
                "retention": retention,
                **sealed._asdict(),
            },
            prepared=True,
        )
        return bool(wanted)

    def snooze(self, wait: timedelta, why: str) -> None:
        """Look again later without having spent an attempt."""
        self._postpone(wait, why, spent=0)

    def retry(self, wait: timedelta, error: str) -> None:
        """Look again later, an attempt spent."""
        self._postpone(wait, error, spent=1)

    def _postpone(self, wait: timedelta, error: str, *, spent: int) -> None:
        rows(
            """
            UPDATE sent_emails
            SET backup_due_at = now() + %(wait)s, backup_lease_until = NULL, backup_error = %(error)s,
                backup_attempt_count = backup_attempt_count - 1 + %(spent)s, updated_at = now()
            WHERE incoming_email_id = %(id)s AND backup_attempt_count = %(attempt)s AND backup_due_at IS NOT NULL
            """,
            {
                "id": self.incoming_email_id,
                "attempt": self.attempt,
                "wait": wait,
                "error": error[:1000],
                "spent": spent,
            },
        )

    def fail(self, *, reason: str, error: str, message_id: str, queue_name: str, actor_name: str) -> bool:
        """Give up: one dead letter. The mail itself is sent and stays so.

        Returns:
            Whether it was this attempt's to give up; False: another has stored the copy or is at it.
        """
        given_up = rows(
            """
            WITH email AS (
                UPDATE sent_emails
                SET backup_due_at = NULL, backup_lease_until = NULL, backup_error = %(error)s, updated_at = now()
                WHERE incoming_email_id = %(id)s AND backup_attempt_count = %(attempts)s AND backup_due_at IS NOT NULL
                RETURNING incoming_email_id AS id
            )
            """
            + RECORD
            + " RETURNING 1",
            {
                "dlq_id": new_id(),
                "id": self.incoming_email_id,
                "mailbox": self.mailbox,
                "attempts": self.attempt,
                "reason": reason,
                "error": error[:1000],
                "message_id": message_id,
                "queue_name": queue_name,
                "actor_name": actor_name,
            },
        )
        return bool(given_up)


class StoredBackup(NamedTuple):
    """What the archive knows of one message."""

    id: str
    incoming_email_id: str
    publisher_message_id: str
    graph_message_id: str
    mailbox: str
    size: int
    compressed_size: int
    checksum: str
    key_id: str
    created_at: datetime
    expires_at: datetime


_LISTED = """
    SELECT b.id::text, b.incoming_email_id::text, e.publisher_message_id, b.graph_message_id, e.mailbox, b.size,
           b.compressed_size, b.checksum, b.key_id, b.created_at, b.expires_at
    FROM email_backups b JOIN incoming_emails e ON e.id = b.incoming_email_id
"""


def stored_backups(*, mailbox: str | None = None, limit: int = 100) -> list[StoredBackup]:
    """Return the newest backups, of one mailbox or of all."""
    return [
        StoredBackup(*row)
        for row in rows(
            _LISTED + "WHERE %(mailbox)s::text IS NULL OR e.mailbox = %(mailbox)s ORDER BY b.id DESC LIMIT %(limit)s",
            {"mailbox": mailbox, "limit": limit},
        )
    ]


def find_backup(id: str) -> StoredBackup | None:
    """Find a backup by its own id, the email's, the publisher's or Graph's."""
    found = rows(
        _LISTED
        + """
        WHERE b.id = (
            SELECT id FROM (
                SELECT id FROM email_backups WHERE id = %(uuid)s
                UNION ALL SELECT id FROM email_backups WHERE incoming_email_id = %(uuid)s
                UNION ALL SELECT id FROM email_backups WHERE graph_message_id = %(id)s
                UNION ALL SELECT b.id FROM email_backups b JOIN incoming_emails e ON e.id = b.incoming_email_id
                          WHERE e.publisher_message_id = %(id)s
            ) found ORDER BY id LIMIT 1
        )
        """,
        {"id": id, "uuid": as_uuid(id)},
    )
    return StoredBackup(*found[0]) if found else None


class SealedBytes(NamedTuple):
    """The sealed bytes of a backup, and the key that they are sealed under."""

    blob: bytes
    key_id: str


def sealed_blob(backup_id: str, *, first_bytes: int | None = None) -> SealedBytes | None:
    """Return the sealed bytes of a backup, or the first of them; None if it has been deleted.

    The key is read with them: a key change may come at any moment.
    """
    found = rows(
        """
        SELECT substring(compressed_blob FROM 1 FOR %(first_bytes)s), key_id
        FROM email_backups WHERE id = %(id)s
        """
        if first_bytes
        else "SELECT compressed_blob, key_id FROM email_backups WHERE id = %(id)s",
        {"id": backup_id, "first_bytes": first_bytes},
    )
    return SealedBytes(bytes(found[0][0]), found[0][1]) if found else None


def stored_after(backup_id: str | None, *, limit: int) -> list[StoredBackup]:
    """Return the backups behind that one, or the first, in order of their ids."""
    found = rows(
        _LISTED + "WHERE %(after)s::uuid IS NULL OR b.id > %(after)s::uuid ORDER BY b.id LIMIT %(limit)s",
        {"after": backup_id, "limit": limit},
    )
    return [StoredBackup(*row) for row in found]


def count() -> int:
    """Return how many backups there are, by an index."""
    return int(rows("SELECT count(*) FROM email_backups")[0][0])


class Archived(NamedTuple):
    """A sending, and whether its email should have a backup and has none."""

    id: str
    incoming_email_id: str
    publisher_message_id: str
    missing: bool


def archived_after(sent_id: str | None, *, retention: timedelta, limit: int) -> list[Archived]:
    """Return the sendings behind that one, or the first, in order of their ids.

    A backup should be there if it was stored and no purge has noted that it deleted it. What was deleted before purges
    noted that was as old as its retention, so of mail that was sent longer ago than ``retention`` only that on hold is
    missed.
    """
    found = rows(
        """
        SELECT s.id::text, s.incoming_email_id::text, e.publisher_message_id,
               s.status = 'sent' AND s.backup_due_at IS NULL AND s.backup_error IS NULL AND s.backup_purged_at IS NULL
               AND (coalesce(s.sent_at, s.intent_at) > now() - %(retention)s
                    OR EXISTS (SELECT 1 FROM holds h WHERE h.incoming_email_id = s.incoming_email_id))
               AND NOT EXISTS (SELECT 1 FROM email_backups b WHERE b.incoming_email_id = s.incoming_email_id)
        FROM sent_emails s JOIN incoming_emails e ON e.id = s.incoming_email_id
        WHERE %(after)s::uuid IS NULL OR s.id > %(after)s::uuid ORDER BY s.id LIMIT %(limit)s
        """,
        {"after": sent_id, "limit": limit, "retention": retention},
    )
    return [Archived(*row) for row in found]
