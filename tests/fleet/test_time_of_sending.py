"""Mail that is not to be sent yet, or no longer."""

from __future__ import annotations

from datetime import datetime, timedelta

from fleet_support import (
    a_mailbox,
    an_email,
    assert_each_left_once,
    deliveries,
    events_of,
    now,
    plain_send,
    settled,
    settled_one,
)

from sandbox.world import World
from simulator.control import Simulator


def test_an_email_is_not_sent_before_its_time(world: World) -> None:
    send_at = now() + timedelta(seconds=3)
    given = [
        an_email(a_mailbox(), send_at=send_at.isoformat()),
        an_email(a_mailbox(), send_at=(now() - timedelta(days=1)).isoformat()),
    ]
    world.publish(*given)

    known = settled(world, given)

    assert_each_left_once(world, known.values())
    later, at_once = (known[email["publisher_message_id"]].id for email in given)
    [delivery] = world.simulator.deliveries(tag=later)
    left_at = datetime.fromisoformat(delivery["at"])
    assert send_at <= left_at < send_at + timedelta(seconds=2)
    [delivery] = world.simulator.deliveries(tag=at_once)
    assert datetime.fromisoformat(delivery["at"]) < send_at


def test_an_email_that_came_too_late_expires(world: World) -> None:
    email = an_email(a_mailbox(), expires_at=(now() - timedelta(seconds=1)).isoformat())

    world.publish(email, correlation_id="too late")

    known = settled_one(world, email)
    assert (known.status, deliveries(world, [known])) == ("expired", {known.publisher_message_id: 0})
    [event] = world.wait_until("its publisher is told", lambda: events_of(world, known, "SendEmailExpired"))
    assert (event.body["status"], event.correlation_id) == ("expired", "too late")


def test_an_email_that_waits_too_long_expires(world: World, simulator: Simulator) -> None:
    # Given a mailbox that Graph wants left alone for three seconds
    mailbox = a_mailbox()
    simulator.throttle(mailbox, "3", operation=plain_send(world))

    # When an email may wait for one
    email = an_email(mailbox, expires_at=(now() + timedelta(seconds=1.5)).isoformat())
    world.publish(email)

    # Then it expires and never leaves
    known = settled_one(world, email)
    assert known.status == "expired"
    another = an_email(mailbox)
    world.publish(another)
    assert_each_left_once(world, [settled_one(world, another)])
    assert deliveries(world, [known]) == {known.publisher_message_id: 0}
