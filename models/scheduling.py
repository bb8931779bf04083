"""What the scheduler does to the tables: lease what is to go out now, and take back what is not.

All that is decided by counts runs in one short transaction under one advisory lock, so that the counts of mail in
flight are exact however many schedulers there are. Whose turn it is, is found before, without the lock (`turns`), for
send budget is reserved in between and no lock is held over a network call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import NamedTuple

from contracts import Event, EventType, event_body, event_id
from models.database import rows, transaction
from models.events import append
from models.states import Route
from models.turns import BATCH, NO_REQUESTS, READY, TO_SEND, Busy, Closed

#: Any constant will do; it names the lock among the database's advisory locks.
_LOCK = 0x6D61696C666C6565
#: Backups of a paused mailbox are looked at again by then even if the pause lasts: an operator may have ended it.
_LONGEST_PUT_OFF = timedelta(minutes=15)
#: Due backups that a sweep looks at: several times as many as are made at once. If none of them can be made now, they
#: are put off, and it looks again.
_BACKUPS_MET = 64
#: What has ended is followed by others when it is so large a part of what may be in flight (this divides it), so that
#: several of one mailbox go together: they share a look and a slot.
_REFILLED_PARTS = 8
#: Backups of a mailbox that has its share in flight let those of others come first: for so long for each that was met
#: before them (two short requests, several mailbox slots), or for a part of the time since their send, which says how
#: long the mailbox's queue is.
_CROWDED_PUT_OFF = timedelta(milliseconds=100)
_CROWDED_PARTS = 20
_LONGEST_CROWDED_PUT_OFF = timedelta(minutes=5)


class Dispatch(NamedTuple):
    """One email that was leased to its route: what the dispatch message says."""

    incoming_email_id: str
    publisher_message_id: str
    mailbox: str
    attempt: int
    correlation_id: str | None
    traceparent: str | None


class Pick(NamedTuple):
    """An email that is to be dispatched, in order of turns: what budget is reserved for it, since when (None: none)."""

    id: str
    mailbox: str
    reserved_at_ms: int | None


class Lapsed(NamedTuple):
    """An email whose lease ran out, and the status that it had then.

    ``unused`` is when send budget was reserved for a dispatch that no worker took, in milliseconds; None: nothing was,
    or a worker may have used it.
    """

    id: str
    mailbox: str
    status: str
    recipients: int
    external_recipients: int
    unused: int | None
    publisher_message_id: str
    correlation_id: str | None
    traceparent: str | None


class DueBackup(NamedTuple):
    """One backup that was leased. ``attempt`` begins when a worker claims it.

    ``simple``: the message has no attachments and is to be found by its tag.
    """

    incoming_email_id: str
    attempt: int
    mailbox: str
    simple: bool


@contextmanager
def sweep() -> Iterator[datetime]:
    """Hold the scheduler's lock for the length of the block, in one transaction.

    Yields the instant as of which it looks, which is that of the wait for the lock: what becomes due after it is left
    to the next sweep.
    """
    with transaction():
        yield rows("SELECT now(), pg_advisory_xact_lock(%(lock)s)", {"lock": _LOCK}, prepared=True)[0][0]


class Due(NamedTuple):
    """Whether there is anything of the kinds that a sweep sees to before it hands out, and as of when."""

    at: datetime
    #: Leases that ran out, mail that is overdue, and mail whose time has come.
    to_take_back: bool
    #: Events that their writers did not publish.
    events: bool


def due() -> Due:
    """Look whether there is anything to be taken back or woken: most sweeps find nothing, and need not ask for each."""
    (found,) = rows(
        """
        SELECT now(), coalesce(least(
            (SELECT min(lease_until) FROM incoming_emails WHERE lease_until IS NOT NULL),
            (SELECT min(backup_lease_until) FROM sent_emails WHERE backup_lease_until IS NOT NULL),
            (SELECT min(expires_at) FROM incoming_emails WHERE expires_at IS NOT NULL AND status = 'received'),
            (SELECT min(next_attempt_at) FROM incoming_emails WHERE next_attempt_at IS NOT NULL)
        ) <= now(), false),
        EXISTS (SELECT FROM outbox_events WHERE published_at IS NULL AND claimed_until <= now())
        """,
        prepared=True,
    )
    return Due(*found)


_EXPIRE_LEASES = f"""
    WITH lapsed AS MATERIALIZED (
        SELECT e.id, e.status, e.lease_token, s.status AS sending
        FROM incoming_emails e
        LEFT JOIN sent_emails s ON s.incoming_email_id = e.id AND s.status IN ('sending', 'in_doubt')
        WHERE e.lease_until <= now() ORDER BY e.lease_until LIMIT {BATCH} FOR UPDATE OF e SKIP LOCKED
    ), doubted AS (
        -- A frozen worker may have sent it only now, so the doubt begins here.
        UPDATE sent_emails s SET status = 'in_doubt', intent_at = now(), updated_at = now(),
               response_metadata = jsonb_set(response_metadata, '{{evidence}}',
                   coalesce(response_metadata->'evidence', '[]') ||
                   jsonb_build_object('at', now(), 'asked', 'send', 'client_request_id', lapsed.lease_token,
                                      'seen', 'the worker''s lease ran out during the send'))
        FROM lapsed WHERE s.incoming_email_id = lapsed.id AND s.status = 'sending'
    )
    UPDATE incoming_emails e
    SET status = CASE WHEN lapsed.sending IS NULL THEN 'received' ELSE 'processing' END,
        -- A dispatch that no worker took was not an attempt.
        attempt_count = e.attempt_count - (lapsed.status = 'dispatched' AND lapsed.sending IS NULL)::int,
        lease_token = NULL, lease_until = NULL, updated_at = now()
    FROM lapsed WHERE e.id = lapsed.id
    RETURNING e.id::text, e.mailbox, lapsed.status, e.recipient_count,
              coalesce(e.external_recipient_count, e.recipient_count),
              CASE WHEN lapsed.status = 'dispatched' THEN round(extract(epoch FROM e.reserved_at) * 1000)::bigint END,
              e.publisher_message_id, e.correlation_id, e.traceparent
