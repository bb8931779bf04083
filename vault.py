"""The vault seals a sent mail's MIME for the archive: compressed, encrypted, bound to the mail that it belongs to.

An archive outlives the database, the backups of the database and the keys of its day. So a sealed blob explains itself,
cannot be moved to another mail's row unnoticed, and changes its key without being decrypted.

The sealed blob, version 1 (sizes in bytes)::

    offset  size  field
         0     4  magic, "MFVB"            the first three are the preamble, which a blob keeps for life
         4     1  version, 1
         5     7  nonce prefix, random
        12    32  salt, random             these two are replaced when the key changes
        44    48  data key, wrapped        32 encrypted and a tag of 16
        92     …  segments                 1 MiB of gzip encrypted and a tag of 16 each; the last may be shorter

Two keys. Each blob has a random *data key* that encrypts its segments. The data key lies in the header, encrypted under
a *wrapping key*: HKDF-SHA256 of a key of the ring, with the salt and the ring key's id. A key change therefore rewrites
80 bytes. The salt makes every wrapping key serve once, so a key of the ring may seal any number of blobs; AES-GCM with
random 96-bit nonces under one key would have to stop at 2^32 (NIST SP 800-38D, section 8.3).

The segments follow STREAM (Hoang, Reyhanitabar, Rogaway, Vizár: *Online Authenticated-Encryption and its Nonce-Reuse
Misuse-Resistance*, 2015). A segment's nonce is prefix (7), number (4, big-endian, from 0), and 1 if it is the last, or
0 (1): a segment that is missing, moved, repeated or cut off decrypts under no nonce. Every encryption authenticates the
preamble and the caller's associated data, too.

All encryption is AES-256-GCM. The plain text inside is one gzip member without a time or name, so that the same mail
compresses to the same bytes.

A sealed *stream*, of a stored attachment, has the magic "MFVS" and is not compressed, so that it can be read from any
segment on: attachments are mostly compressed already, and an upload goes on in their middle. Its header is kept apart
from its segments: a key change rewrites the header alone, and whoever opens knows the size, so also the last segment's
number. Errors::

    VaultError
    ├── InvalidKeyring
    ├── UnknownKey
    └── Tampered
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from types import MappingProxyType
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

#: Plain bytes of a segment: what opening or sealing holds at a time besides the sealed blob itself.
SEGMENT_BYTES = 1024 * 1024
#: A blob's first bytes, which are all that `Vault.rewrap` reads and replaces.
HEADER_BYTES = 92
KEY_BYTES = 32
#: What rows say of how a blob was compressed before it was encrypted.
COMPRESSION = "gzip"

_MAGIC_AND_VERSION = b"MFVB\x01"
_STREAM_MAGIC_AND_VERSION = b"MFVS\x01"
_NONCE_PREFIX_BYTES = 7
_PREAMBLE_BYTES = len(_MAGIC_AND_VERSION) + _NONCE_PREFIX_BYTES
_SALT_BYTES = 32
_TAG_BYTES = 16
_SEALED_SEGMENT_BYTES = SEGMENT_BYTES + _TAG_BYTES
#: A wrapping key encrypts once, so its nonce may be constant.
_WRAPPING_NONCE = bytes(12)
#: Measured on 50 KB HTML mails: level 1 leaves 37 % at 130 MB/s, level 4 34 % at 83, level 6 32 % at 40. Of base64 of
#: compressed files, most of an archive's bytes, every level leaves 76 to 78 %, at 43 to 37 MB/s.
_GZIP_LEVEL = 1
_GZIP_CONTAINER = 16 + zlib.MAX_WBITS

#: psycopg2 returns `bytea` as a memoryview.
Blob = bytes | bytearray | memoryview


class VaultError(Exception):
    """A blob cannot be sealed or opened."""


class InvalidKeyring(VaultError, ValueError):
    """The keys given are not a keyring; ``problems`` has a sentence for each fault, none of which quotes the input."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class UnknownKey(VaultError, LookupError):
    """The key that a blob was sealed with is not in the ring: it was removed before all blobs had a newer one."""


class Tampered(VaultError):
    """The blob is not what was sealed for this mail: damaged, cut short, altered, or another mail's."""


