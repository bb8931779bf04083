"""Payloads at rest: sealed for one email, opened for it alone, and moved to another key without being touched."""

from __future__ import annotations

import base64

import orjson
import pytest
from support import send_email

from payloads import DATA_KEY_LIFE, PayloadPurged, Payloads, WrappedKey
from vault import Keyring, Tampered, UnknownKey

OLD, NEW = bytes(range(32)), bytes(range(32, 64))
ID, OTHER = "0190a000-0000-7000-8000-000000000001", "0190a000-0000-7000-8000-000000000002"
EMAIL = send_email(
    send_at="2030-01-01T00:00:00Z",
    attachments=[
        {"name": "salary.pdf", "size": 12, "contentType": "application/pdf", "urlOrId": "https://x.example/s"}
    ],
)


class Kept:
    """Where data keys are kept, and a clock."""

    def __init__(self) -> None:
        self.keys: dict[str, WrappedKey] = {}
        self.seconds = 0.0

    def payloads(self, **keys: bytes) -> Payloads:
        """What a process with this ring, newest first, seals and opens with."""
        return Payloads(Keyring(keys), keep=self.keep, find=self.keys.get, clock=lambda: self.seconds)

    def keep(self, key: WrappedKey) -> None:
        self.keys[key.id] = key


@pytest.fixture
def kept() -> Kept:
    return Kept()


def seal(payloads: Payloads, id: str = ID) -> dict[str, object]:
    stored: dict[str, object] = orjson.loads(payloads.sealer().seal(id, EMAIL))
    return stored


def test_what_is_kept_shows_no_content_but_what_the_tables_count(kept: Kept) -> None:
    stored = seal(kept.payloads(old=OLD))
    assert stored.keys() == {"sealed", "key", "send_at", "attachments"}
    assert (stored["send_at"], stored["attachments"]) == (EMAIL["send_at"], [{"size": 12}])
    sealed = base64.b64decode(str(stored["sealed"]))
    assert not any(word in sealed for word in (b"salary", b"bob@", b"order", b"Thank"))


def test_a_payload_opens_in_any_process_with_the_ring(kept: Kept) -> None:
    stored = seal(kept.payloads(old=OLD))
    assert kept.payloads(new=NEW, old=OLD).open(ID, stored) == EMAIL


def test_a_payload_of_another_email_or_one_that_was_altered_does_not_open(kept: Kept) -> None:
    payloads = kept.payloads(old=OLD)
    stored = seal(payloads)
    with pytest.raises(Tampered):
        payloads.open(OTHER, stored)
    altered = bytearray(base64.b64decode(str(stored["sealed"])))
    altered[20] ^= 1
    for sealed in (base64.b64encode(altered).decode(), "no base64", "", None):
        with pytest.raises(Tampered):
            payloads.open(ID, {**stored, "sealed": sealed})


def test_what_was_never_sealed_opens_as_it_is_and_what_was_purged_says_so(kept: Kept) -> None:
    payloads = kept.payloads(old=OLD)
    assert payloads.open(ID, EMAIL) == EMAIL
    with pytest.raises(PayloadPurged):
        payloads.open(ID, {"purged": True})


def test_the_same_payload_is_never_sealed_to_the_same_bytes(kept: Kept) -> None:
    payloads = kept.payloads(old=OLD)
    assert len({str(seal(payloads)["sealed"]) for _ in range(100)}) == 100


def test_a_data_key_serves_for_an_hour_and_is_kept_before_it_seals(kept: Kept) -> None:
    payloads = kept.payloads(old=OLD)
    first = payloads.sealer().key_id
    assert list(kept.keys) == [first]
    kept.seconds = DATA_KEY_LIFE.total_seconds() - 1
    assert payloads.sealer().key_id == first
    kept.seconds += 1
    second = payloads.sealer().key_id
    assert list(kept.keys) == [first, second]


def test_no_data_key_seals_that_could_not_be_kept(kept: Kept) -> None:
    def fail(_key: WrappedKey) -> None:
        raise ConnectionError

    payloads = Payloads(Keyring({"old": OLD}), keep=fail, find=kept.keys.get)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            payloads.sealer()


def test_rewrapped_data_keys_open_the_payloads_without_the_old_key(kept: Kept) -> None:
    # Given
    stored = seal(kept.payloads(old=OLD))
    # When
    (key,) = kept.keys.values()
    kept.keep(kept.payloads(new=NEW, old=OLD).rewrap(key))
    # Then
    assert kept.payloads(new=NEW).open(ID, stored) == EMAIL
    with pytest.raises(UnknownKey):
        kept.payloads(old=OLD).open(ID, stored)


def test_a_data_key_that_is_missing_or_was_exchanged_for_another_opens_nothing(kept: Kept) -> None:
    stored = seal(kept.payloads(old=OLD))
    other = kept.payloads(old=OLD).sealer().key_id
    kept.keys[str(stored["key"])] = kept.keys[other]._replace(id=str(stored["key"]))
    with pytest.raises(Tampered):
        kept.payloads(old=OLD).open(ID, stored)
    del kept.keys[str(stored["key"])]
    with pytest.raises(UnknownKey):
        kept.payloads(old=OLD).open(ID, stored)


def test_neither_a_sealer_nor_payloads_show_a_key(kept: Kept) -> None:
    payloads = kept.payloads(old=OLD)
    assert repr(OLD)[2:-1] not in repr(payloads.sealer()) + repr(payloads) + repr(payloads.keyring)
