"""Carries a request to Graph and tells two failures apart: the request never left, and the request left and was lost.

The difference decides whether a mail may be sent again, and neither requests nor urllib3 tells it reliably: a
timeout in the TLS handshake is reported as a read timeout, and a broken record while reading as a TLS error. So it is
noted when a request begins to be written.

Connections are made by urllib3, by requests' rules: ``REQUESTS_CA_BUNDLE``, ``HTTPS_PROXY`` and ``NO_PROXY`` count as
they are when a host is first talked to. What goes over them is `graph_client.exchange`'s. (msal wants a session of
requests': `new_session`.) There is no retry and no redirect at this level.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from graph_client import errors
from graph_client.exchange import Answer, Connection

#: A connection idle for longer is not used again. Whoever closes first risks that a request meets the closing,
#: which for a send costs a look into the mailbox; load balancers and proxies commonly close at 60 seconds or later.
MAX_IDLE = timedelta(seconds=50)

#: A thread talks to Graph and to a few hosts that take uploads.
_MOST_HOSTS = 16
_PORTS = {"http": 80, "https": 443}
#: Scheme, host and port of a URL (RFC 3986, section 3): each call has another URL, so it is not read any further. All
#: who read it must take the same host from it, so there is no user in it and nothing that is read in two ways.
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)(://[a-z0-9._~:%\[\]-]*)(?=[/?#]|\Z)", re.ASCII | re.IGNORECASE)

#: Everything that the libraries below raise for a network that misbehaves.
FOREIGN = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    urllib3.exceptions.ProxySchemeUnsupported,  # a ValueError and nothing else
    http.client.HTTPException,
    OSError,
)

#: Raised before anything is written, whatever the connections noted. ``InvalidHeader`` is not here: it is raised for a
#: response's headers too.
_NEVER_LEFT = (
    requests.ConnectTimeout,
    requests.exceptions.ProxyError,
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
    requests.exceptions.URLRequired,
    urllib3.exceptions.ConnectTimeoutError,
    urllib3.exceptions.ProxyError,
    urllib3.exceptions.ProxySchemeUnsupported,
    urllib3.exceptions.LocationValueError,
    urllib3.exceptions.EmptyPoolError,
    urllib3.exceptions.ClosedPoolError,
)


class _Wire(threading.local):
    """What the thread's present request has come to, and what has to be seen to before one leaves."""

    #: True unless known otherwise: doubt is on the safe side.
    departed = True
    look: Callable[[], None] | None = None


_wire = _Wire()


@contextmanager
def looking_first(look: Callable[[], None]) -> Iterator[None]:
    """Call ``look`` before each request that the thread makes in the block; what it raises keeps the request here.

    By then the token is there and the connection stands: between the look and the first byte the thread waits for
    nothing.
    """
    _wire.look = look
    try:
        yield
    finally:
        _wire.look = None


def translate(exc: BaseException, *, repeatable: bool, client_request_id: str | None = None) -> errors.GraphError:
    """Return what a foreign exception means for the caller. The only place that does.

    Its text stays out, since the libraries put the URL into it, which holds an address or is a secret itself.
    """
    if not _wire.departed or _never_left(exc):
        leaf: type[errors.GraphError] = errors.ConnectionFailed
    else:
        leaf = errors.ConnectionLost if repeatable else errors.AnswerLost
    return leaf(type(origin(exc)).__name__, client_request_id=client_request_id)


def _never_left(exc: BaseException) -> bool:
    return any(isinstance(each, _NEVER_LEFT) for each in _chain(exc))


def origin(exc: BaseException) -> BaseException:
    """Return the innermost cause, which is what to chain to: the outer ones carry the URL in their text."""
    return list(_chain(exc))[-1]


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    """Yield the exception and what it wraps, which requests and urllib3 keep among the arguments or as the reason."""
    while exc is not None:
        yield exc
        wrapped = (getattr(exc, "reason", None), *exc.args)
        exc = next((inner for inner in wrapped if isinstance(inner, BaseException)), None)


