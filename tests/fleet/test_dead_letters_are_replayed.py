"""Thirty emails that Graph refuses for good: each kept as a dead letter, told about, and sent once when it can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import orjson
import pytest
from fleet_support import (
    ADDRESS_MARK,
    Fate,
    a_mailbox,
    an_email,
    assert_each_left_once,
    deliveries,
    emails,
    events_of,
    plain_send,
)
from fleet_support import settled as settle

import models
from models import dead_letters
from models.dead_letters import Filter
from sandbox.world import World
from simulator.control import Simulator

MAILBOX = a_mailbox("refused")

_LETTERS = """
    SELECT d.incoming_email_id::text, d.reason, d.last_error, d.mailbox, d.queue_name, d.attempts, d.body
    FROM dlq d JOIN incoming_emails e ON e.id = d.incoming_email_id WHERE e.mailbox = %(mailbox)s
"""


@pytest.fixture(scope="module")
def refused(world: World, simulator: Simulator) -> list[Fate]:
    """Thirty emails that have failed."""
    simulator.fail(400, "ErrorInvalidRecipients", mailbox=MAILBOX, times=None, operation=plain_send(world))
    given = emails(30, MAILBOX)
    world.publish(*given)
    return list(settle(world, given).values())


@pytest.fixture(scope="module")
def connected(world: World) -> Iterator[None]:
    models.connect(world.environment["DATABASE_URL"], "tests")
    yield
    models.disconnect()


def _letters(world: World) -> list[tuple[Any, ...]]:
    return world.rows(_LETTERS, {"mailbox": MAILBOX})


def test_a_mail_that_graph_refuses_for_good_fails_at_the_first_attempt(refused: list[Fate], world: World) -> None:
    assert {(fate.status, fate.attempt_count) for fate in refused} == {("failed", 1)}
    assert set(deliveries(world, refused).values()) == {0}


def test_each_has_one_dead_letter_that_says_why(refused: list[Fate], world: World) -> None:
    letters = _letters(world)
    assert Counter(letter[0] for letter in letters) == Counter(fate.id for fate in refused)
    assert {(reason, mailbox, queue, attempts) for _, reason, _, mailbox, queue, attempts, _ in letters} == {
        ("invalid_recipient", MAILBOX, "send_plain", 1)
    }
    assert all("400" in error and "ErrorInvalidRecipients" in error for _, _, error, *_ in letters)
    assert not any(ADDRESS_MARK in error for _, _, error, *_ in letters)


def test_the_message_is_kept_by_rabbitmq_and_in_the_table(refused: list[Fate], world: World) -> None:
    a_sweep = timedelta(seconds=75)
    world.wait_until("all are mirrored", lambda: all(letter[-1] for letter in _letters(world)), a_sweep)
    named = {orjson.loads(bytes(letter[-1]))["kwargs"]["incoming_email_id"] for letter in _letters(world)}
    assert named == {fate.id for fate in refused}
    assert world.queue_depth("send_plain.XQ") >= 30


def test_the_publisher_is_told_of_each_once(refused: list[Fate], world: World) -> None:
    for fate in refused:
        [event] = world.wait_until("the event arrives", lambda fate=fate: events_of(world, fate, "SendEmailFailed"))
        assert (event.body["status"], event.body["reason"]) == ("failed", "invalid_recipient")


def test_replayed_when_the_cause_is_gone_each_leaves_once(refused: list[Fate], world: World, connected: None) -> None:
    # Given that Graph would take them now
    world.simulator.clear_faults()
    letters = dead_letters.find_open(Filter(mailbox=MAILBOX), limit=100)
    assert len(letters) == 30

    # When all are replayed, by two operators at a time
    done = [dead_letters.resolve(letter.id, replayed=True, who=who) for letter in letters for who in ("ann", "bob")]
    another = an_email(MAILBOX)
    world.publish(another)  # which wakes the scheduler

    # Then each goes out once
    assert done == [True, False] * 30
    again = settle(world, [fate._asdict() for fate in refused] + [another])
    assert {fate.status for fate in again.values()} == {"processed"}
    assert_each_left_once(world, again.values())
    assert dead_letters.find_open(Filter(mailbox=MAILBOX), limit=100) == []
