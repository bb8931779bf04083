"""The connection to PostgreSQL: what happens when it is cut, and that the next statement has another."""

from __future__ import annotations

import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any

import peewee
import psycopg2
import pytest
import support
from support import email_row, store

import models
from models import DatabaseAway, rows, transaction

shared_database, tables = support.shared_database, support.tables


def backend() -> int:
    return int(rows("SELECT pg_backend_pid()")[0][0])


def terminate(url: str, pid: int) -> None:
    """Have the server close a connection, and wait until it has."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        assert cursor.fetchone() == (True,)
    connection.close()


def test_a_connection_that_the_server_closed_meanwhile_is_replaced_and_costs_nobody_a_statement(tables: str) -> None:
    for ask in (lambda: rows("SELECT 1"), store, transact):
        pid = backend()
        terminate(tables, pid)
        ask()
        assert backend() != pid


def transact() -> None:
    with transaction():
        rows("SELECT 1")


def test_what_the_server_says_unasked_costs_no_connection(tables: str) -> None:
    pid = backend()
    notify(tables)
    assert backend() == pid


def notify(url: str) -> None:
    """Have the server send something to everybody who listens, this thread's connection among them."""
    rows("LISTEN everybody")
    connection = psycopg2.connect(url)
    connection.autocommit = True
    connection.cursor().execute("NOTIFY everybody")
    connection.close()


def test_a_connection_that_is_closed_during_a_statement_is_reported_and_replaced(tables: str) -> None:
    pid = backend()
    with pytest.raises(DatabaseAway):
        rows("SELECT pg_terminate_backend(pg_backend_pid()), pg_sleep(5)")
    assert backend() != pid


def test_a_transaction_whose_connection_is_closed_takes_no_effect_and_the_next_one_works(tables: str) -> None:
    # Given
    id = store()

    def fail_in_between() -> None:
        with transaction():
            rows("UPDATE incoming_emails SET mailbox = 'changed'")
            terminate(tables, backend())
            rows("SELECT 1")

    # When
    with pytest.raises(DatabaseAway):
        fail_in_between()
    # Then
    assert not models.database.in_transaction()
    assert email_row(id)["mailbox"] == "ann@example.com"
    with transaction():
        rows("UPDATE incoming_emails SET mailbox = 'changed'")
    assert email_row(id)["mailbox"] == "changed"


def test_a_connection_that_is_closed_before_the_commit_is_reported(tables: str) -> None:
    id = store()

    def fail_at_the_commit() -> None:
        with transaction():
            rows("UPDATE incoming_emails SET mailbox = 'changed'")
            terminate(tables, backend())

    with pytest.raises(DatabaseAway):
        fail_at_the_commit()
    assert email_row(id)["mailbox"] == "ann@example.com"


def test_a_read_only_server_counts_as_away(tables: str) -> None:
    rows("SET default_transaction_read_only = on")
    with pytest.raises(DatabaseAway, match="read-only"):
        store()
    assert email_row(store())["status"] == "received"  # on another connection


def test_a_server_that_cannot_be_reached_counts_as_away_and_no_secret_is_told(tables: str) -> None:
    models.disconnect()
    models.connect("postgresql://ann:hunter2@127.0.0.1:1/mail", "tests")
    with pytest.raises(DatabaseAway) as away:
        rows("SELECT 1")
    assert "hunter2" not in str(away.value)
    models.connect(tables, "tests")
    assert rows("SELECT 1") == [(1,)]


def test_a_statement_that_runs_too_long_counts_as_away(tables: str) -> None:
    rows("SET statement_timeout = '10ms'")
    with pytest.raises(DatabaseAway):
        rows("SELECT pg_sleep(5)")
    assert rows("SHOW statement_timeout") == [("30s",)]


def test_a_transaction_whose_process_stands_still_is_ended_and_counts_as_away(tables: str) -> None:
    # Given
    def stand_still() -> None:
        with transaction():
            pid = backend()
            rows("SET LOCAL idle_in_transaction_session_timeout = '10ms'")
            support.wait_until("the server ends it", lambda: not alive(tables, pid))
            rows("SELECT 1")

    # When
    with pytest.raises(DatabaseAway):
        stand_still()
    # Then
    assert rows("SHOW idle_in_transaction_session_timeout") == [("30s",)]


def alive(url: str, pid: int) -> bool:
    connection = psycopg2.connect(url)
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", (pid,))
        found = cursor.fetchone() is not None
    connection.close()
    return found


def test_the_server_finds_out_within_a_minute_that_a_host_is_gone(tables: str) -> None:
    told = [rows(f"SHOW tcp_keepalives_{name}")[0][0] for name in ("idle", "interval", "count")]
    assert told == ["30", "5", "3"]


def test_a_mistake_of_ours_is_not_taken_for_an_outage(tables: str) -> None:
    pid = backend()
    with pytest.raises(peewee.ProgrammingError):
        rows("SELECT nonsense")
    with pytest.raises(peewee.IntegrityError):
        rows("INSERT INTO audit_log (id, who, action, subject) VALUES (NULL, 'a', 'b', 'c')")
    assert backend() == pid


def test_each_thread_has_its_own_connection(tables: str) -> None:
    pids = {backend()}
    thread = threading.Thread(target=lambda: (pids.add(backend()), models.disconnect()))
    thread.start()
    thread.join()
    assert len(pids) == 2


def test_instants_are_aware_and_in_utc(tables: str) -> None:
    ((now,),) = rows("SELECT now()")
    assert now.utcoffset().total_seconds() == 0


IDS = ["01a21a52-6bf3-7904-b97b-171b2384b74a", "01a21a52-6bf3-7904-b97b-171b2384b74b"]
#: A parameter that occurs twice, an array of another type than text, and what psycopg2 writes as it is.
SUMMED = f"SELECT %(n)s + 1, %(n)s * 2, %(ids)s::uuid[] @> ARRAY['{IDS[0]}'::uuid], now() + %(wait)s > now(), '5%%'"


def summed(n: int) -> tuple[Any, ...]:
    return rows(SUMMED, {"n": n, "ids": IDS, "wait": timedelta(seconds=1)}, prepared=True)[0]


def plans_known() -> int:
    return int(rows("SELECT count(*) FROM pg_prepared_statements")[0][0])


def test_a_prepared_statement_is_planned_once_for_each_connection(tables: str) -> None:
    before = plans_known()
    # When it is run again and again, the first time in a transaction that is undone
    with suppress(ZeroDivisionError), transaction():
        assert summed(1) == (2, 2, True, True, "5%")
        raise ZeroDivisionError
    answers = [summed(n) for n in range(10)]
    # Then each has its own values, and there is one plan
    assert [answer[:2] for answer in answers] == [(n + 1, n * 2) for n in range(10)]
    assert plans_known() == before + 1
    assert rows("SELECT sum(custom_plans) FROM pg_prepared_statements") == [(0,)]
    # And a new connection has to prepare it again
    terminate(tables, backend())
    assert plans_known() == 0
    assert summed(3)[:2] == (4, 6)
    assert plans_known() == 1
