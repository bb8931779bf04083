"""What the scheduler claims, in whose turn, and what else falls due."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import support
from support import (
    LEASE,
    NOW,
    WITHIN,
    claim,
    dispatch,
    email_row,
    everything,
    lapse,
    make_due,
    rows,
    seconds_until,
    store,
    table,
)

import models
from models import ClaimedEmail, Route, database, mailboxes, scheduling, turns
from models.scheduling import Dispatch, DueBackup, Pick
from models.turns import Busy, Full

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")

MINUTE = timedelta(minutes=1)
FILE = {"name": "a.pdf", "size": 5, "urlOrId": "https://files.example/a.pdf"}


def fill(mailbox_counts: dict[str, int], **changes: object) -> None:
    """Store so many emails of each mailbox."""
    models.store(
        [
            support.arrival(**{"publisher_message_id": f"{mailbox}-{n}", "from": f"{mailbox}@example.com", **changes})
            for mailbox, count in mailbox_counts.items()
            for n in range(count)
        ],
        publish_within=WITHIN,
    )


def senders(claimed: list[Dispatch]) -> list[str]:
    return [dispatch.mailbox.split("@")[0] for dispatch in claimed]


def wake_due() -> int:
    with scheduling.sweep():
        return scheduling.wake_due()


# Claiming


def test_a_dispatch_leases_the_email_counts_the_attempt_and_carries_what_the_worker_needs() -> None:
    # Given
    id = store()
    # When
    (claimed,) = dispatch()
    # Then
    assert claimed == Dispatch(id, "order-1", "ann@example.com", 1, None, None)
    row = email_row(id)
    assert (row["status"], row["attempt_count"], row["lease_token"]) == ("dispatched", 1, None)
    assert 110 < seconds_until("incoming_emails", "lease_until", "id", id) <= 120
    assert dispatch() == []


def test_mail_with_attachments_takes_the_other_route() -> None:
    plain, attached = store(), store(publisher_message_id="order-2", attachments=[FILE])
    assert [d.incoming_email_id for d in dispatch(Route.ATTACHED)] == [attached]
    assert [d.incoming_email_id for d in dispatch(Route.PLAIN)] == [plain]


@pytest.mark.parametrize("capacity", [0, -3])
def test_without_capacity_nothing_is_claimed(capacity: int) -> None:
    store()
    before = everything()
    assert dispatch(capacity=capacity) == []
    assert everything() == before


def test_no_more_than_the_capacity_is_claimed() -> None:
    fill({"a": 9, "b": 9})
    assert len(dispatch(capacity=7)) == 7
    routes, busy = scheduling.in_flight()
    assert (routes[Route.PLAIN], routes[Route.ATTACHED], sum(busy.sends.values())) == (7, 0, 7)


def test_a_mailbox_never_has_more_than_its_share_in_flight() -> None:
    fill({"a": 9, "b": 1, "c": 9})
    assert Counter(senders(dispatch(share=3))) == {"a": 3, "b": 1, "c": 3}
    _, busy = scheduling.in_flight()
    assert dispatch(share=3, busy=busy) == []
    assert Counter(senders(dispatch(share=4, busy=busy))) == {"a": 1, "c": 1}


def test_no_more_is_locked_than_is_claimed(tables: str) -> None:
    # Given a scheduler that has claimed two and not yet committed
    fill({"a": 20})
    picks = chosen(2)
    with scheduling.sweep():
        assert len(scheduling.claim(Route.PLAIN, picks, capacity=2, lease=LEASE)) == 2
        # Then the others are anybody's
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(unlocked).result(timeout=10) == 18


def chosen(capacity: int, share: int = 100) -> list[Pick]:
    found = turns.candidates(Route.PLAIN, capacity=capacity, share=share, busy=scheduling.in_flight()[1], after="")
    return [Pick(each.id, each.mailbox, None) for each in turns.choose(found, capacity)]


def unlocked() -> int:
    try:
        return len(rows("SELECT 1 FROM incoming_emails FOR UPDATE SKIP LOCKED"))
    finally:
        models.disconnect()


def test_a_paused_mailbox_is_passed_over_until_its_pause_ends() -> None:
    fill({"a": 1, "b": 1})
    mailboxes.pause("A@example.com", MINUTE, why="429")
    assert senders(dispatch()) == ["b"]
    rows("UPDATE mailboxes SET paused_until = now()")
    assert senders(dispatch()) == ["a"]


def test_many_paused_mailboxes_do_not_keep_the_others_from_their_turn() -> None:
    # Given more paused mailboxes with mail than one claim takes turns
    fill({f"a{n:03}": 1 for n in range(400)} | {"z": 1})
    for n in range(400):
        mailboxes.pause(f"a{n:03}@example.com", MINUTE, why="429")
    # Then
    assert senders(dispatch(capacity=4)) == ["z"]


def test_many_full_mailboxes_do_not_keep_the_others_from_their_turn() -> None:
    fill({f"a{n:03}": 2 for n in range(300)} | {"z": 1})
    dispatch(capacity=300, share=1)
    _, busy = scheduling.in_flight()
    assert senders(dispatch(capacity=4, share=1, busy=busy)) == ["z"]


def test_a_mailbox_that_refused_is_probed_by_one_email_at_a_time() -> None:
    fill({"a": 5})
    mailboxes.refuse("a@example.com", why="403", first_wait=NOW, longest_wait=NOW)
    assert len(dispatch()) == 1
    _, busy = scheduling.in_flight()
    assert dispatch(busy=busy) == []


def test_turns_begin_after_the_mailbox_that_was_served_last_and_wrap_around() -> None:
    fill({"a": 2, "b": 2, "c": 2, "d": 2})
    assert senders(dispatch(capacity=2, share=1, after="b@example.com")) == ["c", "d"]
    _, busy = scheduling.in_flight()
    assert senders(dispatch(capacity=2, share=1, busy=busy, after="d@example.com")) == ["a", "b"]
    _, busy = scheduling.in_flight()
    assert sorted(senders(dispatch(capacity=9, share=2, busy=busy, after="c@example.com"))) == ["a", "b", "c", "d"]


def test_claims_come_in_the_order_of_turns_so_that_the_last_one_is_the_cursor() -> None:
    names = [f"m{n:02}" for n in range(60)]
    fill(dict.fromkeys(names, 2))
    assert senders(dispatch(capacity=40, share=1)) == names[:40]
    assert senders(dispatch(capacity=40, share=1, after="m39@example.com")) == names[40:] + names[:20]


def test_wrapping_around_does_not_change_the_callers_counts() -> None:
    fill({"a": 2, "b": 2})
    busy = Busy({}, {})
    dispatch(busy=busy, after="a@example.com")
    assert busy == Busy({}, {})


def test_one_backlog_does_not_delay_another_mailbox() -> None:
    fill({"a": 200})
    fill({"b": 1})
    assert "b" in senders(dispatch(capacity=8, share=4))


def test_mail_that_is_not_yet_due_is_left_alone() -> None:
    store(publisher_message_id="later", send_at=(datetime.now(UTC) + MINUTE).isoformat())
    id = store(publisher_message_id="retried")
    claim(id).retry(MINUTE, "503")
    before = everything()
    assert dispatch() == []
    assert wake_due() == 0
    assert everything() == before


def test_due_mail_is_woken_once() -> None:
    id = store()
    claim(id).retry(MINUTE, "503")
    make_due(id)
    assert (wake_due(), wake_due()) == (1, 0)
    assert [(d.incoming_email_id, d.attempt) for d in dispatch()] == [(id, 2)]


def test_mail_in_doubt_is_dispatched_again_without_a_new_attempt() -> None:
    id = store()
    claim(id).mark_in_doubt(look_again_in=NOW, evidence={"seen": "timeout"})
    make_due(id)
    wake_due()
    assert [d.attempt for d in dispatch()] == [1]
    assert email_row(id)["status"] == "dispatched"


def schedule_once(capacity: int = 25) -> int:
    """Sweep as the actor does; return how many were claimed."""
    picks = chosen(capacity, share=4)
    with scheduling.sweep():
        routes, _ = scheduling.in_flight()
        return len(scheduling.claim(Route.PLAIN, picks, capacity=capacity - routes[Route.PLAIN], lease=LEASE))


def in_a_thread(capacity: int = 25) -> int:
    try:
        return sum(schedule_once(capacity) for _ in range(10))
    finally:
        models.disconnect()


def test_two_schedulers_at_once_never_exceed_the_capacity() -> None:
    fill({f"m{n}": 10 for n in range(10)})
    with ThreadPoolExecutor(4) as threads:
        claimed = sum(threads.map(in_a_thread, [25] * 4))
    assert claimed == 25
    assert scheduling.in_flight()[0][Route.PLAIN] == 25


def test_a_scheduler_waits_for_another_and_then_counts_what_that_has_claimed() -> None:
    # Given a scheduler that has claimed and not yet committed
    fill({f"m{n}": 10 for n in range(10)})
    picks = chosen(25, share=4)
    with ThreadPoolExecutor(1) as threads:
        with scheduling.sweep():
            scheduling.claim(Route.PLAIN, picks, capacity=25, lease=LEASE)
            # When another begins
            other = threads.submit(in_a_thread)
            support.wait_until("it waits", lambda: other.done() or waits_for_the_lock())
            assert not other.done()
        # Then
        assert other.result(timeout=10) == 0


def waits_for_the_lock() -> bool:
    return bool(rows("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))


# The cost of a claim


@pytest.fixture
def backlog(database: str) -> None:
    """100,000 waiting emails of 1,000 mailboxes, beside as many not yet due and twice as many that are done."""
    rows(
        """
        INSERT INTO incoming_emails (id, publisher_message_id, payload, content_hash, status, route, mailbox,
                                     recipient_count, next_attempt_at)
        SELECT gen_random_uuid(), n::text, '{}', '', CASE WHEN mod(n, 2) = 0 THEN 'received' ELSE 'processed' END,
               'no-attachment', 'm' || lpad((mod(n / 2, 1000))::text, 4, '0') || '@example.com', 1,
               CASE WHEN mod(n, 4) = 2 THEN now() + interval '1 hour' END
        FROM generate_series(1, 400000) AS n
        """
    )
    rows("ANALYZE")


@contextmanager
def explained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the plans of what is executed in the block: those for the values given, and those for any."""
    plans: list[str] = []
    execute = database.execute_sql

    def explain(sql: str, parameters: object = None) -> object:
        if sql.startswith("EXECUTE"):
            for mode in ("force_custom_plan", "force_generic_plan"):
                execute(f"SET plan_cache_mode = {mode}")
                plan = execute("EXPLAIN " + sql, parameters).fetchall()
                plans.append("\n".join(line for (line,) in plan))
            execute("RESET plan_cache_mode")
        return execute(sql, parameters)

    with monkeypatch.context() as patch:
        patch.setattr(database, "execute_sql", explain)
        yield plans


