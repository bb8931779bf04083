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
from fastapi import APIRouter, Depends, HTTPException, Query, Request
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

import models
import operations
from attachments import StoreUnavailable, TooLarge
from console.access import Access

#: How many files come in at a time; each has a thread and a few megabytes. More wait for their turn.
MAX_AT_A_TIME = 8
#: A client that sends nothing for so long is given up.
PATIENCE = timedelta(seconds=60)


class AttachmentStored(BaseModel):
    """What to put into a `SendEmail`: `id` as `urlOrId`, `size` and `content_type` as they are."""

    id: str
    name: str
    content_type: str
    size: int = Field(description="Bytes.")
    sha256: str = Field(description="SHA-256 of the content, in hex.")
    expires_at: datetime


def router(access: Access, patience: timedelta = PATIENCE) -> APIRouter:
    """Return the route for operators that ``access`` lets in."""
    api = APIRouter(prefix="/api/v1", tags=["attachments"])
    turns = anyio.CapacityLimiter(MAX_AT_A_TIME)

    @api.post("/attachments", status_code=201, responses=_ANSWERS, openapi_extra=_BODY)
    async def store_attachment(
        request: Request,
        name: Annotated[str | None, Query(max_length=255, description="Else that of Content-Disposition.")] = None,
        expires_in: Annotated[int | None, Query(ge=1, le=3_000_000_000, description="Seconds.")] = None,
        who: str = Depends(access.operator),  # an annotation could not name ``access``: see `console.app`
    ) -> AttachmentStored:
        """Store the body as an attachment, under the name and the Content-Type that are given."""
        store = partial(
            operations.attach,
            _chunks(request.stream(), patience),
            name=name or _disposition_name(request),
            content_type=request.headers.get("content-type", "application/octet-stream"),
            who=who,
            expires_in=timedelta(seconds=expires_in) if expires_in else None,
            declared_bytes=_declared_bytes(request),
        )
        return AttachmentStored(**(await _stored(store, turns))._asdict())

    return api


async def _stored(store: partial[operations.Attached], turns: anyio.CapacityLimiter) -> operations.Attached:
    """Store in a thread of its own, and say in HTTP why not."""
    try:
        return await anyio.to_thread.run_sync(store, limiter=turns)
    except operations.NotAttachable as reason:
        raise HTTPException(422, str(reason)) from None
    except TooLarge as reason:
        raise HTTPException(413, str(reason)) from None
    except TimeoutError:
        raise HTTPException(408, "the body did not come") from None
    except ClientDisconnect:
        raise HTTPException(400, "the body broke off") from None
    except StoreUnavailable as away:
        raise HTTPException(503, str(away)) from None
    except models.DatabaseAway:
        raise HTTPException(503, "a server is away: /readyz names it") from None


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
    except ValueError:  # a line break
        return ""
    return header.get_filename("")


def _declared_bytes(request: Request) -> int | None:
    given = request.headers.get("content-length", "")
    return int(given) if given.isascii() and given.isdecimal() and len(given) < 20 else None


_BODY = {
    "requestBody": {
        "required": True,
        "content": {"*/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_ANSWERS: dict[int | str, dict[str, str]] = {
    401: {"description": "No token, or none that is known."},
    403: {"description": "A viewer's token."},
    408: {"description": "The body did not come."},
    413: {"description": "The file is larger than ATTACHMENT_MAX_MB."},
    422: {"description": "The name, the Content-Type or expires_in is not possible."},
    503: {"description": "The store or a server is away."},
}
