"""The ledger in Redis: pauses, slots and windows of the whole fleet, and the scripts that read and charge them.

A decision is one script, because Redis runs nothing else meanwhile: no two workers can both take what is left.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import NamedTuple

from pyrate_limiter import Rate
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from .budgets import Budgets, BudgetUsage, Window
from .refusals import Unavailable

logger = logging.getLogger(__name__)

EPOCH = datetime.fromtimestamp(0, UTC)
MILLISECOND = timedelta(milliseconds=1)

#: The owner of what binds every mailbox. Not a string, for a mailbox may have any name.
TENANT = None

#: How soon to ask again when all slots are held. A hint, since nobody knows when a call to Graph will end.
SLOT_RETRY = timedelta(milliseconds=250)

#: How long concurrency stays at one, two, four … after a pause.
RAMP_STEP = timedelta(seconds=5)

#: How many such steps a pause is remembered for: after the last the limit alone counts.
RAMP_STEPS = 5

#: How long to wait for Redis, in seconds as redis-py wants it, before the one retry and before giving up.
REDIS_TIMEOUT_SECONDS = 0.5


class Slot(NamedTuple):
    """A held slot. It names its mailbox by digest, so it may be logged."""

    key: str
    token: str


class Verdict(NamedTuple):
    """What the ledger says to a claim: ``by`` counts the keys that may refuse from 1, in the order they were given."""

    by: int
    wait_ms: int
    nothing_left: int


_WINDOW = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- A window's use now, and the fields of the sub-windows that have left it since it was last charged.
local function read(key, width, ring)
  local stored = redis.call('HMGET', key, 'used', 'last')
  local used, current = tonumber(stored[1] or 0), math.floor(now / width)
  local last = tonumber(stored[2] or current)
  current = math.max(current, last) -- a clock that was set back must not free anything
  local left = {}
  for i = last + 1, math.min(current, last + ring) do left[#left + 1] = i % ring end
  if #left > 0 then
    for _, units in ipairs(redis.call('HMGET', key, unpack(left))) do used = used - tonumber(units or 0) end
  end
  return {key = key, width = width, ring = ring, last = last, current = current, used = used, left = left}
end

-- Milliseconds until so many of the used units have left the window.
local function frees(window, units)
  for i = window.current - window.ring + 1, window.last do
    units = units - tonumber(redis.call('HGET', window.key, i % window.ring) or 0)
    if units <= 0 then return (i + window.ring) * window.width - now end
  end
end

local function charge(window, units)
  if #window.left > 0 then redis.call('HDEL', window.key, unpack(window.left)) end
  redis.call('HINCRBY', window.key, window.current % window.ring, units)
  redis.call('HSET', window.key, 'used', window.used + units, 'last', window.current)
  redis.call('PEXPIRE', window.key, (window.ring + 1) * window.width)
end
"""

#: KEYS: the mailbox's pause, the tenant's pause, the mailbox's slots, then a window each.
#: ARGV: token, concurrency, lease, slot retry, ramp step, then units, limit, width and ring of each window.
#: Returns the number of the key that refuses for longest (0: admitted), its wait, and 1 if nothing is left of it.
_ADMIT = (
    _WINDOW
    + """
local token, concurrency, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local refusal = {0, 0, 0}
local function refuse(by, wait, nothing_left)
  -- A refusal stands whatever its wait: an error in a wait must not admit anything.
  if wait > refusal[2] or refusal[1] == 0 then refusal = {by, wait, nothing_left} end
end

for i = 1, 2 do
  local ends = tonumber(redis.call('GET', KEYS[i]) or 0)
  if ends > now then
    refuse(i, ends - now, 1)
  elseif ends > 0 then
    concurrency = math.min(concurrency, 2 ^ math.floor((now - ends) / tonumber(ARGV[5])))
  end
end

if concurrency > 0 and redis.call('ZCOUNT', KEYS[3], '(' .. now, '+inf') >= concurrency then
  refuse(3, tonumber(ARGV[4]), 1)
end

local windows = {}
for i = 4, #KEYS do
  local first = 6 + (i - 4) * 4
  local units, limit = tonumber(ARGV[first]), tonumber(ARGV[first + 1])
  local window = read(KEYS[i], tonumber(ARGV[first + 2]), tonumber(ARGV[first + 3]))
  local excess = window.used + units - limit
  if excess > 0 then refuse(i, frees(window, excess), window.used >= limit and 1 or 0) end
  windows[#windows + 1] = {window, units}
end

if refusal[1] > 0 then return refusal end

if concurrency > 0 then
  redis.call('ZADD', KEYS[3], now + lease, token) -- first, for a full Redis refuses a script's first write only
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
  redis.call('PEXPIRE', KEYS[3], math.max(lease, redis.call('PTTL', KEYS[3])))
end
for _, each in ipairs(windows) do charge(each[1], each[2]) end
return refusal
"""
)

#: KEYS: slots, then a window each. ARGV: width and ring of each window.
#: Returns for each key what is used and the milliseconds until a part of it comes back (-1: nothing is used).
_USAGE = (
    _WINDOW
    + """
local first = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
local answer = {{redis.call('ZCOUNT', KEYS[1], '(' .. now, '+inf'), first[2] and first[2] - now or -1}}
for i = 2, #KEYS do
  local window = read(KEYS[i], tonumber(ARGV[2 * i - 3]), tonumber(ARGV[2 * i - 2]))
  answer[i] = {window.used, window.used > 0 and frees(window, 1) or -1}
end
return answer
"""
)

