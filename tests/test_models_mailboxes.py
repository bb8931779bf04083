"""Pauses of mailboxes."""

from __future__ import annotations

from datetime import timedelta

import pytest
import support
from support import rows, seconds_until, table

from models import mailboxes
from models.mailboxes import FOREVER

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
ANN = "ann@example.com"


def paused_for() -> float:
    return seconds_until("mailboxes", "paused_until", "mailbox", ANN)


def test_a_pause_stands_with_its_reason_until_it_ends() -> None:
    mailboxes.pause("Ann@Example.com", MINUTE, why="429")
    (pause,) = mailboxes.pauses()
    assert (pause.mailbox, pause.pause_reason, pause.paused_by) == (ANN, "429", "mailfleet")
    assert 55 < paused_for() <= 60
    rows("UPDATE mailboxes SET paused_until = now()")
    assert mailboxes.pauses() == []


def test_a_longer_pause_is_never_shortened_and_a_shorter_one_is_lengthened() -> None:
    mailboxes.pause(ANN, HOUR, why="first")
    mailboxes.pause(ANN, MINUTE, why="second")
    assert mailboxes.pauses()[0].pause_reason == "first"
    mailboxes.pause(ANN, 2 * HOUR, why="third")
    assert mailboxes.pauses()[0].pause_reason == "third"


def test_an_operators_pause_lasts_until_it_is_resumed() -> None:
    mailboxes.pause_by_hand(ANN, why="migration", who="olga")
    mailboxes.pause(ANN, HOUR, why="429")
    (pause,) = mailboxes.pauses()
    assert (pause.paused_until, pause.paused_by) == (FOREVER, "olga")
    assert mailboxes.resume("ANN@example.com")
    assert mailboxes.pauses() == []
    assert not mailboxes.resume(ANN)


def test_refusals_in_a_row_pause_longer_each_time_up_to_the_longest() -> None:
    waits = [mailboxes.refuse(ANN, why="403", first_wait=MINUTE, longest_wait=5 * MINUTE) for _ in range(5)]
    assert waits == [MINUTE, 2 * MINUTE, 4 * MINUTE, 5 * MINUTE, 5 * MINUTE]
    assert 295 < paused_for() <= 300
    rows("UPDATE mailboxes SET refusal_count = 1000")
    assert mailboxes.refuse(ANN, why="403", first_wait=MINUTE, longest_wait=HOUR) == HOUR


def test_resuming_forgets_the_refusals() -> None:
    mailboxes.refuse(ANN, why="403", first_wait=MINUTE, longest_wait=HOUR)
    mailboxes.resume(ANN)
    assert table("mailboxes")[0]["refusal_count"] == 0
