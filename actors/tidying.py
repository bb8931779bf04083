"""Drafts that nobody sends any more are taken out of the mailboxes, and upload sessions that nobody goes on with ended.

A draft that a dead worker has left is used by the next attempt, which finds it by the email's tag. What is left all the
same, because it showed itself too late or because its email was not sent in the end, is found by the tag here, when the
email has been settled for ``DRAFT_RETENTION_DAYS``.

Every call goes through the limiter, and a turn looks at a bounded number of emails. Whoever dies in it has changed
nothing that another turn does not find again: that an email was looked at is recorded last.

A mailbox that refuses is asked again when the same time has passed, so often at most: one that is gone has no drafts
either. One that is at its limit, or fails for a moment, is asked again by the next turn. Where Graph or the limiter is
away, or our credential is refused, the turn ends.

Where it may die, and what happens next: ``tidying.let-go``: the sessions' addresses are forgotten, and they end by
themselves; the next turn finds the drafts. ``tidying.session-ended``, ``tidying.draft-deleted``: the next turn finds
what is left. ``tidying.recorded``: the next turn goes on with the next email.

A message that may be the mail itself is never deleted: not the one that left, not one in doubt, and nothing of a mail
that was sent unless the mail is there as well. As the request leaves, the email must be as it was found: a replay goes
on with a draft. Nothing of a mail on hold is.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import UTC, datetime
from enum import Enum, auto

import dramatiq
from periodiq import cron

import runtime
from actors.graph_calls import SLOT_WAIT
from actors.outcomes import heed
from actors.waiting import CLOCKS_DIFFER
from crash_points import CrashPoint
from graph_client import Message, UploadSession, looking_first
from graph_client.errors import (
    ConfigurationError,
    ConnectionFailed,
    GraphError,
    ItemNotFound,
    MailboxUnavailable,
    PermanentError,
)
from limiter import Exhausted, NeverFits, Refused
from models import inspection, leftovers
from models.leftovers import Leftover, OpenSession
from telemetry import Step, mail_log
from tracing import trace_id

log = logging.getLogger(__name__)

#: Of one turn: some hundreds of requests, which take a minute or two.
_BATCH = 100
_SESSIONS_BATCH = 1000
#: So many emails are found, of which those of busy mailboxes are passed over.
_FOUND = 10 * _BATCH
#: An email that cannot be looked for is given up after so many times ``DRAFT_RETENTION_DAYS``: one look in each.
_MOST_LOOKS = 10


class _Look(Enum):
    """What came of looking for what an email has left."""

    CLEAN = auto()
    #: Somebody has replayed the email: it is no leftover any more.
    CHANGED = auto()
    #: This email's was refused.
    REFUSED = auto()
    #: So will be those of all others of its mailbox.
    MAILBOX_REFUSES = auto()
    #: It went wrong in a way that passes; the others of its mailbox are left alone for this turn.
    FAILED = auto()
    #: Its mailbox is at its limit, and nothing was asked of Graph.
    BUSY = auto()
    #: Nobody's can be looked for now.
    AWAY = auto()


class _Changed(Exception):
    """Raised when the email is not as it was found: somebody has replayed it, or put it on hold."""


@dramatiq.actor(queue_name="maintenance", periodic=cron("*/10 * * * *"))
def tidy_drafts() -> None:
    """Delete the drafts, and end the upload sessions, that settled emails have left in their mailboxes."""
    leftovers.forget_ended_sessions(_SESSIONS_BATCH)
    busy: set[str] = set()
    refusing: set[str] = set()
    looks = 0
    for leftover in leftovers.due(runtime.configuration.draft_retention, _FOUND):
        if leftover.mailbox in busy:
            continue
        if leftover.mailbox in refusing:
            _record(leftover, _Look.REFUSED)
            continue
        look = _tidied(leftover)
        if look is _Look.AWAY:
            return
        if look in (_Look.BUSY, _Look.FAILED):
            busy.add(leftover.mailbox)
        if look is _Look.MAILBOX_REFUSES:
            refusing.add(leftover.mailbox)
        if look not in (_Look.BUSY, _Look.CHANGED):
            _record(leftover, look)
        looks += 1
        if looks == _BATCH:
            return


def _record(leftover: Leftover, look: _Look) -> None:
    settled_for = datetime.now(UTC) - leftover.updated_at
    given_up = look is not _Look.FAILED and settled_for > _MOST_LOOKS * runtime.configuration.draft_retention
    leftovers.record_look(leftover, clean=look is _Look.CLEAN or given_up)
    runtime.crash_point(CrashPoint.TIDYING_RECORDED)


def _tidied(leftover: Leftover) -> _Look:
    """Take out what the email has left."""
    try:
        sessions = leftovers.let_go(leftover)
        runtime.crash_point(CrashPoint.TIDYING_LET_GO)
        for session in sessions:
            _end(leftover, session)
        for draft in _drafts(leftover):
            _delete(leftover, draft)
    except _Changed:
        return _Look.CHANGED
    except (Refused, NeverFits) as refused:
        return _refused(refused)
    except GraphError as error:
        log.warning("drafts could not be looked for: %s", error)
        heed(leftover.mailbox, error)
        return _failed(error)
    return _Look.CLEAN


def _refused(refused: Refused | NeverFits) -> _Look:
    if isinstance(refused, NeverFits):
        return _Look.REFUSED
    of_all = not isinstance(refused, Exhausted) or refused.budget.startswith("tenant")
    return _Look.AWAY if of_all else _Look.BUSY


def _failed(error: GraphError) -> _Look:
    match error:
        case ConnectionFailed() | ConfigurationError():
            return _Look.AWAY
        case MailboxUnavailable():
            return _Look.MAILBOX_REFUSES
        case PermanentError():
            return _Look.REFUSED
        case _:
            return _Look.FAILED


def _end(leftover: Leftover, session: OpenSession) -> None:
    with suppress(PermanentError), runtime.limiter.slot(leftover.mailbox, wait=SLOT_WAIT):
        runtime.graph.cancel_upload(UploadSession(leftover.mailbox, session.url, session.expires_at, next_offset=0))
    runtime.crash_point(CrashPoint.TIDYING_SESSION_ENDED)


def _drafts(leftover: Leftover) -> list[Message]:
    """Return the drafts of the email that are certainly not the mail itself."""
    since = leftover.created_at - CLOCKS_DIFFER
    with runtime.limiter.slot(leftover.mailbox, wait=SLOT_WAIT):
        found = runtime.graph.find_by_tag(leftover.mailbox, leftover.incoming_email_id, since=since).messages
    if leftover.sent and all(message.is_draft for message in found):
        return []
    return [message for message in found if message.is_draft and message.id != leftover.graph_message_id]


def _delete(leftover: Leftover, draft: Message) -> None:
    def look() -> None:
        if not leftovers.is_unchanged(leftover):
            raise _Changed

    with (
        suppress(ItemNotFound),
        runtime.limiter.slot(leftover.mailbox, wait=SLOT_WAIT),
        looking_first(look),
    ):
        runtime.graph.delete_message(leftover.mailbox, draft.id)
    runtime.crash_point(CrashPoint.TIDYING_DRAFT_DELETED)
    known = inspection.known_as(leftover.incoming_email_id)
    mail_log(
        Step.DRAFT_DELETED,
        incoming_email_id=leftover.incoming_email_id,
        publisher_message_id=known.publisher_message_id,
        correlation_id=known.correlation_id,
        trace_id=trace_id(known.traceparent),
        graph_message_id=draft.id,
    )
