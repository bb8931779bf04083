"""Key changes: everything that is wrapped under an older key is wrapped under the newest.

Data keys alone are opened and wrapped anew; no content is decrypted. Every row can be opened before and after its own
write, and who stops in the middle starts again where it was: what is done is under the newest key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import runtime
from models import audit, rewrapping
from models.rewrapping import Store, Wrapped
from payloads import WrappedKey
from vault import Tampered, UnknownKey, bind_to, bind_to_attachment

#: Rows that are locked at a time, for some hundredths of a second.
BATCH = 200
#: What is damaged is named, but not without end.
_MOST_NAMED = 1000


class Stuck(NamedTuple):
    """A row that stays under its key, and why."""

    table: str
    id: str
    key_id: str
    reason: str


class Rotation(NamedTuple):
    """What a key change has done: rows changed of each table, and what it could not change."""

    newest_key_id: str
    backups: int
    payload_keys: int
    attachments: int
    stuck: list[Stuck]


def older_keys(*, at_most: int = 0) -> dict[str, int]:
    """Return how many rows of all tables with wrapped keys are under each key but the newest.

    Counting millions takes seconds.

    Args:
        at_most: Of each key and table so many are enough to know of; 0: all are counted.
    """
    counts = Counter[str]()
    for store in (rewrapping.PAYLOAD_KEYS, rewrapping.ATTACHMENTS, rewrapping.BACKUPS):
        counts.update(store.counts(but=runtime.vault.keyring.newest_id, at_most=at_most))
    return dict(counts)


def rotate_keys(*, who: str, on_batch: Callable[[int], None] = lambda _rows: None) -> Rotation:
    """Wrap every data key under the newest key of ``BACKUP_KEYS``. Safe to stop anywhere, to repeat and to run twice.

    Args:
        on_batch: Is told how many rows a batch looked at.
    """
    newest = runtime.vault.keyring.newest_id
    audit.record(who, "backups.rotate-keys", newest, older=older_keys())
    stuck: list[Stuck] = []
    payload_keys = _exchange(rewrapping.PAYLOAD_KEYS, _payload_key, stuck, on_batch)
    attachments = _exchange(rewrapping.ATTACHMENTS, _attachment, stuck, on_batch)
    backups = _exchange(rewrapping.BACKUPS, _backup, stuck, on_batch)
    done = Rotation(newest, backups, payload_keys, attachments, stuck)
    counts = {**done._asdict(), "stuck": len(stuck), "left": older_keys()}
    audit.record(who, "backups.rotated", counts.pop("newest_key_id"), **counts)
    return done


def _exchange(
    store: Store, rewrap: Callable[[Wrapped], Wrapped], stuck: list[Stuck], on_batch: Callable[[int], None]
) -> int:
    changed = 0
    for key_id in sorted(store.key_ids(but=runtime.vault.keyring.newest_id)):
        after = None
        while True:
            each = partial(_rewrap_all, store.table, rewrap, stuck)
            batch = store.exchange(key_id, after=after, batch=BATCH, rewrap=each)
            if not batch.seen:
                break
            changed, after = changed + batch.changed, batch.last_id
            on_batch(batch.seen)
    return changed


def _rewrap_all(
    table: str, rewrap: Callable[[Wrapped], Wrapped], stuck: list[Stuck], found: Sequence[Wrapped]
) -> Sequence[Wrapped]:
    new = []
    for each in found:
        try:
            new.append(rewrap(each))
        except (UnknownKey, Tampered) as error:
            if len(stuck) < _MOST_NAMED:
                stuck.append(Stuck(table, each.id, each.key_id, str(error)))
    return new


def _backup(backup: Wrapped) -> Wrapped:
    bound_to = bind_to(backup.incoming_email_id, backup.graph_message_id)
    new = runtime.vault.rewrap(backup.wrapped, key_id=backup.key_id, associated_data=bound_to)
    return backup._replace(wrapped=new.ciphertext, key_id=new.key_id)


def _attachment(attachment: Wrapped) -> Wrapped:
    bound_to = bind_to_attachment(attachment.id)
    new = runtime.vault.rewrap(attachment.wrapped, key_id=attachment.key_id, associated_data=bound_to)
    return attachment._replace(wrapped=new.ciphertext, key_id=new.key_id)


def _payload_key(key: Wrapped) -> Wrapped:
    new = runtime.payloads.rewrap(WrappedKey(key.id, key.key_id, key.wrapped))
    return key._replace(wrapped=new.wrapped, key_id=new.key_id)
