"""What publishers may make us fetch, and what becomes of it: over real TLS, against a source that can misbehave."""

import re
import socket
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import attachments
from attachments import (
    AttachmentError,
    AttachmentRefused,
    AttachmentSource,
    HostPattern,
    InvalidSource,
    NotStored,
    SizeMismatch,
    SourceForbidden,
    SourceGone,
    SourceUnavailable,
    Timeouts,
    TooLarge,
    is_public,
)

PUBLIC_ADDRESS = "93.184.216.34"
FILE = bytes(range(256)) * 4
SECRET = "sig=s3cr3t"
URL = f"https://source.test/file.pdf?{SECRET}"
QUICK = Timeouts(connect=timedelta(seconds=2), read=timedelta(seconds=2), total=timedelta(seconds=5))

Answer = Callable[[str], Iterator[bytes]]


def answer(
    body: bytes = FILE, status: str = "200 OK", headers: Sequence[str] = (), length: int | None = None
) -> Answer:
    """An answer with Content-Length, which is the body's own unless told otherwise."""
    length = len(body) if length is None else length
    head = "\r\n".join([f"HTTP/1.1 {status}", *headers, f"Content-Length: {length}", "", ""])
    return lambda _request: iter([head.encode("latin-1"), body])


def redirect(location: str, status: str = "302 Found") -> Answer:
    return answer(b"", status, [f"Location: {location}"])


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> Answer:
    body = [f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks]
    return lambda _request: iter([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *body, end])


def until_close(body: bytes) -> Answer:
    return lambda _request: iter([b"HTTP/1.1 200 OK\r\n\r\n", body])


def ranged(body: bytes) -> Answer:
    """A source that starts at the offset asked for."""

    def send(request: str) -> Iterator[bytes]:
        start = int(re.search(r"Range: bytes=(\d+)-\r", request)[1])
        content_range = f"Content-Range: bytes {start}-{len(body) - 1}/{len(body)}"
        return answer(body[start:], "206 Partial Content", [content_range])(request)

    return send


class Source:
    """An HTTPS server whose answers, by path, are set by the test."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self.answers: dict[str, Answer] = {"/file.pdf": answer()}
        self.requests: list[str] = []
        self.server_names: list[str | None] = []
        self.says_goodbye = True
        self.stopping = threading.Event()
        self._tls = tls
        self._tls.sni_callback = lambda _socket, name, _context: self.server_names.append(name)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            plain, _ = self._listener.accept()
            with plain, suppress(OSError):
                if self.stopping.is_set():
                    return
                plain.settimeout(5)
                with self._tls.wrap_socket(plain, server_side=True) as connection:
                    self._answer(connection)

    def _answer(self, connection: ssl.SSLSocket) -> None:
        request = b""
        while b"\r\n\r\n" not in request and (received := connection.recv(4096)):
            request += received
        self.requests.append(request.decode("latin-1"))
        path = request.split()[1].decode().partition("?")[0]
        for piece in self.answers[path](self.requests[-1]):
            connection.sendall(piece)
        if self.says_goodbye:
            connection.unwrap().close()

    def stop(self) -> None:
        self.stopping.set()
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._thread.join()
        self._listener.close()


def certificate(
    name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *extensions: tuple[x509.ExtensionType, bool]
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        issuer,
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]),
        key.public_key(),
        x509.random_serial_number(),
        now - timedelta(hours=1),
        now + timedelta(hours=1),
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``ca.pem``, and ``source.pem`` for source.test and others, signed by it."""
    folder = tmp_path_factory.mktemp("certificates")
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "A throwaway authority")])
    sign = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    ca = certificate(
        "A throwaway authority",
        ca_name,
        ca_key,
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (sign, True),
        (x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), False),
    ).sign(ca_key, SHA256())
    names = [x509.DNSName(name) for name in ("source.test", "cdn.test", "xn--bcher-kva.test")]
    leaf = certificate(
        "source.test",
        ca_name,
        key,
        (x509.SubjectAlternativeName([*names, x509.IPAddress(ip_address("127.0.0.1"))]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
    ).sign(ca_key, SHA256())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "ca.pem").write_bytes(ca.public_bytes(Encoding.PEM))
    (folder / "source.pem").write_bytes(private + leaf.public_bytes(Encoding.PEM))
    return folder


@pytest.fixture
def source(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificates / "source.pem")
    started = Source(tls)
    yield started
    started.stop()


class Internet:
    """Names and addresses as the test says; whatever is dialled is recorded and answered by the source."""

    def __init__(self, source: Source | None = None) -> None:
        self.names: dict[str, list[list[str]]] = {}
        self.resolved: list[str] = []
        self.dialled: list[str] = []
        self._source = source

    def resolve(self, host: str, port: int) -> list[tuple[str, int]]:
        self.resolved.append(host)
        answers = self.names.get(host, [[PUBLIC_ADDRESS]])
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(address, port) for address in addresses]

    def dial(self, address: tuple[str, int], timeout_seconds: float) -> socket.socket:
        self.dialled.append(address[0])
        if self._source is None:
            raise ConnectionRefusedError
        return socket.create_connection(("127.0.0.1", self._source.port), timeout_seconds)


