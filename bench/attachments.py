"""Large attachments: what a worker needs for one, how fast it goes, and that kills neither lose nor repeat a byte.

A 5 MB and a 150 MB file are sent, one of 150 MB that is stored with mailfleet, and three of 50 MB with one mail, which
go at the same time. The most memory that the worker has had is read from the kernel for each. The same 150 MB are
copied from the same source to the same simulated Graph by a loop that does nothing else, turn by turn.

    python -m bench.attachments
    python -m bench.attachments --kills 40 --uploads 60 --seed 1

With ``--kills`` the workers are killed while files of 5 to 40 MB go up, one to five with a mail, about half of them
stored with mailfleet and the others on a web server. Graph's record is held against what was published: every mail
once, each attachment once, byte for byte. Half of the kills wait for a worker that has a file part up; a run in which
fewer than a quarter struck one has not shown what it should.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import requests
from rich.console import Console

from bench import report
from bench.blows import Blow, Hand
from bench.limits.findings import Findings
from bench.load import UNBINDING
from graph_client import UPLOAD_RANGE_BYTES, GraphClient, TokenSource
from sandbox.servers import Servers
from sandbox.world import World
from simulator import files
from telemetry import Step

MEGABYTE = 1024 * 1024
SMALL_BYTES, LARGE_BYTES = 5 * MEGABYTE, 150 * MEGABYTE
THREE_BYTES = 50 * MEGABYTE
MOST_GROWTH_MB = 24.0
#: As much for each of the three; docs/performance.md says what the allocator keeps of it.
MOST_GROWTH_THREE_MB = 3 * MOST_GROWTH_MB
#: Bytes a second, of the bare copy's.
LEAST_SHARE = 0.75
_TYPES = ("bridge", "clock", "scheduler", "send_attached")
_TOKEN = "a-token-of-the-bench"
_PATIENCE = timedelta(minutes=20)
_KILL_SETTINGS: dict[str, str | int] = {
    **UNBINDING,
    "METRICS_PORT": 0,
    "CONSOLE_TOKENS": f"bench:operator:{_TOKEN}",
    "GRAPH_TIMEOUT_SECONDS": 5,
    "LEASE_SECONDS": 20,
    "MAX_ATTEMPTS": 50,
    "RETRY_BACKOFF_MAX_SECONDS": 3,
    "RETRY_BACKOFF_MIN_SECONDS": 1,
    "IN_DOUBT_SETTLE_SECONDS": 2,
    "IN_DOUBT_GRACE_SECONDS": 10,
}
_SMALLEST_MB, _LARGEST_MB = 5, 40
_MOST_FILES = 5
#: Of a mail, so that it is below what Exchange takes at most, in base64.
_MOST_MAIL_MB = 100
_STORED_SHARE = 0.5
#: Of the kills, how many wait for a file that is part up, for how long, and how many must have met one.
_AIMED_SHARE = 0.5
_AIMED_WITHIN_SECONDS = 30.0
_LOOK_SECONDS = 0.05
_LEAST_PART_UP = 0.25
#: So many mails that went wrong are named.
_NAMED = 10
_SETTLED = "SELECT count(*) FROM incoming_emails WHERE status IN ('processed', 'failed', 'expired', 'cancelled')"


# Memory and speed


def measure(world: World, times: int) -> Findings:
    """Send a small and a large file so often, and copy the large one barely as often, in turns."""
    findings = Findings()
    world.simulator.set_limits(requests=0, upload_bytes=0)
    worker = _Worker(world)
    world.wait_until("the console is up", lambda: _is_up(_console(world)))
    _send(world, _with_one(world, "warm-up", SMALL_BYTES))
    small = [worker.most_mb(_with_one(world, f"small-{turn}", SMALL_BYTES)) for turn in range(times)]
    large, ours, bare = [], [], []
    for turn in range(times):
        large.append(worker.most_mb(_with_one(world, f"large-{turn}", LARGE_BYTES)))
        ours.append(_seconds(world, f"large-{turn}@contoso.example"))
        _copy(world, f"copy-{turn}@contoso.example")
        bare.append(_seconds(world, f"copy-{turn}@contoso.example"))
    stored = [worker.most_mb(_with_stored(world, f"stored-{turn}")) for turn in range(times)]
    # Last, because what the heap keeps of several at once would count for one.
    three = [worker.most_mb(_with_three(world, f"three-{turn}")) for turn in range(times)]
    findings.tell("resident at most, 5 MB attached, MB", max(small))
    findings.tell("resident at most, 150 MB attached, MB", max(large))
    findings.at_most("growth, MB", max(large) - min(small), MOST_GROWTH_MB)
    findings.tell("resident at most, 150 MB stored with mailfleet, MB", max(stored))
    findings.at_most("growth for the stored one, MB", max(stored) - min(small), MOST_GROWTH_MB)
    findings.tell("resident at most, three of 50 MB at once, MB", max(three))
    findings.at_most("growth for three at once, MB", max(three) - min(small), MOST_GROWTH_THREE_MB)
    rates = [LARGE_BYTES / MEGABYTE / statistics.median(seconds) for seconds in (ours, bare)]
    findings.tell("upload, MB a second", rates[0])
    findings.tell("bare copy, MB a second", rates[1])
    findings.at_least("of the bare copy's", rates[0] / rates[1], LEAST_SHARE)
    return findings


class _Worker:
    """The processes of ``send_attached``, and what the kernel says of their memory."""

    def __init__(self, world: World) -> None:
        self._world = world

    def most_mb(self, mail: dict[str, Any]) -> float:
        """Send a mail and return the most that was resident meanwhile, of the process that had most."""
        pids = self._world.fleet.pids("send_attached")
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # begin the high-water mark anew (proc(5))
        _send(self._world, mail)
        return max(_high_water_mb(pid) for pid in pids)


def _high_water_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(kilobytes) / 1024


def _send(world: World, mail: dict[str, Any]) -> None:
    name = mail["publisher_message_id"]
    world.publish(mail)
    processed = "SELECT 1 FROM incoming_emails WHERE publisher_message_id = %(id)s AND status = 'processed'"
    world.wait_until(f"{name} is sent", lambda: world.rows(processed, {"id": name}), _PATIENCE)


def _with_one(world: World, name: str, size_bytes: int) -> dict[str, Any]:
    return _email(name, [_served(world, f"{name}.bin", size_bytes)])


def _with_three(world: World, name: str) -> dict[str, Any]:
    return _email(name, [_served(world, f"{name}-{place}.bin", THREE_BYTES) for place in range(3)])


def _with_stored(world: World, name: str) -> dict[str, Any]:
    file = f"{name}.bin"
    return _email(name, [{"name": file, "size": LARGE_BYTES, "urlOrId": _stored(world, file, LARGE_BYTES)}])


def _served(world: World, name: str, size_bytes: int) -> dict[str, Any]:
    return {"name": name, "size": size_bytes, "urlOrId": world.simulator.file_url(size_bytes, seed=name)}


def _email(name: str, attachments: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "publisher_message_id": name,
        "from": f"{name}@contoso.example",
        "to": ["reader@example.com"],
        "subject": name,
        "body": {"contentType": "text", "content": "The file is attached."},
        "attachments": attachments,
    }


def _seconds(world: World, mailbox: str) -> float:
    """Return the time from the opening of the upload session to the end of the last range, as Graph saw it."""
    (opened,) = world.simulator.requests(mailbox, "create_upload_session")
    ranges = world.simulator.requests(mailbox, "upload_range")
    return float(ranges[-1]["answered_monotonic"] - opened["arrived_monotonic"])


def _copy(world: World, mailbox: str) -> None:
    """Stream the large file into an upload session, and do nothing else."""
    graph = _graph(world)
    draft = graph.create_draft(mailbox, {"subject": "copy", "body": {"contentType": "text", "content": ""}})
    session = graph.create_upload_session(
        mailbox, draft.id, name="copy", size_bytes=LARGE_BYTES, content_type="application/octet-stream"
    )
    with requests.Session() as http:
        http.verify = world.simulator.ca_bundle
        with http.get(world.simulator.file_url(LARGE_BYTES, seed="copy"), stream=True, timeout=30) as source:
            for offset in range(0, LARGE_BYTES, UPLOAD_RANGE_BYTES):
                content = source.raw.read(UPLOAD_RANGE_BYTES)
                of = f"bytes {offset}-{offset + len(content) - 1}/{LARGE_BYTES}"
                http.put(session.url, data=content, headers={"Content-Range": of}, timeout=30).raise_for_status()


def _graph(world: World) -> GraphClient:
    own = world.environment
    os.environ["REQUESTS_CA_BUNDLE"] = world.simulator.ca_bundle  # whom msal and the client trust
    tokens = TokenSource(
        own["GRAPH_AUTHORITY"],
        own["GRAPH_TENANT_ID"],
        own["GRAPH_CLIENT_ID"],
        secret=own["GRAPH_CLIENT_SECRET"],
        timeout=timedelta(seconds=30),
    )
    return GraphClient(
        own["GRAPH_BASE_URL"],
        tokens,
        timeout=timedelta(seconds=30),
        tag_id="String {7c1f6c1e-52a5-4f0b-8f4e-0d6f5d1a9c55} Name bench",
    )


# Kills


def survive(world: World, servers: Servers, options: argparse.Namespace, screen: Console) -> Findings:
    """Kill the workers while files go up, wait until all is settled, and hold Graph's record against it."""
    chance = random.Random(f"{options.seed} uploads")
    world.wait_until("the console is up", lambda: _is_up(_console(world)))
    mail = [_mail(world, f"upload-{number}", files, chance) for number, files in enumerate(_sizes(options, chance))]
    screen.print(f"{len(mail)} mails; killing while they go up")
    world.simulator.set_limits(requests=0, upload_bytes=0)
    hand = Hand(world, servers)
    struck, told = 0, Counter[str]()
    began = time.monotonic()
    world.publish(*mail)
    for at_seconds in sorted(chance.uniform(0, options.seconds) for _ in range(options.kills)):
        time.sleep(max(0.0, began + at_seconds - time.monotonic()))
        target = _target(world, told, chance)
        hand.deal([Blow(at_seconds, "kill", target)], began)
        lines = world.log_lines(target)
        struck += _part_up(lines[told[target] :]) > 0
        told[target] = len(lines)
    screen.print(f"{time.monotonic() - began:.0f} s: the last blow has fallen; waiting until all is settled")
    world.wait_until("all is settled", lambda: world.count(_SETTLED) >= len(mail), _PATIENCE)
    findings = judge(world, mail)
    findings.at_least("kills that struck a living worker", hand.kills.total(), options.kills)
    findings.at_least("of them while files were part up", struck, math.ceil(_LEAST_PART_UP * options.kills))
    findings.tell("seconds", time.monotonic() - began)
    findings.tell("attempts", world.count("SELECT sum(attempt_count) FROM incoming_emails"))
    attached = [file for each in mail for file in each["attachments"]]
    findings.tell("files", len(attached))
    findings.tell("of them stored with mailfleet", sum("://" not in file["urlOrId"] for file in attached))
    findings.tell("MB published", sum(file["size"] for file in attached) / MEGABYTE)
    return findings


