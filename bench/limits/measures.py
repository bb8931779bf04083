"""Exact measures of a record of calls: how many at once, how many in a window, how much of a rate, how early.

Instants are seconds of the monotonic clock. All of them are functions of the record alone, so a test can give them one.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

SENDS = frozenset({"send_mail", "send_draft"})


class Call(NamedTuple):
    """One request for a mailbox as Graph saw it."""

    arrived: float
    answered: float
    mailbox: str
    operation: str
    status: str
    #: As the answer said it, and the seconds that it meant; None: it said nothing.
    retry_after: str | None = None
    wait_seconds: float | None = None


class Early(NamedTuple):
    """A call that came though its mailbox had been told to wait."""

    call: Call
    #: Since the first answer that it did not heed had left: for so long it could have been known.
    known_for_seconds: float
    #: Until all that it did not heed would have been over.
    too_soon_seconds: float


def by_mailbox(calls: Iterable[Call]) -> dict[str, list[Call]]:
    """Return each mailbox's calls in the order in which they came."""
    found: dict[str, list[Call]] = defaultdict(list)
    for call in sorted(calls):
        found[call.mailbox].append(call)
    return dict(found)


def most_at_once(calls: Iterable[Call]) -> int:
    """Return the most calls that were open at one time. One that ends as another begins is not open with it."""
    steps = [(call.arrived, 1) for call in calls] + [(call.answered, -1) for call in calls]
    return max(accumulate(step for _, step in sorted(steps)), default=0)


def mean_at_once(calls: Iterable[Call], begins: float, ends: float) -> float:
    """Return how many calls were open between two instants, weighted by time."""
    open_seconds = sum(max(0.0, min(call.answered, ends) - max(call.arrived, begins)) for call in calls)
    return open_seconds / (ends - begins)


def most_within(instants: Iterable[float], window_seconds: float) -> int:
    """Return the most instants in any window of that length, whose end is in it and whose beginning is not."""
    window: deque[float] = deque()
    most = 0
    for instant in sorted(instants):
        window.append(instant)
        while window[0] <= instant - window_seconds:
            window.popleft()
        most = max(most, len(window))
    return most


def used_share(instants: Iterable[float], limit: int, window_seconds: float) -> float | None:
    """Return the share of a sliding window's limit that was used; None if the record is too short to say.

    It is the time that ``limit`` × n sends must take, n windows, by the time that they took, for the largest n there
    is. So it makes no difference whether a limiter lets its budget go at once or evenly, nor where a burst is cut, and
    as long as the limit is kept the share cannot be above 1.
    """
    ordered = sorted(instants)
    windows = (len(ordered) - 1) // limit
    if windows < 1:
        return None
    return windows * window_seconds / (ordered[windows * limit] - ordered[0])


def longest_gap(instants: Iterable[float]) -> float:
    """Return the most seconds between two neighbours."""
    ordered = sorted(instants)
    return max((later - earlier for earlier, later in pairwise(ordered)), default=0.0)


def early_calls(calls: Sequence[Call]) -> Iterator[Early]:
    """Yield one mailbox's calls that came while it was to be left alone, each once.

    A wait begins as the 429 or 503 that demands it has left, and ends so many seconds later as its Retry-After says;
    an answer without one, or with one that makes no sense, demands none.
    """
    waits = [call for call in calls if call.status in ("429", "503") and call.wait_seconds is not None]
    for call in calls:
        unheeded = [wait for wait in waits if wait.answered < call.arrived < _waits_until(wait)]
        if unheeded:
            known_for = call.arrived - min(wait.answered for wait in unheeded)
            yield Early(call, known_for, max(map(_waits_until, unheeded)) - call.arrived)


def _waits_until(call: Call) -> float:
    return call.answered + (call.wait_seconds or 0.0)


def percentile(values: Sequence[float], per_cent: int) -> float:
    """Return the value below which so many of a hundred lie, between two neighbours in proportion."""
    return statistics.quantiles(values, n=100, method="inclusive")[per_cent - 1]


def latencies(published: Mapping[str, float], calls: Iterable[Call]) -> list[float]:
    """Return how long it took from each mailbox's publish to its first call that sends, in the order of publishing.

    Raises:
        KeyError: Nothing has been sent from one of them.
    """
    first: dict[str, float] = {}
    for call in sorted(calls):
        if call.operation in SENDS:
            first.setdefault(call.mailbox, call.arrived)
    return [first[mailbox] - at for mailbox, at in published.items()]
