"""Ids of rows."""

from __future__ import annotations

import os
import time
import uuid


def new_id() -> str:
    """Return a UUID of version 7 (RFC 9562): ids grow with time, so indexes grow at one end and sort by age."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10))
    value = milliseconds << 80 | 0x7 << 76 | (random >> 68 & 0xFFF) << 64 | 0x2 << 62 | random & (1 << 62) - 1
    return str(uuid.UUID(int=value))


def as_uuid(text: str) -> str | None:
    """Return the text if it is a UUID: what people type may be an id of ours or of the publisher's."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return None
