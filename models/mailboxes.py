"""What is known of sending mailboxes besides their mail: pauses, refusals, and whose budget is used up.

The scheduler passes over what is paused: a mailbox, a whole route, or everything (the mailbox `EVERY`). Of two pauses
of the same the one that ends later stands, with its own reason and name: an operator's is not cut short by one of
Graph's, nor Graph's by an operator's. To make a pause shorter, resume first. A mailbox, its route and everything may be
paused at the same time, and each pause ends by itself.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from models.database import rows
from models.states import Route
from models.turns import BATCH, EVERY

#: An operator's pause ends when the operator ends it. (PostgreSQL's 'infinity' has no Python value.)
FOREVER = datetime(9999, 1, 1, tzinfo=UTC)
#: Who pauses besides operators: Graph, whose word must outlive Redis, and we, who leave alone what refuses us.
GRAPH = "graph"
_MAILFLEET = "mailfleet"


class Pause(NamedTuple):
    """Nothing is dispatched from the mailbox, if a route is named by this route alone, before ``paused_until``."""

    mailbox: str
    paused_until: datetime
    pause_reason: str
    paused_by: str
    route: str | None = None

    @property
    def until_resumed(self) -> bool:
        """Whether it has no end but an operator's."""
        return self.paused_until >= FOREVER


class Held(NamedTuple):
    """A mailbox that waits for budget until ``full_until``, or that refused us so many times in a row."""

    mailbox: str
    full_until: datetime | None
    full_reason: str | None
    #: Mail with fewer recipients goes on; of every mailbox, with fewer external ones.
    full_from: int
    refusal_count: int


def pause(mailbox: str, wait: timedelta, *, why: str) -> None:
    """Pass the mailbox over for ``wait``, as Graph asked. A longer pause that stands already is kept."""
    _pause(_PAUSE_MAILBOX, mailbox.lower(), wait, why=why, who=GRAPH)


def pause_by_hand(mailbox: str, *, why: str, who: str, wait: timedelta | None = None) -> Pause:
    """Pass the mailbox over for ``wait``, or else until an operator resumes it; return the pause that stands now."""
    _pause(_PAUSE_MAILBOX, mailbox.lower(), wait, why=why, who=who)
    return Pause(*rows(f"{_OF_MAILBOXES} WHERE mailbox = %(mailbox)s", {"mailbox": mailbox.lower()})[0])


def pause_route(route: Route, *, why: str, who: str, wait: timedelta | None = None) -> Pause:
    """Pass all mail of a route over, else as `pause_by_hand`."""
    _pause(_PAUSE_ROUTE, route, wait, why=why, who=who)
    return Pause(*rows(f"{_OF_ROUTES} WHERE route = %(route)s", {"every": EVERY, "route": route})[0])


def _pause(statement: str, subject: str, wait: timedelta | None, *, why: str, who: str) -> None:
    rows(statement, {"subject": subject, "wait": wait, "forever": FOREVER, "why": why, "who": who})


_PAUSE = """
    INSERT INTO {table} ({key}, paused_until, pause_reason, paused_by)
    VALUES (%(subject)s, coalesce(now() + %(wait)s::interval, %(forever)s), %(why)s, %(who)s)
    ON CONFLICT ({key}) DO UPDATE
    SET paused_until = excluded.paused_until, pause_reason = excluded.pause_reason, paused_by = excluded.paused_by,
        updated_at = now()
    WHERE coalesce({table}.paused_until < excluded.paused_until, true)
"""
_PAUSE_MAILBOX = _PAUSE.format(table="mailboxes", key="mailbox")
_PAUSE_ROUTE = _PAUSE.format(table="routes", key="route")


def refuse(mailbox: str, *, why: str, first_wait: timedelta, longest_wait: timedelta) -> timedelta:
    """Pause a mailbox that refused us, longer each time in a row, and return for how long it is paused now.

    Calls that were under way together are refused together: they count once, and the later ones do not lengthen the
    pause. Until the mailbox has taken a mail again the scheduler lets one email at a time probe it.

    Args:
        longest_wait: Of the pause, and of what is returned; the pause that stands may be an operator's and longer.
    """
    paused_for: timedelta = rows(
        _REFUSE,
        {"mailbox": mailbox.lower(), "why": why, "us": _MAILFLEET, "first": first_wait, "longest": longest_wait},
    )[0][0]
    return paused_for


_COUNTS = "(m.refusal_count = 0 OR coalesce(m.paused_until <= now(), true))"
# 2^20 of anything is above the longest, and an interval of 2^1000 would be an error.
_REFUSE = f"""
    INSERT INTO mailboxes AS m (mailbox, refusal_count, paused_until, pause_reason, paused_by)
    VALUES (%(mailbox)s, 1, now() + least(%(first)s, %(longest)s), %(why)s, %(us)s)
    ON CONFLICT (mailbox) DO UPDATE
    SET refusal_count = m.refusal_count + {_COUNTS}::int, updated_at = now(),
        (paused_until, pause_reason, paused_by) = (
            SELECT * FROM (VALUES
                (m.paused_until, m.pause_reason, m.paused_by),
                (CASE WHEN {_COUNTS} THEN now() + least(%(first)s * 2 ^ least(m.refusal_count, 20), %(longest)s) END,
                 %(why)s, %(us)s)
            ) AS pause (ends, reason, by) ORDER BY ends DESC NULLS LAST LIMIT 1
        )
    RETURNING least(greatest(paused_until - now(), '0'), %(longest)s)
"""


