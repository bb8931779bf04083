"""The limiter against a real Redis: what the fleet may do together, whichever process asks."""

from __future__ import annotations

import random
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
    ONE,
    SECOND,
    UNLIMITED,
    WINDOWS,
    Make,
    busiest,
    eventually,
    keys_of,
    let_pass,
    only,
    run_all,
    usage_of,
    used,
    worker,
)
from redis import Redis

from limiter import SLACK, SUBWINDOWS, Budgets, Exhausted, FleetBucket, Limiter, NeverFits, Refused, Spent, Wanted
from limiter.ledger import Ledger

limiter_redis, client = limiter_support.limiter_redis, limiter_support.client
prefix, make = limiter_support.prefix, limiter_support.make


# The fleet: several processes, several threads


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
                limiter.acquire(MAILBOX)
            except Exhausted as exhausted:
                let_pass(min(exhausted.retry_after, 20 * MILLISECOND))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()


def test_fleet_uses_a_limit_fully_but_never_exceeds_it_in_any_window_whatever_its_clocks_say(
    limiter_redis: str, prefix: str, client: Redis
) -> None:
    # Given 4 processes of 4 threads, whose clocks are up to an hour apart
    budgets = only(mailbox_requests_per_10_minutes=50)
    # When all of them ask for one mailbox as fast as they can
    run_all(hammer, [(limiter_redis, prefix, budgets, skew, 4 * SECOND) for skew in (0.0, 0.7, -0.7, 3600.0)])
    # Then no second has more than 50 admissions by Redis's clock, which each slot's lease counts from
    (slots,) = (key for key in keys_of(client, prefix) if key.endswith(":slots"))
    times = [int(score) for _, score in client.zrange(slots, 0, -1, withscores=True)]
    assert busiest([(at, 1) for at in times], 1000) == 50
    # And each further 50 come hardly later: counted from burst to burst, as the end may cut one short
    bursts = (len(times) - 1) // 50
    assert bursts >= 2
    assert times[bursts * 50] - times[0] <= bursts * 1000 / 0.95


def hold_slots(url: str, prefix: str, rounds: int) -> None:
    limiter = Limiter(url, only(mailbox_concurrency=4), LEASE, prefix=prefix)
    client = Redis.from_url(url)

    def work() -> None:
        for _ in range(rounds):
            with suppress(Exhausted), limiter.slot(MAILBOX):
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
    assert used(make())["concurrency"] == 0
    client.delete(f"{prefix}:held", f"{prefix}:now")


def hold_until_killed(url: str, prefix: str, lease: timedelta) -> None:
    limiter = Limiter(url, only(mailbox_concurrency=4), lease, prefix=prefix)
    for _ in range(4):
        limiter.acquire(MAILBOX)
    signal.pause()


def test_slots_of_a_killed_worker_come_back_when_their_lease_runs_out(
    limiter_redis: str, prefix: str, make: Make
) -> None:
    # Given a worker that is killed while it holds all slots
    limiter = make(only(mailbox_concurrency=4))
    with worker(hold_until_killed, limiter_redis, prefix, 3 * SECOND):
        eventually(lambda: used(limiter)["concurrency"] == 4)
    with pytest.raises(Exhausted):
        limiter.acquire(MAILBOX)
    # When the lease runs out
    eventually(lambda: used(limiter)["concurrency"] == 0)
    # Then the slots are free
    limiter.acquire(MAILBOX)


def pause_from_elsewhere(url: str, prefix: str) -> None:
    Limiter(url, UNLIMITED, LEASE, prefix=prefix).pause("throttled@example.com", MINUTE)


def test_pause_binds_every_process(limiter_redis: str, prefix: str, make: Make) -> None:
    # When another process pauses a mailbox
    limiter = make()
    run_all(pause_from_elsewhere, [(limiter_redis, prefix)])
    # Then this one may not use it, in whatever case its address is written, but may use others
    with pytest.raises(Exhausted) as refused:
        limiter.acquire("Throttled@Example.com")
    assert (refused.value.budget, refused.value.mailbox_wide) == ("pause", True)
    assert timedelta(seconds=50) < refused.value.retry_after <= MINUTE
    limiter.acquire("other@example.com")


