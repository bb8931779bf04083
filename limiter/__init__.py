"""The fleet's one limiter: who may talk to Microsoft Graph now, decided in Redis by one atomic script.

Graph counts requests, bytes and concurrent calls per mailbox, whatever process they come from, and a throttled call
counts too; so the limits are kept before the call, by all processes together.

**The protocol.** `Limiter.reserve` charges the send budget of mail that is about to be dispatched, so that mail which
would have to wait occupies no worker. `Limiter.slot` asks Redis before each call. The script looks at the pauses (what
``Retry-After`` demanded), the mailbox's concurrent slots and every window the call is charged to, and takes all or
nothing; what was reserved is moved to the instant of the call, or is charged again if the call comes so late that it
has left the window. A slot is a lease: a worker that dies returns its slot when the lease runs out, releasing a slot
twice or late is harmless, and a call that takes long renews it. A call that lacks nothing but a slot may wait for one:
it is handed over by whoever returns one, to sends first, and among these to the one whose wait ends first; nobody who
comes later gets it before them. Only Redis's clock is read, so the workers' clocks may differ. Whoever cannot ask Redis
may not call Graph (`Unavailable`).

**Windows.** A window is a ring of counters and their sum, so its size and cost do not grow with the traffic. What was
charged stays counted for the window's length and 1/60 to 1/40 of it more. The error is on the strict side only: at
least 97 % of a limit is usable, never more than 100 %.

**Limits** are the settings', unless `set_limits` has set others for the fleet or for a mailbox: they bind every process
from its next call on. What has no limit is counted all the same: one that is set later knows what was spent. A mailbox
that Graph throttles three times in ten minutes, pauses not counted, has the limit lowered to 60 % of what it used
(`throttled`); it grows back by 1/30 of the whole each minute.

**After a pause** a mailbox's concurrency starts at one and doubles every `RAMP_STEP` until it reaches its limit, so
that the waiting mail does not arrive as the burst that was throttled. After a tenant's pause every mailbox does so.
Where concurrency is not limited there is no ramp.

**When Redis loses everything**, or was started anew from an older copy, nobody is admitted (`Emptied`) until one
process has written down what was spent, as PostgreSQL knows it (`restoring`): no send less than there were.
Redis must not evict keys (``maxmemory-policy noeviction``): a window that is evicted is forgotten.

**Keys** name a mailbox by a digest of its lower-cased address, so that ``MONITOR``, the slow log and a dump show no
addresses. They share one hash tag: a call is charged to its mailbox and to the tenant in one step, which Redis Cluster
allows within one hash slot only. Every key of the traffic expires.

**What is pyrate-limiter's**: `Rate` and `Duration` describe the windows; `FleetBucket` is a bucket by its contract, and
its `Limiter` asks the bucket. **What is ours**: the bucket's storage. pyrate's `RedisBucket` reads the workers' clocks
and so admits more than the limit, keeps an entry per unit (a budget of bytes would hold millions), has no slots, cannot
charge several budgets at once, and stays broken after a restart of Redis. pyrate keeps the verdict on the bucket and
holds the limiter's lock over the round trip; so that threads share neither, a bucket and its limiter live for one call.

Errors::

    Refused              not now; try again after `retry_after`
      Exhausted          a budget, the slots or a pause says no; nothing was charged
      Unavailable        Redis cannot say; Graph must not be called
      Emptied            Redis does not know any more; else alike
    NeverFits            a ValueError: more than a budget's whole limit is asked for
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta

from pyrate_limiter import Limiter as PyrateLimiter
from pyrate_limiter import SingleBucketFactory
from redis import Redis

from .bucket import FleetBucket, refusal
from .budgets import (
    CONCURRENCY,
    SLACK,
    SUBWINDOWS,
    WINDOWS,
    Budgets,
    BudgetUsage,
    Reservation,
    Slowed,
    Spent,
    Wanted,
    check_units,
)
from .connections import connect
from .ledger import RAMP_STEP, TENANT, Ledger, Slot, Verdict
from .refusals import Emptied, Exhausted, NeverFits, Refused, Unavailable
from .scripts import RECOVERY_MS

__all__ = [
    "CONCURRENCY",
    "RECOVERY_MS",
    "SLACK",
    "SUBWINDOWS",
    "WINDOWS",
    "BudgetUsage",
    "Budgets",
    "Emptied",
    "Exhausted",
    "FleetBucket",
    "Limiter",
    "NeverFits",
    "Refused",
    "Reservation",
    "Slot",
    "Slowed",
    "Spent",
    "Unavailable",
    "Wanted",
]

_NO_WAIT = timedelta()


class Limiter:
    """The limits of every mailbox and of the tenant. Threads share one; it holds connections and no state.

    Args:
        redis: A client, or a URL; a client made from a URL gives up after a second, and repeats nothing.
        budgets: The limits, where `set_limits` has set no others.
        slot_lease: How long a slot is held without being renewed. A call that takes longer must renew it, or more calls
            than slots run.
        windows: Milliseconds in which each budget is counted. Graph's, unless a test has no time for them.
        ramp_step: How long each step of the ramp after a pause lasts.
        prefix: What every key begins with.
    """

    def __init__(
        self,
        redis: Redis | str,
        budgets: Budgets,
        slot_lease: timedelta,
        *,
        windows: Mapping[str, int] = WINDOWS,
        ramp_step: timedelta = RAMP_STEP,
        prefix: str = "mailfleet",
    ) -> None:
        client = connect(redis) if isinstance(redis, str) else redis
        self.slot_lease = slot_lease
        self._ledger = Ledger(client, budgets, slot_lease, ramp_step, windows, prefix)

    # Calls

    @contextmanager
    def slot(
        self,
        mailbox: str,
        *,
        requests: int = 1,
        send: Wanted | None = None,
        reservation: Reservation | None = None,
        upload_bytes: int = 0,
        wait: timedelta = _NO_WAIT,
    ) -> Iterator[Slot]:
        """Hold one of the mailbox's slots for the length of the block; for the rest see `acquire`."""
        slot = self.acquire(
            mailbox, requests=requests, send=send, reservation=reservation, upload_bytes=upload_bytes, wait=wait
        )
        try:
            yield slot
        finally:
            self.release(slot)

    def acquire(
        self,
        mailbox: str,
        *,
        requests: int = 1,
        send: Wanted | None = None,
        reservation: Reservation | None = None,
        upload_bytes: int = 0,
        wait: timedelta = _NO_WAIT,
    ) -> Slot:
        """Take a slot and charge every budget that Graph will charge for the call, or nothing.

        Args:
            mailbox: Its address, in any case.
            requests: How many requests will be made in the slot, one after the other; charged to the tenant too.
            send: The send that the call makes. Sends get a slot before other calls that wait for one.
            reservation: What was charged for the send before.
            upload_bytes: How many bytes of body will be uploaded.
            wait: For how long to wait for a slot. Nothing else is waited for.

        Raises:
            Exhausted: A budget or the slots are used up, or mailbox or tenant is paused. Costs nothing.
            Emptied: Redis has lost its counts; see `restoring`.
            Unavailable: Redis does not answer.
            NeverFits: A charge is above its limit, however long one waits.
        """
        extra = send.charges() if send else {}
        extra["upload_bytes"] = upload_bytes
        check_units([requests - 1, *extra.values()])
        reserved_at_ms = reservation.at_ms if reservation else 0
        bucket = FleetBucket(self._ledger, mailbox, extra, wait=wait, reserved_at_ms=reserved_at_ms)
        # Leaking would start a thread, and there is nothing to leak.
        pyrate = PyrateLimiter(SingleBucketFactory(bucket, schedule_leak=False))
        pyrate.try_acquire(weight=requests, blocking=False)
        if bucket.refusal:
            raise bucket.refusal
        return bucket.slot

    def renew(self, slot: Slot) -> None:
        """Hold a slot for the length of its lease from now on, once more if it had run out; never raises."""
        self._ledger.renew(slot)

    def release(self, slot: Slot) -> None:
        """Return a slot. Harmless when it was returned before or its lease has run out; never raises."""
        self._ledger.release(slot)

    def reserve(
        self, wanted: Mapping[str, Sequence[Wanted]]
    ) -> dict[str, list[Reservation | Exhausted | Emptied | NeverFits]]:
        """Charge in advance for sends that are about to be dispatched, in order, as many as fit.

        A send that is too large for what is left is passed over; a smaller one behind it may fit. Nothing is dispatched
        of a mailbox whose requests or upload bytes are used up either, though none are charged.

        Args:
            wanted: The sends, by mailbox.

        Returns:
            For each send what was charged or why nothing was.

        Raises:
            Unavailable: Redis does not answer; something may have been charged.
        """
        for send in (send for sends in wanted.values() for send in sends):
            check_units(send.charges().values())
        answers = self._ledger.reserve(wanted)
        return {
            mailbox: [_granted(at_ms, *each) for each in zip(verdicts, wanted[mailbox], strict=True)]
            for mailbox, (at_ms, verdicts) in answers.items()
        }

    def refund(self, mailbox: str, reservation: Reservation, send: Wanted) -> None:
        """Take back a reservation that was not used, once. Harmless when it has left its windows; never raises.

        Reservations have no names: what is given back twice may be another's, if both were charged together.
        """
        self._ledger.refund(mailbox, reservation.at_ms, send.charges())

    # Pauses

    def pause(self, mailbox: str, until: datetime | timedelta) -> datetime:
        """Let no process talk to the mailbox until then (a ``Retry-After``), and gently afterwards.

        A duration starts now on Redis's clock. A pause is never shortened: a longer one that is on stands.

        Returns:
            When the pause will end.
        """
        return self._ledger.pause(mailbox, until)

    def pause_all(self, until: datetime | timedelta) -> datetime:
        """Pause the whole tenant; else as `pause`."""
        return self._ledger.pause(TENANT, until)

    def throttled(self, mailbox: str, wait: timedelta, *, budget: str) -> tuple[Slowed | None, bool]:
        """Pause a mailbox that Graph throttled, and learn from it.

        The third time within ten minutes, pauses not counted, the budget is lowered to 60 % of the most that was used
        of it at any of the three: the first has emptied the window for the others. If ten mailboxes or more are
        throttled within 20 seconds, and half of those that talked to Graph, everything is paused.

        Args:
            budget: What Graph's words are about, or ``sends``, or ``requests``, after what was asked.

        Returns:
            How the budget was lowered, if it was now, and whether everything is paused.
        """
        return self._ledger.throttled(mailbox, wait, budget)

    def resume(self, mailbox: str) -> None:
        """End the mailbox's pause at once, and without a ramp. A pause of the tenant stays on."""
        self._ledger.resume(mailbox)

    def resume_all(self) -> None:
        """End the tenant's pause at once, and without a ramp. Pauses of mailboxes stay on."""
        self._ledger.resume(TENANT)

    def paused_until(self, mailbox: str) -> datetime | None:
        """Return when the mailbox may be used again, whether itself or the tenant is paused; None: it may be now."""
        return self._ledger.paused_until(mailbox, TENANT)

    def tenant_paused_until(self) -> datetime | None:
        """Return when the tenant's pause ends, or None."""
        return self._ledger.paused_until(TENANT)

    # Limits

    def set_limits(self, mailbox: str | None, limits: Mapping[str, int]) -> None:
        """Set limits in the place of the settings', by budget, for a mailbox or (None) for all and the tenant.

        They replace those that were set before, and bind every process from its next call on. 0 switches a limit off.
        PostgreSQL is where they are kept: whoever finds Redis emptied sets them again.
        """
        self._ledger.set_limits({mailbox: limits})

    def set_all_limits(self, limits: Mapping[str | None, Mapping[str, int]]) -> None:
        """Set limits as `set_limits` does, of many mailboxes together."""
        self._ledger.set_limits(limits)

    def set_slowed(self, mailbox: str, slowed: Iterable[Slowed]) -> None:
        """Set which limits of a mailbox are lowered, as `throttled` has told before."""
        self._ledger.set_slowed(mailbox, slowed)

    def usage(self, mailbox: str) -> list[BudgetUsage]:
        """Tell what is used of each of the mailbox's budgets, its slots (``concurrency``) first."""
        return self._ledger.usage(mailbox)

    def tenant_usage(self) -> list[BudgetUsage]:
        """Tell what is used of each of the tenant's budgets."""
        return self._ledger.usage(TENANT)

    # After a loss

    def is_whole(self) -> bool:
        """Say whether Redis still has all that was counted: it was neither emptied nor started anew."""
        return self._ledger.is_whole()

    def restoring(self) -> AbstractContextManager[bool]:
        """Write down in the block what was spent, with `spent` and `hold`; nobody is admitted meanwhile.

        Yields False if another process is at it, or has done it: then there is nothing to do. If the block fails, or
        Redis is started anew meanwhile, nobody is admitted until it is done again.
        """
        return self._ledger.restoring()

    def spent(self, entries: Iterable[Spent]) -> None:
        """Write down what was spent, in the place of what is counted of these budgets. Safe to repeat.

        Changes nothing but in a block of `restoring`: what was counted since must not be undone.
        """
        self._ledger.set_spent(entries)

    def hold(self, mailbox: str, tokens: Iterable[str], lease: timedelta) -> None:
        """Count calls that may be under way, by any tokens, as slots that are held for so long."""
        self._ledger.hold(mailbox, tokens, lease)

    # Turns

    def turn(self, name: str, lasts: timedelta) -> AbstractContextManager[bool]:
        """Do something in one process at a time, for so long at most; yields False if another is at it.

        Nothing may depend on it but economy: a process that stands still loses its turn without knowing.
        """
        return self._ledger.turn(name, lasts)


def _granted(at_ms: int, verdict: Verdict, send: Wanted) -> Reservation | Exhausted | Emptied | NeverFits:
    return refusal(verdict, send.charges().get(verdict.by, 0)) if verdict.by else Reservation(at_ms)
