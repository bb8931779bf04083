"""Dead letters: each is one row, found by whatever an operator knows of it, and resolved once."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
import support
from support import NOW, WITHIN, claim, dispatch, email_row, everything, make_due, rows, sending, store, table

import models
from models import backups, dead_letters, inspection, scheduling
from models.database import database
from models.dead_letters import Copy, Filter, Letter

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")

HOUR = timedelta(hours=1)


def failed(publisher_id: str, sender: str = "ann@example.com", reason: str = "invalid_recipient") -> str:
    """An email that was given up; returns its id."""
    id = store(**{"publisher_message_id": publisher_id, "from": sender})
    claim(id).fail(
        reason=reason,
        error="400",
        message_id=f"message of {publisher_id}",
        queue_name="send_plain",
        actor_name="send_plain",
        publish_within=WITHIN,
    )
    return id


def found(limit: int = 100, **fields: object) -> list[str | None]:
    return [letter.publisher_message_id for letter in dead_letters.find_open(Filter(**fields), limit)]  # type: ignore[arg-type]


def letter_of(publisher_id: str) -> Letter:
    letter = dead_letters.find(publisher_id)
    assert letter is not None
    return letter


def test_filters_narrow_and_the_oldest_comes_first() -> None:
    # Given
    id = failed("a", "ann@example.com", "invalid_recipient")
    failed("b", "ben@example.com", "attempts_used_up")
    failed("c", "ann@example.com", "attempts_used_up")
    rows("UPDATE dlq SET created_at = now() - interval '1 day' WHERE incoming_email_id = %(id)s", {"id": id})
    now = datetime.now(UTC)
    # Then
    assert found() == ["a", "b", "c"]
    assert found(limit=2) == ["a", "b"]
    assert found(reason="attempts_used_up") == ["b", "c"]
    assert found(mailbox="Ann@Example.com") == ["a", "c"]
    assert found(mailbox="ann@example.com", reason="attempts_used_up") == ["c"]
    assert found(since=now - HOUR) == ["b", "c"]
    assert found(until=now - HOUR) == ["a"]
    assert found(ids=(id,)) == ["a"]
    assert found(ids=(letter_of("b").id, letter_of("c").id)) == ["b", "c"]
    assert found(ids=(str(uuid.uuid4()),)) == []


def test_a_letter_is_found_by_its_own_id_the_emails_and_the_publishers() -> None:
    id = failed("a")
    letter = letter_of("a")
    assert dead_letters.find(letter.id) == dead_letters.find(id) == letter
    assert dead_letters.find("unknown") is None


def test_of_several_letters_of_an_email_an_open_one_is_meant() -> None:
    # Given an email whose newest letter was resolved, and whose older one was not
    id = failed("a")
    dead_letters.mirror([Copy("m-1", "send_plain", "send_plain", id, "actor_failed", "given up", b"{}")])
    older, newer = dead_letters.find_open(Filter(), 10)
    dead_letters.resolve(newer.id, replayed=False, who="olga")
    # Then
    assert dead_letters.find(id) == older
    assert letter_of(newer.id).status == "discarded"


def test_a_replay_gives_the_attempts_back_and_the_email_is_ready() -> None:
    id = failed("a")
    assert dead_letters.resolve(letter_of("a").id, replayed=True, who="olga")
    row = email_row(id)
    assert (row["status"], row["attempt_count"], row["next_attempt_at"]) == ("received", 0, None)
    letter = letter_of("a")
    assert (letter.status, letter.resolved_by) == ("replayed", "olga")
    assert letter.resolved_at is not None
    assert found() == []
    assert [d.incoming_email_id for d in dispatch()] == [id]


def test_a_discarded_letter_leaves_the_email_failed() -> None:
    id = failed("a")
    assert dead_letters.resolve(letter_of("a").id, replayed=False, who="olga")
    assert (email_row(id)["status"], letter_of("a").status) == ("failed", "discarded")


@pytest.mark.parametrize("replayed", [True, False])
def test_a_letter_is_resolved_once_and_the_second_time_changes_nothing(replayed: bool) -> None:
    failed("a")
    letter = letter_of("a")
    assert dead_letters.resolve(letter.id, replayed=replayed, who="olga")
    before = everything()
    assert not dead_letters.resolve(letter.id, replayed=True, who="otto")
    assert not dead_letters.resolve(letter.id, replayed=False, who="otto")
    assert not dead_letters.resolve(str(uuid.uuid4()), replayed=True, who="otto")
    assert everything() == before


def test_of_two_operators_who_replay_at_the_same_time_one_does_it() -> None:
    # Given
    ids = [failed(f"order-{n}") for n in range(20)]
    letters = [letter_of(f"order-{n}").id for n in range(20)]
    start = threading.Barrier(2)

    def replay(who: str) -> int:
        start.wait(10)
        done = sum(dead_letters.resolve(letter, replayed=True, who=who) for letter in letters)
        models.disconnect()
        return done

    # When
    with ThreadPoolExecutor(2) as threads:
        done = sum(threads.map(replay, ["olga", "otto"]))
    # Then
    assert done == 20
    assert {email_row(id)["status"] for id in ids} == {"received"}


def test_the_replay_of_an_email_in_doubt_leaves_it_in_doubt() -> None:
    id = store()
    claim(id).mark_in_doubt(look_again_in=NOW, evidence={"seen": "timeout"})
    make_due(id)
    with scheduling.sweep():
        scheduling.wake_due()
    claim(id).fail(
        reason="in_doubt_held",
        error="absent",
        message_id="m",
        queue_name="send_plain",
        actor_name="send_plain",
        publish_within=WITHIN,
    )
    dead_letters.resolve(letter_of("order-1").id, replayed=True, who="olga")
    assert sending(id) == "in_doubt"
    email = claim(id)
    assert email.in_doubt_for is not None
    assert email.replayed_for is not None


def test_the_replay_of_an_email_that_was_sent_meanwhile_does_not_send_it_again() -> None:
    # Given a letter that RabbitMQ's copy made for an email that another worker has sent
    id = store()
    claim(id).record_sent(backup_delay=NOW, publish_within=WITHIN)
    dead_letters.mirror([Copy("m-1", "send_plain", "send_plain", id, "actor_failed", "given up", b"{}")])
    # When
    assert dead_letters.resolve(letter_of("order-1").id, replayed=True, who="olga")
    # Then
    assert email_row(id)["status"] == "processed"
    assert dispatch() == []


def test_the_replay_of_a_backup_makes_it_due_again() -> None:
    id = store()
    claim(id).record_sent(backup_delay=NOW, publish_within=WITHIN)
    rows("UPDATE sent_emails SET backup_due_at = NULL, backup_attempt_count = 8, backup_error = 'x'")
    dead_letters.mirror([Copy("m-1", "backup", "backup_email", id, "backup_failed", "given up", b"{}")])
    dead_letters.resolve(letter_of("order-1").id, replayed=True, who="olga")
    (sent,) = table("sent_emails")
    assert (sent["backup_attempt_count"], sent["backup_due_at"] is None) == (0, False)
    assert email_row(id)["status"] == "processed"


def test_a_copy_of_an_unknown_message_makes_a_row_once_with_its_body() -> None:
    copy = Copy("m-1", "ingest", None, None, "unreadable", "no actor can read this", b"\x00\xff{")
    assert dead_letters.mirror([copy, copy]) == [copy]
    (letter,) = dead_letters.find_open(Filter(), 10)
    assert (letter.queue_name, letter.incoming_email_id, letter.mailbox) == ("ingest", None, None)
    assert bytes(dead_letters.body_of(letter.id) or b"") == copy.body


def test_a_copy_that_names_an_email_that_is_not_here_is_kept_without_it() -> None:
    dead_letters.mirror([Copy("m-1", "send_plain", "send_plain", str(uuid.uuid4()), "actor_failed", "x", b"")])
    assert table("dlq")[0]["incoming_email_id"] is None


def test_a_message_that_fails_again_after_its_replay_is_a_dead_letter_once_more() -> None:
    # Given a replayed letter, whose message comes again and claims the new attempt
    id = store()
    _fail(id)
    dead_letters.resolve(letter_of("order-1").id, replayed=True, who="olga")
    # When
    _fail(id)
    # Then
    (letter,) = dead_letters.find_open(Filter(), 10)
    assert (letter.incoming_email_id, letter.resolved_by) == (id, None)


def _fail(id: str) -> None:
    claim(id).fail(
        reason="invalid_recipient",
        error="Graph says no",
        message_id="the-same",
        queue_name="send_plain",
        actor_name="send_plain",
        publish_within=WITHIN,
    )


def test_an_id_is_looked_up_in_indexes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[str] = []
    execute = database.execute_sql

    def explain(sql: str, parameters: object = None) -> object:
        plans.append("\n".join(line for (line,) in execute("EXPLAIN " + sql, parameters).fetchall()))
        return execute(sql, parameters)

    # Of tables that are known to have a page each any plan is as cheap.
    execute("UPDATE pg_class SET relpages = 0, reltuples = -1 WHERE relnamespace = 'public'::regnamespace", None)
    monkeypatch.setattr(database, "execute_sql", explain)
    dead_letters.find("order-1")
    backups.find_backup("order-1")
    inspection.find_email("order-1")
    assert len(plans) == 3
    assert [plan for plan in plans if "Seq Scan" in plan or "Filter" in plan] == []
