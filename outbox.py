"""Publishing to RabbitMQ, in confirmed batches, from one thread per process.

Confirming each message on its own costs four times what it costs in a batch, and a connection per thread costs a
heartbeat each; so whoever has something to publish hands it to the `Publisher` and, where the order of things matters,
waits for the confirmation. What was not confirmed is reported as such and never forgotten here: the rows that it came
from still say that it is unpublished.
"""

from __future__ import annotations

import logging
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, Generic, NamedTuple, TypeVar

import pika
import pika.exceptions
import pika.spec
from pika.adapters.utils.connection_workflow import AMQPConnectorException

from contracts import Event, EventType

log = logging.getLogger(__name__)

Item = TypeVar("Item")

EXCHANGE = "mail.events"
#: A writer's own time to publish; after that the sweep does. Longer than any confirmation takes.
PUBLISH_WITHIN = timedelta(seconds=30)
#: RabbitMQ under a memory alarm does not answer; a batch is then given up as unconfirmed.
CONFIRM_WITHIN = timedelta(seconds=10)
_BATCH = 200
#: A process has 15 seconds to end in all; what is not published by then is found by the sweep.
_CLOSE_WITHIN = timedelta(milliseconds=700)
_HEARTBEAT_EVERY = timedelta(seconds=5)
_RECONNECT_PAUSE = timedelta(seconds=1)


class Unconfirmed(Exception):
    """Raised when RabbitMQ did not confirm a message: it may or may not have been published."""


class Unpublishable(Unconfirmed):
    """Raised when a message cannot be sent as it is: trying again will not help it."""


class Outgoing(NamedTuple):
    """One message for RabbitMQ.

    ``mandatory``: it counts as unconfirmed if no queue takes it. ``best_effort``: it goes to a queue that is somebody
    else's, and whatever that queue does with it touches nothing else.
    """

    exchange: str
    routing_key: str
    body: bytes
    properties: pika.BasicProperties
    mandatory: bool = False
    best_effort: bool = False


def event_messages(event: Event) -> list[Outgoing]:
    """Return the event for everyone who listens, and a copy for the queue that the publisher named."""
    properties = pika.BasicProperties(
        content_type="application/json",
        delivery_mode=pika.DeliveryMode.Persistent,
        type=event.type,
        message_id=event.id,
        correlation_id=event.correlation_id,
        headers={"traceparent": event.traceparent} if event.traceparent else None,
    )
    messages = [Outgoing(EXCHANGE, EventType(event.type).routing_key, event.body, properties)]
    if event.reply_to:
        messages.append(Outgoing("", event.reply_to, event.body, properties, best_effort=True))
    return messages


class LenientProperties(pika.BasicProperties):
    """Properties of a message that came, without its headers if pika cannot read them.

    RabbitMQ carries what pika fails on: a timestamp in milliseconds, which is in the year 55,000, or tables that are
    nested a thousand deep. The failure would end the connection, and the same message would come first on the next.
    """

    def decode(self, encoded: bytes, offset: int = 0) -> Any:
        try:
            return super().decode(encoded, offset)
        except Exception as error:
            log.warning("a message's headers cannot be read and are left out: %s", type(error).__name__)
            return super().decode(self._without_headers(encoded[offset:]))

    def _without_headers(self, encoded: bytes) -> bytes:
        (flags,) = struct.unpack_from(">H", encoded)
        start = 2
        for before in (self.FLAG_CONTENT_TYPE, self.FLAG_CONTENT_ENCODING):
            start += 1 + encoded[start] if flags & before else 0
        (table_bytes,) = struct.unpack_from(">I", encoded, start)
        rest = encoded[start + 4 + table_bytes :]
        return struct.pack(">H", flags & ~self.FLAG_HEADERS) + encoded[2:start] + rest


# Where pika looks for the class; every connection of the process, Dramatiq's too, reads messages with it.
pika.spec.props[pika.BasicProperties.INDEX] = LenientProperties


