"""How long each process type takes from its start until it works, and a command line until it answers.

A worker or the bridge works when RabbitMQ has its consumer, console and clock when their port answers. Each is started
alone, the servers and everything else being up, several times; the median counts.

    python -m bench.startup --json startup.json

The run fails if a type takes longer than two seconds, or ``mailfleet --help`` longer than 300 ms.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pika

from bench import report
from bench.limits.findings import Findings
from sandbox.servers import Servers
from sandbox.world import World

MOST_SECONDS = 2.0
MOST_HELP_MILLISECONDS = 300.0
#: The queue of which each type's consumer is one.
QUEUES = {
    "bridge": "send_email",
    **{name: name for name in ("scheduler", "send_plain", "send_attached", "backup", "maintenance")},
}
_POLL_SECONDS = 0.01


def measure(world: World, times: int) -> Findings:
    """Start each type so often and tell how long it takes.

    Raises:
        Overdue: One of them does not come up.
    """
    findings = Findings()
    with pika.BlockingConnection(pika.URLParameters(world.environment["RABBITMQ_URL"])) as connection:
        channel = connection.channel()

        def consumed(queue: str) -> bool:
            return bool(channel.queue_declare(queue, passive=True).method.consumer_count)

        for name, queue in QUEUES.items():
            seconds = [_start(world, name, lambda queue=queue: consumed(queue)) for _ in range(times)]
            findings.at_most(f"{name}, s", statistics.median(seconds), MOST_SECONDS)
    for name, port in (
        ("clock", world.fleet.ports["clock.1"].metrics_port),
        ("console", world.fleet.ports["console.1"].port),
    ):
        seconds = [_start(world, name, lambda port=port: _answers(port)) for _ in range(times)]
        findings.at_most(f"{name}, s", statistics.median(seconds), MOST_SECONDS)
    command = [Path(sys.executable).with_name("mailfleet"), "--help"]
    helps = [_milliseconds(command) for _ in range(times)]
    findings.at_most("mailfleet --help, ms", statistics.median(helps), MOST_HELP_MILLISECONDS)
    return findings


def _start(world: World, name: str, works: Callable[[], bool]) -> float:
    world.fleet.kill(name)
    world.wait_until(f"nothing is left of {name}", lambda: not works())
    began = time.monotonic()
    world.fleet.start(name)
    while not works():
        if time.monotonic() - began > 10 * MOST_SECONDS:
            raise SystemExit(f"{name} does not come up")
        time.sleep(_POLL_SECONDS)
    return time.monotonic() - began


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _milliseconds(command: Sequence[Path | str]) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return 1000 * (time.monotonic() - began)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("startup", __doc__)
    parser.add_argument("--times", type=int, default=5)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="mailfleet-bench-") as directory,
        Servers(Path(directory), durable=False, environment={}) as servers,
        World(servers.environment, Path(directory) / "world") as world,
    ):
        world.wait_until_ready()
        findings = measure(world, options.times)
    return report.tell(findings, f"Started {options.times} times each, median", options)


if __name__ == "__main__":
    sys.exit(main())
