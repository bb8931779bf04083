"""The send actors: one mail each, sent once, whatever dies.

Where the worker may die, and what the next claimant does:

* ``send.taken``, before the claim: RabbitMQ delivers the dispatch again, and it is claimed.
* ``send.claimed``: a mail that is sent at once has its intent with its claim: it is in doubt, as below. A draft goes on
  from its last recovery point when the lease has run out, an attempt spent (see `actors.drafts`).
* ``send.intended``, before or during the call, and ``send.answered``, before the outcome is recorded: the intent stands
  when the lease runs out, so the email is in doubt. Its tag is looked for in the mailbox; it is sent again only if it
  stays absent.
* ``send.recorded``, ``expiry.recorded``, ``failure.recorded``: nothing is left to do but to publish the event, which
  the sweep does. The dispatch is delivered again and claims nothing.
* ``doubt.recorded``, ``retry.recorded``: the email waits without a lease, as it would have.
* ``settle.found``, before anything is recorded: it is looked for again when the lease has run out.
* ``settle.recorded``, found absent: it is ready to be sent.

A dispatch that arrives twice claims once. ``settle`` is the only way out of doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import dramatiq
from dramatiq.middleware import CurrentMessage

import runtime
from actors import outcomes
from actors.composition import graph_message, size_of
from actors.drafts import AlreadySent, prepare_draft
from actors.evidence import LOOK_UP, accepted, looked_up, refused
from actors.graph_calls import graph_call, refund
from actors.outcomes import GIVEN_UP, AttemptsUsedUp, InDoubtHeld
from actors.scheduling import ACTORS, receipts
from actors.waiting import CLOCKS_DIFFER
from crash_points import CrashPoint
from graph_client.errors import PermanentError
from models import ClaimedEmail, Route
from telemetry import STAGE_SECONDS, Step, mail_log, note_ids, series
from tracing import Span, trace_id


@dramatiq.actor(queue_name="send_plain", throws=GIVEN_UP)
def send_plain(incoming_email_id: str, attempt: int, **_dispatch: Any) -> None:
    """Send one email that has no attachments, or record why not and when to try again.

    Repeating the message is harmless: an email that is sent, held by another worker or cancelled is left alone.
    """
    at_once = runtime.configuration.send_plain_via == "sendmail"
    with _claimed(incoming_email_id, attempt, Route.PLAIN, intent=at_once) as email:
        if email:
            _settle_or(_send_at_once if at_once else _send_draft, email)


@dramatiq.actor(queue_name="send_attached", throws=GIVEN_UP)
def send_attached(incoming_email_id: str, attempt: int, **_dispatch: Any) -> None:
    """Send one email with its attachments: draft, uploads, send; each arrow is a recovery point.

    Repeating the message is harmless, as with `send_plain`.
    """
    with _claimed(incoming_email_id, attempt, Route.ATTACHED, intent=False) as email:
        if email:
            _settle_or(_send_draft, email)


def _send_at_once(email: ClaimedEmail) -> None:
    message = graph_message(email.id, email.payload)
    with graph_call(email, sends=True, upload_bytes=size_of(message)):
        runtime.crash_point(CrashPoint.SEND_INTENDED)
        answer = runtime.graph.send_mail(email.mailbox, message, client_request_id=email.send_id)
        runtime.crash_point(CrashPoint.SEND_ANSWERED)
    outcomes.record_sent(email, evidence=accepted("sendMail", answer))


def _send_draft(email: ClaimedEmail) -> None:
    try:
        draft_id = prepare_draft(email)
    except AlreadySent as already:
        email.record_intent(runtime.configuration.lease, already.message.id)
        outcomes.record_sent(
            email, graph_message_id=already.message.id, sent_at=already.message.sent_at, evidence=already.evidence
        )
        return
    if email.expired:  # the uploads may have taken a while
        outcomes.record_expired(email)
    else:
        _send_prepared(email, draft_id, email.record_intent)


def _send_prepared(email: ClaimedEmail, draft_id: str, commit_intent: Callable[[timedelta, str], None]) -> None:
    with graph_call(email, sends=True):
        commit_intent(runtime.configuration.lease, draft_id)
        runtime.crash_point(CrashPoint.SEND_INTENDED)
        answer = runtime.graph.send_draft(email.mailbox, draft_id, client_request_id=email.send_id)
        runtime.crash_point(CrashPoint.SEND_ANSWERED)
    outcomes.record_sent(email, graph_message_id=draft_id, evidence=accepted("send", answer))


def _settle_or(send: Callable[[ClaimedEmail], None], email: ClaimedEmail) -> None:
    """Look an email in doubt up; send any other. Do neither if it was paused since it was dispatched."""
    if email.paused:
        outcomes.hold(email)
        return
    email.payload = runtime.payloads.open(email.id, email.payload)
    if email.in_doubt_for is not None:
        settle(email, email.in_doubt_for)
    elif email.attempt > runtime.configuration.max_attempts:
        raise AttemptsUsedUp("every attempt ended with the worker")
    elif email.expired:
        outcomes.record_expired(email)
    else:
        if email.attempt == 1:
            series(STAGE_SECONDS, "claimed").observe(email.waited.total_seconds())
        send(email)


def settle(email: ClaimedEmail, in_doubt_for: timedelta) -> None:
    """Find out what became of a send that has been in doubt for so long, and act on that alone.

    Found and not a draft: it was sent. Found as the draft whose send is in doubt: it is sent now, and may be in doubt
    again; any other draft proves nothing until the grace period has passed. Absent: looked for again until then, and
    once more in the whole mailbox, then sent again or held, as the policy says.
    """
    configuration = runtime.configuration
    grace_is_over = in_doubt_for >= configuration.in_doubt_grace
    # What decides must not depend on when the clocks said that the mail came.
    since = None if grace_is_over else email.created_at - CLOCKS_DIFFER
    try:
        with graph_call(email):
            found = runtime.graph.find_by_tag(email.mailbox, email.id, since=since)
    except PermanentError as error:
        # It says something about the question and nothing about the mail.
        if outcomes.doubted_too_long(email):
            raise InDoubtHeld(f"it could not be looked up: {error}") from error
        outcomes.leave_in_doubt(email, refused(LOOK_UP, error))
        return
    runtime.crash_point(CrashPoint.SETTLE_FOUND)
    sent = [message for message in found.messages if not message.is_draft]
    drafts = [message.id for message in found.messages if message.is_draft]
    evidence = looked_up(found, sent=len(sent), drafts=len(drafts))
    if sent:
        mail_log(Step.SETTLED, incoming_email_id=email.id, found="sent", count=len(sent))
        outcomes.record_sent(email, graph_message_id=sent[0].id, sent_at=sent[0].sent_at, evidence=evidence)
    elif (draft_id := _unsent(email, drafts, grace_is_over)) and not email.expired:
        mail_log(Step.SETTLED, incoming_email_id=email.id, found="draft")
        _send_prepared(email, draft_id, partial(email.repeat_intent, evidence=evidence))
    elif not grace_is_over:
        outcomes.leave_in_doubt(email, evidence)
    elif configuration.in_doubt_policy == "resend" or email.replayed_for is not None:
        email.settle_as_not_sent(evidence)
        runtime.crash_point(CrashPoint.SETTLE_RECORDED)
        mail_log(Step.SETTLED, incoming_email_id=email.id, found="absent")
    else:
        raise InDoubtHeld("its send was begun, and it is not in the mailbox")


def _unsent(email: ClaimedEmail, drafts: list[str], grace_is_over: bool) -> str | None:
    """Return the draft that shows that nothing was sent, and that is complete.

    That is the one whose send is in doubt. Any other may be left over from an earlier attempt, or be how Graph shows a
    mail on its way: it counts only if nothing sent was seen for so long, and if it lacks no attachment.
    """
    if email.doubted_draft_id in drafts:
        return email.doubted_draft_id
    complete = [draft_id for draft_id in drafts if draft_id == email.draft_id or not email.payload.get("attachments")]
    return complete[0] if grace_is_over and complete else None


@contextmanager
def _claimed(incoming_email_id: str, attempt: int, route: Route, *, intent: bool) -> Iterator[ClaimedEmail | None]:
    """Claim the email for the block, and turn whatever the block raises into one recorded outcome."""
    runtime.crash_point(CrashPoint.SEND_TAKEN)
    lease = runtime.configuration.lease
    email = ClaimedEmail.claim(incoming_email_id, attempt, route=route, lease=lease, intent=intent)
    if email is None:
        yield None
        return
    note_ids(
        incoming_email_id=email.id,
        publisher_message_id=email.publisher_message_id,
        graph_message_id=email.draft_id or email.doubted_draft_id,
        correlation_id=email.correlation_id,
        trace_id=trace_id(email.traceparent),
    )
    mail_log(Step.CLAIMED, incoming_email_id=email.id, attempt=attempt)
    receipts.add([(email.id, attempt)])
    with _traced(email, route) as span:
        try:
            runtime.crash_point(CrashPoint.SEND_CLAIMED)
            yield email
        except Exception as error:
            span.fail(error)
            outcomes.record(email, error)
        finally:
            if email.withdrawn:
                refund(email)
            runtime.wake_soon("schedule_emails")


def _traced(email: ClaimedEmail, route: Route) -> AbstractContextManager[Span]:
    """Trace the block as what follows from the dispatch: the row knows only what that followed from."""
    message = CurrentMessage.get_current_message()
    dispatched = message.options.get("traceparent") if message else None
    return runtime.tracer.span(
        ACTORS[route],
        dispatched or email.traceparent,
        kind="consumer",
        incoming_email_id=email.id,
        publisher_message_id=email.publisher_message_id,
        correlation_id=email.correlation_id,
        attempt=email.attempt,
    )
