"""How fast the whole pipeline is and what an email costs in processor time, beside a naive sender in the same run.

Figures of one machine say little; the ratio of two that were measured in one run, against the same servers and the
same simulator, says more. The naive sender (`bench.naive`, a Celery task) does much less: no ids, limiter, archive or
events, and what it has sent is unknown after a crash.

    python -m bench.pipeline --body-kb 2
    python -m bench.pipeline --body-kb 50
    python -m bench.pipeline --body-kb 2 --attachment-kb 200 --emails 1000
    python -m bench.pipeline --processes send_plain=2 backup=2 --threads send_plain=16 --set BACKUP_CONCURRENCY=64
    python -m bench.pipeline --replicas bridge=2 scheduler=2 clock=2

The naive sender sends one half of its mail before the pipeline and one after it: what else the machine does, and how
fast it is just then, weighs on both alike.

No limit binds, but the limiter is on: each call asks it. Every email goes all the way: ingested, answered,
dispatched, sent, told of and archived. The run fails if any of them was delivered other than exactly once, or if plain
mail costs the fleet's processes more than the bound.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import orjson
from rich.console import Console

from bench import naive, report
from bench.comparison import Comparison
from bench.load import TYPES, UNBINDING, emails, lift_limits, publish, seconds_until
from bench.processor import Groups, cpu_seconds, groups, spent
from sandbox.servers import Servers
from sandbox.world import ROOT, World

#: Of the fleet's processes for a plain mail, by the naive sender's.
MOST_CPU_RATIO = 1.5
#: So many mails that went wrong are named.
_NAMED = 10
#: Mails that go through before either is measured: what a process does once is no part of what a mail costs.
_FIRST = 64


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


def measure_pipeline(world: World, measured: Groups, bodies: Sequence[bytes]) -> Measurement:
    """Send the first of the bodies, and measure how the others are sent and archived."""
    _send(world, bodies[:_FIRST], already=0)
    before = cpu_seconds(measured)
    sent_after, archived_after = _send(world, bodies[_FIRST:], already=_FIRST)
    cpu = spent(before, cpu_seconds(measured))
    return Measurement(len(bodies) - _FIRST, sent_after, archived_after, cpu, TYPES)


def _send(world: World, bodies: Sequence[bytes], *, already: int) -> tuple[float, float]:
    """Publish, and wait for the last; return after how many seconds it was sent and archived."""
    began, wanted = time.monotonic(), already + len(bodies)
    publish(world.environment["RABBITMQ_URL"], "send_email", bodies)
    sent_after = seconds_until(began, lambda: len(world.events("SendEmailSent")) >= wanted)
    archived = "SELECT count(*) FROM email_backups"
    return sent_after, seconds_until(began, lambda: world.count(archived) >= wanted)


def measure_naive(world: World, measured: Groups, bodies: Sequence[bytes], processes: int) -> Measurement:
    """Have the naive sender send the same mail; its worker is up and has its connections before the first publish."""
    with naive_worker(world, processes) as pid:
        _send_naively(world, bodies[:_FIRST])
        others = {name: pids for name, pids in measured.items() if name not in TYPES}
        measured = {"naive": partial(_family, pid), **others}
        before, began = cpu_seconds(measured), time.monotonic()
        _send_naively(world, bodies[_FIRST:])
        took, cpu = time.monotonic() - began, spent(before, cpu_seconds(measured))
    return Measurement(len(bodies) - _FIRST, took, None, cpu, ("naive",))


def together(before: Measurement, after: Measurement) -> Measurement:
    """Return both of the naive sender's halves as one."""
    cpu = {name: before.cpu[name] + after.cpu[name] for name in before.cpu}
    return Measurement(before.emails + after.emails, before.sent_after + after.sent_after, None, cpu, before.own)


@contextmanager
def naive_worker(world: World, processes: int) -> Iterator[int]:
    """Run the naive sender's worker for the length of the block; yields its process."""
    world.rows(naive.TABLE)
    naive.app.conf.broker_url = world.environment["RABBITMQ_URL"]
    options = [f"--concurrency={processes}", "--loglevel=ERROR", "--without-gossip", "--without-mingle"]
    command = [sys.executable, "-m", "celery", "--app=bench.naive", "worker", *options]
    with subprocess.Popen(command, cwd=ROOT, env=world.environment, stdout=subprocess.DEVNULL) as worker:
        try:
            yield worker.pid
        finally:
            worker.terminate()


def _send_naively(world: World, bodies: Sequence[bytes]) -> None:
    """Publish, and wait until they are sent."""
    began = time.monotonic()
    with naive.app.producer_pool.acquire(block=True) as producer:
        for body in bodies:
            naive.send.apply_async([orjson.loads(body)], producer=producer)
    sent = "SELECT count(*) FROM naive_emails WHERE status = 'sent'"
    seconds_until(began, lambda: world.count(sent) >= len(bodies))
    world.rows("TRUNCATE naive_emails")


