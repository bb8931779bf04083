"""The runbooks: every command of docs/operations.md and docs/scale.md does what an operator is told that it does."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import operator_support
import psycopg2
import pytest
import support
from operator_support import MAILFLEET, Ended, archive, give_up, mailfleet, workers
from test_alerts import strange

import models
import operations
import runtime
import telemetry
from migrations.__main__ import migrate
from models.dead_letters import Filter
from sandbox.world import new_database
from simulator.control import Simulator
from vault import Keyring, Vault

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


# Scenes: of each command what an operator has before him when he types it, and what is to be seen afterwards


class Typed(NamedTuple):
    """A command of a page as it is typed, without ``mailfleet``."""

    words: list[str]

    def says(self, *verbs: str) -> bool:
        return self.words[: len(verbs)] == [*verbs]

    def option(self, name: str) -> str | None:
        return self.words[self.words.index(name) + 1] if name in self.words else None

    def values(self) -> dict[str, int]:
        """The limits that it sets, or those that it unsets, with a value that one may have."""
        named = (word.partition("=") for word in self.words[2:] if word != "MAILBOX")
        return {name: int(value or 2) for name, _, value in named}

    def subject(self) -> str:
        """What is paused or resumed: everything, a route or the mailbox."""
        return operations.EVERY if "--all" in self.words else self.option("--route") or support.SENDER

    def mailbox(self) -> str | None:
        return support.SENDER if "MAILBOX" in self.words else None


#: Yields the id that the command is about, is sent how it ended, and sees what that has done.
Scene = Generator[str, Ended, None]


def dead_letters(typed: Typed) -> Scene:
    reason = typed.option("--reason") or "mailbox_denied"
    id = give_up("given-up", reason=reason)
    other = give_up("another", reason="damaged", **{"from": "zoe@example.com"})
    ended = yield id
    resolved = {"replay": "replayed", "discard": "discarded"}.get(typed.words[1])
    if resolved and "--dry-run" not in typed.words:
        letters = [models.dead_letters.find(each) for each in (id, other)]
        assert [letter.status for letter in letters if letter] == [resolved, "open"]
        assert support.email_row(id)["status"] == ("received" if resolved == "replayed" else "failed")
    else:
        # It names what is meant and, where that is narrowed, nothing else; and leaves all as it was.
        narrowed = reason in typed.words or "show" in typed.words
        assert (reason in ended.output, "damaged" in ended.output) == (True, not narrowed)
        assert len(operations.find_dead_letters(Filter(), limit=None)) == 2


def finding(typed: Typed) -> Scene:
    archive("archived")
    id = support.store(publisher_message_id="waits")
    if "--in-doubt" in typed.words:
        support.claim(id).mark_in_doubt(look_again_in=support.LEASE, evidence={"asked": "send", "seen": "silence"})
    elif typed.option("--status") == "dispatched":
        support.dispatch()
    ended = yield id
    narrowed = bool(typed.option("--status") or "--in-doubt" in typed.words)
    assert ("waits" in ended.output, "archived" in ended.output) == (True, not narrowed)


def showing_status(typed: Typed) -> Scene:
    ended = yield support.store(publisher_message_id="waits")
    assert "waits" in ended.output
    assert "received" in ended.output


def cancelling(typed: Typed) -> Scene:
    id = support.store(publisher_message_id="waits")
    yield id
    assert support.email_row(id)["status"] == "cancelled"


def holding(typed: Typed) -> Scene:
    id = archive("archived")
    yield id
    assert [(each.incoming_email_id, each.reason) for each in operations.list_holds(limit=9)] == [
        (id, typed.option("--why"))
    ]


def releasing(typed: Typed) -> Scene:
    id = archive("archived")
    operations.hold(id, reason="case 12", who="tests")
    yield id
    assert operations.list_holds(limit=9) == []


def pausing(typed: Typed) -> Scene:
    yield ""
    (pause,) = operations.pauses()
    assert (pause.route or pause.mailbox) == typed.subject()
    assert pause.pause_reason == (typed.option("--why") or "paused by hand")
    assert pause.until_resumed == ("--for" not in typed.words)


def resuming(typed: Typed) -> Scene:
    operations.pause(typed.subject(), why="tests", who="tests", wait=None)
    ended = yield ""
    assert operations.pauses() == []
    assert ended.output.endswith("is resumed\n")


def setting_limits(typed: Typed) -> Scene:
    yield ""
    stand = {(each.mailbox, each.budget): each.limit for each in operations.limits_set()}
    assert stand == {(typed.mailbox() or operations.EVERY, name): limit for name, limit in typed.values().items()}


def unsetting_limits(typed: Typed) -> Scene:
    operations.set_limits(typed.mailbox(), typed.values(), who="tests")
    yield ""
    assert operations.limits_set() == []


def showing_limits(typed: Typed) -> Scene:
    operations.set_limits(None, {"concurrency": 3, "tenant_requests": 777}, who="ann")
    operations.pause(support.SENDER, why="a reason of ours", who="ann", wait=None)
    ended = yield ""
    assert "a reason of ours" in ended.output
    assert re.search(r"\bconcurrency +0 +3\b" if typed.mailbox() else r"\btenant_requests +0 +777\b", ended.output)


def verifying(typed: Typed) -> Scene:
    ended = yield archive("archived")
    assert ended.output.endswith("1 backups opened, 1 mails looked up: 0 wrong\n")


def changing_keys(typed: Typed) -> Scene:
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr(runtime, "vault", Vault(Keyring({"earlier": bytes(range(32))})))
        id = archive("archived")
    with pytest.MonkeyPatch.context() as now:
        ring = {"newest": bytes(range(32, 64)), "earlier": bytes(range(32))}
        now.setattr(runtime, "vault", Vault(Keyring(ring)))
        ended = yield id
        assert "1 backups, 0 attachments, 0 payload keys are now under newest" in ended.output
        assert operations.older_keys() == {}


def counting_expired(typed: Typed) -> Scene:
    id = archive("archived")
    models.rows("UPDATE email_backups SET expires_at = now()")
    ended = yield id
    assert ended.output == "1 backups would be deleted\n"
    assert support.table("email_backups")


def asking_the_doctor(typed: Typed) -> Scene:
    ended = yield ""
    assert len(re.findall(r"^ *ok ", ended.output, re.MULTILINE)) > 5
    assert "PROBLEM" not in ended.output


def forecasting(typed: Typed) -> Scene:
    ended = yield support.store(publisher_message_id="waits")
    assert ended.output.startswith(f"{int(typed.option('--emails') or 1):,} emails: done in ")


SCENES: dict[tuple[str, ...], Callable[[Typed], Scene]] = {
    ("dlq",): dead_letters,
    ("emails", "list"): finding,
    ("status",): showing_status,
    ("cancel",): cancelling,
    ("hold",): holding,
    ("release",): releasing,
    ("pause",): pausing,
    ("resume",): resuming,
    ("limits", "set"): setting_limits,
    ("limits", "unset"): unsetting_limits,
    ("limits", "show"): showing_limits,
    ("backups", "verify"): verifying,
    ("backups", "rotate-keys"): changing_keys,
    ("backups", "purge"): counting_expired,
    ("doctor",): asking_the_doctor,
    ("forecast",): forecasting,
}


@pytest.fixture
def desk(tables: str, run_time_limits: None, graph: Simulator) -> None:
    """Servers that are well."""


@pytest.mark.parametrize("command", commands(PAGE + SCALE))
def test_each_command_of_the_runbooks_does_what_it_says(command: str, desk: None) -> None:
    # Given
    typed = Typed(shlex.split(command)[1:])
    scene = next(scene for verbs, scene in SCENES.items() if typed.says(*verbs))(typed)
    about = {"ID": next(scene), "MAILBOX": support.SENDER}
    # When
    with workers():
        ended = mailfleet(*(about.get(word, word) for word in typed.words))
    # Then
    assert (ended.status, ended.complaint) == (0, ""), ended
    with pytest.raises(StopIteration):
        scene.send(ended)


# What the pages name


def reasons() -> set[str]:
    """Every reason that a dead letter can have: the names of our errors, and what actors call by a word."""
    pending, names = [Exception], set()
    while pending:
        for error in pending.pop().__subclasses__():
            pending.append(error)
            if (ROOT / f"{error.__module__.partition('.')[0]}.py").exists() or (
                ROOT / error.__module__.partition(".")[0]
            ).is_dir():
                names.add(re.sub(r"(?<!^)(?=[A-Z])", "_", error.__name__).lower())
    texts = [file.read_text() for file in (ROOT / "actors").glob("*.py")]
    return names | {word for text in texts for word in re.findall(r'"([a-z_]+)"', text)}


def test_each_reason_of_the_runbooks_is_one_that_a_dead_letter_can_have() -> None:
    cells = re.findall(r"^\| (`.+?) \|", section("Dead letters"), re.MULTILINE)
    named = {reason for cell in cells for reason in re.findall(r"`(\w+)`", cell)}
    named |= {reason for command in commands(PAGE + SCALE) for reason in re.findall(r"--reason (\w+)", command)}
    assert len(named) > 20
    assert named - reasons() == set()
    assert "mailbox_refused" not in reasons()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_each_metric_of_a_page_exists(page: Path) -> None:
    histograms = {name for name, kind, *_ in telemetry.declared() if kind == "histogram"}
    assert set(strange(page.read_text())) - histograms == set()


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


@pytest.mark.skipif(
    not (shutil.which("pg_dump") and shutil.which("pg_restore")), reason="PostgreSQL's tools are not installed"
)
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
