"""Who may ask the console for what.

``CONSOLE_TOKENS`` names each person or program with a role and a token. Without any, only clients on the same machine
are answered, and may look, so that a console that nobody configured is open to nobody else and obeys nobody.
"""

from __future__ import annotations

import hmac
from enum import StrEnum
from typing import Annotated, NamedTuple

from fastapi import Depends, HTTPException, Request

from console.failed_tries import FailedTries

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
#: A proxy on this machine passes on what comes from others.
_PASSED_ON = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


class Role(StrEnum):
    """What a token allows: a viewer looks, an operator acts too."""

    VIEWER = "viewer"
    OPERATOR = "operator"


class Token(NamedTuple):
    """One entry of ``CONSOLE_TOKENS``."""

    name: str
    role: Role
    secret: str

    def __repr__(self) -> str:
        return f"Token({self.name!r}, {self.role.value!r})"


#: Shorter tokens can be guessed.
MIN_TOKEN_CHARACTERS = 16


def parse_tokens(text: str) -> list[Token]:
    """Read ``name:role:token, …``.

    Raises:
        ValueError: An entry is not of that form, by its position: its text may be a secret.
    """
    return [_parse(position, entry.strip()) for position, entry in enumerate(text.split(","), 1) if entry.strip()]


def _parse(position: int, entry: str) -> Token:
    name, _, rest = entry.partition(":")
    role, _, secret = rest.partition(":")
    if not name or role not in set(Role) or len(secret) < MIN_TOKEN_CHARACTERS:
        raise ValueError(
            f"CONSOLE_TOKENS: entry {position} is not name:role:token with the role viewer or operator"
            f" and a token of {MIN_TOKEN_CHARACTERS} characters or more"
        )
    return Token(name, Role(role), secret)


class Access:
    """Lets a request in, or answers 401; 403 if who asks may only look; 429 after too many wrong tokens."""

    def __init__(self, tokens: list[Token], failed_tries: FailedTries | None = None) -> None:
        self._tokens = tokens
        self._failed_tries = failed_tries or FailedTries(per_minute=0)

    def viewer(self, request: Request) -> str:
        """Return the name of who asks; any role may look."""
        return self._token(request).name

    def operator(self, request: Request) -> str:
        """Return the name of who asks, if that is an operator: who acts is written down by a name that is proven."""
        token = self._token(request)
        if token.role != Role.OPERATOR:
            raise HTTPException(403, "only the token of an operator allows this")
        return token.name

    def _token(self, request: Request) -> Token:
        if not self._tokens:
            return self._local(request)
        address = request.client.host if request.client else ""
        if wait := self._failed_tries.wait(address):
            raise HTTPException(429, "too many wrong tokens from this address", {"Retry-After": str(wait)})
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        given = text.strip().encode("latin-1")
        # Every token is compared, so that the time taken tells nothing.
        matching = [token for token in self._tokens if hmac.compare_digest(token.secret.encode(), given)]
        if scheme.lower() != "bearer" or not matching:
            if given:
                self._failed_tries.note(address)
            raise HTTPException(401, "a token is needed", {"WWW-Authenticate": "Bearer"})
        return matching[0]

    def _local(self, request: Request) -> Token:
        passed_on = any(header in request.headers for header in _PASSED_ON)
        if request.client is None or request.client.host not in LOOPBACK or passed_on:
            raise HTTPException(
                401, "without CONSOLE_TOKENS only this machine is answered", {"WWW-Authenticate": "Bearer"}
            )
        return Token("local", Role.VIEWER, "")


def _viewer(request: Request) -> str:
    access: Access = request.app.state.access
    return access.viewer(request)


def _operator(request: Request) -> str:
    access: Access = request.app.state.access
    return access.operator(request)


#: Parameters of what the application of `app.make_app` answers: the name of who asks.
Viewer = Annotated[str, Depends(_viewer)]
Operator = Annotated[str, Depends(_operator)]
