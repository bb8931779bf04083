"""Applies the migrations that the database lacks: the ``release`` process.

Two may start at once: PostgreSQL's advisory lock lets one through, the other then finds nothing to do. yoyo's own lock
is a row that a killed process leaves behind; under the advisory lock such a row is nobody's, and is broken.

An index of a table that may be large is built beside the fleet that runs, ``CONCURRENTLY``. A release that is killed
meanwhile leaves an index that serves nobody and is not built again; the next one drops it first.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg2
from yoyo import get_backend, read_migrations

import settings

log = logging.getLogger("migrations")

_LOCK = 0x6D6967726174
#: How often a release looks whether another has ended.
_PAUSE = timedelta(milliseconds=200)
_BUILT_BESIDE_THE_FLEET = re.compile(r"CREATE INDEX CONCURRENTLY IF NOT EXISTS (\w+)")


def migrate(database_url: str) -> list[str]:
    """Bring the database up to date and return the ids of the migrations that were applied."""
    with closing(psycopg2.connect(database_url)) as connection:
        while not _has_lock(connection):
            connection.rollback()
            time.sleep(_PAUSE.total_seconds())
        return _apply(database_url)


def _has_lock(connection: Any) -> bool:
    """Ask for the lock once, for the length of the transaction that this begins.

    Who waits for it within one statement is waited for by an index that is being built, and that index by who waits.
    """
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", (_LOCK,))
        return bool(cursor.fetchone()[0])


def _apply(database_url: str) -> list[str]:
    with get_backend(database_url) as backend:
        backend.break_lock()
        # yoyo takes every module of the directory for a migration, this one too.
        written = read_migrations(str(Path(__file__).parent)).filter(lambda migration: migration.path.endswith(".sql"))
        missing = backend.to_apply(written)
        texts = [Path(migration.path).read_text("utf-8") for migration in missing]
        _drop_unfinished(database_url, _BUILT_BESIDE_THE_FLEET.findall("".join(texts)))
        with backend.lock():
            backend.apply_migrations(missing)
        return [migration.id for migration in missing]


def _drop_unfinished(database_url: str, indexes: list[str]) -> None:
    with closing(psycopg2.connect(database_url)) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        for index, table in _unfinished(cursor, indexes):
            # PostgreSQL goes on building for a client that was killed: nobody else can have this lock meanwhile.
            cursor.execute(f"BEGIN; LOCK TABLE {table} IN SHARE UPDATE EXCLUSIVE MODE; COMMIT")
            if _unfinished(cursor, [index]):
                log.info("the index %s was not built to its end: dropped", index)
                cursor.execute(f"DROP INDEX CONCURRENTLY {index}")


def _unfinished(cursor: Any, indexes: list[str]) -> list[tuple[str, str]]:
    cursor.execute(
        """
        SELECT indexrelid::regclass::text, indrelid::regclass::text FROM pg_index
        WHERE NOT indisvalid AND indexrelid IN (SELECT to_regclass(name) FROM unnest(%s::text[]) AS name)
        """,
        (indexes,),
    )
    return list(cursor.fetchall())


def main() -> None:
    """Migrate the database that the settings name."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("yoyo").setLevel(logging.WARNING)
    try:
        configuration = settings.load()
    except settings.SettingsInvalid as invalid:
        sys.exit(str(invalid))
    applied = migrate(configuration.database_url.get_secret_value())
    log.info("applied %s", ", ".join(applied) if applied else "nothing: the database is up to date")


if __name__ == "__main__":
    main()