"""


def expire_leases() -> list[Lapsed]:
    """Take back what dead, stuck or never started workers held."""
    return [Lapsed(*row) for row in rows(_EXPIRE_LEASES, prepared=True)]


def wake_due() -> int:
    """Make mail ready whose time has come, and return how many."""
    return len(
        rows(
            f"""
            WITH due AS MATERIALIZED (
                SELECT id FROM incoming_emails WHERE next_attempt_at <= now()
                ORDER BY next_attempt_at LIMIT {BATCH} FOR UPDATE SKIP LOCKED
            )
            UPDATE incoming_emails e SET next_attempt_at = NULL, updated_at = now()
            FROM due WHERE e.id = due.id RETURNING 1
            """,
            prepared=True,
        )
    )


def in_flight() -> tuple[dict[Route, int], Busy]:
    """Count the leased emails per route and per mailbox, and the leased backups per mailbox."""
    routes = dict.fromkeys(Route, 0)
    busy = Busy({}, {})
    for route, mailbox, count in rows(
        """
        SELECT route, mailbox, count(*) FROM incoming_emails WHERE lease_until IS NOT NULL GROUP BY route, mailbox
        UNION ALL
        SELECT NULL, mailbox, count(*) FROM (
            SELECT (SELECT mailbox FROM incoming_emails WHERE id = incoming_email_id) FROM sent_emails
            WHERE backup_lease_until IS NOT NULL
        ) leased GROUP BY mailbox
        """,
        prepared=True,
    ):
        if route is None:
            busy.backups[mailbox] = count
        else:
            routes[Route(route)] += count
            busy.sends[mailbox] = busy.sends.get(mailbox, 0) + count
    return routes, busy


class Agenda(NamedTuple):
    """What there may be to hand out, and what an operator or Graph says to that."""

    #: Routes that have mail to send, and those that have mail in doubt to look up.
    to_send: set[Route]
    to_look_up: set[Route]
    backups: bool
    closed: Closed
    #: What operators have set of how much may be in flight in the whole fleet, by the settings' names.
    limits: dict[str, int]


# A look into the index for each route: written as EXISTS it may be planned to read all that waits, and a plan that was
# made while nothing waited would stay.
_AGENDA = f"""
    WITH each AS (SELECT unnest(%(routes)s::text[]) AS route)
    SELECT 'to send', route, NULL::bigint FROM each CROSS JOIN LATERAL (
        SELECT FROM incoming_emails e WHERE e.route = each.route AND {TO_SEND} LIMIT 1
    ) waiting
    UNION ALL
    SELECT 'to look up', route, NULL FROM each CROSS JOIN LATERAL (
        SELECT FROM incoming_emails e WHERE e.route = each.route AND status = 'processing' AND {READY} LIMIT 1
    ) waiting
    UNION ALL
    SELECT 'backups', NULL, NULL
    WHERE EXISTS (SELECT FROM sent_emails WHERE backup_due_at <= now() AND backup_lease_until IS NULL)
    UNION ALL SELECT 'closed', route, NULL FROM routes WHERE paused_until > now()
    UNION ALL SELECT 'closed', each.route, NULL FROM each, mailboxes WHERE mailbox = '*' AND paused_until > now()
    UNION ALL SELECT 'external from', NULL, full_from FROM mailboxes WHERE mailbox = '*' AND full_until > now()
    UNION ALL SELECT 'limit', name, value FROM fleet_limits
