"""Limits and pauses at run time: what stands in the tables, who is told, and what is written down."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta

import operator_support
import pytest
import support
from operator_support import audited
from support import Fleet, email_row, rows, store, table

import operations
import operations.budgets
import operations.pausing
import runtime
from limiter import Exhausted, Wanted
from models import mailboxes
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
            ON CONFLICT (mailbox) DO UPDATE SET full_until = excluded.full_until, full_reason = excluded.full_reason
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
    assert (sends.limit, sends.configured, sends.why, sends.set_by) == (50, 50, "set for this mailbox", "tests:ben")
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
        (ANN, {"backup_concurrency": 5}, "backup_concurrency is the fleet's: it is set without a mailbox"),
        (None, {"sends": 4, "send_plain_concurrency": 0}, "must be 1 or more; to send nothing, pause"),
        (None, {"send_attached_concurrency": 1_000_001}, "from 1 to 1000000"),
        (None, {"": 5}, "recipients, tenant_requests, tenant_external_recipients"),
    ],
    ids=str,
)
def test_a_limit_that_cannot_be_is_refused_and_nothing_is_changed(
    mailbox: str | None, limits: dict[str, int], sentence: str
) -> None:
    with pytest.raises(NotALimit, match=sentence):
        operations.set_limits(mailbox, limits, who=WHO)
    assert (table("mailboxes"), table("fleet_limits"), audited()) == ([], [], [])


def test_an_unknown_limit_is_not_unset() -> None:
    with pytest.raises(NotALimit, match="no limit named speed"):
        operations.unset_limits(ANN, ["sends", "speed"], who=WHO)
    assert table("mailboxes") == []


def test_the_limits_that_may_be_set_are_those_that_the_limiter_has() -> None:
    assert {each.budget for each in operations.limits(ANN)} == operations.MAILBOX_LIMITS.keys()
    operations.set_limits(None, dict.fromkeys(operations.TENANT_LIMITS, 10), who=WHO)
    assert {each.budget for each in operations.limits(None)} == operations.TENANT_LIMITS.keys()


def test_what_may_be_in_flight_in_the_fleet_is_set_shown_unset_and_written_down() -> None:
    configured = operations.concurrency_limits()
    # When
    change = operations.set_limits(None, {"send_plain_concurrency": 7, "backup_concurrency": 3, "sends": 9}, who=WHO)
    # Then
    assert change.before == dict.fromkeys(change.after)
    assert change.after == {"send_plain_concurrency": 7, "backup_concurrency": 3, "sends": 9}
    assert operations.concurrency_limits() == configured | {"no-attachment": 7, "backup": 3}
    assert [(each.mailbox, each.budget, each.limit, each.set_by) for each in operations.limits_set(EVERY)] == [
        (EVERY, "backup_concurrency", 3, WHO),
        (EVERY, "send_plain_concurrency", 7, WHO),
        (EVERY, "sends", 9, WHO),
    ]
    # And a limiter, of an earlier version too, is told of budgets alone
    assert own(EVERY) == {"sends": 9}
    # And back
    assert operations.unset_limits(None, ["send_plain_concurrency", "sends"], who=WHO).before == {
        "send_plain_concurrency": 7,
        "sends": 9,
    }
    assert operations.concurrency_limits() == configured | {"backup": 3}
    assert [action for _, action, _ in audited()] == ["limits.set", "limits.unset"]


def test_of_two_changes_of_the_fleets_limits_at_a_time_both_stand() -> None:
    names = list(operations.FLEET_LIMITS)
    with ThreadPoolExecutor(max_workers=len(names)) as pool:
        wait([pool.submit(operations.set_limits, None, {name: 5}, who=WHO) for name in names])
    assert {each.budget for each in operations.limits_set()} == {*names}


def test_what_a_later_version_has_set_of_the_fleet_is_passed_over() -> None:
    configured = operations.concurrency_limits()
    rows("INSERT INTO fleet_limits (name, value) VALUES ('look_up_concurrency', 5)")
    assert operations.concurrency_limits() == configured


@pytest.mark.parametrize(("mailbox", "still_waiting"), [("ANN@example.com", {BO, EVERY}), (None, set())])
def test_mail_that_waits_for_budget_is_looked_at_anew_and_the_scheduler_woken(
    mailbox: str | None, still_waiting: set[str], fleet: Fleet
) -> None:
    full(ANN, BO, EVERY)
    operations.set_limits(mailbox, {"sends": 40}, who=WHO)
    assert waiting_for_budget() == still_waiting
    runtime.publisher.close()
    assert [message.actor_name for message in fleet.take("scheduler")] == ["schedule_emails"]


def test_a_scheduler_that_still_knows_the_former_limit_does_not_have_the_last_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    minute = timedelta(minutes=1)
    monkeypatch.setattr(operations.budgets, "OPERATORS_PATIENCE", minute)
    with ThreadPoolExecutor(1) as threads:
        # Given a scheduler that has asked the limiter and not yet noted what it said
        with runtime.limiter.turn("scheduler", minute):
            change = threads.submit(operations.set_limits, ANN, {"sends": 40}, who=WHO)
            support.wait_until("the limit stands", lambda: own(ANN))
            full(ANN)
            assert shown(ANN, "sends").limit == 30
        # Then
        assert change.result(timeout=10).told
    assert (waiting_for_budget(), shown(ANN, "sends").limit) == (set(), 40)


def test_a_scheduler_that_stands_still_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations.budgets, "OPERATORS_PATIENCE", timedelta(milliseconds=50))
    with runtime.limiter.turn("scheduler", HOUR):
        assert operations.set_limits(ANN, {"sends": 40}, who=WHO).told
    assert shown(ANN, "sends").limit == 40


def test_while_redis_is_away_a_limit_stands_and_is_not_told(
    limit: Callable[..., None],
) -> None:
    full(ANN)
    limit(url=f"redis://127.0.0.1:{free_port()}")
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
    with runtime.limiter.slot(ANN, requests=2, send=Wanted(3, 1)):
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
    assert [(pause.mailbox, pause.paused_by) for pause in operations.pauses()] == [(EVERY, "graph")]
    mailboxes.pause(EVERY, HOUR, why="Graph asked everybody to wait")
    assert [pause.pause_reason for pause in operations.pauses()] == ["Graph asked everybody to wait"]
    operations.resume(EVERY, who=WHO)
    assert operations.pauses() == []
    assert runtime.limiter.tenant_paused_until() is None


@pytest.mark.parametrize("subject", [EVERY, ANN])
def test_resuming_has_what_was_held_back_tried_at_once(subject: str) -> None:
    # Given a mailbox that was found full, a mail that failed and waits, and one that is not due yet
    store(publisher_message_id="1")
    later = store(publisher_message_id="2", send_at="2099-01-01T00:00:00Z")
    rows(
        "UPDATE incoming_emails SET next_attempt_at = now() + '1 hour', last_error = 'x' WHERE id <> %(id)s",
        {"id": later},
    )
    full(subject)
    # When
    operations.resume(subject, who=WHO)
    # Then
    assert mailboxes.held() == []
    assert [each.publisher_message_id for each in support.dispatch()] == ["1"]


def test_a_scheduler_that_still_knows_graphs_pause_does_not_have_the_last_word_over_a_resumption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(operations.pausing, "OPERATORS_PATIENCE", HOUR)
    with ThreadPoolExecutor(1) as threads:
        # Given a scheduler that has read the pause and is about to tell Redis
        with runtime.limiter.turn("scheduler", HOUR):
            resumed = threads.submit(operations.resume, ANN, who=WHO)
            wait([resumed], timeout=0.3)
            runtime.limiter.pause(ANN, HOUR)
            full(ANN)
        # Then
        assert resumed.result(timeout=10).told
    assert (runtime.limiter.paused_until(ANN), mailboxes.held()) == (None, [])


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


def test_mail_that_waited_for_a_limit_goes_out_as_soon_as_it_is_raised(stepwise: Fleet) -> None:
    assert stepwise.send() == ["done"]
    assert stepwise.send() == []
    assert [(each.mailbox, each.full_reason) for each in operations.held(None)] == [(ANN, "limit: sends")]
    operations.set_limits(ANN, {"sends": 0}, who=WHO)
    assert stepwise.send() == ["done", "done"]


def test_mail_too_large_for_what_was_left_goes_out_as_soon_as_there_is_room(fleet: Fleet) -> None:
    # Given room for two recipients, and a mail with three that waits behind one with one
    operations.set_limits(ANN, {"recipients": 3}, who=WHO)
    store()
    large = store(publisher_message_id="order-2", to=[f"{name}@example.org" for name in "abc"])
    assert fleet.send() == ["done"]
    assert [(each.full_reason, each.full_from) for each in operations.held(None)] == [("limit: recipients", 3)]
    assert (email_row(large)["next_attempt_at"], fleet.send()) == (None, [])
    # When
    operations.set_limits(None, {"recipients": 5}, who=WHO)
    operations.unset_limits(ANN, ["recipients"], who=WHO)
    # Then
    assert fleet.send() == ["done"]


def test_what_a_worker_put_back_for_a_limit_is_looked_at_anew_and_nothing_else_is() -> None:
    refused = Exhausted("recipients", HOUR, mailbox_wide=True)
    for number, why in enumerate((str(refused), "503: try again in an hour", "limit: recipients")):
        support.claim(store(publisher_message_id=f"order-{number}")).snooze(HOUR, why)
    other = store(**{"publisher_message_id": "other", "from": BO})
    support.claim(other).snooze(HOUR, str(refused))
    rows("UPDATE incoming_emails SET status = 'failed' WHERE publisher_message_id = 'order-2'")
    operations.set_limits(ANN, {"recipients": 500}, who=WHO)
    waiting = {row["publisher_message_id"] for row in table("incoming_emails") if row["next_attempt_at"]}
    assert waiting == {"order-1", "order-2", "other"}


def test_a_changed_limit_ends_no_pause() -> None:
    mailboxes.pause(BO, HOUR, why="Graph asked to wait")
    operations.pause(ANN, why="limit: my patience", who=WHO)
    operations.set_limits(None, {"requests": 20_000}, who=WHO)
    assert {pause.mailbox for pause in operations.pauses()} == {ANN, BO}


def test_an_operators_pause_is_not_hidden_by_a_limit_that_is_used_up(fleet: Fleet, limit: Callable[..., None]) -> None:
    # Given a mailbox whose requests are used up, which a worker finds out
    limit(mailbox_requests_per_10_minutes=2)
    store()
    fleet.schedule()
    runtime.limiter.release(runtime.limiter.acquire(ANN, requests=2))
    assert fleet.run("send_plain") == ["done"]
    assert [(each.mailbox, each.full_reason) for each in operations.held(None)] == [(ANN, "limit: requests")]
    # When an operator pauses it, and then raises the limit
    operations.pause(ANN, why="holiday", who=WHO, wait=HOUR)
    operations.set_limits(ANN, {"requests": 100}, who=WHO)
    # Then
    assert [pause.pause_reason for pause in operations.pauses()] == ["holiday"]
    assert fleet.send() == []


def test_more_than_a_batch_of_waiting_mail_is_looked_at_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailboxes, "BATCH", 2)
    for number in range(5):
        refused = Exhausted("recipients", HOUR, mailbox_wide=False)
        support.claim(store(publisher_message_id=f"order-{number}")).snooze(HOUR, str(refused))
    operations.set_limits(ANN, {"recipients": 500}, who=WHO)
    assert not [row for row in table("incoming_emails") if row["next_attempt_at"]]


def test_limits_that_were_set_hold_again_after_redis_was_emptied(stepwise: Fleet) -> None:
    runtime.redis.flushdb()
    stepwise.schedule()
    sends = shown(ANN, "sends")
    assert (sends.limit, sends.why, sends.set_by) == (1, "set for this mailbox", WHO)


def test_a_cancelled_dispatch_leaves_its_budget_to_another(stepwise: Fleet) -> None:
    stepwise.schedule()
    (dispatched,) = [row for row in table("incoming_emails") if row["status"] == "dispatched"]
    assert shown(ANN, "sends").used == 1
    operations.cancel(dispatched["id"], who=WHO)
    assert (shown(ANN, "sends").used, shown(ANN, "recipients").used) == (0, 0)
    mailboxes.look_anew(ANN)
    assert stepwise.send() == ["done", "done"]  # the first is the dispatch of what is cancelled
    assert sorted(row["status"] for row in table("incoming_emails")) == ["cancelled", "processed", "received"]


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
