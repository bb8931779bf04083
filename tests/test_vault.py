"""What the archive relies on: a sealed mail opens to the same bytes with its key, and in no other way."""

import base64
import gzip
import hashlib
import io
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vault import (
    HEADER_BYTES,
    SEGMENT_BYTES,
    InvalidKeyring,
    Keyring,
    SealedBlob,
    SealedStream,
    Tampered,
    UnknownKey,
    Vault,
    bind_to,
    bind_to_attachment,
    compressed_size_bytes,
)

OLD_KEY = base64.b64encode(bytes(range(32))).decode()
NEW_KEY = base64.b64encode(bytes(range(32, 64))).decode()
SEALED_SEGMENT_BYTES = SEGMENT_BYTES + 16

OLD = Vault(Keyring.parse(f"2025:{OLD_KEY}"))
BOTH = Vault(Keyring.parse(f"2026:{NEW_KEY},2025:{OLD_KEY}"))
NEW = Vault(Keyring.parse(f"2026:{NEW_KEY}"))

MAIL = bind_to("6f1c1b9e-7a55-4d3c-9c9e-0a9b1f0f7a10", "AAMkAGI1")
MIME = b"Subject: quarterly figures\r\n\r\nThe figures are good.\r\n" * 20


def incompressible(size_bytes: int) -> bytes:
    return hashlib.shake_256(b"incompressible").digest(size_bytes)


def seal(mime: bytes, vault: Vault = OLD) -> SealedBlob:
    return vault.seal([mime], associated_data=MAIL)


def unseal(ciphertext: bytes, *, key_id: str = "2025", mail: bytes = MAIL, vault: Vault = OLD) -> bytes:
    return b"".join(vault.open(ciphertext, key_id=key_id, associated_data=mail))


def segments(ciphertext: bytes) -> tuple[bytes, list[bytes]]:
    """Return a blob's header and its sealed segments."""
    starts = range(HEADER_BYTES, len(ciphertext), SEALED_SEGMENT_BYTES)
    return ciphertext[:HEADER_BYTES], [ciphertext[start : start + SEALED_SEGMENT_BYTES] for start in starts]


@pytest.fixture(scope="module")
def long_blob() -> bytes:
    """A blob of three segments."""
    return seal(incompressible(2 * SEGMENT_BYTES + 5000)).ciphertext


@given(st.lists(st.binary(max_size=2000), max_size=20))
def test_what_was_sealed_opens_to_the_same_bytes(chunks: list[bytes]) -> None:
    sealed = OLD.seal(chunks, associated_data=MAIL)

    assert unseal(sealed.ciphertext) == b"".join(chunks)


@settings(max_examples=40, deadline=None)
@given(
    segment_count=st.integers(1, 3), distance=st.integers(-700, 40), chunk_bytes=st.sampled_from([65_536, 5_000_000])
)
def test_sizes_around_a_segment_border_open_to_the_same_bytes(
    segment_count: int, distance: int, chunk_bytes: int
) -> None:
    # Given a mail whose gzip, some 20 bytes and 5 per 16 KiB longer than itself, ends near a segment's border
    mime = incompressible(segment_count * SEGMENT_BYTES + distance)
    chunks = [mime[start : start + chunk_bytes] for start in range(0, len(mime), chunk_bytes)]

    sealed = OLD.seal(chunks, associated_data=MAIL)

    assert unseal(sealed.ciphertext) == mime


def test_a_gzip_that_fills_its_segments_exactly_is_sealed_without_an_empty_last_segment() -> None:
    # Given the mail whose gzip has exactly the size of a segment
    size_bytes = SEGMENT_BYTES
    while (sealed := seal(incompressible(size_bytes))).compressed_size_bytes != SEGMENT_BYTES:
        size_bytes += SEGMENT_BYTES - sealed.compressed_size_bytes

    assert len(sealed.ciphertext) == HEADER_BYTES + SEALED_SEGMENT_BYTES
    assert unseal(sealed.ciphertext) == incompressible(size_bytes)


def test_the_row_records_key_sizes_and_checksum_of_the_plain_mime() -> None:
    sealed = seal(MIME)

    assert (sealed.key_id, sealed.compression, sealed.size_bytes) == ("2025", "gzip", len(MIME))
    assert sealed.checksum == hashlib.sha256(MIME).hexdigest()
    assert len(sealed.ciphertext) == HEADER_BYTES + sealed.compressed_size_bytes + 16


