"""Upload sessions: large attachments that arrive range by range at a URL of their own.

The URL carries its own key and refuses Graph's token, ranges must come strictly in order, and what was begun is lost
when the session is: https://learn.microsoft.com/graph/outlook-large-attachments.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from . import errors, schema
from .calls import Answer, Call
from .composition import check_size
from .contents import Spool
from .mailboxes import Attachment, Mailbox, Message, new_id

if TYPE_CHECKING:
    from .world import World

PREFIX = "/api/v2.0/"
_PATH = re.compile(r"/api/v2\.0/Users\('[^']*'\)/Messages\('[^']*'\)/AttachmentSessions\('([^']+)'\)")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(slots=True)
class UploadSession:
    id: str
    key: str
    app: str
    mailbox: Mailbox
    message: Message
    item: dict[str, Any]
    spool: Spool
    expires_at: datetime
    expires: float

    @property
    def size_bytes(self) -> int:
        return int(self.item["size"])

    def status(self) -> dict[str, Any]:
        """What Outlook says after a range: unlike at creation, a capital letter and a bare number."""
        return {
            "@odata.context": "https://outlook.office.com/api/v2.0/$metadata#Users('')/Messages('')/AttachmentSessions/$entity",
            "ExpirationDateTime": self.expires_at.isoformat().replace("+00:00", "Z"),
            "nextExpectedRanges": [str(self.spool.size_bytes)],
        }


class UploadSessions:
    """The open sessions, by id."""

    def __init__(self) -> None:
        self._sessions: dict[str, UploadSession] = {}

    def open(self, session: UploadSession) -> None:
        self._sessions[session.id] = session

    def close(self, session_id: str, *, keep: bool = False) -> None:
        """Forget a session, and unless they became an attachment also its bytes."""
        session = self._sessions.pop(session_id, None)
        if session is not None and not keep:
            session.spool.discard()

    def at(self, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> UploadSession:
        """Return the session that an upload URL leads to.

        Raises:
            GraphError: No such session, the key is wrong, or a token is presented where none may be.
        """
        parsed = _PATH.fullmatch(path)
        if parsed is None:
            raise errors.upload_session_not_found()
        if "Authorization" in headers:
            raise errors.invalid_token("Access token validation failure. Invalid audience.")
        session = self.get(parsed[1])
        if not secrets.compare_digest(query.get("authtoken", "").encode(), session.key.encode()):
            raise errors.invalid_token("The upload URL's token is invalid.")
        return session

    def get(self, session_id: str) -> UploadSession:
        session = self._sessions.get(session_id)
        if session is None or session.expires <= time.monotonic():
            raise errors.upload_session_not_found()
        return session


def create_session(world: World, call: Call) -> Answer:
    message = call.draft(call.ids[0])
    item = schema.action_parameters(call.json(), ("AttachmentItem",)).get("AttachmentItem") or {}
    schema.check("attachmentItem", item)
    _check_item(item, world)
    lifetime = world.behaviour.session_lifetime_seconds
    session = UploadSession(
        id=new_id("AAMkU"),
        key=secrets.token_urlsafe(48),
        app=call.app,
        mailbox=call.mailbox,
        message=message,
        item=item,
        spool=world.contents.spool(),
        expires_at=datetime.now(UTC) + timedelta(seconds=lifetime),
        expires=time.monotonic() + lifetime,
    )
    world.uploads.open(session)
    return call.answer(
        201,
        {
            "@odata.context": "https://graph.microsoft.com/v1.0/$metadata#microsoft.graph.uploadSession",
            "uploadUrl": _upload_url(call, session),
            "expirationDateTime": session.expires_at.isoformat().replace("+00:00", "Z"),
            "nextExpectedRanges": ["0-"],
        },
    )


def upload_range(world: World, call: Call) -> Answer:
    session = world.uploads.get(call.ids[0])
    message = session.mailbox.find(session.message.id)
    _check_range(session, call)
    _check_growth(world, message, session, len(call.body))
    session.spool.append(call.body)
    if session.spool.size_bytes < session.size_bytes:
        return call.answer(200, session.status())
    attachment = _attachment(session)
    message.attachments.append(attachment)
    message.touch()
    world.uploads.close(session.id, keep=True)
    location = f"{call.base_url}{call.path.rsplit('/', 1)[0]}/Attachments('{attachment.id}')"
    return Answer(201, headers={"Location": location})


def cancel_session(world: World, call: Call) -> Answer:
    world.uploads.close(call.ids[0])
    return Answer(204)


def _check_item(item: dict[str, Any], world: World) -> None:
    if (item.get("attachmentType") or "").lower() != "file":
        raise errors.GraphError(400, "ErrorInvalidRequest", "Only file attachments can be uploaded in a session.")
    if not item.get("name"):
        raise errors.GraphError(400, "ErrorRequiredPropertyMissing", "Required property is missing: Name.")
    size = item.get("size")
    if size is None or size < world.behaviour.min_session_bytes:
        raise errors.GraphError(
            400,
            "ErrorAttachmentSizeShouldNotBeLessThanMinimumSize",
            "Attachment size must be greater than the minimum size.",
        )
    if size > world.behaviour.max_session_bytes:
        raise errors.GraphError(400, "ErrorAttachmentSizeLimitExceeded", "Attachment size exceeds the limit.")


def _upload_url(call: Call, session: UploadSession) -> str:
    path = f"{PREFIX}Users('{secrets.token_hex(8)}')/Messages('{call.ids[0]}')/AttachmentSessions('{session.id}')"
    return f"{call.base_url}{path}?authtoken={session.key}"


def _check_range(session: UploadSession, call: Call) -> None:
    parsed = _RANGE.fullmatch(call.headers.get("Content-Range", ""))
    if parsed is None:
        raise errors.GraphError(400, "ErrorInvalidRequest", "The Content-Range header is missing or malformed.")
    first, last, total = (int(number) for number in parsed.groups())
    if total != session.size_bytes or last >= total or last - first + 1 != len(call.body):
        raise errors.invalid_range("invalidRange", "The range does not fit the session or the body.")
    if first != session.spool.size_bytes:
        code = "fragmentOverlap" if first < session.spool.size_bytes else "fragmentOutOfOrder"
        raise errors.invalid_range(code, "The range is not the one that is expected next.")


def _check_growth(world: World, message: Message, session: UploadSession, more_bytes: int) -> None:
    limit = world.behaviour.max_message_bytes - session.spool.size_bytes - more_bytes
    check_size(message, limit, "Cannot save changes made to an item to store.")


def _attachment(session: UploadSession) -> Attachment:
    item = session.item
    return Attachment(
        new_id("AAMkA"),
        item["name"],
        item.get("contentType") or "application/octet-stream",
        session.spool.finish(),
        bool(item.get("isInline")),
        item.get("contentId"),
        datetime.now(UTC),
    )
