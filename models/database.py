"""The connection to PostgreSQL and the one way in which statements reach it.

A thread keeps its connection for good: opening one costs 6 ms of two processes. A connection that PostgreSQL has closed
stays unusable until it is dropped, so it is dropped here: before it is used, when the end has arrived by then, else
where the failure is seen. Otherwise each thread of the fleet would lose a piece of work to a restart long past.
"""

from __future__ import annotations

import hashlib
import re
import select
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import peewee
import psycopg2
import psycopg2.errorcodes
import psycopg2.extensions
import psycopg2.extras

#: A statement that runs longer is stuck: the slowest of ours reads one index range.
STATEMENT_TIMEOUT_MILLISECONDS = 30_000
#: A transaction that asks nothing for so long belongs to a process that stands still, and holds its locks meanwhile.
IDLE_IN_TRANSACTION_TIMEOUT_MILLISECONDS = 30_000
CONNECT_TIMEOUT_SECONDS = 5
#: Seconds and counts by which either side finds out that the other's host is gone: without it a host that lost its
#: power would keep its locks for hours.
_KEEPALIVES = {"keepalives_idle": 30, "keepalives_interval": 5, "keepalives_count": 3}
_SERVER_SETTINGS = {
    "statement_timeout": STATEMENT_TIMEOUT_MILLISECONDS,
    "idle_in_transaction_session_timeout": IDLE_IN_TRANSACTION_TIMEOUT_MILLISECONDS,
    "TimeZone": "UTC",
    # A plan that looks dear would be compiled for longer than it runs: each of ours reads a few rows of an index.
    "jit": "off",
    # A queue is empty when it is looked at by ANALYZE and long when it matters, so statistics say nothing: every
    # statement has its index. A plain scan of it also clears entries of rows that are gone; a bitmap's does not.
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    **{f"tcp_{name}": value for name, value in _KEEPALIVES.items()},
}
#: Where statements are prepared. PostgreSQL takes an array that it does not know for long, and would plan anew for each
#: that is not: that takes longer than the statement. Each has its index whatever it is given.
_PREPARING_SETTINGS = {"plan_cache_mode": "force_generic_plan"}

#: Codes of the class *invalid transaction state* that are no mistake of ours.
_OUTAGES = {
    psycopg2.errorcodes.READ_ONLY_SQL_TRANSACTION: "is read-only",
    psycopg2.errorcodes.IDLE_IN_TRANSACTION_SESSION_TIMEOUT: "ended a transaction that stood still",
}


class _Connection(psycopg2.extensions.connection):
    """A thread's connection.

    Attributes:
        prepared: The names of the statements that are prepared on it.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.prepared: set[str] = set()
        self._incoming = select.poll()
        self._incoming.register(self, select.POLLIN)

    def has_ended(self) -> bool:
        """Read what the server has said unasked, and say whether that was good-bye."""
        try:
            while not self.closed and self._incoming.poll(0):
                self.poll()
        except psycopg2.Error:
            return True
        return bool(self.closed)


class _Database(peewee.PostgresqlDatabase):
    """A database whose URL may change while the process runs: when it refuses us, it may have."""

    reread: Callable[[], str | None] = staticmethod(lambda: None)
    url = ""
    #: Whether a pooler gives each transaction any connection that is free: nothing may then be left behind in one.
    pooled = False

    def _connect(self) -> Any:
        # PostgreSQL's word for a wrong password comes without a code, in the server's language: any failure counts.
        try:
            return super()._connect()  # type: ignore[misc]
        except psycopg2.OperationalError:
            if not self._has_changed():
                raise
            return super()._connect()  # type: ignore[misc]

    def _has_changed(self) -> bool:
        """Take over the URL that holds now; say whether it is another one. Called under peewee's lock."""
        url = self.reread()
        if url is None or url == self.url:
            return False
        self.database, self.connect_params = _parameters(
            url, self.connect_params["application_name"], pooled=self.pooled
        )
        self.url = url
        return True


database = _Database(None)


