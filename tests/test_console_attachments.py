"""``POST /api/v1/attachments``: whoever may, stores a file by sending it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
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
from console.access import Access, parse_tokens
from console.app import make_app

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
    """Send a body in pieces, the client being "gone" after some; return status and what was answered."""
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
        if piece == "gone":
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": True}

    async def send(message: Any) -> None:
        said.append(message)

    asyncio.run((app or make_app(Access(parse_tokens(TOKENS))))(scope, receive, send))
    body = b"".join(part.get("body", b"") for part in said[1:])
    return said[0]["status"], orjson.loads(body)


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


def test_a_client_that_says_nothing_is_given_up() -> None:
    async def silence() -> AsyncIterator[bytes]:
        yield b"x"
        await anyio.sleep_forever()

    async def take() -> list[bytes]:
        chunks = attachments_api._chunks(silence(), timedelta(milliseconds=20))
        return await anyio.to_thread.run_sync(list, chunks)

    with pytest.raises(TimeoutError):
        anyio.run(take)


def test_a_store_that_is_away_is_answered_with_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "store", Store("file:///proc/nowhere"))
    assert post([b"x"], name="a")[0] == 503