"""


def agenda() -> Agenda:
    """Return for what it is worth asking, and what may not be dispatched now."""
    found: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for what, name, number in rows(_AGENDA, {"routes": [*Route]}, prepared=True):
        found[what][name] = number
    return Agenda(
        to_send={*map(Route, found["to send"])},
        to_look_up={*map(Route, found["to look up"])},
        backups="backups" in found,
        closed=Closed({*map(Route, found["closed"])}, *found["external from"].values() or [None]),
        limits=found["limit"],
    )


_CLAIM = f"""
    WITH wanted AS (
        SELECT * FROM unnest(%(ids)s::uuid[], %(reserved_at)s::bigint[]) WITH ORDINALITY AS wanted (id, at_ms, position)
    ), picked AS MATERIALIZED (
        SELECT e.id, wanted.at_ms, wanted.position FROM incoming_emails e JOIN wanted USING (id)
        WHERE e.status IN ('received', 'processing') AND {READY} AND e.route = %(route)s
        FOR UPDATE OF e SKIP LOCKED
    )
    UPDATE incoming_emails e
    SET status = 'dispatched', attempt_count = e.attempt_count + (e.status = 'received')::int,
        lease_until = now() + %(lease)s, lease_token = NULL, reserved_at = to_timestamp(picked.at_ms / 1000.0),
        updated_at = now()
    FROM picked WHERE e.id = picked.id
    RETURNING picked.position, e.id::text, e.publisher_message_id, e.mailbox, e.attempt_count,
              e.correlation_id, e.traceparent
