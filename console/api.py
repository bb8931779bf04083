"""What the parts of the management API share: who may ask, how much may be said at once, how pages go on."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import AwareDatetime

from console.access import GUARDS
from console.problems import Problem
from models.dead_letters import Place
from models.ids import as_uuid

PREFIX = "/api/v1"
#: A thousand ids fit.
MAX_BODY_BYTES = 64 * 1024
MAX_PAGE = 500

_NO_CONTROLS = r"^[^\x00-\x1f\x7f]*$"
_MAX_ID_CHARACTERS = 1000
_MAX_ADDRESS_CHARACTERS = 254
_MAX_TEXT_CHARACTERS = 256
_MAX_NAME_CHARACTERS = 64
_ADDRESS = r"[^\x00-\x20\x7f/@]+@[^\x00-\x20\x7f/@]+"

Id = Annotated[str, Path(max_length=_MAX_ID_CHARACTERS, pattern=_NO_CONTROLS)]
#: A mailbox's address, or ``*``: every mailbox.
MailboxOrEvery = Annotated[
    str,
    Path(
        max_length=_MAX_ADDRESS_CHARACTERS,
        pattern=rf"^(\*|{_ADDRESS})$",
        description="The mailbox's address; `*` for every mailbox, and the tenant.",
    ),
]
Subject = Annotated[
    str,
    Path(
        max_length=_MAX_ADDRESS_CHARACTERS,
        pattern=rf"^(\*|attachment|no-attachment|{_ADDRESS})$",
        description="The mailbox's address, the route `attachment` or `no-attachment`, or `*` for everything.",
    ),
]
Text = Annotated[str | None, Query(max_length=_MAX_TEXT_CHARACTERS, pattern=_NO_CONTROLS)]
PublishersId = Annotated[str | None, Query(max_length=_MAX_ID_CHARACTERS, pattern=_NO_CONTROLS)]
Instant = Annotated[AwareDatetime | None, Query(description="RFC 3339, with its zone: 2026-01-31T00:00:00Z.")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="At most so many.")]
Cursor = Annotated[str | None, Query(max_length=200, description="`next` of the page before; default: the first page.")]


Problems = dict[int | str, dict[str, Any]]


def problems(descriptions: dict[int, str]) -> Problems:
    """Return what the schema says of the answers that are problems."""
    return {
        status: {
            "description": description,
            "content": {"application/problem+json": {"schema": Problem.model_json_schema()}},
        }
        for status, description in descriptions.items()
    }


class CheckedRoute(APIRoute):
    """Asks for the token before anything else, knows every parameter, and tells the schema of its problems."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.responses = {**self._problems(), **self.responses}

    def _problems(self) -> Problems:
        told: dict[int, str] = {}
        if "/{id}" in self.path:
            told |= {404: "Nothing has this id."}
            if "POST" in self.methods:
                told |= {409: "It is too late for this."}
        if self.body_field:
            told |= {400: "The body is no text.", 413: "The body is too large."}
        return problems(told)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()
        guards = [each.call for each in self.dependant.dependencies if each.call in GUARDS]
        parameters = {parameter.alias for parameter in self.dependant.query_params}

        async def checked(request: Request) -> Response:
            for guard in guards:
                guard(request)  # FastAPI would read the body first, and say what is wrong with it
            _check_query(request, parameters)
            return await answer(request)

        return checked


def _check_query(request: Request, parameters: set[str]) -> None:
    """Refuse what would be left out of account: a filter that is misspelt, or the first of two."""
    given = [name for name, _ in request.query_params.multi_items()]
    faults = [_fault(name, "there is no such parameter") for name in dict.fromkeys(given) if name not in parameters]
    faults += [_fault(name, "is given more than once") for name in parameters if given.count(name) > 1]
    if faults:
        raise RequestValidationError(faults)


def _fault(name: str, said: str) -> dict[str, Any]:
    return {"loc": ("query", name[:_MAX_NAME_CHARACTERS]), "msg": said}


class BoundedRoute(CheckedRoute):
    """Reads no more of a body than `MAX_BODY_BYTES`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await answer(Request(request.scope, _bounded(request.receive)))

        return bounded


def _bounded(receive: Callable[[], Coroutine[Any, Any, Any]]) -> Callable[[], Coroutine[Any, Any, Any]]:
    received = 0

    async def receive_bounded() -> Any:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise HTTPException(413, f"a body has at most {MAX_BODY_BYTES} bytes")
        return message

    return receive_bounded


def private(response: Response) -> None:
    """What one person may see is kept in no cache."""
    response.headers["Cache-Control"] = "no-store"


#: It only tells the schema how to authenticate: `access` decides.
_BEARER = HTTPBearer(auto_error=False, description="A token of CONSOLE_TOKENS.")

_PROBLEMS = problems(
    {
        401: "No token, or a wrong one.",
        403: "A viewer's token, and this acts or takes content out.",
        422: "The request is not valid.",
        429: "Too many wrong tokens from this address.",
        503: "A server is away: try again.",
    }
)


def make_router(path: str, tag: str) -> APIRouter:
    """Return a router for one kind of thing, whose problems, bounds and authentication are those of the API."""
    return APIRouter(
        prefix=PREFIX + path,
        tags=[tag],
        route_class=BoundedRoute,
        responses=_PROBLEMS,
        dependencies=[Depends(_BEARER), Depends(private)],
    )


def cursor_to(id: str | None) -> str | None:
    """Return the cursor of the page that begins behind this row."""
    return base64.urlsafe_b64encode(id.encode()).decode() if id else None


def cursor_to_place(place: Place) -> str:
    return base64.urlsafe_b64encode(f"{place.created_at.isoformat()} {place.id}".encode()).decode()


def id_behind(cursor: str | None) -> str | None:
    """Return the id of the row before the page."""
    if cursor is None:
        return None
    id = as_uuid(_read(cursor))
    if id is None:
        raise _not_a_cursor()
    return id


def place_behind(cursor: str | None) -> Place | None:
    """Return the place before the page of dead letters."""
    if cursor is None:
        return None
    at, _, id = _read(cursor).partition(" ")
    try:
        place = Place(datetime.fromisoformat(at), as_uuid(id) or "")
    except ValueError:
        raise _not_a_cursor() from None
    if not place.id or place.created_at.tzinfo is None:
        raise _not_a_cursor()
    return place


def _read(cursor: str) -> str:
    try:
        return base64.b64decode(cursor.encode(), b"-_", validate=True).decode("ascii")
    except (binascii.Error, UnicodeError):
        raise _not_a_cursor() from None


def _not_a_cursor() -> HTTPException:
    return HTTPException(422, "the cursor is none that this list has given")
