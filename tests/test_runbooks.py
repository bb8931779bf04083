"""The runbooks: every command of docs/operations.md and docs/scale.md does what an operator is told that it does."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import operator_support
import orjson
import psycopg2
import pytest
import support
from operator_support import MAILFLEET, archive, give_up, mailfleet, workers

from migrations.__main__ import migrate
from models import holds
from sandbox.world import new_database
from simulator.control import Simulator

shared_database, tables = support.shared_database, support.tables
run_time_limits = operator_support.run_time_limits

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "operations.md").read_text()
SCALE = (ROOT / "docs" / "scale.md").read_text()


def blocks(page: str) -> list[list[str]]:
    """The indented blocks of a page, each as its lines."""
    found = re.findall(r"(?:^    .*\n)+", page, re.MULTILINE)
    return [[line.strip() for line in block.splitlines()] for block in found]


def commands(page: str) -> list[str]:
    """Every ``mailfleet …`` of a page, in blocks and in sentences, each once."""
    shown = [line for block in blocks(page) for line in block if line.startswith("mailfleet ")]
    told = [found.replace("…", "'a reason'") for found in re.findall(r"`(mailfleet [^`]+)`", page)]
    return sorted({*shown, *told})


def section(heading: str) -> str:
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


# What an operator has before him when he types a command: the mail that it is about


def a_waiting_mail() -> str:
    return support.store(publisher_message_id="waits")


def a_dead_letter() -> str:
    return give_up("given-up", reason="mailbox_denied")


def an_archived_mail() -> str:
    return archive("archived", mime=b"Subject: Your order\r\n\r\nThank you.")


def a_mail_on_hold() -> str:
    id = an_archived_mail()
    holds.place(id, reason="case 12", who="tests")
    return id


#: By how a command begins; the first that fits.
SCENES: dict[str, Callable[[], str]] = {
    "mailfleet dlq": a_dead_letter,
    "mailfleet backups": an_archived_mail,
    "mailfleet hold": an_archived_mail,
    "mailfleet release": a_mail_on_hold,
    "mailfleet ": a_waiting_mail,
}


@pytest.fixture
def desk(tables: str, run_time_limits: None, graph: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that are well, in a directory with nothing but a mail to publish."""
    monkeypatch.chdir(tmp_path)
    Path("mail.json").write_bytes(orjson.dumps(support.send_email()))


@pytest.mark.parametrize("command", commands(PAGE + SCALE))
def test_each_command_of_the_runbooks_does_what_it_says(command: str, desk: None) -> None:
    # Given
    about = next(scene for start, scene in SCENES.items() if command.startswith(start))()
    words = [
        {"ID": about, "MAILBOX": support.SENDER, "FILE": "a-file"}.get(word, word) for word in shlex.split(command)
    ]
    # When
    with workers():
        ended = mailfleet(*words[1:])
    # Then
    assert (ended.status, ended.complaint) == (0, ""), ended


def test_nothing_else_than_the_tools_of_a_host_is_asked_for() -> None:
    tools = {line.split()[0] for block in blocks(PAGE) for line in block}
    assert tools <= {"mailfleet", "bin/start", "pg_dump", "pg_restore"}


@pytest.mark.parametrize("heading", re.findall(r"^## (.+)$", PAGE, re.MULTILINE))
def test_every_section_says_how_to_know_that_it_worked(heading: str) -> None:
    assert "**It worked**" in section(heading)


def test_a_command_that_does_not_exist_would_be_found() -> None:
    page = "Type `mailfleet stop --now`, or\n\n    mailfleet halt\n\n"
    assert commands(page) == ["mailfleet halt", "mailfleet stop --now"]
    assert mailfleet("halt").status == 2


# Where PostgreSQL's tools are, as beside its server; elsewhere there is nothing to run.
if shutil.which("pg_dump") and shutil.which("pg_restore"):

    def test_a_database_is_restored_as_the_runbook_says_and_nothing_is_sent_before_a_look(
        servers: dict[str, str], tmp_path: Path
    ) -> None:
        with ExitStack() as stack:
            # Given a database with a mail that waits
            lost, empty = (new_database(servers["DATABASE_URL"], stack) for _ in range(2))
            migrate(lost)
            keep_one_mail(lost)
            dump, restore, *_ = blocks(section("Restoring the database"))
            # When it is dumped, and restored into an empty one
            follow(dump, lost, tmp_path)
            shown = follow(restore, empty, tmp_path)
            # Then the mail is there, and everything is paused
            assert "waits" in shown
            assert asked(empty, "SELECT count(*) FROM incoming_emails") == 1
            assert "database restored" in follow(["mailfleet limits show"], empty, tmp_path)


def keep_one_mail(url: str) -> None:
    asked(
        url,
        """
        INSERT INTO incoming_emails (id, publisher_message_id, payload, content_hash, route, mailbox, recipient_count)
        VALUES (gen_random_uuid(), 'waits', '{}', '', 'no-attachment', 'ann@example.com', 1) RETURNING 1
        """,
    )


def asked(url: str, sql: str) -> int:
    connection = psycopg2.connect(url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return int(cursor.fetchall()[0][0])
    finally:
        connection.close()


def follow(block: list[str], database_url: str, directory: Path) -> str:
    """Type the lines of a block into a shell, and return what it shows."""
    script = "\n".join(["set -e", *block]).replace("bin/start", f"{ROOT}/bin/start")
    environment = {**os.environ, "DATABASE_URL": database_url, "PATH": f"{MAILFLEET.parent}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["sh", "-c", script], cwd=directory, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
