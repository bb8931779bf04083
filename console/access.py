"""Who may ask the console for what.

``CONSOLE_TOKENS`` names each person or program with a role and a token. Without any, only clients on the same machine
are answered, and may look, so that a console that nobody configured is open to nobody else and obeys nobody.
"""

from __future__ import annotations

import hmac
import logging
import re
from enum import StrEnum
from typing import Annotated

from fastapi import Depends, HTTPException, Request

from console.failed_tries import FailedTries
from console_tokens import Role, Token
from telemetry import CONSOLE_REFUSALS

log = logging.getLogger(__name__)

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
#: What a browser or a script calls this machine. A name of somebody's domain may lead here too: then the page that asks
#: is that somebody's, in the browser of who works here.
_OWN_NAMES = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
#: A proxy on this machine passes on what comes from others.
_PASSED_ON = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


class Refusal(StrEnum):
    """Why a request was refused: the label of the metric."""

    NO_TOKEN = "no_token"  # noqa: S105  a word
    WRONG_TOKEN = "wrong_token"  # noqa: S105  a word
    TOO_MANY_TRIES = "too_many_tries"
    NOT_AN_OPERATOR = "not_an_operator"
    NOT_LOCAL = "not_local"


for _refusal in Refusal:
    CONSOLE_REFUSALS.labels(_refusal.value)


class Access:
    """Lets a request in, or answers 401; 403 if who asks may only look; 429 after too many wrong tokens.

    Each refusal is counted. Wrong tokens are logged too, never themselves, and at most twice in a minute and address.
    """

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
            log.warning("%s asked for what only an operator may", token.name)
            raise _refused(Refusal.NOT_AN_OPERATOR, 403, "only the token of an operator allows this")
        return token.name

    def _token(self, request: Request) -> Token:
        if not self._tokens:
            return self._local(request)
        address = request.client.host if request.client else ""
        if wait := self._failed_tries.wait(address):
            said = "too many wrong tokens from this address"
            raise _refused(Refusal.TOO_MANY_TRIES, 429, said, {"Retry-After": str(wait)})
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        given = text.strip().encode("latin-1")
        # Every token is compared, so that the time taken tells nothing.
        matching = [token for token in self._tokens if hmac.compare_digest(token.secret.encode(), given)]
        if scheme.lower() != "bearer" or not matching:
            if given:
                self._note_wrong_token(address)
            refusal = Refusal.WRONG_TOKEN if given else Refusal.NO_TOKEN
            raise _refused(refusal, 401, "a token is needed", _BEARER)
        return matching[0]

    def _note_wrong_token(self, address: str) -> None:
        tries = self._failed_tries.note(address)
        if self._failed_tries.wait(address):
            log.warning("%d wrong tokens from %s in a minute: it is refused for the rest of it", tries, address)
        elif tries == 1:
            log.warning("a wrong token from %s", address)

    def _local(self, request: Request) -> Token:
        passed_on = any(header in request.headers for header in _PASSED_ON)
        if request.client is None or request.client.host not in LOOPBACK or passed_on:
            raise _refused(Refusal.NOT_LOCAL, 401, "without CONSOLE_TOKENS only this machine is answered", _BEARER)
        if not all(_OWN_NAMES.fullmatch(name) for name in request.headers.getlist("host")):
            said = "without CONSOLE_TOKENS the console is localhost, 127.0.0.1 or [::1] and has no other name"
            raise _refused(Refusal.NOT_LOCAL, 403, said)
        return Token("local", Role.VIEWER, "")


_BEARER = {"WWW-Authenticate": "Bearer"}


def _refused(refusal: Refusal, status: int, said: str, headers: dict[str, str] | None = None) -> HTTPException:
    CONSOLE_REFUSALS.labels(refusal.value).inc()
    return HTTPException(status, said, headers)


def _viewer(request: Request) -> str:
    access: Access = request.app.state.access
    return access.viewer(request)


def _operator(request: Request) -> str:
    access: Access = request.app.state.access
    return access.operator(request)


#: What asks for a token.
GUARDS = (_viewer, _operator)
#: Parameters of what the application of `app.make_app` answers: the name of who asks.
Viewer = Annotated[str, Depends(_viewer)]
Operator = Annotated[str, Depends(_operator)]
