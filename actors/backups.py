"""The backup actor: one sealed copy of every sent mail.

The message is read under the id that its draft had, where it had one; Graph's pages disagree on whether that id
survives the sending, so if nothing is there, and for mail that never was a draft, the tag decides. Whether what is
there has left Drafts is not asked: that would be a request more for each mail, and it has had the delay for it.

Where the worker may die, and what the next one does:

* ``backup.taken``, before the claim: RabbitMQ delivers the dispatch again.
* ``backup.claimed``, ``backup.fetched``: makes it again when the lease has run out, an attempt spent.
* ``backup.stored``, ``backup.postponed``, ``backup-failure.recorded``: the dispatch is delivered again and claims
  nothing; what is recorded holds.

A second copy of a message, however it came about, finds the first.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

import dramatiq
from dramatiq.middleware import CurrentMessage

import limiter as limits
import runtime
from actors.graph_calls import Renewing, backup_call
from actors.outcomes import AttemptsUsedUp, heed, hold_back, pause_everything, pause_fleet, pause_mailbox
from actors.waiting import CLOCKS_DIFFER, after_throttling, backoff, unreachable
from crash_points import CrashPoint
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
from models import ClaimedBackup, DatabaseAway, Sealed
from telemetry import ARCHIVED_BYTES, DEAD_LETTERS, Step, mail_context, mail_log
from vault import SealedBlob, bind_to

log = logging.getLogger(__name__)


#: A mailbox may refuse us for so long before the copies of what it has sent use up their attempts: nothing is lost by
#: waiting, for the mail is sent.
_REFUSED_FOR = timedelta(days=7)


class NotInMailbox(Exception):
    """Raised when a sent mail is not to be found, perhaps not yet."""


@dramatiq.actor(queue_name="backup", throws=(PermanentError, NotInMailbox, AttemptsUsedUp))
def backup_email(incoming_email_id: str, attempt: int) -> None:
    """Store the mail's MIME, sealed, or record why not and when to try again. Safe to repeat."""
    runtime.crash_point(CrashPoint.BACKUP_TAKEN)
    backup = ClaimedBackup.claim(incoming_email_id, attempt, lease=runtime.configuration.lease)
    if backup is None:
        return
    with mail_context(incoming_email_id=backup.incoming_email_id, publisher_message_id=backup.publisher_message_id):
        try:
            runtime.crash_point(CrashPoint.BACKUP_CLAIMED)
            _archive(backup)
        except Exception as error:
            _record(backup, error)
            runtime.crash_point(CrashPoint.BACKUP_POSTPONED)
        finally:
            runtime.wake_soon("schedule_emails")


def _archive(backup: ClaimedBackup) -> None:
    if backup.attempt > runtime.configuration.max_attempts:
        raise AttemptsUsedUp("every attempt ended with the worker")
    message_id, sealed = _copy_known(backup) or _copy_found(backup)
    runtime.crash_point(CrashPoint.BACKUP_FETCHED)
    stored = backup.store(
        message_id,
        Sealed(
            blob=sealed.ciphertext,
            compression=sealed.compression,
            size=sealed.size_bytes,
            compressed_size=sealed.compressed_size_bytes,
            checksum=sealed.checksum,
            key_id=sealed.key_id,
        ),
        retention=runtime.configuration.backup_retention,
    )
    runtime.crash_point(CrashPoint.BACKUP_STORED)
    if not stored:
        mail_log(Step.LEASE_LOST, incoming_email_id=backup.incoming_email_id)
        return
    ARCHIVED_BYTES.inc(sealed.size_bytes)
    mail_log(
        Step.ARCHIVED, incoming_email_id=backup.incoming_email_id, graph_message_id=message_id, bytes=sealed.size_bytes
    )


def _copy_known(backup: ClaimedBackup) -> tuple[str, SealedBlob] | None:
    """Copy the message under the id that is known, if there is one and Graph still knows it."""
    if backup.graph_message_id is None:
        return None
    try:
        with backup_call(backup) as renewing:
            return backup.graph_message_id, _copy(backup, backup.graph_message_id, renewing)
    except ItemNotFound:
        return None


def _copy_found(backup: ClaimedBackup) -> tuple[str, SealedBlob]:
    # Two requests, one after the other: one slot and one question to the limiter will do.
    with backup_call(backup, requests=2) as renewing:
        message_id = _find(backup)
        return message_id, _copy(backup, message_id, renewing)


def _find(backup: ClaimedBackup) -> str:
    # Cheap in a full mailbox; the last look does not depend on when the clocks said that the mail came.
    last = backup.attempt >= runtime.configuration.max_attempts
    since = None if last else backup.received_at - CLOCKS_DIFFER
    for message in runtime.graph.find_by_tag(backup.mailbox, backup.incoming_email_id, since=since).messages:
        if not message.is_draft:
            return message.id
    raise NotInMailbox("the mail is not in the mailbox")


def _copy(backup: ClaimedBackup, message_id: str, renewing: Renewing) -> SealedBlob:
    with runtime.graph.fetch_mime(backup.mailbox, message_id) as chunks:
        return runtime.vault.seal(renewing(chunks), associated_data=bind_to(backup.incoming_email_id, message_id))


def _record(backup: ClaimedBackup, error: Exception) -> None:
    """Record why there is no copy and when to try again; what is everyone's to wait for spends no attempt."""
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
                _retry_or_fail(backup, error, wait)
        case TransientError():
            _retry_or_fail(backup, error, heed(backup.mailbox, error))
        case _:
            _retry_or_fail(backup, error)


def _retry_or_fail(backup: ClaimedBackup, error: Exception, wait: timedelta | None = None) -> None:
    if not isinstance(error, GraphError | NotInMailbox | AttemptsUsedUp):
        log.exception("unforeseen %s", type(error).__name__)
        error = RuntimeError(type(error).__name__)
    final = isinstance(error, PermanentError) and not isinstance(error, ItemNotFound)
    if not final and backup.attempt < runtime.configuration.max_attempts:
        backup.retry(wait or backoff(backup.attempt), str(error))
        mail_log(
            Step.BACKUP_RETRIED, incoming_email_id=backup.incoming_email_id, attempt=backup.attempt, why=str(error)
        )
        return
    message = CurrentMessage.get_current_message()
    given_up = backup.fail(
        reason="backup_failed",
        error=str(error),
        message_id=message.message_id,
        queue_name=message.queue_name,
        actor_name=message.actor_name,
    )
    if not given_up:
        return
    runtime.crash_point(CrashPoint.BACKUP_FAILURE_RECORDED)
    DEAD_LETTERS.labels(message.queue_name, "backup_failed").inc()
    mail_log(
        Step.BACKUP_FAILED, incoming_email_id=backup.incoming_email_id, reason="backup_failed", attempt=backup.attempt
    )
    raise error
