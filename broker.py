"""Dramatiq's broker on RabbitMQ as mailfleet needs it: quorum queues, and a copy of every dead letter.

Dramatiq dead-letters straight into ``<queue>.XQ``, where a message can be neither browsed nor found. Here the way leads
through a topic exchange: the message still lands in ``<queue>.XQ``, and a copy lands in one queue that is read into the
``dlq`` table, so that no dead letter is missed whatever its cause: an error, an unknown actor, an unreadable body.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, ClassVar

import dramatiq
import orjson
import pika.exceptions
from dramatiq import Middleware
from dramatiq.brokers.rabbitmq import DEAD_MESSAGE_TTL, RabbitmqBroker, _RabbitmqConsumer, _RabbitmqMessage
from dramatiq.common import q_name, xq_name
from dramatiq.errors import ConnectionClosed, DecodeError
from dramatiq.middleware import Interrupt
from pika.adapters.utils.connection_workflow import AMQPConnectorException

from crash_points import CrashPoint, CrashPoints

log = logging.getLogger(__name__)

DEAD_LETTER_EXCHANGE = "mail.dead_letters"
MIRROR_QUEUE = "mail.dead_letters.mirror"
#: Nobody of ours sends them, and Dramatiq acts on them whatever they hold.
_REFUSED_OPTIONS = {"eta", "throws", "time_limit"}
#: AMQP's reply code for a queue that does not exist (amqp 0-9-1, 1.8).
_NO_QUEUE = 404
#: A consumer that has had nothing to do for so long consumes anew: a few frames a minute for each queue.
RENEWAL_AFTER = timedelta(minutes=1)
#: How long an acknowledgement may wait for others. More than a part of the prefetched messages never wait: the workers
#: would run out of work that RabbitMQ holds back until it hears of them. Twice as many are prefetched as there are
#: threads (Dramatiq's default), so that with half of them done every thread still has one.
_SETTLE_EVERY = timedelta(milliseconds=100)
_PART_OF_PREFETCH = 2


class MessageEncoder(dramatiq.Encoder):
    """Writes and reads messages as Dramatiq's own encoder of JSON does, in a fraction of its time."""

    def encode(self, data: dict[str, Any]) -> bytes:
        return orjson.dumps(data)

    def decode(self, data: bytes) -> dict[str, Any]:
        message: dict[str, Any] = orjson.loads(data)  # of whatever it raises Dramatiq makes a DecodeError
        return message


