"""The attachments that are stored with mailfleet: what is known of each, who uses it, and when it may go.

A row comes before its file and goes after it, so that no file is without a row, wherever a process dies. A row whose
file was never finished expires like any other.

An attachment may go once it has expired and no email that uses it is unsettled, or once all that use it have been done
for a while. An email's use is noted in the transaction that stores the email. Whoever deletes takes the row for itself
first and looks at the uses then: an email that comes meanwhile waits for the row, and finds that it is gone. From then
on ``deleting_at`` says when its file is to be deleted: now, or later if that has failed, behind all others.

Until its deletion has begun, a hold on an email that uses it takes it back into use. It begins with a transaction that
locks the emails against holds (see `models.holds`) and writes ``-infinity``: what a hold has found is not deleted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from models import audit
from models.database import rows, transaction
from models.holds import NOT_HELD
from models.ids import as_uuid
from models.states import FINAL, SETTLED

#: What was not finished by then never will be: nothing takes so long to be stored.
_UNFINISHED = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Stored:
    """An attachment that can be read, sealed under ``key_id``. Size in bytes, SHA-256 in hex."""

    id: str
    name: str
    content_type: str
    size: int
    sha256: str
    key_id: str
    header: bytes | memoryview
    expires_at: datetime


class Use(NamedTuple):
    """That an email has an attachment that is said to be stored."""

    stored_attachment_id: str
    incoming_email_id: str


def begin(id: str, *, name: str, content_type: str, key_id: str, header: bytes, created_by: str) -> None:
    """Note that a file is about to be written."""
    rows(
        """
        INSERT INTO stored_attachments (id, name, content_type, key_id, header, created_by, expires_at)
        VALUES (%(id)s, %(name)s, %(content_type)s, %(key_id)s, %(header)s, %(created_by)s, now() + %(unfinished)s)
        """,
        {
            "id": id,
            "name": name,
            "content_type": content_type,
            "key_id": key_id,
            "header": header,
            "created_by": created_by,
            "unfinished": _UNFINISHED,
        },
    )


def finish(id: str, *, size: int, sha256: str, keep: timedelta) -> datetime | None:
    """Note that the file is whole, and return until when it is kept; None: it took so long that it was deleted."""
    found = rows(
        """
        UPDATE stored_attachments
        SET size = %(size)s, sha256 = %(sha256)s, stored_at = now(), expires_at = now() + %(keep)s
        WHERE id = %(id)s AND stored_at IS NULL AND deleting_at IS NULL RETURNING expires_at
        """,
        {"id": id, "size": size, "sha256": sha256, "keep": keep},
    )
    return found[0][0] if found else None


def find(id: str) -> Stored | None:
    """Find a whole attachment that is not being deleted.

    One that has expired is there only for as long as it is kept for a mail that came in time, or that is on hold: what
    a later one gets does not depend on how soon somebody deletes it.
    """
    found = rows(
        """
        SELECT id::text, name, content_type, size, sha256, key_id, header, expires_at FROM stored_attachments s
        WHERE id = %(id)s AND stored_at IS NOT NULL AND deleting_at IS NULL AND (
            expires_at > now() OR EXISTS (
                SELECT FROM stored_attachment_uses u JOIN incoming_emails e ON e.id = u.incoming_email_id
                WHERE u.stored_attachment_id = s.id
                  AND (e.status <> ALL(%(settled)s) OR EXISTS (SELECT FROM holds h WHERE h.incoming_email_id = e.id))
            )
        )
        """,
        {"id": as_uuid(id), "settled": [str(status) for status in SETTLED]},
    )
    return Stored(**dict(zip(Stored.__slots__, found[0], strict=True))) if found else None


def note_uses(uses: Iterable[Use]) -> None:
    """Write into the open transaction which new emails use which attachments; of ids that are not stored, nothing."""
    sound = [(id, use.incoming_email_id) for use in uses if (id := as_uuid(use.stored_attachment_id))]
    if not sound:
        return
    # The lock of a foreign key alone would let a deletion pass; in one order, so that no two wait for each other.
    rows(
        """
        WITH stored AS MATERIALIZED (
            SELECT id FROM stored_attachments
            WHERE id = ANY(%(ids)s::uuid[]) AND stored_at IS NOT NULL AND deleting_at IS NULL AND expires_at > now()
            ORDER BY id FOR SHARE
        )
        INSERT INTO stored_attachment_uses (stored_attachment_id, incoming_email_id)
        SELECT stored.id, used.incoming_email_id
        FROM unnest(%(ids)s::uuid[], %(emails)s::uuid[]) AS used (id, incoming_email_id) JOIN stored USING (id)
        ON CONFLICT DO NOTHING
        """,
        {"ids": [id for id, _ in sound], "emails": [email for _, email in sound]},
    )


_HELD = f"""
    EXISTS (
        SELECT FROM stored_attachment_uses u
        WHERE u.stored_attachment_id = s.id AND NOT {NOT_HELD.format(id="u.incoming_email_id")}
    )
