"""An email in a worker's hands: claimed under a lease, and let go by exactly one of its outcomes.

Protocol
    ``claim`` takes a dispatched email, draws a lease token and writes the receipt, all in one statement; a second
    claimant gets ``None``. Every later write names the token: once the lease has run out and the email was taken by
    another, the write changes nothing and raises `LeaseLost`.

    The intent (``sent_emails`` in ``sending``) is committed before the irreversible Graph call. From then on

    * ``record_sent`` needs Graph's word;
    * ``mark_in_doubt`` says that nobody knows; the email waits without a lease and is claimed again to be looked up;
    * ``snooze``, ``retry`` and ``fail`` withdraw the intent: they may be called only where it is proven that Graph did
      not send, and they refuse for an email that was in doubt when it was claimed (``settle_…`` is for those).

    A worker that dies holds the lease until it runs out. If an intent stands by then, the email is in doubt.

Each outcome is one statement: the transition, the sending, the outbox event and the dead letter become true together.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any
from zlib import crc32

import orjson

from contracts import Event, EventType, event_body, event_id
from models.database import rows
from models.dead_letters import RECORD
from models.ids import new_id
from models.states import Route, Sending, Status, check

#: Longer errors are cut: they are read by people.
MAX_ERROR_CHARACTERS = 1000
#: A mail that cannot be looked up is asked for again and again, for days.
MAX_EVIDENCE = 50

#: A mailbox's backups are due at instants that are this part of the delay apart, and other mailboxes' at others.
_TICKS_OF_DELAY = 2
_SHORTEST_TICK = timedelta(microseconds=1)
#: Goes on while this process, or the whole machine, is suspended; Linux's monotonic clock does not do the latter.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class LeaseLost(Exception):
    """Raised when another worker has taken the email: what this one knows is no longer of use."""


_CLAIM = """
    WITH claimed AS (
        UPDATE incoming_emails
        SET status = 'processing', lease_token = %(token)s, lease_until = now() + %(lease)s, updated_at = now()
        WHERE id = %(id)s AND status = 'dispatched' AND attempt_count = %(attempt)s AND route = %(route)s
        RETURNING id, publisher_message_id, mailbox, recipient_count,
                  coalesce(external_recipient_count, recipient_count), round(extract(epoch FROM reserved_at) * 1000),
                  payload::text, draft_id, correlation_id, reply_to, traceparent, created_at
    ), receipt AS (
        INSERT INTO worker_receipts (incoming_email_id, attempt) SELECT id, %(attempt)s FROM claimed
        ON CONFLICT DO NOTHING
    ), intent AS (
        INSERT INTO sent_emails (id, incoming_email_id, status, intent_at)
        SELECT %(sent_id)s, id, 'sending', now() FROM claimed WHERE %(intent)s
        -- The id is the intent's: by it what was sent lately is found.
        ON CONFLICT (incoming_email_id) DO UPDATE
        SET id = excluded.id, status = 'sending', intent_at = now(), graph_message_id = NULL, updated_at = now()
        WHERE sent_emails.status = 'not_sent'
    )
    SELECT claimed.*, s.status, s.graph_message_id, now() - s.intent_at, now() - (
        SELECT max(resolved_at) FROM dlq WHERE dlq.incoming_email_id = claimed.id AND dlq.status = 'replayed'
           AND dlq.queue_name <> 'backup' AND dlq.resolved_at > s.intent_at
    ), EXISTS (SELECT 1 FROM mailboxes m
               -- Found by the key, whatever the planner thinks of the index of pauses.
               WHERE m.mailbox IN (claimed.mailbox, '*') AND coalesce(m.paused_until > now(), false))
       OR EXISTS (SELECT 1 FROM routes r WHERE r.route = %(route)s AND r.paused_until > now())
    FROM claimed LEFT JOIN sent_emails s ON s.incoming_email_id = claimed.id
