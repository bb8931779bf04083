"""The archive: list backups, take one out, delete those whose retention has ended."""

from __future__ import annotations

from collections.abc import Iterator

import runtime
from actors.retention import MOST_BATCHES, purge_kind, retention_of
from models import audit, backups, finding, retention
from models.backups import StoredBackup
from models.finding import BackupPage
from models.retention import Kind
from operations.errors import NotFound
from vault import bind_to


def list_backups(*, mailbox: str | None, limit: int) -> list[StoredBackup]:
    """Return the newest backups, of one mailbox or of all."""
    return backups.stored_backups(mailbox=mailbox.lower() if mailbox else None, limit=limit)


def find_backups(*, mailbox: str | None, limit: int, before: str | None = None) -> BackupPage:
    """Return a page of backups, of one mailbox or of all, newest first: at most ``limit``, those before a row."""
    return finding.backups(mailbox=mailbox, limit=limit, before=before)


def backup(id: str) -> StoredBackup:
    """Return what is known of a backup, by its id, the email's, the publisher's or Graph's.

    Raises:
        NotFound: There is no such backup.
    """
    found = backups.find_backup(id)
    if found is None:
        raise NotFound(f"no backup has the id {id}")
    return found


def export_backup(id: str, *, who: str) -> tuple[StoredBackup, Iterator[bytes]]:
    """Return a backup (by its id, the email's, the publisher's or Graph's) and its exact MIME in chunks.

    Raises:
        NotFound: There is no such backup.
        UnknownKey, Tampered: From the vault, at once or while the chunks are read.
    """
    exported = backup(id)
    sealed = backups.sealed_blob(exported.id)
    if sealed is None:
        raise NotFound(f"the backup {exported.id} was deleted at the end of its retention")
    audit.record(who, "backups.export", exported.id, incoming_email_id=exported.incoming_email_id)
    mime = runtime.vault.open(
        sealed.blob,
        key_id=sealed.key_id,
        associated_data=bind_to(exported.incoming_email_id, exported.graph_message_id),
        checksum=exported.checksum,
    )
    return exported, mime


def purge_backups(*, who: str) -> int:
    """Delete the backups whose retention has ended, as `maintenance` does, and return how many; none on hold."""
    return purge_kind(Kind.BACKUPS, who=who)


def count_expired() -> int:
    """Return how many backups `purge_backups` would delete, as far as it would get."""
    most = MOST_BATCHES * retention.BATCH
    return retention.count_due(Kind.BACKUPS, retention=retention_of(Kind.BACKUPS), most=most)
