"""Whether a fleet under a steady load needs more and more of anything.

A mail comes every so often for as long as is asked. Every few seconds what the fleet holds is looked at: the memory of
each process type, Redis's keys and memory, files in its directory for temporary ones, messages that wait in queues
or are not acknowledged, connections of each process type. Memory is that of all processes of a type; pages that several
processes have are divided among them (``Pss`` of proc(5)), or each of their forks would count the same again.

    python -m bench.soak --json soak.json
    python -m bench.soak --minutes 3

The run fails if a process type has more memory than the bound, or if anything has grown over the second half: by
then all that is made once has been made. Three minutes only show that the bench works.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson
import pika
import redis
from rich.table import Table

from bench import report
from bench.limits import backlog
from bench.load import TYPES, UNBINDING, lift_limits
from bench.sockets import connections
from sandbox.servers import Servers
from sandbox.world import World

MOST_MEGABYTES = 120
#: A figure grows if it does by more than this share of its mean and more than its slack.
GROWTH_SHARE = 0.05
MEGABYTE = 1_000_000
#: A publisher that does not keep up has not made the load.
_LEAST_PUBLISHED_SHARE = 0.95
#: With the console, though nobody asks it anything.
_PROCESS_TYPES = (*TYPES, "console")
_PATIENCE = timedelta(minutes=2)
#: So many samples are enough for a slope, and one costs a second of a processor: RabbitMQ is asked by its own tool.
_SAMPLES = 180
_LEAST_SECONDS_APART = 5.0


class Kind(NamedTuple):
    """What is looked at: how much of it may come and go without having grown, and how much there may be at most."""

    name: str
    slack: float
    most: float | None = None


MEMORY = Kind("memory, MB", 2, MOST_MEGABYTES)
KEYS = Kind("Redis keys", 50)
REDIS_MEMORY = Kind("Redis memory, MB", 1)
FILES = Kind("temporary files", 5)
READY = Kind("messages ready", 100)
UNACKED = Kind("messages unacknowledged", 100)
#: A pool has as many as were ever needed at a time, up to one for each thread.
CONNECTIONS = Kind("connections", 4)

Samples = Sequence[tuple[float, float]]


class Figure(NamedTuple):
    """All that was seen of one thing: instants in seconds, and values."""

    kind: Kind
    whose: str
    samples: list[tuple[float, float]]

    @property
    def name(self) -> str:
        return f"{self.whose}: {self.kind.name}" if self.whose else self.kind.name

    @property
    def most(self) -> float:
        return max(value for _, value in self.samples)

    @property
    def growth(self) -> float:
        return growth(self.samples)

    @property
    def allowed_growth(self) -> float:
        return max(self.kind.slack, GROWTH_SHARE * statistics.mean(value for _, value in second_half(self.samples)))

    @property
    def broken(self) -> bool:
        return self.growth > self.allowed_growth or (self.kind.most is not None and self.most > self.kind.most)


def second_half(samples: Samples) -> Samples:
    return samples[len(samples) // 2 :]


def growth(samples: Samples) -> float:
    """Return by how much the second half has grown: its slope, by least squares, times its length.

    So one odd sample at the end decides nothing.
    """
    instants, values = zip(*second_half(samples), strict=True)
    if len(instants) < 2:
        return 0.0
    return float(statistics.linear_regression(instants, values).slope * (instants[-1] - instants[0]))


class Soak:
    """What was seen, as `bench.report` wants it."""

    def __init__(self, figures: Iterable[Figure], per_second: float, wanted_per_second: float) -> None:
        #: What was never there is left out: queues of kinds of mail that were not published, for one.
        self._figures = [figure for figure in figures if figure.most]
        self._per_second = per_second
        self._kept_up = per_second >= _LEAST_PUBLISHED_SHARE * wanted_per_second

    @property
    def hold(self) -> bool:
        return self._kept_up and not self.broken

    @property
    def broken(self) -> list[str]:
        return [figure.name for figure in self._figures if figure.broken]

    def table(self, title: str) -> Table:
        table = Table(title=f"{title}; {self._per_second:.1f} mails a second{'' if self._kept_up else ', too few'}")
        table.add_column("")
        for heading in ("at half", "at the end", "most", "bound", "growth of\nsecond half", "allowed"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for figure in self._figures:
            bound = "" if figure.kind.most is None else f"≤ {figure.kind.most:g}"
            values = (second_half(figure.samples)[0][1], figure.samples[-1][1], figure.most)
            table.add_row(
                figure.name,
                *map(_shown, values),
                bound,
                _shown(figure.growth),
                f"≤ {_shown(figure.allowed_growth)}",
                "[red]broken[/red]" if figure.broken else "",
            )
        return table

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {
                "name": figure.name,
                "most": figure.most,
                "bound": figure.kind.most,
                "growth": figure.growth,
                "allowed_growth": figure.allowed_growth,
                "kept": not figure.broken,
                "samples": figure.samples,
            }
            for figure in self._figures
        ]


def _shown(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


class Load(threading.Thread):
    """Publishes so many mails a second, from a few hundred mailboxes in turn, until it is over."""

    def __init__(self, rabbitmq_url: str, per_second: float) -> None:
        super().__init__(daemon=True)
        self._url = rabbitmq_url
        self._pause = 1 / per_second
        self._over = threading.Event()
        self._senders = backlog.mailboxes(300, "steady")
        self.published = 0

    def run(self) -> None:
        persistent = pika.BasicProperties(delivery_mode=2)
        with pika.BlockingConnection(pika.URLParameters(self._url)) as connection:
            channel, due = connection.channel(), time.monotonic()
            channel.confirm_delivery()
            while not self._over.is_set():
                connection.sleep(max(0.0, due - time.monotonic()))
                due += self._pause
                email = backlog.email(self._senders[self.published % len(self._senders)])
                channel.basic_publish("", "send_email", orjson.dumps(email), persistent, mandatory=True)
                self.published += 1

    def stop(self) -> None:
        """End, and wait for the end."""
        self._over.set()
        self.join()


class Sampler:
    """Looks at what a world holds."""

    def __init__(self, servers: Servers, world: World) -> None:
        self._servers = servers
        self._world = world
        self._temporary = Path(world.environment["TMPDIR"])
        self._redis = redis.Redis.from_url(servers.redis.url)
        urls = {"PostgreSQL": servers.postgresql.url, "RabbitMQ": servers.rabbitmq.url, "Redis": servers.redis.url}
        self._ports = {urlsplit(url).port or 0: name for name, url in urls.items()}
        self._found: dict[tuple[Kind, str], Figure] = {}

    @property
    def figures(self) -> Iterable[Figure]:
        return self._found.values()

    def sample(self) -> None:
        at = time.monotonic()
        for name in _PROCESS_TYPES:
            pids = self._world.fleet.pids(name)
            self._note(MEMORY, name, at, sum(map(_resident_bytes, pids)) / MEGABYTE)
            held = connections(pids, self._ports)
            for server in self._ports.values():
                self._note(CONNECTIONS, f"{name} to {server}", at, held[server])
        self._note(KEYS, "", at, self._redis.dbsize())
        self._note(REDIS_MEMORY, "", at, self._redis.info("memory")["used_memory"] / MEGABYTE)
        self._note(FILES, "", at, sum(path.is_file() for path in self._temporary.rglob("*")))
        for queue in self._servers.rabbitmq.list_queues("name", "messages_ready", "messages_unacknowledged"):
            self._note(READY, queue["name"], at, queue["messages_ready"])
            self._note(UNACKED, queue["name"], at, queue["messages_unacknowledged"])

    def _note(self, kind: Kind, whose: str, at: float, value: float) -> None:
        self._found.setdefault((kind, whose), Figure(kind, whose, [])).samples.append((at, value))


def _resident_bytes(pid: int) -> int:
    """Return a process's own memory and its part of what it shares."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it ended meanwhile
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def measure(servers: Servers, world: World, options: argparse.Namespace) -> tuple[Soak, int]:
    """Publish for as long as is asked and look every few seconds; return what was seen, and how many mails there were.

    Raises:
        Overdue: The mail is not settled a while after the last was published.
    """
    sampler, load = Sampler(servers, world), Load(servers.rabbitmq.url, options.per_second)
    began = time.monotonic()
    load.start()
    while time.monotonic() < began + 60 * options.minutes:
        sampler.sample()
        time.sleep(max(_LEAST_SECONDS_APART, 60 * options.minutes / _SAMPLES))
    load.stop()
    per_second = load.published / (time.monotonic() - began)
    world.wait_until_settled(load.published, _PATIENCE)
    return Soak(sampler.figures, per_second, options.per_second), load.published


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("soak", __doc__)
    report.add_durable(parser, default=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--per-second", type=float, default=30, help="mails (default: %(default)g: 108,000 in an hour)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="mailfleet-bench-") as directory,
        Servers(Path(directory), durable=options.durable, environment={}) as servers,
        World(servers.environment, Path(directory) / "world", UNBINDING, only=_PROCESS_TYPES) as world,
    ):
        lift_limits(world.simulator)
        world.wait_until_ready()
        soak, published = measure(servers, world, options)
    return report.tell(soak, f"{published:,} mails in {options.minutes:g} minutes", options, {"emails": published})


if __name__ == "__main__":
    sys.exit(main())