"""
# The last query of the statement sees sent_emails as it was before it.


@dataclass(slots=True)
class ClaimedEmail:
    """What a worker needs of the email it holds, and everything it may do to it."""

    id: str
    publisher_message_id: str
    mailbox: str
    recipient_count: int
    external_recipient_count: int
    #: When send budget was charged for it, by Redis's clock; None: none is.
    charged_at_ms: int | None
    payload: dict[str, Any]
    draft_id: str | None
    attempt: int
    created_at: datetime
    #: For how long a send has been in doubt, by PostgreSQL's clock; None if none is.
    in_doubt_for: timedelta | None
    #: The draft whose send is in doubt; None if what is in doubt is a send without a draft.
    doubted_draft_id: str | None
    #: For how long an operator has wanted this email sent although it was given up in doubt; None if none did.
    replayed_for: timedelta | None
    #: Its mailbox, its route or everything was paused after it was dispatched: nothing is to begin.
    paused: bool = False
    correlation_id: str | None = None
    reply_to: str | None = None
    traceparent: str | None = None
    #: This claim has committed its intent to send: from here on only evidence shows that it did not.
    intended: bool = False
    #: It was let go, and is proven not to be sent by this claim.
    withdrawn: bool = False
    _token: str = field(default="", repr=False)
    #: In seconds, by `_now`.
    _held_until: float = 0.0

    @classmethod
    def claim(
        cls, incoming_email_id: str, attempt: int, *, route: Route, lease: timedelta, intent: bool
    ) -> ClaimedEmail | None:
        """Take a dispatched email, or return None if it is not there to be taken.

        Args:
            attempt: As in the dispatch; an older dispatch of the same email claims nothing.
            route: The claimant's; a dispatch that came to another's queue claims nothing.
            intent: Commit the intent to send in the same statement (unless the email is in doubt).
        """
        token = str(uuid.uuid4())
        parameters = {
            "id": incoming_email_id,
            "attempt": attempt,
            "route": route.value,
            "token": token,
            "lease": lease,
            "intent": intent,
            "sent_id": new_id(),
        }
        asked_at = _now()
        found = rows(_CLAIM, parameters, prepared=True)
        if not found:
            return None
        email = cls._from_row(found[0], attempt, token, intent)
        email._held_until = asked_at + lease.total_seconds()
        return email

    @classmethod
    def _from_row(cls, row: tuple[Any, ...], attempt: int, token: str, intent: bool) -> ClaimedEmail:
        id, publisher_id, mailbox, recipient_count, external_recipient_count, charged_at_ms = row[:6]
        payload, draft_id, correlation_id, reply_to, traceparent, created_at = row[6:12]
        sending, doubted_draft_id, intended_for, replayed_for, paused = row[12:]
        in_doubt = sending in (Sending.SENDING, Sending.IN_DOUBT)
        return cls(
            id=str(id),
            publisher_message_id=publisher_id,
            mailbox=mailbox,
            recipient_count=recipient_count,
            external_recipient_count=external_recipient_count,
            charged_at_ms=None if charged_at_ms is None else int(charged_at_ms),
            payload=orjson.loads(payload),
            draft_id=draft_id,
            attempt=attempt,
            created_at=created_at,
            in_doubt_for=intended_for if in_doubt else None,
            doubted_draft_id=doubted_draft_id if in_doubt else None,
            replayed_for=replayed_for if in_doubt else None,
            paused=paused,
            correlation_id=correlation_id,
            reply_to=reply_to,
            traceparent=traceparent,
            intended=intent and not in_doubt,
            _token=token,
        )

    @property
    def send_id(self) -> str:
        """The UUID under which Graph is to log the one send of this claim: it outlives the worker in the tables."""
        return self._token

    def renew(self, lease: timedelta) -> None:
        """Keep the email for another ``lease``, or learn that it is lost."""
        self.write("UPDATE incoming_emails SET lease_until = now() + %(lease)s WHERE {held} RETURNING 1", lease=lease)

    def ensure_held(self, *, at_least: timedelta, lease: timedelta) -> None:
        """Make sure that the lease lasts for ``at_least``, renewing it if need be, or learn that it is lost."""
        if _now() + at_least.total_seconds() > self._held_until:
            self.renew(lease)

    def record_draft(self, draft_id: str) -> None:
        """Remember the draft: the recovery point before the attachments."""
        self.write(
            "UPDATE incoming_emails SET draft_id = %(draft_id)s, updated_at = now() WHERE {held} RETURNING 1",
            draft_id=draft_id,
        )
        self.draft_id = draft_id

    def start_over(self, draft_id: str | None) -> None:
        """Begin anew with this draft, or with none yet: what was brought up to another counts no more."""
        self.write(
            """
            WITH email AS (
                UPDATE incoming_emails SET draft_id = %(draft_id)s, updated_at = now() WHERE {held} RETURNING id
            ), uploads AS (DELETE FROM file_uploads WHERE incoming_email_id IN (SELECT id FROM email))
            SELECT 1 FROM email
            """,
            draft_id=draft_id,
        )
        self.draft_id = draft_id

    def record_intent(self, lease: timedelta, draft_id: str) -> None:
        """Commit the intent to send this draft, and renew the lease for the call that follows."""
        self.write(
            """
            WITH email AS (UPDATE incoming_emails SET lease_until = now() + %(lease)s WHERE {held} RETURNING id)
            INSERT INTO sent_emails (id, incoming_email_id, status, graph_message_id, intent_at)
            SELECT %(sent_id)s, id, 'sending', %(draft_id)s, now() FROM email
            ON CONFLICT (incoming_email_id) DO UPDATE
            SET id = excluded.id, status = 'sending', intent_at = now(),
                graph_message_id = excluded.graph_message_id, updated_at = now()
            WHERE sent_emails.status = 'not_sent' RETURNING 1
            """,
            lease=lease,
            sent_id=new_id(),
            draft_id=draft_id,
        )
        self.intended = True

    def repeat_intent(self, lease: timedelta, draft_id: str, *, evidence: dict[str, Any]) -> None:
        """Commit that the send in doubt is about to be begun again: its doubt begins when this lease can have ended."""
        self.write(
            f"""
            WITH email AS (UPDATE incoming_emails SET lease_until = now() + %(lease)s WHERE {{held}} RETURNING id)
            UPDATE sent_emails
            SET id = %(sent_id)s, intent_at = now() + %(lease)s, graph_message_id = %(draft_id)s, updated_at = now(),
                response_metadata = {_AMENDED}
            WHERE incoming_email_id IN (SELECT id FROM email) RETURNING 1
            """,
            lease=lease,
            sent_id=new_id(),
            draft_id=draft_id,
            evidence=_dated(evidence),
        )

    def record_sent(
        self,
        *,
        backup_delay: timedelta,
        publish_within: timedelta,
        graph_message_id: str | None = None,
        sent_at: datetime | None = None,
        evidence: dict[str, Any] | None = None,
    ) -> list[Event]:
        """Note that Graph has accepted the mail, and return what is to be published for ``publish_within``.

        Args:
            backup_delay: The backup is due after it, and at most half as long later: what a mailbox sends within a
                while is due together, so that one look finds all of it.
            sent_at: As Graph says it; None: now, by PostgreSQL's clock, since budgets are reckoned from it.
        """
        return self._move(
            Status.PROCESSED,
            "next_attempt_at = NULL, last_error = NULL",
            """
            sent AS (
                UPDATE sent_emails
                SET status = 'sent', sent_at = coalesce(%(sent_at)s, now()), graph_message_id = %(graph_message_id)s,
                       backup_due_at = to_timestamp(
                           %(tick)s::float8 * (%(phase)s::float8 + ceil(
                               extract(epoch FROM now() + %(backup_delay)s::interval) / %(tick)s::float8
                               - %(phase)s::float8
                           ))
                       ),
                       updated_at = now(), response_metadata = {amended}
                FROM email WHERE incoming_email_id = email.id
            ), answering AS (
                UPDATE mailboxes SET refusal_count = 0 WHERE mailbox = %(mailbox)s AND refusal_count > 0
            ), {event}
            """,
            event=self._event(EventType.SENT, sent_at or datetime.now(UTC)),
            mailbox=self.mailbox,
            publish_within=publish_within,
            evidence=evidence,
            sent_at=sent_at,
            graph_message_id=graph_message_id,
            backup_delay=backup_delay,
            tick=max(backup_delay / _TICKS_OF_DELAY, _SHORTEST_TICK).total_seconds(),
            phase=crc32(self.mailbox.encode()) / 2**32,
        )

    def mark_in_doubt(self, *, look_again_in: timedelta, evidence: dict[str, Any]) -> None:
        """Let go of an email whose send may or may not have happened, to be looked up then."""
        self._move(
            Status.PROCESSING,
            "next_attempt_at = now() + %(look_again_in)s, last_error = %(error)s",
            """
            doubted AS (
                UPDATE sent_emails
                SET status = 'in_doubt', updated_at = now(), response_metadata = {amended},
                    -- The doubt begins with the lost answer, which may come long after the intent.
                    intent_at = CASE WHEN status = 'sending' OR intent_at > now() THEN now() ELSE intent_at END
                WHERE incoming_email_id IN (SELECT id FROM email)
            )
            """,
            look_again_in=look_again_in,
            error=_error(evidence.get("seen", "")),
            evidence=evidence,
        )

    def settle_as_not_sent(self, evidence: dict[str, Any]) -> None:
        """Note that the mail was proven absent, its draft too: it is sent again from the beginning."""
        self._move(
            Status.RECEIVED,
            "next_attempt_at = NULL, draft_id = NULL, last_error = 'found absent after a lost answer'",
            """
            settled AS (
                UPDATE sent_emails SET status = 'not_sent', updated_at = now(), response_metadata = {amended}
                WHERE incoming_email_id IN (SELECT id FROM email)
            ), uploads AS (
                DELETE FROM file_uploads WHERE incoming_email_id IN (SELECT id FROM email)
            )
            """,
            evidence=evidence,
        )

    def expire(self, publish_within: timedelta) -> list[Event]:
        """Note that ``expires_at`` has passed before the send, and return what is to be published."""
        return self._move(
            Status.EXPIRED,
            "next_attempt_at = NULL",
            _WITHDRAWN + ", {event}",
            event=self._event(EventType.EXPIRED, datetime.now(UTC)),
            publish_within=publish_within,
        )

    @property
    def expired(self) -> bool:
        """Whether the instant has passed after which the email must not be sent."""
        given = self.payload.get("expires_at")
        return given is not None and datetime.fromisoformat(given) <= datetime.now(UTC)

    @property
    def waited(self) -> timedelta:
        """How long ago it could first go out; clocks that differ do not make it less than nothing."""
        send_at = self.payload.get("send_at")
        ready_at = max(self.created_at, datetime.fromisoformat(send_at)) if send_at else self.created_at
        return max(datetime.now(UTC) - ready_at, timedelta())

    def snooze(self, wait: timedelta, why: str) -> None:
        """Let go until later without having spent an attempt."""
        self._let_go(wait, why, "attempt_count = attempt_count - 1, ")

    def retry(self, wait: timedelta, error: str) -> None:
        """Let go until later, an attempt spent."""
        self._let_go(wait, error, "")

    def _let_go(self, wait: timedelta, error: str, also: str) -> None:
        if self.in_doubt_for is not None:
            self.mark_in_doubt(look_again_in=wait, evidence={"seen": f"could not be looked up: {error}"})
            return
        self._move(
            Status.RECEIVED,
            also + "next_attempt_at = now() + %(wait)s, last_error = %(error)s",
            _WITHDRAWN,
            wait=wait,
            error=_error(error),
        )

    def fail(
        self, *, reason: str, error: str, message_id: str, queue_name: str, actor_name: str, publish_within: timedelta
    ) -> list[Event]:
        """Give up: status ``failed``, one dead letter, one event, which is returned to be published.

        An email that was given up before, and replayed, has had its event.
        """
        return self._move(
            Status.FAILED,
            "next_attempt_at = NULL, last_error = %(error)s",
            _WITHDRAWN + f", dead AS ({RECORD})" + ", {event}",
            event=self._event(EventType.FAILED, datetime.now(UTC), reason=reason, detail=_error(error)),
            publish_within=publish_within,
            reason=reason,
            error=_error(error),
            message_id=message_id,
            queue_name=queue_name,
            actor_name=actor_name,
            dlq_id=new_id(),
            attempts=self.attempt,
            mailbox=self.mailbox,
        )

    def _event(self, type: EventType, at: datetime, **details: Any) -> Event:
        body = event_body(
            type, publisher_message_id=self.publisher_message_id, incoming_email_id=self.id, at=at, **details
        )
        return Event(event_id(type, self.id), type, body, self.id, self.correlation_id, self.reply_to, self.traceparent)

    def _move(
        self,
        target: Status,
        assignments: str,
        also: str,
        *,
        event: Event | None = None,
        publish_within: timedelta | None = None,
        evidence: dict[str, Any] | None = None,
        **parameters: Any,
    ) -> list[Event]:
        """Go to ``target`` and let go of the lease; ``also`` are the further parts of the same statement.

        Returns:
            The event, if this email has had none of its type before.
        """
        check(Status.PROCESSING, target)
        if event:
            parameters |= {"event_id": event.id, "event_body": event.body.decode(), "publish_within": publish_within}
        if evidence:
            parameters["evidence"] = _dated(evidence)
        statement = _move_to(target, assignments, also, event.type if event else None, amends=bool(evidence))
        found = self.write(statement, **parameters)
        self.withdrawn = _WITHDRAWN in also and self.in_doubt_for is None
        return [event] if event and found[0][0] else []

    def write(self, sql: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run one statement that returns a row exactly if this worker still holds the email (``{held}``)."""
        asked_at = _now()
        found = rows(_while_held(sql), {"id": self.id, "token": self._token, **parameters}, prepared=True)
        if not found:
            raise LeaseLost(f"email {self.id} is no longer held by this worker")
        if lease := parameters.get("lease"):
            self._held_until = asked_at + lease.total_seconds()
        return found


