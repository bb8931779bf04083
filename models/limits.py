"""Limits that operators set at run time: a mailbox's own, those for every mailbox and the tenant, and the fleet's.

They stand in ``mailboxes.limits`` by the names of the limiter's budgets, in its units; those for every mailbox in the
row `turns.EVERY`. Redis is told of them afterwards, and again whenever it has forgotten: the table is the truth.

How much may be in flight in the whole fleet stands in ``fleet_limits`` by the settings' names. The scheduler reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

import orjson

from models.database import rows, transaction
from models.turns import EVERY

Limits = dict[str, int]


class SetLimit(NamedTuple):
    """A limit that stands, and who set it when; nobody known: not by an operator's command."""

    mailbox: str
    budget: str
    limit: int
    set_by: str | None
    set_at: datetime | None


def of(mailbox: str) -> Limits:
    """Return the limits that were set for this mailbox, or for every one (`EVERY`)."""
    found = rows("SELECT limits FROM mailboxes WHERE mailbox = %(mailbox)s", {"mailbox": mailbox.lower()})
    return dict(found[0][0]) if found else {}


def change(mailbox: str, changes: Mapping[str, int | None]) -> tuple[Limits, Limits]:
    """Set these limits of a mailbox, None unsets one; return all that were set before, and all that are now.

    Of two changes at the same time the second sees the first: neither is lost.
    """
    mailbox = mailbox.lower()
    with transaction():
        rows("INSERT INTO mailboxes (mailbox) VALUES (%(mailbox)s) ON CONFLICT DO NOTHING", {"mailbox": mailbox})
        locked = "SELECT limits FROM mailboxes WHERE mailbox = %(mailbox)s FOR UPDATE"
        before: Limits = rows(locked, {"mailbox": mailbox})[0][0]
        after = {name: limit for name, limit in {**before, **changes}.items() if limit is not None}
        rows(
            "UPDATE mailboxes SET limits = %(limits)s, updated_at = now() WHERE mailbox = %(mailbox)s",
            {"mailbox": mailbox, "limits": orjson.dumps(after).decode()},
        )
    return before, after


def of_fleet() -> Limits:
    """Return the limits that were set for the whole fleet."""
    return dict(rows("SELECT name, value FROM fleet_limits", prepared=True))


def change_fleet(changes: Mapping[str, int | None]) -> tuple[Limits, Limits]:
    """Set these limits of the whole fleet, None unsets one; return what was set before, and what is now.

    Of two changes at the same time the second sees the first.
    """
    with transaction():
        rows("LOCK TABLE fleet_limits IN SHARE ROW EXCLUSIVE MODE")  # a limit that is not set has no row to lock
        before = of_fleet()
        for name, value in changes.items():
            rows("DELETE FROM fleet_limits WHERE name = %(name)s", {"name": name})
            if value is not None:
                rows(
                    "INSERT INTO fleet_limits (name, value) VALUES (%(name)s, %(value)s)",
                    {"name": name, "value": value},
                )
        return before, of_fleet()


_ALL_SET = """
    SELECT own.mailbox, own.budget, own.value, said.who, said.at
    FROM (
        SELECT m.mailbox, each.budget, each.value::bigint
        FROM mailboxes m CROSS JOIN LATERAL jsonb_each_text(m.limits) AS each (budget, value) WHERE m.limits <> '{}'
        UNION ALL SELECT %(every)s, name, value FROM fleet_limits
    ) AS own (mailbox, budget, value)
    LEFT JOIN LATERAL (
        SELECT who, at FROM audit_log
        WHERE subject = own.mailbox AND action = 'limits.set' AND detail ? own.budget ORDER BY at DESC LIMIT 1
    ) AS said ON true
    WHERE coalesce(own.mailbox = %(mailbox)s, true)
    ORDER BY own.mailbox <> %(every)s, own.mailbox, own.budget
"""


def all_set(mailbox: str | None = None) -> list[SetLimit]:
    """Return every limit that stands, with who set it last, those for every mailbox and the fleet first.

    Or those of this mailbox alone; of `EVERY` with the fleet's.
    """
    parameters = {"mailbox": mailbox.lower() if mailbox else None, "every": EVERY}
    return [SetLimit(*row) for row in rows(_ALL_SET, parameters)]
