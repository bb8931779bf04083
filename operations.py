"""What an operator may do, whichever way it is asked for: by the command line now, by the console too.

Every verb that changes something writes who did it into ``audit_log``, in the transaction of the change. None of them
sends anything: they change what the tables say, and the fleet acts on that.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pika
import pika.exceptions
from dramatiq import DecodeError, Message
from dramatiq.common import xq_name

import actors  # noqa: F401  declares the queues
import contracts
import models
import runtime
from broker import MIRROR_QUEUE
from graph_client.errors import GraphError
from limiter import BudgetUsage, Unavailable
from models import audit, backups, dead_letters, inspection, mailboxes
from models.backups import StoredBackup
from models.dead_letters import Filter, Letter
from models.inspection import Backlog
from models.mailboxes import Pause
from outbox import Outgoing, Unconfirmed, connect
from telemetry import Step, mail_log
from vault import bind_to

#: Much longer than publishing takes.
_REPLAY_LEASE = timedelta(minutes=2)


class NotFound(Exception):
    """Raised when no email, dead letter or backup has the id."""


class NotOpen(NotFound):
    """Raised when the only dead letters with the id were replayed or discarded before."""


class NotReplayable(Exception):
    """Raised when a dead letter has nothing that could be tried again."""


class ServerAway(Exception):
    """Raised when PostgreSQL or RabbitMQ does not answer; `ready` tells which."""


# Emails


def publish(body: bytes) -> str:
    """Put one ``SendEmail`` on the queue, as an application would, and return the publisher's id.

    Raises:
        Unacceptable: It would be rejected; nothing was published.
        Unconfirmed: RabbitMQ is away.
    """
    accepted = contracts.accept(body)
    properties = pika.BasicProperties(content_type="application/json", delivery_mode=pika.DeliveryMode.Persistent)
    runtime.publisher.publish([Outgoing("", runtime.SEND_QUEUE, body, properties, mandatory=True)])
    return accepted.publisher_message_id


def status(id: str) -> dict[str, Any]:
    """Return everything that is known of an email, by our id or the publisher's. Its content is left out."""
    incoming_email_id = inspection.find_email(id)
    if incoming_email_id is None:
        raise NotFound(f"no email has the id {id}")
    return inspection.everything_about(incoming_email_id)


# Dead letters


def dead_letter(id: str) -> tuple[Letter, bytes | None]:
    """Return the dead letter with this id (its own, the email's, the publisher's) and its message.

    Of several it is an open one if there is one, else the newest.
    """
    letter = dead_letters.find(id)
    if letter is None:
        raise NotFound(f"no dead letter has the id {id}")
    return letter, dead_letters.body_of(letter.id)


def open_dead_letter(id: str) -> Letter:
    """Return the open dead letter with this id (its own, the email's, the publisher's).

    Raises:
        NotOpen: There are only such as were replayed or discarded.
    """
    letter, _ = dead_letter(id)
    if letter.status != "open":
        raise NotOpen(f"no open dead letter has the id {id}: it was {letter.status} by {letter.resolved_by}")
    return letter


def find_dead_letters(filter: Filter, limit: int | None) -> list[Letter]:
    """Return the open dead letters that match, oldest first."""
    return dead_letters.find_open(filter, limit)


def resolve(
    letters: Sequence[Letter],
    *,
    replay: bool,
    who: str,
    per_second: float | None = None,
    on_each: Callable[[Letter, str], None] | None = None,
) -> int:
    """Replay or discard these letters and return how many were still open.

    A replayed email goes back to ``received``; one in doubt is looked up before anything is sent.

    Args:
        per_second: At most so many, so that a large replay does not arrive as a burst.
        on_each: Told of every letter what became of it, in a word or a sentence.
    """
    resolved = 0
    for number, letter in enumerate(letters):
        if per_second and number:
            time.sleep(1 / per_second)
        outcome = _resolve(letter, replay=replay, who=who)
        resolved += outcome in ("replayed", "discarded")
        if on_each:
            on_each(letter, outcome)
    if replay and resolved:
        runtime.wake("schedule_emails")
    return resolved


def _resolve(letter: Letter, *, replay: bool, who: str) -> str:
    outcome = "replayed" if replay else "discarded"
    foreign = replay and letter.incoming_email_id is None
    try:
        message = _message_again(letter) if foreign else None
    except NotReplayable as reason:
        return str(reason)
    if message:
        if not dead_letters.reserve(letter.id, who, _REPLAY_LEASE):
            return "resolved before"
        if failure := _publish(message, letter):
            return failure
    with models.transaction():
        if not dead_letters.resolve(letter.id, replayed=replay, who=who):
            return "resolved before"
        audit.record(who, f"dlq.{outcome}", letter.id, incoming_email_id=letter.incoming_email_id)
    if replay:
        mail_log(Step.REPLAYED, incoming_email_id=letter.incoming_email_id, dead_letter_id=letter.id)
    return outcome


def _message_again(letter: Letter) -> Message[Any]:
    """Return a message that belongs to no email, with a new id: should it fail again, that is another dead letter."""
    try:
        return Message.decode(dead_letters.body_of(letter.id) or b"").copy(message_id=str(uuid.uuid4()))
    except DecodeError:
        raise NotReplayable("no actor can read it: discard it") from None


