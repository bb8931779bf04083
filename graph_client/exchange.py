"""One request and its answer over a connection that stands, in HTTP/1.1.

Whoever asks knows when the first byte of the request leaves: that is what the outcome of a send hangs on (see
`graph_client.transport`). Answers are parsed by llhttp. What http.client and urllib3 do besides takes six times as long
for each exchange, and was a third of what a mail costs (docs/performance.md).
"""

from __future__ import annotations

import re
import socket
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from urllib.parse import quote

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpResponseParser
from urllib3.util.wait import wait_for_read

#: What is received at once, and so the longest piece of a body. A TLS record holds 16 KB at most.
PIECE_BYTES = 64 * 1024
#: Of an answer's head, with all that comes before it (status 1xx). Graph's have some 1 KB.
MAX_HEAD_BYTES = 64 * 1024
#: A longer body is not copied to leave together with its head.
_SENT_TOGETHER_BYTES = 64 * 1024
_END_OF_HEAD = b"\r\n\r\n"

#: What a request's target may hold as it is. Whatever else is in a URL that Graph has given is quoted.
_TARGET = re.compile(r"[!-~]+")
_TARGET_SAFE = "".join(chr(code) for code in range(ord("!"), ord("~") + 1))
#: zlib's for: either of the two compressions, as its header says.
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


class Interrupted(OSError):
    """Raised when an answer did not arrive whole, or is none."""


