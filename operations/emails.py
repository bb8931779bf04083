"""Emails: find them, publish one, see all that is known of one, keep one from being sent."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pika

import contracts
import models
import runtime
from actors.budgets import give_back
from limiter import Reservation, Wanted
from models import audit, cancelling, finding, inspection
from models.finding import EmailFilter, EmailPage
from operations.errors import NotFound
from outbox import PUBLISH_WITHIN, Outgoing
from telemetry import Step, mail_log
from tracing import trace_id


def publish(body: bytes, *, who: str) -> str:
    """Put one ``SendEmail`` on the queue, as an application would, and return the publisher's id.

    Who wants it is written down first: whoever sees no confirmation does not know that it was not published.

    Raises:
        Unacceptable: It would be rejected; nothing was published.
        Unconfirmed: RabbitMQ is away.
    """
    accepted = contracts.accept(body)
    audit.record(who, "publish", accepted.publisher_message_id)
    properties = pika.BasicProperties(content_type="application/json", delivery_mode=pika.DeliveryMode.Persistent)
    runtime.publisher.publish([Outgoing("", runtime.SEND_QUEUE, body, properties, mandatory=True)])
    return accepted.publisher_message_id


def find_emails(filter: EmailFilter, *, limit: int, before: str | None = None) -> EmailPage:
    """Return a page of the emails that match, newest first: at most ``limit``, those before an email's id."""
    return finding.emails(filter, limit=limit, before=before)


def status(id: str) -> dict[str, Any]:
    """Return everything that is known of an email, by our id or the publisher's. Its content is left out.

    A recipient firewall that stands is told of: it decides where the mail goes.
    """
    known = inspection.everything_about(_found(id))
    firewall = runtime.firewall()
    return {**known, "recipient_firewall": str(firewall)} if firewall.stands else known


def timeline(known: dict[str, Any]) -> list[tuple[datetime, str]]:
    """Return what happened to an email of which `status` tells, in words for people, oldest first."""
    return sorted(_happenings(known), key=lambda happening: str(happening[0]))


def _happenings(known: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    yield known["created_at"], "received"
    for receipt in known["receipts"]:
        yield receipt["received_at"], f"attempt {receipt['attempt']} taken up by a worker"
    for upload in known["uploads"]:
        yield upload["updated_at"], f"{upload['filename']}: {upload['uploaded_bytes']} of {upload['size']} bytes up"
    for seen in (known["sending"] or {}).get("evidence", []):
        asked = f"asked {seen['asked']}, " if "asked" in seen else ""
        yield datetime.fromisoformat(str(seen["at"])), f"{asked}saw {seen['seen']}"
    for event in known["events"]:
        yield (
            event["published_at"] or event["created_at"],
            f"{event['type']} {'published' if event['published_at'] else 'waiting'}",
        )
    for backup in known["backups"]:
        yield backup["created_at"], f"archived, {backup['size']} bytes"
    for letter in known["dead_letters"]:
        yield letter["created_at"], f"dead letter ({letter['status']}): {letter['reason']}"


def cancel(id: str, *, who: str) -> bool:
    """Keep an email, by our id or the publisher's, from being sent, and have the publisher told.

    Returns:
        Whether it was this call that did it: repeating it is harmless.

    Raises:
        NotFound: There is no such email.
        NotCancellable: It is, or may be, sent already, or has ended otherwise. Nothing was changed.
    """
    incoming_email_id = _found(id)
    with models.transaction():
        cancelled = cancelling.cancel(incoming_email_id, publish_within=PUBLISH_WITHIN)
        if cancelled is None:
            return False
        audit.record(who, "cancel", incoming_email_id)
    runtime.events.add([cancelled.event])
    if cancelled.reserved_at_ms is not None:
        send = Wanted(cancelled.recipient_count, cancelled.external_recipient_count)
        give_back(cancelled.mailbox, Reservation(cancelled.reserved_at_ms), send)
        runtime.wake("schedule_emails")
    event = cancelled.event
    mail_log(
        Step.CANCELLED,
        incoming_email_id=incoming_email_id,
        publisher_message_id=event.publisher_message_id,
        correlation_id=event.correlation_id,
        trace_id=trace_id(event.traceparent),
    )
    return True


def _found(id: str) -> str:
    incoming_email_id = inspection.find_email(id)
    if incoming_email_id is None:
        raise NotFound(f"no email has the id {id}")
    return incoming_email_id
