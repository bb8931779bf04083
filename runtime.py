"""The long-lived objects of a process, wired once: settings, database, broker, Redis, limiter, Graph, vault.

Importing this module reads the settings and sets Dramatiq's broker, so everything that declares or sends to an actor
imports it first. Nothing is contacted before it is used: a process starts whether or not its servers are up.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import dramatiq
import pika
from dramatiq.common import q_name
from dramatiq.middleware import CurrentMessage, TimeLimit
from periodiq import PeriodiqMiddleware
from pydantic import SecretStr
from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry

import limiter as limits
import models
import notices
import outbox
import settings
import settings_sources
import telemetry
import worker_metrics
from attachments import (
    AttachmentSource,
    CloudPlace,
    Damaged,
    HostPattern,
    Store,
    StoredAttachment,
    check_store_url,
)
from broker import MIRROR_QUEUE, DeadLettering, FleetBroker, MessageEncoder, declare_if_missing
from console_tokens import parse_tokens
from contracts import Event, EventType, __version__
from crash_points import CrashPoint, CrashPoints
from graph_client import Call, GraphClient, TokenSource
from mail_rules import RecipientFirewall
from models import payload_keys, stored_attachments
from models.ids import as_uuid
from orphans import EndWithParent
from outbox import Batcher, Item, Outgoing, Publisher, Unpublishable
from payloads import Payloads, WrappedKey
from tracing import Tracer, check_endpoint, header_pairs, trace_id
from vault import Keyring, UnknownKey, Vault, VaultError, bind_to_attachment
from waking import NO_MARK, WakeUps

log = logging.getLogger(__name__)

#: The extended property by which a mail is found again. Mailboxes remember every property name, so it never changes.
TAG = "String {7c1f6c1e-52a5-4f0b-8f4e-0d6f5d1a9c55} Name mailfleet-email-id"
SEND_QUEUE = "send_email"
REJECTED_QUEUE = "send_email.rejected"

#: A slot outlasts the silences of its call, and who reads a long answer renews it; a dead worker's comes back after its
#: lease. Only a range of an upload that goes slower than some 45 kB a second is no longer counted while it runs.
_SLOT_MARGIN = timedelta(seconds=30)
_MILLISECOND = timedelta(milliseconds=1)
_batchers: list[Batcher[Any]] = []
#: Longer than any upload should take, shorter than RabbitMQ's 30 minutes for an unacknowledged message.
TIME_LIMIT_MILLISECONDS = timedelta(minutes=20) // _MILLISECOND


def _load() -> settings.Settings:
    try:
        return settings.load(
            {
                "ATTACHMENT_ALLOWED_HOSTS": lambda text: [*map(HostPattern.parse, settings.comma_separated(text))],
                "ATTACHMENT_CLOUD_URLS": lambda text: [*map(CloudPlace.parse, settings.comma_separated(text))],
                "ATTACHMENT_STORE_URL": check_store_url,
                "BACKUP_KEYS": Keyring.parse,
                "CONSOLE_TOKENS": parse_tokens,
                "DEAD_LETTER_WEBHOOK_SECRET": notices.check_secret,
                "OTEL_EXPORTER_OTLP_ENDPOINT": check_endpoint,
                "OTEL_EXPORTER_OTLP_HEADERS": header_pairs,
                "RABBITMQ_URL": outbox.check_url,
                "REDIS_URL": Redis.from_url,
            }
        )
    except settings.SettingsInvalid as invalid:
        sys.exit(str(invalid))


def firewall() -> RecipientFirewall:
    """Return whom mail may reach."""
    return RecipientFirewall.parse(configuration.recipient_firewall)


def attachment_source() -> AttachmentSource:
    """Return what opens attachments wherever the settings let them come from."""
    return AttachmentSource(
        configuration.attachment_allowed_hosts,
        max_bytes=configuration.attachment_max_mb * 1024 * 1024,
        stored=_stored_attachment,
        cloud_urls=configuration.attachment_cloud_urls,
    )


def _stored_attachment(id: str) -> StoredAttachment | None:
    found = stored_attachments.find(id)
    if found is None:
        return None
    return StoredAttachment(found.id, found.size, found.sha256, partial(_plain_pieces, found))


@contextmanager
def _plain_pieces(stored: stored_attachments.Stored, offset: int) -> Iterator[Iterator[bytes]]:
    with store.open(stored.id) as file:
        try:
            yield vault.open_stream(
                stored.header,
                file,
                key_id=stored.key_id,
                associated_data=bind_to_attachment(stored.id),
                size_bytes=stored.size,
                offset=offset,
            )
        except UnknownKey:
            raise  # the file is well: it waits for the key
        except VaultError as error:
            raise Damaged(f"the stored attachment {stored.id} cannot be opened: {error}") from error


def _token_source() -> TokenSource:
    secret = configuration.graph_client_secret
    # A type that never talks to Graph has no credential, and a source that asks for nothing.
    if not settings_sources.is_needed("GRAPH_CLIENT_SECRET"):
        secret = SecretStr("")
    return TokenSource(
        configuration.graph_authority,
        configuration.graph_tenant_id,
        configuration.graph_client_id,
        secret=None if secret is None else secret.get_secret_value(),
        certificate_pem_path=configuration.graph_client_certificate,
        timeout=configuration.graph_timeout,
        reread_secret=settings_sources.Rereading("GRAPH_CLIENT_SECRET"),
        on_credential=_note_credential,
        on_renewal=lambda done: telemetry.TOKEN_RENEWALS.labels("done" if done else "failed").inc(),
    )


def _keyring() -> Keyring:
    """Return the archive's keys; a process type that needs none has none, and opens and seals nothing."""
    keys = configuration.backup_keys.get_secret_value()
    return Keyring.parse(keys) if keys else Keyring({})