def check_url(url: str) -> None:
    """Raise ValueError if pika cannot read something in the URL. The error does not quote it."""
    try:
        pika.URLParameters(url)
    except Exception:  # pika reads each parameter in its own way
        raise ValueError("has a part that is not of the form that it must have") from None


class _Parameters(pika.URLParameters):
    """Parameters whose user and password may be changed while the process runs: each connection asks for them."""

    __slots__ = ("reread",)

    @property
    def credentials(self) -> Any:
        url = self.reread() if hasattr(self, "reread") else None
        if url is not None:
            self._credentials = pika.URLParameters(url).credentials
        return self._credentials

    @credentials.setter
    def credentials(self, value: Any) -> None:
        self._credentials = value


def connection_parameters(url: str, client: str, reread: Callable[[], str | None] = lambda: None) -> pika.URLParameters:
    """Return how every connection of ours is made: it notices a dead or blocked server within half a minute.

    Args:
        reread: Asked for the URL when a connection is made, for the password in it may be another; None: it is not.
    """
    parameters = _Parameters(url)
    parameters.reread = reread
    parameters.heartbeat = 20
    parameters.blocked_connection_timeout = 15
    parameters.socket_timeout = 5
    parameters.stack_timeout = 10
    parameters.client_properties = {"connection_name": client}
    return parameters


def connect(parameters: pika.URLParameters) -> pika.BlockingConnection:
    """Open a connection of the caller's own.

    Raises:
        AMQPError, OSError: RabbitMQ is away. pika's own error for a handshake that hangs would be neither.
    """
    try:
        return pika.BlockingConnection(parameters)
    except AMQPConnectorException as error:
        raise pika.exceptions.AMQPConnectionError("the handshake was not finished in time") from error


def unconfirmed(confirmations: Sequence[Future[None]]) -> list[BaseException | None]:
    """Wait until all have ended, at most `PUBLISH_WITHIN`; return for each what it failed with, None if confirmed."""
    wait(confirmations, timeout=PUBLISH_WITHIN.total_seconds())
    return [done.exception() if done.done() else Unconfirmed("confirmation overdue") for done in confirmations]


class _Batch(NamedTuple):
    messages: list[Outgoing]
    done: Future[None]


