"""Seals the payloads of emails at rest: who reads the database, or a dump of it, reads no content.

The vault's envelope per backup would cost each mail two key derivations and a hundred bytes. Here a process draws one
*data key* an hour, has it kept wrapped under the newest key of the ring, and seals with it whatever arrives. A payload
costs one AES-256-GCM and base64, and a key change rewraps the data keys alone.

A sealed payload is JSON, as the column wants it::

    {"sealed": base64 of nonce (12), cipher text, tag (16); "key": the data key's id; and what SQL asks for:
     "send_at", "expires_at", "attachments": [{"size": …}]}

The email's id is associated data: a payload that was moved to another row does not open. What lies outside is for
counting only; who opens gets the sealed values. Nonces are random: a data key would have to seal 2^32 payloads in its
hour before that is a risk (NIST SP 800-38D, section 8.3), and neither a fork nor a copied machine repeats one.

The wrapped data key: salt (32), the key encrypted (32), tag (16), as in the vault; the key's id is associated data.
What is not sealed, from before or with the setting off, is opened as it is.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vault import KEY_BYTES, Keyring, Tampered, UnknownKey

#: How long a process seals with one data key.
DATA_KEY_LIFE = timedelta(hours=1)
#: Data keys that are kept open: those of a month of two bridges take 100 KB.
_MOST_OPEN_KEYS = 2000

_SALT_BYTES = 32
_NONCE_BYTES = 12
#: A wrapping key encrypts once, so its nonce may be constant.
_WRAPPING_NONCE = bytes(_NONCE_BYTES)
#: What the tables ask a payload for while it is sealed: instants and sizes, no content.
_IN_CLEAR = ("send_at", "expires_at")
_PURGED = "purged"


class PayloadPurged(Exception):
    """Raised when a payload's retention has ended: the content is gone for good."""


class WrappedKey(NamedTuple):
    """A data key as it is kept: ``wrapped`` under the key of the ring that ``key_id`` names."""

    id: str
    key_id: str
    wrapped: bytes


@dataclass(frozen=True, slots=True)
class Sealer:
    """One data key, for the payloads of a batch; ``key_id`` is the data key's."""

    key_id: str
    _cipher: AESGCM = field(repr=False)

    def seal(self, incoming_email_id: str, payload: dict[str, Any]) -> str:
        """Return the payload as the column keeps it."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, orjson.dumps(payload), _bound_to(incoming_email_id))
        kept = {name: payload[name] for name in _IN_CLEAR if name in payload}
        if attachments := payload.get("attachments"):
            kept["attachments"] = [{"size": attachment["size"]} for attachment in attachments]
        return orjson.dumps({"sealed": b2a_base64(sealed, newline=False).decode(), "key": self.key_id, **kept}).decode()


class Payloads:
    """Seals and opens payloads. Safe to share between threads and to be forked.

    Args:
        keep: Stores a data key for good, before it seals anything.
        find: Returns the data key with an id, or None.
        clock: In seconds.
    """

    def __init__(
        self,
        keyring: Keyring,
        *,
        keep: Callable[[WrappedKey], None],
        find: Callable[[str], WrappedKey | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keyring = keyring
        self._keep, self._find, self._clock = keep, find, clock
        self._lock = threading.Lock()
        self._current: tuple[Sealer, float] | None = None
        self._opened: dict[str, AESGCM] = {}

    def sealer(self) -> Sealer:
        """Return what seals the next batch. Once an hour it stores a new data key, in a transaction of its own."""
        with self._lock:
            if self._current is None or self._clock() >= self._current[1]:
                self._current = self._draw(), self._clock() + DATA_KEY_LIFE.total_seconds()
            return self._current[0]

    def forget(self) -> None:
        """Draw a new data key for the next batch: this one is no longer kept, since the database has lost it."""
        with self._lock:
            self._current = None

    def open(self, incoming_email_id: str, kept: dict[str, Any]) -> dict[str, Any]:
        """Return the payload that the column has, sealed or not.

        Raises:
            UnknownKey: Its data key, or the key that this is wrapped under, is not there.
            Tampered: It is not what was sealed for this email.
            PayloadPurged: It is no longer kept.
        """
        if _PURGED in kept:
            raise PayloadPurged("its content was deleted at the end of PAYLOAD_RETENTION_DAYS")
        if "sealed" not in kept:
            return kept
        try:
            # Whatever is not base64 in it does not authenticate.
            sealed = a2b_base64(kept["sealed"])
            plain = self._cipher(kept["key"]).decrypt(
                sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _bound_to(incoming_email_id)
            )
        except (InvalidTag, ValueError, TypeError, KeyError):
            raise Tampered("the payload was altered, or belongs to another email") from None
        payload: dict[str, Any] = orjson.loads(plain)
        return payload

    def rewrap(self, key: WrappedKey) -> WrappedKey:
        """Return the data key under the ring's newest key.

        Raises:
            UnknownKey: The ring has no key ``key.key_id``.
            Tampered: It is not what was wrapped.
        """
        return self._wrap(key.id, self._unwrap(key))

    def _draw(self) -> Sealer:
        data_key, id = AESGCM.generate_key(bit_length=8 * KEY_BYTES), str(uuid.uuid4())
        self._keep(self._wrap(id, data_key))
        return Sealer(id, AESGCM(data_key))

    def _cipher(self, id: str) -> AESGCM:
        if (cipher := self._opened.get(id)) is None:
            if (found := self._find(id)) is None:
                raise UnknownKey("the payload's data key is not in payload_keys")
            cipher = AESGCM(self._unwrap(found))
            if len(self._opened) >= _MOST_OPEN_KEYS:
                self._opened = {}
            self._opened[id] = cipher
        return cipher

    def _wrap(self, id: str, data_key: bytes) -> WrappedKey:
        salt, newest_id = os.urandom(_SALT_BYTES), self.keyring.newest_id
        wrapping_key = self.keyring.wrapping_key(newest_id, salt)
        return WrappedKey(id, newest_id, salt + wrapping_key.encrypt(_WRAPPING_NONCE, data_key, _named(id)))

    def _unwrap(self, key: WrappedKey) -> bytes:
        wrapping_key = self.keyring.wrapping_key(key.key_id, key.wrapped[:_SALT_BYTES])
        try:
            return wrapping_key.decrypt(_WRAPPING_NONCE, key.wrapped[_SALT_BYTES:], _named(key.id))
        except (InvalidTag, ValueError):
            raise Tampered("a data key of payload_keys was altered, or is another's") from None


def _bound_to(incoming_email_id: str) -> bytes:
    return b"mailfleet payload 1\x00" + incoming_email_id.encode()


def _named(data_key_id: str) -> bytes:
    return b"mailfleet payload key 1\x00" + data_key_id.encode()
