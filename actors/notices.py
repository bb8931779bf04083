"""Tells of new dead letters: on ``mail.events``, and to the operator's webhook if there is one.

What came since the last turn is one notice, so that a thousand dead letters wake somebody once. Where it may die, and
what the next turn does:

* ``notice.recorded``, before anything is told: the notice stands in its table; it is told of.
* ``notice.told``, before that is noted: it is told of again, to the byte, under the same id.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

import dramatiq
import pika
from periodiq import cron

import models
import notices
import runtime
from crash_points import CrashPoint
from models import notices as kept
from models.ids import new_id
from notices import NewLetter, NotDelivered
from outbox import EXCHANGE, Outgoing, Unconfirmed, Unpublishable
from telemetry import NOTICES, OTHER

log = logging.getLogger(__name__)

#: A notice counts no more than this: the rest is in the next.
_MAX_LETTERS = 10_000
#: Much longer than publishing and delivering one take.
_LEASE = timedelta(minutes=2)
#: Notices are kept so long, to see what was told; a webhook that takes none for so long gets the later ones only.
_KEPT_FOR = timedelta(days=30)
_PURGE_BATCH = 1000


@dramatiq.actor(queue_name="maintenance", periodic=cron("* * * * *"))
def notify_dead_letters() -> None:
    """Tell of the dead letters that came since the last turn, and of what could not be told then. Safe to repeat."""
    url = runtime.configuration.dead_letter_webhook_url
    _record_new(deliver=url is not None)
    runtime.crash_point(CrashPoint.NOTICE_RECORDED)
    while (notice := kept.claim(deliver=url is not None, lease=_LEASE)) and _tell(notice):
        pass
    kept.purge(_KEPT_FOR, _PURGE_BATCH)


def _record_new(*, deliver: bool) -> None:
    with models.transaction():
        letters = [NewLetter(*letter) for letter in kept.take_unnoticed(_MAX_LETTERS)]
        if letters:
            # RabbitMQ's copies may name any queue: what a stranger wrote is not passed on.
            named = [
                letter if runtime.is_own_queue(letter.queue_name) else letter._replace(queue_name=OTHER)
                for letter in letters
            ]
            id = new_id()
            kept.add(id, notices.body(id, named, datetime.now(UTC)), deliver=deliver)


def _tell(notice: kept.Notice) -> bool:
    """Publish and deliver a notice as far as it is not; return whether to go on with the next.

    Raises:
        Unconfirmed: RabbitMQ is away; what is left is the next turn's.
    """
    published = not notice.publish or _publish(notice)
    delivered = not notice.deliver or _deliver(notice)
    if published:
        kept.release(notice.id)
    return delivered


def _publish(notice: kept.Notice) -> bool:
    """Publish it and return True; or False, and it comes again when its lease is over: a full queue refuses it."""
    try:
        runtime.publisher.publish([_event(notice)])
    except Unpublishable as error:
        log.warning("a notice of dead letters was not published to everyone: %s", error)
        return False
    except Unconfirmed:
        kept.release(notice.id)
        raise
    runtime.crash_point(CrashPoint.NOTICE_TOLD)
    kept.note_published(notice.id)
    return True


def _event(notice: kept.Notice) -> Outgoing:
    properties = pika.BasicProperties(
        content_type="application/json",
        delivery_mode=pika.DeliveryMode.Persistent,
        type=notices.TYPE,
        message_id=notice.id,
    )
    return Outgoing(EXCHANGE, notices.ROUTING_KEY, notice.body.encode(), properties)


def _deliver(notice: kept.Notice) -> bool:
    configuration = runtime.configuration
    url, secret = configuration.dead_letter_webhook_url, configuration.dead_letter_webhook_secret
    assert url is not None  # noqa: S101  (claimed to be delivered)
    try:
        notices.deliver(
            url.get_secret_value(),
            secret.get_secret_value() if secret else None,
            notice.id,
            notice.body.encode(),
            datetime.now(UTC),
        )
    except NotDelivered as error:
        kept.postpone(notice.id, notices.wait_before(notice.attempt_count + 1), str(error))
        NOTICES.labels("failed").inc()
        log.warning("a notice of dead letters was not delivered: %s", error)
        return False
    kept.note_delivered(notice.id)
    NOTICES.labels("delivered").inc()
    return True