@pytest.fixture
def internet(source: Source) -> Internet:
    return Internet(source)


def opener(
    internet: Internet, *allowed: str, max_bytes: int | None = 10**9, timeouts: Timeouts = QUICK
) -> AttachmentSource:
    return AttachmentSource(
        allowed, max_bytes=max_bytes, timeouts=timeouts, resolve=internet.resolve, dial=internet.dial
    )


def fetch(
    internet: Internet,
    url: str = URL,
    *allowed: str,
    declared_size: int | None = None,
    offset: int = 0,
    max_bytes: int | None = 10**9,
    timeouts: Timeouts = QUICK,
) -> bytes:
    attachments_of = opener(internet, *allowed, max_bytes=max_bytes, timeouts=timeouts)
    with attachments_of.open(url, declared_size=declared_size, offset=offset) as stream:
        return b"".join(stream.chunks(100))


# ---- what is fetched


def test_a_public_attachment_is_read_with_its_size_and_type(source: Source, internet: Internet) -> None:
    source.answers["/file.pdf"] = answer(headers=["Content-Type: application/pdf"])

    with opener(internet).open(URL, declared_size=len(FILE)) as stream:
        content = list(stream.chunks(300))

    assert (stream.size_bytes, stream.content_type) == (len(FILE), "application/pdf")
    assert [len(chunk) for chunk in content] == [300, 300, 300, 124]
    assert b"".join(content) == FILE
    assert internet.dialled == [PUBLIC_ADDRESS]


def test_read_returns_exactly_what_was_asked_for_until_the_end(source: Source, internet: Internet) -> None:
    source.answers["/file.pdf"] = chunked(*(FILE[start : start + 7] for start in range(0, len(FILE), 7)))

    with opener(internet).open(URL) as stream:
        assert stream.size_bytes is None
        assert [len(stream.read(500)) for _ in range(4)] == [500, 500, 24, 0]


