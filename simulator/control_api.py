"""What tests, demos and benchmarks may ask of the simulator, over HTTP and from this machine only.

``control.Simulator`` is its client; the two change together.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from typing import Any

import orjson
from aiohttp import web
from cryptography import x509

from . import errors, routes
from .faults import KINDS
from .mailboxes import FOLDERS_BY_NAME
from .rendering import message_json
from .tokens import App
from .world import World

Command = Callable[[World, dict[str, Any]], Any]

_REFUSALS: dict[str, Callable[[str], errors.GraphError | None]] = {
    "available": lambda _: None,
    "denied": lambda _: errors.blocked_by_policy(),
    "unlicensed": lambda _: errors.mailbox_not_enabled(),
    "unknown": errors.invalid_user,
}


async def serve(world: World, request: web.BaseRequest) -> web.StreamResponse:
    if not _is_local(request):
        return web.Response(status=403)
    command = _COMMANDS.get(request.path.removeprefix("/control/"))
    if command is None:
        return web.Response(status=404, text="No such command.")
    body = await request.content.read()
    try:
        given = dict(request.query) | (orjson.loads(body) if body else {})
        result = command(world, given)
    except (KeyError, TypeError, ValueError, errors.GraphError) as error:
        return web.Response(status=400, text=str(error))
    return web.Response(body=orjson.dumps(result), content_type="application/json")


def _is_local(request: web.BaseRequest) -> bool:
    return request.remote is not None and ipaddress.ip_address(request.remote).is_loopback


def _add_fault(world: World, given: dict[str, Any]) -> Any:
    if given.get("kind") not in KINDS:
        raise ValueError(f"no fault {given.get('kind')}; there are {', '.join(KINDS)}")
    if given.get("operation") not in (*routes.OPERATIONS, "token", "any"):
        raise ValueError(f"no operation {given.get('operation')}; there are any, token, {', '.join(routes.OPERATIONS)}")
    if given.get("mailbox"):
        given["mailbox"] = given["mailbox"].lower()
    return world.faults.add(**given).as_json()


def _faults(world: World, _: dict[str, Any]) -> Any:
    return [fault.as_json() for fault in world.faults]


def _clear_faults(world: World, _: dict[str, Any]) -> Any:
    world.faults.clear()
    for mailbox in world.mailboxes.values():
        mailbox.refusal = None


def _release(world: World, _: dict[str, Any]) -> Any:
    world.faults.release()


def _reset(world: World, _: dict[str, Any]) -> Any:
    world.reset()


def _limits(world: World, given: dict[str, Any]) -> Any:
    return asdict(world.throttle.limits.set(**given))


def _behaviour(world: World, given: dict[str, Any]) -> Any:
    return asdict(world.behaviour.set(**given))


def _mailbox_state(world: World, given: dict[str, Any]) -> Any:
    mailbox = world.mailbox_to_configure(given["mailbox"])
    mailbox.refusal = _REFUSALS[given["state"]](given["mailbox"])


def _allow_send_as(world: World, given: dict[str, Any]) -> Any:
    world.mailbox_to_configure(given["mailbox"]).send_as.add(given["address"].lower())


def _register_app(world: World, given: dict[str, Any]) -> Any:
    pem = given.pop("certificate", None)
    certificate = x509.load_pem_x509_certificate(pem.encode()) if pem else None
    known = world.authority.apps.get(given["client_id"])
    app = known or App(given["client_id"], given.get("secret", ""))
    app.secret = given.get("secret") or app.secret
    app.certificate = certificate or app.certificate
    app.roles = tuple(given.get("roles", app.roles))
    world.authority.apps[app.client_id] = app


def _expire_tokens(world: World, _: dict[str, Any]) -> Any:
    world.authority.expire_all()


def _deliveries(world: World, given: dict[str, Any]) -> Any:
    mailbox = given["mailbox"].lower() if given.get("mailbox") else None
    return [each.as_json() for each in world.journal.deliveries_of(mailbox, given.get("tag"))]


def _delivery_counts(world: World, _: dict[str, Any]) -> Any:
    return dict(world.journal.delivered_tags)


def _requests(world: World, given: dict[str, Any]) -> Any:
    mailbox = given["mailbox"].lower() if given.get("mailbox") else None
    found = (
        {"number": number, **each.as_json()}
        for number, each in world.journal.requests_after(int(given.get("after") or 0))
        if mailbox in (None, each.mailbox) and given.get("operation") in (None, each.operation)
    )
    return list(islice(found, given.get("limit")))


def _request_counts(world: World, _: dict[str, Any]) -> Any:
    counts = world.journal.request_counts
    return {
        "requests": [
            {"operation": operation, "status": status, "mailbox": mailbox, "count": number}
            for (operation, status, mailbox), number in counts.items()
        ],
        "most_in_flight": world.throttle.most_in_flight(),
        "provoked_429": [
            {"mailbox": mailbox, "limit": limit, "count": number}
            for (mailbox, limit), number in world.throttle.provoked.items()
        ],
        "early_retries": dict(world.throttle.early_retries),
        "deliveries": len(world.journal.deliveries),
    }


def _messages(world: World, given: dict[str, Any]) -> Any:
    folder = given.get("folder")
    key = None if folder is None else FOLDERS_BY_NAME[folder.lower()]
    return [
        message_json(each, immutable=False, selected=None, expanded=frozenset(each.properties))
        | {"attachmentNames": [attachment.name for attachment in each.attachments]}
        for each in world.mailbox_to_configure(given["mailbox"]).listing(key)
    ]


_COMMANDS: dict[str, Command] = {
    "add-fault": _add_fault,
    "faults": _faults,
    "clear-faults": _clear_faults,
    "release": _release,
    "reset": _reset,
    "limits": _limits,
    "behaviour": _behaviour,
    "mailbox-state": _mailbox_state,
    "allow-send-as": _allow_send_as,
    "register-app": _register_app,
    "expire-tokens": _expire_tokens,
    "deliveries": _deliveries,
    "delivery-counts": _delivery_counts,
    "requests": _requests,
    "request-counts": _request_counts,
    "messages": _messages,
}
