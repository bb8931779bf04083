"""The archive: list backups, take one out, delete those whose retention has ended."""

from __future__ import annotations

from collections.abc import Iterator

import runtime
from actors.retention import MOST_BATCHES, purge_kind, retention_of
from models import audit, backups, retention
from models.backups import StoredBackup
from models.retention import Kind
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
    sealed = backups.sealed_blob(backup.id)
    if sealed is None:
        raise NotFound(f"the backup {backup.id} was deleted at the end of its retention")
    audit.record(who, "backups.export", backup.id, incoming_email_id=backup.incoming_email_id)
    mime = runtime.vault.open(
        sealed.blob,
        key_id=sealed.key_id,
        associated_data=bind_to(backup.incoming_email_id, backup.graph_message_id),
        checksum=backup.checksum,
    )
    return backup, mime


def purge_backups(*, who: str) -> int:
    """Delete the backups whose retention has ended, as `maintenance` does, and return how many; none on hold."""
    return purge_kind(Kind.BACKUPS, who=who)


def count_expired() -> int:
    """Return how many backups `purge_backups` would delete, as far as it would get."""
    most = MOST_BATCHES * retention.BATCH
    return retention.count_due(Kind.BACKUPS, retention=retention_of(Kind.BACKUPS), most=most)