def test_the_request_names_the_host_and_carries_nothing_that_authenticates_us(
    source: Source, internet: Internet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Given credentials and a proxy in the surroundings
    (tmp_path / "netrc").write_text("default login robot password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")

    fetch(internet, "https://Source.TEST./file.pdf?a=b%2Fc&d=ü#page=2")

    # Then the request went straight there, asked for plain bytes, and left the query as it was
    assert source.server_names == ["source.test"]
    head = source.requests[0].lower()
    assert head.startswith("get /file.pdf?a=b%2fc&d=%c3%bc http/1.1\r\nhost: source.test\r\n")
    assert "accept-encoding: identity\r\n" in head
    assert not re.search("authorization|cookie|hunter2", head)


def test_an_international_host_name_is_fetched_in_its_ascii_form(source: Source, internet: Internet) -> None:
    assert fetch(internet, "https://Bücher.test/file.pdf") == FILE
    assert internet.resolved == source.server_names == ["xn--bcher-kva.test"]


def test_the_next_address_is_tried_when_one_does_not_answer(source: Source) -> None:
    class HalfReachable(Internet):
        def dial(self, address: tuple[str, int], timeout_seconds: float) -> socket.socket:
            if address[0] != PUBLIC_ADDRESS:
                self.dialled.append(address[0])
                raise ConnectionRefusedError
            return super().dial(address, timeout_seconds)

    internet = HalfReachable(source)
    internet.names["source.test"] = [["2606:2800:220:1::1", PUBLIC_ADDRESS]]

    assert fetch(internet) == FILE
    assert internet.dialled == ["2606:2800:220:1::1", PUBLIC_ADDRESS]


def test_an_attachment_is_streamed_and_never_held_whole(source: Source, internet: Internet) -> None:
    block = bytes(1024 * 1024)
    source.answers["/file.pdf"] = lambda _: iter(
        [b"HTTP/1.1 200 OK\r\nContent-Length: 33554432\r\n\r\n"] + [block] * 32
    )

    tracemalloc.start()
    with opener(internet).open(URL) as stream:
        read_bytes = sum(len(chunk) for chunk in stream.chunks(320 * 1024))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert read_bytes == 32 * len(block)
    assert peak_bytes < 4 * len(block)


def test_an_id_that_is_not_stored_is_refused_without_a_request(source: Source, internet: Internet) -> None:
    with pytest.raises(NotStored, match="no attachment is stored under the id"):
        fetch(internet, "5b8f6d0e-0000-4000-8000-000000000000")

    assert internet.resolved == []


# ---- where nothing is fetched from


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/",
        "https://127.1/",
        "https://0x7f.1/",
        "https://0x7f000001/",
        "https://2130706433/",
        "https://017700000001/",
        "https://0177.0.0.1/",
        "https://127.0.0.1./",
        "https://１２７.0.0.1/",
        "https://127。0。0。1/",
        "https://localhost/",
        "https://LOCALHOST./",
        "https://0/",
        "https://0.0.0.0/",
        "https://10.1.2.3/",
        "https://172.16.0.1/",
        "https://192.168.1.1/",
        "https://100.64.0.1/",
        "https://169.254.169.254/latest/meta-data/",
        "https://168.63.129.16/",
        "https://192.0.0.192/",
        "https://198.18.0.1/",
        "https://224.0.0.1/",
        "https://239.255.255.250/",
        "https://240.0.0.1/",
        "https://255.255.255.255/",
        "https://[::]/",
        "https://[::1]/",
        "https://[::127.0.0.1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[::ffff:7f00:1]/",
        "https://[::ffff:0:127.0.0.1]/",
        "https://[64:ff9b::127.0.0.1]/",
        "https://[64:ff9b:1::127.0.0.1]/",
        "https://[2002:7f00:1::]/",
        "https://[2001:0:4136:e378:8000:63bf:80ff:fffe]/",
        "https://[2001:db8::1]/",
        "https://[3fff::1]/",
        "https://[fc00::1]/",
        "https://[fd00:ec2::254]/",
        "https://[fe80::1]/",
        "https://[fec0::1]/",
        "https://[ff02::1]/",
    ],
)
def test_without_a_list_of_hosts_no_address_but_a_public_one_is_connected_to(url: str) -> None:
    # Given a listener on every address of this machine, to whose port all addresses lead
    with listener_on_all_addresses() as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]

        def resolve(host: str, _port: int) -> list[tuple[str, int]]:
            return [(address, port) for address in _addresses(host)]

        # When the attachment is opened
        with pytest.raises(SourceForbidden), AttachmentSource(max_bytes=1000, resolve=resolve).open(url):
            pass

        # Then nobody came
        with pytest.raises(BlockingIOError):
            listener.accept()