def resume(mailbox: str) -> bool:
    """End the mailbox's pause, whoever made it, forget its refusals, and that its budget was used up.

    Returns whether there was a pause or a refusal. Everything (`EVERY`) is resumed as a mailbox is; what is paused by
    itself stays so.
    """
    return bool(
        rows(
            """
            WITH standing AS MATERIALIZED (
                SELECT mailbox, coalesce(paused_until > now(), false) OR refusal_count > 0 AS stood FROM mailboxes
                WHERE mailbox = %(mailbox)s FOR UPDATE
            )
            UPDATE mailboxes SET paused_until = NULL, pause_reason = NULL, paused_by = NULL, refusal_count = 0,
                                 full_until = NULL, full_reason = NULL, updated_at = now()
            FROM standing WHERE mailboxes.mailbox = standing.mailbox RETURNING standing.stood
            """,
            {"mailbox": mailbox.lower()},
        )
        == [(True,)]
    )


def release(mailbox: str) -> None:
    """Have the mail tried at once that failed or was held back and waits; not what waits for its ``send_at``.

    Args:
        mailbox: `EVERY`: of all of them.
    """
    concerned = {"mailbox": mailbox.lower(), "every": EVERY, "batch": BATCH}
    while len(rows(_RELEASE, concerned)) == BATCH:
        pass


def resume_route(route: Route) -> bool:
    """End the route's pause and return whether there was one."""
    return bool(
        rows(
            """
            UPDATE routes SET paused_until = NULL, pause_reason = NULL, paused_by = NULL, updated_at = now()
            WHERE route = %(route)s AND paused_until > now() RETURNING 1
            """,
            {"route": route},
        )
    )


_OF_MAILBOXES = "SELECT mailbox, paused_until, pause_reason, paused_by, NULL AS route FROM mailboxes"
_OF_ROUTES = "SELECT %(every)s, paused_until, pause_reason, paused_by, route FROM routes"


def pauses() -> list[Pause]:
    """Return every pause that stands, the longest first."""
    standing = f"""
        {_OF_MAILBOXES} WHERE paused_until > now() UNION ALL {_OF_ROUTES} WHERE paused_until > now()
        ORDER BY paused_until DESC, route, mailbox
    """
    return [Pause(*row) for row in rows(standing, {"every": EVERY})]


def held(mailbox: str | None = None) -> list[Held]:
    """Return what holds this mailbox back besides pauses, nothing if nothing does; None: all that are held back."""
    found = rows(
        """
        SELECT mailbox, CASE WHEN full_until > now() THEN full_until END,
               CASE WHEN full_until > now() THEN full_reason END, full_from, refusal_count
        FROM mailboxes
        WHERE (full_until > now() OR refusal_count > 0) AND coalesce(mailbox = %(mailbox)s, true)
        ORDER BY mailbox
        """,
        {"mailbox": mailbox.lower() if mailbox else None},
    )
    return [Held(*row) for row in found]


def look_anew(mailbox: str) -> None:
    """Have the scheduler ask again for what the mailbox has waited for budget: its limits are others now.

    Its mail too: what a worker had in hand when nothing was left.

    Args:
        mailbox: `EVERY`: all of them.
    """
    concerned = {"mailbox": mailbox.lower(), "every": EVERY, "batch": BATCH}
    rows(_NO_LONGER_FULL, concerned)
    while len(rows(_NO_LONGER_DEFERRED, concerned)) == BATCH:
        pass


_NO_LONGER_FULL = """
    WITH full_ones AS MATERIALIZED (
        -- In the order in which they are noted, so that neither waits for the other.
        SELECT mailbox FROM mailboxes
        WHERE full_until IS NOT NULL AND (mailbox = %(mailbox)s OR %(mailbox)s = %(every)s)
        ORDER BY mailbox COLLATE "C" FOR UPDATE
    )
    UPDATE mailboxes SET full_until = NULL, full_reason = NULL FROM full_ones
    WHERE mailboxes.mailbox = full_ones.mailbox
"""
_WAKE = """
    WITH waiting AS MATERIALIZED (
        SELECT id FROM incoming_emails
        WHERE next_attempt_at IS NOT NULL AND status = 'received' AND ({why})
          AND (mailbox = %(mailbox)s OR %(mailbox)s = %(every)s)
        ORDER BY next_attempt_at LIMIT %(batch)s FOR UPDATE SKIP LOCKED
    )
    UPDATE incoming_emails e SET next_attempt_at = NULL, updated_at = now()
    FROM waiting WHERE e.id = waiting.id RETURNING 1
"""
_NO_LONGER_DEFERRED = _WAKE.format(why="last_error LIKE '%%: none left, try again in %%'")
_RELEASE = _WAKE.format(why="last_error IS NOT NULL")
