"""The forecast's calculation, against a mail-by-mail simulation of windows and slots."""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forecast as forecasts
import limiter
from forecast import STAY, WINDOWS, Fleet, Forecast, Later, Usage, Workload, foresee, planned, told

NEWS = "news@contoso.example"
SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)
ROOMY = 10**9
CALL = timedelta(milliseconds=150)
NO_FILE = {"upload_bytes": 0, "attach_requests": 0}


def fleet(**changes: Any) -> Fleet:
    return replace(Fleet(ROOMY, ROOMY, CALL), **changes)


def of_news(emails: int, *usage: Usage, **changes: Any) -> Workload:
    given: dict[str, Any] = {"plain": emails, "recipients": emails, "external_recipients": emails} | changes
    return Workload(NEWS, usage=usage, **given)


def seconds(emails: int, *usage: Usage, **changes: Any) -> float:
    return done(foresee([of_news(emails, *usage, **changes)], fleet()))


def done(foreseen: Forecast) -> float:
    assert foreseen.done_in is not None
    return foreseen.done_in.total_seconds()


FOUR_AT_A_TIME = Usage("concurrency", 4)
A_MINUTE = 60 * STAY


# By hand


@pytest.mark.parametrize(("emails", "periods", "burst"), [(1, 0, 1), (30, 0, 30), (31, 1, 1), (60, 1, 30), (61, 2, 1)])
def test_a_window_allows_a_burst_and_the_next_one_a_period_later(emails: int, periods: int, burst: int) -> None:
    calls = math.ceil(burst / 4)
    assert seconds(emails, FOUR_AT_A_TIME, Usage("sends", 30)) == pytest.approx(periods * A_MINUTE + calls * 0.15)


def test_what_is_used_is_waited_for_and_costs_nothing_else() -> None:
    used = Usage("sends", 12, 8, 57 * SECOND)
    assert seconds(4, FOUR_AT_A_TIME, used) == pytest.approx(0.15)
    assert 57 < seconds(5, FOUR_AT_A_TIME, used) < 58
    assert seconds(12, FOUR_AT_A_TIME, used) == pytest.approx(A_MINUTE + 0.15)
    assert A_MINUTE < seconds(16, FOUR_AT_A_TIME, used) < A_MINUTE + 1
    assert 57 + A_MINUTE < seconds(17, FOUR_AT_A_TIME, used) < 58 + A_MINUTE


def test_what_was_used_in_a_burst_is_back_together() -> None:
    burst = Usage("sends", 12, 12, 20 * SECOND, 21 * SECOND)
    assert 20 < seconds(12, FOUR_AT_A_TIME, burst) < 22
    assert seconds(12, FOUR_AT_A_TIME, burst._replace(all_free_in=None)) > A_MINUTE


def test_a_limit_that_was_set_below_what_is_used_lets_nothing_go_until_enough_is_back() -> None:
    assert seconds(1, FOUR_AT_A_TIME, Usage("sends", 10, 20, SECOND)) > A_MINUTE / 2


def test_slots_alone_make_rounds_of_calls() -> None:
    assert seconds(1000, FOUR_AT_A_TIME, Usage("sends", 0)) == pytest.approx(250 * 0.15)


def test_budgets_follow_each_other() -> None:
    # 10,000 recipients on the first day, and 2,000 on the second, thirty a minute.
    took = seconds(12_000, FOUR_AT_A_TIME, Usage("sends", 30), Usage("recipients", 10_000))
    assert took == pytest.approx(86_400 * STAY + math.ceil(2000 / 30 - 1) * A_MINUTE, abs=10)


def test_the_requests_of_the_backup_are_counted() -> None:
    assert seconds(3333, Usage("requests", 10_000)) < 60
    assert seconds(3334, Usage("requests", 10_000)) > 600
    as_drafts = fleet(plain_calls=(2, 1))
    assert done(foresee([of_news(3334, Usage("requests", 10_000))], as_drafts)) > 600


def test_bytes_go_up_range_by_range() -> None:
    usage = (FOUR_AT_A_TIME, Usage("upload_bytes", 150_000_000))
    (ten,) = planned(10, 1, upload_bytes=100_000_000, attach_requests=27, usage=usage)
    assert (ten.attached, ten.attach_requests) == (10, 270)
    # 38 ranges fit into a window, so 1,000 MB take seven.
    assert done(foresee([ten], fleet())) == pytest.approx(6 * 300 * STAY, abs=30)


