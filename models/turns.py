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
#: Nor later: budget may come back before its time, from a mail that was not sent after all.
_LONGEST_FULL = timedelta(minutes=5)
#: While large mail is passed over, so many mails of a lane are looked at for smaller ones.
_LOOKED_THROUGH = 500

#: Why a mailbox is full that may not be asked for anything: look-ups and backups wait, too.
NO_REQUESTS = "limit: requests"
#: What is reserved for a send, and given back.
_SEND_BUDGETS = ["limit: sends", "limit: recipients", "limit: tenant_external_recipients"]

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
    #: Whose mail of this mailbox was served last.
    last_tenant: str | None = None


class Closed(NamedTuple):
    """What may not be dispatched now: mail of these routes, and mail with at least so many external recipients."""

    routes: set[Route]
    external_from: int | None


class Full(NamedTuple):
    """For how long and why a mailbox is passed over, as far as mail has at least so many recipients."""

    wait: timedelta
    reason: str
    from_recipients: int = 1


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
            SELECT turn.mailbox, turn.position, m.last_tenant, {_ROOM} AS room,
                   CASE WHEN m.full_until > now() THEN m.full_from END AS full_from
            FROM turn LEFT JOIN busy USING (mailbox) LEFT JOIN mailboxes m USING (mailbox) LEFT JOIN every ON true
            WHERE turn.mailbox IS NOT NULL AND coalesce(m.paused_until <= now(), true)
              AND coalesce(m.full_until <= now() OR m.full_from > 1, true)
        )
        SELECT email.id::text, open.mailbox, open.room, lane.tenant, lane.priority, email.recipient_count,
               email.external_recipients, open.last_tenant
        FROM (
            -- Of a mailbox that is full from a size on there may be nothing: it takes no other's place.
            SELECT *, count(*) FILTER (WHERE coalesce(full_from, %(external_from)s::int) IS NULL)
                          OVER (ORDER BY position) AS before
            FROM open WHERE room > 0
        ) open CROSS JOIN LATERAL (
            SELECT 0 AS behind, * FROM {_lanes(to_send, "> coalesce(open.last_tenant, '')")} further
            UNION ALL
            SELECT 1, * FROM {_lanes(to_send, "<= coalesce(open.last_tenant, '')")} around
        ) lane CROSS JOIN LATERAL (
            SELECT * FROM (
                SELECT id, recipient_count,
                       coalesce(external_recipient_count, recipient_count) AS external_recipients
                FROM incoming_emails
                WHERE {to_send} AND route = %(route)s AND mailbox = open.mailbox AND coalesce(tenant, '') = lane.tenant
                  AND priority = lane.priority
                  -- One that came expired after the sweep had looked for such: its turn is in the next sweep.
                  AND coalesce(expires_at > now(), true)
                ORDER BY id LIMIT CASE WHEN coalesce(open.full_from, %(external_from)s::int) IS NULL
                                       THEN least(open.room, %(capacity)s) ELSE {_LOOKED_THROUGH} END
            ) oldest
            WHERE coalesce(recipient_count < open.full_from, true)
              AND coalesce(external_recipients < %(external_from)s::int, true)
            ORDER BY id LIMIT least(open.room, %(capacity)s)
        ) email
        WHERE open.before <= %(capacity)s
        ORDER BY open.position, lane.behind, lane.tenant, lane.priority, email.id
    """


_CANDIDATES = _candidates(TO_SEND)
#: Has its own index: any number of mails with external recipients may wait before those that have none.
_INTERNAL_CANDIDATES = _candidates(_INTERNAL_TO_SEND)


def candidates(
    route: Route, *, capacity: int, share: int, busy: Busy, after: str, external_from: int | None = None
) -> list[Candidate]:
    """Return ready emails of a route, mailbox by mailbox in order of turns, and within each tenant by tenant.

    Args:
        capacity: How many are wanted; more are returned, to choose from.
        share: How many emails of a mailbox may be in flight, where nothing else is set.
        after: The mailbox that was served last; turns start behind it, and come round to it.
        external_from: Pass over mail with so many external recipients or more.
    """
    if capacity <= 0:
        return []
    wanted = min(capacity, BATCH)
    parameters = {
        "route": route,
        "capacity": wanted,
        # Any mailbox may have nothing but what is passed over.
        "turns": wanted + len({**busy.sends, **busy.backups}) + (BATCH if external_from else 0),
        "share": share,
        "external_from": external_from,
        **_described(busy),
    }
    statement = _INTERNAL_CANDIDATES if external_from == 1 else _CANDIDATES
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
          AND coalesce(m.full_until <= now() OR m.full_reason <> '{NO_REQUESTS}', true)
        ORDER BY e.updated_at LIMIT {BATCH}
    ), numbered AS (
        SELECT *, row_number() OVER (PARTITION BY mailbox ORDER BY updated_at) AS number FROM waiting
    )
    SELECT id::text, mailbox, room, '', 0, 0, 0 FROM numbered WHERE number <= room
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
    last = {candidate.mailbox: candidate for candidate in chosen}
    if changed := [mail for mail in last.values() if mail.tenant != (mail.last_tenant or "")]:
        insert_many(
            """
            INSERT INTO mailboxes (mailbox, last_tenant) VALUES %s
            ON CONFLICT (mailbox) DO UPDATE SET last_tenant = excluded.last_tenant RETURNING 1
            """,
            sorted((mail.mailbox, mail.tenant) for mail in changed),
            row="(%s, nullif(%s, ''))",
        )


def note_full(full: dict[str, Full]) -> None:
    """Pass over mailboxes whose send budget is used up, each for a while and with the reason. Look-ups go on.

    Of `EVERY` it is the external recipients that count: mail with fewer is not passed over, whosever it is.
    """
    if full:
        insert_many(
            """
            INSERT INTO mailboxes (mailbox, full_until, full_reason, full_from) VALUES %s
            ON CONFLICT (mailbox) DO UPDATE
            SET full_until = excluded.full_until, full_reason = excluded.full_reason, full_from = excluded.full_from
            RETURNING 1
            """,
            [
                (mailbox, min(max(each.wait, _SHORTEST_FULL), _LONGEST_FULL), each.reason, each.from_recipients)
                for mailbox, each in sorted(full.items())
            ],
            row="(%s, now() + %s, %s, %s)",
        )


def note_room(mailbox: str, *, external: bool) -> None:
    """Look again at once at a mailbox that waits for send budget, since some has come back.

    Args:
        external: Some of the tenant's external recipients have, too.
    """
    rows(
        """
        UPDATE mailboxes SET full_until = NULL, full_reason = NULL
        WHERE mailbox IN (%(mailbox)s, %(every)s) AND full_until IS NOT NULL AND full_reason = ANY(%(reasons)s)
        """,
        {"mailbox": mailbox, "every": EVERY if external else mailbox, "reasons": _SEND_BUDGETS},
    )


def waited(ids: Sequence[str]) -> dict[str, timedelta]:
    """Return for how long each of these emails could have been sent, as far as it is known: since it was due."""
    found = rows(
        """
        SELECT id::text, now() - greatest(created_at, (payload->>'send_at')::timestamptz) FROM incoming_emails
        WHERE id = ANY(%(ids)s::uuid[])
        """,
        {"ids": list(ids)},
    )
    return dict(found)
