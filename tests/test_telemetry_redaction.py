"""What people write to each other, and what opens doors, reaches no line, whichever way it is tried."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import orjson
import pytest
from support import wait_until

from sandbox.processes import free_port

ROOT = Path(__file__).resolve().parent.parent
#: Part of everything that must not be seen.
PLANTED = "pl4nted"
#: A line may be cut off, but what is planted must not be what was cut off.
BEGIN = """
    import collections, logging, os, sys, threading, warnings
    import telemetry
    telemetry.configure_logging({level!r})
    BODY = "Dear pl4nted, " + "your order is on its way. " * 20
    ADDRESS = "pl4nted@example.org"
    TOKEN = "eyJ0eXAiOiJKV1QipL4nted.eyJhdWQpl4nted"
    UPLOAD = "https://outlook.example/users/pl4nted%40example.org/session?authtoken=pl4nted"
    PASSWORD = "pl4nted"
    SECRETS = [BODY, ADDRESS, TOKEN, UPLOAD, PASSWORD]
    log = logging.getLogger("any")
"""


def tried(program: str, level: str = "DEBUG", **settings: str) -> tuple[int, list[dict[str, Any]], str]:
    """Run a program; return its exit status, its lines and everything that it wrote."""
    ended = subprocess.run(
        [sys.executable, "-c", dedent(BEGIN.format(level=level)) + dedent(program)],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        check=False,
    )
    lines = [orjson.loads(line) for line in ended.stderr.splitlines()]
    return ended.returncode, lines, str(ended.stderr + ended.stdout)


ERRORS = """
    for secret in SECRETS:
        try:
            try:
                raise ValueError(secret)
            except ValueError as error:
                error.add_note(secret)
                raise ExceptionGroup(secret, [KeyError(secret)]) from error
        except ExceptionGroup as error:
            log.exception("failed")
            log.error("failed: %s", error)
            log.error("failed: %r", error)
            log.error(error)
        thread = threading.Thread(target=lambda: {}[secret])
        thread.start(); thread.join()
    """
VALUES = """
    for secret in SECRETS:
        log.error("%s", {"a": secret}); log.error("%r", [secret]); log.error("%s", secret.encode())
        log.error("%s %s", {"a": secret}, bytearray(secret.encode())); log.error({"a": secret})
        log.error("%d emails", secret)
        log.error("told besides", extra={"body": secret})
        log.error("where", stack_info=True)
    log.error("\\ud800 %s", PASSWORD)
    class Mail:
        def __repr__(self): return BODY
    for value in (Mail(), (BODY,), {BODY}, frozenset([BODY]), collections.deque([BODY]), memoryview(BODY.encode())):
        log.error("%s %r", "it was", value)
        log.error(value)
    """
OBJECTS_OF_ASYNCIO = """
    import asyncio, gc
    async def fail():
        raise ValueError(BODY)
    async def leave_alone():
        task = asyncio.ensure_future(fail())
        await asyncio.sleep(0); await asyncio.sleep(0)
        del task
        gc.collect()
        for what in ({"exception": ValueError(BODY)}, {"future": BODY}, {"handle": BODY}, {"mail": BODY}):
            asyncio.get_running_loop().call_exception_handler({"message": "unhandled", **what})
    for _ in range(2):
        asyncio.run(leave_alone())
    """
FOREIGN_LINES = """
    warnings.warn(f"cannot reach {UPLOAD}")
    urllib3 = logging.getLogger("urllib3.connection")
    urllib3.warning("Failed to parse headers (url=%s): %s", UPLOAD, ValueError(BODY))
    urllib3.warning("Retrying (%r) after connection broken: %s", None, f"/v1.0/users/{ADDRESS}/sendMail")
    log.warning("Retrying: /v1.0/users/pl4nted%%40example.org/messages")
    log.warning("refused: Authorization: Bearer %s", TOKEN)
    log.warning("refused: %s", TOKEN)
    log.warning("550 <%s> unknown", ADDRESS)
    log.warning("cannot reach amqp://user:%s@localhost:5672/vhost", PASSWORD)
    log.warning("dsn: host=localhost password=%s dbname=a", PASSWORD)
    log.warning("{'client_secret': '%s'}", PASSWORD)
    log.warning("headers: {'Authorization': 'AWS4-HMAC-SHA256 %s, %s'}", PASSWORD, PASSWORD)
    log.warning("AWS4-HMAC-SHA256 Credential=%s/2026/s3", PASSWORD)
    log.warning("sent with SharedKey account:%s", PASSWORD)
    log.warning("connect: AccountKey=%s;EndpointSuffix=core", PASSWORD)
    log.warning("refused: X-Vault-Token: %s", PASSWORD); log.warning("hvs.%s and whsec_%s", PASSWORD, PASSWORD)
    log.warning("?sv=2026&sig=%s&se=1", PASSWORD); log.warning("of s3://bucket/%s.pdf", PASSWORD)
    log.warning("several lines\\n  %s", BODY)
    log.warning("%s", "x" * 990 + BODY)
    for name in ("urllib3", "requests", "msal", "redis", "botocore.auth", "azure.core", "aiohttp", "opentelemetry"):
        logging.getLogger(name).info("sent %s", BODY); logging.getLogger(name).debug(BODY)
    logging.getLogger("pika.x").error(BODY); logging.getLogger("opentelemetry.x").error(BODY)
    """
LIBRARIES = """
    import pika, psycopg2, redis, requests, urllib3
    import contracts, outbox
    def attempt(call):
        try:
            call()
        except Exception as error:
            log.exception("failed")
            log.warning("away: %s", error)
    rabbitmq = os.environ["RABBITMQ_URL"].split("@")[1]
    attempt(lambda: outbox.connect(outbox.connection_parameters(f"amqp://pl4nted:pl4nted@{rabbitmq}", "tests")))
    attempt(lambda: psycopg2.connect(f"postgresql://pl4nted:pl4nted@{os.environ['DATABASE_URL'].split('@')[1]}"))
    attempt(lambda: psycopg2.connect("postgresql://localhost:pl4nted/a"))
    with psycopg2.connect(os.environ["DATABASE_URL"]) as connection, connection.cursor() as cursor:
        attempt(lambda: cursor.execute("SELECT %s::json", [BODY]))
    attempt(lambda: redis.Redis.from_url("redis://:pl4nted@127.0.0.1:1/0").ping())
    attempt(lambda: urllib3.PoolManager().request("PUT", UPLOAD.replace("outlook.example", "127.0.0.1:1"), body=BODY))
    attempt(lambda: requests.post(f"http://127.0.0.1:1/users/{ADDRESS}/sendMail", headers={"Authorization": TOKEN}))
    attempt(lambda: contracts.accept(b'{"from": "pl4nted@example.org", "pl4nted": 1, "to": "pl4nted"}'))
    attempt(lambda: contracts.accept(BODY.encode()))
    """
MAIL_LOG = """
    import json
    from graph_client.classification import Operation, Reply, classify
    from graph_client.errors import AnswerUnclear, InvalidRecipient
    from telemetry import Step, mail_log
    for secret in SECRETS:
        mail_log(Step.IN_DOUBT, incoming_email_id="e", why=str(AnswerUnclear(secret, status=500)))
        mail_log(Step.BACKUP_RETRIED, incoming_email_id="e", why=str(InvalidRecipient(secret, status=400)))
    for planted in (BODY, ADDRESS, UPLOAD):
        for status in (400, 403, 404, 429, 500):
            body = {"error": {"code": planted, "message": planted, "innerError": {"code": planted}}}
            error = classify(Reply(status, {}, json.dumps(body).encode(), "c"), Operation("send_mail", "mailbox"))
            mail_log(Step.RETRIED, incoming_email_id="e", why=str(error), code=error.code)
    """


@pytest.mark.parametrize("attempts", [ERRORS, VALUES, OBJECTS_OF_ASYNCIO, FOREIGN_LINES, MAIL_LOG])
def test_nothing_that_people_write_and_nothing_that_opens_doors_becomes_part_of_a_line(attempts: str) -> None:
    status, lines, everything = tried(attempts)
    assert status == 0
    assert len(lines) >= 10
    assert PLANTED not in everything.lower()


def test_what_servers_and_libraries_say_of_a_failure_does_not_tell_it_either(servers: dict[str, str]) -> None:
    status, lines, everything = tried(LIBRARIES)
    assert status == 0
    assert sum(line["event"] == "failed" for line in lines) == 9
    assert PLANTED not in everything.lower()


def test_a_process_that_ends_with_an_error_tells_where_and_not_what() -> None:
    status, lines, everything = tried(
        """
        class Closing:
            def __del__(self): raise OSError(PASSWORD)
        Closing()
        raise RuntimeError(BODY)
        """
    )
    assert status == 1
    assert [line["event"] for line in lines] == ["an error could not be raised", "the process has ended"]
    assert "RuntimeError" in lines[1]["exception"]
    assert PLANTED not in everything


def test_settings_that_are_refused_are_not_quoted(tmp_path: Path) -> None:
    refused = {
        "DATABASE_URL": "postgresql://pl4nted:pl4nted@host/name?pl4nted=1",
        "RABBITMQ_URL": "amqp://pl4nted:pl4nted@host:pl4nted/",
        "REDIS_URL": "pl4nted://:pl4nted@host",
        "BACKUP_KEYS": "k:pl4nted",
        "GRAPH_CLIENT_CERTIFICATE": str(tmp_path / "none.pem"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://pl4nted:pl4nted@host",
        "OTEL_EXPORTER_OTLP_HEADERS": "pl4nted",
        "GRAPH_BASE_URL": "http://pl4nted:pl4nted@host/?pl4nted",
        "GRAPH_AUTHORITY": "http://pl4nted:pl4nted@host/?pl4nted",
        "ATTACHMENT_ALLOWED_HOSTS": "https://pl4nted:pl4nted@host",
        "ATTACHMENT_CLOUD_URLS": "https://pl4nted:pl4nted@host/?sig=pl4nted",
        "ATTACHMENT_STORE_URL": "ftp://pl4nted:pl4nted@host/?sig=pl4nted",
        "DEAD_LETTER_WEBHOOK_URL": "http://host/pl4nted",
        "DEAD_LETTER_WEBHOOK_SECRET": "pl4nted",
        "ALLOWED_SENDERS": "pl4nted=",
        "RECIPIENT_FIREWALL": "redirect:pl4nted",
        "LOG_LEVEL": "pl4nted",
    }
    ended = subprocess.run(
        [sys.executable, "-c", "import runtime"], cwd=ROOT, env=os.environ | refused, capture_output=True, check=False
    )
    assert ended.returncode == 1
    assert all(name.encode() in ended.stderr for name in refused)
    assert PLANTED.encode() not in ended.stderr


def test_a_console_tells_nothing_of_what_it_is_asked_at_any_level(servers: dict[str, str], tmp_path: Path) -> None:
    # Given
    port, right = free_port(), "right-pl4nted-token"
    settings = {"LOG_LEVEL": "DEBUG", "PORT": str(port), "CONSOLE_TOKENS": f"ann:operator:{right}"}
    with (tmp_path / "log").open("wb") as log:
        console = subprocess.Popen([sys.executable, "-m", "console"], cwd=ROOT, env=os.environ | settings, stderr=log)
    try:
        wait_until("it answers", lambda: ask(port, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"), 30)
        # When
        for token in ("wrong-pl4nted-token", right):
            for target in ("/metrics?token=pl4nted", "/api/v1/emails/pl4nted%40example.org", "/pl4nted"):
                for method in ("GET", "POST"):
                    head = f"{method} {target} HTTP/1.1\r\nHost: pl4nted\r\nCookie: pl4nted\r\nContent-Length: 7\r\n"
                    assert ask(port, f"{head}Authorization: Bearer {token}\r\n\r\npl4nted".encode())
        ask(port, b"pl4nted\r\n\r\n")
        ask(port, b"GET /pl4nted HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: pl4nted\r\n\r\n")
        ask(port, b"POST /api/v1/emails HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\npl4nted\r\n")
    finally:
        console.terminate()
        console.wait(20)
    # Then
    told = (tmp_path / "log").read_text()
    assert "a wrong token from 127.0.0.1" in told
    assert PLANTED not in told


def ask(port: int, request: bytes) -> bytes:
    """Send what is no proper request, perhaps, and return what is answered, nothing if nobody listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(request)
            return connection.recv(1000)
    except OSError:
        return b""
