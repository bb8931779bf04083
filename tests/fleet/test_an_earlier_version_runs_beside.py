"""An earlier version beside this one, on one database, broker and Redis, as while the one replaces the other."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from fleet_support import a_mailbox, an_attachment, an_email, assert_each_left_once, emails, settled
from worlds import SETTINGS, Worlds

from sandbox.fleet import Fleet
from sandbox.world import ROOT, World

#: The oldest version that is known to run beside this one. With the first release it is that.
EARLIER = "fb70ba2"
PRODUCERS, CONSUMERS = ("bridge", "clock", "scheduler"), ("send_plain", "send_attached", "backup", "maintenance")


class Both(NamedTuple):
    """The world with this version's processes, and the other version's."""

    world: World
    earlier: Fleet

    def only(self, producers: str, consumers: str) -> None:
        """Let the one version take mail in and dispatch it, and the other send it."""
        for version, fleet in {"this": self.world.fleet, "earlier": self.earlier}.items():
            for types, chosen in {PRODUCERS: producers, CONSUMERS: consumers}.items():
                if chosen == version:
                    for name in types:
                        fleet.start(name)
                else:
                    fleet.stop(*types)
        self.world.wait_until_ready()


def git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)


def has_history() -> bool:
    return shutil.which("git") is not None and git("cat-file", "-e", f"{EARLIER}^{{commit}}").returncode == 0


def check_out(directory: Path) -> Path:
    """Put the earlier version into a directory, beside the packages of this one."""
    with tarfile.open(fileobj=io.BytesIO(git("archive", EARLIER).stdout)) as archive:
        archive.extractall(directory, filter="data")
    (directory / ".venv").symlink_to(ROOT / ".venv")
    return directory


pytestmark = pytest.mark.skipif(not has_history(), reason=f"the history has no {EARLIER}, or git is not installed")


@pytest.fixture(scope="module")
def both(worlds: Worlds, servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    worlds.close()
    root = check_out(tmp_path_factory.mktemp("earlier"))
    with ExitStack() as stack:
        world = stack.enter_context(World(servers, tmp_path_factory.mktemp("both"), SETTINGS | {"METRICS_PORT": 0}))
        # Its migrations find nothing to do.
        earlier = Fleet(root / "Procfile", world.environment, tmp_path_factory.mktemp("logs"))
        stack.enter_context(earlier)
        world.wait_until_ready()
        yield Both(world, earlier)


@pytest.mark.parametrize(("producers", "consumers"), [("this", "earlier"), ("earlier", "this")])
def test_what_one_version_dispatches_the_other_sends_and_archives_once(
    both: Both, producers: str, consumers: str
) -> None:
    # Given
    both.only(producers, consumers)
    mailboxes = [a_mailbox("versions") for _ in range(3)]
    given = [email for mailbox in mailboxes for email in emails(5, mailbox)]
    given += [an_email(each, attachments=[an_attachment(both.world.simulator, 4_000_000)]) for each in mailboxes]
    # When
    both.world.publish(*given)
    known = settled(both.world, given)
    # Then
    assert {each.status for each in known.values()} == {"processed"}
    assert_each_left_once(both.world, known.values())
    assert all(each.archived for each in known.values())
    assert both.world.rows("SELECT reason, actor_name, last_error FROM dlq") == []
