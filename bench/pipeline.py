"""How fast the whole pipeline is and what an email costs in processor time, beside a naive sender in the same run.

Figures of one machine say little; the ratio of two that were measured in one run, against the same servers and the
same simulator, says more. The naive sender (`bench.naive`, a Celery task) does much less: no ids, limiter, archive or
events, and what it has sent is unknown after a crash.

    python -m bench.pipeline --emails 2000 --processes send_plain=2 --json pipeline.json

No limit binds, but the limiter is on: each call asks it. Every email goes all the way: ingested, answered,
dispatched, sent, told of and archived. The run fails if any of them was delivered other than exactly once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pika
from rich.console import Console
from rich.table import Table

from bench import naive
from bench.processor import Groups, cpu_seconds, spent
from sandbox.servers import Servers
from sandbox.world import ROOT, World

#: Types that the pipeline needs; the console only reads.
TYPES = ("bridge", "clock", "scheduler", "send_plain", "send_attached", "backup", "maintenance")
LIMIT = timedelta(minutes=30)
_POLL_SECONDS = 0.05

#: High enough not to bind, and not 0: a budget that is switched off would not be asked for.
_UNBINDING = {
    "MAILBOX_REQUESTS_PER_10_MINUTES": 10_000_000,
    "MAILBOX_RECIPIENTS_PER_DAY": 10_000_000,
    "TENANT_REQUESTS_PER_10_SECONDS": 10_000_000,
    "MAILBOX_SENDS_PER_MINUTE": 0,
    "BACKUP_DELAY_SECONDS": 1,
}


@dataclass(frozen=True)
class Measurement:
    """Durations in seconds from the first publish; processor time in seconds by group."""

    emails: int
    sent_after: float
    archived_after: float | None
    cpu: dict[str, float]
    own: tuple[str, ...]

    @property
    def emails_per_second(self) -> float:
        return self.emails / (self.archived_after or self.sent_after)

    @property
    def own_cpu_per_email(self) -> float:
        """Milliseconds of the sender's own processes."""
        return 1000 * sum(self.cpu[name] for name in self.own) / self.emails

    @property
    def cpu_per_email(self) -> float:
        """Milliseconds of the sender's processes and the three servers; Graph's part is not counted."""
        return 1000 * sum(seconds for name, seconds in self.cpu.items() if name != "simulator") / self.emails


def emails(count: int, mailboxes: int, body_kb: float) -> list[bytes]:
    """Return so many ``SendEmail`` bodies, in turns over the mailboxes."""
    text = "The quarterly figures are attached to this message in words. " * (1 + int(body_kb * 1024 / 61))
    content = text[: int(body_kb * 1024)]
    return [
        orjson.dumps(
            {
                "publisher_message_id": f"bench-{number}",
                "from": f"mailbox{number % mailboxes}@contoso.example",
                "to": [f"reader{number}@fabrikam.example"],
                "subject": f"Figures {number}",
                "body": {"contentType": "text", "content": content},
            }
        )
        for number in range(count)
    ]


def publish(rabbitmq_url: str, queue: str, bodies: Sequence[bytes]) -> None:
    """Publish persistent messages as fast as it goes, without waiting for a confirmation of each."""
    persistent = pika.BasicProperties(delivery_mode=2)
    with pika.BlockingConnection(pika.URLParameters(rabbitmq_url)) as connection:
        channel = connection.channel()
        for body in bodies:
            channel.basic_publish("", queue, body, persistent)


def measure_pipeline(world: World, groups: Groups, bodies: Sequence[bytes]) -> Measurement:
    before = cpu_seconds(groups)
    began = time.monotonic()
    publish(world.environment["RABBITMQ_URL"], "send_email", bodies)
    sent_after = _until(began, lambda: len(world.events("SendEmailSent")) >= len(bodies))
    archived_after = _until(began, lambda: world.count("SELECT count(*) FROM email_backups") >= len(bodies))
    own = tuple(name for name in groups if name in TYPES)
    return Measurement(len(bodies), sent_after, archived_after, spent(before, cpu_seconds(groups)), own)


def measure_naive(world: World, groups: Groups, bodies: Sequence[bytes], processes: int) -> Measurement:
    """Have the naive sender send the same mail; its worker is up and has its connections before the first publish."""
    world.rows(naive.TABLE)
    options = [f"--concurrency={processes}", "--loglevel=ERROR", "--without-gossip", "--without-mingle"]
    command = [sys.executable, "-m", "celery", "--app=bench.naive", "worker", *options]
    with subprocess.Popen(command, cwd=ROOT, env=world.environment, stdout=subprocess.DEVNULL) as worker:
        try:
            naive.app.conf.broker_url = world.environment["RABBITMQ_URL"]
            _send_naively(world, bodies[:1], processes * 4)
            groups = {**groups, "naive": partial(_family, worker.pid)}
            before, began = cpu_seconds(groups), time.monotonic()
            _send_naively(world, bodies, len(bodies))
            took, cpu = time.monotonic() - began, spent(before, cpu_seconds(groups))
        finally:
            worker.terminate()
    return Measurement(len(bodies), took, None, {name: cpu[name] for name in cpu if name not in TYPES}, ("naive",))


def _send_naively(world: World, bodies: Sequence[bytes], count: int) -> None:
    """Publish so many, and wait until they are sent."""
    began = time.monotonic()
    with naive.app.producer_pool.acquire(block=True) as producer:
        for number in range(count):
            naive.send.apply_async([orjson.loads(bodies[number % len(bodies)])], producer=producer)
    sent = "SELECT count(*) FROM naive_emails WHERE status = 'sent'"
    _until(began, lambda: world.count(sent) >= count)
    world.rows("TRUNCATE naive_emails")


