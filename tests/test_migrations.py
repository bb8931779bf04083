"""The database's history: it applies to any database, once, whoever dies on the way, and the models describe it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import peewee
import psycopg2
import pytest
import support

import models
from migrations.__main__ import migrate
from models import rows
from models.tables import TABLES
from sandbox.world import new_database

shared_database, tables = support.shared_database, support.tables
ROOT = Path(__file__).resolve().parent.parent
FIRST = "0001.schema"


@pytest.fixture
def empty_database(servers: dict[str, str]) -> Iterator[str]:
    with ExitStack() as stack:
        yield new_database(servers["DATABASE_URL"], stack)


def ask(url: str, sql: str) -> list[tuple[Any, ...]]:
    connection = psycopg2.connect(url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def applied(url: str) -> list[str]:
    return [id for (id,) in ask(url, "SELECT migration_id FROM _yoyo_migration ORDER BY 1")]


def release(url: str) -> subprocess.Popen[str]:
    """Start the process type ``release``."""
    return subprocess.Popen(
        [sys.executable, "-m", "migrations"],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": url},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_sql_file_and_nothing_else_is_applied_to_an_empty_database(empty_database: str) -> None:
    files = sorted(path.stem for path in (ROOT / "migrations").glob("*.sql"))
    assert migrate(empty_database) == files
    assert applied(empty_database) == files


def test_applying_twice_changes_nothing(empty_database: str) -> None:
    migrate(empty_database)
    assert migrate(empty_database) == []


def test_what_is_in_the_tables_stays_there_even_if_a_migration_has_to_run_again(empty_database: str) -> None:
    # Given a filled database whose first migration ran, but was not marked before its process was killed
    migrate(empty_database)
    ask(
        empty_database,
        """
        INSERT INTO incoming_emails (id, publisher_message_id, payload, content_hash, route, mailbox, recipient_count)
        VALUES (gen_random_uuid(), 'order-1', '{}', '', 'attachment', 'ann@example.com', 1)
        """,
    )
    ask(empty_database, "DELETE FROM _yoyo_migration")
    # When
    assert FIRST in migrate(empty_database)
    # Then
    assert ask(empty_database, "SELECT publisher_message_id FROM incoming_emails") == [("order-1",)]


def test_processes_that_start_at_once_apply_each_migration_once(empty_database: str) -> None:
    # When
    processes = [release(empty_database) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in processes]
    # Then
    assert [process.returncode for process in processes] == [0, 0], said
    assert sorted("nothing" in line for line in said) == [False, True]
    assert FIRST in applied(empty_database)


def test_the_lock_row_of_a_killed_process_is_broken(empty_database: str) -> None:
    migrate(empty_database)
    ask(empty_database, "INSERT INTO yoyo_lock (locked, ctime, pid) VALUES (1, now(), 999999)")
    ask(empty_database, "DELETE FROM _yoyo_migration")
    assert FIRST in migrate(empty_database)
    assert ask(empty_database, "SELECT * FROM yoyo_lock") == []


def test_a_release_that_is_killed_while_it_waits_hinders_nobody(empty_database: str) -> None:
    # Given a release that waits for another, and is killed
    connection = psycopg2.connect(empty_database)
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", (0x6D6967726174,))
        waiting = release(empty_database)
        support.wait_until("it waits", lambda: asks(empty_database, "ROLLBACK"))
        waiting.send_signal(signal.SIGKILL)
        waiting.communicate(timeout=10)
    connection.close()
    # Then
    assert FIRST in migrate(empty_database)


def asks(url: str, statement: str) -> bool:
    """Whether somebody's last statement was like that."""
    like = f"query ILIKE '{statement}' AND pid <> pg_backend_pid() AND datname = current_database()"
    return bool(ask(url, f"SELECT 1 FROM pg_stat_activity WHERE {like}"))


# Beside a fleet that runs

#: A migration that builds an index of a table which may be large, and the index.
INDEXING, INDEX = "0012.finding", "incoming_emails_outcomes"
STORE = """
    INSERT INTO incoming_emails (id, publisher_message_id, payload, content_hash, route, mailbox, recipient_count)
    VALUES (gen_random_uuid(), gen_random_uuid()::text, '{}', '', 'attachment', 'ann@example.com', 1)
"""


