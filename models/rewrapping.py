"""Key changes: what is wrapped under which key of the ring, and the exchange of wrapped keys a batch at a time.

Only wrapped data keys are read and written: 92 bytes of a backup, 80 of a payload key. Each row changes its wrapped key
and the id of what that is wrapped under in one write, so that it can be opened at every moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from models.database import rows, transaction

_FIRST = "00000000-0000-0000-0000-000000000000"


class Wrapped(NamedTuple):
    """A backup's header, or a payload key, with what it is bound to: for a payload key its own id alone."""

    id: str
    key_id: str
    wrapped: bytes
    incoming_email_id: str = ""
    graph_message_id: str = ""


#: What exchanges the wrapped keys of a batch; what it leaves out stays as it is.
Rewrap = Callable[[Sequence[Wrapped]], Sequence[Wrapped]]


class Batch(NamedTuple):
    """How far a batch went: rows looked at, rows changed, and the id of the last."""

    seen: int
    changed: int
    last_id: str


class _Statements(NamedTuple):
    take: str
    put: str


class Store:
    """A table with wrapped keys."""

    def __init__(self, table: str, statements: _Statements) -> None:
        self._table, self._statements = table, statements

    def counts(self) -> dict[str, int]:
        """Return how many rows are wrapped under each key, by an index."""
        # Each step jumps to the next key: there are a few, and there may be millions of rows.
        ids = rows(
            f"""
            WITH RECURSIVE key AS (
                (SELECT key_id FROM {self._table} ORDER BY key_id LIMIT 1)
                UNION ALL
                SELECT (SELECT t.key_id FROM {self._table} t WHERE t.key_id > key.key_id ORDER BY t.key_id LIMIT 1)
                FROM key WHERE key.key_id IS NOT NULL
            )
            SELECT key_id, (SELECT count(*) FROM {self._table} t WHERE t.key_id = key.key_id) FROM key
            WHERE key_id IS NOT NULL
            """
        )
        return dict(ids)

    def exchange(self, key_id: str, *, after: str | None, batch: int, rewrap: Rewrap) -> Batch:
        """Exchange the wrapped keys of up to ``batch`` rows under a key, behind the row ``after``, in one transaction.

        Safe to repeat, and beside others: rows that another has in hand are passed over.
        """
        with transaction():
            found = rows(self._statements.take, {"key_id": key_id, "after": after or _FIRST, "batch": batch})
            if not found:
                return Batch(0, 0, after or _FIRST)
            new = rewrap([Wrapped(id, key, bytes(wrapped), *bound) for id, key, wrapped, *bound in found])
            changed = self._put(new)
        return Batch(len(found), changed, found[-1][0])

    def _put(self, new: Sequence[Wrapped]) -> int:
        parameters = {
            "ids": [each.id for each in new],
            "key_ids": [each.key_id for each in new],
            "wrapped": [each.wrapped for each in new],
        }
        return len(rows(self._statements.put, parameters)) if new else 0


_NEW = "(SELECT unnest(%(ids)s::uuid[]), unnest(%(key_ids)s::text[]), unnest(%(wrapped)s::bytea[]))"

BACKUPS = Store(
    "email_backups",
    _Statements(
        """
        SELECT id::text, key_id, coalesce(header, substring(compressed_blob FROM 1 FOR 92)), incoming_email_id::text,
               graph_message_id
        FROM email_backups WHERE key_id = %(key_id)s AND id > %(after)s ORDER BY id LIMIT %(batch)s
        FOR UPDATE SKIP LOCKED
        """,
        # Of a backup from before the header had its column the rest is written once more, now without it: the data key
        # must not stay there wrapped under the old key.
        f"""
        UPDATE email_backups b
        SET header = new.wrapped, key_id = new.key_id,
            compressed_blob = CASE WHEN header IS NULL THEN substring(compressed_blob FROM length(new.wrapped) + 1)
                                   ELSE compressed_blob END
        FROM {_NEW} AS new (id, key_id, wrapped) WHERE b.id = new.id RETURNING 1
        """,
    ),
)
PAYLOAD_KEYS = Store(
    "payload_keys",
    _Statements(
        """
        SELECT id::text, key_id, wrapped FROM payload_keys WHERE key_id = %(key_id)s AND id > %(after)s
        ORDER BY id LIMIT %(batch)s FOR UPDATE SKIP LOCKED
        """,
        f"""
        UPDATE payload_keys k SET wrapped = new.wrapped, key_id = new.key_id
        FROM {_NEW} AS new (id, key_id, wrapped) WHERE k.id = new.id RETURNING 1
        """,
    ),
)