def listener_on_all_addresses() -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    return socket.create_server(("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)


def _addresses(host: str) -> list[str]:
    return [str(address[0]) for *_, address in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]


def test_the_listener_of_the_refusals_would_have_noticed_a_connection() -> None:
    # Given the same listener, and its host on the list of allowed hosts
    with listener_on_all_addresses() as listener:
        port = listener.getsockname()[1]
        opener = AttachmentSource(
            ["127.1"],
            max_bytes=1000,
            timeouts=Timeouts(connect=timedelta(seconds=0.2)),
            resolve=lambda host, _: [(address, port) for address in _addresses(host)],
        )

        with pytest.raises(SourceUnavailable), opener.open("https://127.1/"):
            pass

        listener.accept()[0].close()


@pytest.mark.parametrize(
    "url",
    [
        "http://source.test/file.pdf",
        "ftp://source.test/file.pdf",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_FLUSHALL",
        "https://",
        "https:///file.pdf",
        "https://user@source.test/",
        "https://user:hunter2@source.test/",
        "https://@source.test/",
        "https://source.test@127.0.0.1/",
        "https://source.test\\@127.0.0.1/",
        "https://source.test:99999/",
        "https://source.test:port/",
        "https://source..test/",
        f"https://{'a' * 64}.test/",
        "https://%31%32%37.0.0.1/",
        "https://[::1/",
        "https://[fe80::1%25eth0]/",
        "https://[fe80::1%eth0]/",
        "https://source.test/a b",
        "https://source.test/\r\nX-Injected: 1",
        "https://source.test/\tfile",
        "https://source.test\x00.evil.test/",
        "https://⑯⁄source.test/",
        "data:text/plain,hello",
    ],
)
def test_what_is_not_a_plain_https_url_is_invalid_and_nothing_is_resolved(url: str) -> None:
    internet = Internet()

    with pytest.raises(InvalidSource) as refusal:
        fetch(internet, url)

    assert internet.resolved == internet.dialled == []
    assert "hunter2" not in str(refusal.value)
    assert refusal.value.__cause__ is None


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "100.63.255.255", "172.32.0.1", "2606:4700::1111"])
def test_addresses_of_the_public_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("port", [0, 80, 444, 8443])
def test_without_a_list_of_hosts_another_port_than_443_is_not_connected_to(port: int) -> None:
    internet = Internet()

    with pytest.raises(SourceForbidden, match="443"):
        fetch(internet, f"https://source.test:{port}/file.pdf")

    assert internet.resolved == internet.dialled == []


def test_a_name_with_one_private_address_among_public_ones_is_refused() -> None:
    internet = Internet()
    internet.names["source.test"] = [[PUBLIC_ADDRESS, "10.0.0.1"]]

    with pytest.raises(SourceForbidden, match=r"^https://source.test has an address that is not public"):
        fetch(internet)

    assert internet.dialled == []


def test_the_address_that_was_checked_is_connected_to_even_if_the_name_resolves_differently_afterwards(
    source: Source, internet: Internet
) -> None:
    # Given a name that is public the first time it is looked up and private from then on
    internet.names["source.test"] = [[PUBLIC_ADDRESS], ["127.0.0.1"]]

    # When it is fetched, then it was looked up once and the public address dialled
    assert fetch(internet) == FILE
    assert (internet.resolved, internet.dialled) == (["source.test"], [PUBLIC_ADDRESS])

    # And fetched again, the private address is refused
    with pytest.raises(SourceForbidden):
        fetch(internet)
    assert internet.dialled == [PUBLIC_ADDRESS]


@pytest.mark.parametrize(
    ("pattern", "url", "allowed"),
    [
        ("source.test", "https://source.test/file.pdf", True),
        ("SOURCE.test.", "https://source.test./file.pdf", True),
        ("source.test", "https://source.test:8443/file.pdf", False),
        ("source.test:8443", "https://source.test:8443/file.pdf", True),
        ("source.test:8443", "https://source.test/file.pdf", False),
        ("source.test:*", "https://source.test:9000/file.pdf", True),
        ("*.test", "https://source.test/file.pdf", True),
        ("*.source.test", "https://source.test/file.pdf", False),
        ("source.test", "https://source.test.evil.test/file.pdf", False),
        ("source.test", "https://evilsource.test/file.pdf", False),
        ("source?test", "https://source.test/file.pdf", False),
        ("bücher.test", "https://xn--bcher-kva.test/file.pdf", True),
        ("127.0.0.1:8443", "https://127.0.0.1:8443/file.pdf", True),
        ("cdn.test", f"https://{PUBLIC_ADDRESS}/file.pdf", False),
    ],
)
def test_with_a_list_of_hosts_exactly_these_are_fetched_wherever_they_are(
    source: Source, internet: Internet, pattern: str, url: str, allowed: bool
) -> None:
    for host in ("source.test", "xn--bcher-kva.test", "127.0.0.1"):
        internet.names[host] = [["127.0.0.1"]]

    if allowed:
        assert fetch(internet, url, pattern) == FILE
    else:
        with pytest.raises(SourceForbidden, match="not among the allowed hosts"):
            fetch(internet, url, pattern)
        assert internet.resolved == []


