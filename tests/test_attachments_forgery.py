"""Server-side request forgery: whatever a publisher names, nothing inside is connected to. One table of all forms."""

from __future__ import annotations

import selectors
import socket
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_attachments
from test_attachments import PUBLIC_ADDRESS, QUICK, Internet, Source, answer, redirect

from attachments import AttachmentRefused, AttachmentSource, SourceUnavailable

certificates, source = test_attachments.certificates, test_attachments.source

#: What is inside, in every way to write it.
INSIDE = {
    "this machine": ["127.0.0.1", "127.8.9.10", "localhost", "LOCALHOST.", "[::1]", "[0:0:0:0:0:0:0:1]"],
    "any address of this machine": ["0.0.0.0", "0", "[::]"],
    "private ranges": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1", "[fc00::1]", "[fd12:3456::1]"],
    "link-local, with the metadata of clouds": ["169.254.169.254", "169.254.170.2", "[fe80::1]", "[fd00:ec2::254]"],
    "platforms": ["168.63.129.16", "100.100.100.200", "192.0.0.192"],
    "shared and reserved ranges": ["100.64.0.1", "198.18.0.1", "192.0.2.1", "203.0.113.1", "240.0.0.1", "[3fff::1]"],
    "many at once": ["224.0.0.1", "239.255.255.250", "255.255.255.255", "[ff02::1]"],
    "decimal, octal, hexadecimal, short": [
        *("2130706433", "017700000001", "0x7f000001", "0x7f.1", "0177.0.0.1", "127.1", "127.0.1"),
        *("2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "167772161"),
    ],
    "other digits and dots": ["１２７.0.0.1", "127。0。0。1", "①②⑦.0.0.1", "169.254.169.254."],
    "IPv4 inside IPv6": [
        *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::ffff:a9fe:a9fe]", "[::127.0.0.1]", "[::ffff:0:127.0.0.1]"),
        *("[64:ff9b::127.0.0.1]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::10.0.0.1]"),
        *("[2002:7f00:1::]", "[2002:a9fe:a9fe::1]", "[2002:c0a8:1::1]"),
        "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
    ],
    "names that lead inside": ["inside.test", "mixed.test", "inside6.test"],
}
#: What is no place to fetch from, wherever it leads.
REFUSED_URLS = [
    *("http://source.test/", "HTTP://source.test/", "file:///etc/passwd", "file://localhost/etc/passwd"),
    *("ftp://source.test/", "gopher://127.0.0.1:6379/_INFO", "data:text/plain,x", "jar:https://source.test!/"),
    *("https://source.test:22/", "https://source.test:80/", "https://source.test:8443/", "https://127.0.0.1:6379/"),
    *("https://user@source.test/", "https://user:word@source.test/", "https://source.test@127.0.0.1/"),
    *(
        "https://source.test\\@127.0.0.1/",
        "https://127.0.0.1\\@source.test/",
    ),
    *("https://127.0.0.1%00.source.test/", "https://127.0.0.1%2523@source.test/", "https://[::1%25lo]/"),
    *("//127.0.0.1/", "https:127.0.0.1", "https:///127.0.0.1/", "https://source.test:443@127.0.0.1/"),
]
NAMES = {"inside.test": ["10.1.2.3"], "mixed.test": [PUBLIC_ADDRESS, "192.168.0.1"], "inside6.test": ["::ffff:7f00:1"]}

URLS = [f"https://{host}/file.pdf" for hosts in INSIDE.values() for host in hosts] + REFUSED_URLS


@contextmanager
def listeners() -> Iterator[list[socket.socket]]:
    """Listeners on every address of this machine, IPv4 and IPv6."""
    families = [socket.AF_INET] + ([socket.AF_INET6] if socket.has_dualstack_ipv6() else [])
    opened: list[socket.socket] = []
    try:
        for family in families:
            opened.append(socket.create_server(("", opened[0].getsockname()[1] if opened else 0), family=family))
        yield opened
    finally:
        for each in opened:
            each.close()


