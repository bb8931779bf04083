"""The console as monitoring, proxies and strangers meet it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

import anyio.to_thread
import orjson
import pytest
import requests
import support
from operator_support import Gate, at, give_up, workers
from prometheus_client.parser import text_string_to_metric_families
from support import rows

import operations
import runtime
from console.access import Access
from console.app import make_app
from console.readiness import Readiness
from console_tokens import Token, parse_tokens
from models import inspection, uploads
from operations import Finding
from sandbox.processes import free_port
from sandbox.world import ROOT
from telemetry import FLEET_GAUGES

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")

STRANGER = "203.0.113.9"
SECRET = "a-token-of-the-viewer"
GUARDED = "grafana:viewer:" + SECRET + ", ann:operator:another-long-token"


class Answer(NamedTuple):
    """What the application answers."""

    status: int
    headers: dict[str, str]
    body: bytes


def ask(path: str, *, tokens: str = "", client: str = "127.0.0.1", method: str = "GET", **headers: str) -> Answer:
    """Ask the console as if from another address."""
    application = make_app(Access(parse_tokens(tokens)))
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.replace("_", "-").lower().encode(), value.encode()) for name, value in headers.items()],
        "client": (client, 1),
        "server": ("127.0.0.1", 80),
    }
    said: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        said.append(message)

    asyncio.run(application(scope, receive, send))
    answered = {name.decode(): value.decode() for name, value in said[0]["headers"]}
    return Answer(said[0]["status"], answered, b"".join(part.get("body", b"") for part in said[1:]))


# Who is answered


def test_health_is_open_to_all_and_tells_nothing() -> None:
    assert ask("/healthz", client=STRANGER, tokens=GUARDED).body == b'{"status":"alive"}'
    assert ask("/readyz", client=STRANGER, tokens=GUARDED).status == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_metrics_are_for_whoever_has_a_token(scheme: str) -> None:
    assert ask("/metrics", client=STRANGER, tokens=GUARDED, Authorization=f"{scheme} {SECRET}").status == 200


@pytest.mark.parametrize(
    "authorization",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {SECRET}x"},
        {"Authorization": f"Bearer {SECRET[:-1]}"},
        {"Authorization": "Bearer späß🙈"},
        {"Authorization": f"Basic {SECRET}"},
        {"Authorization": SECRET},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/metrics", "/metrics?_who=ann&access=x&token=" + SECRET])
def test_without_the_right_token_metrics_are_refused_even_on_this_machine(
    authorization: dict[str, str], path: str
) -> None:
    refused = ask(path, tokens=GUARDED, **authorization)
    assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert SECRET.encode() not in refused.body


def test_a_token_may_have_any_letters() -> None:
    assert (
        ask("/metrics", tokens="ann:viewer:späßige-lange-losung", Authorization="Bearer späßige-lange-losung").status
        == 200
    )


@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_where_no_token_is_configured_this_machine_is_answered(client: str) -> None:
    assert ask("/metrics", client=client).status == 200


@pytest.mark.parametrize("client", [STRANGER, "10.0.0.1", "::ffff:203.0.113.9", "127.0.0.1.example", ""])
def test_where_no_token_is_configured_nobody_else_is(client: str) -> None:
    assert ask("/metrics", client=client).status == 401
    assert ask("/metrics", client=client, X_Forwarded_For="127.0.0.1", Authorization="Bearer ").status == 401


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-Real-IP", "Forwarded", "Via"])
def test_what_a_proxy_on_this_machine_passes_on_does_not_come_from_this_machine(header: str) -> None:
    assert ask("/metrics", **{header: STRANGER}).status == 401
    assert ask("/metrics", **{header: "127.0.0.1"}).status == 401


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
def test_where_no_token_is_configured_this_machine_is_called_by_its_own_names(host: str) -> None:
    assert ask("/metrics", Host=host).status == 200
    assert ask("/api/v1/emails", Host=host).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "localhost@evil", ""]
)
def test_a_page_of_another_name_that_leads_to_this_machine_sees_nothing(host: str) -> None:
    """DNS rebinding: the browser of who works here asks in the name of somebody else's page."""
    assert ask("/metrics", Host=host).status == 403
    assert ask("/api/v1/emails", Host=host).status == 403
    assert ask("/metrics", Host=host, tokens=GUARDED, Authorization=f"Bearer {SECRET}").status == 200


