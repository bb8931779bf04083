"""What becomes of a mail once Graph has taken it: it leaves once, twice or never, and is found somewhere afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import composition, errors
from .calls import Answer, Call
from .mailboxes import INBOX, Message

if TYPE_CHECKING:
    from .world import World


def send_mail(world: World, call: Call) -> Answer:
    message, keep = _composed(world, call)
    _check_sendable(world, call, message)
    _submit(world, call, message, keep=keep)
    return _accepted(call)


def send_draft(world: World, call: Call) -> Answer:
    if call.headers.get("Content-Length") is None:
        raise errors.GraphError(411, "ErrorInvalidRequest", "A Content-Length header is required.")
    if call.mailbox.was_submitted(call.ids[0]):
        return _send_again(world, call)
    message = call.message(call.ids[0])
    if not message.is_draft:
        raise errors.not_sendable()
    _check_sendable(world, call, message)
    _submit(world, call, message, keep=True)
    return _accepted(call)


def _composed(world: World, call: Call) -> tuple[Message, bool]:
    if call.is_mime:
        return composition.from_mime(call.body, world.contents), True
    parameters = composition.send_mail_parameters(call.json())
    return composition.from_json(parameters.message, world.contents), parameters.save_to_sent_items


def _check_sendable(world: World, call: Call, message: Message) -> None:
    behaviour = world.behaviour
    composition.check_sendable(message, call.mailbox.send_as, behaviour.max_recipients, behaviour.max_message_bytes)
    if not message.fields.get("from"):
        message.fields["from"] = {"emailAddress": {"address": call.mailbox.address, "name": call.mailbox.address}}


def _send_again(world: World, call: Call) -> Answer:
    """Answer a send of a draft that was sent before. Documented nowhere, hence a choice."""
    match world.behaviour.second_send:
        case "accepted":
            return _accepted(call)
        case "invalid":
            raise errors.not_sendable()
        case _:
            raise errors.item_not_found()


def _submit(world: World, call: Call, message: Message, *, keep: bool) -> None:
    match call.outcome:
        case "stuck":
            if not call.ids:
                call.mailbox.add(message)
            return
        case "lost":
            call.mailbox.submit(message, keep=False)
            return
        case "bounced":
            call.mailbox.add(_non_delivery_report(world, message))
        case "twice":
            world.journal.deliver(call.mailbox.address, message)
            world.journal.deliver(call.mailbox.address, message)
        case _:
            world.journal.deliver(call.mailbox.address, message)
    call.mailbox.submit(message, keep=keep)


def _non_delivery_report(world: World, message: Message) -> Message:
    """What Exchange puts into the sender's Inbox when it cannot deliver after all."""
    refused = ", ".join(message.recipients())
    report = composition.from_json(
        {
            "subject": f"Undeliverable: {message.fields.get('subject') or ''}",
            "from": {"emailAddress": {"address": "postmaster@outlook.example", "name": "Microsoft Outlook"}},
            "body": {
                "contentType": "text",
                "content": f"Delivery has failed to these recipients: {refused}\r\n"
                "Remote server returned '550 5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient not found'\r\n"
                f"Original message: {message.internet_message_id}\r\n",
            },
        },
        world.contents,
    )
    report.folder, report.sent_at = INBOX, report.created_at
    report.headers = [("In-Reply-To", message.internet_message_id), ("Auto-Submitted", "auto-replied")]
    return report


def _accepted(call: Call) -> Answer:
    answer = call.answer(202, None)
    answer.body, answer.content_type = b"", "text/plain"
    return answer
