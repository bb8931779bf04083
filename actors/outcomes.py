"""Why a mail was not sent, and what follows from it: one line of policy per kind of error.

===========================  ==============================================================
limiter says no              snoozed, no attempt spent; a mailbox at its limit is passed over
Graph throttles              everyone leaves the mailbox alone until then; snoozed
outcome unknown              in doubt: looked up, not repeated
mailbox refuses              the mailbox is paused, longer each time; an attempt spent; another mail probes
configuration refused        everything is paused shortly; snoozed: no mail is to blame
Graph out of reach           snoozed: no mail is to blame, however long it lasts
transient                    tried again with full jitter, or when Graph says, to everyone; an attempt spent
payload's key is missing     snoozed: no mail is to blame, and the key may come back
store of attachments away    snoozed: no mail is to blame
permanent, attempts used up  dead-lettered, ``SendEmailFailed``
===========================  ==============================================================

An email that was in doubt stays so whatever the error was, unless it is given up; even then its replay looks first.
"""

from __future__ import annotations

import logging
import re
from datetime import datetime, timedelta
from typing import Any

from dramatiq.middleware import CurrentMessage

import limiter as limits
import runtime
from actors.composition import attached_bytes
from actors.evidence import refused
from actors.waiting import after_refusal, after_throttling, backoff, unreachable
from attachments import AttachmentRefused, SourceUnavailable, StoreUnavailable
from crash_points import CrashPoint
from graph_client.errors import (
    ConfigurationError,
    ConnectionFailed,
    GraphError,
    ItemNotFound,
    MailboxUnavailable,
    MessageTooLarge,
    OutcomeUnknown,
    PermanentError,
    Throttled,
    TransientError,
)
from mail_rules import StoppedByFirewall
from models import ClaimedEmail, DatabaseAway, LeaseLost, mailboxes, turns
from models.spending import record_slowed
from models.turns import EVERY, Full
from outbox import PUBLISH_WITHIN
from payloads import PayloadPurged
from telemetry import (
    CONFIGURATION_REFUSED,
    DEAD_LETTERS,
    LIMITER_REFUSALS,
    LOWERED,
    STAGE_SECONDS,
    Step,
    mail_log,
    series,
)
from vault import Tampered, UnknownKey

log = logging.getLogger(__name__)

#: First pause of a mailbox that refused us; it doubles up to the longest.
_REFUSAL_PAUSE = timedelta(seconds=30)
_LONGEST_REFUSAL_PAUSE = timedelta(hours=1)
#: Without a token nothing works, for any mailbox.
_CONFIGURATION_PAUSE = timedelta(seconds=15)
#: Until somebody has put a key back into BACKUP_KEYS nothing changes, and each look is a claim.
_KEY_PAUSE = timedelta(minutes=5)
#: A mail that could not be looked up for so long is left to the operator.
LONGEST_DOUBT = timedelta(days=3)
#: A draft may stay invisible for a moment after it was made (github.com/demisto/content/pull/41448); if it still is
#: after so many attempts, at least so far apart, it is gone.
_DRAFT_ATTEMPTS = 3
_DRAFT_LAG = timedelta(seconds=1)
#: Graph's words when it says which limit is exceeded (graph error ApplicationThrottled; users' reports).
_BLAMED = {"MailboxConcurrency": limits.CONCURRENCY, "IncomingBytes": "upload_bytes"}

# A counter that appears with its first event has no increase that an alert could see.
for _budget in ("sends", "requests", *_BLAMED.values()):
    LOWERED.labels(_budget)

#: What a worker finds used up; of what is reserved the scheduler finds it out.
_NOT_RESERVED = ("requests", "upload_bytes")


class AttemptsUsedUp(Exception):
    """Raised when an email has failed as often as it may."""


class InDoubtHeld(Exception):
    """Raised when a mail in doubt stayed absent and the policy is to leave it to the operator."""


class Unforeseen(Exception):
    """Raised in the place of an error that nobody foresaw; names its class, since its text may quote anything."""


