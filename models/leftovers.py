"""What an email that has ended may have left in its mailbox: drafts that nobody sends any more, and upload sessions.

An email may have left something if it was not sent, or not at its first attempt: whoever dies between making a draft
and recording it leaves one that the next attempt may not see yet. It is looked for when the email has been settled for
a while, so that a replay finds its draft, and everything that was late has come.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from models.database import rows, transaction
from models.holds import NOT_HELD

_SETTLED = "status IN ('processed', 'failed', 'cancelled', 'expired')"
#: How long a session is kept of which Graph did not say when it ends.
_UNKNOWN_END = timedelta(days=7)
#: That of the index ``incoming_emails_leftovers``.
_MAY_HAVE_LEFT = f"""
    drafts_clean IS NOT TRUE AND {_SETTLED} AND (
        drafts_clean IS FALSE
        OR (route = 'attachment' OR draft_id IS NOT NULL) AND (attempt_count > 1 OR status <> 'processed')
    )
"""


class Leftover(NamedTuple):
    """A settled email of which a draft may be left."""

    incoming_email_id: str
    mailbox: str
    created_at: datetime
    #: As the look found it: what was done to the email since has changed it.
    updated_at: datetime
    #: It was sent; then ``graph_message_id`` is the message that left, if that is known.
    sent: bool
    graph_message_id: str | None


class OpenSession(NamedTuple):
    """An upload session that nobody goes on with; ``url`` is a secret."""

    url: str
    expires_at: datetime


def due(settled_for: timedelta, limit: int) -> list[Leftover]:
    """Return emails that have been settled, or not looked at again, for so long; the longest first.

    One in doubt is left alone: its draft is evidence. So is one on hold, and so are mailboxes that are paused.
    """
    found = rows(
        f"""
        SELECT e.id::text, e.mailbox, e.created_at, e.updated_at, e.status = 'processed', s.graph_message_id
        FROM incoming_emails e LEFT JOIN sent_emails s ON s.incoming_email_id = e.id
        WHERE {_MAY_HAVE_LEFT.replace("status", "e.status")}
          AND coalesce(e.drafts_looked_at, e.updated_at) < now() - %(settled_for)s
          AND coalesce(s.status, 'not_sent') IN ('sent', 'not_sent') AND {NOT_HELD.format(id="e.id")}
          AND NOT EXISTS (SELECT 1 FROM mailboxes m WHERE m.mailbox IN (e.mailbox, '*') AND m.paused_until > now())
        ORDER BY coalesce(e.drafts_looked_at, e.updated_at) LIMIT %(limit)s
        """,
        {"settled_for": settled_for, "limit": limit},
    )
    return [Leftover(*row) for row in found]


def let_go(leftover: Leftover) -> list[OpenSession]:
    """Forget the draft of an email that was not sent, so that a replay makes another; return its open sessions.

    Nothing is changed of an email that was sent, replayed since, or put on hold.
    """
    with transaction():
        _lock_against_holds(leftover)
        found = rows(
            f"""
            WITH email AS (
                UPDATE incoming_emails SET draft_id = NULL, drafts_clean = false
                WHERE id = %(id)s AND updated_at = %(updated_at)s AND status <> 'processed'
                  AND {NOT_HELD.format(id="%(id)s")} RETURNING id
            ), open AS (
                SELECT id, upload_session_info AS session FROM file_uploads
                WHERE incoming_email_id IN (SELECT id FROM email) FOR UPDATE
            ), uploads AS (
                UPDATE file_uploads SET status = 'pending', uploaded_bytes = 0, upload_session_info = NULL
                WHERE id IN (SELECT id FROM open)
            )
            SELECT session->>'url', (session->>'expires_at')::timestamptz FROM open
            WHERE (session->>'expires_at')::timestamptz > now()
            """,
            {"id": leftover.incoming_email_id, "updated_at": leftover.updated_at},
        )
    return [OpenSession(*row) for row in found]


def is_unchanged(leftover: Leftover) -> bool:
    """Say whether the email is as it was found: settled, and neither replayed nor put on hold since."""
    with transaction():
        _lock_against_holds(leftover)
        found = rows(
            f"""
            SELECT 1 FROM incoming_emails
            WHERE id = %(id)s AND updated_at = %(updated_at)s AND {_SETTLED} AND {NOT_HELD.format(id="%(id)s")}
            """,
            {"id": leftover.incoming_email_id, "updated_at": leftover.updated_at},
        )
    return bool(found)


def _lock_against_holds(leftover: Leftover) -> None:
    """Wait for a hold that is being placed (see `models.holds`); the next statement sees it."""
    rows("SELECT 1 FROM incoming_emails WHERE id = %(id)s FOR UPDATE", {"id": leftover.incoming_email_id})


def record_look(leftover: Leftover, *, clean: bool) -> None:
    """Note that the mailbox was looked into; unless it is clean it is looked into again.

    Of an email that was replayed meanwhile nothing is noted: it may leave something again.
    """
    rows(
        """
        UPDATE incoming_emails SET drafts_looked_at = now(), drafts_clean = %(clean)s
        WHERE id = %(id)s AND updated_at = %(updated_at)s
        """,
        {"id": leftover.incoming_email_id, "updated_at": leftover.updated_at, "clean": clean},
    )


def forget_ended_sessions(limit: int) -> int:
    """Delete the addresses of upload sessions that have ended, at most so many; return how many there were.

    Their files begin anew, if anyone goes on with them.
    """
    return len(
        rows(
            """
            UPDATE file_uploads SET status = 'pending', uploaded_bytes = 0, upload_session_info = NULL WHERE id IN (
                SELECT id FROM file_uploads
                WHERE upload_session_info IS NOT NULL
                  AND coalesce((upload_session_info->>'expires_at')::timestamptz, updated_at + %(unknown)s) < now()
                ORDER BY id LIMIT %(limit)s FOR UPDATE SKIP LOCKED
            ) RETURNING 1
            """,
            {"limit": limit, "unknown": _UNKNOWN_END},
        )
    )