#: KEYS: a pause. ARGV: milliseconds, 1 if they count from now (else from 1970), how long the ramp is remembered.
#: Returns when the pause ends. A longer pause that is already there stands.
_PAUSE = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local ends = tonumber(ARGV[1])
if ARGV[2] == '1' then ends = now + ends end
ends = math.max(ends, tonumber(redis.call('GET', KEYS[1]) or 0))
if ends > now then redis.call('SET', KEYS[1], ends, 'PX', ends - now + ARGV[3]) end
return ends
"""

#: KEYS: pauses. Returns when the last of them ends, or nil when none is on.
_PAUSED = """
local clock = redis.call('TIME')
local now, ends = clock[1] * 1000 + math.floor(clock[2] / 1000), 0
for _, key in ipairs(KEYS) do ends = math.max(ends, tonumber(redis.call('GET', key) or 0)) end
return ends > now and ends or nil
"""


class Ledger:
    """Asks Redis; the only place that knows its keys, and how it fails."""

    def __init__(
        self, redis: Redis, slot_lease: timedelta, ramp_step: timedelta, windows: Mapping[str, int], prefix: str
    ) -> None:
        self._redis = redis
        self._lease = slot_lease
        self._ramp_step = ramp_step
        self._windows = windows
        self._prefix = f"{prefix}:{{limits}}"
        # A registered script sends its digest, and its text once if Redis does not know it (any more).
        self._admit = redis.register_script(_ADMIT)
        self._usage = redis.register_script(_USAGE)
        self._pause = redis.register_script(_PAUSE)
        self._paused = redis.register_script(_PAUSED)

    def key(self, owner: str | None, of: str) -> str:
        """Return the key of something that belongs to a mailbox or to the `TENANT`."""
        return f"{self._prefix}:{'tenant' if owner is TENANT else _digest(owner)}:{of}"

    def windows(self, owner: str | None, budgets: Budgets) -> list[Window]:
        """Return the windows in which a mailbox, or the `TENANT`, is counted; a limit of 0 has none."""
        limits = budgets.limits()
        return [
            # The interval is part of the key, for a ring of other sub-windows could not be read.
            Window(budget, self.key(owner, f"{budget}:{interval}"), Rate(limits[budget], interval))
            for budget, interval in self._windows.items()
            if limits[budget] and budget.startswith("tenant_") == (owner is TENANT)
        ]

    def admit(self, mailbox: str, slot: Slot, concurrency: int, charges: Sequence[tuple[Window, int]]) -> Verdict:
        """Take the slot and every charge, or nothing. The pauses of mailbox and tenant and the slots come first in
        `Verdict.by`, then the charges.
        """
        keys = [self.key(mailbox, "pause"), self.key(TENANT, "pause"), slot.key]
        args: list[str | int] = [slot.token, concurrency, _ms(self._lease), _ms(SLOT_RETRY), _ms(self._ramp_step)]
        for window, units in charges:
            keys.append(window.key)
            args += (units, window.rate.limit, window.width, window.ring)
        with _answering():
            return Verdict(*self._admit(keys, args))

    def release(self, slot: Slot) -> None:
        """Return a slot, held or not. Never raises: the call it was for is over, and its lease returns it too."""
        try:
            self._redis.zrem(slot.key, slot.token)
        except RedisError as error:
            logger.warning("Redis does not answer, a slot is left to its lease: %s", type(error).__name__)

    def usage(self, owner: str | None, budgets: Budgets) -> list[BudgetUsage]:
        """Tell what a mailbox, or the `TENANT`, uses of each budget that is limited, its slots first."""
        windows = self.windows(owner, budgets)
        keys = [self.key(owner, "slots"), *(window.key for window in windows)]
        limits = [("concurrency", 0 if owner is TENANT else budgets.mailbox_concurrency)]
        limits += [(window.budget, window.rate.limit) for window in windows]
        with _answering():
            answer = self._usage(keys, [number for window in windows for number in (window.width, window.ring)])
        return [
            BudgetUsage(budget, limit, used, None if wait_ms < 0 else wait_ms * MILLISECOND)
            for (budget, limit), (used, wait_ms) in zip(limits, answer, strict=True)
            if limit
        ]

    def pause(self, owner: str | None, until: datetime | timedelta) -> datetime:
        """Pause a mailbox or the `TENANT` until an instant, or for a while that starts now on Redis's clock."""
        from_now = int(isinstance(until, timedelta))
        length = until if isinstance(until, timedelta) else until - EPOCH
        with _answering():
            ends: int = self._pause(
                [self.key(owner, "pause")], [_ms(length), from_now, _ms(RAMP_STEPS * self._ramp_step)]
            )
        return EPOCH + ends * MILLISECOND

    def resume(self, owner: str | None) -> None:
        """End a pause at once, and its ramp."""
        with _answering():
            self._redis.delete(self.key(owner, "pause"))

    def paused_until(self, *owners: str | None) -> datetime | None:
        """Return when the last of these pauses ends, or None when none is on."""
        with _answering():
            ends: int | None = self._paused([self.key(owner, "pause") for owner in owners])
        return None if ends is None else EPOCH + ends * MILLISECOND


def connect(url: str) -> Redis:
    """Return a client that gives up soon: a worker that waits for Redis holds a thread and sends nothing."""
    return Redis.from_url(
        url,
        socket_timeout=REDIS_TIMEOUT_SECONDS,
        socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), retries=1),
    )


@contextmanager
def _answering() -> Iterator[None]:
    """Translate whatever keeps Redis from answering: refused, timed out, loading, full, read-only."""
    try:
        yield
    except RedisError as error:
        raise Unavailable from error


def _digest(mailbox: str) -> str:
    return sha256(mailbox.lower().encode()).hexdigest()[:32]


def _ms(duration: timedelta) -> int:
    """Whole milliseconds, rounded up: a wait must not end early."""
    return -(-duration // MILLISECOND)