"""


def claim(route: Route, picks: Sequence[Pick], *, capacity: int, lease: timedelta) -> list[Dispatch]:
    """Lease these emails of a route in order, as many as there is capacity for; those that are gone are left out.

    Args:
        lease: How long a worker has to take the dispatch up.
    """
    wanted = picks[: max(0, capacity)]
    if not wanted:
        return []
    parameters = {
        "route": route,
        "ids": [pick.id for pick in wanted],
        "reserved_at": [pick.reserved_at_ms for pick in wanted],
        "lease": lease,
    }
    return [Dispatch(*row) for _, *row in sorted(rows(_CLAIM, parameters, prepared=True), key=itemgetter(0))]


def expire_overdue(publish_within: timedelta) -> list[Event]:
    """Settle mail whose ``expires_at`` has passed before it was dispatched, and return the events to publish."""
    expired = rows(
        f"""
        WITH overdue AS MATERIALIZED (
            SELECT e.id FROM incoming_emails e
            WHERE expires_at <= now() AND status = 'received' AND NOT EXISTS (
                SELECT 1 FROM sent_emails s WHERE s.incoming_email_id = e.id AND s.status = 'in_doubt'
            )
            ORDER BY expires_at LIMIT {BATCH} FOR UPDATE SKIP LOCKED
        )
        UPDATE incoming_emails e SET status = 'expired', next_attempt_at = NULL, updated_at = now()
        FROM overdue WHERE e.id = overdue.id
        RETURNING e.id::text, publisher_message_id, correlation_id, reply_to, traceparent
        """,
        prepared=True,
    )
    now = datetime.now(UTC)
    events = [_expired(now, *row) for row in expired]
    append(events, publish_within)
    return events


def _expired(now: datetime, id: str, publisher_message_id: str, *delivery: str | None) -> Event:
    body = event_body(EventType.EXPIRED, publisher_message_id=publisher_message_id, incoming_email_id=id, at=now)
    return Event(event_id(EventType.EXPIRED, id), EventType.EXPIRED, body, id, *delivery)


# What is met is bounded by a constant, not by a parameter: so the planner knows that it reads the index of due backups
# and no more of the table. Due backups that cannot be made now are put off, or each sweep would meet them again before
# those behind them.
_CLAIM_BACKUPS = f"""
    WITH due AS MATERIALIZED (
        SELECT id, incoming_email_id, backup_due_at, now() - sent_at AS waited FROM sent_emails
        WHERE backup_due_at <= now() AND backup_lease_until IS NULL
        ORDER BY backup_due_at LIMIT {_BACKUPS_MET}
    ), met AS MATERIALIZED (
        SELECT due.id, due.backup_due_at, due.waited, e.mailbox, e.route,
               greatest(m.paused_until, every.paused_until,
                        CASE WHEN m.full_reason = '{NO_REQUESTS}' THEN m.full_until END) AS paused_until,
               coalesce(busy.backups, 0) + row_number() OVER (PARTITION BY e.mailbox ORDER BY due.backup_due_at)
                   -- One that refuses us is probed with one at a time, be it a send or a backup.
                   + CASE WHEN m.refusal_count > 0 THEN %(share)s - 1 + coalesce(busy.sends, 0) ELSE 0 END
                   - %(share)s AS too_many,
               count(*) OVER () = {_BACKUPS_MET} AS more
        FROM due JOIN incoming_emails e ON e.id = due.incoming_email_id
        LEFT JOIN mailboxes m ON m.mailbox = e.mailbox
        LEFT JOIN mailboxes every ON every.mailbox = '*' AND every.paused_until > now()
        LEFT JOIN unnest(%(busy)s::text[], %(sends)s::int[], %(backups)s::int[]) AS busy (mailbox, sends, backups)
               ON busy.mailbox = e.mailbox
    ), picked AS MATERIALIZED (
        SELECT id FROM met WHERE coalesce(paused_until <= now(), true) AND too_many <= 0
        ORDER BY backup_due_at LIMIT %(room)s
    ), decided AS MATERIALIZED (
        SELECT met.id, met.backup_due_at, met.more, met.mailbox, met.route, picked.id IS NOT NULL AS picked,
               CASE WHEN paused_until > now() THEN least(paused_until, now() + %(longest_wait)s)
                    -- Left due if there is nobody behind them: the end of another wakes the scheduler.
                    WHEN too_many > 0 AND more
                    THEN now() + least(greatest(too_many * %(crowded_wait)s::interval, waited / {_CROWDED_PARTS}),
                                       %(longest_crowded_wait)s)
               END AS put_off_until
        FROM met LEFT JOIN picked USING (id)
    ), locked AS MATERIALIZED (
        -- These alone: to lock all that were met, twenty times a second, costs more than the rest of a sweep.
        SELECT s.id FROM sent_emails s JOIN decided USING (id)
        WHERE (decided.picked OR decided.put_off_until IS NOT NULL)
          AND s.backup_due_at = decided.backup_due_at AND s.backup_lease_until IS NULL
        FOR UPDATE OF s SKIP LOCKED
    )
    UPDATE sent_emails s
    SET backup_lease_until = CASE WHEN decided.picked THEN now() + %(lease)s END,
        backup_due_at = coalesce(decided.put_off_until, s.backup_due_at), updated_at = now()
    FROM locked JOIN decided USING (id) WHERE s.id = locked.id
    RETURNING decided.picked, decided.more, s.incoming_email_id::text, s.backup_attempt_count + 1, decided.mailbox,
              decided.route = '{Route.PLAIN}' AND s.graph_message_id IS NULL
