"""Writes a message as RFC 5322 text, anew each time and piece by piece, so that a large attachment needs no memory.

The e-mail package writes everything but the attachments' bytes; these are streamed into the places it leaves for them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP, SMTPUTF8
from email.utils import format_datetime
from typing import Any

from .mailboxes import Attachment, Message
from .rendering import body_text

_ADDRESS_HEADERS = (
    ("To", "toRecipients"),
    ("Cc", "ccRecipients"),
    ("Bcc", "bccRecipients"),
    ("Reply-To", "replyTo"),
)


async def stream(message: Message) -> AsyncIterator[bytes]:
    """Yield the message's MIME."""
    rest = _skeleton(message).as_bytes()
    for attachment in _in_order_of_appearance(message):
        before, _, rest = rest.partition(_place(attachment))
        yield before
        for chunk in attachment.content.chunks():
            yield base64.encodebytes(chunk).replace(b"\n", b"\r\n")
    yield rest


def _skeleton(message: Message) -> EmailMessage:
    """The whole message with a mark in place of each attachment's bytes."""
    skeleton = EmailMessage(policy=_policy(message))
    _set_headers(skeleton, message)
    skeleton.set_content(body_text(message), subtype="html" if message.body_type == "html" else "plain")
    boundary = hashlib.sha256(message.immutable_id.encode()).hexdigest()[:40]
    inline, files = _split(message)
    if inline:
        skeleton.make_related(boundary=f"_005_{boundary}_")
    for attachment in inline:
        skeleton.attach(_part(attachment, skeleton.policy))
    if files:
        skeleton.make_mixed(boundary=f"_004_{boundary}_")
    for attachment in files:
        skeleton.attach(_part(attachment, skeleton.policy))
    return skeleton


def _split(message: Message) -> tuple[list[Attachment], list[Attachment]]:
    inline = [each for each in message.attachments if each.is_inline]
    return inline, [each for each in message.attachments if not each.is_inline]


def _in_order_of_appearance(message: Message) -> list[Attachment]:
    inline, files = _split(message)
    return inline + files


def _part(attachment: Attachment, policy: Any) -> EmailMessage:
    part = EmailMessage(policy=policy)
    disposition = "inline" if attachment.is_inline else "attachment"
    part["Content-Type"] = _one_line(attachment.content_type)
    part["Content-Disposition"] = disposition
    part.set_param("name", _one_line(attachment.name))
    part.set_param("filename", _one_line(attachment.name), header="Content-Disposition")
    if attachment.content_id:
        part["Content-ID"] = f"<{_one_line(attachment.content_id)}>"
    part["Content-Transfer-Encoding"] = "base64"
    part.set_payload(_place(attachment).decode())
    return part


def _place(attachment: Attachment) -> bytes:
    return f"=={hashlib.sha256(attachment.id.encode()).hexdigest()}==\r\n".encode()


def _set_headers(skeleton: EmailMessage, message: Message) -> None:
    sender = _addresses([message.fields["from"]]) if message.fields.get("from") else []
    if sender:
        skeleton["From"] = sender
    for header, field in _ADDRESS_HEADERS:
        if addresses := _addresses(message.fields.get(field) or []):
            skeleton[header] = addresses
    skeleton["Subject"] = _one_line(message.fields.get("subject") or "")
    skeleton["Date"] = format_datetime(message.sent_at or message.created_at)
    skeleton["Message-ID"] = _one_line(message.internet_message_id)
    skeleton["Importance"] = (message.fields.get("importance") or "normal").lower()
    for name, value in message.headers:
        skeleton[_one_line(name)] = _one_line(value)


def _addresses(recipients: list[dict[str, Any]]) -> list[Address]:
    found = []
    for recipient in recipients:
        mailbox = recipient.get("emailAddress") or {}
        user, _, domain = _one_line(mailbox.get("address") or "").rpartition("@")
        found.append(Address(_one_line(mailbox.get("name") or ""), user, domain))
    return found


def _policy(message: Message) -> Any:
    """Addresses beyond ASCII can only be written as UTF-8 (RFC 6532)."""
    return SMTP if all(address.isascii() for address in message.recipients()) else SMTPUTF8


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
