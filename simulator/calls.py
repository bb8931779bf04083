"""A call to Graph and its answer, as values: the routes turn one into the other and know nothing of sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from . import errors
from .mailboxes import Mailbox, Message

JSON = "application/json; charset=utf-8"

#: What becomes of a mail after 202. Only the first is what the sender hopes for.
Outcome = Literal["delivered", "twice", "lost", "stuck", "bounced"]


@dataclass(slots=True)
class Answer:
    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)
    #: Sent chunk by chunk, without a Content-Length, instead of ``body``.
    stream: AsyncIterator[bytes] | None = None
    #: Graph's error code, for the journal.
    code: str = ""


@dataclass(slots=True)
class Call:
    """One authorised call; what faults have to say about its execution is said in the last fields."""

    operation: str
    app: str
    mailbox: Mailbox
    #: The folder that the path names, if it names one.
    folder: str | None
    #: The ids in the path after the mailbox and the folder.
    ids: tuple[str, ...]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    base_url: str
    path: str
    outcome: Outcome = "delivered"
    draft_hidden_for_seconds: float = 0.0
    truncate_mime: bool = False

    @property
    def wants_immutable_ids(self) -> bool:
        return 'idtype="immutableid"' in self.headers.get("Prefer", "").lower()

    @property
    def is_mime(self) -> bool:
        return self.headers.get("Content-Type", "").startswith("text/plain")

    def message(self, message_id: str) -> Message:
        """Return a message of the mailbox, and of the folder if the path names one.

        Raises:
            GraphError: It is not there.
        """
        message = self.mailbox.find(message_id)
        if self.folder not in (None, message.folder):
            raise errors.item_not_found()
        return message

    def draft(self, message_id: str) -> Message:
        """Return a message that may still be changed."""
        message = self.message(message_id)
        if not message.is_draft:
            raise errors.GraphError(400, "ErrorInvalidRequest", "The item is not a draft.")
        return message

    def json(self) -> Any:
        """Return the parsed body.

        Raises:
            GraphError: There is none, it is not JSON, or it is not called JSON.
        """
        if not self.headers.get("Content-Type", "").lower().startswith("application/json"):
            raise errors.GraphError(
                415, "RequestBroker--ParseUri", "A media type in the Content-Type header is not supported."
            )
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise errors.undeserializable_body() from error

    def answer(self, status: int, content: Any) -> Answer:
        headers = {"Preference-Applied": 'IdType="ImmutableId"'} if self.wants_immutable_ids else {}
        return Answer(status, orjson.dumps(content), JSON, headers)
