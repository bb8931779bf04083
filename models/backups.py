"""The archive's rows: due, leased, stored once per Graph message.

The bytes arrive sealed. A backup that is repeated finds the row of the first and leaves it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from models import counting
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
    correlation_id: str | None = None
    traceparent: str | None = None

    @classmethod
    def claim(cls, dispatched: Sequence[tuple[str, int]], *, lease: timedelta) -> list[ClaimedBackup]:
        """Take dispatched backups, of which id and attempt are given: the attempts begin.

        Left out is what is stored, given up or another attempt's.
        """
        found = rows(
            """
            UPDATE sent_emails s
            SET backup_attempt_count = dispatched.attempt, backup_lease_until = now() + %(lease)s, updated_at = now()
            FROM unnest(%(ids)s::uuid[], %(attempts)s::int[]) AS dispatched (id, attempt)
            JOIN incoming_emails e ON e.id = dispatched.id
            WHERE s.incoming_email_id = dispatched.id AND s.backup_due_at IS NOT NULL
              AND s.backup_attempt_count = dispatched.attempt - 1
              -- Has a lease. Found by the key, whatever the planner thinks of the index of leases.
              AND coalesce(s.backup_lease_until, '-infinity') > '-infinity'
            RETURNING e.id::text, e.publisher_message_id, e.mailbox, s.graph_message_id, e.created_at,
                      s.backup_attempt_count, e.correlation_id, e.traceparent
            """,
            {"ids": [id for id, _ in dispatched], "attempts": [attempt for _, attempt in dispatched], "lease": lease},
            prepared=True,
        )
        return [cls(*row) for row in found]

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


class Copy(NamedTuple):
    """What is to be stored of a backup: its message's id at Graph, and the sealed MIME."""

    backup: ClaimedBackup
    graph_message_id: str
    sealed: Sealed


def store(copies: Sequence[Copy], *, retention: timedelta) -> set[str]:
    """Keep the copies until ``retention`` has passed; of each mail the first one counts, whoever made it.

    Returns:
        The ids of the emails of which a copy was wanted. A worker that was frozen may come with a second one, under
        another of Graph's ids: it changes nothing.
    """
    wanted = rows(
        """
        WITH wanted AS (
            UPDATE sent_emails s
            SET graph_message_id = copy.graph_message_id, backup_due_at = NULL, backup_lease_until = NULL,
                backup_error = NULL, updated_at = now()
            FROM unnest(%(ids)s::uuid[], %(graph_message_ids)s::text[]) WITH ORDINALITY
                 AS copy (id, graph_message_id, position)
            WHERE s.incoming_email_id = copy.id AND s.backup_due_at IS NOT NULL
            RETURNING s.incoming_email_id, copy.graph_message_id, copy.position
        ), answering AS (
            UPDATE mailboxes SET refusal_count = 0 WHERE mailbox = ANY(%(mailboxes)s::text[]) AND refusal_count > 0
        ), stored AS (
            INSERT INTO email_backups (id, graph_message_id, incoming_email_id, compressed_blob, compression, size,
                                       compressed_size, checksum, key_id, expires_at)
            SELECT (%(backup_ids)s::uuid[])[position], graph_message_id, incoming_email_id,
                   (%(blobs)s::bytea[])[position], (%(compressions)s::text[])[position],
                   (%(sizes)s::bigint[])[position], (%(compressed_sizes)s::bigint[])[position],
                   (%(checksums)s::text[])[position], (%(key_ids)s::text[])[position], now() + %(retention)s
            FROM wanted ON CONFLICT (graph_message_id) DO NOTHING
        )
        SELECT incoming_email_id::text FROM wanted
        """,
        {
            "ids": [copy.backup.incoming_email_id for copy in copies],
            "mailboxes": [*{copy.backup.mailbox for copy in copies}],
            "graph_message_ids": [copy.graph_message_id for copy in copies],
            "backup_ids": [new_id() for _ in copies],
            "blobs": [copy.sealed.blob for copy in copies],
            "compressions": [copy.sealed.compression for copy in copies],
            "sizes": [copy.sealed.size for copy in copies],
            "compressed_sizes": [copy.sealed.compressed_size for copy in copies],
            "checksums": [copy.sealed.checksum for copy in copies],
            "key_ids": [copy.sealed.key_id for copy in copies],
            "retention": retention,
        },
        prepared=True,
    )
    return {id for (id,) in wanted}


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


LISTED = """
    SELECT b.id::text, b.incoming_email_id::text, e.publisher_message_id, b.graph_message_id, e.mailbox, b.size,
           b.compressed_size, b.checksum, b.key_id, b.created_at, b.expires_at
    FROM email_backups b JOIN incoming_emails e ON e.id = b.incoming_email_id
"""


def stored_backups(*, mailbox: str | None = None, limit: int = 100) -> list[StoredBackup]:
    """Return the newest backups, of one mailbox or of all."""
    return [
        StoredBackup(*row)
        for row in rows(
            LISTED + "WHERE %(mailbox)s::text IS NULL OR e.mailbox = %(mailbox)s ORDER BY b.id DESC LIMIT %(limit)s",
            {"mailbox": mailbox, "limit": limit},
        )
    ]


def find_backup(id: str) -> StoredBackup | None:
    """Find a backup by its own id, the email's, the publisher's or Graph's."""
    found = rows(
        LISTED
        + """
        WHERE b.id = (
            SELECT id FROM (
                SELECT 1 AS rank, id FROM email_backups WHERE id = %(uuid)s
                UNION ALL SELECT 2, id FROM email_backups WHERE incoming_email_id = %(uuid)s
                UNION ALL SELECT 3, id FROM email_backups WHERE graph_message_id = %(id)s
                UNION ALL SELECT 4, b.id FROM email_backups b JOIN incoming_emails e ON e.id = b.incoming_email_id
                          WHERE e.publisher_message_id = %(id)s
            ) found ORDER BY rank, id LIMIT 1  -- a publisher chooses its own id freely
        )
        """,
        {"id": id, "uuid": as_uuid(id)},
    )
    return StoredBackup(*found[0]) if found else None


class SealedBytes(NamedTuple):
    """The sealed bytes of a backup, the key that they are sealed under, and how they were compressed before."""

    blob: bytes
    key_id: str
    compression: str


def sealed_blob(backup_id: str, *, first_bytes: int | None = None) -> SealedBytes | None:
    """Return the sealed bytes of a backup, or the first of them; None if it has been deleted.

    The key is read with them: a key change may come at any moment.
    """
    found = rows(
        """
        SELECT substring(compressed_blob FROM 1 FOR %(first_bytes)s), key_id, compression
        FROM email_backups WHERE id = %(id)s
        """
        if first_bytes
        else "SELECT compressed_blob, key_id, compression FROM email_backups WHERE id = %(id)s",
        {"id": backup_id, "first_bytes": first_bytes},
    )
    return SealedBytes(bytes(found[0][0]), *found[0][1:]) if found else None


def stored_after(backup_id: str | None, *, limit: int) -> list[StoredBackup]:
    """Return the backups behind that one, or the first, in order of their ids."""
    found = rows(
        LISTED + "WHERE %(after)s::uuid IS NULL OR b.id > %(after)s::uuid ORDER BY b.id LIMIT %(limit)s",
        {"after": backup_id, "limit": limit},
    )
    return [StoredBackup(*row) for row in found]


def count() -> int:
    """Return how many backups there are."""
    return counting.count("email_backups")


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
