"""The limiter against a real Redis: what the fleet may do together, whichever process asks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import limiter_support
import pyrate_limiter
import pytest
from limiter_support import (
    LEASE,
    LONG,
    MAILBOX,
    MILLISECOND,
    MINUTE,
    SECOND,
    UNLIMITED,
    WINDOWS,
    busiest,
    eventually,
    keys_of,
    let_pass,
    run_all,
    usage_of,
    used,
    worker,
)
from redis import Redis

from limiter import Budgets, Exhausted, FleetBucket, Limiter, NeverFits, Refused, Wanted
from limiter.ledger import Ledger

limiter_redis, client = limiter_support.limiter_redis, limiter_support.client
prefix, make = limiter_support.prefix, limiter_support.make

Make = Callable[..., Limiter]
ONE = Wanted(1, 0)


# ---- the fleet: several processes, several threads ----


def skewed(clock: Callable[[], float], skew: float) -> Callable[[], float]:
    return lambda: clock() + skew


def hammer(url: str, prefix: str, budgets: Budgets, skew: float, lasts: timedelta) -> None:
    """Admit as much as the limiter allows, in a process whose clocks are wrong, and keep every slot."""
    for name in ("time", "monotonic"):
        setattr(time, name, skewed(getattr(time, name), skew))
    limiter = Limiter(url, budgets, timedelta(hours=1), windows={**WINDOWS, "requests": 1000}, prefix=prefix)
    ends = time.monotonic() + lasts.total_seconds()

    def work() -> None:
        while time.monotonic() < ends:
            try:
                limiter.acquire("busy@example.com")
            except Exhausted as exhausted:
                let_pass(min(exhausted.retry_after, timedelta(milliseconds=20)))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()


def test_fleet_uses_a_limit_fully_but_never_exceeds_it_in_any_window_whatever_its_clocks_say(
    limiter_redis: str, prefix: str, client: Redis
) -> None:
    # Given 4 processes of 4 threads, whose clocks are up to an hour apart
    budgets = Budgets(10**9, 50, 0, 0, 0, 0, 0)
    skews = (0.0, 0.7, -0.7, 3600.0)
    # When all of them ask for one mailbox as fast as they can
    run_all(hammer, [(limiter_redis, prefix, budgets, skew, 4 * SECOND) for skew in skews])
    # Then no second has more than 50 admissions by Redis's clock, which each slot's lease counts from
    (slots,) = (key for key in keys_of(client, prefix) if key.endswith(":slots"))
    times = [int(score) for _, score in client.zrange(slots, 0, -1, withscores=True)]
    assert busiest([(at, 1) for at in times], 1000) == 50
    # And each further 50 come hardly later: counted from burst to burst, as the end may cut one short
    bursts = (len(times) - 1) // 50
    assert bursts >= 2
    assert times[bursts * 50] - times[0] <= bursts * 1000 / 0.95


def hold_slots(url: str, prefix: str, rounds: int) -> None:
    limiter = Limiter(url, Budgets(4, 0, 0, 0, 0, 0, 0), LEASE, prefix=prefix)
    client = Redis.from_url(url)

    def work() -> None:
        for _ in range(rounds):
            with suppress(Exhausted), limiter.slot("busy@example.com"):
                client.lpush(f"{prefix}:held", client.incr(f"{prefix}:now"))
                client.decr(f"{prefix}:now")

    with client, ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()


def test_fleet_never_holds_more_slots_of_a_mailbox_than_its_concurrency(
    limiter_redis: str, prefix: str, client: Redis, make: Make
) -> None:
    # When 16 threads in 4 processes take and return slots
    run_all(hold_slots, [(limiter_redis, prefix, 200)] * 4)
    # Then up to 4 were held at once, never 5, and all came back
    assert max(map(int, client.lrange(f"{prefix}:held", 0, -1))) == 4
    assert used(make(Budgets()), "busy@example.com")["concurrency"] == 0
    client.delete(f"{prefix}:held", f"{prefix}:now")


def hold_until_killed(url: str, prefix: str, lease: timedelta) -> None:
    limiter = Limiter(url, Budgets(4, 0, 0, 0, 0, 0, 0), lease, prefix=prefix)
    for _ in range(4):
        limiter.acquire("busy@example.com")
    signal.pause()


def test_slots_of_a_killed_worker_come_back_when_their_lease_runs_out(
    limiter_redis: str, prefix: str, make: Make
) -> None:
    # Given a worker that is killed while it holds all slots
    limiter, lease = make(Budgets(4, 0, 0, 0, 0, 0, 0)), 3 * SECOND
    with worker(hold_until_killed, limiter_redis, prefix, lease):
        eventually(lambda: used(limiter, "busy@example.com")["concurrency"] == 4)
    with pytest.raises(Exhausted):
        limiter.acquire("busy@example.com")
    # When the lease runs out
    let_pass(limiter.usage("busy@example.com")[0].next_free_in)
    # Then the slots are free
    eventually(lambda: used(limiter, "busy@example.com")["concurrency"] == 0, within=SECOND)
    limiter.acquire("busy@example.com")


def pause_from_elsewhere(url: str, prefix: str) -> None:
    Limiter(url, UNLIMITED, LEASE, prefix=prefix).pause("throttled@example.com", timedelta(minutes=1))


def test_pause_binds_every_process(limiter_redis: str, prefix: str, make: Make) -> None:
    # When another process pauses a mailbox
    limiter = make()
    run_all(pause_from_elsewhere, [(limiter_redis, prefix)])
    # Then this one may not use it, in whatever case its address is written, but may use others
    with pytest.raises(Exhausted) as refused:
        limiter.acquire("Throttled@Example.com")
    assert (refused.value.budget, refused.value.mailbox_wide) == ("pause", True)
    assert timedelta(seconds=55) < refused.value.retry_after <= timedelta(minutes=1)
    limiter.acquire("other@example.com")


# ---- budgets ----

CHARGES = [
    (Budgets(0, 3, 0, 0, 0, 0, 0), {}, "requests"),
    (Budgets(0, 0, 3, 0, 0, 0, 0), {"upload_bytes": 1_000_000}, "upload_bytes"),
    (Budgets(0, 0, 0, 3, 0, 0, 0), {"send": Wanted(5, 5)}, "sends"),
    (Budgets(0, 0, 0, 0, 3, 0, 0), {"send": ONE}, "recipients"),
    (Budgets(0, 0, 0, 0, 0, 3, 0), {}, "tenant_requests"),
    (Budgets(0, 0, 0, 0, 0, 0, 3), {"send": Wanted(2, 1)}, "tenant_external_recipients"),
]


@pytest.mark.parametrize(("budgets", "charge", "budget"), CHARGES, ids=[budget for _, _, budget in CHARGES])
def test_budget_admits_its_limit_exactly_and_again_after_the_wait_it_names(
    make: Make, budgets: Budgets, charge: dict[str, Any], budget: str
) -> None:
    # Given a budget of three that is used up
    limiter = make(budgets)
    for _ in range(3):
        limiter.acquire("a@example.com", **charge)
    # When a fourth asks
    with pytest.raises(Exhausted) as refused:
        limiter.acquire("a@example.com", **charge)
    # Then it is told which budget, and a wait of about the window
    assert (refused.value.budget, refused.value.mailbox_wide) == (budget, True)
    assert refused.value.retry_after <= timedelta(milliseconds=WINDOWS[budget] * 1.1)
    # And it is admitted after that wait
    let_pass(refused.value.retry_after)
    limiter.acquire("a@example.com", **charge)


def test_waiting_less_than_told_is_refused_again(make: Make) -> None:
    # Given a window of some seconds that is full
    limiter = make(Budgets(0, 1, 0, 0, 0, 0, 0), windows={**WINDOWS, "requests": 2_000})
    limiter.acquire("a@example.com")
    with pytest.raises(Exhausted) as first:
        limiter.acquire("a@example.com")
    # When asked again after a tenth of the wait
    let_pass(first.value.retry_after / 10)
    with pytest.raises(Exhausted) as second:
        limiter.acquire("a@example.com")
    # Then the end has not moved
    assert first.value.retry_after * 0.5 < second.value.retry_after < first.value.retry_after


def test_refusal_costs_nothing(make: Make) -> None:
    # Given a mailbox with two sends left and one recipient too few
    limiter = make(Budgets(4, 100, 1, 2, 10, 100, 0), windows={**WINDOWS, **dict.fromkeys(WINDOWS, 60_000)})
    limiter.release(limiter.acquire("a@example.com", recipients=8))
    before, tenant_before = used(limiter, "a@example.com"), limiter.tenant_usage()[0].used
    # When a send to three asks
    with pytest.raises(Exhausted) as refused:
        limiter.acquire("a@example.com", sends=1, recipients=3, upload_bytes=10)
    # Then no other budget is charged, and a smaller send is not ruled out
    assert (refused.value.budget, refused.value.mailbox_wide) == ("recipients", False)
    assert (used(limiter, "a@example.com"), limiter.tenant_usage()[0].used) == (before, tenant_before)
    limiter.acquire("a@example.com", sends=1, recipients=2, upload_bytes=10)


def test_refusal_names_the_longest_of_several_waits(make: Make) -> None:
    # Given a mailbox whose requests and recipients are used up
    limiter = make(Budgets(0, 1, 0, 0, 1, 0, 0), windows={**WINDOWS, "requests": 300, "recipients": 900})
    limiter.acquire("a@example.com", recipients=1)
    # When asked again
    with pytest.raises(Exhausted) as refused:
        limiter.acquire("a@example.com", recipients=1)
    # Then the one that lasts longer is named, and its wait suffices
    assert refused.value.budget == "recipients"
    let_pass(refused.value.retry_after)
    limiter.acquire("a@example.com", recipients=1)


def test_usage_tells_what_is_used_and_when_it_comes_back(make: Make) -> None:
    # When a mailbox holds a slot and has sent
    limiter = make(Budgets(4, 10, 2, 10, 10, 100, 0))
    limiter.acquire("a@example.com", requests=2, sends=1, recipients=3, upload_bytes=500)
    # Then each budget says so
    usages = limiter.usage("a@example.com") + limiter.tenant_usage()
    expected = [
        ("concurrency", 4, 1),
        ("requests", 10, 2),
        ("upload_bytes", 2_000_000, 500),
        ("sends", 10, 1),
        ("recipients", 10, 3),
        ("tenant_requests", 100, 2),
    ]
    assert [(each.budget, each.limit, each.used) for each in usages] == expected
    # And all but the slot is free again when it said
    let_pass(max(each.next_free_in for each in usages if each.budget != "concurrency"))
    after = limiter.usage("a@example.com") + limiter.tenant_usage()
    assert [each.used for each in after] == [1, 0, 0, 0, 0, 0]
    assert [each.next_free_in for each in after[1:]] == [None] * 5


def test_zero_switches_a_limit_off(make: Make, client: Redis, prefix: str) -> None:
    # When nothing is limited
    limiter = make(UNLIMITED)
    for _ in range(20):
        limiter.acquire("a@example.com", sends=100, recipients=10**6, upload_bytes=10**9)
    # Then nothing is counted
    assert (limiter.usage("a@example.com"), limiter.tenant_usage(), keys_of(client, prefix)) == ([], [], [])


def test_mailbox_may_have_limits_of_its_own(make: Make) -> None:
    # Given a fleet whose mailboxes may send twice
    limiter, own = make(Budgets(0, 0, 0, 2, 0, 0, 0)), Budgets(0, 0, 0, 3, 0, 0, 0)
    # When one with a limit of three has sent three
    for _ in range(3):
        limiter.acquire("own@example.com", sends=1, budgets=own)
    # Then it has no more, by either limit
    for budgets in (own, None):
        with pytest.raises(Exhausted):
            limiter.acquire("own@example.com", sends=1, budgets=budgets)


def test_charge_above_a_whole_limit_is_an_error_not_an_endless_wait(make: Make) -> None:
    with pytest.raises(NeverFits, match="recipients: 11 asked for, the limit is 10"):
        make(Budgets(mailbox_recipients_per_day=10)).acquire("a@example.com", recipients=11)


@pytest.mark.parametrize("charge", [{"requests": 0}, {"sends": -1}, {"recipients": -1}, {"upload_bytes": -1}])
def test_charge_that_would_free_a_budget_is_an_error(make: Make, charge: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="negative"):
        make().acquire("a@example.com", **charge)


def test_bucket_can_be_waited_for_with_pyrates_limiter(
    limiter_redis: str, prefix: str, make: Make
) -> None:
    # Given a mailbox with no send left
    budgets = Budgets(4, 0, 0, 1, 0, 0, 0)
    limiter = make(budgets)
    limiter.acquire("a@example.com", sends=1)
    ledger = Ledger(Redis.from_url(limiter_redis), LEASE, SECOND, WINDOWS, prefix)
    bucket = FleetBucket(ledger, "a@example.com", budgets, {"sends": 1})
    factory = pyrate_limiter.SingleBucketFactory(bucket, schedule_leak=False)
    # When pyrate's limiter waits for one
    assert pyrate_limiter.Limiter(factory).try_acquire(blocking=True, timeout=5)
    # Then it holds the bucket's slot, and returns it when the bucket is flushed
    assert (bucket.failing_rate, bucket.waiting(pyrate_limiter.RateItem("", 0)), bucket.leak()) == (None, 0, 0)
    assert used(limiter, "a@example.com")["concurrency"] == 2
    bucket.flush()
    assert used(limiter, "a@example.com")["concurrency"] == 1


# ---- slots ----


def test_slot_is_returned_when_the_block_fails(make: Make) -> None:
    limiter = make(Budgets(1, 0, 0, 0, 0, 0, 0))
    with pytest.raises(ZeroDivisionError), limiter.slot("a@example.com"):
        _ = 1 / 0
    assert used(limiter, "a@example.com") == {"concurrency": 0}


def test_returning_a_slot_late_or_twice_takes_none_from_its_next_holder(make: Make) -> None:
    # Given a slot whose lease ran out and which another holds now
    limiter = make(Budgets(1, 0, 0, 0, 0, 0, 0), slot_lease=timedelta(milliseconds=50))
    late = limiter.acquire("a@example.com")
    let_pass(timedelta(milliseconds=60))
    make(Budgets(1, 0, 0, 0, 0, 0, 0)).acquire("a@example.com")
    # When the first holder returns it, twice
    limiter.release(late)
    limiter.release(late)
    # Then it is still held
    assert used(limiter, "a@example.com") == {"concurrency": 1}


def test_short_lease_does_not_shorten_a_long_one(make: Make) -> None:
    # Given a slot with a long lease and one with a short lease
    budgets = Budgets(2, 0, 0, 0, 0, 0, 0)
    limiter = make(budgets)
    limiter.acquire("a@example.com")
    make(budgets, slot_lease=timedelta(milliseconds=50)).acquire("a@example.com")
    # When the short one has run out
    let_pass(timedelta(milliseconds=100))
    # Then the long one is held
    assert used(limiter, "a@example.com") == {"concurrency": 1}


# ---- pauses ----


def test_pause_is_never_shortened(make: Make) -> None:
    # Given a mailbox paused for a minute
    limiter = make()
    ends = limiter.pause("a@example.com", timedelta(minutes=1))
    # When shorter pauses come in
    assert limiter.pause("a@example.com", SECOND) == ends
    assert limiter.pause("a@example.com", datetime.now(UTC) + SECOND) == ends
    # Then the long one stands, until a longer one comes
    assert limiter.paused_until("a@example.com") == ends
    later = datetime(2100, 1, 1, tzinfo=UTC)
    assert limiter.pause("a@example.com", later) == later == limiter.paused_until("a@example.com")


def test_pause_that_is_over_already_pauses_nothing(make: Make) -> None:
    limiter = make()
    limiter.pause("a@example.com", datetime(2020, 1, 1, tzinfo=UTC))
    limiter.pause("a@example.com", timedelta())
    limiter.acquire("a@example.com")
    assert limiter.paused_until("a@example.com") is None


def test_pause_of_the_tenant_binds_every_mailbox_and_outlasts_a_resumed_mailbox(make: Make) -> None:
    # Given a mailbox and the tenant paused
    limiter = make()
    limiter.pause("a@example.com", SECOND)
    ends = limiter.pause_all(timedelta(minutes=1))
    # When the mailbox is resumed
    limiter.resume("a@example.com")
    # Then the tenant's pause still binds it
    with pytest.raises(Exhausted, match=r"tenant_pause: none left, try again in \d+\.\d+ s"):
        limiter.acquire("a@example.com")
    assert limiter.paused_until("b@example.com") == limiter.tenant_paused_until() == ends
    # When the tenant is resumed too
    limiter.resume_all()
    # Then all may go on
    limiter.acquire("a@example.com")
    assert limiter.paused_until("a@example.com") is limiter.tenant_paused_until() is None


@pytest.mark.parametrize("name", ["tenant", "", "limits"])
def test_mailbox_of_any_name_is_only_a_mailbox(make: Make, name: str) -> None:
    limiter = make()
    limiter.pause(name, timedelta(minutes=1))
    limiter.acquire("a@example.com")
    assert limiter.tenant_paused_until() is None


def test_concurrency_ramps_up_after_a_pause_instead_of_bursting(make: Make) -> None:
    # Given a pause that has ended
    step = timedelta(milliseconds=500)
    limiter = make(Budgets(4, 0, 0, 0, 0, 0, 0), ramp_step=step)
    limiter.pause("a@example.com", timedelta(milliseconds=50))
    let_pass(timedelta(milliseconds=60))
    # When slots are asked for, step by step
    held = []
    for _ in range(3):
        with ExitStack() as block:
            held.append(take_all(limiter, block))
        let_pass(step)
    # Then their number doubles up to the limit
    assert held == [1, 2, 4]


def take_all(limiter: Limiter, block: ExitStack) -> int:
    for taken in range(100):
        try:
            block.enter_context(limiter.slot("a@example.com"))
        except Exhausted:
            return taken
    raise AssertionError("no limit")


# ---- Redis ----


def test_no_key_shows_an_address_or_outlives_its_use_or_leaves_the_hash_slot(
    make: Make, client: Redis, prefix: str
) -> None:
    # When everything that has a key is used
    limiter = make(Budgets(4, 10, 2, 10, 10, 100, 0), windows={**WINDOWS, **dict.fromkeys(WINDOWS, 60_000)})
    limiter.acquire("a@example.com", sends=1, recipients=3, upload_bytes=500)
    limiter.pause("a@example.com", SECOND)
    limiter.pause_all(SECOND)
    # Then each has an end, none an address, all one tag
    keys = keys_of(client, prefix)
    assert len(keys) == 8
    assert all(0 < client.pttl(key) <= 65_000 for key in keys)
    assert not [key for key in keys if "example" in key or f"{prefix}:{{limits}}:" not in key]


def test_refusal_and_slot_do_not_show_the_address(make: Make) -> None:
    limiter = make(Budgets(1, 0, 0, 0, 0, 0, 0))
    slot = limiter.acquire("someone@example.com")
    with pytest.raises(Refused) as refused:
        limiter.acquire("someone@example.com")
    assert "someone" not in f"{refused.value} {refused.value!r} {slot}"


def test_memory_of_a_mailbox_does_not_grow_with_its_traffic(
    make: Make, client: Redis, prefix: str
) -> None:
    # Given a mailbox
    limiter = make(Budgets(0, 10**9, 0, 0, 0, 0))
    # When it is charged all the time for longer than its window
    charge_throughout(limiter, timedelta(milliseconds=2 * WINDOWS["requests"]))
    # Then it takes a counter per sub-window and two numbers, no more, however many charges there were
    (key,) = keys_of(client, prefix)
    assert limiter.usage("a@example.com")[0].used > 61 + 2
    assert client.hlen(key) <= 61 + 2


def charge_throughout(limiter: Limiter, lasts: timedelta) -> None:
    ends = time.monotonic() + lasts.total_seconds()
    while time.monotonic() < ends:
        limiter.acquire("a@example.com")


def test_nothing_is_admitted_while_redis_is_away_and_all_is_well_when_it_is_back(own_redis: RedisServer) -> None:
    # Given a worker that holds a slot
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    held = limiter.acquire("a@example.com")
    # When Redis is away
    own_redis.stop()
    # Then nobody is admitted, soon and with a word, and the slot is let go without one
    began = time.monotonic()
    with pytest.raises(Unavailable, match="Redis does not answer the limiter: ConnectionError") as refused:
        limiter.acquire("a@example.com")
    assert SECOND / 10 <= refused.value.retry_after <= 5 * SECOND
    for ask in (limiter.usage, limiter.paused_until, limiter.resume):
        with pytest.raises(Unavailable):
            ask("a@example.com")
    limiter.release(held)
    assert time.monotonic() - began < 2
    # When it is back, empty
    own_redis.start()
    # Then the same limiter works
    limiter.release(limiter.acquire("a@example.com"))


def test_redis_that_hangs_holds_a_worker_for_moments_only(own_redis: RedisServer) -> None:
    # Given a Redis that accepts connections but says nothing
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    limiter.acquire("a@example.com")
    own_redis.process.send_signal(signal.SIGSTOP)
    # When asked
    began = time.monotonic()
    with pytest.raises(Unavailable, match="TimeoutError"):
        limiter.acquire("a@example.com")
    # Then the answer is no, within a moment
    assert time.monotonic() - began < 3
    # And when it goes on, so does the limiter
    own_redis.process.send_signal(signal.SIGCONT)
    limiter.acquire("a@example.com")


@pytest.mark.parametrize("command", ["SCRIPT FLUSH", "FLUSHALL"])
def test_emptied_redis_is_refilled(own_redis: RedisServer, command: str) -> None:
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    held = limiter.acquire("a@example.com")
    with Redis.from_url(own_redis.url) as client:
        client.execute_command(*command.split())
    limiter.release(held)
    limiter.release(limiter.acquire("a@example.com", sends=1))
    assert used(limiter, "a@example.com")["sends"] == 1


def test_full_redis_admits_nothing(own_redis: RedisServer) -> None:
    with Redis.from_url(own_redis.url) as client:
        client.config_set("maxmemory", 1)
    with pytest.raises(Unavailable):
        Limiter(own_redis.url, Budgets(), LEASE).acquire("a@example.com")