def test_a_sweep_among_100000_waiting_emails_reads_indexes_alone(
    backlog: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # When 64 are claimed
    with explained(monkeypatch) as plans:
        claimed = dispatch(capacity=64, share=4, after="m0500@example.com")
    # Then
    assert len(claimed) == 64
    assert any("incoming_emails_lanes" in plan for plan in plans)
    assert any("incoming_emails_look_ups" in plan for plan in plans)
    assert "Seq Scan on incoming_emails" not in "\n".join(plans)
    # When only mail without external recipients may go
    with explained(monkeypatch) as plans:
        internal = turns.candidates(Route.PLAIN, capacity=64, share=4, busy=Busy({}, {}), after="", external_from=1)
    # Then
    assert internal == []
    assert all("incoming_emails_internal_lanes" in plan for plan in plans)
    assert "Seq Scan on incoming_emails" not in "\n".join(plans)
    # When the rest of a sweep is done
    with explained(monkeypatch) as plans, scheduling.sweep():
        scheduling.due()
        scheduling.agenda()
        scheduling.expire_leases()
        scheduling.expire_overdue(WITHIN)
        scheduling.wake_due()
        _, busy = scheduling.in_flight()
        scheduling.claim_backups(concurrency=8, share=4, busy=busy, lease=LEASE)
        scheduling.next_due_in(datetime.now(UTC))
    # Then
    assert len(plans) >= 8
    assert "Seq Scan on incoming_emails" not in "\n".join(plans)


# Expiry


def test_mail_that_is_overdue_expires_with_one_event_and_is_never_dispatched() -> None:
    # Given
    id = store(expires_at=(datetime.now(UTC) + MINUTE).isoformat())
    rows("UPDATE incoming_emails SET expires_at = now()")
    # When
    with scheduling.sweep():
        (event,) = scheduling.expire_overdue(WITHIN)
        assert scheduling.expire_overdue(WITHIN) == []
    # Then
    assert (event.type, event.incoming_email_id) == ("SendEmailExpired", id)
    assert event.id in {row["id"] for row in table("outbox_events")}
    assert email_row(id)["status"] == "expired"
    assert dispatch() == []


def test_mail_in_a_workers_hands_does_not_expire() -> None:
    id = store(expires_at=(datetime.now(UTC) + MINUTE).isoformat())
    claim(id)
    rows("UPDATE incoming_emails SET expires_at = now()")
    with scheduling.sweep():
        assert scheduling.expire_overdue(WITHIN) == []
    assert email_row(id)["status"] == "processing"


# What there is to do


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE incoming_emails SET next_attempt_at = {at}",
        "UPDATE incoming_emails SET status = 'dispatched', lease_until = {at}",
        "UPDATE incoming_emails SET status = 'received', expires_at = {at}",
        "UPDATE sent_emails SET backup_due_at = NULL, backup_lease_until = {at}",
    ],
)
def test_a_sweep_takes_back_whatever_is_over_and_nothing_before(statement: str) -> None:
    # Given an email that is done
    claim(store()).record_sent(backup_delay=NOW, publish_within=WITHIN)
    assert not scheduling.due().to_take_back
    # When something of it is over in a minute, then now
    rows(statement.format(at="now() + interval '1 minute'"))
    assert not scheduling.due().to_take_back
    rows(statement.format(at="now()"))
    # Then
    assert scheduling.due().to_take_back