def _sizes(options: argparse.Namespace, chance: random.Random) -> Iterator[list[int]]:
    """Yield the sizes of each mail's files in bytes, until there are as many files as are wanted."""
    left = options.uploads
    while left:
        sizes: list[int] = []
        for _ in range(min(left, chance.randint(1, _MOST_FILES))):
            size_bytes = round(chance.uniform(options.smallest_mb, options.largest_mb) * MEGABYTE)
            if not sizes or sum(sizes) + size_bytes <= _MOST_MAIL_MB * MEGABYTE:
                sizes.append(size_bytes)
        left -= len(sizes)
        yield sizes


def _mail(world: World, name: str, sizes: Sequence[int], chance: random.Random) -> dict[str, Any]:
    attachments = []
    for place, size_bytes in enumerate(sizes):
        attachment = _served(world, f"{name}-{place}.bin", size_bytes)
        if chance.random() < _STORED_SHARE:
            attachment["urlOrId"] = _stored(world, attachment["name"], size_bytes)
        attachments.append(attachment)
    return _email(name, attachments)


def _stored(world: World, name: str, size_bytes: int) -> str:
    """Store the file that the web server would give, and return its id."""
    answer = requests.post(
        f"{_console(world)}/api/v1/attachments",
        params={"name": name},
        data=files.chunks(name, size_bytes),
        headers={"Authorization": f"Bearer {_TOKEN}"},
        timeout=120,
    )
    answer.raise_for_status()
    return str(answer.json()["id"])


