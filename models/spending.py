"""What was spent of the limits, as the tables know it: what the limiter is told when Redis has lost its counts.

Never less than it was: what cannot be known exactly is counted as if it had been now, or as the most it can have been.
It also keeps what must outlive Redis: limits of mailboxes, by operators or learned, and Graph's pauses.
"""

from __future__ import annotations

import time
import uuid
from datetime import datetime, timedelta
from typing import NamedTuple

import orjson

from models.database import rows

#: A mail's requests besides those for its files: draft or send, find, MIME, and two that may have been repeated.
_REQUESTS_PER_MAIL = 5
#: A file's requests besides its ranges: the session, and the look whether it is there.
_REQUESTS_PER_FILE = 2
_RANGE_BYTES = 3 * 1024 * 1024
#: The body of a mail is smaller, with few exceptions, and a delivery never larger than 4 MB.
_BYTES_PER_MAIL = 64 * 1024


class Spending(NamedTuple):
    """What a mailbox has spent ``age`` ago; of what may still be under way it is nought."""

    mailbox: str
    age: timedelta
    sends: int
    recipients: int
    external_recipients: int
    requests: int
    upload_bytes: int


# Ids grow with time, so the rows of a day are a range of the key. What may still be under way counts as now; what was
# reserved, since then.
_SPENT = """
    WITH spent AS (
        SELECT e.id, e.mailbox, e.recipient_count, e.external_recipient_count,
               CASE WHEN s.status = 'sent' THEN greatest(now() - s.sent_at, '0') ELSE '0' END AS age
        FROM sent_emails s JOIN incoming_emails e ON e.id = s.incoming_email_id
        WHERE s.id >= %(since)s AND s.status <> 'not_sent' AND s.updated_at > now() - interval '25 hours'
        UNION ALL
        SELECT e.id, e.mailbox, e.recipient_count, e.external_recipient_count, greatest(now() - e.reserved_at, '0')
        FROM incoming_emails e
        WHERE e.lease_until IS NOT NULL AND e.reserved_at IS NOT NULL AND NOT EXISTS (
            SELECT 1 FROM sent_emails s WHERE s.incoming_email_id = e.id AND s.status = 'sending')
    ), aged AS (
        -- Half a second is the least part of a minute that is counted, twelve minutes that of a day; rounded down.
        SELECT spent.*, CASE WHEN age < interval '12 minutes'
                             THEN date_bin('500 ms', timestamp 'epoch' + age, timestamp 'epoch')
                             ELSE date_bin('12 minutes', timestamp 'epoch' + age, timestamp 'epoch') END
                        - timestamp 'epoch' AS since
        FROM spent WHERE age < interval '25 hours'
    )
    SELECT mailbox, since, count(*), sum(recipient_count), sum(coalesce(external_recipient_count, recipient_count)),
           sum(%(per_mail)s + coalesce(files.requests, 0)), sum(%(bytes_per_mail)s + coalesce(files.bytes, 0))
    FROM aged LEFT JOIN LATERAL (
        SELECT sum(%(per_file)s + ceil(size / %(range_bytes)s::float)) AS requests, sum(size) AS bytes
        FROM file_uploads WHERE incoming_email_id = aged.id AND aged.age < interval '12 minutes'
    ) files ON true
    GROUP BY mailbox, since
"""


def spent() -> list[Spending]:
    """Return what each mailbox has spent within a day, in parts by age. Reads the sent mail of that day."""
    since = uuid.UUID(int=int((time.time() - timedelta(hours=26).total_seconds()) * 1000) << 80)
    parameters = {
        "since": str(since),
        "per_mail": _REQUESTS_PER_MAIL,
        "per_file": _REQUESTS_PER_FILE,
        "range_bytes": _RANGE_BYTES,
        "bytes_per_mail": _BYTES_PER_MAIL,
    }
    return [Spending(mailbox, age, *map(int, counts)) for mailbox, age, *counts in rows(_SPENT, parameters)]


def under_way() -> dict[str, list[str]]:
    """Return by mailbox what may have a call to Graph under way: workers hold it."""
    found: dict[str, list[str]] = {}
    for mailbox, token in rows(
        """
        SELECT mailbox, lease_token::text FROM incoming_emails WHERE lease_token IS NOT NULL
        UNION ALL
        SELECT e.mailbox, s.id::text FROM sent_emails s JOIN incoming_emails e ON e.id = s.incoming_email_id
        WHERE s.backup_lease_until IS NOT NULL
        """
    ):
        found.setdefault(mailbox, []).append(token)
    return found


_PAUSED_BY_GRAPH = "paused_until > now() AND paused_by = 'mailfleet' AND pause_reason LIKE 'Graph asked%%'"


class OwnLimits(NamedTuple):
    """What binds a mailbox (``*``: every mailbox) besides the settings, as it is kept."""

    mailbox: str
    limits: dict[str, int]
    #: By budget: ``limit``, ``at`` (milliseconds since 1970), ``whole``, ``strikes``.
    slowed: dict[str, dict[str, int]]
    #: Until when Graph wants to be left alone.
    throttled_until: datetime | None


_OWN_LIMITS = f"SELECT mailbox, limits, slowed, CASE WHEN {_PAUSED_BY_GRAPH} THEN paused_until END FROM mailboxes"


def own_limits(*, lowered_within: timedelta) -> list[OwnLimits]:
    """Return all that binds mailboxes now; what was lowered longer ago than that has grown back and may be left out."""
    standing = f"""
        {_OWN_LIMITS} WHERE limits <> '{{}}' OR ({_PAUSED_BY_GRAPH})
                        OR (slowed <> '{{}}' AND updated_at > now() - %(lowered_within)s::interval)
    """
    return [OwnLimits(*row) for row in rows(standing, {"lowered_within": lowered_within})]


def changed_limits(within: timedelta) -> list[OwnLimits]:
    """Return what binds those mailboxes now for which it may have changed lately, if only by having none any more."""
    changed = f"{_OWN_LIMITS} WHERE updated_at > now() - %(within)s::interval"
    return [OwnLimits(*row) for row in rows(changed, {"within": within})]


def record_slowed(mailbox: str, budget: str, how: dict[str, int]) -> None:
    """Keep that a limit of a mailbox was lowered, in the place of what was kept of that budget."""
    rows(
        """
        INSERT INTO mailboxes (mailbox, slowed) VALUES (%(mailbox)s, %(slowed)s)
        ON CONFLICT (mailbox) DO UPDATE SET slowed = mailboxes.slowed || excluded.slowed, updated_at = now()
        """,
        {"mailbox": mailbox.lower(), "slowed": orjson.dumps({budget: how}).decode()},
    )
