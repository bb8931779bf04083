"""Dramatiq's broker as we need it: queues of one type, and a copy of every dead letter."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import dramatiq
import orjson
import pika
import pytest
from dramatiq import Worker
from dramatiq.brokers.rabbitmq import DEAD_MESSAGE_TTL
from dramatiq.errors import BrokerConnectionError
from dramatiq.middleware import CurrentMessage, Shutdown
from support import wait_until

import runtime
from broker import DEAD_LETTER_EXCHANGE, MIRROR_QUEUE, DeadLettering, FleetBroker, FleetConsumer
from crash_points import CrashPoints
from models import DatabaseAway

UNLIMITED = (runtime.SEND_QUEUE, runtime.REJECTED_QUEUE, MIRROR_QUEUE)


class Failing:
    """A broker with actors of its own, in a worker that runs while the test does."""

    def __init__(self, url: str, queue_type: str) -> None:
        self.queue = f"test_{secrets.token_hex(4)}"
        self.dead_letters: list[str] = []
        self.seen: list[str] = []
        self.broker = FleetBroker(
            url=pika.URLParameters(url),
            queue_type=queue_type,
            crash_point=CrashPoints(None),
            middleware=[CurrentMessage(), DeadLettering((DatabaseAway,), lambda: self.dead_letters.append("told"))],
        )
        self.fail = self._actor("fail")
        self.keep = self._actor("keep", found_again=False)
        self.sweep = self._actor("sweep", periodic="* * * * *")
        self.connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self.connection.channel()

    def _actor(self, name: str, **options: Any) -> Any:
        def work(how: str) -> None:
            self.seen.append(how)
            if how == "away":
                raise DatabaseAway
            if how == "shutdown":
                raise Shutdown
            if how == "broken":
                raise RuntimeError("no")

        return dramatiq.actor(actor_name=name, queue_name=self.queue, broker=self.broker, **options)(work)

    def taken(self, queue: str) -> list[tuple[Any, bytes]]:
        taken = []
        while (delivery := self.channel.basic_get(queue, auto_ack=True))[0] is not None:
            taken.append((delivery[1], delivery[2]))
        return taken

    def mirrored(self) -> list[bytes]:
        """The copies of this test's dead letters."""
        return [
            body
            for properties, body in self.taken(MIRROR_QUEUE)
            if properties.headers["x-death"][0]["queue"] == self.queue
        ]


@pytest.fixture(params=["quorum", "classic"])
def queue_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def failing(servers: dict[str, str], queue_type: str) -> Iterator[Failing]:
    failing = Failing(servers["RABBITMQ_URL"], queue_type)
    failing.channel.queue_delete(MIRROR_QUEUE)  # which is of the broker's type
    worker = Worker(failing.broker, worker_timeout=50)
    worker.start()
    yield failing
    worker.stop()
    failing.broker.close()
    for name in (failing.queue, failing.queue + ".DQ", failing.queue + ".XQ", MIRROR_QUEUE):
        failing.channel.queue_delete(name)
    failing.connection.close()


@pytest.fixture(autouse=True)
def mirror_of_the_fleet(servers: dict[str, str]) -> Iterator[None]:
    """Leave the mirror as the fleet declares it."""
    yield
    with pika.BlockingConnection(pika.URLParameters(servers["RABBITMQ_URL"])) as connection:
        runtime.declare(connection.channel())


def test_a_dead_letter_arrives_in_its_own_queue_and_in_the_mirror(failing: Failing) -> None:
    # When
    message = failing.fail.send("broken")
    # Then
    (dead,) = wait_until("it is dead-lettered", lambda: failing.taken(failing.queue + ".XQ"))
    assert dead[1] == message.encode()
    assert wait_until("it is mirrored", failing.mirrored) == [message.encode()]
    assert set(failing.dead_letters) == {"told"}


@pytest.mark.parametrize("body", [b"\xff\xfe no message", b"{}", b'{"actor_name": "unknown"}'])
def test_a_message_that_no_actor_can_read_is_dead_lettered_with_its_body(failing: Failing, body: bytes) -> None:
    failing.fail.send("well")
    wait_until("the worker is up", lambda: failing.seen)
    failing.channel.basic_publish("", failing.queue, body)
    assert wait_until("it is mirrored", failing.mirrored) == [body]


