"""Whose turn it is: which ready mail the scheduler looks at next, and in what order.

Turns go round among mailboxes, and within a mailbox among the tenants whose mail it sends; within a tenant a lottery
among the priorities gives each its weight, so that none starves. A mailbox that is paused, or whose send budget is
used up, is passed over until its time comes, however much waits for it.

The turns come from the index of ready mail: a recursive query skips from one mailbox to the next, and within each from
one lane (tenant and priority) to the next, and reads a few emails of each. Its cost depends on what it finds, not on
what is waiting. It only reads: what it finds is claimed afterwards (`scheduling.claim`), if it is still there.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from models.database import insert_many, rows
from models.states import Route

#: The mailbox that stands for every mailbox.
EVERY = "*"
#: Bounds what one look reads, and with it the work of one sweep.
BATCH = 500
#: By priority as it is stored: how often mail of it goes out while all wait.
WEIGHTS = {0: 6, 1: 3, 2: 1}
#: A full mailbox is looked at no sooner than this: a few mails together cost less than each for itself.
_SHORTEST_FULL = timedelta(milliseconds=500)

READY = "lease_until IS NULL AND next_attempt_at IS NULL"
TO_SEND = f"status = 'received' AND {READY}"
_INTERNAL_TO_SEND = f"{TO_SEND} AND external_recipient_count = 0"


class Candidate(NamedTuple):
    """A ready email, as far as it matters for whose turn it is."""

    id: str
    mailbox: str
    #: How many more emails of the mailbox may be in flight.
    room: int
    tenant: str
    priority: int
    recipients: int
    external_recipients: int
    #: Since it was received.
    waited: timedelta


class Closed(NamedTuple):
    """What may not be dispatched now: mail of these routes, and, if so, mail with external recipients."""

    routes: set[Route]
    external: bool


class Busy(NamedTuple):
    """How many emails and how many backups each mailbox has in flight."""

    sends: dict[str, int]
    backups: dict[str, int]


# How many more of a mailbox's emails may be in flight. One that refuses us is probed with one at a time; else it is the
# number of requests that it may make at a time, its own or every mailbox's if one was set, or `share`.
# A concurrency that throttling has lowered is not looked at: the slots keep it, and what waits for one is snoozed.
_ROOM = """
    CASE WHEN m.refusal_count > 0 THEN 1 - coalesce(busy.backups, 0)
         ELSE least(nullif(coalesce((m.limits->>'concurrency')::bigint, (every.limits->>'concurrency')::bigint), 0),
                    CASE WHEN coalesce(m.limits, '{}') || coalesce(every.limits, '{}') ? 'concurrency'
                         THEN 1000000 ELSE %(share)s END)
    END - coalesce(busy.in_flight, 0)
"""
_BUSY = """
    busy AS MATERIALIZED (
        SELECT * FROM unnest(%(busy)s::text[], %(in_flight)s::int[], %(backups)s::int[])
                      AS busy (mailbox, in_flight, backups)
    ), every AS MATERIALIZED (SELECT limits FROM mailboxes WHERE mailbox = '*')
