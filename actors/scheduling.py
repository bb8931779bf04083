"""The scheduler: decides which mail goes out now, and hands it to the send actors.

``schedule_emails`` is woken by ingest, by every finished send and by the next due time, and swept each minute in case
a wake-up was lost. What is to go out is looked for, has its send budget reserved, is claimed, and is published once the
claim is committed.

Where it may die, and what the next one does:

* ``wake-up.marked``, before the wake-up is published: nobody is woken for two seconds; the minute's sweep makes up.
* ``scheduler.woken``, before the commit: RabbitMQ delivers the wake-up again; nothing has happened.
* ``scheduler.claimed``, before anything is published: the dispatches' leases run out, their send budget is given back,
  and the mail is claimed again, no attempt spent; the same for backups.
* ``expiry.recorded``: the mail is expired; the event is left to the next sweep.
* ``scheduler.dispatched``: workers have the dispatches; the wake-up is delivered again and finds nothing to do.
* ``events.taken``, leftover events about to be published: they are anybody's again after `outbox.PUBLISH_WITHIN`.
* ``receipts.noted``: the message is delivered again and notes the same.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import dramatiq
from periodiq import cron

import limiter as limits
import models
import runtime
from actors import concurrency
from actors.budgets import keep_counts, limits_may_be_unknown, refund, refund_lapsed, reserve, turn
from actors.concurrency import Concurrency
from contracts import Event
from crash_points import CrashPoint
from models import Route, scheduling, turns
from models.scheduling import Agenda, Dispatch, DueBackup, Lapsed, Pick
from models.states import Status
from models.turns import Busy, Candidate
from outbox import PUBLISH_WITHIN, Batcher, Pace, Unconfirmed, Unpublishable
from telemetry import DISPATCHED, LEASES_EXPIRED, Step, mail_log
from tracing import Span, ending, trace_id

log = logging.getLogger(__name__)

#: Actors of the routes, by name: the modules of the actors import this one.
ACTORS = {Route.PLAIN: "send_plain", Route.ATTACHED: "send_attached"}
#: Without a limit per mailbox one mailbox could still not take more than this of the fleet.
_UNLIMITED_SHARE = 1_000_000
#: Due times that are closer together than this are one.
_SHORTEST_NAP = timedelta(milliseconds=200)
_LONGEST_NAP = timedelta(hours=1)
#: A server that was away is tried again after this, without waiting for the minute's sweep.
_AWAY_PAUSE = timedelta(seconds=2)
#: Sweeps begin at least so far apart: what becomes ready meanwhile is claimed together. After a lull the first begins
#: at once. Without it a busy fleet sweeps for every other email, and the sweeps wait for each other.
_SWEEPS_APART = timedelta(milliseconds=50)
#: After one that has filled what a route may have in flight the workers have more than they can do at once, and the
#: next may gather more. Else a few mailboxes have as much in flight as they may, and each end makes room for one more.
_SWEEPS_APART_WHEN_FULL = timedelta(milliseconds=100)

#: Backups of one mailbox that one message asks for: they are read one after the other, under one lease.
_BACKUPS_TOGETHER = 8

#: The mailbox that each route served last. Only fairness depends on it: a new process starts anywhere.
_last_served = dict.fromkeys(Route, "")
# A counter that appears with its first event has no increase that an alert could see.
for _route in Route:
    DISPATCHED.labels(_route.value)
for _status in (Status.DISPATCHED, Status.PROCESSING):
    LEASES_EXPIRED.labels(_status.value)


@dramatiq.actor(queue_name="scheduler", periodic=cron("* * * * *"))
def schedule_emails() -> None:
    """Dispatch what may go out, and see to it that the next due time is not slept through. Safe to repeat."""
    _pace.keep()
    can_count = runtime.woken("schedule_emails")
    runtime.crash_point(CrashPoint.SCHEDULER_WOKEN)
    try:
        while (swept := _sweep(hand_out=can_count)).more:
            pass
        if swept.events:
            publish_leftover_events()
        waits = [scheduling.next_due_in(swept.at), swept.everybody_waits]
        _alarm.ring_in(min((wait for wait in waits if wait is not None), default=None))
    except (models.DatabaseAway, Unconfirmed):
        _alarm.ring_in(_AWAY_PAUSE)  # who would have woken us may have failed just so
        raise


class _Sweep(NamedTuple):
    """What a sweep has found."""

    at: datetime
    #: Events are left over.
    events: bool
    #: There may be more to dispatch at once.
    more: bool
    #: When there may be, if everybody has to wait for the limiter.
    everybody_waits: timedelta | None


def _sweep(*, hand_out: bool) -> _Sweep:
    """Take back what nobody works on any more, then dispatch what may go out.

    While Redis is away nothing is handed out: no worker could count it, and all would put it back as fast as it came.
    """
    due = scheduling.due()
    lapsed, more = _take_back() if due.to_take_back else ([], False)
    if not hand_out:
        return _Sweep(due.at, due.events, more, _AWAY_PAUSE)
    try:
        with turn():
            refund_lapsed(lapsed)  # before a loss is made good, which does not count them
            keep_counts()
            handed_out, everybody_waits = _hand_out()
    except limits.Unavailable:
        limits_may_be_unknown()
        return _Sweep(due.at, due.events, more, _AWAY_PAUSE)
    return _Sweep(due.at, due.events, more or handed_out, everybody_waits)


def _take_back() -> tuple[list[Lapsed], bool]:
    """Take back what nobody works on and wake what is due; return whose lease ran out, and whether there is more."""
    with scheduling.sweep():
        lapsed = scheduling.expire_leases()
        scheduling.expire_backup_leases()
        expired = scheduling.expire_overdue(PUBLISH_WITHIN)
        woken = scheduling.wake_due()
    for each in lapsed:
        LEASES_EXPIRED.labels(each.status).inc()
        mail_log(
            Step.LEASE_LOST,
            incoming_email_id=each.id,
            publisher_message_id=each.publisher_message_id,
            correlation_id=each.correlation_id,
            trace_id=trace_id(each.traceparent),
            status=each.status,
        )
    _announce_expired(expired)
    return lapsed, max(len(lapsed), len(expired), woken) >= scheduling.BATCH


def _hand_out() -> tuple[bool, timedelta | None]:
    """Dispatch one batch; return whether there may be more at once, and how long everybody waits for the limiter."""
    agenda = scheduling.agenda()
    waiting = [
        route for route in Route if route in agenda.to_send | agenda.to_look_up and route not in agenda.closed.routes
    ]
    if not waiting and not agenda.backups:
        return False, None
    routes, busy = scheduling.in_flight()
    most = concurrency.effective(agenda.limits)
    chosen = {
        # In any order: what a mailbox has room for goes to the first, and must not go to the same one each time.
        route: _choose(route, agenda, most.of(route) - routes[route], busy)
        for route in random.sample(waiting, len(waiting))
    }
    reserved = reserve([candidate for mails in chosen.values() for candidate in mails.to_send])
    picks = {pick.id: pick for pick in reserved.picks}
    backups_due = agenda.backups and scheduling.room_for_backups(most.backup_concurrency, busy) > 0
    claims, backups, more_backups = _claim(chosen, picks, most, backups_due=backups_due)
    claimed = {dispatch.incoming_email_id for dispatches in claims.values() for dispatch in dispatches}
    refund(
        [candidate for mails in chosen.values() for candidate in mails.to_send],
        [pick for id, pick in picks.items() if id not in claimed],
    )
    runtime.crash_point(CrashPoint.SCHEDULER_CLAIMED)
    _dispatch(claims, backups)
    _pace.full = any(most.of(route) <= routes[route] + len(claims.get(route, [])) for route in chosen)
    full_batch = any(len(dispatches) >= scheduling.BATCH for dispatches in claims.values())
    return reserved.passed_over or full_batch or more_backups, reserved.everybody_waits


class _Chosen(NamedTuple):
    to_look_up: list[Candidate]
    to_send: list[Candidate]


def _share() -> int:
    return runtime.configuration.mailbox_concurrency or _UNLIMITED_SHARE


def _choose(route: Route, agenda: Agenda, capacity: int, busy: Busy) -> _Chosen:
    """Choose what is to go out, look-ups first, and note it as busy for the routes that follow."""
    to_look_up: list[Candidate] = []
    if route in agenda.to_look_up:
        to_look_up = turns.look_ups(route, capacity=capacity, share=_share(), busy=busy)
        _add(to_look_up, busy)
        capacity -= len(to_look_up)
    if route not in agenda.to_send:
        return _Chosen(to_look_up, [])
    found = turns.candidates(
        route,
        capacity=capacity,
        share=_share(),
        busy=busy,
        after=_last_served[route],
        external_from=agenda.closed.external_from,
    )
    wanted = min(capacity, scheduling.BATCH)
    to_send = turns.choose(found, wanted)
    _add(to_send, busy)
    if to_send:
        # Where there was room for all who could go, all have had their turn; unless some were not even looked at,
        # behind mailboxes in which only mail that is passed over waits.
        all_had_their_turn = len(to_send) < wanted and agenda.closed.external_from is None
        _last_served[route] = "" if all_had_their_turn else to_send[-1].mailbox
    return _Chosen(to_look_up, to_send)


def _add(emails: Sequence[Candidate | Dispatch], busy: Busy) -> None:
    for email in emails:
        busy.sends[email.mailbox] = busy.sends.get(email.mailbox, 0) + 1


def _claim(
    chosen: dict[Route, _Chosen], picks: dict[str, Pick], most: Concurrency, *, backups_due: bool
) -> tuple[dict[Route, list[Dispatch]], list[DueBackup], bool]:
    """Lease what was chosen and has its budget, as far as nobody else has; and backups that are due."""
    configuration = runtime.configuration
    if not picks and not backups_due and not any(mails.to_look_up for mails in chosen.values()):
        return {}, [], False
    with scheduling.sweep():
        routes, busy = scheduling.in_flight()
        claims = {}
        for route, mails in chosen.items():
            wanted = [Pick(mail.id, mail.mailbox, None) for mail in mails.to_look_up]
            wanted += [picks[mail.id] for mail in mails.to_send if mail.id in picks]
            capacity = most.of(route) - routes[route]
            claims[route] = scheduling.claim(route, wanted, capacity=capacity, lease=configuration.lease)
            _add(claims[route], busy)
        turns.note_served([mail for mails in chosen.values() for mail in mails.to_send if mail.id in picks])
        backups, more_backups = [], False
        if backups_due:
            backups, more_backups = scheduling.claim_backups(
                concurrency=most.backup_concurrency, share=_share(), busy=busy, lease=configuration.lease
            )
    return claims, backups, more_backups


def _dispatch(claims: dict[Route, list[Dispatch]], backups: Sequence[DueBackup]) -> None:
    begun = [_begin(route, dispatch) for route, dispatches in claims.items() for dispatch in dispatches]
    messages = [message for message, _ in begun]
    messages += _backup_messages(backups)
    if not messages:
        return
    try:
        with ending(span for _, span in begun):
            runtime.enqueue(messages).result()
    except Unconfirmed:
        # Even if some of it was published: a worker claims nothing that is no longer dispatched.
        scheduling.take_back([dispatch for dispatches in claims.values() for dispatch in dispatches], backups)
        raise
    runtime.crash_point(CrashPoint.SCHEDULER_DISPATCHED)
    for route, dispatches in claims.items():
        DISPATCHED.labels(route.value).inc(len(dispatches))
        for dispatch in dispatches:
            mail_log(
                Step.DISPATCHED,
                incoming_email_id=dispatch.incoming_email_id,
                publisher_message_id=dispatch.publisher_message_id,
                correlation_id=dispatch.correlation_id,
                trace_id=trace_id(dispatch.traceparent),
                route=route,
                attempt=dispatch.attempt,
            )


def _begin(route: Route, dispatch: Dispatch) -> tuple[dramatiq.Message[Any], Span]:
    """Return the dispatch's message with its span, under which the worker goes on."""
    span = runtime.tracer.begin(
        "dispatch",
        dispatch.traceparent,
        kind="producer",
        incoming_email_id=dispatch.incoming_email_id,
        publisher_message_id=dispatch.publisher_message_id,
        correlation_id=dispatch.correlation_id,
        route=route.value,
        attempt=dispatch.attempt,
    )
    return _message(route, dispatch, span.traceparent), span


