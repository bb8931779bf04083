"""Send budget: reserved before mail is dispatched, and written down again when Redis has lost its counts.

Mail that would have to wait for budget is not dispatched: its mailbox is passed over until a part of the budget comes
back, so that it occupies no worker and no queue, and is not looked at meanwhile.

Where the process may die, and what the next one does:

* ``budget.reserved``, before the claim: what is reserved stays charged until it leaves its window; the mail is ready.
* between the end of a lease and the refund of its reservation: the same.
* ``budget.restoring``, all that was spent is written down: nobody is admitted until another has done it again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import limiter as limits
import runtime
from crash_points import CrashPoint
from graph_client import ATTACH_JSON_BYTES, SMALL_ATTACHMENT_BYTES, UPLOAD_RANGE_BYTES
from limiter import Emptied, Exhausted, NeverFits, Reservation, Slowed, Spent, Wanted
from models import DatabaseAway, mailboxes, spending, turns
from models.scheduling import Lapsed, Pick
from models.turns import EVERY, Candidate, Full
from telemetry import LIMITER_ADMITTED, LIMITER_REFUSALS, RESTORED

#: What an operator sets reaches Redis at once; if Redis was away then, within this of its return.
_SYNC_EVERY = timedelta(seconds=30)
_CHANGED_WITHIN = timedelta(hours=1)
_RECOVERY = timedelta(milliseconds=limits.RECOVERY_MS)
#: Longer than Redis can be away without anybody seeing to it.
_CHANGED_MEANWHILE = timedelta(days=30)
#: A mail that is too large for what is left of its mailbox's budget lets smaller ones pass for so long since it was
#: due; then all wait until there is enough for it.
_OVERTAKEN_FOR = timedelta(hours=1)
#: A scheduler hands out for no longer than this, unless it stands still.
LONGEST_TURN = timedelta(seconds=3)
#: What an operator asks for takes effect within a second; a scheduler has its turn for much less, unless it died in it.
OPERATORS_PATIENCE = timedelta(milliseconds=700)
_NEXT_IN_TURN = timedelta(milliseconds=10)
#: What binds every mailbox is looked at again by whoever sweeps next, not noted for each.
_OF_EVERYBODY = ("tenant_pause", "tenant_requests")


class Reserved(NamedTuple):
    """What may be dispatched, in order, and when more may be if everybody has to wait."""

    picks: list[Pick]
    #: Some of what was looked at has to wait, and is passed over from now on: others may be ready.
    passed_over: bool
    everybody_waits: timedelta | None


def reserve(candidates: Sequence[Candidate]) -> Reserved:
    """Charge for what is about to be dispatched, and have the rest wait until its turn comes.

    Raises:
        Unavailable: Redis does not answer: nothing may be dispatched.
    """
    wanted: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        wanted.setdefault(candidate.mailbox, []).append(candidate)
    if not wanted:
        return Reserved([], False, None)
    sends = {mailbox: [_send(candidate) for candidate in mails] for mailbox, mails in wanted.items()}
    answers = runtime.limiter.reserve(sends)
    picks: list[Pick] = []
    full: dict[str, Full] = {}
    too_large: list[tuple[Candidate, Exhausted]] = []
    everybody_waits: list[timedelta] = []
    for mailbox, mails in wanted.items():
        for candidate, answer in zip(mails, answers[mailbox], strict=True):
            match answer:
                case Reservation():
                    picks.append(Pick(candidate.id, mailbox, answer.at_ms))
                case NeverFits():
                    picks.append(Pick(candidate.id, mailbox, None))  # the worker gives it up, with the reason
                case Emptied():
                    everybody_waits.append(answer.retry_after)
                case Exhausted(budget=budget) if budget in _OF_EVERYBODY:
                    everybody_waits.append(answer.retry_after)
                case Exhausted() if answer.mailbox_wide:
                    full.setdefault(_whose(candidate, answer), Full(answer.retry_after, f"limit: {answer.budget}"))
                case Exhausted():
                    too_large.append((candidate, answer))
    without_room = _without_room_for(too_large)
    # What waits for long is not overtaken by what was asked for together with it.
    overtaking = [pick for pick in picks if _waited_for(without_room.get(pick.mailbox))]
    picks = [pick for pick in picks if not _waited_for(without_room.get(pick.mailbox))]
    refund(candidates, overtaking)
    full = without_room | full
    for each in full.values():
        LIMITER_REFUSALS.labels(each.reason.removeprefix("limit: ")).inc()
    turns.note_full(full)
    LIMITER_ADMITTED.labels("send").inc(len(picks))
    runtime.crash_point(CrashPoint.BUDGET_RESERVED)
    return Reserved(picks, bool(full), max(everybody_waits, default=None))


def _send(candidate: Candidate) -> Wanted:
    return Wanted(candidate.recipients, candidate.external_recipients)


def _whose(candidate: Candidate, refused: Exhausted) -> str:
    return EVERY if refused.budget == "tenant_external_recipients" else candidate.mailbox


def _without_room_for(too_large: Sequence[tuple[Candidate, Exhausted]]) -> dict[str, Full]:
    """Say from which size on mail is passed over: smaller mail may fit into what is left.

    After a while it may not: or large mail would wait for ever.
    """
    if not too_large:
        return {}
    waited = turns.waited([candidate.id for candidate, _ in too_large])
    full: dict[str, Full] = {}
    for candidate, refused in too_large:
        whose = _whose(candidate, refused)
        size = candidate.external_recipients if whose == EVERY else candidate.recipients
        if whose != EVERY and waited.get(candidate.id, timedelta()) > _OVERTAKEN_FOR:
            size = 1
        if whose not in full or size < full[whose].from_recipients:
            full[whose] = Full(refused.retry_after, f"limit: {refused.budget}", size)
    return full


def _waited_for(full: Full | None) -> bool:
    return full is not None and full.from_recipients == 1


def refund(candidates: Sequence[Candidate], unused: Sequence[Pick]) -> None:
    """Give back what was reserved for mail that was not dispatched after all."""
    known = {candidate.id: candidate for candidate in candidates}
    for pick in unused:
        if pick.reserved_at_ms is not None:
            runtime.limiter.refund(pick.mailbox, Reservation(pick.reserved_at_ms), _send(known[pick.id]))


def give_back(mailbox: str, reservation: Reservation, send: Wanted) -> None:
    """Take back what was charged for a send that is not made, and have others that wait for it looked at."""
    runtime.limiter.refund(mailbox, reservation, send)
    with suppress(DatabaseAway):  # it is looked at before long in any case
        turns.note_room(mailbox, external=send.external_recipients > 0)


def refund_lapsed(lapsed: Sequence[Lapsed]) -> None:
    """Give back what was reserved for dispatches that no worker took: with the workers down a day's would be gone."""
    for each in lapsed:
        if each.unused is not None:
            give_back(each.mailbox, Reservation(each.unused), Wanted(each.recipients, each.external_recipients))


