"""Housekeeping: the copies of dead letters are read into their table, and what has expired is deleted.

Both do a bounded batch at a time. Where they may die, and what happens next:

* ``mirror.consumed``, before the commit: RabbitMQ delivers the copies again at the next turn.
* ``mirror.stored``, before the ACK: the copies are delivered again and find their rows. ``mirror.acknowledged``: done.
* A purge: see `actors.retention`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from datetime import datetime, timedelta
from typing import Any

import dramatiq
import orjson
import pika.exceptions
from periodiq import cron

import models
import runtime
from actors.retention import purge_kind
from broker import MIRROR_QUEUE
from crash_points import CrashPoint
from models import dead_letters, inspection
from models.dead_letters import Copy
from models.ids import as_uuid, new_id
from models.retention import Kind
from outbox import Unconfirmed, connect
from telemetry import MIRRORED, OTHER, Step, mail_log
from tracing import trace_id

log = logging.getLogger(__name__)

_BATCH = 100
#: A batch is closed at this, too.
_BATCH_BYTES = 8 * 1024 * 1024
#: RabbitMQ moves a dead letter a moment after it was refused.
_QUIET = timedelta(seconds=1)
#: Of what nobody can read, more is of no use to anybody.
_MAX_BODY_BYTES = 1_000_000
#: Of a foreign message; an index holds no more than a few thousand.
_MAX_ID_BYTES = 255


@dramatiq.actor(queue_name="maintenance", periodic=cron("* * * * *"))
def mirror_dead_letters() -> None:
    """Read RabbitMQ's copies of dead letters into the ``dlq`` table."""
    runtime.woken("mirror_dead_letters")
    try:
        connection = connect(runtime.rabbitmq)
        try:
            channel = connection.channel()
            runtime.declare(channel)
            earlier = _EarlierRows(models.now())
            while _mirror_batch(channel, earlier):
                pass
        finally:
            connection.close()
    except (pika.exceptions.AMQPError, OSError) as error:
        raise Unconfirmed("RabbitMQ is away") from error


def _mirror_batch(channel: Any, earlier: _EarlierRows) -> bool:
    """Mirror what is there, at most a batch; return whether there may be more."""
    taken, more = _take(channel)
    if not taken:
        return False
    runtime.crash_point(CrashPoint.MIRROR_CONSUMED)
    copies = [_copy(method, properties, body, earlier) for method, properties, body in taken]
    try:
        missing = dead_letters.mirror(copies)
    except models.NotStorable:
        # One of them is of a kind that nobody foresaw: it keeps no other from its row, and has one itself.
        missing = [copy for each in copies for copy in _mirror_alone(each)]
    runtime.crash_point(CrashPoint.MIRROR_STORED)
    channel.basic_ack(taken[-1][0].delivery_tag, multiple=True)
    runtime.crash_point(CrashPoint.MIRROR_ACKNOWLEDGED)
    for copy in missing:
        MIRRORED.labels(copy.queue_name if runtime.is_own_queue(copy.queue_name) else OTHER).inc()
        known = inspection.known_as(copy.incoming_email_id)
        mail_log(
            Step.DEAD_LETTER_MIRRORED,
            incoming_email_id=copy.incoming_email_id,
            publisher_message_id=known.publisher_message_id,
            correlation_id=known.correlation_id,
            trace_id=trace_id(known.traceparent),
            reason=copy.reason,
            queue=copy.queue_name,
        )
    return more


def _take(channel: Any) -> tuple[list[tuple[Any, Any, bytes]], bool]:
    """Take what is there, at most a batch, until nothing more comes for a moment; say whether there may be more.

    One at a time: what RabbitMQ would hand out ahead is bounded by its number only, and a copy may have megabytes.
    """
    taken: list[tuple[Any, Any, bytes]] = []
    held_bytes, quiet_since = 0, time.monotonic()
    while time.monotonic() - quiet_since < _QUIET.total_seconds():
        method, properties, body = channel.basic_get(MIRROR_QUEUE)
        if method is None:
            channel.connection.sleep(_QUIET.total_seconds() / 10)
            continue
        taken.append((method, properties, body))
        held_bytes, quiet_since = held_bytes + len(body), time.monotonic()
        if len(taken) == _BATCH or held_bytes >= _BATCH_BYTES:
            return taken, True
    return taken, False


def _mirror_alone(copy: Copy) -> list[Copy]:
    try:
        return dead_letters.mirror([copy])
    except models.NotStorable as refusal:
        log.error("a dead letter of %s is kept as bytes: %s", copy.queue_name, refusal)
        return dead_letters.mirror([copy._replace(actor_name=None, incoming_email_id=None, reason="not_storable")])


def _copy(method: Any, properties: Any, body: bytes, earlier: _EarlierRows) -> Copy:
    death = ((properties.headers or {}).get("x-death") or [{}])[0]
    queue_name = str(death.get("queue", "unknown"))
    message = _message(body)
    incoming_email_id = message.get("kwargs", {}).get("incoming_email_id")
    fingerprint = hashlib.sha256(body + repr((queue_name, death.get("time"))).encode()).hexdigest()
    return Copy(
        message_id=_id(message.get("message_id")) or earlier.id_of(fingerprint, method.redelivered),
        queue_name=queue_name.removesuffix(".DQ"),
        actor_name=_text(message.get("actor_name")),
        incoming_email_id=as_uuid(incoming_email_id) if isinstance(incoming_email_id, str) else None,
        reason="unreadable" if not message else "actor_failed",
        error="no actor can read this message" if not message else "the actor gave the message up",
        # A message that can be read may be replayed, so it is kept whole.
        body=body if message else body[:_MAX_BODY_BYTES],
    )


class _EarlierRows:
    """Finds the rows of copies that come again, where what was dead-lettered has no id of its own.

    Of several that are all alike each stands for another of their rows. What was delivered before this turn began can
    have a row of before only.
    """

    def __init__(self, began_at: datetime) -> None:
        self._began_at = began_at
        self._left: dict[str, list[str]] = {}

    def id_of(self, fingerprint: str, redelivered: bool) -> str:
        """Return the id of a row that an earlier turn has made, or a new one; only what comes again can have a row."""
        if redelivered:
            if fingerprint not in self._left:
                self._left[fingerprint] = dead_letters.message_ids(f"{fingerprint}:", before=self._began_at)
            if self._left[fingerprint]:
                return self._left[fingerprint].pop(0)
        return f"{fingerprint}:{new_id()}"


def _id(value: Any) -> str | None:
    """Return a message's own id, unless it is none: Dramatiq's are UUIDs."""
    text = _text(value)
    return text if text and len(text.encode("utf-8", "replace")) <= _MAX_ID_BYTES else None


def _text(value: Any) -> str | None:
    """Return what PostgreSQL can store of a foreign value."""
    return value.replace("\x00", "?") if isinstance(value, str) else None


def _message(body: bytes) -> dict[str, Any]:
    """Return the message's fields, or nothing if it is not one of Dramatiq's."""
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    known = isinstance(message, dict) and isinstance(message.get("kwargs"), dict)
    return message if known else {}


@dramatiq.actor(queue_name="maintenance", periodic=cron("*/10 * * * *"))
def purge_expired() -> None:
    """Delete what is past its retention: backups, payloads, and the records that grow with every mail."""
    for kind in Kind:
        purge_kind(kind, who="maintenance")
