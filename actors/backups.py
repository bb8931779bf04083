"""The backup actor: one sealed copy of every sent mail.

The message is read under the id that its draft had, where it had one; Graph's pages disagree on whether that id
survives the sending, so if nothing is there, and for mail that never was a draft, the tag decides. Whether what is
there has left Drafts is not asked: that would be a request more for each mail, and it has had the delay for it.

Where the worker may die, and what the next one does:

* ``backup.taken``, before the claim: RabbitMQ delivers the dispatch again.
* ``backup.claimed``, ``backup.fetched``: makes it again when the lease has run out, an attempt spent.
* ``backup.stored``, ``backup.postponed``, ``backup-failure.recorded``: the dispatch is delivered again and claims
  nothing; what is recorded holds.

Several of one mailbox are made together, found by one look, as long as nothing has gone wrong with them.

A second copy of a message, however it came about, finds the first.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from typing import Any

import dramatiq
from dramatiq.middleware import CurrentMessage

import limiter as limits
import runtime
from actors.graph_calls import Renewing, backup_call
from actors.outcomes import AttemptsUsedUp, heed, hold_back, pause_everything, pause_fleet, pause_mailbox
from actors.waiting import CLOCKS_DIFFER, after_throttling, backoff, unreachable
from crash_points import CrashPoint
from graph_client import Message
from graph_client.errors import (
    ConfigurationError,
    ConnectionFailed,
    GraphError,
    ItemNotFound,
    MailboxUnavailable,
    PermanentError,
    Throttled,
    TransientError,
)
from models import ClaimedBackup, Copy, DatabaseAway, Sealed
from models.backups import store
from telemetry import ARCHIVED_BYTES, DEAD_LETTERS, Step, mail_context, mail_log, note_ids
from tracing import Span, active, ending, trace_id
from vault import bind_to

log = logging.getLogger(__name__)

_GIVEN_UP_FOR = "backup_failed"
# A counter that appears with its first event has no increase that an alert could see.
DEAD_LETTERS.labels("backup", _GIVEN_UP_FOR)

#: A mailbox may refuse us for so long before the copies of what it has sent use up their attempts: nothing is lost by
#: waiting, for the mail is sent.
_REFUSED_FOR = timedelta(days=7)


class NotInMailbox(Exception):
    """Raised when a sent mail is not to be found, perhaps not yet."""


GIVEN_UP = (PermanentError, NotInMailbox, AttemptsUsedUp)


@dramatiq.actor(queue_name="backup", throws=GIVEN_UP)
def backup_email(incoming_email_id: str, attempt: int, **_dispatch: Any) -> None:
    """Store the mail's MIME, sealed, or record why not and when to try again. Safe to repeat."""
    for backup in _claimed([(incoming_email_id, attempt)]):
        note_ids(**_ids(backup))
        try:
            with _told_of(backup), ending([_begin(backup)]):
                runtime.crash_point(CrashPoint.BACKUP_CLAIMED)
                _archive([_copy_known(backup) or _copy_found(backup)])
        except Exception as error:
            _record(backup, error)
        finally:
            runtime.wake_soon("schedule_emails")


@dramatiq.actor(queue_name="backup", throws=GIVEN_UP)
def backup_emails(backups: list[list[Any]], **_dispatch: Any) -> None:
    """Store the MIMEs of several mails of one mailbox: one look finds them, under one slot. Safe to repeat.

    What cannot be made here is made alone the next time, where it may also be given up. If the trouble is not one
    mail's, those behind it are put back.

    Args:
        backups: Of each the email's id and the attempt.
    """
    claimed = _claimed([(str(incoming_email_id), int(attempt)) for incoming_email_id, attempt, *_ in backups])
    if not claimed:
        return
    left, copies = deque(claimed), list[Copy]()
    spans = {backup.incoming_email_id: _begin(backup) for backup in claimed}
    with ending(spans.values()):
        try:
            _copy_all(left, copies, spans)
        except Exception as error:
            for backup in left:
                spans[backup.incoming_email_id].fail(error)
            _record(left.popleft(), error, together=True)
            for backup in left:
                backup.snooze(timedelta(), "put back: another of its mailbox met trouble")
        finally:
            if copies:
                _archive(copies)
            runtime.wake_soon("schedule_emails")