class Keyring:
    """The keys that can open the archive; the newest seals. Neither ``repr`` nor ``str`` shows a key."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """Take keys by their ids, newest first, as `parse` reads them."""
        self._keys = MappingProxyType(dict(keys))

    @classmethod
    def parse(cls, text: str) -> Keyring:
        """Read ``id:base64`` pairs, comma-separated, newest first. White space around a pair is ignored.

        Raises:
            InvalidKeyring: At least one pair is wrong. Pairs are named by their position, because in a mistyped one
                the key may stand in the id's place.
        """
        if not text.strip():
            raise InvalidKeyring(["no key is given"])
        pairs = [_KeyPair.parse(pair.strip()) for pair in text.split(",")]
        problems = [f"key {n} {pair}" for n, pair in enumerate(pairs, start=1) if isinstance(pair, str)]
        sound = {n: pair for n, pair in enumerate(pairs, start=1) if isinstance(pair, _KeyPair)}
        if problems := problems + _repetitions(sound):
            raise InvalidKeyring(problems)
        return cls({pair.id: pair.key for pair in sound.values()})

    @property
    def ids(self) -> tuple[str, ...]:
        """The keys' ids, newest first."""
        return tuple(self._keys)

    @property
    def newest_id(self) -> str:
        return self.ids[0]

    def __repr__(self) -> str:
        return f"Keyring(ids={list(self.ids)})"

    def wrapping_key(self, key_id: str, salt: bytes) -> AESGCM:
        """Derive the key that wraps one blob's data key.

        Raises:
            UnknownKey: No key of the ring has this id.
        """
        if key_id not in self._keys:
            raise UnknownKey(f"no key with the id {key_id!r} is in the ring")
        info = b"mailfleet vault 1: wrap\x00" + key_id.encode()
        return AESGCM(HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(self._keys[key_id]))


@dataclass(frozen=True)
class _KeyPair:
    id: str
    key: bytes = field(repr=False)

    @classmethod
    def parse(cls, pair: str) -> _KeyPair | str:
        """Return the pair, or what is wrong with it."""
        key_id, colon, encoded = pair.partition(":")
        if not pair:
            return "is empty: there is a comma too many"
        if not colon:
            return "has no ':' between its id and its base64"
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", key_id):
            return "has an id that is not 1 to 64 letters, digits, '.', '_' or '-'"
        try:
            key = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            return "is not valid base64"
        return cls(key_id, key) if len(key) == KEY_BYTES else f"has {len(key)} bytes instead of {KEY_BYTES}"


def _repetitions(pairs: Mapping[int, _KeyPair]) -> list[str]:
    problems, ids, keys = [], dict[str, int](), dict[bytes, int]()
    for n, pair in pairs.items():
        if (first := ids.setdefault(pair.id, n)) != n:
            problems.append(f"key {n} has the same id as key {first}")
        if (first := keys.setdefault(pair.key, n)) != n:
            problems.append(f"key {n} is the same key as key {first}")
    return problems


@dataclass(frozen=True, slots=True)
class SealedBlob:
    """A sealed mail and what its row records. ``size_bytes`` and ``checksum`` (SHA-256, hex) are of the plain MIME."""

    ciphertext: bytes = field(repr=False)
    key_id: str
    size_bytes: int
    compressed_size_bytes: int
    checksum: str
    compression: str = COMPRESSION


@dataclass(frozen=True, slots=True)
class RewrappedBlob:
    """A blob under a newer key; size and checksum of what it holds are unchanged."""

    ciphertext: bytes = field(repr=False)
    key_id: str


@dataclass(frozen=True, slots=True)
class SealedStream:
    """A stream that is sealed while its segments are taken; the header is to be kept apart from them."""

    header: bytes = field(repr=False)
    key_id: str
    segments: Iterator[bytes] = field(repr=False)


class Seekable(Protocol):
    """A file of segments: what `Vault.open_stream` needs of it."""

    def seek(self, offset: int, /) -> object: ...

    def read(self, size: int, /) -> bytes: ...


def compressed_size_bytes(ciphertext: Blob) -> int:
    """Return how many compressed bytes a sealed blob holds, as its length tells."""
    sealed = max(0, len(ciphertext) - HEADER_BYTES)
    return sealed - -(-sealed // _SEALED_SEGMENT_BYTES) * _TAG_BYTES


def bind_to(email_id: str, graph_message_id: str) -> bytes:
    """Return the associated data that ties a blob to one email and one Graph message."""
    return _bound(email_id, graph_message_id)


def bind_to_attachment(attachment_id: str) -> bytes:
    """Return the associated data that ties a stream to one stored attachment."""
    return _bound(attachment_id)


def _bound(*parts: str) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in map(str.encode, parts))


