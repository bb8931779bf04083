"""The gauges that belong to the fleet and to no process: what is waiting, in the tables and in the queues."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import models
import operations
from models.states import Status
from telemetry import FLEET_GAUGES, FleetGauge

log = logging.getLogger(__name__)

#: Prometheus gives a scrape up after ten seconds, with all that the other server has told.
_PATIENCE = timedelta(seconds=8)
#: The value of a gauge, or its values by label. A gauge without a value is left out.
Values = Mapping[str, float | Mapping[str, float]]


class FleetCollector(Collector):
    """Asks PostgreSQL and RabbitMQ at each scrape, once for all scrapes that came before it began to ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked_at = float("-inf")
        self._values: Values = {}
        self._questions = {"PostgreSQL": _Question(_backlog), "RabbitMQ": _Question(_queues)}

    def describe(self) -> list[Metric]:
        return []  # nothing is asked before the first scrape

    def collect(self) -> Iterator[Metric]:
        values = self._ask(time.monotonic())
        yield from (_family(gauge, values[gauge.name]) for gauge in FLEET_GAUGES if gauge.name in values)

    def _ask(self, came_at: float) -> Values:
        with self._lock:
            if self._asked_at < came_at:
                began_at = time.monotonic()
                self._values = _named(self._answers())
                self._asked_at = began_at
            return self._values

    def _answers(self) -> dict[str, float | Mapping[str, float]]:
        """Ask each server apart: what one does not tell is no reason to keep to oneself what the other does."""
        for question in self._questions.values():
            question.ask()
        deadline = time.monotonic() + _PATIENCE.total_seconds()
        answers = {server: question.answer(deadline) for server, question in self._questions.items()}
        values: dict[str, float | Mapping[str, float]] = {}
        for answer in answers.values():
            values |= answer or {}
        return values | {"server_up": {server: float(answer is not None) for server, answer in answers.items()}}


class _Question:
    """What one server is asked, in a thread of its own: a server that hangs holds up neither scrape nor process."""

    def __init__(self, ask: Callable[[], Values]) -> None:
        self._ask = ask
        self._answer: Values | None = None
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Begin to ask, unless the last time has not ended yet."""
        if self._thread is None or not self._thread.is_alive():
            self._answer = None
            self._thread = threading.Thread(target=self._run, name="fleet's gauges", daemon=True)
            self._thread.start()

    def answer(self, deadline: float) -> Values | None:
        """Return what was answered by then; None: nothing, the server is as good as away."""
        if self._thread:
            self._thread.join(max(0, deadline - time.monotonic()))
        return self._answer

    def _run(self) -> None:
        try:
            self._answer = self._ask()
        except operations.ServerAway as away:
            log.warning("the fleet's gauges lack what a server tells: %s", away)
        finally:
            models.disconnect()


def _named(values: Values) -> Values:
    return {f"mailfleet_{name}": value for name, value in values.items()}


def _family(gauge: FleetGauge, value: float | Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(gauge.name, gauge.help, labels=[gauge.label] if gauge.label else [])
    for label, number in value.items() if isinstance(value, Mapping) else [(None, value)]:
        family.add_metric([label] if label is not None else [], number)
    return family


def _backlog() -> dict[str, float | Mapping[str, float]]:
    backlog, limits = operations.backlog(), operations.concurrency_limits()
    waiting = (Status.RECEIVED, Status.DISPATCHED, Status.PROCESSING)
    return {
        "emails_waiting": {status.value: backlog.by_status.get(status.value, 0) for status in waiting},
        "emails_oldest_waiting_age_seconds": _age(backlog.oldest_waiting),
        "emails_in_doubt": backlog.in_doubt,
        "emails_oldest_in_doubt_age_seconds": _age(backlog.oldest_doubt),
        "concurrency_limit": limits,
        "in_flight": dict.fromkeys(limits, 0) | backlog.in_flight,
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