def _claimed(dispatched: Sequence[tuple[str, int]]) -> list[ClaimedBackup]:
    runtime.crash_point(CrashPoint.BACKUP_TAKEN)
    return ClaimedBackup.claim(dispatched, lease=runtime.configuration.lease)


def _begin(backup: ClaimedBackup) -> Span:
    """Begin the backup's span, under what the mail's row names: several are dispatched by one message."""
    noted = {**_ids(backup), "trace_id": None}  # a span is in its trace
    return runtime.tracer.begin("backup", backup.traceparent, kind="consumer", attempt=backup.attempt, **noted)


def _ids(backup: ClaimedBackup) -> dict[str, str | None]:
    return {
        "incoming_email_id": backup.incoming_email_id,
        "publisher_message_id": backup.publisher_message_id,
        "graph_message_id": backup.graph_message_id,
        "correlation_id": backup.correlation_id,
        "trace_id": trace_id(backup.traceparent),
    }


def _told_of(backup: ClaimedBackup) -> AbstractContextManager[None]:
    return mail_context(**_ids(backup))


def _copy_all(left: deque[ClaimedBackup], copies: list[Copy], spans: Mapping[str, Span]) -> None:
    """Move each backup from those that are left to the copies; of one that cannot be made, record why.

    Raises:
        Exception: What is in the way of the first that is left, and of all behind it.
    """
    mailbox, ids = left[0].mailbox, [backup.incoming_email_id for backup in left]
    since = min(backup.received_at for backup in left) - CLOCKS_DIFFER
    with backup_call(mailbox, requests=runtime.graph.requests_to_find(len(ids)) + len(ids)) as renewing:
        found = runtime.graph.find_by_tags(mailbox, ids, since=since)
        while left:
            backup = left[0]
            try:
                with _told_of(backup), active([spans[backup.incoming_email_id]]):
                    runtime.crash_point(CrashPoint.BACKUP_CLAIMED)
                    message_id = _sent_one(found[backup.incoming_email_id])
                    copies.append(Copy(backup, message_id, _sealed(backup, message_id, renewing)))
            except (NotInMailbox, PermanentError) as error:
                _record(backup, error, together=True)
            left.popleft()


def _archive(copies: Sequence[Copy]) -> None:
    runtime.crash_point(CrashPoint.BACKUP_FETCHED)
    stored = store(copies, retention=runtime.configuration.backup_retention)
    runtime.crash_point(CrashPoint.BACKUP_STORED)
    for backup, message_id, sealed in copies:
        with _told_of(backup):
            if backup.incoming_email_id not in stored:
                mail_log(Step.LEASE_LOST, incoming_email_id=backup.incoming_email_id)
                continue
            ARCHIVED_BYTES.inc(sealed.size)
            mail_log(
                Step.ARCHIVED,
                incoming_email_id=backup.incoming_email_id,
                graph_message_id=message_id,
                bytes=sealed.size,
            )


def _copy_known(backup: ClaimedBackup) -> Copy | None:
    """Copy the message under the id that is known, if there is one and Graph still knows it."""
    if backup.attempt > runtime.configuration.max_attempts:
        raise AttemptsUsedUp("every attempt ended with the worker, or is used up")
    if backup.graph_message_id is None:
        return None
    try:
        with backup_call(backup.mailbox) as renewing:
            return Copy(backup, backup.graph_message_id, _sealed(backup, backup.graph_message_id, renewing))
    except ItemNotFound:
        return None


def _copy_found(backup: ClaimedBackup) -> Copy:
    # Two requests, one after the other: one slot and one question to the limiter will do.
    with backup_call(backup.mailbox, requests=2) as renewing:
        message_id = _find(backup)
        return Copy(backup, message_id, _sealed(backup, message_id, renewing))