"""


def _lanes(to_send: str, within: str) -> str:
    """Return the query of the lanes of ``open.mailbox`` whose tenant is ``within`` the turn."""
    at = f"{to_send} AND route = %(route)s AND mailbox = open.mailbox"
    return f"""
        (WITH RECURSIVE lane (tenant, priority, number) AS (
            (SELECT coalesce(tenant, ''), priority, 1 FROM incoming_emails WHERE {at} AND coalesce(tenant, '') {within}
             ORDER BY coalesce(tenant, ''), priority LIMIT 1)
            UNION ALL
            SELECT following.*, lane.number + 1 FROM lane CROSS JOIN LATERAL (
                SELECT coalesce(tenant, ''), priority FROM incoming_emails
                WHERE {at} AND (coalesce(tenant, ''), priority) > (lane.tenant, lane.priority)
                  AND coalesce(tenant, '') {within}
                ORDER BY coalesce(tenant, ''), priority LIMIT 1
            ) following WHERE lane.number < least(open.room, %(capacity)s) * {len(WEIGHTS)}
        ) SELECT * FROM lane)
    """


def _candidates(to_send: str) -> str:
    return f"""
        WITH RECURSIVE {_BUSY}, turn (mailbox, position) AS (
            (SELECT mailbox, 1 FROM incoming_emails
             WHERE {to_send} AND route = %(route)s AND mailbox > %(after)s ORDER BY mailbox LIMIT 1)
            UNION ALL
            SELECT (SELECT mailbox FROM incoming_emails
                    WHERE {to_send} AND route = %(route)s AND mailbox > turn.mailbox ORDER BY mailbox LIMIT 1),
                   position + 1
            FROM turn WHERE turn.mailbox IS NOT NULL
              -- Mailboxes that are passed over use up turns without giving mail.
              AND position < %(turns)s + (SELECT count(*) FROM mailboxes WHERE paused_until > now())
                                       + (SELECT count(*) FROM mailboxes WHERE full_until > now())
        ), open AS MATERIALIZED (
            SELECT turn.mailbox, turn.position, m.last_tenant, {_ROOM} AS room
            FROM turn LEFT JOIN busy USING (mailbox) LEFT JOIN mailboxes m USING (mailbox) LEFT JOIN every ON true
            WHERE turn.mailbox IS NOT NULL AND coalesce(m.paused_until <= now(), true)
              AND coalesce(m.full_until <= now(), true)
        )
        SELECT email.id::text, open.mailbox, open.room, lane.tenant, lane.priority, email.recipient_count,
               coalesce(email.external_recipient_count, email.recipient_count), now() - email.created_at
        FROM (SELECT * FROM open WHERE room > 0 ORDER BY position LIMIT %(capacity)s) open CROSS JOIN LATERAL (
            SELECT 0 AS behind, * FROM {_lanes(to_send, "> coalesce(open.last_tenant, '')")} further
            UNION ALL
            SELECT 1, * FROM {_lanes(to_send, "<= coalesce(open.last_tenant, '')")} around
        ) lane CROSS JOIN LATERAL (
            SELECT id, recipient_count, external_recipient_count, created_at FROM incoming_emails
            WHERE {to_send} AND route = %(route)s AND mailbox = open.mailbox AND coalesce(tenant, '') = lane.tenant
              AND priority = lane.priority
              -- One that came expired after the sweep had looked for such: its turn is in the next sweep.
              AND coalesce(expires_at > now(), true)
            ORDER BY id LIMIT least(open.room, %(capacity)s)
        ) email
        ORDER BY open.position, lane.behind, lane.tenant, lane.priority, email.id
    """


#: By whether mail with external recipients is passed over: each condition has its index.
_CANDIDATES = {False: _candidates(TO_SEND), True: _candidates(_INTERNAL_TO_SEND)}


def candidates(
    route: Route, *, capacity: int, share: int, busy: Busy, after: str, internal_only: bool = False
) -> list[Candidate]:
    """Return ready emails of a route, mailbox by mailbox in order of turns, and within each tenant by tenant.

    Args:
        capacity: How many are wanted; more are returned, to choose from.
        share: How many emails of a mailbox may be in flight, where nothing else is set.
        after: The mailbox that was served last; turns start behind it, and come round to it.
        internal_only: Pass over mail with external recipients.
    """
    if capacity <= 0:
        return []
    wanted = min(capacity, BATCH)
    parameters = {
        "route": route,
        "capacity": wanted,
        "turns": wanted + len(busy.sends),
        "share": share,
        **_described(busy),
    }
    statement = _CANDIDATES[internal_only]
    found = [Candidate(*row) for row in rows(statement, parameters | {"after": after}, prepared=True)]
    if after and len({candidate.mailbox for candidate in found}) < wanted:
        met = {candidate.mailbox for candidate in found}
        around = [Candidate(*row) for row in rows(statement, parameters | {"after": ""}, prepared=True)]
        found += [candidate for candidate in around if candidate.mailbox not in met]
    return found


def _described(busy: Busy) -> dict[str, object]:
    mailboxes = [*{**busy.sends, **busy.backups}]
    return {
        "busy": mailboxes,
        "in_flight": [busy.sends.get(mailbox, 0) for mailbox in mailboxes],
        "backups": [busy.backups.get(mailbox, 0) for mailbox in mailboxes],
    }


def choose(found: Iterable[Candidate], capacity: int) -> list[Candidate]:
    """Choose whom to send now, in order: as many of each mailbox as it has room for, the tenants taking turns."""
    chosen: list[Candidate] = []
    for _, of_mailbox in groupby(found, attrgetter("mailbox")):
        ordered = _in_turn([*of_mailbox])
        chosen += ordered[: min(ordered[0].room, capacity - len(chosen))]
        if len(chosen) >= capacity:
            break
    return chosen


def _in_turn(waiting: list[Candidate]) -> list[Candidate]:
    """Order a mailbox's emails: one tenant after the other, each by lottery among its priorities."""
    lotteries = [_lottery([*of_tenant]) for _, of_tenant in groupby(waiting, attrgetter("tenant"))]
    ordered: list[Candidate] = []
    while lotteries:
        drawn = [(lottery, next(lottery, None)) for lottery in lotteries]
        ordered += [candidate for _, candidate in drawn if candidate]
        lotteries = [lottery for lottery, candidate in drawn if candidate]
    return ordered


