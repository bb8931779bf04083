"""Send budget: reserved before mail is handed out, given back when it is not sent, known again after a loss."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import limiter_support
import orjson
import pytest
import support
from limiter_support import Wire
from support import SENDER, Fleet, claim, email_row, make_due, rows, store, table, work

import runtime
from actors import budgets
from actors.outcomes import pause_fleet
from graph_client.errors import Throttled
from limiter import Emptied, Exhausted, Slowed, Wanted
from models import limits as set_by_operators
from models import turns

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure, limit = support.configure, support.limit
limiter_redis, wire = limiter_support.limiter_redis, limiter_support.wire

Limit = Callable[..., None]
BEN = "ben@example.com"


def used(budget: str, mailbox: str | None = SENDER) -> int:
    usage = runtime.limiter.usage(mailbox) if mailbox else runtime.limiter.tenant_usage()
    return next(each.used for each in usage if each.budget == budget)


def empty_redis() -> None:
    runtime.redis.flushdb()


def statuses() -> list[str]:
    return [row["status"] for row in table("incoming_emails")]


# Reserved


def test_budget_is_charged_once_from_the_dispatch_to_the_send(fleet: Fleet) -> None:
    store(cc=["carl@example.org"])
    fleet.schedule()
    assert (used("sends"), used("recipients")) == (1, 2)
    fleet.run("send_plain")
    assert (used("sends"), used("recipients")) == (1, 2)
    assert statuses() == ["processed"]


def test_mail_beyond_the_budget_is_not_handed_out_and_its_mailbox_is_not_looked_at_until_then(
    fleet: Fleet, limit: Limit
) -> None:
    # Given budget for three of five
    limit(mailbox_sends_per_minute=3)
    support.store_many(5)
    # When
    fleet.schedule()
    # Then
    assert len(fleet.take("send_plain")) == 3
    assert sorted(statuses()) == ["dispatched"] * 3 + ["received"] * 2
    before = rows("SELECT xmin::text, ctid::text FROM incoming_emails ORDER BY id")
    fleet.schedule()
    assert rows("SELECT xmin::text, ctid::text FROM incoming_emails ORDER BY id") == before
    # When the mailbox is looked at again too early, nothing is gained
    rows("UPDATE mailboxes SET full_until = NULL")
    fleet.schedule()
    assert fleet.take("send_plain") == []


def test_another_mailbox_is_served_although_one_is_full(fleet: Fleet, limit: Limit) -> None:
    limit(mailbox_sends_per_minute=1)
    support.store_many(3)
    store(**{"publisher_message_id": "other", "from": BEN})
    fleet.schedule()
    handed_out = [message.kwargs["publisher_message_id"] for message in fleet.take("send_plain")]
    assert (len(handed_out), "other" in handed_out) == (2, True)


def test_a_mail_that_is_too_large_for_what_is_left_waits_and_a_smaller_one_goes(fleet: Fleet, limit: Limit) -> None:
    limit(mailbox_recipients_per_day=3)
    first = store(publisher_message_id="1", to=["a@example.org", "b@example.org"])
    large = store(publisher_message_id="2", to=["a@example.org", "b@example.org"])
    small = store(publisher_message_id="3")
    fleet.schedule()
    assert [message.kwargs["incoming_email_id"] for message in fleet.take("send_plain")] == [first, small]
    assert (email_row(large)["status"], email_row(large)["last_error"]) == ("received", "limit: recipients")
    assert email_row(large)["next_attempt_at"] is not None


def test_external_recipients_are_the_tenants_and_hold_back_no_internal_mail(fleet: Fleet, limit: Limit) -> None:
    # Given one external recipient a day for all mailboxes together
    limit(tenant_external_recipients_per_day=1)
    outward, other, inward = (
        store(publisher_message_id="1"),
        store(**{"publisher_message_id": "2", "from": BEN}),
        store(publisher_message_id="3"),
    )
    rows("UPDATE incoming_emails SET external_recipient_count = 0 WHERE id = %(id)s", {"id": inward})
    # When
    fleet.schedule()
    # Then
    handed_out = {message.kwargs["incoming_email_id"] for message in fleet.take("send_plain")}
    assert (len(handed_out), inward in handed_out) == (2, True)
    (waiting,) = {outward, other} - handed_out
    assert email_row(waiting)["last_error"] == "limit: tenant_external_recipients"
    assert used("tenant_external_recipients", None) == 1


def test_look_ups_go_on_while_the_budget_is_used_up(fleet: Fleet, limit: Limit) -> None:
    id = store()
    claim(id).mark_in_doubt(look_again_in=timedelta(), evidence={"seen": "timeout"})
    limit(mailbox_sends_per_minute=1)
    with runtime.limiter.slot(SENDER, send=Wanted(1, 1)):
        pass
    make_due(id)
    fleet.schedule()
    assert len(fleet.take("send_plain")) == 1


def test_while_everything_is_paused_in_redis_nothing_is_handed_out_and_no_mailbox_is_marked(fleet: Fleet) -> None:
    support.store_many(3)
    runtime.limiter.pause_all(timedelta(minutes=1))
    fleet.schedule()
    assert fleet.take("send_plain") == []
    assert rows("SELECT 1 FROM mailboxes") == []
    runtime.limiter.resume_all()
    fleet.schedule()
    assert len(fleet.take("send_plain")) == 3


# Given back


def test_what_redis_may_have_moved_to_a_call_is_not_taken_back_from_another_mail(
    fleet: Fleet, limit: Limit, wire: Wire
) -> None:
    # Given two mails whose budget was reserved together
    support.store_many(2)
    fleet.schedule()
    messages = fleet.take("send_plain")
    assert used("sends") == 2
    # When one is admitted, but its worker does not learn it
    limit(url=wire.url)
    wire.loses = "cut"
    work(messages[0])
    # Then it is sent later, and the other's budget is still charged
    assert (wire.loses, sorted(statuses())) == (None, ["dispatched", "received"])
    assert used("sends") == 2


@pytest.mark.parametrize("operation", ["send_mail"])
def test_what_is_proven_not_to_be_sent_gives_its_budget_back(fleet: Fleet, operation: str) -> None:
    fleet.graph.throttle(SENDER, retry_after="7")
    store()
    fleet.send()
    assert statuses() == ["received"]
    assert (used("sends"), used("recipients")) == (0, 0)


def test_what_may_have_been_sent_stays_charged(fleet: Fleet) -> None:
    fleet.graph.lose_next_answer(mailbox=SENDER)
    store()
    fleet.send()
    assert (used("sends"), used("recipients")) == (1, 1)


def test_what_another_scheduler_took_meanwhile_gives_its_budget_back(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    store()
    note_full = turns.note_full

    def taken_meanwhile(full: dict[str, tuple[timedelta, str]]) -> None:
        note_full(full)
        rows("UPDATE incoming_emails SET status = 'dispatched', lease_until = now() + interval '1 minute'")

    monkeypatch.setattr(turns, "note_full", taken_meanwhile)
    fleet.schedule()
    assert fleet.take("send_plain") == []
    assert used("sends") == 0


# After a loss


def test_nobody_is_admitted_by_an_emptied_redis_until_a_scheduler_has_written_down_what_was_spent(fleet: Fleet) -> None:
    # Given a mail sent, and one in a worker's hands
    store(cc=["carl@example.org"])
    fleet.send()
    store(publisher_message_id="in hand", to=["a@example.org", "b@example.org", "c@example.org"])
    fleet.schedule()
    (message,) = fleet.take("send_plain")
    # When
    empty_redis()
    # Then
    with pytest.raises(Emptied):
        runtime.limiter.acquire(SENDER)
    assert support.work(message) == "done"
    assert len(fleet.graph.deliveries()) == 1
    # When
    fleet.schedule()
    # Then
    assert (used("sends"), used("recipients"), used("tenant_external_recipients", None)) >= (1, 2, 0)
    assert used("requests") >= 3
    runtime.limiter.release(runtime.limiter.acquire(SENDER))


def test_after_a_loss_no_more_is_sent_in_the_minute_than_the_limit(fleet: Fleet, limit: Limit) -> None:
    limit(mailbox_sends_per_minute=3)
    support.store_many(6)
    fleet.send()
    for _ in range(3):
        empty_redis()
        rows("UPDATE mailboxes SET full_until = NULL")
        fleet.send()
    assert len(fleet.graph.deliveries()) == 3


def test_what_is_in_flight_during_a_loss_keeps_its_reservation(fleet: Fleet, limit: Limit) -> None:
    limit(mailbox_sends_per_minute=2)
    support.store_many(4)
    fleet.schedule()
    messages = fleet.take("send_plain")
    empty_redis()
    rows("UPDATE mailboxes SET full_until = NULL")
    fleet.schedule()
    assert fleet.take("send_plain") == []
    assert [support.work(message) for message in messages] == ["done"] * 2
    assert (len(fleet.graph.deliveries()), used("sends")) == (2, 2)


def test_calls_under_way_during_a_loss_hold_their_slots(fleet: Fleet, limit: Limit) -> None:
    limit(mailbox_concurrency=2)
    for n in range(2):
        assert claim(store(publisher_message_id=f"{n}"))
    empty_redis()
    budgets.keep_counts()
    with pytest.raises(Exhausted, match="concurrency"):
        runtime.limiter.acquire(SENDER)


def test_limits_that_were_set_or_learned_and_graphs_pauses_outlive_redis(fleet: Fleet) -> None:
    # Given
    rows(
        """
        INSERT INTO mailboxes (mailbox, limits, slowed, paused_until, pause_reason, paused_by)
        VALUES ('*', '{"sends": 20}', '{}', NULL, NULL, NULL), (%(ben)s, '{"sends": 7}', '{}', NULL, NULL, NULL),
               (%(sender)s, '{}', %(slowed)s, now() + interval '1 minute', 'Graph asked to wait: 429', 'mailfleet')
        """,
        {
            "ben": BEN,
            "sender": SENDER,
            "slowed": orjson.dumps({"sends": {"limit": 9, "at": _now_ms(), "whole": 20, "strikes": 3}}).decode(),
        },
    )
    # When
    empty_redis()
    budgets.keep_counts()
    # Then
    sends = {mailbox: _usage(mailbox) for mailbox in (SENDER, BEN, "carl@example.com")}
    assert {mailbox: each.limit for mailbox, each in sends.items()} == {SENDER: 9, BEN: 7, "carl@example.com": 20}
    assert "slowed to 9" in str(sends[SENDER].why)
    assert runtime.limiter.paused_until(SENDER)
    assert runtime.limiter.paused_until(BEN) is None


def test_what_was_lowered_so_long_ago_that_it_has_grown_back_is_not_written_down_again(fleet: Fleet) -> None:
    slowed = orjson.dumps({"sends": {"limit": 9, "at": _now_ms() - 1_860_000, "whole": 20, "strikes": 3}}).decode()
    rows(
        """
        INSERT INTO mailboxes (mailbox, slowed, updated_at)
        VALUES (%(sender)s, %(slowed)s, now() - interval '31 minutes')
        """,
        {"sender": SENDER, "slowed": slowed},
    )
    empty_redis()
    budgets.keep_counts()
    assert [*runtime.redis.scan_iter("mailfleet:*:slowed")] == []


def test_limits_that_redis_was_not_told_of_reach_it_and_what_it_has_lowered_meanwhile_stays_so(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given limits that were set and unset while Redis was away, and one that it has lowered a moment ago
    runtime.limiter.set_limits(BEN, {"sends": 7})
    set_by_operators.change(SENDER, {"requests": 500})
    set_by_operators.change("carl@example.com", {"sends": 8})
    set_by_operators.change(BEN, {"sends": None})
    runtime.limiter.set_slowed(SENDER, [Slowed("sends", 9, datetime.now(UTC), 30, 3)])
    # When a scheduler looks what it has missed
    monkeypatch.setattr(budgets, "_sync", budgets._Sync())
    budgets.keep_counts()
    # Then
    limits = {mailbox: _usage(mailbox).limit for mailbox in (SENDER, BEN, "carl@example.com")}
    assert limits == {SENDER: 9, BEN: 30, "carl@example.com": 8}
    assert [each.limit for each in runtime.limiter.usage(SENDER) if each.budget == "requests"] == [500]


def _now_ms() -> int:
    return int(rows("SELECT extract(epoch FROM now()) * 1000")[0][0])


def _usage(mailbox: str) -> runtime.limits.BudgetUsage:
    return next(each for each in runtime.limiter.usage(mailbox) if each.budget == "sends")


# Learned


def throttled(message: str = "") -> Throttled:
    return Throttled(message, status=429, retry_after=timedelta(seconds=1))


@pytest.mark.parametrize(
    ("message", "budget"),
    [
        ("", "sends"),
        ("Application is over its MailboxConcurrency limit.", "concurrency"),
        ("Application is over its IncomingBytes limit.", "upload_bytes"),
    ],
)
def test_a_mailbox_that_graph_throttles_again_and_again_is_slowed_and_it_is_kept(
    fleet: Fleet, message: str, budget: str
) -> None:
    # When
    for _ in range(3):
        pause_fleet(SENDER, timedelta(seconds=1), throttled(message), budget="sends")
        runtime.limiter.resume(SENDER)
    # Then
    (slowed,) = [each for each in runtime.limiter.usage(SENDER) if each.why]
    assert (slowed.budget, slowed.limit < slowed.configured) == (budget, True)
    (kept,) = table("mailboxes")[0]["slowed"].values()
    assert kept["strikes"] == 3
    assert kept["limit"] <= slowed.limit <= kept["limit"] * 1.01  # it has begun to grow back


def test_many_throttled_mailboxes_pause_everything(fleet: Fleet) -> None:
    for n in range(10):
        mailbox = f"m{n}@example.com"
        runtime.limiter.release(runtime.limiter.acquire(mailbox))
        pause_fleet(mailbox, timedelta(minutes=1), throttled(), budget="sends")
    assert runtime.limiter.tenant_paused_until()
    assert turns.paused_routes() == set(turns.Route)