def _find(backup: ClaimedBackup) -> str:
    # Cheap in a full mailbox; the last look does not depend on when the clocks said that the mail came.
    last = backup.attempt >= runtime.configuration.max_attempts
    since = None if last else backup.received_at - CLOCKS_DIFFER
    return _sent_one(runtime.graph.find_by_tag(backup.mailbox, backup.incoming_email_id, since=since).messages)


def _sent_one(found: Sequence[Message]) -> str:
    """Return the id of the first message that is not a draft."""
    for message in found:
        if not message.is_draft:
            return message.id
    raise NotInMailbox("the mail is not in the mailbox")


def _sealed(backup: ClaimedBackup, message_id: str, renewing: Renewing) -> Sealed:
    """Fetch the MIME and seal it."""
    with runtime.graph.fetch_mime(backup.mailbox, message_id) as chunks:
        sealed = runtime.vault.seal(renewing(chunks), associated_data=bind_to(backup.incoming_email_id, message_id))
    return Sealed(
        blob=sealed.ciphertext,
        compression=sealed.compression,
        size=sealed.size_bytes,
        compressed_size=sealed.compressed_size_bytes,
        checksum=sealed.checksum,
        key_id=sealed.key_id,
    )


def _record(backup: ClaimedBackup, error: Exception, *, together: bool = False) -> None:
    """Record why there is no copy and when to try again; what is everyone's to wait for spends no attempt.

    Args:
        together: It was tried with others, whose message may not be dead-lettered for it: if its attempts are used up,
            which is so only to a worker with a lower ``MAX_ATTEMPTS`` than the scheduler's, the next one gives it up.
    """
    with _told_of(backup):
        _record_why(backup, error, together=together)
        runtime.crash_point(CrashPoint.BACKUP_POSTPONED)


def _record_why(backup: ClaimedBackup, error: Exception, *, together: bool) -> None:
    match error:
        case DatabaseAway():
            raise error
        case limits.Refused():
            wait, _ = hold_back(backup.mailbox, error)
            backup.snooze(wait, str(error))
        case Throttled():
            wait = after_throttling(error)
            pause_fleet(backup.mailbox, wait, error, budget="requests")
            backup.snooze(wait, str(error))
        case ConfigurationError():
            pause_everything()
            backup.snooze(unreachable(), str(error))
        case ConnectionFailed():
            backup.snooze(unreachable(), str(error))
        case MailboxUnavailable():
            wait = 2 * pause_mailbox(backup.mailbox, error)  # another is the next to probe
            if datetime.now(UTC) - backup.received_at < _REFUSED_FOR:
                backup.snooze(wait, str(error))
            else:
                _retry_or_fail(backup, error, wait, together=together)
        case TransientError():
            _retry_or_fail(backup, error, heed(backup.mailbox, error), together=together)
        case _:
            _retry_or_fail(backup, error, together=together)


def _retry_or_fail(backup: ClaimedBackup, error: Exception, wait: timedelta | None = None, *, together: bool) -> None:
    if not isinstance(error, GraphError | NotInMailbox | AttemptsUsedUp):
        log.exception("unforeseen %s", type(error).__name__)
        error = RuntimeError(type(error).__name__)
    final = isinstance(error, PermanentError) and not isinstance(error, ItemNotFound)
    if together or (not final and backup.attempt < runtime.configuration.max_attempts):
        backup.retry(wait or backoff(backup.attempt), str(error))
        mail_log(
            Step.BACKUP_RETRIED, incoming_email_id=backup.incoming_email_id, attempt=backup.attempt, why=str(error)
        )
        return
    message = CurrentMessage.get_current_message()
    given_up = backup.fail(
        reason=_GIVEN_UP_FOR,
        error=str(error),
        message_id=message.message_id,
        queue_name=message.queue_name,
        actor_name=message.actor_name,
    )
    if not given_up:
        return
    runtime.crash_point(CrashPoint.BACKUP_FAILURE_RECORDED)
    DEAD_LETTERS.labels(message.queue_name, _GIVEN_UP_FOR).inc()
    mail_log(
        Step.BACKUP_FAILED, incoming_email_id=backup.incoming_email_id, reason=_GIVEN_UP_FOR, attempt=backup.attempt
    )
    raise error