def test_events_are_left_over_when_their_writers_time_is_over() -> None:
    store()
    assert not scheduling.due().events
    rows("UPDATE outbox_events SET claimed_until = now()")
    assert scheduling.due().events
    rows("UPDATE outbox_events SET published_at = now()")
    assert not scheduling.due().events


def test_the_agenda_says_for_what_it_is_worth_asking() -> None:
    # Given nothing
    assert scheduling.agenda() == ({*()}, {*()}, False, ({*()}, None), {})
    # When mail of one route waits, mail of the other is in doubt, and a backup is due
    claim(store(publisher_message_id="sent")).record_sent(backup_delay=NOW, publish_within=WITHIN)
    store()
    doubted = store(publisher_message_id="doubted", attachments=[FILE])
    rows("UPDATE incoming_emails SET status = 'processing' WHERE id = %(id)s", {"id": doubted})
    # Then
    assert scheduling.agenda()[:3] == ({Route.PLAIN}, {Route.ATTACHED}, True)
    # When none of it can be done now
    rows("UPDATE incoming_emails SET lease_until = now() + interval '1 minute'")
    rows("UPDATE sent_emails SET backup_due_at = now() + interval '1 minute'")
    # Then
    assert scheduling.agenda()[:3] == ({*()}, {*()}, False)


