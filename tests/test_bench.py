"""What the benches reckon with, where the answer is known; that they measure rightly is seen by running them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench import attachments
from bench.comparison import Comparison
from bench.soak import Figure, Kind, growth
from bench.sockets import connections

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "archive",
    "attachments",
    "backlog",
    "chaos",
    "ingest",
    "latency",
    "limits",
    "payloads",
    "pipeline",
    "soak",
    "startup",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_bench_tells_its_options(command: str) -> None:
    told = subprocess.run(
        [sys.executable, "-m", f"bench.{command}", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert f"python -m bench.{command}" in told.stdout


def test_growth_is_that_of_the_second_half_over_its_length() -> None:
    steady_after_a_start = [(0, 0), (10, 50), (20, 100), (30, 100), (40, 100), (50, 100)]
    assert growth(steady_after_a_start) == 0
    ever_more = [(10 * number, 3 * number) for number in range(8)]
    assert growth(ever_more) == pytest.approx(9)
    assert growth([(0, 1)]) == 0


def test_a_figure_may_grow_by_its_slack_or_a_small_share_of_itself_and_not_above_its_bound() -> None:
    def broken(values: list[float], kind: Kind) -> bool:
        return Figure(kind, "it", [(float(at), value) for at, value in enumerate(values)]).broken

    assert not broken([100, 100, 100, 104], Kind("keys", 0))
    assert broken([100, 100, 100, 106], Kind("keys", 0))
    assert not broken([100, 100, 100, 106], Kind("keys", 6))
    assert broken([100, 100, 200, 100], Kind("memory", 1000, most=120))


def test_a_ratio_holds_at_its_bound_and_breaks_above_it() -> None:
    found = Comparison("ours", "theirs")
    found.add("at it", 3, 2, at_most=1.5)
    found.add("above it", 3.1, 2, at_most=1.5)
    found.add("only told", 100, 2)
    found.add("nothing to compare with", 100, None, at_most=1.5)
    assert (found.broken, found.hold) == (["above it"], False)
    assert [line["ratio"] for line in found.as_json()] == [1.5, 1.55, 50, None]


def test_connections_are_those_to_the_named_ports_that_the_processes_hold() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        port = server.getsockname()[1]
        with (
            socket.create_connection(server.getsockname()),
            socket.create_connection(server.getsockname()),
            socket.create_connection(other.getsockname()),
        ):
            assert connections({os.getpid()}, {port: "it"}) == {"it": 2}
        assert connections({os.getpid()}, {port: "it"}) == {}


def test_a_kill_counts_for_an_upload_only_while_a_file_is_part_up() -> None:
    def line(event: str, position: int | None = None, email: str = "one") -> dict[str, object]:
        return {"event": event, "incoming_email_id": email} | ({} if position is None else {"position": position})

    started = [{"event": "a worker is ready"}, line("claimed"), line("drafted")]
    assert attachments._part_up(started) == 0
    two = [*started, line("uploading", 0), line("uploading", 1), line("uploading", 1)]
    assert attachments._part_up(two) == 2
    assert attachments._part_up([*two, line("uploaded", 1), line("uploading", 0, "other")]) == 2
    assert attachments._part_up([*two, line("retried")]) == 0
    assert attachments._part_up([*two, line("uploaded", 0), line("uploaded", 1), line("sent")]) == 0
