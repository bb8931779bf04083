"""How much of Graph a mailbox and the tenant may use, as value objects: whoever reads the settings fills them in.

A limit is one number of the application's; the window in which it is counted is Graph's and does not change with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from pyrate_limiter import Duration, Rate

BYTES_PER_MB = 1_000_000

#: Counters per window. More use the limit better (n / (n + 1) of it) and cost memory: about 0.5 kB per full window.
SUBWINDOWS = 60

#: Each budget's name and the length of its window in milliseconds, as pyrate's `Rate` wants it.
WINDOWS: Mapping[str, int] = {
    "requests": 10 * Duration.MINUTE,
    "upload_bytes": 5 * Duration.MINUTE,
    "sends": 1 * Duration.MINUTE,
    "recipients": 1 * Duration.DAY,
    "tenant_requests": 10 * Duration.SECOND,
}


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

    def limits(self) -> dict[str, int]:
        """Return the limit of each budget of `WINDOWS`, in the budget's own unit."""
        return {
            "requests": self.mailbox_requests_per_10_minutes,
            "upload_bytes": self.mailbox_upload_mb_per_5_minutes * BYTES_PER_MB,
            "sends": self.mailbox_sends_per_minute,
            "recipients": self.mailbox_recipients_per_day,
            "tenant_requests": self.tenant_requests_per_10_seconds,
        }


class BudgetUsage(NamedTuple):
    """How much of a budget is used, in its unit; ``next_free_in`` is when a part of that comes back, if any is used."""

    budget: str
    limit: int
    used: int
    next_free_in: timedelta | None


class Window(NamedTuple):
    """A budget's window: its key, its rate, and the ring of sub-windows in which it is counted."""

    budget: str
    key: str
    rate: Rate

    @property
    def width(self) -> int:
        """Milliseconds of a sub-window, rounded up: a longer window is a stricter one."""
        return -(-self.rate.interval // SUBWINDOWS)

    @property
    def ring(self) -> int:
        """Sub-windows that count: those that the window's length covers, and the one it covers in part."""
        return -(-self.rate.interval // self.width) + 1
