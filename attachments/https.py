"""One attachment is asked for over HTTPS: redirects are followed, every connection is guarded, every wait is limited.

The connection is ours rather than `requests`', which resolves a name again when it connects and limits only each wait.
"""

from __future__ import annotations

import http.client
import math
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import urljoin

import requests
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from attachments.contents import Waiting
from attachments.errors import (
    InvalidSource,
    SizeMismatch,
    SourceChanged,
    SourceForbidden,
    SourceGone,
    SourceUnavailable,
    unavailable_on_failure,
)
from attachments.guard import Destination, Guard

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_REDIRECTS = 3
#: A Retry-After beyond this is not believed.
MAX_RETRY_AFTER = timedelta(days=1)

#: An ETag, or a date: what may be kept in a table.
_VERSION = re.compile(r'(?:W/)?"[\x21\x23-\x7e]{1,200}"|[A-Z][a-z]{2}, [A-Za-z0-9 :]{1,40}')
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRANSIENT = frozenset({408, 425, 429})
#: What one receipt may bring: above TLS's 16 KiB records, and little to allocate for a receipt that brings less.
_RECEIPT_BYTES = 64 * 1024

#: Opens a TCP connection to an address and port within so many seconds. Raises OSError.
Dial = Callable[[tuple[str, int], float], socket.socket]


def dial_by_system(address: tuple[str, int], timeout_seconds: float) -> socket.socket:
    return socket.create_connection(address, timeout_seconds)


@dataclass(frozen=True)
class Timeouts:
    """How long a fetch may take.

    Args:
        connect: For a connection, and for TLS on it.
        read: For each silence.
        slack: From a request until its content begins; and for the content, besides what its bytes are given.
        total: From look-up to last byte, including what its reader does meanwhile.
        least_bytes_per_second: Of the content; what its reader does meanwhile is not counted. A thread is as busy with
            a source that drips as with one that flows.
    """

    connect: timedelta = timedelta(seconds=5)
    read: timedelta = timedelta(seconds=30)
    slack: timedelta = timedelta(seconds=60)
    total: timedelta = timedelta(minutes=10)
    least_bytes_per_second: int = 16 * 1024


class _Deadline:
    """Gives each wait its own limit, and none beyond the end of the whole; tells of each wait before it begins."""

    def __init__(self, timeouts: Timeouts, waiting: Waiting) -> None:
        self._timeouts = timeouts
        self._waiting = waiting
        self._ends = time.monotonic() + timeouts.total.total_seconds()
        self._answer_by = math.inf
        self._patience = timeouts.slack.total_seconds()

    def expect_answer(self) -> None:
        self._answer_by = time.monotonic() + self._timeouts.slack.total_seconds()

    def expect_content(self) -> None:
        self._answer_by, self._patience = math.inf, self._timeouts.slack.total_seconds()

    def earn(self, size_bytes: int) -> None:
        """Count bytes of content that have come: they are waited for longer."""
        self._patience += size_bytes / self._timeouts.least_bytes_per_second

    @contextmanager
    def receiving(self) -> Iterator[float]:
        """Yield how many seconds to wait for bytes at most, and count how long that takes."""
        self._waiting()
        began = time.monotonic()
        seconds = min(self._at_most(self._timeouts.read), self._answer_by - began, self._patience)
        if seconds <= 0:
            raise TimeoutError
        try:
            yield seconds
        finally:
            self._patience -= time.monotonic() - began

    def connect_seconds(self) -> float:
        self._waiting()
        return self._at_most(self._timeouts.connect)

    def _at_most(self, wait: timedelta) -> float:
        left = self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, wait.total_seconds())


class _DeadlineSocket(ssl.SSLSocket):
    """Waits no longer than is left of the whole, each time: dripping, in headers too, holds nobody beyond that."""

    deadline: _Deadline

    def recv_into(self, buffer: WriteableBuffer, nbytes: int | None = None, flags: int = 0) -> int:
        with self.deadline.receiving() as seconds:
            self.settimeout(seconds)
            return super().recv_into(buffer, nbytes, flags)


