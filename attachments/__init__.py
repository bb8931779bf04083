"""An attachment is read as a stream from where its ``urlOrId`` points, held to what was declared and what is allowed.

Where that is: an ``https`` URL, the id of an attachment that is stored with us (`stored`), an object in a cloud's store
where an operator has listed it (`cloud`); or the file came with the mail (`inline`).

The publisher names the URL and we fetch it from inside the network, so every fetch may be a server-side request forgery
(owasp.org/www-community/attacks/Server_Side_Request_Forgery). The rules, for each redirect as for the first request:

* ``https`` alone, without a user name or password; nothing that authenticates us is ever sent.
* The host name is resolved once, every address of the answer is checked, and a checked address is connected to, while
  the certificate is still checked against the name. A name that resolves differently the next time gains nothing.
* With a list of allowed hosts only these are fetched from, wherever they are. Without it, any host on port 443 whose
  addresses are all public.

No bytes are kept. Sizes are checked before the last bytes are handed out, so that no upload is completed with a wrong
file. Errors tell whether another try may help; of a URL, which may carry a signature, they show scheme and host alone::

    AttachmentError
    ├── AttachmentRefused
    │   ├── InvalidSource
    │   ├── SourceForbidden
    │   ├── SourceGone
    │   ├── NotStored
    │   ├── Damaged
    │   ├── SizeMismatch
    │   ├── TypeMismatch
    │   └── TooLarge
    └── SourceUnavailable
        ├── SourceChanged
        └── StoreUnavailable
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from attachments.cloud import CloudFetcher, CloudPlace
from attachments.contents import Content, Fetcher, Waiting
from attachments.errors import (
    AttachmentError,
    AttachmentRefused,
    Damaged,
    InvalidSource,
    NotStored,
    SizeMismatch,
    SourceChanged,
    SourceForbidden,
    SourceGone,
    SourceUnavailable,
    StoreUnavailable,
    TooLarge,
    TypeMismatch,
)
from attachments.filesystems import CLOUD_SCHEMES
from attachments.guard import HTTPS_PORT, Guard, HostPattern, Resolve, is_public, resolve_by_system
from attachments.https import (
    MAX_REDIRECTS,
    MAX_RETRY_AFTER,
    Dial,
    HttpsFetcher,
    Timeouts,
    dial_by_system,
)
from attachments.inline import SCHEME as INLINE
from attachments.inline import InlineFetcher, source_of
from attachments.store import Store, check_store_url
from attachments.stored import StoredAttachment, StoredFetcher
from attachments.types import demand_type

__all__ = [
    "CLOUD_SCHEMES",
    "HTTPS_PORT",
    "MAX_REDIRECTS",
    "MAX_RETRY_AFTER",
    "AttachmentError",
    "AttachmentRefused",
    "AttachmentSource",
    "AttachmentStream",
    "CloudPlace",
    "Damaged",
    "Dial",
    "HostPattern",
    "InvalidSource",
    "NotStored",
    "Resolve",
    "SizeMismatch",
    "SourceChanged",
    "SourceForbidden",
    "SourceGone",
    "SourceUnavailable",
    "Store",
    "StoreUnavailable",
    "StoredAttachment",
    "Timeouts",
    "TooLarge",
    "TypeMismatch",
    "check_store_url",
    "dial_by_system",
    "is_public",
    "resolve_by_system",
    "source_of",
]


class AttachmentSource:
    """Opens attachments by URL or id. Safe to share between threads.

    ``allowed_hosts`` are `HostPattern` texts. TLS trust is that of `requests`: ``REQUESTS_CA_BUNDLE``, else certifi.
    """

    def __init__(
        self,
        allowed_hosts: Sequence[str] = (),
        *,
        max_bytes: int | None,
        stored: Callable[[str], StoredAttachment | None] | None = None,
        cloud_urls: Sequence[str] = (),
        timeouts: Timeouts | None = None,
        resolve: Resolve = resolve_by_system,
        dial: Dial = dial_by_system,
    ) -> None:
        """Without ``max_bytes`` any size is accepted, and without ``stored`` no id.

        Raises:
            ValueError: A pattern is not a host or host:port, or one of ``cloud_urls`` is not a place in a cloud.
        """
        self._max_bytes = max_bytes
        timeouts = timeouts or Timeouts()
        guard = Guard(tuple(HostPattern.parse(text) for text in allowed_hosts), resolve)
        cloud = CloudFetcher(cloud_urls, timeouts.total)
        self._by_scheme: dict[str, Fetcher] = {
            "https": HttpsFetcher(guard, dial, timeouts),
            "": StoredFetcher(stored or (lambda _id: None)),
            INLINE: InlineFetcher(),
            **dict.fromkeys(CLOUD_SCHEMES, cloud),
        }

    @contextmanager
    def open(
        self,
        url_or_id: str,
        *,
        declared_size: int | None = None,
        declared_type: str | None = None,
        offset: int = 0,
        version: str | None = None,
        waiting: Waiting = lambda: None,
    ) -> Iterator[AttachmentStream]:
        """Yield the attachment's bytes from ``offset`` on; sizes are in bytes and of the whole attachment.

        Args:
            version: That of the stream which the bytes before the offset were read from.
            waiting: Called before each wait for the source, here and while reading; what it raises ends the fetch.

        Raises:
            AttachmentRefused: It cannot be had, now or later; here or while reading.
            SourceUnavailable: It cannot be had now; here or while reading.
            SourceChanged: The source has another file than that of the version.
        """
        if self._max_bytes is not None and (declared_size or 0) > self._max_bytes:
            raise TooLarge(f"the attachment is declared with {declared_size} bytes, {self._max_bytes} are allowed")
        fetcher = self._by_scheme.get(url_or_id[: max(0, url_or_id.find(":"))].lower())
        if fetcher is None:
            raise InvalidSource("attachments are fetched from https URLs and the object stores of clouds only")
        with fetcher.fetch(url_or_id, offset, version, waiting) as answer:
            demand_type(answer.origin, answer.content_type, declared_type)
            stream = AttachmentStream(answer, declared_size=declared_size, max_bytes=self._max_bytes)
            stream.skip_to(offset)
            yield stream


class AttachmentStream:
    """The bytes of one attachment, to be read once, in order."""

    def __init__(self, answer: Content, *, declared_size: int | None, max_bytes: int | None) -> None:
        self._answer = answer
        self._max_bytes = max_bytes
        self.size_bytes = answer.total_bytes if declared_size is None else declared_size
        self.content_type = answer.content_type
        self.version = answer.version
        self._position = answer.position
        if answer.total_bytes is not None:
            self._check_length(answer.total_bytes)
            self._check_complete(answer.total_bytes)
        else:
            self._demand_end()  # of an empty file nothing is read, and what there is would go unseen

    def read(self, size_bytes: int) -> bytes:
        """Return exactly so many bytes, fewer only at the end, none after it."""
        read = bytearray()  # a source may give a byte at a time, and each would be an object
        while len(read) < size_bytes and (piece := self.receive(size_bytes - len(read))):
            read += piece
        return bytes(read)

    def chunks(self, chunk_bytes: int) -> Iterator[bytes]:
        """Yield the rest in chunks of this size; only the last may be smaller."""
        while chunk := self.read(chunk_bytes):
            yield chunk

    def skip_to(self, offset: int) -> None:
        """Discard the bytes before ``offset``, where a source could not start there by itself."""
        while self._position < offset:
            if not self.receive(offset - self._position):
                raise SizeMismatch(
                    f"{self._answer.origin} has {self._position} bytes, reading was to go on at {offset}"
                )

    def receive(self, at_most: int) -> bytes:
        """Return what comes first, at most so many bytes, none at the end; a slow source gives little at a time."""
        piece = self._answer.read(at_most)
        self._position += len(piece)
        self._check_length(self._position)
        if piece:
            self._demand_end()
        else:
            self._check_complete(self._position)
        return piece

    def _demand_end(self) -> None:
        """Where the last byte that was declared has been read, see that there is none behind it."""
        if self._position == self.size_bytes and (more := self._answer.read(1)):
            self._check_length(self._position + len(more))

    def _check_length(self, length_bytes: int) -> None:
        if self._max_bytes is not None and length_bytes > self._max_bytes:
            raise TooLarge(f"{self._answer.origin} has more than the {self._max_bytes} bytes that are allowed")
        if self.size_bytes is not None and length_bytes > self.size_bytes:
            raise SizeMismatch(f"{self._answer.origin} has more than the {self.size_bytes} bytes that were declared")

    def _check_complete(self, length_bytes: int) -> None:
        if self.size_bytes is not None and length_bytes < self.size_bytes:
            raise SizeMismatch(f"{self._answer.origin} has {length_bytes} bytes, {self.size_bytes} were declared")
