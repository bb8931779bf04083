"""However the answer to a send is lost, and whichever way it is sent: it is looked for before it is sent again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fleet_support import Fate, a_mailbox, an_attachment, an_email, assert_each_left_once, plain_send, settled
from worlds import Worlds

from sandbox.world import World
from simulator.control import Simulator

Fault = Callable[[Simulator, str, str], None]

#: What Graph does to one send of a mailbox, and whether it had sent the mail.
LOST: dict[str, tuple[Fault, bool]] = {
    "the connection closes after the send": (lambda g, m, op: g.lose_next_answer(m, op), True),
    "504 after the send": (lambda g, m, op: g.fail(504, executed=True, mailbox=m, operation=op), True),
    "504 without JSON after the send": (
        lambda g, m, op: g.fail(504, executed=True, mailbox=m, operation=op, body="html"),
        True,
    ),
    "504 instead of the send": (lambda g, m, op: g.fail(504, mailbox=m, operation=op), False),
    "500 after the send": (lambda g, m, op: g.fail(500, executed=True, mailbox=m, operation=op), True),
    "503 after the send": (lambda g, m, op: g.fail(503, executed=True, mailbox=m, operation=op), True),
    "408 after the send": (lambda g, m, op: g.fail(408, executed=True, mailbox=m, operation=op), True),
    "a reset instead of the send": (lambda g, m, op: g.reset_connection(m, op), False),
    "silence after the send": (lambda g, m, op: g.hang(m, op, executed=True), True),
    "silence instead of the send": (lambda g, m, op: g.hang(m, op, executed=False), False),
    "twice a reset instead of the send": (lambda g, m, op: g.reset_connection(m, op, times=2), False),
    "the lookup fails as well": (
        lambda g, m, op: (g.lose_next_answer(m, op), g.fail(500, mailbox=m, operation="find"))[0],
        True,
    ),
    "the lookup is throttled": (
        lambda g, m, op: (g.lose_next_answer(m, op), g.throttle(m, "1", operation="find"))[0],
        True,
    ),
}
ROUTES = ["plain", "attached"]


@pytest.fixture(scope="module")
def world(worlds: Worlds, way: str) -> World:
    return worlds.get({"SEND_PLAIN_VIA": way})


@pytest.fixture(scope="module")
def lost(world: World, simulator: Simulator) -> dict[tuple[str, str], Fate]:
    """What became of one email for each loss and route."""
    given: dict[tuple[str, str], dict[str, Any]] = {}
    for what, (fault, _) in LOST.items():
        for route in ROUTES:
            mailbox = a_mailbox("lost")
            fault(simulator, mailbox, plain_send(world) if route == "plain" else "send_draft")
            attachments = [an_attachment(simulator, 1000)] if route == "attached" else None
            given[what, route] = an_email(mailbox, attachments=attachments)
    world.publish(*given.values())
    known = settled(world, given.values())
    return {key: known[email["publisher_message_id"]] for key, email in given.items()}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("what", LOST)
def test_it_leaves_once(world: World, lost: dict[tuple[str, str], Fate], what: str, route: str) -> None:
    known = lost[what, route]
    assert (known.status, known.archived) == ("processed", True)
    assert_each_left_once(world, [known])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("what", LOST)
def test_what_was_seen_is_kept_as_evidence(
    world: World, lost: dict[tuple[str, str], Fate], what: str, route: str
) -> None:
    evidence = lost[what, route].evidence
    asked = [each.get("asked") for each in evidence]
    assert asked[0] == "send"
    assert "messages by tag" in asked
    had_been_sent = LOST[what][1]
    found = [each["seen"] for each in evidence if each.get("asked") == "messages by tag"]
    if had_been_sent:
        assert found[-1] == "1 sent, 0 drafts"
    elif route == "attached" or plain_send(world) == "send_draft":
        assert found[-1] == "0 sent, 1 drafts"
    else:
        assert found[-1] == "0 sent, 0 drafts"


def test_an_accepted_send_with_retry_after_counts_as_sent(world: World, simulator: Simulator) -> None:
    mailbox = a_mailbox()
    simulator.accept_with_retry_after(mailbox, "5", plain_send(world))
    email = an_email(mailbox)

    world.publish(email)

    known = settled(world, [email])[email["publisher_message_id"]]
    assert (known.status, known.attempt_count) == ("processed", 1)
    assert [each["seen"] for each in known.evidence] == ["202"]
    assert_each_left_once(world, [known])
