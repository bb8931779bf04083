"""The store of attachments: sealed files by id, in a local folder or a cloud's bucket.

It knows nothing of what is in a file or how long that is wanted. A file may be there in part when a process has died
while it wrote: whoever writes makes a note of it first, by which it is found and deleted.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from attachments.errors import SourceGone, StoreUnavailable
from attachments.filesystems import READ_BLOCK_BYTES, WRITE_BLOCK_BYTES, Folder, demand_scheme, failures_of

_ORIGIN = "the store of attachments"
#: The file that every store has.
MARKER = ".mailfleet"
#: What shared folders say that flush names by themselves (fsync(2)).
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP)


def check_store_url(url: str) -> str:
    """Return the URL of a store.

    Raises:
        ValueError: It is neither a local folder nor in a known cloud, or its cloud's package is missing.
    """
    if "::" in url or "?" in url or "#" in url:
        raise ValueError("must be the URL of a folder, without '?', '#' or '::'")
    if local := _local_path(url):
        if not local.is_absolute():
            raise ValueError("must be an absolute path, as in file:///var/lib/mailfleet/attachments")
        return url
    demand_scheme(url)
    if not urlsplit(url).netloc:
        raise ValueError("names no bucket or container")
    return url


def _local_path(url: str) -> PurePosixPath | None:
    scheme, separator, path = url.partition("://")
    if not separator:
        return PurePosixPath(url)
    return PurePosixPath(unquote(path)) if scheme.lower() == "file" else None


@contextmanager
def _failures_of_writing() -> Iterator[None]:
    try:
        with failures_of(_ORIGIN, StoreUnavailable):
            yield
    except SourceGone:  # a folder on the way is missing, or the bucket
        raise StoreUnavailable(f"{_ORIGIN} is not there") from None


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _keep_names(folder.parent)


def _keep_names(folder: Path) -> None:
    """Have the names in a folder survive a loss of power: what was flushed of a file does not bring its name along."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as refusal:
        if refusal.errno not in _NOT_FOR_FOLDERS:
            raise
    finally:
        os.close(descriptor)


class Store:
    """Sealed files by name. Safe to share between threads; nothing is contacted before it is used."""

    def __init__(self, url: str) -> None:
        local = _local_path(url)
        self._is_local = local is not None
        self._folder = Folder(f"file://{local}" if local else url)
        self._is_marked = False

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Keep what the chunks make up; what the chunks raise leaves nothing behind.

        Raises:
            StoreUnavailable: It cannot be kept now.
        """
        with _failures_of_writing():
            filesystem, path = self._folder.at(name)
            if self._is_local:
                _make_folder(Path(path).parent)
            self._mark()
            file = filesystem.open(path, "wb", block_size=WRITE_BLOCK_BYTES, autocommit=self._is_local)
        try:
            for chunk in chunks:
                with _failures_of_writing():
                    file.write(chunk)
            with _failures_of_writing():
                self._finish(file, path)
        except BaseException:
            self._abandon(file, name)
            raise

    def _mark(self) -> None:
        """See to it that the store can be told from an empty folder in its place, as where no volume is mounted."""
        if not self._is_marked:
            filesystem, marker = self._folder.at(MARKER)
            if not filesystem.exists(marker):
                filesystem.pipe_file(marker, b"The store of attachments of mailfleet is here.\n")
            self._is_marked = True

    def _finish(self, file: Any, path: str) -> None:
        if self._is_local:
            file.flush()
            os.fsync(file.fileno())
            file.close()
            _keep_names(Path(path).parent)
        else:
            file.close()
            file.commit()

    def _abandon(self, file: Any, name: str) -> None:
        with suppress(Exception):  # what fails here is found again by the note that was made of it
            if self._is_local:
                file.close()
            else:
                file.discard()
                file.closed = True  # else its end would still make a file of what was written
        with suppress(StoreUnavailable):
            self.delete(name)

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Yield a file that can be read from anywhere.

        Raises:
            SourceGone: There is none of this name.
            StoreUnavailable: It cannot be had now; here or while reading.
        """
        with self._failures():
            filesystem, path = self._folder.at(name)
            file = filesystem.open(path, "rb", block_size=READ_BLOCK_BYTES, cache_type="readahead")
        # What fails in the block is not the store's: only its reads are.
        try:
            yield cast(BinaryIO, _Reader(file))
        finally:
            with suppress(Exception):
                file.close()

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is deleted already.

        Raises:
            StoreUnavailable: Nobody knows whether it is gone.
        """
        with suppress(SourceGone), self._failures():
            filesystem, path = self._folder.at(name)
            filesystem.rm_file(path)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Tell a file that is not there from a store that is not: a volume may not be mounted."""
        try:
            with failures_of(_ORIGIN, StoreUnavailable):
                yield
        except SourceGone:
            with failures_of(_ORIGIN, StoreUnavailable):
                filesystem, marker = self._folder.at(MARKER)
                is_there = filesystem.exists(marker)
            if not is_there:
                raise StoreUnavailable(f"{_ORIGIN} is not there: it has no file {MARKER}, which each has") from None
            raise


class _Reader:
    """A file whose reads fail as the store's do."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def seek(self, offset: int, /) -> object:
        with failures_of(_ORIGIN, StoreUnavailable):
            return self._file.seek(offset)

    def read(self, size: int, /) -> bytes:
        with failures_of(_ORIGIN, StoreUnavailable):
            return bytes(self._file.read(size))