class Answer:
    """An answer as far as its headers; the body is read with `pieces`, or given up with `close`."""

    def __init__(self, connection: Connection, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        #: By names in lower case; what comes several times is joined by commas.
        self.headers = headers
        self._connection: Connection | None = connection

    def pieces(self) -> Iterator[bytes]:
        """Yield the body as it arrives, decompressed, in pieces of at most `PIECE_BYTES`. Its end frees the connection.

        Raises:
            OSError: The body ended early; what was yielded is not the whole.
        """
        if self._connection is not None:
            encoding = self.headers.get("content-encoding", "").lower()
            arriving = self._connection.body()
            yield from arriving if encoding in ("", "identity") else _decompressed(arriving, encoding)
            self.close()

    def close(self) -> None:
        """Let go of the answer; a connection on which some of it is still to come is closed."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.end()


class Connection:
    """A connection that stands, for one exchange after the other.

    Args:
        host: As requests are to name it, with the port if it is not the scheme's.
    """

    def __init__(self, connected: socket.socket, host: str) -> None:
        self._socket = connected
        self._host = host
        self._parsed = _Parsed()
        self._parser = HttpResponseParser(self._parsed)
        self._keeps_alive = True
        self._is_free = True
        self._idle_since = time.monotonic()
        weakref.finalize(self, connected.close)

    def is_usable(self, max_idle: timedelta) -> bool:
        """Say whether another request may be made: nothing is under way, and the server has not closed it."""
        idle = time.monotonic() - self._idle_since
        return self._is_free and idle <= max_idle.total_seconds() and not wait_for_read(self._socket, timeout=0.0)

    def head(self, method: str, target: str, headers: Mapping[str, str]) -> bytes:
        """Write the head of a request.

        Raises:
            ValueError: A header holds what cannot be sent.
        """
        if not _TARGET.fullmatch(target):
            target = quote(target, safe=_TARGET_SAFE, errors="replace")
        fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        if fields.count("\r") != len(headers) or fields.count("\n") != len(headers):
            raise ValueError("a header holds a line break")
        return f"{method} {target} HTTP/1.1\r\nHost: {self._host}\r\n{fields}\r\n".encode("latin-1")

    def ask(self, head: bytes, body: bytes | None) -> Answer:
        """Send a request and return the answer as far as its headers.

        Raises:
            OSError: The exchange failed, the request perhaps after it was read; the connection is closed.
        """
        self._is_free, self._keeps_alive = False, True
        try:
            self._send(head, body or b"")
            return Answer(self, *self._receive_head())
        except BaseException:
            self.close()
            raise

    def body(self) -> Iterator[bytes]:
        """Yield the rest of the answer as it arrives."""
        while True:
            yield from self._parsed.take()
            if self._parsed.is_complete:
                return
            if received := self._socket.recv(PIECE_BYTES):
                self._feed(received)
            elif self._parsed.has_length:
                raise Interrupted("the connection was closed within an answer")
            else:
                self._keeps_alive = False
                return

    def end(self) -> None:
        """Leave the connection to the next exchange, or close it if some of the answer is unread or it may not stay."""
        if self._keeps_alive and self._parsed.is_complete and not self._parsed.has_surplus:
            self._is_free, self._idle_since = True, time.monotonic()
        else:
            self.close()

    def retire(self) -> None:
        """Close it, at the end of its exchange if there is one under way."""
        self._keeps_alive = False
        if self._is_free:
            self.close()

    def close(self) -> None:
        self._is_free = False
        self._socket.close()

    def _send(self, head: bytes, body: bytes) -> None:
        try:
            if len(body) <= _SENT_TOGETHER_BYTES:
                self._socket.sendall(head + body)
            else:
                self._socket.sendall(head)
                self._socket.sendall(body)
        except (BrokenPipeError, ConnectionResetError):
            self._keeps_alive = False  # who has stopped reading may have said why

    def _receive_head(self) -> tuple[int, Mapping[str, str]]:
        """Return status and headers of the answer proper; what of its body came with them is kept."""
        received, budget = b"", MAX_HEAD_BYTES
        while True:
            while (end := received.find(_END_OF_HEAD)) < 0:
                if len(received) > budget:
                    raise Interrupted("an answer's head is too long")
                more = self._socket.recv(PIECE_BYTES)
                if not more:
                    raise Interrupted("the connection was closed before an answer")
                received += more
            end += len(_END_OF_HEAD)
            # No further than the head: only now does the parser know its status.
            self._parsed.begin()
            self._feed(received[:end])
            if not self._parsed.has_head:
                raise Interrupted("what came is no answer: it begins with a blank line")
            received, budget = received[end:], budget - end
            status = self._parser.get_status_code()
            if status >= 200:
                break
        self._keeps_alive = self._keeps_alive and self._may_stay_alive()
        if received:
            self._feed(received)
        return status, self._parsed.headers

    def _may_stay_alive(self) -> bool:
        connection = self._parsed.headers.get("connection", "").lower()
        return self._parser.get_http_version() == "1.1" and "close" not in connection

    def _feed(self, received: bytes) -> None:
        try:
            self._parser.feed_data(received)
        except HttpParserCallbackError as error:
            # What was thrown into the thread while it was in `_Parsed`, such as the end of an actor's time. The parser
            # goes no further, however far the answer had come.
            self._keeps_alive = False
            raise (error.__context__ or error) from None
        except (HttpParserError, HttpParserUpgrade) as error:
            if not self._parsed.is_complete:
                raise Interrupted(f"what came is no answer: {type(error).__name__}") from error
            self._parsed.has_surplus = True


class _Parsed:
    """What the parser has made of the answer that is arriving."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.has_head = False
        self.is_complete = True
        #: Whether something came after the answer that nobody had asked for.
        self.has_surplus = False
        self._pieces: list[bytes] = []

    def begin(self) -> None:
        self.headers, self.has_head, self.is_complete, self._pieces = {}, False, False, []

    @property
    def has_length(self) -> bool:
        """Whether the answer says where it ends; else it is where the connection ends."""
        return "content-length" in self.headers or "transfer-encoding" in self.headers

    def take(self) -> list[bytes]:
        """Return what has arrived of the body since the last time."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def on_message_begin(self) -> None:
        self.has_surplus = self.is_complete

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.has_head:
            self.has_surplus = True  # a trailer, which the parser may heed, or of what nobody had asked for
            return
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def on_headers_complete(self) -> None:
        self.has_head = True

    def on_body(self, piece: bytes) -> None:
        if not self.is_complete:
            self._pieces.append(piece)

    def on_message_complete(self) -> None:
        self.is_complete = True


def _decompressed(pieces: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """Yield what was compressed, which nobody had asked for: something on the way may do it all the same."""
    decompressor, is_empty = zlib.decompressobj(_GZIP_OR_ZLIB), True
    for compressed in pieces:
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise Interrupted("an answer in an encoding that was not asked for")
        left, is_empty = compressed, False
        while left:
            try:
                piece = decompressor.decompress(left, PIECE_BYTES)
            except zlib.error as error:
                raise Interrupted("an answer that cannot be decompressed") from error
            if piece:
                yield piece
            left = decompressor.unconsumed_tail
        if decompressor.unused_data:
            raise Interrupted("something follows what was compressed")
    if not (decompressor.eof or is_empty):
        raise Interrupted("the connection was closed within an answer")