# Budgets

CHARGES = [
    ("requests", only(mailbox_requests_per_10_minutes=3), {}),
    ("upload_bytes", only(mailbox_upload_mb_per_5_minutes=3), {"upload_bytes": 1_000_000}),
    ("sends", only(mailbox_sends_per_minute=3), {"send": Wanted(5, 5)}),
    ("recipients", only(mailbox_recipients_per_day=3), {"send": ONE}),
    ("tenant_requests", only(tenant_requests_per_10_seconds=3), {}),
    ("tenant_external_recipients", only(tenant_external_recipients_per_day=3), {"send": Wanted(2, 1)}),
]


@pytest.mark.parametrize(("budget", "budgets", "charge"), CHARGES, ids=[budget for budget, _, _ in CHARGES])
def test_budget_admits_its_limit_exactly_and_again_after_the_wait_it_names(
    make: Make, budget: str, budgets: Budgets, charge: dict[str, Any]
) -> None:
    # Given a budget of three that is used up
    limiter = make(budgets)
    for _ in range(3):
        limiter.acquire(MAILBOX, **charge)
    # When a fourth asks
    with pytest.raises(Exhausted) as refused:
        limiter.acquire(MAILBOX, **charge)
    # Then it is told which budget, and a wait of about the window
    assert (refused.value.budget, refused.value.mailbox_wide) == (budget, True)
    assert refused.value.retry_after <= WINDOWS[budget] * 1.1 * MILLISECOND
    # And it is admitted after that wait
    let_pass(refused.value.retry_after)
    limiter.acquire(MAILBOX, **charge)


def test_no_window_of_a_budgets_length_ever_has_more_than_its_limit(make: Make) -> None:
    # When calls of random size come at random instants, for several windows
    limiter = make(only(mailbox_sends_per_minute=8, mailbox_recipients_per_day=60))
    calls = [sent for _ in range(400) for sent in try_to_send(limiter, random.randint(1, 20))]
    # Then none of the length has more sends or recipients than the limit, and the limits were reached
    assert calls[-1][0] - calls[0][0] > 2 * WINDOWS["recipients"]
    assert 0 < 8 - busiest([(at, 1) for at, _ in calls], WINDOWS["sends"]) + 1 <= 3
    assert 60 - 20 <= busiest(calls, WINDOWS["recipients"]) <= 60


def try_to_send(limiter: Limiter, recipients: int) -> list[tuple[int, int]]:
    """Send if the limiter lets us; return when, by Redis's clock, and to how many."""
    let_pass(random.expovariate(1 / 4) * MILLISECOND)
    try:
        with limiter.slot(MAILBOX, send=Wanted(recipients, 0)) as slot:
            return [(slot.at_ms, recipients)]
    except Exhausted:
        return []


def test_waiting_less_than_told_is_refused_again(make: Make) -> None:
    # Given a window of some seconds that is full
    limiter = make(only(mailbox_requests_per_10_minutes=1), windows={**WINDOWS, "requests": 4_000})
    limiter.acquire(MAILBOX)
    with pytest.raises(Exhausted) as first:
        limiter.acquire(MAILBOX)
    # When asked again after a tenth of the wait
    let_pass(first.value.retry_after / 10)
    with pytest.raises(Exhausted) as second:
        limiter.acquire(MAILBOX)
    # Then the end has not moved
    assert second.value.retry_after < first.value.retry_after


def test_refusal_costs_nothing(make: Make) -> None:
    # Given a mailbox with two sends left and one recipient too few
    limiter = make(Budgets(4, 100, 1, 3, 10, 100, 100), windows=LONG)
    limiter.release(limiter.acquire(MAILBOX, send=Wanted(8, 1)))
    before = used(limiter)
    # When a send to three asks
    with pytest.raises(Exhausted) as refused:
        limiter.acquire(MAILBOX, send=Wanted(3, 3), upload_bytes=10)
    # Then no other budget is charged, and a smaller send is not ruled out
    assert (refused.value.budget, refused.value.mailbox_wide) == ("recipients", False)
    assert used(limiter) == before
    limiter.acquire(MAILBOX, send=Wanted(2, 0), upload_bytes=10)