class _Departing:
    """Notes that a request of requests' begins to be written; the connection is made before."""

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.is_closed:  # type: ignore[attr-defined]
            self.connect()  # type: ignore[attr-defined]
        _wire.departed = True
        super().request(*args, **kwargs)  # type: ignore[misc]


class _Connection(_Departing, HTTPConnection):
    idle_since = 0.0


class _SecureConnection(_Departing, HTTPSConnection):
    idle_since = 0.0


class _Freshening:
    """Closes a connection that was idle for too long instead of using it; it is made anew then."""

    def _put_conn(self, conn: Any) -> None:
        if conn is not None:
            conn.idle_since = time.monotonic()
        super()._put_conn(conn)  # type: ignore[misc]

    def _get_conn(self, timeout: float | None = None) -> Any:
        conn = super()._get_conn(timeout)  # type: ignore[misc]
        if time.monotonic() - conn.idle_since > MAX_IDLE.total_seconds():
            conn.close()
        return conn


class _Pool(_Freshening, HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(_Freshening, HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


_POOLS = {"http": _Pool, "https": _SecurePool}


class _Adapter(HTTPAdapter):
    def __init__(self) -> None:
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = _POOLS
        return manager

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        """Ask for a token."""
        _wire.departed = False
        return super().send(*args, **kwargs)

    def pool(self, origin: str) -> HTTPConnectionPool:
        """Return the connections to a host, by way of the proxy if there is one."""
        proxies, verify = surroundings(origin)
        # In the clear is only this machine, which no proxy reaches.
        way = proxies if origin.startswith("https:") else None
        pool = self.get_connection_with_tls_context(requests.Request("GET", origin).prepare(), verify, way)
        self.cert_verify(pool, origin, verify, None)  # type: ignore[no-untyped-call]
        return cast(HTTPConnectionPool, pool)


class _Session(requests.Session):
    def get_redirect_target(self, resp: Any) -> None:
        """No answer is a redirect, so that requests prepares none either (it would read the body, unbounded)."""


def new_session() -> requests.Session:
    """Return a session without retries, redirects and environment look-ups."""
    session = _Session()
    session.trust_env = False
    session.mount("https://", _Adapter())
    session.mount("http://", _Adapter())
    return session


class Surroundings(NamedTuple):
    """What the environment says about talking to a host."""

    proxies: Any
    verify: bool | str


@lru_cache(maxsize=64)
def surroundings(origin: str) -> Surroundings:
    """Return proxies and CA bundle for ``scheme://host:port``, by requests' rules; asked once per process."""
    with requests.Session() as session:
        merged = session.merge_environment_settings(origin, {}, True, None, None)
    verify = merged["verify"]
    return Surroundings(merged["proxies"], True if verify is None else verify)


def origin_of(url: str) -> str:
    """Return a URL's ``scheme://host:port``, of which `require_secure` says whether we talk to it.

    Raises:
        InsecureUrl: It has none.
    """
    found = _ORIGIN.match(url)
    if found is None:
        raise errors.InsecureUrl("not a URL")
    return found[1].lower() + found[2]


@lru_cache(maxsize=64)
def require_secure(origin: str) -> None:
    """Refuse to talk in the clear to anything but this machine.

    Raises:
        InsecureUrl: The scheme is not https, and the host is not on the loopback.
    """
    try:
        parts = urlsplit(origin)
    except ValueError:
        raise errors.InsecureUrl("not a URL") from None
    secure = parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname or ""))
    if not secure or not parts.hostname:
        raise errors.InsecureUrl("https is required, except on the loopback")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Response(NamedTuple):
    """An answer as far as its headers; the body is read with `read` or `chunks`, or given up with `close`."""

    answer: Answer
    client_request_id: str

    @property
    def status(self) -> int:
        return self.answer.status

    @property
    def headers(self) -> Mapping[str, str]:
        """Their names are in lower case."""
        return self.answer.headers

    def close(self) -> None:
        """Let go of the answer; a connection on which some of it is still to come is closed."""
        self.answer.close()


