"""Housekeeping: no dead letter is missed whatever it is, and what has expired is deleted."""

from __future__ import annotations

import secrets

import orjson
import pika
import pytest
import support
from support import Fleet, rows, store, table, wait_until

import actors
import runtime
from actors import maintenance
from broker import MIRROR_QUEUE
from crash_points import CrashPoint
from models import dead_letters
from models.dead_letters import Copy
from outbox import Unconfirmed

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet


def dead_letter(fleet: Fleet, body: bytes, queue: str = "send_plain") -> None:
    """Have RabbitMQ dead-letter a message, as it does when a worker refuses it."""
    before = waiting(fleet)
    fleet.channel.basic_publish("", queue, body, pika.BasicProperties())
    delivery = wait_until("it is there", lambda: taken if (taken := fleet.channel.basic_get(queue))[0] else None)
    fleet.channel.basic_reject(delivery[0].delivery_tag, requeue=False)
    wait_until("it is mirrored", lambda: waiting(fleet) > before)


def waiting(fleet: Fleet) -> int:
    return int(fleet.channel.queue_declare(MIRROR_QUEUE, passive=True).method.message_count)


def test_a_dead_letter_that_no_actor_recorded_gets_its_row_with_its_body(fleet: Fleet) -> None:
    # Given
    id = store()
    message = actors.send_plain.message(incoming_email_id=id, attempt=1)
    dead_letter(fleet, message.encode())
    # When
    actors.mirror_dead_letters()
    # Then
    (letter,) = table("dlq")
    assert (letter["incoming_email_id"], letter["message_id"]) == (id, message.message_id)
    assert (letter["queue_name"], letter["actor_name"], letter["reason"]) == (
        "send_plain",
        "send_plain",
        "actor_failed",
    )
    assert bytes.fromhex(letter["body"][2:]) == message.encode()
    assert waiting(fleet) == 0


def test_the_copy_of_a_recorded_failure_completes_its_row(fleet: Fleet) -> None:
    fleet.graph.fail(400, "ErrorInvalidRecipients", operation="send_mail")
    store()
    fleet.schedule()
    (message,) = fleet.take("send_plain")
    assert support.work(message) == "dead-lettered"
    dead_letter(fleet, message.encode())
    actors.mirror_dead_letters()
    (letter,) = table("dlq")
    assert (letter["reason"], letter["mirrored_at"] is not None) == ("invalid_recipient", True)


POISON = {
    "no JSON": b"\xff\xfe\x00",
    "no message": b"[1, 2]",
    "empty": b"",
    "no arguments": b'{"message_id": "x"}',
    "odd fields": orjson.dumps({"message_id": {"a": 1}, "actor_name": 5, "kwargs": {"incoming_email_id": 7}}),
    "NUL": orjson.dumps({"message_id": "a\x00b", "actor_name": "a\x00b", "kwargs": {"incoming_email_id": "\x00"}}),
    "unknown email": orjson.dumps({"kwargs": {"incoming_email_id": "01900000-0000-7000-8000-000000000000"}}),
    "large": b"x" * 1_500_000,
    "an id that no index holds": orjson.dumps(
        {"message_id": secrets.token_hex(20_000), "actor_name": "x", "kwargs": {}, "queue_name": "ingest"}
    ),
}


def test_whatever_was_dead_lettered_is_kept_and_does_not_stop_the_mirror(fleet: Fleet) -> None:
    for body in POISON.values():
        dead_letter(fleet, body, queue="ingest")
    actors.mirror_dead_letters()
    letters = table("dlq")
    assert {(letter["queue_name"], letter["status"], letter["incoming_email_id"]) for letter in letters} == {
        ("ingest", "open", None)
    }
    kept = {bytes.fromhex(letter["body"][2:]) for letter in letters}
    assert kept == {body[:1_000_000] for body in POISON.values()}
    assert waiting(fleet) == 0


def test_copies_are_read_in_batches_that_are_bounded_by_bytes_too(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    sizes, store_copies = [], dead_letters.mirror

    def mirror(copies: list[Copy]) -> list[Copy]:
        sizes.append(len(copies))
        return store_copies(copies)

    monkeypatch.setattr(maintenance, "_BATCH_BYTES", 250_000)
    monkeypatch.setattr(dead_letters, "mirror", mirror)
    for n in range(5):
        dead_letter(fleet, bytes([n]) * 100_000)
    # When
    actors.mirror_dead_letters()
    # Then
    assert sizes == [3, 2]
    assert len(table("dlq")) == 5


class Died(Exception):
    """Raised in the place of a death of the process."""


def test_of_foreign_messages_that_are_all_alike_each_has_its_row_whatever_dies(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given some, and a process that dies after it has stored their rows, before it has acknowledged them
    def die(point: CrashPoint) -> None:
        if point is CrashPoint.MIRROR_STORED:
            raise Died

    for _ in range(3):
        dead_letter(fleet, b"who am I?")
    with monkeypatch.context() as patched:
        patched.setattr(runtime, "crash_point", die)
        with pytest.raises(Died):
            actors.mirror_dead_letters()
    wait_until("RabbitMQ delivers again", lambda: waiting(fleet) == 3)
    # When they come again, with one that is new
    dead_letter(fleet, b"who am I?")
    actors.mirror_dead_letters()
    # Then
    assert len(table("dlq")) == 4
    assert waiting(fleet) == 0


def test_expired_backups_are_deleted(fleet: Fleet) -> None:
    id = store()
    fleet.send()
    fleet.backup()
    assert len(table("email_backups")) == 1
    actors.purge_expired()
    assert len(table("email_backups")) == 1
    rows("UPDATE email_backups SET expires_at = now()")
    actors.purge_expired()
    assert table("email_backups") == []
    assert support.sending(id) == "sent"


def test_a_rabbitmq_that_cannot_be_reached_is_away_however_the_system_says_so(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(pika, "BlockingConnection", refuse)
    with pytest.raises(Unconfirmed):
        actors.mirror_dead_letters()


def test_before_the_tables_are_made_the_mirror_fails_without_a_dead_letter_of_its_own(fleet: Fleet) -> None:
    # Given
    dead_letter(fleet, b"no message", queue="ingest")
    rows("ALTER TABLE dlq RENAME TO gone")
    # When
    try:
        assert support.work(actors.mirror_dead_letters.message()) == "done"
    finally:
        rows("ALTER TABLE gone RENAME TO dlq")
    # Then the copy is there for the next turn
    wait_until("it is back", lambda: waiting(fleet) == 1)
    actors.mirror_dead_letters()
    assert len(table("dlq")) == 1
