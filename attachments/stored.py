"""Attachments that are stored with mailfleet, by their ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from attachments.contents import Content, PiecewiseContent, Waiting
from attachments.errors import Damaged, NotStored


@dataclass(frozen=True)
class StoredAttachment:
    """What is known of a stored attachment; ``sha256`` is hex. ``pieces`` opens its plain bytes from an offset on."""

    id: str
    size_bytes: int
    sha256: str
    pieces: Callable[[int], AbstractContextManager[Iterable[bytes]]]


class StoredFetcher:
    """Opens stored attachments, which ``find`` looks up; None: there is none of this id."""

    def __init__(self, find: Callable[[str], StoredAttachment | None]) -> None:
        self._find = find

    @contextmanager
    def fetch(self, id: str, offset: int, _version: str | None, _waiting: Waiting) -> Iterator[Content]:
        """Yield the content from the offset on.

        Raises:
            NotStored: There is no such attachment, or none any more.
            Damaged, StoreUnavailable: Here or while reading.
        """
        stored = self._find(id)
        if stored is None:
            raise NotStored(
                "no attachment is stored under the id that urlOrId names: it has expired, was deleted when its mails"
                " were done, or was never stored here"
            )
        with stored.pieces(offset) as pieces:
            yield PiecewiseContent(
                f"the stored attachment {stored.id}",
                pieces if offset else _verified(pieces, stored),
                position=offset,
                total_bytes=stored.size_bytes,
                # No type: whoever stored it and whoever publishes it are one side, and the mail's is what counts.
                version=stored.sha256,
            )


def _verified(pieces: Iterable[bytes], stored: StoredAttachment) -> Iterator[bytes]:
    """Pass the pieces on, the last of them only once the checksum of the whole is right."""
    digest, left_bytes = hashlib.sha256(), stored.size_bytes
    for piece in pieces:
        digest.update(piece)
        left_bytes -= len(piece)
        if left_bytes <= 0:
            _demand(digest.hexdigest() == stored.sha256, stored)
        yield piece
    _demand(left_bytes == 0 and digest.hexdigest() == stored.sha256, stored)


def _demand(is_whole: bool, stored: StoredAttachment) -> None:
    if not is_whole:
        raise Damaged(f"the stored attachment {stored.id} is not what was stored: its checksum differs")
