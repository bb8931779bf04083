"""What happened: every mail that really left, and what was asked how often and answered how.

This is what tests and benchmarks assert on, so it tells deliveries, which nobody can take back, from answers.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
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
    at: datetime
    operation: str
    mailbox: str
    status: str
    code: str
    request_bytes: int
    client_request_id: str | None


class Journal:
    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.delivered_tags: Counter[str] = Counter()
        self.requests: deque[Request] = deque(maxlen=REMEMBERED_REQUESTS)
        self.request_counts: Counter[tuple[str, str, str]] = Counter()

    def deliver(self, mailbox: str, message: Message) -> None:
        tags = tuple(message.properties.values())
        self.deliveries.append(Delivery(datetime.now(UTC), mailbox, tags, message))
        self.delivered_tags.update(tags or ("",))

    def note(self, request: Request) -> None:
        self.request_counts[request.operation, request.status, request.mailbox] += 1
        self.requests.append(request)

    def deliveries_of(self, mailbox: str | None, tag: str | None) -> Iterator[Delivery]:
        return (
            each
            for each in self.deliveries
            if (mailbox is None or each.mailbox == mailbox) and (tag is None or tag in each.tags)
        )
