"""Whether the archive has what was sent: every backup is opened, and every archived mail looked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from itertools import permutations
from typing import NamedTuple

import runtime
from models import audit, backups
from models.backups import StoredBackup
from vault import COMPRESSION, HEADER_BYTES, Tampered, UnknownKey, bind_to, compressed_size_bytes

_BATCH = 1000
#: Damaged backups that are tried under each other's names: as many times themselves.
_MOST_COMPARED = 100


class Fault(StrEnum):
    """What can be wrong with a backup."""

    DAMAGED = "damaged"
    SWAPPED = "swapped"
    MISSING = "missing"
    UNKNOWN_KEY = "unknown key"


class Discrepancy(NamedTuple):
    """A backup that is not what it should be; without ``backup_id`` it is the email's that is missing."""

    fault: Fault
    backup_id: str | None
    incoming_email_id: str
    publisher_message_id: str
    detail: str


class Verification(NamedTuple):
    """What was looked at, and what is wrong."""

    backups: int
    emails: int
    discrepancies: list[Discrepancy]


def count_to_verify() -> int:
    """Return how many backups `verify` will open."""
    return backups.count()


def verify(*, who: str, on_each: Callable[[], None] = lambda: None) -> Verification:
    """Open every backup and compare it with what was recorded; then look for the backup of every archived mail.

    Holds no transaction open; reads the whole archive once, a backup at a time.

    Args:
        on_each: Is called after each backup.
    """
    opened, damaged = 0, list[tuple[StoredBackup, Discrepancy]]()
    for backup in _stored():
        if discrepancy := _examine(backup):
            damaged.append((backup, discrepancy))
        opened += 1
        on_each()
    emails, missing = _look_for_missing()
    found = [*_name_swapped(damaged), *missing]
    audit.record(who, "backups.verify", "archive", backups=opened, emails=emails, discrepancies=len(found))
    return Verification(opened, emails, found)


def _stored() -> Iterator[StoredBackup]:
    batch = backups.stored_after(None, limit=_BATCH)
    while batch:
        yield from batch
        batch = backups.stored_after(batch[-1].id, limit=_BATCH)


def _examine(backup: StoredBackup) -> Discrepancy | None:
    """Open one backup; None if it is what was stored, or has been deleted meanwhile."""
    sealed = backups.sealed_blob(backup.id)
    if sealed is None:
        return None
    try:
        chunks = runtime.vault.open(
            sealed.blob,
            key_id=sealed.key_id,
            associated_data=bind_to(backup.incoming_email_id, backup.graph_message_id),
            checksum=backup.checksum,
        )
        size = sum(map(len, chunks))
    except UnknownKey as error:
        return _discrepancy(Fault.UNKNOWN_KEY, backup, str(error))
    except Tampered as error:
        return _discrepancy(Fault.DAMAGED, backup, str(error))
    compressed_size = compressed_size_bytes(sealed.blob)
    for what, found, recorded in (
        ("bytes", size, backup.size),
        ("compressed bytes", compressed_size, backup.compressed_size),
        ("for its compression", COMPRESSION, sealed.compression),
    ):
        if found != recorded:
            return _discrepancy(Fault.DAMAGED, backup, f"it has {found} {what}, and {recorded} is recorded")
    return None


def _discrepancy(fault: Fault, backup: StoredBackup, detail: str) -> Discrepancy:
    return Discrepancy(fault, backup.id, backup.incoming_email_id, backup.publisher_message_id, detail)


def _name_swapped(damaged: list[tuple[StoredBackup, Discrepancy]]) -> list[Discrepancy]:
    """Say of damaged backups whose they are, where they are another damaged one's."""
    found = {backup.id: discrepancy for backup, discrepancy in damaged}
    for (backup, _), (other, _) in permutations(damaged[:_MOST_COMPARED], 2):
        if _is_of(backup, other):
            detail = f"it holds the backup of the email {other.incoming_email_id}"
            found[backup.id] = _discrepancy(Fault.SWAPPED, backup, detail)
    return list(found.values())


def _is_of(backup: StoredBackup, other: StoredBackup) -> bool:
    header = backups.sealed_blob(backup.id, first_bytes=HEADER_BYTES)
    bound_to = bind_to(other.incoming_email_id, other.graph_message_id)
    for key_id in {backup.key_id, other.key_id}:
        try:
            runtime.vault.rewrap(header.blob if header else b"", key_id=key_id, associated_data=bound_to)
        except (Tampered, UnknownKey):
            continue
        return True
    return False


def _look_for_missing() -> tuple[int, list[Discrepancy]]:
    emails, missing = 0, list[Discrepancy]()
    after = None
    while True:
        batch = backups.archived_after(after, retention=runtime.configuration.backup_retention, limit=_BATCH)
        if not batch:
            return emails, missing
        emails, after = emails + len(batch), batch[-1].id
        missing += [
            Discrepancy(
                Fault.MISSING,
                None,
                each.incoming_email_id,
                each.publisher_message_id,
                "it was archived, and there is no backup of it",
            )
            for each in batch
            if each.missing
        ]
