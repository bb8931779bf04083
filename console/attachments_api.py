"""``POST /api/v1/attachments``: the body is the file, and goes into the store as it comes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from email.message import EmailMessage
from functools import partial
from typing import Annotated, NamedTuple

import anyio
import anyio.from_thread
import anyio.to_thread
from fastapi import HTTPException, Query, Request
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

import operations
from console.access import Operator
from console.api import CheckedRoute, make_router, problems

#: How many files come in at a time; each has a thread and a few megabytes. More wait for their turn.
MAX_AT_A_TIME = 8


class Patience(NamedTuple):
    """How long a client is waited for, and waits."""

    #: For the next bytes; and for all of them together, beside what they take at the least rate.
    silence: timedelta = timedelta(seconds=60)
    #: A client that drips would keep its turn from the others for ever. Half of a slow uplink's megabit a second.
    least_bytes_per_second: int = 64 * 1024
    #: Proxies give an answer up after a minute, as a rule.
    turn: timedelta = timedelta(seconds=30)


PATIENCE = Patience()

router = make_router("/attachments", "attachments")
router.route_class = CheckedRoute  # no bound on the body here: `operations.attach` has its own
_turns = anyio.Semaphore(MAX_AT_A_TIME)
#: The rest of a body is not read, however long it would go on.
_CLOSE = {"Connection": "close"}
_BUSY = {"Retry-After": "30", **_CLOSE}
_UNKNOWN_TYPE = "application/octet-stream"
#: What curl says of a body of which it was told nothing.
_NO_TYPE_GIVEN = "application/x-www-form-urlencoded"
_PROBLEMS = problems(
    {
        400: "The body broke off.",
        408: "The body did not come, or too slowly.",
        413: "The body is too large.",
        415: "The body is a form, not the file itself.",
        503: "Too many files are being stored, or a server or the store is away: try again.",
    }
)
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"*/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}


class AttachmentStored(BaseModel):
    """What to put into a `SendEmail`: `id` as `urlOrId`, `size` and `content_type` as they are."""

    id: str
    name: str
    content_type: str
    size: int = Field(description="Bytes.")
    sha256: str = Field(description="SHA-256 of the content, in hex.")
    expires_at: datetime


@router.post("", status_code=201, openapi_extra=_BODY, responses=_PROBLEMS)
async def store_attachment(
    who: Operator,
    request: Request,
    name: Annotated[str | None, Query(max_length=255, description="Else that of Content-Disposition.")] = None,
    expires_in: Annotated[int | None, Query(ge=1, le=3_000_000_000, description="Seconds.")] = None,
) -> AttachmentStored:
    """Store the body as an attachment, under the name and the Content-Type that are given."""
    content_type = request.headers.get("content-type", _UNKNOWN_TYPE)
    if content_type.lower().startswith("multipart/"):
        raise HTTPException(415, "the body is to be the file itself, not a form with it (curl: --data-binary)", _CLOSE)
    if content_type == _NO_TYPE_GIVEN:
        content_type = _UNKNOWN_TYPE
    patience: Patience = request.app.state.patience
    store = partial(
        operations.attach,
        _chunks(request.stream(), patience),
        name=name or _disposition_name(request),
        content_type=content_type,
        who=f"api:{who}",
        expires_in=timedelta(seconds=expires_in) if expires_in else None,
        declared_bytes=_declared_bytes(request),
    )
    async with _turn(patience.turn):
        try:
            # The thread is its turn's, and none of those that the other paths share.
            stored = await anyio.to_thread.run_sync(store, limiter=anyio.CapacityLimiter(1))
        except TimeoutError:
            raise HTTPException(408, "the body did not come, or too slowly", _CLOSE) from None
        except ClientDisconnect:
            raise HTTPException(400, "the body broke off") from None
    return AttachmentStored(**stored._asdict())


@asynccontextmanager
async def _turn(wait: timedelta) -> AsyncIterator[None]:
    try:
        with anyio.fail_after(wait.total_seconds()):
            await _turns.acquire()
    except TimeoutError:
        raise HTTPException(503, "too many files are being stored: try again", _BUSY) from None
    try:
        yield
    finally:
        _turns.release()


def _chunks(stream: AsyncIterator[bytes], patience: Patience) -> Iterator[bytes]:
    """Yield, in a thread, what comes to the event loop; the client is held back as the store takes it.

    Raises:
        TimeoutError: The client was waited for too long, at a time or in all; waiting for the store does not count.
    """
    silence = patience.silence.total_seconds()
    waited, received = 0.0, 0

    async def following() -> bytes | None:
        with anyio.fail_after(min(silence, silence + received / patience.least_bytes_per_second - waited)):
            return await anext(stream, None)

    while True:
        began = time.monotonic()
        chunk = anyio.from_thread.run(following)
        if chunk is None:
            return
        waited += time.monotonic() - began
        received += len(chunk)
        yield chunk


def _disposition_name(request: Request) -> str:
    """Return the file name of ``Content-Disposition``, in whichever way it is written there; else nothing."""
    header = EmailMessage()
    try:
        header["Content-Disposition"] = request.headers.get("content-disposition", "attachment")
        return header.get_filename("")
    except Exception:  # a line break, or what Python's parser stumbles over: IndexError and others
        return ""


def _declared_bytes(request: Request) -> int | None:
    given = request.headers.get("content-length", "")
    return int(given) if given.isascii() and given.isdecimal() and len(given) < 20 else None
