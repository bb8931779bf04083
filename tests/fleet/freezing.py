"""Means to freeze a process at a chosen moment, and to have RabbitMQ give it up as it does after a silent minute."""

from __future__ import annotations

import socket
import threading
from contextlib import closing, suppress
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import psycopg2


class Gate:
    """Stops statements on single mailboxes in the middle: each takes effect when the gate is opened.

    Whoever sent one can be frozen meanwhile, and so before it learns what came of it.
    """

    _LOCK = 1

    def __init__(self, database_url: str) -> None:
        self._connection = psycopg2.connect(database_url)
        self._connection.autocommit = True
        self._stops = 0
        self._ask("SELECT pg_advisory_lock(%s)", self._LOCK)
        self._ask(
            """
            CREATE FUNCTION stand_still() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_advisory_xact_lock_shared(%s); RETURN NEW; END $$
            """,
            self._LOCK,
        )

    def stop(self, mailbox: str, event: str, condition: str = "true") -> None:
        """Stop what does ``event`` (INSERT, UPDATE) to an email of the mailbox, if the condition on its row holds."""
        self._stops += 1
        self._ask(
            f"CREATE TRIGGER gate_{self._stops} BEFORE {event} ON incoming_emails FOR EACH ROW"
            f" WHEN (NEW.mailbox = %s AND {condition}) EXECUTE FUNCTION stand_still()",
            mailbox,
        )

    def stopped(self) -> int:
        """Return how many statements stand before it."""
        found = self._ask(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = %s AND NOT granted", self._LOCK
        )
        return int(found[0][0])

    def open(self) -> None:
        """Let all pass that stand before it, and whoever comes."""
        self._ask("SELECT pg_advisory_unlock(%s)", self._LOCK)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def _ask(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(sql, values)
            return cursor.fetchall() if cursor.description else []


class Line:
    """A way to a server that can be cut: the server sees that its clients are gone, and they see it when they wake."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (parts.hostname or "", parts.port or 0)
        self._entry = socket.create_server(("127.0.0.1", 0))
        login, at, _ = parts.netloc.rpartition("@")
        self.url = parts._replace(netloc=f"{login}{at}127.0.0.1:{self._entry.getsockname()[1]}").geturl()
        self._ends: list[socket.socket] = []

    def cut(self) -> None:
        """End every connection that is there; new ones are made as before."""
        while self._ends:
            with suppress(OSError):
                self._ends.pop().shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entry.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):  # the entry was closed
            while True:
                client, _ = self._entry.accept()
                server = socket.create_connection(self._server)
                self._ends += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=_carry, args=(source, sink), daemon=True).start()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with closing(sink), suppress(OSError):
        while carried := source.recv(65536):
            sink.sendall(carried)