def _note_credential(certificate_ends_at: datetime | None) -> None:
    ends_at, kind = certificate_ends_at or credential_expires_at(), "certificate" if certificate_ends_at else "secret"
    if ends_at:
        telemetry.CREDENTIAL_EXPIRES_AT.labels(kind).set(ends_at.timestamp())


def credential_expires_at() -> datetime | None:
    """Return when the certificate or the secret for Graph ends, as far as that is known."""
    if tokens.certificate_expires_at:
        return tokens.certificate_expires_at
    day = configuration.graph_client_secret_expires_on
    return datetime(day.year, day.month, day.day, tzinfo=UTC) if day else None


def _find_data_key(id: str) -> WrappedKey | None:
    found = payload_keys.find(id)
    return WrappedKey(*found) if found else None


def _count_call(call: Call) -> None:
    telemetry.series(telemetry.GRAPH_REQUESTS, call.operation, str(call.status or "none")).inc()
    telemetry.series(telemetry.GRAPH_SECONDS, call.operation).observe(call.duration.total_seconds())
    if call.status == 429 or (call.status == 503 and call.retry_after):
        telemetry.THROTTLED.labels(call.operation).inc()
    if expires_at := tokens.expires_at:
        telemetry.TOKEN_EXPIRES_AT.set(expires_at.timestamp())


def _tell_of_call(call: Call) -> None:
    _count_call(call)
    if not tracer.is_recording():
        return
    failure = None if call.status and call.status < 400 else str(call.status or "no answer")
    tracer.record_call(
        f"graph {call.operation}",
        call.duration,
        failure=failure,
        **{"http.response.status_code": call.status},
        graph_request_id=call.request_id,
        client_request_id=call.client_request_id,
    )


def _count_unknown_code(status: int, _code: str) -> None:
    telemetry.GRAPH_UNKNOWN_CODES.labels(str(status)).inc()


def declare(channel: Any) -> None:
    """Declare what publishing needs: the events' exchange and every queue of ours.

    ``send_email`` and ``send_email.rejected`` are left as they are if somebody made them before.
    """
    channel.exchange_declare(outbox.EXCHANGE, "topic", durable=True)
    fleet_broker.declare_all(channel)
    for queue_name in (SEND_QUEUE, REJECTED_QUEUE):
        declare_if_missing(channel.connection, queue_name, configuration.rabbitmq_queue_type)


