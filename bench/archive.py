"""How fast the vault seals and opens mail, beside bare gzip and a file in the same run.

The floor compresses with the same level and writes the result into a file without flushing it; it neither encrypts nor
takes a checksum. Each size is measured with text, which compresses, and with base64 of random bytes, as a compressed
file looks in a mail: of that gzip saves the quarter that base64 adds.

    python -m bench.archive --json archive.json

The run fails if anything that was opened is not what was sealed.
"""

from __future__ import annotations

import base64
import gzip
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import report
from bench.comparison import Comparison
from vault import KEY_BYTES, Keyring, Vault, bind_to

SIZES_BYTES = (5_000, 50_000, 5_000_000, 50_000_000)
KINDS = ("text", "base64")
MEGABYTE = 1_000_000
_GZIP_LEVEL = 1
_WORDS = ("quarter", "figure", "message", "invoice", "attached", "regards", "account", "thousand", "<p>", "</p>", "of")
_BOUND_TO = bind_to("email", "message")
#: Graph's answer comes in pieces, and so does what a reader takes.
_CHUNK_BYTES = 64 * 1024
#: However long one takes.
_LEAST_TURNS = 3


class Effort(NamedTuple):
    """What one pass over the plain bytes took, in seconds."""

    wall: float
    cpu: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every size with either content, and print one table."""
    parser = report.parser("archive", __doc__)
    parser.add_argument("--seconds", type=float, default=2, help="for each way of each content (default: %(default)g)")
    options = parser.parse_args(arguments)
    found = Comparison("vault", "floor")
    with tempfile.TemporaryDirectory(prefix="mailfleet-bench-") as directory:
        for size in SIZES_BYTES:
            for kind in KINDS:
                _measure(found, kind, content(kind, size), Path(directory) / "mail.gz", options.seconds)
    return report.tell(found, "the vault beside gzip and a file", options)


def content(kind: str, size_bytes: int) -> bytes:
    """Return so many bytes as they are in mails of that kind: the same in every run."""
    chance = random.Random(1)
    if kind == "text":
        # It begins again only after more than gzip looks back, which is 32 KB.
        words = " ".join(f"{word}{chance.randrange(1000)}" for word in chance.choices(_WORDS, k=20_000)).encode()
        return (words * (1 + size_bytes // len(words)))[:size_bytes]
    return base64.encodebytes(chance.randbytes(size_bytes))[:size_bytes]


def _measure(found: Comparison, kind: str, plain: bytes, file: Path, seconds: float) -> None:
    vault = Vault(Keyring({"bench": bytes(KEY_BYTES)}))
    blob = vault.seal(_chunks(plain), associated_data=_BOUND_TO)
    if _opened(vault, blob.ciphertext, blob.checksum) != plain:
        raise SystemExit(f"{len(plain)} bytes of {kind}: what was opened is not what was sealed")
    sealing = _in_turn(
        lambda: vault.seal(_chunks(plain), associated_data=_BOUND_TO),
        lambda: file.write_bytes(gzip.compress(plain, _GZIP_LEVEL)),
        seconds,
    )
    opening = _in_turn(
        lambda: _opened(vault, blob.ciphertext, blob.checksum), lambda: gzip.decompress(file.read_bytes()), seconds
    )
    name, megabytes = f"{len(plain) // 1000:,} KB of {kind}", len(plain) / MEGABYTE
    for way, (ours, floor) in (("seal", sealing), ("open", opening)):
        found.add(f"{name}, {way}, MB/s", megabytes / ours.wall, megabytes / floor.wall)
        found.add(f"{name}, {way}, CPU ms per MB", 1000 * ours.cpu / megabytes, 1000 * floor.cpu / megabytes, digits=2)
    stored = 100 / len(plain)
    found.add(f"{name}, stored, % of plain", stored * len(blob.ciphertext), stored * file.stat().st_size)
    found.end_section()


def _chunks(plain: bytes) -> Iterator[bytes]:
    return (plain[start : start + _CHUNK_BYTES] for start in range(0, len(plain), _CHUNK_BYTES))


def _opened(vault: Vault, blob: bytes, checksum: str) -> bytes:
    return b"".join(vault.open(blob, key_id="bench", associated_data=_BOUND_TO, checksum=checksum))


def _in_turn(ours: Callable[[], object], floor: Callable[[], object], seconds: float) -> tuple[Effort, Effort]:
    """Run both in turn, so that whatever else the machine does hits both; return the medians."""
    efforts: tuple[list[Effort], list[Effort]] = ([], [])
    over = time.perf_counter() + 2 * seconds
    while len(efforts[0]) < _LEAST_TURNS or time.perf_counter() < over:
        for each, run in zip(efforts, (ours, floor), strict=True):
            each.append(_timed(run))
    return _median(efforts[0]), _median(efforts[1])


def _timed(run: Callable[[], object]) -> Effort:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Effort(time.perf_counter() - wall, time.process_time() - cpu)


def _median(efforts: list[Effort]) -> Effort:
    return Effort(*map(statistics.median, zip(*efforts, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