def _console(world: World) -> str:
    return f"http://127.0.0.1:{world.fleet.ports['console.1'].port}"


def _is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/readyz", timeout=5).ok
    except requests.RequestException:
        return False


def _part_up(lines: Sequence[dict[str, Any]]) -> int:
    """Return how many files were part up when a worker died that has logged these lines since it was started."""
    under_way: dict[str, set[int]] = {}
    for line in lines:
        positions = under_way.setdefault(line.get("incoming_email_id", ""), set())
        if line["event"] == Step.UPLOADING:
            positions.add(line["position"])
        elif line["event"] == Step.UPLOADED:
            positions.discard(line["position"])
        else:  # whatever else is told of a mail, its files are not being brought up
            positions.clear()
    return sum(map(len, under_way.values()))


def _target(world: World, told: Mapping[str, int], chance: random.Random) -> str:
    """Return a worker: at times any, at others one that has a file part up, waited for if need be.

    Args:
        told: How many lines each has logged before it was last started.
    """
    replicas = [name for name in sorted(world.fleet.ports) if name.startswith("send_attached.")]
    anyone, aimed = chance.choice(replicas), chance.random() < _AIMED_SHARE
    ends_at = time.monotonic() + _AIMED_WITHIN_SECONDS
    while aimed and time.monotonic() < ends_at:
        for name in sorted(replicas, key=lambda name: name != anyone):
            if name not in world.fleet.dead and _part_up(world.log_lines(name)[told[name] :]):
                return name
        time.sleep(_LOOK_SECONDS)
    return anyone


