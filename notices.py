"""Notices of new dead letters: what they say, how they are signed, and the way to the operator's webhook.

A notice says how many dead letters came for which reason, and their ids: enough to wake somebody and to look them up
with ``mailfleet dlq``. It holds no address and no text of an error. Signatures follow standardwebhooks.com, so that a
receiver can check them with a library that exists.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import orjson
import requests

#: The property ``type`` and the routing key of a notice on ``mail.events``; publishers listen to ``email.*``.
TYPE = "DeadLettersRecorded"
ROUTING_KEY = "dead_letters.recorded"
#: The counts tell of all; so many are named.
MAX_NAMED = 100
#: For the connection, and for each silence of the receiver.
_PATIENCE_SECONDS = 5
_BASE64_SECRET = "whsec_"  # noqa: S105  (the prefix that the standard gives to a secret in base64)


class NotDelivered(Exception):
    """Raised when the webhook did not take a notice; says why without its address."""


class NewLetter(NamedTuple):
    """A dead letter that nobody was told of."""

    id: str
    incoming_email_id: str | None
    reason: str
    queue_name: str
    created_at: datetime


def body(notice_id: str, letters: Sequence[NewLetter], at: datetime) -> bytes:
    """Return the notice's JSON."""
    return orjson.dumps(
        {
            "type": TYPE,
            "notice_id": notice_id,
            "recorded_at": _instant(at),
            "count": len(letters),
            "by_reason": dict(Counter(letter.reason for letter in letters).most_common()),
            "by_queue": dict(Counter(letter.queue_name for letter in letters).most_common()),
            "first_at": _instant(min(letter.created_at for letter in letters)),
            "last_at": _instant(max(letter.created_at for letter in letters)),
            "dead_letters": [
                letter._asdict() | {"created_at": _instant(letter.created_at)} for letter in letters[:MAX_NAMED]
            ],
        }
    )


def _instant(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def signature(secret: str, notice_id: str, at: datetime, content: bytes) -> str:
    """Return ``v1,`` and the base64 of the HMAC-SHA256 over id, Unix time and content, joined by dots."""
    signed = f"{notice_id}.{int(at.timestamp())}.".encode() + content
    return "v1," + base64.b64encode(hmac.digest(_key(secret), signed, hashlib.sha256)).decode()


def _key(secret: str) -> bytes:
    if secret.startswith(_BASE64_SECRET):
        return base64.b64decode(secret.removeprefix(_BASE64_SECRET), validate=True)
    return secret.encode()


def check_secret(secret: str) -> None:
    """Raise ValueError if the secret cannot sign, or could be guessed. The error does not quote it."""
    try:
        key = _key(secret)
    except ValueError:
        raise ValueError("must have base64 after whsec_") from None
    if len(key) < 16:
        raise ValueError("must have 16 bytes or more")


def deliver(url: str, secret: str | None, notice_id: str, content: bytes, at: datetime) -> None:
    """Post a notice. Repeating it is harmless for a receiver that looks at ``webhook-id``.

    Raises:
        NotDelivered: The receiver cannot be reached, or did not answer with 2xx. A redirect is not followed.
    """
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "mailfleet",
        "webhook-id": notice_id,
        "webhook-timestamp": str(int(at.timestamp())),
    }
    if secret:
        headers["webhook-signature"] = signature(secret, notice_id, at, content)
    try:
        # What it answers besides is not read: it may be of any length.
        with (
            _session(url) as session,
            session.post(
                url, content, headers=headers, timeout=_PATIENCE_SECONDS, allow_redirects=False, stream=True
            ) as response,
        ):
            status = response.status_code
    except (requests.RequestException, OSError, ValueError) as error:
        raise NotDelivered(f"no answer ({type(error).__name__})") from None  # its text quotes the address
    if not 200 <= status < 300:
        raise NotDelivered(f"answered {status}")


def _session(url: str) -> requests.Session:
    """Return a session that reaches what is in plain http, which is this machine, without the environment's proxy."""
    session = requests.Session()
    surroundings = session.merge_environment_settings(url, {}, None, None, None)
    session.verify = surroundings["verify"]
    if url.startswith("https:"):
        session.proxies = surroundings["proxies"]
    session.trust_env = False  # nor is a login of a .netrc sent along
    return session


def wait_before(attempt: int) -> timedelta:
    """Return how long to wait after so many attempts: a minute, doubled each time, at most an hour."""
    return min(timedelta(minutes=1) * 2 ** min(attempt - 1, 10), timedelta(hours=1))
