"""When Redis is away, hangs, is full, was emptied or started anew: nothing is admitted that was not counted."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta

import limiter_support
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
    Make,
    RedisServer,
    Wire,
    eventually,
    let_pass,
    make_whole,
    only,
    sums,
    usage_of,
    used,
    worker,
)
from redis import Redis

from limiter import Budgets, Emptied, Exhausted, Limiter, Reservation, Spent, Unavailable, Wanted

limiter_redis, client, own_redis = limiter_support.limiter_redis, limiter_support.client, limiter_support.own_redis
prefix, make, wire = limiter_support.prefix, limiter_support.make, limiter_support.wire


@pytest.fixture
def fresh(limiter_redis: str, prefix: str) -> Callable[..., Limiter]:
    """Make limiters of a fleet whose Redis knows nothing yet."""
    return lambda budgets=None: Limiter(limiter_redis, budgets or Budgets(), LEASE, prefix=f"{prefix}-fresh")


def assert_closed(limiter: Limiter) -> None:
    assert not limiter.is_whole()
    with pytest.raises(Emptied, match="Redis was emptied") as refused:
        limiter.acquire(MAILBOX)
    assert SECOND / 10 <= refused.value.retry_after <= 5 * SECOND
    answers = limiter.reserve({MAILBOX: [ONE, ONE], "b@example.com": [ONE]})
    assert [type(answer) for of_mailbox in answers.values() for answer in of_mailbox] == [Emptied] * 3


def assert_open(limiter: Limiter) -> None:
    assert limiter.is_whole()
    limiter.release(limiter.acquire(MAILBOX))
    (granted,) = limiter.reserve({MAILBOX: [ONE]})[MAILBOX]
    assert isinstance(granted, Reservation)


# Away


def test_nothing_is_admitted_while_redis_is_away(own_redis: RedisServer) -> None:
    # Given a worker that holds a slot
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    make_whole(limiter)
    held = limiter.acquire(MAILBOX)
    # When Redis is away
    own_redis.stop()
    # Then nobody is admitted, soon and with a word, and what is given back is let go without one
    began = time.monotonic()
    with pytest.raises(Unavailable, match="Redis does not answer the limiter: ConnectionError") as refused:
        limiter.acquire(MAILBOX, wait=MINUTE)
    assert SECOND / 10 <= refused.value.retry_after <= 5 * SECOND
    for ask in (limiter.usage, limiter.paused_until, limiter.resume):
        with pytest.raises(Unavailable):
            ask(MAILBOX)
    with pytest.raises(Unavailable):
        limiter.reserve({MAILBOX: [ONE]})
    with pytest.raises(Unavailable):
        limiter.is_whole()
    limiter.renew(held)
    limiter.release(held)
    limiter.refund(MAILBOX, Reservation(held.at_ms), ONE)
    assert time.monotonic() - began < 5
    # And when it is back, the same limiter works
    own_redis.start()
    make_whole(limiter)
    assert_open(limiter)


def test_redis_that_hangs_holds_a_worker_for_moments_only(own_redis: RedisServer) -> None:
    # Given a Redis that accepts connections but says nothing
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    make_whole(limiter)
    own_redis.process.send_signal(signal.SIGSTOP)
    # When asked
    began = time.monotonic()
    with pytest.raises(Unavailable, match="TimeoutError"):
        limiter.acquire(MAILBOX)
    # Then the answer is no, within a moment
    assert time.monotonic() - began < 3
    # And when it goes on, so does the limiter
    own_redis.process.send_signal(signal.SIGCONT)
    limiter.acquire(MAILBOX)


def test_full_redis_admits_nothing_but_takes_slots_back(own_redis: RedisServer) -> None:
    limiter = Limiter(own_redis.url, only(mailbox_concurrency=4), LEASE)
    make_whole(limiter)
    slot = limiter.acquire(MAILBOX)
    own_redis.execute("CONFIG SET maxmemory 1")
    with pytest.raises(Unavailable):
        limiter.acquire(MAILBOX)
    with pytest.raises(Unavailable):
        limiter.reserve({MAILBOX: [ONE]})
    limiter.release(slot)
    assert used(limiter)["concurrency"] == 0


# Answers that are lost


@pytest.mark.parametrize("loses", ["swallowed", "cut"])
def test_what_was_done_is_not_done_again_because_its_answer_was_lost(
    make: Make, wire: Wire, prefix: str, loses: str
) -> None:
    # Given a worker that has reserved for two sends, and used each script before
    limiter, distant = make(windows=LONG), Limiter(wire.url, UNLIMITED, LEASE, windows=LONG, prefix=prefix)
    first, _, refunded = distant.reserve({MAILBOX: [ONE, ONE, ONE]})[MAILBOX]
    assert isinstance(first, Reservation)
    assert isinstance(refunded, Reservation)
    distant.refund(MAILBOX, refunded, ONE)
    distant.release(distant.acquire(MAILBOX))
    charged = used(limiter)
    # When Redis gives one back, charges for another and admits a call, each without that its answer arrives
    wire.loses = loses
    distant.refund(MAILBOX, first, ONE)
    # Then each has happened once
    assert used(limiter)["sends"] == charged["sends"] - 1
    wire.loses = loses
    with pytest.raises(Unavailable):
        distant.reserve({MAILBOX: [ONE]})
    assert used(limiter)["sends"] == charged["sends"]
    wire.loses = loses
    with pytest.raises(Unavailable):
        distant.acquire(MAILBOX)
    assert used(limiter)["requests"] == charged["requests"] + 1
    assert wire.loses is None
    # And what comes next is answered
    distant.acquire(MAILBOX)


def test_connection_that_redis_has_closed_meanwhile_costs_no_answer(make: Make, own_redis: RedisServer) -> None:
    # Given a worker whose connection lies idle
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    make_whole(limiter)
    # When Redis closes it
    own_redis.execute("CLIENT KILL TYPE normal")
    # Then the next call is admitted all the same
    limiter.acquire(MAILBOX)
    # And so after a restart
    own_redis.stop()
    own_redis.start()
    assert not limiter.is_whole()


# Emptied


def test_redis_that_never_knew_anything_admits_nobody(fresh: Callable[..., Limiter]) -> None:
    assert_closed(fresh())


def test_emptied_redis_admits_nobody_until_what_was_spent_is_written_down(own_redis: RedisServer) -> None:
    # Given a Redis that was emptied while a worker held a slot
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    make_whole(limiter)
    held = limiter.acquire(MAILBOX, send=ONE)
    own_redis.execute("FLUSHALL")
    # Then nobody is admitted, whatever is given back
    assert_closed(limiter)
    limiter.release(held)
    limiter.refund(MAILBOX, Reservation(held.at_ms), ONE)
    assert_closed(limiter)
    # When what was spent is written down
    with limiter.restoring() as mine:
        assert mine
        limiter.spent([Spent(MAILBOX, "sends", timedelta(), 29)])
        # Then nobody is admitted before it is done
        assert_closed(limiter)
    # And then as much as is left
    limiter.acquire(MAILBOX, send=ONE)
    with pytest.raises(Exhausted, match="sends"):
        limiter.acquire(MAILBOX, send=ONE)


def test_redis_that_has_forgotten_the_scripts_only_goes_on(own_redis: RedisServer) -> None:
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    make_whole(limiter)
    slot = limiter.acquire(MAILBOX)
    own_redis.execute("SCRIPT FLUSH")
    limiter.release(slot)
    assert_open(limiter)


def test_restarted_redis_admits_nobody_until_it_is_restored(own_redis: RedisServer) -> None:
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    make_whole(limiter)
    own_redis.stop()
    own_redis.start()
    assert_closed(limiter)
    make_whole(limiter)
    assert_open(limiter)


def test_redis_that_was_started_with_an_older_copy_admits_nobody(own_redis: RedisServer) -> None:
    # Given a Redis that has saved what it knew before the last sends
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    make_whole(limiter)
    limiter.acquire(MAILBOX, send=ONE)
    own_redis.execute("SAVE")
    for _ in range(2):
        limiter.acquire(MAILBOX, send=ONE)
    # When it dies and starts from that copy
    own_redis.stop()
    own_redis.start()
    assert used(limiter)["sends"] == 1
    # Then a call is refused, without that anyone has asked whether the counts are whole
    with pytest.raises(Emptied):
        limiter.acquire(MAILBOX)
    (refused,) = limiter.reserve({MAILBOX: [ONE]})[MAILBOX]
    assert isinstance(refused, Emptied)
    assert_closed(limiter)
    # And what is written down takes the place of the copy's
    with limiter.restoring():
        limiter.spent([Spent(MAILBOX, "sends", timedelta(), 3)])
    assert used(limiter)["sends"] == 3
    assert_open(limiter)


def test_reservation_is_refused_first_by_a_redis_with_an_older_copy(own_redis: RedisServer) -> None:
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    make_whole(limiter)
    own_redis.execute("SAVE")
    own_redis.stop()
    own_redis.start()
    (refused,) = limiter.reserve({MAILBOX: [ONE]})[MAILBOX]
    assert isinstance(refused, Emptied)


def test_restarted_redis_can_be_restored_before_anyone_has_asked_it_anything(own_redis: RedisServer) -> None:
    # Given a Redis that was started from a copy
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    make_whole(limiter)
    limiter.set_limits(MAILBOX, {"sends": 7})
    own_redis.execute("SAVE")
    own_redis.stop()
    own_redis.start()
    # When what was spent is written down at once
    with limiter.restoring():
        limiter.spent([Spent(MAILBOX, "sends", timedelta(), 3)])
        with pytest.raises(Emptied):
            limiter.acquire(MAILBOX)
    # Then it counts, and what the copy knows besides is kept
    assert usage_of(limiter, "sends")[:3] == ("sends", 7, 3)
    assert_open(limiter)


# Restored


def test_one_process_at_a_time_restores(fresh: Callable[..., Limiter]) -> None:
    # Given a process that is at it
    mine, other = fresh(), fresh()
    with mine.restoring() as first:
        assert first
        # When another would
        with other.restoring() as second:
            # Then there is nothing to do for it, and it opens nothing
            assert not second
        assert_closed(other)
    assert_open(other)
    # Nor when it is done
    with other.restoring() as again:
        assert not again
    assert_open(mine)


def test_restoration_that_fails_leaves_it_to_another_at_once(fresh: Callable[..., Limiter]) -> None:
    limiter = fresh()
    with pytest.raises(ZeroDivisionError), limiter.restoring():
        _ = 1 / 0
    assert_closed(limiter)
    make_whole(fresh())
    assert_open(limiter)


def restore_until_killed(url: str, prefix: str) -> None:
    with Limiter(url, Budgets(), LEASE, prefix=prefix).restoring():
        signal.pause()


def test_restoration_of_a_killed_process_is_left_to_another(limiter_redis: str, prefix: str, client: Redis) -> None:
    # Given a process that is killed while it restores
    of_fresh = f"{prefix}-fresh"
    with worker(restore_until_killed, limiter_redis, of_fresh):
        eventually(lambda: any(key.endswith(":restoring") for key in client.scan_iter(f"{of_fresh}:*")))
    limiter = Limiter(limiter_redis, Budgets(), LEASE, prefix=of_fresh)
    assert_closed(limiter)
    # When its time is over
    (turn,) = client.scan_iter(f"{of_fresh}:*:restoring")
    assert 0 < client.pttl(turn) <= 120_000
    client.delete(turn)
    # Then another does it
    make_whole(limiter)
    assert_open(limiter)


def test_restoration_that_redis_has_not_survived_opens_nothing(own_redis: RedisServer) -> None:
    # Given a Redis that is started anew, from a copy, in the middle of a restoration
    limiter = Limiter(own_redis.url, Budgets(), LEASE)
    with limiter.restoring() as mine:
        assert mine
        own_redis.execute("SAVE")
        limiter.spent([Spent(MAILBOX, "sends", timedelta(), 30)])
        own_redis.stop()
        own_redis.start()
    # When the restoration is done
    # Then it was not this Redis that was filled
    assert_closed(limiter)
    make_whole(limiter)


def test_process_that_stood_still_while_it_restored_undoes_nothing(
    fresh: Callable[..., Limiter], client: Redis
) -> None:
    # Given a process whose turn was over long before it went on
    late, other = fresh(), fresh()
    with late.restoring() as mine:
        assert mine
        (turn,) = client.scan_iter("*-fresh:*:restoring")
        client.delete(turn)
        make_whole(other)
        other.acquire(MAILBOX, send=ONE)
        # When it writes down what it knew
        late.spent([Spent(MAILBOX, "sends", timedelta(), 0)])
    # Then what was spent since counts
    assert used(other)["sends"] == 1
    assert_open(other)


def test_what_was_spent_counts_from_its_age_on_and_is_safe_to_repeat(
    fresh: Callable[..., Limiter], client: Redis, prefix: str
) -> None:
    # Given sends of different age, of which one has left the minute
    limiter = fresh(Budgets(mailbox_sends_per_minute=10))
    spent = [
        Spent(MAILBOX, "sends", timedelta(seconds=-5), 1),
        Spent(MAILBOX, "sends", timedelta(seconds=10), 2),
        Spent(MAILBOX, "sends", timedelta(seconds=10), 3),
        Spent(MAILBOX, "sends", timedelta(seconds=59), 4),
        Spent(MAILBOX, "sends", timedelta(seconds=90), 50),
        Spent(MAILBOX, "recipients", timedelta(hours=23), 60),
        Spent(MAILBOX, "recipients", timedelta.max, 70),
        Spent("B@example.com", "upload_bytes", timedelta(), 8),
        Spent(None, "tenant_external_recipients", timedelta(hours=1), 9),
    ]
    # When they are written down, twice, and by an iterator
    with limiter.restoring():
        limiter.spent(spent)
        limiter.spent(each for each in spent)
    # Then each counts once
    assert sums(client, f"{prefix}-fresh", "sends") == (10, 10)
    charged = used(limiter)
    assert (charged["sends"], charged["recipients"], charged["tenant_external_recipients"]) == (10, 60, 9)
    assert used(limiter, "b@example.com")["upload_bytes"] == 8
    # And comes back when its time is over, not before
    with pytest.raises(Exhausted) as refused:
        limiter.acquire(MAILBOX, send=ONE)
    assert timedelta(0) < refused.value.retry_after <= timedelta(seconds=3)
    with pytest.raises(Exhausted) as refused:
        limiter.acquire(MAILBOX, send=Wanted(9_941, 0))
    assert refused.value.budget == "recipients"
    assert timedelta(minutes=50) < refused.value.retry_after <= timedelta(minutes=100)


def test_reservation_that_was_written_down_after_a_loss_is_found_by_its_call(
    limiter_redis: str, prefix: str, client: Redis
) -> None:
    # Given all that may be sent reserved, in a Redis that is emptied and restored with what it knew
    budgets = Budgets(mailbox_sends_per_minute=5)
    limiter = Limiter(limiter_redis, budgets, LEASE, prefix=prefix)
    reservations = [each for each in limiter.reserve({MAILBOX: [ONE] * 5})[MAILBOX] if isinstance(each, Reservation)]
    other = Limiter(limiter_redis, budgets, LEASE, prefix=f"{prefix}-fresh")
    with other.restoring():
        seconds, microseconds = client.time()
        age = (seconds * 1000 + microseconds // 1000 - reservations[0].at_ms) * MILLISECOND
        other.spent(Spent(MAILBOX, budget, age, 5) for budget in ("sends", "recipients"))
    # When it is sent
    for reservation in reservations:
        other.release(other.acquire(MAILBOX, send=ONE, reservation=reservation))
    # Then it counts once
    assert (used(other)["sends"], used(other)["recipients"]) == (5, 5)


@pytest.mark.parametrize(
    "spent",
    [
        Spent(MAILBOX, "tenant_requests", timedelta(), 1),
        Spent(None, "sends", timedelta(), 1),
        Spent(MAILBOX, "sends", timedelta(), -1),
    ],
)
def test_spending_that_cannot_be_counted_is_an_error(make: Make, spent: Spent) -> None:
    with pytest.raises(ValueError, match=r"no budget|negative"):
        make().spent([spent])


def test_calls_that_may_be_under_way_hold_slots_for_a_while(make: Make) -> None:
    # Given calls that were under way when Redis was emptied
    limiter = make(only(mailbox_concurrency=3), windows=LONG)
    limiter.hold(MAILBOX, ["one", "two"], MINUTE)
    limiter.hold(MAILBOX, ["two", "three"], 300 * MILLISECOND)
    limiter.hold(MAILBOX, [], MINUTE)
    # When another would begin
    with pytest.raises(Exhausted, match="concurrency"):
        limiter.acquire(MAILBOX)
    # Then it may when theirs are over
    let_pass(310 * MILLISECOND)
    limiter.acquire(MAILBOX)
    limiter.acquire(MAILBOX)
    assert used(limiter)["concurrency"] == 3


# Turns


def test_a_turn_is_one_processs_at_a_time_and_over_when_it_is_done_or_lasts_too_long(make: Make) -> None:
    limiter, other = make(), make()
    with limiter.turn("sweep", MINUTE) as mine:
        assert mine
        with other.turn("sweep", MINUTE) as others, other.turn("another", MINUTE) as another:
            assert (others, another) == (False, True)
    with pytest.raises(ZeroDivisionError), limiter.turn("sweep", MINUTE) as mine:
        _ = 1 / (0 if mine else 1)
    with ExitStack() as block:
        with limiter.turn("sweep", 20 * MILLISECOND) as mine:
            assert mine
            let_pass(40 * MILLISECOND)
            assert block.enter_context(other.turn("sweep", MINUTE))
        # Whoever ends too late does not end the turn of the next
        with limiter.turn("sweep", MINUTE) as mine:
            assert not mine
