"""Judges a run: Graph's own record of what left is held against the database, the archive and the events.

Nothing is taken from what the fleet says of itself alone: a mail counts as sent if Graph delivered it, as archived if
its copy can be opened and is a copy of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from bench.copies import wrong_copies
from bench.mail import Email, attachments
from sandbox.world import World

_TOLD = ("SendEmailReceived", "SendEmailSent")
_MUST_BE_NONE = (
    "not archived once",
    "archive wrong",
    "not acknowledged",
    "not told as sent",
    "told otherwise",
    "repeated under another id",
    "attachments wrong",
    "content wrong",
    "of nobody's emails",
    "not processed",
    "not recorded as sent",
    "events unpublished",
    "leases left",
    "dead letters open",
)
#: Stands for the id of a mail that the fleet does not know; matches none, nor that of mail without a tag.
_UNKNOWN = "unknown to the fleet"

_STATES = """
    SELECT e.publisher_message_id, e.id::text, e.status, coalesce(s.status, 'none')
    FROM incoming_emails e LEFT JOIN sent_emails s ON s.incoming_email_id = e.id
"""
_UNPUBLISHED = "SELECT count(*) FROM outbox_events WHERE published_at IS NULL"
_LEASES = """
    SELECT (SELECT count(*) FROM incoming_emails WHERE lease_until IS NOT NULL OR lease_token IS NOT NULL)
         + (SELECT count(*) FROM sent_emails WHERE backup_lease_until IS NOT NULL)
"""
_WERE_IN_DOUBT = """
    SELECT count(*) FROM sent_emails
    WHERE jsonb_array_length(coalesce(response_metadata->'evidence', '[]')) > 1
"""


@dataclass(frozen=True)
class Verdict:
    """What the record shows."""

    figures: dict[str, int]
    #: The publisher's ids.
    lost_ids: list[str]
    duplicated_ids: list[str]

    @property
    def lost(self) -> int:
        return len(self.lost_ids)

    @property
    def duplicated(self) -> int:
        return len(self.duplicated_ids)

    @property
    def holds(self) -> bool:
        return self.lost == self.duplicated == 0 and not any(self.figures[name] for name in _MUST_BE_NONE)


def judge(world: World, mail: list[Email]) -> Verdict:
    """Hold Graph's record against the database, the archive and the events."""
    record = _Record(world, mail)
    counts = record.deliveries
    left = [(email["publisher_message_id"], count) for email, count in zip(mail, counts, strict=True)]
    figures = {
        "emails": len(mail),
        "rows": len(record.states),
        "delivered once": counts.count(1),
        **_archived(record),
        **_told(record),
        **_delivered_right(record),
        **_left_over(record),
        "were in doubt": world.count(_WERE_IN_DOUBT),
    }
    return Verdict(figures, [id for id, count in left if not count], [id for id, count in left if count > 1])


def unpublished(world: World) -> int:
    """Return how many events wait in the outbox."""
    return world.count(_UNPUBLISHED)


def all_told(world: World, count: int) -> bool:
    """Tell whether so many emails have been answered and told as sent."""
    return all(len({event.body["publisher_message_id"] for event in world.events(kind)}) >= count for kind in _TOLD)


class _Record:
    """What is asked of several times."""

    def __init__(self, world: World, mail: list[Email]) -> None:
        self.world = world
        self.mail = mail
        #: The fleet's id, the email's status and that of its sending, by the publisher's id.
        self.states: dict[str, tuple[str, str, str]] = {row[0]: row[1:] for row in world.rows(_STATES)}
        self.delivered_by_tag: Mapping[str, int] = world.simulator.delivery_counts_by_tag()

    def state(self, email: Email) -> tuple[str, str, str]:
        return self.states.get(email["publisher_message_id"], (_UNKNOWN, "none", "none"))

    @cached_property
    def by_id(self) -> dict[str, Email]:
        return {self.state(email)[0]: email for email in self.mail}

    @cached_property
    def deliveries(self) -> list[int]:
        """How often each email left."""
        return [self.delivered_by_tag.get(self.state(email)[0], 0) for email in self.mail]


def _archived(record: _Record) -> dict[str, int]:
    copies = dict(record.world.rows("SELECT incoming_email_id::text, count(*) FROM email_backups GROUP BY 1"))
    return {
        "not archived once": sum(copies.get(record.state(email)[0], 0) != 1 for email in record.mail),
        "archive wrong": wrong_copies(record.world, record.by_id),
    }


def _told(record: _Record) -> dict[str, int]:
    events = record.world.events()
    told = Counter((event.type, event.body.get("publisher_message_id")) for event in events)
    ids = [email["publisher_message_id"] for email in record.mail]
    return {
        "not acknowledged": sum(not told["SendEmailReceived", id] for id in ids),
        "not told as sent": sum(not told["SendEmailSent", id] for id in ids),
        "told otherwise": sum(event.type not in _TOLD for event in events),
        "events repeated": sum(count - 1 for count in told.values()),
        "repeated under another id": sum(len(ids) - 1 for ids in _ids_of_events(record.world)),
    }


def _ids_of_events(world: World) -> Iterator[set[str]]:
    """Yield under which ids each event came: one, however often it came."""
    ids: dict[tuple[str, str], set[str]] = {}
    for event in world.events():
        ids.setdefault((event.type, event.body.get("publisher_message_id", "")), set()).add(event.message_id)
    yield from ids.values()


def _delivered_right(record: _Record) -> dict[str, int]:
    wrong_attachments = wrong_content = 0
    for delivery in record.world.simulator.deliveries():
        have = sorted((each["name"], each["sha256"]) for each in delivery["attachments"])
        for email in filter(None, map(record.by_id.get, delivery["tags"])):
            wrong_attachments += have != attachments(email)
            wrong_content += any(delivery[name] != value for name, value in _content(email).items())
    return {
        "attachments wrong": wrong_attachments,
        "content wrong": wrong_content,
        "of nobody's emails": sum(record.delivered_by_tag.values()) - sum(record.deliveries),
    }


def _content(email: Email) -> dict[str, object]:
    """Return what a delivery should say of it."""
    return {
        "mailbox": email["from"].lower(),
        "recipients": email["to"],
        "subject": email["subject"],
        "body": email["body"]["content"],
    }


def _left_over(record: _Record) -> dict[str, int]:
    world = record.world
    return {
        "not processed": sum(record.state(email)[1] != "processed" for email in record.mail),
        "not recorded as sent": sum(record.state(email)[2] != "sent" for email in record.mail),
        "events unpublished": unpublished(world),
        "leases left": world.count(_LEASES),
        "dead letters": world.count("SELECT count(*) FROM dlq"),
        "dead letters open": world.count("SELECT count(*) FROM dlq WHERE status = 'open'"),
    }
