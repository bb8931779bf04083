"""Stored attachments are deleted once nobody needs them, a bounded batch at a time.

A file that cannot be deleted is put off, so that it stops no other. Where several in a row cannot, it is the store that
is away: the turn ends, and the next begins with those that were not tried.

A mail that is put on hold before its file's turn has come keeps its attachment.

Where it may die, and what happens next: before the file is deleted, or before its row is, the row says that it is being
deleted, and the next turn goes on. ``purge.deleted``: the next turn deletes the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import timedelta

import dramatiq
from periodiq import cron

import runtime
from attachments import StoreUnavailable
from crash_points import CrashPoint
from models import stored_attachments
from telemetry import ATTACHMENTS_DELETED, PURGED

log = logging.getLogger(__name__)

_BATCH = 100
#: How long a file that could not be deleted is left alone.
_PUT_OFF = timedelta(hours=1)
#: So many that fail one after the other: each try at a store that is away may take a minute.
_AWAY_AFTER = 5


@dramatiq.actor(queue_name="maintenance", periodic=cron("*/10 * * * *"))
def delete_stored_attachments() -> None:
    """Delete stored attachments that have expired, or whose mails are all done, with their files."""
    while taken := stored_attachments.take_deletable(_BATCH, keep_used=runtime.configuration.attachment_keep_used):
        gone, is_away = _delete_files(taken)
        deleted = stored_attachments.forget(gone, who="maintenance")
        runtime.crash_point(CrashPoint.PURGE_DELETED)
        ATTACHMENTS_DELETED.inc(deleted)
        PURGED.labels("attachments").inc(deleted)
        log.info("deleted %d stored attachments", deleted)
        if is_away or len(taken) < _BATCH:
            return


def _delete_files(taken: Iterable[str]) -> tuple[list[str], bool]:
    """Return the ids whose files are gone, and whether the store is away, so that the rest was not tried."""
    gone: list[str] = []
    failed_in_a_row = 0
    for id in taken:
        if not stored_attachments.begin_deleting(id):
            continue
        try:
            runtime.store.delete(id)
        except StoreUnavailable as failure:
            log.warning("the file of the stored attachment %s cannot be deleted now: %s", id, failure)
            stored_attachments.put_off(id, _PUT_OFF)
            failed_in_a_row += 1
            if failed_in_a_row == _AWAY_AFTER:
                return gone, True
        else:
            gone.append(id)
            failed_in_a_row = 0
    return gone, False