class Vault:
    """Seals, opens and rewraps blobs. Safe to share between threads.

    ``associated_data`` is not stored: who opens must name the same mail as who sealed (see `bind_to`).
    """

    def __init__(self, keyring: Keyring) -> None:
        self.keyring = keyring

    def seal(self, chunks: Iterable[bytes], *, associated_data: bytes) -> SealedBlob:
        """Compress and encrypt the MIME that the chunks make up, under the ring's newest key.

        Beside the sealed blob about two segments are held, however long the MIME or one of its chunks is.
        """
        preamble = _MAGIC_AND_VERSION + os.urandom(_NONCE_PREFIX_BYTES)
        data_key = AESGCM.generate_key(bit_length=8 * KEY_BYTES)
        key_id = self.keyring.newest_id
        sealed = io.BytesIO()  # whose getvalue() hands over its buffer; joining pieces would hold the blob twice
        sealed.write(preamble + self._wrap(data_key, key_id, preamble, associated_data))
        plain = _Measured(chunks)
        compressed = _Measured(_gzip(plain))
        for segment in _seal_segments(compressed, _SegmentCipher(data_key, preamble, associated_data)):
            sealed.write(segment)
        return SealedBlob(sealed.getvalue(), key_id, plain.size_bytes, compressed.size_bytes, plain.checksum)

    def open(
        self, ciphertext: Blob, *, key_id: str, associated_data: bytes, checksum: str | None = None
    ) -> Iterator[bytes]:
        """Return the MIME in chunks of at most a segment.

        What is yielded is authentic, but only the iterator's end proves that it is complete: a caller that passes the
        chunks on must take them back when `Tampered` comes out of the iterator. With ``checksum``, the end compares it.

        Raises:
            UnknownKey: The ring has no such key; at once.
            Tampered: This is not what was sealed with this key for this mail; at once or on the way.
        """
        blob = memoryview(ciphertext)
        data_key = self._unwrap(blob, key_id, associated_data, _MAGIC_AND_VERSION)
        cipher = _SegmentCipher(data_key, bytes(blob[:_PREAMBLE_BYTES]), associated_data)
        return _verified(_gunzip(_open_segments(blob[HEADER_BYTES:], cipher)), checksum)

    def seal_stream(self, chunks: Iterable[bytes], *, associated_data: bytes) -> SealedStream:
        """Encrypt what the chunks make up, under the ring's newest key, holding about two segments at a time."""
        preamble = _STREAM_MAGIC_AND_VERSION + os.urandom(_NONCE_PREFIX_BYTES)
        data_key = AESGCM.generate_key(bit_length=8 * KEY_BYTES)
        key_id = self.keyring.newest_id
        header = preamble + self._wrap(data_key, key_id, preamble, associated_data)
        return SealedStream(header, key_id, _seal_segments(chunks, _SegmentCipher(data_key, preamble, associated_data)))

    def open_stream(
        self, header: Blob, file: Seekable, *, key_id: str, associated_data: bytes, size_bytes: int, offset: int = 0
    ) -> Iterator[bytes]:
        """Return the plain bytes from ``offset`` on, in chunks of at most a segment, of which one is held at a time.

        ``size_bytes`` is of the whole stream, without encryption. What is yielded is authentic and in its place.

        Raises:
            UnknownKey: The ring has no such key; at once.
            Tampered: This is not the whole of what was sealed with this key for this attachment; at once or on the way.
        """
        blob = memoryview(header)
        data_key = self._unwrap(blob, key_id, associated_data, _STREAM_MAGIC_AND_VERSION)
        cipher = _SegmentCipher(data_key, bytes(blob[:_PREAMBLE_BYTES]), associated_data)
        return _open_from(file, cipher, size_bytes, offset)

    def rewrap(self, ciphertext: Blob, *, key_id: str, associated_data: bytes) -> RewrappedBlob:
        """Return the blob, or a stream's header, under the ring's newest key; what it holds is not decrypted.

        Reads and replaces the first `HEADER_BYTES` alone: given only these, it returns only these.

        Raises:
            UnknownKey: The ring has no key ``key_id``.
            Tampered: The header is not one that was sealed with this key for this mail.
        """
        blob = memoryview(ciphertext)
        data_key = self._unwrap(blob, key_id, associated_data, _MAGIC_AND_VERSION, _STREAM_MAGIC_AND_VERSION)
        preamble = bytes(blob[:_PREAMBLE_BYTES])
        newest_id = self.keyring.newest_id
        wrapped = self._wrap(data_key, newest_id, preamble, associated_data)
        return RewrappedBlob(b"".join((preamble, wrapped, blob[HEADER_BYTES:])), newest_id)

    def _wrap(self, data_key: bytes, key_id: str, preamble: bytes, associated_data: bytes) -> bytes:
        salt = os.urandom(_SALT_BYTES)
        wrapping_key = self.keyring.wrapping_key(key_id, salt)
        return salt + wrapping_key.encrypt(_WRAPPING_NONCE, data_key, preamble + associated_data)

    def _unwrap(self, blob: memoryview, key_id: str, associated_data: bytes, *magics: bytes) -> bytes:
        header = bytes(blob[:HEADER_BYTES])
        preamble, rest = header[:_PREAMBLE_BYTES], header[_PREAMBLE_BYTES:]
        if not header.startswith(magics) or len(header) < HEADER_BYTES:
            raise Tampered("this is not a sealed blob of a known version")
        wrapping_key = self.keyring.wrapping_key(key_id, rest[:_SALT_BYTES])
        try:
            return wrapping_key.decrypt(_WRAPPING_NONCE, rest[_SALT_BYTES:], preamble + associated_data)
        except InvalidTag:
            raise Tampered("the header was altered, or the blob belongs to another mail or key") from None