def test_an_ipv6_address_may_be_listed() -> None:
    assert HostPattern.parse("[::1]:8443").matches("::1", 8443)
    assert HostPattern.parse("[0:0::1]").matches("::1", 443)


@pytest.mark.parametrize("pattern", ["", "https://source.test", "source.test/path", "a b", "source.test:x", "[::1"])
def test_a_pattern_that_is_not_a_host_is_refused_at_the_start(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not a host or host:port"):
        AttachmentSource([pattern], max_bytes=1000)


# ---- redirects


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_followed_to_another_allowed_host(source: Source, internet: Internet, status: str) -> None:
    source.answers["/file.pdf"] = redirect("https://cdn.test/moved.pdf", status)
    source.answers["/moved.pdf"] = answer()

    assert fetch(internet) == FILE
    assert source.server_names == ["source.test", "cdn.test"]


def test_a_relative_redirect_is_followed(source: Source, internet: Internet) -> None:
    source.answers["/file.pdf"] = redirect("moved.pdf")
    source.answers["/moved.pdf"] = answer()

    assert fetch(internet) == FILE


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("https://127.0.0.1/", SourceForbidden),
        ("https://internal.test/", SourceForbidden),
        ("//169.254.169.254/latest", SourceForbidden),
        ("https://cdn.test:8443/", SourceForbidden),
        ("http://cdn.test/", SourceForbidden),
        ("file:///etc/passwd", InvalidSource),
        ("https://user:hunter2@cdn.test/", InvalidSource),
        ("https://[::1/", InvalidSource),
        ("", InvalidSource),
    ],
)
def test_each_redirect_is_checked_like_the_first_url(
    source: Source, internet: Internet, location: str, error: type[AttachmentRefused]
) -> None:
    internet.names |= {"127.0.0.1": [["127.0.0.1"]], "internal.test": [["10.0.0.1"]]}
    internet.names["169.254.169.254"] = [["169.254.169.254"]]
    source.answers["/file.pdf"] = redirect(location)

    with pytest.raises(error):
        fetch(internet)

    assert internet.dialled == [PUBLIC_ADDRESS]


def test_three_redirects_are_followed_and_a_fourth_is_not(source: Source, internet: Internet) -> None:
    for hop in (1, 2, 3):
        source.answers[f"/{hop}"] = redirect(f"/{hop - 1}" if hop > 1 else "/file.pdf")

    assert fetch(internet, "https://source.test/3") == FILE

    source.answers["/4"] = redirect("/3")
    with pytest.raises(SourceForbidden, match="redirects"):
        fetch(internet, "https://source.test/4")


# ---- certificates


def test_a_certificate_for_another_name_is_not_trusted_though_the_address_is_right(internet: Internet) -> None:
    with pytest.raises(SourceUnavailable, match=r"^https://unnamed.test has no trusted certificate"):
        fetch(internet, "https://unnamed.test/file.pdf")


def test_without_the_bundle_of_the_environment_a_private_authority_is_not_trusted(
    internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)

    with pytest.raises(SourceUnavailable, match="certificate"):
        fetch(internet)


# ---- sizes


@pytest.mark.parametrize("declared_size", [len(FILE) - 1, len(FILE) + 1])
@pytest.mark.parametrize("content", [answer(), chunked(FILE), until_close(FILE)], ids=["length", "chunked", "close"])
def test_another_number_of_bytes_than_declared_is_found_before_the_last_chunk_is_handed_out(
    source: Source, internet: Internet, content: Answer, declared_size: int
) -> None:
    source.answers["/file.pdf"] = content
    handed_out: list[bytes] = []

    with (
        pytest.raises(SizeMismatch, match="declared"),
        opener(internet).open(URL, declared_size=declared_size) as stream,
    ):
        handed_out.extend(stream.chunks(declared_size))

    assert handed_out == []