@cache
def _move_to(target: Status, assignments: str, also: str, event_type: str | None, *, amends: bool) -> str:
    """Return the statement of a move: one for each outcome, made once."""
    parts = {"{event}": _EVENT, "{type}": f"'{event_type}'", "{amended}": _AMENDED if amends else "response_metadata"}
    for name, part in parts.items():
        also = also.replace(name, part)
    return f"""
        WITH email AS (
            UPDATE incoming_emails
            SET status = '{target}', lease_token = NULL, lease_until = NULL, updated_at = now(), {assignments}
            WHERE {{held}} RETURNING id, correlation_id, reply_to, traceparent
        ), {also}
        SELECT {"EXISTS (SELECT 1 FROM event)" if event_type else "false"} FROM email
    """


@cache
def _while_held(sql: str) -> str:
    return sql.replace("{held}", "id = %(id)s AND lease_token = %(token)s AND status = 'processing'")


# What was seen of an earlier send is kept.
_WITHDRAWN = """
    withdrawn AS (
        DELETE FROM sent_emails
        WHERE incoming_email_id IN (SELECT id FROM email) AND status = 'sending' AND NOT response_metadata ? 'evidence'
    ), still_not_sent AS (
        UPDATE sent_emails SET status = 'not_sent', updated_at = now()
        WHERE incoming_email_id IN (SELECT id FROM email) AND status = 'sending' AND response_metadata ? 'evidence'
    )
"""
_EVENT = """
    event AS (
        INSERT INTO outbox_events (id, incoming_email_id, type, body,
                                   correlation_id, reply_to, traceparent, claimed_until)
        SELECT %(event_id)s, id, {type}, %(event_body)s,
               correlation_id, reply_to, traceparent, now() + %(publish_within)s
        FROM email ON CONFLICT (incoming_email_id, type) DO NOTHING RETURNING 1
    )
"""
# The first entry is the send itself; of the looks that follow, the oldest makes room.
_AMENDED = f"""
    jsonb_set(response_metadata, '{{evidence}}',
        CASE WHEN jsonb_array_length(response_metadata->'evidence') >= {MAX_EVIDENCE}
             THEN (response_metadata->'evidence') - 1
             ELSE coalesce(response_metadata->'evidence', '[]') END || %(evidence)s::jsonb)
"""


def _now() -> float:
    return time.clock_gettime(_CLOCK)


def _dated(evidence: dict[str, Any]) -> str:
    return orjson.dumps({"at": datetime.now(UTC), **evidence}).decode()


def _error(text: str) -> str:
    return text[:MAX_ERROR_CHARACTERS]
