"""Dead letters: the table that knows every message which was given up, and the only source of replay.

A row is written when an actor gives up (`models.claims`, `models.backups`) and completed from the copy that RabbitMQ
makes of each dead letter; whichever comes first makes the row, ``message_id`` keeps it single.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from models.database import rows, transaction
from models.ids import as_uuid, new_id

#: The part of a statement that writes the row of an email that is given up in its part ``email (id)``. Takes the id of
#: a new row as ``dlq_id`` and ``reason``, ``attempts``, ``error``, ``mailbox``, ``message_id``, ``queue_name``,
#: ``actor_name``. The same message may fail again after a replay: then it is a dead letter once more.
RECORD = """
    INSERT INTO dlq (id, incoming_email_id, reason, attempts, last_error, mailbox,
                     message_id, queue_name, actor_name)
    SELECT %(dlq_id)s, id, %(reason)s, %(attempts)s, %(error)s, %(mailbox)s,
           %(message_id)s, %(queue_name)s, %(actor_name)s
    FROM email ON CONFLICT (message_id) DO UPDATE
    SET incoming_email_id = excluded.incoming_email_id, reason = excluded.reason, attempts = excluded.attempts,
        last_error = excluded.last_error, mailbox = excluded.mailbox,
        status = 'open', resolved_at = NULL, resolved_by = NULL, noticed_at = NULL
"""


class Copy(NamedTuple):
    """RabbitMQ's copy of a dead letter; what could not be read of it is None."""

    message_id: str
    queue_name: str
    actor_name: str | None
    incoming_email_id: str | None
    reason: str
    error: str
    body: bytes


def mirror(copies: Sequence[Copy]) -> list[Copy]:
    """Complete the rows of these dead letters, making those that are missing; return which were missing.

    Raises:
        NotStorable: One of them has something that PostgreSQL cannot keep; none is stored.
    """
    with transaction():
        return [copy for copy in copies if _mirror(copy)]


def _mirror(copy: Copy) -> bool:
    parameters = copy._asdict() | {"id": new_id()}
    return bool(
        rows(
            """
            INSERT INTO dlq (id, incoming_email_id, reason, last_error, mailbox,
                             message_id, queue_name, actor_name, body, mirrored_at)
            SELECT %(id)s, e.id, %(reason)s, %(error)s, e.mailbox,
                   %(message_id)s, %(queue_name)s, %(actor_name)s, %(body)s, now()
            FROM (VALUES (1)) AS one LEFT JOIN incoming_emails e ON e.id = %(incoming_email_id)s
            ON CONFLICT (message_id) DO UPDATE SET body = excluded.body, mirrored_at = now()
            RETURNING xmax = 0
            """,
            parameters,
        )[0][0]
    )


def message_ids(prefix: str, *, before: datetime) -> list[str]:
    """Return the ids that begin so, of rows made before that, oldest first."""
    found = rows(
        """
        SELECT message_id FROM dlq WHERE starts_with(message_id, %(prefix)s) AND created_at < %(before)s ORDER BY id
        """,
        {"prefix": prefix, "before": before},
    )
    return [message_id for (message_id,) in found]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which open dead letters an operator means. Empty fields do not narrow."""

    reason: str | None = None
    mailbox: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    ids: tuple[str, ...] = ()


class Place(NamedTuple):
    """A place in the order of dead letters: behind the one with this instant and id."""

    created_at: datetime
    id: str


class Letter(NamedTuple):
    """One row of the table, for people."""

    id: str
    status: str
    incoming_email_id: str | None
    publisher_message_id: str | None
    mailbox: str | None
    queue_name: str
    reason: str
    attempts: int
    last_error: str | None
    created_at: datetime
    resolved_at: datetime | None
    resolved_by: str | None


class Group(NamedTuple):
    """The open dead letters with the same reason, of mail in the same queue.

    Attributes:
        mailboxes: How many mailboxes are concerned,
        mailbox: and one of them; None: there is none.
        last_error: Of the newest.
    """

    reason: str
    queue_name: str
    dead_letters: int
    mailboxes: int
    mailbox: str | None
    oldest: datetime
    newest: datetime
    last_error: str | None


_SELECT = """
    SELECT d.id::text, d.status, d.incoming_email_id::text, e.publisher_message_id, d.mailbox, d.queue_name, d.reason,
           d.attempts, d.last_error, d.created_at, d.resolved_at, d.resolved_by
    FROM dlq d LEFT JOIN incoming_emails e ON e.id = d.incoming_email_id
"""
_MATCHING = """
    WHERE d.status = 'open'
      AND (%(reason)s::text IS NULL OR d.reason = %(reason)s)
      AND (%(mailbox)s::text IS NULL OR d.mailbox = %(mailbox)s)
      AND (%(since)s::timestamptz IS NULL OR d.created_at >= %(since)s)
      AND (%(until)s::timestamptz IS NULL OR d.created_at < %(until)s)
      AND (%(ids)s::uuid[] = '{}' OR d.id = ANY(%(ids)s::uuid[]) OR d.incoming_email_id = ANY(%(ids)s::uuid[]))
