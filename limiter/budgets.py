"""How much of Graph a mailbox and the tenant may use, and what is asked of it, as value objects.

A limit is one number of the application's; the window in which it is counted is Graph's and does not change with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from pyrate_limiter import Duration

BYTES_PER_MB = 1_000_000
#: No number in a budget is larger: Redis's scripts add up two such exactly, and no larger ones.
MOST_UNITS = 2**52

#: Counters per window. More use the limit better and cost memory: about 1 kB per full window. With the two that a ring
#: holds besides they stay within the 128 fields that Redis stores compactly (hash-max-listpack-entries).
SUBWINDOWS = 120
#: Sub-windows for which a charge counts longer than the window: 1/60 of it, a second for a minute's. What was charged a
#: moment before it reached Graph is one call among others that may have been faster; Graph counts arrivals.
SLACK = 2

#: Each budget's name and the length of its window in milliseconds, as pyrate's `Rate` wants it.
WINDOWS: Mapping[str, int] = {
    "requests": 10 * Duration.MINUTE,
    "upload_bytes": 5 * Duration.MINUTE,
    "sends": 1 * Duration.MINUTE,
    "recipients": 1 * Duration.DAY,
    "tenant_requests": 10 * Duration.SECOND,
    "tenant_external_recipients": 1 * Duration.DAY,
}
#: How many requests run at a time: a limit without a window.
CONCURRENCY = "concurrency"


@dataclass(frozen=True)
class Budgets:
    """What a mailbox and the tenant may use. ``0`` switches a limit off."""

    #: Concurrent requests per application and mailbox
    #: (learn.microsoft.com/graph/throttling-limits, Outlook service limits).
    mailbox_concurrency: int = 4
    #: Requests per application and mailbox (same page).
    mailbox_requests_per_10_minutes: int = 10_000
    #: Bytes of POST, PATCH and PUT per application and mailbox, in MB of 10**6 bytes (same page).
    mailbox_upload_mb_per_5_minutes: int = 150
    #: Exchange Online's message rate limit (learn.microsoft.com/office365/servicedescriptions/
    #: exchange-online-service-description/exchange-online-limits, sending limits); above it mail is queued and slowed.
    mailbox_sends_per_minute: int = 30
    #: Exchange Online's recipient rate limit, a rolling day (same page); above it mail bounces after it was accepted.
    mailbox_recipients_per_day: int = 10_000
    #: Requests per application over all mailboxes (learn.microsoft.com/graph/throttling-limits, global limit).
    tenant_requests_per_10_seconds: int = 130_000
    #: Exchange Online's tenant external recipient rate limit, 500 x licences^0.7 + 9500 in a rolling day
    #: (techcommunity.microsoft.com/blog/exchange/4372797); unknown to us, so off.
    tenant_external_recipients_per_day: int = 0

    def limits(self) -> dict[str, int]:
        """Return each limit in its budget's own unit: `CONCURRENCY`, then those of `WINDOWS`."""
        return {
            CONCURRENCY: self.mailbox_concurrency,
            "requests": self.mailbox_requests_per_10_minutes,
            "upload_bytes": self.mailbox_upload_mb_per_5_minutes * BYTES_PER_MB,
            "sends": self.mailbox_sends_per_minute,
            "recipients": self.mailbox_recipients_per_day,
            "tenant_requests": self.tenant_requests_per_10_seconds,
            "tenant_external_recipients": self.tenant_external_recipients_per_day,
        }


@dataclass(frozen=True)
class Wanted:
    """A send that is about to be dispatched: how many recipients it has, and how many of these are external."""

    recipients: int
    external_recipients: int

    def charges(self) -> dict[str, int]:
        """Return what it costs, by budget."""
        return {
            "sends": 1,
            "recipients": self.recipients,
            "tenant_external_recipients": self.external_recipients,
        }


@dataclass(frozen=True)
class Reservation:
    """Send budget that was charged at an instant in milliseconds of Redis's clock: by `reserve`, or with a slot."""

    at_ms: int


@dataclass(frozen=True)
class Spent:
    """What PostgreSQL knows to be spent: how long ago, by which mailbox (None: the tenant), units of which budget."""

    mailbox: str | None
    budget: str
    age: timedelta
    units: int


class BudgetUsage(NamedTuple):
    """How much of a budget is used, in its unit.

    ``limit`` is what counts now (0: no limit), ``configured`` what is set; ``why`` tells who set it or lowered it,
    None: the settings. ``next_free_in`` is when a part of what is used comes back, if any is used. What is not limited
    is counted too, so that a limit that is set later is kept from its first moment on.
    """

    budget: str
    limit: int
    used: int
    next_free_in: timedelta | None
    configured: int
    why: str | None
    #: When all of it is back; None for slots, which come back as calls end.
    all_free_in: timedelta | None = None


class Slowed(NamedTuple):
    """A limit that was lowered at an instant because Graph throttled so often; it grows back to the whole in time."""

    budget: str
    limit: int
    at: datetime
    whole: int
    strikes: int

    def __str__(self) -> str:
        return f"slowed to {self.limit} at {self.at:%H:%M}: {self.strikes} × 429"

    @classmethod
    def from_row(cls, budget: str, row: Mapping[str, int]) -> Slowed:
        """Read what `as_row` returns."""
        at = datetime.fromtimestamp(row["at"] / 1000, UTC)
        return cls(budget, row["limit"], at, row["whole"], row["strikes"])

    def as_row(self) -> dict[str, int]:
        """Return what is kept of it besides the budget, in the order of the ledger's record; ``at`` in milliseconds."""
        at_ms = round(self.at.timestamp() * 1000)
        return {"limit": self.limit, "at": at_ms, "whole": self.whole, "strikes": self.strikes}

    @classmethod
    def parse(cls, budget: str, record: str) -> Slowed:
        """Read what the ledger keeps: ``limit:at:whole:strikes``."""
        limit, at_ms, whole, strikes = map(int, record.split(":"))
        return cls.from_row(budget, {"limit": limit, "at": at_ms, "whole": whole, "strikes": strikes})

    def record(self) -> str:
        """Return what `parse` reads."""
        row = self.as_row()
        check_units([self.limit - 1, *row.values()])  # a limit of 0 would be none
        return ":".join(map(str, row.values()))


class Window(NamedTuple):
    """A budget's window: its key, its limit, and the ring of sub-windows in which it is counted."""

    budget: str
    key: str
    limit: int
    #: Milliseconds of a sub-window, rounded up: a longer window is a stricter one.
    width: int
    #: Sub-windows that count: those that the window's length covers, the one it covers in part, and the slack.
    ring: int

    @classmethod
    def of(cls, budget: str, key: str, limit: int, interval: int) -> Window:
        """Return the window whose length is ``interval`` milliseconds."""
        width = -(-interval // SUBWINDOWS)
        return cls(budget, key, limit, width, -(-interval // width) + 1 + SLACK)

    def described(self, units: int | str) -> str:
        """What a script is told of the window."""
        return f"{self.budget} {self.limit} {self.width} {self.ring} {units}"


def check_units(units: Iterable[int]) -> None:
    """Refuse what cannot be counted.

    Raises:
        ValueError: One is negative, or more than `MOST_UNITS`.
    """
    if not all(0 <= each <= MOST_UNITS for each in units):
        raise ValueError(f"a budget counts from 0 to {MOST_UNITS}, nothing negative")
