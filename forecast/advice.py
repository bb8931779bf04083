"""What an operator is told: when everything is done, which setting binds, and what would help, in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

from .convoys import PAUSE, SEND_AT
from .outlooks import ATTACHED_CONCURRENCY, PLAIN_CONCURRENCY, Outlook, outlooks
from .workloads import CONCURRENCY, STAY, WINDOWS, Fleet, Workload

#: What more mailboxes or more concurrency are looked for: to be done in a fourth of the time.
_SOONER = 4
#: A time that is not shorter than this part of the other is no help.
_NOTICEABLE = 0.9
_BYTES_PER_MB = 1_000_000
_SETTINGS = {budget: window.setting for budget, window in WINDOWS.items()} | {
    CONCURRENCY: "MAILBOX_CONCURRENCY",
    PLAIN_CONCURRENCY: "SEND_PLAIN_CONCURRENCY",
    ATTACHED_CONCURRENCY: "SEND_ATTACHED_CONCURRENCY",
}
_ROUTES = {PLAIN_CONCURRENCY: "send_plain", ATTACHED_CONCURRENCY: "send_attached"}
_HELP_FOR_THE_TENANT = {
    "tenant_requests": "Graph counts them per application: another one for a part of the mail would help",
    "tenant_external_recipients": "Exchange allows more to a tenant with more licences",
}


class Forecast(NamedTuple):
    """When everything is done that can be, what binds it, in which mailbox if in one, and what would help.

    ``done_in`` is None if nothing can be. ``mailboxes`` has the latest first, before them those that are never done.
    """

    emails: int
    paused: int
    done_in: timedelta | None
    binds: str
    mailbox: str | None
    advice: str
    mailboxes: list[Outlook]


def foresee(workloads: Sequence[Workload], fleet: Fleet, *, stay: float = STAY) -> Forecast:
    """Forecast when all this mail is with Graph, if no other comes.

    Args:
        stay: For how many windows a charge is counted.
    """
    found = outlooks(workloads, fleet, stay=stay)
    last, done_in = _last(found)
    emails = sum(outlook.alike * outlook.emails for outlook in found)
    paused = sum(outlook.alike * outlook.paused for outlook in found)
    sentences = [_Advice(workloads, fleet, stay, found).about(last, done_in)] if last else []
    sentences += _about_what_is_never_done(found)
    return Forecast(
        emails,
        paused,
        done_in if last or not (emails or paused) else None,
        last.binds if last else found[0].binds if found else "",
        last.mailbox if last and not _is_everybodys(last.binds) else None,
        "; ".join(sentences) or "nothing is waiting",
        found,
    )


def setting_of(cause: str) -> str:
    """Return the setting that what binds is known by; what is no setting's is returned as it is."""
    return _SETTINGS.get(cause, cause)


def told(duration: timedelta) -> str:
    """Say a duration as people do, in its two largest units."""
    seconds = math.ceil(duration.total_seconds())
    if seconds <= 90:
        return f"{seconds} s"
    minutes = math.ceil(seconds / 60)
    if minutes <= 90:
        return f"{minutes} min"
    days, hours = divmod(math.ceil(minutes / 60), 24)
    return f"{days} d {hours} h" if minutes >= 36 * 60 else f"{minutes // 60} h {minutes % 60} min"


def _last(found: Sequence[Outlook]) -> tuple[Outlook | None, timedelta]:
    """Return the mailbox that is done last, of those that are, and when."""
    done = ((outlook, outlook.done_in) for outlook in found if outlook.done_in is not None and outlook.emails)
    return next(done, (None, timedelta()))


def _is_everybodys(cause: str) -> bool:
    return cause in _ROUTES or cause in _HELP_FOR_THE_TENANT


def _about_what_is_never_done(found: Sequence[Outlook]) -> list[str]:
    sentences = [
        f"mail of {outlook.mailbox} exceeds {_SETTINGS[outlook.binds]} alone and will be given up"
        for outlook in found
        if outlook.done_in is None and outlook.binds != PAUSE
    ]
    paused = [outlook for outlook in found if outlook.paused]
    if paused:
        emails = sum(outlook.paused * outlook.alike for outlook in paused)
        sentences.append(f"{emails:,} emails wait until an operator ends a pause, see mailfleet limits show")
    return sentences


