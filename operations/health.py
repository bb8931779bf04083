"""Health: how much is waiting, and whether everything that the fleet needs is there and well."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pika
import pika.exceptions
from dramatiq.common import xq_name

import models
import runtime
from actors import concurrency
from broker import MIRROR_QUEUE
from graph_client.errors import GraphError
from limiter import Refused
from models import Route, inspection
from models.database import unkept_settings
from models.inspection import Backlog
from operations.errors import ServerAway
from operations.rotation import older_keys
from outbox import connect


def backlog() -> Backlog:
    """Return how much of what is waiting.

    Raises:
        ServerAway: PostgreSQL does not answer.
    """
    try:
        return inspection.backlog()
    except models.DatabaseAway as away:
        raise ServerAway(str(away)) from away


def concurrency_limits() -> dict[str, int]:
    """Return how many emails of each route, and how many backups, may be in flight in the whole fleet.

    Raises:
        ServerAway: PostgreSQL does not answer.
    """
    try:
        limits = concurrency.effective()
    except models.DatabaseAway as away:
        raise ServerAway(str(away)) from away
    return {**{route.value: limits.of(route) for route in Route}, "backup": limits.backup_concurrency}


class QueueState(NamedTuple):
    """How many messages are ready in a queue, and how many consumers it has."""

    ready: int
    consumers: int


def queues() -> dict[str, QueueState]:
    """Return the state of each queue that there is, those of dead letters included.

    Raises:
        ServerAway: RabbitMQ does not answer.
    """
    worked = sorted(runtime.fleet_broker.queues)
    names = [runtime.SEND_QUEUE, runtime.REJECTED_QUEUE, *worked, *map(xq_name, worked), MIRROR_QUEUE]
    try:
        with connect(runtime.rabbitmq) as connection:
            found = {name: _declared(connection, name) for name in names}
    except (pika.exceptions.AMQPError, OSError) as error:
        raise ServerAway("RabbitMQ is away") from error
    return {
        name: QueueState(declared.message_count, declared.consumer_count)
        for name, declared in found.items()
        if declared
    }


class Finding(NamedTuple):
    """What one check of `doctor` found."""

    subject: str
    fine: bool
    detail: str


#: What has not answered by then is as good as away. A handshake with RabbitMQ is given up as late.
_PATIENCE = timedelta(seconds=10)


#: Whoever asks how it stands wants to know at once: of what is under an older key no more is counted.
MOST_COUNTED = 10_000

#: What mailfleet needs of Graph.
_PERMISSIONS = {"Mail.Send", "Mail.ReadWrite"}

#: Long enough to have a new certificate or secret issued.
CREDENTIAL_NOTICE = timedelta(days=14)


def doctor(mailboxes: Sequence[str] = ()) -> list[Finding]:
    """Check everything that the fleet needs, within `_PATIENCE` whatever is broken.

    Args:
        mailboxes: Try in each, by a draft that is deleted again, whether Graph lets us work in it.
    """
    return _check_all(_CHECKS | {mailbox: partial(_try_mailbox, mailbox) for mailbox in mailboxes})


def ready() -> list[Finding]:
    """Check that the servers answer: what decides whether a process can work now."""
    return _check_all(_SERVERS)


def _check_all(checks: Mapping[str, Callable[[], str]]) -> list[Finding]:
    """Make all checks at the same time: one that hangs holds up no other, nor the end of the process."""
    found: dict[str, Finding] = {}

    def note(subject: str) -> None:
        found[subject] = _check(subject, checks[subject])

    threads = [threading.Thread(target=note, args=[subject], daemon=True) for subject in checks]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _PATIENCE.total_seconds()
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    late = f"no answer within {_PATIENCE.total_seconds():g} s"
    return [found.get(subject, Finding(subject, False, late)) for subject in checks]


def _check(subject: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, True, check())
    except (_Unwell, models.DatabaseAway, GraphError, Refused) as unwell:
        return Finding(subject, False, str(unwell))
    except Exception as error:  # its text may quote a secret
        return Finding(subject, False, f"away, or refuses us ({type(error).__name__})")
    finally:
        models.disconnect()


class _Unwell(Exception):
    pass


def _check_postgresql() -> str:
    models.rows("SELECT 1")
    if missing := _missing_migrations():
        raise _Unwell(f"the database lacks {', '.join(missing)}: run the release process")
    if unkept := unkept_settings():
        raise _Unwell(f"the pooler does not set {', '.join(unkept)}: see connect_query in docs/deploy.md")
    return "answers, and its schema is up to date"


def _missing_migrations() -> list[str]:
    applied = {row[0] for row in models.rows("SELECT to_regclass('_yoyo_migration') IS NOT NULL")} == {True}
    known = {row[0] for row in models.rows("SELECT migration_id FROM _yoyo_migration")} if applied else set()
    files = (Path(__file__).parent.parent / "migrations").glob("*.sql")
    return sorted({path.stem for path in files} - known)


def _check_rabbitmq() -> str:
    with connect(runtime.rabbitmq) as connection:
        idle = [queue for queue in _worked_queues() if not _has_consumer(connection, queue)]
    if idle:
        raise _Unwell(f"answers, but nobody works on {', '.join(idle)}")
    return "answers, and every queue has a worker"


def _worked_queues() -> list[str]:
    """Every queue that a process type of the Procfile consumes; ``ingest`` has a worker only where it is used."""
    return [runtime.SEND_QUEUE, *sorted(runtime.fleet_broker.queues - {"ingest"})]


def _has_consumer(connection: Any, queue: str) -> bool:
    declared = _declared(connection, queue)
    return bool(declared and declared.consumer_count)


def _declared(connection: Any, queue: str) -> Any:
    """Return RabbitMQ's counts of a queue, or None: nobody has made it yet."""
    try:
        return connection.channel().queue_declare(queue, passive=True).method
    except pika.exceptions.ChannelClosedByBroker:
        return None


