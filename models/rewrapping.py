"""Key changes: what is wrapped under which key of the ring, and the exchange of wrapped keys a batch at a time.

Only wrapped data keys are read and exchanged: the header of a backup or of a stored attachment, 80 bytes of a payload
key. PostgreSQL puts the rest of a backup behind its new header by itself. Each row changes its wrapped key and the id
of what that is wrapped under in one write, so that it can be opened at every moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from models.counting import count
from models.database import rows, transaction

_FIRST = "00000000-0000-0000-0000-000000000000"


#: Sealed bytes of a batch, which PostgreSQL writes anew.
BATCH_BYTES = 64_000_000


class Wrapped(NamedTuple):
    """A header, or a payload key, with what it is bound to: but for a backup its own id alone."""

    id: str
    key_id: str
    wrapped: bytes
    incoming_email_id: str = ""
    graph_message_id: str = ""


#: What exchanges the wrapped keys of a batch; what it leaves out stays as it is.
Rewrap = Callable[[Sequence[Wrapped]], Sequence[Wrapped]]


class Batch(NamedTuple):
    """How far a batch went: rows looked at, 0 at the end; rows changed; and the id of the last."""

    seen: int
    changed: int
    last_id: str


class _Statements(NamedTuple):
    take: str
    put: str


class Store:
    """A table with wrapped keys."""

    def __init__(self, table: str, statements: _Statements) -> None:
        self.table, self._statements = table, statements

    def key_ids(self, *, but: str) -> list[str]:
        """Return the keys but that one that something is wrapped under."""
        # Each step jumps to the next key: there are a few, and there may be millions of rows.
        found = rows(
            f"""
            WITH RECURSIVE key AS (
                (SELECT key_id FROM {self.table} ORDER BY key_id LIMIT 1)
                UNION ALL
                SELECT (SELECT t.key_id FROM {self.table} t WHERE t.key_id > key.key_id ORDER BY t.key_id LIMIT 1)
                FROM key WHERE key.key_id IS NOT NULL
            )
            SELECT key_id FROM key WHERE key_id <> %(but)s
            """,
            {"but": but},
        )
        return [key_id for (key_id,) in found]

    def counts(self, *, but: str, at_most: int = 0) -> dict[str, int]:
        """Return how many rows are wrapped under each key but that one.

        Args:
            at_most: Of each key so many are enough to know of; 0: all are counted.
        """
        return {
            key_id: count(self.table, "key_id = %(key_id)s", {"key_id": key_id}, at_most=at_most)
            for key_id in self.key_ids(but=but)
        }

    def exchange(self, key_id: str, *, after: str | None, batch: int, rewrap: Rewrap) -> Batch:
        """Exchange the wrapped keys of up to ``batch`` rows under a key, behind the row ``after``, in one transaction.

        Safe to repeat, and beside others: rows that another has in hand are passed over.
        """
        with transaction():
            found = rows(self._statements.take, {"key_id": key_id, "after": after or _FIRST, "batch": batch})
            if not found:
                return Batch(0, 0, after or _FIRST)
            taken = _within_bytes(found)
            changed = self._put(rewrap(taken))
        return Batch(len(taken), changed, taken[-1].id)

    def _put(self, new: Sequence[Wrapped]) -> int:
        parameters = {
            "ids": [each.id for each in new],
            "key_ids": [each.key_id for each in new],
            "wrapped": [each.wrapped for each in new],
        }
        return len(rows(self._statements.put, parameters)) if new else 0


def _within_bytes(found: list[tuple[Any, ...]]) -> list[Wrapped]:
    taken: list[Wrapped] = []
    total = 0
    for id, key_id, wrapped, size, *bound in found:
        total += size
        if taken and total > BATCH_BYTES:
            break
        taken.append(Wrapped(id, key_id, bytes(wrapped), *bound))
    return taken


_NEW = "(SELECT unnest(%(ids)s::uuid[]), unnest(%(key_ids)s::text[]), unnest(%(wrapped)s::bytea[]))"

BACKUPS = Store(
    "email_backups",
    _Statements(
        """
        SELECT id::text, key_id, substring(compressed_blob FROM 1 FOR 92), compressed_size, incoming_email_id::text,
               graph_message_id
        FROM email_backups WHERE key_id = %(key_id)s AND id > %(after)s ORDER BY email_backups.id LIMIT %(batch)s
        FOR UPDATE SKIP LOCKED
        """,
        f"""
        UPDATE email_backups b
        SET key_id = new.key_id,
            compressed_blob = new.wrapped || substring(compressed_blob FROM length(new.wrapped) + 1)
        FROM {_NEW} AS new (id, key_id, wrapped) WHERE b.id = new.id RETURNING 1
        """,
    ),
)
ATTACHMENTS = Store(
    "stored_attachments",
    _Statements(
        """
        SELECT id::text, key_id, header, 0 FROM stored_attachments WHERE key_id = %(key_id)s AND id > %(after)s
        ORDER BY stored_attachments.id LIMIT %(batch)s FOR UPDATE SKIP LOCKED
        """,
        f"""
        UPDATE stored_attachments a SET header = new.wrapped, key_id = new.key_id
        FROM {_NEW} AS new (id, key_id, wrapped) WHERE a.id = new.id RETURNING 1
        """,
    ),
)
PAYLOAD_KEYS = Store(
    "payload_keys",
    _Statements(
        """
        SELECT id::text, key_id, wrapped, 0 FROM payload_keys WHERE key_id = %(key_id)s AND id > %(after)s
        ORDER BY payload_keys.id LIMIT %(batch)s FOR UPDATE SKIP LOCKED
        """,
        f"""
        UPDATE payload_keys k SET wrapped = new.wrapped, key_id = new.key_id
        FROM {_NEW} AS new (id, key_id, wrapped) WHERE k.id = new.id RETURNING 1
        """,
    ),
)
