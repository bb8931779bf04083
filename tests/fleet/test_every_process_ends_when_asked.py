"""SIGTERM, as every deployment sends it: all processes end by themselves in time, and the work goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests
from fleet_support import a_mailbox, an_attachment, an_email, assert_each_left_once, emails, fates, settled
from worlds import Worlds

from sandbox.world import ROOT, World, new_database
from simulator.control import Simulator


@pytest.fixture(scope="module")
def world(worlds: Worlds) -> World:
    """A fleet whose workers' metrics are served."""
    return worlds.get(measured=True)


def test_all_end_within_fifteen_seconds_under_load_and_go_on_afterwards(world: World, simulator: Simulator) -> None:
    # Given a fleet in the middle of its work
    simulator.set_latency(0.5)
    mailboxes = [a_mailbox("stopped") for _ in range(6)]
    given = [email for mailbox in mailboxes for email in emails(10, mailbox)]
    given += [an_email(mailbox, attachments=[an_attachment(simulator, 4_000_000)]) for mailbox in mailboxes]
    world.publish(*given)
    world.wait_until("some have left", lambda: len(simulator.deliveries()) > 0)
    world.wait_until("work is in hand", lambda: any(f.status == "processing" for f in fates(world, given).values()))

    # When all are told to end
    killed = world.fleet.stop()

    # Then nobody had to be killed, what was in hand is finished or handed back, and the rest is sent once after a start
    assert killed == []
    assert world.count("SELECT count(*) FROM incoming_emails WHERE status = 'processing' AND lease_until > now()") == 0
    simulator.set_latency(0)
    for name in world.fleet.ports:
        world.fleet.start(name)
    known = settled(world, given)
    assert {each.status for each in known.values()} == {"processed"}
    assert_each_left_once(world, known.values())


@pytest.mark.parametrize("type", ["send_plain", "maintenance"])
def test_a_worker_ends_with_its_main_process_though_that_was_killed(world: World, type: str) -> None:
    # Given Dramatiq's main process, its workers, and the one that serves their metrics
    tree = world.fleet.pids(type)
    (main,) = [pid for pid in tree if parent_of(pid) not in tree]
    assert len(tree) > 2
    # When the main process alone is killed
    os.kill(main, signal.SIGKILL)
    # Then
    world.wait_until("all have ended", lambda: not any(alive(pid) for pid in tree))
    world.fleet.start(type)
    world.wait_until_ready()


def test_metrics_are_served_again_after_the_process_that_served_them_was_killed(world: World) -> None:
    # Given the process that serves a type's metrics
    (server,) = [pid for pid in world.fleet.pids("send_plain") if serves_metrics(pid)]
    others = set(world.fleet.pids("send_plain")) - {server}
    # When
    os.kill(server, signal.SIGKILL)
    world.wait_until("it has ended", lambda: not alive(server))
    # Then there is another, and nobody else had to end
    world.wait_until("metrics are served again", lambda: bool(metrics_of(world, "send_plain.1")))
    assert others <= set(world.fleet.pids("send_plain"))


def serves_metrics(pid: int) -> bool:
    return b"worker_metrics" in Path(f"/proc/{pid}/cmdline").read_bytes()


def metrics_of(world: World, name: str) -> str:
    with requests.Session() as session:
        session.trust_env = False
        try:
            return session.get(f"http://127.0.0.1:{world.fleet.ports[name].metrics_port}/metrics", timeout=5).text
        except requests.ConnectionError:
            return ""


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_releases_at_once_are_safe(world: World, servers: dict[str, str]) -> None:
    with ExitStack() as stack:
        environment = {**world.environment, "DATABASE_URL": new_database(servers["DATABASE_URL"], stack)}
        releases = [
            subprocess.Popen(
                ["bin/start", "release"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for _ in range(2)
        ]
        outputs = [release.communicate(timeout=60)[0].decode() for release in releases]

    assert [release.returncode for release in releases] == [0, 0]
    assert sorted("applied 0001" in output for output in outputs) == [False, True]
