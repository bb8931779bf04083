"""The fleet's one limiter: who may talk to Microsoft Graph now, decided in Redis by one atomic script.

Graph counts requests, bytes and concurrent calls per mailbox, whatever process they come from, and a throttled call
counts too; so the limits are kept before the call, by all processes together.

**The protocol.** `Limiter.slot` asks Redis once. The script looks at the pauses (what ``Retry-After`` demanded), the
mailbox's concurrent slots and every window the call is charged to, and takes all or nothing. A slot is a lease: a
worker that dies returns its slot when the lease runs out, and releasing a slot twice or late is harmless. Only Redis's
clock is read, so the workers' clocks may differ. Whoever cannot ask Redis may not call Graph (`Unavailable`).

**Windows.** A window is a ring of `SUBWINDOWS` + 1 counters and their sum, so its size and cost do not grow with the
traffic. What was charged stays counted until the whole sub-window has left: for the window's length and up to one
`SUBWINDOWS`-th more. The error is on the strict side only: at least 98 % of a limit is usable, never more than 100 %.

**After a pause** a mailbox's concurrency starts at one and doubles every `RAMP_STEP` until it reaches its limit, so
that the waiting mail does not arrive as the burst that was throttled. After a tenant's pause every mailbox does so.
Where concurrency is not limited there is no ramp.

**When Redis loses everything**, pauses, slots and windows start empty and the script is loaded anew. Until a window has
passed, up to one further limit may be used in it, and until the calls in flight end, as many slots again. Graph answers
too many calls or bytes with ``Retry-After``, which is a pause again; it does not answer too many sends or recipients.
Redis must not evict keys (``maxmemory-policy noeviction``): a window that is evicted is forgotten as well.

**Keys** name a mailbox by a digest of its lower-cased address, so that ``MONITOR``, the slow log and a dump show no
addresses. They share one hash tag: a call is charged to its mailbox and to the tenant in one step, which Redis Cluster
allows within one hash slot only. Every key expires.

**What is pyrate-limiter's**: `Rate` and `Duration` describe the windows; `FleetBucket` is a bucket by its contract, and
its `Limiter` asks the bucket. **What is ours**: the bucket's storage. pyrate's `RedisBucket` reads the workers' clocks
and so admits more than the limit, keeps an entry per unit (a budget of bytes would hold millions), has no slots, cannot
charge several budgets at once, and stays broken after a restart of Redis. pyrate keeps the verdict on the bucket and
holds the limiter's lock over the round trip; so that threads share neither, a bucket and its limiter live for one call.

Errors::

    Refused              not now; try again after `retry_after`
      Exhausted          a budget, the slots or a pause says no; nothing was charged
      Unavailable        Redis cannot say; Graph must not be called
    NeverFits            a ValueError: more than a budget's whole limit is asked for
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta

from pyrate_limiter import Limiter as PyrateLimiter
from pyrate_limiter import SingleBucketFactory
from redis import Redis

from .bucket import FleetBucket
from .budgets import WINDOWS, Budgets, BudgetUsage
from .ledger import RAMP_STEP, TENANT, Ledger, Slot, connect
from .refusals import Exhausted, NeverFits, Refused, Unavailable

__all__ = [
    "WINDOWS",
    "BudgetUsage",
    "Budgets",
    "Exhausted",
    "FleetBucket",
    "Limiter",
    "NeverFits",
    "Refused",
    "Slot",
    "Unavailable",
]


class Limiter:
    """The limits of every mailbox and of the tenant. Threads share one; it holds a connection pool and no state.

    Args:
        redis: A client, or a URL; a client made from a URL gives up after half a second and one retry.
        budgets: The limits, unless a call brings its own.
        slot_lease: How long a slot is held at most. Longer than any call to Graph takes, or more calls than slots run.
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
        self._budgets = budgets
        client = connect(redis) if isinstance(redis, str) else redis
        self._ledger = Ledger(client, slot_lease, ramp_step, windows, prefix)

    @contextmanager
    def slot(
        self,
        mailbox: str,
        *,
        requests: int = 1,
        sends: int = 0,
        recipients: int = 0,
        upload_bytes: int = 0,
        budgets: Budgets | None = None,
    ) -> Iterator[Slot]:
        """Hold one of the mailbox's slots for the length of the block; for the rest see `acquire`."""
        slot = self.acquire(
            mailbox, requests=requests, sends=sends, recipients=recipients, upload_bytes=upload_bytes, budgets=budgets
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
        sends: int = 0,
        recipients: int = 0,
        upload_bytes: int = 0,
        budgets: Budgets | None = None,
    ) -> Slot:
        """Take a slot and charge every budget that Graph will charge for the call, or nothing. Does not wait.

        Args:
            mailbox: Its address, in any case.
            requests: How many requests will be made in the slot, one after the other; charged to the tenant too.
            sends: How many messages will be sent.
            recipients: How many recipients they have together.
            upload_bytes: How many bytes of body will be uploaded.
            budgets: The mailbox's own limits, if it has any.

        Raises:
            Exhausted: A budget or the slots are used up, or mailbox or tenant is paused. Costs nothing.
            Unavailable: Redis does not answer.
            NeverFits: A charge is above its limit, however long one waits.
        """
        extra = {"sends": sends, "recipients": recipients, "upload_bytes": upload_bytes}
        if requests < 1 or min(extra.values()) < 0:
            raise ValueError("a call makes at least one request and charges nothing negative")
        bucket = FleetBucket(self._ledger, mailbox, budgets or self._budgets, extra)
        # Leaking would start a thread, and there is nothing to leak.
        pyrate = PyrateLimiter(SingleBucketFactory(bucket, schedule_leak=False))
        if not pyrate.try_acquire(weight=requests, blocking=False) and bucket.refusal:
            raise bucket.refusal
        return bucket.slot

    def release(self, slot: Slot) -> None:
        """Return a slot. Harmless when it was returned before or its lease has run out; never raises."""
        self._ledger.release(slot)

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

    def usage(self, mailbox: str, budgets: Budgets | None = None) -> list[BudgetUsage]:
        """Tell what is used of each of the mailbox's budgets that is limited, its slots (``concurrency``) first."""
        return self._ledger.usage(mailbox, budgets or self._budgets)

    def tenant_usage(self) -> list[BudgetUsage]:
        """Tell what is used of each of the tenant's budgets that is limited."""
        return self._ledger.usage(TENANT, self._budgets)
