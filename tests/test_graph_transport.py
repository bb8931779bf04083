"""What real sockets do to a call, and what the client makes of it: above all, whether a send may have happened."""

from __future__ import annotations

import socket
import struct
import threading
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from graph_client import Call, GraphClient, UploadSession, errors, transport

MAILBOX = "ann@contoso.example"
MESSAGE: dict[str, Any] = {"subject": "s", "toRecipients": [{"emailAddress": {"address": "bob@fabrikam.example"}}]}
DRAFT = b'{"id": "AAMk", "isDraft": true}'

Script = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers each request with the next thing in the server's script, and with 202 when that is over."""

    protocol_version = "HTTP/1.1"
    server: Server

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.server.received.append(self)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        script = self.server.script
        (script.pop(0) if script else accept)(self)

    do_GET = do_PUT = do_DELETE = do_POST

    def log_message(self, *args: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Script] = []
        self.received: list[Handler] = []
        self.accepted = 0
        self.given_up = threading.Event()
        self.closed = threading.Event()

    def get_request(self) -> tuple[socket.socket, Any]:
        self.accepted += 1
        return super().get_request()

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.closed.set()

    def handle_error(self, *args: object) -> None:
        """Connections break on purpose here."""


def accept(handler: Handler) -> None:
    handler.answer(202)


def accept_and_close(handler: Handler) -> None:
    handler.answer(202)
    handler.close_connection = True


def close_without_answer(handler: Handler) -> None:
    handler.close_connection = True


