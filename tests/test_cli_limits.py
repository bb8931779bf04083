"""``limits``, ``pause`` and ``resume`` as an operator and his scripts meet them."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import operator_support
import orjson
import pytest
import support
from operator_support import Ended, audited, mailfleet
from support import rows, seconds_until, table

import runtime
from limiter import Slowed
from models import mailboxes
from sandbox.processes import free_port

shared_database, tables, limit = support.shared_database, support.tables, support.limit
run_time_limits = operator_support.run_time_limits
pytestmark = pytest.mark.usefixtures("tables", "run_time_limits")

ANN = "ann@example.com"


def answer(*arguments: str) -> Any:
    """What a command answers with ``--json``, and with nothing besides."""
    ended = mailfleet(*arguments, "--json")
    assert (ended.status, ended.complaint) == (0, "")
    return orjson.loads(ended.output)


def own_limits() -> dict[str, dict[str, int]]:
    return {row["mailbox"]: row["limits"] for row in table("mailboxes") if row["limits"]}


# Limits


def test_limits_are_set_shown_with_who_set_them_and_unset() -> None:
    assert answer("limits", "set", "Ann@example.com", "sends=40", "upload_mb=20") == {
        "before": {"sends": None, "upload_bytes": None},
        "after": {"sends": 40, "upload_bytes": 20_000_000},
        "told": True,
    }
    assert mailfleet("limits", "set", "sends=20", "tenant_requests=0").status == 0
    assert own_limits() == {ANN: {"sends": 40, "upload_bytes": 20_000_000}, "*": {"sends": 20, "tenant_requests": 0}}
    shown = mailfleet("limits", "show", ANN).output
    assert "set for this mailbox by cli:" in shown
    overview = mailfleet("limits", "show").output
    for fact in ("every mailbox", "tenant_requests", "none", ANN, "20000000", "cli:"):
        assert fact in overview
    budgets = {budget["budget"]: budget for budget in answer("limits", "show", ANN)["budgets"]}
    assert {name: budgets["sends"][name] for name in ("limit", "configured", "why")} == {
        "limit": 40,
        "configured": 40,
        "why": "set for this mailbox",
    }
    assert budgets["sends"]["set_by"].startswith("cli:")
    assert [(each["mailbox"], each["budget"]) for each in answer("limits", "show")["limits"]] == [
        ("*", "sends"),
        ("*", "tenant_requests"),
        (ANN, "sends"),
        (ANN, "upload_bytes"),
    ]
    undone = mailfleet("limits", "unset", ANN, "upload_mb", "sends").output
    assert "20000000" in undone
    assert "not set" in undone
    assert answer("limits", "unset", "sends")["after"] == {"sends": None}
    assert own_limits() == {"*": {"tenant_requests": 0}}
    assert answer("limits", "set", "send_plain_concurrency=90")["after"] == {"send_plain_concurrency": 90}
    assert re.search(r"the fleet +send_plain_concurrency +90 +cli:", mailfleet("limits", "show").output)
    assert answer("limits", "unset", "send_plain_concurrency")["before"] == {"send_plain_concurrency": 90}
    assert {action for _, action, _ in audited()} == {"limits.set", "limits.unset"}


def test_a_limit_that_single_mails_may_exceed_is_set_with_a_warning() -> None:
    ended = mailfleet("limits", "set", "recipients=5", "tenant_external_recipients=499", "sends=1")
    assert ended.status == 0
    assert ended.complaint.splitlines() == [
        "A single mail with more than 5 recipients will be given up (never_fits).",
        "A single mail with more than 499 external recipients will be given up (never_fits).",
    ]
    for arguments in (("set", "recipients=500", "tenant_external_recipients=0"), ("unset", "recipients")):
        assert mailfleet("limits", *arguments).complaint == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["set"], "Missing argument"),
        (["set", ANN], "say which limit"),
        (["set", "ann@", "sends=1"], "a mailbox is named by its address"),
        (["set", f"{'a' * 250}@b.example", "sends=1"], "a mailbox is named by its address"),
        (["set", "sends"], "a limit is set as BUDGET=VALUE"),
        (["set", "sends=fast"], "a limit is set as BUDGET=VALUE"),
        (["set", "sends=1e3"], "a limit is set as BUDGET=VALUE"),
        (["set", "sends=" + "9" * 5000], "a limit is set as BUDGET=VALUE"),
        (["set", "sends=1", ANN], "a limit is set as BUDGET=VALUE"),
        (["set", "sends=1", "sends=2"], "a limit is given twice"),
        (["set", "upload_mb=10", "upload_bytes=20000000"], "a limit is given twice"),
        (["set", "upload_mb=1"], "upload_bytes must be 0 (no limit) or from 5000000"),
        (["set", "speed=1"], "there are concurrency, requests, upload_bytes, sends, recipients, tenant_requests"),
        (["set", ANN, "tenant_requests=1"], "it is set without a mailbox"),
        (["unset", "sends", "speed"], "there is no limit named speed"),
        (["unset", ANN], "say which limit"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_limit_that_cannot_be_set_is_wrong_usage_and_changes_nothing(arguments: list[str], sentence: str) -> None:
    ended = mailfleet("limits", *arguments)
    assert (ended.status, ended.output) == (2, "")
    assert sentence in ended.complaint
    assert (table("mailboxes"), audited()) == ([], [])


def test_while_redis_is_away_the_limit_stands_and_the_command_says_when_it_takes_effect(limit: Any) -> None:
    limit(url=f"redis://127.0.0.1:{free_port()}")
    ended = mailfleet("limits", "set", ANN, "sends=40")
    assert ended.status == 0
    assert "Redis is away: this takes effect within a minute after it is back." in ended.complaint
    assert own_limits() == {ANN: {"sends": 40}}
    mailfleet("pause", ANN)
    assert mailfleet("resume", ANN).complaint == "Redis is away: a pause of Graph's that it remembers ends by itself.\n"


def test_a_limit_that_graph_keeps_below_what_is_set_is_shown_with_the_reason() -> None:
    mailfleet("limits", "set", ANN, "sends=40")
    slowed = Slowed("sends", 18, datetime.now(UTC), 40, 3)
    runtime.limiter.set_slowed(ANN, [slowed])
    assert f"{slowed}; else 40 by cli:" in mailfleet("limits", "show", ANN).output


def test_what_holds_a_mailbox_back_is_shown() -> None:
    rows(
        """
        INSERT INTO mailboxes (mailbox, full_until, full_reason, refusal_count)
        VALUES ('ann@example.com', '2999-01-01', 'sends: 30 [b]a minute[/b]', 0), ('bo@example.com', NULL, NULL, 3)
        """
    )
    shown = mailfleet("limits", "show").output
    assert "waits for budget: sends: 30 [b]a minute[/b]" in shown
    assert "2999-01-01 00:00:00" in shown
    assert "refuses us (3 times in a row): probed one mail at a time" in shown
    assert [each["mailbox"] for each in answer("limits", "show", "BO@example.com")["held"]] == ["bo@example.com"]


# Pauses


def test_a_mailbox_is_paused_shown_and_resumed() -> None:
    assert mailfleet("pause", "Ann@example.com", "--why", "[red]holiday").status == 0
    shown = mailfleet("limits", "show", ANN).output
    assert "[red]holiday" in shown
    assert "concurrency" in shown
    with runtime.limiter.slot(ANN):
        told = answer("limits", "show", ANN)
    assert [pause["mailbox"] for pause in told["pauses"]] == [ANN]
    assert told["budgets"][0]["used"] == 1
    assert 0 < told["budgets"][0]["next_free_in"] < 600
    assert "tenant_requests" in [budget["budget"] for budget in answer("limits", "show")["budgets"]]
    assert mailfleet("resume", ANN) == Ended(0, "ann@example.com is resumed\n", "")
    assert mailfleet("resume", ANN) == Ended(0, "ann@example.com was not paused\n", "")


def test_a_route_and_everything_are_paused_for_a_while_and_resumed() -> None:
    assert mailfleet("pause", "--route", "attachment", "--for", "30m", "--why", "store is down").status == 0
    assert 1790 < seconds_until("routes", "paused_until", "route", "attachment") <= 1800
    assert "everything is paused until resumed by cli:" in mailfleet("pause", "--all").output
    shown = mailfleet("limits", "show").output
    for fact in ("route attachment", "store is down", "every mailbox", "resumed"):
        assert fact in shown
    assert [(pause["mailbox"], pause["route"]) for pause in answer("limits", "show")["pauses"]] == [
        ("*", None),
        ("*", "attachment"),
    ]
    assert mailfleet("resume", "--all").output == "everything is resumed\n"
    assert mailfleet("resume", "--route", "no-attachment").output == "the route no-attachment was not paused\n"
    assert mailfleet("resume", "--route", "attachment").output == "the route attachment is resumed\n"
    assert [(action, subject) for _, action, subject in audited()] == [
        ("pause", "attachment"),
        ("pause", "*"),
        ("resume", "*"),
        ("resume", "no-attachment"),
        ("resume", "attachment"),
    ]


def test_a_pause_that_does_not_last_as_long_as_another_says_which_stands() -> None:
    mailfleet("pause", ANN, "--why", "migration")
    ended = mailfleet("pause", ANN, "--for", "90s", "--why", "a moment")
    assert "is paused until resumed by cli:" in ended.output
    assert ended.output.endswith(": migration\n")
    mailboxes.resume(ANN)
    assert ": a moment" in mailfleet("pause", ANN, "--for", "365d", "--why", "a moment").output


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [ANN, "--all"],
        ["--all", "--route", "attachment"],
        ["--route", "sideways"],
        ["*"],
        [f"{'a' * 250}@b.example"],
        [ANN, "--why", "x" * 1001],
        *([ANN, "--for", duration] for duration in ("", "0m", "30", "1.5h", "-1h", "366d", "99999999s", "m", "1h30m")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_pause_of_nothing_of_two_things_or_without_measure_is_wrong_usage(arguments: list[str]) -> None:
    ended = mailfleet("pause", *arguments)
    assert (ended.status, ended.output) == (2, "")
    assert (table("mailboxes"), table("routes"), audited()) == ([], [], [])
