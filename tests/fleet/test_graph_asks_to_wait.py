"""Mailboxes that Graph wants left alone, or refuses: nobody calls them meanwhile, and no attempt is spent on waiting.

Everything is published at once, since some of the waits are half a minute long.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from email.utils import format_datetime
from typing import Any, NamedTuple

import pytest
from fleet_support import (
    a_mailbox,
    an_email,
    arrived,
    assert_each_left_once,
    emails,
    fate,
    now,
    plain_send,
    settled,
    settled_one,
)

from sandbox.world import World
from simulator.control import Simulator


def _date() -> str:
    return format_datetime(now() + timedelta(seconds=6), usegmt=True)


#: What Graph says, and for how many seconds it wants to be left alone at least. A date has no fractions.
FORMS: dict[str, tuple[Callable[[], str | None], float]] = {
    "seconds": (lambda: "3", 3),
    "a fraction": (lambda: "0.249", 0.249),
    "a list": (lambda: "0,4", 4),
    "a date": (_date, 2.5),
    "nothing": (lambda: None, 29.5),
    "no sense": (lambda: "soon", 29.5),
}
HALF_A_MINUTE = 50


class Throttled(NamedTuple):
    """A mailbox that Graph throttled once, and what was to be sent from it before and during the pause."""

    mailbox: str
    emails: list[dict[str, Any]]
    refused_at: datetime


def _refusal(simulator: Simulator, mailbox: str, status: str) -> datetime | None:
    found = [datetime.fromisoformat(each["at"]) for each in simulator.requests(mailbox) if each["status"] == status]
    return found[0] if found else None


@pytest.fixture(scope="module")
def throttled(world: World, simulator: Simulator) -> dict[str, Throttled]:
    mailboxes = {form: a_mailbox("throttled") for form in FORMS}
    first = {form: an_email(mailbox) for form, mailbox in mailboxes.items()}
    for form, mailbox in mailboxes.items():
        simulator.throttle(mailbox, FORMS[form][0](), operation=plain_send(world))
    world.publish(*first.values())
    found = {}
    for form, mailbox in mailboxes.items():
        refused_at = world.wait_until("it is throttled", lambda mailbox=mailbox: _refusal(simulator, mailbox, "429"))
        found[form] = Throttled(mailbox, [first[form], *emails(3, mailbox)], refused_at)
    world.publish(*(email for each in found.values() for email in each.emails[1:]))
    return found


@pytest.fixture(scope="module")
def denied(world: World, simulator: Simulator) -> list[dict[str, Any]]:
    """Two emails of a mailbox that refused the first and would take both now."""
    mailbox = a_mailbox("denied")
    simulator.deny(mailbox)
    first, second = emails(2, mailbox)
    world.publish(first)
    world.wait_until("it is refused", lambda: _refusal(simulator, mailbox, "403"))
    world.publish(second)
    simulator.allow(mailbox)
    return [first, second]


def test_other_mailboxes_are_not_held_back(
    world: World, throttled: dict[str, Throttled], denied: list[dict[str, Any]]
) -> None:
    began = now()
    other = an_email(a_mailbox("other"))
    world.publish(other)
    known = settled_one(world, other)

    [delivery] = world.simulator.deliveries(tag=known.id)
    assert datetime.fromisoformat(delivery["at"]) - began < timedelta(seconds=2)


@pytest.mark.parametrize("form", FORMS)
def test_a_throttled_mailbox_is_left_alone_by_all_processes_until_then(
    world: World, throttled: dict[str, Throttled], form: str
) -> None:
    mailbox, given, refused_at = throttled[form]

    known = settled(world, given, HALF_A_MINUTE)

    assert_each_left_once(world, known.values())
    later = [at for at in arrived(world, mailbox) if at > refused_at]
    assert min(later) - refused_at >= timedelta(seconds=FORMS[form][1])
    assert min(later) - refused_at < timedelta(seconds=FORMS[form][1] + 5)
    assert mailbox not in world.simulator.request_counts()["early_retries"]


@pytest.mark.parametrize("form", FORMS)
def test_waiting_for_graph_costs_no_attempt(world: World, throttled: dict[str, Throttled], form: str) -> None:
    known = settled(world, throttled[form].emails, HALF_A_MINUTE)
    assert {each.attempt_count for each in known.values()} == {1}


def test_a_mailbox_that_refused_us_sends_its_mail_once_it_no_longer_does(
    world: World, denied: list[dict[str, Any]]
) -> None:
    known = settled(world, denied, HALF_A_MINUTE)
    assert {each.status for each in known.values()} == {"processed"}
    assert_each_left_once(world, known.values())
    # Only the first met the refusal; the second waited for it to end.
    assert [known[email["publisher_message_id"]].attempt_count for email in denied] == [2, 1]


def test_an_expired_token_is_replaced_without_spending_an_attempt(world: World, simulator: Simulator) -> None:
    mailbox = a_mailbox()
    simulator.expire_token(mailbox, operation=plain_send(world))
    email = an_email(mailbox)

    world.publish(email)

    known = settled_one(world, email)
    assert (known.status, known.attempt_count, known.last_error) == ("processed", 1, None)
    assert [each["status"] for each in simulator.requests(mailbox, plain_send(world))] == ["401", "202"]
    assert_each_left_once(world, [known])


def test_a_full_service_is_tried_again_after_its_wait(world: World, simulator: Simulator) -> None:
    # Given a mailbox whose server is busy for two seconds, with the error that is no answer to the send
    mailbox = a_mailbox()
    simulator.unavailable(mailbox, "2", operation="create_draft")
    email = an_email(mailbox, attachments=[{"name": "a", "size": 5, "urlOrId": simulator.file_url(5)}])

    # When it is to send a mail with a file
    world.publish(email)
    refused_at = world.wait_until("it is refused", lambda: _refusal(simulator, mailbox, "503"))

    # Then it is left alone for so long
    known = settled_one(world, email)
    assert_each_left_once(world, [known])
    assert min(at for at in arrived(world, mailbox) if at > refused_at) - refused_at >= timedelta(seconds=2)
    assert fate(world, email) == known
