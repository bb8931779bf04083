"""Who may ask the console for what.

``CONSOLE_TOKENS`` names each person or program with a role and a token. Without any, only clients on the same machine
are answered, so that a console that nobody configured is open to nobody else.
"""

from __future__ import annotations

import hmac
import ipaddress
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from fastapi import HTTPException, Request

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


#: Failed tries are remembered of so many addresses.
MAX_ADDRESSES = 10_000
_MINUTE = 60.0
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


class FailedTries:
    """Counts wrong tokens by client address and minute. Threads may share it; its memory is bounded.

    An address over its limit is refused whatever it says, so the right token is not told from a wrong one either. An
    IPv6 client has 2**64 addresses of its own, so its network is what is counted.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Allow so many wrong tokens a minute; 0: any number."""
        self._per_minute = per_minute
        self._clock = clock
        self._tries: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, address: str) -> None:
        """Count one wrong token. The address that has been quiet for longest is forgotten for one too many."""
        network, now = _network(address), self._clock()
        with self._lock:
            began_at, count = self._tries.pop(network, (now, 0))
            self._tries[network] = (now, 1) if now - began_at >= _MINUTE else (began_at, count + 1)
            if len(self._tries) > MAX_ADDRESSES:
                self._tries.popitem(last=False)

    def wait(self, address: str) -> int:
        """Return for how many seconds the address is refused; 0: it is not."""
        with self._lock:
            began_at, count = self._tries.get(_network(address), (0.0, 0))
        left = began_at + _MINUTE - self._clock()
        return math.ceil(left) if self._per_minute and count >= self._per_minute and left > 0 else 0


def _network(address: str) -> str:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))


class Access:
    """Lets a request in, or answers 401; 429 to an address that tried too many wrong tokens."""

    def __init__(self, tokens: list[Token], failed_tries: FailedTries | None = None) -> None:
        self._tokens = tokens
        self._failed_tries = failed_tries or FailedTries(per_minute=0)

    def viewer(self, request: Request) -> str:
        """Return the name of who asks; any role may look."""
        if not self._tokens:
            return self._local(request)
        address = request.client.host if request.client else ""
        self._refuse_guesser(address)
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        given = text.strip().encode("latin-1")
        # Every token is compared, so that the time taken tells nothing.
        matching = [token for token in self._tokens if hmac.compare_digest(token.secret.encode(), given)]
        if scheme.lower() != "bearer" or not matching:
            if given:
                self._failed_tries.note(address)
            raise HTTPException(401, "a token is needed", {"WWW-Authenticate": "Bearer"})
        return matching[0].name

    def _refuse_guesser(self, address: str) -> None:
        if wait := self._failed_tries.wait(address):
            raise HTTPException(429, "too many wrong tokens from this address", {"Retry-After": str(wait)})

    def _local(self, request: Request) -> str:
        passed_on = any(header in request.headers for header in _PASSED_ON)
        if request.client is None or request.client.host not in LOOPBACK or passed_on:
            raise HTTPException(
                401, "without CONSOLE_TOKENS only this machine is answered", {"WWW-Authenticate": "Bearer"}
            )
        return "local"