def test_refusal_names_the_longest_of_several_waits(make: Make) -> None:
    # Given a mailbox whose requests and recipients are used up, and whose slot is held
    budgets = only(mailbox_concurrency=1, mailbox_requests_per_10_minutes=1, mailbox_recipients_per_day=1)
    limiter = make(budgets, slot_lease=50 * MILLISECOND, windows={**WINDOWS, "requests": 300, "recipients": 900})
    limiter.acquire(MAILBOX, send=ONE)
    # When asked again
    with pytest.raises(Exhausted) as refused:
        limiter.acquire(MAILBOX, send=ONE)
    # Then the one that lasts longer is named, and its wait suffices
    assert refused.value.budget == "recipients"
    let_pass(refused.value.retry_after)
    limiter.acquire(MAILBOX, send=ONE)


def test_usage_tells_what_is_used_and_when_it_comes_back(make: Make) -> None:
    # When a mailbox holds a slot and has sent
    limiter = make(Budgets(4, 10, 2, 10, 10, 100, 50), windows=dict.fromkeys(WINDOWS, 1_500))
    limiter.acquire(MAILBOX, requests=2, send=Wanted(3, 1), upload_bytes=500)
    # Then each budget says so
    usages = limiter.usage(MAILBOX) + limiter.tenant_usage()
    expected = [
        ("concurrency", 4, 1),
        ("requests", 10, 2),
        ("upload_bytes", 2_000_000, 500),
        ("sends", 10, 1),
        ("recipients", 10, 3),
        ("tenant_requests", 100, 2),
        ("tenant_external_recipients", 50, 1),
    ]
    assert [(each.budget, each.limit, each.used) for each in usages] == expected
    # And all but the slot is free again when it said: what was charged together comes back together
    assert [each.all_free_in for each in usages] == [None, *(each.next_free_in for each in usages[1:])]
    let_pass(max(each.next_free_in for each in usages if each.budget != "concurrency"))
    after = limiter.usage(MAILBOX) + limiter.tenant_usage()
    assert [each.used for each in after] == [1, 0, 0, 0, 0, 0, 0]
    assert [each.next_free_in for each in after[1:]] == [None] * 6


def test_usage_tells_when_the_last_comes_back_of_what_was_charged_one_after_the_other(make: Make) -> None:
    # When a mailbox sends, and sends again two seconds later
    limiter = make(windows=dict.fromkeys(WINDOWS, 30_000))
    limiter.acquire(MAILBOX, send=ONE)
    let_pass(2 * SECOND)
    limiter.acquire(MAILBOX, send=ONE)
    # Then the second comes back so much later
    sends = usage_of(limiter, "sends")
    assert sends.next_free_in
    assert sends.all_free_in
    assert timedelta(seconds=1.7) < sends.all_free_in - sends.next_free_in < timedelta(seconds=4)


def test_zero_switches_a_limit_off_but_what_is_spent_is_known_all_the_same(make: Make) -> None:
    # When nothing is limited
    limiter = make(UNLIMITED, windows=LONG)
    for _ in range(20):
        limiter.acquire(MAILBOX, requests=100, send=Wanted(10**6, 10**6), upload_bytes=10**9)
    # Then all is admitted, and counted
    usages = limiter.usage(MAILBOX) + limiter.tenant_usage()
    assert [usage.limit for usage in usages] == [0] * 7
    assert [usage.used for usage in usages] == [20, 2000, 20 * 10**9, 20, 20 * 10**6, 2000, 20 * 10**6]