def test_sealing_the_same_mail_again_gives_the_same_checksum_and_gzip_but_another_ciphertext() -> None:
    first, second = seal(MIME), seal(MIME)

    assert first.checksum == second.checksum
    assert first.compressed_size_bytes == second.compressed_size_bytes
    assert first.ciphertext[HEADER_BYTES:] != second.ciphertext[HEADER_BYTES:]
    assert first.ciphertext[:HEADER_BYTES] != second.ciphertext[:HEADER_BYTES]


def test_the_ciphertext_shows_neither_the_mail_nor_its_gzip() -> None:
    sealed = seal(MIME).ciphertext

    assert b"figures" not in sealed
    assert gzip.compress(MIME, compresslevel=1, mtime=0)[10:40] not in sealed
    assert b"\x1f\x8b\x08" not in sealed[HEADER_BYTES : HEADER_BYTES + 16]


def test_the_sealed_mail_is_not_in_the_text_that_a_log_would_show_of_it() -> None:
    sealed = seal(MIME)

    assert "ciphertext" not in repr(sealed)


def test_any_flipped_bit_of_a_blob_is_found() -> None:
    sealed = seal(b"short").ciphertext

    for position in range(len(sealed)):
        altered = bytearray(sealed)
        altered[position] ^= 1 << position % 8
        with pytest.raises(Tampered):
            unseal(bytes(altered))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_flipped_bit_in_any_segment_of_a_long_blob_is_found(long_blob: bytes, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(long_blob) - 1))
    altered = bytearray(long_blob)
    altered[position] ^= 1 << data.draw(st.integers(0, 7))

    with pytest.raises(Tampered):
        unseal(bytes(altered))


@pytest.mark.parametrize("kept", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 16])
def test_a_blob_cut_in_or_after_its_header_is_found(kept: int, long_blob: bytes) -> None:
    with pytest.raises(Tampered):
        unseal(long_blob[:kept])


@pytest.mark.parametrize("kept_segments", [1, 2])
def test_a_blob_cut_at_a_segment_border_is_found(kept_segments: int, long_blob: bytes) -> None:
    header, sealed_segments = segments(long_blob)

    with pytest.raises(Tampered):
        unseal(header + b"".join(sealed_segments[:kept_segments]))


@pytest.mark.parametrize(
    "order", [(1, 0, 2), (0, 0, 1, 2), (1, 2), (0, 2), (0, 1, 2, 2), (2,)], ids=lambda order: "-".join(map(str, order))
)
def test_segments_swapped_repeated_or_left_out_are_found(order: tuple[int, ...], long_blob: bytes) -> None:
    header, sealed_segments = segments(long_blob)

    with pytest.raises(Tampered):
        unseal(header + b"".join(sealed_segments[number] for number in order))


def test_bytes_after_the_last_segment_are_found(long_blob: bytes) -> None:
    with pytest.raises(Tampered):
        unseal(long_blob + b"more")


def test_segments_of_another_blob_are_found() -> None:
    first, second = seal(MIME).ciphertext, seal(MIME).ciphertext

    with pytest.raises(Tampered):
        unseal(first[:HEADER_BYTES] + second[HEADER_BYTES:])


@pytest.mark.parametrize("other", [b"", MAIL + b"\x00", bind_to("6f1c1b9e-7a55-4d3c-9c9e-0a9b1f0f7a10", "AAMkAGI2")])
def test_a_blob_in_another_mails_row_does_not_open(other: bytes) -> None:
    sealed = seal(MIME).ciphertext

    with pytest.raises(Tampered):
        unseal(sealed, mail=other)


def test_ids_are_bound_so_that_no_two_pairs_of_ids_are_the_same() -> None:
    assert bind_to("ab", "c") != bind_to("a", "bc")


def test_a_blob_whose_key_left_the_ring_names_the_key_at_once() -> None:
    sealed = seal(MIME).ciphertext

    with pytest.raises(UnknownKey, match="2025"):
        NEW.open(sealed, key_id="2025", associated_data=MAIL)