def reset(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def say_nothing(handler: Handler) -> None:
    handler.server.given_up.wait(10)
    handler.close_connection = True


def talk_nonsense(handler: Handler) -> None:
    handler.wfile.write(b"NOT HTTP AT ALL\r\n\r\n")
    handler.close_connection = True


def answering(status: int, body: bytes = b"", **headers: str) -> Script:
    return lambda handler: handler.answer(status, body, **headers)


def break_off(handler: Handler) -> None:
    handler.answer(200, b"half", Content_Length="8")
    handler.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.given_up.set()
        running.shutdown()
        thread.join()


class FixedToken:
    def token(self) -> str:
        return "t0ken"

    def drop(self, token: str) -> None:
        raise AssertionError("nothing here refuses the token")


def client_of(server: Server, timeout: timedelta = timedelta(seconds=5), **options: Any) -> GraphClient:
    return client_at(f"http://127.0.0.1:{server.server_port}/v1.0", timeout, **options)


def client_at(base_url: str, timeout: timedelta = timedelta(seconds=5), **options: Any) -> GraphClient:
    return GraphClient(base_url, FixedToken(), timeout, "String {0} Name tag", **options)


LOSSES = [close_without_answer, reset, talk_nonsense]


@pytest.mark.parametrize("lose", LOSSES)
def test_a_send_whose_answer_is_lost_has_an_unknown_outcome(server: Server, lose: Script) -> None:
    server.script = [lose]

    with pytest.raises(errors.AnswerLost):
        client_of(server).send_mail(MAILBOX, MESSAGE)

    assert len(server.received) == 1


@pytest.mark.parametrize("lose", LOSSES)
def test_a_repeatable_call_whose_answer_is_lost_is_a_transient_error(server: Server, lose: Script) -> None:
    server.script = [lose]

    with pytest.raises(errors.ConnectionLost):
        client_of(server).create_draft(MAILBOX, MESSAGE)

    assert len(server.received) == 1


def test_a_send_that_is_not_answered_in_time_has_an_unknown_outcome(server: Server) -> None:
    server.script = [say_nothing]
    calls: list[Call] = []

    with pytest.raises(errors.AnswerLost) as caught:
        client_of(server, timedelta(milliseconds=100), on_call=calls.append).send_draft(MAILBOX, "id")

    assert [(call.operation, call.status) for call in calls] == [("send_draft", None)]
    assert caught.value.client_request_id == calls[0].client_request_id
    assert calls[0].duration >= timedelta(milliseconds=100)


def test_a_connection_that_the_server_closes_under_a_send_leaves_the_outcome_unknown(server: Server) -> None:
    # Given a connection that is kept alive
    client = client_of(server)
    client.send_mail(MAILBOX, MESSAGE)
    # When the server closes it just as the next request arrives
    server.script = [close_without_answer]
    # Then nobody can tell whether the request was read
    with pytest.raises(errors.AnswerLost):
        client.send_mail(MAILBOX, MESSAGE)
    assert server.accepted == 1


def test_a_connection_closed_by_the_server_beforehand_is_replaced_unnoticed(server: Server) -> None:
    client = client_of(server)
    server.script = [accept_and_close]
    client.send_mail(MAILBOX, MESSAGE)
    assert server.closed.wait(5)

    client.send_mail(MAILBOX, MESSAGE)

    assert server.accepted == 2


def test_a_connection_is_used_again_until_it_has_idled_for_too_long(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(server)
    for _ in range(3):
        client.send_mail(MAILBOX, MESSAGE)
    assert server.accepted == 1

    monkeypatch.setattr(transport, "MAX_IDLE", timedelta(0))
    client.send_mail(MAILBOX, MESSAGE)

    assert server.accepted == 2


@pytest.mark.parametrize("status", [400, 404, 429, 500])
def test_an_error_with_a_body_leaves_the_connection_usable(server: Server, status: int) -> None:
    client = client_of(server)
    server.script = [answering(status, b'{"error": {"code": "x"}}')]
    with pytest.raises(errors.GraphError):
        client.send_mail(MAILBOX, MESSAGE)

    client.send_mail(MAILBOX, MESSAGE)

    assert server.accepted == 1


def test_an_endless_error_body_is_not_read_to_its_end(server: Server) -> None:
    server.script = [answering(400, b"x" * 1_000_000)]

    with pytest.raises(errors.InvalidMessage):
        client_of(server).send_mail(MAILBOX, MESSAGE)


def test_a_send_accepted_with_a_body_that_breaks_off_was_accepted(server: Server) -> None:
    server.script = [answering(202, b"half", Content_Length="8", Connection="close")]

    assert client_of(server).send_mail(MAILBOX, MESSAGE).request_id is None


def test_an_answer_whose_headers_contradict_each_other_is_a_lost_one(server: Server) -> None:
    server.script = [answering(202, Content_Length="0, 5", Connection="close")]

    with pytest.raises(errors.AnswerLost):
        client_of(server).send_mail(MAILBOX, MESSAGE)


def test_a_repeatable_calls_body_that_breaks_off_is_a_transient_error(server: Server) -> None:
    server.script = [break_off]

    with pytest.raises(errors.ConnectionLost):
        client_of(server).get_message(MAILBOX, "id")


def test_a_mime_that_breaks_off_raises_in_the_middle_of_the_stream(server: Server) -> None:
    server.script = [answering(200, b"x" * 70_000, Content_Length="140000", Connection="close")]

    received: list[bytes] = []
    with client_of(server).fetch_mime(MAILBOX, "id") as chunks, pytest.raises(errors.ConnectionLost):
        received.extend(chunks)
    assert b"".join(received) == b"x" * 70_000


def test_a_mime_is_given_in_bounded_chunks_and_frees_its_connection(server: Server) -> None:
    mime, client = b"0123456789" * 50_000, client_of(server)
    server.script = [answering(200, mime)]

    with client.fetch_mime(MAILBOX, "id") as chunks:
        received = list(chunks)

    assert b"".join(received) == mime
    assert max(map(len, received)) <= 64 * 1024
    client.send_mail(MAILBOX, MESSAGE)
    assert server.accepted == 1


def test_a_mime_left_unread_does_not_confuse_the_next_call(server: Server) -> None:
    client = client_of(server)
    server.script = [answering(200, b"x" * 500_000)]

    with client.fetch_mime(MAILBOX, "id") as chunks:
        next(chunks)

    client.send_mail(MAILBOX, MESSAGE)


def test_a_send_that_no_server_takes_never_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_again:
        port = closed_again.getsockname()[1]

    with pytest.raises(errors.ConnectionFailed):
        client_at(f"http://127.0.0.1:{port}").send_mail(MAILBOX, MESSAGE)


def test_a_send_to_a_name_that_does_not_resolve_never_left() -> None:
    with pytest.raises(errors.ConnectionFailed):
        client_at("https://graph.invalid").send_mail(MAILBOX, MESSAGE)


@pytest.mark.parametrize("answer", [b"no TLS here", b""], ids=["nonsense", "closed"])
def test_a_send_that_fails_in_the_tls_handshake_never_left(answer: bytes) -> None:
    # Given a server that reads the client's hello and does not shake hands
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def refuse() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=refuse)
        thread.start()
        # When a mail is sent
        with pytest.raises(errors.ConnectionFailed):
            client_at(f"https://127.0.0.1:{listening.getsockname()[1]}").send_mail(MAILBOX, MESSAGE)
        # Then it may be sent again at once: requests reports this as it does a reset after the request
        thread.join()


def test_a_send_whose_tls_handshake_times_out_never_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = client_at(f"https://127.0.0.1:{silent.getsockname()[1]}", timedelta(milliseconds=100))

        with pytest.raises(errors.ConnectionFailed):
            client.send_mail(MAILBOX, MESSAGE)


def test_a_lost_answer_is_told_apart_after_a_failed_connection_in_the_same_thread(server: Server) -> None:
    with pytest.raises(errors.ConnectionFailed):
        client_at("https://graph.invalid").send_mail(MAILBOX, MESSAGE)
    server.script = [close_without_answer]

    with pytest.raises(errors.AnswerLost):
        client_of(server).send_mail(MAILBOX, MESSAGE)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(server: Server, status: int) -> None:
    server.script = [answering(status, Location="/elsewhere", Set_Cookie="a=b")]

    with pytest.raises(errors.UnexpectedRedirect):
        client_of(server).send_mail(MAILBOX, MESSAGE)

    assert len(server.received) == 1


def test_cookies_are_not_sent_back(server: Server) -> None:
    client = client_of(server)
    server.script = [answering(202, Set_Cookie="a=b")]

    client.send_mail(MAILBOX, MESSAGE)
    client.send_mail(MAILBOX, MESSAGE)

    assert "Cookie" not in server.received[1].headers


def test_sending_a_draft_says_that_its_body_is_empty(server: Server) -> None:
    client_of(server).send_draft(MAILBOX, "AAMk/=")

    (received,) = server.received
    assert received.headers.get_all("Content-Length") == ["0"]
    assert "Transfer-Encoding" not in received.headers
    assert received.path == "/v1.0/users/ann@contoso.example/messages/AAMk%2F%3D/send"


def test_each_thread_has_connections_of_its_own(server: Server) -> None:
    client = client_of(server)
    together = threading.Barrier(3)

    def send() -> None:
        together.wait()
        client.send_mail(MAILBOX, MESSAGE)

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert server.accepted == 3


def test_no_traceback_shows_a_mailbox_or_an_upload_url() -> None:
    client = client_at("https://graph.invalid")
    session = UploadSession(MAILBOX, "https://upload.invalid/a?authtoken=s3cret", None)

    shown = []
    for call in (lambda: client.send_mail(MAILBOX, MESSAGE), lambda: client.upload_range(session, 0, b"x", 1)):
        with pytest.raises(errors.ConnectionFailed) as caught:
            call()
        shown.append("".join(traceback.format_exception(caught.value)))

    assert not [text for text in shown if "s3cret" in text or MAILBOX in text]
    assert "s3cret" not in repr(session)


@pytest.mark.parametrize(
    "url",
    [
        "http://graph.microsoft.com/v1.0",
        "http://localhost.evil.example",
        "ftp://127.0.0.1",
        "graph.microsoft.com",
        "https://",
    ],
)
def test_a_base_url_in_the_clear_is_refused_off_the_loopback(url: str) -> None:
    with pytest.raises(errors.InsecureUrl):
        client_at(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "https://graph.example"])
