"""Ingest: from a delivery to a row and its ``SendEmailReceived``, or to a rejection that says why.

The bridge calls the actor in its own process with what it has consumed; Python producers may send to the queue
``ingest`` instead. Either way a batch is one transaction, and it is done only when its events and rejections are
confirmed by RabbitMQ: who calls may acknowledge what it consumed. Running a batch again finds the rows of the first.

Where it may die, and what happens when the batch is run again:

* ``ingest.stored``, before anything is published: the rows are found; their events are left to the scheduler's sweep,
  which also does the work if the scheduler was not woken; rejections are decided and published again.
* ``events.published``, ``events.marked``: see `runtime.publish_events`.
* ``ingest.published``, all confirmed: the rows are found; rejections are published again, an event with the same
  ``message_id``.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import dramatiq
import orjson
import pika

import contracts
import models
import runtime
import telemetry
from contracts import Event, EventType, Unacceptable
from crash_points import CrashPoint
from mail_rules import refusal_of_sender, sender_rules
from models import Arrival, Reception
from models.ingest import Stored
from outbox import PUBLISH_WITHIN, Outgoing, Unconfirmed, Unpublishable, event_messages
from telemetry import Step, mail_log
from tracing import Span, ending, trace_id

log = logging.getLogger(__name__)

#: AMQP frames a message's headers once; a long detail would not fit every client's frame.
_MAX_DETAIL_BYTES = 2000
#: AMQP's longest property.
_MAX_PROPERTY_BYTES = 255
_AWAY_PAUSE = timedelta(seconds=2)
_REJECTED = "rejected"
# A counter that appears with its first event has no increase that an alert could see.
for _outcome in (Reception.STORED.value, Reception.DUPLICATE.value, _REJECTED):
    telemetry.DELIVERIES.labels(_outcome)


class Delivery(NamedTuple):
    """One message as it came: its body and what its properties say about answering it."""

    body: bytes
    correlation_id: str | None = None
    reply_to: str | None = None
    traceparent: str | None = None
    #: The publisher's user, which RabbitMQ has verified.
    user_id: str | None = None

    @classmethod
    def of(cls, body: bytes, correlation_id: Any, reply_to: Any, traceparent: Any, user_id: Any = None) -> Delivery:
        """Keep of the properties what can be stored and carried back: AMQP lets a client put any bytes there."""
        return cls(body, *map(_carried, (correlation_id, reply_to, traceparent, user_id)))

    @property
    def answering(self) -> tuple[str | None, str | None, str | None]:
        """What an answer carries back: correlation id, queue to reply to, traceparent."""
        return self.correlation_id, self.reply_to, self.traceparent


class _Arrived(NamedTuple):
    delivery: Delivery
    arrival: Arrival
    span: Span


class _Rejection(NamedTuple):
    delivery: Delivery
    reason: str
    detail: str
    publisher_message_id: str | None
    incoming_email_id: str | None = None


def _carried(value: Any) -> str | None:
    # What is printable has no surrogates, so it can be encoded.
    printable = isinstance(value, str) and value.isprintable()
    return value if printable and len(value.encode()) <= _MAX_PROPERTY_BYTES else None


@dramatiq.actor(queue_name="ingest", found_again=False)
def ingest_emails(deliveries: list[dict[str, Any]]) -> None:
    """Ingest emails that a Python producer sent to this queue.

    Args:
        deliveries: Each ``{"email": {…}}`` as in ``SendEmail``, optionally with ``correlation_id``, ``reply_to`` and
            ``traceparent``.
    """
    read = [_produced(**delivery) for delivery in deliveries]
    while True:
        try:
            return ingest(read)
        except (models.DatabaseAway, Unconfirmed):
            # Only this message has the emails: wait until the actor's time limit dead-letters it, content included.
            time.sleep(_AWAY_PAUSE.total_seconds())


def _produced(email: Any, correlation_id: Any = None, reply_to: Any = None, traceparent: Any = None) -> Delivery:
    return Delivery.of(orjson.dumps(email), correlation_id, reply_to, traceparent)


def ingest(deliveries: Sequence[Delivery]) -> None:
    """Store a batch, publish its events and rejections, and wake the scheduler.

    Safe to repeat. On return every delivery is either stored and its event published, or rejected and said so.

    Raises:
        DatabaseAway: Nothing is certain; repeat the batch.
        Unconfirmed: What is valid is stored; its events are left to the sweep. Repeat the batch for the rejections.
    """
    arrivals, rejections = _sort(deliveries)
    try:
        with ending(arrived.span for arrived in arrivals):
            _announce(*_store(arrivals, rejections))
    except models.NotStorable as refusal:
        # One of them is of a kind that nobody foresaw: found by itself, it stops no other.
        if len(deliveries) > 1:
            for delivery in deliveries:
                ingest([delivery])
        else:
            _announce([], [_Rejection(deliveries[0], "not_storable", str(refusal), None)])


def _store(arrivals: list[_Arrived], rejections: list[_Rejection]) -> tuple[list[Event], list[_Rejection]]:
    """Store what arrived; return the events that became true, and the rejections with the conflicts added."""
    stored = _store_sealed([arrived.arrival for arrived in arrivals]) if arrivals else []
    for (delivery, arrival, span), (reception, incoming_email_id, _) in zip(arrivals, stored, strict=True):
        publisher_message_id = arrival.accepted.publisher_message_id
        if reception is not Reception.CONFLICT:  # which is counted as rejected once its rejection is told
            telemetry.DELIVERIES.labels(reception.value).inc()
        span.note(incoming_email_id=incoming_email_id, outcome=reception.value)
        if reception is Reception.STORED:
            mail_log(
                Step.RECEIVED,
                incoming_email_id=incoming_email_id,
                publisher_message_id=publisher_message_id,
                correlation_id=arrival.correlation_id,
                trace_id=trace_id(arrival.traceparent),
            )
        elif reception is Reception.CONFLICT:
            rejections.append(_conflict(delivery, publisher_message_id, incoming_email_id))
    return [event for _, _, event in stored if event], rejections


def _store_sealed(arrivals: Sequence[Arrival]) -> list[Stored]:
    sealer = runtime.payloads.sealer() if runtime.configuration.seal_payloads else None
    try:
        return models.store(arrivals, publish_within=PUBLISH_WITHIN, sealer=sealer)
    except models.DataKeyLost:
        runtime.payloads.forget()
        raise


def _sort(deliveries: Sequence[Delivery]) -> tuple[list[_Arrived], list[_Rejection]]:
    arrivals, rejections = [], []
    for delivery in deliveries:
        try:
            accepted = contracts.accept(delivery.body)
            _check_sender(delivery, accepted)
            _check_reply_to(delivery, accepted)
        except Unacceptable as error:
            # Even to tell of the rejection nothing is put on a queue of our own.
            told = delivery._replace(reply_to=None) if runtime.is_own_queue(delivery.reply_to) else delivery
            rejections.append(_Rejection(told, error.reason, error.detail, error.publisher_message_id))
        else:
            arrivals.append(_arrived(delivery, accepted))
    return arrivals, rejections


def _arrived(delivery: Delivery, accepted: contracts.AcceptedEmail) -> _Arrived:
    """Begin the mail's trace, or go on with its publisher's: what follows from here is found under this span."""
    span = runtime.tracer.root(
        "receive",
        delivery.traceparent,
        publisher_message_id=accepted.publisher_message_id,
        correlation_id=delivery.correlation_id,
    )
    answering = delivery.correlation_id, delivery.reply_to, span.traceparent
    arrival = Arrival(accepted, *answering, *_recipients_reached(accepted))
    return _Arrived(delivery, arrival, span)


def _recipients_reached(accepted: contracts.AcceptedEmail) -> tuple[int, int]:
    """Return how many external recipients the mail reaches, and how many in all: what limits count."""
    domains = accepted.email.recipient_domains
    firewall = runtime.firewall()
    if firewall.stands:
        email = accepted.email
        reached = firewall.reached({"to": email.to, "cc": email.cc, "bcc": email.bcc})
        domains = [address.rpartition("@")[2].lower() for addresses in reached.values() for address in addresses]
    patterns = [pattern.lower() for pattern in runtime.configuration.internal_domains]
    return sum(not any(fnmatchcase(domain, pattern) for pattern in patterns) for domain in domains), len(domains)


def _check_sender(delivery: Delivery, accepted: contracts.AcceptedEmail) -> None:
    rules = sender_rules(runtime.configuration.allowed_senders)
    if refusal := refusal_of_sender(accepted.email.mailbox, delivery.user_id, rules):
        raise Unacceptable("sender_not_allowed", f"from: {refusal}", accepted.publisher_message_id)


def _check_reply_to(delivery: Delivery, accepted: contracts.AcceptedEmail) -> None:
    if runtime.is_own_queue(delivery.reply_to):
        raise Unacceptable("invalid", "reply_to: this is a queue of mailfleet's own", accepted.publisher_message_id)


def _conflict(delivery: Delivery, publisher_message_id: str, incoming_email_id: str) -> _Rejection:
    detail = "an email with this publisher_message_id and other content was received before"
    return _Rejection(delivery, "conflict", detail, publisher_message_id, incoming_email_id)


def _announce(events: list[Event], rejections: list[_Rejection]) -> None:
    """Publish everything with one confirmation, then note and log it."""
    if events:
        runtime.wake("schedule_emails")
    runtime.crash_point(CrashPoint.INGEST_STORED)
    try:
        runtime.publish_events(events)
    except Unpublishable:
        log.warning("a consumer's queue refuses events: they are left to the sweep")
    runtime.publisher.publish([message for rejection in rejections for message in _rejection_messages(rejection)])
    runtime.crash_point(CrashPoint.INGEST_PUBLISHED)
    for rejection in rejections:
        _note_rejection(rejection)


def _note_rejection(rejection: _Rejection) -> None:
    telemetry.DELIVERIES.labels(_REJECTED).inc()
    mail_log(
        Step.REJECTED,
        incoming_email_id=rejection.incoming_email_id,
        publisher_message_id=rejection.publisher_message_id,
        correlation_id=rejection.delivery.correlation_id,
        trace_id=trace_id(rejection.delivery.traceparent),
        reason=rejection.reason,
    )


def _rejection_messages(rejection: _Rejection) -> list[Outgoing]:
    """Return the original for ``send_email.rejected``, and the event that tells the publisher."""
    delivery = rejection.delivery
    kept = pika.BasicProperties(
        delivery_mode=pika.DeliveryMode.Persistent,
        correlation_id=delivery.correlation_id,
        reply_to=delivery.reply_to,
        headers={"x-reject-reason": rejection.reason, "x-reject-detail": _cut(rejection.detail)},
    )
    event = Event(
        contracts.rejection_id(hashlib.sha256(delivery.body).hexdigest() + rejection.reason),
        EventType.REJECTED,
        contracts.event_body(
            EventType.REJECTED,
            publisher_message_id=rejection.publisher_message_id,
            incoming_email_id=rejection.incoming_email_id,
            at=datetime.now(UTC),
            reason=rejection.reason,
            detail=rejection.detail,
        ),
        rejection.incoming_email_id,
        *delivery.answering,
    )
    # Of the rest nothing is stored, so it must not stop the line: the original is what is kept.
    told = [message._replace(best_effort=True) for message in event_messages(event)]
    return [Outgoing("", runtime.REJECTED_QUEUE, delivery.body, kept, mandatory=True), *told]


def _cut(detail: str) -> str:
    return detail.encode()[:_MAX_DETAIL_BYTES].decode("utf-8", "ignore")
