"""The outbox: events that became true with a row, and whether they have been published.

An event is its writer's to publish until ``claimed_until``; then the sweep claims what is left. So in ordinary running
nobody publishes an event twice, and an event outlives its writer.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from contracts import Event
from models.database import insert_many, rows

#: Bounds one sweep.
BATCH = 500


def append(events: Sequence[Event], publish_within: timedelta) -> None:
    """Write events into the transaction that makes them true. One that exists already is left as it is."""
    if events:
        insert_many(
            """
            INSERT INTO outbox_events (id, incoming_email_id, type, body,
                                       correlation_id, reply_to, traceparent, claimed_until)
            VALUES %s ON CONFLICT (incoming_email_id, type) DO NOTHING RETURNING 1
            """,
            [
                (
                    event.id,
                    event.incoming_email_id,
                    event.type,
                    event.body.decode(),
                    event.correlation_id,
                    event.reply_to,
                    event.traceparent,
                    publish_within,
                )
                for event in events
            ],
            row="(%s, %s, %s, %s, %s, %s, %s, now() + %s)",
        )


def mark_published(event_ids: Sequence[str]) -> None:
    """Note that RabbitMQ has confirmed these events. Safe to repeat."""
    rows(
        "UPDATE outbox_events SET published_at = now() WHERE id = ANY(%(ids)s::uuid[]) AND published_at IS NULL",
        {"ids": list(event_ids)},
        prepared=True,
    )


def claim_unpublished(publish_within: timedelta) -> list[Event]:
    """Claim what its writer did not publish in time."""
    claimed = rows(
        f"""
        WITH leftover AS MATERIALIZED (
            SELECT id FROM outbox_events WHERE published_at IS NULL AND claimed_until <= now()
            ORDER BY claimed_until LIMIT {BATCH} FOR UPDATE SKIP LOCKED
        )
        UPDATE outbox_events e SET claimed_until = now() + %(publish_within)s
        FROM leftover WHERE e.id = leftover.id
        RETURNING e.id::text, type, body::text, incoming_email_id::text, correlation_id, reply_to, traceparent
        """,
        {"publish_within": publish_within},
        prepared=True,
    )
    return [Event(id, type, body.encode(), *rest) for id, type, body, *rest in claimed]
