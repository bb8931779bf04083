"""Send budget: reserved before mail is handed out, given back when it is not sent, known again after a loss."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta

import limiter_support
import orjson
import psycopg2
import pytest
import support
from limiter_support import Wire
from support import SENDER, Fleet, claim, email_row, make_due, rows, store, table, work

import models
import operations
import runtime
from actors import budgets
from actors.outcomes import pause_fleet
from graph_client import SMALL_ATTACHMENT_BYTES
from graph_client.errors import Throttled
from limiter import Emptied, Exhausted, Slowed, Wanted
from models import ClaimedEmail, scheduling, turns, uploads
from models import limits as set_by_operators
from outbox import Unconfirmed

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure, limit = support.configure, support.limit
limiter_redis, wire = limiter_support.limiter_redis, limiter_support.wire

Limit = Callable[..., None]
BEN = "ben@example.com"


def used(budget: str, mailbox: str | None = SENDER) -> int:
    usage = runtime.limiter.usage(mailbox) if mailbox else runtime.limiter.tenant_usage()
    return next(each.used for each in usage if each.budget == budget)


def with_files(fleet: Fleet, *sizes: int) -> str:
    files = [{"name": f"{n}", "size": n, "urlOrId": fleet.graph.file_url(n, name=f"{n}")} for n in sizes]
    return store(attachments=files)


def sent_with_files(fleet: Fleet, *sizes: int) -> None:
    with_files(fleet, *sizes)
    assert fleet.send() == ["done"]


def received_bytes(fleet: Fleet) -> int:
    """How much Graph has been sent in bodies."""
    return sum(request["request_bytes"] for request in fleet.graph.requests())


def empty_redis() -> None:
    runtime.redis.flushdb()


def restore() -> None:
    empty_redis()
    budgets.keep_counts()


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


def test_files_are_charged_as_they_go_up(fleet: Fleet) -> None:
    # When one goes up in base64, and one in ranges
    sent_with_files(fleet, SMALL_ATTACHMENT_BYTES, SMALL_ATTACHMENT_BYTES + 1)
    # Then
    assert received_bytes(fleet) > 7_000_000
    assert 0 <= used("upload_bytes") - received_bytes(fleet) < 2000


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
    assert (email_row(large)["status"], email_row(large)["next_attempt_at"]) == ("received", None)
    assert [(row["full_reason"], row["full_from"]) for row in table("mailboxes")] == [("limit: recipients", 2)]


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
    assert used("tenant_external_recipients", None) == 1
    # And what waits is not touched, nor looked at again until some of it comes back
    assert (email_row(waiting)["next_attempt_at"], email_row(waiting)["last_error"]) == (None, None)
    assert [(row["mailbox"], row["full_reason"]) for row in table("mailboxes")] == [
        ("*", "limit: tenant_external_recipients")
    ]
    limit(tenant_external_recipients_per_day=2)
    fleet.schedule()
    assert fleet.take("send_plain") == []
    # When it does
    rows("UPDATE mailboxes SET full_until = now()")
    fleet.schedule()
    assert [message.kwargs["incoming_email_id"] for message in fleet.take("send_plain")] == [waiting]


def test_internal_mail_goes_on_behind_any_number_of_external_mails(fleet: Fleet, limit: Limit) -> None:
    limit(tenant_external_recipients_per_day=1)
    support.store_many(30)
    inward = store(publisher_message_id="inward")
    rows("UPDATE incoming_emails SET external_recipient_count = 0 WHERE id = %(id)s", {"id": inward})
    fleet.schedule()
    assert inward in {message.kwargs["incoming_email_id"] for message in fleet.take("send_plain")}


def test_a_large_mail_is_overtaken_for_a_while_and_then_waited_for(fleet: Fleet, limit: Limit) -> None:
    # Given room for two more recipients, and a mail with three that has let others pass for more than an hour
    limit(mailbox_recipients_per_day=3)
    store(publisher_message_id="1")
    fleet.send()
    large = store(publisher_message_id="2", to=["a@example.org", "b@example.org", "c@example.org"])
    rows("UPDATE incoming_emails SET created_at = now() - interval '2 hours' WHERE id = %(id)s", {"id": large})
    # When smaller ones are asked for together with it
    small = store(publisher_message_id="3")
    fleet.schedule()
    # Then
    assert fleet.take("send_plain") == []
    assert [row["full_reason"] for row in table("mailboxes")] == ["limit: recipients"]
    assert used("recipients") == 1
    # When there is enough
    limit(mailbox_recipients_per_day=5)
    rows("UPDATE mailboxes SET full_until = now()")
    fleet.schedule()
    assert {message.kwargs["incoming_email_id"] for message in fleet.take("send_plain")} == {large, small}


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

    def taken_meanwhile(full: dict[str, turns.Full]) -> None:
        note_full(full)
        rows("UPDATE incoming_emails SET status = 'dispatched', lease_until = now() + interval '1 minute'")

    monkeypatch.setattr(turns, "note_full", taken_meanwhile)
    fleet.schedule()
    assert fleet.take("send_plain") == []
    assert used("sends") == 0


@pytest.mark.parametrize("away", ["worker", "RabbitMQ"])
def test_a_dispatch_that_no_worker_took_gives_its_budget_back(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    # Given
    store(cc=["carl@example.org"])
    if away == "RabbitMQ":
        monkeypatch.setattr(runtime, "enqueue", _unconfirmed)
        with pytest.raises(Unconfirmed):
            fleet.schedule()
        monkeypatch.undo()
    else:
        fleet.schedule()
        fleet.take("send_plain")
    assert (used("sends"), used("recipients")) == (1, 2)
    rows("UPDATE incoming_emails SET lease_until = now(), next_attempt_at = now() + '1 hour'")  # not handed out again
    # When
    fleet.schedule()
    # Then
    assert (used("sends"), used("recipients")) == (0, 0)
    # And once
    fleet.schedule()
    assert (used("sends"), used("recipients")) == (0, 0)


def _unconfirmed(_messages: object) -> Future[None]:
    failed: Future[None] = Future()
    failed.set_exception(Unconfirmed("RabbitMQ is away"))
    return failed


def test_a_large_mail_that_was_not_due_before_lets_others_pass(fleet: Fleet, limit: Limit) -> None:
    # Given one that was published hours ago and is due now
    limit(mailbox_recipients_per_day=3)
    store(publisher_message_id="1")
    fleet.send()
    due = datetime.now(UTC)
    large = store(
        publisher_message_id="2", to=["a@example.org", "b@example.org", "c@example.org"], send_at=due.isoformat()
    )
    rows(
        "UPDATE incoming_emails SET created_at = now() - interval '2 hours', next_attempt_at = NULL WHERE id = %(id)s",
        {"id": large},
    )
    small = store(publisher_message_id="3")
    # When
    fleet.schedule()
    # Then
    assert [message.kwargs["incoming_email_id"] for message in fleet.take("send_plain")] == [small]


def test_a_mail_that_a_worker_died_with_stays_charged(fleet: Fleet) -> None:
    id = store()
    fleet.schedule()
    (message,) = fleet.take("send_plain")
    attempt = message.kwargs["attempt"]
    assert ClaimedEmail.claim(id, attempt, route=turns.Route.PLAIN, lease=timedelta(), intent=True)
    fleet.schedule()
    assert used("sends") == 1


@pytest.mark.parametrize("how", ["throttled", "cancelled", "not taken"])
@pytest.mark.parametrize("budget", ["mailbox_recipients_per_day", "tenant_external_recipients_per_day"])
def test_what_waits_for_budget_is_looked_at_when_it_is_given_back(
    fleet: Fleet, limit: Limit, how: str, budget: str
) -> None:
    # Given one mail dispatched, and one of another tenant that waits for what it has reserved
    limit(**{budget: 2})
    first = store(publisher_message_id="1", cc=["carl@example.org"])
    waiting = store(publisher_message_id="2", cc=["carl@example.org"])
    fleet.schedule()
    (message,) = fleet.take("send_plain")
    assert [row["full_reason"] for row in table("mailboxes")]
    # When it is not sent after all
    if how == "throttled":
        fleet.graph.throttle(SENDER, retry_after="1")
        assert work(message) == "done"
        rows("UPDATE mailboxes SET paused_until = NULL")
        runtime.limiter.resume(SENDER)
    elif how == "cancelled":
        assert operations.cancel(first, who="tests")
    else:
        rows("UPDATE incoming_emails SET lease_until = now() WHERE lease_until IS NOT NULL")
    rows("UPDATE incoming_emails SET next_attempt_at = now() + '1 hour' WHERE id = %(id)s", {"id": first})
    fleet.schedule()
    # Then
    assert [message.kwargs["incoming_email_id"] for message in fleet.take("send_plain")] == [waiting]


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


def test_after_a_loss_files_count_as_they_went_up(fleet: Fleet) -> None:
    sent_with_files(fleet, SMALL_ATTACHMENT_BYTES, SMALL_ATTACHMENT_BYTES + 1)
    requests = used("requests")
    restore()
    assert 0 <= used("upload_bytes") - received_bytes(fleet) < 4000
    assert requests <= used("requests") <= requests + 10


def test_after_a_loss_a_body_counts_with_its_length(fleet: Fleet) -> None:
    store(body={"contentType": "text", "content": "ü" * 300_000})
    fleet.send()
    restore()
    assert 0 <= used("upload_bytes") - received_bytes(fleet) < 2000


@pytest.mark.parametrize("due", [False, True])
def test_after_a_loss_what_went_up_for_mail_that_waits_to_be_sent_counts(fleet: Fleet, due: bool) -> None:
    # Given a mail whose files are up and whose send was refused
    fleet.graph.throttle(operation="send_draft")
    id = with_files(fleet, 1_000_000)
    fleet.send()
    assert (email_row(id)["status"], email_row(id)["lease_until"]) == ("received", None)
    if due:
        rows("UPDATE incoming_emails SET next_attempt_at = NULL")
    # When
    restore()
    # Then
    assert 0 <= used("upload_bytes") - received_bytes(fleet) < 4000
    assert used("requests") >= 3
    assert used("sends") == 0
    # Unless it was long ago
    rows("UPDATE file_uploads SET updated_at = now() - interval '6 minutes'")
    restore()
    assert used("upload_bytes") < 4000


def test_after_a_loss_files_count_that_a_worker_brings_up_for_long(fleet: Fleet) -> None:
    id = with_files(fleet, 1_000_000)
    fleet.schedule()
    uploads.plan(claim(id, intent=False), email_row(id)["payload"]["attachments"])
    rows("UPDATE incoming_emails SET reserved_at = now() - interval '20 minutes'")
    restore()
    assert used("upload_bytes") > 1_300_000
    assert used("sends") == 0


def test_after_a_loss_a_late_backup_counts_when_it_was_made(fleet: Fleet) -> None:
    store()
    fleet.send()
    rows("UPDATE sent_emails SET sent_at = now() - interval '1 hour', updated_at = now() - interval '1 hour'")
    restore()
    assert (used("requests"), used("recipients")) == (0, 1)
    fleet.backup()
    restore()
    assert used("requests") >= 2
    assert (used("sends"), used("recipients")) == (0, 1)


LONG_AGO = "00000000-0000-7000-8000-000000000000"


@pytest.mark.parametrize("sizes", [(), (100,)])
def test_after_a_loss_mail_counts_that_was_found_absent_long_ago_and_is_sent_now(
    fleet: Fleet, sizes: tuple[int, ...]
) -> None:
    # Given a mail of which an intent of long ago is kept as evidence
    id = with_files(fleet, *sizes)
    claim(id, intent=False)
    rows(
        """
        INSERT INTO sent_emails (id, incoming_email_id, status, intent_at) VALUES (%(old)s, %(id)s, 'not_sent', now())
        """,
        {"old": LONG_AGO, "id": id},
    )
    rows("UPDATE incoming_emails SET status = 'received', lease_token = NULL, lease_until = NULL")
    # When
    assert fleet.send() == ["done"]
    assert support.sending(id) == "sent"
    restore()
    # Then
    assert used("sends") == 1


def test_after_a_loss_mail_counts_whose_draft_was_in_doubt_for_long_and_is_sent_now(fleet: Fleet) -> None:
    id = store()
    claim(id).mark_in_doubt(look_again_in=timedelta(), evidence={"seen": "timeout"})
    rows("UPDATE sent_emails SET id = %(old)s", {"old": LONG_AGO})
    rows("UPDATE incoming_emails SET next_attempt_at = NULL")
    email = claim(id, intent=False)
    email.repeat_intent(support.LEASE, "a draft", evidence={"seen": "a draft"})
    email.record_sent(backup_delay=support.LEASE, publish_within=support.LEASE)
    restore()
    assert used("sends") == 1


def test_limits_that_were_unset_since_an_old_copy_of_redis_do_not_come_back_with_it(fleet: Fleet) -> None:
    # Given a Redis that was started from a copy of before a limit was unset
    rows("INSERT INTO mailboxes (mailbox, updated_at) VALUES (%(ben)s, now() - interval '1 day')", {"ben": BEN})
    runtime.limiter.set_limits(BEN, {"sends": 7})
    runtime.redis.delete("mailfleet:{limits}:born")
    assert not runtime.limiter.is_whole()
    # When
    budgets.keep_counts()
    # Then
    assert _usage(BEN).limit == 30


def test_what_was_spent_is_found_out_however_long_it_takes(fleet: Fleet, tables: str) -> None:
    # Given a table that keeps the question waiting for longer than statements may take
    empty_redis()
    with closing(psycopg2.connect(tables)) as other, ThreadPoolExecutor(1) as pool:
        with other, other.cursor() as locking:
            locking.execute("LOCK TABLE file_uploads")
            # When
            restoring = pool.submit(_restore_within, "50ms")
            support.wait_until("it has waited for long", lambda: restoring.done() or rows(_WAITS_FOR_LONG))
        # Then
        restoring.result()
    assert runtime.limiter.is_whole()


_WAITS_FOR_LONG = """
    SELECT 1 FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE relation = 'file_uploads'::regclass AND NOT granted
      AND query_start < clock_timestamp() - interval '100 milliseconds'
"""


def _restore_within(timeout: str) -> None:
    try:
        rows("SELECT set_config('statement_timeout', %(timeout)s, false)", {"timeout": timeout})
        budgets.keep_counts()
    finally:
        models.disconnect()


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
               (%(sender)s, '{}', %(slowed)s, now() + interval '1 minute', 'asked to wait: 429', 'graph')
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
    assert scheduling.agenda().closed.routes == set(turns.Route)
