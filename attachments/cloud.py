"""Attachments in the cloud's object stores, from the places alone that an operator has listed.

The publisher's URL chooses an object below a listed prefix and nothing else: the file system is made from the
operator's prefix, with the operator's credentials, and never from what a publisher wrote. A name that could be read as
leading out of the prefix is refused rather than understood.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import unquote

from attachments.contents import Content, PiecewiseContent, Waiting
from attachments.errors import InvalidSource, SourceChanged, SourceForbidden, SourceGone, SourceUnavailable
from attachments.filesystems import READ_BLOCK_BYTES, Folder, demand_scheme, failures_of

#: How much is read at a time.
_PIECE_BYTES = 1024 * 1024
#: What some part on the way may understand otherwise than as a letter of a name.
_AMBIGUOUS = re.compile(r"[\x00-\x20\x7f\\?#*\[\]]|::")


@dataclass(frozen=True)
class CloudPlace:
    """A bucket or container, or what is below a path in it: ``names`` is the path, the bucket first."""

    scheme: str
    names: tuple[str, ...]

    @classmethod
    def parse(cls, url: str) -> CloudPlace:
        """Read a prefix of ``ATTACHMENT_CLOUD_URLS``.

        Raises:
            ValueError: It is none, or its cloud's package is missing.
        """
        scheme = demand_scheme(url)
        try:
            return cls(scheme, _names(url.removesuffix("/")))
        except InvalidSource as invalid:
            raise ValueError(f"a prefix is not usable: {invalid}") from None

    @property
    def url(self) -> str:
        return f"{self.scheme}://{'/'.join(self.names)}"

    def below(self, scheme: str, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return how an object is called from here; nothing if it is elsewhere."""
        inside = scheme == self.scheme and names[: len(self.names)] == self.names
        return names[len(self.names) :] if inside else ()


def _names(url: str) -> tuple[str, ...]:
    """Return a URL's bucket and path.

    Raises:
        InvalidSource: A part of it is empty, leads elsewhere, or could be read in two ways.
    """
    path = url.partition("://")[2]
    names = tuple(path.split("/"))
    if _AMBIGUOUS.search(path) or not all(names):
        raise InvalidSource("the URL has an empty part or a character that object stores do not agree on")
    if any(unquote(name) in (".", "..") or "/" in unquote(name) for name in names):
        raise InvalidSource("the URL has a part that leads to another folder")
    return names


class CloudFetcher:
    """Opens objects below the listed places; ``total`` is how long each may take, its reader's work included."""

    def __init__(self, prefixes: Sequence[str], total: timedelta) -> None:
        """Raises ValueError when a prefix is none (see `CloudPlace.parse`)."""
        places = [CloudPlace.parse(prefix) for prefix in prefixes]
        self._folders = {place: Folder(place.url) for place in places}
        self._total = total

    @contextmanager
    def fetch(self, url: str, offset: int, version: str | None, waiting: Waiting) -> Iterator[Content]:
        """Yield the object from the offset on.

        Raises:
            SourceForbidden: It is below no listed place.
            InvalidSource, SourceGone, SourceUnavailable, SourceChanged: See there.
        """
        scheme, names = url.partition("://")[0].lower(), _names(url)
        origin = f"{scheme}://{names[0].rpartition('@')[2]}"
        filesystem, path = self._find(origin, scheme, names)
        ends_at = time.monotonic() + self._total.total_seconds()
        with ExitStack() as stack:
            with failures_of(origin):
                file = _opened(filesystem, path)
                stack.callback(_close, file)
                if file.details.get("type") != "file":
                    raise SourceGone(f"{origin} has a folder there, no file")
                found = _version(file.details)
                if version and found and version != found:
                    raise SourceChanged(f"{origin} has changed the attachment since its first bytes were read")
                file.seek(offset)

            def look() -> None:
                if found and _version(filesystem.info(path)) != found:
                    raise SourceChanged(f"{origin} has changed the attachment while it was read")

            # What fails in the block is not the cloud's: only its reads are.
            pieces = _pieces(file, origin, ends_at, look, waiting)
            yield PiecewiseContent(origin, pieces, position=offset, total_bytes=file.size, version=found)

    def _find(self, origin: str, scheme: str, names: tuple[str, ...]) -> tuple[Any, str]:
        for place, folder in self._folders.items():
            if inside := place.below(scheme, names):
                with failures_of(origin):
                    return folder.at(*inside)
        raise SourceForbidden(f"{origin}, or that part of it, is not listed in ATTACHMENT_CLOUD_URLS")


def _opened(filesystem: Any, path: str) -> Any:
    try:
        return filesystem.open(path, "rb", block_size=READ_BLOCK_BYTES, cache_type="readahead")
    except OSError as error:
        # S3's answer to HEAD has no body, and so does not say who or what is refused; its answer to GET does.
        if isinstance(error, PermissionError) or error.errno == errno.EINVAL:
            filesystem.cat_file(path, start=0, end=1)
        raise


def _close(file: Any) -> None:
    with suppress(Exception):
        file.close()


def _version(details: Mapping[str, Any]) -> str | None:
    return details.get("ETag") or details.get("etag")


def _pieces(file: Any, origin: str, ends_at: float, look: Callable[[], None], waiting: Waiting) -> Iterator[bytes]:
    """Yield the rest of the file; ``look`` is asked before the last of it whether it was the same file all the time.

    S3's client makes the version a condition of each read, Azure's does not, and mixes the two.
    """
    while True:
        if time.monotonic() > ends_at:
            raise SourceUnavailable(f"{origin} took too long")
        waiting()
        with failures_of(origin):
            piece = file.read(_PIECE_BYTES)
            if piece and file.tell() >= file.size:
                look()
        if not piece:
            return
        yield piece
