"""Limits and pauses at run time: what stands in the tables, who is told, and what is written down."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import operator_support
import pytest
import support
from operator_support import RUN_TIME_LIMITS, audited, with_run_time_limits
from support import Fleet, email_row, rows, store, table

import operations
import runtime
from limiter import Unavailable, Wanted
from models import mailboxes, scheduling
from operations import EVERY, NotALimit
from sandbox.processes import free_port

shared_database, tables, fleet, limit = support.shared_database, support.tables, support.fleet, support.limit
run_time_limits = operator_support.run_time_limits
pytestmark = pytest.mark.usefixtures("tables", "run_time_limits")

WHO = "tests:olga"
ANN, BO = "ann@example.com", "bo@example.com"
HOUR = timedelta(hours=1)


def full(*names: str) -> None:
    for name in names:
        rows(
            """
            INSERT INTO mailboxes (mailbox, full_until, full_reason)
            VALUES (%(mailbox)s, now() + interval '1 hour', 'sends: 30 per minute')
            """,
            {"mailbox": name},
        )


def waiting_for_budget() -> set[str]:
    return {row["mailbox"] for row in table("mailboxes") if row["full_until"] or row["full_reason"]}


def own(mailbox: str) -> dict[str, int]:
    return {row["mailbox"]: row["limits"] for row in table("mailboxes")}.get(mailbox, {})


def shown(mailbox: str | None, budget: str) -> operations.Limit:
    return next(each for each in operations.limits(mailbox) if each.budget == budget)


# Setting limits


def test_a_limit_that_is_set_stands_is_shown_with_who_set_it_and_is_written_down_with_what_it_was() -> None:
    change = operations.set_limits("Ann@Example.com", {"sends": 40}, who=WHO)
    assert change == ({"sends": None}, {"sends": 40}, True)
    assert operations.set_limits(ANN, {"sends": 50, "requests": 0}, who="tests:ben").before == {
        "sends": 40,
        "requests": None,
    }
    assert own(ANN) == {"sends": 50, "requests": 0}
    sends = shown(ANN, "sends")
    assert (sends.limit, sends.configured, sends.why, sends.set_by) == (50, 30, "set for this mailbox", "tests:ben")
    assert abs((datetime.now(UTC) - sends.set_at).total_seconds()) < 60  # type: ignore[operator]
    assert [(entry["who"], entry["action"], entry["subject"], entry["detail"]) for entry in table("audit_log")] == [
        (WHO, "limits.set", ANN, {"sends": {"old": None, "new": 40}}),
        (
            "tests:ben",
            "limits.set",
            ANN,
            {"sends": {"old": 40, "new": 50}, "requests": {"old": None, "new": 0}},
        ),
    ]


def test_what_is_set_for_every_mailbox_is_shown_for_each_unless_it_has_its_own() -> None:
    operations.set_limits(None, {"sends": 20, "recipients": 500, "tenant_requests": 1000}, who=WHO)
    operations.set_limits(ANN, {"sends": 40}, who="tests:ben")
    assert [(each.mailbox, each.budget, each.limit, each.set_by) for each in operations.limits_set()] == [
        (EVERY, "recipients", 500, WHO),
        (EVERY, "sends", 20, WHO),
        (EVERY, "tenant_requests", 1000, WHO),
        (ANN, "sends", 40, "tests:ben"),
    ]
    assert [(shown(ANN, name).limit, shown(ANN, name).set_by) for name in ("sends", "recipients")] == [
        (40, "tests:ben"),
        (500, WHO),
    ]
    assert (shown(BO, "sends").limit, shown(BO, "sends").why) == (20, "set for every mailbox")
    assert (shown(BO, "requests").why, shown(BO, "requests").set_by) == (None, None)
    assert (shown(None, "tenant_requests").limit, shown(None, "tenant_requests").set_by) == (1000, WHO)


def test_a_limit_that_is_unset_is_the_settings_again() -> None:
    operations.set_limits(ANN, {"sends": 40, "requests": 500}, who=WHO)
    assert operations.unset_limits(ANN, ["sends"], who=WHO) == ({"sends": 40}, {"sends": None}, True)
    assert own(ANN) == {"requests": 500}
    assert (shown(ANN, "sends").limit, shown(ANN, "sends").why, shown(ANN, "sends").set_by) == (30, None, None)
    assert audited()[-1] == (WHO, "limits.unset", ANN)


def test_what_changes_nothing_is_not_written_down_and_is_told_again() -> None:
    operations.set_limits(ANN, {"sends": 40}, who=WHO)
    runtime.limiter.set_limits(ANN, {})  # as if Redis had been emptied
    operations.set_limits(ANN, {"sends": 40}, who=WHO)
    operations.unset_limits(ANN, ["requests"], who=WHO)
    assert shown(ANN, "sends").limit == 40
    assert len(audited()) == 1


@pytest.mark.parametrize(
    ("mailbox", "limits", "sentence"),
    [
        (ANN, {"sends": -1}, "sends must be 0 .no limit. or from 1 to 1000000000"),
        (ANN, {"sends": 1_000_000_001}, "from 1 to 1000000000"),
        (ANN, {"requests": 1}, "from 2 to"),
        (ANN, {"upload_bytes": 1_000_000}, "from 5000000 to"),
        (ANN, {"concurrency": 1_001}, "from 1 to 1000"),
        (ANN, {"sends": 40, "speed": 1}, "no limit named speed; there are concurrency, requests, upload_bytes, sends"),
        (ANN, {"tenant_requests": 5}, "tenant_requests is the tenant's: it is set without a mailbox"),
        (None, {"": 5}, "recipients, tenant_requests, tenant_external_recipients"),
    ],
    ids=str,
)
def test_a_limit_that_cannot_be_is_refused_and_nothing_is_changed(
    mailbox: str | None, limits: dict[str, int], sentence: str
) -> None:
    with pytest.raises(NotALimit, match=sentence):
        operations.set_limits(mailbox, limits, who=WHO)
    assert (table("mailboxes"), audited()) == ([], [])


def test_an_unknown_limit_is_not_unset() -> None:
    with pytest.raises(NotALimit, match="no limit named speed"):
        operations.unset_limits(ANN, ["sends", "speed"], who=WHO)
    assert table("mailboxes") == []


def test_the_limits_that_may_be_set_are_those_that_the_limiter_has() -> None:
    assert {each.budget for each in operations.limits(ANN)} == operations.MAILBOX_LIMITS.keys()
    operations.set_limits(None, dict.fromkeys(operations.TENANT_LIMITS, 10), who=WHO)
    if RUN_TIME_LIMITS:
        assert {each.budget for each in operations.limits(None)} == operations.TENANT_LIMITS.keys()


@pytest.mark.parametrize(("mailbox", "still_waiting"), [("ANN@example.com", {BO, EVERY}), (None, set())])
def test_mail_that_waits_for_budget_is_looked_at_anew_and_the_scheduler_woken(
    mailbox: str | None, still_waiting: set[str], fleet: Fleet
) -> None:
    full(ANN, BO, EVERY)
    operations.set_limits(mailbox, {"sends": 40}, who=WHO)
    assert waiting_for_budget() == still_waiting
    runtime.publisher.close()
    assert [message.actor_name for message in fleet.take("scheduler")] == ["schedule_emails"]


def test_a_sweep_that_still_knows_the_former_limit_does_not_have_the_last_word() -> None:
    with ThreadPoolExecutor(1) as threads:
        # Given a sweep that has asked the limiter and not yet noted what it said
        with scheduling.sweep():
            change = threads.submit(operations.set_limits, ANN, {"sends": 40}, who=WHO)
            support.wait_until("the limit is set", lambda: change.done() or waits_for_the_sweep())
            rows("UPDATE mailboxes SET full_until = now() + interval '1 hour', full_reason = 'sends'")
        # Then
        assert change.result(timeout=10).told
    assert waiting_for_budget() == set()


def waits_for_the_sweep() -> bool:
    return bool(rows("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))


def test_while_redis_is_away_a_limit_stands_and_is_not_told(
    limit: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    full(ANN)

    def away(_mailbox: str | None, _limits: Mapping[str, int]) -> None:
        raise Unavailable

    monkeypatch.setattr(runtime.limiter, "set_limits", away, raising=False)
    assert operations.set_limits(ANN, {"sends": 40}, who=WHO) == ({"sends": None}, {"sends": 40}, False)
    assert own(ANN) == {"sends": 40}
    assert waiting_for_budget() == set()
    assert audited() == [(WHO, "limits.set", ANN)]


def test_of_two_that_set_limits_at_once_neither_is_lost() -> None:
    start = threading.Barrier(2)

    def set_one(name: str) -> None:
        start.wait()
        operations.set_limits(ANN, {name: 40}, who=WHO)

    with ThreadPoolExecutor(2) as threads:
        for _ in range(10):
            list(threads.map(set_one, ["sends", "recipients"]))
            assert own(ANN) == {"sends": 40, "recipients": 40}
            assert [shown(ANN, name).limit for name in ("sends", "recipients")] == [40, 40]
            operations.unset_limits(ANN, ["sends", "recipients"], who=WHO)


def test_redis_is_told_the_last_of_several_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another operator's change is committed and told while this one's is on its way: it must not be untold."""
    told: list[dict[str, int]] = []

    def remember(_mailbox: str | None, limits: Mapping[str, int]) -> None:
        if not told:
            rows("""UPDATE mailboxes SET limits = '{"sends": 40, "requests": 500}'""")
        told.append(dict(limits))

    monkeypatch.setattr(runtime.limiter, "set_limits", remember, raising=False)
    operations.set_limits(ANN, {"sends": 40}, who=WHO)
    assert told == [{"sends": 40}, {"sends": 40, "requests": 500}]


