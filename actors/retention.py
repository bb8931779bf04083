"""Retention as the settings have it: whatever is past it is deleted, batch by batch.

Where it may die: ``purge.deleted``, after a batch: the next turn deletes the rest.
"""

from __future__ import annotations

import logging
from datetime import timedelta

import runtime
from crash_points import CrashPoint
from models import retention
from models.retention import Kind
from telemetry import PURGED

log = logging.getLogger(__name__)

#: Batches of a kind in one turn: 100,000 rows. A backlog, after a shortened retention, takes several turns.
MOST_BATCHES = 100
# A counter that appears with its first event has no increase that an alert could see.
for _kind in Kind:
    PURGED.labels(_kind.value)


def purge_kind(kind: Kind, *, who: str, most_batches: int = MOST_BATCHES) -> int:
    """Delete what is past its retention of one kind, and return how much that was. Safe to repeat."""
    purged = 0
    for _ in range(most_batches):
        batch = retention.purge(kind, retention=retention_of(kind), who=who)
        runtime.crash_point(CrashPoint.PURGE_DELETED)
        PURGED.labels(kind.value).inc(batch.rows)
        purged += batch.rows
        if not batch.more:
            break
    if purged:
        log.info("deleted %d %s past their retention", purged, kind.value)
    return purged


def retention_of(kind: Kind) -> timedelta:
    """Return how long that is kept."""
    configuration = runtime.configuration
    return {
        Kind.BACKUPS: configuration.backup_retention,
        Kind.PAYLOADS: configuration.payload_retention,
        Kind.AUDIT: configuration.audit_retention,
    }.get(kind, configuration.record_retention)
