"""Waiting for a slot: whoever returns one hands it on, to sends first, and to nobody who cannot take it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import limiter_support
import pytest
from limiter_support import (
    LEASE,
    LONG,
    MAILBOX,
    MILLISECOND,
    ONE,
    SECOND,
    Make,
    eventually,
    held,
    let_pass,
    only,
    run_all,
    used,
    waiting,
    worker,
)
from redis import Redis

from limiter import Exhausted, Limiter, Slot, Wanted

limiter_redis, client = limiter_support.limiter_redis, limiter_support.client
prefix, make = limiter_support.prefix, limiter_support.make

Start = Callable[..., Future[Slot]]

#: Longer than any of these tests.
LONG_ENOUGH = timedelta(minutes=1)


@pytest.fixture
def start(client: Redis, prefix: str) -> Iterator[Start]:
    """Have a call wait for a slot in a thread of its own; returns when it does wait."""
    with ThreadPoolExecutor(8) as pool:

        def start(limiter: Limiter, send: Wanted | None = None) -> Future[Slot]:
            before = waiting(client, prefix)
            call = pool.submit(limiter.acquire, MAILBOX, send=send, wait=LONG_ENOUGH)
            eventually(lambda: waiting(client, prefix) == before + 1)
            let_pass(2 * MILLISECOND)  # who came first is known to the millisecond
            return call

        yield start


def wait_for_slot(url: str, prefix: str) -> None:
    Limiter(url, only(mailbox_concurrency=1), LEASE, prefix=prefix).acquire(MAILBOX, wait=LONG_ENOUGH)
    signal.pause()


def hold_slots(url: str, prefix: str, rounds: int) -> None:
    limiter = Limiter(url, only(mailbox_concurrency=4), LEASE, prefix=prefix)
    client = Redis.from_url(url)

    def work(number: int) -> None:
        for _ in range(rounds):
            with limiter.slot(MAILBOX, send=ONE if number % 2 else None, wait=LONG_ENOUGH):
                client.lpush(f"{prefix}:held", client.incr(f"{prefix}:now"))
                client.decr(f"{prefix}:now")

    with client, ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, number) for number in range(4)]:
            done.result()


def test_fleet_that_waits_for_slots_never_holds_more_than_its_concurrency_and_all_get_theirs(
    limiter_redis: str, prefix: str, client: Redis, make: Make
) -> None:
    # When 16 threads in 4 processes want slots all the time
    run_all(hold_slots, [(limiter_redis, prefix, 60)] * 4)
    # Then each got one each time, up to 4 were held at once, never 5, and all came back
    counts = [int(count) for count in client.lrange(f"{prefix}:held", 0, -1)]
    assert (len(counts), max(counts)) == (4 * 4 * 60, 4)
    assert (used(make())["concurrency"], waiting(client, prefix)) == (0, 0)
    client.delete(f"{prefix}:held", f"{prefix}:now")


def test_returned_slot_goes_to_the_call_that_waits_in_another_process(
    limiter_redis: str, prefix: str, client: Redis, make: Make
) -> None:
    # Given a call that waits for the slot of this process, elsewhere, and stands still for a moment
    limiter = make(only(mailbox_concurrency=1))
    slot = limiter.acquire(MAILBOX)
    with worker(wait_for_slot, limiter_redis, prefix) as waits:
        eventually(lambda: waiting(client, prefix) == 1)
        os.kill(waits.pid or 0, signal.SIGSTOP)
        # When the slot is returned
        limiter.release(slot)
        # Then it is the other's already, and nobody else gets it
        assert (held(client, prefix), waiting(client, prefix)) == (1, 0)
        with pytest.raises(Exhausted, match="concurrency"):
            limiter.acquire(MAILBOX)
        # And the other holds it for as long as any
        os.kill(waits.pid or 0, signal.SIGCONT)
        eventually(lambda: limiter.usage(MAILBOX)[0].next_free_in > 10 * SECOND)


def test_sends_get_a_slot_before_other_calls_and_each_in_order_of_coming(make: Make, start: Start) -> None:
    # Given two calls that wait for one slot, and two sends that came later
    limiter = make(only(mailbox_concurrency=1))
    slot = limiter.acquire(MAILBOX)
    calls = [start(limiter), start(limiter), start(limiter, ONE), start(limiter, ONE)]
    first_call, second_call, first_send, second_send = calls
    order = [first_send, second_send, first_call, second_call]
    # When the slot is returned, again and again
    for number, expected in enumerate(order):
        limiter.release(slot)
        # Then it goes to the sends first, and to each in turn
        slot = expected.result(20)
        assert [call.done() for call in order] == [True] * (number + 1) + [False] * (3 - number)
    limiter.release(slot)


def test_slot_whose_lease_runs_out_goes_to_those_that_wait_not_to_a_newcomer(make: Make, start: Start) -> None:
    # Given a call that waits for the slot of a worker that has died
    budgets = only(mailbox_concurrency=1)
    make(budgets, slot_lease=SECOND).acquire(MAILBOX)
    limiter = make(budgets)
    waits = start(limiter)
    # When others ask the moment that its lease runs out, sends even
    while not waits.done():
        with pytest.raises(Exhausted, match="concurrency"):
            limiter.acquire(MAILBOX, send=ONE)
    # Then the one that waits has it
    limiter.release(waits.result())


def test_slot_that_was_handed_to_a_dead_worker_comes_back(
    limiter_redis: str, prefix: str, client: Redis, make: Make, start: Start
) -> None:
    # Given a worker that was killed while it waited
    limiter = make(only(mailbox_concurrency=1))
    slot = limiter.acquire(MAILBOX)
    with worker(wait_for_slot, limiter_redis, prefix):
        eventually(lambda: waiting(client, prefix) == 1)
    # When the slot is handed to it, before another
    waits = start(limiter)
    limiter.release(slot)
    assert (held(client, prefix), waiting(client, prefix)) == (1, 1)
    # Then the other gets it a moment later
    limiter.release(waits.result(20))
    assert (held(client, prefix), waiting(client, prefix)) == (0, 0)


def test_wait_ends_after_its_time_and_leaves_nothing(make: Make, client: Redis, prefix: str) -> None:
    # Given a mailbox whose slot is held
    limiter = make(only(mailbox_concurrency=1))
    slot = limiter.acquire(MAILBOX)
    # When a call waits for less than that
    with pytest.raises(Exhausted) as refused:
        limiter.acquire(MAILBOX, wait=400 * MILLISECOND)
    # Then it is told so, and nobody waits any more: the slot is free as soon as it is returned
    assert (refused.value.budget, refused.value.mailbox_wide) == ("concurrency", True)
    assert waiting(client, prefix) == 0
    limiter.release(slot)
    assert held(client, prefix) == 0


def test_wait_that_is_interrupted_leaves_nothing(make: Make, client: Redis, prefix: str) -> None:
    # Given a call that waits
    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    def interrupt_wait() -> None:
        eventually(lambda: waiting(client, prefix) == 1)
        os.kill(os.getpid(), signal.SIGUSR1)

    limiter = make(only(mailbox_concurrency=1))
    slot = limiter.acquire(MAILBOX)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        # When its thread is interrupted
        threading.Thread(target=interrupt_wait).start()
        with pytest.raises(Interrupted):
            limiter.acquire(MAILBOX, wait=LONG_ENOUGH)
    finally:
        signal.signal(signal.SIGUSR1, before)
    # Then nobody waits any more
    assert waiting(client, prefix) == 0
    limiter.release(slot)
    assert held(client, prefix) == 0


@pytest.mark.parametrize("lacks", ["requests", "pause"])
def test_nothing_but_a_slot_is_waited_for(make: Make, client: Redis, prefix: str, lacks: str) -> None:
    # Given a mailbox that has no slot left, and something else neither
    limiter = make(only(mailbox_concurrency=1, mailbox_requests_per_10_minutes=1), windows=LONG)
    limiter.acquire(MAILBOX)
    if lacks == "pause":
        limiter.pause(MAILBOX, 2 * LONG_ENOUGH)
    # When a call would wait
    with pytest.raises(Exhausted, match=lacks):
        limiter.acquire(MAILBOX, wait=2 * LONG_ENOUGH)
    # Then it did not
    assert waiting(client, prefix) == 0


def test_slot_is_handed_on_by_a_call_that_lacks_something_else_by_now(make: Make, start: Start) -> None:
    # Given a send and a call that wait for one slot, and no send left meanwhile
    limiter = make(only(mailbox_concurrency=1, mailbox_sends_per_minute=1), windows=LONG)
    slot = limiter.acquire(MAILBOX)
    sends, calls = start(limiter, ONE), start(limiter)
    limiter.reserve({MAILBOX: [ONE]})
    # When the slot is returned
    limiter.release(slot)
    # Then the send is refused, and the call has it
    with pytest.raises(Exhausted, match="sends"):
        sends.result(20)
    limiter.release(calls.result(20))


def test_nothing_is_handed_over_during_a_pause(make: Make, start: Start, client: Redis, prefix: str) -> None:
    # Given a call that waits for the slot of a mailbox that is paused then
    limiter = make(only(mailbox_concurrency=1))
    slot = limiter.acquire(MAILBOX)
    waits = start(limiter)
    limiter.pause(MAILBOX, LONG_ENOUGH)
    # When the slot is returned
    limiter.release(slot)
    # Then nobody has it, and the call is refused
    assert held(client, prefix) == 0
    with pytest.raises(Exhausted, match="pause"):
        waits.result(20)
    assert waiting(client, prefix) == 0


def test_no_more_is_handed_over_after_a_pause_than_the_ramp_allows(
    make: Make, start: Start, client: Redis, prefix: str
) -> None:
    # Given a mailbox that was paused while two of its slots were held, and a call that waits
    limiter = make(only(mailbox_concurrency=2), ramp_step=LONG_ENOUGH)
    first, second = limiter.acquire(MAILBOX), limiter.acquire(MAILBOX)
    limiter.pause(MAILBOX, 10 * MILLISECOND)
    let_pass(20 * MILLISECOND)
    waits = start(limiter)
    # When one is returned
    limiter.release(first)
    # Then it is not handed over, for one at a time is what the mailbox begins with
    assert (held(client, prefix), waiting(client, prefix)) == (1, 1)
    # But the next is
    limiter.release(second)
    assert (held(client, prefix), waiting(client, prefix)) == (1, 0)
    limiter.release(waits.result(20))


def test_call_that_waits_goes_on_when_its_limit_is_raised_or_switched_off(make: Make, start: Start) -> None:
    # Given two calls that wait
    limiter = make(only(mailbox_concurrency=1))
    limiter.acquire(MAILBOX)
    first, second = start(limiter), start(limiter)
    # When one slot more is allowed
    limiter.set_limits(MAILBOX, {"concurrency": 2})
    # Then one of them has it
    first.result(20)
    assert not second.done()
    # And when any number is, the other
    limiter.set_limits(MAILBOX, {"concurrency": 0})
    second.result(20)
