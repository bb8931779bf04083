"""The forecast itself: a convoy for each mailbox, and one for the fleet in which they take turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from fractions import Fraction
from itertools import groupby
from typing import NamedTuple

from .convoys import PAUSE, Convoy, Gate, Pace, longest
from .workloads import CONCURRENCY, STAY, WINDOWS, Fleet, Later, Usage, Workload, charged

PLAIN_CONCURRENCY = "send_plain_concurrency"
ATTACHED_CONCURRENCY = "send_attached_concurrency"


class Outlook(NamedTuple):
    """When the mail of a mailbox, or of each of ``alike`` mailboxes, is done, and what binds it.

    ``done_in`` is None where nothing is done until somebody acts: what ``binds`` is an operator's `PAUSE`, or the
    budget whose whole limit an email exceeds alone. ``paused`` emails are not among the others.
    """

    mailbox: str
    emails: int
    paused: int
    done_in: timedelta | None
    binds: str
    alike: int


def outlooks(workloads: Sequence[Workload], fleet: Fleet, *, stay: float = STAY) -> list[Outlook]:
    """Return the outlook of each workload, the latest first, before them those that are never done.

    Args:
        stay: For how many windows a charge is counted.
    """
    ahead = _ahead(workloads)
    fleets = _fleets_convoy([workload for workload in workloads if workload.emails], fleet, stay)
    found = [_outlook(workload, fleet, stay, fleets, ahead.get(workload.emails, 0)) for workload in workloads]
    return sorted(found, key=lambda outlook: (outlook.done_in is not None, -(outlook.done_in or timedelta())))


def _outlook(workload: Workload, fleet: Fleet, stay: float, fleets: Convoy | None, ahead: int) -> Outlook:
    def outlook(done_in: timedelta | None, binds: str) -> Outlook:
        return Outlook(workload.mailbox, workload.emails, workload.paused, done_in, binds, workload.alike)

    if fleets is None or not workload.emails:
        return outlook(None, PAUSE) if workload.paused else outlook(timedelta(), CONCURRENCY)
    own = _mailboxs_convoy(workload, fleet, stay)
    if never := own.never() or fleets.never():
        return outlook(None, never)
    chain = longest([own.leaves(workload.emails), fleets.leaves(ahead)])
    return outlook(timedelta(seconds=chain.seconds), chain.cause)


def _ahead(workloads: Sequence[Workload]) -> dict[int, int]:
    """Return, for each number of emails, how many the fleet has sent when a mailbox with as many is through."""
    through, waiting = 0, sum(workload.alike for workload in workloads)
    ahead = {}
    for emails, same in groupby(sorted(workloads, key=lambda each: each.emails), key=lambda each: each.emails):
        mailboxes = sum(workload.alike for workload in same)
        ahead[emails] = through + emails * waiting
        through += emails * mailboxes
        waiting -= mailboxes
    return ahead


def _mailboxs_convoy(workload: Workload, fleet: Fleet, stay: float) -> Convoy:
    slots = workload.limit(CONCURRENCY) or fleet.plain_concurrency + fleet.attached_concurrency
    calls = fleet.send_requests(workload) / workload.emails
    later = workload.later or Later(0, timedelta(), timedelta(), timedelta())
    return Convoy(
        workload.emails,
        list(_gates(workload.usage, workload, fleet, stay)),
        [Pace(CONCURRENCY, slots, calls * fleet.call.total_seconds())],
        due=workload.emails - min(later.emails, workload.emails),
        due_from=later.from_in.total_seconds(),
        due_until=later.last_in.total_seconds(),
        begins=max(workload.paused_for, fleet.paused_for).total_seconds(),
    )


def _fleets_convoy(workloads: Sequence[Workload], fleet: Fleet, stay: float) -> Convoy | None:
    if not workloads:
        return None
    total = Workload(
        "",
        **{
            name: sum(workload.alike * getattr(workload, name) for workload in workloads)
            for name in ("plain", "attached", "recipients", "external_recipients", "upload_bytes", "attach_requests")
        },
    )
    later = [(workload.later, workload.alike) for workload in workloads if workload.later]
    undue = sum(each.emails * alike for each, alike in later)
    due_from = sum(each.from_in.total_seconds() * each.emails * alike for each, alike in later) / max(undue, 1)
    due_until = sum(each.last_in.total_seconds() * each.emails * alike for each, alike in later) / max(undue, 1)
    return Convoy(
        total.emails,
        list(_gates(fleet.usage, total, fleet, stay)),
        list(_route_paces(total, fleet)),
        due=total.emails - min(undue, total.emails),
        due_from=due_from,
        due_until=due_until,
        begins=fleet.paused_for.total_seconds(),
    )


def _route_paces(total: Workload, fleet: Fleet) -> Iterator[Pace]:
    """Yield the pace of each route, in emails of the whole convoy: a route that half of them take goes twice as far."""
    routes = [
        (PLAIN_CONCURRENCY, fleet.plain_concurrency, total.plain, fleet.plain_send_requests(total)),
        (ATTACHED_CONCURRENCY, fleet.attached_concurrency, total.attached, fleet.attached_send_requests(total)),
    ]
    for cause, concurrency, emails, requests in routes:
        if emails:
            seconds = requests / emails * fleet.call.total_seconds()
            yield Pace(cause, concurrency * total.emails / emails, seconds)


def _gates(usages: Sequence[Usage], workload: Workload, fleet: Fleet, stay: float) -> Iterator[Gate]:
    for usage in usages:
        if usage.limit and usage.budget in WINDOWS:
            units, charge = charged(usage.budget, workload, fleet)
            if units:
                yield _gate(usage, Fraction(units, workload.emails), charge, stay)


def _gate(usage: Usage, per_email: Fraction, charge: Fraction, stay: float) -> Gate:
    usable = usage.limit // charge * charge
    period = WINDOWS[usage.budget].length.total_seconds() * stay
    first, last = (period if at is None else at.total_seconds() for at in (usage.next_free_in, usage.all_free_in))
    return Gate(
        usage.budget,
        capacity=usable / per_email,
        period=period,
        free=float((usage.limit - usage.used) / per_email),
        used=float(usage.used / per_email),
        back_from=first,
        back_until=max(first, last),
    )