def test_more_than_the_limit_is_refused_by_declared_size_by_content_length_and_by_count(
    source: Source, internet: Internet
) -> None:
    with pytest.raises(TooLarge):
        fetch(internet, declared_size=len(FILE), max_bytes=len(FILE) - 1)
    assert internet.dialled == []

    for content in (answer(), chunked(FILE[:500], FILE[500:])):
        source.answers["/file.pdf"] = content
        with pytest.raises(TooLarge):
            fetch(internet, max_bytes=len(FILE) - 1)
        assert fetch(internet, max_bytes=len(FILE)) == FILE
        assert fetch(internet, max_bytes=None) == FILE


@pytest.mark.parametrize("content", [answer(b""), chunked(), until_close(b"")], ids=["length", "chunked", "close"])
def test_an_empty_attachment_is_empty(source: Source, internet: Internet, content: Answer) -> None:
    source.answers["/file.pdf"] = content

    assert fetch(internet, declared_size=0) == b""


@pytest.mark.parametrize("content", [answer(), chunked(FILE), until_close(FILE)], ids=["length", "chunked", "close"])
def test_a_file_with_bytes_that_was_declared_empty_is_refused_before_anything_is_read(
    source: Source, internet: Internet, content: Answer
) -> None:
    source.answers["/file.pdf"] = content

    with pytest.raises(SizeMismatch, match="more than the 0 bytes"), opener(internet).open(URL, declared_size=0):
        pass


@pytest.mark.parametrize(
    ("content", "declared_size"),
    [
        (answer(FILE, length=len(FILE) + 1), None),
        (answer(FILE, length=len(FILE) + 1), len(FILE) + 1),
        (chunked(FILE, end=b""), None),
        (chunked(FILE, end=b""), len(FILE)),
        (chunked(FILE, end=b"5\r\nab"), len(FILE) + 5),
        (until_close(FILE), None),
        (until_close(FILE), len(FILE)),
    ],
    ids=["length", "length, declared", "chunked", "chunked, declared", "in a chunk", "close", "close, declared"],
)
def test_a_stream_that_breaks_off_may_be_tried_again(
    source: Source, internet: Internet, content: Answer, declared_size: int | None
) -> None:
    source.answers["/file.pdf"] = content
    source.says_goodbye = False

    with pytest.raises(SourceUnavailable):
        fetch(internet, declared_size=declared_size)


# ---- offsets


def test_reading_goes_on_at_an_offset_by_a_range(source: Source, internet: Internet) -> None:
    source.answers["/file.pdf"] = ranged(FILE)

    with opener(internet).open(URL, declared_size=len(FILE), offset=1000) as stream:
        assert stream.size_bytes == len(FILE)
        assert b"".join(stream.chunks(100)) == FILE[1000:]


def test_a_source_without_ranges_is_read_and_discarded_up_to_the_offset(source: Source, internet: Internet) -> None:
    assert fetch(internet, declared_size=len(FILE), offset=1000) == FILE[1000:]
    assert "Range: bytes=1000-" in source.requests[0]


def test_whoever_waits_for_the_offset_is_asked_and_may_end_it(source: Source, internet: Internet) -> None:
    class Over(Exception):
        pass

    asked: list[int] = []

    def waiting() -> None:
        asked.append(1)
        if len(asked) == 30:  # far behind the headers, which take a few receipts
            raise Over

    whole = f"HTTP/1.1 200 OK\r\nContent-Length: {len(FILE)}\r\n\r\n".encode()
    source.answers["/file.pdf"] = lambda _: _dripping(whole, b"x", source.stopping)
    with pytest.raises(Over), opener(internet).open(URL, declared_size=len(FILE), offset=1020, waiting=waiting):
        pytest.fail("what lies behind the offset was handed out")
    assert len(asked) == 30


