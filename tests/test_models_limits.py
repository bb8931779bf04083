"""Limits that operators set: what stands, and who set it."""

from __future__ import annotations

import pytest
import support
from support import rows

import models
from models import audit, limits
from models.mailboxes import EVERY

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")

ANN = "ann@example.com"


def test_a_change_adds_replaces_and_takes_away_and_tells_what_was_and_what_is() -> None:
    assert limits.of(ANN) == {}
    assert limits.change("Ann@Example.com", {"sends": 40, "requests": 0}) == ({}, {"sends": 40, "requests": 0})
    assert limits.change(ANN, {"sends": 50, "requests": None, "recipients": None}) == (
        {"sends": 40, "requests": 0},
        {"sends": 50},
    )
    assert limits.of("ANN@example.com") == {"sends": 50}


def test_a_change_leaves_the_mailboxs_pause_and_other_mailboxes_alone() -> None:
    rows("INSERT INTO mailboxes (mailbox, pause_reason) VALUES ('ann@example.com', '429'), ('bo@example.com', NULL)")
    limits.change(ANN, {"sends": 40})
    assert [(row["mailbox"], row["limits"], row["pause_reason"]) for row in support.table("mailboxes")] == [
        (ANN, {"sends": 40}, "429"),
        ("bo@example.com", {}, None),
    ]


def test_each_limit_that_stands_is_told_with_who_set_it_last() -> None:
    # Given two operators, one of whom changed his mind, and a limit that no command has set
    limits.change(ANN, {"sends": 40, "requests": 500, "recipients": 1})
    limits.change(EVERY, {"sends": 20})
    for at, who, action, subject, names in (
        ("2026-01-01", "olga", "limits.set", ANN, ["sends", "requests"]),
        ("2026-01-02", "ben", "limits.set", ANN, ["sends"]),
        ("2026-01-03", "cora", "limits.unset", ANN, ["requests"]),
        ("2026-01-04", "dan", "limits.set", EVERY, ["sends"]),
        ("2026-01-05", "eve", "pause", ANN, ["sends"]),
    ):
        audit.record(who, action, subject, **{name: {"old": None, "new": 1} for name in names})
        rows("UPDATE audit_log SET at = %(at)s WHERE who = %(who)s", {"at": at, "who": who})
    # Then
    told = [(each.mailbox, each.budget, each.limit, each.set_by) for each in limits.all_set()]
    of_ann = [(ANN, "recipients", 1, None), (ANN, "requests", 500, "olga"), (ANN, "sends", 40, "ben")]
    assert told == [(EVERY, "sends", 20, "dan"), *of_ann]
    assert [each.budget for each in limits.all_set("Ann@example.com")] == ["recipients", "requests", "sends"]


def test_who_set_a_limit_is_found_without_reading_the_whole_log() -> None:
    rows(
        """
        INSERT INTO audit_log (id, who, action, subject)
        SELECT gen_random_uuid(), 'olga', 'dlq.replayed', n::text FROM generate_series(1, 5000) n
        """
    )
    limits.change(ANN, {"sends": 40})
    with models.transaction():
        rows("ANALYZE audit_log")
        plan = "\n".join(row[0] for row in rows(f"EXPLAIN {limits._ALL_SET}", {"mailbox": None, "every": EVERY}))
    assert "audit_log_subject" in plan