"""
_MAY_GO = f"""
    s.deleting_at IS NULL AND NOT {_HELD}
    AND (
        s.expires_at <= now() AND NOT EXISTS (
            SELECT FROM stored_attachment_uses u JOIN incoming_emails e ON e.id = u.incoming_email_id
            WHERE u.stored_attachment_id = s.id AND e.status <> ALL(%(settled)s)
        )
        OR EXISTS (SELECT FROM stored_attachment_uses u WHERE u.stored_attachment_id = s.id) AND NOT EXISTS (
            SELECT FROM stored_attachment_uses u JOIN incoming_emails e ON e.id = u.incoming_email_id
            WHERE u.stored_attachment_id = s.id
              AND (e.status <> ALL(%(done)s) OR e.updated_at > now() - %(keep_used)s)
        )
    )
"""


def take_deletable(batch: int, *, keep_used: timedelta) -> list[str]:
    """Take at most ``batch`` attachments that may go out of use, and return the ids of whose files are to be deleted.

    Those that were taken by somebody who died before `forget` are returned again, the longest taken first; those that
    were `put_off` when their time has come. Each has to be asked about by `begin_deleting` before its file is touched.

    Args:
        keep_used: How long one stays after the last of its mails is done: another may be on its way.
    """
    wanted = {
        "batch": batch,
        "keep_used": keep_used,
        "settled": [str(status) for status in SETTLED],
        "done": [str(status) for status in FINAL],
    }
    take_back_held()
    with transaction():
        candidates = rows(
            f"SELECT s.id::text FROM stored_attachments s WHERE {_MAY_GO} LIMIT %(batch)s FOR UPDATE SKIP LOCKED",
            wanted,
        )
        # Once more, now that nobody can begin to use them: what was seen above is from before they were locked.
        rows(
            f"UPDATE stored_attachments s SET deleting_at = now() WHERE s.id = ANY(%(ids)s::uuid[]) AND {_MAY_GO}",
            {**wanted, "ids": [id for (id,) in candidates]},
        )
    taken = rows(
        f"""
        SELECT s.id::text FROM stored_attachments s
        WHERE s.deleting_at <= now() AND NOT {_HELD} ORDER BY s.deleting_at, s.id LIMIT %(batch)s
        """,
        wanted,
    )
    return [id for (id,) in taken]


def take_back_held() -> None:
    """Take back into use what was taken, and whose deletion has not begun, of every email that is on hold."""
    rows(
        f"""
        UPDATE stored_attachments SET deleting_at = NULL WHERE id IN (
            SELECT s.id FROM stored_attachments s WHERE s.deleting_at > '-infinity' AND {_HELD} FOR UPDATE SKIP LOCKED
        )
        """
    )


def begin_deleting(id: str) -> bool:
    """Return whether the file of an attachment that was taken is to be deleted now; if so, no hold stops it any more.

    A hold that is being placed on a mail that uses it is waited for, and one that comes later waits for this.
    """
    with transaction():
        rows(
            """
            SELECT 1 FROM incoming_emails e WHERE e.id IN (
                SELECT u.incoming_email_id FROM stored_attachment_uses u WHERE u.stored_attachment_id = %(id)s
            ) ORDER BY e.id FOR UPDATE
            """,
            {"id": id},
        )
        # By a statement of its own: what was waited for is seen.
        begun = rows(
            f"""
            UPDATE stored_attachments s SET deleting_at = '-infinity'
            WHERE s.id = %(id)s AND s.deleting_at IS NOT NULL AND NOT {_HELD} RETURNING 1
            """,
            {"id": id},
        )
    return bool(begun)


def put_off(id: str, wait: timedelta) -> None:
    """Leave the file of an attachment that was taken to be deleted later: it cannot be now."""
    rows(
        "UPDATE stored_attachments SET deleting_at = now() + %(wait)s WHERE id = %(id)s AND deleting_at IS NOT NULL",
        {"id": id, "wait": wait},
    )


def give_up(id: str) -> None:
    """Take an attachment that could not be stored out of use."""
    rows("UPDATE stored_attachments SET deleting_at = now() WHERE id = %(id)s AND stored_at IS NULL", {"id": id})


def forget(ids: list[str], *, who: str) -> int:
    """Delete the rows of attachments that were taken and whose files are gone; return how many, as the audit log does.

    Safe to repeat: what was forgotten before is not written down again.
    """
    with transaction():
        gone = rows(
            "DELETE FROM stored_attachments WHERE id = ANY(%(ids)s::uuid[]) AND deleting_at IS NOT NULL RETURNING 1",
            {"ids": ids},
        )
        if gone:
            audit.record(who, "purge", "attachments", count=len(gone))
    return len(gone)