def _publish(message: Message[Any], letter: Letter) -> str | None:
    """Put a message back on its queue; every actor bears a repeat. If that fails say why: the letter stays open."""
    properties = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
    try:
        runtime.publisher.publish([Outgoing("", letter.queue_name, message.encode(), properties, mandatory=True)])
    except Exception as error:
        dead_letters.release(letter.id)
        if not isinstance(error, Unconfirmed):
            raise
        return str(error)
    return None


# Backups


def list_backups(*, mailbox: str | None, limit: int) -> list[StoredBackup]:
    """Return the newest backups, of one mailbox or of all."""
    return backups.stored_backups(mailbox=mailbox.lower() if mailbox else None, limit=limit)


def export_backup(id: str, *, who: str) -> tuple[StoredBackup, Iterator[bytes]]:
    """Return a backup (by its id, the email's, the publisher's or Graph's) and its exact MIME in chunks.

    Raises:
        NotFound: There is no such backup.
        UnknownKey, Tampered: From the vault, at once or while the chunks are read.
    """
    backup = backups.find_backup(id)
    if backup is None:
        raise NotFound(f"no backup has the id {id}")
    audit.record(who, "backups.export", backup.id, incoming_email_id=backup.incoming_email_id)
    mime = runtime.vault.open(
        backups.sealed_blob(backup.id),
        key_id=backup.key_id,
        associated_data=bind_to(backup.incoming_email_id, backup.graph_message_id),
        checksum=backup.checksum,
    )
    return backup, mime


# Mailboxes


def pause(mailbox: str, *, why: str, who: str) -> None:
    """Dispatch nothing from the mailbox until it is resumed. Mail that a worker has in hand goes out."""
    with models.transaction():
        mailboxes.pause_by_hand(mailbox, why=why, who=who)
        audit.record(who, "pause", mailbox.lower(), why=why)


def resume(mailbox: str, *, who: str) -> bool:
    """End the mailbox's pause, the operator's or Graph's; return whether there was one."""
    with models.transaction():
        resumed = mailboxes.resume(mailbox)
        audit.record(who, "resume", mailbox.lower())
    runtime.limiter.resume(mailbox)
    runtime.wake("schedule_emails")
    return resumed


def pauses() -> list[Pause]:
    """Return every pause that stands, the tenant's first."""
    until = runtime.limiter.tenant_paused_until()
    tenants = [Pause("every mailbox", until, "Graph asked to wait or refused us", "mailfleet")] if until else []
    return tenants + mailboxes.pauses()


def limits(mailbox: str | None) -> list[BudgetUsage]:
    """Return how much of each budget is used: the mailbox's, or the tenant's."""
    return runtime.limiter.usage(mailbox) if mailbox else runtime.limiter.tenant_usage()


# Health


def backlog() -> Backlog:
    """Return how much of what is waiting.

    Raises:
        ServerAway: PostgreSQL does not answer.
    """
    try:
        return inspection.backlog()
    except models.DatabaseAway as away:
        raise ServerAway(str(away)) from away


def queue_depths() -> dict[str, int]:
    """Return how many messages are ready in each queue that there is, those of dead letters included.

    Raises:
        ServerAway: RabbitMQ does not answer.
    """
    worked = sorted(runtime.fleet_broker.queues)
    queues = [runtime.SEND_QUEUE, runtime.REJECTED_QUEUE, *worked, *map(xq_name, worked), MIRROR_QUEUE]
    try:
        with connect(runtime.rabbitmq) as connection:
            found = {queue: _declared(connection, queue) for queue in queues}
    except (pika.exceptions.AMQPError, OSError) as error:
        raise ServerAway("RabbitMQ is away") from error
    return {queue: declared.message_count for queue, declared in found.items() if declared}


class Finding(NamedTuple):
    """What one check of `doctor` found."""

    subject: str
    fine: bool
    detail: str


#: What has not answered by then is as good as away. A handshake with RabbitMQ is given up as late.
_PATIENCE = timedelta(seconds=10)


def doctor() -> list[Finding]:
    """Check everything that the fleet needs, within `_PATIENCE` whatever is broken."""
    return _check_all(_CHECKS)


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
    except (_Unwell, models.DatabaseAway, GraphError, Unavailable) as unwell:
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
    return "answers, and its schema is up to date"


def _missing_migrations() -> list[str]:
    applied = {row[0] for row in models.rows("SELECT to_regclass('_yoyo_migration') IS NOT NULL")} == {True}
    known = {row[0] for row in models.rows("SELECT migration_id FROM _yoyo_migration")} if applied else set()
    files = (Path(__file__).parent / "migrations").glob("*.sql")
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
    roles = runtime.graph.ping()
    if roles is None:
        return "gives a token"
    if missing := {"Mail.Send", "Mail.ReadWrite"} - roles:
        raise _Unwell(
            f"gives a token without {', '.join(sorted(missing))}; fine if RBAC for Applications grants them instead"
        )
    return f"gives a token with {', '.join(sorted(roles))}"


def _check_archive() -> str:
    newest = runtime.vault.keyring.newest_id
    unknown = [
        row[0]
        for row in models.rows("SELECT DISTINCT key_id FROM email_backups")
        if row[0] not in runtime.vault.keyring.ids
    ]
    if unknown:
        raise _Unwell(f"backups are sealed under {', '.join(unknown)}, which BACKUP_KEYS does not have")
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
    "Backlog": _check_backlog,
}
