"""Mail that waits: published and ingested like any other while nobody dispatches, then let go at once."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import orjson

from bench import load
from sandbox.world import World

_INGEST_LIMIT = timedelta(minutes=5)
_STORED = "SELECT count(*) FROM incoming_emails"
_WAITING = """
    SELECT mailbox, count(*) FROM incoming_emails
    WHERE mailbox = ANY(%(mailboxes)s) AND status = 'received' AND lease_until IS NULL GROUP BY mailbox
"""
_SETTLED = """
    SELECT count(*) FROM incoming_emails e LEFT JOIN sent_emails s ON s.incoming_email_id = e.id
    WHERE e.mailbox = ANY(%(mailboxes)s)
      AND (e.status = 'failed' OR (e.status = 'processed' AND s.backup_due_at IS NULL))
"""
_ONE_IN_HAND = "SELECT count(*) FROM incoming_emails WHERE status = 'processing' AND lease_until IS NOT NULL"


def mailboxes(count: int, name: str) -> list[str]:
    """Return mailboxes that no other run uses."""
    run = uuid.uuid4().hex[:6]
    return [f"{name}{number}-{run}@contoso.example" for number in range(count)]


def email(mailbox: str, **changes: Any) -> dict[str, Any]:
    """Return an email with an id of its own."""
    return {
        "publisher_message_id": uuid.uuid4().hex,
        "from": mailbox,
        "to": ["reader@fabrikam.example"],
        "subject": "Figures",
        "body": {"contentType": "text", "content": "The quarterly figures are ready."},
    } | changes


def emails(count: int, senders: Sequence[str], **changes: Any) -> Iterator[dict[str, Any]]:
    """Yield so many for each of the mailboxes, in turns."""
    return (email(mailbox, **changes) for _ in range(count) for mailbox in senders)


def let_go(world: World, mail: Iterable[dict[str, Any]], *, at_once: bool = True) -> int:
    """Publish mail and wait until the bridge has stored all of it; return how much that is.

    Args:
        at_once: No scheduler runs meanwhile, so that all of it waits and is let go together.

    Raises:
        Overdue: It is not stored in time.
    """
    if at_once:
        world.fleet.stop("scheduler")
    before, published = world.count(_STORED), publish(world, mail)
    world.wait_until("all are stored", lambda: world.count(_STORED) >= before + published, _INGEST_LIMIT)
    if at_once:
        world.fleet.start("scheduler")
    return published


def publish(world: World, mail: Iterable[dict[str, Any]]) -> int:
    """Publish mail, confirmed, and return how much it is."""
    bodies = [orjson.dumps(each) for each in mail]
    load.publish(world.environment["RABBITMQ_URL"], "send_email", bodies)
    return len(bodies)


def waiting(world: World, senders: Sequence[str]) -> dict[str, int]:
    """Return how many of each mailbox's emails are neither sent nor in anybody's hands."""
    return dict.fromkeys(senders, 0) | dict(world.rows(_WAITING, {"mailboxes": list(senders)}))


def settled(world: World, senders: Sequence[str]) -> int:
    """Return of how many of these mailboxes' emails nothing more is to be done."""
    return int(world.rows(_SETTLED, {"mailboxes": list(senders)})[0][0])


def one_is_in_hand(world: World) -> bool:
    """Tell whether a worker is about to send."""
    return bool(world.count(_ONE_IN_HAND))