# What is held back


def test_what_waits_for_budget_and_what_refuses_us_is_told() -> None:
    full(ANN, EVERY)
    mailboxes.refuse(BO, why="403", first_wait=HOUR, longest_wait=HOUR)
    rows("INSERT INTO mailboxes (mailbox, full_until) VALUES ('carl@example.com', now())")
    assert [(each.mailbox, each.full_reason, each.refusal_count) for each in operations.held(None)] == [
        (EVERY, "sends: 30 per minute", 0),
        (ANN, "sends: 30 per minute", 0),
        (BO, None, 1),
    ]
    assert [each.mailbox for each in operations.held("BO@example.com")] == [BO]
    assert operations.held("carl@example.com") == []


def test_limits_show_what_a_mailbox_and_the_tenant_have_used() -> None:
    with runtime.limiter.slot(ANN, requests=2, send=Wanted(3, 0)):
        used = {budget.budget: budget.used for budget in operations.limits(ANN)}
        assert (used["concurrency"], used["requests"], used["recipients"]) == (1, 2, 3)
    assert ("tenant_requests", 2) in [(budget.budget, budget.used) for budget in operations.limits(None)]


# Pauses


def test_a_mailbox_that_is_paused_is_passed_over_until_it_is_resumed() -> None:
    store()
    operations.pause("Ann@example.com", why="holiday", who=WHO)
    assert [(pause.mailbox, pause.pause_reason, pause.paused_by) for pause in operations.pauses()] == [
        (ANN, "holiday", WHO)
    ]
    assert support.dispatch() == []
    assert operations.resume("ANN@example.com", who=WHO) == (True, True)
    assert operations.resume(ANN, who=WHO) == (False, True)
    assert len(support.dispatch()) == 1
    assert audited()[:2] == [(WHO, "pause", ANN), (WHO, "resume", ANN)]


