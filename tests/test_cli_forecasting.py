"""``mailfleet forecast`` as an operator and his scripts meet it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
import support
from operator_support import mailfleet
from support import SENDER, store, store_many

import runtime
from actors.budgets import keep_counts
from limiter import Wanted
from models import mailboxes
from sandbox.processes import free_port

shared_database, tables, limit, configure = (
    support.shared_database,
    support.tables,
    support.limit,
    support.configure,
)


@pytest.fixture(autouse=True)
def own_servers(tables: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", tables)
    runtime.redis.flushdb()
    keep_counts()


def foreseen(*arguments: str) -> dict[str, Any]:
    ended = mailfleet("forecast", *arguments, "--json")
    assert (ended.status, ended.complaint) == (0, "")
    return dict(orjson.loads(ended.output))


def test_nothing_waits() -> None:
    assert mailfleet("forecast").output == "nothing is waiting\n"
    assert foreseen()["done_in"] == 0


def test_the_backlog_is_foreseen_with_what_is_used() -> None:
    store_many(40)
    began = datetime.now(UTC)
    # Given 30 a minute: the other ten a minute later
    told = foreseen()
    assert (told["emails"], told["binds"], told["mailbox"]) == (40, "sends", SENDER)
    assert 61 < told["done_in"] < 65
    asked_at = datetime.fromisoformat(told["asked_at"])
    assert began <= asked_at <= datetime.now(UTC)
    assert datetime.fromisoformat(told["done_at"]) - asked_at == timedelta(seconds=told["done_in"])
    # If 25 were sent a moment ago, the last five wait for two of them to come back, one after the other
    runtime.limiter.reserve({SENDER: [Wanted(1, 1)] * 25})
    [outlook] = foreseen()["mailboxes"]
    assert 115 < outlook["done_in"] < 125


def test_people_are_told_in_a_sentence_what_binds_and_what_would_help() -> None:
    store_many(40)
    done, advice, *table = mailfleet("forecast").output.splitlines()
    assert done.startswith("40 emails: done in 63 s (20")
    assert advice == (
        f"MAILBOX_SENDS_PER_MINUTE of {SENDER} binds: 30 a minute; spread over 3 more mailboxes: done in 1 s"
    )
    assert any(SENDER in line and "MAILBOX_SENDS_PER_MINUTE" in line and "63 s" in line for line in table)


def test_of_many_mailboxes_people_are_shown_the_latest() -> None:
    for number in range(22):
        store(publisher_message_id=str(number), **{"from": f"m{number}@example.com"})
    assert "and 2 more mailboxes, done no later" in mailfleet("forecast").output
    assert len(foreseen()["mailboxes"]) == 22


def test_a_mailbox_has_its_own_limits() -> None:
    store_many(40)
    runtime.limiter.set_limits(SENDER, {"sends": 50})
    assert foreseen()["done_in"] < 10


def test_what_waits_for_an_operator_is_never_done() -> None:
    store_many(2)
    mailboxes.pause_by_hand(SENDER, why="holiday", who="tests")
    told = foreseen()
    assert (told["emails"], told["paused"], told["done_in"], told["done_at"]) == (0, 2, None, None)
    assert "2 emails wait until an operator ends a pause" in mailfleet("forecast").output
    assert "never" in mailfleet("forecast").output


def test_planned_mail_starts_from_unused_mailboxes() -> None:
    store_many(40)
    told = foreseen("--emails", "1200", "--mailboxes", "4")
    assert (told["emails"], told["mailboxes"][0]["alike"], told["mailboxes"][0]["emails"]) == (1200, 4, 300)
    assert 9 * 61 < told["done_in"] < 10 * 61
    assert "of each of 4 mailboxes binds" in mailfleet("forecast", "--emails", "1200", "--mailboxes", "4").output


def test_planned_attachments_fill_the_upload_budget() -> None:
    told = foreseen("--emails", "100", "--attachments-mb", "10")
    assert (told["binds"], told["emails"]) == ("upload_bytes", 100)
    assert told["done_in"] > 6 * 300
    # A small one goes up in base64: 37 in five minutes, not 50
    assert foreseen("--emails", "100", "--attachments-mb", "3")["done_in"] > 2 * 300


def test_ten_to_the_ninth_emails_are_foreseen() -> None:
    assert mailfleet("forecast", "--emails", "1000000000").status == 0


def test_plain_mail_that_goes_as_drafts_takes_a_call_more(configure: Callable[..., None]) -> None:
    at_once = foreseen("--emails", "30")["done_in"]
    configure(send_plain_via="draft")
    assert foreseen("--emails", "30")["done_in"] == pytest.approx(2 * at_once)


def test_a_pause_of_the_tenant_delays_everything() -> None:
    runtime.limiter.pause_all(timedelta(hours=1))
    assert 3500 < foreseen("--emails", "1")["done_in"] < 3700


@pytest.mark.parametrize(
    "arguments",
    [
        ["--emails", "0"],
        ["--emails", "1e9"],
        ["--emails", "1000000001"],
        ["--emails", "1", "--mailboxes", "0"],
        ["--emails", "1", "--attachments-mb", "151"],
        ["--emails", "1", "--attachments-mb", "nan"],
        ["--mailboxes", "2"],
        ["--attachments-mb", "2"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told(arguments: list[str]) -> None:
    ended = mailfleet("forecast", *arguments)
    assert (ended.status, ended.output) == (2, "")
    assert "Error:" in ended.complaint


def test_without_redis_nothing_is_foreseen(limit: Callable[..., None]) -> None:
    limit(f"redis://127.0.0.1:{free_port()}/0")
    ended = mailfleet("forecast", "--emails", "1")
    assert (ended.status, ended.output) == (1, "")
    assert "Redis does not answer" in ended.complaint
