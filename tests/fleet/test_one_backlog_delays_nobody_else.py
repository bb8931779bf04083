"""A mailbox with three hundred waiting emails, beside others that have one."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from fleet_support import a_mailbox, an_email, emails, fates, now, plain_send, settled_one

from sandbox.world import World
from simulator.control import Simulator

BACKLOG = a_mailbox("newsletter")


@pytest.fixture(scope="module")
def backlog(world: World, simulator: Simulator) -> None:
    """Three hundred emails that are received, of which few have been sent."""
    simulator.set_latency(0.3, plain_send(world))
    given = emails(300, BACKLOG)
    world.publish(*given)
    world.wait_until("all are received", lambda: len(fates(world, given)) == 300)


def _left_at(world: World, tag: str) -> datetime:
    [delivery] = world.simulator.deliveries(tag=tag)
    return datetime.fromisoformat(delivery["at"])


def _of_the_backlog_before(world: World, instant: datetime) -> int:
    return sum(datetime.fromisoformat(delivery["at"]) < instant for delivery in world.simulator.deliveries(BACKLOG))


@pytest.mark.parametrize("name", ["aaron", "zoe"])
def test_another_mailboxs_email_leaves_at_once(world: World, backlog: None, name: str) -> None:
    began = now()
    email = an_email(a_mailbox(name))

    world.publish(email)

    left_at = _left_at(world, settled_one(world, email).id)
    assert left_at - began < timedelta(seconds=2)
    assert _of_the_backlog_before(world, left_at) < 250


def test_urgent_mail_of_the_same_mailbox_goes_before_its_backlog(world: World, backlog: None) -> None:
    began = now()
    urgent = an_email(BACKLOG, priority="high", subject="Urgent")

    world.publish(urgent)

    left_at = _left_at(world, settled_one(world, urgent).id)
    assert left_at - began < timedelta(seconds=2)
    assert _of_the_backlog_before(world, left_at) < 250
