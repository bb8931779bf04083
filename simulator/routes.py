"""Which call a method and path mean, and which role it takes.

Roles as in https://learn.microsoft.com/graph/permissions-reference: whoever may write may not therefore send.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote

from . import errors, messages, submission, uploads
from .calls import Answer, Call
from .mailboxes import FOLDERS_BY_NAME

if TYPE_CHECKING:
    from .world import World

Serve = Callable[["World", Call], Answer]

_SEND = frozenset({"Mail.Send"})
_WRITE = frozenset({"Mail.ReadWrite"})
_READ = frozenset({"Mail.Read", "Mail.ReadWrite"})


@dataclass(frozen=True, slots=True)
class Route:
    operation: str
    serve: Serve
    roles: frozenset[str]


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a path leads: a route, and what the path says besides."""

    route: Route
    address: str
    folder: str | None
    ids: tuple[str, ...]


#: By the path below the mailbox, with * for an id and without the folder.
_ROUTES: dict[tuple[str, ...], dict[str, Route]] = {
    ("sendmail",): {"POST": Route("send_mail", submission.send_mail, _SEND)},
    ("messages",): {
        "GET": Route("find", messages.list_messages, _READ),
        "POST": Route("create_draft", messages.create_draft, _WRITE),
    },
    ("messages", "*"): {
        "GET": Route("get_message", messages.get_message, _READ),
        "PATCH": Route("update_message", messages.update_message, _WRITE),
        "DELETE": Route("delete_message", messages.delete_message, _WRITE),
    },
    ("messages", "*", "$value"): {"GET": Route("mime", messages.get_mime, _READ)},
    ("messages", "*", "send"): {"POST": Route("send_draft", submission.send_draft, _SEND)},
    ("messages", "*", "attachments"): {
        "GET": Route("list_attachments", messages.list_attachments, _READ),
        "POST": Route("attach", messages.attach, _WRITE),
    },
    ("messages", "*", "attachments", "createuploadsession"): {
        "POST": Route("create_upload_session", uploads.create_session, _WRITE)
    },
    ("messages", "*", "attachments", "*"): {
        "GET": Route("get_attachment", messages.get_attachment, _READ),
        "DELETE": Route("delete_attachment", messages.delete_attachment, _WRITE),
    },
    ("messages", "*", "attachments", "*", "$value"): {
        "GET": Route("get_attachment", messages.get_attachment_bytes, _READ)
    },
    (): {"GET": Route("get_folder", messages.get_folder, _READ)},
}

_WORDS = frozenset(word for path in _ROUTES for word in path) - {"*"}

_UPLOAD_ROUTES = {
    "PUT": Route("upload_range", uploads.upload_range, frozenset()),
    "DELETE": Route("cancel_upload_session", uploads.cancel_session, frozenset()),
}

OPERATIONS = frozenset(route.operation for routes in (*_ROUTES.values(), _UPLOAD_ROUTES) for route in routes.values())


def find(method: str, raw_path: str) -> Destination:
    """Return where a path below ``/v1.0`` leads.

    Raises:
        GraphError: Nowhere, or not with this method.
    """
    collection, address, *below = [unquote(segment) for segment in raw_path.split("/")[2:]] + [""] * 2
    if collection == "me":
        raise errors.bad_request("/me request is only valid with delegated authentication flow.")
    below = [segment for segment in below if segment]
    folder = _take_folder(below)
    shape = tuple(word if (word := segment.lower()) in _WORDS else "*" for segment in below)
    routes = _ROUTES.get(shape)
    if collection != "users" or routes is None or not (shape or folder):
        raise errors.bad_request("Resource not found for the segment.")
    ids = tuple(segment for segment, word in zip(below, shape, strict=True) if word == "*")
    return Destination(_by_method(routes, method), address, folder, ids)


def upload(method: str) -> Route:
    return _by_method(_UPLOAD_ROUTES, method)


def _by_method(routes: dict[str, Route], method: str) -> Route:
    route = routes.get(method)
    if route is None:
        raise errors.GraphError(
            405, "Request_BadRequest", "Specified HTTP method is not allowed for the request target."
        )
    return route


def _take_folder(below: list[str]) -> str | None:
    """Remove a leading ``mailFolders/{id}`` and return the folder that it names."""
    if len(below) < 2 or below[0].lower() != "mailfolders":
        return None
    folder = FOLDERS_BY_NAME.get(below[1]) or FOLDERS_BY_NAME.get(below[1].lower())
    if folder is None:
        raise errors.malformed_id()
    del below[:2]
    return folder
