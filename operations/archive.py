"""The archive: list backups, take one out."""

from __future__ import annotations

from collections.abc import Iterator

import runtime
from models import audit, backups
from models.backups import StoredBackup
from operations.errors import NotFound
from vault import bind_to


def list_backups(*, mailbox: str | None, limit: int) -> list[StoredBackup]:
    """Return the newest backups, of one mailbox or of all."""
    return backups.stored_backups(mailbox=mailbox.lower() if mailbox else None, limit=limit)


def export_backup(id: str, *, who: str) -> tuple[StoredBackup, Iterator[bytes]]:
    """Return a backup (by its id, the email's, the publisher's or Graph's) and its exact MIME in chunks.

    Raises:
        NotFound: There is no such backup.
        UnknownKey, Tampered: From the vault, at once or while the chunks are read.
    """
    backup = backups.find_backup(id)
    if backup is None:
        raise NotFound(f"no backup has the id {id}")
    audit.record(who, "backups.export", backup.id, incoming_email_id=backup.incoming_email_id)
    mime = runtime.vault.open(
        backups.sealed_blob(backup.id),
        key_id=backup.key_id,
        associated_data=bind_to(backup.incoming_email_id, backup.graph_message_id),
        checksum=backup.checksum,
    )
    return backup, mime
