"""What one call asks of the fleet's budgets, as a bucket of pyrate-limiter's whose counts are in Redis.

It lets pyrate's `Limiter` be used over budgets that its own buckets cannot hold: several at once, each in its own unit.
"""

from collections.abc import Mapping
from secrets import token_hex

from pyrate_limiter import AbstractBucket, Decision, Rate, RateItem

from .budgets import Budgets
from .ledger import MILLISECOND, TENANT, Ledger, Slot
from .refusals import Exhausted, NeverFits


class FleetBucket(AbstractBucket):
    """A bucket for one call: ``put`` takes its slot and all that it is charged, or nothing, in one round trip.

    The weight of the item is the number of requests, charged to the mailbox and the tenant; `extra` is charged besides.
    Afterwards ``failing_rate`` and ``waiting`` say what refused and for how long, as with any bucket of pyrate's, and
    `refusal` says it as an error.
    """

    is_async = False

    def __init__(self, ledger: Ledger, mailbox: str, budgets: Budgets, extra: Mapping[str, int]) -> None:
        self._ledger = ledger
        self._mailbox = mailbox
        self._budgets = budgets
        self._windows = ledger.windows(mailbox, budgets) + ledger.windows(TENANT, budgets)
        # Not through the property, which wants rates of one unit, in order.
        self._rates = [window.rate for window in self._windows]
        self._extra = extra
        self.slot = Slot(ledger.key(mailbox, "slots"), token_hex(8))
        self.refusal: Exhausted | None = None

    def put(self, item: RateItem) -> bool:
        """Ask the ledger.

        Raises:
            NeverFits: A charge is above its limit.
            Unavailable: Redis does not answer.
        """
        charges = [(each, units) for each in self._windows if (units := self._extra.get(each.budget, item.weight))]
        for window, units in charges:
            if units > window.rate.limit:
                raise NeverFits(window.budget, units, window.rate.limit)
        by, wait_ms, nothing_left = self._ledger.admit(
            self._mailbox, self.slot, self._budgets.mailbox_concurrency, charges
        )
        if not by:
            return self._record(item, Decision())
        names = ("pause", "tenant_pause", "concurrency", *(window.budget for window, _ in charges))
        self.refusal = Exhausted(names[by - 1], wait_ms * MILLISECOND, bool(nothing_left))
        # A pause or a held slot has no rate of its own: it lets one such call pass per wait.
        rate = charges[by - 4][0].rate if by > 3 else Rate(item.weight, wait_ms)
        return self._record(item, Decision(rate, wait_ms))

    def waiting(self, item: RateItem) -> int:
        """Return the milliseconds after which the last ``put`` would be admitted."""
        return self._recorded_wait(item) or 0

    def leak(self, _timestamp: int | None = None) -> int:
        """Return 0: what has left a window is forgotten when the window is next charged."""
        return 0

    def flush(self) -> None:
        """Return the slot and forget the verdict. What was charged stays charged: Graph has counted it too."""
        self._ledger.release(self.slot)
        self.failing_rate = self.refusal = None

    def count(self) -> int:
        """Return how many of the mailbox's requests are in the window: they are the weight of an item."""
        usage = self._ledger.usage(self._mailbox, self._budgets)
        return sum(each.used for each in usage if each.budget == "requests")

    def peek(self, index: int) -> None:
        """Return None: units are counted, not listed."""
