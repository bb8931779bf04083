"""What may come over a connection, and what is made of it: an answer, or none, and whether the next one may follow."""

from __future__ import annotations

import gzip
import random
import socket
import threading
import zlib
from collections.abc import Iterator
from datetime import timedelta

import pytest

from graph_client import exchange
from graph_client.exchange import MAX_HEAD_BYTES, PIECE_BYTES, Answer, Connection, Interrupted

MINUTE = timedelta(minutes=1)
ACCEPTED = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"


HEAD = b"GET / HTTP/1.1\r\nHost: graph.example\r\n\r\n"


class Peer:
    """The other end of a connection, and this one."""

    def __init__(self) -> None:
        ours, self.socket = socket.socketpair()
        ours.settimeout(5)
        self.socket.settimeout(5)
        self.connection = Connection(ours, "graph.example")

    def ask(self, answer: bytes, *, ends: bool = False, head: bytes = HEAD, body: bytes | None = None) -> Answer:
        """Have this answer there when it is asked."""
        self.socket.sendall(answer)
        if ends:
            self.socket.shutdown(socket.SHUT_WR)
        return self.connection.ask(head, body)

    def is_usable(self) -> bool:
        return self.connection.is_usable(MINUTE)


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.socket.close()
    peer.connection.close()


def whole(answer: Answer) -> bytes:
    return b"".join(answer.pieces())


def chunked(body: bytes, size: int = 1000) -> bytes:
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])


# Requests


def test_a_request_leaves_as_it_was_given(peer: Peer) -> None:
    head = peer.connection.head("PUT", "/a%20b?$filter=c", {"Authorization": "Bearer x", "Content-Length": "4"})

    peer.ask(ACCEPTED, head=head, body=b"body")

    assert peer.socket.recv(1000) == (
        b"PUT /a%20b?$filter=c HTTP/1.1\r\nHost: graph.example\r\n"
        b"Authorization: Bearer x\r\nContent-Length: 4\r\n\r\nbody"
    )


def test_a_long_body_arrives_whole(peer: Peer) -> None:
    body, received = random.Random(1).randbytes(1_000_000), bytearray()

    def read() -> None:
        while len(received) < len(body):
            received.extend(peer.socket.recv(100_000))

    reading = threading.Thread(target=read)
    reading.start()
    peer.ask(ACCEPTED, body=body)
    reading.join(5)

    assert bytes(received).partition(b"\r\n\r\n")[2] == body


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/a b", "/a%20b"),
        ("/a\r\nEvil: 1", "/a%0D%0AEvil:%201"),
        ("/ä", "/%C3%A4"),
        ("/a%2Fb?c='d'&e=(f)", "/a%2Fb?c='d'&e=(f)"),
        ("/\ud800", "/?"),
    ],
)
def test_what_a_target_may_not_hold_is_quoted(peer: Peer, target: str, sent: str) -> None:
    head = peer.connection.head("GET", target, {})

    assert head.decode() == f"GET {sent} HTTP/1.1\r\nHost: graph.example\r\n\r\n"


@pytest.mark.parametrize("value", ["x\r\nEvil: 1", "x\nEvil: 1", "x\rEvil: 1"])
def test_a_header_with_a_line_break_is_not_sent(peer: Peer, value: str) -> None:
    with pytest.raises(ValueError, match="line break"):
        peer.connection.head("GET", "/", {"a": value})


# Answers


BODY = bytes(range(256)) * 20


@pytest.mark.parametrize(
    "framed",
    [b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY), b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY)],
    ids=["length", "chunks"],
)
@pytest.mark.parametrize("size", [1, 7, 100_000], ids=["bytes", "sevens", "at-once"])
def test_an_answer_is_the_same_however_it_arrives(peer: Peer, framed: bytes, size: int) -> None:
    answer = b"HTTP/1.1 200 OK\r\nRequest-Id: r1\r\nvia: a\r\nVia: b\r\n" + framed

    def write() -> None:
        for start in range(0, len(answer), size):
            peer.socket.sendall(answer[start : start + size])

    writing = threading.Thread(target=write)
    writing.start()
    received = peer.connection.ask(HEAD, None)
    assert (received.status, received.headers["request-id"], received.headers["via"]) == (200, "r1", "a, b")
    assert whole(received) == BODY
    writing.join(5)
    assert peer.is_usable()


