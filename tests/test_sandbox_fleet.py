"""The fleet: a Procfile's lines as processes that can be killed, frozen, restarted, and are all gone at the end."""

import os
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from textwrap import dedent

import pytest

from sandbox.fleet import Fleet, ReleaseFailed, read_procfile
from sandbox.processes import wait_until

SOON = timedelta(seconds=10)

#: A master with one worker, which it ends when it is told to end.
MASTER = """sh -c 'trap "kill \\$!; wait; echo ended the worker; exit" TERM; sleep 1000 & echo up; wait'"""
#: Does not end on SIGTERM, and neither does what it forks.
STUBBORN = """sh -c 'trap "" TERM; echo up; while :; do sleep 1000; done'"""

FleetOf = Callable[..., Fleet]


@pytest.fixture
def fleet_of(tmp_path: Path) -> FleetOf:
    def describe(procfile: str, **options: object) -> Fleet:
        (tmp_path / "Procfile").write_text(dedent(procfile))
        return Fleet(tmp_path / "Procfile", dict(os.environ), tmp_path / "logs", **options)

    return describe


def logged(fleet: Fleet, replica: str, text: str) -> bool:
    return wait_until(lambda: text in fleet.logs[replica].read_text(), SOON)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def states(fleet: Fleet, name: str) -> set[str]:
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in fleet.pids(name)}


def test_a_procfile_is_read_in_its_order_with_comments_left_out(tmp_path: Path) -> None:
    procfile = tmp_path / "Procfile"
    procfile.write_text("# types\nrelease: bin/release\n\nsend_plain: bin/start send_plain --x=1:2\n")

    assert read_procfile(procfile) == {"release": "bin/release", "send_plain": "bin/start send_plain --x=1:2"}


def test_a_line_that_is_no_process_type_is_refused(tmp_path: Path) -> None:
    procfile = tmp_path / "Procfile"
    procfile.write_text("send plain\n")

    with pytest.raises(ValueError, match="send plain"):
        read_procfile(procfile)


def test_a_type_that_the_procfile_lacks_is_refused(fleet_of: FleetOf) -> None:
    with pytest.raises(ValueError, match="brdige"):
        fleet_of("bridge: true\n", only={"brdige"})


def test_release_has_ended_before_anything_else_starts(fleet_of: FleetOf, tmp_path: Path) -> None:
    procfile = """\
        worker: sh -c 'cat released; exec sleep 1000'
        release: sh -c 'sleep 0.2; echo done > released'
        """

    with fleet_of(procfile) as fleet:
        assert logged(fleet, "worker.1", "done")
        assert (tmp_path / "released").exists()
        assert list(fleet.ports) == ["worker.1"]


def test_a_failed_release_starts_nothing_and_says_why(fleet_of: FleetOf, tmp_path: Path) -> None:
    fleet = fleet_of("release: sh -c 'echo no table; exit 3'\nworker: touch started\n")

    with pytest.raises(ReleaseFailed, match="status 3\nno table"), fleet:
        pass

    assert not (tmp_path / "started").exists()


def test_each_replica_has_ports_and_a_log_of_its_own(fleet_of: FleetOf, tmp_path: Path) -> None:
    procfile = """\
        worker: sh -c 'echo ports $PORT $METRICS_PORT; exec sleep 1000'
        other: touch started
        """

    with fleet_of(procfile, only={"worker"}, scale={"worker": 2}) as fleet:
        for name in ("worker.1", "worker.2"):
            assert fleet.logs[name] == tmp_path / "logs" / f"{name}.log"
            assert logged(fleet, name, "ports {} {}\n".format(*fleet.ports[name]))
        numbers = [number for ports in fleet.ports.values() for number in ports]
        assert len(set(numbers)) == 4

    assert not (tmp_path / "started").exists()


def test_a_process_can_serve_on_the_port_it_was_given(fleet_of: FleetOf) -> None:
    with fleet_of("web: python3 -m http.server --bind 127.0.0.1 $PORT\n") as fleet:
        url = f"http://127.0.0.1:{fleet.ports['web.1'].port}/Procfile"

        def answers() -> bool:
            try:
                with urllib.request.urlopen(url) as response:
                    return response.status == 200
            except OSError:
                return False

        assert wait_until(answers, SOON)


