"""The bridge: consumes ``send_email`` and calls the ingest actor in its own process, a batch at a time.

A delivery is acknowledged only when it is stored and its event confirmed, or when it is kept in
``send_email.rejected`` and the publisher told; so bad input never stops the line, and nothing is lost when PostgreSQL
or RabbitMQ are away: the deliveries stay unacknowledged until both are back.

Where it may die, and what the next one does:

* ``bridge.consumed``, before the commit: RabbitMQ delivers the batch again; nothing has happened.
* within ``ingest``: see there.
* ``bridge.ingested``, before the ACK: RabbitMQ delivers the batch again, and it finds its rows.
* ``bridge.acknowledged``: nothing is left to do.
"""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pika.exceptions

import runtime
import telemetry
from actors.ingest import Delivery, ingest
from broker import RENEWAL_AFTER
from crash_points import CrashPoint
from models import DatabaseAway
from outbox import Unconfirmed, connect

log = logging.getLogger(__name__)

#: One transaction and one confirmation for so many deliveries; more gain little.
BATCH = 100
#: A batch is closed at this, too: a delivery may have megabytes, and a transaction holds each several times.
BATCH_BYTES = 8 * 1024 * 1024
#: RabbitMQ hands out the next batch while one is being stored.
PREFETCH = 2 * BATCH
#: It counts deliveries, not bytes: in an outage it would have us hold as many as these, whatever their size.
HELD_BYTES = 4 * BATCH_BYTES
#: A batch that is not full waits no longer than this, and not at all if it comes so long after the last: mail that
#: comes singly is not held back.
LINGER = timedelta(milliseconds=10)
LULL = timedelta(milliseconds=100)
#: With nothing in hand the bridge looks no more often whether it shall stop.
IDLE = timedelta(milliseconds=500)
_FIRST_PAUSE, _LONGEST_PAUSE = timedelta(milliseconds=500), timedelta(seconds=15)


class Inbox:
    """What RabbitMQ has handed out and no batch has taken yet, bounded in bytes.

    What comes over the bound is put aside: its body is let go, and RabbitMQ gets it back once the rest is done. Until
    then everything that follows is put aside too, so that all of it can be told by its last tag. A delivery comes back
    to its queue once in an outage, not again and again.
    """

    def __init__(self, connection: pika.BlockingConnection, channel: Any, bound_bytes: int) -> None:
        self.held_bytes = 0
        self._held: deque[tuple[Any, Any, bytes]] = deque()
        self._bound_bytes = bound_bytes
        self._last_aside: int | None = None
        self._connection, self._channel = connection, channel
        self._cancelled = False
        channel.add_on_cancel_callback(self._cancel)
        channel.basic_consume(runtime.SEND_QUEUE, self._receive)

    def take(self, patience: timedelta) -> tuple[Any, Any, bytes] | None:
        """Return the next delivery, None if none comes in time.

        Raises:
            AMQPError: RabbitMQ no longer hands out anything to us.
        """
        if not self._held:
            self._connection.process_data_events(patience.total_seconds())
        if self._held:
            delivery = self._held.popleft()
            self.held_bytes -= len(delivery[2])
            return delivery
        if self._cancelled or not self._channel.is_open:
            raise pika.exceptions.ConsumerCancelled
        return None

    def hand_back(self) -> None:
        """Give RabbitMQ back what was put aside, if all that came before it is acknowledged."""
        if self._last_aside is not None and not self._held:
            tag, self._last_aside = self._last_aside, None
            self._channel.basic_nack(tag, multiple=True, requeue=True)

    def _receive(self, _channel: Any, method: Any, properties: Any, body: bytes) -> None:
        over = self._held and self.held_bytes + len(body) > self._bound_bytes
        if over or self._last_aside is not None:
            self._last_aside = method.delivery_tag
        else:
            self._held.append((method, properties, body))
            self.held_bytes += len(body)

    def _cancel(self, _frame: Any) -> None:
        self._cancelled = True


