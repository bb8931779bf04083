"""What no actor can work on, put on the actors' queues: kept with its body, and in nobody's way."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

import orjson
import pytest
from fleet_support import a_mailbox, an_email, assert_each_left_once, put, settled_one, take_all

from sandbox.world import World

#: A copy that comes later than the wake-up which tells of it is read by the sweep of the next minute.
A_SWEEP = timedelta(seconds=75)


def _message(actor_name: str = "send_plain", queue_name: str = "send_plain", **changes: Any) -> bytes:
    kwargs = {"incoming_email_id": str(uuid.uuid4()), "attempt": 1}
    message = {
        "queue_name": queue_name,
        "actor_name": actor_name,
        "args": [],
        "kwargs": kwargs,
        "options": {},
        "message_id": str(uuid.uuid4()),
        "message_timestamp": 1_700_000_000_000,
    }
    return orjson.dumps(message | changes)


def _to(actor_name: str, queue_name: str = "send_plain", **kwargs: Any) -> bytes:
    return _message(actor_name, queue_name, kwargs=kwargs)


FOREIGN = {
    "no JSON": ("send_plain", b"hello \xff"),
    "nothing": ("send_plain", b""),
    "a list": ("send_plain", b"[1, 2]"),
    "an object": ("send_plain", b'{"hello": "world"}'),
    "a number": ("send_plain", b"17"),
    "NUL": ("send_plain", b"\0"),
    "an unknown actor": ("send_plain", _message("no_such_actor")),
    "another queue's actor": ("send_plain", _message("no_such_actor", queue_name="elsewhere")),
    "an argument too many": ("send_plain", _message(args=["a", "b", "c"])),
    "an argument too few": ("send_plain", _to("send_plain", attempt=1)),
    "an id that is none": ("send_plain", _to("send_plain", incoming_email_id="ann", attempt=1)),
    "NUL in the id": ("send_plain", _to("send_plain", incoming_email_id="a\0b", attempt=1)),
    "a list as id": ("send_plain", _to("send_plain", incoming_email_id=[1], attempt=1)),
    "a word as attempt": ("send_plain", _to("send_plain", incoming_email_id=str(uuid.uuid4()), attempt="one")),
    "too large an attempt": ("send_plain", _to("send_plain", incoming_email_id=str(uuid.uuid4()), attempt=2**40)),
    "a list as actor": ("send_plain", _message(actor_name=["send_plain"])),  # type: ignore[arg-type]
    "nothing as actor": ("send_plain", _message(actor_name=None)),  # type: ignore[arg-type]
    "a number as queue": ("send_plain", _message(queue_name=17)),  # type: ignore[arg-type]
    "a number as options": ("send_plain", _message(options=17)),
    "a number as arguments": ("send_plain", _message(kwargs=17)),
    "to be held for a century": ("send_plain", _message(options={"eta": 4_900_000_000_000})),
    "for the uploads": ("send_attached", b"hello"),
    "for the archive": ("backup", _to("backup_email", "backup", incoming_email_id="ann", attempt=1)),
    "for the archive, several": ("backup", _to("backup_emails", "backup", backups=17)),
    "in the wrong queue": ("backup", _to("send_plain", incoming_email_id=str(uuid.uuid4()), attempt=1)),
    "for the scheduler": ("scheduler", _to("acknowledge_receipt", "scheduler", receipts=[["ann", "one"]])),
    "receipts that are none": ("scheduler", _to("acknowledge_receipt", "scheduler", receipts=17)),
    "for housekeeping": ("maintenance", b"hello"),
}


@pytest.fixture(scope="module")
def marked(world: World) -> dict[str, bytes]:
    """The bodies, each put on its queue once."""
    for queue, body in FOREIGN.values():
        put(world, queue, body)
    return {what: body for what, (_, body) in FOREIGN.items()}


@pytest.mark.parametrize("what", FOREIGN)
def test_it_is_in_the_table_with_its_body(world: World, marked: dict[str, bytes], what: str) -> None:
    queue = FOREIGN[what][0]
    sql = "SELECT status, reason FROM dlq WHERE body = %(body)s AND queue_name = %(queue)s"

    found = world.wait_until("it is mirrored", lambda: world.rows(sql, {"body": marked[what], "queue": queue}), A_SWEEP)

    assert [status for status, _ in found] == ["open"]
    assert found[0][1] in ("unreadable", "actor_failed")


def test_rabbitmq_keeps_each_in_the_queue_for_dead_letters(world: World, marked: dict[str, bytes]) -> None:
    kept: set[bytes] = set()

    def all_kept() -> bool:
        for queue in {queue for queue, _ in FOREIGN.values()}:
            kept.update(body for _, body in take_all(world, f"{queue}.XQ"))
        return kept >= set(marked.values())

    world.wait_until("each is dead-lettered", all_kept)


def test_the_workers_go_on(world: World, marked: dict[str, bytes]) -> None:
    email = an_email(a_mailbox())
    world.publish(email)
    assert_each_left_once(world, [settled_one(world, email)])
    assert world.fleet.dead == []
