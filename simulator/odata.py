"""The query options that Graph's mail understands, as strictly as it does: a filter it cannot serve is an error.

https://learn.microsoft.com/graph/api/singlevaluelegacyextendedproperty-get documents the filter by extended property.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from urllib.parse import urlencode

from . import errors, schema
from .mailboxes import Mailbox, Message, property_key

DEFAULT_PAGE = 10
LARGEST_PAGE = 1000

_STRING = r"'((?:[^']|'')*)'"
_AND = re.compile(r"\s+and\s+", re.IGNORECASE)
_TAG = re.compile(
    rf"singleValueExtendedProperties/[Aa]ny\(\s*(\w+)\s*:\s*\1/id\s+eq\s+{_STRING}\s+and\s+\1/value\s+eq\s+{_STRING}\s*\)"
)
_TAGS = re.compile(
    rf"singleValueExtendedProperties/[Aa]ny\(\s*(\w+)\s*:\s*\1/id\s+eq\s+{_STRING}\s+and\s+"
    rf"\(\s*(\1/value\s+eq\s+{_STRING}(?:\s+or\s+\1/value\s+eq\s+{_STRING})*)\s*\)\s*\)"
)
_INTERNET_ID = re.compile(rf"internetMessageId\s+eq\s+{_STRING}")
_SINCE = re.compile(r"(sentDateTime|createdDateTime|receivedDateTime)\s+(ge|gt|le|lt)\s+(\S+)")
_IS_DRAFT = re.compile(r"isDraft\s+eq\s+(true|false)")
_EXPAND = re.compile(
    rf"singleValueExtendedProperties\(\s*\$filter\s*=\s*id\s+eq\s+{_STRING}(?:\s+or\s+id\s+eq\s+{_STRING})*\s*\)"
)

_SELECTABLE = frozenset(schema.TYPES["message"])
_KNOWN_OPTIONS = frozenset({"$filter", "$select", "$expand", "$top", "$skip", "$orderby", "$count"})

Candidates = Callable[[Mailbox, str | None], Iterable[Message]]
Condition = Callable[[Message], bool]


@dataclass(frozen=True, slots=True)
class Filter:
    """Where to look first, and what must hold of each message found there."""

    candidates: Candidates
    conditions: tuple[Condition, ...]

    def messages(self, mailbox: Mailbox, folder: str | None) -> Iterator[Message]:
        found = self.candidates(mailbox, folder)
        return (each for each in found if all(condition(each) for condition in self.conditions))


def parse_filter(text: str | None, *, alternatives: bool = True) -> Filter:
    """Read a ``$filter``.

    Args:
        alternatives: Whether an extended property may have one of several values.

    Raises:
        GraphError: 400, not one of the forms that are served.
    """
    candidates: Candidates = Mailbox.listing
    conditions: list[Condition] = []
    for clause in _clauses(text or ""):
        if tag := _TAG.fullmatch(clause):
            key, value = property_key(_unquote(tag[2])), _unquote(tag[3]).lower()
            candidates = _tagged(key, value)
            conditions.append(_has_tag(key, value))
        elif (tags := _TAGS.fullmatch(clause)) and alternatives:
            key = property_key(_unquote(tags[2]))
            values = {_unquote(each).lower() for each in re.findall(_STRING, tags[3])}
            candidates = _tagged_any(key, values)
            conditions.append(_has_any_tag(key, values))
        elif internet_id := _INTERNET_ID.fullmatch(clause):
            candidates = _with_internet_id(_unquote(internet_id[1]))
            conditions.append(_has_internet_id(_unquote(internet_id[1])))
        else:
            conditions.append(_condition(clause))
    return Filter(candidates, tuple(conditions))


def parse_select(query: Mapping[str, str]) -> frozenset[str] | None:
    """Read ``$select``; None selects what Graph returns unasked."""
    if not query.get("$select"):
        return None
    selected = frozenset(name.strip() for name in query["$select"].split(","))
    for unknown in sorted(selected - _SELECTABLE):
        raise errors.GraphError(
            400,
            "RequestBroker--ParseUri",
            f"Could not find a property named '{unknown}' on type 'Microsoft.OutlookServices.Message'.",
        )
    return selected


def parse_expand(query: Mapping[str, str]) -> frozenset[str]:
    """Read ``$expand``: the keys of the extended properties to show, and ``attachments`` if these are."""
    text = query.get("$expand", "").strip()
    if not text:
        return frozenset()
    if text == "attachments":
        return frozenset({"attachments"})
    if not _EXPAND.fullmatch(text):
        raise errors.GraphError(400, "ErrorInvalidUrlQuery", "The query parameter '$expand' is invalid.")
    return frozenset(property_key(_unquote(each)) for each in re.findall(_STRING, text))


def check_options(query: Mapping[str, str]) -> None:
    for name in query:
        if name.startswith("$") and name not in _KNOWN_OPTIONS:
            raise errors.bad_request(f"The query parameter '{name}' is not supported.")


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a listing and the query that gives the next one, if there is any."""

    messages: list[Message]
    next_query: str | None