def _lottery(waiting: list[Candidate]) -> Iterator[Candidate]:
    lanes = {priority: [*lane] for priority, lane in groupby(waiting, attrgetter("priority"))}
    while lanes:
        weights = [WEIGHTS[priority] for priority in lanes]
        (priority,) = random.choices([*lanes], weights)  # noqa: S311  not a secret
        yield lanes[priority].pop(0)
        lanes = {priority: lane for priority, lane in lanes.items() if lane}


# Mailboxes without room are left out before the oldest are taken: or their mail would keep others from their turn.
_LOOK_UPS = f"""
    WITH {_BUSY}, waiting AS MATERIALIZED (
        SELECT e.id, e.mailbox, e.updated_at, {_ROOM} AS room
        FROM incoming_emails e LEFT JOIN mailboxes m USING (mailbox) LEFT JOIN busy USING (mailbox)
        LEFT JOIN every ON true
        WHERE e.status = 'processing' AND e.lease_until IS NULL AND e.next_attempt_at IS NULL AND e.route = %(route)s
          AND coalesce(m.paused_until <= now(), true) AND {_ROOM} > 0
        ORDER BY e.updated_at LIMIT {BATCH}
    ), numbered AS (
        SELECT *, row_number() OVER (PARTITION BY mailbox ORDER BY updated_at) AS number FROM waiting
    )
    SELECT id::text, mailbox, room, '', 0, 0, 0, interval '0' FROM numbered WHERE number <= room
    ORDER BY updated_at LIMIT %(capacity)s
"""


def look_ups(route: Route, *, capacity: int, share: int, busy: Busy) -> list[Candidate]:
    """Return emails in doubt whose look-up is due, the longest waiting first; they need no send budget."""
    if capacity <= 0:
        return []
    parameters = {"route": route, "capacity": min(capacity, BATCH), "share": share, **_described(busy)}
    return [Candidate(*row) for row in rows(_LOOK_UPS, parameters, prepared=True)]


def note_served(chosen: Sequence[Candidate]) -> None:
    """Remember which tenant of each mailbox was served last, where there are tenants."""
    last = {candidate.mailbox: candidate.tenant for candidate in chosen}
    if named := sorted((mailbox, tenant) for mailbox, tenant in last.items() if tenant):
        insert_many(
            """
            INSERT INTO mailboxes (mailbox, last_tenant) VALUES %s
            ON CONFLICT (mailbox) DO UPDATE SET last_tenant = excluded.last_tenant RETURNING 1
            """,
            named,
        )
    if unnamed := [mailbox for mailbox, tenant in last.items() if not tenant]:
        rows(
            "UPDATE mailboxes SET last_tenant = NULL WHERE mailbox = ANY(%(unnamed)s) AND last_tenant IS NOT NULL",
            {"unnamed": unnamed},
        )


def note_full(full: dict[str, tuple[timedelta, str]]) -> None:
    """Pass over mailboxes whose send budget is used up, each for a while and with the reason. Look-ups go on.

    `EVERY`: pass over mail with external recipients, whosever it is.
    """
    if full:
        insert_many(
            """
            INSERT INTO mailboxes (mailbox, full_until, full_reason) VALUES %s
            ON CONFLICT (mailbox) DO UPDATE
            SET full_until = excluded.full_until, full_reason = excluded.full_reason RETURNING 1
            """,
            [(mailbox, max(wait, _SHORTEST_FULL), why) for mailbox, (wait, why) in sorted(full.items())],
            row="(%s, now() + %s, %s)",
        )


def defer(deferred: dict[str, tuple[timedelta, str]]) -> None:
    """Have emails wait each for itself: they are too large for what is left of a budget, others may not be."""
    if deferred:
        ids = [*deferred]
        rows(
            f"""
            UPDATE incoming_emails e SET next_attempt_at = now() + deferred.wait, last_error = deferred.why,
                                         updated_at = now()
            FROM unnest(%(ids)s::uuid[], %(waits)s::interval[], %(reasons)s::text[]) AS deferred (id, wait, why)
            WHERE e.id = deferred.id AND {TO_SEND}
            """,
            {
                "ids": ids,
                "waits": [max(deferred[id][0], _SHORTEST_FULL) for id in ids],
                "reasons": [deferred[id][1] for id in ids],
            },
        )


def closed() -> Closed:
    """Return what an operator, a pause of everything, or the limit of external recipients lets nothing out of now."""
    found = rows(
        """
        SELECT route FROM routes WHERE paused_until > now()
        UNION ALL SELECT '*' FROM mailboxes WHERE mailbox = '*' AND paused_until > now()
        UNION ALL SELECT 'external' FROM mailboxes WHERE mailbox = '*' AND full_until > now()
        """,
        prepared=True,
    )
    names = {name for (name,) in found}
    return Closed({route for route in Route if {route, EVERY} & names}, "external" in names)
