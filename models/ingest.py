"""Storing accepted emails: once per publisher's id, together with the event that says so.

One transaction takes a whole batch. The unique key of ``publisher_message_id`` decides who is first, whichever
process, and the event ``SendEmailReceived`` becomes true in the same transaction as its row.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import orjson

from contracts import AcceptedEmail, Event, EventType, event_body, event_id
from models.database import insert_many, rows, transaction
from models.events import append
from models.ids import new_id
from models.payload_keys import DataKeyLost
from models.states import Route
from models.stored_attachments import Use, note_uses

#: Lower is served first.
PRIORITIES = {"high": 0, "normal": 1, "bulk": 2}


class Reception(StrEnum):
    """What became of one email of a batch."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


class Arrival(NamedTuple):
    """An accepted email with what its delivery said about answering it."""

    accepted: AcceptedEmail
    correlation_id: str | None = None
    reply_to: str | None = None
    traceparent: str | None = None
    #: None counts every recipient as external.
    external_recipient_count: int | None = None
    #: How many the mail reaches; None: all that it names.
    recipient_count: int | None = None


class Stored(NamedTuple):
    """What became of one `Arrival`: the id under which the email is known, and the event to publish if it is new."""

    reception: Reception
    incoming_email_id: str
    event: Event | None


class Sealer(Protocol):
    """Seals the payloads of a batch with one data key, which has been kept before."""

    @property
    def key_id(self) -> str: ...

    def seal(self, incoming_email_id: str, payload: dict[str, Any], /) -> str: ...


_INSERT_EMAILS = """
    INSERT INTO incoming_emails (id, publisher_message_id, payload, content_hash, route, mailbox, tenant, priority,
                                 recipient_count, external_recipient_count, correlation_id, reply_to, traceparent,
                                 next_attempt_at, expires_at)
    VALUES %s ON CONFLICT (publisher_message_id) DO NOTHING RETURNING id::text
"""
#: Looked at once for the statement, not for each row.
_KEPT = ", EXISTS (SELECT 1 FROM payload_keys WHERE id = '{id}')"
_KNOWN = """
    SELECT publisher_message_id, id::text, content_hash FROM incoming_emails WHERE publisher_message_id = ANY(%(ids)s)
"""


def store(arrivals: Sequence[Arrival], *, publish_within: timedelta, sealer: Sealer | None = None) -> list[Stored]:
    """Store a batch and say of each email, in order, whether it is new, known or in conflict with a known one.

    Safe to repeat. The events of new emails are the caller's to publish for ``publish_within``; then the sweep's.
    Without ``sealer`` the payloads are kept in clear.

    Raises:
        DataKeyLost: The sealer's data key is not kept any more, so nothing was stored.
    """
    first = _first_of_each_id(arrivals)
    # Inserted in one order by everyone: two batches with the same ids wait for each other instead of deadlocking.
    ordered = sorted(first.items())
    ids = {publisher_id: new_id() for publisher_id, _ in ordered}
    now = datetime.now(UTC)
    events = {}
    with transaction():
        new_ids = _insert([_email_row(ids[key], arrival, now, sealer) for key, arrival in ordered], sealer)
        for publisher_id, arrival in ordered:
            if ids[publisher_id] in new_ids:
                events[publisher_id] = _received(ids[publisher_id], arrival, now)
        append(list(events.values()), publish_within)
        note_uses(use for key in events for use in _uses(ids[key], first[key]))
        stored = {key: (ids[key], first[key].accepted.content_hash) for key in events}
        if known := [key for key in first if key not in events]:
            stored |= {row[0]: (row[1], bytes(row[2])) for row in rows(_KNOWN, {"ids": known})}
    return [_reception(arrival, first, stored, events) for arrival in arrivals]


def _insert(emails: list[tuple[Any, ...]], sealer: Sealer | None) -> set[str]:
    """Insert those that are new, and return their ids."""
    if sealer is None:
        return {id for (id,) in insert_many(_INSERT_EMAILS, emails)}
    inserted = insert_many(_INSERT_EMAILS + _KEPT.format(id=uuid.UUID(sealer.key_id)), emails)
    if not all(kept for _, kept in inserted):
        raise DataKeyLost("PostgreSQL has lost the data key of new payloads")
    return {id for id, _ in inserted}


def _first_of_each_id(arrivals: Sequence[Arrival]) -> dict[str, Arrival]:
    first: dict[str, Arrival] = {}
    for arrival in arrivals:
        first.setdefault(arrival.accepted.publisher_message_id, arrival)
    return first


def _email_row(id: str, arrival: Arrival, now: datetime, sealer: Sealer | None) -> tuple[Any, ...]:
    accepted, email = arrival.accepted, arrival.accepted.email
    payload = {"publisher_message_id": accepted.publisher_message_id, **orjson.loads(accepted.canonical)}
    return (
        id,
        accepted.publisher_message_id,
        sealer.seal(id, payload) if sealer else orjson.dumps(payload).decode(),
        accepted.content_hash,
        Route.ATTACHED if email.attachments else Route.PLAIN,
        email.mailbox,
        email.tenant,
        PRIORITIES[email.priority],
        email.recipient_count if arrival.recipient_count is None else arrival.recipient_count,
        arrival.external_recipient_count,
        arrival.correlation_id,
        arrival.reply_to,
        arrival.traceparent,
        email.send_at if email.send_at and email.send_at > now else None,
        email.expires_at,
    )


def _uses(id: str, arrival: Arrival) -> list[Use]:
    return [Use(each.stored_id, id) for each in arrival.accepted.email.attachments if each.stored_id]


def _received(id: str, arrival: Arrival, now: datetime) -> Event:
    publisher_message_id = arrival.accepted.publisher_message_id
    body = event_body(EventType.RECEIVED, publisher_message_id=publisher_message_id, incoming_email_id=id, at=now)
    return Event(
        event_id(EventType.RECEIVED, id),
        EventType.RECEIVED,
        body,
        id,
        arrival.correlation_id,
        arrival.reply_to,
        arrival.traceparent,
    )


def _reception(
    arrival: Arrival, first: dict[str, Arrival], stored: dict[str, tuple[str, bytes]], events: dict[str, Event]
) -> Stored:
    publisher_id = arrival.accepted.publisher_message_id
    incoming_email_id, content_hash = stored[publisher_id]
    if content_hash != arrival.accepted.content_hash:
        return Stored(Reception.CONFLICT, incoming_email_id, None)
    event = events.get(publisher_id) if first[publisher_id] is arrival else None
    return Stored(Reception.STORED if event else Reception.DUPLICATE, incoming_email_id, event)
