"""Stored attachments are deleted once nobody needs them, and sealed under the newest key, a bounded batch at a time.

Where it may die, and what happens next: before the file is deleted, or before its row is, the row says that it is being
deleted, and the next turn goes on. ``purge.deleted``: the next turn deletes the rest. A key change is each row's own.
"""

from __future__ import annotations

import logging

import dramatiq
from periodiq import cron

import runtime
from attachments import StoreUnavailable
from crash_points import CrashPoint
from models import stored_attachments
from models.stored_attachments import Header
from telemetry import ATTACHMENTS_DELETED
from vault import VaultError, bind_to_attachment

log = logging.getLogger(__name__)

_BATCH = 100


@dramatiq.actor(queue_name="maintenance", periodic=cron("*/10 * * * *"))
def delete_stored_attachments() -> None:
    """Delete stored attachments that have expired, or whose mails are all done, with their files."""
    while taken := stored_attachments.take_deletable(_BATCH, keep_used=runtime.configuration.attachment_keep_used):
        try:
            for id in taken:
                runtime.store.delete(id)
        except StoreUnavailable as away:
            log.warning("stored attachments cannot be deleted now: %s", away)
            return
        stored_attachments.forget(taken)
        runtime.crash_point(CrashPoint.PURGE_DELETED)
        ATTACHMENTS_DELETED.inc(len(taken))
        log.info("deleted %d stored attachments", len(taken))
        if len(taken) < _BATCH:
            return


@dramatiq.actor(queue_name="maintenance", periodic=cron("5-59/10 * * * *"))
def rewrap_stored_attachments() -> None:
    """Seal the keys of stored attachments under the ring's newest, so that an older one can be removed soon."""
    newest, after = runtime.vault.keyring.newest_id, None
    while batch := stored_attachments.sealed_otherwise(newest, _BATCH, after=after):
        for header in batch:
            _rewrap(header)
        after = batch[-1].id


def _rewrap(before: Header) -> None:
    try:
        sealed = runtime.vault.rewrap(
            before.header, key_id=before.key_id, associated_data=bind_to_attachment(before.id)
        )
    except VaultError as error:
        log.error("the stored attachment %s stays under its key: %s", before.id, error)
    else:
        stored_attachments.replace_header(before, key_id=sealed.key_id, header=bytes(sealed.ciphertext))
