"""Pauses of sending mailboxes: whom the scheduler passes over, until when, and why."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from models.database import rows

#: An operator's pause ends when the operator ends it. (PostgreSQL's 'infinity' has no Python value.)
FOREVER = datetime(9999, 1, 1, tzinfo=UTC)


class Pause(NamedTuple):
    """A mailbox from which nothing is dispatched before ``paused_until``."""

    mailbox: str
    paused_until: datetime
    pause_reason: str
    paused_by: str


def pause(mailbox: str, wait: timedelta, *, why: str) -> None:
    """Pass the mailbox over for ``wait``. A longer pause that stands already is kept."""
    _pause(mailbox, datetime.now(UTC) + wait, why=why, who="mailfleet")


def pause_by_hand(mailbox: str, *, why: str, who: str) -> None:
    """Pass the mailbox over until an operator resumes it."""
    _pause(mailbox, FOREVER, why=why, who=who)


def _pause(mailbox: str, until: datetime, *, why: str, who: str) -> None:
    rows(
        """
        INSERT INTO mailboxes (mailbox, paused_until, pause_reason, paused_by)
        VALUES (%(mailbox)s, %(until)s, %(why)s, %(who)s)
        ON CONFLICT (mailbox) DO UPDATE
        SET paused_until = excluded.paused_until, pause_reason = excluded.pause_reason, paused_by = excluded.paused_by,
            updated_at = now()
        WHERE coalesce(mailboxes.paused_until < excluded.paused_until, true)
        """,
        {"mailbox": mailbox.lower(), "until": until, "why": why, "who": who},
    )


def refuse(mailbox: str, *, why: str, first_wait: timedelta, longest_wait: timedelta) -> timedelta:
    """Pause a mailbox that refused us, longer each time in a row, and return for how long.

    Until it has taken a mail again the scheduler lets one email at a time probe it.
    """
    count: int = rows(
        """
        INSERT INTO mailboxes (mailbox, refusal_count) VALUES (%(mailbox)s, 1)
        ON CONFLICT (mailbox) DO UPDATE SET refusal_count = mailboxes.refusal_count + 1, updated_at = now()
        RETURNING refusal_count
        """,
        {"mailbox": mailbox.lower()},
    )[0][0]
    wait: timedelta = min(first_wait * 2 ** min(count - 1, 20), longest_wait)
    pause(mailbox, wait, why=why)
    return wait


def resume(mailbox: str) -> bool:
    """End the mailbox's pause, whoever made it, and have the mail that it held back tried at once.

    Returns whether there was a pause. Mail that waits for its ``send_at`` goes on waiting.
    """
    return bool(
        rows(
            """
            WITH released AS (
                UPDATE incoming_emails SET next_attempt_at = NULL, updated_at = now()
                WHERE next_attempt_at > now() AND mailbox = %(mailbox)s AND status = 'received'
                  AND last_error IS NOT NULL
            )
            UPDATE mailboxes
            SET paused_until = NULL, pause_reason = NULL, paused_by = NULL, refusal_count = 0, updated_at = now()
            WHERE mailbox = %(mailbox)s AND paused_until > now() RETURNING 1
            """,
            {"mailbox": mailbox.lower()},
        )
    )


def pauses() -> list[Pause]:
    """Return every pause that stands, the longest first."""
    return [
        Pause(*row)
        for row in rows(
            """
            SELECT mailbox, paused_until, pause_reason, paused_by FROM mailboxes
            WHERE paused_until > now() ORDER BY paused_until DESC
            """
        )
    ]
