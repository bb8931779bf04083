"""Turns what a client sends, JSON or MIME, into a message, or says why Graph would not take it."""

from __future__ import annotations

import binascii
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.message import EmailMessage, MIMEPart
from email.utils import getaddresses
from typing import Any

from . import errors, schema
from .contents import ContentStore
from .mailboxes import DRAFTS, Attachment, Message, new_id, property_key

MAX_INTERNET_HEADERS = 5

#: Atoms joined by single dots, an @, a domain of two labels or more: what Graph resolves.
_ADDRESS = re.compile(r"[^\s@<>()\[\],;:\\\".]+(?:\.[^\s@<>()\[\],;:\\\".]+)*@[^\s@.<>,;_]+(?:\.[^\s@.<>,;_]+)+")

_RECIPIENT_FIELDS = ("toRecipients", "ccRecipients", "bccRecipients")

#: Members that a client may name, but Exchange decides.
_DECIDED_BY_EXCHANGE = frozenset(
    {
        "id",
        "bodyPreview",
        "changeKey",
        "conversationId",
        "conversationIndex",
        "createdDateTime",
        "hasAttachments",
        "isDraft",
        "lastModifiedDateTime",
        "parentFolderId",
        "receivedDateTime",
        "sentDateTime",
        "uniqueBody",
        "webLink",
    }
)

#: Members that are kept in a place of their own, not among the fields.
_KEPT_APART = frozenset(
    {
        "@odata.type",
        "attachments",
        "body",
        "internetMessageHeaders",
        "internetMessageId",
        "singleValueExtendedProperties",
    }
)


def from_json(given: Any, contents: ContentStore) -> Message:
    """Compose a draft from a message in Graph's JSON.

    Raises:
        GraphError: 400, not a valid message.
    """
    schema.check("message", given)
    body = given.get("body") or {}
    message = _new_message(contents, (body.get("content") or "").encode(), (body.get("contentType") or "text").lower())
    message.fields = _plain_fields(given)
    message.headers = internet_headers(given.get("internetMessageHeaders"))
    message.properties = extended_properties(given)
    message.internet_message_id = given.get("internetMessageId") or message.internet_message_id
    message.attachments = [file_attachment(each, contents) for each in given.get("attachments") or ()]
    return message


def revise(message: Message, changes: Any, contents: ContentStore) -> dict[str, str]:
    """Apply a PATCH to a message and return the extended properties that it sets, for the mailbox to index.

    Raises:
        GraphError: 400, not a valid change. Nothing has been changed then.
    """
    schema.check("message", changes)
    if not message.is_draft and changes.keys() & {"subject", "body", "replyTo", "internetMessageId"}:
        raise errors.GraphError(400, "ErrorInvalidPropertySet", "Set action is invalid for property.")
    if changes.keys() & {"attachments", "internetMessageHeaders"}:
        raise errors.GraphError(400, "ErrorInvalidPropertySet", "Set action is invalid for property.")
    properties = extended_properties(changes)
    if body := changes.get("body"):
        message.body = contents.put((body.get("content") or "").encode())
        message.body_type = (body.get("contentType") or message.body_type).lower()
    message.fields.update(_plain_fields(changes))
    message.touch()
    return properties


def from_mime(encoded: bytes, contents: ContentStore) -> Message:
    """Compose a draft from a base64-encoded RFC 5322 message.

    Raises:
        GraphError: 400, not base64 or not a message.
    """
    try:
        raw = binascii.a2b_base64(b"".join(encoded.split()), strict_mode=True)
    except binascii.Error as error:
        raise errors.GraphError(
            400, "ErrorMimeContentInvalidBase64String", "Invalid base64 string for MIME content."
        ) from error
    parsed = message_from_bytes(raw, policy=policy.default)
    if not parsed.keys():
        raise errors.GraphError(400, "ErrorMimeContentInvalid", "The MIME content is invalid.")
    return _from_parsed_mime(parsed, contents)


def check_sendable(message: Message, mailbox_may_send_as: set[str], max_recipients: int, max_bytes: int) -> None:
    """Refuse what can be stored as a draft but not submitted.

    Raises:
        GraphError: No or too many recipients, an invalid one, a foreign sender, or too large.
    """
    recipients = [each for kind in _RECIPIENT_FIELDS for each in message.fields.get(kind) or ()]
    if not recipients or len(recipients) > max_recipients:
        raise errors.invalid_recipients()
    for recipient in recipients:
        _check_address(recipient)
    for recipient in message.fields.get("replyTo") or ():
        _check_address(recipient)
    for role in ("from", "sender"):
        claimed = ((message.fields.get(role) or {}).get("emailAddress") or {}).get("address")
        if claimed and claimed.lower() not in mailbox_may_send_as:
            raise errors.send_as_denied()
    check_size(message, max_bytes, "Cannot submit message.")


def check_size(message: Message, max_bytes: int, step: str) -> None:
    if message.size_bytes > max_bytes:
        raise errors.message_too_large(step)