class DatabaseAway(Exception):
    """Raised when PostgreSQL cannot be reached, gave up on a statement, is read-only after a failover or not set up.

    Whether the statement took effect is not known. Everything that waits is found again in the tables.
    """


class NotStorable(Exception):
    """Raised when PostgreSQL refuses a value: what was given cannot be kept, now or later."""


def connect(
    url: str, application_name: str, reread: Callable[[], str | None] = lambda: None, *, pooled: bool = False
) -> None:
    """Set where PostgreSQL is. Connections are opened by the threads that need one.

    Args:
        reread: Asked for the URL when a connection is refused, for its password may have been changed; None: it is
            not known to be another one.
        pooled: It is a pooler in transaction mode: no statement is prepared, and it has to make `unkept_settings` hold.
    """
    name, parameters = _parameters(url, application_name, pooled=pooled)
    database.init(name, **parameters)
    database.url, database.reread, database.pooled = url, reread, pooled


def _parameters(url: str, application_name: str, *, pooled: bool) -> tuple[str, dict[str, Any]]:
    parts = urlsplit(url)
    settings = " ".join(f"-c {name}={value}" for name, value in (_SERVER_SETTINGS | _PREPARING_SETTINGS).items())
    return unquote(parts.path.lstrip("/")), {
        "host": parts.hostname,
        "port": parts.port or 5432,
        "user": unquote(parts.username or ""),
        "password": unquote(parts.password or ""),
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "application_name": application_name,
        "connection_factory": _Connection,
        **({} if pooled else {"options": settings}),
        **_KEEPALIVES,
        **dict(parse_qsl(parts.query)),
    }


def unkept_settings() -> list[str]:
    """Return the settings of ours that do not hold on a connection: those that a pooler has not been told of.

    Keepalives are left out: they are between the pooler and PostgreSQL, which may share a host.
    """
    wanted = {name: str(value) for name, value in _SERVER_SETTINGS.items() if not name.startswith("tcp_")}
    found = dict(rows("SELECT name, setting FROM pg_settings WHERE name = ANY(%(names)s)", {"names": [*wanted]}))
    if found["TimeZone"] == "Etc/UTC":  # as a server is set up where the machine's clock says UTC
        found["TimeZone"] = "UTC"
    return sorted(name for name, value in wanted.items() if found.get(name) != value)


def disconnect() -> None:
    """Close this thread's connection, if it has one; who has none must not wait for others that are connecting."""
    if not database.is_closed():
        database.close()


def rows(sql: str, parameters: Mapping[str, Any] | None = None, *, prepared: bool = False) -> list[tuple[Any, ...]]:
    """Run one statement, in the transaction that is open or in its own, and return its rows.

    Args:
        prepared: PostgreSQL is to parse and plan it once for each connection: for what runs for each mail or each
            sweep, where that takes several times as long as the execution. The text must be one of a few.
            Behind a pooler it is not prepared.

    Raises:
        DatabaseAway: See there.
    """
    with _dropping_dead_connections:
        if prepared and not database.pooled:
            sql = _prepare(sql)
        cursor = database.execute_sql(sql, parameters)  # type: ignore[no-untyped-call]
        return cursor.fetchall() if cursor.description else []


def _prepare(sql: str) -> str:
    """Prepare a statement unless this connection has done so, and return the one that executes it."""
    statement = _Prepared.of(sql)
    prepared = database.connection().prepared  # type: ignore[no-untyped-call]
    if statement.name not in prepared:
        database.execute_sql(statement.prepare)  # type: ignore[no-untyped-call]
        prepared.add(statement.name)  # a transaction that is rolled back leaves it prepared
    return statement.execute


class _Prepared(NamedTuple):
    """A statement as PostgreSQL's PREPARE and EXECUTE want it."""

    name: str
    prepare: str
    execute: str

    @classmethod
    @cache
    def of(cls, sql: str) -> Self:
        name = f"s{hashlib.blake2b(sql.encode(), digest_size=8).hexdigest()}"
        # A list is an array of text to psycopg2: what the statement casts it to has to be said to EXECUTE, too.
        casts: dict[str, str] = {}
        for parameter, cast in _PARAMETER.findall(sql):
            casts[parameter] = casts.get(parameter) or cast
        numbers = {parameter: number for number, parameter in enumerate(casts, 1)}
        text = _PARAMETER.sub(lambda found: f"${numbers[found[1]]}{found[2]}", sql)
        arguments = ", ".join(f"%({parameter})s{cast}" for parameter, cast in casts.items())
        return cls(name, f"PREPARE {name} AS {text}", f"EXECUTE {name} ({arguments})" if casts else f"EXECUTE {name}")


