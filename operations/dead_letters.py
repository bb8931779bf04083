"""Dead letters: find them, send their emails again, set them aside."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pika
from dramatiq import DecodeError, Message

import models
import runtime
from models import audit, dead_letters, inspection
from models.dead_letters import Filter, Group, Letter, Place
from operations.errors import NotFound, NotOpen, NotReplayable
from outbox import Outgoing, Unconfirmed
from telemetry import Step, mail_log
from tracing import trace_id

#: Much longer than publishing takes.
_REPLAY_LEASE = timedelta(minutes=2)


def dead_letter(id: str) -> Letter:
    """Return the dead letter with this id (its own, the email's, the publisher's).

    Of several it is an open one if there is one, else the newest.
    """
    letter = dead_letters.find(id)
    if letter is None:
        raise NotFound(f"no dead letter has the id {id}")
    return letter


def read_message(id: str, *, who: str) -> tuple[Letter, bytes | None]:
    """Return a dead letter and its message, as far as it has arrived, and write down who read it.

    A foreign message may be a whole mail of somebody's.
    """
    letter = dead_letter(id)
    audit.record(who, "dlq.read", letter.id, incoming_email_id=letter.incoming_email_id)
    return letter, dead_letters.body_of(letter.id)


def open_dead_letter(id: str) -> Letter:
    """Return the open dead letter with this id (its own, the email's, the publisher's).

    Raises:
        NotOpen: There are only such as were replayed or discarded.
    """
    letter = dead_letter(id)
    if letter.status != "open":
        raise NotOpen(f"no open dead letter has the id {id}: it was {letter.status} by {letter.resolved_by}")
    return letter


def find_dead_letters(filter: Filter, limit: int | None, after: Place | None = None) -> list[Letter]:
    """Return the open dead letters that match, oldest first, or those of them that come after a place."""
    return dead_letters.find_open(filter, limit, after)


def dead_letter_groups(filter: Filter) -> list[Group]:
    """Return the open dead letters that match by their cause, the largest group first."""
    return dead_letters.groups(filter)


def resolve(
    letters: Sequence[Letter],
    *,
    replay: bool,
    who: str,
    per_second: float | None = None,
    on_each: Callable[[Letter, str], None] | None = None,
) -> int:
    """Replay or discard these letters and return how many were still open.

    A replayed email goes back to ``received``; one in doubt is looked up before anything is sent.

    Args:
        per_second: At most so many, so that a large replay does not arrive as a burst.
        on_each: Told of every letter what became of it, in a word or a sentence.
    """
    resolved = 0
    for number, letter in enumerate(letters):
        if per_second and number:
            time.sleep(1 / per_second)
        outcome = _resolve(letter, replay=replay, who=who)
        resolved += outcome in ("replayed", "discarded")
        if on_each:
            on_each(letter, outcome)
    if replay and resolved:
        runtime.wake("schedule_emails")
    return resolved


def _resolve(letter: Letter, *, replay: bool, who: str) -> str:
    outcome = "replayed" if replay else "discarded"
    foreign = replay and letter.incoming_email_id is None
    try:
        message = _message_again(letter) if foreign else None
    except NotReplayable as reason:
        return str(reason)
    if message:
        if not dead_letters.reserve(letter.id, who, _REPLAY_LEASE):
            return "resolved before"
        if failure := _publish(message, letter):
            return failure
    with models.transaction():
        if not dead_letters.resolve(letter.id, replayed=replay, who=who):
            return "resolved before"
        audit.record(who, f"dlq.{outcome}", letter.id, incoming_email_id=letter.incoming_email_id)
    if replay:
        known = inspection.known_as(letter.incoming_email_id)
        mail_log(
            Step.REPLAYED,
            incoming_email_id=letter.incoming_email_id,
            publisher_message_id=known.publisher_message_id,
            correlation_id=known.correlation_id,
            trace_id=trace_id(known.traceparent),
            dead_letter_id=letter.id,
        )
    return outcome


def _message_again(letter: Letter) -> Message[Any]:
    """Return a message that belongs to no email, with a new id: should it fail again, that is another dead letter."""
    try:
        return Message.decode(dead_letters.body_of(letter.id) or b"").copy(message_id=str(uuid.uuid4()))
    except DecodeError:
        raise NotReplayable("no actor can read it: discard it") from None


def _publish(message: Message[Any], letter: Letter) -> str | None:
    """Put a message back on its queue; every actor bears a repeat. If that fails say why: the letter stays open."""
    properties = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
    try:
        runtime.publisher.publish([Outgoing("", letter.queue_name, message.encode(), properties, mandatory=True)])
    except Exception as error:
        dead_letters.release(letter.id)
        if not isinstance(error, Unconfirmed):
            raise
        return str(error)
    return None
