"""Limits, pauses and cancelling as a running fleet obeys them: nothing is started anew."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from fleet_support import (
    a_mailbox,
    an_attachment,
    an_email,
    assert_each_left_once,
    deliveries,
    emails,
    events_of,
    fate,
    fates,
    settled,
    settled_one,
)

from sandbox.world import World
from simulator.control import Simulator

MAILFLEET = Path(sys.executable).with_name("mailfleet")


def mailfleet(world: World, *arguments: str) -> str:
    """Run an operator's command beside the fleet and return what it says."""
    return subprocess.check_output([MAILFLEET, *arguments], env=world.environment, text=True)


@pytest.fixture(autouse=True)
def as_before(world: World) -> Iterator[None]:
    yield
    for what in (["--all"], ["--route", "attachment"]):
        mailfleet(world, "resume", *what)


def received(world: World, email: dict[str, Any]) -> None:
    world.wait_until("it is stored", lambda: fate(world, email))


def test_mail_that_waits_for_a_limit_goes_out_when_the_limit_is_raised(world: World) -> None:
    # Given a mailbox that may send one a minute, and has
    mailbox = a_mailbox()
    mailfleet(world, "limits", "set", mailbox, "sends=1")
    given = emails(4, mailbox)
    world.publish(*given)
    world.wait_until(
        "the others wait for budget",
        lambda: (
            len(fates(world, given)) == len(given)
            and [
                held["full_reason"]
                for held in orjson.loads(mailfleet(world, "limits", "show", mailbox, "--json"))["held"]
            ]
            == ["limit: sends"]
        ),
    )
    left = deliveries(world, fates(world, given).values())
    assert sum(left.values()) <= 1
    # When
    mailfleet(world, "limits", "set", mailbox, "sends=0")
    # Then none of them waits for its minute
    assert_each_left_once(world, settled(world, given).values())


def test_what_is_cancelled_during_a_pause_of_everything_never_leaves(world: World) -> None:
    # Given
    mailfleet(world, "pause", "--all", "--why", "moving house")
    unwanted, wanted = emails(2, a_mailbox())
    world.publish(unwanted, wanted, correlation_id="please not")
    for email in (unwanted, wanted):
        received(world, email)
    # When
    mailfleet(world, "cancel", unwanted["publisher_message_id"])
    mailfleet(world, "resume", "--all")
    # Then
    assert_each_left_once(world, [settled_one(world, wanted)])
    known = settled_one(world, unwanted)
    assert (known.status, deliveries(world, [known])) == ("cancelled", {known.publisher_message_id: 0})
    [event] = world.wait_until("its publisher is told", lambda: events_of(world, known, "SendEmailCancelled"))
    assert (event.body["status"], event.correlation_id) == ("cancelled", "please not")


def test_a_pause_of_a_route_holds_back_no_other(world: World, simulator: Simulator) -> None:
    # Given
    mailfleet(world, "pause", "--route", "attachment")
    mailbox = a_mailbox()
    attached = an_email(mailbox, attachments=[an_attachment(simulator, 1000)])
    plain = an_email(mailbox)
    # When
    world.publish(attached)
    received(world, attached)
    world.publish(plain)
    # Then
    assert_each_left_once(world, [settled_one(world, plain)])
    waiting = fate(world, attached)
    assert waiting is not None
    assert (waiting.status, waiting.attempt_count) == ("received", 0)
    mailfleet(world, "resume", "--route", "attachment")
    assert_each_left_once(world, [settled_one(world, attached)])
