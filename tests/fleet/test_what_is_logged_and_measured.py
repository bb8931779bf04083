"""What an operator reads: lines with the ids and without what people write to each other, and the same in numbers."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests
from fleet_support import (
    ADDRESS_MARK,
    BODY_MARK,
    SUBJECT_MARK,
    a_mailbox,
    an_attachment,
    an_email,
    plain_send,
    put,
    settled_one,
)
from worlds import Worlds

from sandbox.world import World
from simulator.control import Simulator

STEPS = ["received", "dispatched", "claimed", "drafted", "uploaded", "sent", "archived"]


@pytest.fixture(scope="module")
def world(worlds: Worlds) -> World:
    """A fleet whose workers' metrics are served."""
    return worlds.get(measured=True)


@pytest.fixture(scope="module")
def email(world: World, simulator: Simulator) -> dict[str, Any]:
    """An email with a file whose life is over, beside others that met trouble of every kind."""
    mailboxes = [a_mailbox() for _ in range(6)]
    simulator.fail(400, "ErrorInvalidRecipients", mailbox=mailboxes[0], message=f"{ADDRESS_MARK} is no recipient")
    simulator.lose_next_answer(mailboxes[1], plain_send(world))
    simulator.fail(500, mailbox=mailboxes[2], operation="create_draft", body="html", message=BODY_MARK)
    simulator.fail(418, "NobodyKnows", mailbox=mailboxes[3], operation="upload_range", message=BODY_MARK)
    simulator.break_mime(mailboxes[4])
    attached = [an_email(each, attachments=[an_attachment(simulator, 3_500_000)]) for each in mailboxes[2:4]]
    whole = an_email(mailboxes[5], attachments=[an_attachment(simulator, 3_500_000), an_attachment(simulator, 10)])
    rest = [an_email(mailbox) for mailbox in (mailboxes[0], mailboxes[1], mailboxes[4])]
    world.publish(*attached, *rest, whole, _spoilt(), orjson.dumps(_spoilt()) + b"}")
    for queue in ("send_plain", "send_attached", "backup", "scheduler", "maintenance"):
        put(world, queue, orjson.dumps(_spoilt()), BODY_MARK.encode())
    put(world, "send_plain", _misaddressed())
    for each in (*attached, *rest, whole):
        settled_one(world, each, 60)
    return whole


def _spoilt() -> dict[str, Any]:
    return an_email(a_mailbox(), **{f"x-{BODY_MARK}": 1}, subject=17)


def _misaddressed() -> bytes:
    """A message for an actor whose arguments are an email instead of its id."""
    kwargs = {"incoming_email_id": orjson.dumps(_spoilt()).decode(), "attempt": BODY_MARK}
    given = {"queue_name": "send_plain", "actor_name": "send_plain", "args": [], "kwargs": kwargs, "options": {}}
    return orjson.dumps(given | {"message_id": "misaddressed", "message_timestamp": 1_700_000_000_000})


def _lines(world: World) -> list[tuple[str, bytes]]:
    return [(name, line) for name, log in world.fleet.logs.items() for line in log.read_bytes().splitlines()]


def test_every_line_is_json(world: World, email: dict[str, Any]) -> None:
    unreadable = [(name, line) for name, line in _lines(world) if not line.startswith(b"{")]
    assert unreadable == []
    assert all({"event", "level", "timestamp"} <= orjson.loads(line).keys() for _, line in _lines(world))


def test_each_step_of_an_emails_life_is_one_line_with_its_ids(world: World, email: dict[str, Any]) -> None:
    known = settled_one(world, email)
    told = [orjson.loads(line) for _, line in _lines(world) if known.id.encode() in line]
    steps = [line["event"] for line in sorted(told, key=lambda line: line["timestamp"])]
    # The worker may tell that it has the email before the scheduler tells that it has sent it there.
    told_first = [step for step in dict.fromkeys(steps) if step != "dispatched"]
    assert told_first == [step for step in STEPS if step != "dispatched"]
    assert "dispatched" in steps
    assert {line["publisher_message_id"] for line in told} == {known.publisher_message_id}
    assert {line["incoming_email_id"] for line in told} == {known.id}


def _secrets(world: World) -> dict[str, re.Pattern[bytes]]:
    environment = world.environment
    password = environment["DATABASE_URL"].split("@")[0].rsplit(":", 1)[1]
    literal = {
        "body": BODY_MARK,
        "address": ADDRESS_MARK,
        "subject": SUBJECT_MARK,
        "client secret": environment["GRAPH_CLIENT_SECRET"],
        "database password": password,
        "archive key": environment["BACKUP_KEYS"].split(":")[1],
    }
    patterns = {"token": rb"eyJ[A-Za-z0-9_-]{20,}", "authorization": rb"Bearer ", "upload URL": rb"authtoken"}
    return {what: re.compile(re.escape(text).encode()) for what, text in literal.items()} | {
        what: re.compile(pattern) for what, pattern in patterns.items()
    }


def test_no_line_of_this_run_tells_what_people_write_to_each_other(world: World, email: dict[str, Any]) -> None:
    leaks = [
        (what, name, line[:300])
        for name, line in _lines(world)
        for what, secret in _secrets(world).items()
        if secret.search(line)
    ]
    assert leaks == []


def _command_lines(world: World) -> list[bytes]:
    """The command line of every process of the fleet, whoever started it."""
    database = world.environment["DATABASE_URL"].encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if database in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes())
    return found


def test_no_command_line_of_a_process_tells_a_secret(world: World, email: dict[str, Any]) -> None:
    lines = _command_lines(world)
    assert len(lines) >= len(world.fleet.logs)
    assert [(what, line) for line in lines for what, secret in _secrets(world).items() if secret.search(line)] == []


def _metrics(world: World, name: str) -> str:
    url = f"http://127.0.0.1:{world.fleet.ports[name].metrics_port}/metrics"
    with requests.Session() as session:
        session.trust_env = False
        return session.get(url, timeout=5).text


@pytest.mark.parametrize(
    ("name", "sample"),
    [
        ("bridge.1", 'mailfleet_emails_total{step="received"}'),
        ("scheduler.1", 'mailfleet_dispatched_total{route="attachment"}'),
        ("send_plain.1", 'mailfleet_emails_total{step="in doubt"}'),
        ("send_attached.1", 'mailfleet_emails_total{step="sent"}'),
        ("backup.1", 'mailfleet_emails_total{step="archived"}'),
    ],
)
def test_each_process_counts_what_it_did(world: World, email: dict[str, Any], name: str, sample: str) -> None:
    [line] = [line for line in _metrics(world, name).splitlines() if line.startswith(sample)]
    assert float(line.rpartition(" ")[2]) >= 1