def test_a_blob_does_not_open_with_another_key_of_the_ring() -> None:
    sealed = seal(MIME).ciphertext

    with pytest.raises(Tampered):
        unseal(sealed, key_id="2026", vault=BOTH)


def test_the_same_key_under_another_id_does_not_open_a_blob() -> None:
    renamed = Vault(Keyring.parse(f"renamed:{OLD_KEY}"))

    with pytest.raises(Tampered):
        unseal(seal(MIME).ciphertext, key_id="renamed", vault=renamed)


def test_a_content_without_the_recorded_checksum_is_found() -> None:
    sealed = seal(MIME)
    opened = OLD.open(sealed.ciphertext, key_id="2025", associated_data=MAIL, checksum="0" * 64)

    with pytest.raises(Tampered, match="checksum"):
        b"".join(opened)


def test_a_blob_opens_from_the_memoryview_that_the_database_driver_returns() -> None:
    sealed = seal(MIME)

    opened = OLD.open(memoryview(sealed.ciphertext), key_id="2025", associated_data=MAIL, checksum=sealed.checksum)

    assert b"".join(opened) == MIME


def test_the_newest_key_seals_and_older_keys_still_open() -> None:
    before = seal(MIME).ciphertext

    assert seal(MIME, BOTH).key_id == "2026"
    assert unseal(before, vault=BOTH) == MIME


def test_rewrapping_moves_a_blob_to_the_newest_key_and_leaves_its_content_untouched(long_blob: bytes) -> None:
    # Given a blob under the old key
    # When it is rewrapped by a ring that has a newer one
    rewrapped = BOTH.rewrap(long_blob, key_id="2025", associated_data=MAIL)

    # Then the newer key opens it alone, the segments are the same, and the old blob opens with the old key as before
    assert rewrapped.key_id == "2026"
    assert rewrapped.ciphertext[HEADER_BYTES:] == long_blob[HEADER_BYTES:]
    assert unseal(rewrapped.ciphertext, key_id="2026", vault=NEW) == incompressible(2 * SEGMENT_BYTES + 5000)
    assert unseal(long_blob, vault=OLD) == incompressible(2 * SEGMENT_BYTES + 5000)
    with pytest.raises(Tampered):
        unseal(rewrapped.ciphertext, key_id="2025", vault=OLD)


def test_rewrapping_needs_the_header_alone(long_blob: bytes) -> None:
    header = BOTH.rewrap(long_blob[:HEADER_BYTES], key_id="2025", associated_data=MAIL).ciphertext

    assert len(header) == HEADER_BYTES
    assert unseal(header + long_blob[HEADER_BYTES:], key_id="2026", vault=NEW) == incompressible(
        2 * SEGMENT_BYTES + 5000
    )


def test_rewrapping_refuses_another_mails_blob_and_an_unknown_key(long_blob: bytes) -> None:
    with pytest.raises(Tampered):
        BOTH.rewrap(long_blob, key_id="2025", associated_data=b"another mail")
    with pytest.raises(UnknownKey):
        BOTH.rewrap(long_blob, key_id="2024", associated_data=MAIL)


def test_sealing_and_opening_hold_a_few_segments_however_long_the_mail() -> None:
    # Given 200 MB of MIME that compresses to next to nothing, in chunks and in one piece
    chunk = bytes(50 * SEGMENT_BYTES)

    def mime() -> Iterator[bytes]:
        for _ in range(4):
            yield chunk

    # When it is sealed and opened
    tracemalloc.start()
    sealed = OLD.seal(mime(), associated_data=MAIL)
    opened_bytes = sum(len(piece) for piece in OLD.open(sealed.ciphertext, key_id="2025", associated_data=MAIL))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    # Then memory stayed flat
    assert opened_bytes == sealed.size_bytes == 200 * SEGMENT_BYTES
    assert peak_bytes < 8 * SEGMENT_BYTES


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no key is given"),
        ("  \n", "no key is given"),
        (OLD_KEY, "key 1 has no ':'"),
        (f"2025:{OLD_KEY},", "key 2 is empty"),
        (f":{OLD_KEY}", "key 1 has an id that is not"),
        (f"two words:{OLD_KEY}", "key 1 has an id that is not"),
        (f"{'x' * 65}:{OLD_KEY}", "key 1 has an id that is not"),
        (f"{OLD_KEY}:2025", "key 1 has an id that is not"),
        ("2025:not base64!", "key 1 is not valid base64"),
        (f"2025:{OLD_KEY[:-1]}", "key 1 is not valid base64"),
        (f"2025:{base64.b64encode(bytes(16)).decode()}", "key 1 has 16 bytes instead of 32"),
        (f"2025:{base64.b64encode(bytes(33)).decode()}", "key 1 has 33 bytes instead of 32"),
        (f"2025:{OLD_KEY},2025:{NEW_KEY}", "key 2 has the same id as key 1"),
        (f"2026:{OLD_KEY},2025:{OLD_KEY}", "key 2 is the same key as key 1"),
    ],
)
def test_a_wrong_keyring_is_refused_with_its_problem_and_without_its_keys(text: str, problem: str) -> None:
    with pytest.raises(InvalidKeyring) as refusal:
        Keyring.parse(text)

    assert problem in str(refusal.value)
    assert OLD_KEY[:12] not in str(refusal.value)
    assert refusal.value.__cause__ is None