class FileInDoubt(Exception):
    """Raised when a file may still appear on a draft that is otherwise worth keeping, for as long as ``wait``."""

    def __init__(self, wait: timedelta) -> None:
        super().__init__("a file may still appear on the draft: a request to attach it was never answered")
        self.wait = wait


class TooLargeForMailbox(Exception):
    """Raised in the place of Graph's word for it; says how large the mail is, and who may change what is allowed."""


#: What ends an email: recorded as failed, and dead-lettered.
GIVEN_UP = (
    PermanentError,
    AttachmentRefused,
    AttemptsUsedUp,
    InDoubtHeld,
    StoppedByFirewall,
    TooLargeForMailbox,
    limits.NeverFits,
    Tampered,
    PayloadPurged,
)


def record_sent(
    email: ClaimedEmail,
    *,
    evidence: dict[str, Any],
    graph_message_id: str | None = None,
    sent_at: datetime | None = None,
) -> None:
    """Record that the mail is sent, and have the world told."""
    events = email.record_sent(
        backup_delay=runtime.configuration.backup_delay,
        publish_within=PUBLISH_WITHIN,
        graph_message_id=graph_message_id,
        sent_at=sent_at,
        evidence=evidence,
    )
    runtime.crash_point(CrashPoint.SEND_RECORDED)
    runtime.events.add(events)
    series(STAGE_SECONDS, "sent").observe(email.waited.total_seconds())
    mail_log(Step.SENT, incoming_email_id=email.id, graph_message_id=graph_message_id, attempt=email.attempt)


def record_expired(email: ClaimedEmail) -> None:
    """Record that the mail came too late to be sent, and have the world told."""
    events = email.expire(PUBLISH_WITHIN)
    runtime.crash_point(CrashPoint.EXPIRY_RECORDED)
    runtime.events.add(events)
    mail_log(Step.EXPIRED, incoming_email_id=email.id)


def hold(email: ClaimedEmail) -> None:
    """Put an email back that is paused: it is the scheduler's again, which passes it over until the pause ends."""
    _snooze(email, timedelta(), "paused", "paused")


def record(email: ClaimedEmail, error: Exception) -> None:
    """Record why the mail was not sent and when it is tried again; raise what dead-letters the message."""
    try:
        _record(email, error)
    except LeaseLost:
        mail_log(Step.LEASE_LOST, incoming_email_id=email.id)


def _record(email: ClaimedEmail, error: Exception) -> None:
    match error:
        case LeaseLost() | DatabaseAway():
            raise error  # nothing can be recorded: the lease runs out, or has
        case ItemNotFound() if email.intended or email.in_doubt_for is not None:
            _doubt(email, error)  # a draft that is gone may have been sent
        case ItemNotFound():
            _wait_for_draft(email, error)
        case MessageTooLarge():
            _fail(email, TooLargeForMailbox(_how_large(email, error)), because=error)
        case _ if isinstance(error, GIVEN_UP):
            _fail(email, error)
        case limits.Refused():
            _hold_back(email, error)
        case Throttled():
            _leave_alone(email, error)
        case OutcomeUnknown():
            _doubt(email, error)
        case MailboxUnavailable():
            # Another mail is the next to probe: it may be this one alone that is refused.
            _retry(email, error, 2 * pause_mailbox(email.mailbox, error))
        case ConfigurationError():
            pause_everything()
            _snooze(email, unreachable(), str(error), "configuration")
        case UnknownKey():
            log.error("a payload cannot be opened: %s", error)
            _snooze(email, _KEY_PAUSE, str(error), "key missing")
        case ConnectionFailed():
            _snooze(email, unreachable(), str(error), "unreachable")
        case TransientError():
            _retry(email, error, heed(email.mailbox, error) or backoff(email.attempt))
        case StoreUnavailable():
            _snooze(email, unreachable(), str(error), "store away")
        case FileInDoubt():
            _snooze(email, error.wait, str(error), "file in doubt")
        case SourceUnavailable():
            _retry(email, error, error.retry_after or backoff(email.attempt))
        case _:
            _retry_unforeseen(email, error)