def test_an_actor_that_succeeds_leaves_nothing_behind(failing: Failing) -> None:
    failing.fail.send("well")
    failing.broker.join(failing.queue, timeout=10_000)
    assert (failing.taken(failing.queue), failing.taken(failing.queue + ".XQ")) == ([], [])
    assert failing.dead_letters == []


@pytest.mark.parametrize("how", ["away", "shutdown"])
def test_a_message_that_points_to_a_row_is_dropped_while_a_server_is_away(failing: Failing, how: str) -> None:
    failing.fail.send(how)
    failing.fail.send("well")
    wait_until("both are done", lambda: failing.seen == [how, "well"])
    failing.broker.join(failing.queue, timeout=10_000)
    assert (failing.taken(failing.queue), failing.mirrored()) == ([], [])


@pytest.mark.parametrize("how", ["away", "shutdown"])
def test_a_message_with_content_of_its_own_is_dead_lettered_with_it(failing: Failing, how: str) -> None:
    message = failing.keep.send(how)
    assert wait_until("it is mirrored", failing.mirrored) == [message.encode()]


def test_queues_have_the_arguments_of_their_type(failing: Failing, queue_type: str) -> None:
    arguments = failing.broker._build_queue_arguments(failing.queue)
    assert (arguments["x-queue-type"], arguments["x-dead-letter-exchange"]) == (queue_type, DEAD_LETTER_EXCHANGE)
    assert arguments["x-dead-letter-routing-key"] == failing.queue + ".XQ"
    confirmed = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
    assert (confirmed.items() <= arguments.items()) is (queue_type == "quorum")
    assert failing.broker._dead_letter_arguments() == {"x-queue-type": queue_type, "x-message-ttl": DEAD_MESSAGE_TTL}


def test_declaring_everything_again_agrees_with_what_the_workers_declared(failing: Failing) -> None:
    failing.fail.send("well")
    wait_until("the worker is up", lambda: failing.seen)
    failing.broker.declare_all(failing.channel)
    for name in (failing.queue, failing.queue + ".XQ"):
        assert failing.channel.queue_declare(name, passive=True)


@pytest.mark.parametrize("how", ["away", "broken"])
def test_a_periodic_actors_message_is_never_dead_lettered(failing: Failing, how: str) -> None:
    failing.sweep.send(how)
    failing.fail.send("well")
    wait_until("both are done", lambda: failing.seen == [how, "well"])
    failing.broker.join(failing.queue, timeout=10_000)
    assert (failing.taken(failing.queue), failing.mirrored(), failing.dead_letters) == ([], [], [])


@pytest.fixture
def connection(servers: dict[str, str]) -> Iterator[pika.BlockingConnection]:
    """A connection to a RabbitMQ that lacks the queues which have no limit."""
    with closing(pika.BlockingConnection(pika.URLParameters(servers["RABBITMQ_URL"]))) as connection:
        for queue in UNLIMITED:
            connection.channel().queue_delete(queue)
        yield connection
        for queue in UNLIMITED:
            connection.channel().queue_delete(queue)


def test_what_must_not_be_lost_may_come_back_more_often_than_rabbitmq_4_bears_by_itself(
    connection: pika.BlockingConnection, servers: dict[str, str]
) -> None:
    # Given a message in the queues of mail, of what was refused of it and of dead letters
    channel = connection.channel()
    runtime.declare(channel)
    channel.confirm_delivery()
    for queue in UNLIMITED:
        channel.basic_publish("", queue, b"a mail")
    # When each process that has them in hand dies
    for _ in range(25):
        with closing(pika.BlockingConnection(pika.URLParameters(servers["RABBITMQ_URL"]))) as dying:
            taking = dying.channel()
            for queue in UNLIMITED:
                wait_until("it is there", lambda: taking.basic_get(queue)[0])  # noqa: B023
    # Then
    for queue in UNLIMITED:
        left = wait_until("it is there", lambda: channel.basic_get(queue, auto_ack=True)[2])  # noqa: B023
        assert left == b"a mail"


@pytest.mark.parametrize("arguments", [{}, {"x-queue-type": "quorum"}, {"x-max-length": 1000}])
def test_a_queue_that_a_publisher_has_made_stays_as_it_is(
    connection: pika.BlockingConnection, arguments: dict[str, Any]
) -> None:
    channel = connection.channel()
    channel.queue_declare(runtime.SEND_QUEUE, durable=True, arguments=arguments)
    runtime.declare(channel)
    channel.queue_declare(runtime.SEND_QUEUE, durable=True, arguments=arguments)