_PARAMETER = re.compile(r"%\((\w+)\)s((?:::\w+(?:\[\])?)?)")


def now() -> datetime:
    """Return the instant by PostgreSQL's clock, which is that of every row."""
    at: datetime = rows("SELECT now()")[0][0]
    return at


def insert_many(sql: str, values: list[tuple[Any, ...]], row: str | None = None) -> list[tuple[Any, ...]]:
    """Run ``INSERT … VALUES %s … RETURNING …`` for many rows at once and return what it returned.

    Args:
        row: How one row is written, if it is more than its values: ``(%s, now() + %s)``.
    """
    with _dropping_dead_connections:
        cursor = database.cursor()  # type: ignore[no-untyped-call]
        returned: list[tuple[Any, ...]] = psycopg2.extras.execute_values(
            cursor, sql, values, template=row, page_size=len(values), fetch=True
        )
        return returned


@contextmanager
def transaction() -> Iterator[None]:
    """Make the statements of the block take effect together. Nothing in it may wait for the network."""
    with _dropping_dead_connections, database.atomic():
        yield


class _DroppingDeadConnections:
    """What every statement runs within: a connection that has ended is dropped, and errors are told in our words."""

    def __enter__(self) -> None:
        if not database.is_closed() and not database.in_transaction():
            connection: _Connection = database.connection()  # type: ignore[no-untyped-call]
            if connection.has_ended():
                _drop_connection()  # nothing is lost with it

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is not None:
            _translate(error)


_dropping_dead_connections = _DroppingDeadConnections()


def _translate(error: BaseException) -> None:
    """Raise what a caller is to know of an error, unless it is to know it as it is."""
    match error:
        case DatabaseAway():
            _drop_connection()
        case (
            peewee.OperationalError()
            | peewee.InterfaceError()
            | psycopg2.OperationalError()
            | psycopg2.InterfaceError()
        ):
            if _code(error) == psycopg2.errorcodes.PROGRAM_LIMIT_EXCEEDED:
                raise NotStorable("PostgreSQL refuses a value (it is too long for an index)") from error
            _drop_connection()
            raise DatabaseAway(f"PostgreSQL is away ({_diagnosis(error)})") from error
        case peewee.DataError() | psycopg2.DataError():
            raise NotStorable(f"PostgreSQL refuses a value ({_diagnosis(error)})") from error
        case peewee.ProgrammingError() | psycopg2.ProgrammingError():
            if _code(error) == psycopg2.errorcodes.UNDEFINED_TABLE:
                raise DatabaseAway("PostgreSQL has no tables yet") from error
        case peewee.InternalError() | psycopg2.InternalError():
            if outage := _OUTAGES.get(_code(error) or ""):
                _drop_connection()
                raise DatabaseAway(f"PostgreSQL {outage}") from error


def _drop_connection() -> None:
    if database.in_transaction():
        return  # the end of the transaction comes through here again
    try:
        database.close()
    except (peewee.PeeweeException, psycopg2.Error):
        pass  # forgotten all the same: closing a dead connection may fail


def _code(error: BaseException) -> str | None:
    return getattr(getattr(error, "orig", error), "pgcode", None)


def _diagnosis(error: BaseException) -> str:
    """Name the failure without the server's message, which may repeat parameters."""
    cause = getattr(error, "orig", error)
    code = _code(error)
    return f"{type(cause).__name__} {code}" if code else type(cause).__name__


@contextmanager
def reading() -> Iterator[None]:
    """Let peewee's own queries run in the block, with the same errors as `rows`."""
    with _dropping_dead_connections:
        yield