"""


def room_for_backups(concurrency: int, busy: Busy) -> int:
    """Return how many more backups may be leased: none until there is room for several."""
    room = concurrency - sum(busy.backups.values())
    return room if room >= max(1, concurrency // _REFILLED_PARTS) else 0


def claim_backups(*, concurrency: int, share: int, busy: Busy, lease: timedelta) -> tuple[list[DueBackup], bool]:
    """Lease due backups, several at a time; return them, and whether there may be more to lease at once.

    Args:
        concurrency: At most so many are in flight in the whole fleet,
        share: and so many of one mailbox.
        busy: What is in flight.
        lease: How long a worker has to take the backup up.
    """
    room = room_for_backups(concurrency, busy)
    if not room:
        return [], False
    mailboxes = [*{**busy.sends, **busy.backups}]
    parameters = {
        "room": room,
        "share": share,
        "busy": mailboxes,
        "sends": [busy.sends.get(mailbox, 0) for mailbox in mailboxes],
        "backups": [busy.backups.get(mailbox, 0) for mailbox in mailboxes],
        "longest_wait": _LONGEST_PUT_OFF,
        "crowded_wait": _CROWDED_PUT_OFF,
        "longest_crowded_wait": _LONGEST_CROWDED_PUT_OFF,
        "lease": lease,
    }
    decided = rows(_CLAIM_BACKUPS, parameters, prepared=True)
    claimed = [DueBackup(*backup) for picked, _, *backup in decided if picked]
    put_off_from_many = any(more and not picked for picked, more, *_ in decided)
    return claimed, put_off_from_many and len(claimed) < room


def expire_backup_leases() -> None:
    """End the leases of backups that nobody makes any more."""
    rows("UPDATE sent_emails SET backup_lease_until = NULL WHERE backup_lease_until <= now()", prepared=True)


def take_back(dispatches: Sequence[Dispatch], backups: Sequence[DueBackup]) -> None:
    """End the leases of what could not be handed to a worker, no attempt spent; the next sweep finds it."""
    rows(
        """
        WITH backups AS (
            UPDATE sent_emails s SET backup_lease_until = now()
            FROM unnest(%(backups)s::uuid[], %(attempts)s::int[]) AS taken (id, attempt)
            WHERE s.incoming_email_id = taken.id AND s.backup_attempt_count = taken.attempt - 1
              AND s.backup_lease_until IS NOT NULL
        )
        UPDATE incoming_emails SET lease_until = now()
        WHERE id = ANY(%(emails)s::uuid[]) AND status = 'dispatched'
        """,
        {
            "emails": [dispatch.incoming_email_id for dispatch in dispatches],
            "backups": [backup.incoming_email_id for backup in backups],
            "attempts": [backup.attempt for backup in backups],
        },
    )


def next_due_in(swept_at: datetime) -> timedelta | None:
    """Return how long it is until there is something to do that nobody will announce, by PostgreSQL's clock.

    Args:
        swept_at: As of when the last sweep has looked; what was due then and is still there waits for something else.
    """
    due_in: timedelta | None = rows(
        """
        SELECT least(
            (SELECT min(next_attempt_at) FROM incoming_emails WHERE next_attempt_at IS NOT NULL),
            (SELECT min(lease_until) FROM incoming_emails WHERE lease_until IS NOT NULL),
            (SELECT min(expires_at) FROM incoming_emails WHERE expires_at IS NOT NULL AND status = 'received'),
            (SELECT min(backup_due_at) FROM sent_emails
             WHERE backup_due_at > %(swept_at)s AND backup_lease_until IS NULL),
            (SELECT min(backup_lease_until) FROM sent_emails WHERE backup_lease_until IS NOT NULL),
            (SELECT min(paused_until) FROM mailboxes WHERE paused_until > %(swept_at)s),
            (SELECT min(full_until) FROM mailboxes WHERE full_until > %(swept_at)s),
            (SELECT min(paused_until) FROM routes WHERE paused_until > %(swept_at)s),
            (SELECT min(claimed_until) FROM outbox_events WHERE published_at IS NULL)
        ) - now()
        """,
        {"swept_at": swept_at},
        prepared=True,
    )[0][0]
    return due_in


def acknowledge_receipts(receipts: list[tuple[str, int]]) -> None:
    """Note that the scheduler knows of these (email id, attempt) receipts. Safe to repeat."""
    rows(
        """
        UPDATE worker_receipts r SET acknowledged_at = now()
        FROM unnest(%(ids)s::uuid[], %(attempts)s::int[]) AS received (id, attempt)
        WHERE r.incoming_email_id = received.id AND r.attempt = received.attempt AND r.acknowledged_at IS NULL
        """,
        {"ids": [id for id, _ in receipts], "attempts": [attempt for _, attempt in receipts]},
        prepared=True,
    )