@pytest.mark.parametrize("subject", [EVERY, "attachment", ANN])
def test_each_pause_is_of_one_thing_and_is_resumed_by_itself(subject: str) -> None:
    for each in (EVERY, "attachment", ANN):
        operations.pause(each, why=f"{each}!", who=WHO, wait=HOUR)
    assert operations.resume(subject, who=WHO) == (True, True)
    assert operations.resume(subject, who=WHO) == (False, True)
    assert {pause.pause_reason for pause in operations.pauses()} == {
        f"{each}!" for each in (EVERY, "attachment", ANN)
    } - {f"{subject}!"}
    assert audited() == [
        *[(WHO, "pause", each) for each in (EVERY, "attachment", ANN)],
        *[(WHO, "resume", subject)] * 2,
    ]


def test_a_pause_that_is_shorter_than_one_that_stands_says_so() -> None:
    operations.pause(ANN, why="migration", who=WHO)
    standing = operations.pause(ANN, why="a moment", who="tests:ben", wait=HOUR)
    assert (standing.pause_reason, standing.paused_by, standing.until_resumed) == ("migration", WHO, True)


def test_resuming_ends_graphs_pause_too_and_the_tenants_is_shown() -> None:
    runtime.limiter.pause(ANN, support.WITHIN)
    operations.resume(ANN, who=WHO)
    assert runtime.limiter.paused_until(ANN) is None
    runtime.limiter.pause_all(support.WITHIN)
    assert [(pause.mailbox, pause.paused_by) for pause in operations.pauses()] == [(EVERY, "mailfleet")]
    operations.resume(EVERY, who=WHO)
    assert operations.pauses() == []


