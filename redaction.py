"""Takes out of a library's log line what tells of a mail or opens a door: addresses, paths, tokens, whole objects.

Our own lines are made of ids and counts and need none of it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from datetime import date, timedelta
from types import FunctionType
from typing import Any
from uuid import UUID

from dramatiq.message import Message

#: What of a foreign line tells too much: the path of a URL, which holds an address or is a secret itself, and who
#: logs in with what; addresses; tokens, in a header or by their form.
_TELLING = (
    (re.compile(r"\b([a-z][a-z0-9+.-]*://)(?:[^\s/@]*@)?([^\s/?#'\"<>]*)[^\s'\"<>]*", re.IGNORECASE), r"\1\2/…"),
    (re.compile(r"(?<=[ '\"=(:,])/[^\s'\"]*(?:@|%40|[Tt]oken|\?)[^\s'\"]*"), "/…"),
    (re.compile(r"[^\s@'\"<>(),;:=/]+(?:@|%40)[^\s@'\"<>(),;:/]+", re.IGNORECASE), "…@…"),
    (re.compile(r"\b(authorization['\"]?\s*[=:]\s*['\"]?)[^'\"]+", re.IGNORECASE), r"\1…"),
    (re.compile(r"\b(bearer|basic|sharedkey|sharedkeylite|sharedaccesssignature)\s+[\w.~+/=:-]+", re.I), r"\1 …"),
    (re.compile(r"\b(?:eyJ[\w-]{8,}(?:\.[\w-]*)*|hv[sbr]\.[\w-]+|whsec_[\w+/=-]+)"), "…"),
    (
        re.compile(
            r"\b(\w*(?:password|passwd|secret|token|signature|sig|key|credential))(['\"]?\s*[=:]\s*['\"]?)[^\s'\"&,;]+",
            re.IGNORECASE,
        ),
        r"\1\2…",
    ),
)
#: No line of ours is longer; a foreign one that is may hold a body.
_LONGEST_CHARACTERS = 1000


def redacted(_logger: Any, _method: str, line: Any) -> Any:
    """Take out of a line of `logging` what looks like an address, a URL's path, a token or a password.

    Of several lines the first is kept: asyncio and others put whole objects into those behind it.
    """
    text = str(line["event"]).partition("\n")[0][:_LONGEST_CHARACTERS]
    for telling, kept in _TELLING:
        text = telling.sub(kept, text)
    return {**line, "event": text}


def without_message_arguments(record: logging.LogRecord) -> bool:
    """Keep actors' arguments, which may be whole emails, and errors' texts, which may quote one, out of the lines."""
    record.msg = _named(record.msg)
    if isinstance(record.args, tuple):
        record.args = tuple(_named(argument) for argument in record.args)
    elif isinstance(record.args, Mapping):  # logging has taken it out of the tuple
        record.args = _Fields({name: _named(value) for name, value in record.args.items()})
    # At DEBUG each actor tells its call, in a logger of its own name.
    return record.msg != "Received args=%r kwargs=%r."


class _Fields(dict[str, Any]):
    """Values that a line asks for by their names, and does not get as a whole."""

    def __repr__(self) -> str:
        return "(dict)"


def _named(argument: Any) -> Any:
    if isinstance(argument, Message) or hasattr(argument, "_message"):
        return f"{argument.actor_name}[{argument.message_id}]"
    if isinstance(argument, BaseException):
        return type(argument).__name__
    return argument if isinstance(argument, _PLAIN) else f"({type(argument).__name__})"


#: What a line may show; anything else is told by its kind, for it may hold a mail.
_PLAIN = (str, int, float, type(None), type, date, timedelta, UUID, FunctionType)
