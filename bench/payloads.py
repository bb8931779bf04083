"""What sealed payloads cost a mail, beside payloads in clear in the same run.

First the sealing and opening alone, then the ingest of batches of 100 as the bridge stores them, with the processor
time of PostgreSQL's process for the connection and the bytes of table and TOAST. What is stored is rolled back but for
one batch, whose size is looked at.

    python -m bench.payloads --json payloads.json

The run fails if sealing costs the bridge's process and PostgreSQL together more than a tenth of a millisecond a mail of
2 KB.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import orjson

import models
from bench import report
from bench.archive import content
from bench.comparison import Comparison
from bench.processor import cpu_seconds
from contracts import accept
from migrations.__main__ import migrate
from models import Arrival, payload_keys
from models.ingest import Sealer
from payloads import Payloads, WrappedKey
from sandbox.servers import Servers
from sandbox.world import new_database
from vault import KEY_BYTES, Keyring

SIZES_BYTES = (2_000, 50_000)
#: The figure that has to be kept, for a plain mail.
MOST_MILLISECONDS = 0.1
_BATCH = 100
_ID = "0190a000-0000-7000-8000-000000000001"
_WITHIN = timedelta(seconds=30)
#: Calls that are timed together: one takes microseconds.
_CALLS = 200
#: Batches of one way before the other's turn: the kernel counts PostgreSQL's time in hundredths of a second.
_ROUNDS = 5


class Stored(NamedTuple):
    """Of a mail that is stored: processor time in milliseconds, and bytes of the table."""

    own: float
    postgresql: float
    size: float


class _RolledBack(Exception):
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure both sizes, and print one table."""
    parser = report.parser("payloads", __doc__)
    parser.add_argument("--seconds", type=float, default=4, help="for each way of each size (default: %(default)g)")
    options = parser.parse_args(arguments)
    found = Comparison("sealed", "in clear")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mailfleet-bench-")))
        directory.chmod(0o711)
        servers = stack.enter_context(Servers(directory, durable=False, environment={}))
        url = new_database(servers.environment["DATABASE_URL"], stack)
        migrate(url)
        models.connect(url, "bench")
        stack.callback(models.disconnect)
        extra = [_measure(found, size, options.seconds) for size in SIZES_BYTES]
    found.add(f"{SIZES_BYTES[0] // 1000} KB, more than in clear, ms", extra[0], None, digits=3)
    return max(report.tell(found, "sealed payloads", options), int(extra[0] > MOST_MILLISECONDS))


def _measure(found: Comparison, size_bytes: int, seconds: float) -> float:
    """Add a size's lines, and return by how many milliseconds of processor time sealed mail costs more to store."""
    payloads = _payloads()
    sealer, email = payloads.sealer(), _email(size_bytes, "0")
    sealed, clear = sealer.seal(_ID, email), orjson.dumps(email).decode()
    name = f"{size_bytes // 1000} KB"
    seal = _each(lambda: sealer.seal(_ID, email), seconds), _each(lambda: orjson.dumps(email).decode(), seconds)
    opened = (
        _each(lambda: payloads.open(_ID, orjson.loads(sealed)), seconds),
        _each(lambda: payloads.open(_ID, orjson.loads(clear)), seconds),
    )
    found.add(f"{name}, to be kept, CPU ms", *seal, digits=4)
    found.add(f"{name}, to be read, CPU ms", *opened, digits=4)
    with_seal, without = _store_in_turn(size_bytes, sealer, seconds)
    found.add(f"{name}, stored in a batch of {_BATCH}, CPU ms", with_seal.own, without.own, digits=3)
    found.add(f"{name}, PostgreSQL's for it, CPU ms", with_seal.postgresql, without.postgresql, digits=3)
    found.add(f"{name}, bytes of the table", with_seal.size, without.size, digits=0)
    found.end_section()
    return with_seal.own + with_seal.postgresql - without.own - without.postgresql


def _payloads() -> Payloads:
    kept: dict[str, WrappedKey] = {}

    def keep(key: WrappedKey) -> None:
        kept[key.id] = key
        payload_keys.keep(*key)

    return Payloads(Keyring({"bench": bytes(KEY_BYTES)}), keep=keep, find=kept.get)


def _email(size_bytes: int, publisher_message_id: str) -> dict[str, object]:
    return {
        "publisher_message_id": publisher_message_id,
        "from": "ann@example.com",
        "to": ["bob@example.org"],
        "subject": "Your order",
        "body": {"contentType": "html", "content": content("text", size_bytes).decode()},
    }


def _each(run: Callable[[], object], seconds: float) -> float:
    """Return the milliseconds of processor time of one call: those of the quickest of many rounds."""
    over, best = time.perf_counter() + seconds / 4, float("inf")
    while time.perf_counter() < over:
        began = time.process_time()
        for _ in range(_CALLS):
            run()
        best = min(best, (time.process_time() - began) / _CALLS)
    return 1000 * best


def _store_in_turn(size_bytes: int, sealer: Sealer, seconds: float) -> tuple[Stored, Stored]:
    """Store batches sealed and in clear in turn, so that whatever else the machine does hits both."""
    arrivals = [Arrival(accept(orjson.dumps(_email(size_bytes, f"bench-{n}")))) for n in range(_BATCH)]
    ways = (sealer, None)
    spent = dict.fromkeys(ways, (0.0, 0.0))
    turns, over = 0, time.perf_counter() + 2 * seconds
    while time.perf_counter() < over:
        turns += 1
        for way in ways:
            own, server = _spent_on(partial(_store, arrivals, way))
            spent[way] = spent[way][0] + own, spent[way][1] + server
    mails = turns * _ROUNDS * _BATCH
    found = [
        Stored(1000 * own / mails, 1000 * server / mails, _size(arrivals, way)) for way, (own, server) in spent.items()
    ]
    return found[0], found[1]


def _spent_on(do: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of this process and of PostgreSQL's for its connection."""
    ((pid,),) = models.rows("SELECT pg_backend_pid()")
    own, server = time.process_time(), cpu_seconds({"": lambda: [pid]})[""]
    do()
    return time.process_time() - own, cpu_seconds({"": lambda: [pid]})[""] - server


def _store(arrivals: list[Arrival], sealer: Sealer | None) -> None:
    for _ in range(_ROUNDS):
        _and_undo(lambda: models.store(arrivals, publish_within=_WITHIN, sealer=sealer))


def _and_undo(do: Callable[[], object]) -> None:
    try:
        with models.transaction():
            do()
            raise _RolledBack
    except _RolledBack:
        pass


def _size(arrivals: list[Arrival], sealer: Sealer | None) -> float:
    """Return the bytes that a payload takes in the table, compressed as PostgreSQL does."""
    sizes: list[float] = []

    def look() -> None:
        models.store(arrivals, publish_within=_WITHIN, sealer=sealer)
        sizes.append(float(models.rows("SELECT avg(pg_column_size(payload)) FROM incoming_emails")[0][0]))

    _and_undo(look)
    return sizes[0]


if __name__ == "__main__":
    sys.exit(main())
