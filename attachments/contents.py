"""What every kind of source hands over: a content of known origin that is read once, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

#: Called before each wait for a source; what it raises ends the fetch.
Waiting = Callable[[], object]


class Content(Protocol):
    """The bytes of one attachment from ``position`` on; ``origin`` names the source without secrets."""

    origin: str
    position: int
    total_bytes: int | None
    content_type: str | None
    version: str | None

    def read(self, at_most: int) -> bytes:
        """Return what comes next, at most so many bytes; none at the end. Raises SourceUnavailable."""
        ...


class Fetcher(Protocol):
    """Finds attachments of one scheme."""

    def fetch(self, url: str, offset: int, version: str | None, waiting: Waiting) -> AbstractContextManager[Content]:
        """Return a content that begins at the offset or before it, of the same version if the source can tell."""
        ...


class PiecewiseContent:
    """A content that comes in pieces of the source's choosing."""

    def __init__(
        self,
        origin: str,
        pieces: Iterable[bytes],
        *,
        position: int,
        total_bytes: int,
        content_type: str | None = None,
        version: str | None = None,
    ) -> None:
        self.origin = origin
        self.position = position
        self.total_bytes: int | None = total_bytes
        self.content_type = content_type
        self.version = version
        self._pieces: Iterator[bytes] = iter(pieces)
        self._waiting = memoryview(b"")

    def read(self, at_most: int) -> bytes:
        if not self._waiting and at_most:
            self._waiting = memoryview(next(self._pieces, b""))
        piece, self._waiting = self._waiting[:at_most], self._waiting[at_most:]
        return bytes(piece)
