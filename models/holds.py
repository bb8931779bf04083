"""Legal holds: emails of which nothing is deleted, whatever its retention says.

A hold and a purge of the same email wait for each other: the hold's reference locks the email's row against the purge,
and the purge looks for holds only once it has locked the rows. So what a hold finds is there until it is released.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from models.database import rows

#: A condition on the email's id ``{id}``: nobody holds it.
NOT_HELD = "NOT EXISTS (SELECT 1 FROM holds WHERE holds.incoming_email_id = {id})"


class Hold(NamedTuple):
    """An email on hold, since when and why, and what is there of it."""

    incoming_email_id: str
    publisher_message_id: str
    mailbox: str
    reason: str | None
    placed_by: str
    placed_at: datetime
    has_payload: bool
    has_backup: bool


def place(incoming_email_id: str, *, reason: str | None, who: str) -> bool:
    """Hold an email; return whether it was not on hold. One that stands keeps its reason and its name."""
    return bool(
        rows(
            """
            INSERT INTO holds (incoming_email_id, reason, placed_by) VALUES (%(id)s, %(reason)s, %(who)s)
            ON CONFLICT DO NOTHING RETURNING 1
            """,
            {"id": incoming_email_id, "reason": reason, "who": who},
        )
    )


def release(incoming_email_id: str) -> bool:
    """End the hold of an email; return whether there was one. What is past its retention goes with the next purge."""
    return bool(rows("DELETE FROM holds WHERE incoming_email_id = %(id)s RETURNING 1", {"id": incoming_email_id}))


def standing(*, incoming_email_id: str | None = None, limit: int = 1000) -> list[Hold]:
    """Return the holds that stand, the newest first: of one email or of all."""
    found = rows(
        """
        SELECT e.id::text, e.publisher_message_id, e.mailbox, h.reason, h.placed_by, h.placed_at,
               e.payload_purged_at IS NULL,
               EXISTS (SELECT 1 FROM email_backups b WHERE b.incoming_email_id = e.id)
        FROM holds h JOIN incoming_emails e ON e.id = h.incoming_email_id
        WHERE %(id)s::uuid IS NULL OR e.id = %(id)s::uuid
        ORDER BY h.placed_at DESC LIMIT %(limit)s
        """,
        {"id": incoming_email_id, "limit": limit},
    )
    return [Hold(*row) for row in found]