FORGED = {
    "another queue": {"queue_name": "another"},
    "the dead letters": {"queue_name": "{queue}.XQ"},
    "the delayed": {"queue_name": "{queue}.DQ"},
    "throws": {"options": {"throws": "RuntimeError"}},
    "no time limit": {"options": {"time_limit": "none"}},
    "arguments": {"args": 5},
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
def test_a_message_that_lies_is_dead_lettered_and_costs_no_worker(failing: Failing, forged: dict[str, Any]) -> None:
    # Given as many as there are workers, and one more
    failing.fail.send("well")
    wait_until("the worker is up", lambda: failing.seen)
    message = orjson.loads(failing.fail.message("broken").encode()) | forged
    message["queue_name"] = message["queue_name"].format(queue=failing.queue)
    for _ in range(9):
        failing.channel.basic_publish("", failing.queue, orjson.dumps(message))
    # When
    dead: list[bytes] = []
    wait_until("all are dead-lettered", lambda: dead.extend(failing.mirrored()) or len(dead) == 9)
    # Then
    failing.keep.send("well")
    wait_until("a worker is left", lambda: failing.seen == ["well", "well"])


def test_a_queue_that_was_deleted_and_declared_again_at_once_is_consumed_again(failing: Failing) -> None:
    # Given a worker that is not told: of a quorum queue RabbitMQ says nothing if another has its name by then
    failing.broker.renewal_after = timedelta(milliseconds=300)
    failing.keep.send("before")
    wait_until("it is done", lambda: failing.seen == ["before"])
    failing.channel.queue_delete(failing.queue)
    failing.broker.declare_all(failing.channel)
    # When
    failing.keep.send("after")
    # Then
    wait_until("it is done", lambda: failing.seen == ["before", "after"])


def test_a_consumer_that_consumes_anew_loses_and_repeats_nothing(failing: Failing) -> None:
    # Given a worker that consumes anew whenever nothing has come for a moment
    failing.broker.renewal_after = timedelta(milliseconds=10)
    # When
    for number in range(20):
        failing.keep.send(str(number))
        wait_until("it is done", lambda number=number: len(failing.seen) > number)
    # Then
    assert failing.seen == [str(number) for number in range(20)]
    assert failing.taken(failing.queue) == []


@pytest.fixture
def consumer(failing: Failing) -> Iterator[Any]:
    """A consumer of a queue of its own, in this thread."""
    queue = failing.queue + ".alone"
    failing.channel.queue_declare(queue, durable=True)
    consumer = FleetConsumer(failing.broker, queue, 1, 5_000)
    yield consumer
    if consumer.connection.is_open:
        consumer.connection.close()
    failing.channel.queue_delete(queue)


def test_a_consumer_whose_queue_was_deleted_ends_with_its_connection(failing: Failing, consumer: Any) -> None:
    # Given a consumer that RabbitMQ has refused the queue
    failing.channel.queue_delete(consumer.queue_name)
    with pytest.raises(BrokerConnectionError):
        next(consumer)
    # When
    with pytest.raises(BrokerConnectionError):
        consumer.close()
    # Then
    assert consumer.connection.is_closed


def test_a_message_whose_connection_is_gone_is_left_to_rabbitmq_without_waiting(
    failing: Failing, consumer: Any
) -> None:
    # Given
    message = failing.fail.message("well").copy(queue_name=consumer.queue_name)
    failing.channel.basic_publish("", consumer.queue_name, message.encode())
    taken = next(consumer)
    consumer.connection.close()
    # When
    consumer.ack(taken)
    consumer.nack(taken)
    # Then
    (left,) = wait_until("it is there again", lambda: failing.taken(consumer.queue_name))
    assert left[1] == message.encode()


def test_a_server_that_accepts_and_says_nothing_counts_as_away() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        parameters = pika.ConnectionParameters(host, port, socket_timeout=0.2, stack_timeout=0.3)
        with pytest.raises(BrokerConnectionError):
            FleetConsumer(SimpleNamespace(parameters=parameters), "any", 1, 50)
