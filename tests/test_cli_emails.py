"""``mailfleet emails`` and ``dlq groups`` as an operator and his scripts meet them."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
import support
from operator_support import give_up, mailfleet

from cli.emails import STATUSES
from models import Status

shared_database, tables = support.shared_database, support.tables


@pytest.fixture(autouse=True)
def own_tables(tables: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", tables)


def answer(*arguments: str) -> Any:
    ended = mailfleet(*arguments, "--json")
    assert (ended.status, ended.complaint) == (0, "")
    return orjson.loads(ended.output)


def test_every_status_can_be_asked_for() -> None:
    assert list(Status) == STATUSES


def test_emails_are_found_newest_first_by_what_is_known_of_them() -> None:
    failed = give_up("order-1")
    waiting = support.store(publisher_message_id="order-2", **{"from": "bo@example.com"})

    def found(*filters: str) -> list[str]:
        return [email["incoming_email_id"] for email in answer("emails", "list", *filters)]

    assert found() == [waiting, failed]
    assert found("--limit", "1") == [waiting]
    assert found("--status", "failed") == [failed]
    assert found("--mailbox", "Bo@example.com") == [waiting]
    assert found("--publisher-message-id", "order-1", "--error", "graph") == [failed]
    assert found("--in-doubt") == found("--since", "2999-01-01") == found("--until", "2020-01-01") == []
    assert found("--since", "2020-01-01", "--until", "2999-01-01") == [waiting, failed]


def test_more_than_a_page_is_found() -> None:
    support.store_many(501)
    assert len(answer("emails", "list", "--limit", "1000")) == 501
    assert len(answer("emails", "list", "--mailbox", "ann@example.com", "--limit", "501")) == 501


def test_people_see_a_table_and_wrong_usage_is_told() -> None:
    give_up("order-1")
    shown = mailfleet("emails", "list").output
    for told in ("order-1", "failed", "Graph says no"):
        assert told in shown
    assert mailfleet("emails", "list", "--status", "lost").status == 2


def test_dead_letters_are_told_by_their_cause() -> None:
    for n in range(3):
        give_up(f"order-{n}")
    give_up("order-9", reason="mailbox_full")
    groups = answer("dlq", "groups")
    assert [(group["reason"], group["dead_letters"]) for group in groups] == [
        ("invalid_recipient", 3),
        ("mailbox_full", 1),
    ]
    assert len(answer("dlq", "groups", "--reason", "mailbox_full")) == 1
    assert "invalid_recipient" in mailfleet("dlq", "groups").output