def test_large_numbers_are_counted_exactly(make: Make) -> None:
    # Given numbers that a float's fourteen digits do not hold
    limiter = make(only(mailbox_requests_per_10_minutes=2**52), windows=LONG)
    # When they are charged, and too much is
    limiter.acquire(MAILBOX, requests=10**15 + 1, upload_bytes=2**52 - 1)
    limiter.acquire(MAILBOX, requests=2**52 - 10**15 - 2, upload_bytes=1)
    with pytest.raises(Exhausted):
        limiter.acquire(MAILBOX, requests=2)
    # Then each unit counts
    limiter.acquire(MAILBOX, requests=1)
    assert (used(limiter)["requests"], used(limiter)["upload_bytes"]) == (2**52, 2**52)


def test_charge_above_a_whole_limit_is_an_error_not_an_endless_wait(make: Make) -> None:
    with pytest.raises(NeverFits, match="recipients: 11 asked for, the limit is 10"):
        make(Budgets(mailbox_recipients_per_day=10)).acquire(MAILBOX, send=Wanted(11, 0))


@pytest.mark.parametrize(
    "charge",
    [
        {"requests": 0},
        {"send": Wanted(-1, 0)},
        {"send": Wanted(1, -1)},
        {"upload_bytes": -1},
        {"upload_bytes": 2**52 + 1},
    ],
)
def test_charge_that_would_free_a_budget_or_cannot_be_counted_is_an_error(make: Make, charge: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="negative"):
        make().acquire(MAILBOX, **charge)


def test_bucket_can_be_waited_for_with_pyrates_limiter(limiter_redis: str, prefix: str, make: Make) -> None:
    # Given a mailbox with no send left
    budgets = only(mailbox_concurrency=4, mailbox_sends_per_minute=1)
    limiter = make(budgets)
    limiter.acquire(MAILBOX, send=ONE)
    ledger = Ledger(Redis.from_url(limiter_redis), budgets, LEASE, SECOND, WINDOWS, prefix)
    bucket = FleetBucket(ledger, MAILBOX, ONE.charges(), wait=timedelta(), reserved_at_ms=0)
    factory = pyrate_limiter.SingleBucketFactory(bucket, schedule_leak=False)
    # When pyrate's limiter waits for one
    assert pyrate_limiter.Limiter(factory).try_acquire(blocking=True, timeout=5)
    # Then it holds the bucket's slot, and returns it when the bucket is flushed
    assert (bucket.failing_rate, bucket.waiting(pyrate_limiter.RateItem("", 0)), bucket.leak()) == (None, 0, 0)
    assert (bucket.refusal, bucket.count()) == (None, 2)
    assert used(limiter)["concurrency"] == 2
    bucket.flush()
    assert used(limiter)["concurrency"] == 1


# Slots


def test_slot_is_returned_when_the_block_fails(make: Make) -> None:
    limiter = make(only(mailbox_concurrency=1))
    with pytest.raises(ZeroDivisionError), limiter.slot(MAILBOX):
        _ = 1 / 0
    assert used(limiter)["concurrency"] == 0


def test_returning_a_slot_late_or_twice_takes_none_from_its_next_holder(make: Make) -> None:
    # Given a slot whose lease ran out and which another holds now
    limiter = make(only(mailbox_concurrency=1), slot_lease=50 * MILLISECOND)
    late = limiter.acquire(MAILBOX)
    let_pass(60 * MILLISECOND)
    make(only(mailbox_concurrency=1)).acquire(MAILBOX)
    # When the first holder returns it, twice
    limiter.release(late)
    limiter.release(late)
    # Then it is still held
    assert used(limiter)["concurrency"] == 1


def test_slot_that_is_renewed_outlives_its_lease_and_is_returned_as_ever(make: Make) -> None:
    # Given a call that takes longer than the lease, and so long at first that the slot is gone
    lease = 200 * MILLISECOND
    limiter = make(only(mailbox_concurrency=1), slot_lease=lease)
    slot = limiter.acquire(MAILBOX)
    let_pass(lease * 1.1)
    assert used(limiter)["concurrency"] == 0
    # When it is renewed, by one with a lease that no test outlasts
    make(only(mailbox_concurrency=1)).renew(slot)
    let_pass(lease * 1.1)
    # Then it is held
    with pytest.raises(Exhausted, match="concurrency"):
        limiter.acquire(MAILBOX)
    # And can be returned
    limiter.release(slot)
    assert used(limiter)["concurrency"] == 0