def _message(route: Route, dispatch: Dispatch, traceparent: str | None) -> dramatiq.Message[Any]:
    options = {"traceparent": traceparent} if traceparent else {}
    actor = runtime.fleet_broker.get_actor(ACTORS[route])
    return actor.message_with_options(
        kwargs={
            "incoming_email_id": dispatch.incoming_email_id,
            "publisher_message_id": dispatch.publisher_message_id,
            "route": route.value,
            "attempt": dispatch.attempt,
        },
        **options,
    )


def _backup_messages(backups: Sequence[DueBackup]) -> list[dramatiq.Message[Any]]:
    """Put the first attempts at simple messages of one mailbox together; what is dearer or has failed goes alone."""
    alone, by_mailbox = [], defaultdict(list)
    for backup in backups:
        together = backup.simple and backup.attempt == 1 < runtime.configuration.max_attempts
        (by_mailbox[backup.mailbox] if together else alone).append(backup)
    groups = [
        found[start : start + _BACKUPS_TOGETHER]
        for found in by_mailbox.values()
        for start in range(0, len(found), _BACKUPS_TOGETHER)
    ]
    return [_backup_message(group) for group in [*groups, *([backup] for backup in alone)]]


def _backup_message(group: Sequence[DueBackup]) -> dramatiq.Message[Any]:
    if len(group) > 1:
        actor = runtime.fleet_broker.get_actor("backup_emails")
        return actor.message([[backup.incoming_email_id, backup.attempt] for backup in group])
    actor = runtime.fleet_broker.get_actor("backup_email")
    return actor.message(incoming_email_id=group[0].incoming_email_id, attempt=group[0].attempt)