def test_the_agenda_costs_no_more_where_much_waits_than_where_it_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a plan that was made while nothing waited, and a backlog that has come since
    rows("ANALYZE")
    scheduling.agenda()
    rows(
        """
        INSERT INTO incoming_emails (id, publisher_message_id, payload, content_hash, status, route, mailbox,
                                     recipient_count)
        SELECT gen_random_uuid(), n::text, '{}', '', 'received', 'no-attachment', 'ann@example.com', 1
        FROM generate_series(1, 5000) AS n
        """
    )
    # When
    plans: list[str] = []
    execute = database.execute_sql

    def explain(sql: str, parameters: object = None) -> object:
        plans.append("\n".join(line for (line,) in execute("EXPLAIN ANALYZE " + sql, parameters).fetchall()))
        return execute(sql, parameters)

    with monkeypatch.context() as patch:
        patch.setattr(database, "execute_sql", explain)
        agenda = scheduling.agenda()
    # Then
    assert agenda.to_send == {Route.PLAIN}
    (plan,) = plans
    assert max(map(int, re.findall(r"actual time=\S+ rows=(\d+)", plan))) <= len(Route), plan


def test_the_agenda_says_what_binds() -> None:
    rows("INSERT INTO mailboxes (mailbox, full_until, full_from) VALUES ('*', now() + interval '1 minute', 3)")
    rows("INSERT INTO routes (route, paused_until) VALUES ('attachment', now() + interval '1 minute')")
    rows("INSERT INTO fleet_limits (name, value) VALUES ('backup_concurrency', 2)")
    assert scheduling.agenda()[3:] == (({Route.ATTACHED}, 3), {"backup_concurrency": 2})


