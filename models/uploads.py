"""How far each attachment of an email has got into its draft.

Progress is committed under the email's lease after every step that Graph has confirmed, and each commit renews the
lease: a long upload keeps its email, and a worker that lost it learns so at the next range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson

from models.claims import ClaimedEmail
from models.database import rows
from models.ids import new_id

#: How many bytes bring a file up, in SQL: a small one goes in base64 within a request's JSON, a larger one as it is.
UPLOAD_BYTES = "CASE WHEN size <= %(small)s THEN 4 * ceil(size / 3.0) + %(attach_json)s ELSE size END"


@dataclass(slots=True)
class Upload:
    """One attachment of a claimed email. Sizes in bytes; ``session_url`` is a secret."""

    position: int
    filename: str
    size: int
    uploaded_bytes: int
    uploaded: bool
    session_url: str | None = None
    session_expires_at: datetime | None = None
    #: Tells whether the source still has the file that the session was begun with.
    source_version: str | None = None
    #: For how long a request that attaches it has been without a recorded answer; None: there is no such request.
    attaching_for: timedelta | None = None

    @property
    def status(self) -> str:
        if self.uploaded:
            return "uploaded"
        return "uploading" if self.attaching_for is not None or self.session_url else "pending"


def plan(email: ClaimedEmail, attachments: Sequence[dict[str, Any]]) -> list[Upload]:
    """Return the email's uploads in order, making their rows on the first call."""
    rows(
        """
        INSERT INTO file_uploads (id, incoming_email_id, position, filename, size)
        SELECT * FROM unnest(%(row_ids)s::uuid[], %(email_ids)s::uuid[], %(positions)s::int[],
                             %(names)s::text[], %(sizes)s::bigint[])
        ON CONFLICT (incoming_email_id, position) DO NOTHING
        """,
        {
            "row_ids": [new_id() for _ in attachments],
            "email_ids": [email.id] * len(attachments),
            "positions": list(range(len(attachments))),
            "names": [attachment["name"] for attachment in attachments],
            "sizes": [attachment["size"] for attachment in attachments],
        },
    )
    found = rows(
        """
        SELECT position, filename, size, uploaded_bytes, status = 'uploaded', upload_session_info->>'url',
               (upload_session_info->>'expires_at')::timestamptz, upload_session_info->>'source_version',
               CASE WHEN status = 'uploading' AND upload_session_info IS NULL THEN now() - updated_at END
        FROM file_uploads WHERE incoming_email_id = %(id)s ORDER BY position
        """,
        {"id": email.id},
    )
    return [Upload(*row) for row in found]


def record_progress(email: ClaimedEmail, upload: Upload, *, lease: timedelta) -> None:
    """Commit how far the upload is and renew the email's lease.

    Raises:
        LeaseLost: The email was taken by another worker.
    """
    session = None
    if upload.session_url and not upload.uploaded:
        session = orjson.dumps(
            {
                "url": upload.session_url,
                "expires_at": upload.session_expires_at,
                "source_version": upload.source_version,
            }
        ).decode()
    email.write(
        """
        WITH email AS (UPDATE incoming_emails SET lease_until = now() + %(lease)s WHERE {held} RETURNING id)
        UPDATE file_uploads
        SET uploaded_bytes = %(uploaded_bytes)s, status = %(status)s, upload_session_info = %(session)s,
            updated_at = now()
        WHERE incoming_email_id IN (SELECT id FROM email) AND position = %(position)s RETURNING 1
        """,
        lease=lease,
        position=upload.position,
        uploaded_bytes=upload.uploaded_bytes,
        status=upload.status,
        session=session,
    )
