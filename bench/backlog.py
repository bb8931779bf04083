"""Whether what the fleet does costs the same with few and with many mails in the tables, whoever's they are.

Two databases are filled alike but for the number of mails (`bench.tables`), and the same is done in both in turn: what
the scheduler asks and claims in one sweep, the ingest of a batch, what ``mailfleet status`` asks of one mail, and the
replay of one dead letter. Each is undone, so that every repetition finds the same tables. Compared are the processor
time of PostgreSQL's process and the time that the caller waits; both without the commit.

    python -m bench.backlog --json backlog.json
    python -m bench.backlog --small 10000 --large 300000 --waiting 60000 --mailboxes 10000

The run fails if anything costs much more in the large tables than in the small ones. With 5,000,000 mails it takes
some minutes to fill them, and about 15 GB of disk.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import orjson
from rich.console import Console

import models
from bench import report, tables
from bench.comparison import Comparison
from bench.limits import backlog
from contracts import accept
from migrations.__main__ import migrate
from models import Arrival, Route, audit, dead_letters, inspection, scheduling, turns
from models.scheduling import Dispatch, Pick
from sandbox.servers import Servers
from sandbox.world import new_database

MOST_GROWTH = 1.3
#: As the settings have it by default.
_IN_FLIGHT = {Route.PLAIN: 64, Route.ATTACHED: 16}
_BACKUPS_IN_FLIGHT = 32
_SHARE = 4
_LEASE = timedelta(minutes=2)
_BATCH = 100


class Cost(NamedTuple):
    """Milliseconds of one operation."""

    #: Of PostgreSQL's process for the connection.
    cpu: float
    waited: float


class Case(NamedTuple):
    """One of the two databases."""

    url: str
    filling: tables.Filling


#: Does something once, and returns something true if there was anything to do. What it needs is prepared before.
Operation = Callable[[], object]


def sweep() -> list[Dispatch]:
    """Do to the tables what one sweep of the scheduler does (`actors.scheduling`), with no budget to be reserved."""
    swept_at = scheduling.due().at
    with scheduling.sweep():  # not all of it in every sweep: only if something is due
        scheduling.expire_leases()
        scheduling.expire_backup_leases()
        scheduling.expire_overdue(_LEASE)
        scheduling.wake_due()
    routes, busy = scheduling.in_flight()
    scheduling.agenda()
    picks: dict[Route, list[Pick]] = {}
    chosen: list[turns.Candidate] = []
    for route in Route:
        capacity = _IN_FLIGHT[route] - routes[route]
        found = turns.look_ups(route, capacity=capacity, share=_SHARE, busy=busy)
        ready = turns.candidates(route, capacity=capacity, share=_SHARE, busy=busy, after="")
        chosen += (to_send := turns.choose(ready, capacity))
        picks[route] = [Pick(mail.id, mail.mailbox, None) for mail in [*found, *to_send]]
    with scheduling.sweep():
        routes, busy = scheduling.in_flight()
        claimed = [
            dispatch
            for route in Route
            for dispatch in scheduling.claim(
                route, picks[route], capacity=_IN_FLIGHT[route] - routes[route], lease=_LEASE
            )
        ]
        turns.note_served(chosen)
        scheduling.claim_backups(concurrency=_BACKUPS_IN_FLIGHT, share=_SHARE, busy=busy, lease=_LEASE)
    scheduling.next_due_in(swept_at)
    return claimed


def _sweep(_: Case) -> Operation:
    return sweep


def _ingest(case: Case) -> Operation:
    senders = [f"mailbox{random.randrange(case.filling.mailboxes)}@contoso.example" for _ in range(_BATCH)]
    arrivals = [
        Arrival(accept(orjson.dumps(backlog.email(sender, publisher_message_id=str(uuid.uuid4())))))
        for sender in senders
    ]
    return lambda: models.store(arrivals, publish_within=_LEASE)


def _status(case: Case) -> Operation:
    id = tables.publisher_message_id(random.randint(1, case.filling.settled))
    return lambda: inspection.everything_about(inspection.find_email(id) or "")


def _replay(case: Case) -> Operation:
    failed = case.filling.settled // tables.FAILED_EVERY
    id = tables.publisher_message_id(tables.FAILED_EVERY * random.randint(1, failed))
    return lambda: _replay_one(id)


def _replay_one(id: str) -> bool:
    """Do to the tables what ``mailfleet dlq replay`` does."""
    letter = dead_letters.find(id)
    if letter is None or letter.status != "open":
        return False
    with models.transaction():
        done = dead_letters.resolve(letter.id, replayed=True, who="bench")
        audit.record("bench", "dlq.replayed", letter.id, incoming_email_id=letter.incoming_email_id)
    return done


OPERATIONS: dict[str, Callable[[Case], Operation]] = {
    "sweep": _sweep,
    f"ingest of {_BATCH}": _ingest,
    "status of one": _status,
    "replay of one": _replay,
}


class _Undone(Exception):
    """Takes back what was done."""


@contextmanager
def _undoing() -> Iterator[None]:
    with suppress(_Undone), models.transaction():
        yield
        raise _Undone


def measure(case: Case, repetitions: int) -> dict[str, list[Cost]]:
    """Do everything so many times, over a connection of its own, on which everything was done once before."""
    models.connect(case.url, "bench")
    try:
        ((backend,),) = models.rows("SELECT pg_backend_pid()")
        for prepare in OPERATIONS.values():
            _cost(prepare(case), backend)
        costs = defaultdict(list)
        for _ in range(repetitions):
            for name, prepare in OPERATIONS.items():
                costs[name].append(_cost(prepare(case), backend))
        return costs
    finally:
        models.disconnect()


def _cost(operation: Operation, backend: int) -> Cost:
    with _undoing():
        cpu, began = _cpu_nanoseconds(backend), time.perf_counter()
        done = operation()
        cost = Cost((_cpu_nanoseconds(backend) - cpu) / 1e6, 1000 * (time.perf_counter() - began))
        if not done:
            raise SystemExit("there was nothing to do: nothing was measured")
    return cost


def _cpu_nanoseconds(pid: int) -> int:
    """Return the time that a process has run; unlike proc(5)'s ticks it can tell a millisecond."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def compare(small: Case, large: Case, options: argparse.Namespace, found: Comparison) -> None:
    """Do everything in both in turn, so that whatever else the machine does hits both, and compare the medians."""
    costs: dict[Case, dict[str, list[Cost]]] = {small: defaultdict(list), large: defaultdict(list)}
    for _ in range(options.rounds):
        for case, of_case in costs.items():
            for name, measured in measure(case, options.repetitions).items():
                of_case[name] += measured
    whose = f"{large.filling.mailboxes:,} mailbox{'es' if large.filling.mailboxes > 1 else ''}"
    for name in OPERATIONS:
        for what, label in (("cpu", "CPU"), ("waited", "waited")):
            of_large, of_small = (_median(costs[case][name], what) for case in (large, small))
            found.add(f"{whose}: {name}, {label}, ms", of_large, of_small, digits=3, at_most=MOST_GROWTH)
    found.end_section()