def _how_large(email: ClaimedEmail, error: MessageTooLarge) -> str:
    count, size_bytes = len(email.payload.get("attachments", ())), attached_bytes(email.payload)
    allowed = runtime.configuration.message_max_mb
    who = (
        f"its mailbox may send, which an Exchange administrator sets (35 MB unless it was raised, counted as the mail"
        f" travels: in base64 the attachments have {4 * -(-size_bytes // 3):,} bytes)"
        if error.status
        else f"MESSAGE_MAX_MB allows, {allowed} MB"
    )
    return f"the mail with {count} attachments of {size_bytes:,} bytes together is larger than {who}: {error}"


def _hold_back(email: ClaimedEmail, refused: limits.Refused) -> None:
    wait, budget = hold_back(email.mailbox, refused)
    if isinstance(refused, limits.Unavailable):
        # Its charge may have been moved to the call that was not made: what is given back might be another mail's.
        email.charged_at_ms = None
    _snooze(email, wait, str(refused), budget)


def hold_back(mailbox: str, refused: limits.Refused) -> tuple[timedelta, str]:
    """Have the scheduler pass over a mailbox that is at its limit; return when to ask again, and the limit's name."""
    LIMITER_REFUSALS.labels(refused.budget).inc()
    if refused.mailbox_wide and refused.budget in _NOT_RESERVED:
        turns.note_full({mailbox: Full(refused.retry_after, f"limit: {refused.budget}")})
    return after_refusal(refused), refused.budget


def _leave_alone(email: ClaimedEmail, throttled: Throttled) -> None:
    wait = after_throttling(throttled)
    pause_fleet(email.mailbox, wait, throttled, budget="sends" if email.intended else "requests")
    _snooze(email, wait, str(throttled), "throttled")


def pause_fleet(mailbox: str, wait: timedelta, error: GraphError, *, budget: str) -> None:
    """Have everyone leave the mailbox alone: at once through Redis, and through the scheduler, which survives Redis.

    Args:
        budget: What is lowered if Graph throttles again and again and does not say what it is about.
    """
    mailboxes.pause(mailbox, wait, why=f"asked to wait: {error}")
    try:
        if not isinstance(error, Throttled):
            runtime.limiter.pause(mailbox, wait)
        elif error.scope == "tenant":
            runtime.limiter.pause_all(wait)
            mailboxes.pause(EVERY, wait, why=f"asked everybody to wait: {error}")
        else:
            _learn(mailbox, wait, error, budget)
    except limits.Unavailable:
        log.warning("a pause could not be told to the fleet: Redis is away")


def heed(mailbox: str, error: GraphError) -> timedelta | None:
    """Have everyone leave the mailbox alone for as long as Graph asked to with its error, if it did; return that."""
    if error.retry_after:
        pause_fleet(mailbox, error.retry_after, error, budget="requests")
    return error.retry_after


def _learn(mailbox: str, wait: timedelta, throttled: Throttled, budget: str) -> None:
    blamed = next((budget for words, budget in _BLAMED.items() if words in throttled.message), budget)
    slowed, everybody = runtime.limiter.throttled(mailbox, wait, budget=blamed)
    if slowed:
        record_slowed(mailbox, blamed, slowed.as_row())
        LOWERED.labels(blamed).inc()
        log.warning("%s of the mailbox: %s", blamed, str(slowed))
    if everybody:
        mailboxes.pause(EVERY, wait, why="asked many mailboxes to wait")


def pause_everything() -> None:
    """Have everyone leave Graph alone for a moment: it refused our configuration."""
    CONFIGURATION_REFUSED.inc()
    try:
        runtime.limiter.pause_all(_CONFIGURATION_PAUSE)
    except limits.Unavailable:
        log.warning("a pause could not be told to the fleet: Redis is away")


