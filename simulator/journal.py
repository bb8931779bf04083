"""What happened: every mail that really left, and what was asked how often and answered how.

This is what tests and benchmarks assert on, so it tells deliveries, which nobody can take back, from answers.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from .mailboxes import Message

#: So many of the latest requests are remembered one by one.
REMEMBERED_REQUESTS = 20_000

#: The status under which a request is counted whose connection was closed without an answer.
NO_ANSWER = "none"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One mail on its way to its recipients. The message may be moved or deleted later; the tags are as it left."""

    at: datetime
    mailbox: str
    tags: tuple[str, ...]
    message: Message

    def as_json(self) -> dict[str, Any]:
        message = self.message
        body = message.body
        return {
            "at": self.at.isoformat(),
            "mailbox": self.mailbox,
            "tags": list(self.tags),
            "recipients": message.recipients(),
            "subject": message.fields.get("subject") or "",
            "internetMessageId": message.internet_message_id,
            "headers": dict(message.headers),
            "body_sha256": body.sha256,
            "body_bytes": body.size_bytes,
            "body": None if body.in_memory is None else body.in_memory.decode(),
            "attachments": [
                {"name": each.name, "bytes": each.content.size_bytes, "sha256": each.content.sha256}
                for each in message.attachments
            ],
        }


@dataclass(frozen=True, slots=True)
class Request:
    """One request and its answer, of which the last byte had been written ``at`` that instant.

    ``arrived_monotonic`` (its headers were read) and ``answered_monotonic`` (the same instant as ``at``) are seconds of
    the machine's monotonic clock, which all its processes share and nobody sets: for windows and concurrency.
    """

    at: datetime
    arrived_monotonic: float
    answered_monotonic: float
    operation: str
    mailbox: str
    status: str
    code: str
    request_bytes: int
    client_request_id: str | None
    #: Of the answer, as it was written.
    retry_after: str | None
    #: For how long that asked to be left alone; None if there was none, or it made no sense.
    wait_seconds: float | None

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class Journal:
    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.delivered_tags: Counter[str] = Counter()
        self.requests: deque[Request] = deque(maxlen=REMEMBERED_REQUESTS)
        self.request_counts: Counter[tuple[str, str, str]] = Counter()
        self._noted = 0

    def deliver(self, mailbox: str, message: Message) -> None:
        tags = tuple(message.properties.values())
        self.deliveries.append(Delivery(datetime.now(UTC), mailbox, tags, message))
        self.delivered_tags.update(tags or ("",))

    def note(self, request: Request) -> None:
        self.request_counts[request.operation, request.status, request.mailbox] += 1
        self.requests.append(request)
        self._noted += 1

    def requests_after(self, number: int) -> Iterator[tuple[int, Request]]:
        """Yield the remembered requests behind the one of that number, each with its own, counted from 1."""
        forgotten = self._noted - len(self.requests)
        first = max(number, forgotten)
        return enumerate(islice(self.requests, first - forgotten, None), first + 1)

    def deliveries_of(self, mailbox: str | None, tag: str | None) -> Iterator[Delivery]:
        return (
            each
            for each in self.deliveries
            if (mailbox is None or each.mailbox == mailbox) and (tag is None or tag in each.tags)
        )
