"""What the tests of the operator's tools share: mail that was given up or archived, and servers that are away."""

from __future__ import annotations

import os
import socket
import socketserver
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pika
import pytest
import support
from click.testing import CliRunner

import runtime
from actors.budgets import keep_counts
from cli import main
from models import ClaimedBackup, Sealed, backups, dead_letters, rows
from models.dead_letters import Copy
from sandbox.processes import free_port
from vault import bind_to

MIME = b"From: ann@example.com\r\nSubject: Your order\r\n\r\n" + bytes(range(256)) * 10_000


def give_up(publisher_message_id: str = "order-1", *, reason: str = "invalid_recipient", **changes: Any) -> str:
    """Store an email, have a worker give it up, and return its id."""
    id = support.store(publisher_message_id=publisher_message_id, **changes)
    support.claim(id).fail(
        reason=reason,
        error="Graph says no",
        message_id=str(uuid.uuid4()),
        queue_name="send_plain",
        actor_name="send_plain",
        publish_within=support.WITHIN,
    )
    return id


def letter_of(id: str) -> str:
    """The id of the email's newest dead letter."""
    letter = dead_letters.find(id)
    assert letter is not None
    return letter.id


def foreign(body: bytes, *, reason: str = "actor_failed", queue_name: str = "maintenance") -> str:
    """Mirror a dead letter that belongs to no email, and return its id."""
    message_id = str(uuid.uuid4())
    dead_letters.mirror([Copy(message_id, queue_name, None, None, reason, "the actor gave the message up", body)])
    return str(rows("SELECT id FROM dlq WHERE message_id = %(id)s", {"id": message_id})[0][0])


def archive(publisher_message_id: str = "order-1", *, mime: bytes = MIME, **changes: Any) -> str:
    """Store an email as sent and archived, and return its id."""
    id = support.store(publisher_message_id=publisher_message_id, **changes)
    support.claim(id).record_sent(backup_delay=support.NOW, publish_within=support.WITHIN)
    graph_id = f"graph-{publisher_message_id}"
    blob = runtime.vault.seal([mime], associated_data=bind_to(id, graph_id))
    sealed = Sealed(blob.ciphertext, "gzip", blob.size_bytes, blob.compressed_size_bytes, blob.checksum, blob.key_id)
    email = support.email_row(id)
    claimed = ClaimedBackup(id, publisher_message_id, email["mailbox"], graph_id, email["created_at"], 1)
    backups.store([backups.Copy(claimed, graph_id, sealed)], retention=timedelta(days=1))
    return id


def tamper(id: str) -> None:
    """Change the last byte of an email's sealed backup."""
    backup = backups.find_backup(id)
    assert backup is not None
    ((blob,),) = rows("SELECT compressed_blob FROM email_backups WHERE id = %(id)s", {"id": backup.id})
    changed = bytearray(blob)
    changed[-1] ^= 1
    rows(
        "UPDATE email_backups SET compressed_blob = %(blob)s WHERE id = %(id)s",
        {"blob": bytes(changed), "id": backup.id},
    )


def audited() -> list[tuple[str, str, str]]:
    """Who did what to what, oldest first."""
    return rows("SELECT who, action, subject FROM audit_log ORDER BY at, id")


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    output: str
    complaint: str


MAILFLEET = Path(sys.executable).with_name("mailfleet")


def mailfleet(*arguments: str | bytes | Path, stdin: bytes = b"", **environment: str) -> Ended:
    """Run the operator's command line: in a process of its own where that has another environment, else in this one."""
    if not environment and all(isinstance(argument, str | Path) for argument in arguments):
        run = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
        if run.exception and not isinstance(run.exception, SystemExit):
            raise run.exception
        return Ended(run.exit_code, run.stdout_bytes.decode(), run.stderr)
    ended = subprocess.run(
        [MAILFLEET, *arguments], input=stdin, env=os.environ | environment, capture_output=True, timeout=60, check=False
    )
    return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


@contextmanager
def workers() -> Iterator[None]:
    """Consume from every queue that has a worker in a fleet."""
    with pika.BlockingConnection(runtime.rabbitmq) as connection:
        channel = connection.channel()
        runtime.declare(channel)
        for queue in (*support.QUEUES, runtime.SEND_QUEUE):
            channel.basic_consume(queue, lambda *_: None)
        yield


def at(url: str, port: int) -> str:
    """The same URL with another port of this machine."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{port}".lstrip("@")).geturl()


@contextmanager
def silence() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class Gate:
    """A way to a server that can be shut and opened."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url).hostname or "", urlsplit(url).port or 0
        self.port = free_port()
        self.url = at(url, self.port)
        self._server: socketserver.ThreadingTCPServer | None = None
        self._passing: set[socket.socket] = set()
        self.open()

    def open(self) -> None:
        gate = self

        class Passage(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(gate._target) as far:
                    gate._passing |= {self.request, far}
                    back = threading.Thread(target=_pour, args=[far, self.request], daemon=True)
                    back.start()
                    _pour(self.request, far)
                    back.join()

        socketserver.ThreadingTCPServer.allow_reuse_address = True
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", self.port), Passage)
        threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()

    def shut(self) -> None:
        if self._server:
            self._server.shutdown()
            for passing in self._passing:
                _end(passing)
            self._server.server_close()
        self._server, self._passing = None, set()


def _pour(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass  # one side is gone, so is the other
    _end(target)


def _end(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # ended before


@pytest.fixture
def run_time_limits() -> Iterator[None]:
    """Counts, limits and pauses in Redis that begin at nothing, and are gone afterwards."""
    runtime.redis.flushdb()
    keep_counts()
    yield
    runtime.redis.flushdb()
