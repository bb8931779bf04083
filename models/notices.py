"""Notices of new dead letters: each open letter is told of once, in a notice that is kept until everybody has it.

A notice is made in the transaction that marks its letters, so that none is missed and none is in two. It is claimed to
be published and delivered; whoever dies with it leaves it to the next turn, which repeats it to the byte.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from models.database import rows


class Notice(NamedTuple):
    """A claimed notice, and what is to be done with it."""

    id: str
    body: str
    publish: bool
    deliver: bool
    #: Tries to deliver it so far.
    attempt_count: int


def take_unnoticed(limit: int) -> list[tuple[str, str | None, str, str, datetime]]:
    """Mark open dead letters as told of, oldest first; return id, email's id, reason, queue and when each was made.

    To be called in the transaction that adds the notice.
    """
    return sorted(
        rows(
            """
            WITH found AS MATERIALIZED (
                SELECT id FROM dlq WHERE noticed_at IS NULL AND status = 'open'
                ORDER BY created_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
            )
            UPDATE dlq SET noticed_at = now() FROM found WHERE dlq.id = found.id
            RETURNING dlq.id::text, incoming_email_id::text, reason, queue_name, created_at
            """,
            {"limit": limit},
        ),
        key=lambda letter: (letter[4], letter[0]),
    )


def add(id: str, body: bytes, *, deliver: bool) -> None:
    """Keep a notice until it is published and, if it is to be, delivered: not before those that wait already."""
    rows(
        """
        INSERT INTO dead_letter_notices (id, body, deliver_at)
        SELECT %(id)s, %(body)s::json, CASE WHEN %(deliver)s THEN
            greatest(now(), (SELECT max(deliver_at) FROM dead_letter_notices WHERE deliver_at IS NOT NULL)) END
        """,
        {"id": id, "body": body.decode(), "deliver": deliver},
    )


def claim(*, deliver: bool, lease: timedelta) -> Notice | None:
    """Take the oldest notice with something to do, or return None.

    Args:
        deliver: Whether there is somewhere to deliver to.
        lease: Nobody else takes it meanwhile.
    """
    found = rows(
        """
        WITH next AS MATERIALIZED (
            SELECT id FROM dead_letter_notices
            WHERE (published_at IS NULL OR (%(deliver)s AND deliver_at <= now()))
              AND coalesce(claimed_until <= now(), true)
            ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED
        )
        UPDATE dead_letter_notices n SET claimed_until = now() + %(lease)s FROM next WHERE n.id = next.id
        RETURNING n.id::text, n.body::text, published_at IS NULL, %(deliver)s AND coalesce(deliver_at <= now(), false),
                  attempt_count
        """,
        {"deliver": deliver, "lease": lease},
    )
    return Notice(*found[0]) if found else None


def note_published(id: str) -> None:
    """Note that RabbitMQ has confirmed it."""
    rows("UPDATE dead_letter_notices SET published_at = now() WHERE id = %(id)s", {"id": id})


def note_delivered(id: str) -> None:
    """Note that the webhook has taken it."""
    rows(
        """
        UPDATE dead_letter_notices
        SET delivered_at = now(), deliver_at = NULL, attempt_count = attempt_count + 1, last_error = NULL
        WHERE id = %(id)s
        """,
        {"id": id},
    )


def postpone(id: str, wait: timedelta, error: str) -> None:
    """Have it tried again after ``wait``, and no other before it."""
    rows(
        """
        UPDATE dead_letter_notices
        SET deliver_at = greatest(deliver_at, now() + %(wait)s),
            attempt_count = attempt_count + (id = %(id)s)::int,
            last_error = CASE WHEN id = %(id)s THEN %(error)s ELSE last_error END
        WHERE deliver_at IS NOT NULL
        """,
        {"id": id, "wait": wait, "error": error},
    )


def release(id: str) -> None:
    """Let go of a notice: there is nothing more to do with it now."""
    rows("UPDATE dead_letter_notices SET claimed_until = NULL WHERE id = %(id)s", {"id": id})


def purge(older_than: timedelta, limit: int) -> int:
    """Delete at most so many notices that are older, delivered or not; return how many."""
    return len(
        rows(
            """
            DELETE FROM dead_letter_notices WHERE id IN (
                SELECT id FROM dead_letter_notices WHERE created_at < now() - %(age)s
                ORDER BY created_at LIMIT %(limit)s
            ) RETURNING 1
            """,
            {"age": older_than, "limit": limit},
        )
    )
