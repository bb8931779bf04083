"""Ingest: stored and told, or rejected, kept and told; whatever the bytes are and however often they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest
import support
from support import Fleet, everything, send_email, table, work

import actors
import models
import runtime
import telemetry
from actors.ingest import Delivery, ingest
from contracts import MAX_DELIVERY_BYTES
from outbox import Unconfirmed
from tracing import trace_id

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure = support.configure


def delivery(email: dict[str, Any] | None = None, **properties: Any) -> Delivery:
    return Delivery(orjson.dumps(email or send_email()), **properties)


def told(fleet: Fleet) -> list[tuple[str, dict[str, Any]]]:
    return [(properties.type, orjson.loads(body)) for properties, body in fleet.take_raw("test.events")]


def test_a_stored_email_is_told_at_once_and_wakes_the_scheduler(fleet: Fleet) -> None:
    ingest([delivery(correlation_id="c-1")])
    ((properties, body),) = fleet.take_raw("test.events")
    (row,) = table("incoming_emails")
    assert (properties.type, properties.correlation_id) == ("SendEmailReceived", "c-1")
    assert orjson.loads(body)["incoming_email_id"] == row["id"]
    assert orjson.loads(body)["publisher_message_id"] == "order-1"
    assert table("outbox_events")[0]["published_at"] is not None
    assert [message.actor_name for message in fleet.take("scheduler")] == ["schedule_emails"]


def test_a_repeated_delivery_is_neither_stored_nor_told_again(fleet: Fleet) -> None:
    ingest([delivery(), delivery()])
    before = everything()
    ingest([delivery()])
    assert everything() == before
    assert [type for type, _ in told(fleet)] == ["SendEmailReceived"]


def test_a_publisher_that_named_a_queue_gets_its_copy_there(fleet: Fleet) -> None:
    fleet.channel.queue_declare("test.answers", durable=True)
    ingest([delivery(reply_to="test.answers"), delivery({"no": "email"}, reply_to="test.answers")])
    types = [properties.type for properties, _ in fleet.take_raw("test.answers")]
    assert types == ["SendEmailReceived", "SendEmailRejected"]
    ingest([delivery(send_email(publisher_message_id="2"), reply_to="no.such.queue")])
    assert len(table("incoming_emails")) == 2


REFUSING = {"x-max-length": 1, "x-overflow": "reject-publish"}


@pytest.mark.parametrize("reply_to", ["test.full", "amq.rabbitmq.reply-to.g1h2AA==.xx"])
def test_a_reply_that_cannot_be_made_harms_nobody_else(fleet: Fleet, reply_to: str) -> None:
    # Given a publisher whose queue is full, or who has gone
    fleet.channel.queue_declare("test.full", arguments=REFUSING)
    fleet.channel.basic_publish("", "test.full", b"full")
    # When
    try:
        ingest([Delivery(b"no json", reply_to=reply_to), delivery(reply_to=reply_to)])
        ingest([delivery(send_email(publisher_message_id="2"))])
    finally:
        fleet.channel.queue_delete("test.full")
    # Then
    assert sorted(type for type, _ in told(fleet)) == ["SendEmailReceived", "SendEmailReceived", "SendEmailRejected"]
    assert [row["published_at"] is None for row in table("outbox_events")] == [False, False]


def test_a_consumer_whose_queue_is_full_does_not_stop_the_line(fleet: Fleet) -> None:
    # Given
    fleet.channel.queue_declare("test.full", arguments=REFUSING)
    fleet.channel.queue_bind("test.full", "mail.events", "#")
    fleet.channel.basic_publish("", "test.full", b"full")
    # When
    try:
        ingest([delivery()])
    finally:
        fleet.channel.queue_delete("test.full")
    # Then the email is stored, and its event is the sweep's to tell
    assert len(table("incoming_emails")) == 1
    assert table("outbox_events")[0]["published_at"] is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not_json"),
        (b"\xff\xfe\x00", "not_json"),
        (b'{"from": ', "not_json"),
        (b"[" * 100_000, "not_json"),
        (b"null", "invalid"),
        (b"[]", "invalid"),
        (orjson.dumps(send_email(to=["not an address"])), "invalid"),
        (b" " * (MAX_DELIVERY_BYTES + 1), "too_large"),
    ],
    ids=["empty", "binary", "broken", "deep", "null", "list", "wrong", "huge"],
)
def test_bad_input_is_kept_with_its_reason_and_the_publisher_is_told(fleet: Fleet, body: bytes, reason: str) -> None:
    # When
    ingest([Delivery(body, correlation_id="c-1"), delivery()])
    # Then
    ((properties, kept),) = fleet.take_raw(runtime.REJECTED_QUEUE)
    assert kept == body
    assert properties.headers["x-reject-reason"] == reason
    assert properties.headers["x-reject-detail"]
    assert properties.correlation_id == "c-1"
    events = dict(told(fleet))
    assert events["SendEmailRejected"]["reason"] == reason
    assert len(table("incoming_emails")) == 1
    assert "SendEmailReceived" in events


def test_a_conflict_is_rejected_and_names_the_email_that_is_known(fleet: Fleet) -> None:
    ingest([delivery()])
    (row,) = table("incoming_emails")
    ingest([delivery(send_email(subject="Another"))])
    ((properties, _),) = fleet.take_raw(runtime.REJECTED_QUEUE)
    assert properties.headers["x-reject-reason"] == "conflict"
    (rejected,) = [body for type, body in told(fleet) if type == "SendEmailRejected"]
    assert (rejected["incoming_email_id"], rejected["publisher_message_id"]) == (row["id"], "order-1")
    assert table("incoming_emails") == [row]


def test_each_delivery_is_counted_once_whatever_becomes_of_it(fleet: Fleet) -> None:
    before = counted()
    ingest([delivery(), delivery(), delivery({"no": "email"})])
    ingest([delivery(send_email(subject="Another"))])
    assert {name: number - before.get(name, 0) for name, number in counted().items()} == {
        "stored": 1,
        "duplicate": 1,
        "rejected": 2,
    }


def counted() -> dict[str, float]:
    (family,) = telemetry.DELIVERIES.collect()
    return {each.labels["outcome"]: each.value for each in family.samples if each.name.endswith("_total")}


def test_a_rejection_that_is_repeated_has_the_same_id(fleet: Fleet) -> None:
    for _ in range(2):
        ingest([Delivery(b"{}")])
    ids = {properties.message_id for properties, _ in fleet.take_raw("test.events")}
    assert len(ids) == 1


@pytest.mark.parametrize(("sender", "accepted"), [("Ann@Example.com", True), ("eve@example.org", False)])
def test_only_allowed_mailboxes_may_be_sent_from(
    fleet: Fleet, configure: Callable[..., None], sender: str, accepted: bool
) -> None:
    configure(allowed_senders=("*@EXAMPLE.com",))
    ingest([delivery(send_email(**{"from": sender}))])
    assert len(table("incoming_emails")) == accepted
    rejected = fleet.take_raw(runtime.REJECTED_QUEUE)
    assert [properties.headers["x-reject-reason"] for properties, _ in rejected] == (
        [] if accepted else ["sender_not_allowed"]
    )


@pytest.mark.parametrize(
    ("user", "detail"),
    [
        ("crm", None),
        ("billing", "the user of RabbitMQ that user_id names may not"),
        (None, "the property user_id names none"),
    ],
)
def test_a_mailbox_may_be_one_users_alone(
    fleet: Fleet, configure: Callable[..., None], user: str | None, detail: str | None
) -> None:
    configure(allowed_senders=("crm=ann@*", "billing=invoices@example.com"))
    ingest([delivery(user_id=user)])
    ((type, body),) = told(fleet)
    assert type == ("SendEmailRejected" if detail else "SendEmailReceived")
    assert not detail or (body["reason"] == "sender_not_allowed" and detail in body["detail"])


@pytest.mark.parametrize(
    ("entries", "counted"),
    [
        (("redirect:qa@test.example",), (1, 1)),
        (("*@example.org",), (2, 2)),
        (("nobody@test.example",), (0, 0)),
        ((), (4, 4)),
    ],
)
def test_limits_count_the_recipients_that_a_firewall_lets_pass(
    fleet: Fleet, configure: Callable[..., None], entries: tuple[str, ...], counted: tuple[int, int]
) -> None:
    configure(recipient_firewall=entries)
    ingest([delivery(send_email(to=["a@example.org", "b@Example.org"], cc=["c@example.net"], bcc=["d@example.net"]))])
    (row,) = table("incoming_emails")
    assert (row["recipient_count"], row["external_recipient_count"]) == counted


def test_what_is_stored_but_could_not_be_told_is_told_by_the_sweep(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given RabbitMQ away
    away = runtime.Publisher(runtime.outbox.connection_parameters("amqp://a:b@127.0.0.1:1/", "test"), lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "publisher", away)
        with pytest.raises(Unconfirmed):
            ingest([delivery()])
        away.close()
    assert len(table("incoming_emails")) == 1
    assert told(fleet) == []
    # When the writer's time is over
    models.rows("UPDATE outbox_events SET claimed_until = now()")
    fleet.schedule()
    # Then
    assert [type for type, _ in told(fleet)] == ["SendEmailReceived"]


# From Python


def test_a_python_producer_may_send_to_the_actors_queue(fleet: Fleet) -> None:
    message = actors.ingest_emails.message([{"email": send_email(), "correlation_id": "c-1"}, {"email": {"no": 1}}])
    assert work(message) == "done"
    assert table("incoming_emails")[0]["correlation_id"] == "c-1"
    assert sorted(type for type, _ in told(fleet)) == ["SendEmailReceived", "SendEmailRejected"]


@pytest.mark.parametrize("value", [5, "x\x00y", "line\nbreak", "x" * 300, {"a": 1}, b"\xff"])
@pytest.mark.parametrize("name", ["correlation_id", "reply_to", "traceparent"])
def test_a_property_that_cannot_be_carried_is_left_out(fleet: Fleet, name: str, value: Any) -> None:
    given = {"correlation_id": None, "reply_to": None, "traceparent": None, name: value}
    ingest([Delivery.of(orjson.dumps(send_email()), **given), Delivery.of(b"{}", **given)])
    kept = table("incoming_emails")[0][name]
    assert (trace_id(kept) and kept != value) if name == "traceparent" else kept is None
    assert sorted(type for type, _ in told(fleet)) == ["SendEmailReceived", "SendEmailRejected"]


def test_a_message_of_another_shape_is_dead_lettered_with_its_content(fleet: Fleet) -> None:
    assert work(actors.ingest_emails.message([{"emails": []}])) == "dead-lettered"


def test_properties_are_measured_in_the_bytes_that_they_are_carried_in(fleet: Fleet) -> None:
    fleet.channel.queue_declare("ä" * 127, durable=True)
    given = {"correlation_id": "ä" * 128, "reply_to": "ä" * 127, "traceparent": None}
    ingest([Delivery.of(orjson.dumps(send_email()), **given)])
    (row,) = table("incoming_emails")
    assert (row["correlation_id"], row["reply_to"]) == (None, "ä" * 127)
    assert len(fleet.take_raw("ä" * 127)) == 1
    fleet.channel.queue_delete("ä" * 127)


def test_an_event_that_cannot_be_published_keeps_no_other_from_being_published(fleet: Fleet) -> None:
    # Given events left over, one of which cannot be encoded
    support.store_many(3)
    models.rows("UPDATE outbox_events SET claimed_until = now()")
    models.rows(
        "UPDATE outbox_events SET correlation_id = repeat('ä', 200) WHERE id = (SELECT id FROM outbox_events LIMIT 1)"
    )
    # When
    fleet.schedule()
    # Then the others are published and marked, and the scheduler's turn is complete
    assert len({body["incoming_email_id"] for _, body in told(fleet)}) == 2
    assert len([row for row in table("outbox_events") if row["published_at"] is None]) == 1


OWN_QUEUES = [
    "send_email",
    "send_email.rejected",
    "mail.dead_letters.mirror",
    "scheduler",
    "send_plain.DQ",
    "backup.XQ",
]


@pytest.mark.parametrize("queue", OWN_QUEUES)
@pytest.mark.parametrize("email", [send_email(), {"no": "email"}], ids=["valid", "invalid"])
def test_nobody_has_answers_put_on_our_own_queues(fleet: Fleet, queue: str, email: dict[str, Any]) -> None:
    # When
    ingest([delivery(email, reply_to=queue)])
    # Then it is rejected, which everyone but that queue is told
    assert table("incoming_emails") == []
    assert [type for type, _ in told(fleet)] == ["SendEmailRejected"]
    ((properties, _),) = fleet.take_raw(runtime.REJECTED_QUEUE)
    assert properties.headers["x-reject-reason"] == "invalid"
    if queue in support.QUEUES:
        assert fleet.take_raw(queue) == []
