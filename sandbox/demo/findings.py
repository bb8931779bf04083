"""What became of each mail, and whether that is what had to.

mailfleet's tables and events say what it believes; the simulator's record of deliveries says what is true.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sandbox.demo.mails import Ending, Mail
from sandbox.world import World
from simulator import files

RECEIVED = "SendEmailReceived"
FINAL = {
    Ending.SENT: "SendEmailSent",
    Ending.FAILED: "SendEmailFailed",
    Ending.EXPIRED: "SendEmailExpired",
    Ending.REJECTED: "SendEmailRejected",
}

_ROWS = """
    SELECT e.publisher_message_id, e.id::text, e.status, e.attempt_count, e.created_at, s.sent_at, s.status,
           coalesce(s.response_metadata->'evidence', '[]'), s.backup_due_at IS NOT NULL, b.size, b.compressed_size,
           (SELECT reason FROM dlq WHERE dlq.incoming_email_id = e.id LIMIT 1)
    FROM incoming_emails e
    LEFT JOIN sent_emails s ON s.incoming_email_id = e.id
    LEFT JOIN email_backups b ON b.incoming_email_id = e.id
"""


class Row(NamedTuple):
    """What the tables know of an email. Sizes in bytes, of the archived MIME and of its sealed copy."""

    id: str
    status: str
    attempts: int
    created_at: datetime
    sent_at: datetime | None
    sending: str | None
    evidence: list[dict[str, Any]]
    backup_due: bool
    size_bytes: int | None
    sealed_bytes: int | None
    dead_letter: str | None

    @property
    def in_doubt(self) -> bool:
        return self.sending == "in_doubt"


@dataclass(frozen=True)
class Finding:
    """One mail with all that is known of it afterwards.

    Attributes:
        row: None if mailfleet has not accepted it.
        events: The types of its events, each counted once however often it came.
        deliveries: What the simulator let go, as `Simulator.deliveries` tells it.
    """

    mail: Mail
    row: Row | None = None
    events: frozenset[str] = frozenset()
    deliveries: tuple[Mapping[str, Any], ...] = ()

    @property
    def status(self) -> str:
        if self.row:
            return self.row.status
        return Ending.REJECTED if FINAL[Ending.REJECTED] in self.events else "not received"

    @property
    def settled(self) -> bool:
        """Whether nothing more will happen to it: its last event is out, and the archive has what it is to have."""
        return bool(self.events & set(FINAL.values())) and not (self.row and self.row.backup_due)

    @property
    def lost(self) -> bool:
        return self.mail.ending is Ending.SENT and not self.deliveries

    @property
    def duplicated(self) -> bool:
        return len(self.deliveries) > 1

    def problems(self) -> list[str]:
        """Return in what it differs from what had to become of it; empty if in nothing."""
        found = [*self._wrong_deliveries(), *self._wrong_state()]
        if self.deliveries and not found:
            found = _differences(self.mail, self.deliveries[0])
        return found

    def _wrong_deliveries(self) -> list[str]:
        if self.lost:
            return ["lost: it was never delivered"]
        if self.duplicated:
            return [f"duplicated: delivered {len(self.deliveries)} times"]
        if self.deliveries and self.mail.ending is not Ending.SENT:
            return ["delivered although it should not be"]
        return []

    def _wrong_state(self) -> list[str]:
        ending, found = self.mail.ending, []
        if self.status != ending:
            found.append(f"{self.status} instead of {ending}")
        expected = {FINAL[ending]} if ending is Ending.REJECTED else {RECEIVED, FINAL[ending]}
        if self.events != expected:
            found.append(f"its events are {', '.join(sorted(self.events)) or 'missing'}")
        if ending is Ending.SENT and not (self.row and self.row.size_bytes):
            found.append("it is not in the archive")
        if ending is Ending.FAILED and not (self.row and self.row.dead_letter):
            found.append("it has no dead letter")
        return found


def _differences(mail: Mail, delivery: Mapping[str, Any]) -> list[str]:
    """Compare what arrived with what was published."""
    assert isinstance(mail.content, dict)
    attached = {file.name: files.sha256(file.name, file.size_bytes) for file in mail.files}
    compared = {
        "recipients": (sorted(delivery["recipients"]), mail.recipients),
        "subject": (delivery["subject"], mail.content["subject"]),
        "body": (delivery["body"], mail.content["body"]["content"]),
        "attachments": ({each["name"]: each["sha256"] for each in delivery["attachments"]}, attached),
    }
    return [
        f"its {part} differ from what was published" for part, (arrived, sent) in compared.items() if arrived != sent
    ]


def look(world: World, mails: Iterable[Mail]) -> list[Finding]:
    """Return what mailfleet says of each mail now; what was delivered is left out."""
    rows = {publisher_id: Row(*row) for publisher_id, *row in world.rows(_ROWS)}
    events = defaultdict(set)
    for event in world.events():
        events[event.correlation_id].add(event.type)
    return [Finding(mail, rows.get(mail.key), frozenset(events[mail.key])) for mail in mails]


def with_deliveries(findings: Sequence[Finding], deliveries: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Add to each mail what was delivered of it: its id is the value of the tag that the mail carries."""
    by_tag = defaultdict(list)
    for delivery in deliveries:
        for tag in delivery["tags"]:
            by_tag[tag].append(delivery)
    return [
        Finding(each.mail, each.row, each.events, tuple(by_tag[each.row.id]) if each.row else ()) for each in findings
    ]


def strays(findings: Sequence[Finding], deliveries: Sequence[Mapping[str, Any]]) -> int:
    """Count the deliveries that belong to no mail of the demo."""
    known = {each.row.id for each in findings if each.row}
    return sum(known.isdisjoint(delivery["tags"]) for delivery in deliveries)
