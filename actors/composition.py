"""From a stored ``SendEmail`` to the message that Graph is given."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import orjson

import runtime
from mail_rules import RecipientFirewall, StoppedByFirewall

#: Recipient fields of a ``SendEmail`` and of Graph's message.
_RECIPIENTS = {"to": "toRecipients", "cc": "ccRecipients", "bcc": "bccRecipients", "reply_to": "replyTo"}


def graph_message(incoming_email_id: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Return the message without its attachments, tagged so that it can be found by the email's id.

    The sender is the mailbox that the request names; ``from`` is left out, so that no send-as right is asked for.
    It, and what is replied to it, goes to whom the firewall lets it reach.

    Raises:
        StoppedByFirewall: It reaches nobody.
    """
    firewall = runtime.firewall()
    if firewall.stands:
        payload = _behind(firewall, payload)
    message = {
        "subject": payload.get("subject", ""),
        "body": payload["body"],
        "importance": payload.get("importance", "normal"),
        **{
            theirs: [{"emailAddress": {"address": address}} for address in payload[ours]]
            for ours, theirs in _RECIPIENTS.items()
            if payload.get(ours)
        },
    }
    if payload.get("headers"):
        message["internetMessageHeaders"] = [
            {"name": name, "value": value} for name, value in payload["headers"].items()
        ]
    return runtime.graph.tagged(message, incoming_email_id)


def _behind(firewall: RecipientFirewall, payload: dict[str, Any]) -> dict[str, Any]:
    reached = firewall.reached(payload)
    if not any(reached.values()):
        raise StoppedByFirewall("RECIPIENT_FIREWALL lets the mail reach none of its recipients")
    answered = {"reply_to": firewall.replied_to(payload), "headers": firewall.headers(payload)}
    return {**payload, "to": [], "cc": [], "bcc": [], **reached, **answered}


#: Joiners that scripts and emoji need; the other invisible characters only make a name look like another.
_JOINERS = "\u200c\u200d"
#: What Windows takes in no file's name; behind a colon it would write into a stream that nobody sees
#: (https://learn.microsoft.com/windows/win32/fileio/naming-a-file).
_UNFIT = re.compile(r'[<>:"|?*]')
#: Devices, whatever extension they are given (same page).
_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³]) *(?:\.|$)", re.IGNORECASE)


def file_name(name: str) -> str:
    """Return the name under which a file is attached: one under which any reader's program can save it.

    Without path, so that no program is given a folder to write into. Without invisible characters, and without the
    dots and spaces at the end that Windows drops: no name reads as another than it is, and none is saved as another.
    What Windows cannot have in a name is ``_``, and a device has one before it.
    """
    last = re.split(r"[/\\]", name)[-1]
    visible = "".join(each for each in last if each in _JOINERS or unicodedata.category(each) not in ("Cc", "Cf"))
    fit = _UNFIT.sub("_", visible).rstrip(". ").lstrip()
    return f"_{fit}" if _DEVICE.match(fit) else fit or "attachment"


def size_of(message: dict[str, Any]) -> int:
    """Return how many bytes of the mailbox's upload budget the message takes."""
    return len(orjson.dumps(message))


def attached_bytes(payload: dict[str, Any]) -> int:
    """Return how many bytes the attachments of a stored ``SendEmail`` have together."""
    return sum(attachment["size"] for attachment in payload.get("attachments", ()))
