"""Named lines at which a test may have the process killed: the seam through which every promise is tried.

Between any two steps that take effect outside the process stands ``crash_point(name)``. It does nothing unless
``CRASH_DIRECTORY`` is set; then a file of the line's name in that directory is one kill, taken by deleting the file, so
that a process which is started again gets past the line. The settings refuse it unless Graph is on loopback.
"""

from __future__ import annotations

import os
import signal
from enum import StrEnum
from pathlib import Path


class CrashPoint(StrEnum):
    """Every line that can be armed, in the order of a mail's life."""

    BRIDGE_CONSUMED = "bridge.consumed"
    INGEST_STORED = "ingest.stored"
    INGEST_PUBLISHED = "ingest.published"
    BRIDGE_INGESTED = "bridge.ingested"
    BRIDGE_ACKNOWLEDGED = "bridge.acknowledged"
    SCHEDULER_CLAIMED = "scheduler.claimed"
    SCHEDULER_DISPATCHED = "scheduler.dispatched"
    SEND_CLAIMED = "send.claimed"
    DRAFT_CREATED = "draft.created"
    DRAFT_RECORDED = "draft.recorded"
    ATTACHMENT_ATTACHED = "attachment.attached"
    SESSION_CREATED = "session.created"
    RANGE_UPLOADED = "range.uploaded"
    UPLOAD_RECORDED = "upload.recorded"
    SEND_INTENDED = "send.intended"
    SEND_ANSWERED = "send.answered"
    SEND_RECORDED = "send.recorded"
    SETTLE_FOUND = "settle.found"
    EVENTS_PUBLISHED = "events.published"
    BACKUP_CLAIMED = "backup.claimed"
    BACKUP_FETCHED = "backup.fetched"
    BACKUP_STORED = "backup.stored"
    FAILURE_RECORDED = "failure.recorded"
    MIRROR_STORED = "mirror.stored"


class CrashPoints:
    """Kills the process at an armed line."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def __call__(self, point: CrashPoint) -> None:
        if self._directory is None:
            return
        try:
            (self._directory / point).unlink()
        except FileNotFoundError:
            return  # not armed, or another process was first
        os.kill(os.getpid(), signal.SIGKILL)