def _family(pid: int) -> set[int]:
    """The process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {pid, *map(int, children)}


def not_once(world: World, count: int) -> list[str]:
    """Return what is wrong with the deliveries, by the simulator's record: nothing, if each email left exactly once."""
    wanted = {row[0] for row in world.rows("SELECT id::text FROM incoming_emails")}
    left = world.simulator.delivery_counts_by_tag()
    problems = [f"{tag} left {times} times" for tag, times in left.items() if times != 1]
    problems += [f"{id} never left" for id in wanted - left.keys()]
    if len(wanted) != count:
        problems.append(f"{len(wanted)} emails were stored instead of {count}")
    return problems


def compare(pipeline: Measurement, simple: Measurement | None, *, plain: bool) -> Comparison:
    """Hold the pipeline against the naive sender, if that was measured."""
    found = Comparison("pipeline", "naive")
    speed = simple.emails_per_second if simple else None
    found.add("seconds to the last one sent", pipeline.sent_after, simple.sent_after if simple else None)
    found.add("seconds to the last one archived", pipeline.archived_after, None)
    found.add("emails per second, to the end", pipeline.emails_per_second, speed)
    found.add("emails per second, sent", pipeline.emails / pipeline.sent_after, speed)
    found.add(
        "CPU per email, own processes, ms",
        pipeline.own_cpu_per_email,
        simple.own_cpu_per_email if simple else None,
        digits=2,
        at_most=MOST_CPU_RATIO if plain else None,
    )
    found.add(
        "CPU per email, with servers, ms", pipeline.cpu_per_email, simple.cpu_per_email if simple else None, digits=2
    )
    found.end_section()
    theirs = _per_email(simple) if simple else {}
    ours = _per_email(pipeline)
    for name in dict.fromkeys([*ours, *theirs]):
        found.add(f"CPU per email, {name}, ms", ours.get(name), theirs.get(name), digits=2)
    return found


def _per_email(measurement: Measurement) -> dict[str, float]:
    """Milliseconds by group."""
    return {name: 1000 * seconds / measurement.emails for name, seconds in measurement.cpu.items()}


def _environment(options: argparse.Namespace) -> dict[str, str | int]:
    chosen = dict(_pairs(options.set))
    processes = {f"{name.upper()}_PROCESSES": number for name, number in _pairs(options.processes)}
    threads = {f"{name.upper()}_THREADS": number for name, number in _pairs(options.threads)}
    return {**UNBINDING, **processes, **threads, **chosen}


def _pairs(values: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, number) for name, _, number in (value.partition("=") for value in values)]


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("pipeline", __doc__)
    report.add_durable(parser, default=True)
    add = parser.add_argument
    add("--emails", type=int, default=5000)
    add("--mailboxes", type=int, default=200)
    add("--body-kb", type=float, default=2)
    add("--attachment-kb", type=int, default=0, help="of one attachment to each email; 0: none")
    add("--processes", nargs="*", default=[], metavar="TYPE=N", help="worker processes of a type")
    add("--replicas", nargs="*", default=[], metavar="TYPE=N", help="so many of a type, beside each other")
    add("--threads", nargs="*", default=[], metavar="TYPE=N", help="threads of each worker process")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of the fleet")
    add("--naive-processes", type=int, default=2, help="0 leaves the naive sender out")
    return parser.parse_args(arguments)


def _bodies(options: argparse.Namespace, world: World) -> list[bytes]:
    size = options.attachment_kb * 1024
    # One file for all: what it costs to serve is the same, and nobody keeps it.
    file = {"name": "figures.bin", "size": size, "urlOrId": world.simulator.file_url(size, seed="figures")}
    return emails(_FIRST + options.emails, options.mailboxes, options.body_kb, [file] if size else [])


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments(arguments)
    scale = {name: int(number) for name, number in _pairs(options.replicas)}
    with (
        tempfile.TemporaryDirectory(prefix="mailfleet-bench-") as directory,
        Servers(Path(directory), durable=options.durable, environment={}) as servers,
        World(servers.environment, Path(directory) / "world", _environment(options), only=TYPES, scale=scale) as world,
    ):
        lift_limits(world.simulator)
        bodies = _bodies(options, world)
        world.wait_until_ready()
        measured = groups(servers, world, TYPES)
        naively = partial(measure_naive, world, measured, bodies[: _FIRST + options.emails // 2])
        simple = naively(options.naive_processes) if options.naive_processes else None
        pipeline = measure_pipeline(world, measured, bodies)
        problems = not_once(world, len(bodies))
        if simple:
            simple = together(simple, naively(options.naive_processes))
    return _tell(options, pipeline, simple, problems)


def _tell(options: argparse.Namespace, pipeline: Measurement, simple: Measurement | None, problems: list[str]) -> int:
    attached = f", one attachment of {options.attachment_kb} KB" if options.attachment_kb else ""
    found = compare(pipeline, simple, plain=not attached)
    status = report.tell(
        found,
        f"{options.emails} emails, bodies of {options.body_kb:g} KB{attached}",
        options,
        {
            "holds": found.hold and not problems,
            "pipeline": asdict(pipeline),
            "naive": simple and asdict(simple),
            "problems": problems,
        },
    )
    Console().print(*(problems[:_NAMED] or [f"All {options.emails} left exactly once."]), sep="\n")
    return 1 if problems else status


if __name__ == "__main__":
    sys.exit(main())