def test_mail_that_is_not_due_is_waited_for() -> None:
    tomorrow = Later(100, 24 * HOUR, 24 * HOUR, 24 * HOUR)
    foreseen = foresee([of_news(130, FOUR_AT_A_TIME, Usage("sends", 30), later=tomorrow)], fleet())
    assert done(foreseen) == pytest.approx(86_400 + 3 * A_MINUTE, abs=1)
    assert foreseen.binds == "send_at"


def test_one_early_retry_makes_no_trickle_of_tomorrows_newsletter() -> None:
    tomorrow = Later(50_001, SECOND, 24 * HOUR * 50_000 / 50_001, 24 * HOUR)
    assert seconds(50_001, FOUR_AT_A_TIME, Usage("sends", 30), later=tomorrow) > 86_400 + 50_000 / 30 * 60


def test_a_pause_with_an_end_is_waited_for() -> None:
    foreseen = foresee([of_news(31, Usage("sends", 30), FOUR_AT_A_TIME, paused_for=HOUR)], fleet())
    assert done(foreseen) == pytest.approx(3600 + A_MINUTE, abs=1)
    assert foreseen.advice == f"the pause of {NEWS} binds; mailfleet resume {NEWS} would end it now"
    foreseen = foresee([of_news(1, FOUR_AT_A_TIME)], fleet(paused_for=HOUR))
    assert done(foreseen) == pytest.approx(3600.15)


def test_an_operators_pause_has_no_end_and_holds_up_nothing_else() -> None:
    paused = Workload("paused@contoso.example", paused=7, usage=[FOUR_AT_A_TIME])
    foreseen = foresee([paused, of_news(4, FOUR_AT_A_TIME)], fleet())
    assert done(foreseen) == pytest.approx(0.15)
    assert "7 emails wait until an operator ends a pause" in foreseen.advice
    assert [(outlook.mailbox, outlook.done_in is None, outlook.binds) for outlook in foreseen.mailboxes] == [
        (paused.mailbox, True, "pause"),
        (NEWS, False, "concurrency"),
    ]
    assert foresee([paused], fleet()).done_in is None


def test_what_exceeds_a_limit_alone_never_goes() -> None:
    foreseen = foresee([of_news(5, Usage("recipients", 400), recipients=2500)], fleet())
    assert (foreseen.done_in, foreseen.binds) == (None, "recipients")
    assert "exceeds MAILBOX_RECIPIENTS_PER_DAY alone" in foreseen.advice


def test_nothing_waits() -> None:
    assert foresee([], fleet()) == Forecast(0, 0, timedelta(), "", None, "nothing is waiting", [])


# The fleet


def test_a_small_mailbox_is_through_in_its_turns() -> None:
    small, large = Workload("small@x.example", plain=10), Workload("large@x.example", plain=10_000)
    foreseen = foresee([small, large], fleet(plain_concurrency=10))
    took = {outlook.mailbox: outlook.done_in for outlook in foreseen.mailboxes}
    assert took == {small.mailbox: 2 * CALL, large.mailbox: 1001 * CALL}


def test_routes_go_side_by_side() -> None:
    both = Workload(NEWS, plain=100, attached=100, attach_requests=100)
    foreseen = foresee([both], fleet(plain_concurrency=10, attached_concurrency=10))
    assert done(foreseen) == pytest.approx(10 * 3 * 0.15)
    assert foreseen.binds == "send_attached_concurrency"


def test_the_tenants_budgets_bind_all_mailboxes_together() -> None:
    mailboxes = [replace(of_news(50), mailbox=f"m{number}@x.example") for number in range(10)]
    licences = Usage("tenant_external_recipients", 400)
    foreseen = foresee(mailboxes, fleet(usage=[licences]))
    assert (done(foreseen), foreseen.binds, foreseen.mailbox) == (
        pytest.approx(86_400 * STAY, abs=10),
        "tenant_external_recipients",
        None,
    )
    foreseen = foresee(mailboxes, fleet(usage=[Usage("tenant_requests", 300)]))
    assert done(foreseen) == pytest.approx(4 * 10 * STAY, abs=1)


# What would help


def test_the_binding_mailbox_is_named_with_what_would_help() -> None:
    usage = (FOUR_AT_A_TIME, Usage("sends", 30))
    foreseen = foresee([of_news(1440, *usage), replace(of_news(3, *usage), mailbox="ann@contoso.example")], fleet())
    assert foreseen.mailbox == NEWS
    assert foreseen.advice == (
        f"MAILBOX_SENDS_PER_MINUTE of {NEWS} binds: 30 a minute; spread over 3 more mailboxes: done in 12 min"
    )