# What is due next


def test_nothing_is_due_where_nothing_waits() -> None:
    store()
    rows("UPDATE outbox_events SET published_at = now()")
    assert scheduling.next_due_in(datetime.now(UTC)) is None


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE incoming_emails SET next_attempt_at = {at}",
        "UPDATE incoming_emails SET status = 'dispatched', lease_until = {at}",
        "UPDATE incoming_emails SET expires_at = {at}",
        "UPDATE outbox_events SET published_at = NULL, claimed_until = {at}",
        "INSERT INTO mailboxes (mailbox, paused_until) VALUES ('ann@example.com', {at})",
        "UPDATE sent_emails SET backup_due_at = {at}",
        "UPDATE sent_emails SET backup_due_at = now() - interval '1 hour', backup_lease_until = {at}",
    ],
)
def test_the_scheduler_wakes_for_whatever_falls_due(statement: str) -> None:
    # Given an email that is done, and one thing that falls due in an hour
    id = store()
    claim(id).record_sent(backup_delay=NOW, publish_within=WITHIN)
    rows("UPDATE outbox_events SET published_at = now()")
    rows("UPDATE sent_emails SET backup_due_at = NULL")
    if "expires_at" in statement:
        rows("UPDATE incoming_emails SET status = 'received'")
    assert scheduling.next_due_in(datetime.now(UTC)) is None
    # When
    rows(statement.format(at="now() + interval '1 hour'"))
    # Then
    due_in = scheduling.next_due_in(datetime.now(UTC))
    assert due_in is not None
    assert timedelta(minutes=59) < due_in <= timedelta(minutes=60)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE sent_emails SET backup_due_at = now()",
        "INSERT INTO mailboxes (mailbox, paused_until) VALUES ('ann@example.com', now())",
    ],
)
def test_what_falls_due_while_a_sweep_runs_is_not_slept_through(statement: str) -> None:
    # Given a sweep that has begun
    claim(store()).record_sent(backup_delay=MINUTE, publish_within=WITHIN)
    with scheduling.sweep() as swept_at:
        pass
    # When something falls due that it no longer sees
    rows(statement)
    # Then it is due at once
    due_in = scheduling.next_due_in(swept_at)
    assert due_in is not None
    assert due_in <= timedelta(0)


