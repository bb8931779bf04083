"""The proof harness: mail goes through while everything dies, and the record must show each mail once.

A seeded schedule kills and freezes processes of every type and kills PostgreSQL, RabbitMQ and Redis (`bench.blows`),
while Graph fails in every way that it may (`bench.faults`) and shows what was sent when it likes (`bench.tenant`). Then
Graph's own record is held against the database, the archive and the events (`bench.verdict`).

    python -m bench.chaos --emails 5000 --kills 150 --seed 1
    python -m bench.chaos --emails 5000 --kills 150 --fault gateway-timeout-after-send=0.3

Exit status 1 on any loss or duplicate, and on anything else that is not as promised. That it can be is seen with a
setting that breaks the promise's assumptions:

    python -m bench.chaos --emails 500 --kills 0 --set IN_DOUBT_SETTLE_SECONDS=1 --set IN_DOUBT_GRACE_SECONDS=1
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from bench import tenant
from bench.blows import Hand, schedule
from bench.faults import FAULTS, HANG_SECONDS, break_graph, rates
from bench.mail import Email, Publisher, emails, mailboxes
from bench.verdict import Verdict, all_told, judge, unpublished
from sandbox.servers import Servers
from sandbox.world import ROOT, Overdue, World

GRAPH_TIMEOUT_SECONDS = 2
LEASE_SECONDS = 20
#: Longer than a request may take effect after its doubt has begun and its mail stay invisible then, together.
GRACE_SECONDS = 15
SETTINGS = {
    "METRICS_PORT": 0,
    "BACKUP_DELAY_SECONDS": 1,
    "GRAPH_TIMEOUT_SECONDS": GRAPH_TIMEOUT_SECONDS,
    "IN_DOUBT_GRACE_SECONDS": GRACE_SECONDS,
    "IN_DOUBT_SETTLE_SECONDS": 2,
    "LEASE_SECONDS": LEASE_SECONDS,
    "MAILBOX_SENDS_PER_MINUTE": 0,
    "MAX_ATTEMPTS": 50,
    "RETRY_BACKOFF_MAX_SECONDS": 3,
    "RETRY_BACKOFF_MIN_SECONDS": 1,
}
SCALE = {"bridge": 2, "scheduler": 2, "send_plain": 2, "send_attached": 2, "backup": 2}
#: How long after its client has given up a call may take effect that Graph holds.
LATE_SECONDS = HANG_SECONDS - GRAPH_TIMEOUT_SECONDS
#: Longer than the lease by no more than that: a process may be frozen between its look at the lease and the request.
LONG_FREEZE_SECONDS = LEASE_SECONDS + LATE_SECONDS
#: Between the longest that a mail may stay invisible and the end of the grace; a machine under attack is late itself.
_MARGIN_SECONDS = 2.0
_KILLS_PER_FREEZE = 7
_PATIENCE = timedelta(minutes=10)
#: Afterwards nothing may happen any more; a woken process or a call that Graph held would have shown by then.
_QUIET_SECONDS = 3.0
#: So many mails that went wrong are named, for a look into the logs.
_NAMED = 20


def run(options: argparse.Namespace, screen: Console) -> tuple[Verdict, dict[str, Any]]:
    """Publish, break everything, wait until all is settled, and judge; return the circumstances too."""
    folder = Path(options.directory or tempfile.mkdtemp(prefix="chaos-", dir=_scratch()))
    settings = SETTINGS | {"SEND_PLAIN_VIA": options.via} | dict(options.settings)
    with (
        Servers(folder / "servers", durable=False, environment={}) as servers,
        World(servers.environment, folder / "world", settings, scale=SCALE, supervise=True) as world,
    ):
        world.wait_until_ready(timedelta(seconds=60))
        senders = mailboxes(options.mailboxes)
        mail = list(emails(options.emails, senders, world.simulator, _chance(options, "mail")))
        longest_delay = GRACE_SECONDS - LATE_SECONDS - _MARGIN_SECONDS
        behaviour = tenant.draw(senders, longest_delay, _chance(options, "tenant"))
        world.simulator.set_behaviour(**behaviour)
        began = time.monotonic()
        attack = _attack(options, world, servers, mail)
        screen.print(f"{time.monotonic() - began:.0f} s: the last blow has fallen; waiting until all is settled")
        _wait(world, len(mail), screen)
        circumstances = {"seconds": round(time.monotonic() - began), **attack, **_described(behaviour)}
        return judge(world, mail), circumstances | {"leases lost": _leases_lost(world)}


def _attack(options: argparse.Namespace, world: World, servers: Servers, mail: list[Email]) -> dict[str, Any]:
    """Publish while blows fall and Graph fails, until all processes are awake and Graph is well again."""
    break_graph(world.simulator, rates(options.fault_rate, dict(options.fault)))
    publisher = Publisher(world, mail, options.seconds, _chance(options, "publisher"))
    freezes = options.kills // _KILLS_PER_FREEZE if options.freezes is None else options.freezes
    replicas = sorted(world.fleet.ports)
    blows = schedule(
        options.kills, freezes, options.freeze_seconds, options.seconds, replicas, _chance(options, "blows")
    )
    hand = Hand(world, servers)
    began = time.monotonic()
    publisher.start()
    hand.deal(blows, began)
    publisher.join()
    hand.wait_until_all_are_awake()
    calls = world.simulator.request_counts()["requests"]
    world.simulator.clear_faults()
    return {
        "published twice": publisher.repeats,
        "kills": hand.kills.total(),
        **{f"kills of {name}": count for name, count in sorted(hand.kills.items())},
        "freezes": hand.freezes.total(),
        "freezes beyond the lease": sum(count for seconds, count in hand.freezes.items() if seconds > LEASE_SECONDS),
        "Graph calls": sum(row["count"] for row in calls),
        "of them failed": sum(row["count"] for row in calls if not str(row["status"]).startswith("2")),
    }


def _described(behaviour: dict[str, Any]) -> dict[str, Any]:
    delays = behaviour["sent_items_delay_by_mailbox"].values()
    return {
        "Sent Items delay, longest": max(delays),
        "drafts being sent": behaviour["while_submitting"],
        "immutable ids": behaviour["immutable_ids"],
    }


def _leases_lost(world: World) -> int:
    """How often a worker found out that the email it held was no longer its own."""
    return sum(line.get("event") == "lease lost" for name in world.fleet.ports for line in world.log_lines(name))


def _wait(world: World, count: int, screen: Console) -> None:
    try:
        world.wait_until_settled(count, _PATIENCE)
        world.wait_until("every event has arrived", lambda: all_told(world, count))
        world.wait_until("the outbox is empty", lambda: not unpublished(world), _PATIENCE)
    except Overdue as overdue:
        screen.print(f"[red]{overdue}[/red]")
    time.sleep(_QUIET_SECONDS)


def _chance(options: argparse.Namespace, purpose: str) -> random.Random:
    """Return a source for one purpose alone, so that what one thread draws does not depend on another."""
    return random.Random(f"{options.seed} {purpose}")


def _named_rate(text: str) -> tuple[str, float]:
    name, _, rate = text.partition("=")
    if name not in FAULTS or not 0 <= float(rate) <= 1:
        raise ValueError(text)
    return name, float(rate)


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(text)
    return name, value


def _scratch() -> Path:
    scratch = ROOT / ".local"
    scratch.mkdir(exist_ok=True)
    return scratch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--emails", type=int, default=1000)
    add("--mailboxes", type=int, default=50)
    add("--kills", type=int, default=30, help="SIGKILLs that strike a living process or server")
    add("--freezes", type=int, help="on top of the kills (default: one for seven kills)")
    add(
        "--freeze-seconds",
        type=float,
        default=LONG_FREEZE_SECONDS,
        help=f"of every third freeze; longer than a lease, {LEASE_SECONDS} (default: %(default)g)",
    )
    add("--seconds", type=float, default=120, help="over which mail and blows are spread")
    add("--seed", type=int, default=1)
    add("--fault-rate", type=float, default=0.12, help="share of all Graph calls that go wrong")
    add(
        "--fault",
        type=_named_rate,
        action="append",
        default=[],
        metavar="NAME=RATE",
        help=f"share of one kind, of the calls that it can strike; may be given again: {', '.join(FAULTS)}",
    )
    add("--via", choices=["sendmail", "draft"], default="sendmail")
    add(
        "--set",
        type=_setting,
        action="append",
        default=[],
        dest="settings",
        metavar="NAME=VALUE",
        help="a setting of the fleet; may be given again",
    )
    add("--directory", help="where logs stay")
    add("--json", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run once and print one table."""
    options = _parser().parse_args(arguments)
    screen = Console()
    verdict, circumstances = run(options, screen)
    table = Table("what", "count", title=f"seed {options.seed}, via {options.via}")
    figures = circumstances | verdict.figures | {"lost": verdict.lost, "duplicated": verdict.duplicated}
    for name, value in figures.items():
        table.add_row(name, str(value))
    screen.print(table)
    for what, ids in (("lost", verdict.lost_ids), ("duplicated", verdict.duplicated_ids)):
        if ids:
            screen.print(f"{what}: {', '.join(ids[:_NAMED])}")
    if options.json:
        options.json.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2))
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main())