def judge(world: World, mail: Sequence[dict[str, Any]]) -> Findings:
    """Hold what left Graph against what was published."""
    ids = dict(world.rows("SELECT publisher_message_id, id::text FROM incoming_emails"))
    left = world.simulator.delivery_counts_by_tag()
    times = Counter({each["publisher_message_id"]: left.get(ids[each["publisher_message_id"]], 0) for each in mail})
    wrong = [each for each in mail if times[each["publisher_message_id"]] == 1 and not _whole(world, ids, each)]
    findings = Findings()
    findings.tell("mails", len(mail))
    findings.at_most("lost", sum(count == 0 for count in times.values()), 0)
    findings.at_most("sent more than once", sum(count > 1 for count in times.values()), 0)
    findings.at_most("attachments missing, twice or other", len(wrong), 0)
    for each in wrong[:_NAMED]:
        findings.tell("wrong", each["publisher_message_id"])
    return findings


def _whole(world: World, ids: dict[str, str], mail: dict[str, Any]) -> bool:
    (delivery,) = world.simulator.deliveries(tag=ids[mail["publisher_message_id"]])
    wanted = [(each["name"], files.sha256(each["name"], each["size"])) for each in mail["attachments"]]
    return sorted((each["name"], each["sha256"]) for each in delivery["attachments"]) == sorted(wanted)


# The command


@contextmanager
def _world(
    settings: dict[str, str | int], only: Sequence[str] = _TYPES, **fleet_options: Any
) -> Iterator[tuple[World, Servers]]:
    with (
        tempfile.TemporaryDirectory(prefix="mailfleet-bench-") as directory,
        Servers(Path(directory), durable=False, environment={}) as servers,
        World(servers.environment, Path(directory) / "world", settings, only=only, **fleet_options) as world,
    ):
        world.wait_until_ready(timedelta(seconds=90))
        yield world, servers


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = report.parser("attachments", __doc__)
    add = parser.add_argument
    add("--times", type=int, default=3, help="how often each file is sent and copied (default: %(default)s)")
    add("--kills", type=int, default=0, help="kill the workers so often instead")
    add("--uploads", type=int, default=60, help="files, one to five with a mail, for --kills (default: %(default)s)")
    add("--smallest-mb", type=float, default=_SMALLEST_MB)
    add("--largest-mb", type=float, default=_LARGEST_MB)
    add("--seconds", type=float, default=120, help="over which the kills are spread (default: %(default)g)")
    add("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _arguments(arguments)
    if options.kills:
        with _world(_KILL_SETTINGS, (*_TYPES, "console"), scale={"send_attached": 2}, supervise=True) as (
            world,
            servers,
        ):
            findings = survive(world, servers, options, Console())
        return report.tell(findings, f"{options.kills} kills, seed {options.seed}", options)
    settings: dict[str, str | int] = {**UNBINDING, "CONSOLE_TOKENS": f"bench:operator:{_TOKEN}"}
    with _world(settings, (*_TYPES, "console")) as (world, _):
        findings = measure(world, options.times)
    return report.tell(findings, f"Sent {options.times} times", options)


if __name__ == "__main__":
    sys.exit(main())
