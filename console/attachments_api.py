"""``POST /api/v1/attachments``: the body is the file, and goes into the store as it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
from email.message import EmailMessage
from functools import partial
from typing import Annotated

import anyio
import anyio.from_thread
import anyio.to_thread
from fastapi import HTTPException, Query, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

import operations
from console.access import Operator
from console.api import make_router

#: How many files come in at a time; each has a thread and a few megabytes. More wait for their turn.
MAX_AT_A_TIME = 8
#: A client that sends nothing for so long is given up.
PATIENCE = timedelta(seconds=60)


router = make_router("/attachments", "attachments")
router.route_class = APIRoute  # no bound on the body here: `operations.attach` has its own
_turns = anyio.CapacityLimiter(MAX_AT_A_TIME)
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


@router.post("", status_code=201, openapi_extra=_BODY)
async def store_attachment(
    who: Operator,
    request: Request,
    name: Annotated[str | None, Query(max_length=255, description="Else that of Content-Disposition.")] = None,
    expires_in: Annotated[int | None, Query(ge=1, le=3_000_000_000, description="Seconds.")] = None,
) -> AttachmentStored:
    """Store the body as an attachment, under the name and the Content-Type that are given."""
    store = partial(
        operations.attach,
        _chunks(request.stream(), PATIENCE),
        name=name or _disposition_name(request),
        content_type=request.headers.get("content-type", "application/octet-stream"),
        who=f"api:{who}",
        expires_in=timedelta(seconds=expires_in) if expires_in else None,
        declared_bytes=_declared_bytes(request),
    )
    try:
        stored = await anyio.to_thread.run_sync(store, limiter=_turns)
    except TimeoutError:
        raise HTTPException(408, "the body did not come") from None
    except ClientDisconnect:
        raise HTTPException(400, "the body broke off") from None
    return AttachmentStored(**stored._asdict())


def _chunks(stream: AsyncIterator[bytes], patience: timedelta) -> Iterator[bytes]:
    """Yield, in a thread, what comes to the event loop; the client is held back as the store takes it."""

    async def following() -> bytes | None:
        with anyio.fail_after(patience.total_seconds()):
            return await anext(stream, None)

    while (chunk := anyio.from_thread.run(following)) is not None:
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