def test_a_page_of_another_origin_gets_no_leave_to_ask_with_a_token_or_to_read_the_answer() -> None:
    asked = {"Origin": "https://evil.example", "Access_Control_Request_Method": "POST"}
    asked |= {"Access_Control_Request_Headers": "authorization,content-type"}
    for tokens in ("", GUARDED):
        for answer in (
            ask("/api/v1/pauses/a@example.com", method="OPTIONS", tokens=tokens, **asked),
            ask("/api/v1/emails", tokens=tokens, Authorization=f"Bearer {SECRET}", **asked),
        ):
            assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_tokens_are_read_and_never_shown() -> None:
    first, second = parse_tokens(GUARDED)
    assert first == Token("grafana", "viewer", SECRET)  # type: ignore[arg-type]
    assert (second.name, second.role) == ("ann", "operator")
    assert SECRET not in repr([first, second])


@pytest.mark.parametrize(
    "text", [SECRET, f":viewer:{SECRET}", f"ann:root:{SECRET}", f"ann:{SECRET}", "ann:viewer:short"]
)
def test_a_token_of_another_form_is_told_by_its_position(text: str) -> None:
    with pytest.raises(ValueError, match="entry 2") as error:
        parse_tokens(f"{GUARDED.partition(',')[0]},{text}")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("role", ["viewer", "operator"])
def test_two_entries_with_one_token_are_refused(role: str) -> None:
    """Who acts is written down by a name, and a viewer's token must not be an operator's."""
    with pytest.raises(ValueError, match="entry 2 has the token of an earlier one") as error:
        parse_tokens(f"ann:operator:{SECRET}, grafana:{role}:{SECRET}")
    assert SECRET not in str(error.value)


# What is answered


def test_looking_needs_no_body_and_nothing_else_is_there() -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        assert ask(path, method="HEAD").status == 200
        assert {ask(path, method=method).status for method in ("POST", "PUT", "DELETE")} == {405}
    assert {ask(path).status for path in ("/", "/docs", "/openapi.json", "/healthz/x", "//metrics", "/../cli.py")} == {
        404
    }


def test_many_that_ask_whether_it_is_ready_at_once_are_answered_from_one_look() -> None:
    # Given
    looks: list[float] = []
    now = [0.0]

    def look() -> list[Finding]:
        looks.append(now[0])
        threading.Event().wait(0.05)  # as long as servers take
        return [Finding("Redis", True, "answers")]

    readiness = Readiness(look, clock=lambda: now[0])

    async def ask_for_long() -> None:
        # When
        answers = await asyncio.gather(*(readiness.findings() for _ in range(8)))
        # Then
        assert answers == [[Finding("Redis", True, "answers")]] * 8
        assert looks == [0.0]
        for now[0] in (1.9, 2.0, 3.9):
            await readiness.findings()

    asyncio.run(ask_for_long())
    assert looks == [0.0, 2.0]


def test_strangers_who_wait_for_an_answer_of_the_servers_keep_nobody_else_from_theirs() -> None:
    # Given a check that hangs, as while RabbitMQ stands still
    hangs = threading.Event()
    readiness = Readiness(lambda: [Finding("RabbitMQ", hangs.wait(30), "answers")])

    async def ask_all() -> None:
        strangers = [asyncio.create_task(readiness.findings()) for _ in range(60)]
        await asyncio.sleep(0)
        # When somebody else needs one of the threads that all requests share
        await asyncio.wait_for(anyio.to_thread.run_sync(lambda: None), 5)
        assert not any(stranger.done() for stranger in strangers)
        hangs.set()
        await asyncio.gather(*strangers)

    # Then they are answered
    asyncio.run(ask_all())