def enqueue(messages: Sequence[dramatiq.Message[Any]]) -> Future[None]:
    """Hand messages for actors to the publisher: one confirmation for all, instead of one for each."""
    return publisher.submit(
        [Outgoing("", message.queue_name, message.encode(), _TASK, mandatory=True) for message in messages]
    )


def publish_events(events: Sequence[Event]) -> None:
    """Publish events and mark those as published that are confirmed; the others are left to the sweep.

    A process that dies at ``events.published``, before the mark, has the sweep publish them again, with the same
    ``message_id``; at ``events.marked`` nothing is left to do.

    Raises:
        Unconfirmed, DatabaseAway: Some may have been published without being marked. They keep their ``message_id``.
        Unpublishable: All are published but some that never will be.
    """
    failures = outbox.unconfirmed([publisher.submit(outbox.event_messages(event)) for event in events])
    confirmed = [event for event, failure in zip(events, failures, strict=True) if failure is None]
    if confirmed:
        crash_point(CrashPoint.EVENTS_PUBLISHED)
        models.mark_published([event.id for event in confirmed])
        crash_point(CrashPoint.EVENTS_MARKED)
    for event in confirmed:
        telemetry.series(telemetry.PUBLISHED, event.type).inc()
    # One that may succeed the next time says more than one that never will.
    for failure in sorted(filter(None, failures), key=lambda failure: isinstance(failure, Unpublishable)):
        raise failure


def wake(actor_name: str) -> None:
    """Have an actor run at once, wherever a worker is free for it (see `waking`)."""
    wake_ups.wake(actor_name)


def wake_soon(actor_name: str) -> None:
    """Wake as `wake` does, but from another thread, and once for all who ask at about the same time: for each mail."""
    _wake_ups_of_mails.add([actor_name])


def woken(actor_name: str) -> bool:
    """Note that an actor is about to look: it may be woken again from here on. Return whether Redis answered."""
    message = CurrentMessage.get_current_message()
    # The clock's message has no mark, and leaves that of a wake-up that is on its way.
    return wake_ups.arrived(actor_name, message.options.get("mark", NO_MARK) if message else "")


def is_own_queue(name: str | None) -> bool:
    """Say whether a queue is one that mailfleet itself works on or keeps things in."""
    return name is not None and q_name(name) in {SEND_QUEUE, REJECTED_QUEUE, MIRROR_QUEUE, *fleet_broker.queues}


def wake_mirror() -> None:
    """Have the dead letters mirrored soon."""
    wake("mirror_dead_letters")


def batcher(name: str, pass_on: Callable[[list[Item]], object], apart: timedelta) -> Batcher[Item]:
    """Return a batcher that is emptied at the end of the process, before the publisher is."""
    made = Batcher(name, pass_on, apart)
    _batchers.append(made)
    return made


class FlushAtShutdown(dramatiq.Middleware):
    """Publishes what a worker still has in hand before it ends."""

    def before_worker_shutdown(self, _broker: Any, _worker: Any) -> None:
        _flush()

    def after_worker_shutdown(self, _broker: Any, _worker: Any) -> None:
        tracer.close()


def close() -> None:
    """Publish what is still in hand, end the connections, deliver the traces. For the end of a process."""
    _flush()
    tracer.close()


def _flush() -> None:
    for each in _batchers:
        each.close()
    publisher.close()


def _ids_in(message: Any) -> dict[str, str | None]:
    """Return the ids of the mail that a message says it is for: of a foreign one, only what can be nothing else."""
    id, traceparent = message.kwargs.get("incoming_email_id"), message.options.get("traceparent")
    return {
        "incoming_email_id": as_uuid(id) if isinstance(id, str) else None,
        "trace_id": trace_id(traceparent) if isinstance(traceparent, str) else None,
    }


def _tracer() -> Tracer:
    headers = configuration.otlp_headers
    return Tracer(
        configuration.otlp_endpoint,
        headers=header_pairs(headers.get_secret_value()) if headers else {},
        ratio=configuration.traces_sampled,
        version=__version__,
        on_lost=telemetry.note_lost_spans,
    )


