"""Pauses: nothing is sent from a mailbox for a while, until an operator or the clock ends it."""

from __future__ import annotations

import models
import runtime
from models import audit, mailboxes
from models.mailboxes import Pause


def pause(mailbox: str, *, why: str, who: str) -> None:
    """Dispatch nothing from the mailbox until it is resumed. Mail that a worker has in hand goes out."""
    with models.transaction():
        mailboxes.pause_by_hand(mailbox, why=why, who=who)
        audit.record(who, "pause", mailbox.lower(), why=why)


def resume(mailbox: str, *, who: str) -> bool:
    """End the mailbox's pause, the operator's or Graph's; return whether there was one."""
    with models.transaction():
        resumed = mailboxes.resume(mailbox)
        audit.record(who, "resume", mailbox.lower())
    runtime.limiter.resume(mailbox)
    runtime.wake("schedule_emails")
    return resumed


def pauses() -> list[Pause]:
    """Return every pause that stands, the tenant's first."""
    until = runtime.limiter.tenant_paused_until()
    tenants = [Pause("every mailbox", until, "Graph asked to wait or refused us", "mailfleet")] if until else []
    return tenants + mailboxes.pauses()
