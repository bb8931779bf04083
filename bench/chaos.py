"""The proof harness: mail goes through while everything dies, and the record must show each mail once.

A seeded schedule kills and freezes processes of every type and kills PostgreSQL, RabbitMQ and Redis, while Graph fails
in every way that it may (`bench.faults`). Then Graph's own record is held against the database and the events.

    python -m bench.chaos --emails 5000 --kills 150 --seed 1
    python -m bench.chaos --emails 5000 --kills 150 --fault gateway-timeout-after-send=0.3

Exit status 1 on any loss or duplicate.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pika.exceptions
from rich.console import Console
from rich.table import Table

from bench.faults import FAULTS, break_graph, rates
from sandbox.programs import ServerFailed
from sandbox.servers import Servers
from sandbox.world import ROOT, Overdue, World
from simulator.control import Simulator

SETTINGS = {
    "BACKUP_DELAY_SECONDS": 1,
    "GRAPH_TIMEOUT_SECONDS": 2,
    # Longer than a frozen process, a late answer and the lag of the mailbox together: what the guarantee assumes.
    "IN_DOUBT_GRACE_SECONDS": 15,
    "IN_DOUBT_SETTLE_SECONDS": 2,
    "LEASE_SECONDS": 20,
    "MAILBOX_SENDS_PER_MINUTE": 0,
    "MAX_ATTEMPTS": 50,
    "RETRY_BACKOFF_MAX_SECONDS": 3,
    "RETRY_BACKOFF_MIN_SECONDS": 1,
}
SCALE = {"bridge": 2, "scheduler": 2, "send_plain": 2, "send_attached": 2, "backup": 2}
SERVERS = ("postgresql", "rabbitmq", "redis")
#: Of all kills; a server takes many processes' work with it.
_SERVER_SHARE = 0.1
_FREEZE_SHARE = 0.15
_FREEZE_SECONDS = 3.0
_ATTACHED_SHARE = 0.1
_REPEATED_SHARE = 0.05
_PATIENCE = timedelta(minutes=10)
_START_ATTEMPTS = 10


@dataclass(frozen=True)
class Blow:
    """One entry of the schedule: what happens to whom, so many seconds after the start."""

    at_seconds: float
    kind: str
    target: str


def schedule(kills: int, lasts_seconds: float, targets: Sequence[str], chance: random.Random) -> list[Blow]:
    """Return a schedule: the same for the same seed."""
    blows = []
    for at_seconds in sorted(chance.uniform(0, lasts_seconds) for _ in range(kills)):
        if chance.random() < _SERVER_SHARE:
            blows.append(Blow(at_seconds, "server", chance.choice(SERVERS)))
        else:
            kind = "freeze" if chance.random() < _FREEZE_SHARE else "kill"
            blows.append(Blow(at_seconds, kind, chance.choice(targets)))
    return blows


def emails(count: int, mailboxes: int, simulator: Simulator, chance: random.Random) -> Iterator[dict[str, Any]]:
    """Yield emails, some with attachments small and large."""
    for number in range(count):
        email: dict[str, Any] = {
            "publisher_message_id": f"chaos-{number}",
            "from": f"sender{number % mailboxes}@contoso.example",
            "to": ["reader@example.com"],
            "subject": f"Number {number}",
            "body": {"contentType": "text", "content": f"This is number {number}."},
        }
        if chance.random() < _ATTACHED_SHARE:
            sizes = [chance.choice((1_000, 200_000, 4_500_000)) for _ in range(chance.randint(1, 2))]
            email["attachments"] = [
                {"name": f"{size}-{place}.bin", "size": size, "urlOrId": simulator.file_url(size, seed=number)}
                for place, size in enumerate(sizes)
            ]
        yield email


class Publisher(threading.Thread):
    """Publishes as an application would: again and again until RabbitMQ has confirmed, and some mail twice."""

    def __init__(self, world: World, mail: list[dict[str, Any]], lasts_seconds: float, chance: random.Random) -> None:
        super().__init__(daemon=True)
        self._world = world
        self._mail = mail
        self._pause = lasts_seconds / max(len(mail) / 20, 1)
        self._chance = chance
        self.repeats = 0

    def run(self) -> None:
        for start in range(0, len(self._mail), 20):
            batch = self._mail[start : start + 20]
            again = [email for email in batch if self._chance.random() < _REPEATED_SHARE]
            self.repeats += len(again)
            self._publish(batch + again)
            time.sleep(self._pause)

    def _publish(self, batch: list[dict[str, Any]]) -> None:
        while True:
            try:
                return self._world.publish(*batch)
            except (pika.exceptions.AMQPError, OSError):
                time.sleep(0.5)


def strike(blow: Blow, world: World, servers: Servers) -> None:
    """Carry one entry of the schedule out; what was killed comes back as on a platform that restarts it."""
    if blow.kind == "server":
        server = getattr(servers, blow.target)
        server.kill()
        _start(server)
    elif blow.kind == "freeze":
        world.fleet.suspend(blow.target)
        threading.Timer(_FREEZE_SECONDS, world.fleet.resume, [blow.target]).start()
    else:
        world.fleet.kill(blow.target)


def _start(server: Any) -> None:
    """Start a killed server; what it leaves behind (PostgreSQL's shared memory) may stand in its way for a moment."""
    for _ in range(_START_ATTEMPTS):
        try:
            return server.start()
        except ServerFailed as failure:
            last = failure
            time.sleep(1)
    raise last


_MUST_BE_NONE = (
    "not archived once",
    "not acknowledged",
    "not told as sent",
    "repeated under another id",
    "attachments wrong",
    "of nobody's emails",
)


@dataclass(frozen=True)
class Verdict:
    """What the record shows."""

    figures: dict[str, int]
    lost: int
    duplicated: int

    @property
    def holds(self) -> bool:
        return self.lost == self.duplicated == 0 and not any(self.figures[name] for name in _MUST_BE_NONE)


def judge(world: World, mail: list[dict[str, Any]]) -> Verdict:
    """Hold Graph's record against the database and the events."""
    known = dict(world.rows("SELECT publisher_message_id, id::text FROM incoming_emails"))
    delivered = world.simulator.delivery_counts_by_tag()
    counts = [delivered.get(known.get(email["publisher_message_id"], ""), 0) for email in mail]
    archived = dict(world.rows("SELECT incoming_email_id::text, count(*) FROM email_backups GROUP BY 1"))
    told = {kind: Counter(event.body["publisher_message_id"] for event in world.events(kind)) for kind in _TOLD}
    ids = [email["publisher_message_id"] for email in mail]
    figures = {
        "emails": len(mail),
        "rows": len(known),
        "delivered once": counts.count(1),
        "not archived once": sum(archived.get(known.get(id, ""), 0) != 1 for id in ids),
        "not acknowledged": sum(not told["SendEmailReceived"][id] for id in ids),
        "not told as sent": sum(not told["SendEmailSent"][id] for id in ids),
        "events repeated": sum(count - 1 for counter in told.values() for count in counter.values()),
        "repeated under another id": sum(len(ids) - 1 for ids in _ids_of_events(world)),
        "attachments wrong": _wrong_attachments(world, mail, known),
        "were in doubt": world.count(_WERE_IN_DOUBT),
        "dead letters": world.count("SELECT count(*) FROM dlq"),
        "of nobody's emails": sum(delivered.values()) - sum(counts),
    }
    return Verdict(figures, lost=counts.count(0), duplicated=sum(count > 1 for count in counts))


_TOLD = ("SendEmailReceived", "SendEmailSent")
_WERE_IN_DOUBT = """
    SELECT count(*) FROM sent_emails
    WHERE jsonb_array_length(coalesce(response_metadata->'evidence', '[]')) > 1
"""


def _ids_of_events(world: World) -> Iterator[set[str]]:
    """Yield under which ids each event came: one, however often it came."""
    ids: dict[tuple[str, str], set[str]] = {}
    for event in world.events():
        ids.setdefault((event.type, event.body["incoming_email_id"]), set()).add(event.message_id)
    yield from ids.values()


def _wrong_attachments(world: World, mail: list[dict[str, Any]], known: dict[str, str]) -> int:
    wanted = {
        known.get(email["publisher_message_id"], ""): sorted((a["name"], a["size"]) for a in email["attachments"])
        for email in mail
        if "attachments" in email
    }
    wrong = 0
    for delivery in world.simulator.deliveries():
        have = sorted((attachment["name"], attachment["bytes"]) for attachment in delivery["attachments"])
        wrong += any(have != wanted.get(tag, []) for tag in delivery["tags"])
    return wrong


def run(options: argparse.Namespace, screen: Console) -> tuple[Verdict, dict[str, Any]]:
    """Publish, break everything, wait until all is settled, and judge."""
    chance = random.Random(options.seed)
    folder = Path(options.directory or tempfile.mkdtemp(prefix="chaos-", dir=_scratch()))
    with Servers(folder / "servers", durable=False, environment={}) as servers:
        settings = SETTINGS | {"SEND_PLAIN_VIA": options.via}
        world_options: dict[str, Any] = {"scale": SCALE, "supervise": True}
        with World(servers.environment, folder / "world", settings, **world_options) as world:
            world.wait_until_ready(timedelta(seconds=60))
            mail = list(emails(options.emails, options.mailboxes, world.simulator, chance))
            break_graph(world.simulator, rates(options.fault_rate, dict(options.fault)))
            began = time.monotonic()
            publisher = Publisher(world, mail, options.seconds, chance)
            publisher.start()
            _strike_all(options, world, servers, chance, began)
            publisher.join()
            screen.print(f"{time.monotonic() - began:.0f} s: the last blow has fallen; waiting until all is settled")
            counts = world.simulator.request_counts()
            world.simulator.clear_faults()
            _wait(world, len(mail), screen)
            verdict = judge(world, mail)
            return verdict, {
                "seconds": round(time.monotonic() - began),
                "published twice": publisher.repeats,
                "kills": options.kills,
                "Graph calls": sum(row["count"] for row in counts["requests"]),
                "of them failed": sum(
                    row["count"] for row in counts["requests"] if not str(row["status"]).startswith("2")
                ),
            }


def _strike_all(
    options: argparse.Namespace, world: World, servers: Servers, chance: random.Random, began: float
) -> None:
    for blow in schedule(options.kills, options.seconds, sorted(world.fleet.ports), chance):
        time.sleep(max(0.0, began + blow.at_seconds - time.monotonic()))
        strike(blow, world, servers)


def _wait(world: World, count: int, screen: Console) -> None:
    try:
        world.wait_until_settled(count, _PATIENCE)
        told = lambda kind: {event.body["publisher_message_id"] for event in world.events(kind)}  # noqa: E731
        world.wait_until("every event has arrived", lambda: all(len(told(kind)) >= count for kind in _TOLD))
    except Overdue as overdue:
        screen.print(f"[red]{overdue}[/red]")


def _named_rate(text: str) -> tuple[str, float]:
    name, _, rate = text.partition("=")
    if name not in FAULTS or not 0 <= float(rate) <= 1:
        raise ValueError(text)
    return name, float(rate)


def _scratch() -> Path:
    scratch = ROOT / ".local"
    scratch.mkdir(exist_ok=True)
    return scratch


def main(arguments: Sequence[str] | None = None) -> int:
    """Run once and print one table."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--emails", type=int, default=1000)
    parser.add_argument("--mailboxes", type=int, default=50)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=120, help="over which mail and kills are spread")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fault-rate", type=float, default=0.12, help="share of all Graph calls that go wrong")
    parser.add_argument(
        "--fault",
        type=_named_rate,
        action="append",
        default=[],
        metavar="NAME=RATE",
        help=f"share of one kind, of the calls that it can strike; may be given again: {', '.join(FAULTS)}",
    )
    parser.add_argument("--via", choices=["sendmail", "draft"], default="sendmail")
    parser.add_argument("--directory", help="where logs stay")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    screen = Console()
    verdict, circumstances = run(options, screen)
    table = Table("what", "count", title=f"seed {options.seed}, via {options.via}")
    figures = circumstances | verdict.figures | {"lost": verdict.lost, "duplicated": verdict.duplicated}
    for name, value in figures.items():
        table.add_row(name, str(value))
    screen.print(table)
    if options.json:
        options.json.write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2))
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main())