def file_attachment(given: Any, contents: ContentStore) -> Attachment:
    """Make an attachment from Graph's JSON, its bytes included.

    Raises:
        GraphError: 400, not a file attachment, unnamed, or its bytes are not base64.
    """
    schema.check("fileAttachment", given)
    if "@odata.type" not in given:
        raise errors.unreadable_body(
            "A type named 'microsoft.graph.attachment' is abstract; the annotation '@odata.type' must name its kind."
        )
    if not given.get("name"):
        raise errors.GraphError(400, "ErrorRequiredPropertyMissing", "Required property is missing: Name.")
    try:
        data = binascii.a2b_base64(given.get("contentBytes") or "", strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise errors.unreadable_body("Cannot convert the literal to the expected type 'Edm.Binary'.") from error
    return Attachment(
        new_id("AAMkA"),
        given["name"],
        given.get("contentType") or "application/octet-stream",
        contents.put(data),
        bool(given.get("isInline")),
        given.get("contentId"),
        datetime.now(UTC),
    )


def internet_headers(given: list[dict[str, Any]] | None) -> list[tuple[str, str]]:
    if given is None:
        return []
    if not 0 < len(given) <= MAX_INTERNET_HEADERS:
        raise errors.GraphError(
            400,
            "InvalidInternetMessageHeaderCollection",
            f"Maximum number of headers in one message should be less than or equal to {MAX_INTERNET_HEADERS}.",
        )
    for header in given:
        name = header.get("name") or ""
        if not name.lower().startswith("x-"):
            raise errors.GraphError(
                400,
                "InvalidInternetMessageHeader",
                f"The internet message header name '{name}' should start with 'x-' or 'X-'.",
            )
    return [(header["name"], header.get("value") or "") for header in given]


def extended_properties(given: dict[str, Any]) -> dict[str, str]:
    properties = {}
    for each in given.get("singleValueExtendedProperties") or ():
        if each.get("id") is None or each.get("value") is None:
            raise errors.GraphError(400, "ErrorInvalidProperty", "An extended property needs an id and a value.")
        properties[property_key(each["id"])] = each["value"]
    return properties


def _plain_fields(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in given.items() if name not in _KEPT_APART and name not in _DECIDED_BY_EXCHANGE
    }


def _check_address(recipient: dict[str, Any]) -> None:
    address = (recipient.get("emailAddress") or {}).get("address")
    if not address:
        raise errors.invalid_recipients()
    if _ADDRESS.fullmatch(address) is None:
        raise errors.unresolved_recipient(address)


def _new_message(contents: ContentStore, body: bytes, body_type: str) -> Message:
    now = datetime.now(UTC)
    return Message(
        id=new_id(),
        immutable_id=new_id("AAMkI"),
        folder=DRAFTS,
        fields={},
        body=contents.put(body),
        body_type=body_type,
        internet_message_id=f"<{uuid.uuid4().hex}@simulated.outlook.example>",
        created_at=now,
        modified_at=now,
    )


def _from_parsed_mime(parsed: EmailMessage, contents: ContentStore) -> Message:
    body = parsed.get_body(("html", "plain"))
    text = body.get_content() if body is not None else ""
    kind = "html" if body is not None and body.get_content_subtype() == "html" else "text"
    message = _new_message(contents, text.encode(), kind)
    message.fields = {"subject": str(parsed.get("Subject", ""))}
    for field, header in zip(_RECIPIENT_FIELDS, ("To", "Cc", "Bcc"), strict=True):
        message.fields[field] = _mime_recipients(parsed, header)
    message.fields["replyTo"] = _mime_recipients(parsed, "Reply-To")
    for sender in _mime_recipients(parsed, "From")[:1]:
        message.fields["from"] = sender
    message.internet_message_id = str(parsed.get("Message-ID", "")).strip() or message.internet_message_id
    message.headers = [(name, str(value)) for name, value in parsed.items() if name.lower().startswith("x-")]
    message.attachments = [_mime_attachment(part, contents) for part in _mime_files(parsed, body)]
    return message


def _mime_recipients(parsed: EmailMessage, header: str) -> list[dict[str, Any]]:
    values = [str(value) for value in parsed.get_all(header, [])]
    return [{"emailAddress": {"name": name, "address": address}} for name, address in getaddresses(values)]


def _mime_files(parsed: EmailMessage, body: MIMEPart | None) -> list[EmailMessage]:
    leaves = [part for part in parsed.walk() if not part.is_multipart() and part is not body]
    return [part for part in leaves if part.get_filename() or part.get_content_maintype() not in ("text", "multipart")]


def _mime_attachment(part: EmailMessage, contents: ContentStore) -> Attachment:
    content_id = str(part.get("Content-ID", "")).strip("<> ") or None
    return Attachment(
        new_id("AAMkA"),
        part.get_filename() or "attachment",
        part.get_content_type(),
        contents.put(_bytes_of(part)),
        part.get_content_disposition() == "inline",
        content_id,
        datetime.now(UTC),
    )


def _bytes_of(part: EmailMessage) -> bytes:
    payload = part.get_payload(decode=True)
    return payload if isinstance(payload, bytes) else b""


@dataclass(frozen=True, slots=True)
class SendMailParameters:
    message: dict[str, Any]
    save_to_sent_items: bool


def send_mail_parameters(body: Any) -> SendMailParameters:
    """Read the parameters of sendMail; the flag may be a string, as in Microsoft's own samples.

    Raises:
        GraphError: 400, no message, another parameter, or the flag is not one.
    """
    parameters = schema.action_parameters(body, ("Message", "SaveToSentItems"))
    if parameters.get("Message") is None:
        raise errors.bad_request("The parameter 'Message' is required and must not be null.")
    flag = parameters.get("SaveToSentItems", True)
    if isinstance(flag, str) and flag.lower() in ("true", "false"):
        flag = flag.lower() == "true"
    if flag is not None and not isinstance(flag, bool):
        raise errors.unreadable_body(
            "Cannot convert the parameter 'SaveToSentItems' to the expected type 'Edm.Boolean'."
        )
    return SendMailParameters(parameters["Message"], flag is not False)