def test_a_resumption_that_redis_does_not_hear_of_holds_in_the_tables_and_says_so(
    fleet: Fleet, limit: Callable[..., None]
) -> None:
    operations.pause(ANN, why="holiday", who=WHO)
    limit(url=f"redis://127.0.0.1:{free_port()}")
    assert operations.resume(ANN, who=WHO) == (True, False)
    assert mailboxes.pauses() == []
    runtime.publisher.close()
    assert [message.actor_name for message in fleet.take("scheduler")] == ["schedule_emails"]


# Limits and pauses that are obeyed


@pytest.fixture
def stepwise(fleet: Fleet) -> Fleet:
    """A fleet whose limiter starts with one mail a minute for Ann."""
    operations.set_limits(ANN, {"sends": 1}, who=WHO)
    for number in range(3):
        store(publisher_message_id=f"order-{number}")
    return fleet


@with_run_time_limits
def test_mail_that_waited_for_a_limit_goes_out_as_soon_as_it_is_raised(stepwise: Fleet) -> None:
    assert stepwise.send() == ["done"]
    assert stepwise.send() == []
    assert {each.mailbox for each in operations.held(None)} == {ANN}
    operations.set_limits(ANN, {"sends": 0}, who=WHO)
    assert stepwise.send() == ["done", "done"]


@with_run_time_limits
def test_limits_that_were_set_hold_again_after_redis_was_emptied(stepwise: Fleet) -> None:
    runtime.redis.flushdb()
    stepwise.schedule()
    sends = shown(ANN, "sends")
    assert (sends.limit, sends.why, sends.set_by) == (1, "set for this mailbox", WHO)


@with_run_time_limits
@pytest.mark.parametrize(("subject", "goes_out"), [(EVERY, []), ("attachment", ["no-attachment"])])
def test_what_is_paused_is_not_dispatched_and_goes_out_when_it_is_resumed(
    subject: str, goes_out: list[str], fleet: Fleet
) -> None:
    # Given
    file = {"name": "a.pdf", "size": 5, "urlOrId": "https://files.example/a.pdf"}
    ids = [store(publisher_message_id="plain"), store(publisher_message_id="attached", attachments=[file])]
    operations.pause(subject, why="maintenance", who=WHO)
    # When
    fleet.schedule()
    # Then
    dispatched = [row["route"] for row in map(email_row, ids) if row["status"] == "dispatched"]
    assert dispatched == goes_out
    operations.resume(subject, who=WHO)
    fleet.schedule()
    assert {email_row(id)["status"] for id in ids} == {"dispatched"}