def test_all_that_are_late_for_the_same_reason_are_spread() -> None:
    usage = (FOUR_AT_A_TIME, Usage("sends", 30))
    late = planned(100_000, 10, usage=usage, **NO_FILE)
    assert "of each of 10 mailboxes binds: 30 a minute; spread over 30 more mailboxes: done in" in (
        foresee(late, fleet()).advice
    )


def test_what_would_bind_then_is_told_where_a_change_alone_is_no_help() -> None:
    busy = fleet(plain_concurrency=1)
    advice = foresee([of_news(100, Usage("concurrency", 1))], busy).advice
    assert "it would take as long, for then SEND_PLAIN_CONCURRENCY binds" in advice


def test_concurrency_that_binds_is_to_be_raised_with_its_threads() -> None:
    advice = foresee([of_news(100_000)], fleet(plain_concurrency=8)).advice
    assert advice == (
        "SEND_PLAIN_CONCURRENCY binds: 8 in flight; raised to 32, with as many threads of send_plain: done in 8 min"
    )


def test_planned_mail_is_shared_evenly() -> None:
    shares = planned(10, 4, usage=(), **NO_FILE)
    assert [(share.mailbox, share.plain, share.alike) for share in shares] == [
        ("each of 2 mailboxes", 3, 2),
        ("each of 2 others", 2, 2),
    ]
    assert [(share.mailbox, share.plain) for share in planned(2, 5, usage=(), **NO_FILE)] == [
        ("each of 2 mailboxes", 1)
    ]


@pytest.mark.parametrize(
    ("duration", "words"),
    [
        (0, "0 s"),
        (0.2, "1 s"),
        (90, "90 s"),
        (91, "2 min"),
        (5400, "90 min"),
        (5401, "1 h 31 min"),
        (129_600, "1 d 12 h"),
    ],
)
def test_durations_are_told_as_people_do(duration: float, words: str) -> None:
    assert told(timedelta(seconds=duration)) == words


def test_windows_are_the_limiters() -> None:
    assert {budget: window.length / timedelta(milliseconds=1) for budget, window in WINDOWS.items()} == limiter.WINDOWS
    assert pytest.approx(1 + (limiter.SLACK + 1) / limiter.SUBWINDOWS) == STAY
    assert limiter.CONCURRENCY == forecasts.workloads.CONCURRENCY


# Mail by mail


@dataclass
class Ring:
    """A window of the limiter's: a charge counts until the last sub-window has left that it can have been in."""

    limit: int
    length: float
    sub_windows: int = 120
    slack: int = 2

    def __post_init__(self) -> None:
        self._charges: Counter[int] = Counter()

    @property
    def width(self) -> float:
        return self.length / self.sub_windows

    def admits_at(self, at: float, units: int) -> float:
        """Return when so much is free, from that instant on."""
        current = math.floor(at / self.width + 1e-9)
        excess = sum(self._charges.values()) + units - self.limit
        for index in sorted(self._charges):
            left = index + self.sub_windows + 1 + self.slack
            if left <= current:
                excess -= self._charges.pop(index)
            elif excess > 0:
                excess -= self._charges[index]
                at = left * self.width
        return at

    def charge(self, at: float, units: int) -> None:
        self._charges[math.floor(at / self.width + 1e-9)] += units


class Exact:
    """A window in which a charge counts for exactly the period, and what was used comes back at given times."""

    def __init__(self, limit: int, period: float, used: Sequence[float] = ()) -> None:
        self._limit, self._period = limit, period
        self._back = deque((at, 1) for at in sorted(used))
        self._used = len(self._back)

    def admits_at(self, at: float, units: int) -> float:
        while self._back and (self._back[0][0] <= at + 1e-9 or self._used + units > self._limit):
            back_at, back = self._back.popleft()
            at, self._used = max(at, back_at), self._used - back
        return at

    def charge(self, at: float, units: int) -> None:
        self._back.append((at + self._period, units))
        self._used += units


def simulated(
    emails: int, slots: int, windows: Sequence[tuple[Ring | Exact, int]], due: Callable[[int], float] = lambda _: 0.0
) -> float:
    """Send one email after the other, as soon as a slot and every window admit it; return when the last is done."""
    idle = [0.0] * slots
    at = last = 0.0
    for number in range(emails):
        at = max(at, heapq.heappop(idle), due(number))
        for window, units in windows:
            at = window.admits_at(at, units)
        for window, units in windows:
            window.charge(at, units)
        last = max(last, at + CALL.total_seconds())
        heapq.heappush(idle, at + CALL.total_seconds())
    return last


def spread(count: int, first: float, last: float) -> list[float]:
    return [first + (last - first) * number / count for number in range(1, count + 1)]


