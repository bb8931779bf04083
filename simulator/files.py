"""Files of any size to attach: pseudo-random bytes that follow from a seed, so that anyone can compute them again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

BLOCK_BYTES = 64 * 1024


def chunks(seed: str | int, size_bytes: int, start: int = 0) -> Iterator[bytes]:
    """Yield the bytes of the file ``seed`` from ``start`` up to ``size_bytes``, at most 64 KiB at a time."""
    while start < size_bytes:
        number, skip = divmod(start, BLOCK_BYTES)
        block = hashlib.shake_128(f"{seed}:{number}".encode()).digest(BLOCK_BYTES)
        chunk = block[skip : skip + size_bytes - start]
        yield chunk
        start += len(chunk)


def content(seed: str | int, size_bytes: int) -> bytes:
    return b"".join(chunks(seed, size_bytes))


def sha256(seed: str | int, size_bytes: int) -> str:
    """Return the hexadecimal digest of the whole file, computed without holding it in memory."""
    digest = hashlib.sha256()
    for chunk in chunks(seed, size_bytes):
        digest.update(chunk)
    return digest.hexdigest()