def test_https_and_the_loopback_are_accepted(url: str) -> None:
    client_at(url)


def test_a_call_goes_through_the_environments_proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a proxy that refuses to connect anybody
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:secret@127.0.0.1:{server.server_port}")
    asked: list[tuple[str, str | None]] = []

    def refuse(handler: Handler) -> None:
        asked.append((handler.path, handler.headers["Proxy-Authorization"]))
        handler.send_error(407)

    monkeypatch.setattr(Handler, "do_CONNECT", refuse, raising=False)
    # When
    with pytest.raises(errors.ConnectionFailed):
        client_at("https://graph.proxied.example/v1.0").send_mail(MAILBOX, MESSAGE)
    # Then
    assert asked == [("graph.proxied.example:443", "Basic dXNlcjpzZWNyZXQ=")]


def test_a_certificate_is_held_against_the_environments_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/bundle.pem")

    with pytest.raises(errors.ConnectionFailed):
        client_at("https://graph.bundled.example/v1.0").send_mail(MAILBOX, MESSAGE)


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://graph.microsoft.com/v1.0/me", "https://graph.microsoft.com"),
        ("HTTPS://graph.microsoft.com?a=/", "https://graph.microsoft.com"),
        ("http://[::1]:8080#a", "http://[::1]:8080"),
    ],
)
def test_a_url_is_asked_for_its_host_and_for_nothing_else(url: str, origin: str) -> None:
    assert transport.origin_of(url) == origin


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/v1.0/me",
        "//graph.example/a",
        "1http://a",
        "https:graph.example",
        "https://ex\u00e4mple.com/x",
        "https://a b/",
        "http://evil.example\\@127.0.0.1/a",
        "http://evil.example@127.0.0.1/a",
        "https://graph.example\r\n/a",
    ],
)
def test_what_names_no_host_is_no_url(url: str) -> None:
    with pytest.raises(errors.InsecureUrl):
        transport.origin_of(url)