class _PinnedConnection(http.client.HTTPSConnection):
    """Connects to checked addresses only, and demands a certificate for the host that the URL names."""

    def __init__(
        self, destination: Destination, dial: Callable[[], socket.socket], deadline: _Deadline, tls: ssl.SSLContext
    ) -> None:
        super().__init__(destination.host, destination.port, context=tls)
        self._dial = dial
        self._deadline = deadline
        self._tls = tls

    def connect(self) -> None:
        plain = self._dial()
        try:
            plain.settimeout(self._deadline.connect_seconds())
            # An end without TLS's goodbye may be an attacker's: without Content-Length it would pass for the end.
            tls = self._tls.wrap_socket(plain, server_hostname=self.host, suppress_ragged_eofs=False)
        except BaseException:
            plain.close()
            raise
        self.sock = cast(_DeadlineSocket, tls)  # the class that _trusted_by_requests told the context to make
        self.sock.deadline = self._deadline


class Answer:
    """One HTTP answer and its content, which begins at ``position`` of the attachment."""

    def __init__(
        self,
        response: http.client.HTTPResponse,
        connection: http.client.HTTPConnection,
        origin: str,
        deadline: _Deadline,
    ) -> None:
        self._response = response
        self._connection = connection
        self._deadline = deadline
        self._left_bytes = response.length
        self.origin = origin
        self.status = response.status
        self.content_type = response.headers.get("Content-Type")
        self.version = self._version()
        self.position, self.total_bytes = self._extent()

    def _version(self) -> str | None:
        """Return what tells this file from a later one at the same URL; None if the source does not say.

        A weak ETag comes last, since it is no condition for a range.
        """
        given = (self._response.headers.get(name, "") for name in ("ETag", "Last-Modified"))
        return min((text for text in given if _VERSION.fullmatch(text)), key=_is_weak, default=None)

    def _extent(self) -> tuple[int, int | None]:
        """Return where the content begins and how long the whole is; a range that ends early has position -1."""
        if self.status != http.client.PARTIAL_CONTENT:
            return 0, self._response.length
        match = re.fullmatch(
            r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", self._response.headers.get("Content-Range", "")
        )
        if match is None:
            return -1, None
        first, last, total = int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])
        return (first if total in (None, last + 1) else -1), total

    def read(self, at_most: int) -> bytes:
        """Return what has arrived of the next bytes, or wait for some; none at the end.

        Raises:
            SourceUnavailable: The content broke off or took too long.
        """
        # HTTPResponse.read1 does not count down Content-Length before Python 3.12, and reads beyond it.
        at_most = min(at_most, _RECEIPT_BYTES, at_most if self._left_bytes is None else self._left_bytes)
        if not at_most:
            return b""
        with unavailable_on_failure(self.origin):
            piece = self._response.read1(at_most)
        self._deadline.earn(len(piece))
        if self._left_bytes is not None:
            if not piece:
                raise SourceUnavailable(f"{self.origin} broke off {self._left_bytes} bytes before the end")
            self._left_bytes -= len(piece)
        return piece

    def redirect(self, url: str) -> str:
        """Return the URL that the answer to this one redirects to."""
        location = self._response.headers.get("Location")
        if not location:
            raise InvalidSource(f"{self.origin} redirects without saying where")
        try:
            return urljoin(url, location.encode("latin-1").decode())
        except ValueError:
            raise InvalidSource(f"{self.origin} redirects to what is not a URL") from None

    def demand_content(self) -> None:
        """Raise what an answer without the attachment's plain bytes means."""
        if self.status in _TRANSIENT or self.status >= http.client.INTERNAL_SERVER_ERROR:
            raise SourceUnavailable(f"{self.origin} answered {self.status}", self._retry_after())
        if self.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise SizeMismatch(f"{self.origin} has fewer bytes than were read before")
        if self.status not in (http.client.OK, http.client.PARTIAL_CONTENT):
            raise SourceGone(f"{self.origin} does not hand out the attachment: it answered {self.status}")
        if self._response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise SourceGone(f"{self.origin} hands out the attachment only encoded, as by compression")

    def _retry_after(self) -> timedelta | None:
        text = self._response.headers.get("Retry-After", "").strip()
        if re.fullmatch(r"\d{1,9}(\.\d*)?", text):
            return min(timedelta(seconds=float(text)), MAX_RETRY_AFTER)
        try:
            at = parsedate_to_datetime(text)
        except (ValueError, OverflowError):
            return None
        wait = (at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)
        return min(max(wait, timedelta()), MAX_RETRY_AFTER)

    def close(self) -> None:
        self._response.close()
        self._connection.close()


