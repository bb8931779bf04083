"""Stored attachments are deleted once nobody needs them, a bounded batch at a time.

Where it may die, and what happens next: before the file is deleted, or before its row is, the row says that it is being
deleted, and the next turn goes on. ``purge.deleted``: the next turn deletes the rest.
"""

from __future__ import annotations

import logging

import dramatiq
from periodiq import cron

import runtime
from attachments import StoreUnavailable
from crash_points import CrashPoint
from models import stored_attachments
from telemetry import ATTACHMENTS_DELETED

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
