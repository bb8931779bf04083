"""The proof harness, run for a minute; and that it would find what it looks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orjson
from fleet_support import a_mailbox, an_email, fates, settled_one

from bench.chaos import judge
from sandbox.world import ROOT, World


def test_while_everything_dies_and_graph_fails_each_mail_leaves_once(tmp_path: Path) -> None:
    # Given every kind of process killed, each server too, and a tenth of the calls to Graph failing
    options = "--emails 300 --mailboxes 20 --kills 14 --seconds 25 --seed 11 --fault gateway-timeout-after-send=0.1"
    # When
    ended = subprocess.run(
        [sys.executable, "-m", "bench.chaos", *options.split(), "--json", tmp_path / "figures.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # Then
    assert ended.returncode == 0, ended.stdout
    figures = orjson.loads((tmp_path / "figures.json").read_bytes())
    assert (figures["delivered once"], figures["lost"], figures["duplicated"]) == (300, 0, 0)
    # And it was no easy minute
    assert figures["of them failed"] > 0.05 * figures["Graph calls"]
    assert figures["were in doubt"] > 10


def test_a_mail_that_left_twice_and_one_that_never_did_are_found(world: World) -> None:
    # Given a Graph that breaks its word
    doubled, lost, fine = (an_email(a_mailbox(name)) for name in ("doubled", "lost", "fine"))
    world.simulator.deliver_twice(doubled["from"])
    world.simulator.lose_mail(lost["from"])
    # When
    world.publish(doubled, lost, fine)
    settled_one(world, doubled)
    settled_one(world, fine)
    world.wait_until(
        "all are said to be sent", lambda: fates(world, [lost])[lost["publisher_message_id"]].status == "processed"
    )
    # Then
    verdict = judge(world, [doubled, lost, fine])
    assert (verdict.lost, verdict.duplicated, verdict.figures["delivered once"], verdict.holds) == (1, 1, 1, False)
