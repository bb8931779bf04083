"""How the simulated tenant behaves where Graph's documentation is silent or contradicts itself, or an admin decides.

Everything here can be changed while the simulator runs; the defaults are the least convenient of what was observed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

MEBIBYTE = 1024 * 1024


@dataclass
class Settable:
    """A record whose fields can be set from JSON by name."""

    def set(self, **changes: Any) -> Self:
        """Change some fields.

        Raises:
            ValueError: A field is unknown, or its value is none of its choices. Nothing has been changed then.
        """
        kinds = get_type_hints(type(self))
        unknown = changes.keys() - {each.name for each in fields(self)}
        if unknown:
            raise ValueError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        for name, value in changes.items():
            choices = get_args(kinds[name]) if get_origin(kinds[name]) is Literal else (value,)
            if value not in choices:
                raise ValueError(f"{name} is one of {', '.join(choices)}")
        for name, value in changes.items():
            setattr(self, name, value)
        return self


@dataclass
class Behaviour(Settable):
    #: How long a sent mail stays invisible before it is found in Sent Items.
    sent_items_delay_seconds: float = 0.2
    #: The same for single mailboxes, by lower-case address.
    sent_items_delay_by_mailbox: dict[str, float] = field(default_factory=dict)
    #: What is seen of a draft during that time: nothing, or still the draft.
    while_submitting: Literal["hidden", "draft"] = "hidden"
    #: Whether a filter may name several values of an extended property: the documents show one.
    filters_take_alternatives: bool = True
    #: How long an item that has just been stored is found by its id but by no filter on a property.
    filter_lag_seconds: float = 0.0
    #: Whether the immutable id of a draft survives its sending: documented both ways.
    immutable_ids: Literal["change", "stable"] = "change"
    #: The answer to a second send of one draft: 404, 400, or 202 without a second mail.
    second_send: Literal["not_found", "invalid", "accepted"] = "not_found"
    #: Answer every call only after this time, so that concurrency can be observed.
    latency_seconds: float = 0.0
    latency_by_operation: dict[str, float] = field(default_factory=dict)
    #: The largest request, and how a larger one is refused.
    max_request_bytes: int = 4 * MEBIBYTE
    oversize_answer: Literal["empty", "html", "bad_request"] = "empty"
    #: The largest message. An admin may raise 35 MB to 150 MB; here there is room for a body beside such a file.
    max_message_bytes: int = 154 * MEBIBYTE
    #: Files that an upload session takes.
    min_session_bytes: int = 3_000_000
    max_session_bytes: int = 150 * MEBIBYTE
    session_lifetime_seconds: float = 86_400.0
    max_recipients: int = 500
    #: Seconds that a token lives; None draws 60 to 90 minutes, as Entra does.
    token_lifetime_seconds: float | None = None
    #: Addresses below these domains have no mailbox; any other has one as soon as it is named.
    unknown_domains: list[str] = field(default_factory=lambda: ["unknown.example"])

    def sent_items_delay(self, mailbox: str) -> float:
        return self.sent_items_delay_by_mailbox.get(mailbox, self.sent_items_delay_seconds)

    def latency(self, operation: str) -> float:
        return self.latency_by_operation.get(operation, self.latency_seconds)