def _announce_expired(events: list[Event]) -> None:
    if events:
        runtime.crash_point(CrashPoint.EXPIRY_RECORDED)
    runtime.events.add(events)
    for event in events:
        mail_log(
            Step.EXPIRED,
            incoming_email_id=event.incoming_email_id,
            publisher_message_id=event.publisher_message_id,
            correlation_id=event.correlation_id,
            trace_id=trace_id(event.traceparent),
        )


def publish_leftover_events() -> None:
    """Publish events whose writer did not: it died, or RabbitMQ was away.

    A batch at a time, with a sweep in between: a subscriber whose queue is full may have any number of them wait.
    """
    if leftover := models.claim_unpublished(PUBLISH_WITHIN):
        runtime.crash_point(CrashPoint.EVENTS_TAKEN)
        try:
            runtime.publish_events(leftover)
        except Unpublishable as error:
            log.error("of %d events some cannot be published: %s", len(leftover), error)


@dramatiq.actor(queue_name="scheduler")
def acknowledge_receipt(receipts: list[list[Any]]) -> None:
    """Note which attempts workers have in hand. Safe to repeat.

    Nothing makes up for a message that is lost, and nothing needs to: the receipt only stays unacknowledged in its row.

    Args:
        receipts: Of each the email's id and the attempt.
    """
    taken = [(str(incoming_email_id), int(attempt)) for incoming_email_id, attempt, *_ in receipts]
    scheduling.acknowledge_receipts(taken)
    runtime.crash_point(CrashPoint.RECEIPTS_NOTED)