"""
_BEHIND = "AND (d.created_at, d.id) > (%(created_at)s, %(id)s::uuid)"


def _parameters(filter: Filter) -> dict[str, Any]:
    return {
        "reason": filter.reason,
        "mailbox": filter.mailbox.lower() if filter.mailbox else None,
        "since": filter.since,
        "until": filter.until,
        "ids": list(filter.ids),
    }


def find_open(filter: Filter, limit: int | None, after: Place | None = None) -> list[Letter]:
    """Return the open dead letters that match, oldest first, or those of them that come after a place."""
    behind = _BEHIND if after else ""
    statement = f"{_SELECT} {_MATCHING} {behind} ORDER BY d.created_at, d.id LIMIT %(limit)s"
    place = after._asdict() if after else {}
    return [Letter(*row) for row in rows(statement, {**_parameters(filter), **place, "limit": limit})]


def groups(filter: Filter) -> list[Group]:
    """Return the open dead letters that match by their cause, the largest group first."""
    statement = f"""
        SELECT d.reason, d.queue_name, count(*), count(DISTINCT d.mailbox), min(d.mailbox), min(d.created_at),
               max(d.created_at), (array_agg(d.last_error ORDER BY d.created_at DESC))[1]
        FROM dlq d {_MATCHING} GROUP BY d.reason, d.queue_name ORDER BY count(*) DESC, d.reason, d.queue_name
    """
    return [Group(*row) for row in rows(statement, _parameters(filter))]


def find(id: str) -> Letter | None:
    """Find a dead letter by its own id, the email's or the publisher's: of several an open one, or the newest."""
    found = rows(
        _SELECT
        + """
        WHERE d.id IN (
            SELECT %(uuid)s::uuid
            UNION ALL SELECT id FROM dlq WHERE incoming_email_id = %(uuid)s
            UNION ALL SELECT dlq.id FROM dlq JOIN incoming_emails e ON e.id = incoming_email_id
                      WHERE e.publisher_message_id = %(id)s
        )
        -- A publisher chooses its own id freely: it comes last.
        ORDER BY (d.id = %(uuid)s) IS TRUE DESC, (d.incoming_email_id = %(uuid)s) IS TRUE DESC,
                 d.status = 'open' DESC, d.created_at DESC LIMIT 1
        """,
        {"id": id, "uuid": as_uuid(id)},
    )
    return Letter(*found[0]) if found else None


def body_of(letter_id: str) -> bytes | None:
    """Return the message as it was dead-lettered, once RabbitMQ's copy has arrived."""
    body = rows("SELECT body FROM dlq WHERE id = %(id)s", {"id": letter_id})[0][0]
    return None if body is None else bytes(body)


def resolve(letter_id: str, *, replayed: bool, who: str) -> bool:
    """Replay or discard one open letter; return whether this call did it.

    Of two that try at the same time one succeeds. A failed email goes back to ``received`` with its attempts given
    back; an email whose backup failed has its backup made due again. An email in doubt stays in doubt: its next claim
    looks it up before anything is sent.
    """
    with transaction():
        letter = rows(
            """
            UPDATE dlq SET status = %(status)s, resolved_at = now(), resolved_by = %(who)s
            WHERE id = %(id)s AND status = 'open' RETURNING incoming_email_id::text, queue_name
            """,
            {"id": letter_id, "status": "replayed" if replayed else "discarded", "who": who},
        )
        if letter and replayed:
            _put_back(*letter[0])
    return bool(letter)


def reserve(letter_id: str, who: str, lease: timedelta) -> bool:
    """Keep others from replaying an open letter that belongs to no email while its message is published.

    Whoever dies meanwhile leaves it open: it can be replayed again once the lease is over.
    """
    return bool(
        rows(
            """
            UPDATE dlq SET resolved_at = now(), resolved_by = %(who)s
            WHERE id = %(id)s AND status = 'open' AND (resolved_at IS NULL OR resolved_at < now() - %(lease)s)
            RETURNING 1
            """,
            {"id": letter_id, "who": who, "lease": lease},
        )
    )


def release(letter_id: str) -> None:
    """Undo a reservation: the message could not be published."""
    rows(
        "UPDATE dlq SET resolved_at = NULL, resolved_by = NULL WHERE id = %(id)s AND status = 'open'", {"id": letter_id}
    )


def _put_back(incoming_email_id: str | None, queue_name: str) -> None:
    if queue_name == "backup":
        rows(
            """
            UPDATE sent_emails
            SET backup_due_at = now(), backup_attempt_count = 0, backup_lease_until = NULL, updated_at = now()
            WHERE incoming_email_id = %(id)s AND status = 'sent'
            """,
            {"id": incoming_email_id},
        )
    else:
        rows(
            """
            UPDATE incoming_emails
            SET status = CASE WHEN doubt.stands THEN 'processing' ELSE 'received' END,
                -- To be looked up is no attempt of its own.
                attempt_count = doubt.stands::int, next_attempt_at = NULL, updated_at = now(),
                drafts_clean = false  -- whatever it has left until now: its attempts are counted anew
            FROM (SELECT EXISTS (SELECT 1 FROM sent_emails WHERE incoming_email_id = %(id)s
                                   AND status IN ('sending', 'in_doubt')) AS stands) AS doubt
            WHERE id = %(id)s AND status = 'failed'
            """,
            {"id": incoming_email_id},
        )
