"""Applies the migrations that the database lacks: the ``release`` process.

Two may start at once: PostgreSQL's advisory lock lets one through, the other then finds nothing to do. yoyo's own lock
is a row that a killed process leaves behind; under the advisory lock such a row is nobody's, and is broken.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import psycopg2
from yoyo import get_backend, read_migrations

import settings

log = logging.getLogger("migrations")

_LOCK = 0x6D6967726174


def migrate(database_url: str) -> list[str]:
    """Bring the database up to date and return the ids of the migrations that were applied."""
    connection = psycopg2.connect(database_url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            return _apply(database_url)
    finally:
        connection.close()


def _apply(database_url: str) -> list[str]:
    with get_backend(database_url) as backend:
        backend.break_lock()
        # yoyo takes every module of the directory for a migration, this one too.
        written = read_migrations(str(Path(__file__).parent)).filter(lambda migration: migration.path.endswith(".sql"))
        missing = backend.to_apply(written)
        with backend.lock():
            backend.apply_migrations(missing)
        return [migration.id for migration in missing]


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