class HttpsFetcher:
    def __init__(self, guard: Guard, dial: Dial, timeouts: Timeouts) -> None:
        self._guard = guard
        self._dial = dial
        self._timeouts = timeouts
        self._tls = _trusted_by_requests()

    @contextmanager
    def fetch(self, url: str, offset: int, version: str | None, waiting: Waiting) -> Iterator[Answer]:
        """Yield an answer with content that begins at the offset or before it.

        Raises:
            SourceChanged: The source says that it is another file than that of the version.
        """
        deadline = _Deadline(self._timeouts, waiting)
        answer = self._follow(url, _part(offset, version), deadline)
        if offset and answer.position not in (0, offset):
            answer.close()
            answer = self._follow(url, {}, deadline)
        with closing(answer):
            answer.demand_content()
            if version and answer.version and answer.version != version:
                raise SourceChanged(f"{answer.origin} has changed the attachment since its first bytes were read")
            if answer.position not in (0, offset):
                raise SourceGone(f"{answer.origin} answers with a part that was not asked for")
            yield answer

    def _follow(self, url: str, part: dict[str, str], deadline: _Deadline) -> Answer:
        for _ in range(1 + MAX_REDIRECTS):
            answer = self._ask(Destination.parse(url), part, deadline)
            if answer.status not in _REDIRECTS:
                return answer
            with closing(answer):
                url = answer.redirect(url)
        raise SourceForbidden(f"{answer.origin} redirects after {MAX_REDIRECTS} redirects already")

    def _ask(self, destination: Destination, part: dict[str, str], deadline: _Deadline) -> Answer:
        addresses = self._guard.addresses(destination)
        headers = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "mailfleet", **part}
        connection = _PinnedConnection(destination, lambda: self._connect(addresses, deadline), deadline, self._tls)
        with ExitStack() as on_failure, unavailable_on_failure(destination.origin):
            on_failure.callback(connection.close)
            connection.request("GET", destination.target, headers=headers)
            deadline.expect_answer()
            answer = Answer(connection.getresponse(), connection, destination.origin, deadline)
            deadline.expect_content()
            on_failure.pop_all()
        return answer

    def _connect(self, addresses: Sequence[tuple[str, int]], deadline: _Deadline) -> socket.socket:
        failure = OSError("the name has no address")
        for address in addresses:
            try:
                return self._dial(address, deadline.connect_seconds())
            except OSError as exc:
                failure = exc
        raise failure


def _is_weak(version: str) -> bool:
    return version.startswith("W/")


def _part(offset: int, version: str | None) -> dict[str, str]:
    """Return the headers that ask for the rest from the offset on, and for the whole if it is another file by now.

    A weak ETag is no condition (RFC 9110, 13.1.5): it is compared with that of the answer.
    """
    if not offset:
        return {}
    return {"Range": f"bytes={offset}-", **({"If-Range": version} if version and not _is_weak(version) else {})}


#: OpenSSL's SSL_OP_IGNORE_UNEXPECTED_EOF; not every Python has a name for it.
_IGNORE_UNEXPECTED_EOF = 0x80


def _trusted_by_requests() -> ssl.SSLContext:
    with requests.Session() as session:
        trust = session.merge_environment_settings("https://", {}, False, None, None)["verify"]
    bundle = trust if isinstance(trust, str) else DEFAULT_CA_BUNDLE_PATH
    folder = Path(bundle).is_dir()
    context = ssl.create_default_context(cafile=None if folder else bundle, capath=bundle if folder else None)
    # Some Pythons take a connection that was cut for one that was closed; a file would end early and nobody would know.
    context.options &= ~_IGNORE_UNEXPECTED_EOF
    context.sslsocket_class = _DeadlineSocket
    context.set_alpn_protocols(["http/1.1"])
    return context
