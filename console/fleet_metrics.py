"""The gauges that belong to the fleet and to no process: what is waiting, in the tables and in the queues."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pika.exceptions
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import runtime
from models import inspection
from models.states import Status
from outbox import connect

QUEUES = ("send_email", "send_email.rejected", *sorted(runtime.fleet_broker.queues))


class FleetCollector(Collector):
    """Asks PostgreSQL and RabbitMQ at each scrape."""

    def describe(self) -> list[Metric]:
        return []  # nothing is asked before the first scrape

    def collect(self) -> Iterator[Metric]:
        yield from _backlog()
        yield _queue_depths()


def _backlog() -> Iterator[Metric]:
    backlog = inspection.backlog()
    waiting = GaugeMetricFamily(
        "mailfleet_emails_waiting", "Emails that are not settled, by status.", labels=["status"]
    )
    for status in (Status.RECEIVED, Status.DISPATCHED, Status.PROCESSING):
        waiting.add_metric([status.value], backlog.by_status.get(status.value, 0))
    yield waiting
    age = (datetime.now(UTC) - backlog.oldest_waiting).total_seconds() if backlog.oldest_waiting else 0
    for name, help, value in (
        ("emails_oldest_waiting_age_seconds", "Age of the oldest email that could go out now.", age),
        ("emails_in_doubt", "Emails whose send may or may not have happened.", backlog.in_doubt),
        ("outbox_events_unpublished", "Events that RabbitMQ has not confirmed yet.", backlog.unpublished_events),
        ("dead_letters_open", "Dead letters that nobody has replayed or discarded.", backlog.open_dead_letters),
        ("backups_due", "Sent emails whose backup is due.", backlog.backups_due),
    ):
        yield GaugeMetricFamily(f"mailfleet_{name}", help, value)


def _queue_depths() -> Metric:
    depths = GaugeMetricFamily("mailfleet_queue_messages_ready", "Messages ready in a queue.", labels=["queue"])
    with connect(runtime.rabbitmq) as connection:
        for queue in QUEUES:
            try:
                declared = connection.channel().queue_declare(queue, passive=True)
            except pika.exceptions.ChannelClosedByBroker:
                continue  # not made yet
            depths.add_metric([queue], declared.method.message_count)
    return depths
