"""How long a mail takes from its publish to Graph, at rest and under half of what the fleet can do.

First a burst tells how many mails a second the fleet takes to their end. Then it rests, and one mail after the other is
published, each from another mailbox: what is measured ends as the request to send arrives at Graph, so Graph's own time
is not in it. Then half of that throughput is published evenly for a while, some of it from mailboxes of their own,
which are measured. At last the naive sender (`bench.naive`) is measured at rest, in the same run.

    python -m bench.latency --json latency.json

The run fails if a mail takes longer than the bounds say.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pika

from bench import naive, report
from bench.limits import backlog
from bench.limits.findings import Findings
from bench.limits.machine import Meter
from bench.limits.measures import SENDS, latencies, percentile
from bench.limits.recorder import Recorder
from bench.load import TYPES, UNBINDING, emails, lift_limits, publish, seconds_until
from bench.pipeline import naive_worker
from sandbox.servers import Servers
from sandbox.world import World

MOST_AT_REST_MILLISECONDS = {50: 25.0, 99: 100.0}
MOST_UNDER_LOAD_MILLISECONDS = {99: 500.0}
LOAD_SHARE = 0.5
#: A publisher that does not keep up has not made the load.
_LEAST_PUBLISHED_SHARE = 0.95
_WARM_UP = 20
_PATIENCE = timedelta(minutes=2)

#: Hands one email over.
Send = Callable[[dict[str, Any]], None]


def measure(world: World, options: argparse.Namespace) -> Findings:
    """Measure the throughput, then latencies at rest and under load, then the naive sender's.

    Raises:
        Overdue: A mail does not come to Graph.
    """
    findings = Findings()
    per_second = _throughput(world, options.burst)
    findings.tell("emails per second, to the end, of a burst", per_second)
    every = timedelta(milliseconds=options.every_ms)
    with Recorder(world.simulator) as recorder:
        with _publisher(world) as send:
            at_rest = _probe(world, recorder, send, _own(options.probes), every)
        _tell(findings, "at rest", at_rest, MOST_AT_REST_MILLISECONDS)
        _measure_load(findings, world, recorder, LOAD_SHARE * per_second, options)
        world.fleet.stop()
        with naive_worker(world, processes=2), _naive_publisher() as send:
            _probe(world, recorder, send, _own(_WARM_UP), every)
            others = _probe(world, recorder, send, _own(options.probes), every)
    _tell(findings, "naive at rest", others, {})
    findings.tell("ratio at rest, p50", percentile(at_rest, 50) / percentile(others, 50))
    return findings


def _throughput(world: World, count: int) -> float:
    """Return emails per second from the first publish to the last copy in the archive."""
    began = time.monotonic()
    publish(world.environment["RABBITMQ_URL"], "send_email", emails(count, 200, 2, name="burst"))
    return count / seconds_until(began, lambda: world.count("SELECT count(*) FROM email_backups") >= count)


def _measure_load(
    findings: Findings, world: World, recorder: Recorder, per_second: float, options: argparse.Namespace
) -> None:
    count = round(per_second * options.seconds)
    mail = _mixed(count, max(1, count // options.probes))
    meter, began = Meter(world), time.monotonic()
    with _publisher(world) as send:
        published = _publish(send, mail, timedelta(seconds=1 / per_second))
        took = time.monotonic() - began
        world.wait_until("all have come to Graph", lambda: _sent_all(recorder, published), _PATIENCE)
    findings.tell("emails per second under load", count / took)
    findings.at_least("of what it should be", count / took / per_second, _LEAST_PUBLISHED_SHARE)
    _tell(findings, "under load", latencies(published, recorder.calls), MOST_UNDER_LOAD_MILLISECONDS)
    meter.read().tell(findings)


def _tell(findings: Findings, when: str, found: Sequence[float], bounds: dict[int, float]) -> None:
    findings.tell(f"emails measured, {when}", len(found))
    for per_cent in (50, 99):
        name, milliseconds = f"publish to Graph, {when}, p{per_cent}, ms", 1000 * percentile(found, per_cent)
        if bound := bounds.get(per_cent):
            findings.at_most(name, milliseconds, bound)
        else:
            findings.tell(name, milliseconds)
    findings.tell(f"publish to Graph, {when}, longest, ms", 1000 * max(found))


# Mail


def _own(count: int) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Yield emails to measure, each from a mailbox of its own."""
    return ((True, backlog.email(mailbox)) for mailbox in backlog.mailboxes(count, "other"))


def _mixed(count: int, measured_every: int) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Yield emails from some hundred mailboxes, and between them such as are measured."""
    measured, others = _own(1 + count // measured_every), backlog.mailboxes(200, "busy")
    for number in range(count):
        if number % measured_every:
            yield False, backlog.email(others[number % len(others)])
        else:
            yield next(measured)


# Publishing


def _probe(
    world: World, recorder: Recorder, send: Send, mail: Iterable[tuple[bool, dict[str, Any]]], every: timedelta
) -> list[float]:
    published = _publish(send, mail, every)
    world.wait_until("all have come to Graph", lambda: _sent_all(recorder, published), _PATIENCE)
    return latencies(published, recorder.calls)


def _publish(send: Send, mail: Iterable[tuple[bool, dict[str, Any]]], every: timedelta) -> dict[str, float]:
    """Publish emails, one ``every`` so often on average, and return when, by mailbox, for those that are measured.

    Not quite evenly, or each would meet the fleet's own timers in the same phase.
    """
    published, due = {}, time.monotonic()
    for measured, email in mail:
        time.sleep(max(0.0, due - time.monotonic()))
        due += every.total_seconds() * random.uniform(0.5, 1.5)
        if measured:
            published[email["from"]] = time.monotonic()
        send(email)
    return published


@contextmanager
def _publisher(world: World) -> Iterator[Send]:
    """Publish to the fleet, over a connection that stays open for the block: it is to be left once all have arrived."""
    with pika.BlockingConnection(pika.URLParameters(world.environment["RABBITMQ_URL"])) as connection:
        channel, persistent = connection.channel(), pika.BasicProperties(delivery_mode=2)
        yield lambda email: channel.basic_publish("", "send_email", orjson.dumps(email), persistent)


@contextmanager
def _naive_publisher() -> Iterator[Send]:
    with naive.app.producer_pool.acquire(block=True) as producer:
        yield lambda email: naive.send.apply_async([email], producer=producer)


def _sent_all(recorder: Recorder, published: dict[str, float]) -> bool:
    return published.keys() <= {call.mailbox for call in recorder.calls if call.operation in SENDS}


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("latency", __doc__)
    report.add_durable(parser, default=True)
    add = parser.add_argument
    add("--burst", type=int, default=2000, help="emails that the throughput is measured with (default: %(default)s)")
    add("--probes", type=int, default=300, help="emails measured, each time (default: %(default)s)")
    add("--every-ms", type=float, default=300, help="between those at rest, on average (default: %(default)g)")
    add("--seconds", type=float, default=60, help="of load (default: %(default)g)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="mailfleet-bench-") as directory,
        Servers(Path(directory), durable=options.durable, environment={}) as servers,
        World(servers.environment, Path(directory) / "world", UNBINDING, only=TYPES) as world,
    ):
        lift_limits(world.simulator)
        world.wait_until_ready()
        findings = measure(world, options)
    return report.tell(findings, "from the publish to Graph", options)


if __name__ == "__main__":
    sys.exit(main())
