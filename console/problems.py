"""Whatever cannot be answered is said in one shape, ``application/problem+json`` (RFC 9457).

``detail`` is a sentence for people. Nothing repeats what was given in a body or a header, but for the name of a field.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

import attachments
import limiter
import models
import operations
import outbox
import vault


class Problem(BaseModel):
    """Why a request was not answered; ``errors``: what is wrong ``where``, in ``query``, ``path`` or ``body``."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[dict[str, str]] | None = None


#: What is away now may be asked again after so many seconds.
_RETRY_AFTER_SECONDS = "5"
#: An exception that is another's child comes before it.
_STATUSES: dict[type[Exception], HTTPStatus] = {
    operations.NotOpen: HTTPStatus.CONFLICT,
    operations.NotFound: HTTPStatus.NOT_FOUND,
    operations.NotCancellable: HTTPStatus.CONFLICT,
    operations.NotReplayable: HTTPStatus.CONFLICT,
    operations.NotALimit: HTTPStatus.UNPROCESSABLE_ENTITY,
    operations.NotAttachable: HTTPStatus.UNPROCESSABLE_ENTITY,
    attachments.TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    attachments.StoreUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    models.NotStorable: HTTPStatus.UNPROCESSABLE_ENTITY,
    operations.ServerAway: HTTPStatus.SERVICE_UNAVAILABLE,
    models.DatabaseAway: HTTPStatus.SERVICE_UNAVAILABLE,
    limiter.Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    outbox.Unconfirmed: HTTPStatus.SERVICE_UNAVAILABLE,
    vault.VaultError: HTTPStatus.INTERNAL_SERVER_ERROR,
}


def answer_problems(app: FastAPI) -> None:
    """Have the application answer with a problem whatever it cannot do."""
    for exception in _STATUSES:
        app.add_exception_handler(exception, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _unforeseen)


def _refused(_request: Request, error: Exception) -> JSONResponse:
    status = next(status for exception, status in _STATUSES.items() if isinstance(error, exception))
    headers = {"Retry-After": _RETRY_AFTER_SECONDS} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
    return _problem(status, str(error), headers)


def _http(_request: Request, error: Any) -> JSONResponse:
    return _problem(error.status_code, str(error.detail), error.headers)


def _invalid(_request: Request, error: Any) -> JSONResponse:
    faults = [{"where": ".".join(map(str, each["loc"])), "problem": each["msg"]} for each in error.errors()]
    return _problem(HTTPStatus.UNPROCESSABLE_ENTITY, "the request is not valid", errors=faults)


def _unforeseen(_request: Request, _error: Exception) -> JSONResponse:
    return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "something failed here; the console's log says what")


def _problem(status: int, detail: str, headers: Any = None, errors: list[dict[str, str]] | None = None) -> JSONResponse:
    problem = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, errors=errors)
    body = problem.model_dump(exclude_none=True)
    kept_nowhere = {"Cache-Control": "no-store", **(headers or {})}
    return JSONResponse(body, status, kept_nowhere, media_type="application/problem+json")
