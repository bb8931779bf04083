"""Ids of rows."""

from __future__ import annotations

import os
import time
import uuid
from datetime import UTC, datetime, timedelta

_EPOCH = datetime.fromtimestamp(0, UTC)


def new_id() -> str:
    """Return a UUID of version 7 (RFC 9562): ids grow with time, so indexes grow at one end and sort by age.

    Twelve bits go on where the milliseconds end (section 6.2, method 3): what came a quarter of a microsecond later
    sorts behind.
    """
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    fraction, random = nanoseconds * 4096 // 1_000_000, int.from_bytes(os.urandom(8)) >> 2
    value = milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0x2 << 62 | random
    return str(uuid.UUID(int=value))


def first_id(at: datetime) -> str:
    """Return an id below every id that was made at that instant or later, and above all earlier ones."""
    milliseconds = max((at - _EPOCH) // timedelta(milliseconds=1), 0)
    return str(uuid.UUID(int=milliseconds << 80))


def as_uuid(text: str) -> str | None:
    """Return the text if it is a UUID: what people type may be an id of ours or of the publisher's."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return None