def test_one_exchange_follows_the_other(peer: Peer) -> None:
    for number in range(3):
        answer = peer.ask(b"HTTP/1.1 200 OK\r\nn: %d\r\nContent-Length: 1\r\n\r\n%d" % (number, number))
        assert (answer.headers["n"], whole(answer)) == (str(number), b"%d" % number)


def test_an_answer_without_a_body_leaves_the_connection_usable(peer: Peer) -> None:
    for status in (b"202 Accepted\r\nContent-Length: 0", b"204 No Content"):
        peer.ask(b"HTTP/1.1 " + status + b"\r\n\r\n").close()
        assert peer.is_usable()


def test_what_precedes_an_answer_is_not_the_answer(peer: Peer) -> None:
    answer = peer.ask(b"HTTP/1.1 100 Continue\r\nx: 1\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + ACCEPTED)

    assert (answer.status, dict(answer.headers)) == (202, {"content-length": "0"})


def test_a_body_without_a_length_ends_with_the_connection(peer: Peer) -> None:
    answer = peer.ask(b"HTTP/1.1 200 OK\r\n\r\nall there is", ends=True)

    assert whole(answer) == b"all there is"
    assert not peer.is_usable()


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 202 A\r\nConnection: close\r\n", b"HTTP/1.0 202 A\r\nConnection: keep-alive\r\n"]
)
def test_a_connection_that_does_not_stay_is_not_used_again(peer: Peer, head: bytes) -> None:
    whole(peer.ask(head + b"Content-Length: 0\r\n\r\n"))

    assert not peer.is_usable()


