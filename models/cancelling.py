"""Cancelling: an email that nobody has begun to send is never sent.

The row's lock decides between an operator and a worker who want the same email at the same moment: whoever comes second
sees what the first has made of it. The sending is looked at only under the lock, by a statement of its own: a snapshot
from before could miss that the email has been in a worker's hands, and in doubt, meanwhile.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from contracts import Event, EventType, event_body, event_id
from models.database import rows, transaction
from models.events import append
from models.states import Sending, Status, check

#: Why an email that has come to its end is not cancelled.
_ENDED = {
    Status.PROCESSED: "it is sent",
    Status.FAILED: "it has failed, and is sent only if its dead letter is replayed: discard that instead",
    Status.EXPIRED: "it has expired, and is not sent",
}


class NotCancellable(Exception):
    """Raised when an email is, or may be, sent already, or has ended otherwise; the text says which."""


class Cancelled(NamedTuple):
    """An email that was cancelled: the event to publish, and the send budget that was reserved for its dispatch."""

    event: Event
    mailbox: str
    recipient_count: int
    external_recipient_count: int
    #: By Redis's clock; None: none was reserved.
    reserved_at_ms: int | None


def cancel(incoming_email_id: str, *, publish_within: timedelta) -> Cancelled | None:
    """Settle an email that no worker has in hand as cancelled, in the transaction that is open or its own.

    Safe to repeat. A dispatch that is on its way claims nothing any more. A draft that was made for it stays.

    Returns:
        What the caller has to publish for ``publish_within``, and to give back; None if it was cancelled before.

    Raises:
        NotCancellable: Nothing was changed.
    """
    with transaction():
        ((status, held, *told),) = rows(_LOCK, {"id": incoming_email_id})
        if status == Status.CANCELLED:
            return None
        if refusal := _refusal(incoming_email_id, Status(status), held):
            raise NotCancellable(refusal)
        check(Status(status), Status.CANCELLED)
        rows(
            """
            UPDATE incoming_emails SET status = 'cancelled', next_attempt_at = NULL, lease_until = NULL,
                                       updated_at = now()
            WHERE id = %(id)s
            """,
            {"id": incoming_email_id},
        )
        mailbox, recipients, external_recipients, reserved_at_ms, *delivery = told
        event = _cancelled(incoming_email_id, *delivery)
        append([event], publish_within)
    return Cancelled(event, mailbox, recipients, external_recipients, reserved_at_ms)


# What is reserved belongs to a dispatch; when that has ended it was given back, or has left its window.
_LOCK = """
    SELECT status, lease_token IS NOT NULL, mailbox, recipient_count,
           coalesce(external_recipient_count, recipient_count),
           CASE WHEN status = 'dispatched' THEN round(extract(epoch FROM reserved_at) * 1000)::bigint END,
           publisher_message_id, correlation_id, reply_to, traceparent
    FROM incoming_emails WHERE id = %(id)s FOR UPDATE
"""


def _refusal(incoming_email_id: str, status: Status, held: bool) -> str | None:
    if status in _ENDED:
        return _ENDED[status]
    if held:
        return "a worker has it in hand"
    sendings = rows("SELECT status FROM sent_emails WHERE incoming_email_id = %(id)s", {"id": incoming_email_id})
    if {sending for (sending,) in sendings} & {Sending.SENDING, Sending.IN_DOUBT}:
        return "it may have been sent: it is in doubt until it has been looked up"
    return None


def _cancelled(id: str, publisher_message_id: str, *delivery: str | None) -> Event:
    body = event_body(
        EventType.CANCELLED, publisher_message_id=publisher_message_id, incoming_email_id=id, at=datetime.now(UTC)
    )
    return Event(event_id(EventType.CANCELLED, id), EventType.CANCELLED, body, id, *delivery)
