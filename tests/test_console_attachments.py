"""``POST /api/v1/attachments``: whoever may, stores a file by sending it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import anyio
import anyio.to_thread
import orjson
import pytest
import support
from fastapi import FastAPI
from support import table

import runtime
from attachments import Store
from console import attachments_api
from console.access import Access
from console.app import make_app
from console.attachments_api import Patience
from console_tokens import parse_tokens

shared_database, tables, configure = support.shared_database, support.tables, support.configure
pytestmark = pytest.mark.usefixtures("tables")

TOKENS = "grafana:viewer:a-token-of-the-viewer, ann:operator:another-long-token"
ANN = {"Authorization": "Bearer another-long-token"}
FILE = hashlib.shake_256(b"a file").digest(2_500_000)
PIECES = [FILE[start : start + 60_000] for start in range(0, len(FILE), 60_000)]


def post(
    pieces: list[bytes | str],
    headers: dict[str, str] | None = None,
    *,
    client: str = "203.0.113.9",
    app: FastAPI | None = None,
    **query: str,
) -> tuple[int, Any]:
    """Send a body in pieces; return status and what was answered."""
    said = asyncio.run(exchange(app or make_app(Access(parse_tokens(TOKENS))), pieces, headers, client, **query))
    return said.status, said.body


class Said(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any


async def exchange(
    app: FastAPI,
    pieces: list[bytes | str],
    headers: dict[str, str] | None = None,
    client: str = "203.0.113.9",
    **query: str,
) -> Said:
    """Send a body in pieces, the client being "gone" or "silent" after some, or in a "pause"; return the answer."""
    given = {"Content-Type": "application/pdf", **ANN, **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": "POST",
        "path": "/api/v1/attachments",
        "raw_path": b"/api/v1/attachments",
        "query_string": urlencode(query).encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in given.items() if value],
        "client": (client, 1),
        "server": ("127.0.0.1", 80),
    }
    waiting, said = list(pieces), list[Any]()

    async def receive() -> dict[str, Any]:
        if not waiting:
            return {"type": "http.request", "body": b"", "more_body": False}
        piece = waiting.pop(0)
        if piece == "silent":
            await anyio.sleep_forever()
        if piece == "pause":
            await anyio.sleep(0.01)
            piece = waiting.pop(0)
        if piece == "gone":
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": True}

    async def send(message: Any) -> None:
        said.append(message)

    await app(scope, receive, send)
    body = b"".join(part.get("body", b"") for part in said[1:])
    given_back = {name.decode(): value.decode() for name, value in said[0]["headers"]}
    return Said(said[0]["status"], given_back, orjson.loads(body))


def test_a_file_is_stored_as_it_comes_and_can_be_sent() -> None:
    status, stored = post(PIECES, name="Angebot für Ümläut.pdf", expires_in="3600")
    assert status == 201
    (row,) = table("stored_attachments")
    assert stored == {
        "id": row["id"],
        "name": "Angebot für Ümläut.pdf",
        "content_type": "application/pdf",
        "size": len(FILE),
        "sha256": hashlib.sha256(FILE).hexdigest(),
        "expires_at": stored["expires_at"],
    }
    assert row["created_by"] == "api:ann"
    assert 3500 < support.seconds_until("stored_attachments", "expires_at", "id", row["id"]) <= 3600
    with runtime.source.open(stored["id"], declared_size=len(FILE)) as stream:
        assert b"".join(stream.chunks(1_000_000)) == FILE


def test_a_form_is_no_file_and_a_client_that_was_told_no_type_says_nothing() -> None:
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert post([b"--x"], form, name="a.pdf")[0] == 415
    assert table("stored_attachments") == []
    curl = {"Content-Type": "application/x-www-form-urlencoded"}
    assert post([b"x"], curl, name="a.pdf")[1]["content_type"] == "application/octet-stream"


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('attachment; filename="a b.pdf"', "a b.pdf"),
        (f"attachment; filename*=UTF-8''{quote('für.pdf')}", "für.pdf"),
        ("inline; filename=a.pdf", "a.pdf"),
    ],
)
def test_the_name_may_be_given_in_content_disposition(disposition: str, name: str) -> None:
    assert post([b"x"], {"Content-Disposition": disposition})[1]["name"] == name


def test_an_empty_file_is_one() -> None:
    assert post([], name="empty")[1]["size"] == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer another-long-tokem"}, 401),
        ({"Authorization": "Bearer a-token-of-the-viewer"}, 403),
    ],
)
def test_only_an_operator_stores_files(headers: dict[str, str], status: int) -> None:
    assert post(PIECES, headers, client="127.0.0.1", name="a")[0] == status
    assert table("stored_attachments") == []


def test_without_tokens_nobody_stores_files() -> None:
    assert post([b"x"], {"Authorization": ""}, app=make_app(Access([])), name="a")[0] == 401
    assert post([b"x"], {"Authorization": ""}, app=make_app(Access([])), client="127.0.0.1", name="a")[0] == 403


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ({}, {}),
        ({}, {"name": "a\nb"}),
        ({}, {"name": "a" * 256}),
        ({}, {"name": "a", "expires_in": "0"}),
        ({}, {"name": "a", "expires_in": "99999999"}),
        ({"Content-Type": "pdf"}, {"name": "a"}),
        ({"Content-Length": "2"}, {"name": "a"}),
    ],
)
def test_what_cannot_be_stored_as_asked_is_answered_with_422(headers: dict[str, str], query: dict[str, str]) -> None:
    assert post([b"x"], headers, **query)[0] == 422
    assert [row for row in table("stored_attachments") if row["stored_at"]] == []


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "2500000"}])
def test_more_than_the_limit_is_answered_with_413(configure: Any, headers: dict[str, str]) -> None:
    configure(attachment_max_mb=1)
    status, answer = post(PIECES, headers, name="a")
    assert (status, "1048576" in answer["detail"]) == (413, True)


def test_a_body_that_breaks_off_is_not_stored() -> None:
    assert post([*PIECES, "gone"], name="a")[0] == 400
    assert [row for row in table("stored_attachments") if row["stored_at"]] == []


def impatient(**patience: Any) -> FastAPI:
    given = Patience(silence=timedelta(milliseconds=300), turn=timedelta(milliseconds=50))
    return make_app(Access(parse_tokens(TOKENS)), given._replace(**patience))


def test_a_client_that_says_nothing_is_given_up() -> None:
    said = asyncio.run(exchange(impatient(), [b"x", "silent"], name="a"))
    assert (said.status, said.headers["connection"]) == (408, "close")
    assert [row for row in table("stored_attachments") if row["stored_at"]] == []


def test_a_client_that_drips_is_given_up_though_it_is_never_silent_for_long() -> None:
    dripping: list[bytes | str] = ["pause", b"x"] * 200
    assert asyncio.run(exchange(impatient(), dripping, name="a")).status == 408
    # But one that is as fast as it must be may take its time
    slow_enough = impatient(least_bytes_per_second=50)
    assert asyncio.run(exchange(slow_enough, ["pause", b"xx"] * 60, name="a")).status == 201


def test_who_is_held_back_by_the_store_is_not_given_up() -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x"

    def store_slowly(chunks: Iterator[bytes]) -> bytes:
        return b"".join(chunk for chunk in chunks if not time.sleep(0.05))

    async def take() -> bytes:
        chunks = attachments_api._chunks(body(), Patience(silence=timedelta(milliseconds=300)))
        return await anyio.to_thread.run_sync(store_slowly, chunks)

    assert anyio.run(take) == b"x" * 10


def test_who_gets_no_turn_in_time_is_told_when_to_come_again() -> None:
    async def nine_at_a_time() -> list[Said]:
        app = impatient()
        silent = [asyncio.ensure_future(exchange(app, ["silent"], name="a")) for _ in range(8)]
        await asyncio.sleep(0.1)
        return [await exchange(app, [b"x"], name="a"), *await asyncio.gather(*silent)]

    ninth, *others = asyncio.run(nine_at_a_time())
    assert (ninth.status, ninth.headers["retry-after"], ninth.headers["connection"]) == (503, "30", "close")
    assert {said.status for said in others} == {408}
    # And their turns are free again
    assert asyncio.run(exchange(impatient(), [b"x"], name="a")).status == 201


def test_a_store_that_is_away_is_answered_with_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "store", Store("file:///proc/nowhere"))
    assert post([b"x"], name="a")[0] == 503
