"""A forecast that is asked for at the beginning of a backlog, and what the fleet then makes of it.

Twelve sends a minute: a mailbox that has used some of them, and one that fills a window. Neither dividing the backlog
by the limit nor leaving out what is used would come within a tenth of the truth.
"""

from __future__ import annotations

import math
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from fleet_support import a_mailbox, emails, fates, settled
from worlds import Worlds

from sandbox.world import World

SENDS_PER_MINUTE = 12
#: By mailbox: emails sent a moment before, and the backlog.
GIVEN = {
    a_mailbox("used"): (8, 10),  # four go at once, six when what is used is back
    a_mailbox("once"): (0, 20),  # twelve at once, and eight a window later
}


@pytest.fixture(scope="module")
def world(worlds: Worlds) -> World:
    return worlds.get({"MAILBOX_SENDS_PER_MINUTE": SENDS_PER_MINUTE})


@pytest.fixture(scope="module")
def foreseen(world: World) -> dict[str, Any]:
    """What the command line foresees of the backlog, which is over when this is returned."""
    before = [email for mailbox, (used, _) in GIVEN.items() for email in emails(used, mailbox)]
    world.publish(*before)
    settled(world, before)
    backlog = [email for mailbox, (_, count) in GIVEN.items() for email in emails(count, mailbox)]
    world.publish(*backlog)
    world.wait_until("all are received", lambda: len(fates(world, backlog)) == len(backlog))
    asked = subprocess.run(
        [Path(sys.executable).with_name("mailfleet"), "forecast", "--json"],
        env=world.environment,
        capture_output=True,
        timeout=60,
        check=True,
    )
    expected = sum(used + count for used, count in GIVEN.values())
    deliveries = world.simulator.deliveries
    world.wait_until(
        "all is accepted", lambda: sum(len(deliveries(mailbox)) for mailbox in GIVEN) == expected, timedelta(minutes=3)
    )
    return dict(orjson.loads(asked.stdout))


def _took(world: World, foreseen: dict[str, Any], *mailboxes: str) -> timedelta:
    """How long after the question Graph accepted the last mail of these mailboxes."""
    last = max(delivery["at"] for mailbox in mailboxes for delivery in world.simulator.deliveries(mailbox))
    return datetime.fromisoformat(last) - datetime.fromisoformat(foreseen["asked_at"])


def _within_a_tenth(foreseen_seconds: float, took: timedelta) -> bool:
    return abs(foreseen_seconds - took.total_seconds()) <= took.total_seconds() / 10


def test_the_backlog_is_done_when_the_forecast_said(world: World, foreseen: dict[str, Any]) -> None:
    took = _took(world, foreseen, *GIVEN)
    assert _within_a_tenth(foreseen["done_in"], took), (foreseen, took)
    assert foreseen["binds"] == "sends"
    assert f"MAILBOX_SENDS_PER_MINUTE of {foreseen['mailbox']}" in foreseen["advice"]


@pytest.mark.parametrize("mailbox", GIVEN, ids=lambda mailbox: mailbox.split("-")[0])
def test_each_mailbox_is_done_when_the_forecast_said(world: World, foreseen: dict[str, Any], mailbox: str) -> None:
    [outlook] = [outlook for outlook in foreseen["mailboxes"] if outlook["mailbox"] == mailbox]
    took = _took(world, foreseen, mailbox)
    assert _within_a_tenth(outlook["done_in"], took), (outlook, took)
    assert outlook["binds"] == "sends"


def test_neither_the_quotient_nor_bursts_without_what_is_used_would_have_done(
    world: World, foreseen: dict[str, Any]
) -> None:
    for mailbox in GIVEN:
        [emails_left] = [each["emails"] for each in foreseen["mailboxes"] if each["mailbox"] == mailbox]
        took = _took(world, foreseen, mailbox)
        assert not _within_a_tenth(emails_left / SENDS_PER_MINUTE * 60, took)
        assert not _within_a_tenth((math.ceil(emails_left / SENDS_PER_MINUTE) - 1) * 61.5, took)
