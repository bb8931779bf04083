"""PgBouncer in transaction mode, configured as docs/deploy.md says: a whole fleet on two connections of PostgreSQL."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import psycopg2
import pytest
import requests
from fleet_support import a_mailbox, an_attachment, an_email, assert_each_left_once, emails, put, settled
from worlds import SETTINGS, Worlds

from sandbox.fleet import read_procfile
from sandbox.processes import free_port, wait_until
from sandbox.programs import START_LIMIT
from sandbox.world import ROOT, World

MAILFLEET = ROOT / ".venv" / "bin" / "mailfleet"
CONNECT_QUERY = re.findall(r"connect_query='([^']+)'", (ROOT / "docs" / "deploy.md").read_text())
CONNECTIONS = 2
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin") or ""
PROCESS_TYPES = set(read_procfile(ROOT / "Procfile")) - {"release"}

pytestmark = pytest.mark.skipif(not PGBOUNCER, reason="PgBouncer is not installed")


@contextmanager
def pooler(url: str, program: str, connect_query: str) -> Iterator[str]:
    """The URL of a PgBouncer before the server of a URL, for any of its databases."""
    parts, port = urlsplit(url), free_port()
    # It refuses to run as root; the user that it runs as has to get into the directory.
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="mailfleet-pooler-", dir="/tmp") as name, ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o711)
        users, configuration = directory / "users", directory / "pgbouncer.ini"
        users.write_text(f'"{parts.username}" "{parts.password}"\n')
        configuration.write_text(
            f"""
            [databases]
            * = host={parts.hostname} port={parts.port} connect_query='{connect_query}'
            [pgbouncer]
            listen_addr = 127.0.0.1
            listen_port = {port}
            unix_socket_dir =
            auth_type = scram-sha-256
            auth_file = {users}
            pool_mode = transaction
            default_pool_size = {CONNECTIONS}
            max_client_conn = 1000
            """.replace("            ", "")
        )
        for file in (users, configuration):
            file.chmod(0o600)
            if user:
                os.chown(file, user.pw_uid, user.pw_gid)
        process = subprocess.Popen(
            [program, "-q", configuration],
            user=user.pw_uid if user else None,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        through = parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{port}").geturl()
        wait_until(lambda: process.poll() is not None or answers(through), START_LIMIT)
        assert process.poll() is None, "PgBouncer does not start"
        yield through


def answers(url: str) -> bool:
    try:
        psycopg2.connect(url, connect_timeout=5).close()
    except psycopg2.OperationalError:
        return False
    return True


def connections(url: str, world: World) -> int:
    """How many connections to the world's database there are at the server of a URL."""
    direct = psycopg2.connect(url)
    try:
        with direct.cursor() as cursor:
            name = urlsplit(world.environment["DATABASE_URL"]).path.lstrip("/")
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = %s", (name,))
            return int(cursor.fetchone()[0])  # type: ignore[index]
    finally:
        direct.close()


def doctors_word(world: World, **changes: str) -> str:
    """What the doctor says of PostgreSQL."""
    environment = {**world.environment, **changes}
    ended = subprocess.run(
        [MAILFLEET, "doctor"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return next(line.strip() for line in ended.stdout.splitlines() if "PostgreSQL" in line)


@pytest.fixture(scope="module")
def world(worlds: Worlds, servers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    worlds.close()
    settings = SETTINGS | {"METRICS_PORT": 0, "DATABASE_POOLED": "true"}
    with pooler(servers["DATABASE_URL"], PGBOUNCER, CONNECT_QUERY[0]) as url:
        through = servers | {"DATABASE_URL": url}
        with World(through, tmp_path_factory.mktemp("pooled"), settings) as world:
            world.wait_until_ready()
            yield world


def test_a_fleet_sends_and_archives_each_mail_once_on_two_connections(world: World) -> None:
    mailboxes = [a_mailbox("pooled") for _ in range(4)]
    given = [email for mailbox in mailboxes for email in emails(10, mailbox)]
    given += [an_email(each, attachments=[an_attachment(world.simulator, 4_000_000)]) for each in mailboxes]
    world.publish(*given)
    known = settled(world, given)
    assert {each.status for each in known.values()} == {"processed"}
    assert_each_left_once(world, known.values())
    assert all(each.archived for each in known.values())


def test_every_process_type_and_the_command_line_work_through_it(world: World, servers: dict[str, str]) -> None:
    # Given a mail that is archived, and a message that no actor can work on
    (email,) = given = emails(1, a_mailbox("pooled"))
    world.publish(email)
    settled(world, given)
    put(world, "maintenance", b"hello")
    # Then maintenance, which the clock wakes if nothing else does, keeps that
    world.wait_until("it is kept", lambda: world.count("SELECT count(*) FROM dlq"), timedelta(seconds=75))
    # the console shows it
    console = f"http://127.0.0.1:{world.fleet.ports['console.1'].port}"
    assert requests.get(f"{console}/readyz", timeout=10).status_code == 200
    assert len(requests.get(f"{console}/api/v1/dead-letters", timeout=10).json()["dead_letters"]) == 1
    # an operator's commands have their transactions
    id = email["publisher_message_id"]
    for command in (
        ("limits", "set", email["from"], "sends=60"),
        ("hold", id),
        ("release", id),
        ("backups", "verify"),
        ("backups", "rotate-keys"),
        ("dlq", "discard", "--reason", "unreadable"),
    ):
        ended = subprocess.run(
            [MAILFLEET, *command], env=world.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 0, (command, ended.stdout, ended.stderr)
    # and PostgreSQL has had no connection but those of the pool
    assert {name.partition(".")[0] for name in world.fleet.ports} == PROCESS_TYPES
    assert connections(servers["DATABASE_URL"], world) <= CONNECTIONS


def test_the_doctor_is_content_with_a_pooler_that_is_set_up_as_documented(world: World) -> None:
    assert doctors_word(world).startswith("ok")


def test_the_doctor_names_what_the_pooler_does_not_set(world: World, servers: dict[str, str]) -> None:
    with pooler(servers["DATABASE_URL"], PGBOUNCER, "SET jit = off") as bare:
        database = urlsplit(world.environment["DATABASE_URL"]).path
        word = doctors_word(world, DATABASE_URL=urlsplit(bare)._replace(path=database).geturl())
    assert word.startswith("PROBLEM")
    assert "enable_bitmapscan, enable_seqscan, idle_in_transaction_session_timeout, statement_timeout" in word