class Publisher:
    """Publishes what threads hand over, in the order of each thread, over one connection.

    Args:
        parameters: Where RabbitMQ is.
        declare: Makes the exchanges and queues that must exist; called on every new connection.
    """

    def __init__(self, parameters: pika.URLParameters, declare: Callable[[Any], None]) -> None:
        self._parameters = parameters
        self._declare = declare
        self._waiting: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._start = threading.Lock()
        self._thread: threading.Thread | None = None
        self._connection: Any = None
        self._channel: Any = None
        self._failed_at = float("-inf")
        self._returned: list[str] = []
        self._refused: set[int] = set()
        self._sent: dict[int, Outgoing] = {}

    def submit(self, messages: Sequence[Outgoing]) -> Future[None]:
        """Hand messages over; the future ends when all are confirmed or with `Unconfirmed`."""
        self._ensure_started()
        batch = _Batch(list(messages), Future())
        self._waiting.put(batch)
        return batch.done

    def publish(self, messages: Sequence[Outgoing]) -> None:
        """Publish and wait until all are confirmed, at most `PUBLISH_WITHIN`.

        Raises:
            Unconfirmed: RabbitMQ is away, blocked, or has no queue for a mandatory message.
        """
        if messages:
            (failure,) = unconfirmed([self.submit(messages)])
            if failure:
                raise failure

    def close(self) -> None:
        """Publish what was handed over and end the connection. Whoever still comes afterwards opens another."""
        with self._start:
            if self._thread:
                self._waiting.put(None)
                self._thread.join(timeout=_CLOSE_WITHIN.total_seconds())
            self._thread = None

    def _ensure_started(self) -> None:
        with self._start:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        open = True
        while open:
            batches = self._next_batches()
            open = None not in batches
            if work := [batch for batch in batches if batch is not None]:
                self._settle_surely(work)
            else:
                self._keep_alive()
        self._disconnect()

    def _settle_surely(self, batches: list[_Batch]) -> None:
        """Settle whatever happens: somebody waits for each of them, and this thread must live on."""
        try:
            self._settle(batches)
        except Exception as error:
            log.error("publishing failed: %s", type(error).__name__)
            self._disconnect()
            for batch in batches:
                if not batch.done.done():
                    batch.done.set_exception(Unconfirmed(f"publishing failed ({type(error).__name__})"))

    def _next_batches(self) -> list[_Batch | None]:
        """Wait for work, then take all that has gathered: batches grow by themselves under load."""
        try:
            batches = [self._waiting.get(timeout=_HEARTBEAT_EVERY.total_seconds())]
        except queue.Empty:
            return []
        while len(batches) < _BATCH and not self._waiting.empty():
            batches.append(self._waiting.get())
        return batches

    def _settle(self, batches: list[_Batch]) -> None:
        try:
            unroutable = self._publish([m for batch in batches for m in batch.messages if not m.best_effort])
        except Unconfirmed as error:
            if isinstance(error, Unpublishable) and len(batches) > 1:
                for batch in batches:
                    self._settle([batch])  # the one that cannot be published fails alone
            else:
                for batch in batches:
                    batch.done.set_exception(error)
            return
        self._send_apart([message for batch in batches for message in batch.messages if message.best_effort])
        for batch in batches:
            missing = {m.routing_key for m in batch.messages if m.mandatory} & unroutable
            if missing:
                batch.done.set_exception(Unconfirmed(f"RabbitMQ has no queue named {', '.join(sorted(missing))}"))
            elif any(id(message) in self._refused for message in batch.messages):
                batch.done.set_exception(Unpublishable("a queue that is full refuses it"))
            else:
                batch.done.set_result(None)

    def _send_apart(self, messages: list[Outgoing]) -> None:
        """Publish each over a channel of its own: RabbitMQ closes the channel of a reply that it cannot make."""
        for message in messages:
            try:
                channel = self._connection.channel()
                channel.basic_publish(message.exchange, message.routing_key, message.body, message.properties)
                channel.close()
            except Exception as error:
                log.info("a copy that was asked for could not be delivered: %s", type(error).__name__)

    def _publish(self, messages: list[Outgoing]) -> set[str]:
        """Publish and wait until all are confirmed; return the queues that mandatory messages did not find."""
        try:
            channel = self._open_channel()
            self._returned.clear()
            self._refused.clear()
            self._sent.clear()
            self._send(channel, messages)
            self._await_confirms()
        except Unconfirmed:
            raise
        except (pika.exceptions.AMQPConnectionError, pika.exceptions.AMQPChannelError, OSError) as error:
            self._failed_at = time.monotonic()
            self._disconnect()
            raise Unconfirmed(f"RabbitMQ did not confirm ({type(error).__name__})") from error
        except Exception as error:
            # pika refuses with whatever came to its mind, AMQPErrors too, what it cannot encode.
            log.error("a batch could not be published: %s", type(error).__name__)
            self._disconnect()
            raise Unpublishable(f"a message cannot be published ({type(error).__name__})") from error
        if self._returned:
            self._disconnect()  # the next connection declares what is missing
        return set(self._returned)

    def _send(self, channel: Any, messages: list[Outgoing]) -> None:
        for message in messages:
            self._published += 1
            self._pending.add(self._published)
            self._sent[self._published] = message
            # BlockingChannel would write each to the socket by itself; the channel beneath it keeps them for one write.
            channel._impl.basic_publish(
                message.exchange, message.routing_key, message.body, message.properties, mandatory=message.mandatory
            )

    def _await_confirms(self) -> None:
        """Write what is to be sent, and wait until all of it is confirmed."""
        deadline = time.monotonic() + CONFIRM_WITHIN.total_seconds()
        # Unlike process_data_events with a time limit, this returns as soon as a confirmation has come. By itself it
        # would wait for as long as the connection lives, whatever became of the channel.
        self._connection._flush_output(
            lambda: not self._pending or self._channel.is_closed or time.monotonic() > deadline
        )
        if self._channel.is_closed:
            raise pika.exceptions.AMQPChannelError("message refused")
        if self._pending:
            raise pika.exceptions.AMQPConnectionError("confirmation overdue")

    def _open_channel(self) -> Any:
        if self._still_open():
            return self._channel
        if time.monotonic() - self._failed_at < _RECONNECT_PAUSE.total_seconds():
            raise Unconfirmed("RabbitMQ was away a moment ago")
        self._connection = connect(self._parameters)
        channel = self._channel = self._connection.channel()
        self._declare(channel)
        self._published, self._pending = 0, set()
        # BlockingChannel can only wait for one confirmation at a time; the channel beneath it reports each as it comes.
        channel._impl.confirm_delivery(self._on_confirmation)
        channel._impl.add_on_return_callback(self._on_return)
        return channel

    def _still_open(self) -> bool:
        """Notice, before anything is published, what the server has closed meanwhile."""
        self._keep_alive()
        if self._connection is not None and self._channel.is_closed:
            self._disconnect()
        return self._connection is not None

    def _on_confirmation(self, frame: Any) -> None:
        tag, multiple = frame.method.delivery_tag, frame.method.multiple
        settled = {t for t in self._pending if t <= tag} if multiple else {tag}
        if isinstance(frame.method, pika.spec.Basic.Nack):
            self._refused |= {id(self._sent[t]) for t in settled if t in self._sent}
        self._pending -= settled

    def _on_return(self, _channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
        self._returned.append(method.routing_key)

    def _keep_alive(self) -> None:
        if self._connection is not None:
            try:
                self._connection.process_data_events(0)
            except Exception:  # pika asserts what it expects of a connection
                self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        try:
            if connection is not None and connection.is_open:
                connection.close()
        except Exception:  # as above
            log.debug("the connection was lost while it was closed")


class Pace:
    """Keeps turns apart, so that each finds more to do; after a lull the first begins at once. Threads may share it."""

    def __init__(self) -> None:
        self._began_at = float("-inf")
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def keep(self, apart: timedelta) -> None:
        """Wait until it is so long since the last turn began; the next begins then."""
        with self._lock:
            self._began_at = max(time.monotonic(), self._began_at + apart.total_seconds())
            begins_in = self._began_at - time.monotonic()
        if begins_in > 0:
            self._ended.wait(begins_in)

    def end(self) -> None:
        """Let every turn begin at once from now on."""
        self._ended.set()


class Batcher(Generic[Item]):
    """Gathers what threads add and passes it on in batches, from a thread of its own.

    For what need not be waited for and may be lost: if passing a batch on fails, or the process dies, either a sweep
    makes up for it or nothing depends on it.

    Args:
        apart: Batches begin so far apart: what is added meanwhile goes together. After a lull the first item goes at
            once.
    """

    def __init__(
        self, name: str, pass_on: Callable[[list[Item]], object], apart: timedelta = timedelta(milliseconds=50)
    ) -> None:
        self._name = name
        self._pass_on = pass_on
        self._apart = apart
        self._pace = Pace()
        self._waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._start = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, items: Iterable[Item]) -> None:
        """Hand items over; returns at once."""
        with self._start:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        for item in items:
            self._waiting.put(item)

    def close(self) -> None:
        """Pass on what was handed over. Whatever still comes afterwards is passed on as well."""
        self._pace.end()
        with self._start:
            if self._thread:
                self._waiting.put(None)
                self._thread.join(timeout=_CLOSE_WITHIN.total_seconds())
            self._thread = None

    def _run(self) -> None:
        open = True
        while open:
            gathered = [self._waiting.get()]
            self._pace.keep(self._apart)
            while len(gathered) < _BATCH and not self._waiting.empty():
                gathered.append(self._waiting.get())
            open = None not in gathered
            self._flush([item for item in gathered if item is not None])

    def _flush(self, batch: list[Item]) -> None:
        try:
            if batch:
                self._pass_on(batch)
        except Exception as error:
            log.warning("%d %s were not passed on: %s", len(batch), self._name, type(error).__name__)
