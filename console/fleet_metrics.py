"""The gauges that belong to the fleet and to no process: what is waiting, in the tables and in the queues."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import operations
from models.states import Status


class FleetCollector(Collector):
    """Asks PostgreSQL and RabbitMQ at each scrape."""

    def describe(self) -> list[Metric]:
        return []  # nothing is asked before the first scrape

    def collect(self) -> Iterator[Metric]:
        yield from _backlog()
        yield _queue_depths()


def _backlog() -> Iterator[Metric]:
    backlog = operations.backlog()
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
        ("mailboxes_refusing", "Mailboxes that refuse us: probed one email at a time.", backlog.mailboxes_refusing),
        ("mailboxes_full", "Mailboxes that wait for budget.", backlog.mailboxes_full),
    ):
        yield GaugeMetricFamily(f"mailfleet_{name}", help, value)


def _queue_depths() -> Metric:
    depths = GaugeMetricFamily("mailfleet_queue_messages_ready", "Messages ready in a queue.", labels=["queue"])
    for queue, count in operations.queue_depths().items():
        depths.add_metric([queue], count)
    return depths
