"""Mail without attachments that goes by way of a draft has two calls at which Graph may ask to be left alone."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from fleet_support import a_mailbox, arrived, assert_each_left_once, emails, settled
from worlds import Worlds

from sandbox.world import World
from simulator.control import Simulator

pytestmark = pytest.mark.parametrize("way", ["draft"], indirect=True)


@pytest.fixture(scope="module")
def world(worlds: Worlds, way: str) -> World:
    return worlds.get({"SEND_PLAIN_VIA": way})


def _refused_at(simulator: Simulator, mailbox: str) -> list[datetime]:
    return [datetime.fromisoformat(each["at"]) for each in simulator.requests(mailbox) if each["status"] == "429"]


@pytest.mark.parametrize("operation", ["create_draft", "send_draft"])
def test_all_mail_of_the_mailbox_waits_without_spending_an_attempt(
    world: World, simulator: Simulator, operation: str
) -> None:
    # Given a mailbox that Graph throttles at one of the calls
    mailbox = a_mailbox("throttled")
    simulator.throttle(mailbox, "2", operation=operation)
    first, *others = emails(4, mailbox)

    # When it has more to send meanwhile
    world.publish(first)
    [refused_at] = world.wait_until("it is throttled", lambda: _refused_at(simulator, mailbox))
    world.publish(*others)

    # Then nobody calls it until then, and each goes out once
    known = settled(world, [first, *others])
    assert {each.attempt_count for each in known.values()} == {1}
    assert_each_left_once(world, known.values())
    assert min(at for at in arrived(world, mailbox) if at > refused_at) - refused_at >= timedelta(seconds=2)