@pytest.mark.parametrize("content_range", ["bytes 0-23/1024", "bytes 1000-1010/1024", "bytes */1024", "nonsense"])
def test_a_range_that_was_not_asked_for_is_not_used(source: Source, internet: Internet, content_range: str) -> None:
    # Given a source that answers any range with a wrong one
    def send(request: str) -> Iterator[bytes]:
        if "Range:" not in request:
            return answer()(request)
        return answer(b"x" * 24, "206 Partial Content", [f"Content-Range: {content_range}"])(request)

    source.answers["/file.pdf"] = send

    # Then what is read is what stands at the offset
    assert fetch(internet, declared_size=len(FILE), offset=1000) == FILE[1000:]


def test_a_source_that_shrank_below_the_offset_is_a_size_mismatch(source: Source, internet: Internet) -> None:
    source.answers["/file.pdf"] = answer(b"", "416 Range Not Satisfiable")
    with pytest.raises(SizeMismatch):
        fetch(internet, offset=1000)

    source.answers["/file.pdf"] = answer(b"short")
    with pytest.raises(SizeMismatch):
        fetch(internet, offset=1000)


# ---- what a source may answer instead


@pytest.mark.parametrize(
    "status", ["401 No", "403 No", "404 No", "410 Gone", "400 No", "204 Empty", "206 Part", "304 No"]
)
def test_a_final_answer_without_the_attachment_is_permanent(source: Source, internet: Internet, status: str) -> None:
    source.answers["/file.pdf"] = answer(b"", status)

    with pytest.raises(SourceGone, match=r"^https://source.test "):
        fetch(internet)


def test_an_attachment_that_comes_only_compressed_is_refused(source: Source, internet: Internet) -> None:
    source.answers["/file.pdf"] = answer(headers=["Content-Encoding: gzip"])

    with pytest.raises(SourceGone, match="encoded"):
        fetch(internet)


@pytest.mark.parametrize("status", ["500 Oops", "502 Bad", "503 Busy", "504 Late", "429 Slow", "408 Late", "425 Early"])
def test_a_failure_of_the_source_is_transient(source: Source, internet: Internet, status: str) -> None:
    source.answers["/file.pdf"] = answer(b"", status)

    with pytest.raises(SourceUnavailable) as failure:
        fetch(internet)

    assert failure.value.retry_after is None


@pytest.mark.parametrize(
    ("retry_after", "expected"),
    [
        ("120", timedelta(seconds=120)),
        ("0.5", timedelta(seconds=0.5)),
        ("999999999", timedelta(days=1)),
        (format_datetime(datetime(2001, 1, 1, tzinfo=UTC), usegmt=True), timedelta()),
        (format_datetime(datetime(2999, 1, 1, tzinfo=UTC), usegmt=True), timedelta(days=1)),
        ("soon", None),
        ("-5", None),
        ("1e999", None),
    ],
)
def test_what_the_source_asks_to_wait_is_told(
    source: Source, internet: Internet, retry_after: str, expected: timedelta | None
) -> None:
    source.answers["/file.pdf"] = answer(b"", "503 Busy", [f"Retry-After: {retry_after}"])

    with pytest.raises(SourceUnavailable) as failure:
        fetch(internet)

    assert failure.value.retry_after == expected


@pytest.mark.parametrize("nonsense", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 2xx\r\n\r\n"])
def test_a_source_that_does_not_speak_http_is_transient(source: Source, internet: Internet, nonsense: bytes) -> None:
    source.answers["/file.pdf"] = lambda _: iter([nonsense])

    with pytest.raises(SourceUnavailable):
        fetch(internet)


def test_a_source_that_nobody_answers_for_is_transient() -> None:
    with pytest.raises(SourceUnavailable, match=r"^https://source.test cannot be reached"):
        fetch(Internet())


def test_a_name_that_does_not_resolve_is_transient() -> None:
    def resolve(host: str, port: int) -> list[tuple[str, int]]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    source = AttachmentSource(max_bytes=1000, resolve=resolve)
    with pytest.raises(SourceUnavailable, match="does not resolve"), source.open(URL):
        pass


def _dripping(first: bytes, drop: bytes, stopping: threading.Event) -> Iterator[bytes]:
    yield first
    while not stopping.wait(0.02):
        yield drop


def test_whoever_waits_for_an_answer_that_drips_is_asked_before_each_drop(source: Source, internet: Internet) -> None:
    class Over(Exception):
        pass

    drops: list[int] = []

    def waiting() -> None:
        drops.append(1)
        if len(drops) == 8:
            raise Over

    source.answers["/file.pdf"] = lambda _: _dripping(b"HTTP/1.1 200 OK\r\n", b"x-a: b\r\n", source.stopping)
    with pytest.raises(Over), opener(internet).open(URL, waiting=waiting):
        pytest.fail("there was never an answer")


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x-a: b\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),
    ],
)
def test_a_source_that_drips_is_given_up_once_its_slack_is_used_up(
    source: Source, internet: Internet, first: bytes, drop: bytes
) -> None:
    source.answers["/file.pdf"] = lambda _: _dripping(first, drop, source.stopping)
    timeouts = replace(QUICK, total=timedelta(minutes=1), slack=timedelta(seconds=1))
    began = time.monotonic()
    with pytest.raises(SourceUnavailable):
        fetch(internet, timeouts=timeouts)
    assert time.monotonic() - began < 5