def gauges() -> dict[tuple[str, str], float]:
    text = ask("/metrics").body.decode()
    return {
        (sample.name.removeprefix("mailfleet_"), "".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_gauges_tell_what_the_tables_and_queues_hold_now() -> None:
    # Given
    give_up("failed")
    doubted = support.store(publisher_message_id="in doubt")
    support.claim(doubted).mark_in_doubt(look_again_in=support.WITHIN, evidence={})
    sent = support.store(publisher_message_id="sent")
    support.claim(sent).record_sent(backup_delay=support.NOW, publish_within=support.WITHIN)
    support.store(publisher_message_id="dispatched")
    support.dispatch()
    later = support.store(publisher_message_id="later", send_at="2999-01-01T00:00:00Z")
    rows("UPDATE incoming_emails SET created_at = now() - interval '9 days' WHERE id = %(id)s", {"id": later})
    ready = support.store(publisher_message_id="ready")
    rows("UPDATE incoming_emails SET created_at = now() - interval '1 hour' WHERE id = %(id)s", {"id": ready})
    rows(
        """
        INSERT INTO mailboxes (mailbox, refusal_count, full_until) VALUES
        ('ann@example.com', 3, NULL), ('bo@example.com', 1, now() + interval '1 hour'), ('carl@example.com', 0, now())
        """
    )
    before = gauges().get(("queue_messages_ready", "send_email"), 0)
    operations.publish(orjson.dumps(support.send_email()), who="cli:ann")
    runtime.close()
    # When
    told = gauges()
    # Then
    assert [told["emails_waiting", status] for status in ("received", "dispatched", "processing")] == [2, 1, 1]
    assert 3600 <= told["emails_oldest_waiting_age_seconds", ""] < 3700
    assert (told["emails_in_doubt", ""], told["dead_letters_open", ""], told["backups_due", ""]) == (1, 1, 1)
    assert (told["mailboxes_refusing", ""], told["mailboxes_full", ""]) == (2, 1)
    assert told["outbox_events_unpublished", ""] == len(support.table("outbox_events")) == 8
    assert told["queue_messages_ready", "send_email"] == before + 1
    assert {"send_plain.XQ", "mail.dead_letters.mirror"} <= {
        queue for name, queue in told if name == "queue_messages_ready"
    }


def test_gauges_tell_how_much_of_what_may_be_in_use_is() -> None:
    # Given one in flight with two attachments, one up and one half up; a doubt; a backup; letters of two kinds
    attachments = [{"name": f"{n}.pdf", "size": 1000, "urlOrId": f"https://files.example/{n}"} for n in range(2)]
    attached = support.claim(support.store(publisher_message_id="attached", attachments=attachments), intent=False)
    for upload in uploads.plan(attached, attachments):
        upload.uploaded, upload.uploaded_bytes = upload.position == 0, 1000 if upload.position == 0 else 400
        uploads.record_progress(attached, upload, lease=support.LEASE)
    doubted = support.store(publisher_message_id="in doubt")
    support.claim(doubted).mark_in_doubt(look_again_in=support.WITHIN, evidence={})
    rows("UPDATE sent_emails SET intent_at = now() - interval '1 hour'")
    sent = support.store(publisher_message_id="sent")
    support.claim(sent).record_sent(backup_delay=support.NOW, publish_within=support.WITHIN)
    rows("UPDATE sent_emails SET backup_due_at = now() - interval '2 hours' WHERE status = 'sent'")
    rows("UPDATE outbox_events SET created_at = now() - interval '3 hours'")
    give_up("one"), give_up("two"), give_up("three", reason="mailbox_full")
    rows("INSERT INTO mailboxes (mailbox, paused_until) VALUES ('bo@example.com', 'infinity')")
    # When
    with workers():
        told = gauges()
    # Then
    assert [told["in_flight", route] for route in ("no-attachment", "attachment", "backup")] == [0, 1, 0]
    limit = runtime.configuration.send_plain_concurrency
    assert told["concurrency_limit", "no-attachment"] == limit
    assert (told["uploads_in_hand", ""], told["upload_bytes_in_hand", "uploaded"]) == (1, 1400)
    assert told["upload_bytes_in_hand", "remaining"] == 600
    assert told["dead_letters_open_by_reason", "invalid_recipient"] == 2
    assert told["dead_letters_open_by_reason", "mailbox_full"] == 1
    ages = ("emails_oldest_in_doubt_age_seconds", "backups_oldest_due_age_seconds", "outbox_oldest_age_seconds")
    assert [int(told[age, ""] // 3600) for age in ages] == [1, 2, 3]
    assert told["mailboxes_paused", ""] == 1
    assert (told["queue_consumers", "send_plain"], told["queue_consumers", "send_plain.XQ"]) == (1, 0)
    assert {f"mailfleet_{name}" for name, _ in told} == {
        gauge.name for gauge in FLEET_GAUGES if "certificate" not in gauge.name
    }


def test_of_a_large_backlog_postgresqls_estimate_is_told_and_still_its_oldest_mail() -> None:
    # Given mail of several mailboxes and priorities, and mail for later
    for number in range(6):
        support.store(publisher_message_id=f"o{number}", **{"from": f"m{number % 2}@example.com"})
    oldest = support.store(publisher_message_id="oldest", priority="bulk")
    rows("UPDATE incoming_emails SET created_at = now() - interval '2 hours' WHERE id = %(id)s", {"id": oldest})
    support.store(publisher_message_id="later", send_at="2999-01-01T00:00:00Z")
    rows("ANALYZE incoming_emails")
    # When no more than two of anything are counted
    told = inspection.backlog(counted=2)
    # Then
    assert told.by_status == {"received": 8}
    assert told.oldest_waiting is not None
    assert 7200 <= (datetime.now(UTC) - told.oldest_waiting).total_seconds() < 7300
    assert inspection.backlog().by_status == {"received": 8}


# As a process


@contextmanager
def console(**environment: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the process type and return its address when it answers."""
    port = free_port()
    settings = os.environ | {"PORT": str(port), **environment}
    with subprocess.Popen([sys.executable, "-m", "console"], cwd=ROOT, env=settings, stderr=subprocess.PIPE) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            support.wait_until("the console answers", lambda: status_of(f"{url}/healthz") == 200)
            yield url, process
        finally:
            process.kill()


def status_of(url: str, **headers: str) -> int | None:
    with suppress(requests.ConnectionError):
        return requests.get(url, timeout=30, headers=headers).status_code
    return None


def test_a_readiness_probe_names_the_server_that_is_away_until_it_is_back(tables: str, servers: dict[str, str]) -> None:
    # Given
    urls = servers | {"DATABASE_URL": tables}
    names = {"DATABASE_URL": "PostgreSQL", "RABBITMQ_URL": "RabbitMQ", "REDIS_URL": "Redis"}
    gates = {name: Gate(url) for name, url in urls.items()}
    with console(**{name: gate.url for name, gate in gates.items()}) as (url, _):
        assert status_of(f"{url}/readyz") == 200
        for name, gate in gates.items():
            # When
            gate.shut()
            # Then
            support.wait_until("it is seen", lambda: status_of(f"{url}/readyz") == 503)
            away = requests.get(f"{url}/readyz", timeout=30)
            assert away.json() == {subject: "away" if subject == names[name] else "ok" for subject in names.values()}
            gauge = {"DATABASE_URL": "mailfleet_emails_in_doubt", "RABBITMQ_URL": "mailfleet_queue_consumers"}
            told = requests.get(f"{url}/metrics", timeout=30).text
            assert told.count('mailfleet_server_up{server="') == 2
            for other in gauge:
                assert f'up{{server="{names[other]}"}} {int(other != name)}.0' in told
                assert (gauge[other] in told) == (other != name)
            assert status_of(f"{url}/healthz") == 200
            # And when it is back
            gate.open()
            support.wait_until("it is seen", lambda: status_of(f"{url}/readyz") == 200)
            assert status_of(f"{url}/metrics") == 200
    for gate in gates.values():
        gate.shut()


def test_a_server_that_hangs_keeps_back_nothing_of_the_other(tables: str) -> None:
    # Given a RabbitMQ that takes connections and never answers
    with socket.create_server(("127.0.0.1", 0)) as hung:
        url = at(os.environ["RABBITMQ_URL"], hung.getsockname()[1])
        with console(RABBITMQ_URL=url, DATABASE_URL=tables) as (address, process):
            for _ in range(2):
                # When
                told = requests.get(f"{address}/metrics", timeout=10).text
                # Then
                assert 'mailfleet_server_up{server="PostgreSQL"} 1.0' in told
                assert 'mailfleet_server_up{server="RabbitMQ"} 0.0' in told
                assert "mailfleet_emails_in_doubt" in told
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=5) == 0


def test_the_process_starts_without_its_servers_ignores_forged_origins_and_ends_at_sigterm() -> None:
    nowhere = {name: at(os.environ[name], free_port()) for name in ("DATABASE_URL", "RABBITMQ_URL", "REDIS_URL")}
    with console(**nowhere, FORWARDED_ALLOW_IPS="*") as (url, process), requests.Session() as kept_alive:
        assert kept_alive.get(f"{url}/readyz", timeout=30).json() == dict.fromkeys(
            ("PostgreSQL", "RabbitMQ", "Redis"), "away"
        )
        told = requests.get(f"{url}/metrics", timeout=60).text
        assert [line for line in told.splitlines() if line.startswith("mailfleet_server_up")] == [
            f'mailfleet_server_up{{server="{server}"}} 0.0' for server in ("PostgreSQL", "RabbitMQ")
        ]
        assert "mailfleet_emails_waiting" not in told
        assert status_of(f"{url}/metrics", **{"X-Forwarded-For": "127.0.0.1"}) == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


def test_tokens_of_another_form_stop_the_start_without_being_shown() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "console"],
        cwd=ROOT,
        env=os.environ | {"CONSOLE_TOKENS": f"ann:operater:{SECRET}", "PORT": str(free_port())},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 1
    assert b"CONSOLE_TOKENS: entry 1" in ended.stderr
    assert SECRET.encode() not in ended.stderr + ended.stdout
