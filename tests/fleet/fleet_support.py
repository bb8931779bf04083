"""Emails to publish, and what became of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pika

from sandbox.world import World
from simulator import files
from simulator.control import Simulator

#: No line that the fleet logs may contain one of these.
BODY_MARK = "Zitronenfalter"
ADDRESS_MARK = "kaisermantel"
SUBJECT_MARK = "Trauermantel"


class Fate(NamedTuple):
    """What an operator can see of an email."""

    id: str
    publisher_message_id: str
    status: str
    attempt_count: int
    last_error: str | None
    evidence: list[dict[str, Any]]
    archived: bool
    over: bool


_FATES = """
    SELECT e.id::text, e.publisher_message_id, e.status, e.attempt_count, e.last_error,
           coalesce(s.response_metadata->'evidence', '[]'),
           EXISTS (SELECT 1 FROM email_backups b WHERE b.incoming_email_id = e.id),
           e.status IN ('failed', 'cancelled', 'expired') OR (e.status = 'processed' AND s.backup_due_at IS NULL)
    FROM incoming_emails e LEFT JOIN sent_emails s ON s.incoming_email_id = e.id
    WHERE e.publisher_message_id = ANY(%(ids)s)
"""


def a_mailbox(name: str = "ann") -> str:
    """Return a mailbox that no other test uses."""
    return f"{name}-{uuid.uuid4().hex[:8]}-{ADDRESS_MARK}@contoso.example"


def an_email(mailbox: str, **changes: Any) -> dict[str, Any]:
    """Return an email with an id of its own; None leaves a field out."""
    email = {
        "publisher_message_id": f"order-{uuid.uuid4().hex}",
        "from": mailbox,
        "to": [f"bob.{ADDRESS_MARK}@fabrikam.example"],
        "subject": f"{SUBJECT_MARK} is on its way",
        "body": {"contentType": "text", "content": f"Your {BODY_MARK} has been sent.\n"},
    } | changes
    return {name: value for name, value in email.items() if value is not None}


def plain_send(world: World) -> str:
    """Return the call by which a mail without attachments leaves: the fault that meets it is asked for there."""
    return {"sendmail": "send_mail", "draft": "send_draft"}[world.environment["SEND_PLAIN_VIA"]]


def emails(count: int, mailbox: str, **changes: Any) -> list[dict[str, Any]]:
    return [an_email(mailbox, **changes) for _ in range(count)]


def an_attachment(simulator: Simulator, size_bytes: int, **faults: Any) -> dict[str, Any]:
    """Return an attachment whose bytes are those of `attached_sha256`."""
    seed = uuid.uuid4().hex[:12]
    url = simulator.file_url(size_bytes, seed, **faults)
    return {"name": f"{seed}.bin", "size": size_bytes, "urlOrId": url}


def attached_sha256(attachment: dict[str, Any]) -> str:
    return files.sha256(attachment["name"].removesuffix(".bin"), attachment["size"])


def fates(world: World, sent: Iterable[dict[str, Any]]) -> dict[str, Fate]:
    """Return what is known of these emails, by the publisher's id."""
    ids = [email["publisher_message_id"] for email in sent]
    return {row[1]: Fate(*row) for row in world.rows(_FATES, {"ids": ids})}


def fate(world: World, email: dict[str, Any]) -> Fate | None:
    return fates(world, [email]).get(email["publisher_message_id"])


def settled(world: World, sent: Iterable[dict[str, Any]], seconds: float = 90) -> dict[str, Fate]:
    """Wait until nothing more happens to these emails by itself, and return what became of them."""
    wanted = {email["publisher_message_id"]: email for email in sent}

    def all_over() -> dict[str, Fate]:
        found = fates(world, wanted.values())
        return found if len(found) == len(wanted) and all(each.over for each in found.values()) else {}

    return world.wait_until(f"{len(wanted)} emails are settled", all_over, timedelta(seconds=seconds))


def settled_one(world: World, email: dict[str, Any], seconds: float = 30) -> Fate:
    return settled(world, [email], seconds)[email["publisher_message_id"]]


def deliveries(world: World, fates: Iterable[Fate]) -> dict[str, int]:
    """Return how often each of these emails left, by the publisher's id."""
    by_tag = world.simulator.delivery_counts_by_tag()
    return {fate.publisher_message_id: by_tag.get(fate.id, 0) for fate in fates}


def assert_each_left_once(world: World, fates: Iterable[Fate]) -> None:
    left = deliveries(world, fates)
    assert {id: count for id, count in left.items() if count != 1} == {}


def events_of(world: World, fate: Fate, type: str) -> list[Any]:
    return [event for event in world.events(type) if event.body["incoming_email_id"] == fate.id]


def arrived(world: World, mailbox: str) -> list[datetime]:
    """Return when Graph answered each request for the mailbox."""
    return [datetime.fromisoformat(request["at"]) for request in world.simulator.requests(mailbox.lower())]


def now() -> datetime:
    return datetime.now(UTC)


def put(world: World, queue: str, *bodies: bytes, **properties: Any) -> None:
    """Put raw messages on any queue."""
    with pika.BlockingConnection(pika.URLParameters(world.environment["RABBITMQ_URL"])) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for body in bodies:
            channel.basic_publish("", queue, body, pika.BasicProperties(delivery_mode=2, **properties), mandatory=True)


def take_all(world: World, queue: str) -> list[tuple[pika.BasicProperties, bytes]]:
    """Take what is ready in a queue."""
    taken = []
    with pika.BlockingConnection(pika.URLParameters(world.environment["RABBITMQ_URL"])) as connection:
        channel = connection.channel()
        while (message := channel.basic_get(queue, auto_ack=True))[0] is not None:
            taken.append(message[1:])
    return taken
