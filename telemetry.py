"""What mailfleet says about itself: JSON log lines, the mail log, and metrics.

The mail log is one line per event in an email's life, from a closed set of events, always with the ids; the other lines
are for whoever mends the software. Neither contains an address, a body, a token or an upload URL: lines are built from
ids and counts, never from messages or exceptions' arguments that may quote them.

Metrics are declared here and nowhere else, each with its unit.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import dramatiq
import orjson
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess, start_http_server

from redaction import redacted, without_message_arguments

# --- logs


class Step(StrEnum):
    """The events of the mail log."""

    RECEIVED = "received"
    REJECTED = "rejected"
    DISPATCHED = "dispatched"
    CLAIMED = "claimed"
    DRAFTED = "drafted"
    UPLOADING = "uploading"
    UPLOADED = "uploaded"
    SENT = "sent"
    IN_DOUBT = "in doubt"
    SETTLED = "settled"
    SNOOZED = "snoozed"
    RETRIED = "retried"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    ARCHIVED = "archived"
    REPLAYED = "replayed"
    DRAFT_DELETED = "draft deleted"
    LEASE_LOST = "lease lost"
    BACKUP_RETRIED = "backup retried"
    BACKUP_FAILED = "backup failed"
    DEAD_LETTER_MIRRORED = "dead letter mirrored"


#: Written to at once: Dramatiq puts a pipe through its main process in the place of ``sys.stderr``.
_STANDARD_ERROR = os.fdopen(2, "wb", buffering=0, closefd=False)
_STANDARD_ERROR_TEXT = io.TextIOWrapper(_STANDARD_ERROR, write_through=True)
#: Says whether the mail log is wanted; its lines go past `logging`, for each mail has several.
_mail = logging.getLogger("mail")
_mail_lines = structlog.BytesLogger(_STANDARD_ERROR)

#: The ids of the mail that is worked on, by which every line tells what it is about; None: nobody's.
_ids: ContextVar[dict[str, str] | None] = ContextVar("ids", default=None)


def mail_log(
    step: Step, *, incoming_email_id: str | None, publisher_message_id: str | None = None, **fields: Any
) -> None:
    """Write one line of the mail log and count it. Fields that are None are left out."""
    series(EMAILS, step.value).inc()
    if not _mail.isEnabledFor(logging.INFO):
        return
    fields |= {"incoming_email_id": incoming_email_id, "publisher_message_id": publisher_message_id}
    told = {"event": step.value, "level": "info", "timestamp": datetime.now(UTC)}
    line = {**(_ids.get() or {}), **_known(fields), **told}
    _mail_lines.msg(orjson.dumps(line, option=orjson.OPT_UTC_Z))


@contextmanager
def mail_context(**ids: str | None) -> Iterator[None]:
    """Put these ids on every line that is logged within the block."""
    token = _ids.set({**(_ids.get() or {}), **_known(ids)})
    try:
        yield
    finally:
        _ids.reset(token)


def note_ids(**ids: str | None) -> None:
    """Put these ids on every line until the block of `mail_context`, or the message that is worked on, has ended."""
    held = _ids.get()
    if held is not None:
        held.update(_known(ids))


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _with_ids(_logger: Any, _method: str, line: Any) -> Any:
    """Add the ids of the mail that is worked on; what a line says itself counts."""
    return {**ids, **line} if (ids := _ids.get()) else line


class MailOfMessage(dramatiq.Middleware):
    """Has every line, Dramatiq's too, tell the mail that the message in hand is for.

    Args:
        ids_in: Returns the ids that can be told from a message before its mail is claimed.
    """

    def __init__(self, ids_in: Callable[[Any], dict[str, str | None]]) -> None:
        self._ids_in = ids_in

    def before_process_message(self, _broker: Any, message: Any) -> None:
        _ids.set(_known(self._ids_in(message)))

    def after_process_message(self, _broker: Any, _message: Any, **_outcome: Any) -> None:
        _ids.set(None)

    def after_skip_message(self, _broker: Any, _message: Any) -> None:
        _ids.set(None)


def configure_logging(level: str) -> None:
    """Send every line, ours and the libraries', to standard error as JSON."""
    handler = _Handler(_STANDARD_ERROR_TEXT)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                _with_ids,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.stdlib.add_logger_name,
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                redacted,
                _exceptions,
                structlog.processors.JSONRenderer(lambda *args, **kwargs: orjson.dumps(*args, **kwargs).decode()),
            ],
        )
    )
    handler.addFilter(without_message_arguments)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
    # pika tells each failed connect in six lines; whoever connects tells it in one. As do those who trace.
    for told_by_us in ("pika", "opentelemetry"):
        logging.getLogger(told_by_us).setLevel(logging.CRITICAL)
    logging.captureWarnings(True)
    threading.excepthook = _log_end_of_thread
    sys.excepthook = _log_end_of_process
    sys.unraisablehook = _log_unraisable


