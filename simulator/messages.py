"""The calls on messages and their attachments."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from . import composition, errors, mime, odata, rendering
from .calls import Answer, Call
from .mailboxes import DRAFTS, FOLDER_NAMES, Attachment, Message, folder_id

if TYPE_CHECKING:
    from .world import World


def list_messages(world: World, call: Call) -> Answer:
    odata.check_options(call.query)
    selected, expanded = odata.parse_select(call.query), odata.parse_expand(call.query)
    alternatives = world.behaviour.filters_take_alternatives
    matching = odata.parse_filter(call.query.get("$filter"), alternatives=alternatives).messages(
        call.mailbox, call.folder
    )
    page = odata.page(matching, call.query)
    listing: dict[str, Any] = {
        "@odata.context": f"{rendering.CONTEXT}('{call.mailbox.address}')/messages",
        "value": [
            rendering.message_json(each, immutable=call.wants_immutable_ids, selected=selected, expanded=expanded)
            for each in page.messages
        ],
    }
    if page.next_query is not None:
        listing["@odata.nextLink"] = f"{call.base_url}{call.path}?{page.next_query}"
    return call.answer(200, listing)


def create_draft(world: World, call: Call) -> Answer:
    if call.is_mime and call.folder is not None:
        raise errors.undeserializable_body()
    compose = composition.from_mime if call.is_mime else composition.from_json
    message = compose(call.body if call.is_mime else call.json(), world.contents)
    composition.check_size(message, world.behaviour.max_message_bytes, "Cannot save changes made to an item to store.")
    message.folder = call.folder or DRAFTS
    message.visible_from = time.monotonic() + call.draft_hidden_for_seconds
    call.mailbox.add(message)
    return _shown(call, message, 201)


def get_message(_: World, call: Call) -> Answer:
    odata.check_options(call.query)
    return _shown(call, call.message(call.ids[0]), 200)


def update_message(world: World, call: Call) -> Answer:
    message = call.message(call.ids[0])
    changes = call.json()
    properties = composition.revise(message, changes, world.contents)
    for key, value in properties.items():
        call.mailbox.set_property(message, key, value)
    if changes.get("internetMessageId"):
        call.mailbox.set_internet_id(message, changes["internetMessageId"])
    return _shown(call, message, 200)


def delete_message(_: World, call: Call) -> Answer:
    call.mailbox.discard(call.message(call.ids[0]))
    return Answer(204)


def get_mime(_: World, call: Call) -> Answer:
    message = call.message(call.ids[0])
    written = mime.stream(message)
    return Answer(200, content_type="text/plain", stream=_broken_off(written) if call.truncate_mime else written)


def get_folder(_: World, call: Call) -> Answer:
    folder = call.folder or ""
    messages = list(call.mailbox.listing(folder))
    return call.answer(
        200,
        {
            "id": folder_id(folder),
            "displayName": FOLDER_NAMES[folder],
            "totalItemCount": len(messages),
            "unreadItemCount": sum(not each.fields.get("isRead", True) for each in messages),
        },
    )


def list_attachments(_: World, call: Call) -> Answer:
    selected = {name for name in call.query.get("$select", "").split(",") if name}
    with_bytes = not selected or "contentBytes" in selected
    rendered = [
        rendering.attachment_json(each, with_bytes=with_bytes) for each in call.message(call.ids[0]).attachments
    ]
    if selected:
        keep = selected | {"id", "@odata.type"}
        rendered = [{name: value for name, value in each.items() if name in keep} for each in rendered]
    return call.answer(200, {"value": rendered})


def attach(world: World, call: Call) -> Answer:
    message = call.draft(call.ids[0])
    attachment = composition.file_attachment(call.json(), world.contents)
    room = world.behaviour.max_message_bytes - attachment.content.size_bytes
    composition.check_size(message, room, "Cannot save changes made to an item to store.")
    message.attachments.append(attachment)
    message.touch()
    return call.answer(201, rendering.attachment_json(attachment, with_bytes=True))


def get_attachment(_: World, call: Call) -> Answer:
    return call.answer(200, rendering.attachment_json(_attachment(call), with_bytes=True))


def get_attachment_bytes(_: World, call: Call) -> Answer:
    attachment = _attachment(call)
    return Answer(200, content_type=attachment.content_type, stream=_chunks(attachment))


def delete_attachment(_: World, call: Call) -> Answer:
    message = call.draft(call.ids[0])
    message.attachments.remove(_attachment(call))
    message.touch()
    return Answer(204)


def _shown(call: Call, message: Message, status: int) -> Answer:
    selected, expanded = odata.parse_select(call.query), odata.parse_expand(call.query)
    shown = rendering.message_json(message, immutable=call.wants_immutable_ids, selected=selected, expanded=expanded)
    context = {"@odata.context": f"{rendering.CONTEXT}('{call.mailbox.address}')/messages/$entity"}
    return call.answer(status, context | shown)


def _attachment(call: Call) -> Attachment:
    message_id, attachment_id = call.ids
    for attachment in call.message(message_id).attachments:
        if attachment.id == attachment_id:
            return attachment
    raise errors.item_not_found()


async def _chunks(attachment: Attachment) -> AsyncIterator[bytes]:
    for chunk in attachment.content.chunks():
        yield chunk


async def _broken_off(written: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield half of the first piece, then break the connection."""
    async for piece in written:
        yield piece[: len(piece) // 2]
        raise errors.ConnectionDropped
