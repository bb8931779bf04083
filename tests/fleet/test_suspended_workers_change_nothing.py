"""A machine stands still for longer than its leases while another takes over; woken, it changes and asks nothing.

Every process of the first machine is frozen in the middle of something, at one instant: in a call that Graph answers
meanwhile, in a statement that takes effect meanwhile, between two pieces of a file. RabbitMQ gives the machine up, the
second does the work, and then the first is woken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
from fleet_support import (
    Fate,
    a_mailbox,
    an_attachment,
    an_email,
    assert_each_left_once,
    attached_sha256,
    events_of,
    now,
    plain_send,
    settled,
)
from freezing import Gate, Line
from worlds import Worlds

from models.database import IDLE_IN_TRANSACTION_TIMEOUT_MILLISECONDS
from sandbox.fleet import Fleet
from sandbox.world import PROCFILE, World
from simulator.control import Simulator

#: A call may be held for as long as it takes to have all of them held, and a lease outlasts a call.
SETTINGS: dict[str, str | int] = {"GRAPH_TIMEOUT_SECONDS": 15, "LEASE_SECONDS": 30, "MAX_ATTEMPTS": 8}
TYPES = ("send_attached", "send_plain", "backup", "scheduler", "bridge", "clock")
#: PostgreSQL ends a transaction that stands still; the rest is for the sweep that waited for it.
HELD_UP = timedelta(milliseconds=IDLE_IN_TRANSACTION_TIMEOUT_MILLISECONDS) + timedelta(seconds=5)

SMALL_BYTES = 50_000
LARGE_BYTES = 4_500_000
SLOW_BYTES, SLOW_BYTES_PER_SECOND = 1_200_000, 200_000

Email = dict[str, Any]
#: Asks Graph to hold a call for the mailbox, and returns the email that meets it.
Hold = Callable[[Simulator, str, str], Email]


def _its_send_is_answered(graph: Simulator, mailbox: str, send: str) -> Email:
    graph.hang(mailbox, send, executed=True)
    return an_email(mailbox)


def _its_send_is_cut_off(graph: Simulator, mailbox: str, send: str) -> Email:
    graph.hang(mailbox, send, executed=False)
    return an_email(mailbox)


def _it_is_looked_for(graph: Simulator, mailbox: str, send: str) -> Email:
    graph.lose_next_answer(mailbox, send)
    graph.hang(mailbox, "find", executed=True)
    return an_email(mailbox)


def _attached(operation: str, *sizes: int) -> Hold:
    def hold(graph: Simulator, mailbox: str, _send: str) -> Email:
        graph.hang(mailbox, operation, executed=True)
        return an_email(mailbox, attachments=[an_attachment(graph, size) for size in sizes])

    return hold


def _its_copy_is_fetched(graph: Simulator, mailbox: str, _send: str) -> Email:
    graph.hang(mailbox, "mime", executed=True)
    return an_email(mailbox)


#: What Graph answers while the worker is frozen, and in which process that is.
CALLS: dict[str, tuple[str, Hold]] = {
    "its send is answered": ("send_plain", _its_send_is_answered),
    "its send is cut off": ("send_plain", _its_send_is_cut_off),
    "it is looked for after a lost answer": ("send_plain", _it_is_looked_for),
    "its draft is made": ("send_attached", _attached("create_draft", SMALL_BYTES)),
    "the first of two files is attached": ("send_attached", _attached("attach", SMALL_BYTES, SMALL_BYTES)),
    "the first of two ranges is up": ("send_attached", _attached("upload_range", LARGE_BYTES, SMALL_BYTES)),
    "the last range is up": ("send_attached", _attached("upload_range", 3_500_000)),
    "its draft is sent": ("send_attached", _attached("send_draft", LARGE_BYTES, SMALL_BYTES)),
    "its copy is fetched": ("backup", _its_copy_is_fetched),
}
#: What is in the middle of a statement or of a file.
OTHERS = {
    "it is claimed": "send_plain",
    "the token for its send is renewed": "send_plain",
    "its slow file is read": "send_attached",
    "it is dispatched": "scheduler",
    "it is stored": "bridge",
    "it is delivered": "bridge",
}
FROZEN_IN = {what: type for what, (type, _) in CALLS.items()} | OTHERS
UNDER_A_LEASE = [what for what, type in FROZEN_IN.items() if type.startswith("send_")]


class Woken(NamedTuple):
    """The first machine's world after it was woken, the second machine's fleet, and what there was to be seen."""

    world: World
    second: Fleet
    emails: dict[str, Email]
    fates: dict[str, Fate]
    frozen_at: datetime
    #: The tables' rows and Graph's record before the first machine was woken.
    rows: dict[str, list[str]]
    requests: dict[str, list[str]]

    def mailbox(self, what: str) -> str:
        return str(self.emails[what]["from"])


@pytest.fixture(scope="module")
def woken(worlds: Worlds, servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Woken]:
    with ExitStack() as stack:
        line = stack.enter_context(Line(servers["RABBITMQ_URL"]))
        world = worlds.get(SETTINGS | {"RABBITMQ_URL": line.url}, only=TYPES)
        stack.callback(worlds.close)
        gate = stack.enter_context(Gate(world.environment["DATABASE_URL"]))

        emails = _bring_all_to_a_halt(world, gate)
        frozen_at = _freeze(world, line)
        gate.open()
        world.simulator.clear_faults()  # which lets go of the calls, too

        environment = {**world.environment, "RABBITMQ_URL": servers["RABBITMQ_URL"]}
        directory = tmp_path_factory.mktemp("second-machine")
        second = stack.enter_context(Fleet(PROCFILE, environment, directory, only=TYPES))
        by_id = settled(world, emails.values())
        known = {what: by_id[email["publisher_message_id"]] for what, email in emails.items()}
        world.wait_until("all events are published", lambda: world.count(_UNPUBLISHED) == 0)
        result = Woken(world, second, emails, known, frozen_at, _rows(world, known), _requests(world, emails))
        for type in TYPES:
            world.fleet.resume(type)
        yield result


_UNPUBLISHED = "SELECT count(*) FROM outbox_events WHERE published_at IS NULL"


def _bring_all_to_a_halt(world: World, gate: Gate) -> dict[str, Email]:
    """Publish an email for each place at which a process is to be frozen, and return when all have got there."""
    graph, send = world.simulator, plain_send(world)
    emails = {what: hold(graph, a_mailbox("frozen"), send) for what, (_, hold) in CALLS.items()}
    emails |= {what: an_email(a_mailbox("frozen")) for what in OTHERS}
    slow = an_attachment(graph, SLOW_BYTES, slow=SLOW_BYTES_PER_SECOND)
    emails["its slow file is read"] |= {"attachments": [slow]}
    gate.stop(emails["it is claimed"]["from"], "UPDATE", "NEW.status = 'processing'")
    gate.stop(emails["it is dispatched"]["from"], "UPDATE", "NEW.status = 'dispatched'")
    gate.stop(emails["it is stored"]["from"], "INSERT")

    world.publish(*(emails[what] for what in CALLS))
    world.wait_until("Graph holds the calls of the workers that send", lambda: len(graph.faults()) <= 1)
    world.publish(emails["it is claimed"])
    world.wait_until("Graph holds the archive's as well", lambda: graph.faults() == [])
    world.wait_until("a worker stands still", lambda: gate.stopped() == 1)
    refused = emails["the token for its send is renewed"]
    graph.expire_token(refused["from"], send)
    graph.hang(operation="token", executed=True)
    world.publish(refused)
    world.wait_until("the authority holds the renewal", lambda: graph.faults() == [])
    world.publish(emails["its slow file is read"])
    world.wait_until("the file is being read", lambda: world.rows(_READING, SETTINGS | emails["its slow file is read"]))
    world.publish(emails["it is dispatched"])
    world.wait_until("the scheduler stands still", lambda: gate.stopped() == 2)
    world.publish(emails["it is stored"])
    world.wait_until("the bridge stands still", lambda: gate.stopped() == 3)
    world.publish(emails["it is delivered"])
    return emails


#: The lease of a worker that reads is renewed with each piece.
_READING = """
    SELECT 1 FROM incoming_emails WHERE publisher_message_id = %(publisher_message_id)s AND draft_id IS NOT NULL
      AND lease_until - make_interval(secs => %(LEASE_SECONDS)s) > updated_at + interval '100 milliseconds'