def connections(opened: list[socket.socket]) -> int:
    """How many have connected."""
    with selectors.DefaultSelector() as selector:
        for each in opened:
            selector.register(each, selectors.EVENT_READ)
        return len(selector.select(0))


def resolving_to(port: int) -> Internet:
    """The system's look-ups, but for the names of the table; every address leads to the listeners' port."""

    class Inside(Internet):
        def resolve(self, host: str, _port: int) -> list[tuple[str, int]]:
            self.resolved.append(host)
            if host in NAMES:
                return [(address, port) for address in NAMES[host]]
            if host == "source.test":
                return [(PUBLIC_ADDRESS, port)]
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return [(str(address[0]), port) for *_, address in found]

        def dial(self, address: tuple[str, int], timeout_seconds: float) -> socket.socket:
            self.dialled.append(address[0])
            return socket.create_connection(("127.0.0.1", port), timeout_seconds)

    return Inside()


@pytest.mark.parametrize("url", URLS)
def test_nothing_inside_is_connected_to(url: str) -> None:
    with listeners() as opened:
        internet = resolving_to(opened[0].getsockname()[1])
        attachments = AttachmentSource(max_bytes=1000, timeouts=QUICK, resolve=internet.resolve, dial=internet.dial)
        with pytest.raises(AttachmentRefused), attachments.open(url):
            pass
        assert (connections(opened), internet.dialled) == (0, [])


@pytest.mark.parametrize("url", URLS)
def test_no_redirect_leads_inside(source: Source, url: str) -> None:
    # Given a public host that redirects there
    source.answers = defaultdict(lambda: answer(b"", "404 Not Found"))
    source.answers["/file.pdf"] = redirect(url.encode().decode("latin-1"))
    with listeners() as opened:
        inside = resolving_to(opened[0].getsockname()[1])
        outside = Internet(source)
        attachments = AttachmentSource(max_bytes=1000, timeouts=QUICK, resolve=inside.resolve, dial=outside.dial)
        # When
        with pytest.raises(AttachmentRefused), attachments.open("https://source.test/file.pdf"):
            pass
        # Then the public host alone was connected to, once more where the URL is a path to its parser
        assert (connections(opened), set(outside.dialled)) == (0, {PUBLIC_ADDRESS})


@pytest.mark.parametrize("inside", ["127.0.0.1", "169.254.169.254", "10.0.0.1", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("answered_before", [0, 1, 2])
def test_a_name_that_leads_inside_at_its_next_look_up_gains_nothing(
    source: Source, certificates: Path, inside: str, answered_before: int
) -> None:
    # Given a name that is public for its first look-ups, and inside from then on
    internet = Internet(source)
    internet.names["source.test"] = [[PUBLIC_ADDRESS]] * answered_before + [[inside]]
    attachments = AttachmentSource(max_bytes=10_000, timeouts=QUICK, resolve=internet.resolve, dial=internet.dial)
    # When it is fetched again and again
    for _ in range(answered_before + 1):
        try:
            with attachments.open("https://source.test/file.pdf") as stream:
                stream.read(10_000)
        except AttachmentRefused:
            pass
    # Then each look-up's own answer was checked and dialled, and never the inside
    assert internet.dialled == [PUBLIC_ADDRESS] * answered_before


def test_the_listeners_would_have_noticed() -> None:
    with listeners() as opened:
        internet = resolving_to(opened[0].getsockname()[1])
        allowed = AttachmentSource(
            ["127.0.0.1"], max_bytes=1000, timeouts=QUICK, resolve=internet.resolve, dial=internet.dial
        )
        opened[0].settimeout(5)
        with pytest.raises(SourceUnavailable):
            _open_while_nobody_answers(allowed, opened)
        assert internet.dialled == ["127.0.0.1"]


def _open_while_nobody_answers(attachments: AttachmentSource, opened: list[socket.socket]) -> None:
    """Open while the listener only takes the connection and drops it."""
    dropping = threading.Thread(target=lambda: opened[0].accept()[0].close())
    dropping.start()
    try:
        with attachments.open("https://127.0.0.1/"):
            pass
    finally:
        dropping.join()