@pytest.mark.parametrize(
    "surplus",
    [
        ACCEPTED,
        b"nonsense",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
def test_what_nobody_asked_for_is_nobodys_answer(peer: Peer, surplus: bytes) -> None:
    answer = peer.ask(b"HTTP/1.1 400 Bad\r\nContent-Length: 2\r\n\r\nno" + surplus)

    assert (answer.status, whole(answer), dict(answer.headers)) == (400, b"no", {"content-length": "2"})
    assert not peer.is_usable()


def test_an_answer_that_comes_unasked_ends_the_connection(peer: Peer) -> None:
    whole(peer.ask(ACCEPTED))

    peer.socket.sendall(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n")

    assert not peer.is_usable()


def test_a_trailer_changes_no_header(peer: Peer) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = peer.ask(head + b"1\r\na\r\n0\r\nConnection: close\r\n\r\n")

    assert (whole(answer), dict(answer.headers)) == (b"a", {"transfer-encoding": "chunked"})
    assert not peer.is_usable()


# Answers that are none


@pytest.mark.parametrize(
    "answer", [b"\r\n\r\n", b"\r\n\r\nHTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"]
)
def test_a_blank_line_is_not_the_answer_before_it_once_more(peer: Peer, answer: bytes) -> None:
    whole(peer.ask(ACCEPTED))

    with pytest.raises(Interrupted, match="no answer"):
        peer.ask(answer)


class TimeIsUp(BaseException):
    """As Dramatiq throws it into a thread."""


@pytest.fixture
def interrupted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a thread interrupted at the end of what the parser calls."""
    called = getattr(exchange._Parsed, request.param)

    def interrupt(*arguments: object) -> None:
        called(*arguments)
        raise TimeIsUp

    monkeypatch.setattr(exchange._Parsed, request.param, interrupt)


@pytest.mark.parametrize(
    "interrupted", ["on_header", "on_headers_complete", "on_body", "on_message_complete"], indirect=True
)
def test_what_interrupts_the_thread_is_neither_lost_nor_an_error_of_the_network(interrupted: None, peer: Peer) -> None:
    with pytest.raises(TimeIsUp):
        whole(peer.ask(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na"))

    assert not peer.is_usable()


@pytest.mark.parametrize("interrupted", ["on_body", "on_message_complete"], indirect=True)
def test_a_body_within_which_the_thread_is_interrupted_ends_the_connection(interrupted: None, peer: Peer) -> None:
    answer = peer.ask(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n")
    peer.socket.sendall(b"a")

    with pytest.raises(TimeIsUp):
        whole(answer)

    answer.close()
    assert not peer.is_usable()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 202 Acc",
        b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n",
        b"NOT HTTP AT ALL\r\n\r\n",
        b"HTTP/1.1 202 A\r\nContent-Length: 0, 5\r\n\r\n",
        b"HTTP/1.1 202 A\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 202 A\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
def test_an_answer_that_is_none_is_an_error(peer: Peer, answer: bytes) -> None:
    with pytest.raises(Interrupted):
        peer.ask(answer, ends=True)

    assert not peer.is_usable()


def test_the_head_of_an_answer_is_bounded(peer: Peer) -> None:
    peer.socket.setblocking(False)
    writing = threading.Thread(target=lambda: (peer.socket.settimeout(5), _send_for_ever(peer.socket)))
    writing.start()

    with pytest.raises(Interrupted, match="too long"):
        peer.connection.ask(HEAD, None)

    writing.join(5)


def _send_for_ever(to: socket.socket) -> None:
    to.sendall(b"HTTP/1.1 200 OK\r\n")
    for _ in range(10 * MAX_HEAD_BYTES // 100):
        try:
            to.sendall(b"a: " + b"x" * 95 + b"\r\n")
        except OSError:
            return


@pytest.mark.parametrize(
    "cut",
    [b"Content-Length: 9\r\n\r\nhalf", b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"],
    ids=["length", "chunks"],
)
def test_a_body_that_breaks_off_is_an_error_after_what_came(peer: Peer, cut: bytes) -> None:
    received = []

    with pytest.raises(Interrupted):
        received.extend(peer.ask(b"HTTP/1.1 200 OK\r\n" + cut, ends=True).pieces())

    assert not peer.is_usable()


def test_a_body_that_is_given_up_ends_the_connection(peer: Peer) -> None:
    answer = peer.ask(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")

    answer.close()

    assert not peer.is_usable()
    assert list(answer.pieces()) == []


def test_an_answer_that_is_over_has_no_more_to_do_with_the_connection(peer: Peer) -> None:
    first = peer.ask(ACCEPTED)
    whole(first)
    second = peer.ask(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nha")

    first.close()

    peer.socket.sendall(b"lf")
    assert whole(second) == b"half"


def test_an_answer_that_came_before_the_request_was_read_is_read() -> None:
    # Given a server that says no and closes, whatever is still on its way to it
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def refuse() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

        refusing = threading.Thread(target=refuse)
        refusing.start()
        connection = Connection(socket.create_connection(listening.getsockname()), "graph.example")
        # When more is sent than fits on the way
        answer = connection.ask(HEAD, b"x" * 10_000_000)
        # Then
        assert (answer.status, whole(answer)) == (413, b"no")
        connection.close()
        refusing.join(5)


# Compressed, though nobody asks for it


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_a_compressed_body_is_given_as_it_was_and_in_bounded_pieces(peer: Peer, encoding: str, compress) -> None:  # type: ignore[no-untyped-def]
    compressed = compress(bytes(5_000_000))
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(compressed)}\r\n\r\n"

    pieces = list(peer.ask(head.encode() + compressed).pieces())

    assert b"".join(pieces) == bytes(5_000_000)
    assert max(map(len, pieces)) <= PIECE_BYTES


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", b"not gzip at all"),
        ("gzip", gzip.compress(b"x" * 1000)[:-5]),
        ("gzip", gzip.compress(b"one") + gzip.compress(b"two")),
        ("br", b"?"),
        ("gzip, gzip", b"?"),
    ],
)
def test_a_body_that_cannot_be_decompressed_is_an_error(peer: Peer, encoding: str, body: bytes) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(body)}\r\n\r\n"

    with pytest.raises(Interrupted):
        whole(peer.ask(head.encode() + body))


def test_an_empty_body_needs_no_decompressing(peer: Peer) -> None:
    for encoding in (b"", b"gzip", b"utf-8"):
        head = b"HTTP/1.1 202 A\r\nContent-Encoding: " + encoding
        assert whole(peer.ask(head + b"\r\nContent-Length: 0\r\n\r\n")) == b""
