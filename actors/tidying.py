"""Drafts that nobody sends any more are taken out of the mailboxes, and upload sessions that nobody goes on with ended.

A draft that a dead worker has left is used by the next attempt, which finds it by the email's tag. What is left all the
same, because it showed itself too late or because its email was not sent in the end, is found by the tag here, when the
email has been settled for ``DRAFT_RETENTION_DAYS``.

Every call goes through the limiter, and a turn looks at a bounded number of emails. Whoever dies in it has changed
nothing that another turn does not find again: that an email was looked at is recorded last. A mailbox that refuses, or
is at its limit, is asked again when the same time has passed.

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

import dramatiq
from periodiq import cron

import runtime
from actors.graph_calls import SLOT_WAIT
from actors.outcomes import heed
from actors.waiting import CLOCKS_DIFFER
from crash_points import CrashPoint
from graph_client import Message, UploadSession, looking_first
from graph_client.errors import GraphError, ItemNotFound, PermanentError
from limiter import NeverFits, Refused
from models import inspection, leftovers
from models.leftovers import Leftover, OpenSession
from telemetry import Step, mail_log
from tracing import trace_id

log = logging.getLogger(__name__)

#: Of one turn: some hundreds of requests, which take a minute or two.
_BATCH = 100
_SESSIONS_BATCH = 1000


class _Changed(Exception):
    """Raised when the email is not as it was found: somebody has replayed it, or put it on hold."""


@dramatiq.actor(queue_name="maintenance", periodic=cron("*/10 * * * *"))
def tidy_drafts() -> None:
    """Delete the drafts, and end the upload sessions, that settled emails have left in their mailboxes."""
    leftovers.forget_ended_sessions(_SESSIONS_BATCH)
    refusing: set[str] = set()
    for leftover in leftovers.due(runtime.configuration.draft_retention, _BATCH):
        clean = leftover.mailbox not in refusing and _tidied(leftover)
        if not clean:
            refusing.add(leftover.mailbox)
        leftovers.record_look(leftover, clean=clean)
        runtime.crash_point(CrashPoint.TIDYING_RECORDED)


def _tidied(leftover: Leftover) -> bool:
    """Take out what the email has left; return whether nothing is left."""
    try:
        sessions = leftovers.let_go(leftover)
        runtime.crash_point(CrashPoint.TIDYING_LET_GO)
        for session in sessions:
            _end(leftover, session)
        for draft in _drafts(leftover):
            _delete(leftover, draft)
    except (_Changed, Refused, NeverFits):
        return False
    except PermanentError as error:
        log.warning("a mailbox does not let its drafts be looked for: %s", error)
        return True  # and will not the next time
    except GraphError as error:
        log.warning("drafts could not be looked for: %s", error)
        heed(leftover.mailbox, error)
        return False
    return True


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