# Taking back


def test_what_could_not_be_published_is_claimed_again_without_an_attempt_spent() -> None:
    # Given
    sent, plain = store(publisher_message_id="sent"), store(publisher_message_id="plain")
    claim(sent).record_sent(backup_delay=NOW, publish_within=WITHIN)
    lapse(plain)
    dispatches, backups = dispatch(), claim_backups()
    assert [backup.attempt for backup in backups] == [1]
    # When
    scheduling.take_back(dispatches, backups)
    with scheduling.sweep():
        scheduling.expire_leases()
    # Then
    assert [(d.incoming_email_id, d.attempt) for d in dispatch()] == [(plain, 1)]
    assert claim_backups() == [DueBackup(sent, 1, "ann@example.com", True)]


def test_what_a_worker_has_claimed_meanwhile_is_not_taken_back() -> None:
    id = store()
    dispatches = dispatch()
    assert ClaimedEmail.claim(id, 1, route=Route.PLAIN, lease=LEASE, intent=True)
    before = everything()
    scheduling.take_back(dispatches, [])
    assert everything() == before


# Backups


def claim_backups(concurrency: int = 100, share: int = 100) -> list[DueBackup]:
    with scheduling.sweep():
        scheduling.expire_backup_leases()
        _, busy = scheduling.in_flight()
        return scheduling.claim_backups(concurrency=concurrency, share=share, busy=busy, lease=LEASE)[0]


def sent_many(count: int, sender: str = "ann@example.com") -> list[str]:
    ids = [store(publisher_message_id=f"{sender}-{n}", **{"from": sender}) for n in range(count)]
    for id in ids:
        claim(id).record_sent(backup_delay=NOW, publish_within=WITHIN)
    return ids


def test_due_backups_are_leased_up_to_the_concurrency_of_the_fleet() -> None:
    ids = sent_many(5)
    first = claim_backups(concurrency=3)
    assert [backup.incoming_email_id for backup in first] == ids[:3]
    assert claim_backups(concurrency=3) == []
    assert len(claim_backups(concurrency=4)) == 1


def test_backups_that_end_are_followed_by_several_together() -> None:
    # Given as many in flight as may be, and others behind them
    sent_many(20)
    in_flight = claim_backups(concurrency=16)
    assert len(in_flight) == 16
    # When one of them ends, and then another
    followed_by = []
    for backup in in_flight[:2]:
        rows(
            "UPDATE sent_emails SET backup_lease_until = NULL, backup_due_at = NULL WHERE incoming_email_id = %(id)s",
            {"id": backup.incoming_email_id},
        )
        followed_by.append(len(claim_backups(concurrency=16)))
    # Then
    assert followed_by == [0, 2]


def test_backups_of_a_paused_mailbox_and_backups_not_yet_due_wait() -> None:
    sent_many(1)
    mailboxes.pause("ann@example.com", MINUTE, why="429")
    assert claim_backups() == []
    rows("UPDATE mailboxes SET paused_until = NULL")
    rows("UPDATE sent_emails SET backup_due_at = now() + interval '1 hour'")
    assert claim_backups() == []


def test_a_backup_whose_worker_died_is_leased_again_by_the_sweep_that_sees_it() -> None:
    (id,) = sent_many(1)
    claim_backups()
    assert models.ClaimedBackup.claim([(id, 1)], lease=LEASE)
    rows("UPDATE sent_emails SET backup_lease_until = now()")
    assert claim_backups() == [DueBackup(id, 2, "ann@example.com", True)]


