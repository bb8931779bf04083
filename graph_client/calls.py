"""One authorised call to Graph: token, request ids, one more try after a 401, and an error for whatever is no success.

In layers, each adding one thing: ``call`` reads the answer, ``open`` insists on success, ``_with_fresh_token``
survives a token that was revoked, ``_observed`` reports what happened, and the transport carries.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, TypeVar

import orjson

from graph_client import errors
from graph_client.classification import Operation, Reply, classify
from graph_client.records import Call
from graph_client.retry_after import retry_after_in
from graph_client.transport import Response, Transport, read

#: Graph takes no longer request; 4 MB are named in
#: https://learn.microsoft.com/graph/api/user-post-messages and enforced with 413. Checked before anything is sent.
MAX_REQUEST_BYTES = 4 * 1024 * 1024

#: An error says little; the page of a gateway that stands in for Graph may say much.
MAX_ERROR_BYTES = 64 * 1024

#: Creating a draft or an attachment is answered with all of it, in base64, with HTML made longer.
MAX_ANSWER_BYTES = 16 * 1024 * 1024

T = TypeVar("T")
OnCall = Callable[[Call], None]
OnUnknownCode = Callable[[int, str], None]


class Tokens(Protocol):
    """Where bearer tokens come from: ``graph_client.TokenSource``, or whatever else has them."""

    def token(self) -> str:
        """Return a token that is good for a while yet."""

    def drop(self, token: str) -> None:
        """Forget a token that Graph refused."""


class Request(NamedTuple):
    """What to ask, and of whose mailbox; ``headers`` come on top of those that every call has.

    ``client_request_id`` names the call in Graph's own logs; without one each gets a new one.
    """

    operation: Operation
    mailbox: str
    method: str
    url: str
    body: bytes | None = None
    headers: Mapping[str, str] = {}
    client_request_id: str | None = None


class Calls:
    """Makes calls, for any number of threads."""

    def __init__(
        self,
        tokens: Tokens,
        timeout: timedelta,
        user_agent: str,
        on_call: OnCall | None,
        on_unknown_code: OnUnknownCode | None,
    ) -> None:
        self._tokens = tokens
        self._transport = Transport(timeout)
        self._on_call = on_call
        self._on_unknown_code = on_unknown_code
        self._headers = {
            "User-Agent": user_agent,
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "return-client-request-id": "true",
        }

    def call(self, request: Request, *, authorised: bool = True) -> Reply:
        """Make a call that succeeds, and read its answer.

        Raises:
            GraphError: The leaf that fits, see ``graph_client.errors``.
        """
        response = self.open(request, authorised=authorised)
        body = read(response, MAX_ANSWER_BYTES)
        reply = _reply(response, body)
        if body is None and request.operation.repeatable:
            raise errors.ConnectionLost("the answer did not arrive whole", **reply.facts())
        return reply

    def open(self, request: Request, *, authorised: bool = True) -> Response:
        """Like ``call``, with the body of the answer still to be read."""
        if request.body is not None and len(request.body) > MAX_REQUEST_BYTES:
            raise errors.MessageTooLarge("the request exceeds what Graph takes")
        response = self._with_fresh_token(request) if authorised else self._observed(request, None)
        if _is_success(request.operation, response.status):
            return response
        reply = _reply(response, read(response, MAX_ERROR_BYTES))
        raise classify(reply, request.operation, self._on_unknown_code)

    def _with_fresh_token(self, request: Request) -> Response:
        """Repeat the request once with another token after a 401, which precedes any effect on the mailbox."""
        token = self._tokens.token()
        response = self._observed(request, token)
        if response.status != 401:
            return response
        read(response, MAX_ERROR_BYTES)
        self._tokens.drop(token)
        return self._observed(request, self._tokens.token())

    def _observed(self, request: Request, token: str | None) -> Response:
        client_request_id = request.client_request_id or str(uuid.uuid4())
        headers = {**self._headers, **request.headers, "client-request-id": client_request_id}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        if request.body is not None:
            headers["Content-Length"] = str(len(request.body))
        began = time.perf_counter()
        try:
            response = self._transport.open(
                request.method,
                request.url,
                headers,
                request.body,
                client_request_id=client_request_id,
                repeatable=request.operation.repeatable,
            )
        except errors.GraphError:  # not what a look has raised: then nobody was asked
            self._report(request, client_request_id, time.perf_counter() - began, None)
            raise
        self._report(request, client_request_id, time.perf_counter() - began, response)
        return response

    def _report(self, request: Request, client_request_id: str, seconds: float, response: Response | None) -> None:
        if self._on_call is None:
            return
        headers: Mapping[str, str] = {} if response is None else response.headers
        call = Call(
            operation=request.operation.name,
            mailbox=request.mailbox,
            status=None if response is None else response.status,
            duration=timedelta(seconds=seconds),
            retry_after=retry_after_in(headers),
            request_id=headers.get("request-id"),
            client_request_id=client_request_id,
        )
        # An observer must not decide what became of a mail: its failure would hide that the mail was sent.
        with suppress(Exception):
            self._on_call(call)


def _is_success(operation: Operation, status: int) -> bool:
    """A send is accepted by 202 and nothing else, also if a Retry-After comes with it."""
    return 200 <= status < 300 if operation.repeatable else status == 202


def _reply(response: Response, body: bytes | None) -> Reply:
    return Reply(response.status, response.headers, body or b"", response.client_request_id)


def encode(value: Any) -> bytes:
    """Return the value as JSON.

    Raises:
        InvalidMessage: It holds what JSON cannot say, such as half a surrogate pair.
    """
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as exc:
        raise errors.InvalidMessage("cannot be written as JSON") from exc


def understood(reply: Reply, parse: Callable[[Any], T]) -> T:
    """Return what ``parse`` makes of the answer's JSON.

    Raises:
        ServerUnavailable: It makes nothing of it; something other than Graph may have answered.
    """
    try:
        return parse(orjson.loads(reply.body))
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise errors.ServerUnavailable("a success whose body cannot be understood", **reply.facts()) from exc
