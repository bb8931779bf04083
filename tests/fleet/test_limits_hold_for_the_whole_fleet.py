"""Two processes of each sending type against a slow Graph: together they keep what each limit allows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from fleet_support import a_mailbox, an_attachment, an_email, assert_each_left_once, emails, fates
from worlds import Worlds

from sandbox.world import World

IN_FLIGHT = "SELECT route, count(*) FROM incoming_emails WHERE lease_until IS NOT NULL GROUP BY route"
BACKUPS_IN_FLIGHT = "SELECT 'backup', count(*) FROM sent_emails WHERE backup_lease_until IS NOT NULL"
PLAIN_CONCURRENCY, ATTACHED_CONCURRENCY, BACKUP_CONCURRENCY = 5, 2, 3
MAILBOX_CONCURRENCY = 4


@pytest.fixture(scope="module")
def busy(worlds: Worlds) -> tuple[World, list[dict[str, Any]], Counter[str]]:
    """A world that has sent from two mailboxes, and the most emails and backups that were leased at a time, by kind."""
    world = worlds.get(
        {
            "SEND_PLAIN_CONCURRENCY": PLAIN_CONCURRENCY,
            "SEND_ATTACHED_CONCURRENCY": ATTACHED_CONCURRENCY,
            "BACKUP_CONCURRENCY": BACKUP_CONCURRENCY,
            "MAILBOX_CONCURRENCY": MAILBOX_CONCURRENCY,
        },
        scale={"send_plain": 2, "send_attached": 2, "backup": 2},
    )
    world.simulator.set_latency(0.15)
    mailboxes = [a_mailbox("busy"), a_mailbox("busy")]
    given = [email for mailbox in mailboxes for email in emails(25, mailbox)]
    given += [
        an_email(mailbox, attachments=[an_attachment(world.simulator, 4_000_000)])
        for mailbox in mailboxes
        for _ in range(4)
    ]
    most: Counter[str] = Counter()

    def over() -> bool:
        for route, count in world.rows(f"{IN_FLIGHT} UNION ALL {BACKUPS_IN_FLIGHT}"):
            most[route] = max(most[route], count)
        found = fates(world, given)
        return len(found) == len(given) and all(each.over for each in found.values())

    world.publish(*given)
    world.wait_until("all is sent and archived", over)
    return world, given, most


def test_graph_never_had_to_throttle_us(busy: tuple[World, list[dict[str, Any]], Counter[str]]) -> None:
    world, _, _ = busy
    counts = world.simulator.request_counts()
    assert counts["provoked_429"] == []
    assert set(counts["most_in_flight"].values()) == {MAILBOX_CONCURRENCY}  # reached, and not passed


@pytest.mark.parametrize(
    ("kind", "concurrency"),
    [("no-attachment", PLAIN_CONCURRENCY), ("attachment", ATTACHED_CONCURRENCY), ("backup", BACKUP_CONCURRENCY)],
)
def test_no_more_is_in_flight_of_a_kind_than_there_may_be(
    busy: tuple[World, list[dict[str, Any]], Counter[str]], kind: str, concurrency: int
) -> None:
    _, _, most = busy
    assert most[kind] == concurrency  # reached, and not passed


def test_being_held_back_costs_no_attempt_and_loses_nothing(
    busy: tuple[World, list[dict[str, Any]], Counter[str]],
) -> None:
    world, given, _ = busy
    known = fates(world, given).values()
    assert {(each.status, each.attempt_count) for each in known} == {("processed", 1)}
    assert_each_left_once(world, known)
