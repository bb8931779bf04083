"""The bridge: a delivery leaves ``send_email`` only when it is stored and told, or rejected and kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import orjson
import pika
import pytest
import support
from strange_properties import STRANGE_PROPERTIES
from support import Fleet, rows, send_email, table, wait_until

import actors.ingest
import bridge
import models
import outbox
import runtime
from actors.ingest import Delivery
from contracts import MAX_DELIVERY_BYTES

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet


@contextmanager
def running(held_bytes: int = bridge.HELD_BYTES) -> Iterator[None]:
    """Let a bridge consume for the length of the block; at its end it has finished what it had in hand."""
    consuming = bridge.Bridge(held_bytes)

    def run() -> None:
        consuming.run()
        models.disconnect()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        consuming.stop()
        thread.join(20)
        assert not thread.is_alive()


def publish(fleet: Fleet, *bodies: bytes, **properties: object) -> None:
    for body in bodies:
        fleet.channel.basic_publish("", runtime.SEND_QUEUE, body, pika.BasicProperties(**properties))


def waiting(fleet: Fleet, queue: str) -> int:
    return int(fleet.channel.queue_declare(queue, passive=True).method.message_count)


def consumers(fleet: Fleet) -> int:
    """How many consume, none if there is no queue: asked over a channel that RabbitMQ may close."""
    channel = fleet.channel.connection.channel()
    try:
        return int(channel.queue_declare(runtime.SEND_QUEUE, passive=True).method.consumer_count)
    except pika.exceptions.ChannelClosedByBroker:
        return 0
    finally:
        if channel.is_open:
            channel.close()


def emails(count: int) -> list[bytes]:
    return [orjson.dumps(send_email(publisher_message_id=f"order-{n}")) for n in range(count)]


def test_every_delivery_is_stored_told_and_acknowledged(fleet: Fleet) -> None:
    # Given more than one batch, every email but the last twice
    headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    publish(fleet, *emails(149), *emails(149), emails(150)[-1], correlation_id="c-1", headers=headers)
    # When
    with running():
        wait_until("all are told", lambda: count("outbox_events WHERE published_at IS NOT NULL") == 150)
    # Then
    assert count("incoming_emails") == 150
    assert waiting(fleet, runtime.SEND_QUEUE) == 0
    assert len(fleet.take_raw("test.events")) == 150
    assert table("incoming_emails")[0]["traceparent"] == headers["traceparent"]


def count(what: str) -> int:
    return int(rows(f"SELECT count(*) FROM {what}")[0][0])


def test_nothing_is_acknowledged_while_postgresql_fails_and_all_is_stored_when_it_is_back(fleet: Fleet) -> None:
    # Given tables that take nothing, as on a server that was made read-only
    publish(fleet, *emails(20))
    name = rows("SELECT current_database()")[0][0]
    rows(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    # When
    try:
        with running():
            wait_until("they were tried", lambda: waiting(fleet, runtime.SEND_QUEUE) < 20)
        wait_until("they are back in the queue", lambda: waiting(fleet, runtime.SEND_QUEUE) == 20)
        assert count("incoming_emails") == 0
    finally:
        rows("SET default_transaction_read_only = off")
        rows(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    # Then
    with running():
        wait_until("all are stored", lambda: count("incoming_emails") == 20)
        wait_until("all are acknowledged", lambda: waiting(fleet, runtime.SEND_QUEUE) == 0)
    assert len(fleet.take_raw("test.events")) == 20


def test_a_queue_that_was_deleted_and_declared_again_at_once_is_consumed_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a bridge that is not told: of a quorum queue RabbitMQ says nothing if another has its name by then
    monkeypatch.setattr(bridge, "RENEWAL_AFTER", timedelta(milliseconds=300))
    publish(fleet, *emails(1))
    with running():
        wait_until("it is acknowledged", lambda: count("incoming_emails") == 1)
        fleet.channel.queue_delete(runtime.SEND_QUEUE)
        runtime.declare(fleet.channel)
        # When
        publish(fleet, *emails(2))
        # Then
        wait_until("both are stored", lambda: count("incoming_emails") == 2)


def test_in_an_outage_a_batch_is_kept_and_not_handed_back_and_forth(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a PostgreSQL that is away for the first two tries
    connections, outages = [], iter([models.DatabaseAway("away"), models.DatabaseAway("still")])

    def connect(parameters: pika.URLParameters) -> pika.BlockingConnection:
        connections.append(outbox.connect(parameters))
        return connections[-1]

    def ingest(deliveries: list[Delivery]) -> None:
        if outage := next(outages, None):
            raise outage
        actors.ingest.ingest(deliveries)

    monkeypatch.setattr(bridge, "connect", connect)
    monkeypatch.setattr(bridge, "ingest", ingest)
    publish(fleet, *emails(3))
    # When
    with running():
        wait_until("all are stored", lambda: count("incoming_emails") == 3)
        wait_until("all are acknowledged", lambda: waiting(fleet, runtime.SEND_QUEUE) == 0)
    # Then all of it went over one connection: a quorum queue drops what comes back too often
    assert len(connections) == 1


def test_in_an_outage_large_mail_is_held_up_to_a_bound_and_handed_back_once(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given mail of 100 KB each, of which three are a batch and as many more may be held, and an outage of PostgreSQL
    inboxes, held, redelivered, back = [], [], [], threading.Event()

    class Watched(bridge.Inbox):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            inboxes.append(self)

        def take(self, patience: timedelta) -> Any:
            if (delivery := super().take(patience)) and delivery[0].redelivered:
                redelivered.append(delivery[2])
            return delivery

    def ingest(deliveries: list[Delivery]) -> None:
        held.append(inboxes[0].held_bytes)
        if not back.is_set():
            raise models.DatabaseAway("away")
        actors.ingest.ingest(deliveries)

    monkeypatch.setattr(bridge, "Inbox", Watched)
    monkeypatch.setattr(bridge, "BATCH_BYTES", 250_000)
    monkeypatch.setattr(bridge, "ingest", ingest)
    content = {"contentType": "text", "content": "x" * 99_000}
    publish(fleet, *(orjson.dumps(send_email(publisher_message_id=f"large-{n}", body=content)) for n in range(20)))
    with running(held_bytes=350_000):
        # When all have been handed out, and were tried more than once
        wait_until("all are handed out", lambda: waiting(fleet, runtime.SEND_QUEUE) == 0 and len(held) > 2)
        back.set()
        wait_until("all are stored", lambda: count("incoming_emails") == 20)
    # Then
    assert waiting(fleet, runtime.SEND_QUEUE) == 0
    assert 250_000 < max(held) <= 350_000
    assert len(redelivered) == len(set(redelivered)) == 14
    assert len(inboxes) == 1


def test_a_queue_that_is_deleted_is_declared_and_consumed_again(fleet: Fleet) -> None:
    with running():
        wait_until("it consumes", lambda: consumers(fleet) == 1)
        # When
        fleet.channel.queue_delete(runtime.SEND_QUEUE)
        wait_until("it is back", lambda: consumers(fleet) == 1)
        publish(fleet, *emails(2))
        # Then
        wait_until("both are stored", lambda: count("incoming_emails") == 2)


def test_nothing_is_acknowledged_before_its_event_is_confirmed(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a RabbitMQ that takes connections for consuming only
    publish(fleet, *emails(3))
    away = runtime.Publisher(runtime.outbox.connection_parameters("amqp://a:b@127.0.0.1:1/", "test"), lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "publisher", away)
        with running():
            wait_until("they are stored", lambda: count("incoming_emails") == 3)
        away.close()
    # Then
    wait_until("they are back in the queue", lambda: waiting(fleet, runtime.SEND_QUEUE) == 3)
    # When the deliveries come again, the sweep tells what is stored
    with running():
        wait_until("they are acknowledged", lambda: waiting(fleet, runtime.SEND_QUEUE) == 0)
    rows("UPDATE outbox_events SET claimed_until = now()")
    fleet.schedule()
    assert len(fleet.take_raw("test.events")) == 3


BAD = {
    "not UTF-8": b"\xff\xfe\xfd",
    "no JSON": b"hello",
    "another object": b'{"a": 1}',
    "too large": b"x" * (MAX_DELIVERY_BYTES + 1),
    "invalid UTF-8 within": b'{"from": "\xc3\x28"}',
    "NUL in a string": orjson.dumps(send_email(subject="a\x00b")),
}


def test_bad_input_is_kept_as_it_was_and_does_not_stop_the_line(fleet: Fleet) -> None:
    # Given
    good = emails(2)
    publish(fleet, good[0], *BAD.values(), good[1])
    # When
    with running():
        wait_until("good ones are stored", lambda: count("incoming_emails") == 2)
        wait_until("all are acknowledged", lambda: waiting(fleet, runtime.SEND_QUEUE) == 0)
    # Then
    assert sorted(body for _, body in fleet.take_raw(runtime.REJECTED_QUEUE)) == sorted(BAD.values())


@pytest.mark.parametrize("correlation_id", ["a\x00b", "line\nbreak", b"\xff\xfe"])
def test_properties_that_cannot_be_stored_do_not_stop_the_line(fleet: Fleet, correlation_id: str | bytes) -> None:
    publish(fleet, *emails(1), b"{}", correlation_id=correlation_id, headers={"traceparent": 7, "x": b"\xff"})
    with running():
        wait_until("it is stored", lambda: count("incoming_emails") == 1)
        wait_until("both are acknowledged", lambda: waiting(fleet, runtime.SEND_QUEUE) == 0)
    assert table("incoming_emails")[0]["correlation_id"] is None
    assert len(fleet.take_raw(runtime.REJECTED_QUEUE)) == 1


@pytest.mark.parametrize("what", STRANGE_PROPERTIES)
def test_properties_that_nobody_expects_do_not_stop_the_line(fleet: Fleet, what: str) -> None:
    # Given
    fleet.channel.basic_publish("", runtime.SEND_QUEUE, emails(1)[0], STRANGE_PROPERTIES[what])
    publish(fleet, emails(2)[1])
    # When
    with running():
        # Then it is stored, and so is what comes behind it
        wait_until("both are stored", lambda: count("incoming_emails") == 2)
        wait_until("both are acknowledged", lambda: waiting(fleet, runtime.SEND_QUEUE) == 0)


def test_a_bridge_stops_promptly_with_nothing_to_do(fleet: Fleet) -> None:
    with running():
        wait_until("it consumes", lambda: consumers(fleet) == 1)


def test_a_bridge_that_is_up_before_the_tables_waits_for_them(fleet: Fleet) -> None:
    # Given
    publish(fleet, *emails(3))
    rows("ALTER TABLE incoming_emails RENAME TO gone")
    # When
    try:
        with running():
            wait_until("they were tried", lambda: waiting(fleet, runtime.SEND_QUEUE) < 3)
        wait_until("they are back in the queue", lambda: waiting(fleet, runtime.SEND_QUEUE) == 3)
    finally:
        rows("ALTER TABLE gone RENAME TO incoming_emails")
    # Then
    with running():
        wait_until("all are stored", lambda: count("incoming_emails") == 3)


# Batches


class Scripted:
    """An inbox that hands out given bodies, then nothing, and notes how long it was waited for each."""

    def __init__(self, bodies: list[bytes]) -> None:
        self.bodies = bodies
        self.waits: list[timedelta] = []

    def take(self, patience: timedelta) -> tuple[object, object, bytes] | None:
        self.waits.append(patience)
        return ("method", "properties", self.bodies.pop(0)) if self.bodies else None

    def hand_back(self) -> None:
        pass


def batches(inbox: Scripted) -> list[int]:
    consuming = bridge.Bridge()
    sizes = []
    for batch in consuming._batches(inbox):
        sizes.append(len(batch))
        if not inbox.bodies:
            consuming.stop()
    return sizes


def test_a_batch_is_bounded_by_its_bytes_as_well_as_by_its_deliveries() -> None:
    assert batches(Scripted([b"x" * 4_000_000] * 7)) == [3, 3, 1]
    assert batches(Scripted([b"x" * 20_000_000] * 2)) == [1, 1]
    assert batches(Scripted([b"x"] * 150)) == [100, 50]


def test_a_mail_that_comes_singly_is_not_held_back() -> None:
    inbox = Scripted([b"x"])
    assert batches(inbox) == [1]
    assert inbox.waits == [bridge.IDLE, timedelta()]


def test_mail_that_follows_soon_is_gathered_for_a_moment() -> None:
    inbox = Scripted([b"x"] * 101)
    assert batches(inbox) == [100, 1]
    assert inbox.waits[-2:] == [bridge.IDLE, bridge.LINGER]