def keep_counts() -> None:
    """See to it that the limiter's counts are whole: after a loss write down what was spent, as PostgreSQL knows it.

    Raises:
        Unavailable: Redis does not answer.
    """
    if not runtime.limiter.is_whole():
        with runtime.limiter.restoring() as mine:
            if mine:
                _restore()
                RESTORED.inc()
    _sync.keep()


def _restore() -> None:
    for mailbox, tokens in spending.under_way().items():
        runtime.limiter.hold(mailbox, tokens, runtime.configuration.graph_timeout)
    standing = spending.own_limits(lowered_within=_RECOVERY)
    # An older copy has limits that were unset since.
    _tell([*spending.changed_limits(_CHANGED_MEANWHILE), *standing])
    for owner in standing:
        if owner.slowed:
            slowed = [Slowed.from_row(budget, how) for budget, how in owner.slowed.items()]
            runtime.limiter.set_slowed(owner.mailbox, slowed)
    runtime.limiter.spent(_spent())
    runtime.crash_point(CrashPoint.BUDGET_RESTORING)


def _spent() -> list[Spent]:
    entries: list[Spent] = []
    for part in spending.spent(
        small_bytes=SMALL_ATTACHMENT_BYTES, attach_json_bytes=ATTACH_JSON_BYTES, range_bytes=UPLOAD_RANGE_BYTES
    ):
        of_mailbox = {
            "sends": part.sends,
            "recipients": part.recipients,
            "requests": part.requests,
            "upload_bytes": part.upload_bytes,
        }
        of_tenant = {"tenant_requests": part.requests, "tenant_external_recipients": part.external_recipients}
        entries += [Spent(part.mailbox, budget, part.age, units) for budget, units in of_mailbox.items()]
        entries += [Spent(None, budget, part.age, units) for budget, units in of_tenant.items()]
    return [
        entry for entry in entries if entry.age.total_seconds() * 1000 <= _LONGEST_STAY * limits.WINDOWS[entry.budget]
    ]


#: In windows: how long a charge may count.
_LONGEST_STAY = 1 + (limits.SLACK + 1) / limits.SUBWINDOWS


def _tell(owners: Sequence[spending.OwnLimits]) -> None:
    """Tell Redis what operators have set, and until when Graph wants to be left alone."""
    runtime.limiter.set_all_limits({None if each.mailbox == EVERY else each.mailbox: each.limits for each in owners})
    for owner in owners:
        if owner.throttled_until and owner.mailbox == EVERY:
            runtime.limiter.pause_all(owner.throttled_until)
        elif owner.throttled_until:
            runtime.limiter.pause(owner.mailbox, owner.throttled_until)


@contextmanager
def turn(patience: timedelta | None = None) -> Iterator[None]:
    """Hand out, or change limits, in one process at a time.

    Two that hand out would reserve for the same mail and find mailboxes full that are not. A scheduler that stands
    still is not waited for: after ``patience`` (`LONGEST_TURN`) it is done without the turn.
    """
    deadline = time.monotonic() + (patience or LONGEST_TURN).total_seconds()
    while True:
        with runtime.limiter.turn("scheduler", LONGEST_TURN) as mine:
            if mine or time.monotonic() > deadline:
                yield
                return
        time.sleep(_NEXT_IN_TURN.total_seconds())


def limits_may_be_unknown() -> None:
    """Note that Redis was away: what operators have set meanwhile it has to be told."""
    _sync.missed = True


class _Sync:
    """Has the limits that operators have set reach Redis even if it was away when they did.

    Not what was lowered: Redis lowers it, and may have done so a moment ago. It is told only after a loss.
    """

    def __init__(self) -> None:
        self.missed = True
        self._next_at = float("-inf")

    def keep(self) -> None:
        if time.monotonic() < self._next_at:
            return
        _tell(spending.changed_limits(_CHANGED_MEANWHILE if self.missed else _CHANGED_WITHIN))
        if self.missed:
            mailboxes.look_anew(EVERY)
        self.missed = False
        self._next_at = time.monotonic() + _SYNC_EVERY.total_seconds()


_sync = _Sync()