def page(messages: Iterator[Message], query: Mapping[str, str]) -> Page:
    top, skip = _count(query, "$top", DEFAULT_PAGE), _count(query, "$skip", 0)
    if not 1 <= top <= LARGEST_PAGE:
        raise errors.GraphError(
            400, "ErrorInvalidUrlQuery", f"The limit of '{LARGEST_PAGE}' for Top query was exceeded."
        )
    found = list(islice(messages, skip, skip + top + 1))
    more = len(found) > top
    return Page(found[:top], urlencode({**query, "$skip": skip + top}) if more else None)


def _count(query: Mapping[str, str], option: str, default: int) -> int:
    text = query.get(option, str(default))
    if not text.isdecimal():
        raise errors.bad_request(f"Invalid value '{text}' for {option} query option found.")
    return int(text)


def _clauses(text: str) -> Iterator[str]:
    """Split at each ``and`` that stands in no string and no parentheses."""
    start = depth = 0
    quoted = False
    position = 0
    while position < len(text):
        character = text[position]
        if character == "'":
            quoted = not quoted
        elif not quoted and character in "()":
            depth += 1 if character == "(" else -1
        elif not quoted and not depth and (separator := _AND.match(text, position)):
            yield text[start:position].strip()
            start = position = separator.end()
            continue
        position += 1
    if text[start:].strip():
        yield text[start:].strip()


def _condition(clause: str) -> Condition:
    if since := _SINCE.fullmatch(clause):
        return _since(since[1], since[2], since[3])
    if draft := _IS_DRAFT.fullmatch(clause):
        wanted = draft[1] == "true"
        return lambda message: message.is_draft == wanted
    raise errors.unsupported_filter(clause.split(" ")[0].split("(")[0].split("/")[0])


def _since(name: str, operator: str, literal: str) -> Condition:
    limit = _instant(literal)

    def instant(message: Message) -> datetime:
        return message.created_at if name == "createdDateTime" else message.sent_at or message.created_at

    comparisons: dict[str, Condition] = {
        "ge": lambda message: instant(message) >= limit,
        "gt": lambda message: instant(message) > limit,
        "le": lambda message: instant(message) <= limit,
        "lt": lambda message: instant(message) < limit,
    }
    return comparisons[operator]


def _instant(literal: str) -> datetime:
    try:
        instant = datetime.fromisoformat(literal)
    except ValueError:
        instant = None
    if instant is None or instant.tzinfo is None:
        raise errors.bad_request(f"Invalid DateTimeOffset literal '{literal}' in the filter.")
    return instant


def _tagged(key: str, value: str) -> Candidates:
    return lambda mailbox, folder: mailbox.tagged(key, value, folder)


def _has_tag(key: str, value: str) -> Condition:
    return lambda message: message.properties.get(key, "").lower() == value


def _tagged_any(key: str, values: set[str]) -> Candidates:
    return lambda mailbox, folder: chain.from_iterable(mailbox.tagged(key, value, folder) for value in values)


def _has_any_tag(key: str, values: set[str]) -> Condition:
    return lambda message: message.properties.get(key, "").lower() in values


def _with_internet_id(internet_message_id: str) -> Candidates:
    return lambda mailbox, folder: mailbox.with_internet_id(internet_message_id, folder)


def _has_internet_id(internet_message_id: str) -> Condition:
    return lambda message: message.internet_message_id.lower() == internet_message_id.lower()


def _unquote(literal: str) -> str:
    return literal.replace("''", "'")