# A counter that appears with its first event has no increase that an alert could see. Rejections go another way.
for _type in set(EventType) - {EventType.REJECTED}:
    telemetry.PUBLISHED.labels(_type.value)

_TASK = pika.BasicProperties(content_type="application/json", delivery_mode=pika.DeliveryMode.Persistent)

configuration = _load()
crash_point = CrashPoints(configuration.crash_directory)
telemetry.configure_logging(configuration.log_level)
tracer = _tracer()
models.connect(
    configuration.database_url.get_secret_value(),
    "mailfleet",
    settings_sources.Rereading("DATABASE_URL"),
    pooled=configuration.database_pooled,
)

rabbitmq = outbox.connection_parameters(
    configuration.rabbitmq_url.get_secret_value(), "mailfleet", settings_sources.Rereading("RABBITMQ_URL")
)
redis = Redis.from_url(
    configuration.redis_url.get_secret_value(),
    socket_timeout=1,
    socket_connect_timeout=1,
    retry=Retry(NoBackoff(), 1),
)
limiter = limits.Limiter(
    configuration.redis_url.get_secret_value(),
    limits.Budgets(
        mailbox_concurrency=configuration.mailbox_concurrency,
        mailbox_requests_per_10_minutes=configuration.mailbox_requests_per_10_minutes,
        mailbox_upload_mb_per_5_minutes=configuration.mailbox_upload_mb_per_5_minutes,
        mailbox_sends_per_minute=configuration.mailbox_sends_per_minute,
        mailbox_recipients_per_day=configuration.mailbox_recipients_per_day,
        tenant_requests_per_10_seconds=configuration.tenant_requests_per_10_seconds,
        tenant_external_recipients_per_day=configuration.tenant_external_recipients_per_day,
    ),
    slot_lease=2 * configuration.graph_timeout + _SLOT_MARGIN,
)
tokens = _token_source()
graph = GraphClient(
    configuration.graph_base_url,
    tokens,
    timeout=configuration.graph_timeout,
    tag_id=TAG,
    user_agent="mailfleet",
    on_call=_tell_of_call,
    on_unknown_code=_count_unknown_code,
)
vault = Vault(_keyring())
payloads = Payloads(vault.keyring, keep=lambda key: payload_keys.keep(*key), find=_find_data_key)
store = Store(configuration.attachment_store_url)
source = attachment_source()

fleet_broker = FleetBroker(
    url=rabbitmq,
    queue_type=configuration.rabbitmq_queue_type,
    crash_point=crash_point,
    middleware=[
        telemetry.MailOfMessage(_ids_in),
        TimeLimit(time_limit=TIME_LIMIT_MILLISECONDS),
        CurrentMessage(),
        DeadLettering((models.DatabaseAway, outbox.Unconfirmed, limits.Unavailable, RedisError), wake_mirror),
        FlushAtShutdown(),
        EndWithParent(),
        PeriodiqMiddleware(skip_delay=30),
        telemetry.WorkerMetrics(in_files=configuration.prometheus_multiproc_dir is not None),
        worker_metrics.ServeMetrics(
            configuration.prometheus_multiproc_dir if configuration.metrics_port else None,
            configuration.metrics_port,
            configuration.log_level,
        ),
    ],
)
dramatiq.set_broker(fleet_broker)
dramatiq.set_encoder(MessageEncoder())

publisher = Publisher(rabbitmq, declare)
#: Long enough that the mails of a busy process share a statement and a confirmation, too short to be felt.
events: Batcher[Event] = batcher("events", publish_events, apart=timedelta(milliseconds=100))
wake_ups = WakeUps(
    redis, lambda name, mark: enqueue([fleet_broker.get_actor(name).message_with_options(mark=mark)]), crash_point
)
#: As often as the scheduler looks for mail: a mailbox whose mail is in flight waits for the next one.
_wake_ups_of_mails: Batcher[str] = batcher(
    "wake-ups", lambda names: [wake(name) for name in set(names)], apart=timedelta(milliseconds=50)
)
