"""Named lines at which a test may have the process killed: the seam through which every promise is tried.

Between any two steps that take effect outside the process stands ``crash_point(name)``. It does nothing unless
``CRASH_DIRECTORY`` is set; then a file of the line's name in that directory is one kill, taken by deleting the file, so
that a process which is started again gets past the line. The settings refuse it unless Graph is on loopback.

What the next process does after a death at each of them is told where the line is, and in ``docs/flow.md``.
"""

from __future__ import annotations

import logging
import os
import signal
from enum import StrEnum
from pathlib import Path

log = logging.getLogger(__name__)


class CrashPoint(StrEnum):
    """Every line that can be armed, in the order of a mail's life."""

    BRIDGE_CONSUMED = "bridge.consumed"
    INGEST_STORED = "ingest.stored"
    INGEST_PUBLISHED = "ingest.published"
    BRIDGE_INGESTED = "bridge.ingested"
    BRIDGE_ACKNOWLEDGED = "bridge.acknowledged"
    WAKE_UP_MARKED = "wake-up.marked"
    SCHEDULER_WOKEN = "scheduler.woken"
    BUDGET_RESTORING = "budget.restoring"
    BUDGET_RESERVED = "budget.reserved"
    SCHEDULER_CLAIMED = "scheduler.claimed"
    SCHEDULER_DISPATCHED = "scheduler.dispatched"
    RECEIPTS_NOTED = "receipts.noted"
    SEND_TAKEN = "send.taken"
    SEND_CLAIMED = "send.claimed"
    DRAFT_CREATED = "draft.created"
    DRAFT_RECORDED = "draft.recorded"
    ATTACHMENT_BEGUN = "attachment.begun"
    ATTACHMENT_ATTACHED = "attachment.attached"
    SESSION_CREATED = "session.created"
    SESSION_RECORDED = "session.recorded"
    RANGE_UPLOADED = "range.uploaded"
    RANGE_RECORDED = "range.recorded"
    UPLOAD_RECORDED = "upload.recorded"
    SEND_INTENDED = "send.intended"
    SEND_ANSWERED = "send.answered"
    SEND_RECORDED = "send.recorded"
    DOUBT_RECORDED = "doubt.recorded"
    RETRY_RECORDED = "retry.recorded"
    EXPIRY_RECORDED = "expiry.recorded"
    SETTLE_FOUND = "settle.found"
    SETTLE_RECORDED = "settle.recorded"
    EVENTS_TAKEN = "events.taken"
    EVENTS_PUBLISHED = "events.published"
    EVENTS_MARKED = "events.marked"
    BACKUP_TAKEN = "backup.taken"
    BACKUP_CLAIMED = "backup.claimed"
    BACKUP_FETCHED = "backup.fetched"
    BACKUP_STORED = "backup.stored"
    BACKUP_POSTPONED = "backup.postponed"
    FAILURE_RECORDED = "failure.recorded"
    BACKUP_FAILURE_RECORDED = "backup-failure.recorded"
    MESSAGE_DONE = "message.done"
    MESSAGE_ACKNOWLEDGED = "message.acknowledged"
    MESSAGE_GIVEN_UP = "message.given-up"
    MESSAGE_REFUSED = "message.refused"
    MIRROR_CONSUMED = "mirror.consumed"
    MIRROR_STORED = "mirror.stored"
    MIRROR_ACKNOWLEDGED = "mirror.acknowledged"
    NOTICE_RECORDED = "notice.recorded"
    NOTICE_TOLD = "notice.told"
    TIDYING_LET_GO = "tidying.let-go"
    TIDYING_SESSION_ENDED = "tidying.session-ended"
    TIDYING_DRAFT_DELETED = "tidying.draft-deleted"
    TIDYING_RECORDED = "tidying.recorded"
    PURGE_DELETED = "purge.deleted"


class CrashPoints:
    """Kills the process at an armed line."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    @property
    def armed(self) -> bool:
        """Whether any line can be armed at all."""
        return self._directory is not None

    def __call__(self, point: CrashPoint, queue_name: str = "") -> None:
        """Die here, if this line is armed; ``queue_name`` tells apart what every queue's worker passes."""
        if self._directory is None:
            return
        name = f"{point}.{queue_name}" if queue_name else point
        try:
            (self._directory / name).unlink()
        except FileNotFoundError:
            return  # not armed, or another process was first
        log.critical("killed at %s", name)
        os.kill(os.getpid(), signal.SIGKILL)
