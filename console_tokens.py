"""Who may use the console: the entries of ``CONSOLE_TOKENS``."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


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
        ValueError: An entry is not of that form, or has another's token, by its position: its text may be a secret.
    """
    tokens: list[Token] = []
    for position, entry in enumerate(text.split(","), 1):
        if not entry.strip():
            continue
        token = _parse(position, entry.strip())
        if token.secret in (other.secret for other in tokens):
            raise ValueError(f"entry {position} has the token of an earlier one: who asks with it is not known")
        tokens.append(token)
    return tokens


def _parse(position: int, entry: str) -> Token:
    name, _, rest = entry.partition(":")
    role, _, secret = rest.partition(":")
    if not name or role not in set(Role) or len(secret) < MIN_TOKEN_CHARACTERS:
        raise ValueError(
            f"entry {position} is not name:role:token with the role viewer or operator"
            f" and a token of {MIN_TOKEN_CHARACTERS} characters or more"
        )
    return Token(name, Role(role), secret)
