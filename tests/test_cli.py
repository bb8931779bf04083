"""The command line as an operator and his scripts meet it: answers on standard output, sentences on standard error."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
import pika
import pytest
import support
from operator_support import (
    MAILFLEET,
    MIME,
    Ended,
    archive,
    at,
    audited,
    foreign,
    give_up,
    letter_of,
    mailfleet,
    silence,
    tamper,
    workers,
)
from support import rows

import runtime
from models import uploads
from sandbox.processes import free_port
from sandbox.world import new_database
from simulator.control import Simulator

shared_database, tables = support.shared_database, support.tables

SERVERS = ("DATABASE_URL", "RABBITMQ_URL", "REDIS_URL")
EMAIL = orjson.dumps(support.send_email())


@pytest.fixture(autouse=True)
def own_tables(tables: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", tables)


def says(ended: Ended, status: int, *sentences: str) -> None:
    """The command answered nothing, ended so, and said these sentences without telling of its own making."""
    assert (ended.status, ended.output) == (status, ""), ended
    assert "Traceback" not in ended.complaint
    for sentence in sentences:
        assert sentence in ended.complaint


def answer(*arguments: str, status: int = 0) -> Any:
    """What a command answers with ``--json``, and with nothing besides."""
    ended = mailfleet(*arguments, "--json")
    assert (ended.status, ended.complaint) == (status, "")
    return orjson.loads(ended.output)


# As a program


def test_help_does_not_wait_for_what_it_does_not_need() -> None:
    code = "import sys, cli; print(len(sys.modules)); print({'peewee', 'pika', 'redis', 'rich'} & sys.modules.keys())"
    count, heavy = subprocess.check_output([sys.executable, "-c", code], text=True).split("\n")[:2]
    assert heavy == "set()"
    assert int(count) < 250
    assert "Publish, look up and operate" in mailfleet("--help").output


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["status"],
        ["cancel"],
        ["dlq", "replay"],
        ["dlq", "list", "--limit", "0"],
        ["dlq", "list", "--since", "yesterday"],
        ["dlq", "replay", "--all", "--rate", "0"],
        ["pause", ""],
        ["pause", "ann@"],
        ["publish", "no-such-file"],
        ["publish", "."],
        ["status", b"\xff\xfe"],
    ],
    ids=str,
)
def test_wrong_usage_is_told_and_ends_with_2(arguments: list[str | bytes]) -> None:
    says(mailfleet(*arguments), 2, "Usage:", "Error:")


def test_missing_settings_are_all_told_at_once() -> None:
    for command in ("settings", "doctor"):
        says(mailfleet(command, REDIS_URL="", BACKUP_KEYS=""), 1, "REDIS_URL is missing", "BACKUP_KEYS is missing")


def test_a_key_that_is_no_key_is_told_without_being_shown() -> None:
    ended = mailfleet("dlq", "list", BACKUP_KEYS="c2VjcmV0")
    says(ended, 1, "BACKUP_KEYS: key 1")
    assert "c2VjcmV0" not in ended.complaint


@pytest.mark.parametrize("away", SERVERS)
@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_a_server_that_is_away_is_a_sentence_within_seconds(away: str, silent: bool, servers: dict[str, str]) -> None:
    commands = {
        "DATABASE_URL": (["dlq", "list"], "PostgreSQL is away"),
        "RABBITMQ_URL": (["publish", "-"], "RabbitMQ did not confirm"),
        "REDIS_URL": (["limits", "show"], "Redis does not answer"),
    }
    arguments, sentence = commands[away]
    with silence() as port:
        began = time.monotonic()
        ended = mailfleet(*arguments, stdin=EMAIL, **{away: at(os.environ[away], port if silent else free_port())})
    says(ended, 1, sentence)
    assert time.monotonic() - began < 60


def test_a_database_that_was_never_migrated_is_a_sentence(servers: dict[str, str]) -> None:
    with ExitStack() as stack:
        empty = new_database(servers["DATABASE_URL"], stack)
        says(mailfleet("dlq", "list", DATABASE_URL=empty), 1, "PostgreSQL has no tables yet")


# Emails


@pytest.fixture
def published() -> Iterator[Any]:
    """Takes what was published, a body at a time."""
    with pika.BlockingConnection(runtime.rabbitmq) as connection:
        channel = connection.channel()
        runtime.declare(channel)
        channel.queue_purge(runtime.SEND_QUEUE)
        yield lambda: channel.basic_get(runtime.SEND_QUEUE, auto_ack=True)[2]


def test_an_email_is_published_from_a_file_or_standard_input(published: Any, tmp_path: Path) -> None:
    (tmp_path / "mail.json").write_bytes(EMAIL)
    assert mailfleet("publish", tmp_path / "mail.json") == Ended(0, "order-1\n", "")
    assert mailfleet("publish", "-", stdin=EMAIL) == Ended(0, "order-1\n", "")
    assert [published(), published(), published()] == [EMAIL, EMAIL, None]


def test_an_email_that_would_be_rejected_is_told_why(published: Any) -> None:
    says(mailfleet("publish", "-", stdin=b'{"form": 1}'), 1, "from: Field required", "form: Extra inputs")
    says(mailfleet("publish", "-", stdin=b" " * 4_000_001), 1, "more than 4000000")
    says(mailfleet("publish", "-"), 1, "not valid JSON")
    assert published() is None


def test_status_shows_how_far_each_attachment_is() -> None:
    given = [{"name": f"{name}.bin", "size": 4000, "urlOrId": "https://files.example/a"} for name in "abcd"]
    id = support.store(attachments=[*given, given[0] | {"name": "empty", "size": 0}])
    email = support.claim(id, intent=False)
    planned = uploads.plan(email, email.payload["attachments"])
    for upload, uploaded_bytes in zip(planned, (0, 1000, 3990, 4000, 0), strict=True):
        upload.uploaded, upload.uploaded_bytes = uploaded_bytes == upload.size, uploaded_bytes
        uploads.record_progress(email, upload, lease=support.LEASE)

    shown = mailfleet("status", id).output

    bars = [line.split() for line in shown.splitlines() if "░" in line or "█" in line]
    assert [line[:3] for line in bars] == [
        ["a.bin", "░" * 24, "0"],
        ["b.bin", "█" * 6 + "░" * 18, "25"],
        ["c.bin", "█" * 23 + "▉", "99"],
        ["d.bin", "█" * 24, "100"],
        ["empty", "█" * 24, "100"],
    ]
    assert "1,000 of 4,000 bytes" in shown


def test_status_tells_people_and_scripts_the_same() -> None:
    id = give_up("order:bug:1 [b]x[/b]")
    shown = mailfleet("status", id).output
    for fact in (id, "order:bug:1 [b]x[/b]", "ann@example.com", "failed", "Graph says no", "invalid_recipient"):
        assert fact in shown
    known = answer("status", "order:bug:1 [b]x[/b]")
    assert (known["incoming_email_id"], known["status"], known["last_error"]) == (id, "failed", "Graph says no")


def test_an_email_in_doubt_is_shown_as_such_with_the_evidence() -> None:
    id = support.store()
    support.claim(id).mark_in_doubt(look_again_in=support.WITHIN, evidence={"asked": "send", "seen": "AnswerLost"})
    shown = mailfleet("status", id).output
    assert "processing (in doubt)" in shown
    assert "asked send, saw AnswerLost" in shown


@pytest.mark.parametrize(
    "id", ["", "x" * 10_000, "a'; DROP TABLE dlq; --\x1b[31m", "späß🙈"], ids=lambda id: ascii(id[:9])
)
def test_an_unknown_id_is_a_sentence(id: str) -> None:
    says(mailfleet("status", id), 1, "no email has the id")
    says(mailfleet("cancel", id), 1, "no email has the id")
    says(mailfleet("dlq", "show", id), 1, "no dead letter has the id")


def test_an_email_is_cancelled_once_and_what_is_too_late_is_a_sentence() -> None:
    id = support.store(publisher_message_id="order-1")
    assert mailfleet("cancel", "order-1") == Ended(0, "order-1  cancelled\n", "")
    assert answer("cancel", id) == {"id": id, "outcome": "cancelled before"}
    assert answer("status", id)["status"] == "cancelled"
    support.claim(support.store(publisher_message_id="order-2"))
    says(mailfleet("cancel", "order-2"), 1, "order-2 is not cancelled: a worker has it in hand")
    says(mailfleet("cancel", give_up("order-3")), 1, "discard that instead")


# Dead letters


def listed(*options: str) -> list[str]:
    return [letter["publisher_message_id"] for letter in answer("dlq", "list", *options)]


def test_every_filter_narrows_the_list_and_the_oldest_comes_first() -> None:
    for number, (reason, sender) in enumerate(
        [("mailbox_denied", "ann"), ("message_too_large", "ann"), ("mailbox_denied", "bo")]
    ):
        id = give_up(f"order-{number}", reason=reason, **{"from": f"{sender}@example.com"})
        rows(
            "UPDATE dlq SET created_at = %(at)s WHERE incoming_email_id = %(id)s",
            {"at": f"2026-01-0{number + 1}", "id": id},
        )
    assert listed() == ["order-0", "order-1", "order-2"]
    assert listed("--limit", "2") == ["order-0", "order-1"]
    assert listed("--reason", "mailbox_denied") == ["order-0", "order-2"]
    assert listed("--mailbox", "Ann@example.com") == ["order-0", "order-1"]
    assert listed("--since", "2026-01-02", "--until", "2026-01-03T00:00:00Z") == ["order-1"]
    assert listed("--since", "2026-01-02T01:00:00+0200") == ["order-1", "order-2"]
    assert listed("--reason", "mailbox_denied", "--mailbox", "bo@example.com") == ["order-2"]


def test_a_list_in_a_pipe_keeps_an_id_in_one_piece() -> None:
    letter = letter_of(give_up("order-1" * 30))
    assert letter in mailfleet("dlq", "list").output


def test_a_foreign_letter_is_shown_whole_but_directs_no_terminal() -> None:
    letter = foreign(b"first\nsecond \x1b]0;title\x07 \xff", reason="unreadable")
    ended = mailfleet("dlq", "show", letter)
    assert ended.status == 0
    assert "first\nsecond �]0;title� �" in ended.output
    assert answer("dlq", "show", letter)["message"] == "first\nsecond \x1b]0;title\x07 �"
    assert [(action, subject) for _, action, subject in audited()] == [("dlq.read", letter)] * 2


@pytest.mark.parametrize("rate", ["nan", "inf", "0", "-1"])
def test_a_rate_that_is_none_is_a_sentence(rate: str) -> None:
    for number in range(2):
        give_up(f"order-{number}")
    says(mailfleet("dlq", "replay", "--all", "--rate", rate), 2, "Invalid value for '--rate'")


def test_a_dry_run_changes_nothing() -> None:
    give_up("order-1")
    assert [letter["publisher_message_id"] for letter in answer("dlq", "replay", "--all", "--dry-run")] == ["order-1"]
    assert "order-1" in mailfleet("dlq", "discard", "--all", "--dry-run").output
    assert (listed(), audited()) == (["order-1"], [])


def test_a_replay_means_the_letters_that_are_named_and_no_other() -> None:
    ids = [give_up(f"order-{number}") for number in range(5)]
    assert [outcome["outcome"] for outcome in answer("dlq", "replay", ids[0], "order-1", letter_of(ids[2]))] == [
        "replayed"
    ] * 3
    assert listed() == ["order-3", "order-4"]
    assert mailfleet("dlq", "replay", "--all", "--limit", "1").output.endswith("1 of 1 replayed\n")
    assert mailfleet("dlq", "discard", "--mailbox", "ann@example.com").output.endswith("1 of 1 discarded\n")
    assert (listed(), mailfleet("dlq", "replay", "--all")) == ([], Ended(0, "0 of 0 replayed\n", ""))
    says(mailfleet("dlq", "replay", "nobody's"), 1, "no dead letter has the id nobody's")
    says(mailfleet("dlq", "replay", "order-4"), 1, "no open dead letter has the id order-4: it was discarded by cli:")


def test_a_letter_that_cannot_be_replayed_ends_with_1() -> None:
    letter = foreign(b"hello", reason="unreadable")
    assert answer("dlq", "replay", letter, status=1) == [{"id": letter, "outcome": "no actor can read it: discard it"}]


def test_of_two_replays_at_once_each_letter_is_replayed_by_one() -> None:
    ids = [give_up(f"order-{number}") for number in range(20)]
    with ThreadPoolExecutor(2) as terminals:
        ended = list(terminals.map(lambda tty: mailfleet("dlq", "replay", "--all", TERM=tty), ("xterm", "vt100")))
    assert sum(each.output.count("  replayed\n") for each in ended) == len(ids)
    assert sorted(subject for _, _, subject in audited()) == sorted(letter_of(id) for id in ids)


def test_a_terminal_sees_progress_and_the_answer_stays_clean() -> None:
    for number in range(3):
        give_up(f"order-{number}")
    ours, terminal = pty.openpty()
    try:
        ended = subprocess.run(
            [MAILFLEET, "dlq", "discard", "--all", "--json"],
            stdout=subprocess.PIPE,
            stderr=terminal,
            check=True,
            env=os.environ | {"TERM": "xterm"},
        )
        assert "100%" in os.read(ours, 65536).decode()
    finally:
        os.close(terminal)
        os.close(ours)
    assert [outcome["outcome"] for outcome in orjson.loads(ended.stdout)] == ["discarded"] * 3


# The archive


def test_backups_are_listed_and_exported_to_a_new_file_of_the_operators_alone(tmp_path: Path) -> None:
    id = archive("order-1")
    (backup,) = answer("backups", "list", "--mailbox", "ANN@example.com")
    assert (backup["incoming_email_id"], backup["size"]) == (id, len(MIME))
    assert answer("backups", "list", "--mailbox", "bo@example.com") == []
    assert mailfleet("backups", "export", backup["id"], "-o", tmp_path / "mail.eml") == Ended(0, "", "")
    assert (tmp_path / "mail.eml").read_bytes() == MIME
    assert (tmp_path / "mail.eml").stat().st_mode & 0o777 == 0o600
    assert subprocess.check_output([MAILFLEET, "backups", "export", "order-1"]) == MIME


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    archive("order-1")
    (tmp_path / "mail.eml").write_text("mine")
    says(mailfleet("backups", "export", "order-1", "-o", tmp_path / "mail.eml"), 1, "File exists")
    says(mailfleet("backups", "export", "order-1", "-o", tmp_path / "no" / "mail.eml"), 1, "No such file")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("mail.eml", "mine")]


def test_an_export_that_fails_leaves_no_file(tmp_path: Path) -> None:
    tamper(archive("order-1", mime=os.urandom(3_000_000)))
    says(mailfleet("backups", "export", "order-1", "-o", tmp_path / "mail.eml"), 1, "segment")
    rows("UPDATE email_backups SET key_id = 'lost'")
    says(mailfleet("backups", "export", "order-1", "-o", tmp_path / "mail.eml"), 1, "'lost'")
    says(mailfleet("backups", "export", "nobody's", "-o", tmp_path / "mail.eml"), 1, "no backup has the id")
    assert list(tmp_path.iterdir()) == []


# Who did it


def test_every_change_is_written_down_with_who_made_it(tmp_path: Path) -> None:
    replayed, discarded, archived = (give_up("order-1"), give_up("order-2"), archive("order-3"))
    who = {"LOGNAME": "ann"}
    mailfleet("pause", "ann@example.com", **who)
    mailfleet("resume", "ann@example.com", **who)
    mailfleet("dlq", "replay", replayed, **who)
    mailfleet("dlq", "discard", discarded, **who)
    mailfleet("backups", "export", archived, "-o", tmp_path / "mail.eml", **who)
    assert [(by, action) for by, action, _ in audited()] == [
        ("cli:ann", action) for action in ("pause", "resume", "dlq.replayed", "dlq.discarded", "backups.export")
    ]


# The installation


def test_settings_are_shown_without_the_secrets() -> None:
    shown = answer("settings")
    assert shown["MAILBOX_CONCURRENCY"] == "4"
    secrets = [os.environ[name] for name in (*SERVERS, "GRAPH_CLIENT_SECRET", "BACKUP_KEYS")]
    output = mailfleet("settings").output
    assert not [secret for secret in secrets if secret in output or secret in str(shown)]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BACKUP_KEYS", ","),
        ("BACKUP_KEYS", f"k:{'A' * 43}=,k:{'B' * 43}="),
        ("CONSOLE_TOKENS", "ann:operator:hunter2"),
        ("CONSOLE_TOKENS", "ann:operator:hunter2hunter2hunter2,bob:viewer:hunter2hunter2hunter2"),
        ("ATTACHMENT_STORE_URL", "nonsense"),
        ("ATTACHMENT_STORE_URL", "s3://AKIA:hunter2@bucket/x"),
        ("ATTACHMENT_CLOUD_URLS", "s3://AKIA:hunter2@bucket/x"),
        ("GRAPH_BASE_URL", "https://u:hunter2@graph.microsoft.com/v1.0"),
        ("GRAPH_AUTHORITY", "https://u:hunter2@login.microsoftonline.com"),
    ],
)
def test_settings_with_which_no_process_starts_are_refused_and_not_shown(variable: str, value: str) -> None:
    for command in ("settings", "doctor"):
        ended = mailfleet(command, **{variable: value})
        says(ended, 1, f"{variable}: ")
        assert "hunter2" not in ended.output + ended.complaint


def test_the_doctor_says_that_all_is_well_with_0(graph: Simulator) -> None:
    with workers():
        assert {finding["fine"] for finding in answer("doctor")} == {True}
        assert "PROBLEM" not in mailfleet("doctor").output


def test_the_doctor_names_a_credential_that_graph_refuses(graph: Simulator) -> None:
    ended = mailfleet("doctor", GRAPH_CLIENT_SECRET="not-the-secret")
    assert ended.status == 1
    assert "AuthenticationFailed" in ended.output
    assert "not-the-secret" not in ended.output + ended.complaint


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
def test_the_doctor_names_everything_that_is_away_within_seconds(silent: bool, graph: Simulator) -> None:
    with silence() as port:
        away = {name: at(os.environ[name], port if silent else free_port()) for name in (*SERVERS, "GRAPH_AUTHORITY")}
        began = time.monotonic()
        ended = mailfleet("doctor", "--json", **away)
    assert time.monotonic() - began < 15
    assert ended.status == 1
    findings = {finding["subject"]: finding["fine"] for finding in orjson.loads(ended.output)}
    away_too = dict.fromkeys(["PostgreSQL", "RabbitMQ", "Redis", "Graph", "Archive", "Backlog"], False)
    assert findings == {**away_too, "Recipients": True}
    assert not [url for url in away.values() if url in ended.output + ended.complaint]
