"""Who may send from which mailbox, and whom mail may reach: the rules that an operator gives as patterns.

`ALLOWED_SENDERS` and `RECIPIENT_FIREWALL` are read here, by whoever checks, counts or composes a mail. Patterns are
those of a shell (``*@example.com``) and do not distinguish case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

#: Stands for every publisher, also for one that does not say who it is.
ANYBODY = "*"
_ADDRESS = re.compile(r"[^@\s,:*?\[\]]+@[^@\s,:*?\[\]]+")
_FIELDS = ("to", "cc", "bcc")
_REDIRECT = "redirect:"
#: Graph takes so many x- headers, each of so many characters at most.
_MAX_HEADERS = 5
_MAX_HEADER_CHARACTERS = 995


class StoppedByFirewall(Exception):
    """Raised when the firewall lets a mail reach none of its recipients."""


class SenderRule(NamedTuple):
    """One entry of ``ALLOWED_SENDERS``: who may send from the mailboxes that match."""

    user: str
    pattern: str

    @classmethod
    def parse(cls, entry: str) -> SenderRule:
        """Read ``pattern`` or ``user=pattern``; for a pattern that has a ``=`` itself, ``*=pattern``."""
        user, equals, pattern = entry.partition("=")
        return cls(user.strip(), pattern.strip().lower()) if equals else cls(ANYBODY, entry.lower())

    @staticmethod
    def check(entries: tuple[str, ...]) -> tuple[str, ...]:
        """Return the entries.

        Raises:
            ValueError: One of them has no user or no pattern.
        """
        for position, entry in enumerate(entries, 1):
            if not all(SenderRule.parse(entry)):
                raise ValueError(f"entry {position} must be pattern or user=pattern")
        return entries


@cache
def sender_rules(entries: tuple[str, ...]) -> list[SenderRule]:
    """Return the rules that ``ALLOWED_SENDERS`` has."""
    return [SenderRule.parse(entry) for entry in entries]


def refusal_of_sender(mailbox: str, user: str | None, rules: Iterable[SenderRule]) -> str | None:
    """Say why a publisher may not send from a mailbox; None if it may.

    Args:
        mailbox: In lower case.
        user: The publisher's user of RabbitMQ, as RabbitMQ has verified it; None if the publisher does not say.
    """
    of = [rule.user for rule in rules if fnmatchcase(mailbox, rule.pattern)]
    if ANYBODY in of or (user is not None and user in of):
        return None
    if not of:
        return "this mailbox may not be sent from"
    if user is None:
        return "only some users of RabbitMQ may send from this mailbox, and the property user_id names none"
    return "the user of RabbitMQ that user_id names may not send from this mailbox"


class RecipientFirewall(NamedTuple):
    """``RECIPIENT_FIREWALL``: whom mail may reach where it must not reach everybody.

    Attributes:
        allowed: Patterns of recipients; all others are left out.
        redirect_to: The one address that gets everything instead.
    """

    allowed: tuple[str, ...] = ()
    redirect_to: str | None = None

    @classmethod
    @cache
    def parse(cls, entries: tuple[str, ...]) -> RecipientFirewall:
        """Read patterns, or ``redirect:address`` alone; nothing lets everything pass."""
        if entries and entries[0].startswith(_REDIRECT):
            return cls((), entries[0].removeprefix(_REDIRECT).strip())
        return cls(tuple(entry.lower() for entry in entries))

    @staticmethod
    def check(entries: tuple[str, ...]) -> tuple[str, ...]:
        """Return the entries.

        Raises:
            ValueError: They are not one of the two forms.
        """
        redirects = [entry for entry in entries if entry.startswith(_REDIRECT)]
        if redirects and (len(entries) > 1 or not _ADDRESS.fullmatch(entries[0].removeprefix(_REDIRECT).strip())):
            raise ValueError("redirect:address must name one address, and nothing else may be given")
        if any("@" not in entry for entry in entries):
            raise ValueError("each pattern must have an @, as in *@test.example")
        return entries

    @property
    def stands(self) -> bool:
        return bool(self.allowed or self.redirect_to)

    def __str__(self) -> str:
        """Say what it does, without an address."""
        if self.redirect_to:
            return "all mail goes to one address"
        return "mail reaches listed recipients only" if self.allowed else "mail reaches whomever it names"

    def reached(self, payload: Mapping[str, Any]) -> dict[str, list[str]]:
        """Return the addresses that a ``SendEmail`` reaches, by the field they are in."""
        if self.redirect_to:
            return {"to": [self.redirect_to]}
        given = {field: list(payload.get(field) or ()) for field in _FIELDS}
        return {field: [each for each in given[field] if self._passes(each)] for field in _FIELDS}

    def replied_to(self, payload: Mapping[str, Any]) -> list[str]:
        """Return the addresses that replies to a ``SendEmail`` go to; none: to the mailbox that sends it.

        Who tests and answers a mail reaches no more people than the mail itself may.
        """
        given = payload.get("reply_to") or ()
        if self.redirect_to:
            return [self.redirect_to] if given else []
        return [each for each in given if self._passes(each)]

    def headers(self, payload: Mapping[str, Any]) -> dict[str, str]:
        """Return the x- headers of the mail: the publisher's, and whom a redirected mail was for.

        Of more than Graph takes, the publisher's last are left out; of a long list, its end.
        """
        given: dict[str, str] = dict(payload.get("headers") or {})
        if not self.redirect_to:
            return given
        told = {field: f"x-original-{field.replace('_', '-')}" for field in (*_FIELDS, "reply_to")}
        named = {header: _listed(payload[field]) for field, header in told.items() if payload.get(field)}
        kept = [name for name in given if name.lower() not in named][: _MAX_HEADERS - len(named)]
        return {**{name: given[name] for name in kept}, **named}

    def _passes(self, address: str) -> bool:
        return not self.allowed or any(fnmatchcase(address.lower(), pattern) for pattern in self.allowed)


def _listed(addresses: Sequence[str]) -> str:
    """Return the addresses, as many as a header holds, and how many more there are."""
    text = ", ".join(addresses)
    shown = len(addresses)
    while len(text) > _MAX_HEADER_CHARACTERS:
        shown -= 1
        text = f"{', '.join(addresses[:shown])} and {len(addresses) - shown} more"
    return text
