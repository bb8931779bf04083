"""Servers that go away under load, what was published meanwhile, and what the fleet spent on waiting for them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pika
import psycopg2
import requests
from fleet_support import a_mailbox, an_attachment, an_email, emails, fates
from pika.exceptions import ChannelClosedByBroker

from sandbox.servers import Servers
from sandbox.world import World

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Effort(NamedTuple):
    """What one replica, with all that it forked, spent while a server was away."""

    outage: str
    replica: str
    lasted_seconds: float
    processor_seconds: float
    lines: int


class Outages:
    """A fleet at work on servers that can be taken away from it."""

    def __init__(self, servers: Servers, world: World) -> None:
        self.servers = servers
        self.world = world
        self.given: list[dict[str, Any]] = []
        #: Emails whose events may have gone where nobody had bound a queue yet.
        self.untold: list[dict[str, Any]] = []
        self.efforts: list[Effort] = []

    def some_work(self, name: str) -> list[dict[str, Any]]:
        """Publish emails of five mailboxes and return them as soon as some have left."""
        mailboxes = [a_mailbox(name) for _ in range(5)]
        batch = [email for mailbox in mailboxes for email in emails(4, mailbox)]
        files = [an_attachment(self.world.simulator, 3_500_000) for _ in range(2)]
        batch += [an_email(mailbox, attachments=[file]) for mailbox, file in zip(mailboxes, files, strict=False)]
        self.given += batch
        self.world.publish(*batch)
        # A consumer whose queue was deleted and declared again at once notices within a minute.
        left = lambda: len(self.world.simulator.deliveries(mailboxes[0])) > 2  # noqa: E731
        self.world.wait_until("some have left", left, timedelta(seconds=90))
        return batch

    def more_work(self, name: str) -> None:
        """Publish emails that nobody may be able to take."""
        batch = emails(6, a_mailbox(name))
        self.given += batch
        self.world.publish(*batch)

    def some_stored_work(self, name: str) -> None:
        """Publish emails and return when RabbitMQ may lose them and what it has to tell of them."""
        batch = self.some_work(name)
        self.untold += batch
        self.world.wait_until("all are stored", lambda: len(fates(self.world, batch)) == len(batch))

    def wait_until_told(self) -> None:
        """Wait until both events of every email that was given have come to the subscriber."""
        names = {email["publisher_message_id"] for email in self.given}

        def told(type: str) -> set[str]:
            return {event.body["publisher_message_id"] for event in self.world.events(type)}

        self.world.wait_until("all are told", lambda: told("SendEmailReceived") & told("SendEmailSent") >= names)

    @contextmanager
    def away(self, outage: str) -> Iterator[None]:
        """Measure what the fleet spends in the block."""
        began, spent, logged = time.monotonic(), self._processor_seconds(), self._lines()
        yield
        lasted, spent_since, logged_since = time.monotonic() - began, self._processor_seconds(), self._lines()
        self.efforts += [
            Effort(outage, name, lasted, spent_since[name] - spent[name], logged_since[name] - logged[name])
            for name in spent
        ]

    def freeze(self, server: str, duration: timedelta) -> None:
        """Have a server accept connections and say nothing for a while."""
        frozen = getattr(self.servers, server)
        with self.away(f"{server} is frozen"):
            frozen.suspend()
            self.let_pass(duration)
            frozen.resume()

    def let_pass(self, duration: timedelta) -> None:
        """Let an outage last."""
        until = time.monotonic() + duration.total_seconds()
        self.world.wait_until("it is over", lambda: time.monotonic() > until, 2 * duration)

    def administer(self, *statements: str) -> None:
        """Run statements on PostgreSQL in a session that may write whatever the default is."""
        connection = psycopg2.connect(self.servers.postgresql.url, options="-c default_transaction_read_only=off")
        connection.autocommit = True
        for statement in statements:
            connection.cursor().execute(statement)
        connection.close()

    @contextmanager
    def rabbitmq(self) -> Iterator[Any]:
        """Lend a channel of an operator's own."""
        with pika.BlockingConnection(pika.URLParameters(self.servers.rabbitmq.url)) as connection:
            yield connection.channel()

    def consumers(self, queue: str) -> int:
        """Return how many consume from a queue; 0 if there is none."""
        with suppress(ChannelClosedByBroker), self.rabbitmq() as channel:
            return int(channel.queue_declare(queue, passive=True).method.consumer_count)
        return 0

    def exchange_exists(self, name: str) -> bool:
        with suppress(ChannelClosedByBroker), self.rabbitmq() as channel:
            return bool(channel.exchange_declare(name, passive=True))
        return False

    def times_done(self, replica: str, actor: str) -> int:
        """Return how many messages of an actor a worker has done, as its metrics tell."""
        url = f"http://127.0.0.1:{self.world.fleet.ports[replica].metrics_port}/metrics"
        with requests.Session() as session:
            session.trust_env = False
            lines = session.get(url, timeout=5).text.splitlines()
        sample = f'mailfleet_messages_total{{actor="{actor}",outcome="done"}}'
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith(sample))

    def _processor_seconds(self) -> dict[str, float]:
        return {name: sum(map(_spent, self.world.fleet.pids(name))) for name in self.world.fleet.logs}

    def _lines(self) -> dict[str, int]:
        return {name: log.read_bytes().count(b"\n") for name, log in self.world.fleet.logs.items()}


def _spent(pid: int) -> float:
    """Return the seconds of a processor that a process has used, by itself and by the kernel; see proc(5)."""
    with suppress(FileNotFoundError):
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / _TICKS_PER_SECOND
    return 0.0