class _SegmentCipher:
    """One blob's data key with what every segment of the blob authenticates."""

    def __init__(self, data_key: bytes, preamble: bytes, associated_data: bytes) -> None:
        self._cipher = AESGCM(data_key)
        self._nonce_prefix = preamble[-_NONCE_PREFIX_BYTES:]
        self._authenticated = preamble + associated_data

    def encrypt(self, segment: Blob, number: int, *, last: bool) -> bytes:
        return self._cipher.encrypt(self._nonce(number, last), segment, self._authenticated)

    def decrypt(self, segment: memoryview, number: int, *, last: bool) -> bytes:
        try:
            return self._cipher.decrypt(self._nonce(number, last), segment, self._authenticated)
        except InvalidTag:
            raise Tampered(f"segment {number} was altered or moved, or the blob was cut short") from None

    def _nonce(self, number: int, last: bool) -> bytes:
        return self._nonce_prefix + number.to_bytes(4, "big") + bytes([last])


class _Measured:
    """Passes chunks on and knows, afterwards, how many bytes they had and their SHA-256."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._digest.update(chunk)
            self.size_bytes += len(chunk)
            yield chunk

    @property
    def checksum(self) -> str:
        return self._digest.hexdigest()


def _gzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    compressor = zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP_CONTAINER)  # zlib writes no time into the gzip header
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), SEGMENT_BYTES):
            yield compressor.compress(view[start : start + SEGMENT_BYTES])
    yield compressor.flush()


def _gunzip(segments: Iterable[bytes]) -> Iterator[bytes]:
    decompressor = zlib.decompressobj(wbits=_GZIP_CONTAINER)
    for segment in segments:
        # A segment of zeros grows a thousandfold, so it is decompressed a bounded piece at a time.
        piece = decompressor.decompress(segment, SEGMENT_BYTES)
        while piece:
            yield piece
            piece = decompressor.decompress(decompressor.unconsumed_tail, SEGMENT_BYTES)


def _seal_segments(compressed: Iterable[bytes], cipher: _SegmentCipher) -> Iterator[bytes]:
    numbers, waiting = count(), bytearray()
    for piece in compressed:
        waiting += piece
        while len(waiting) > SEGMENT_BYTES:  # not >=, because the last segment, which is marked, must not be empty
            yield cipher.encrypt(waiting[:SEGMENT_BYTES], next(numbers), last=False)
            del waiting[:SEGMENT_BYTES]
    yield cipher.encrypt(waiting, next(numbers), last=True)


def _open_segments(body: memoryview, cipher: _SegmentCipher) -> Iterator[bytes]:
    starts = range(0, len(body), _SEALED_SEGMENT_BYTES)
    if not starts:
        raise Tampered("the blob ends after its header")
    for number, start in enumerate(starts):
        yield cipher.decrypt(body[start : start + _SEALED_SEGMENT_BYTES], number, last=start == starts[-1])


def _open_from(file: Seekable, cipher: _SegmentCipher, size_bytes: int, offset: int) -> Iterator[bytes]:
    last = max(size_bytes - 1, 0) // SEGMENT_BYTES
    first = min(offset // SEGMENT_BYTES, last)
    file.seek(first * _SEALED_SEGMENT_BYTES)
    for number in range(first, last + 1):
        ends_here = number == last
        wanted = min(SEGMENT_BYTES, size_bytes - number * SEGMENT_BYTES) + _TAG_BYTES
        sealed = _read(file, wanted + ends_here)  # a byte behind the end would have been added
        plain = cipher.decrypt(memoryview(sealed), number, last=ends_here)
        if piece := plain[max(0, offset - number * SEGMENT_BYTES) :]:
            yield piece


def _read(file: Seekable, size: int) -> bytes:
    """Read so much, or what is left: a file may give less at a time."""
    pieces = []
    while size and (piece := file.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _verified(chunks: Iterable[bytes], checksum: str | None) -> Iterator[bytes]:
    plain = _Measured(chunks)
    yield from plain
    if checksum is not None and plain.checksum != checksum:
        raise Tampered("the content does not have the recorded checksum")
