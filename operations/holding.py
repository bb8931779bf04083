"""Legal holds: what an operator keeps from every purge, and lets go again."""

from __future__ import annotations

import models
from models import audit, holds, inspection, stored_attachments
from models.holds import Hold
from operations.errors import NotFound


def hold(id: str, *, reason: str | None, who: str) -> tuple[Hold, bool]:
    """Keep everything of an email, by our id or the publisher's, until it is released.

    Safe to repeat: the hold that stands keeps its reason and its name.

    Returns:
        The hold that stands, which says what there still is, and whether it is this call's.

    Raises:
        NotFound: There is no such email.
    """
    incoming_email_id = _found(id)
    with models.transaction():
        placed = holds.place(incoming_email_id, reason=reason, who=who)
        if placed:
            stored_attachments.take_back_held()
            audit.record(who, "hold", incoming_email_id, reason=reason)
    # Asked by a statement of its own: a purge that was first has ended by now.
    (standing,) = holds.standing(incoming_email_id=incoming_email_id)
    return standing, placed


def release(id: str, *, who: str) -> bool:
    """End the hold of an email; what is past its retention goes with the next purge.

    Returns:
        Whether there was one.

    Raises:
        NotFound: There is no such email.
    """
    incoming_email_id = _found(id)
    with models.transaction():
        released = holds.release(incoming_email_id)
        if released:
            audit.record(who, "release", incoming_email_id)
    return released


def list_holds(*, limit: int) -> list[Hold]:
    """Return the holds that stand, the newest first."""
    return holds.standing(limit=limit)


def _found(id: str) -> str:
    found = inspection.find_email(id)
    if found is None:
        raise NotFound(f"no email has the id {id}")
    return found
