"""The HTTP side: admits each call as Graph would, lets faults strike, answers, and writes the journal.

aiohttp's bare server is used without its application layer: a benchmark shares the machine with the simulator.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import parse_qsl

import orjson
from aiohttp import ClientError, web

from . import control_api, errors, file_server, page, routes, tokens
from .calls import JSON, Answer, Call
from .faults import Fault
from .journal import NO_ANSWER, Request
from .mailboxes import Mailbox
from .throttling import wait_seconds
from .uploads import PREFIX as UPLOAD_PREFIX
from .world import World

_DIAGNOSTICS = '{"ServerInfo":{"DataCenter":"Simulator","Slice":"E","Ring":"0","ScaleUnit":"000","RoleInstance":"SIM"}}'
_NO_LINGER = struct.pack("ii", 1, 0)
_WRITING = frozenset({"POST", "PATCH", "PUT"})


@dataclass(slots=True)
class Trace:
    """What becomes known of a request while it is served, for the journal."""

    operation: str = "unknown"
    mailbox: str = ""
    request_bytes: int = 0
    status: str = NO_ANSWER
    code: str = ""
    retry_after: str | None = None
    arrived_monotonic: float = field(default_factory=time.monotonic)


class GraphServer:
    def __init__(self, world: World) -> None:
        self.world = world
        self._files = file_server.FileServer()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._serve(request)
        except (ClientError, ConnectionError):  # the client went away while it was being answered
            return _drop(request, hard=False)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.rel_url.raw_path
        if path.startswith("/v1.0/"):
            return await self._answer(request, self._graph)
        if path.startswith(UPLOAD_PREFIX):
            return await self._answer(request, self._upload)
        if path.startswith("/control/"):
            return await control_api.serve(self.world, request)
        if path.startswith("/files/"):
            return await self._files.serve(request)
        if path == "/health":
            return web.json_response({"status": "ok"})
        if path == "/":
            return web.Response(text=page.render(self.world), content_type="text/html")
        return await self._authority(request)

    async def _authority(self, request: web.BaseRequest) -> web.StreamResponse:
        tenant, _, rest = request.path.removeprefix("/").partition("/")
        if rest == "v2.0/.well-known/openid-configuration" and request.method == "GET":
            return web.Response(body=tokens.discovery(tenant, _base_url(request)), content_type="application/json")
        if rest == "oauth2/v2.0/token" and request.method == "POST":
            return await self._answer(request, self._token)
        return web.Response(status=404, text="Not found")

    async def _answer(
        self, request: web.BaseRequest, serve: Callable[[web.BaseRequest, Trace], Awaitable[Answer]]
    ) -> web.StreamResponse:
        trace = Trace()
        request_id = str(uuid.uuid4())
        try:
            try:
                answer = await serve(request, trace)
            except errors.GraphError as refusal:
                await _drain(request)
                answer = _refusal(refusal, request, request_id)
            response = await _respond(request, answer, request_id)
            trace.status, trace.code = str(answer.status), answer.code
            trace.retry_after = answer.headers.get("Retry-After")
            return response
        except errors.ConnectionDropped as drop:
            return _drop(request, hard=drop.hard)
        finally:
            self.world.journal.note(
                Request(
                    at=datetime.now(UTC),
                    arrived_monotonic=trace.arrived_monotonic,
                    answered_monotonic=time.monotonic(),
                    operation=trace.operation,
                    mailbox=trace.mailbox,
                    status=trace.status,
                    code=trace.code,
                    request_bytes=trace.request_bytes,
                    client_request_id=request.headers.get("client-request-id"),
                    retry_after=trace.retry_after,
                    wait_seconds=wait_seconds(trace.retry_after),
                )
            )

    async def _graph(self, request: web.BaseRequest, trace: Trace) -> Answer:
        destination = routes.find(request.method, request.rel_url.raw_path)
        route = destination.route
        trace.operation, trace.mailbox = route.operation, destination.address.lower()
        grant = self.world.authority.authorize(request.headers.get("Authorization"))
        if not grant.roles & route.roles:
            raise errors.access_denied()
        mailbox = self.world.mailbox(destination.address)
        with self.world.throttle.slot(grant.app, mailbox.address):
            call = await self._call(request, trace, grant.app, mailbox)
            call.folder, call.ids = destination.folder, destination.ids
            return await self._execute(request, route, call)

    async def _upload(self, request: web.BaseRequest, trace: Trace) -> Answer:
        route = routes.upload(request.method)
        trace.operation = route.operation
        session = self.world.uploads.at(request.path, request.query, request.headers)
        trace.mailbox = session.mailbox.address
        if session.mailbox.refusal is not None:
            raise session.mailbox.refusal
        with self.world.throttle.slot(session.app, session.mailbox.address):
            call = await self._call(request, trace, session.app, session.mailbox)
            call.ids = (session.id,)
            return await self._execute(request, route, call)

    async def _token(self, request: web.BaseRequest, trace: Trace) -> Answer:
        trace.operation = "token"
        call = await self._call(request, trace, "", Mailbox("", self.world.behaviour))
        form = dict(parse_qsl(call.body.decode(errors="replace")))

        def issue(_: World, __: Call) -> Answer:
            try:
                tenant = request.path.split("/")[1]
                url = f"{call.base_url}{call.path}"
                issued = self.world.authority.issue(tenant, url, form, request.headers.get("Authorization", ""))
            except tokens.TokenRefused as refused:
                return Answer(refused.status, orjson.dumps(refused.as_json()), code=str(refused))
            return Answer(200, orjson.dumps(issued))

        return await self._execute(request, routes.Route("token", issue, frozenset()), call)

    async def _call(self, request: web.BaseRequest, trace: Trace, app: str, mailbox: Mailbox) -> Call:
        body = await self._read(request)
        trace.request_bytes = len(body)
        if request.method in _WRITING and app:
            self.world.throttle.count_upload(app, mailbox.address, len(body))
        return Call(
            operation=trace.operation,
            app=app,
            mailbox=mailbox,
            folder=None,
            ids=(),
            query=request.query,
            headers=request.headers,
            body=body,
            base_url=_base_url(request),
            path=request.rel_url.raw_path,
        )

    async def _read(self, request: web.BaseRequest) -> bytes:
        """Return the whole body; one that is too large is read to its end, or the client would not see the answer."""
        behaviour = self.world.behaviour
        pieces, size = [], 0
        async for piece in _pieces(request):
            size += len(piece)
            if size <= behaviour.max_request_bytes:
                pieces.append(piece)
        if size > behaviour.max_request_bytes:
            raise errors.request_too_large(behaviour.oversize_answer)
        return b"".join(pieces)

    async def _execute(self, request: web.BaseRequest, route: routes.Route, call: Call) -> Answer:
        if latency := self.world.behaviour.latency(route.operation):
            await asyncio.sleep(latency)
        fault = self.world.faults.take(route.operation, call.mailbox.address)
        if fault is None:
            return route.serve(self.world, call)
        return await fault.strike(_StruckCall(self.world, request, route, call, fault))


@dataclass(frozen=True, slots=True)
class _StruckCall:
    """A call with a fault in its way; implements ``faults.StruckCall``."""

    world: World
    request: web.BaseRequest
    route: routes.Route
    call: Call
    fault: Fault

    def execute(self) -> Answer:
        try:
            return self.route.serve(self.world, self.call)
        except errors.GraphError:
            self.world.faults.give_back(self.fault)
            raise

    async def hold(self, seconds: float | None, *, even_if_deserted: bool = False) -> None:
        await self.world.faults.hold(seconds, (lambda: True) if even_if_deserted else self._is_connected)

    def lose_upload_session(self) -> None:
        self.world.uploads.close(self.call.ids[0])

    def expire_token(self) -> None:
        self.world.authority.expire(self.call.headers.get("Authorization"))

    def shut_out(self, retry_after: str | None) -> None:
        self.world.throttle.shut(self.call.app, self.call.mailbox.address, retry_after)

    def _is_connected(self) -> bool:
        return self.request.transport is not None and not self.request.transport.is_closing()


def _refusal(refusal: errors.GraphError, request: web.BaseRequest, request_id: str) -> Answer:
    if refusal.form == "empty":
        return Answer(refusal.status, b"", "text/plain", refusal.headers, code=refusal.code)
    if refusal.form == "html":
        page = f"<html><head><title>{refusal.status}</title></head><body><h2>Error {refusal.status}</h2></body></html>"
        return Answer(refusal.status, page.encode(), "text/html", refusal.headers, code=refusal.code)
    body = {
        "error": {
            "code": refusal.code,
            "message": refusal.message,
            "innerError": {
                "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
                "request-id": request_id,
                "client-request-id": request.headers.get("client-request-id", request_id),
            },
        }
    }
    return Answer(refusal.status, orjson.dumps(body), JSON, refusal.headers, code=refusal.code)


async def _respond(request: web.BaseRequest, answer: Answer, request_id: str) -> web.StreamResponse:
    headers = {
        "Cache-Control": "private",
        "request-id": request_id,
        "client-request-id": request.headers.get("client-request-id", request_id),
        "x-ms-ags-diagnostic": _DIAGNOSTICS,
        "Content-Type": answer.content_type,
        **answer.headers,
    }
    if answer.stream is None:
        complete = web.Response(status=answer.status, body=answer.body, headers=headers)
        # Here rather than by aiohttp afterwards, so that the journal's instant is that at which the answer left.
        await complete.prepare(request)
        await complete.write_eof()
        return complete
    response = web.StreamResponse(status=answer.status, headers=headers)
    response.enable_chunked_encoding()
    await response.prepare(request)
    async for chunk in answer.stream:
        await response.write(chunk)
        await asyncio.sleep(0)  # let others be served, and a lost connection be noticed
    await response.write_eof()
    return response


def _drop(request: web.BaseRequest, *, hard: bool) -> web.StreamResponse:
    transport = request.transport
    if transport is not None:
        if hard:
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        transport.abort()
    return web.Response()


async def _pieces(request: web.BaseRequest) -> AsyncIterator[bytes]:
    try:
        async for piece in request.content.iter_any():
            yield piece
    except (ClientError, ConnectionError):
        raise errors.ConnectionDropped from None


async def _drain(request: web.BaseRequest) -> None:
    async for _ in _pieces(request):
        pass


def _base_url(request: web.BaseRequest) -> str:
    return f"https://{request.host}"