def test_short_lease_does_not_shorten_a_long_one(make: Make) -> None:
    # Given a slot with a long lease and one with a short lease
    budgets = only(mailbox_concurrency=2)
    limiter = make(budgets)
    limiter.acquire(MAILBOX)
    make(budgets, slot_lease=50 * MILLISECOND).acquire(MAILBOX)
    # When the short one has run out
    let_pass(100 * MILLISECOND)
    # Then the long one is held
    assert used(limiter)["concurrency"] == 1


# Pauses


def test_pause_is_never_shortened(make: Make) -> None:
    # Given a mailbox paused for a minute
    limiter = make()
    ends = limiter.pause(MAILBOX, MINUTE)
    # When shorter pauses come in
    assert limiter.pause(MAILBOX, SECOND) == ends
    assert limiter.pause(MAILBOX, datetime.now(UTC) + SECOND) == ends
    # Then the long one stands, until a longer one comes
    assert limiter.paused_until(MAILBOX) == ends
    later = datetime(2100, 1, 1, tzinfo=UTC)
    assert limiter.pause(MAILBOX, later) == later == limiter.paused_until(MAILBOX)


def test_pause_may_be_for_good(make: Make) -> None:
    limiter = make()
    assert limiter.pause("b@example.com", timedelta.max) > datetime(2100, 1, 1, tzinfo=UTC)
    last_year = datetime(9999, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)
    assert limiter.pause(MAILBOX, last_year) == last_year == limiter.paused_until(MAILBOX)
    with pytest.raises(Exhausted):
        limiter.acquire(MAILBOX)


def test_pause_that_is_over_already_pauses_nothing(make: Make) -> None:
    limiter = make()
    limiter.pause(MAILBOX, datetime(2020, 1, 1, tzinfo=UTC))
    limiter.pause(MAILBOX, timedelta())
    limiter.pause(MAILBOX, -SECOND)
    limiter.acquire(MAILBOX)
    assert limiter.paused_until(MAILBOX) is None


def test_pause_of_the_tenant_binds_every_mailbox_and_outlasts_a_resumed_mailbox(make: Make) -> None:
    # Given a mailbox and the tenant paused
    limiter = make()
    limiter.pause(MAILBOX, SECOND)
    ends = limiter.pause_all(MINUTE)
    # When the mailbox is resumed
    limiter.resume(MAILBOX)
    # Then the tenant's pause still binds it
    with pytest.raises(Exhausted, match=r"tenant_pause: none left, try again in \d+\.\d+ s"):
        limiter.acquire(MAILBOX)
    assert limiter.paused_until("b@example.com") == limiter.tenant_paused_until() == ends
    # When the tenant is resumed too
    limiter.resume_all()
    # Then all may go on
    limiter.acquire(MAILBOX)
    assert limiter.paused_until(MAILBOX) is limiter.tenant_paused_until() is None


@pytest.mark.parametrize("name", ["tenant", "", "limits"])
def test_mailbox_of_any_name_is_only_a_mailbox(make: Make, name: str) -> None:
    limiter = make()
    limiter.pause(name, MINUTE)
    limiter.set_limits(name, {"requests": 1})
    limiter.acquire(MAILBOX, requests=2)
    assert limiter.tenant_paused_until() is None


def test_concurrency_ramps_up_after_a_pause_instead_of_bursting(make: Make) -> None:
    # Given a pause that has ended
    step = 500 * MILLISECOND
    limiter = make(only(mailbox_concurrency=4), ramp_step=step)
    limiter.pause(MAILBOX, 50 * MILLISECOND)
    let_pass(60 * MILLISECOND)
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
            block.enter_context(limiter.slot(MAILBOX))
        except Exhausted:
            return taken
    raise AssertionError("no limit")