def _median(costs: list[Cost], what: str) -> float:
    return statistics.median(getattr(cost, what) for cost in costs)


def _filled(filling: tables.Filling, server: str, stack: ExitStack, screen: Console) -> Case:
    began, case = time.monotonic(), Case(new_database(server, stack), filling)
    migrate(case.url)
    tables.fill(case.url, filling)
    models.connect(case.url, "bench")
    ((size,),) = models.rows("SELECT pg_size_pretty(pg_database_size(current_database()))")
    models.disconnect()
    screen.print(
        f"{filling.emails:,} mails, of which {filling.waiting:,} wait; mailboxes: {filling.mailboxes:,}; "
        f"{size}, filled in {time.monotonic() - began:.0f} s"
    )
    return case


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("backlog", __doc__)
    report.add_durable(parser, default=False)
    add = parser.add_argument
    add("--small", type=int, default=10_000, metavar="EMAILS")
    add("--large", type=int, default=5_000_000, metavar="EMAILS")
    add(
        "--waiting",
        type=int,
        default=1_000_000,
        help="of the large; of the small the same share",
    )
    add("--mailboxes", type=int, nargs="+", default=[1, 10_000], help="one pair of databases for each")
    add("--rounds", type=int, default=10, help="turns that each database has (default: %(default)s)")
    add("--repetitions", type=int, default=30, help="of everything in each turn (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options, screen = _arguments(arguments), Console()
    found = Comparison(f"{options.large:,} mails", f"{options.small:,} mails")
    with (
        tempfile.TemporaryDirectory(prefix="mailfleet-bench-") as directory,
        Servers(Path(directory), durable=options.durable, environment={}) as servers,
    ):
        for mailboxes in options.mailboxes:
            with ExitStack() as stack:  # the databases go with it, before the next ones are made
                waiting = {
                    options.small: options.small * options.waiting // options.large,
                    options.large: options.waiting,
                }
                small, large = (
                    _filled(tables.Filling(emails, waiting[emails], mailboxes), servers.postgresql.url, stack, screen)
                    for emails in (options.small, options.large)
                )
                compare(small, large, options, found)
    return report.tell(found, "the same in large and in small tables", options)


if __name__ == "__main__":
    sys.exit(main())