def _family(pid: int) -> set[int]:
    """The process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {pid, *map(int, children)}


def _until(began: float, holds: Callable[[], bool]) -> float:
    while not holds():
        if time.monotonic() - began > LIMIT.total_seconds():
            raise SystemExit("the pipeline does not come to an end")
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - began


def not_once(world: World, count: int) -> list[str]:
    """Return what is wrong with the deliveries, by the simulator's record: nothing, if each email left exactly once."""
    wanted = {row[0] for row in world.rows("SELECT id::text FROM incoming_emails")}
    left = world.simulator.delivery_counts_by_tag()
    problems = [f"{tag} left {times} times" for tag, times in left.items() if times != 1]
    problems += [f"{id} never left" for id in wanted - left.keys()]
    if len(wanted) != count:
        problems.append(f"{len(wanted)} emails were stored instead of {count}")
    return problems


def _groups(servers: Servers, world: World) -> Groups:
    return {
        **{name: partial(world.fleet.pids, name) for name in TYPES},
        "postgresql": servers.postgresql.pids,
        "rabbitmq": servers.rabbitmq.pids,
        "redis": servers.redis.pids,
        "simulator": world.simulator.pids,
    }


def _environment(options: argparse.Namespace) -> dict[str, str | int]:
    chosen = dict(pair.split("=", 1) for pair in options.set)
    processes = {f"{name.upper()}_PROCESSES": number for name, number in _pairs(options.processes)}
    threads = {f"{name.upper()}_THREADS": number for name, number in _pairs(options.threads)}
    return {**_UNBINDING, **processes, **threads, **chosen}


def _pairs(values: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, number) for name, _, number in (value.partition("=") for value in values)]


def _report(pipeline: Measurement, simple: Measurement | None) -> Table:
    table = Table(title=f"{pipeline.emails} plain emails")
    for heading in ("", "pipeline", "naive", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")

    def row(name: str, ours: float | None, theirs: float | None, digits: int = 1) -> None:
        shown = [f"{value:.{digits}f}" if value is not None else "" for value in (ours, theirs)]
        ratio = f"{ours / theirs:.2f}" if ours is not None and theirs else ""
        table.add_row(name, *shown, ratio)

    row("seconds to the last one sent", pipeline.sent_after, simple.sent_after if simple else None)
    row("seconds to the last one archived", pipeline.archived_after, None)
    row("emails per second, to the end", pipeline.emails_per_second, simple.emails_per_second if simple else None)
    row("emails per second, sent", pipeline.emails / pipeline.sent_after, simple.emails_per_second if simple else None)
    row("CPU per email, own processes, ms", pipeline.own_cpu_per_email, simple.own_cpu_per_email if simple else None, 2)
    row("CPU per email, with servers, ms", pipeline.cpu_per_email, simple.cpu_per_email if simple else None, 2)
    table.add_section()
    for name in dict.fromkeys([*pipeline.cpu, *(simple.cpu if simple else ())]):
        ours, theirs = pipeline.cpu.get(name), simple.cpu.get(name) if simple else None
        row(
            f"CPU per email, {name}, ms",
            None if ours is None else 1000 * ours / pipeline.emails,
            None if theirs is None or simple is None else 1000 * theirs / simple.emails,
            2,
        )
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=__doc__.split("\n\n")[0])
    parser.add_argument("--emails", type=int, default=2000)
    parser.add_argument("--mailboxes", type=int, default=200)
    parser.add_argument("--body-kb", type=float, default=2)
    parser.add_argument("--processes", nargs="*", default=[], metavar="TYPE=N", help="worker processes of a type")
    parser.add_argument("--threads", nargs="*", default=[], metavar="TYPE=N", help="threads of each worker process")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of the fleet")
    parser.add_argument("--naive-processes", type=int, default=2, help="0 leaves the naive sender out")
    parser.add_argument("--durable", action=argparse.BooleanOptionalAction, default=True, help="flush commits to disk")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args()


def main() -> int:
    options = _arguments()
    bodies = emails(options.emails, options.mailboxes, options.body_kb)
    with (
        tempfile.TemporaryDirectory(prefix="mailfleet-bench-") as directory,
        Servers(Path(directory), durable=options.durable, environment={}) as servers,
        World(servers.environment, Path(directory) / "world", _environment(options), only=TYPES) as world,
    ):
        world.simulator.set_limits(concurrency=0, requests=0, upload_bytes=0)
        world.wait_until_ready()
        groups = _groups(servers, world)
        pipeline = measure_pipeline(world, groups, bodies)
        problems = not_once(world, options.emails)
        world.fleet.stop()
        simple = measure_naive(world, groups, bodies, options.naive_processes) if options.naive_processes else None
    _tell(options, pipeline, simple, problems)
    return 1 if problems else 0


def _tell(
    options: argparse.Namespace, pipeline: Measurement, simple: Measurement | None, problems: Sequence[str]
) -> None:
    console = Console()
    console.print(_report(pipeline, simple))
    for problem in problems[:10]:
        console.print(problem)
    if not problems:
        console.print(f"All {options.emails} left exactly once.")
    if options.json:
        figures: Mapping[str, Any] = {
            "options": {name: value for name, value in vars(options).items() if name != "json"},
            "cpus": os.cpu_count(),
            "pipeline": asdict(pipeline),
            "naive": asdict(simple) if simple else None,
            "problems": list(problems),
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