class Bridge:
    """Consumes until it is stopped; comes back by itself when a server was away.

    Args:
        held_bytes: Of what waits for a batch no more is kept in memory, but for a single delivery that is larger.
    """

    def __init__(self, held_bytes: int = HELD_BYTES) -> None:
        self._running = True
        self._pause = _FIRST_PAUSE
        self._held_bytes = held_bytes

    def stop(self, *_signal: Any) -> None:
        """End after the batch in hand."""
        self._running = False

    def run(self) -> None:
        """Consume, over one connection after another, until stopped."""
        while self._running:
            try:
                self._consume()
            except (pika.exceptions.AMQPError, OSError) as error:
                self._wait("RabbitMQ is away", error, time.sleep)

    def _wait(self, what: str, error: Exception, sleep: Callable[[float], None]) -> None:
        log.warning("%s, trying again in %.1f s: %s", what, self._pause.total_seconds(), type(error).__name__)
        until = time.monotonic() + self._pause.total_seconds()
        while self._running and time.monotonic() < until:
            sleep(0.1)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _consume(self) -> None:
        connection = connect(runtime.rabbitmq)
        try:
            channel = connection.channel()
            runtime.declare(channel)
            channel.basic_qos(prefetch_count=PREFETCH)
            for batch in self._batches(Inbox(connection, channel, self._held_bytes)):
                runtime.crash_point(CrashPoint.BRIDGE_CONSUMED)
                if not self._ingest([_delivery(properties, body) for _, properties, body in batch], connection):
                    return
                runtime.crash_point(CrashPoint.BRIDGE_INGESTED)
                channel.basic_ack(batch[-1][0].delivery_tag, multiple=True)
                runtime.crash_point(CrashPoint.BRIDGE_ACKNOWLEDGED)
                self._pause = _FIRST_PAUSE
        finally:
            if connection.is_open:
                connection.close()

    def _ingest(self, deliveries: list[Delivery], connection: pika.BlockingConnection) -> bool:
        """Ingest, however long it takes; return whether it is done. If not the bridge is to stop.

        The batch is kept meanwhile: RabbitMQ 4 drops what comes back to a quorum queue more than twenty times.
        """
        while True:
            try:
                with telemetry.INGEST_SECONDS.time():
                    ingest(deliveries)
            except (DatabaseAway, Unconfirmed) as error:
                self._wait("a batch is kept", error, connection.sleep)
                if not self._running:
                    return False
            else:
                return True

    def _batches(self, inbox: Inbox) -> Iterator[list[tuple[Any, Any, bytes]]]:
        """Yield what has come, at most a batch at a time, waiting a moment for a batch to fill.

        Each is acknowledged before the next is asked for. Ends when nothing has come for so long that the queue may
        have been deleted without our being told.
        """
        batch: list[tuple[Any, Any, bytes]] = []
        held_bytes, busy_at, handed_over_at = 0, time.monotonic(), float("-inf")
        while batch or (self._running and time.monotonic() - busy_at < RENEWAL_AFTER.total_seconds()):
            if not batch:
                inbox.hand_back()
            linger = LINGER if time.monotonic() - handed_over_at < LULL.total_seconds() else timedelta()
            delivery = inbox.take(linger if batch else IDLE)
            if delivery is not None:
                busy_at = time.monotonic()
                batch.append(delivery)
                held_bytes += len(delivery[2])
            if batch and (delivery is None or len(batch) >= BATCH or held_bytes >= BATCH_BYTES):
                yield batch
                batch, held_bytes, handed_over_at = [], 0, time.monotonic()


def _delivery(properties: Any, body: bytes) -> Delivery:
    traceparent = (properties.headers or {}).get("traceparent")
    return Delivery.of(body, properties.correlation_id, properties.reply_to, traceparent, properties.user_id)


def main() -> None:
    """Run the bridge until SIGTERM or SIGINT."""
    telemetry.serve_own_metrics(runtime.configuration.metrics_port)
    bridge = Bridge()
    signal.signal(signal.SIGTERM, bridge.stop)
    signal.signal(signal.SIGINT, bridge.stop)
    log.info("the bridge is up")
    bridge.run()
    runtime.close()


if __name__ == "__main__":
    main()