def test_a_source_that_flows_slowly_is_waited_for_longer_than_its_slack(source: Source, internet: Internet) -> None:
    def slowly(request: str) -> Iterator[bytes]:
        for piece in answer()(request):
            for start in range(0, len(piece), 100):
                yield piece[start : start + 100]
                time.sleep(0.05)

    source.answers["/file.pdf"] = slowly
    timeouts = replace(QUICK, total=timedelta(minutes=1), slack=timedelta(seconds=0.3), least_bytes_per_second=1000)
    assert fetch(internet, timeouts=timeouts) == FILE


@pytest.mark.parametrize(
    ("first", "drop"),
    [(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"), (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b"x")],
    ids=["headers", "content"],
)
def test_a_source_that_drips_is_given_up_at_the_total_deadline(
    source: Source, internet: Internet, first: bytes, drop: bytes
) -> None:
    source.answers["/file.pdf"] = lambda _: _dripping(first, drop, source.stopping)
    patience = Timeouts(read=timedelta(seconds=5), total=timedelta(seconds=0.4))

    with pytest.raises(SourceUnavailable, match="took too long"):
        fetch(internet, timeouts=patience)


@pytest.mark.parametrize(
    "first", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"], ids=["no answer", "no content"]
)
def test_a_source_that_falls_silent_is_given_up_at_the_read_timeout(
    source: Source, internet: Internet, first: bytes
) -> None:
    given_up = threading.Event()

    def send(_request: str) -> Iterator[bytes]:
        yield first
        given_up.wait(5)

    source.answers["/file.pdf"] = send

    with pytest.raises(SourceUnavailable, match="took too long"):
        fetch(internet, timeouts=Timeouts(read=timedelta(seconds=0.2)))
    given_up.set()


# ---- errors


@pytest.mark.parametrize(
    "content", [answer(b"", "404 No"), answer(b"", "503 No"), answer(FILE, length=2000), redirect("http://x.test")]
)
def test_errors_show_scheme_and_host_and_nothing_else_of_the_url(
    source: Source, internet: Internet, content: Answer
) -> None:
    source.answers["/file.pdf"] = content

    with pytest.raises(AttachmentError) as failure:
        fetch(internet, declared_size=5)

    assert "s3cr3t" not in str(failure.value)
    assert "file.pdf" not in str(failure.value)


def test_an_error_of_the_reader_passes_as_it_is(source: Source, internet: Internet) -> None:
    failure = OSError("disk full")

    with pytest.raises(OSError, match="disk full") as raised, opener(internet).open(URL):
        raise failure

    assert raised.value is failure


def test_the_errors_are_those_that_the_module_draws() -> None:
    drawn = re.findall(r"^    (│   |    )?(?:[├└]── )?(\w+)$", attachments.__doc__, re.MULTILINE)
    errors = {
        name
        for name, value in vars(attachments).items()
        if isinstance(value, type) and issubclass(value, AttachmentError)
    }

    assert {name for _, name in drawn} == errors
    for indent, name in drawn[1:]:
        parent = {"│   ": AttachmentRefused, "    ": SourceUnavailable}.get(indent, AttachmentError)
        assert getattr(attachments, name).__base__ is parent