def _reach_rabbitmq() -> str:
    connect(runtime.rabbitmq).close()
    return "answers"


def _reach_redis() -> str:
    runtime.redis.ping()
    return "answers"


def _check_redis() -> str:
    policy = runtime.redis.info("memory")["maxmemory_policy"]  # hosted servers do not let CONFIG GET be called
    if policy != "noeviction":
        raise _Unwell(f"maxmemory-policy is {policy}: limits would be forgotten; set noeviction")
    return "answers, and evicts nothing"


def _check_graph() -> str:
    expiry = _check_credential()
    roles = runtime.graph.ping()
    if roles is None:
        return f"gives a token{expiry}"
    missing = _PERMISSIONS - roles
    if missing == _PERMISSIONS:
        # What RBAC for Applications grants no token names.
        return f"gives a token that names neither permission, as where Exchange grants them: try --mailbox{expiry}"
    if missing:
        raise _Unwell(f"gives a token without {', '.join(sorted(missing))}")
    return f"gives a token with {', '.join(sorted(roles))}{expiry}"


def _try_mailbox(mailbox: str) -> str:
    """Make a draft in the mailbox and delete it: all but the send itself, which cannot be tried without a mail."""
    draft = {"subject": "mailfleet doctor", "body": {"contentType": "text", "content": "Made to be deleted."}}
    with runtime.limiter.slot(mailbox, requests=2, wait=timedelta(seconds=1)):
        made = runtime.graph.create_draft(mailbox, draft)
        runtime.graph.delete_message(mailbox, made.id)
    return "lets drafts be made and deleted; whether it lets mail be sent shows the first mail"


def _check_credential() -> str:
    expires_at = runtime.credential_expires_at()
    if expires_at is None:
        return ""
    left = expires_at - datetime.now(UTC)
    if left < CREDENTIAL_NOTICE:
        ends = "has ended" if left < timedelta() else f"ends in {left.days} days"
        raise _Unwell(f"the application's credential {ends} ({expires_at:%Y-%m-%d}): see docs/security.md, Rotation")
    return f"; the application's credential ends on {expires_at:%Y-%m-%d}"


def recipient_firewall() -> str:
    """Say what ``RECIPIENT_FIREWALL`` does, without an address."""
    return str(runtime.firewall())


def _check_archive() -> str:
    newest = runtime.vault.keyring.newest_id
    older = older_keys(at_most=MOST_COUNTED)
    if unknown := sorted(set(older) - set(runtime.vault.keyring.ids)):
        raise _Unwell(f"something is sealed under {', '.join(unknown)}, which BACKUP_KEYS does not have")
    if older:
        least = "at least " if max(older.values()) >= MOST_COUNTED else ""
        count = f"{least}{sum(older.values())}"
        return f"seals under {newest}; {count} under older keys, see mailfleet backups rotate-keys"
    return f"seals under {newest}"


def _check_backlog() -> str:
    backlog = inspection.backlog()
    waiting = ", ".join(f"{count} {status}" for status, count in sorted(backlog.by_status.items())) or "nothing waiting"
    if backlog.open_dead_letters:
        raise _Unwell(f"open dead letters: {backlog.open_dead_letters}, see mailfleet dlq list ({waiting})")
    return waiting


_SERVERS = {"PostgreSQL": _check_postgresql, "RabbitMQ": _reach_rabbitmq, "Redis": _reach_redis}
_CHECKS: dict[str, Callable[[], str]] = {
    "PostgreSQL": _check_postgresql,
    "RabbitMQ": _check_rabbitmq,
    "Redis": _check_redis,
    "Graph": _check_graph,
    "Archive": _check_archive,
    "Recipients": recipient_firewall,
    "Backlog": _check_backlog,
}
