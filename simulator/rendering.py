"""Messages and attachments as Graph's JSON."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from typing import Any

from .mailboxes import Attachment, Message, folder_id

CONTEXT = "https://graph.microsoft.com/v1.0/$metadata#users"
_ALWAYS = ("id", "@odata.etag")
_HAS_HTML = re.compile(r"<html[\s>]", re.IGNORECASE)


def instant(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def body_text(message: Message) -> str:
    """The body as Exchange gives it back: HTML becomes a whole document, whatever was submitted."""
    text = message.body.read().decode(errors="replace")
    if message.body_type != "html" or _HAS_HTML.search(text):
        return text
    head = '<head>\r\n<meta http-equiv="Content-Type" content="text/html; charset=utf-8">\r\n</head>'
    return f"<html>\r\n{head}\r\n<body>\r\n{text}\r\n</body>\r\n</html>\r\n"


def has_attachments(message: Message) -> bool:
    return any(not each.is_inline for each in message.attachments)


def message_json(
    message: Message, *, immutable: bool, selected: frozenset[str] | None, expanded: frozenset[str]
) -> dict[str, Any]:
    rendered = _all_members(message, immutable, selected)
    if selected is not None:
        rendered = {name: value for name, value in rendered.items() if name in selected or name in _ALWAYS}
    if shown := [
        {"id": _property_id(key), "value": value} for key, value in message.properties.items() if key in expanded
    ]:
        rendered["singleValueExtendedProperties"] = shown
    if "attachments" in expanded:
        rendered["attachments"] = [attachment_json(each, with_bytes=True) for each in message.attachments]
    return rendered


def attachment_json(attachment: Attachment, *, with_bytes: bool) -> dict[str, Any]:
    """An attachment; its ``size`` is, as in Exchange, larger than its bytes are."""
    content = attachment.content
    rendered = {
        "@odata.type": "#microsoft.graph.fileAttachment",
        "@odata.mediaContentType": attachment.content_type,
        "id": attachment.id,
        "lastModifiedDateTime": instant(attachment.modified_at),
        "name": attachment.name,
        "contentType": attachment.content_type,
        "size": content.size_bytes + content.size_bytes // 22 + 200,
        "isInline": attachment.is_inline,
        "contentId": attachment.content_id,
        "contentLocation": None,
    }
    if with_bytes:
        rendered["contentBytes"] = base64.b64encode(content.read()).decode()
    return rendered


def _all_members(message: Message, immutable: bool, selected: frozenset[str] | None) -> dict[str, Any]:
    fields = message.fields
    sent_at = instant(message.sent_at or message.created_at)
    needs_body = selected is None or bool(selected & {"body", "bodyPreview", "uniqueBody"})
    text = body_text(message) if needs_body else ""
    change_key = f"CQAAABYAAAD{message.change:08d}"
    rendered = {
        "@odata.etag": f'W/"{change_key}"',
        "id": message.immutable_id if immutable else message.id,
        "createdDateTime": instant(message.created_at),
        "lastModifiedDateTime": instant(message.modified_at),
        "changeKey": change_key,
        "categories": fields.get("categories") or [],
        "receivedDateTime": sent_at,
        "sentDateTime": sent_at,
        "hasAttachments": has_attachments(message),
        "internetMessageId": message.internet_message_id,
        "subject": fields.get("subject") or "",
        "bodyPreview": re.sub(r"<[^>]*>|\s+", " ", text).strip()[:255],
        "importance": (fields.get("importance") or "normal").lower(),
        "parentFolderId": folder_id(message.folder),
        "conversationId": f"AAQk{message.internet_message_id.strip('<>').partition('@')[0]}=",
        "isDeliveryReceiptRequested": fields.get("isDeliveryReceiptRequested"),
        "isReadReceiptRequested": bool(fields.get("isReadReceiptRequested")),
        "isRead": fields.get("isRead", True),
        "isDraft": message.is_draft,
        "webLink": "https://outlook.office365.com/owa/",
        "inferenceClassification": fields.get("inferenceClassification") or "focused",
        "body": {"contentType": message.body_type, "content": text},
        "sender": fields.get("sender") or fields.get("from"),
        "from": fields.get("from"),
        "flag": fields.get("flag") or {"flagStatus": "notFlagged"},
    }
    rendered |= {name: fields.get(name) or [] for name in ("toRecipients", "ccRecipients", "bccRecipients", "replyTo")}
    if selected is not None and "internetMessageHeaders" in selected and message.headers:
        rendered["internetMessageHeaders"] = [{"name": name, "value": value} for name, value in message.headers]
    return rendered


def _property_id(key: str) -> str:
    kind, _, rest = key.partition(" ")
    if rest.startswith("0x"):
        return f"{kind.capitalize()} {rest}"
    guid, by, name = rest.split(" ", 2)
    return f"{kind.capitalize()} {{{guid}}} {by.capitalize()} {name}"
