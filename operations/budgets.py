"""Limits: how much of Graph may be used and is, and what operators have set in the place of the settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

import models
import runtime
from actors.budgets import OPERATORS_PATIENCE, turn
from actors.concurrency import Concurrency
from bounds import (
    CONCURRENCY_BOUNDS,
    COUNT_BOUNDS,
    FLEET_CONCURRENCY_BOUNDS,
    REQUESTS_BOUNDS,
    UPLOAD_MB_BOUNDS,
    Bounds,
)
from contracts import MAX_RECIPIENTS
from limiter import Unavailable
from models import audit, mailboxes
from models import limits as set_by_operators
from models.limits import SetLimit
from models.mailboxes import Held
from models.turns import EVERY
from operations.errors import NotALimit

#: What may be set for a mailbox, or for each of them.
MAILBOX_LIMITS: Mapping[str, Bounds] = {
    "concurrency": CONCURRENCY_BOUNDS,
    "requests": REQUESTS_BOUNDS,
    "upload_bytes": Bounds(*(megabytes * 1_000_000 for megabytes in UPLOAD_MB_BOUNDS)),
    "sends": COUNT_BOUNDS,
    "recipients": COUNT_BOUNDS,
}
#: What may be set for the tenant.
TENANT_LIMITS: Mapping[str, Bounds] = {
    "tenant_requests": REQUESTS_BOUNDS,
    "tenant_external_recipients": COUNT_BOUNDS,
}
#: What may be set for the fleet: how much of a kind may be in flight.
FLEET_LIMITS: Mapping[str, Bounds] = dict.fromkeys(Concurrency._fields, FLEET_CONCURRENCY_BOUNDS)


class Limit(NamedTuple):
    """A budget: what of it is used, what limits it, and who said so.

    Attributes:
        limit: The effective limit, in the budget's unit.
        used: As much of it as is used now.
        next_free_in: When a part of what is used comes back; None: nothing is used.
        configured: What is set; ``limit`` is less while it is slowed.
        why: Why ``limit`` is another than the settings', None if it is not.
        set_by: The operator who set it, where one has,
        set_at: and when.
    """

    budget: str
    limit: int
    used: int
    next_free_in: timedelta | None
    configured: int
    why: str | None
    set_by: str | None
    set_at: datetime | None


class LimitsChange(NamedTuple):
    """What became of limits that were set.

    Attributes:
        before: Each limit that was named, as it was set before; None: it was not.
        after: As it is set now; None: the settings say it, or what is set for every mailbox.
        told: Whether Redis answered. If not, all of it takes effect within a minute after Redis is back.
    """

    before: dict[str, int | None]
    after: dict[str, int | None]
    told: bool

    @property
    def warnings(self) -> list[str]:
        """What the operator should know of what is set now, in sentences."""
        return [_warning(name, limit) for name, limit in self.after.items() if _gives_up(name, limit)]


def _gives_up(name: str, limit: int | None) -> bool:
    return name.endswith("recipients") and bool(limit) and limit < MAX_RECIPIENTS


def _warning(name: str, limit: int | None) -> str:
    kind = "external recipients" if name.startswith("tenant_") else "recipients"
    return f"A single mail with more than {limit} {kind} will be given up (never_fits)."


def limits(mailbox: str | None) -> list[Limit]:
    """Return how much of each budget is used, and what limits it: the mailbox's, or the tenant's.

    Raises:
        Unavailable: Redis does not answer.
    """
    usage = runtime.limiter.usage(mailbox) if mailbox else runtime.limiter.tenant_usage()
    own = set_by_operators.all_set(EVERY) + (set_by_operators.all_set(mailbox) if mailbox else [])
    said = {each.budget: (each.set_by, each.set_at) for each in own}
    return [
        Limit(u.budget, u.limit, u.used, u.next_free_in, u.configured, u.why, *said.get(u.budget, (None, None)))
        for u in usage
    ]


def limits_set(mailbox: str | None = None) -> list[SetLimit]:
    """Return every limit that operators have set and not unset, those for every mailbox first; or this one's alone."""
    return set_by_operators.all_set(mailbox)


def held(mailbox: str | None) -> list[Held]:
    """Return the mailboxes that wait for budget or refuse us: this one, if it does, or all."""
    return mailboxes.held(mailbox)


def set_limits(mailbox: str | None, limits: Mapping[str, int], *, who: str) -> LimitsChange:
    """Set limits of a mailbox, or (None) for every mailbox, the tenant and the fleet, in the place of the settings.

    Mail that waits for budget is looked at anew. Repeating it is harmless, and tells Redis again.

    Args:
        limits: In the budgets' units; 0 switches a limit off, except of the fleet's.

    Raises:
        NotALimit: Nothing was changed.
    """
    for name, limit in limits.items():
        bounds = _bounds(mailbox, name)
        if name in FLEET_LIMITS and limit == 0:
            raise NotALimit(f"{name} must be {bounds.least} or more; to send nothing, pause")
        try:
            bounds.check(limit)
        except ValueError as problem:
            raise NotALimit(f"{name} {problem}") from None
    return _change(mailbox, limits, "limits.set", who)


def unset_limits(mailbox: str | None, names: Iterable[str], *, who: str) -> LimitsChange:
    """Have the settings, or what is set for every mailbox, say these limits again; else as `set_limits`."""
    changes = dict.fromkeys(names)
    for name in changes:
        _bounds(mailbox, name)
    return _change(mailbox, changes, "limits.unset", who)


def _bounds(mailbox: str | None, name: str) -> Bounds:
    known = MAILBOX_LIMITS if mailbox else {**MAILBOX_LIMITS, **TENANT_LIMITS, **FLEET_LIMITS}
    if name in known:
        return known[name]
    for limits, whose in ((TENANT_LIMITS, "tenant"), (FLEET_LIMITS, "fleet")):
        if name in limits:
            raise NotALimit(f"{name} is the {whose}'s: it is set without a mailbox")
    raise NotALimit(f"there is no limit named {name}; there are {', '.join(known)}")


def _change(mailbox: str | None, changes: Mapping[str, int | None], action: str, who: str) -> LimitsChange:
    subject = mailbox.lower() if mailbox else EVERY
    with models.transaction():
        before, after = _write(subject, changes)
        changed = {name: {"old": before.get(name), "new": after.get(name)} for name in changes}
        if any(values["old"] != values["new"] for values in changed.values()):
            audit.record(who, action, subject, **changed)
    told = _tell(mailbox)
    mailboxes.look_anew(subject)
    runtime.wake("schedule_emails")
    return LimitsChange({name: before.get(name) for name in changes}, {name: after.get(name) for name in changes}, told)


def _write(subject: str, changes: Mapping[str, int | None]) -> tuple[dict[str, int], dict[str, int]]:
    """Change the budgets of a mailbox, or of every one, and the limits of the fleet, each where it stands."""
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    of_fleet = {name: limit for name, limit in changes.items() if name in FLEET_LIMITS}
    budgets = {name: limit for name, limit in changes.items() if name not in FLEET_LIMITS}
    for was, now in (
        *([set_by_operators.change_fleet(of_fleet)] if of_fleet else []),
        *([set_by_operators.change(subject, budgets)] if budgets else []),
    ):
        before |= was
        after |= now
    return before, after


def _tell(mailbox: str | None) -> bool:
    """Tell Redis what stands in the table."""
    try:
        # A scheduler that knows the former limits has then noted for what it found no budget.
        with turn(OPERATORS_PATIENCE):
            runtime.limiter.set_limits(mailbox, set_by_operators.of(mailbox or EVERY))
    except Unavailable:
        return False
    return True
