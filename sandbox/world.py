"""A whole mailfleet in a box: the Procfile's processes, a simulated Graph, and the means to publish and to look.

Servers are given by their URLs and are emptied at the start, so they must be private ones.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import orjson
import pika
import psycopg2
import redis

from sandbox.environment import fleet_settings
from sandbox.fleet import Fleet
from simulator.control import Simulator

ROOT = Path(__file__).resolve().parent.parent
PROCFILE = ROOT / "Procfile"

#: Often enough for a test; what is asked costs the fleet a part of the same processors.
POLL = timedelta(milliseconds=100)

#: No email goes on by itself from these, and its backup is stored or given up.
_SETTLED = """
    SELECT count(*) FROM incoming_emails e LEFT JOIN sent_emails s ON s.incoming_email_id = e.id
    WHERE e.status IN ('failed', 'cancelled', 'expired') OR (e.status = 'processed' AND s.backup_due_at IS NULL)
"""


class Overdue(AssertionError):
    """Raised when something did not come about in time."""


class Event(NamedTuple):
    """One message that arrived on ``mail.events``."""

    type: str
    message_id: str
    correlation_id: str | None
    body: dict[str, Any]


class World:
    """A fleet with its Graph for the length of a ``with`` block.

    Args:
        servers: ``DATABASE_URL``, ``RABBITMQ_URL``, ``REDIS_URL``. A database of its own is made in the first.
        directory: For logs and the simulator's files.
        settings: Overrides of the fleet's settings, by variable.
        simulator: One that runs already; else one is started.
        fleet_options: As of `Fleet`: ``only``, ``scale``, ``supervise``.
    """

    def __init__(
        self,
        servers: Mapping[str, str],
        directory: Path,
        settings: Mapping[str, str | int] | None = None,
        **fleet_options: Any,
    ) -> None:
        self._servers = dict(servers)
        self._directory = directory
        self._settings = settings or {}
        self._fleet_options = fleet_options
        self._stack = ExitStack()
        self._database: Any = None
        self.simulator: Simulator
        self.fleet: Fleet
        self.environment: dict[str, str] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._empty_servers(stack)
            self.simulator = stack.enter_context(Simulator.start(self._directory / "graph"))
            temporary = self._directory / "tmp"
            temporary.mkdir(exist_ok=True)
            # Workers leave the files of their metrics there.
            store = {"ATTACHMENT_STORE_URL": f"file://{self._directory.absolute() / 'attachments'}"}
            own = {**fleet_settings(self.simulator, **{**store, **self._settings}), "TMPDIR": str(temporary)}
            self.environment = {**os.environ, **self._servers, **own}
            self.fleet = Fleet(PROCFILE, self.environment, self._directory / "logs", **self._fleet_options)
            stack.enter_context(self.fleet)
            self._listener = stack.enter_context(_Listener(self._servers["RABBITMQ_URL"]))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._database:
            self._database.close()
        self._stack.__exit__(kind, error, trace)

    def _empty_servers(self, stack: ExitStack) -> None:
        redis.Redis.from_url(self._servers["REDIS_URL"]).flushall()
        drop_queues(self._servers["RABBITMQ_URL"])
        self._servers["DATABASE_URL"] = new_database(self._servers["DATABASE_URL"], stack)

    # Publishing

    def publish(self, *emails: Mapping[str, Any] | bytes, **properties: Any) -> None:
        """Publish emails, or raw bodies, as an application would: persistent, confirmed, on the default exchange."""
        with pika.BlockingConnection(pika.URLParameters(self.environment["RABBITMQ_URL"])) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            for email in emails:
                body = email if isinstance(email, bytes) else orjson.dumps(dict(email))
                channel.basic_publish(
                    "", "send_email", body, pika.BasicProperties(delivery_mode=2, **properties), mandatory=True
                )

    # Looking

    def rows(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Run one statement on the fleet's database."""
        kept = self._database
        if kept:
            try:
                return _rows(kept, sql, parameters)
            except (psycopg2.OperationalError, psycopg2.InterfaceError):
                pass  # PostgreSQL was away since
        self._database = psycopg2.connect(self._servers["DATABASE_URL"])
        self._database.autocommit = True
        return _rows(self._database, sql, parameters)

    def count(self, sql: str) -> int:
        """Return the only value of a query."""
        return int(self.rows(sql)[0][0])

    def events(self, type: str | None = None) -> list[Event]:
        """Return every event that has arrived so far, in order, repeats included."""
        return [event for event in list(self._listener.events) if type in (None, event.type)]

    def queue_depth(self, queue: str) -> int:
        """Return how many messages are ready in a queue."""
        with pika.BlockingConnection(pika.URLParameters(self.environment["RABBITMQ_URL"])) as connection:
            return int(connection.channel().queue_declare(queue, passive=True).method.message_count)

    def wait_until(self, what: str, holds: Callable[[], Any], within: timedelta = timedelta(seconds=90)) -> Any:
        """Wait until ``holds`` returns something true, and return it.

        Raises:
            Overdue: It did not in time.
        """
        deadline = time.monotonic() + within.total_seconds()
        while not (found := holds()):
            if time.monotonic() > deadline:
                raise Overdue(
                    f"not within {within.total_seconds():g} s: {what}; the fleet's logs are in {self._directory}"
                )
            time.sleep(POLL.total_seconds())
        return found

    def wait_until_ready(self, within: timedelta = timedelta(seconds=30)) -> None:
        """Wait until publishers find their queue and every worker's queue has a consumer.

        Raises:
            Overdue: They do not in time, or a process has ended by itself and nobody starts it again.
        """
        self.wait_until("the fleet is ready", self._ready, within)

    def _ready(self) -> bool:
        if (dead := self.fleet.dead) and not self._fleet_options.get("supervise"):
            raise Overdue(f"{', '.join(dead)} ended before the fleet was ready; its logs are in {self._directory}")
        types = {name.rsplit(".", 1)[0] for name in self.fleet.ports}
        return _have_consumers(self.environment["RABBITMQ_URL"], ["send_email", *(types & set(QUEUES))])

    def wait_until_settled(self, emails: int, within: timedelta = timedelta(seconds=60)) -> None:
        """Wait until so many emails are failed, cancelled or expired, or sent and archived or their backup given up."""
        self.wait_until(f"{emails} emails are settled", lambda: self.count(_SETTLED) >= emails, within)

    def log_lines(self, name: str) -> list[dict[str, Any]]:
        """Return the JSON lines that a process has logged."""
        lines = self.fleet.logs[name].read_bytes().splitlines()
        return [orjson.loads(line) for line in lines if line.startswith(b"{")]


