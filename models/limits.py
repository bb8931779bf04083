"""Limits that operators set at run time: a mailbox's own, and those for every mailbox and the tenant.

They stand in ``mailboxes.limits`` by the names of the limiter's budgets, in its units; those for every mailbox in the
row `turns.EVERY`. Redis is told of them afterwards, and again whenever it has forgotten: the table is the truth.
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


_ALL_SET = """
    SELECT m.mailbox, own.budget, own.value::bigint, said.who, said.at
    FROM mailboxes m CROSS JOIN LATERAL jsonb_each_text(m.limits) AS own (budget, value)
    LEFT JOIN LATERAL (
        SELECT who, at FROM audit_log
        WHERE subject = m.mailbox AND action = 'limits.set' AND detail ? own.budget ORDER BY at DESC LIMIT 1
    ) AS said ON true
    WHERE m.limits <> '{}' AND coalesce(m.mailbox = %(mailbox)s, true)
    ORDER BY m.mailbox <> %(every)s, m.mailbox, own.budget
"""


def all_set(mailbox: str | None = None) -> list[SetLimit]:
    """Return every limit that stands, with who set it last, those for every mailbox first; or of this one alone."""
    parameters = {"mailbox": mailbox.lower() if mailbox else None, "every": EVERY}
    return [SetLimit(*row) for row in rows(_ALL_SET, parameters)]