def _tell(receipts: list[tuple[str, int]]) -> None:
    runtime.enqueue([acknowledge_receipt.message([list(receipt) for receipt in receipts])]).result()


#: What workers have in hand, on its way to the scheduler. The receipts themselves are rows, written by the claims.
#: Nobody waits for them; what a process that dies has gathered stays unacknowledged.
receipts: Batcher[tuple[str, int]] = runtime.batcher("receipts", _tell, apart=timedelta(milliseconds=250))


class _Pace:
    """Keeps the sweeps of a process apart. Wake-ups that come while one waits are one with it."""

    def __init__(self) -> None:
        self._pace = Pace()
        #: Whether the last sweep has filled what a route may have in flight.
        self.full = False

    def keep(self) -> None:
        self._pace.keep(_SWEEPS_APART_WHEN_FULL if self.full else _SWEEPS_APART)
        self.full = False


_pace = _Pace()


class _Alarm:
    """Wakes the scheduler at the next due time, from the process that looked last.

    If that process dies, the minute's sweep takes its place.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def ring_in(self, wait: timedelta | None) -> None:
        """Forget the earlier time and wake the scheduler after this; None: nothing is due."""
        with self._lock:
            if self._timer:
                self._timer.cancel()
            self._timer = None
            if wait is not None:
                nap = min(max(wait, _SHORTEST_NAP), _LONGEST_NAP)
                self._timer = threading.Timer(nap.total_seconds(), runtime.wake, ["schedule_emails"])
                self._timer.daemon = True
                self._timer.start()


_alarm = _Alarm()
