"""What one call asks of the fleet's budgets, as a bucket of pyrate-limiter's whose counts are in Redis.

It lets pyrate's `Limiter` be used over budgets that its own buckets cannot hold: several at once, each in its own unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from secrets import token_hex

from pyrate_limiter import AbstractBucket, Decision, Rate, RateItem

from .ledger import MILLISECOND, Ledger, Slot, Verdict
from .refusals import Emptied, Exhausted, NeverFits


class FleetBucket(AbstractBucket):
    """A bucket for one call: ``put`` takes its slot and all that it is charged, or nothing, in one round trip.

    The weight of the item is the number of requests, charged to the mailbox and the tenant; `extra` is charged besides.
    Afterwards ``failing_rate`` and ``waiting`` say what refused and for how long, as with any bucket of pyrate's, and
    `refusal` says it as an error.

    Args:
        wait: For how long ``put`` may wait for a slot, if nothing else is in the way.
        reserved_at_ms: When the send and its recipients were charged in advance; 0: they were not.
    """

    is_async = False

    def __init__(
        self, ledger: Ledger, mailbox: str, extra: Mapping[str, int], *, wait: timedelta, reserved_at_ms: int
    ) -> None:
        self._ledger = ledger
        self._mailbox = mailbox
        # Not through the property, which wants rates of one unit.
        self._rates = ledger.rates
        self._extra = extra
        self._wait = wait
        self._reserved_at_ms = reserved_at_ms
        self.slot = Slot(ledger.owner(mailbox), token_hex(8))
        self.refusal: Exhausted | Emptied | None = None

    def put(self, item: RateItem) -> bool:
        """Ask the ledger.

        Raises:
            NeverFits: A charge is above its limit.
            Unavailable: Redis does not answer.
        """
        charges = {budget: units for budget, units in self._extra.items() if units}
        charges["requests"] = charges["tenant_requests"] = item.weight
        verdict = self._ledger.admit(
            self.slot, self._mailbox, charges, wait=self._wait, reserved_at_ms=self._reserved_at_ms
        )
        if not verdict.by:
            self.slot = Slot(self.slot.owner, self.slot.token, at_ms=verdict.wait_ms)
            self.refusal = None
            return self._record(item, Decision())
        refused = refusal(verdict, charges.get(verdict.by, 0))
        if isinstance(refused, NeverFits):
            raise refused
        self.refusal = refused
        # Whatever refused lets one such call pass per wait.
        return self._record(item, Decision(Rate(item.weight, max(verdict.wait_ms, 1)), verdict.wait_ms))

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
        usage = self._ledger.usage(self._mailbox)
        return sum(each.used for each in usage if each.budget == "requests")

    def peek(self, index: int) -> None:
        """Return None: units are counted, not listed."""


def refusal(verdict: Verdict, asked: int) -> Exhausted | Emptied | NeverFits:
    """Say as an error what the ledger said to so many units of what refuses."""
    if verdict.by == "emptied":
        return Emptied()
    if verdict.limit:
        return NeverFits(verdict.by, asked, verdict.limit)
    return Exhausted(verdict.by, verdict.wait_ms * MILLISECOND, bool(verdict.nothing_left))
