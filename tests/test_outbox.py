"""Publishing: confirmed or said to be unconfirmed, in order, over a connection that may go at any time."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import pika
import pytest
from support import wait_until

import outbox
import runtime
from actors import scheduling
from contracts import Event, EventType
from outbox import (
    Batcher,
    Outgoing,
    Publisher,
    Unconfirmed,
    Unpublishable,
    _Batch,
    connection_parameters,
    event_messages,
    unconfirmed,
)


class Queue:
    """A queue of this test alone, with the publisher that declares it."""

    def __init__(self, url: str) -> None:
        self.name = f"test.{uuid.uuid4().hex}"
        self.client = f"publisher of {self.name}"
        self.url = url
        self.declared = 0
        self.publisher = Publisher(connection_parameters(url, self.client), self._declare)
        self.connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self.connection.channel()

    def _declare(self, channel: Any) -> None:
        self.declared += 1
        channel.queue_declare(self.name, durable=True)

    def message(self, body: bytes, **details: Any) -> Outgoing:
        return Outgoing("", self.name, body, pika.BasicProperties(**details), mandatory=True)

    def bodies(self) -> list[bytes]:
        taken = []
        while (delivery := self.channel.basic_get(self.name, auto_ack=True))[0] is not None:
            taken.append(delivery[2])
        return taken


@pytest.fixture
def queue(servers: dict[str, str]) -> Iterator[Queue]:
    queue = Queue(servers["RABBITMQ_URL"])
    yield queue
    queue.publisher.close()
    queue.channel.queue_delete(queue.name)
    queue.connection.close()


def test_a_published_batch_is_in_the_queue_when_the_call_returns(queue: Queue) -> None:
    bodies = [str(n).encode() for n in range(500)]
    queue.publisher.publish([queue.message(body) for body in bodies])
    assert queue.bodies() == bodies
    assert queue.declared == 1


def test_publishing_nothing_contacts_nobody(queue: Queue) -> None:
    queue.publisher.publish([])
    assert queue.declared == 0


def test_a_mandatory_message_without_a_queue_is_unconfirmed_and_the_queue_is_declared_for_the_next(
    queue: Queue,
) -> None:
    # Given
    queue.publisher.publish([queue.message(b"1")])
    queue.channel.queue_delete(queue.name)
    # When
    with pytest.raises(Unconfirmed, match=queue.name):
        queue.publisher.publish([queue.message(b"2")])
    queue.publisher.publish([queue.message(b"3")])
    # Then
    assert queue.bodies() == [b"3"]


def test_a_message_that_nobody_must_take_is_confirmed_without_a_queue(queue: Queue) -> None:
    queue.publisher.publish([Outgoing("", "no.such.queue", b"", pika.BasicProperties())])


def test_a_connection_that_was_lost_between_two_publishes_is_replaced(queue: Queue) -> None:
    # Given a publisher whose socket the other side has closed
    queue.publisher.publish([queue.message(b"1")])
    break_socket(queue.publisher)
    # When
    queue.publisher.publish([queue.message(b"2")])
    # Then
    assert queue.bodies() == [b"1", b"2"]
    assert queue.declared == 2


def test_an_outage_ends_although_somebody_publishes_all_the_time(queue: Queue) -> None:
    # Given a publisher that failed to connect
    queue.publisher._parameters.port, port = 1, queue.publisher._parameters.port
    with pytest.raises(Unconfirmed):
        queue.publisher.publish([queue.message(b"1")])
    # When RabbitMQ is there again
    queue.publisher._parameters.port = port
    # Then whoever tries again and again succeeds
    publish_until_confirmed(queue, b"2")
    assert queue.bodies() == [b"2"]


def test_a_channel_that_rabbitmq_closed_is_replaced(queue: Queue) -> None:
    # Given a publisher that published to an exchange that is not there, which closes its channel
    queue.publisher.publish([queue.message(b"1")])
    with pytest.raises(Unconfirmed):
        queue.publisher.publish([Outgoing("no.such.exchange", "", b"", pika.BasicProperties())])
    # Then
    publish_until_confirmed(queue, b"2")
    assert queue.bodies() == [b"1", b"2"]


def test_while_rabbitmq_is_away_a_publish_fails_at_once_and_works_when_it_is_back() -> None:
    publisher = Publisher(connection_parameters("amqp://guest:guest@127.0.0.1:1/", "test"), lambda channel: None)
    message = Outgoing("", "q", b"", pika.BasicProperties())
    with pytest.raises(Unconfirmed):
        publisher.publish([message])
    began = time.monotonic()
    with pytest.raises(Unconfirmed):
        publisher.publish([message])
    assert time.monotonic() - began < 0.5
    publisher.close()


def test_each_threads_messages_keep_their_order_and_none_is_lost(queue: Queue) -> None:
    # Given
    def publish(thread: int) -> None:
        batches = [[queue.message(f"{thread}:{n}:{part}".encode()) for part in range(2)] for n in range(50)]
        for future in [queue.publisher.submit(batch) for batch in batches]:
            future.result(timeout=30)

    # When
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(publish, range(8)))
    # Then
    by_thread: dict[str, list[str]] = {}
    for body in queue.bodies():
        thread, _, rest = body.decode().partition(":")
        by_thread.setdefault(thread, []).append(rest)
    expected = [f"{n}:{part}" for n in range(50) for part in range(2)]
    assert by_thread == {str(thread): expected for thread in range(8)}
    assert queue.declared == 1


@pytest.mark.parametrize("poison", [{"correlation_id": 5}, {"headers": {"x": object()}}, {"reply_to": "x" * 300}])
def test_a_message_that_cannot_be_encoded_is_unconfirmed_and_the_publisher_lives_on(
    queue: Queue, poison: dict[str, Any]
) -> None:
    with pytest.raises(Unconfirmed):
        queue.publisher.submit([queue.message(b"", **poison)]).result(timeout=5)
    publish_until_confirmed(queue, b"2")


def test_a_message_that_cannot_be_encoded_fails_alone(queue: Queue) -> None:
    # Given a publisher that has a whole batch of batches at once
    batches = [queue.message(str(n).encode(), correlation_id="ä" * 200 if n == 3 else "c") for n in range(6)]
    work = [_Batch([message], Future()) for message in batches]
    for batch in work:
        queue.publisher._waiting.put(batch)
    # When
    queue.publisher._ensure_started()
    failures = unconfirmed([batch.done for batch in work])
    # Then
    assert [type(failure) for failure in failures] == [type(None)] * 3 + [Unpublishable] + [type(None)] * 2
    assert set(queue.bodies()) == {b"0", b"1", b"2", b"4", b"5"}


class Asserting:
    """A connection that is in a state that pika did not foresee."""

    is_open = True

    def process_data_events(self, _time_limit: float) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError


def test_a_publisher_outlives_what_pika_did_not_foresee(queue: Queue) -> None:
    # Given
    queue.publisher.publish([queue.message(b"1")])
    queue.publisher._connection.close()
    queue.publisher._connection = Asserting()
    # When
    publish_until_confirmed(queue, b"2")
    # Then
    assert queue.bodies() == [b"1", b"2"]


def test_whoever_waits_is_told_when_settling_itself_fails(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(queue.publisher, "_publish", lambda _: None)  # no set, as was promised
        with pytest.raises(Unconfirmed):
            queue.publisher.submit([queue.message(b"1")]).result(timeout=5)
    publish_until_confirmed(queue, b"2")


def test_a_publisher_whose_thread_has_ended_begins_another(queue: Queue) -> None:
    queue.publisher.publish([queue.message(b"1")])
    thread = queue.publisher._thread
    assert thread is not None
    queue.publisher._waiting.put(None)
    thread.join(10)
    queue.publisher.submit([queue.message(b"2")]).result(timeout=5)


def test_nobody_waits_for_a_confirmation_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "PUBLISH_WITHIN", timedelta(milliseconds=10))
    (failure,) = unconfirmed([Future()])
    assert isinstance(failure, Unconfirmed)


def test_what_is_submitted_is_published_before_the_publisher_is_closed(queue: Queue) -> None:
    confirmed = [queue.publisher.submit([queue.message(str(n).encode())]) for n in range(300)]
    queue.publisher.close()
    assert all(future.done() and future.exception() is None for future in confirmed)
    assert len(queue.bodies()) == 300


def test_what_comes_after_the_close_is_published_as_well(queue: Queue) -> None:
    queue.publisher.publish([queue.message(b"1")])
    queue.publisher.close()
    queue.publisher.submit([queue.message(b"2")]).result(timeout=5)
    assert queue.bodies() == [b"1", b"2"]


def publish_until_confirmed(queue: Queue, body: bytes) -> None:
    def confirmed() -> bool:
        try:
            queue.publisher.publish([queue.message(body)])
        except Unconfirmed:
            return False
        return True

    wait_until("RabbitMQ confirms again", confirmed)


def break_socket(publisher: Publisher) -> None:
    """Shut the publisher's connection down from below, as a network does."""
    publisher._connection._impl._transport._sock.shutdown(2)


