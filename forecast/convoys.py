"""A convoy of emails in which each waits for its budgets: when does the last one leave?

With a budget of L emails in a window that counts for a period P, the n-th email leaves no sooner than P after the
(n - L)-th, nor sooner than a burst allows after those before it, nor before it is due. So it leaves at the end of the
longest chain of such waits back to the head of the convoy. A chain takes k periods of each budget. The k that are tried
are the largest and those that lead back to where another wait begins: what that leaves out is a few percent at most,
where one budget that is used in part meets another (`tests/test_forecast.py` holds it against a simulation).

Seconds are floats. Counts of emails, by which periods are counted, are exact: an error of rounding would be a period.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

#: What a chain may be due to besides budgets.
PAUSE = "pause"
SEND_AT = "send_at"
_ROUNDING = 1e-9


class Chain(NamedTuple):
    """Waits that follow each other: how long they take, and what the longest part of it is due to."""

    seconds: float
    cause: str
    part_seconds: float

    def then(self, seconds: float, cause: str) -> Chain:
        total = self.seconds + seconds
        if cause == self.cause:
            return Chain(total, cause, self.part_seconds + seconds)
        return Chain(total, cause, seconds) if seconds > self.part_seconds else self._replace(seconds=total)


def longest(chains: Iterable[Chain]) -> Chain:
    """Return the longest, of equal ones the first."""
    return max(chains, key=attrgetter("seconds"))


@dataclass(frozen=True)
class Gate:
    """A budget of a convoy, counted in emails.

    Args:
        capacity: Emails that fit into a window; 0: none ever does.
        period: Seconds for which what is charged counts.
        free: Emails for which nothing that is used has to come back; negative if more is used than the limit.
        used: How many emails have used as much; it comes back evenly
        back_from, back_until: from this second until that.
    """

    cause: str
    capacity: Fraction
    period: float
    free: float
    used: float
    back_from: float
    back_until: float

    def periods(self, position: Fraction) -> int:
        """Return how many periods the email at the position waits at least: how often the capacity is ahead of it."""
        return math.ceil(position / self.capacity) - 1

    def back_at(self, position: float) -> float:
        """Return when so much of what is used is back that an email of the first window can go."""
        share = min(1.0, (position - self.free) / self.used)
        return self.back_from + (self.back_until - self.back_from) * share


class Pace(NamedTuple):
    """How fast a burst goes: so many emails at a time, and the seconds that each takes."""

    cause: str
    parallel: float
    seconds: float

    def lasts(self, emails: float) -> float:
        return math.ceil(emails / self.parallel - _ROUNDING) * self.seconds


@dataclass(frozen=True)
class Convoy:
    """Emails one behind the other, those that are due first.

    Args:
        emails: How many, and how many of them are ``due`` now.
        due_from, due_until: The seconds from and until which the others fall due, evenly.
        begins: The second before which nobody leaves.
    """

    emails: int
    gates: Sequence[Gate]
    paces: Sequence[Pace]
    due: int
    due_from: float = 0
    due_until: float = 0
    begins: float = 0

    def never(self) -> str | None:
        """Return the budget whose whole limit an email of this convoy exceeds, if there is one."""
        return next((gate.cause for gate in self.gates if not gate.capacity), None)

    def leaves(self, position: int) -> Chain:
        """Return the longest chain that ends with the email at the position, counted from 1."""
        return self._longest(Fraction(position), self._narrow)

    @cached_property
    def _narrow(self) -> list[Gate]:
        """The gates of which a period can be part of the longest chain, the narrowest first.

        If as many emails take as long through another gate, or in a burst, then a chain through that is as long.
        """
        narrow: list[Gate] = []
        for gate in sorted(self.gates, key=lambda gate: gate.capacity / Fraction(gate.period)):
            through_others = [gate.capacity // other.capacity * other.period for other in narrow]
            in_a_burst = [math.floor(gate.capacity / Fraction(pace.parallel)) * pace.seconds for pace in self.paces]
            if max([*through_others, *in_a_burst]) < gate.period:
                narrow.append(gate)
        return narrow

    def _longest(self, position: Fraction, gates: Sequence[Gate]) -> Chain:
        if not gates:
            return self._first(float(position))
        gate, *others = gates
        chains = [self._longest(position, others)]
        for periods in self._worth_trying(gate, position):
            rest = self._longest(position - periods * gate.capacity, others)
            chains.append(rest.then(periods * gate.period, gate.cause))
        return longest(chains)

    def _worth_trying(self, gate: Gate, position: Fraction) -> set[int]:
        most = gate.periods(position)
        numbers = {most}
        for ahead in self._first_to_wait:
            if ahead < position:
                to_there = gate.periods(position - ahead)
                numbers |= {to_there, to_there + 1}
        return {number for number in numbers if 0 < number <= most}

    @cached_property
    def _first_to_wait(self) -> list[Fraction]:
        """How many are ahead of the first email that is not due yet, or for which something has to come back."""
        undue = [Fraction(self.due)] if self.due < self.emails else []
        return undue + [Fraction(max(gate.free, 0)).limit_denominator() for gate in self.gates if gate.used]

    def _first(self, position: float) -> Chain:
        """Return the longest chain without a whole period: a wait, and the burst of those who waited for the same."""
        chains = []
        for ahead, seconds, cause in self._waits(position):
            for pace in self.paces:
                waited = Chain(seconds, cause, seconds) if seconds else Chain(0, pace.cause, 0)
                chains.append(waited.then(pace.lasts(position - ahead), pace.cause))
        return longest(chains)

    def _waits(self, position: float) -> Iterator[tuple[float, float, str]]:
        """Yield how many are ahead of an email that has to wait, until when, and what for."""
        one = min(position, 1.0)
        yield 0, self.begins, PAUSE
        if position > self.due:
            share = (position - self.due) / (self.emails - self.due)
            yield self.due, self.due_from, SEND_AT
            yield position - one, self.due_from + (self.due_until - self.due_from) * share, SEND_AT
        for gate in self.gates:
            if gate.used and position > gate.free + _ROUNDING:
                last = min(position, float(gate.capacity))
                yield max(gate.free, 0), gate.back_from, gate.cause
                if last > gate.free + _ROUNDING:
                    yield max(last - one, 0), gate.back_at(last), gate.cause
