"""An attachment is read as a stream from where its ``urlOrId`` points, held to what was declared and what is allowed.

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
    │   ├── SizeMismatch
    │   └── TooLarge
    └── SourceUnavailable
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import string
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import quote, urljoin, urlsplit

import idna
import requests
from requests.utils import DEFAULT_CA_BUNDLE_PATH

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

HTTPS_PORT = 443
MAX_REDIRECTS = 3
#: A Retry-After beyond this is not believed.
MAX_RETRY_AFTER = timedelta(days=1)

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRANSIENT = frozenset({408, 425, 429})
#: What one receipt may bring: above TLS's 16 KiB records, and little to allocate for a receipt that brings less.
_RECEIPT_BYTES = 64 * 1024

#: What no public host has (iana.org/assignments/iana-ipv4-special-registry and its IPv6 twin). Written out because
#: `ipaddress` counts multicast as global and had several of the others wrong before Python 3.11.10 (CVE-2024-4032).
_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's platform endpoint, reachable only from within a virtual machine
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # with Teredo and 6to4, which carry an IPv4 address
    )
)
#: All of IPv6 that is handed out. Beyond it are local and multicast addresses, and the mapped and NAT64 forms of IPv4.
_GLOBAL_UNICAST = ip_network("2000::/3")


class AttachmentError(Exception):
    """An attachment could not be read."""


class AttachmentRefused(AttachmentError):
    """Trying again will not help: the publisher or the operator has to change something."""


class InvalidSource(AttachmentRefused):
    """The ``urlOrId`` is neither a usable ``https`` URL nor the id of a stored attachment."""


class SourceForbidden(AttachmentRefused):
    """The URL, or a redirect, leads where this installation does not fetch from."""


class SourceGone(AttachmentRefused):
    """The source is there and does not hand out the attachment: 403, 404, 410 or another final answer."""


class SizeMismatch(AttachmentRefused):
    """The source has another number of bytes than the publisher declared."""


class TooLarge(AttachmentRefused):
    """The attachment is larger than this installation accepts."""


class SourceUnavailable(AttachmentError):
    """The source failed for now; ``retry_after`` is how long it asked to be left alone, if it did."""

    def __init__(self, message: str, retry_after: timedelta | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


#: Resolves a host and port to the addresses and ports to connect to, like `socket.getaddrinfo`. Raises OSError.
Resolve = Callable[[str, int], Sequence[tuple[str, int]]]
#: Opens a TCP connection to an address and port within so many seconds. Raises OSError.
Dial = Callable[[tuple[str, int], float], socket.socket]


def resolve_by_system(host: str, port: int) -> Sequence[tuple[str, int]]:
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(str(address[0]), int(address[1])) for *_, address in answers]


def dial_by_system(address: tuple[str, int], timeout_seconds: float) -> socket.socket:
    return socket.create_connection(address, timeout_seconds)


@dataclass(frozen=True)
class Timeouts:
    """How long a fetch may take; ``total`` is from look-up to last byte, including what its reader does meanwhile."""

    connect: timedelta = timedelta(seconds=5)
    read: timedelta = timedelta(seconds=30)
    total: timedelta = timedelta(minutes=10)


class AttachmentSource:
    """Opens attachments by URL or id. Safe to share between threads.

    ``allowed_hosts`` are `HostPattern` texts. TLS trust is that of `requests`: ``REQUESTS_CA_BUNDLE``, else certifi.
    """

    def __init__(
        self,
        allowed_hosts: Sequence[str] = (),
        *,
        max_bytes: int | None,
        timeouts: Timeouts | None = None,
        resolve: Resolve = resolve_by_system,
        dial: Dial = dial_by_system,
    ) -> None:
        """Without ``max_bytes`` any size is accepted. Raises ValueError when a pattern is not a host or host:port."""
        self._max_bytes = max_bytes
        timeouts = timeouts or Timeouts()
        guard = _Guard(tuple(HostPattern.parse(text) for text in allowed_hosts), resolve)
        self._by_scheme = {"https": _HttpsFetcher(guard, dial, timeouts)}

    @contextmanager
    def open(self, url_or_id: str, *, declared_size: int | None = None, offset: int = 0) -> Iterator[AttachmentStream]:
        """Yield the attachment's bytes from ``offset`` on; sizes are in bytes and of the whole attachment.

        Raises:
            AttachmentRefused: It cannot be had, now or later; here or while reading.
            SourceUnavailable: It cannot be had now; here or while reading.
        """
        if self._max_bytes is not None and (declared_size or 0) > self._max_bytes:
            raise TooLarge(f"the attachment is declared with {declared_size} bytes, {self._max_bytes} are allowed")
        scheme, separator, _ = url_or_id.partition("://")
        if not separator:
            raise InvalidSource("no attachment is stored under this id")
        fetcher = self._by_scheme.get(scheme.lower())
        if fetcher is None:
            raise InvalidSource("attachments are fetched from https URLs only")
        with fetcher.fetch(url_or_id, offset) as answer:
            stream = AttachmentStream(answer, declared_size=declared_size, max_bytes=self._max_bytes)
            stream.skip_to(offset)
            yield stream


class AttachmentStream:
    """The bytes of one attachment, to be read once, in order."""

    def __init__(self, answer: _Answer, *, declared_size: int | None, max_bytes: int | None) -> None:
        self._answer = answer
        self._max_bytes = max_bytes
        self.size_bytes = answer.total_bytes if declared_size is None else declared_size
        self.content_type = answer.content_type
        self._position = answer.position
        if answer.total_bytes is not None:
            self._check_length(answer.total_bytes)
            self._check_complete(answer.total_bytes)

    def read(self, size_bytes: int) -> bytes:
        """Return exactly so many bytes, fewer only at the end, none after it."""
        pieces: list[bytes] = []
        wanted = size_bytes
        while wanted and (piece := self._read_piece(wanted)):
            pieces.append(piece)
            wanted -= len(piece)
        return b"".join(pieces)

    def chunks(self, chunk_bytes: int) -> Iterator[bytes]:
        """Yield the rest in chunks of this size; only the last may be smaller."""
        while chunk := self.read(chunk_bytes):
            yield chunk

    def skip_to(self, offset: int) -> None:
        """Discard the bytes before ``offset``, where a source could not start there by itself."""
        while self._position < offset:
            if not self._read_piece(offset - self._position):
                raise SizeMismatch(
                    f"{self._answer.origin} has {self._position} bytes, reading was to go on at {offset}"
                )

    def _read_piece(self, at_most: int) -> bytes:
        piece = self._answer.read(at_most)
        self._position += len(piece)
        self._check_length(self._position)
        if not piece:
            self._check_complete(self._position)
        elif self._position == self.size_bytes and (more := self._answer.read(1)):
            self._check_length(self._position + len(more))
        return piece

    def _check_length(self, length_bytes: int) -> None:
        if self._max_bytes is not None and length_bytes > self._max_bytes:
            raise TooLarge(f"{self._answer.origin} has more than the {self._max_bytes} bytes that are allowed")
        if self.size_bytes is not None and length_bytes > self.size_bytes:
            raise SizeMismatch(f"{self._answer.origin} has more than the {self.size_bytes} bytes that were declared")

    def _check_complete(self, length_bytes: int) -> None:
        if self.size_bytes is not None and length_bytes < self.size_bytes:
            raise SizeMismatch(f"{self._answer.origin} has {length_bytes} bytes, {self.size_bytes} were declared")


@dataclass(frozen=True)
class HostPattern:
    """An allowed host: ``host`` (on port 443) or ``host:port``. ``*`` stands for any characters in either part.

    So ``*.example.com`` is every host under example.com but not example.com itself. An IPv6 address with a port is
    written ``[::1]:8443``.
    """

    host: str
    port: str

    @classmethod
    def parse(cls, text: str) -> HostPattern:
        """Raises ValueError when it is neither form."""
        match = re.fullmatch(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<host>[^\s:/@\[\]]+))(?::(?P<port>\d+|\*))?", text.lower())
        if match is None:
            raise ValueError(f"{text!r} is not a host or host:port")
        host = str(ip_address(match["v6"])) if match["v6"] else match["host"].rstrip(".")
        if not host.isascii():
            host = idna.encode(host, uts46=True).decode()
        return cls(host, match["port"] or str(HTTPS_PORT))

    def matches(self, host: str, port: int) -> bool:
        return _wildcard(self.host, host) and _wildcard(self.port, str(port))


def _wildcard(pattern: str, text: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), text) is not None


@dataclass(frozen=True)
class _Destination:
    """Where a URL leads: ``host`` is in lower-case ASCII without brackets, ``target`` is path and query."""

    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, url: str) -> _Destination:
        # urlsplit drops tabs and newlines silently, and some parsers read a backslash as a slash.
        if re.search(r"[\x00-\x20\x7f\\]", url):
            raise InvalidSource("the URL contains a space, a control character or a backslash")
        try:
            parts = urlsplit(url)
            port = HTTPS_PORT if parts.port is None else parts.port
            host = _ascii_host(parts.hostname or "")
        except ValueError:
            raise InvalidSource("the URL has no valid host and port") from None  # its text quotes the URL
        if parts.scheme != "https":
            raise SourceForbidden("attachments are fetched over https only, redirects included")
        if "@" in parts.netloc:
            raise InvalidSource("the URL carries a user name or password")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(host, port, quote(target, safe=string.punctuation))

    @property
    def origin(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}" if self.port == HTTPS_PORT else f"https://{host}:{self.port}"


def _ascii_host(host: str) -> str:
    """Raises ValueError when this is not a host name or address. An IPv6 zone is none: it is for local addresses."""
    if ":" in host and "%" not in host:
        return str(IPv6Address(host))
    name = host if host.isascii() else idna.encode(host, uts46=True).decode()
    name = name.lower().removesuffix(".")
    if len(name) > 253 or not re.fullmatch(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", name):
        raise ValueError
    return name


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet and has no other address inside it."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address) and ip not in _GLOBAL_UNICAST:
        return False
    return ip.is_global and not any(ip in network for network in _NOT_PUBLIC)


@dataclass(frozen=True)
class _Guard:
    """Decides which addresses may be connected to."""

    allowed: Sequence[HostPattern]
    resolve: Resolve

    def addresses(self, destination: _Destination) -> Sequence[tuple[str, int]]:
        """Return the checked addresses of a destination; whoever connects must not resolve its name again."""
        origin = destination.origin
        if self.allowed and not any(pattern.matches(destination.host, destination.port) for pattern in self.allowed):
            raise SourceForbidden(f"{origin} is not among the allowed hosts")
        if not self.allowed and destination.port != HTTPS_PORT:
            raise SourceForbidden(f"{origin} is not on port {HTTPS_PORT}, and not among the allowed hosts")
        with _unavailable_on_failure(origin):
            addresses = self.resolve(destination.host, destination.port)
        if not self.allowed and not all(is_public(address) for address, _ in addresses):
            raise SourceForbidden(f"{origin} has an address that is not public, and is not among the allowed hosts")
        return addresses


class _Deadline:
    """Gives each wait its own limit, and none beyond the end of the whole."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._ends = time.monotonic() + timeouts.total.total_seconds()

    def connect_seconds(self) -> float:
        return self._at_most(self._timeouts.connect)

    def read_seconds(self) -> float:
        return self._at_most(self._timeouts.read)

    def _at_most(self, wait: timedelta) -> float:
        left = self._ends - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, wait.total_seconds())


