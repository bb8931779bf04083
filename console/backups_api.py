"""The archive over HTTP: list backups, take one out."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import datetime
from itertools import chain

from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

import operations
from console.access import Operator, Viewer
from console.api import Cursor, Id, Limit, Text, cursor_to, id_behind, make_router

router = make_router("/backups", "backups")


class Backup(BaseModel):
    """What the archive knows of one message; sizes in bytes, ``checksum`` the SHA-256 of its MIME in hex."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    incoming_email_id: str
    publisher_message_id: str
    graph_message_id: str
    mailbox: str
    size: int
    compressed_size: int
    checksum: str
    key_id: str
    created_at: datetime
    expires_at: datetime


class Backups(BaseModel):
    """A page of backups, newest first. It may be short and not the last: that has no ``next``."""

    backups: list[Backup]
    next: str | None


@router.get("")
def find_backups(_who: Viewer, mailbox: Text = None, limit: Limit = 100, cursor: Cursor = None) -> Backups:
    """List the newest backups, of one mailbox or of all. Follow `next` until it is null."""
    page = operations.find_backups(mailbox=mailbox, limit=limit, before=id_behind(cursor))
    return Backups(backups=[Backup.model_validate(backup) for backup in page.backups], next=cursor_to(page.more_before))


@router.get("/{id}")
def show_backup(_who: Viewer, id: Id) -> Backup:
    """Show what is known of a backup, by its id, the email's, the publisher's or Graph's."""
    return Backup.model_validate(operations.backup(id))


@router.get("/{id}/mime", response_class=StreamingResponse, responses={200: {"content": {"message/rfc822": {}}}})
def export_backup(who: Operator, id: Id) -> StreamingResponse:
    """Return the exact MIME of a backup; who took it out is written down.

    A backup that turns out not to be genuine breaks off before its last bytes: what is shorter than `Content-Length`
    is nothing.
    """
    backup, chunks = operations.export_backup(id, who=f"api:{who}")
    genuine = _last_when_proven(chunks)
    first = next(genuine, b"")  # what cannot be opened at all is still answered as a problem
    digest = base64.b64encode(bytes.fromhex(backup.checksum)).decode()
    return StreamingResponse(
        chain([first], genuine),
        media_type="message/rfc822",
        headers={
            "Content-Length": str(backup.size),
            "Content-Disposition": f'attachment; filename="{backup.id}.eml"',
            "Repr-Digest": f"sha-256=:{digest}:",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        },
    )


def _last_when_proven(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Keep the last chunk until the end has proven that all are genuine."""
    held: bytes | None = None
    for chunk in chunks:
        if held is not None:
            yield held
        held = chunk
    if held is not None:
        yield held
