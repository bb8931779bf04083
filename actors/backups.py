"""The backup actor: one sealed copy of every sent mail.

Dying anywhere leaves the backup leased and due: it is made again, and the second copy finds the first. The message is
found by its tag, since the id that a draft had need not survive its sending.
"""

from __future__ import annotations

import logging
from datetime import timedelta

import dramatiq
from dramatiq.middleware import CurrentMessage

import limiter as limits
import runtime
from actors.outcomes import AttemptsUsedUp, hold_back, pause_everything, pause_fleet
from actors.waiting import after_throttling, backoff, unreachable
from crash_points import CrashPoint
from graph_client.errors import ConfigurationError, GraphError, ItemNotFound, PermanentError, Throttled
from models import ClaimedBackup, DatabaseAway, Sealed
from telemetry import ARCHIVED_BYTES, DEAD_LETTERS, Step, mail_context, mail_log
from vault import bind_to

log = logging.getLogger(__name__)

#: A mail cannot have been sent before Graph was asked; clocks differ by less than this.
_CLOCKS_DIFFER = timedelta(minutes=10)


class NotInMailbox(Exception):
    """Raised when a sent mail is not to be found, perhaps not yet."""


@dramatiq.actor(queue_name="backup", throws=(PermanentError, NotInMailbox, AttemptsUsedUp))
def backup_email(incoming_email_id: str, attempt: int) -> None:
    """Store the mail's MIME, sealed, or record why not and when to try again. Safe to repeat."""
    backup = ClaimedBackup.claim(incoming_email_id, attempt, lease=runtime.configuration.lease)
    if backup is None:
        return
    with mail_context(incoming_email_id=backup.incoming_email_id, publisher_message_id=backup.publisher_message_id):
        try:
            runtime.crash_point(CrashPoint.BACKUP_CLAIMED)
            _archive(backup)
        except Exception as error:
            _record(backup, error)
        finally:
            runtime.wake_soon("schedule_emails")


def _archive(backup: ClaimedBackup) -> None:
    if backup.attempt > runtime.configuration.max_attempts:
        raise AttemptsUsedUp("every attempt ended with the worker")
    # Two requests, one after the other: one slot and one question to the limiter will do.
    with runtime.limiter.slot(backup.mailbox, requests=2):
        message_id = _find(backup)
        with runtime.graph.fetch_mime(backup.mailbox, message_id) as chunks:
            sealed = runtime.vault.seal(chunks, associated_data=bind_to(backup.incoming_email_id, message_id))
    runtime.crash_point(CrashPoint.BACKUP_FETCHED)
    backup.store(
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
    ARCHIVED_BYTES.inc(sealed.size_bytes)
    mail_log(
        Step.ARCHIVED, incoming_email_id=backup.incoming_email_id, graph_message_id=message_id, bytes=sealed.size_bytes
    )


def _find(backup: ClaimedBackup) -> str:
    found = runtime.graph.find_by_tag(
        backup.mailbox, backup.incoming_email_id, since=backup.received_at - _CLOCKS_DIFFER
    )
    for message in found:
        if not message.is_draft:
            return message.id
    raise NotInMailbox("the mail is not in the mailbox")


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
            pause_fleet(backup.mailbox, wait, error)
            backup.snooze(wait, str(error))
        case ConfigurationError():
            pause_everything()
            backup.snooze(unreachable(), str(error))
        case _:
            _retry_or_fail(backup, error)


def _retry_or_fail(backup: ClaimedBackup, error: Exception) -> None:
    if not isinstance(error, GraphError | NotInMailbox | AttemptsUsedUp):
        log.exception("unforeseen %s", type(error).__name__)
        error = RuntimeError(type(error).__name__)
    final = isinstance(error, PermanentError) and not isinstance(error, ItemNotFound)
    if not final and backup.attempt < runtime.configuration.max_attempts:
        backup.retry(backoff(backup.attempt), str(error))
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
    DEAD_LETTERS.labels(message.queue_name, "backup_failed").inc()
    mail_log(
        Step.BACKUP_FAILED, incoming_email_id=backup.incoming_email_id, reason="backup_failed", attempt=backup.attempt
    )
    raise error
