"""Limits and pauses over HTTP: how much may be sent, and whether at all."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

import operations
from console.access import Operator, Viewer
from console.api import MailboxOrEvery, Subject, make_router
from models.mailboxes import Pause as Standing
from operations import EVERY, LimitsChange

limits_router = make_router("/limits", "limits")
pauses_router = make_router("/pauses", "pauses")

_LONGEST_PAUSE = timedelta(days=365)
_MAX_LIMIT = 10**15
_TELLS_REDIS = "Whether Redis answered. If not, it takes effect within a minute after Redis is back."

_LIMITS = [*operations.MAILBOX_LIMITS, *operations.TENANT_LIMITS, *operations.FLEET_LIMITS]

Budget = Annotated[str, Path(max_length=64, description=", ".join(_LIMITS))]


class _Shown(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Usage(_Shown):
    """A budget, in its unit: what of it is used, what limits it, and who said so. A limit of 0 is none."""

    budget: str
    used: int
    limit: int
    configured: int
    next_free_in_seconds: float | None
    why: str | None
    set_by: str | None
    set_at: datetime | None


class SetLimit(_Shown):
    """A limit that an operator has set, in the place of the settings."""

    mailbox: str
    budget: str
    limit: int
    set_by: str | None
    set_at: datetime | None


class Held(_Shown):
    """A mailbox that waits for budget until ``full_until``, or refused us so many times in a row."""

    mailbox: str
    full_until: datetime | None
    full_reason: str | None
    full_from: int
    refusal_count: int


class Pause(BaseModel):
    """A pause that stands; ``until``: null if it has no end but an operator's."""

    subject: str
    until: datetime | None
    why: str
    paused_by: str


class Limits(BaseModel):
    """The budgets of a mailbox, or of the tenant, and all that holds mail back."""

    budgets: list[Usage]
    limits: list[SetLimit]
    held: list[Held]


class Wanted(BaseModel):
    """A limit that is to be set, in the budget's unit; 0: none."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(ge=0, le=_MAX_LIMIT, strict=True)


class Change(BaseModel):
    """What became of a limit; ``before``, ``after``: null where none was, or is, set."""

    budget: str
    before: int | None
    after: int | None
    told: bool = Field(description=_TELLS_REDIS)
    warnings: list[str]


class PauseWanted(BaseModel):
    """Why something is to be paused, and for how long: null: until it is resumed."""

    model_config = ConfigDict(extra="forbid")

    why: str = Field("paused by hand", min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]*$")
    seconds: int | None = Field(None, ge=1, le=_LONGEST_PAUSE // timedelta(seconds=1), strict=True)


class Resumption(BaseModel):
    """What a resumption ended; ``stood``: whether there was a pause, or a mailbox that refused us."""

    subject: str
    stood: bool
    told: bool = Field(description="Whether Redis answered. If not, a pause of Graph's ends by itself.")


def _named(mailbox: str) -> str | None:
    """Return the mailbox as `operations` names it: none stands for every one, and the tenant."""
    return None if mailbox == EVERY else mailbox


@limits_router.get("/{mailbox}")
def show_limits(_who: Viewer, mailbox: MailboxOrEvery) -> Limits:
    """Show the budgets of a mailbox, or (`*`) of the tenant, the limits that are set, and what is held back."""
    named = _named(mailbox)
    return Limits(
        budgets=[_usage(limit) for limit in operations.limits(named)],
        limits=[SetLimit.model_validate(each) for each in operations.limits_set(named)],
        held=[Held.model_validate(each) for each in operations.held(named)],
    )


def _usage(limit: operations.Limit) -> Usage:
    told = limit._asdict()
    free_in = told.pop("next_free_in")
    return Usage(**told, next_free_in_seconds=None if free_in is None else free_in.total_seconds())


@limits_router.put("/{mailbox}/{budget}")
def set_limit(who: Operator, mailbox: MailboxOrEvery, budget: Budget, wanted: Wanted) -> Change:
    """Set a limit of a mailbox, or (`*`) of every one, the tenant or the fleet, instead of the settings, at once."""
    return _change(budget, operations.set_limits(_named(mailbox), {budget: wanted.limit}, who=f"api:{who}"))


@limits_router.delete("/{mailbox}/{budget}")
def unset_limit(who: Operator, mailbox: MailboxOrEvery, budget: Budget) -> Change:
    """Go back to what the settings, or what is set for every mailbox, say."""
    return _change(budget, operations.unset_limits(_named(mailbox), [budget], who=f"api:{who}"))


def _change(budget: str, change: LimitsChange) -> Change:
    return Change(
        budget=budget,
        before=change.before[budget],
        after=change.after[budget],
        told=change.told,
        warnings=change.warnings,
    )


@pauses_router.get("")
def find_pauses(_who: Viewer) -> list[Pause]:
    """List every pause that stands, operators' and Graph's, the longest first."""
    return [_pause(each) for each in operations.pauses()]


@pauses_router.put("/{subject}")
def pause(who: Operator, subject: Subject, wanted: PauseWanted) -> Pause:
    """Send nothing more from a mailbox, by a route or at all. Of two pauses the one that ends later stands."""
    wait = timedelta(seconds=wanted.seconds) if wanted.seconds else None
    return _pause(operations.pause(subject, why=wanted.why, who=f"api:{who}", wait=wait))


@pauses_router.delete("/{subject}")
def resume(who: Operator, subject: Subject) -> Resumption:
    """Send from a mailbox, by a route or at all again, whoever paused it. What is paused by itself stays so."""
    resumed = operations.resume(subject, who=f"api:{who}")
    return Resumption(subject=subject, stood=resumed.stood, told=resumed.told)


def _pause(standing: Standing) -> Pause:
    return Pause(
        subject=standing.route or standing.mailbox,
        until=None if standing.until_resumed else standing.paused_until,
        why=standing.pause_reason,
        paused_by=standing.paused_by,
    )
