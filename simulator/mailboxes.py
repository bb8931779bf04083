"""Mailboxes and the messages in them: what is stored, under which id, in which folder, and from when on it can be seen.

A message changes its folder and its ids when it is sent, and it does so a while after Graph has answered 202.
"""

from __future__ import annotations

import base64
import heapq
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import count
from typing import Any

from . import errors
from .behaviour import Behaviour
from .contents import Content

DRAFTS, SENT_ITEMS, INBOX, DELETED_ITEMS = "drafts", "sentitems", "inbox", "deleteditems"
FOLDER_NAMES = {DRAFTS: "Drafts", SENT_ITEMS: "Sent Items", INBOX: "Inbox", DELETED_ITEMS: "Deleted Items"}

_SERIAL = count(1)


def folder_id(folder: str) -> str:
    return base64.urlsafe_b64encode(f"AAMkFolder:{folder:-<24}".encode()).decode()


FOLDERS_BY_NAME = {name: name for name in FOLDER_NAMES} | {folder_id(name): name for name in FOLDER_NAMES}


def new_id(kind: str = "AAMk") -> str:
    """A fresh id that looks like Graph's: opaque, case-sensitive, URL-safe."""
    return f"{kind}{secrets.token_urlsafe(33)}{next(_SERIAL):08d}="


_PROPERTY_ID = re.compile(
    r"(?P<type>Boolean|Binary|Currency|Double|Float|Guid|Int16|Int32|Int64|Long|Integer|Short|String|SystemTime)"
    r"(?: \{?(?P<set>[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})\}? (?P<by>Name|Id) (?P<name>.+)"
    r"| (?P<tag>0x[0-9A-Fa-f]+))"
)


@lru_cache(maxsize=4096)
def property_key(property_id: str) -> str:
    """Return the form under which an extended property is compared: its name keeps its case, all else does not.

    Raises:
        GraphError: Not a valid id of an extended property.
    """
    parsed = _PROPERTY_ID.fullmatch(property_id)
    if parsed is None:
        raise errors.GraphError(400, "ErrorInvalidProperty", "The extended property id is not valid.")
    kind = parsed["type"].lower()
    if parsed["tag"]:
        return f"{kind} {parsed['tag'].lower()}"
    return f"{kind} {parsed['set'].lower()} {parsed['by'].lower()} {parsed['name']}"


@dataclass(slots=True)
class Attachment:
    id: str
    name: str
    content_type: str
    content: Content
    is_inline: bool
    content_id: str | None
    modified_at: datetime


@dataclass(slots=True)
class Message:
    """One item of a mailbox. ``fields`` holds, in Graph's JSON, what needs no rule of its own."""

    id: str
    immutable_id: str
    folder: str
    fields: dict[str, Any]
    body: Content
    body_type: str
    internet_message_id: str
    created_at: datetime
    modified_at: datetime
    headers: list[tuple[str, str]] = field(default_factory=list)
    properties: dict[str, str] = field(default_factory=dict)
    attachments: list[Attachment] = field(default_factory=list)
    sent_at: datetime | None = None
    #: On the monotonic clock: when it can be seen at all, and when it is found by a filter.
    visible_from: float = 0.0
    filterable_from: float = 0.0
    change: int = 1

    @property
    def is_draft(self) -> bool:
        return self.sent_at is None

    @property
    def size_bytes(self) -> int:
        return self.body.size_bytes + sum(each.content.size_bytes for each in self.attachments)

    def recipients(self) -> list[str]:
        return [
            each["emailAddress"]["address"]
            for kind in ("toRecipients", "ccRecipients", "bccRecipients")
            for each in self.fields.get(kind) or ()
        ]

    def touch(self) -> None:
        self.modified_at = datetime.now(UTC)
        self.change += 1


@dataclass(order=True, slots=True)
class _Arrival:
    """A sent message on its way to Sent Items; ``keep`` is false when no copy is wanted."""

    due: float
    serial: int
    message: Message = field(compare=False)
    submitted_at: datetime = field(compare=False)
    keep: bool = field(compare=False)


