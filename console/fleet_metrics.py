"""The gauges that belong to the fleet and to no process: what is waiting, in the tables and in the queues."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import operations
from models.states import Status
from telemetry import FLEET_GAUGES, FleetGauge

#: The value of a gauge, or its values by label. A gauge without a value is left out.
Values = Mapping[str, float | Mapping[str, float]]


class FleetCollector(Collector):
    """Asks PostgreSQL and RabbitMQ at each scrape, once for all scrapes that came before it began to ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked_at = float("-inf")
        self._values: Values = {}

    def describe(self) -> list[Metric]:
        return []  # nothing is asked before the first scrape

    def collect(self) -> Iterator[Metric]:
        values = self._ask(time.monotonic())
        yield from (_family(gauge, values[gauge.name]) for gauge in FLEET_GAUGES if gauge.name in values)

    def _ask(self, came_at: float) -> Values:
        with self._lock:
            if self._asked_at < came_at:
                began_at = time.monotonic()
                self._values = _named(_answered() | _limits())
                self._asked_at = began_at
            return self._values


def _answered() -> dict[str, float | Mapping[str, float]]:
    """Ask each server apart: what one does not tell is no reason to keep to oneself what the other does."""
    values: dict[str, float | Mapping[str, float]] = {}
    up = dict.fromkeys(_ASKED, 0.0)
    for server, ask in _ASKED.items():
        with suppress(operations.ServerAway):
            values |= ask()
            up[server] = 1
    return values | {"server_up": up}


def _named(values: Values) -> Values:
    return {f"mailfleet_{name}": value for name, value in values.items()}


def _family(gauge: FleetGauge, value: float | Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(gauge.name, gauge.help, labels=[gauge.label] if gauge.label else [])
    for label, number in value.items() if isinstance(value, Mapping) else [(None, value)]:
        family.add_metric([label] if label is not None else [], number)
    return family


def _backlog() -> dict[str, float | Mapping[str, float]]:
    backlog = operations.backlog()
    waiting = (Status.RECEIVED, Status.DISPATCHED, Status.PROCESSING)
    return {
        "emails_waiting": {status.value: backlog.by_status.get(status.value, 0) for status in waiting},
        "emails_oldest_waiting_age_seconds": _age(backlog.oldest_waiting),
        "emails_in_doubt": backlog.in_doubt,
        "emails_oldest_in_doubt_age_seconds": _age(backlog.oldest_doubt),
        "in_flight": dict.fromkeys(operations.concurrency_limits(), 0) | backlog.in_flight,
        "uploads_in_hand": backlog.uploads_in_hand,
        "upload_bytes_in_hand": {
            "uploaded": backlog.uploaded_bytes_in_hand,
            "remaining": backlog.remaining_bytes_in_hand,
        },
        "outbox_events_unpublished": backlog.unpublished_events,
        "outbox_oldest_age_seconds": _age(backlog.oldest_event),
        "dead_letters_open": backlog.open_dead_letters,
        "dead_letters_open_by_reason": backlog.dead_letters_by_reason,
        "dead_letter_notices_undelivered": backlog.undelivered_notices,
        "backups_due": backlog.backups_due,
        "backups_oldest_due_age_seconds": _age(backlog.oldest_backup_due),
        "mailboxes_refusing": backlog.mailboxes_refusing,
        "mailboxes_full": backlog.mailboxes_full,
        "mailboxes_paused": backlog.mailboxes_paused,
    }


def _age(since: datetime | None) -> float:
    return max(0.0, (datetime.now(UTC) - since).total_seconds()) if since else 0


def _queues() -> dict[str, float | Mapping[str, float]]:
    queues = operations.queues()
    return {
        "queue_messages_ready": {name: state.ready for name, state in queues.items()},
        "queue_consumers": {name: state.consumers for name, state in queues.items()},
    }


_ASKED = {"PostgreSQL": _backlog, "RabbitMQ": _queues}


def _limits() -> dict[str, float | Mapping[str, float]]:
    return {"concurrency_limit": operations.concurrency_limits()}
