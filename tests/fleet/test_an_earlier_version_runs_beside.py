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

#: Versions that are known to run beside this one, with the settings that the changelog asks for meanwhile. With the
#: first release they are that. The first is the oldest: it knows nothing of the tables and columns of the migrations
#: that came after it (`ADDED_SINCE` among them), nor of sealed payloads. The second reads what is sealed.
EARLIER: dict[str, dict[str, str | int]] = {"2777756": {"SEAL_PAYLOADS": "false"}, "fb70ba2": {}}
ADDED_SINCE = {"2777756": {"0008.archive.sql"}, "fb70ba2": {"0013.concurrency.sql"}}
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
    return shutil.which("git") is not None and all(
        git("cat-file", "-e", f"{version}^{{commit}}").returncode == 0 for version in EARLIER
    )


def check_out(version: str, directory: Path) -> Path:
    """Put an earlier version into a directory, beside the packages of this one."""
    with tarfile.open(fileobj=io.BytesIO(git("archive", version).stdout)) as archive:
        archive.extractall(directory, filter="data")
    (directory / ".venv").symlink_to(ROOT / ".venv")
    return directory


pytestmark = pytest.mark.skipif(not has_history(), reason="git or the earlier versions are not here")


@pytest.fixture(scope="module", params=EARLIER)
def both(
    request: pytest.FixtureRequest, worlds: Worlds, servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Both]:
    worlds.close()
    root = check_out(request.param, tmp_path_factory.mktemp("earlier"))
    settings = SETTINGS | {"METRICS_PORT": 0} | EARLIER[request.param]
    with ExitStack() as stack:
        world = stack.enter_context(World(servers, tmp_path_factory.mktemp("both"), settings))
        # Its migrations find nothing to do.
        earlier = Fleet(root / "Procfile", world.environment, tmp_path_factory.mktemp("logs"))
        stack.enter_context(earlier)
        world.wait_until_ready()
        yield Both(world, earlier)


@pytest.mark.parametrize("version", EARLIER)
def test_an_earlier_version_lacks_the_migrations_that_it_is_here_for(version: str) -> None:
    known = git("ls-tree", "--name-only", version, "migrations/").stdout.decode().split()
    files = {path.name for path in (ROOT / "migrations").glob("*.sql")}
    assert files - {Path(name).name for name in known} >= ADDED_SINCE[version]


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
