"""``schedule_emails``: what may go out goes to its route, within the limits, and nothing is slept through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
import support
from support import SENDER, Fleet, email_row, everything, make_due, rows, store, store_many, table, wait_until, work

import actors
import models
import operations
import runtime
from actors import scheduling
from models import mailboxes
from outbox import Unconfirmed

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure = support.configure

Configure = Callable[..., None]
FILE = {"name": "a.pdf", "size": 5, "urlOrId": "https://files.example/a.pdf"}


def away() -> runtime.Publisher:
    return runtime.Publisher(runtime.outbox.connection_parameters("amqp://a:b@127.0.0.1:1/", "test"), lambda _: None)


def test_each_email_is_handed_to_the_queue_of_its_route_with_what_a_dispatch_says(fleet: Fleet) -> None:
    # Given
    plain = store(publisher_message_id="plain")
    attached = store(publisher_message_id="attached", attachments=[FILE])
    rows("UPDATE incoming_emails SET traceparent = '00-a-b-01' WHERE id = %(id)s", {"id": plain})
    # When
    fleet.schedule()
    # Then
    ((to_plain,), (to_attached,)) = fleet.take("send_plain"), fleet.take("send_attached")
    assert to_plain.kwargs == {
        "incoming_email_id": plain,
        "publisher_message_id": "plain",
        "route": "no-attachment",
        "attempt": 1,
    }
    assert to_plain.options["traceparent"] == "00-a-b-01"
    assert (to_attached.kwargs["incoming_email_id"], to_attached.kwargs["route"]) == (attached, "attachment")


def test_no_more_is_in_flight_than_each_route_may_have(fleet: Fleet, configure: Configure) -> None:
    # Given
    configure(send_plain_concurrency=3, send_attached_concurrency=2, mailbox_concurrency=0)
    store_many(8)
    store_many(8, attachments=[FILE], publisher_message_id=None, subject="attached")
    for n in range(8):
        store(publisher_message_id=f"attached-{n}", attachments=[FILE])
    # When
    for _ in range(3):
        fleet.schedule()
    # Then
    assert (len(fleet.take("send_plain")), len(fleet.take("send_attached"))) == (3, 2)


def test_a_mailbox_that_refuses_us_is_probed_by_a_send_or_by_a_backup_not_by_both(fleet: Fleet) -> None:
    # Given a mailbox that refused, with a mail and a backup that are due
    store(publisher_message_id="sent")
    fleet.send()
    mailboxes.refuse(SENDER, why="403", first_wait=timedelta(), longest_wait=timedelta())
    store(publisher_message_id="waits")
    rows("UPDATE sent_emails SET backup_due_at = now()")
    # When
    fleet.schedule()
    # Then
    assert len(fleet.take("send_plain")) + len(fleet.take("backup")) == 1


def test_a_mailbox_has_no_more_in_flight_than_its_share_over_both_routes(fleet: Fleet, configure: Configure) -> None:
    configure(mailbox_concurrency=3)
    for n in range(4):
        store(publisher_message_id=f"plain-{n}")
        store(publisher_message_id=f"attached-{n}", attachments=[FILE])
    fleet.schedule()
    fleet.schedule()
    assert len(fleet.take("send_plain")) + len(fleet.take("send_attached")) == 3


def test_attached_mail_does_not_wait_behind_all_plain_mail_of_its_mailbox(fleet: Fleet, configure: Configure) -> None:
    # Given a mailbox with more of each than it may have in flight
    configure(mailbox_concurrency=1)
    for n in range(30):
        store(publisher_message_id=f"plain-{n}")
        store(publisher_message_id=f"attached-{n}", attachments=[FILE])
    # When one after the other is done (a fair coin shows one side 30 times once in a thousand million)
    for _ in range(30):
        fleet.schedule()
        rows("UPDATE incoming_emails SET status = 'processed', lease_until = NULL WHERE lease_until IS NOT NULL")
    # Then both went out
    assert fleet.take("send_plain")
    assert fleet.take("send_attached")


def test_turns_go_on_where_they_ended_so_that_each_mailbox_is_served(fleet: Fleet, configure: Configure) -> None:
    # Given
    configure(send_plain_concurrency=2, mailbox_concurrency=1)
    for name in "abcde":
        for n in range(3):
            store(**{"publisher_message_id": f"{name}-{n}", "from": f"{name}@example.com"})
    # When every mail is done at once
    served: list[str] = []
    for _ in range(5):
        fleet.schedule()
        served += [message.kwargs["publisher_message_id"][0] for message in fleet.take("send_plain")]
        rows("UPDATE incoming_emails SET status = 'processed', lease_until = NULL WHERE lease_until IS NOT NULL")
    # Then
    assert Counter(served) == dict.fromkeys("abcde", 2)


def test_what_could_not_be_published_is_taken_back_and_goes_out_later_without_an_attempt_spent(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    id = store()
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "publisher", publisher := away())
        with pytest.raises(Unconfirmed):
            fleet.schedule()
        publisher.close()
    # When
    fleet.schedule()
    # Then
    (message,) = fleet.take("send_plain")
    assert message.kwargs["attempt"] == 1
    assert email_row(id)["attempt_count"] == 1


def test_a_scheduler_that_died_between_claim_and_publish_costs_nothing(fleet: Fleet) -> None:
    id = store()
    support.dispatch()
    make_due(id)
    fleet.schedule()
    assert [message.kwargs["attempt"] for message in fleet.take("send_plain")] == [1]


def test_mail_wakes_by_itself_when_its_time_has_come(fleet: Fleet) -> None:
    # Given
    id = store(send_at=(datetime.now(UTC) + timedelta(seconds=0.6)).isoformat())
    fleet.schedule()
    assert fleet.take("send_plain") == []
    fleet.take("scheduler")
    # Then the scheduler is woken
    (message,) = wait_until("the alarm rings", lambda: fleet.take("scheduler"))
    assert message.actor_name == "schedule_emails"
    wait_until("it is due", lambda: support.seconds_until("incoming_emails", "next_attempt_at", "id", id) <= 0)
    work(message)
    assert len(fleet.take("send_plain")) == 1


def test_wake_ups_of_a_burst_are_one_and_none_is_lost(fleet: Fleet) -> None:
    for _ in range(50):
        runtime.wake("schedule_emails")
    runtime.publisher.publish([])
    (message,) = wait_until("it is woken", lambda: fleet.take("scheduler"))
    work(message)
    runtime.wake("schedule_emails")
    assert wait_until("it is woken again", lambda: fleet.take("scheduler"))


def test_without_redis_nothing_is_handed_out_and_it_is_looked_for_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a limiter that cannot count
    store()
    store(publisher_message_id="order-2", expires_at=(datetime.now(UTC) + timedelta(minutes=1)).isoformat())
    rows("UPDATE incoming_emails SET expires_at = now() WHERE publisher_message_id = 'order-2'")
    with monkeypatch.context() as patched:
        patched.setattr(runtime.wake_ups, "redis", runtime.Redis(port=1, retry=runtime.Retry(runtime.NoBackoff(), 0)))
        # When
        fleet.schedule()
        # Then nothing is sent to workers who would put it back, and the rest goes on
        assert fleet.take("send_plain") == []
        assert fleet.events() == ["SendEmailExpired"]
    # And the scheduler wakes itself until Redis is back
    support.wait_until("it is woken", lambda: fleet.take("scheduler"))
    fleet.schedule()
    assert len(fleet.take("send_plain")) == 1


def test_however_many_events_are_left_over_mail_is_dispatched_in_between(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given more events than are published at a time, whose writer did not
    monkeypatch.setattr(models.events, "BATCH", 2)
    for number in range(5):
        store(publisher_message_id=f"order-{number}")
    rows("UPDATE outbox_events SET claimed_until = now()")
    # When
    fleet.schedule()
    # Then the sweep has handed out the mail, and comes again for the rest
    assert len(fleet.take("send_plain")) == 4  # the mailbox's share
    assert len(fleet.take_raw("test.events")) == 2
    support.wait_until("it wakes itself", lambda: fleet.take("scheduler"))
    fleet.schedule()
    fleet.schedule()
    assert len(fleet.take_raw("test.events")) == 3


def test_overdue_mail_expires_and_its_publisher_is_told(fleet: Fleet) -> None:
    id = store(expires_at=(datetime.now(UTC) + timedelta(minutes=1)).isoformat())
    rows("UPDATE incoming_emails SET expires_at = now()")
    fleet.schedule()
    assert email_row(id)["status"] == "expired"
    assert fleet.take("send_plain") == []
    assert fleet.events() == ["SendEmailExpired"]


@pytest.mark.parametrize(
    "at",
    ["9999-12-31T23:59:59-23:00", "0001-01-01T00:00:00+23:00", "9998-01-01T00:00:00Z", "2030-01-01T00:00:00+23:00"],
)
@pytest.mark.parametrize("field", ["send_at", "expires_at"])
def test_an_instant_at_the_end_of_time_does_not_stop_the_scheduler(fleet: Fleet, field: str, at: str) -> None:
    from actors.ingest import Delivery, ingest

    ingest([Delivery(support.orjson.dumps(support.send_email(**{field: at})))])
    fleet.schedule()
    fleet.schedule()


def test_events_that_nobody_published_are_published_once(fleet: Fleet) -> None:
    store()
    rows("UPDATE outbox_events SET claimed_until = now()")
    fleet.schedule()
    fleet.schedule()
    assert fleet.events() == ["SendEmailReceived"]
    assert table("outbox_events")[0]["published_at"] is not None


def test_due_backups_are_handed_to_their_queue_up_to_the_fleets_concurrency(fleet: Fleet, configure: Configure) -> None:
    configure(backup_concurrency=2)
    for result in store_many(3):
        support.claim(result.incoming_email_id).record_sent(backup_delay=support.NOW, publish_within=support.WITHIN)
    fleet.schedule()
    fleet.schedule()
    (message,) = fleet.take("backup")
    assert len(message.args[0]) == 2
    assert message.actor_name == "backup_emails"


def test_what_may_be_in_flight_is_changed_while_the_scheduler_runs(fleet: Fleet, configure: Configure) -> None:
    # Given
    configure(send_plain_concurrency=1, backup_concurrency=1, mailbox_concurrency=0)
    for result in store_many(4, **{"from": "ben@example.com"}):
        support.claim(result.incoming_email_id).record_sent(backup_delay=support.NOW, publish_within=support.WITHIN)
    for number in range(4):
        store(publisher_message_id=f"plain-{number}")

    def in_flight() -> tuple[int, int]:
        fleet.schedule()
        leased = [len([row for row in table(name) if row[column]]) for name, column in LEASES.items()]
        return leased[0], leased[1]

    assert in_flight() == (1, 1)
    # Then more goes out, by each as it was set
    operations.set_limits(None, {"send_plain_concurrency": 3, "backup_concurrency": 2}, who="tests")
    assert in_flight() == (3, 2)
    # And back to the settings: what is in hand stays, and nothing is added
    operations.unset_limits(None, ["send_plain_concurrency", "backup_concurrency"], who="tests")
    assert in_flight() == (3, 2)


LEASES = {"incoming_emails": "lease_until", "sent_emails": "backup_lease_until"}


def test_a_paused_mailbox_is_left_alone_and_others_are_not(fleet: Fleet) -> None:
    store()
    store(**{"publisher_message_id": "2", "from": "ben@example.com"})
    mailboxes.pause(SENDER, timedelta(minutes=1), why="429")
    fleet.schedule()
    assert [message.kwargs["publisher_message_id"] for message in fleet.take("send_plain")] == ["2"]


def test_scheduling_twice_hands_out_nothing_twice(fleet: Fleet) -> None:
    store()
    fleet.schedule()
    before = everything()
    fleet.schedule()
    assert everything() == before
    assert len(fleet.take("send_plain")) == 1


def test_a_sweep_asks_only_for_what_there_is(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given
    fleet.schedule()
    statements: list[str] = []
    execute = models.database.execute_sql

    def count(sql: str, parameters: object = None) -> object:
        if sql.startswith("EXECUTE"):
            statements.append(sql)
        return execute(sql, parameters)

    monkeypatch.setattr(models.database, "execute_sql", count)
    # When there is nothing
    fleet.schedule()
    # Then it asks what is due, for what it is worth asking, and what is due next
    assert len(statements) == 3
    # When there is mail of one route
    store()
    statements.clear()
    fleet.schedule()
    # Then
    assert len(fleet.take("send_plain")) == 1
    assert len(statements) == 8


def test_sweeps_are_further_apart_after_one_that_filled_what_may_be_in_flight(
    fleet: Fleet, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    apart: list[timedelta] = []
    monkeypatch.setattr(scheduling._pace, "full", False)
    monkeypatch.setattr(scheduling._pace._pace, "keep", apart.append)
    configure(send_plain_concurrency=2)
    store()
    # When one is handed out, then as many as may be in flight, then there is nothing to hand out
    fleet.schedule()
    store_many(1)
    fleet.schedule()
    fleet.schedule()
    fleet.schedule()
    # Then
    near, far = scheduling._SWEEPS_APART, scheduling._SWEEPS_APART_WHEN_FULL
    assert near < far
    assert apart == [near, near, far, near]


def test_acknowledging_a_receipt_twice_keeps_the_first_time(fleet: Fleet) -> None:
    id = store()
    support.claim(id)
    actors.acknowledge_receipt([[id, 1]])
    before = table("worker_receipts")
    actors.acknowledge_receipt([[id, 1], [id, 2]])
    assert table("worker_receipts") == before
    assert before[0]["acknowledged_at"] is not None