def test_mail_is_stored_while_an_index_is_built(empty_database: str) -> None:
    # Given a database that lacks an index, and a transaction that has stored a mail and goes on
    migrate(empty_database)
    ask(empty_database, f"DELETE FROM _yoyo_migration WHERE migration_id = '{INDEXING}'; DROP INDEX {INDEX}")
    connection = psycopg2.connect(empty_database)
    with connection, connection.cursor() as cursor:
        cursor.execute(STORE)
        # When the index is built
        building = release(empty_database)
        support.wait_until("it is built", lambda: asks(empty_database, "CREATE INDEX%"))
        # Then others store mail
        ask(empty_database, f"SET lock_timeout = '2s'; {STORE}")
    connection.close()
    assert (building.communicate(timeout=60)[1], building.returncode) == (f"applied {INDEXING}\n", 0)
    assert valid(empty_database)


def test_an_index_whose_building_was_broken_off_is_built_anew(empty_database: str) -> None:
    migrate(empty_database)
    ask(empty_database, f"DELETE FROM _yoyo_migration WHERE migration_id = '{INDEXING}'")
    ask(empty_database, f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{INDEX}'::regclass")
    assert migrate(empty_database) == [INDEXING]
    assert valid(empty_database)


def valid(url: str) -> bool:
    return ask(url, f"SELECT indisvalid FROM pg_index WHERE indexrelid = '{INDEX}'::regclass") == [(True,)]


@pytest.mark.parametrize("path", sorted((ROOT / "migrations").glob("*.sql"))[5:], ids=lambda path: path.name)
def test_an_index_of_a_table_that_may_be_large_is_built_beside_the_fleet(path: Path) -> None:
    sql = path.read_text()
    new = set(re.findall(r"CREATE TABLE IF NOT EXISTS (\w+)", sql))
    indexes = re.findall(r"CREATE (?:UNIQUE )?INDEX (.*?)IF NOT EXISTS \w+ ON (\w+)", sql)
    beside = [table for how, table in indexes if how == "CONCURRENTLY "]
    assert {table for _, table in indexes} - new == set(beside)
    assert ("-- transactional: false" in sql) == bool(beside)


# Old and new versions side by side

#: What the version before may not bear: something gone, renamed, of another type, or asked for that it does not write.
TAKES_AWAY = re.compile(
    r"DROP\s+(TABLE|COLUMN|SCHEMA|TYPE|VIEW)|RENAME\s+(TO|COLUMN|CONSTRAINT)|ALTER\s+(COLUMN\s+)?\w+\s+(SET\s+DATA\s+)?TYPE"
    r"|SET\s+NOT\s+NULL|DROP\s+DEFAULT|TRUNCATE|DELETE\s+FROM|CREATE\s+(UNIQUE\s+INDEX|TRIGGER|RULE)"
    r"|ADD\s+(CONSTRAINT|CHECK|UNIQUE|FOREIGN\s+KEY|PRIMARY\s+KEY|EXCLUDE)"
    r"|ADD\s+COLUMN\s+(IF\s+NOT\s+EXISTS\s+)?\w+[^,;]*NOT\s+NULL(?![^,;]*\b(DEFAULT|GENERATED)\b)(?<!DEFAULT)",
    re.IGNORECASE,
)


def taken_away(sql: str) -> list[str]:
    statements = re.sub(r"--.*", "", sql).split(";")
    return [statement.strip() for statement in statements if TAKES_AWAY.search(statement)]


def test_migrations_only_add() -> None:
    for path in sorted((ROOT / "migrations").glob("*.sql")):
        assert taken_away(path.read_text()) == [], path.name


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE dlq",
        "ALTER TABLE dlq DROP COLUMN IF EXISTS reason",
        "ALTER TABLE dlq RENAME COLUMN reason TO cause",
        "ALTER TABLE dlq ALTER COLUMN attempts TYPE bigint",
        "ALTER TABLE dlq ALTER COLUMN reason SET NOT NULL",
        "ALTER TABLE dlq ADD COLUMN IF NOT EXISTS cause text NOT NULL",
        "ALTER TABLE dlq ADD CONSTRAINT dlq_reason CHECK (reason <> '')",
        "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS dlq_once ON dlq (incoming_email_id)",
    ],
)
def test_a_migration_that_takes_something_away_would_be_found(sql: str) -> None:
    assert taken_away(f"{sql};") == [sql]


