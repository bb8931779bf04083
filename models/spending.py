"""What was spent of the limits, as the tables know it: what the limiter is told when Redis has lost its counts.

Never less was sent, to whomever: what cannot be known exactly is counted as if it had been now, or as the most it can
have been. Of requests and bytes the tables do not know all: those of attempts that failed and left no draft, or whose
mail was given up since; files that were begun anew; and backups of mail that was sent more than a day ago.
It also keeps what must outlive Redis: limits of mailboxes, by operators or learned, and Graph's pauses.
"""

from __future__ import annotations

import time
import uuid
from datetime import datetime, timedelta
from typing import NamedTuple

import orjson

from models.database import rows, transaction
from models.mailboxes import GRAPH
from models.uploads import UPLOAD_BYTES

#: A mail's requests besides those for its files: draft or send, find, MIME, and two that may have been repeated.
_REQUESTS_PER_MAIL = 5
#: A file's requests besides its ranges: the session, and the look whether it is there.
_REQUESTS_PER_FILE = 2
#: For a million mails a day it takes seconds. Nobody is admitted meanwhile, but if it were given up, nobody ever would.
_TIMEOUT = timedelta(seconds=100)


class Spending(NamedTuple):
    """What a mailbox has spent ``age`` ago; of what may still be under way it is nought."""

    mailbox: str
    age: timedelta
    sends: int
    recipients: int
    external_recipients: int
    requests: int
    upload_bytes: int


#: How large a body is in Graph's words, in SQL: those of ours, which are longer but for the recipients, and sealed a
#: third longer still.
_BODY_BYTES = "octet_length(e.payload::text) + 50 * e.recipient_count + 1000"
# Ids grow with time, so the rows of a day are a range of the key; each intent draws a new one. What may still be under
# way counts as now; what was reserved, since then. A row that was changed was at most then worked on: sent or archived.
_SPENT = f"""
    WITH mail AS MATERIALIZED (
        SELECT e.id, e.mailbox, e.recipient_count, e.external_recipient_count, sent_ago, worked_ago,
               CASE WHEN worked_ago < interval '6 minutes' THEN {_BODY_BYTES} ELSE 0 END AS body_bytes
        FROM sent_emails s JOIN incoming_emails e ON e.id = s.incoming_email_id CROSS JOIN LATERAL (
            SELECT CASE WHEN s.status = 'sent' THEN greatest(now() - s.sent_at, '0') ELSE '0' END AS sent_ago,
                   CASE WHEN s.status = 'sending' OR s.backup_lease_until IS NOT NULL THEN interval '0'
                        ELSE greatest(now() - s.updated_at, '0') END AS worked_ago
        ) ago
        WHERE s.id >= %(since)s AND s.status <> 'not_sent' AND s.updated_at > now() - interval '25 hours'
        UNION ALL
        SELECT e.id, e.mailbox, e.recipient_count, e.external_recipient_count, greatest(now() - e.reserved_at, '0'),
               interval '0', {_BODY_BYTES}
        FROM incoming_emails e
        WHERE e.lease_until IS NOT NULL AND NOT EXISTS (
            SELECT 1 FROM sent_emails s WHERE s.incoming_email_id = e.id AND s.status = 'sending')
        UNION ALL
        -- Begun and put off: its draft is made, perhaps its files are up. By one index or the other.
        SELECT e.id, e.mailbox, 0, 0, NULL, greatest(now() - e.updated_at, '0'), {_BODY_BYTES}
        FROM incoming_emails e
        WHERE e.status = 'received' AND e.lease_until IS NULL AND e.next_attempt_at IS NULL
          AND e.draft_id IS NOT NULL AND e.updated_at > now() - interval '12 minutes'
        UNION ALL
        SELECT e.id, e.mailbox, 0, 0, NULL, greatest(now() - e.updated_at, '0'), {_BODY_BYTES}
        FROM incoming_emails e
        WHERE e.status = 'received' AND e.next_attempt_at IS NOT NULL
          AND e.draft_id IS NOT NULL AND e.updated_at > now() - interval '12 minutes'
    ), part AS (
        SELECT mailbox, sent_ago AS age, 1 AS sends, recipient_count AS recipients,
               coalesce(external_recipient_count, recipient_count) AS external_recipients, 0 AS requests, 0 AS bytes
        FROM mail WHERE sent_ago < interval '25 hours'
        UNION ALL
        SELECT mailbox, worked_ago, 0, 0, 0, %(per_mail)s, body_bytes FROM mail WHERE worked_ago < interval '12 minutes'
        UNION ALL
        SELECT mailbox, CASE WHEN f.status = 'uploaded' THEN greatest(now() - f.updated_at, '0') ELSE worked_ago END,
               0, 0, 0, %(per_file)s + ceil(size / %(range)s::float), {UPLOAD_BYTES}
        FROM mail JOIN file_uploads f ON f.incoming_email_id = mail.id WHERE worked_ago < interval '12 minutes'
    ), aged AS (
        -- Half a second is the least part of a minute that is counted, twelve minutes that of a day; rounded down.
        SELECT part.*, CASE WHEN age < interval '12 minutes'
                            THEN date_bin('500 ms', timestamp 'epoch' + age, timestamp 'epoch')
                            ELSE date_bin('12 minutes', timestamp 'epoch' + age, timestamp 'epoch') END
                       - timestamp 'epoch' AS since
        FROM part
    )
    SELECT mailbox, since, sum(sends), sum(recipients), sum(external_recipients), sum(requests), sum(bytes)
    FROM aged GROUP BY mailbox, since
"""


def spent(*, small_bytes: int, attach_json_bytes: int, range_bytes: int) -> list[Spending]:
    """Return what each mailbox has spent within a day, in parts by age.

    Reads the sent mail of that day, and looks through what waits for what was begun.

    Args:
        small_bytes: Files up to this go up in one request, in base64,
        attach_json_bytes: with so much around them;
        range_bytes: larger ones in a session and a request for each range.
    """
    since = uuid.UUID(int=int((time.time() - timedelta(hours=26).total_seconds()) * 1000) << 80)
    parameters = {
        "since": str(since),
        "per_mail": _REQUESTS_PER_MAIL,
        "per_file": _REQUESTS_PER_FILE,
        "small": small_bytes,
        "attach_json": attach_json_bytes,
        "range": range_bytes,
    }
    with transaction():
        rows("SELECT set_config('statement_timeout', %(timeout)s, true)", {"timeout": f"{_TIMEOUT.total_seconds():g}s"})
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


_PAUSED_BY_GRAPH = f"paused_until > now() AND paused_by = '{GRAPH}'"


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
