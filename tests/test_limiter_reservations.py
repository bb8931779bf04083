"""Send budget that is charged in advance: it counts until the call, moves with it, and is given back once."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
    WINDOWS,
    Make,
    busiest,
    let_pass,
    only,
    run_all,
    sums,
    usage_of,
    used,
)
from redis import Redis

from limiter import Budgets, Exhausted, Limiter, NeverFits, Reservation, Wanted
from limiter.budgets import Window

limiter_redis, client = limiter_support.limiter_redis, limiter_support.client
prefix, make = limiter_support.prefix, limiter_support.make


def reserve(limiter: Limiter, *sends: Wanted) -> list[Reservation]:
    """Reserve for sends that must all fit."""
    answers = limiter.reserve({MAILBOX: sends})[MAILBOX]
    granted = [answer for answer in answers if isinstance(answer, Reservation)]
    assert len(granted) == len(sends)
    return granted


# What counts


def test_reservation_counts_at_once_and_the_call_does_not_count_again(make: Make) -> None:
    # Given budget for one send that is reserved
    limiter = make(Budgets(4, 10, 1, 1, 3, 10, 2), windows=LONG)
    send = Wanted(3, 2)
    (reservation,) = reserve(limiter, send)
    charged = used(limiter)
    assert [charged[budget] for budget in send.charges()] == [1, 3, 2]
    # When another send asks
    with pytest.raises(Exhausted):
        limiter.acquire(MAILBOX, send=ONE)
    # Then it is refused, but the one that it was reserved for is not
    limiter.acquire(MAILBOX, send=send, reservation=reservation, upload_bytes=7)
    # And what was reserved has become the call's: only what was not reserved is charged besides
    besides = {"concurrency": 1, "requests": 1, "upload_bytes": 7, "tenant_requests": 1}
    assert used(limiter) == charged | besides


def test_reservation_moves_to_the_instant_of_the_call(make: Make, client: Redis) -> None:
    # Given a send that was reserved a while before the call
    limiter = make(only(mailbox_sends_per_minute=1))
    (reservation,) = reserve(limiter, ONE)
    let_pass(WINDOWS["sends"] // 2 * MILLISECOND)
    slot = limiter.acquire(MAILBOX, send=ONE, reservation=reservation)
    assert slot.at_ms > reservation.at_ms
    # When another asks
    with pytest.raises(Exhausted) as refused:
        limiter.acquire(MAILBOX, send=ONE)
    # Then it is told to wait for the window's length from the call on
    seconds, microseconds = client.time()
    free_at_ms = seconds * 1000 + microseconds // 1000 + refused.value.retry_after / MILLISECOND
    assert free_at_ms >= slot.at_ms + WINDOWS["sends"]


def test_call_that_is_refused_keeps_its_reservation(make: Make) -> None:
    # Given a send that is reserved, and no slot
    limiter = make(only(mailbox_concurrency=1, mailbox_sends_per_minute=1), windows=LONG)
    (reservation,) = reserve(limiter, ONE)
    slot = limiter.acquire(MAILBOX)
    with pytest.raises(Exhausted, match="concurrency"):
        limiter.acquire(MAILBOX, send=ONE, reservation=reservation)
    # When the slot is free
    limiter.release(slot)
    # Then it may send
    limiter.acquire(MAILBOX, send=ONE, reservation=reservation)
    assert used(limiter)["sends"] == 1


def test_reservation_that_has_left_its_window_is_charged_anew(make: Make) -> None:
    # Given a send that was reserved so long ago that the minute has forgotten it, though the day has not
    limiter = make(only(mailbox_sends_per_minute=1), windows={**LONG, "sends": 100})
    (reservation,) = reserve(limiter, Wanted(2, 1))
    let_pass(usage_of(limiter, "sends").next_free_in or timedelta())
    assert used(limiter)["sends"] == 0
    # When it is sent
    limiter.acquire(MAILBOX, send=Wanted(2, 1), reservation=reservation)
    # Then it counts in the minute, and once in the day
    charged = used(limiter)
    assert (charged["sends"], charged["recipients"], charged["tenant_external_recipients"]) == (1, 2, 1)


def test_reservation_that_has_left_its_window_is_refused_when_nothing_is_left(make: Make) -> None:
    # Given a send that was reserved too long ago, and another since
    limiter = make(only(mailbox_sends_per_minute=1), windows={**LONG, "sends": 1_000})
    (old,) = reserve(limiter, ONE)
    let_pass(usage_of(limiter, "sends").next_free_in or timedelta())
    (young,) = reserve(limiter, ONE)
    # When the old one asks
    with pytest.raises(Exhausted, match="sends"):
        limiter.acquire(MAILBOX, send=ONE, reservation=old)
    # Then the young one has kept its place
    limiter.acquire(MAILBOX, send=ONE, reservation=young)


def test_reservation_of_which_redis_knows_nothing_is_charged_anew(make: Make) -> None:
    limiter = make(only(mailbox_sends_per_minute=1), windows=LONG)
    slot = limiter.acquire(MAILBOX)
    for expected in (1, 1):
        with suppress(Exhausted):
            limiter.acquire(MAILBOX, send=ONE, reservation=Reservation(slot.at_ms))
        assert used(limiter)["sends"] == expected


def test_limit_is_never_exceeded_in_any_window_however_late_reservations_are_used(make: Make) -> None:
    # When sends are reserved and made up to a window later, some of them never
    limiter = make(only(mailbox_sends_per_minute=10, mailbox_recipients_per_day=60))
    calls: list[tuple[int, int]] = []
    lock = threading.Lock()

    def send_late(reservation: Reservation, send: Wanted) -> None:
        let_pass(random.uniform(0, WINDOWS["recipients"]) * MILLISECOND)
        if random.random() < 0.2:
            limiter.refund(MAILBOX, reservation, send)
            return
        with suppress(Exhausted), limiter.slot(MAILBOX, send=send, reservation=reservation) as slot, lock:
            calls.append((slot.at_ms, send.recipients))

    with ThreadPoolExecutor(32) as pool:
        for _ in range(150):
            sends = [Wanted(random.randint(1, 12), 0) for _ in range(3)]
            for send, answer in zip(sends, limiter.reserve({MAILBOX: sends})[MAILBOX], strict=True):
                if isinstance(answer, Reservation):
                    pool.submit(send_late, answer, send)
            let_pass(random.uniform(0, 40) * MILLISECOND)
    # Then no window of the length has more than the limit, and they were used
    calls.sort()
    assert calls[-1][0] - calls[0][0] > 2 * WINDOWS["recipients"]
    assert 3 <= busiest([(at, 1) for at, _ in calls], WINDOWS["sends"]) <= 10
    assert 20 <= busiest(calls, WINDOWS["recipients"]) <= 60
    # And nothing stays charged
    let_pass(2 * WINDOWS["recipients"] * MILLISECOND)
    assert set(used(limiter).values()) == {0}


def reserve_much(url: str, prefix: str) -> None:
    limiter = Limiter(url, only(mailbox_recipients_per_day=100), LEASE, windows=LONG, prefix=prefix)
    for _ in range(40):
        limiter.reserve({MAILBOX: [ONE, Wanted(2, 0)]})


def test_processes_that_reserve_together_reserve_the_limit_and_no_more(
    limiter_redis: str, prefix: str, make: Make
) -> None:
    run_all(reserve_much, [(limiter_redis, prefix)] * 3)
    assert used(make(windows=LONG))["recipients"] == 100


# What is granted


def test_what_is_too_large_for_the_rest_is_passed_over_and_what_is_behind_it_granted(make: Make) -> None:
    # Given a mailbox with five recipients left
    limiter = make(only(mailbox_recipients_per_day=5), windows=LONG)
    # When sends are reserved
    answers = limiter.reserve({MAILBOX: [Wanted(3, 0), Wanted(4, 0), Wanted(2, 0), ONE]})[MAILBOX]
    # Then those that fit are granted, in order
    assert [type(answer) for answer in answers] == [Reservation, Exhausted, Reservation, Exhausted]
    # And the others are told whether a smaller one may fit
    assert [answer.mailbox_wide for answer in answers if isinstance(answer, Exhausted)] == [False, True]
    assert used(limiter)["recipients"] == 5


def test_what_never_fits_is_said_in_its_place_and_costs_nothing(make: Make) -> None:
    limiter = make(only(mailbox_recipients_per_day=5), windows=LONG)
    too_large, granted = limiter.reserve({MAILBOX: [Wanted(6, 0), ONE]})[MAILBOX]
    assert isinstance(too_large, NeverFits)
    assert str(too_large) == "recipients: 6 asked for, the limit is 5"
    assert isinstance(granted, Reservation)
    assert (used(limiter)["sends"], used(limiter)["recipients"]) == (1, 1)


def test_mailboxes_are_reserved_for_each_for_itself_and_the_tenant_for_all(make: Make) -> None:
    # Given two external recipients that the tenant may have, and a send that each mailbox may make
    limiter = make(only(mailbox_sends_per_minute=1, tenant_external_recipients_per_day=2), windows=LONG)
    outwards = Wanted(1, 1)
    # When three mailboxes want more
    answers = limiter.reserve({"a": [outwards, ONE], "b": [outwards], "c": [outwards, ONE], "d": []})
    # Then the one that comes last has nothing but what is internal
    granted = {name: [isinstance(answer, Reservation) for answer in of_name] for name, of_name in answers.items()}
    assert granted == {"a": [True, False], "b": [True], "c": [False, True], "d": []}
    assert [answers["a"][1].budget, answers["c"][0].budget] == ["sends", "tenant_external_recipients"]  # type: ignore[union-attr]


@pytest.mark.parametrize("budget", ["requests", "upload_bytes", "tenant_requests"])
def test_nothing_is_reserved_when_the_call_could_not_be_made_anyway(make: Make, budget: str) -> None:
    # Given a mailbox that may not call Graph for a while
    limiter = make(Budgets(0, 5, 1, 10, 10, 5, 0), windows=LONG)
    if budget == "tenant_requests":
        limiter.acquire("b@example.com", requests=5)
    else:
        limiter.acquire(MAILBOX, **{budget: {"requests": 5, "upload_bytes": 1_000_000}[budget]})
    # When sends are to be reserved
    answers = limiter.reserve({MAILBOX: [ONE, ONE]})[MAILBOX]
    # Then none is, and for the same reason
    assert [(type(answer), answer.budget) for answer in answers] == [(Exhausted, budget)] * 2  # type: ignore[union-attr]
    assert used(limiter)["sends"] == 0


def test_what_needs_no_budget_of_a_kind_is_not_held_up_by_it(make: Make) -> None:
    # Given a tenant that has sent to more external recipients than it may by now
    limiter = make(windows=LONG)
    reserve(limiter, Wanted(3, 3))
    limiter.set_limits(None, {"tenant_external_recipients": 1})
    # When internal mail is to be sent
    # Then it may be
    (reservation,) = reserve(limiter, Wanted(5, 0))
    limiter.acquire(MAILBOX, send=Wanted(5, 0), reservation=reservation)


@pytest.mark.parametrize("of", ["mailbox", "tenant"])
def test_nothing_is_reserved_during_a_pause(make: Make, of: str) -> None:
    limiter = make()
    limiter.pause(MAILBOX, MINUTE) if of == "mailbox" else limiter.pause_all(MINUTE)
    (refused,) = limiter.reserve({MAILBOX: [ONE]})[MAILBOX]
    assert isinstance(refused, Exhausted)
    assert refused.budget == {"mailbox": "pause", "tenant": "tenant_pause"}[of]
    assert refused.retry_after > 50 * SECOND


@pytest.mark.parametrize("send", [Wanted(-1, 0), Wanted(1, -1), Wanted(2**60, 0)])
def test_reservation_that_would_free_a_budget_or_cannot_be_counted_is_an_error(make: Make, send: Wanted) -> None:
    with pytest.raises(ValueError, match="negative"):
        make().reserve({MAILBOX: [ONE, send]})


# What is given back


def test_refund_gives_back_exactly_what_was_reserved(make: Make, client: Redis, prefix: str) -> None:
    # Given three sends of which one is reserved now and one was some sub-windows before
    limiter = make(only(mailbox_sends_per_minute=3, tenant_external_recipients_per_day=6), windows=LONG)
    send = Wanted(3, 2)
    (first,) = reserve(limiter, send)
    let_pass(SECOND)
    second, third = reserve(limiter, send, send)
    # When the first and the second are given back
    limiter.refund(MAILBOX, first, send)
    limiter.refund(MAILBOX, second, send)
    # Then the third counts, and what they had may be had again
    charged = used(limiter)
    assert [charged[budget] for budget in send.charges()] == [1, 3, 2]
    reserve(limiter, send, send)
    limiter.acquire(MAILBOX, send=send, reservation=third)
    # And the sums are those of the parts
    assert sums(client, prefix, "sends") == (3, 3)


def test_refund_that_comes_late_takes_nothing_that_others_have(make: Make, client: Redis, prefix: str) -> None:
    # Given a reservation that has left its minute, but not its day, and a send since
    limiter = make(only(mailbox_sends_per_minute=5), windows={**LONG, "sends": 300})
    (late,) = reserve(limiter, ONE)
    let_pass(600 * MILLISECOND)
    reserve(limiter, ONE)
    # When it is given back
    limiter.refund(MAILBOX, late, ONE)
    # Then the day has it back, and the minute is as it was
    assert used(limiter)["recipients"] == 1
    assert sums(client, prefix, "sends") == (1, 1)


def test_refund_takes_nothing_from_the_sub_window_that_has_its_place_in_the_ring_now(
    make: Make, client: Redis, prefix: str
) -> None:
    limiter = make(only(mailbox_sends_per_minute=5), windows=LONG)
    (reservation,) = reserve(limiter, ONE)
    window = Window.of("sends", "", 5, LONG["sends"])
    limiter.refund(MAILBOX, Reservation(reservation.at_ms - window.ring * window.width), ONE)
    limiter.refund(MAILBOX, Reservation(reservation.at_ms + window.ring * window.width), ONE)
    assert sums(client, prefix, "sends") == (1, 1)


def test_refund_never_makes_a_counter_negative(make: Make, client: Redis, prefix: str) -> None:
    # Given a reservation that was given back
    limiter = make(windows=LONG)
    (reservation,) = reserve(limiter, ONE)
    limiter.refund(MAILBOX, reservation, ONE)
    # When more is given back
    limiter.refund(MAILBOX, reservation, Wanted(5, 5))
    limiter.refund(MAILBOX, Reservation(reservation.at_ms + 3_600_000), ONE)
    limiter.refund("nobody@example.com", reservation, ONE)
    # Then nothing is charged, not less than nothing
    assert sums(client, prefix, "sends") == sums(client, prefix, "recipients") == (0, 0)


def test_refund_into_a_window_that_has_moved_on_leaves_its_sum_right(make: Make, client: Redis, prefix: str) -> None:
    # Given a reservation, and one before it that has left the window, without anything charged since
    limiter = make(only(mailbox_sends_per_minute=5), windows={**LONG, "sends": 1_000})
    reserve(limiter, ONE, ONE)
    let_pass(600 * MILLISECOND)
    (young,) = reserve(limiter, ONE)
    let_pass(500 * MILLISECOND)
    # When it is given back
    limiter.refund(MAILBOX, young, ONE)
    # Then nothing is left, and as much may be reserved as ever
    assert used(limiter)["sends"] == 0
    reserve(limiter, *[ONE] * 5)
    assert used(limiter)["sends"] == 5
    assert sums(client, prefix, "sends") == (5, 5)