class Mailbox:
    """One user's messages, found by id, by tag and by internet message id without looking at all of them."""

    def __init__(self, address: str, behaviour: Behaviour) -> None:
        self.address = address
        #: None, or why calls to this mailbox are refused.
        self.refusal: errors.GraphError | None = None
        self.send_as: set[str] = {address}
        self._behaviour = behaviour
        self._messages: dict[str, Message] = {}
        self._by_id: dict[str, Message] = {}
        self._by_property: dict[tuple[str, str], dict[str, Message]] = {}
        self._by_internet_id: dict[str, dict[str, Message]] = {}
        self._arrivals: list[_Arrival] = []
        self._submitted: set[str] = set()

    def add(self, message: Message, stored_at: float | None = None) -> None:
        """Store the message, as of that instant on the monotonic clock, or now."""
        stored_at = time.monotonic() if stored_at is None else stored_at
        message.filterable_from = stored_at + self._behaviour.filter_lag_seconds
        self._messages[message.id] = message
        self._by_id[message.id] = self._by_id[message.immutable_id] = message
        self._index(message)

    def remove(self, message: Message) -> None:
        del self._messages[message.id]
        del self._by_id[message.id], self._by_id[message.immutable_id]
        self._unindex(message)

    def discard(self, message: Message) -> None:
        """Move the message to Deleted Items, where it has other ids."""
        self.remove(message)
        message.folder, message.id, message.immutable_id = DELETED_ITEMS, new_id(), new_id("AAMkI")
        self.add(message)

    def find(self, message_id: str) -> Message:
        """Return the message that either of its ids names now.

        Raises:
            GraphError: There is none, or it is not visible yet.
        """
        self._settle()
        message = self._by_id.get(message_id)
        if message is None or message.visible_from > time.monotonic():
            raise errors.item_not_found() if message_id.startswith("AAMk") else errors.malformed_id()
        return message

    def was_submitted(self, message_id: str) -> bool:
        """Tell whether a draft of this id has been sent."""
        return message_id in self._submitted

    def listing(self, folder: str | None) -> Iterator[Message]:
        """Yield the visible messages, the newest first."""
        self._settle()
        return self._visible(reversed(self._messages.values()), folder)

    def tagged(self, key: str, value: str, folder: str | None) -> Iterator[Message]:
        self._settle()
        return self._filterable(self._by_property.get((key, value.lower()), {}), folder)

    def with_internet_id(self, internet_message_id: str, folder: str | None) -> Iterator[Message]:
        self._settle()
        return self._filterable(self._by_internet_id.get(internet_message_id.lower(), {}), folder)

    def set_property(self, message: Message, key: str, value: str) -> None:
        self._unindex(message)
        message.properties[key] = value
        self._index(message)

    def set_internet_id(self, message: Message, internet_message_id: str) -> None:
        self._unindex(message)
        message.internet_message_id = internet_message_id
        self._index(message)

    def submit(self, message: Message, *, keep: bool) -> None:
        """Let the message leave; it arrives in Sent Items after the configured delay, or nowhere if not to be kept."""
        if message.id in self._messages:
            self._submitted.update((message.id, message.immutable_id))
            if self._behaviour.while_submitting == "hidden":
                self.remove(message)
        due = time.monotonic() + self._behaviour.sent_items_delay(self.address)
        heapq.heappush(self._arrivals, _Arrival(due, next(_SERIAL), message, datetime.now(UTC), keep))

    def _settle(self) -> None:
        now = time.monotonic()
        while self._arrivals and self._arrivals[0].due <= now:
            arrival = heapq.heappop(self._arrivals)
            if arrival.message.id in self._messages:
                self.remove(arrival.message)
            if arrival.keep:
                self._arrive(arrival)

    def _arrive(self, arrival: _Arrival) -> None:
        message = arrival.message
        message.id = new_id()
        if self._behaviour.immutable_ids == "change":
            message.immutable_id = new_id("AAMkI")
        message.folder = SENT_ITEMS
        message.sent_at = arrival.submitted_at
        message.touch()
        # It arrived when it was due, although nobody looked until now.
        self.add(message, arrival.due)

    def _index(self, message: Message) -> None:
        for key, value in message.properties.items():
            self._by_property.setdefault((key, value.lower()), {})[message.id] = message
        self._by_internet_id.setdefault(message.internet_message_id.lower(), {})[message.id] = message

    def _unindex(self, message: Message) -> None:
        for key, value in message.properties.items():
            self._by_property.get((key, value.lower()), {}).pop(message.id, None)
        self._by_internet_id.get(message.internet_message_id.lower(), {}).pop(message.id, None)

    def _filterable(self, found: dict[str, Message], folder: str | None) -> Iterator[Message]:
        now = time.monotonic()
        return (each for each in self._visible(found.values(), folder) if each.filterable_from <= now)

    def _visible(self, messages: Iterable[Message], folder: str | None) -> Iterator[Message]:
        now = time.monotonic()
        return (each for each in messages if each.visible_from <= now and (folder is None or each.folder == folder))