# Events

EVENT = Event("id-1", EventType.SENT, b"{}", "email-1", "c-1", "answers", "00-a-b-01")


def test_an_event_goes_to_whoever_listens_and_a_copy_to_whom_the_publisher_named() -> None:
    to_all, copy = event_messages(EVENT)
    assert (to_all.exchange, to_all.routing_key, to_all.mandatory) == ("mail.events", "email.sent", False)
    assert (copy.exchange, copy.routing_key, copy.body) == ("", "answers", b"{}")
    for message in (to_all, copy):
        properties = message.properties
        assert (properties.type, properties.message_id) == ("SendEmailSent", "id-1")
        assert (properties.correlation_id, properties.delivery_mode) == ("c-1", 2)
        assert (properties.content_type, properties.headers) == ("application/json", {"traceparent": "00-a-b-01"})


def test_without_a_reply_to_nobody_else_gets_a_copy() -> None:
    (message,) = event_messages(EVENT._replace(reply_to=None, traceparent=None))
    assert message.properties.headers is None


@pytest.mark.parametrize("type", list(EventType))
def test_every_event_has_its_routing_key(type: EventType) -> None:
    (message,) = event_messages(Event("id", type, b""))
    assert message.routing_key == f"email.{type.name.lower()}"
    assert message.properties.type == type.value