def test_every_problem_of_a_keyring_is_told_at_once() -> None:
    with pytest.raises(InvalidKeyring) as refusal:
        Keyring.parse(f"2026:short,,2025:{OLD_KEY},2025:{NEW_KEY}")

    assert [problem[:5] for problem in refusal.value.problems] == ["key 1", "key 2", "key 4"]


def test_a_keyring_read_from_a_file_may_end_in_a_newline_and_break_lines() -> None:
    keyring = Keyring.parse(f"2026:{NEW_KEY},\n  2025:{OLD_KEY}\n")

    assert (keyring.newest_id, keyring.ids) == ("2026", ("2026", "2025"))


def test_a_keyring_shows_its_ids_and_never_its_keys() -> None:
    keyring = Keyring.parse(f"2026:{NEW_KEY},2025:{OLD_KEY}")

    for text in (repr(keyring), str(keyring), f"{keyring}", repr(Vault(keyring))):
        assert NEW_KEY not in text
        assert repr(bytes(range(32)))[2:-1] not in text
    assert "2026" in repr(keyring)


def test_errors_do_not_show_key_material_or_content() -> None:
    sealed = bytearray(seal(MIME).ciphertext)
    sealed[-1] ^= 1

    with pytest.raises(Tampered) as altered:
        unseal(bytes(sealed))

    assert b"figures".decode() not in str(altered.value)
    assert str(altered.value) == "segment 0 was altered or moved, or the blob was cut short"


# Streams

ATTACHMENT = bind_to_attachment("0199c1d2-7a55-7d3c-9c9e-0a9b1f0f7a10")
LONG = incompressible(2 * SEGMENT_BYTES + 5000)


def seal_stream(plain: bytes, vault: Vault = OLD) -> tuple[SealedStream, bytes]:
    """Seal a stream that comes in odd pieces; return its header's keeper and its segments."""
    pieces = [plain[start : start + 700_001] for start in range(0, len(plain), 700_001)]
    sealed = vault.seal_stream(pieces, associated_data=ATTACHMENT)
    return sealed, b"".join(sealed.segments)


def unseal_stream(
    sealed: SealedStream,
    file: bytes,
    size_bytes: int,
    *,
    offset: int = 0,
    associated_data: bytes = ATTACHMENT,
    vault: Vault = OLD,
) -> bytes:
    return b"".join(
        vault.open_stream(
            sealed.header,
            io.BytesIO(file),
            key_id=sealed.key_id,
            associated_data=associated_data,
            size_bytes=size_bytes,
            offset=offset,
        )
    )


@pytest.mark.parametrize("size_bytes", [0, 1, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, len(LONG)])
def test_a_stream_opens_to_the_same_bytes_from_any_offset(size_bytes: int) -> None:
    plain = LONG[:size_bytes]
    sealed, file = seal_stream(plain)
    for offset in {0, 1, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, size_bytes}:
        if offset <= size_bytes:
            assert unseal_stream(sealed, file, size_bytes, offset=offset) == plain[offset:]
    assert plain[:64] not in file or not plain


