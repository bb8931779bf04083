"""Limits at run time: set by an operator, lowered by what Graph says, grown back in time; throttling of the tenant."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import limiter_support
import pytest
from limiter_support import (
    LEASE,
    LONG,
    MAILBOX,
    MILLISECOND,
    MINUTE,
    ONE,
    Make,
    eventually,
    keys_of,
    let_pass,
    only,
    run_all,
    usage_of,
    used,
)
from redis import Redis

from limiter import Budgets, Exhausted, Limiter, NeverFits, Reservation, Slowed, Wanted, ledger

limiter_redis, client = limiter_support.limiter_redis, limiter_support.client
prefix, make = limiter_support.prefix, limiter_support.make

#: Graph's word in tests: short, so that the pauses of several strikes are over soon.
WAIT = 5 * MILLISECOND


def sends_left(limiter: Limiter, mailbox: str = MAILBOX, at_most: int = 50) -> int:
    """How many more sends are granted; they are spent."""
    answers = limiter.reserve({mailbox: [ONE] * at_most})[mailbox]
    return sum(isinstance(answer, Reservation) for answer in answers)


# Set by an operator


def set_limits_elsewhere(url: str, prefix: str) -> None:
    Limiter(url, Budgets(), LEASE, prefix=prefix).set_limits(MAILBOX, {"sends": 2})


def test_limit_that_is_set_binds_every_process_at_once(limiter_redis: str, prefix: str, make: Make) -> None:
    # Given a worker, and a limit that another process sets
    limiter = make(Budgets(), windows=LONG)
    limiter.acquire(MAILBOX, send=ONE)
    run_all(set_limits_elsewhere, [(limiter_redis, prefix)])
    # When the worker sends on
    limiter.acquire(MAILBOX, send=ONE)
    # Then what it has sent before counts too
    with pytest.raises(Exhausted, match="sends"):
        limiter.acquire(MAILBOX, send=ONE)
    # And another mailbox may send as ever
    assert sends_left(limiter, "b@example.com") == 30


def test_mailbox_goes_by_its_own_limits_before_those_of_all_before_the_settings(make: Make) -> None:
    limiter = make(Budgets(mailbox_sends_per_minute=10), windows=LONG)
    limiter.set_limits(None, {"sends": 20})
    limiter.set_limits("own@example.com", {"sends": 30})
    assert [sends_left(limiter, mailbox) for mailbox in ("own@example.com", "Any@example.com")] == [30, 20]
    limiter.set_limits(None, {})
    assert sends_left(limiter, "new@example.com") == 10


def test_limits_that_are_set_replace_those_that_were_and_zero_switches_off(make: Make) -> None:
    limiter = make(Budgets(mailbox_recipients_per_day=10), windows=LONG)
    # Given two limits of a mailbox's own
    limiter.set_limits(MAILBOX, {"recipients": 5, "sends": 1})
    with pytest.raises(NeverFits):
        limiter.acquire(MAILBOX, send=Wanted(6, 0))
    # When one is switched off and the other not named
    limiter.set_limits(MAILBOX, {"recipients": 0})
    # Then the one limits nothing, and the other is the settings' again
    limiter.acquire(MAILBOX, send=Wanted(10_000, 0))
    assert sends_left(limiter) == 29


def test_limit_that_is_set_later_knows_what_was_spent_before(make: Make) -> None:
    # Given a tenant whose external recipients and calls are not limited
    limiter = make(windows=LONG)
    limiter.acquire(MAILBOX, send=Wanted(9, 7))
    limiter.reserve({MAILBOX: [Wanted(2, 2)]})
    # When they come to be
    limiter.set_limits(None, {"tenant_external_recipients": 10, "concurrency": 1})
    # Then what was spent counts, as does the call that is under way
    (refused,) = limiter.reserve({MAILBOX: [Wanted(2, 2)]})[MAILBOX]
    assert isinstance(refused, Exhausted)
    assert refused.budget == "tenant_external_recipients"
    with pytest.raises(Exhausted, match="concurrency"):
        limiter.acquire(MAILBOX)


def test_concurrency_can_be_set_too(make: Make) -> None:
    limiter = make(only(mailbox_concurrency=4))
    limiter.set_limits(MAILBOX, {"concurrency": 1})
    limiter.acquire(MAILBOX)
    with pytest.raises(Exhausted, match="concurrency"):
        limiter.acquire(MAILBOX)


def test_usage_tells_the_limit_that_counts_the_one_that_is_set_and_why(make: Make) -> None:
    limiter = make(Budgets(), windows=LONG)
    # Given limits from everywhere
    at = datetime.now(UTC)
    limiter.set_limits(None, {"requests": 500, "tenant_requests": 7, "concurrency": 3, "recipients": 10_000})
    limiter.set_limits(MAILBOX, {"concurrency": 2, "sends": 40, "upload_bytes": 0})
    limiter.set_slowed(MAILBOX, [Slowed("sends", 18, at, 40, 3), Slowed("concurrency", 1, at, 4, 3)])
    # When usage is asked for
    told = {usage.budget: (usage.limit, usage.configured, usage.why) for usage in limiter.usage(MAILBOX)}
    # Then each says where it comes from
    assert told == {
        "concurrency": (1, 2, f"slowed to 1 at {at:%H:%M}: 3 × 429"),
        "requests": (500, 500, "set for every mailbox"),
        "upload_bytes": (0, 0, "set for this mailbox"),
        "sends": (18, 40, f"slowed to 18 at {at:%H:%M}: 3 × 429"),
        "recipients": (10_000, 10_000, "set for every mailbox"),
    }
    tenants = [(usage.budget, usage.limit, usage.configured, usage.why) for usage in limiter.tenant_usage()]
    assert tenants == [
        ("tenant_requests", 7, 7, "set for the tenant"),
        ("tenant_external_recipients", 0, 0, None),
    ]


@pytest.mark.parametrize(
    ("mailbox", "limits"),
    [
        (MAILBOX, {"tenant_requests": 1}),
        (MAILBOX, {"sendz": 1}),
        (None, {"sends": -1}),
        (None, {"sends": 2**60}),
    ],
)
def test_limit_that_cannot_be_kept_is_an_error_and_changes_nothing(
    make: Make, mailbox: str | None, limits: dict[str, int]
) -> None:
    limiter = make()
    limiter.set_limits(mailbox, {"sends": 1})
    with pytest.raises(ValueError, match=r"no such limit|negative"):
        limiter.set_limits(mailbox, limits)
    assert usage_of(limiter, "sends").limit == 1


# Learned from Graph


def strikes(limiter: Limiter, number: int, budget: str = "sends", mailbox: str = MAILBOX) -> list[Slowed | None]:
    """Have Graph throttle a mailbox so often, each time when the last pause is over."""
    answers = []
    for _ in range(number):
        answers.append(limiter.throttled(mailbox, WAIT, budget=budget)[0])
        while limiter.paused_until(mailbox):
            let_pass(WAIT)
    return answers


def test_third_429_lowers_the_limit_to_three_fifths_of_what_was_used(make: Make) -> None:
    # Given a mailbox that has sent 20 of 30
    limiter = make(Budgets(), windows=LONG)
    limiter.reserve({MAILBOX: [ONE] * 20})
    # When Graph throttles it three times
    first, second, third = strikes(limiter, 3)
    # Then the third time its limit is lowered, and says so
    assert (first, second) == (None, None)
    assert third is not None
    assert (third.budget, third.limit, third.whole, third.strikes) == ("sends", 12, 30, 3)
    assert str(third) == usage_of(limiter, "sends").why == f"slowed to 12 at {third.at:%H:%M}: 3 × 429"
    with pytest.raises(Exhausted, match="sends"):
        limiter.acquire(MAILBOX, send=ONE)
    # And other budgets and mailboxes are as they were
    assert usage_of(limiter, "requests").limit == 10_000
    assert usage_of(limiter, "sends", "b@example.com").limit == 30
    # And it takes three more to lower it again
    assert [slowed is None for slowed in strikes(limiter, 3)] == [True, True, False]
    assert usage_of(limiter, "sends").limit == 7


def test_what_a_mailbox_used_is_what_it_had_used_before_the_first_pause(make: Make) -> None:
    # Given a mailbox that sent 20 before Graph throttled it, and whose window has emptied while it waited
    limiter = make(Budgets())
    limiter.reserve({MAILBOX: [ONE] * 20})
    assert strikes(limiter, 1) == [None]
    eventually(lambda: usage_of(limiter, "sends").used == 0)
    # When it is throttled twice more
    *_, third = strikes(limiter, 2)
    # Then it has three fifths of the 20
    assert third is not None
    assert (third.limit, third.whole) == (12, 30)


def test_where_nothing_was_used_the_limit_in_force_is_lowered(make: Make) -> None:
    limiter = make(Budgets())
    limiter.set_limits(MAILBOX, {"sends": 10})
    assert [each.limit for each in strikes(limiter, 3) if each] == [6]


def test_calls_that_are_throttled_together_count_once(make: Make) -> None:
    # When calls that were under way together are throttled, one after the other
    limiter = make(Budgets(), windows=LONG)
    for _ in range(5):
        assert limiter.throttled(MAILBOX, MINUTE, budget="sends") == (None, False)
    # Then it was one strike: the pause of the first was on
    limiter.resume(MAILBOX)
    assert strikes(limiter, 1) == [None]
    (third,) = strikes(limiter, 1)
    assert third is not None


def test_call_that_is_throttled_while_everything_is_paused_is_no_strike(make: Make) -> None:
    limiter = make(Budgets(), windows=LONG)
    limiter.pause_all(MINUTE)
    for _ in range(3):
        assert limiter.throttled(MAILBOX, MILLISECOND, budget="sends") == (None, False)
        let_pass(2 * MILLISECOND)


def test_a_mailbox_that_is_paused_for_long_is_slowed_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given pauses that are longer than strikes are remembered
    monkeypatch.setattr(ledger, "STRIKES_COUNT_FOR", 2 * WAIT)
    limiter = make(Budgets(), windows=LONG)
    answers = []
    for _ in range(3):
        answers.append(limiter.throttled(MAILBOX, 4 * WAIT, budget="sends")[0])
        while limiter.paused_until(MAILBOX):
            let_pass(MILLISECOND)
    assert [answer is None for answer in answers] == [True, True, False]


def test_strikes_are_counted_for_each_budget_and_mailbox(make: Make) -> None:
    limiter = make(Budgets(), windows=LONG)
    assert strikes(limiter, 2, "sends") == [None, None]
    assert strikes(limiter, 2, "requests") == [None, None]
    assert strikes(limiter, 2, "sends", "b@example.com") == [None, None]
    (slowed,) = strikes(limiter, 1, "requests")
    assert slowed is not None
    assert slowed.budget == "requests"


def test_concurrency_is_learned_from_the_slots_that_are_held(make: Make) -> None:
    # Given a mailbox with four calls, of which one was throttled and has returned its slot
    limiter = make(Budgets(mailbox_concurrency=4))
    for _ in range(3):
        limiter.acquire(MAILBOX)
    *_, slowed = strikes(limiter, 3, "concurrency")
    assert slowed is not None
    assert (slowed.limit, slowed.whole) == (2, 4)


def test_limit_that_is_lowered_again_and_again_keeps_a_tenth(make: Make) -> None:
    # Given a mailbox that uses little of its limit
    limiter = make(Budgets(mailbox_sends_per_minute=30), windows=LONG)
    limiter.acquire(MAILBOX, send=ONE)
    # When Graph throttles it on and on
    slowed = [each for each in strikes(limiter, 9) if each]
    # Then it may use a tenth of it, and never nothing
    assert [each.limit for each in slowed] == [3, 3, 3]
    limiter.set_limits(MAILBOX, {"sends": 2})
    *_, slowed_to = strikes(limiter, 3)
    assert slowed_to is not None
    assert slowed_to.limit == 1


def test_limit_of_one_cannot_be_lowered(make: Make) -> None:
    limiter = make(Budgets(mailbox_concurrency=1))
    limiter.acquire(MAILBOX)
    assert strikes(limiter, 3, "concurrency") == [None, None, None]
    assert usage_of(limiter, "concurrency").why is None


def test_what_is_not_limited_is_learned_too_and_grows_back_to_what_was_used(make: Make) -> None:
    # Given a mailbox without a limit
    limiter = make(windows=LONG)
    limiter.reserve({MAILBOX: [ONE] * 100})
    # When Graph throttles it
    *_, slowed = strikes(limiter, 3)
    # Then it has one
    assert slowed is not None
    assert (slowed.limit, slowed.whole) == (60, 100)
    usage = usage_of(limiter, "sends")
    assert (usage.limit, usage.used, usage.configured, usage.why) == (60, 100, 0, str(slowed))


def test_what_is_not_limited_grows_back_to_the_same_when_it_is_lowered_again(make: Make) -> None:
    # Given a mailbox without a limit that was slowed when it had used 100, and has used less since
    limiter = make(windows=LONG)
    limiter.set_slowed(MAILBOX, slowed_ago(0, limit=60, whole=100))
    limiter.reserve({MAILBOX: [ONE] * 50})
    # When Graph throttles it again
    *_, slowed = strikes(limiter, 3)
    # Then it has less, but not less to come back to
    assert slowed is not None
    assert (slowed.limit, slowed.whole) == (30, 100)


def slowed_ago(minutes: float, limit: int = 12, whole: int = 30) -> Iterable[Slowed]:
    return [Slowed("sends", limit, datetime.now(UTC) - minutes * MINUTE, whole, 3)]


@pytest.mark.parametrize(("minutes", "limit"), [(0, 12), (1.5, 13), (9.5, 21), (17.5, 29), (18.5, 30), (10_000, 30)])
def test_limit_grows_back_by_a_thirtieth_of_the_whole_each_minute(make: Make, minutes: float, limit: int) -> None:
    limiter = make(Budgets(mailbox_sends_per_minute=30), windows=LONG)
    limiter.set_slowed(MAILBOX, slowed_ago(minutes))
    usage = usage_of(limiter, "sends")
    assert (usage.limit, usage.configured, usage.why is None) == (limit, 30, limit == 30)
    assert sends_left(limiter) == limit


def test_lowered_limit_is_never_above_the_one_that_is_set(make: Make) -> None:
    # Given a limit that was lowered to 12 of 30
    limiter = make(Budgets(mailbox_sends_per_minute=30), windows=LONG)
    limiter.set_slowed(MAILBOX, slowed_ago(0))
    # When an operator sets less
    limiter.set_limits(MAILBOX, {"sends": 5})
    # Then that counts, and is not called slowed
    assert usage_of(limiter, "sends")[:2] == ("sends", 5)
    assert usage_of(limiter, "sends").why == "set for this mailbox"
    assert sends_left(limiter) == 5


def test_limit_that_was_lowered_by_a_clock_ahead_of_redis_neither_shrinks_nor_ends(make: Make) -> None:
    limiter = make(Budgets(mailbox_sends_per_minute=30))
    limiter.set_slowed(MAILBOX, slowed_ago(-60))
    assert usage_of(limiter, "sends").limit == 12


def test_lowered_limit_makes_a_large_charge_wait_not_fail(make: Make) -> None:
    # Given a limit that was lowered below what one call uploads
    limiter = make(only(mailbox_upload_mb_per_5_minutes=10), windows=LONG)
    limiter.set_slowed(MAILBOX, [Slowed("upload_bytes", 1_000_000, datetime.now(UTC), 10_000_000, 3)])
    # When it is asked for
    with pytest.raises(Exhausted, match="upload_bytes") as refused:
        limiter.acquire(MAILBOX, upload_bytes=3_000_000)
    # Then it may be had when the limit has grown
    assert refused.value.retry_after > timedelta()


def test_slowed_limits_that_are_set_replace_those_that_were(make: Make) -> None:
    limiter = make(Budgets(mailbox_sends_per_minute=30), windows=LONG)
    limiter.set_slowed(MAILBOX, slowed_ago(0))
    limiter.set_slowed(MAILBOX, [])
    assert usage_of(limiter, "sends").limit == 30


@pytest.mark.parametrize(
    "slowed",
    [
        Slowed("sends", 0, datetime.now(UTC), 30, 3),
        Slowed("sends", 1, datetime.now(UTC), -30, 3),
        Slowed("tenant_requests", 1, datetime.now(UTC), 30, 3),
    ],
)
def test_slowed_limit_that_cannot_be_kept_is_an_error(make: Make, slowed: Slowed) -> None:
    with pytest.raises(ValueError, match=r"negative|no budget"):
        make().set_slowed(MAILBOX, [slowed])


@pytest.mark.parametrize("budget", ["tenant_requests", "pause", ""])
def test_only_a_mailboxs_budget_is_learned(make: Make, budget: str) -> None:
    with pytest.raises(ValueError, match="no budget"):
        make().throttled(MAILBOX, WAIT, budget=budget)


# The tenant's throttling


def talk(limiter: Limiter, number: int) -> list[str]:
    mailboxes = [f"{name}@example.com" for name in range(number)]
    for mailbox in mailboxes:
        limiter.release(limiter.acquire(mailbox))
    return mailboxes


def throttle(limiter: Limiter, mailboxes: Iterable[str], budget: str = "requests") -> list[bool]:
    return [limiter.throttled(mailbox, MINUTE, budget=budget)[1] for mailbox in mailboxes]


def test_ten_throttled_mailboxes_that_are_half_of_all_pause_everything(make: Make, client: Redis, prefix: str) -> None:
    # Given 20 mailboxes that talk to Graph
    limiter = make()
    mailboxes = talk(limiter, 20)
    # When ten of them are throttled
    answers = throttle(limiter, mailboxes[:10])
    # Then with the tenth everything is paused, mailboxes that were not throttled too
    assert answers == [False] * 9 + [True]
    with pytest.raises(Exhausted, match="tenant_pause"):
        limiter.acquire("new@example.com")
    assert limiter.tenant_paused_until()
    # And it is no strike of the tenth
    assert len([key for key in keys_of(client, prefix) if ":strikes:" in key]) == 9


def test_throttled_mailboxes_that_are_few_or_the_minority_are_paused_for_themselves(make: Make) -> None:
    # When nine of nine are throttled
    limiter = make()
    assert throttle(limiter, talk(limiter, 9)) == [False] * 9
    assert limiter.tenant_paused_until() is None
    limiter.acquire("other@example.com")


def test_throttled_mailboxes_are_paused_for_themselves_where_most_are_not_throttled(make: Make) -> None:
    # When twelve of 30 are throttled, some of them twice
    limiter = make()
    mailboxes = talk(limiter, 30)
    assert throttle(limiter, [*mailboxes[:12], *mailboxes[:12]]) == [False] * 24
    assert limiter.tenant_paused_until() is None
    limiter.acquire(mailboxes[-1])


def test_mailbox_learns_nothing_from_the_tenants_throttling(make: Make) -> None:
    # Given a mailbox with two strikes, and all throttled
    limiter = make(Budgets(), windows=LONG)
    mailboxes = talk(limiter, 12)
    assert strikes(limiter, 2, "requests", mailboxes[0]) == [None, None]
    assert throttle(limiter, mailboxes[1:])[-1]
    # When it is throttled with them
    slowed, everything = limiter.throttled(mailboxes[0], MINUTE, budget="requests")
    # Then it was not its doing
    assert (slowed, everything) == (None, True)
    limiter.resume_all()
    limiter.resume(mailboxes[0])
    assert used(limiter, mailboxes[0])["requests"] == 1
