"""The ledger in Redis: pauses, slots, windows and limits of the whole fleet, and how Redis is asked.

A decision is one script (see `scripts`): no two workers can both take what is left.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from operator import itemgetter
from secrets import token_hex
from typing import NamedTuple

from pyrate_limiter import Rate
from redis import Redis
from redis.exceptions import RedisError

from . import scripts
from .budgets import CONCURRENCY, Budgets, BudgetUsage, Slowed, Spent, Wanted, Window, check_units
from .connections import Opening, OwnConnections, Script
from .refusals import Unavailable

logger = logging.getLogger(__name__)

EPOCH = datetime.fromtimestamp(0, UTC)
MILLISECOND = timedelta(milliseconds=1)

#: The owner of what binds every mailbox. Not a string, for a mailbox may have any name.
TENANT = None

#: How soon to ask again when all slots are held. A hint, since nobody knows when a call to Graph will end.
SLOT_RETRY = timedelta(milliseconds=500)
#: A slot that is handed to a waiting call is the next one's if the call does not take it up by then: it may be dead.
HANDOVER = timedelta(seconds=1)
#: A waiting call looks by itself so often: a lease may have run out, which wakes nobody.
LOOK_AGAIN = timedelta(milliseconds=300)

#: How long concurrency stays at one, two, four … after a pause.
RAMP_STEP = timedelta(seconds=5)
#: How many such steps a pause is remembered for: after the last the limit alone counts.
RAMP_STEPS = 5

#: So many times within so long Graph throttles a mailbox before a limit of it is lowered: once may be anything.
STRIKES = 3
STRIKES_COUNT_FOR = timedelta(minutes=10)
#: What is left of a limit that is lowered, and the least it can come to, in percent of the whole.
SLOWED_TO_PERCENT = 60
SLOWED_TO_AT_LEAST_PERCENT = 10
#: So many throttled mailboxes within 20 s, if they are half of those that talked to Graph, are the tenant's matter.
THROTTLED_MAILBOXES = 10

#: Longer than finding out what was spent takes; writing it down takes as long as it needs, each part less than this.
_FINDING_OUT = timedelta(minutes=2)
_WRITING_DOWN = timedelta(seconds=30)
#: So many windows or limits are written down at a time: some 100 kB, some ten milliseconds of Redis's time.
_WRITTEN_TOGETHER = 100

#: Of so many mailboxes a process remembers the keys, and of so many kinds of call to one how it asks: some 5 kB each.
_KNOWN_MAILBOXES = 1_000
#: No pause is longer: its end must be a date.
_LONGEST_PAUSE = timedelta(days=36_500)

#: What a limit was set for, by the number that the scripts give.
_SET_FOR = (None, "set for every mailbox", "set for this mailbox")


class Slot(NamedTuple):
    """A held slot. It names its mailbox by digest, so it may be logged. What it cost was charged ``at_ms``."""

    owner: str
    token: str
    at_ms: int = 0


class Verdict(NamedTuple):
    """What the ledger says to a claim: what refuses it (see `scripts`), for how long, and if the charge is above the
    whole of a limit, that limit. If nothing refuses, ``wait_ms`` is the instant.
    """

    by: str
    wait_ms: int
    nothing_left: int
    limit: int

    @classmethod
    def parse(cls, answer: Sequence[int | bytes | str]) -> Verdict:
        """Read what a script says."""
        by, *numbers = answer
        return cls(_text(by), *numbers)  # type: ignore[arg-type]


class Ledger:
    """Asks Redis; the only place that knows its keys, and how it fails.

    Nothing is asked twice. A script may have run though its answer was lost: run again, it would charge twice, or give
    back what is another's. A connection that ended while it lay idle is no such case, for it is looked at and made anew
    before a command is sent (see `connections`).
    """

    def __init__(
        self,
        redis: Redis,
        budgets: Budgets,
        slot_lease: timedelta,
        ramp_step: timedelta,
        windows: Mapping[str, int],
        prefix: str,
    ) -> None:
        self._redis = redis
        self._limits = budgets.limits()
        self._lease = slot_lease
        self._ramp_step = ramp_step
        self._intervals = windows
        self._prefix = f"{prefix}:{{limits}}"
        own = OwnConnections(redis)
        self._admit = Script(own, scripts.ADMIT)
        self._release = Script(own, scripts.RELEASE)
        self._paused = Script(own, scripts.PAUSED)
        # A registered script sends its digest, and its text once if Redis does not know it (any more).
        self._reserve = redis.register_script(scripts.RESERVE)
        self._refund = redis.register_script(scripts.REFUND)
        self._usage = redis.register_script(scripts.USAGE)
        self._pause = redis.register_script(scripts.PAUSE)
        self._throttled = redis.register_script(scripts.THROTTLED)
        self._hold = redis.register_script(scripts.HOLD)
        self._whole = redis.register_script(scripts.WHOLE)
        self._restore = redis.register_script(scripts.RESTORE)
        self._restored = redis.register_script(scripts.RESTORED)
        self._spent = redis.register_script(scripts.SPENT)
        self._end_of_turn = redis.register_script(scripts.END_TURN)

        self._speed = (self._limits[CONCURRENCY], _ms(ramp_step))
        # Each call asks for its mailbox's keys, and they are a dozen.
        remembered = lru_cache(maxsize=_KNOWN_MAILBOXES)
        self.owner = remembered(self._owner)
        self.windows = remembered(self._windows)
        self._head = remembered(self._head_of)
        self._claim = remembered(self._claim_of)
        self._opening_of_release = remembered(self._open_release)
        in_order = sorted(windows.items(), key=itemgetter(1))
        self.rates = [Rate(max(self._limits[budget], 1), interval) for budget, interval in in_order]

    # Keys

    def _owner(self, mailbox: str | None) -> str:
        """Return how keys name a mailbox, or the `TENANT`."""
        return "tenant" if mailbox is TENANT else sha256(mailbox.lower().encode()).hexdigest()[:32]

    def _windows(self, mailbox: str | None) -> tuple[Window, ...]:
        """Return the windows in which a mailbox, or the `TENANT`, is counted."""
        owner = self.owner(mailbox)
        return tuple(
            # The interval is part of the key, for a ring of other sub-windows could not be read.
            Window.of(budget, self._key(owner, f"{budget}:{interval}"), self._limits[budget], interval)
            for budget, interval in self._intervals.items()
            if budget.startswith("tenant_") == (mailbox is TENANT)
        )

    def _window(self, mailbox: str | None, budget: str) -> Window:
        for window in self.windows(mailbox):
            if window.budget == budget:
                return window
        raise ValueError(f"{budget}: no budget of a {'tenant' if mailbox is TENANT else 'mailbox'}")

    def _key(self, owner: str, of: str) -> str:
        return f"{self._prefix}:{owner}:{of}"

    def _head_of(self, owner: str) -> tuple[str, ...]:
        """Return the keys of `scripts.HEAD`."""
        own = [self._key(owner, of) for of in ("limits", "slowed", "pause")]
        waiting = [self._key(owner, of) for of in ("slots", "waiting_send", "waiting")]
        tenants = self._key("tenant", "limits")
        return (self._born, tenants, *own, self._key("tenant", "pause"), *waiting)

    # Calls

    def admit(
        self, slot: Slot, mailbox: str, charges: Mapping[str, int], *, wait: timedelta, reserved_at_ms: int
    ) -> Verdict:
        """Take the slot and every charge, or nothing; wait for a slot if it is only that. No charge may be 0."""
        opening, described = self._claim(mailbox, tuple(charges))
        windows, sends = described % charges, int("sends" in charges)

        def ask(wait_ms: int) -> Verdict:
            return Verdict.parse(self._admit.ask(opening, windows, slot.token, wait_ms, sends, reserved_at_ms))

        with _answering():
            return self._wait_for(slot, wait, ask) if wait > timedelta() else ask(0)

    def _claim_of(self, mailbox: str, charged: tuple[str, ...]) -> tuple[Opening, str]:
        """Return what is the same in each call that charges these budgets, and their windows but for the units."""
        windows = [each for each in self.windows(mailbox) + self.windows(TENANT) if each.budget in charged]
        keys = [*self._head(self.owner(mailbox)), *(window.key for window in windows)]
        leases = (_ms(self._lease), _ms(SLOT_RETRY), _ms(HANDOVER))
        prefixes = (self._key("tenant", "talking:"), self._key("tenant", "woken:"))
        described = " ".join(window.described(f"%({window.budget})d") for window in windows)
        return self._admit.opening(keys, [*self._speed, *leases, *prefixes]), described

    def _wait_for(self, slot: Slot, wait: timedelta, ask: Callable[[int], Verdict]) -> Verdict:
        """Ask, again when woken, and by itself from time to time, until nothing or something else refuses."""
        admitted, ends = False, time.monotonic() + wait.total_seconds()
        try:
            while True:
                left = ends - time.monotonic()
                verdict = ask(max(0, round(left * 1000)))
                admitted = verdict.by == ""
                if verdict.by != CONCURRENCY or left <= 0:
                    return verdict
                # Redis takes a wait of less than a millisecond for one without end.
                timeout = max(0.001, min(left, LOOK_AGAIN.total_seconds()))
                self._redis.blpop([self._key("tenant", f"woken:{slot.token}")], timeout=timeout)
        finally:
            if not admitted:
                # Whoever stops waiting, for whatever reason, must not be handed a slot, or hands it on.
                self.release(slot)

    def renew(self, slot: Slot) -> None:
        """Have the slot's lease begin anew. Never raises: the call that it is for goes on whatever Redis says."""
        try:
            self._hold(self._head(slot.owner), [_ms(self._lease), slot.token])
        except RedisError as error:
            logger.warning("Redis does not answer, a slot's lease is not renewed: %s", type(error).__name__)

    def release(self, slot: Slot) -> None:
        """Return a slot, held or not. Never raises: the call it was for is over, and its lease returns it too."""
        try:
            self._release.ask(self._opening_of_release(slot.owner), slot.token)
        except RedisError as error:
            logger.warning("Redis does not answer, a slot is left to its lease: %s", type(error).__name__)

    def _open_release(self, owner: str) -> Opening:
        return self._release.opening(self._head(owner), [*self._speed, _ms(HANDOVER), self._key("tenant", "woken:")])

    def reserve(self, wanted: Mapping[str, Sequence[Wanted]]) -> dict[str, tuple[int, list[Verdict]]]:
        """Charge for the sends of each mailbox what fits.

        Returns:
            For each mailbox the instant in milliseconds, and a verdict for each of its sends; all refused by
            ``emptied`` if the counts are lost.
        """
        tenants = self.windows(TENANT)
        with _answering(), self._redis.pipeline(transaction=False) as pipeline:
            self._whole([self._born], client=pipeline)
            for mailbox, sends in wanted.items():
                windows = self.windows(mailbox) + tenants
                described = " ".join(window.described(_COUNTED.get(window.budget, 0)) for window in windows)
                counts = " ".join(f"{send.recipients} {send.external_recipients}" for send in sends)
                keys = [*self._head(self.owner(mailbox)), *(window.key for window in windows)]
                self._reserve(keys, [*self._speed, described, counts], client=pipeline)
            _, *answers = pipeline.execute()
        lost = Verdict("emptied", 0, 1, 0)
        return {
            mailbox: (at_ms, [Verdict.parse(each) for each in verdicts] if at_ms >= 0 else [lost] * len(sends))
            for (mailbox, sends), (at_ms, *verdicts) in zip(wanted.items(), answers, strict=True)
        }

    def refund(self, mailbox: str, reserved_at_ms: int, charges: Mapping[str, int]) -> None:
        """Take back what was reserved and will not be used. Never raises: a charge that stays is on the strict side."""
        windows = [w for w in self.windows(mailbox) + self.windows(TENANT) if charges.get(w.budget)]
        described = [number for w in windows for number in (w.width, w.ring, charges[w.budget])]
        try:
            self._refund([window.key for window in windows], [reserved_at_ms, *described])
        except RedisError as error:
            logger.warning("Redis does not answer, a reservation stays charged: %s", type(error).__name__)

    def usage(self, mailbox: str | None) -> list[BudgetUsage]:
        """Tell what a mailbox, or the `TENANT`, uses of each budget, its slots first."""
        windows = self.windows(mailbox)
        keys = [*self._head(self.owner(mailbox)), *(window.key for window in windows)]
        with _answering():
            answer = self._usage(keys, [*self._speed, " ".join(window.described(0) for window in windows)])
        found = zip([CONCURRENCY, *(window.budget for window in windows)], answer, strict=True)
        return [_usage(budget, *told) for budget, told in found if mailbox is not TENANT or budget != CONCURRENCY]

    # Pauses

    def pause(self, mailbox: str | None, until: datetime | timedelta) -> datetime:
        """Pause a mailbox or the `TENANT` until an instant, or for a while that starts now on Redis's clock."""
        from_now = int(isinstance(until, timedelta))
        length = min(until, _LONGEST_PAUSE) if isinstance(until, timedelta) else until - EPOCH
        with _answering():
            ends: int = self._pause([self._key(self.owner(mailbox), "pause")], [_ms(length), from_now, self._ramp_ms])
        return EPOCH + ends * MILLISECOND

    @property
    def _ramp_ms(self) -> int:
        return _ms(RAMP_STEPS * self._ramp_step)

    def resume(self, mailbox: str | None) -> None:
        """End a pause at once, and its ramp."""
        with _answering():
            self._redis.delete(self._key(self.owner(mailbox), "pause"))

    def paused_until(self, *mailboxes: str | None) -> datetime | None:
        """Return when the last of these pauses ends, or None when none is on."""
        with _answering():
            pauses = self._paused.opening([self._key(self.owner(mailbox), "pause") for mailbox in mailboxes])
            ends: int | None = self._paused.ask(pauses)
        return None if ends is None else EPOCH + ends * MILLISECOND

    def throttled(self, mailbox: str, wait: timedelta, budget: str) -> tuple[Slowed | None, bool]:
        """Pause what Graph throttled, and lower the budget if it happens again and again.

        Returns:
            How the budget was lowered, if it was, and whether the whole tenant is paused.
        """
        owner = self.owner(mailbox)
        windows = [] if budget == CONCURRENCY else [self._window(mailbox, budget)]
        keys = [*self._head(owner), self._key(owner, f"strikes:{budget}"), *(window.key for window in windows)]
        width, ring = (windows[0].width, windows[0].ring) if windows else (0, 0)
        learning = (STRIKES, _ms(STRIKES_COUNT_FOR), SLOWED_TO_PERCENT, SLOWED_TO_AT_LEAST_PERCENT)
        prefixes = (self._key("tenant", "talking:"), self._key("tenant", "throttled:"))
        pause = (_ms(min(wait, _LONGEST_PAUSE)), self._ramp_ms)
        arguments: list[str | int] = [*self._speed, budget, self._limits[budget], width, ring, *learning, *prefixes]
        with _answering():
            record, tenants = self._throttled(keys, [*arguments, THROTTLED_MAILBOXES, *pause])
        return Slowed.parse(budget, _text(record)) if record else None, bool(tenants)

    # What outlives Redis

    def set_limits(self, limits: Mapping[str | None, Mapping[str, int]]) -> None:
        """Set the own limits of mailboxes, and the fleet's (`TENANT`), in the place of those that each has."""
        for mailbox, own in limits.items():
            for budget in own:
                if budget not in self._limits or (mailbox is not TENANT and budget.startswith("tenant_")):
                    raise ValueError(f"{budget}: no such limit here")
            check_units(own.values())
        self._write_hashes({self._key(self.owner(mailbox), "limits"): own for mailbox, own in limits.items()})

    def set_slowed(self, mailbox: str, slowed: Iterable[Slowed]) -> None:
        """Set which limits of a mailbox are lowered, in the place of those that are."""
        records = {each.budget: each.record() for each in slowed}
        for budget in records.keys() - {CONCURRENCY}:
            self._window(mailbox, budget)
        self._write_hashes({self._key(self.owner(mailbox), "slowed"): records}, lasts_ms=scripts.RECOVERY_MS)

    def _write_hashes(
        self, hashes: Mapping[str, Mapping[str, int] | Mapping[str, str]], lasts_ms: int | None = None
    ) -> None:
        written = list(hashes.items())
        for first in range(0, len(written), _WRITTEN_TOGETHER):
            with _answering(), self._redis.pipeline() as pipeline:
                for key, fields in written[first : first + _WRITTEN_TOGETHER]:
                    pipeline.delete(key)
                    if fields:
                        pipeline.hset(key, mapping=dict(fields.items()))
                    if lasts_ms:
                        pipeline.pexpire(key, lasts_ms)
                pipeline.execute()

    # After a loss

    @property
    def _born(self) -> str:
        return f"{self._prefix}:born"

    @property
    def _restoring(self) -> str:
        return f"{self._prefix}:turn:restoring"

    def set_spent(self, entries: Iterable[Spent]) -> None:
        """Write down what was spent, in the place of what is counted of each budget that is named."""
        parts: dict[tuple[str | None, str], Counter[int]] = {}
        for entry in entries:
            window = self._window(entry.mailbox, entry.budget)
            check_units([entry.units])
            # As young as the youngest of its sub-window: it counts no shorter than it should.
            age_ms = max(0, entry.age // MILLISECOND) // window.width * window.width
            if age_ms <= window.width * window.ring:
                parts.setdefault((entry.mailbox, entry.budget), Counter())[age_ms] += entry.units
        spent_on = list(parts.items())
        for first in range(0, len(spent_on), _WRITTEN_TOGETHER):
            together = spent_on[first : first + _WRITTEN_TOGETHER]
            with _answering(), self._redis.pipeline(transaction=False) as pipeline:
                for (mailbox, budget), spent in together:
                    window = self._window(mailbox, budget)
                    described = [number for part in spent.items() for number in part]
                    self._spent([self._born, window.key], [window.width, window.ring, *described], client=pipeline)
                pipeline.pexpire(self._restoring, _WRITING_DOWN)
                pipeline.execute()

    def hold(self, mailbox: str, tokens: Iterable[str], lease: timedelta) -> None:
        """Have these slots held for a while, by whoever holds the tokens."""
        arguments: list[str | int] = [_ms(lease), *tokens]
        with _answering():
            self._hold(self._head(self.owner(mailbox)), arguments)

    def is_whole(self) -> bool:
        """Say whether this Redis is the one that was filled last, and has lost nothing since."""
        with _answering():
            return bool(self._whole([self._born]))

    @contextmanager
    def restoring(self) -> Iterator[bool]:
        """Let one process at a time write down what was spent, and nobody spend meanwhile; False: nothing is to do."""
        token, keys = token_hex(8), [self._born, self._restoring]
        with _answering():
            # Asked before anything is written: a Redis that is started anew meanwhile has not all of it.
            run_id = self._restore(keys, [token, _ms(_FINDING_OUT)])
        if not run_id:
            yield False
            return
        try:
            yield True
            with _answering():
                self._restored(keys, [token, run_id])
        finally:
            self._end_turn(self._restoring, token)

    @contextmanager
    def turn(self, name: str, lasts: timedelta) -> Iterator[bool]:
        """Do something in one process at a time; False: another is at it. It is a courtesy, not a lock."""
        token, key = token_hex(8), f"{self._prefix}:turn:{name}"
        with _answering():
            taken = bool(self._redis.set(key, token, nx=True, px=_ms(lasts)))
        try:
            yield taken
        finally:
            if taken:
                self._end_turn(key, token)

    def _end_turn(self, key: str, token: str) -> None:
        try:
            self._end_of_turn([key], [token])
        except RedisError as error:
            logger.warning("Redis does not answer, a turn ends by itself: %s", type(error).__name__)


#: What an email counts for, as `scripts.RESERVE` wants it told.
_COUNTED = {"sends": 1, "recipients": 2, "tenant_external_recipients": 3}


def _usage(
    budget: str, limit: int, used: int, wait_ms: int, all_ms: int, set_to: int, by: int, slowed: bytes | str
) -> BudgetUsage:
    why = "set for the tenant" if by and budget.startswith("tenant_") else _SET_FOR[by]
    if limit != set_to:
        why = str(Slowed.parse(budget, _text(slowed)))
    next_free_in, all_free_in = (None if ms < 0 else ms * MILLISECOND for ms in (wait_ms, all_ms))
    return BudgetUsage(budget, limit, used, next_free_in, set_to, why, all_free_in)


@contextmanager
def _answering() -> Iterator[None]:
    """Translate whatever keeps Redis from answering: refused, timed out, loading, full, read-only."""
    try:
        yield
    except RedisError as error:
        raise Unavailable from error


def _text(answer: bytes | str) -> str:
    """A client may decode what Redis says, or not."""
    return answer.decode() if isinstance(answer, bytes) else answer


def _ms(duration: timedelta) -> int:
    """Whole milliseconds, rounded up: a wait must not end early."""
    return -(-duration // MILLISECOND)