def test_nothing_is_left_of_a_fleet_after_the_block(fleet_of: FleetOf) -> None:
    orphaning = "sh -c '(sleep 1000 &) ; setsid sleep 1000 & echo up; wait'"

    with fleet_of(f"a: {MASTER}\nb: {orphaning}\n", stop_limit=timedelta(seconds=0.3)) as fleet:
        assert logged(fleet, "a.1", "up")
        assert logged(fleet, "b.1", "up")
        assert wait_until(lambda: len(fleet.pids("b")) >= 3, SOON)
        members = fleet.pids("a") | fleet.pids("b")

    assert not [pid for pid in members if runs(pid)]


def test_a_replica_that_ignores_sigterm_is_killed_and_named(fleet_of: FleetOf) -> None:
    procfile = f"polite: sleep 1000\nstubborn: {STUBBORN}\n"

    with fleet_of(procfile, scale={"stubborn": 2}, stop_limit=timedelta(seconds=0.3)) as fleet:
        assert logged(fleet, "stubborn.1", "up")
        assert logged(fleet, "stubborn.2", "up")

        assert fleet.stop() == ["stubborn.1", "stubborn.2"]
        assert not fleet.pids("stubborn") | fleet.pids("polite")
        assert fleet.dead == []


def test_sigterm_goes_to_the_command_alone_so_that_it_can_end_its_workers(fleet_of: FleetOf, tmp_path: Path) -> None:
    (tmp_path / "worker").write_text("trap 'echo told as well' TERM; echo up; while :; do sleep 0.01; done\n")
    (tmp_path / "master").write_text("sh worker & trap 'sleep 0.1; kill -9 $!; echo ended it; exit' TERM; wait\n")

    with fleet_of("worker: sh master\n") as fleet:
        assert logged(fleet, "worker.1", "up")

        assert fleet.stop("worker") == []
        assert fleet.logs["worker.1"].read_text() == "up\nended it\n"


def test_a_killed_replica_is_gone_with_its_children_and_the_others_go_on(fleet_of: FleetOf) -> None:
    with fleet_of(f"worker: {MASTER}\n", scale={"worker": 2}) as fleet:
        assert logged(fleet, "worker.1", "up")
        assert wait_until(lambda: len(fleet.pids("worker.1")) == 2, SOON)

        fleet.kill("worker.1")

        assert fleet.pids("worker.1") == set()
        assert fleet.pids("worker.2")
        assert fleet.dead == ["worker.1"]


def test_a_replica_starts_again_on_its_ports_and_in_its_log(fleet_of: FleetOf) -> None:
    with fleet_of("worker: sh -c 'echo port $PORT; exec sleep 1000'\n") as fleet:
        before = fleet.ports
        assert logged(fleet, "worker.1", "port")
        fleet.kill("worker")

        assert fleet.restart_dead() == ["worker.1"]

        assert fleet.ports == before
        assert logged(fleet, "worker.1", 2 * f"port {before['worker.1'].port}\n")


def test_what_was_stopped_on_purpose_is_not_restarted(fleet_of: FleetOf) -> None:
    with fleet_of("worker: sleep 1000\n") as fleet:
        fleet.stop("worker")

        assert fleet.restart_dead() == []


def test_a_supervised_replica_that_ends_is_started_again(fleet_of: FleetOf) -> None:
    with fleet_of("worker: sh -c 'echo run; sleep 0.1'\n", supervise=True) as fleet:
        assert logged(fleet, "worker.1", "run\nrun\n")


def test_a_new_process_starts_only_after_the_old_ones_orphans_are_gone(fleet_of: FleetOf) -> None:
    with fleet_of("worker: sh -c 'env -i sleep 1000 & echo up'\n") as fleet:
        assert wait_until(lambda: fleet.dead, SOON)
        [orphan] = fleet.pids("worker")

        fleet.restart_dead()

        assert not runs(orphan)


def test_a_suspended_replica_is_frozen_with_its_children_until_it_is_resumed(fleet_of: FleetOf) -> None:
    with fleet_of(f"worker: {MASTER}\n") as fleet:
        assert wait_until(lambda: len(fleet.pids("worker")) == 2, SOON)

        fleet.suspend("worker")
        assert wait_until(lambda: states(fleet, "worker") == {"T"}, SOON)

        fleet.resume("worker")
        assert wait_until(lambda: states(fleet, "worker") == {"S"}, SOON)
