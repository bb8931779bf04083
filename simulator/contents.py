"""Bodies and attachments: small ones in memory, all others on disk with only their digest in memory.

A simulated mailbox can hold many attachments of 150 MB, and a benchmark sends hundreds of thousands of mails.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: What is no longer than this stays in memory.
IN_MEMORY_BYTES = 2048

CHUNK_BYTES = 57 * 4096  # a multiple of 57, so that chunks can be turned into base64 lines one by one


@dataclass(frozen=True, slots=True)
class Content:
    """Immutable bytes, wherever they are kept."""

    sha256: str
    size_bytes: int
    in_memory: bytes | None
    path: Path | None = None
    offset: int = 0

    def chunks(self) -> Iterator[bytes]:
        if self.in_memory is not None:
            yield self.in_memory
            return
        assert self.path is not None
        with self.path.open("rb") as file:
            file.seek(self.offset)
            left = self.size_bytes
            while left and (chunk := file.read(min(CHUNK_BYTES, left))):
                left -= len(chunk)
                yield chunk

    def read(self) -> bytes:
        return b"".join(self.chunks())


class Spool:
    """A file that grows chunk by chunk and becomes a Content at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self.size_bytes = 0
        path.touch()

    def append(self, chunk: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(chunk)
        self._digest.update(chunk)
        self.size_bytes += len(chunk)

    def finish(self) -> Content:
        return Content(self._digest.hexdigest(), self.size_bytes, None, self._path)

    def discard(self) -> None:
        self._path.unlink(missing_ok=True)


class ContentStore:
    """Keeps contents below a folder of its own, which is emptied first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spools = 0
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._shared = self._folder / "contents"
        self._shared.touch()
        self._end = 0

    def put(self, data: bytes) -> Content:
        digest = hashlib.sha256(data).hexdigest()
        if len(data) <= IN_MEMORY_BYTES:
            return Content(digest, len(data), data)
        with self._shared.open("ab") as file:
            file.write(data)
        content = Content(digest, len(data), None, self._shared, self._end)
        self._end += len(data)
        return content

    def spool(self) -> Spool:
        self._spools += 1
        return Spool(self._folder / f"upload-{self._spools}")