class _Advice:
    """Tries what could be changed and says what it would bring."""

    def __init__(self, workloads: Sequence[Workload], fleet: Fleet, stay: float, found: Sequence[Outlook]) -> None:
        self._workloads = workloads
        self._fleet = fleet
        self._stay = stay
        self._outlooks = {outlook.mailbox: outlook for outlook in found}

    def about(self, last: Outlook, done_in: timedelta) -> str:
        """Say what binds the last mail, which is done then, and what would have it done sooner."""
        workload = next(workload for workload in self._workloads if workload.mailbox == last.mailbox)
        if last.binds == PAUSE and self._fleet.paused_for >= workload.paused_for:
            return "a pause of every mailbox binds, and ends by itself"
        if last.binds == PAUSE:
            return f"the pause of {last.mailbox} binds; mailfleet resume {last.mailbox} would end it now"
        if last.binds == SEND_AT:
            return f"the last mail of {last.mailbox} is not due sooner"
        if last.binds in _ROUTES:
            return self._raise(last.binds, done_in)
        if last.binds in _HELP_FOR_THE_TENANT:
            limit = next(usage.limit for usage in self._fleet.usage if usage.budget == last.binds)
            return f"{setting_of(last.binds)} binds: {_amount(last.binds, limit)}; {_HELP_FOR_THE_TENANT[last.binds]}"
        return self._spread(last, done_in, workload.limit(last.binds))

    def _spread(self, last: Outlook, done_in: timedelta, limit: int) -> str:
        late = self._as_late_as(last, done_in)
        others = sum(self._outlooks[name].alike for name in late if name != last.mailbox)
        whose = f"{last.mailbox} and {others:,} more" if others else last.mailbox
        binds = f"{setting_of(last.binds)} of {whose} binds: {_amount(last.binds, limit)}"
        spread: list[Workload] = []
        more = 0
        for each in self._workloads:
            parts = min(late.get(each.mailbox, 1), each.emails or 1)
            part = each.part(parts)
            spread += [part, part.from_elsewhere(parts - 1)] if parts > 1 else [each]
            more += (parts - 1) * each.alike
        if not more:
            return binds
        change = f"spread over {more:,} more {'mailboxes' if more > 1 else 'mailbox'}"
        return f"{binds}; {self._would(change, spread, self._fleet, done_in)}"

    def _as_late_as(self, last: Outlook, done_in: timedelta) -> dict[str, int]:
        """Return the mailboxes that the same budget makes late, and among how many each would have to be spread."""
        soon = done_in / _SOONER
        return {
            name: math.ceil(outlook.done_in / soon)
            for name, outlook in self._outlooks.items()
            if outlook.binds == last.binds and outlook.done_in is not None and outlook.done_in > soon
        }

    def _raise(self, route: str, done_in: timedelta) -> str:
        plain, attached = self._fleet.plain_concurrency, self._fleet.attached_concurrency
        if route == PLAIN_CONCURRENCY:
            limit, fleet = plain, replace(self._fleet, plain_concurrency=plain * _SOONER)
        else:
            limit, fleet = attached, replace(self._fleet, attached_concurrency=attached * _SOONER)
        change = f"raised to {limit * _SOONER:,}, with as many threads of {_ROUTES[route]}"
        would = self._would(change, self._workloads, fleet, done_in)
        return f"{setting_of(route)} binds: {_amount(route, limit)}; {would}"

    def _would(self, change: str, workloads: Sequence[Workload], fleet: Fleet, done_in: timedelta) -> str:
        then, then_done_in = _last(outlooks(workloads, fleet, stay=self._stay))
        if then and then_done_in > _NOTICEABLE * done_in:
            return f"{change} it would take as long, for then {setting_of(then.binds)} binds"
        return f"{change}: done in {told(then_done_in)}"


def _amount(cause: str, limit: int) -> str:
    if cause in _ROUTES:
        return f"{limit:,} in flight"
    if cause == CONCURRENCY:
        return f"{limit:,} at a time" if limit else "no limit, one call after the other for each mail"
    number = f"{limit / _BYTES_PER_MB:g} MB" if cause == "upload_bytes" else f"{limit:,}"
    return f"{number} {WINDOWS[cause].per}"
