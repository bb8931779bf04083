"""The measures by which limits are judged, on records of which the answer is known."""

from __future__ import annotations

import random

import pytest

from bench.limits import waits
from bench.limits.findings import Findings
from bench.limits.measures import (
    Call,
    by_mailbox,
    early_calls,
    latencies,
    longest_gap,
    mean_at_once,
    most_at_once,
    most_within,
    used_share,
)

ANN, BOB = "ann@contoso.example", "bob@contoso.example"


def a_call(arrived: float, answered: float | None = None, mailbox: str = ANN, **more: object) -> Call:
    return Call(arrived, arrived if answered is None else answered, mailbox, "send_mail", "202")._replace(**more)


def throttled(answered: float, retry_after: str | None, wait_seconds: float | None) -> Call:
    return a_call(answered - 0.1, answered, status="429", retry_after=retry_after, wait_seconds=wait_seconds)


def test_calls_are_open_together_only_if_one_comes_before_the_other_is_answered() -> None:
    assert most_at_once([a_call(0, 1), a_call(1, 2), a_call(2, 3)]) == 1
    assert most_at_once([a_call(0, 1), a_call(0.5, 2), a_call(0.9, 3), a_call(1.5, 3)]) == 3
    assert most_at_once([]) == 0


def test_a_call_that_is_refused_at_once_counts_with_those_that_it_was_too_many_for() -> None:
    assert most_at_once([a_call(0, 1), a_call(0, 1), a_call(0.5, 0.5001, status="429")]) == 3


def test_the_mean_counts_of_a_call_what_lies_between_the_instants() -> None:
    calls = [a_call(0, 4), a_call(8, 12), a_call(20, 30)]
    assert mean_at_once(calls, begins=2, ends=10) == pytest.approx((2 + 2) / 8)


def test_a_window_holds_its_end_and_not_its_beginning() -> None:
    assert most_within([0, 30, 60], 60) == 2
    assert most_within([0.001, 30, 60], 60) == 3
    assert most_within([], 60) == 0


def test_the_most_in_a_window_is_that_of_a_search_by_hand() -> None:
    chance = random.Random(1)
    instants = [chance.uniform(0, 300) for _ in range(400)]
    by_hand = max(sum(end - 60 < each <= end for each in instants) for end in instants)
    assert most_within(instants, 60) == by_hand


@pytest.mark.parametrize(
    ("instants", "share"),
    [
        ([60 * burst for burst in range(6) for _ in range(40)], 1.0),
        ([1.5 * number for number in range(240)], 1.0),
        ([66 * burst for burst in range(6) for _ in range(40)], 60 / 66),
        # Wherever the record is cut
        ([66 * burst for burst in range(6) for _ in range(40)][:220], 60 / 66),
        # A minute is lost, of five
        ([60 * burst for burst in (0, 1, 3, 4, 5) for _ in range(40)] + [360], 5 / 6),
    ],
)
def test_the_used_share_is_the_same_for_bursts_and_for_an_even_flow(instants: list[float], share: float) -> None:
    assert used_share(instants, 40, 60) == pytest.approx(share)


def test_no_used_share_is_told_of_a_record_shorter_than_a_window() -> None:
    assert used_share([float(number) for number in range(40)], 40, 60) is None


def test_the_longest_gap_is_between_neighbours() -> None:
    assert longest_gap([5.0, 1.0, 2.0]) == 3
    assert longest_gap([1.0]) == 0


def test_a_call_is_early_from_the_answer_until_its_time_has_passed() -> None:
    calls = [throttled(10, "2", 2.0), a_call(9.99), a_call(10.04), a_call(11.5), a_call(12), a_call(12.5)]
    found = [(each.call.arrived, each.known_for_seconds, each.too_soon_seconds) for each in early_calls(sorted(calls))]
    assert found == [(10.04, pytest.approx(0.04), pytest.approx(1.96)), (11.5, pytest.approx(1.5), pytest.approx(0.5))]


def test_a_call_that_could_know_of_one_wait_is_not_on_its_way_because_of_another() -> None:
    # Given a long wait, and a short one that began just before the call
    calls = [throttled(10, "5", 5.0), throttled(12, "1", 1.0), a_call(12.01)]
    # Then the call could have known for two seconds
    assert [each.known_for_seconds for each in early_calls(sorted(calls)) if each.call.status == "202"] == [
        pytest.approx(2.01)
    ]


def test_an_answer_that_demands_no_wait_makes_no_call_early() -> None:
    calls = [throttled(10, None, None), throttled(10.5, "soon", None), a_call(11)]
    accepted = a_call(11, 11.1, retry_after="5", wait_seconds=5.0)
    assert list(early_calls(sorted([*calls, accepted, a_call(12)]))) == []


def test_waits_are_judged_by_mailbox_and_what_could_be_known_apart_from_what_could_not() -> None:
    # Given a throttled mailbox with a call 40 ms later, and one of 60 ms later, and another mailbox that is not
    calls = [throttled(10, "2", 2.0), a_call(10.04), a_call(10.06), a_call(10.5, mailbox=BOB)]
    # When
    findings = waits.judge(waits.Plan(), calls)
    # Then
    assert (findings["early, on their way"], findings["early, could be known"]) == (1, 1)
    assert findings["429 with Retry-After: seconds"] == 1
    assert findings["those were"] == "1 × send_mail"
    assert "early, could be known" in findings.broken
    assert "429 with Retry-After: date" in findings.broken  # it did not happen, so nothing was shown


def test_latency_is_from_the_publish_to_the_first_call_that_sends() -> None:
    calls = [a_call(5, operation="create_draft"), a_call(6), a_call(7), a_call(9, mailbox=BOB)]
    assert latencies({ANN: 4.5, BOB: 8.0}, calls) == [1.5, 1.0]
    with pytest.raises(KeyError):
        latencies({"nobody@contoso.example": 1.0}, calls)


def test_calls_are_told_apart_by_mailbox_in_the_order_in_which_they_came() -> None:
    assert by_mailbox([a_call(2), a_call(1, mailbox=BOB), a_call(0)]) == {
        ANN: [a_call(0), a_call(2)],
        BOB: [a_call(1, mailbox=BOB)],
    }


def test_a_bound_holds_at_its_own_value_and_breaks_beyond() -> None:
    findings = Findings()
    findings.at_most("most", 4, 4)
    findings.at_least("least", 0.9, 0.9)
    assert findings.hold
    findings.at_most("more", 5, 4)
    findings.at_least("less", 0.8999, 0.9)
    assert (findings.hold, findings.broken) == (False, ["more", "less"])