class Counted(io.BytesIO):
    """A file that knows how much of it was read."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        piece = super().read(size)
        self.count += len(piece)
        return piece


def test_a_stream_that_is_opened_in_its_last_segment_is_not_read_before_it() -> None:
    sealed, file = seal_stream(LONG)
    counted = Counted(file)
    opened = OLD.open_stream(
        sealed.header,
        counted,
        key_id="2025",
        associated_data=ATTACHMENT,
        size_bytes=len(LONG),
        offset=2 * SEGMENT_BYTES,
    )
    assert b"".join(opened) == LONG[2 * SEGMENT_BYTES :]
    assert counted.count == 5000 + 16


A, B, C = (slice(number * SEALED_SEGMENT_BYTES, (number + 1) * SEALED_SEGMENT_BYTES) for number in range(3))


@pytest.mark.parametrize(
    ("change", "size_change"),
    [
        (lambda file: file[B] + file[A] + file[C], 0),
        (lambda file: file[A] + file[C], 0),
        (lambda file: file[A] + file[C], -SEGMENT_BYTES),
        (lambda file: file[A] + file[B], -5000),
        (lambda file: file[A] + file[B], 0),
        (lambda file: file[A] + file[A] + file[C], 0),
        (lambda file: file[:-1], 0),
        (lambda file: file[:-1], -1),
        (lambda file: file + b"x", 0),
        (lambda file: file + file[C], 0),
        (lambda file: file[:5] + bytes([file[5] ^ 1]) + file[6:], 0),
        (lambda _file: b"", 0),
        (lambda _file: b"", -len(LONG)),
        (lambda file: file, SEGMENT_BYTES),
    ],
    ids=[
        "swapped",
        "dropped",
        "dropped-and-told",
        "cut-and-told",
        "cut",
        "repeated",
        "short",
        "short-and-told",
        "long",
        "longer",
        "flipped",
        "gone",
        "none",
        "more",
    ],
)
def test_no_segment_of_a_stream_is_swapped_dropped_or_changed_unseen(change: Any, size_change: int) -> None:
    sealed, file = seal_stream(LONG)
    with pytest.raises(Tampered):
        unseal_stream(sealed, change(file), len(LONG) + size_change)


def test_a_stream_opens_for_its_own_attachment_and_as_a_stream_alone() -> None:
    sealed, file = seal_stream(LONG)
    with pytest.raises(Tampered):
        unseal_stream(sealed, file, len(LONG), associated_data=bind_to_attachment("another"))
    with pytest.raises(Tampered):
        OLD.open(sealed.header + file, key_id="2025", associated_data=ATTACHMENT)
    with pytest.raises(UnknownKey):
        unseal_stream(sealed, file, len(LONG), vault=NEW)


def test_a_stream_gets_a_newer_key_by_its_header_alone() -> None:
    sealed, file = seal_stream(LONG)
    newer = BOTH.rewrap(sealed.header, key_id="2025", associated_data=ATTACHMENT)
    renewed = SealedStream(newer.ciphertext, newer.key_id, iter(()))
    assert unseal_stream(renewed, file, len(LONG), vault=NEW) == LONG


def test_a_stream_of_any_length_is_sealed_and_opened_in_the_memory_of_a_few_segments(tmp_path: Path) -> None:
    piece, count = incompressible(1_000_000), 24
    path = tmp_path / "sealed"
    tracemalloc.start()
    try:
        sealed = OLD.seal_stream((piece for _ in range(count)), associated_data=ATTACHMENT)
        with path.open("wb") as file:
            file.writelines(sealed.segments)
        with path.open("rb") as file:
            opened = OLD.open_stream(
                sealed.header, file, key_id="2025", associated_data=ATTACHMENT, size_bytes=count * len(piece)
            )
            assert sum(map(len, opened)) == count * len(piece)
        assert tracemalloc.get_traced_memory()[1] < 6 * SEGMENT_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [0, 1, SEGMENT_BYTES, 3 * SEGMENT_BYTES + 5])
def test_a_blobs_length_tells_how_much_is_compressed_in_it(size: int) -> None:
    sealed = Vault(Keyring({"2025": bytes(32)})).seal([os.urandom(size)], associated_data=MAIL)
    assert compressed_size_bytes(sealed.ciphertext) == sealed.compressed_size_bytes