@settings(deadline=None)
@given(emails=st.integers(1, 300), slots=st.integers(1, 6), limit=st.integers(1, 40), began=st.floats(0, 60))
def test_a_ring_of_counters_takes_as_long_as_foreseen(emails: int, slots: int, limit: int, began: float) -> None:
    took = simulated(emails, slots, [(Ring(limit, 60), 1)], lambda _: began) - began
    foreseen = seconds(emails, Usage("concurrency", slots), Usage("sends", limit))
    # At first a charge may be back half a second earlier: it can have been anywhere in its sub-window.
    assert foreseen - 0.5 - CALL.total_seconds() <= took <= foreseen + 1e-6 + CALL.total_seconds()


@st.composite
def budgets(draw: st.DrawFn) -> list[tuple[Usage, int]]:
    """Some of a mailbox's budgets, used in part, with what an email costs of each."""
    recipients = draw(st.integers(1, 5))
    costs = {"sends": (1, 40), "recipients": (recipients, 80), "requests": (3, 100)}
    found = []
    for budget in draw(st.sets(st.sampled_from(sorted(costs)), min_size=1)):
        units, most = costs[budget]
        limit = units * draw(st.integers(1, most))
        used = draw(st.integers(0, limit))
        first = draw(st.integers(1, int(WINDOWS[budget].length.total_seconds())))
        found.append((Usage(budget, limit, used, first * SECOND if used else None), units))
    return found


def exact(usage: Usage) -> Exact:
    period = WINDOWS[usage.budget].length.total_seconds() * STAY
    first = usage.next_free_in.total_seconds() if usage.next_free_in else 0
    return Exact(usage.limit, period, spread(usage.used, first, period))


@settings(deadline=None, max_examples=300)
@given(emails=st.integers(1, 400), slots=st.integers(1, 6), given_budgets=budgets())
def test_several_budgets_that_are_used_in_part_take_as_long_as_foreseen(
    emails: int, slots: int, given_budgets: list[tuple[Usage, int]]
) -> None:
    took = simulated(emails, slots, [(exact(usage), units) for usage, units in given_budgets])
    recipients = next((units for usage, units in given_budgets if usage.budget == "recipients"), 1)
    usage = [usage for usage, _ in given_budgets]
    foreseen = seconds(emails, Usage("concurrency", slots), *usage, recipients=emails * recipients)
    assert took * 0.95 - 1 <= foreseen <= took + 1


@settings(deadline=None)
@given(
    emails=st.integers(1, 300),
    undue=st.integers(1, 300),
    limit=st.integers(1, 40),
    due_from=st.integers(0, 600),
    lasts=st.integers(0, 3600),
)
def test_mail_that_falls_due_little_by_little_takes_as_long_as_foreseen(
    emails: int, undue: int, limit: int, due_from: int, lasts: int
) -> None:
    undue = min(emails, undue)
    due = [0.0] * (emails - undue) + spread(undue, due_from, due_from + lasts)
    took = simulated(emails, 4, [(Exact(limit, A_MINUTE), 1)], due.__getitem__)
    later = Later(undue, due_from * SECOND, (due_from + lasts / 2) * SECOND, (due_from + lasts) * SECOND)
    foreseen = seconds(emails, FOUR_AT_A_TIME, Usage("sends", limit), later=later)
    assert took * 0.95 - 1 <= foreseen <= took + 1


@settings(deadline=None)
@given(emails=st.integers(1, 10**6), given_budgets=budgets())
def test_more_mail_takes_no_less_and_a_higher_limit_no_more(
    emails: int, given_budgets: list[tuple[Usage, int]]
) -> None:
    usage = [usage for usage, _ in given_budgets]
    took = [seconds(emails + more, FOUR_AT_A_TIME, *usage) for more in (0, 1, 2, 1000)]
    assert all(less <= more * 1.01 for less, more in pairwise(took))
    for changed in usage:
        higher = [each._replace(limit=each.limit * 2) if each is changed else each for each in usage]
        assert seconds(emails, FOUR_AT_A_TIME, *higher) <= took[0] * 1.01


def test_any_number_is_foreseen_at_once() -> None:
    usage = [FOUR_AT_A_TIME, Usage("requests", 10_000), Usage("sends", 30), Usage("recipients", 10_000)]
    everything = planned(10**9, 10**6, upload_bytes=150_000_000, attach_requests=40, usage=usage)
    foreseen = foresee(everything, fleet(usage=[Usage("tenant_requests", 130_000)], plain_concurrency=64))
    assert foreseen.emails == 10**9
    assert done(foreseen) > 0
    assert len(foreseen.mailboxes) == 1