# Redis


def test_no_key_shows_an_address_or_outlives_its_use_or_leaves_the_hash_slot(
    make: Make, client: Redis, prefix: str
) -> None:
    # When everything of the traffic that has a key is used
    limiter = make(Budgets(4, 10, 2, 10, 10, 100, 50), windows=LONG, ramp_step=SECOND)
    limiter.acquire(MAILBOX, send=Wanted(3, 1), upload_bytes=500)
    for _ in range(3):
        limiter.throttled(MAILBOX, MILLISECOND, budget="sends")
        let_pass(2 * MILLISECOND)
    limiter.throttled(MAILBOX, MILLISECOND, budget="requests")
    limiter.pause_all(SECOND)
    # Then each has an end, none an address, all one tag
    keys = keys_of(client, prefix)
    kinds = {key.split(":")[3] for key in keys}
    assert kinds == {*WINDOWS, "slots", "pause", "slowed", "strikes", "talking", "throttled"}
    assert all(0 < client.pttl(key) <= 30 * 60_000 for key in keys)
    assert not [key for key in keys if "example" in key or f"{prefix}:{{limits}}:" not in key]


def test_refusal_and_slot_do_not_show_the_address(make: Make) -> None:
    limiter = make(only(mailbox_concurrency=1))
    slot = limiter.acquire("someone@example.com")
    with pytest.raises(Refused) as refused:
        limiter.acquire("someone@example.com")
    assert "someone" not in f"{refused.value} {refused.value!r} {slot}"


def test_memory_of_a_mailbox_does_not_grow_with_its_traffic(limiter_redis: str, client: Redis) -> None:
    # Given a mailbox that has been charged in every sub-window for longer than its windows are
    prefix = f"test-{random.randbytes(6).hex()}"
    limiter = Limiter(limiter_redis, UNLIMITED, LEASE, windows=LONG, prefix=prefix)
    ages = [step * LONG["sends"] / SUBWINDOWS * MILLISECOND for step in range(SUBWINDOWS + 20)]
    budgets = {budget: None if budget.startswith("tenant_") else MAILBOX for budget in LONG}
    with limiter.restoring():
        limiter.spent(Spent(owner, budget, age, 1) for budget, owner in budgets.items() for age in ages)
    # When it is charged on and on
    for _ in range(SUBWINDOWS):
        limiter.release(limiter.acquire(MAILBOX, send=Wanted(2, 1), upload_bytes=1))
    # Then each window takes a counter per sub-window and two numbers, no more, however many charges there were
    assert usage_of(limiter, "requests").used > 1.5 * SUBWINDOWS
    rings = [key for key in keys_of(client, prefix) if client.type(key) == "hash"]
    assert len(rings) == len(LONG)
    assert SUBWINDOWS <= max(map(client.hlen, rings)) <= SUBWINDOWS + 1 + SLACK + 2
    # And Redis stores them compactly
    assert {client.object("encoding", key) for key in rings} <= {"listpack", "ziplist"}


@pytest.mark.parametrize("decodes", [True, False])
def test_client_of_ones_own_may_decode_what_redis_says_or_not(limiter_redis: str, prefix: str, decodes: bool) -> None:
    with Redis.from_url(limiter_redis, decode_responses=decodes) as client:
        limiter = Limiter(client, only(mailbox_concurrency=1), LEASE, windows=LONG, prefix=prefix)
        assert limiter.is_whole()
        (reservation,) = limiter.reserve({MAILBOX: [ONE]})[MAILBOX]
        with limiter.slot(MAILBOX, send=ONE, reservation=reservation), pytest.raises(Exhausted, match="concurrency"):
            limiter.acquire(MAILBOX, wait=MILLISECOND)
        limiter.set_limits(MAILBOX, {"sends": 30})
        for _ in range(3):
            slowed, _ = limiter.throttled(MAILBOX, MILLISECOND, budget="sends")
            let_pass(2 * MILLISECOND)
        assert str(slowed) == usage_of(limiter, "sends").why
