"""What Graph's answers say, as values: only the fields that a sender of mail needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Answer:
    """Graph's acceptance of a mail; delivery follows later and may still fail."""

    request_id: str | None
    client_request_id: str
    received_at: datetime


@dataclass(frozen=True, slots=True)
class Message:
    """A message in a mailbox. ``id`` is immutable while the message stays in the mailbox, if Graph keeps its word."""

    id: str
    internet_message_id: str | None
    is_draft: bool
    created_at: datetime | None
    sent_at: datetime | None
    parent_folder_id: str | None

    #: The fields to ask Graph for.
    SELECT = "id,internetMessageId,isDraft,createdDateTime,sentDateTime,parentFolderId"

    @classmethod
    def from_graph(cls, body: Mapping[str, Any]) -> Message:
        """Read a message resource. A draft is not sent, whatever its ``sentDateTime`` says (Exchange fills it)."""
        is_draft = bool(body["isDraft"])
        return cls(
            id=body["id"],
            internet_message_id=body.get("internetMessageId"),
            is_draft=is_draft,
            created_at=parse_instant(body.get("createdDateTime")),
            sent_at=None if is_draft else parse_instant(body.get("sentDateTime")),
            parent_folder_id=body.get("parentFolderId"),
        )


class Found(NamedTuple):
    """What a search found, and Graph's ids of the requests that it took: one for each page."""

    messages: list[Message]
    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class Attachment:
    """An attachment of a message. ``size_bytes`` is Exchange's figure, which exceeds the content's length."""

    id: str
    name: str
    size_bytes: int
    content_type: str | None
    is_inline: bool
    content_id: str | None

    #: The fields to ask Graph for: not the content; and ``contentId`` belongs to the derived type.
    SELECT = "id,name,size,contentType,isInline,microsoft.graph.fileAttachment/contentId"

    @classmethod
    def from_graph(cls, body: Mapping[str, Any]) -> Attachment:
        return cls(
            id=body["id"],
            name=body.get("name") or "",
            size_bytes=int(body.get("size") or 0),
            content_type=body.get("contentType"),
            is_inline=bool(body.get("isInline")),
            content_id=body.get("contentId"),
        )


@dataclass(frozen=True, slots=True)
class UploadSession:
    """A place to upload one attachment to, range after range.

    ``url`` is a secret, for it carries its own authority; it is left out of ``repr``. The session ends at
    ``expires_at``, which no upload moves.
    """

    mailbox: str
    url: str = field(repr=False)
    expires_at: datetime | None
    next_offset: int = 0


class Call(NamedTuple):
    """One HTTP request as it went, for metrics and logs. ``status`` is None when no answer arrived."""

    operation: str
    mailbox: str
    status: int | None
    duration: timedelta
    retry_after: timedelta | None
    request_id: str | None
    client_request_id: str


def parse_instant(text: str | None) -> datetime | None:
    """Read one of Graph's instants, which are UTC."""
    if not text:
        return None
    at = datetime.fromisoformat(text)
    return at if at.tzinfo else at.replace(tzinfo=UTC)