"""


def _freeze(world: World, line: Line) -> datetime:
    for type in TYPES:
        world.fleet.suspend(type)
    line.cut()
    return now()


def _rows(world: World, known: dict[str, Fate]) -> dict[str, list[str]]:
    """Return all that the tables say of these emails, but for the receipts: whoever wakes did have them in hand."""
    key = {"incoming_emails": "id"}
    return {
        table: [
            row
            for (row,) in world.rows(
                f"SELECT (to_jsonb(t) - '{{compressed_blob}}'::text[])::text FROM {table} t"
                f" WHERE {key.get(table, 'incoming_email_id')} = ANY(%(ids)s::uuid[]) ORDER BY 1",
                {"ids": [fate.id for fate in known.values()]},
            )
        ]
        for table in ("incoming_emails", "file_uploads", "sent_emails", "email_backups", "outbox_events", "dlq")
    }


def _requests(world: World, emails: dict[str, Email]) -> dict[str, list[str]]:
    return {
        what: [each["operation"] for each in world.simulator.requests(email["from"].lower())]
        for what, email in emails.items()
    }


@pytest.fixture(scope="module")
def afterwards(woken: Woken) -> dict[str, Fate]:
    """What became of emails that the first machine had to send without the second, after it was woken."""
    world = woken.world
    world.wait_until("all have noticed", lambda: all(_noticed(woken, what) for what in UNDER_A_LEASE))
    assert woken.second.stop() == []
    given = [an_email(a_mailbox("afterwards")) for _ in range(3)]
    given.append(an_email(a_mailbox("afterwards"), attachments=[an_attachment(world.simulator, SMALL_BYTES)]))
    world.publish(*given)
    return settled(world, given)


def _log_lines(log: Path, incoming_email_id: str) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in log.read_bytes().splitlines() if incoming_email_id.encode() in line]


def _noticed(woken: Woken, what: str) -> list[dict[str, Any]]:
    """Return the lines in which a woken worker says that the email is no longer its own."""
    lines = _log_lines(woken.world.fleet.logs[f"{FROZEN_IN[what]}.1"], woken.fates[what].id)
    return [line for line in lines if line["event"] == "lease lost"]


@pytest.mark.parametrize("what", FROZEN_IN)
def test_it_left_and_was_archived_once(woken: Woken, what: str) -> None:
    known = woken.fates[what]
    assert known.status == "processed"
    assert_each_left_once(woken.world, [known])
    assert len([row for row in woken.rows["email_backups"] if known.id in row]) == 1


@pytest.mark.parametrize("what", FROZEN_IN)
def test_nothing_but_the_whole_mail_is_in_the_mailbox(woken: Woken, what: str) -> None:
    [message] = woken.world.simulator.messages(woken.mailbox(what))
    assert not message["isDraft"]
    [delivery] = woken.world.simulator.deliveries(tag=woken.fates[what].id)
    arrived = sorted((each["name"], each["sha256"]) for each in delivery["attachments"])
    attached = woken.emails[what].get("attachments", [])
    assert arrived == sorted((each["name"], attached_sha256(each)) for each in attached)


@pytest.mark.parametrize("what", UNDER_A_LEASE)
def test_the_woken_worker_notices_that_it_has_lost_its_lease(
    woken: Woken, afterwards: dict[str, Fate], what: str
) -> None:
    assert len(_noticed(woken, what)) == 1


def test_a_scheduler_that_stands_still_holds_the_others_up_for_no_longer_than_a_transaction_may(woken: Woken) -> None:
    lines = _log_lines(woken.second.logs["scheduler.1"], woken.fates["it is dispatched"].id)
    dispatched_at = min(datetime.fromisoformat(line["timestamp"]) for line in lines if line["event"] == "dispatched")
    assert dispatched_at - woken.frozen_at < HELD_UP


def test_the_woken_machine_goes_on_working(woken: Woken, afterwards: dict[str, Fate]) -> None:
    assert woken.world.fleet.dead == []
    assert {each.status for each in afterwards.values()} == {"processed"}
    assert_each_left_once(woken.world, afterwards.values())


def test_the_woken_machine_changes_nothing_in_the_database(woken: Woken, afterwards: dict[str, Fate]) -> None:
    assert _rows(woken.world, woken.fates) == woken.rows


def test_the_woken_machine_asks_graph_for_nothing(woken: Woken, afterwards: dict[str, Fate]) -> None:
    assert _requests(woken.world, woken.emails) == woken.requests


@pytest.mark.parametrize("type", ["SendEmailReceived", "SendEmailSent"])
def test_the_publisher_is_told_once(woken: Woken, afterwards: dict[str, Fate], type: str) -> None:
    told = {what: len(events_of(woken.world, known, type)) for what, known in woken.fates.items()}
    assert told == dict.fromkeys(FROZEN_IN, 1)