def test_a_mailbox_never_has_more_than_its_share_of_backups_in_flight() -> None:
    ann, ben = sent_many(4), sent_many(1, "ben@example.com")
    assert [backup.incoming_email_id for backup in claim_backups(share=2)] == [*ann[:2], *ben]
    assert claim_backups(share=2) == []
    rows("UPDATE sent_emails SET backup_due_at = NULL, backup_lease_until = NULL WHERE backup_lease_until IS NOT NULL")
    assert [backup.incoming_email_id for backup in claim_backups(share=2)] == ann[2:]


def test_a_backlog_of_backups_that_must_wait_is_met_once_and_then_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given more backups of a paused and of a busy mailbox than one sweep meets, all due before another's
    monkeypatch.setattr(scheduling, "_BACKUPS_MET", 3)
    paused, busy, (last,) = sent_many(4), sent_many(7, "ben@example.com"), sent_many(1, "zoe@example.com")
    mailboxes.pause("ann@example.com", MINUTE, why="429")
    # When
    claimed, more = [], True
    while more:
        with scheduling.sweep():
            _, busy_now = scheduling.in_flight()
            backups, more = scheduling.claim_backups(concurrency=9, share=2, busy=busy_now, lease=LEASE)
        claimed += [backup.incoming_email_id for backup in backups]
    # Then
    assert claimed == [*busy[:2], last]
    for id in paused:
        assert 50 < seconds_until("sent_emails", "backup_due_at", "incoming_email_id", id) <= 60


def test_backups_wait_while_their_mailbox_may_make_no_requests() -> None:
    ids = sent_many(1)
    turns.note_full({"ann@example.com": Full(MINUTE, "limit: requests")})
    assert claim_backups() == []
    rows("UPDATE mailboxes SET full_reason = 'limit: sends'")
    rows("UPDATE sent_emails SET backup_due_at = now()")
    assert [backup.incoming_email_id for backup in claim_backups()] == ids


def test_a_crowded_backup_waits_longer_the_longer_its_mailbox_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_BACKUPS_MET", 3)
    monkeypatch.setattr(scheduling, "_CLAIM_BACKUPS", scheduling._CLAIM_BACKUPS.replace("64", "3"))
    sent_many(4)
    rows("UPDATE sent_emails SET sent_at = now() - interval '1 hour'")
    claim_backups(share=1)
    ((wait,),) = rows("SELECT max(backup_due_at) - now() FROM sent_emails WHERE backup_lease_until IS NULL")
    assert timedelta(minutes=2) < wait <= timedelta(minutes=3)


def test_backups_that_an_operators_pause_holds_back_are_looked_at_again() -> None:
    (id,) = sent_many(1)
    mailboxes.pause_by_hand("ann@example.com", why="holiday", who="olga")
    assert claim_backups() == []
    assert 800 < seconds_until("sent_emails", "backup_due_at", "incoming_email_id", id) <= 900


def test_a_claim_of_backups_reads_the_index_of_due_ones_and_no_settled_mail(
    backlog: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given 100,000 emails that are sent, of which 20,000 are due for their backup
    rows(
        """
        INSERT INTO sent_emails (id, incoming_email_id, status, intent_at, backup_due_at)
        SELECT gen_random_uuid(), id, 'sent', now(), CASE WHEN mod(publisher_message_id::int, 5) = 0 THEN now() END
        FROM incoming_emails WHERE status = 'processed' AND publisher_message_id::int <= 200000
        """
    )
    rows("ANALYZE")
    # When
    with explained(monkeypatch) as plans:
        assert len(claim_backups(concurrency=8)) == 8
    # Then
    assert not {"Seq Scan on sent_emails", "Seq Scan on incoming_emails"} & set(
        re.findall(r"Seq Scan on \w+", str(plans))
    )
    assert "sent_emails_backup_due" in plans[-1]


def test_what_a_worker_has_begun_meanwhile_keeps_its_lease() -> None:
    sent_many(1)
    (backup,) = claim_backups()
    assert models.ClaimedBackup.claim([(backup.incoming_email_id, backup.attempt)], lease=LEASE)
    before = everything()
    scheduling.take_back([], [backup])
    assert everything() == before
