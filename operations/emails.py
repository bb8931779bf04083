"""Single emails: publish one, see all that is known of one."""

from __future__ import annotations

from typing import Any

import pika

import contracts
import runtime
from models import inspection
from operations.errors import NotFound
from outbox import Outgoing


def publish(body: bytes) -> str:
    """Put one ``SendEmail`` on the queue, as an application would, and return the publisher's id.

    Raises:
        Unacceptable: It would be rejected; nothing was published.
        Unconfirmed: RabbitMQ is away.
    """
    accepted = contracts.accept(body)
    properties = pika.BasicProperties(content_type="application/json", delivery_mode=pika.DeliveryMode.Persistent)
    runtime.publisher.publish([Outgoing("", runtime.SEND_QUEUE, body, properties, mandatory=True)])
    return accepted.publisher_message_id


def status(id: str) -> dict[str, Any]:
    """Return everything that is known of an email, by our id or the publisher's. Its content is left out."""
    incoming_email_id = inspection.find_email(id)
    if incoming_email_id is None:
        raise NotFound(f"no email has the id {id}")
    return inspection.everything_about(incoming_email_id)