def test_a_migration_that_adds_a_column_with_a_default_is_no_fault() -> None:
    assert taken_away("ALTER TABLE dlq ADD COLUMN cause text NOT NULL DEFAULT '';") == []


def test_no_table_asks_the_version_that_first_had_it_for_a_column_that_it_does_not_write(empty_database: str) -> None:
    # Given what each table asks for once all migrations have run
    migrate(empty_database)
    required = ask(
        empty_database,
        """
        SELECT table_name, column_name FROM information_schema.columns
        WHERE table_schema = 'public' AND is_nullable = 'NO' AND column_default IS NULL AND is_identity = 'NO'
          AND is_generated = 'NEVER' AND table_name NOT LIKE '%yoyo%'
        """,
    )
    # Then it asked for that from its beginning
    for table, column in required:
        assert re.search(rf"^    {column}\s", created(table), re.MULTILINE), (table, column)


def created(table: str) -> str:
    """The statement that makes a table."""
    history = "".join(path.read_text() for path in sorted((ROOT / "migrations").glob("*.sql")))
    found = re.search(rf"CREATE TABLE IF NOT EXISTS {table} \((.*?)^\)", history, re.MULTILINE | re.DOTALL)
    assert found, table
    return found[1]


# The models describe the schema

TYPES = {
    peewee.UUIDField: "uuid",
    peewee.TextField: "text",
    peewee.BooleanField: "boolean",
    peewee.SmallIntegerField: "smallint",
    peewee.IntegerField: "integer",
    peewee.BigIntegerField: "bigint",
    peewee.BooleanField: "boolean",
    models.tables.TimestampField: "timestamp with time zone",
    models.tables.JsonTextField: "json",
    models.tables.JsonField: "jsonb",
    models.tables.ByteaField: "bytea",
}


def described(model: type[peewee.Model]) -> set[tuple[str, str, bool]]:
    fields = model._meta.sorted_fields
    return {(field.column_name, TYPES[_kind(field)], field.null) for field in fields}


def _kind(field: peewee.Field) -> type[peewee.Field]:
    return type(field.rel_field) if isinstance(field, peewee.ForeignKeyField) else type(field)


@pytest.mark.parametrize("model", TABLES, ids=lambda model: model._meta.table_name)
def test_each_model_has_the_columns_types_and_nulls_of_its_table(model: type[peewee.Model], tables: str) -> None:
    columns = rows(
        """
        SELECT column_name, data_type, is_nullable = 'YES' FROM information_schema.columns
        WHERE table_schema = 'public' AND table_name = %(table)s
        """,
        {"table": model._meta.table_name},
    )
    assert described(model) == set(columns)


@pytest.mark.parametrize("model", TABLES, ids=lambda model: model._meta.table_name)
def test_each_model_has_the_unique_and_foreign_keys_of_its_table(model: type[peewee.Model], tables: str) -> None:
    keys = rows(
        """
        SELECT c.contype, a.attname FROM pg_constraint c JOIN pg_attribute a ON a.attrelid = c.conrelid
        WHERE a.attnum = ANY(c.conkey) AND c.conrelid = %(table)s::regclass AND c.contype IN ('u', 'f')
          AND (c.contype = 'f' OR cardinality(c.conkey) = 1)
        """,
        {"table": model._meta.table_name},
    )
    fields = model._meta.sorted_fields
    foreign = {("f", field.column_name) for field in fields if isinstance(field, peewee.ForeignKeyField)}
    unique = {("u", field.column_name) for field in fields if field.unique}
    assert foreign | unique == set(keys)


def test_every_table_has_a_model(tables: str) -> None:
    found = rows("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
    ours = {name for (name,) in found if "yoyo" not in name}
    assert ours == {model._meta.table_name for model in TABLES}
