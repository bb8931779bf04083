"""How fast the bridge takes mail in and what a mail costs, beside a plain consumer in the same run.

Only the bridge runs. It stands still while the queue is filled, so that what is measured is the taking alone, from the
first delivery until every mail is stored and its event published. The plain consumer does one INSERT and one
acknowledgement per message: no validation, no duplicates, no events; a message that it cannot store stops it.

    python -m bench.ingest --emails 10000 --json ingest.json

The run fails if the bridge did not store each mail once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pika
import psycopg2

from bench import report
from bench.comparison import Comparison
from bench.load import emails, publish, seconds_until
from bench.processor import Groups, cpu_seconds, groups, spent
from sandbox.servers import Servers
from sandbox.world import World

PLAIN_QUEUE = "plain"
#: As many as the bridge has.
_PREFETCH = 200
_TABLE = "CREATE TABLE plain_emails (id bigserial PRIMARY KEY, payload json NOT NULL, created_at timestamptz NOT NULL)"
_INSERT = "INSERT INTO plain_emails (payload, created_at) VALUES (%s, now())"
# Both are told in a moment whatever has been stored: counting rows again and again would be measured with the rest.
_ALL_INGESTED = """
    SELECT count(*) FROM incoming_emails WHERE publisher_message_id = 'bench-{last}'
       AND NOT EXISTS (SELECT 1 FROM outbox_events WHERE published_at IS NULL)
"""
_INSERTED = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM plain_emails_id_seq"
_SERVERS = ("postgresql", "rabbitmq")


class Measurement(NamedTuple):
    """How many mails a second, and milliseconds of processor time per mail by group."""

    per_second: float
    cpu_per_email: dict[str, float]


def consume_plainly(rabbitmq_url: str, database_url: str) -> None:
    """Take messages until killed: the floor."""
    database = psycopg2.connect(database_url)
    with pika.BlockingConnection(pika.URLParameters(rabbitmq_url)) as connection:
        channel = connection.channel()
        channel.queue_declare(PLAIN_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        channel.basic_qos(prefetch_count=_PREFETCH)
        for method, _, body in channel.consume(PLAIN_QUEUE):
            with database, database.cursor() as cursor:
                cursor.execute(_INSERT, (body.decode(),))
            channel.basic_ack(method.delivery_tag)


def measure_bridge(world: World, measured: Groups, bodies: Sequence[bytes]) -> Measurement:
    """Let the bridge take what waits."""
    url = world.environment["RABBITMQ_URL"]
    return _measure(
        measured,
        lambda: publish(url, "send_email", bodies),
        lambda: world.fleet.suspend("bridge"),
        lambda: world.fleet.resume("bridge"),
        lambda: bool(world.count(_ALL_INGESTED.format(last=len(bodies) - 1))),
        len(bodies),
    )


def measure_plain(world: World, measured: Groups, bodies: Sequence[bytes]) -> Measurement:
    """Let a plain consumer, a process of its own, take the same."""
    world.rows(_TABLE)
    with _plain_consumer(world) as pid:
        return _measure(
            {"consumer": lambda: {pid}, **{name: measured[name] for name in _SERVERS}},
            lambda: publish(world.environment["RABBITMQ_URL"], PLAIN_QUEUE, bodies),
            lambda: os.kill(pid, signal.SIGSTOP),
            lambda: os.kill(pid, signal.SIGCONT),
            lambda: world.count(_INSERTED) >= len(bodies),
            len(bodies),
        )


def _measure(
    measured: Groups,
    publish_all: Callable[[], None],
    suspend: Callable[[], None],
    resume: Callable[[], None],
    all_are_taken: Callable[[], bool],
    count: int,
) -> Measurement:
    suspend()
    publish_all()
    before, began = cpu_seconds(measured), time.monotonic()
    resume()
    took = seconds_until(began, all_are_taken)
    used = spent(before, cpu_seconds(measured))
    return Measurement(count / took, {name: 1000 * seconds / count for name, seconds in used.items()})


@contextmanager
def _plain_consumer(world: World) -> Iterator[int]:
    """Run a plain consumer for the length of the block; yields its process once it consumes."""
    urls = [world.environment[name] for name in ("RABBITMQ_URL", "DATABASE_URL")]
    # Not forked: this process has threads.
    consumer = multiprocessing.get_context("spawn").Process(target=consume_plainly, args=urls, daemon=True)
    consumer.start()
    try:
        world.wait_until("the plain consumer is up", lambda: _has_consumer(world))
        yield consumer.pid or 0
    finally:
        consumer.kill()
        consumer.join()


def _has_consumer(world: World) -> bool:
    with pika.BlockingConnection(pika.URLParameters(world.environment["RABBITMQ_URL"])) as connection:
        try:
            declared = connection.channel().queue_declare(PLAIN_QUEUE, passive=True)
        except pika.exceptions.ChannelClosedByBroker:
            return False
        return bool(declared.method.consumer_count)


def compare(bridge: Measurement, plain: Measurement) -> Comparison:
    found = Comparison("bridge", "plain")
    found.add("emails per second", bridge.per_second, plain.per_second)
    ours, theirs = bridge.cpu_per_email, plain.cpu_per_email
    found.add("CPU per email, in all, ms", sum(ours.values()), sum(theirs.values()), digits=3)
    found.add("CPU per email, own process, ms", ours["bridge"], theirs["consumer"], digits=3)
    for name in _SERVERS:
        found.add(f"CPU per email, {name}, ms", ours[name], theirs[name], digits=3)
    return found


def _each_is_stored(world: World, count: int) -> bool:
    left = world.queue_depth("send_email") + world.queue_depth("send_email.rejected")
    return not left and world.count("SELECT count(*) FROM incoming_emails") == count


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("ingest", __doc__)
    report.add_durable(parser, default=True)
    parser.add_argument("--emails", type=int, default=10_000)
    parser.add_argument("--mailboxes", type=int, default=200)
    parser.add_argument("--body-kb", type=float, default=2)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments(arguments)
    bodies = emails(options.emails, options.mailboxes, options.body_kb)
    with (
        tempfile.TemporaryDirectory(prefix="mailfleet-bench-") as directory,
        Servers(Path(directory), durable=options.durable, environment={}) as servers,
        World(servers.environment, Path(directory) / "world", only=("bridge",)) as world,
    ):
        world.wait_until_ready()
        of_world = groups(servers, world, ("bridge",))
        measured = {name: of_world[name] for name in ("bridge", *_SERVERS)}
        bridge = measure_bridge(world, measured, bodies)
        world.wait_until("each is stored and none is left", lambda: _each_is_stored(world, options.emails))
        world.fleet.stop()
        plain = measure_plain(world, measured, bodies)
    return report.tell(compare(bridge, plain), f"{options.emails} emails, bodies of {options.body_kb:g} KB", options)


if __name__ == "__main__":
    sys.exit(main())