class _Listener:
    """Collects what is published on ``mail.events``."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._over = threading.Event()
        self._bound = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.events: list[Event] = []

    def __enter__(self) -> Self:
        self._thread.start()
        self._bound.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self._listen()
            except (pika.exceptions.AMQPError, OSError):
                self._over.wait(0.5)

    def _listen(self) -> None:
        with pika.BlockingConnection(pika.URLParameters(self._url)) as connection:
            channel = connection.channel()
            channel.exchange_declare("mail.events", "topic", durable=True)
            # Durable: a restart of RabbitMQ must not hide events from whoever counts them.
            channel.queue_declare("sandbox.events", durable=True)
            channel.queue_bind("sandbox.events", "mail.events", "#")
            self._bound.set()
            for method, properties, body in channel.consume("sandbox.events", inactivity_timeout=0.1):
                if method is not None:
                    self.events.append(
                        Event(properties.type, properties.message_id, properties.correlation_id, orjson.loads(body))
                    )
                    channel.basic_ack(method.delivery_tag)
                if self._over.is_set():
                    return


def _rows(connection: Any, sql: str, parameters: Mapping[str, Any] | None) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters)
        return cursor.fetchall() if cursor.description else []


def _have_consumers(rabbitmq_url: str, queues: Iterable[str]) -> bool:
    with pika.BlockingConnection(pika.URLParameters(rabbitmq_url)) as connection:
        channel = connection.channel()
        try:
            return all(channel.queue_declare(queue, passive=True).method.consumer_count > 0 for queue in queues)
        except pika.exceptions.ChannelClosedByBroker:
            return False


#: Every queue that a fleet may have made.
QUEUES = ("ingest", "scheduler", "send_plain", "send_attached", "backup", "maintenance")
_OTHER_QUEUES = ("send_email", "send_email.rejected", "mail.dead_letters.mirror", "sandbox.events")


def drop_queues(rabbitmq_url: str, queues: Iterable[str] = QUEUES) -> None:
    """Delete the fleet's queues and what is in them."""
    with pika.BlockingConnection(pika.URLParameters(rabbitmq_url)) as connection:
        for queue in [*_OTHER_QUEUES, *(name + suffix for name in queues for suffix in ("", ".DQ", ".XQ"))]:
            connection.channel().queue_delete(queue)


def new_database(database_url: str, stack: ExitStack) -> str:
    """Make an empty database beside the one that is named, to be dropped with the stack, and return its URL."""
    name = f"mailfleet_{time.time_ns():x}"
    _administer(database_url, f'CREATE DATABASE "{name}"')
    stack.callback(_administer, database_url, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    return urlsplit(database_url)._replace(path=f"/{name}").geturl()


def _administer(database_url: str, statement: str) -> None:
    connection = psycopg2.connect(database_url)
    try:
        connection.autocommit = True
        connection.cursor().execute(statement)
    except psycopg2.OperationalError:
        if not statement.startswith("DROP"):
            raise  # a server that is gone has no database to drop
    finally:
        connection.close()