#: Below a warning these tell what passes through them: paths with addresses, headers, bodies.
_CHATTY = (
    *("urllib3", "requests", "msal", "redis", "peewee", "dramatiq", "periodiq", "asyncio", "concurrent", "yoyo"),
    *("fsspec", "s3fs", "botocore", "aiobotocore", "boto3", "azure", "adlfs", "aiohttp", "hpack", "httpx", "httpcore"),
)


class _Handler(logging.StreamHandler[Any]):
    """Writes lines; of one that cannot be written it tells where it came from, and not, as logging does, its values."""

    def handleError(self, record: logging.LogRecord) -> None:
        told = {"event": "a line could not be written", "level": "error", "logger": record.name, "line": record.lineno}
        self.stream.write(orjson.dumps(told).decode() + self.terminator)


def _log_unraisable(ignored: sys.UnraisableHookArgs) -> None:
    if ignored.exc_value is not None:
        logging.getLogger(__name__).error("an error could not be raised", exc_info=ignored.exc_value)


def _log_end_of_process(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        logging.getLogger(__name__).critical("the process has ended", exc_info=(kind, error, trace))


def _log_end_of_thread(end: threading.ExceptHookArgs) -> None:
    if end.exc_value is not None:
        logging.getLogger(__name__).critical("a thread has ended", exc_info=end.exc_value)


def _without_text(exc_info: Any) -> str:
    """Render an exception by its types and places: its text may quote what was worked on, down to the body."""
    told = []
    error = exc_info[1]
    while error is not None:
        told += [f"{type(error).__module__}.{type(error).__qualname__}\n", *traceback.format_tb(error.__traceback__)]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "".join(told)


_exceptions = structlog.processors.ExceptionRenderer(_without_text)


# --- metrics

Metric = TypeVar("Metric", Counter, Gauge, Histogram)

EMAILS = Counter("mailfleet_emails", "Events in the lives of emails, as in the mail log.", ["step"])
STAGE_SECONDS = Histogram(
    "mailfleet_stage_duration_seconds",
    "Time from when an email could first go out (received, or its send_at) until a worker claimed it, and until Graph"
    " took it.",
    ["stage"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 14_400, 86_400),
)
GRAPH_REQUESTS = Counter("mailfleet_graph_requests", "Requests to Graph by how they ended.", ["operation", "status"])
GRAPH_SECONDS = Histogram(
    "mailfleet_graph_request_duration_seconds",
    "Time from a request to Graph to the end of its answer.",
    ["operation"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
GRAPH_UNKNOWN_CODES = Counter("mailfleet_graph_unknown_codes", "Error codes of Graph that no table knows.", ["status"])
THROTTLED = Counter("mailfleet_graph_throttled", "Answers of Graph that asked to wait.", ["operation"])
CREDENTIAL_EXPIRES_AT = Gauge(
    "mailfleet_graph_credential_expiry_timestamp_seconds",
    "When the certificate or the secret in use for Graph ends, in Unix time, as far as it is known.",
    ["kind"],
    multiprocess_mode="livemin",
)
CONFIGURATION_REFUSED = Counter(
    "mailfleet_graph_configuration_refused", "Times that Graph or its token endpoint refused the application itself."
)
TOKEN_EXPIRES_AT = Gauge(
    "mailfleet_graph_token_expiry_timestamp_seconds",
    "When the newest token of the process type ends, in Unix time. Of its processes one may fail to renew its own:"
    " `mailfleet_graph_token_renewals_total` tells.",
    multiprocess_mode="livemax",
)
TOKEN_RENEWALS = Counter("mailfleet_graph_token_renewals", "Tries to get a token for Graph.", ["outcome"])
LIMITER_ADMITTED = Counter("mailfleet_limiter_admitted", "What the limiter let pass: calls, reserved sends.", ["what"])
LIMITER_REFUSALS = Counter("mailfleet_limiter_refusals", "Calls that the limiter held back.", ["budget"])
LOWERED = Counter("mailfleet_limits_lowered", "Limits of mailboxes lowered because Graph kept throttling.", ["budget"])
RESTORED = Counter("mailfleet_limiter_restored", "Times that what was spent was written down again in Redis.")
DELIVERIES = Counter(
    "mailfleet_deliveries",
    "Deliveries on send_email by what became of them: stored, duplicate or rejected, conflicts among these.",
    ["outcome"],
)
INGEST_SECONDS = Histogram(
    "mailfleet_ingest_duration_seconds",
    "Time of one try of the bridge to store a batch of deliveries and have its events confirmed.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
DISPATCHED = Counter("mailfleet_dispatched", "Emails handed to send actors.", ["route"])
LEASES_EXPIRED = Counter(
    "mailfleet_leases_expired", "Leases of emails that ran out, by what the email was.", ["status"]
)
PUBLISHED = Counter("mailfleet_events_published", "Events confirmed by RabbitMQ.", ["type"])
DEAD_LETTERS = Counter("mailfleet_dead_letters", "Messages that were given up.", ["queue", "reason"])
MIRRORED = Counter("mailfleet_dead_letters_mirrored", "Dead letters that only RabbitMQ's copy told of.", ["queue"])
NOTICES = Counter("mailfleet_dead_letter_notices", "Tries to tell the webhook of dead letters.", ["outcome"])
MESSAGES = Counter("mailfleet_messages", "Messages that actors have worked on.", ["actor", "outcome"])
MESSAGE_SECONDS = Histogram(
    "mailfleet_message_duration_seconds",
    "Time that actors spent on a message.",
    ["actor"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
PERIODIC_TURN_AT = Gauge(
    "mailfleet_periodic_turn_timestamp_seconds",
    "When an actor that the clock calls last ended well, or else when its worker began, in Unix time.",
    ["actor"],
    multiprocess_mode="max",
)
PURGED = Counter("mailfleet_purged", "Rows deleted, or payloads emptied, at the end of their retention.", ["kind"])
UPLOADED_BYTES = Counter(
    "mailfleet_uploaded_bytes", "Bytes of attachments that Graph has taken, in one request or as a range.", ["way"]
)
ARCHIVED_BYTES = Counter("mailfleet_archived_bytes", "MIME bytes archived, before compression.")
SPANS_LOST = Counter("mailfleet_spans_lost", "Spans of traces that could not be delivered.")
CONSOLE_REFUSALS = Counter(
    "mailfleet_console_refusals", "Requests to the console that were refused for who asked.", ["reason"]
)
ATTACHMENTS_STORED = Counter("mailfleet_attachments_stored", "Attachments stored for later mails.")
ATTACHMENTS_DELETED = Counter("mailfleet_attachments_deleted", "Stored attachments that nobody needed any more.")


@cache
def series(metric: Metric, *labels: str) -> Metric:
    """Return a metric's series, as its ``labels`` does: for what is counted for each mail, where that takes longer.

    A series that was made before a fork counts for the process that it is in.
    """
    return metric.labels(*labels)


#: The value of a label that came from outside and is none of ours: what strangers write must not become series.
OTHER = "other"
# A counter that appears with its first event has no increase that an alert could see.
for _step in Step:
    EMAILS.labels(_step.value)
for _outcome in ("delivered", "failed"):
    NOTICES.labels(_outcome)
for _outcome in ("done", "failed"):
    TOKEN_RENEWALS.labels(_outcome)
for _what in ("call", "send"):
    LIMITER_ADMITTED.labels(_what)
for _way in ("request", "range"):
    UPLOADED_BYTES.labels(_way)


class FleetGauge(NamedTuple):
    """A gauge that belongs to the fleet and to no process: the console asks the servers for it at each scrape."""

    name: str
    help: str
    label: str | None = None


FLEET_GAUGES = (
    FleetGauge("mailfleet_server_up", "Whether a server answers the console: 1 or 0.", "server"),
    FleetGauge("mailfleet_emails_waiting", "Emails that are not settled, by status.", "status"),
    FleetGauge("mailfleet_emails_oldest_waiting_age_seconds", "Age of the oldest email that could go out now."),
    FleetGauge("mailfleet_emails_in_doubt", "Emails whose send may or may not have happened."),
    FleetGauge("mailfleet_emails_oldest_in_doubt_age_seconds", "Age of the oldest doubt."),
    FleetGauge(
        "mailfleet_in_flight", "Emails and backups that are dispatched or in hand: concurrency in use.", "route"
    ),
    FleetGauge("mailfleet_concurrency_limit", "How many may be in flight, by the console's settings.", "route"),
    FleetGauge("mailfleet_uploads_in_hand", "Attachments of emails in flight that are not up yet."),
    FleetGauge(
        "mailfleet_upload_bytes_in_hand", "Bytes of attachments of emails in flight, by whether up.", "progress"
    ),
    FleetGauge("mailfleet_outbox_events_unpublished", "Events that RabbitMQ has not confirmed yet."),
    FleetGauge("mailfleet_outbox_oldest_age_seconds", "Age of the oldest event that is not confirmed."),
    FleetGauge("mailfleet_dead_letters_open", "Dead letters that nobody has replayed or discarded."),
    FleetGauge("mailfleet_dead_letters_open_by_reason", "The same by reason.", "reason"),
    FleetGauge("mailfleet_dead_letter_notices_undelivered", "Notices of dead letters that the webhook has not taken."),
    FleetGauge("mailfleet_backups_due", "Sent emails whose backup is due."),
    FleetGauge("mailfleet_backups_oldest_due_age_seconds", "For how long the oldest backup has been due."),
    FleetGauge("mailfleet_mailboxes_refusing", "Mailboxes that refuse us: probed one email at a time."),
    FleetGauge("mailfleet_mailboxes_full", "Mailboxes that wait for budget."),
    FleetGauge("mailfleet_mailboxes_paused", "Mailboxes that are paused, by Graph or an operator."),
    FleetGauge("mailfleet_queue_messages_ready", "Messages ready in a queue.", "queue"),
    FleetGauge("mailfleet_queue_consumers", "Consumers of a queue.", "queue"),
)


def declared() -> list[tuple[str, str, list[str], str, str]]:
    """Return every metric: its name as scraped, its type, its labels, its help, and who serves it."""
    own = [
        (_exposed_name(metric), metric._type, list(metric._labelnames), metric._documentation, "process")
        for metric in globals().values()
        if isinstance(metric, Counter | Gauge | Histogram)
    ]
    return own + [
        (gauge.name, "gauge", [gauge.label] if gauge.label else [], gauge.help, "console") for gauge in FLEET_GAUGES
    ]


def _exposed_name(metric: Any) -> str:
    return f"{metric._name}_total" if isinstance(metric, Counter) else str(metric._name)


_INTRODUCTION = """\
# Metrics

Made from `telemetry.py` by `python -m telemetry`. What a **process** counts is served on `METRICS_PORT` of each process
type, in a worker summed over all of its processes and threads, and begins at nothing when it starts: use `rate` and
`increase`, and `sum` over instances. What the **console** serves on its own `/metrics` (with a token) is the whole
fleet's, read from PostgreSQL and RabbitMQ at each scrape: scrape one console. Of a server that does not answer the
gauges are missing and `mailfleet_server_up` is 0. It counts 100,000 of anything at most; of
more emails that wait it tells PostgreSQL's estimate. No label has an address. Alerts are in
`docker/prometheus/alerts.yaml`, a dashboard is `docker/grafana/mailfleet.json`.

| metric | type | labels | served by | meaning |
|---|---|---|---|---|"""


def reference() -> str:
    """Return ``docs/metrics.md``: one row per metric."""
    rows = [
        f"| `{name}` | {type} | {', '.join(f'`{label}`' for label in labels)} | {server} | {help} |"
        for name, type, labels, help, server in declared()
    ]
    return "\n".join([_INTRODUCTION, *rows, ""])


def note_lost_spans(count: int) -> None:
    """Count spans that the receiver of traces did not take, and tell of it."""
    SPANS_LOST.inc(count)
    logging.getLogger(__name__).warning("%d spans could not be delivered to the receiver of traces", count)


def serve_own_metrics(port: int) -> None:
    """Serve this process's metrics, if ``port`` is not 0. For process types that are a single process."""
    if port:
        start_http_server(port)


def serve_workers_metrics(port: int) -> None:
    """Serve the sum over all worker processes of a type, until the process is ended."""
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    _server, thread = start_http_server(port, registry=registry)
    thread.join()


class WorkerMetrics(dramatiq.Middleware):
    """Counts and times the messages of a worker.

    Args:
        in_files: Whether processes add up their metrics in files; then an ended one must not count as alive.
    """

    def __init__(self, *, in_files: bool = False) -> None:
        self._in_files = in_files
        self._began: dict[str, float] = {}

    def before_worker_boot(self, broker: Any, worker: Any) -> None:
        """Have what the worker will count begin at nothing: what begins with its first event shows no increase."""
        for actor in broker.actors.values():
            if worker.consumer_whitelist is None or actor.queue_name in worker.consumer_whitelist:
                for outcome in ("done", "failed"):
                    MESSAGES.labels(actor.actor_name, outcome)
                if "periodic" in actor.options:
                    PERIODIC_TURN_AT.labels(actor.actor_name).set_to_current_time()

    def before_process_message(self, _broker: Any, message: Any) -> None:
        self._began[message.message_id] = time.monotonic()

    def after_process_message(
        self,
        broker: Any,
        message: Any,
        *,
        result: Any = None,  # noqa: ARG002 (Dramatiq passes it by name)
        exception: BaseException | None = None,
    ) -> None:
        began = self._began.pop(message.message_id, time.monotonic())
        actor = message.actor_name if message.actor_name in broker.actors else OTHER
        series(MESSAGE_SECONDS, actor).observe(time.monotonic() - began)
        series(MESSAGES, actor, "failed" if exception else "done").inc()
        if not exception and actor != OTHER and "periodic" in broker.actors[actor].options:
            PERIODIC_TURN_AT.labels(actor).set_to_current_time()

    def after_skip_message(self, _broker: Any, message: Any) -> None:
        self._began.pop(message.message_id, None)

    def after_worker_shutdown(self, _broker: Any, _worker: Any) -> None:
        if self._in_files:
            multiprocess.mark_process_dead(os.getpid())


if __name__ == "__main__":
    print(reference(), end="")