# Batches of what need not be waited for


def test_a_batcher_passes_on_in_order_what_threads_add() -> None:
    passed: list[list[int]] = []
    batcher = Batcher[int]("numbers", passed.append)
    for n in range(1000):
        batcher.add([n])
    batcher.close()
    assert [n for batch in passed for n in batch] == list(range(1000))
    assert len(passed) < 100


def test_a_batcher_that_fails_to_pass_one_batch_on_passes_on_the_others() -> None:
    passed: list[int] = []
    seen = threading.Event()

    def pass_on(batch: list[int]) -> None:
        seen.set()
        if 1 in batch:
            raise Unconfirmed("RabbitMQ is away")
        passed.extend(batch)

    batcher = Batcher[int]("numbers", pass_on)
    batcher.add([1])
    assert seen.wait(5)
    batcher.add([2, 3])
    batcher.close()
    assert passed == [2, 3]


def test_a_batcher_passes_on_what_comes_after_its_close() -> None:
    passed: list[int] = []
    batcher = Batcher[int]("numbers", passed.extend)
    batcher.add([1])
    batcher.close()
    batcher.add([2])
    batcher.close()
    batcher.close()
    assert passed == [1, 2]


def test_the_first_item_after_a_lull_is_passed_on_at_once_and_what_follows_goes_together() -> None:
    passed: SimpleQueue[list[int]] = SimpleQueue()
    batcher = Batcher[int]("numbers", passed.put, apart=timedelta(seconds=2))
    began = time.monotonic()
    batcher.add([0])
    assert passed.get(timeout=10) == [0]
    assert time.monotonic() - began < 1
    for number in (1, 2, 3):
        batcher.add([number])
        time.sleep(0.01)
    assert passed.get(timeout=10) == [1, 2, 3]
    assert time.monotonic() - began >= 2


def test_every_batcher_is_emptied_at_the_end_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_batchers", [*runtime._batchers])
    passed: list[int] = []
    runtime.batcher("numbers", passed.extend, timedelta()).add([1, 2])
    runtime.close()
    assert passed == [1, 2]
    assert {runtime.events, runtime._wake_ups_of_mails, scheduling.receipts} <= set(runtime._batchers)
