"""Storing attachments: a stream of any size goes sealed into the store, and an id comes back that ``urlOrId`` may name.

A process that dies on the way leaves a row that was never finished, and perhaps a part of a file: `maintenance` deletes
both when the row expires.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import NamedTuple

from pydantic import ValidationError

import contracts
import models
import runtime
from attachments import StoreUnavailable, TooLarge
from models import audit, stored_attachments
from models.ids import new_id
from operations.errors import NotAttachable
from telemetry import ATTACHMENTS_STORED
from vault import bind_to_attachment


class Attached(NamedTuple):
    """A stored attachment; a ``SendEmail`` names its ``id`` as ``urlOrId``, and its size."""

    id: str
    name: str
    content_type: str
    size: int
    sha256: str
    expires_at: datetime


def attach(
    chunks: Iterable[bytes],
    *,
    name: str,
    content_type: str,
    who: str,
    expires_in: timedelta | None = None,
    declared_bytes: int | None = None,
) -> Attached:
    """Store what the chunks make up, of which little is held at a time. What the chunks raise leaves nothing behind.

    Args:
        expires_in: How long it is kept at most; without it as long as the settings say, which is the longest.
        declared_bytes: How many bytes there will be, where somebody has said so.

    Raises:
        NotAttachable: Name, type or time are not possible, or there are not as many bytes as were declared.
        TooLarge: There are more bytes than ``ATTACHMENT_MAX_MB``.
        StoreUnavailable: The store is away.
    """
    keep = _check(name, content_type, expires_in)
    incoming = _Incoming(chunks, declared_bytes, max_bytes=runtime.configuration.attachment_max_mb * 1024 * 1024)
    id = new_id()
    sealed = runtime.vault.seal_stream(incoming, associated_data=bind_to_attachment(id))
    stored_attachments.begin(
        id, name=name, content_type=content_type, key_id=sealed.key_id, header=sealed.header, created_by=who
    )
    try:
        runtime.store.write(id, sealed.segments)
        expires_at = _finish(id, incoming, keep, who)
    except BaseException:
        _undo(id)
        raise
    ATTACHMENTS_STORED.inc()
    return Attached(id, name, content_type, incoming.size_bytes, incoming.sha256, expires_at)


def _check(name: str, content_type: str, expires_in: timedelta | None) -> timedelta:
    """Return how long to keep it."""
    longest = runtime.configuration.attachment_retention
    keep = longest if expires_in is None else expires_in
    try:
        contracts.Attachment.model_validate(
            {"name": name, "size": 0, "contentType": content_type, "urlOrId": "of-no-matter"}
        )
    except ValidationError as invalid:
        if any("name" in problem["loc"] for problem in invalid.errors(include_input=False)):
            raise NotAttachable("the name must be a line of 1 to 255 characters") from None
        raise NotAttachable("the content type must be one, as in application/pdf") from None
    media_type = content_type.partition(";")[0].lower()
    if not any(fnmatchcase(media_type, pattern.lower()) for pattern in runtime.configuration.attachment_types):
        raise NotAttachable("files of this content type are not stored here (ATTACHMENT_TYPES)")
    if not timedelta(0) < keep <= longest:
        raise NotAttachable(f"it must expire within {longest / timedelta(days=1):g} days (ATTACHMENT_RETENTION_DAYS)")
    return keep


class _Incoming:
    """Passes chunks on while they fit, and knows afterwards how many bytes they had and their SHA-256."""

    def __init__(self, chunks: Iterable[bytes], declared_bytes: int | None, *, max_bytes: int) -> None:
        self._chunks = chunks
        self._declared_bytes = declared_bytes
        self._max_bytes = max_bytes
        self._demand_room(declared_bytes or 0)
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self.size_bytes += len(chunk)
            self._demand_room(self.size_bytes)
            self._digest.update(chunk)
            yield chunk
        if self._declared_bytes not in (None, self.size_bytes):
            raise NotAttachable(f"{self._declared_bytes} bytes were declared, and {self.size_bytes} came")

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _demand_room(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise TooLarge(f"the attachment has more than the {self._max_bytes} bytes that are allowed")


def _finish(id: str, incoming: _Incoming, keep: timedelta, who: str) -> datetime:
    with models.transaction():
        expires_at = stored_attachments.finish(id, size=incoming.size_bytes, sha256=incoming.sha256, keep=keep)
        if expires_at is not None:
            audit.record(who, "attachments.store", id, size=incoming.size_bytes)
    if expires_at is None:
        with suppress(StoreUnavailable):
            runtime.store.delete(id)  # its row may be gone, and with it whoever would look for the file
        raise NotAttachable("it took so long to arrive that it was given up")
    return expires_at


def _undo(id: str) -> None:
    """Leave the row to `maintenance`: the file has been deleted already, unless the store is away."""
    with suppress(models.DatabaseAway):  # then the row expires
        stored_attachments.give_up(id)
