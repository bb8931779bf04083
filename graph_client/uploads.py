"""Upload sessions: how an attachment that does not fit into one request gets to Graph, in ranges and in order.

A session's URL belongs to another host and is its own authority, so no token goes with a range; Outlook refuses one
that comes with it (https://learn.microsoft.com/graph/outlook-large-attachments). There is no documented way to ask
a session how far it is: whoever uploads keeps the offset, and starts a new session when in doubt.
"""

from __future__ import annotations

from typing import Any

from graph_client import errors
from graph_client.calls import Calls, Request, encode, understood
from graph_client.classification import Operation, next_expected_offset
from graph_client.records import UploadSession, parse_instant
from graph_client.transport import origin_of, require_secure

#: 12 x 320 KiB, which is 3.75 MiB. Outlook advises to stay below 4 MB a request; other Graph uploads insist on
#: multiples of 320 KiB, and keeping to that costs nothing
#: (https://learn.microsoft.com/graph/api/driveitem-createuploadsession).
UPLOAD_RANGE_BYTES = 12 * 320 * 1024

#: An upload session takes no larger attachment (https://learn.microsoft.com/graph/outlook-large-attachments).
MAX_ATTACHMENT_BYTES = 150 * 1024 * 1024

_CREATE = Operation("create_upload_session")
_UPLOAD = Operation("upload_range", target="upload")
_CANCEL = Operation("cancel_upload", target="upload")


def create(
    calls: Calls,
    mailbox: str,
    message_url: str,
    *,
    name: str,
    size_bytes: int,
    content_type: str,
    is_inline: bool,
    content_id: str | None,
) -> UploadSession:
    """Open a session, see ``GraphClient.create_upload_session``."""
    if size_bytes > MAX_ATTACHMENT_BYTES:
        raise errors.AttachmentTooLarge("no upload session takes as much")
    item: dict[str, Any] = {
        "attachmentType": "file",
        "name": name,
        "size": size_bytes,
        "contentType": content_type,
        "isInline": is_inline,
    }
    if content_id is not None:
        item["contentId"] = content_id
    url = f"{message_url}/attachments/createUploadSession"
    headers = {"Content-Type": "application/json"}
    reply = calls.call(Request(_CREATE, mailbox, "POST", url, encode({"AttachmentItem": item}), headers))
    session = understood(reply, lambda body: _session(mailbox, body))
    require_secure(origin_of(session.url))
    return session


def _session(mailbox: str, body: dict[str, Any]) -> UploadSession:
    expires_at = parse_instant(body.get("expirationDateTime"))
    return UploadSession(mailbox, str(body["uploadUrl"]), expires_at, next_expected_offset(body) or 0)


def upload(calls: Calls, session: UploadSession, offset: int, content: bytes, total_bytes: int) -> int | None:
    """Upload one range, see ``GraphClient.upload_range``."""
    end = offset + len(content)
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Range": f"bytes {offset}-{end - 1}/{total_bytes}",
    }
    request = Request(_UPLOAD, session.mailbox, "PUT", session.url, content, headers)
    reply = calls.call(request, authorised=False)
    if reply.status == 201:
        return None
    return understood(reply, _wanted)


def _wanted(body: dict[str, Any]) -> int:
    """Return the next offset; an answer that names none is not understood."""
    if (offset := next_expected_offset(body)) is None:
        raise ValueError("no range is named")
    return offset


def cancel(calls: Calls, session: UploadSession) -> None:
    """Give up a session, see ``GraphClient.cancel_upload``."""
    try:
        calls.call(Request(_CANCEL, session.mailbox, "DELETE", session.url), authorised=False)
    except errors.UploadSessionLost:
        return  # it had ended by itself
