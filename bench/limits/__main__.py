"""Runs one experiment against servers, a fleet and a simulated Graph of its own, and prints one table.

    python -m bench.limits concurrency --mailboxes 10 --processes 2
    python -m bench.limits rate --minutes 5
    python -m bench.limits retry-after
    python -m bench.limits flood --waiting 50000

Exit status 1 if a bound is not kept. That it can be is seen with a limit above the one that Graph has:

    python -m bench.limits concurrency --seconds 10 --set MAILBOX_CONCURRENCY=5
    python -m bench.limits rate --minutes 2 --no-blows --set MAILBOX_SENDS_PER_MINUTE=45
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import orjson
from rich.console import Console

from bench.limits import concurrency, flood, rate, waits
from bench.limits.findings import Findings
from sandbox.servers import Servers
from sandbox.world import World

#: Types that the experiments need; the console only reads.
_TYPES = ("bridge", "clock", "scheduler", "send_plain", "send_attached", "backup", "maintenance")
#: Options that do not change what is measured.
_NOT_SHOWN = {"describe", "experiment", "json", "directory", "settings"}
_READY_WITHIN = timedelta(minutes=1)


class Experiment(NamedTuple):
    """A fleet, and what is done with it."""

    settings: Mapping[str, str | int]
    scale: Mapping[str, int]
    measure: Callable[[World, Servers], Findings]


def _concurrency(options: argparse.Namespace) -> Experiment:
    plan = concurrency.Plan(
        mailboxes=options.mailboxes,
        processes=options.processes,
        latency=timedelta(milliseconds=options.latency_ms),
        steady=timedelta(seconds=options.seconds),
        emails=options.emails,
    )
    return Experiment(concurrency.settings(plan), {}, lambda world, _: concurrency.measure(world, plan))


def _rate(options: argparse.Namespace) -> Experiment:
    plan = rate.Plan(mailboxes=options.mailboxes, lasts=timedelta(minutes=options.minutes))
    if not options.blows:
        plan = replace(plan, worker_dies_after=None, redis_dies_after=None)

    def measure(world: World, servers: Servers) -> Findings:
        def lose_redis() -> None:
            servers.redis.kill()
            servers.redis.start()

        return rate.measure(world, plan, lose_redis)

    return Experiment(rate.settings(plan), rate.SCALE, measure)


def _retry_after(options: argparse.Namespace) -> Experiment:
    plan = waits.Plan(mailboxes=options.mailboxes, emails=options.emails, lasts=timedelta(seconds=options.seconds))
    return Experiment(waits.settings(plan), waits.SCALE, lambda world, _: waits.measure(world, plan))


def _flood(options: argparse.Namespace) -> Experiment:
    plan = flood.Plan(waiting=options.waiting, probes=options.probes, every=timedelta(seconds=options.every))
    return Experiment(flood.settings(plan), {}, lambda world, _: flood.measure(world, plan))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="EXPERIMENT")

    def command(
        name: str, describe: Callable[[argparse.Namespace], Experiment], module: object
    ) -> Callable[..., object]:
        described = (module.__doc__ or "").split("\n\n")[0]
        added = commands.add_parser(name, help=described, description=described)
        added.set_defaults(describe=describe, experiment=name)
        added.add_argument(
            "--set",
            type=_setting,
            action="append",
            default=[],
            dest="settings",
            metavar="NAME=VALUE",
            help="a setting of the fleet; may be given again",
        )
        added.add_argument("--directory", help="where logs stay")
        added.add_argument("--json", type=Path, help="write the figures there too")
        return added.add_argument

    add = command("concurrency", _concurrency, concurrency)
    add("--mailboxes", type=int, default=3)
    add("--processes", type=int, default=1, help="of send_plain, and of backup")
    add("--latency-ms", type=float, default=150, help="of each call (default: %(default)g)")
    add("--seconds", type=float, default=30, help="of the steady state (default: %(default)g)")
    add("--emails", type=int, help="for each mailbox (default: more than can be sent)")
    add = command("rate", _rate, rate)
    add("--mailboxes", type=int, default=5)
    add("--minutes", type=float, default=5)
    add("--blows", action=argparse.BooleanOptionalAction, default=True, help="kill a worker and lose Redis on the way")
    add = command("retry-after", _retry_after, waits)
    add("--mailboxes", type=int, default=20)
    add("--emails", type=int, default=60, help="for each mailbox (default: %(default)s)")
    add("--seconds", type=float, default=120, help="at most (default: %(default)g)")
    add = command("flood", _flood, flood)
    add("--waiting", type=int, default=50_000)
    add("--probes", type=int, default=60, help="mails of other mailboxes, and as many at rest (default: %(default)s)")
    add("--every", type=float, default=3, help="seconds between them (default: %(default)g)")
    return parser


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(text)
    return name, value


def run(options: argparse.Namespace) -> Findings:
    experiment: Experiment = options.describe(options)
    settings = {**experiment.settings, **dict(options.settings)}
    with ExitStack() as stack:
        directory = options.directory or stack.enter_context(tempfile.TemporaryDirectory(prefix="limits-"))
        folder = Path(directory).resolve()
        servers = stack.enter_context(Servers(folder / "servers", durable=False, environment={}))
        world = stack.enter_context(
            World(
                servers.environment,
                folder / "world",
                settings,
                only=_TYPES,
                scale=experiment.scale,
                supervise=True,
            )
        )
        world.wait_until_ready(_READY_WITHIN)
        return experiment.measure(world, servers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run once and print one table."""
    options = _parser().parse_args(arguments)
    findings = run(options)
    shown = {name: value for name, value in vars(options).items() if name not in _NOT_SHOWN and value is not None}
    given = shown | dict(options.settings)
    title = ", ".join([options.experiment, *(f"{name} {value}" for name, value in given.items())])
    Console().print(findings.table(title))
    if options.json:
        figures = {
            "experiment": options.experiment,
            "options": given,
            "cpus": os.cpu_count(),
            "holds": findings.hold,
            "figures": findings.as_json(),
        }
        options.json.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2))
    return 0 if findings.hold else 1


if __name__ == "__main__":
    sys.exit(main())