def pause_mailbox(mailbox: str, error: MailboxUnavailable) -> timedelta:
    """Have the scheduler pass over a mailbox that refuses us, longer each time in a row; return for how long."""
    return mailboxes.refuse(mailbox, why=str(error), first_wait=_REFUSAL_PAUSE, longest_wait=_LONGEST_REFUSAL_PAUSE)


def _wait_for_draft(email: ClaimedEmail, error: ItemNotFound) -> None:
    """Give a draft that Graph does not find the time to appear, then start over with another."""
    if email.attempt >= _DRAFT_ATTEMPTS:
        email.start_over(None)
    _retry(email, error, _DRAFT_LAG + backoff(email.attempt))


def _doubt(email: ClaimedEmail, unknown: OutcomeUnknown | ItemNotFound) -> None:
    heed(email.mailbox, unknown)
    leave_in_doubt(email, refused("send", unknown))
    mail_log(Step.IN_DOUBT, incoming_email_id=email.id, why=str(unknown))


def leave_in_doubt(email: ClaimedEmail, evidence: dict[str, Any]) -> None:
    """Let go of an email of which nobody knows whether it was sent; it is looked up in a while."""
    email.mark_in_doubt(look_again_in=runtime.configuration.in_doubt_settle, evidence=evidence)
    runtime.crash_point(CrashPoint.DOUBT_RECORDED)


def _snooze(email: ClaimedEmail, wait: timedelta, why: str, reason: str) -> None:
    email.snooze(wait, why)
    runtime.crash_point(CrashPoint.RETRY_RECORDED)
    mail_log(Step.SNOOZED, incoming_email_id=email.id, why=reason, seconds=round(wait.total_seconds(), 3))


def _retry(email: ClaimedEmail, error: Exception, wait: timedelta) -> None:
    if email.in_doubt_for is not None:
        if doubted_too_long(email):
            _fail(email, InDoubtHeld(f"it could not be looked up: {error}"))
    elif email.attempt >= runtime.configuration.max_attempts:
        _fail(email, AttemptsUsedUp(f"attempt {email.attempt}: {error}"), because=error)
    email.retry(wait, str(error) or type(error).__name__)
    runtime.crash_point(CrashPoint.RETRY_RECORDED)
    mail_log(
        Step.RETRIED,
        incoming_email_id=email.id,
        attempt=email.attempt,
        why=type(error).__name__,
        seconds=round(wait.total_seconds(), 3),
    )


def doubted_too_long(email: ClaimedEmail) -> bool:
    """Say whether a mail in doubt is to be left to the operator: nobody could look it up, though it was wanted."""
    waits = [wait for wait in (email.in_doubt_for, email.replayed_for) if wait is not None]
    return bool(waits) and min(waits) > LONGEST_DOUBT


def _retry_unforeseen(email: ClaimedEmail, error: Exception) -> None:
    """Treat an error of our own as one: where the intent stands it may have come after the send."""
    log.exception("unforeseen %s", type(error).__name__)
    if email.intended:
        evidence = {"asked": "send", "seen": type(error).__name__, "client_request_id": email.send_id}
        leave_in_doubt(email, evidence)
    else:
        _retry(email, Unforeseen(type(error).__name__), backoff(email.attempt))


def _fail(email: ClaimedEmail, error: Exception, *, because: Exception | None = None) -> None:
    """Give the email up; the reason is the kind of ``because``, by which an operator finds what to mend."""
    reason = _snake_case(type(because or error).__name__)
    message = CurrentMessage.get_current_message()
    events = email.fail(
        reason=reason,
        error=str(error),
        message_id=message.message_id,
        queue_name=message.queue_name,
        actor_name=message.actor_name,
        publish_within=PUBLISH_WITHIN,
    )
    runtime.crash_point(CrashPoint.FAILURE_RECORDED)
    runtime.events.add(events)
    DEAD_LETTERS.labels(message.queue_name, reason).inc()
    mail_log(Step.FAILED, incoming_email_id=email.id, reason=reason, attempt=email.attempt)
    raise error


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
