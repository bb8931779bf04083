"""The addresses that settings name, and how each must look. No error quotes one: it may hold a password."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

import psycopg2
from psycopg2.extensions import parse_dsn
from pydantic import AfterValidator, SecretStr

LOOPBACK_HOSTS = {"localhost", "127.0.0.1", "::1"}


def server(*schemes: str) -> AfterValidator:
    """Check an address without ever quoting it: it holds a password."""

    def check(secret: SecretStr) -> SecretStr:
        if not secret.get_secret_value():
            return secret  # withheld: this process type does not need it
        try:
            parts = urlsplit(secret.get_secret_value())
            usable = parts.scheme in schemes and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(
                f"must look like {schemes[0]}://user:password@host:port/name, with special characters percent-encoded"
            )
        return secret

    return AfterValidator(check)


#: What `models` tells PostgreSQL itself; `models.database.connect` would get it twice.
_OWN_KEYWORDS = {"host", "port", "user", "password", "dbname", "connect_timeout", "application_name", "options"} | {
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
}


def postgresql(secret: SecretStr) -> SecretStr:
    """Check what follows the ``?`` of PostgreSQL's address."""
    url = secret.get_secret_value()
    if own := {keyword for keyword, _ in parse_qsl(urlsplit(url).query)} & _OWN_KEYWORDS:
        raise ValueError(f"{', '.join(sorted(own))} may not be given in its query: mailfleet sets it")
    try:
        parse_dsn(url)
    except psycopg2.ProgrammingError:
        raise ValueError("has something in its query that PostgreSQL's clients do not know") from None
    return secret


def https(url: str) -> str:
    """Check an address of HTTP, which may be plain on this machine only."""
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or (parts.scheme != "https" and not (parts.scheme == "http" and on_loopback(url))):
        raise ValueError("must be an https address (http is accepted on loopback only)")
    return url


def without_credentials(url: str) -> str:
    """Refuse an address with a user or a password: it is no secret, and shown. A container of Azure is no user."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url  # whoever knows its form refuses it
    is_container = parts.scheme in ("abfs", "abfss") and parts.password is None
    if "@" in parts.netloc and not is_container:
        raise ValueError("must hold no user and no password: it is no secret, and is shown")
    return url


def webhook(secret: SecretStr | None) -> SecretStr | None:
    """Check an address that is a secret: its path may be what lets one in."""
    if secret is not None:
        https(secret.get_secret_value())
    return secret


def on_loopback(url: str) -> bool:
    """Say whether an address is this machine's."""
    return urlsplit(url).hostname in LOOPBACK_HOSTS