class FleetConsumer(_RabbitmqConsumer):
    """A consumer that settles only what came over its own connection, and hands on only what an actor can take.

    Delivery tags start anew with each connection. After a reconnect Dramatiq's consumer takes the tag of a message of
    the old connection for one of the new, and so acknowledges a message that is still being worked on.

    What the workers are done with is settled by the consumer's own thread, all that has gathered at once: waking it for
    each message, as Dramatiq does, costs as much as the work of a small mail.

    Where the process may die: at ``message.done`` RabbitMQ delivers the message again, and the actor finds that it is
    done; at ``message.acknowledged`` it is over. At ``message.given-up`` it is delivered again, and finds its row of
    ``dlq`` or is given up once more; at ``message.refused`` RabbitMQ dead-letters it, and the minute's turn mirrors it.

    Dramatiq takes a message's word for the queue that it came from and for its members' types; one that lies ends the
    thread that works on it, and the next one's when it comes again. One with an ``eta`` would wait in this process.

    RabbitMQ does not tell the consumers of a quorum queue that was deleted if one of its name is declared at once; they
    would wait for ever.
    """

    def __init__(self, broker: Any, queue_name: str, prefetch: int, timeout: int) -> None:
        try:
            super().__init__(broker, queue_name, prefetch, timeout)
        except AMQPConnectorException as error:  # a server that accepts and then says nothing
            raise ConnectionClosed(error) from error
        self._prefetch, self._timeout_seconds = prefetch, timeout / 1000
        self._busy_at = time.monotonic()
        self._arrived: deque[tuple[Any, Any, bytes]] = deque()
        self._cancelled = False
        #: Guards the tags: those in the workers' hands, and those that they are done with or have given up.
        self._lock = threading.Lock()
        self._done: list[int] = []
        self._given_up: list[int] = []
        try:
            with self._connection_errors():
                self._consume()
        except ConnectionClosed:
            self.connection.close()
            raise

    def _consume(self) -> None:
        self.channel.add_on_cancel_callback(self._on_cancel)
        self.channel.basic_consume(self.queue_name, self._on_delivery)

    def _on_delivery(self, _channel: Any, method: Any, properties: Any, body: bytes) -> None:
        self._arrived.append((method, properties, body))

    def _on_cancel(self, _method_frame: Any) -> None:
        self._cancelled = True

    @contextlib.contextmanager
    def _connection_errors(self) -> Iterator[None]:
        """Raise what pika raises as Dramatiq expects it, and have a queue that is gone declared anew."""
        try:
            yield
        except (AssertionError, pika.exceptions.AMQPConnectionError, pika.exceptions.AMQPChannelError) as error:
            if getattr(error, "reply_code", None) == _NO_QUEUE:
                self.broker.queues_pending.add(q_name(self.queue_name))
            raise ConnectionClosed(error) from None

    def __next__(self) -> Any:
        with self._connection_errors():
            arrived = self._next_arrived()
        if arrived is None:
            if self._cancelled:
                raise StopIteration  # Dramatiq consumes anew
            self._renew_if_idle()
            return None
        self._busy_at = time.monotonic()
        method, _, body = arrived
        message = self._read(method, body)
        if message is None:
            self._nack(method.delivery_tag)
            return None
        with self._lock:
            self.known_tags.add(method.delivery_tag)
        if self._can_be_taken(message):
            return message
        log.error("a message in %s is none that an actor can take", self.queue_name)
        self.nack(message)
        return None

    def _next_arrived(self) -> tuple[Any, Any, bytes] | None:
        self._settle()
        if not self._arrived and not self._cancelled:
            busy = self.known_tags or self._done or self._given_up
            self.connection.process_data_events(_SETTLE_EVERY.total_seconds() if busy else self._timeout_seconds)
        if not self.channel.is_open:  # of which pika tells only who uses it
            raise pika.exceptions.ChannelWrongStateError
        return self._arrived.popleft() if self._arrived else None

    def _read(self, method: Any, body: bytes) -> Any:
        try:
            message = _RabbitmqMessage(method.redelivered, method.delivery_tag, dramatiq.Message.decode(body))
        except DecodeError:
            log.exception("a message in %s is none", self.queue_name)
            return None
        message.came_over = self
        return message

    def _renew_if_idle(self) -> None:
        """Consume over a new channel, if nothing is in hand that came over this one."""
        if self.known_tags or time.monotonic() - self._busy_at < self.broker.renewal_after.total_seconds():
            return
        self._busy_at = time.monotonic()
        try:
            self._settle()
            self.channel.close()
            self._arrived.clear()  # what came meanwhile is delivered again
            self.channel = self.connection.channel()
            self.channel.basic_qos(prefetch_count=self._prefetch)
            self._consume()
        except (pika.exceptions.AMQPConnectionError, pika.exceptions.AMQPChannelError) as error:
            raise ConnectionClosed(error) from error

    def _can_be_taken(self, message: Any) -> bool:
        names = (message.queue_name, message.actor_name, message.message_id)
        return (
            all(isinstance(name, str) for name in names)
            and message.queue_name == self.queue_name
            and isinstance(message.args, list | tuple)
            and isinstance(message.kwargs, dict)
            and isinstance(message.options, dict)
            and not _REFUSED_OPTIONS & message.options.keys()
        )

    def ack(self, message: Any) -> None:
        """Have the message acknowledged in a moment, if RabbitMQ waits for it."""
        self._busy_at = time.monotonic()
        if message.came_over is self:
            self.broker.crash_point(CrashPoint.MESSAGE_DONE, self.queue_name)
            self._let_go(message, given_up=False)

    def nack(self, message: Any) -> None:
        """Have the message dead-lettered in a moment, if RabbitMQ waits for it."""
        self._busy_at = time.monotonic()
        if message.came_over is self:
            self._let_go(message, given_up=True)

    def _let_go(self, message: Any, *, given_up: bool) -> None:
        with self._lock:
            if message._tag not in self.known_tags:
                return
            self.known_tags.discard(message._tag)
            settled = self._given_up if given_up else self._done
            settled.append(message._tag)
            due = len(settled) == max(1, self._prefetch // _PART_OF_PREFETCH)
        if due:
            # It wakes the connection; and a connection that is closed has nothing to settle.
            with contextlib.suppress(pika.exceptions.ConnectionWrongStateError):
                self.connection.add_callback_threadsafe(lambda: None)

    def _nack(self, tag: int) -> None:
        with self._lock:
            self._given_up.append(tag)

    def _settle(self) -> None:
        """Tell RabbitMQ of everything that the workers have let go of.

        All that came before the oldest in hand is acknowledged by one frame; for that to be true of what was given up,
        it is refused first.
        """
        if not self._done and not self._given_up:
            return
        with self._lock:
            given_up, self._given_up = self._given_up, []
            done, self._done = sorted(self._done), []
            oldest_in_hand = min(self.known_tags, default=math.inf)
        for tag in given_up:
            self.broker.crash_point(CrashPoint.MESSAGE_GIVEN_UP)
            self.channel.basic_nack(tag, requeue=False)
            self.broker.crash_point(CrashPoint.MESSAGE_REFUSED)
            # Of a body that is no message at all Dramatiq tells no middleware, and of others before it is true.
            self.broker.emit_after("nack", None)
        before = bisect_left(done, oldest_in_hand)
        # BlockingChannel would write each to the socket by itself; the channel beneath it keeps them for one write.
        if before:
            self.channel._impl.basic_ack(done[before - 1], multiple=True)
        for tag in done[before:]:
            self.channel._impl.basic_ack(tag)
        if done:
            self.channel._flush_output()
            self.broker.crash_point(CrashPoint.MESSAGE_ACKNOWLEDGED, self.queue_name)

    def close(self) -> None:
        """Settle what is left, and close the connection too when RabbitMQ has closed the channel.

        Raises:
            ConnectionClosed: Something was closed already. Any other error would end the consumer's thread for good.
        """
        try:
            if self.channel.is_open:
                self._settle()
            super().close()
        except Exception as error:
            with contextlib.suppress(Exception):
                self.connection.close()
            raise ConnectionClosed(error) from error


class FleetBroker(RabbitmqBroker):
    """A `RabbitmqBroker` with confirmed publishes, queues of one type, and the dead-letter exchange."""

    @property
    def consumer_class(self) -> type[FleetConsumer]:
        return FleetConsumer

    def __init__(
        self,
        *,
        url: Any,
        queue_type: str,
        middleware: list[Any],
        crash_point: CrashPoints,
        renewal_after: timedelta = RENEWAL_AFTER,
    ) -> None:
        super().__init__(url=None, confirm_delivery=True, middleware=middleware)
        self.parameters = url
        self.crash_point = crash_point
        self.renewal_after = renewal_after
        self._queue_type = queue_type

    def declare_all(self, channel: Any) -> None:
        """Declare every queue that an actor has, on the given channel: what a publisher needs to exist."""
        for queue_name in self.queues:
            for arguments, name in self._declarations(queue_name):
                channel.queue_declare(name, durable=True, arguments=arguments)
        self._declare_dead_letters(channel)
        for queue_name in self.queues:
            channel.queue_bind(xq_name(queue_name), DEAD_LETTER_EXCHANGE, xq_name(queue_name))

    def _declarations(self, queue_name: str) -> list[tuple[dict[str, Any], str]]:
        return [
            (self._build_queue_arguments(queue_name), queue_name),
            (self._dead_letter_arguments(), xq_name(queue_name)),
        ]

    def _declare_dead_letters(self, channel: Any) -> None:
        channel.exchange_declare(DEAD_LETTER_EXCHANGE, "topic", durable=True)
        declare_if_missing(channel.connection, MIRROR_QUEUE, self._queue_type)
        channel.queue_bind(MIRROR_QUEUE, DEAD_LETTER_EXCHANGE, "#")

    def _dead_letter_arguments(self) -> dict[str, Any]:
        return {"x-queue-type": self._queue_type, "x-message-ttl": DEAD_MESSAGE_TTL}

    def _build_queue_arguments(self, queue_name: str) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._build_queue_arguments(queue_name)
        arguments |= {"x-queue-type": self._queue_type, "x-dead-letter-exchange": DEAD_LETTER_EXCHANGE}
        if self._queue_type == "quorum":
            # A dead letter is moved with confirmation, which needs a queue that refuses instead of dropping its head.
            arguments |= {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
        return arguments

    def _declare_xq_queue(self, queue_name: str) -> Any:
        self._declare_dead_letters(self.channel)
        declared = self.channel.queue_declare(
            xq_name(queue_name), durable=True, arguments=self._dead_letter_arguments()
        )
        self.channel.queue_bind(xq_name(queue_name), DEAD_LETTER_EXCHANGE, xq_name(queue_name))
        return declared


def declare_if_missing(connection: Any, queue_name: str, queue_type: str) -> None:
    """Declare a durable queue that loses no message however often it comes back, unless there is one of the name.

    RabbitMQ 4 drops what comes back to a quorum queue more than twenty times, as all does that a process has in hand
    when it dies. To versions before it, which have no such limit, the word for none is one for dropping at once. A
    queue that others have made keeps its arguments.
    """
    if _exists(connection, queue_name):
        return
    arguments: dict[str, Any] = {"x-queue-type": queue_type}
    if queue_type == "quorum" and _major_version(connection) >= 4:
        arguments["x-delivery-limit"] = -1
    channel = connection.channel()
    try:
        channel.queue_declare(queue_name, durable=True, arguments=arguments)
        channel.close()
    except pika.exceptions.ChannelClosedByBroker:
        if not _exists(connection, queue_name):  # others may have been faster
            raise


def _exists(connection: Any, queue_name: str) -> bool:
    channel = connection.channel()
    try:
        channel.queue_declare(queue_name, passive=True)
    except pika.exceptions.ChannelClosedByBroker as closed:
        if closed.reply_code != _NO_QUEUE:
            raise
        return False
    channel.close()
    return True


def _major_version(connection: Any) -> int:
    """Return the first number of the server's version: what it says of itself is at no public place of pika's."""
    told = connection._impl.server_properties.get("version", b"")
    major = (told.decode() if isinstance(told, bytes) else str(told)).partition(".")[0]
    return int(major) if major.isdecimal() else 0


class DeadLettering(Middleware):
    """Dead-letters a message whose actor raised, unless the error is not the message's fault.

    This stands in for Dramatiq's retries, which would wait in a worker's memory and in RabbitMQ: here everything that
    is to be tried again waits in PostgreSQL. While a server is away a message that only points to a row is dropped,
    since the row's lease brings it back; one that carries content of its own (``found_again=False``) is dead-lettered
    with it. A periodic actor's message says nothing that its next turn does not: it is never dead-lettered.

    Args:
        away: Errors that say that a server cannot be reached.
    """

    actor_options: ClassVar[set[str]] = {"found_again", "periodic", "throws"}

    def __init__(self, away: tuple[type[BaseException], ...], on_dead_letter: Callable[[], None]) -> None:
        self._away = (*away, Interrupt)
        self._on_dead_letter = on_dead_letter

    def after_process_message(
        self,
        broker: Any,
        message: Any,
        *,
        result: Any = None,  # noqa: ARG002 (Dramatiq passes it by name)
        exception: BaseException | None = None,
    ) -> None:
        if exception is None:
            return
        options = broker.get_actor(message.actor_name).options
        if options.get("periodic"):
            # The next turn does the work; and a mirror that dead-letters itself would wake itself for ever.
            log.error("%s failed and is left to its next turn: %s", message.actor_name, type(exception).__name__)
        elif isinstance(exception, self._away) and options.get("found_again", True):
            log.warning("%s was given up for now: %s", message.actor_name, type(exception).__name__)
        else:
            message.fail()

    def after_nack(self, _broker: Any, _message: Any) -> None:
        self._on_dead_letter()