class _DeadlineSocket(ssl.SSLSocket):
    """Waits no longer than is left of the whole, each time: dripping, in headers too, holds nobody beyond that."""

    deadline: _Deadline

    def recv_into(self, buffer: WriteableBuffer, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(self.deadline.read_seconds())
        return super().recv_into(buffer, nbytes, flags)


class _PinnedConnection(http.client.HTTPSConnection):
    """Connects to checked addresses only, and demands a certificate for the host that the URL names."""

    def __init__(
        self, destination: _Destination, dial: Callable[[], socket.socket], deadline: _Deadline, tls: ssl.SSLContext
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


class _Answer:
    """One HTTP answer and its content, which begins at ``position`` of the attachment."""

    def __init__(self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection, origin: str) -> None:
        self._response = response
        self._connection = connection
        self._left_bytes = response.length
        self.origin = origin
        self.status = response.status
        self.content_type = response.headers.get("Content-Type")
        self.position, self.total_bytes = self._extent()

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
        with _unavailable_on_failure(self.origin):
            piece = self._response.read1(at_most)
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
        except ValueError:
            return None
        wait = (at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)
        return min(max(wait, timedelta()), MAX_RETRY_AFTER)

    def close(self) -> None:
        self._response.close()
        self._connection.close()


class _HttpsFetcher:
    def __init__(self, guard: _Guard, dial: Dial, timeouts: Timeouts) -> None:
        self._guard = guard
        self._dial = dial
        self._timeouts = timeouts
        self._tls = _trusted_by_requests()

    @contextmanager
    def fetch(self, url: str, offset: int) -> Iterator[_Answer]:
        """Yield an answer with content that begins at the offset or before it."""
        deadline = _Deadline(self._timeouts)
        answer = self._follow(url, offset, deadline)
        if offset and answer.position not in (0, offset):
            answer.close()
            answer = self._follow(url, 0, deadline)
        with closing(answer):
            answer.demand_content()
            if answer.position not in (0, offset):
                raise SourceGone(f"{answer.origin} answers with a part that was not asked for")
            yield answer

    def _follow(self, url: str, offset: int, deadline: _Deadline) -> _Answer:
        for _ in range(1 + MAX_REDIRECTS):
            answer = self._ask(_Destination.parse(url), offset, deadline)
            if answer.status not in _REDIRECTS:
                return answer
            with closing(answer):
                url = answer.redirect(url)
        raise SourceForbidden(f"{answer.origin} redirects after {MAX_REDIRECTS} redirects already")

    def _ask(self, destination: _Destination, offset: int, deadline: _Deadline) -> _Answer:
        addresses = self._guard.addresses(destination)
        headers = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "mailfleet"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        connection = _PinnedConnection(destination, lambda: self._connect(addresses, deadline), deadline, self._tls)
        with ExitStack() as on_failure, _unavailable_on_failure(destination.origin):
            on_failure.callback(connection.close)
            connection.request("GET", destination.target, headers=headers)
            answer = _Answer(connection.getresponse(), connection, destination.origin)
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


def _trusted_by_requests() -> ssl.SSLContext:
    with requests.Session() as session:
        trust = session.merge_environment_settings("https://", {}, False, None, None)["verify"]
    bundle = trust if isinstance(trust, str) else DEFAULT_CA_BUNDLE_PATH
    folder = Path(bundle).is_dir()
    context = ssl.create_default_context(cafile=None if folder else bundle, capath=bundle if folder else None)
    context.sslsocket_class = _DeadlineSocket
    context.set_alpn_protocols(["http/1.1"])
    return context


@contextmanager
def _unavailable_on_failure(origin: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError as exc:
        raise SourceUnavailable(f"{origin} has no trusted certificate for its name") from exc
    except socket.gaierror as exc:
        raise SourceUnavailable(f"{origin} has a name that does not resolve") from exc
    except TimeoutError as exc:
        raise SourceUnavailable(f"{origin} took too long") from exc
    except OSError as exc:
        raise SourceUnavailable(f"{origin} cannot be reached, or broke off ({type(exc).__name__})") from exc
    except http.client.HTTPException as exc:  # from None, because these texts quote what the source sent
        raise SourceUnavailable(f"{origin} broke off or does not speak HTTP ({type(exc).__name__})") from None