class _Host:
    """A host that a thread talks to, over one connection that is made anew when it cannot be used any more."""

    def __init__(self, origin: str, timeout: float) -> None:
        self._pool = _Adapter().pool(origin)
        self._timeout = timeout
        host = f"[{self._pool.host}]" if ":" in self._pool.host else self._pool.host
        parts = urlsplit(origin)
        self._name = host if parts.port in (None, _PORTS[parts.scheme]) else f"{host}:{parts.port}"
        self._connection: Connection | None = None

    def connection(self) -> Connection:
        """Return a connection that stands, and on which nothing is under way."""
        if self._connection is None or not self._connection.is_usable(MAX_IDLE):
            self.leave()
            self._connection = self._connect()
        return self._connection

    def leave(self) -> None:
        """Close the connection when its exchange is over."""
        if self._connection is not None:
            self._connection.retire()
        self._connection = None

    def _connect(self) -> Connection:
        # urllib3 sees to the name, the proxy and the certificate, as for what goes through requests.
        connection: Any = self._pool._new_conn()
        connection.timeout = self._timeout
        if self._pool.proxy is None:
            connection.connect()
        else:
            self._pool._prepare_proxy(connection)
        connection.sock.settimeout(self._timeout)
        return Connection(connection.sock, self._name)


class Transport:
    """Connections of each thread's own, so that threads share nothing; they are closed when it ends.

    To be made after a fork, or at least not used before it.
    """

    def __init__(self, timeout: timedelta) -> None:
        """``timeout`` bounds the connect and each silence of the peer, not the whole exchange."""
        self._timeout = timeout.total_seconds()
        self._threads = threading.local()

    def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        *,
        client_request_id: str,
        repeatable: bool,
    ) -> Response:
        """Send the request and return the answer as far as its headers.

        Raises:
            InsecureUrl: The URL is plain http to another machine.
            ConnectionFailed: The request never left.
            ConnectionLost: It left and no answer came; it may be repeated.
            AnswerLost: It left and no answer came; it must not be repeated.
        """
        origin = origin_of(url)
        require_secure(origin)
        try:
            with translating(repeatable, client_request_id):
                _wire.departed = False
                return Response(self._exchange(method, origin, url, headers, body), client_request_id)
        finally:
            _wire.departed = True

    def _exchange(self, method: str, origin: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Answer:
        target = url[len(origin) :].partition("#")[0]
        connection = self._host(origin).connection()
        head = connection.head(method, target if target.startswith("/") else f"/{target}", headers)
        if _wire.look:
            _wire.look()
        _wire.departed = True
        return connection.ask(head, body)

    def _host(self, origin: str) -> _Host:
        hosts: dict[str, _Host] = self._threads.__dict__.setdefault("hosts", {})
        if origin not in hosts:
            if len(hosts) >= _MOST_HOSTS:
                for host in hosts.values():
                    host.leave()
                hosts.clear()
            hosts[origin] = _Host(origin, self._timeout)
        return hosts[origin]


@contextmanager
def translating(repeatable: bool, client_request_id: str | None) -> Iterator[None]:
    """Let only our own errors out of the block."""
    try:
        yield
    except FOREIGN as exc:
        raise translate(exc, repeatable=repeatable, client_request_id=client_request_id) from origin(exc)


def read(response: Response, limit_bytes: int) -> bytes | None:
    """Return the body, whose end frees the connection; None when it exceeds the limit or did not arrive whole."""
    pieces, left = [], limit_bytes
    try:
        for piece in response.answer.pieces():
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                response.close()
                return None
    except FOREIGN:
        response.close()
        return None
    return b"".join(pieces)


def chunks(response: Response) -> Iterator[bytes]:
    """Yield the body piece by piece, each at most `exchange.PIECE_BYTES` long.

    Raises:
        ConnectionLost: The body ended early; what was yielded is not the whole.
    """
    with translating(True, response.client_request_id):
        _wire.departed = True
        yield from response.answer.pieces()
