"""How much is to be sent from each mailbox: what a forecast is made from.

How many emails wait is counted in indexes alone. What they cost (recipients, bytes, requests for their files) is in the
rows and their payloads, so it is read of a sample where many wait.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

from models.database import rows, transaction
from models.mailboxes import FOREVER
from models.states import Route
from models.turns import EVERY, TO_SEND
from models.uploads import UPLOAD_BYTES

#: Mailboxes that are told of, those with most mail first.
MOST_MAILBOXES = 10_000
#: Emails whose rows are read: as many of each mailbox and route that has ready mail, and the first that are not due.
SAMPLE = 10_000
#: Sends that are looked at to know how long one takes.
_LATEST_SENDS = 200


class Waiting(NamedTuple):
    """What is to be sent from a mailbox: ``plain`` and ``attached`` emails, and what they cost together.

    ``attach_requests`` bring the files up. ``later`` of the emails are not due yet, but the first, the mean and the
    last of them in ``due_in``. Nothing is sent for ``paused_for``. ``paused`` emails besides wait until an operator
    ends a pause.
    """

    mailbox: str
    plain: int
    attached: int
    paused: int
    recipients: int
    external_recipients: int
    upload_bytes: int
    attach_requests: int
    later: int
    due_in: tuple[timedelta, timedelta, timedelta] | None
    paused_for: timedelta


#: On average. A body is counted as large as the payload it came in: Graph is sent the same fields by other names. One
#: that is sealed is a third larger.
_COSTS = """
    avg(recipient_count) AS recipients,
    avg(coalesce(external_recipient_count, recipient_count)) AS external_recipients,
    avg(octet_length(payload::text) + coalesce(files.bytes, 0)) AS upload_bytes,
    avg(coalesce(files.requests, 0)) AS attach_requests
"""
_FILES = f"""
    LEFT JOIN LATERAL (
        SELECT sum({UPLOAD_BYTES}) AS bytes,
               sum(CASE WHEN size <= %(small)s THEN 1 ELSE 1 + ceil(size / %(range)s::numeric) END) AS requests
        FROM (
            SELECT (file->>'size')::bigint AS size
            FROM json_array_elements(CASE WHEN route = %(attached)s THEN payload->'attachments' END) file
        ) sizes
    ) files ON true
"""
_TOGETHER = ", ".join(
    f"coalesce(round(sum(emails * {cost}) FILTER (WHERE NOT paused)), 0)"
    for cost in ("recipients", "external_recipients", "upload_bytes", "attach_requests")
)
_WAITING = f"""
    WITH ready AS MATERIALIZED (
        SELECT mailbox, route, count(*) AS emails FROM incoming_emails WHERE {TO_SEND} GROUP BY mailbox, route
        ORDER BY emails DESC LIMIT 2 * %(most)s
    ), share AS MATERIALIZED (
        SELECT greatest(1, %(sample)s / greatest(count(*), 1)) AS emails FROM ready
    ), undue AS MATERIALIZED (
        -- If not all of them are read, the others are taken to be like these.
        SELECT greatest(1, count(*) / %(sample)s::numeric) AS times FROM incoming_emails
        WHERE next_attempt_at IS NOT NULL
    ), part AS (
        SELECT ready.mailbox, ready.route, ready.emails::numeric, 0::numeric AS later,
               NULL::timestamptz AS first_at, NULL::timestamptz AS mean_at, NULL::timestamptz AS last_at, costs.*
        FROM ready CROSS JOIN share CROSS JOIN LATERAL (
            SELECT {_COSTS} FROM (
                SELECT * FROM incoming_emails
                WHERE {TO_SEND} AND route = ready.route AND mailbox = ready.mailbox LIMIT share.emails
            ) email {_FILES}
        ) costs
        UNION ALL
        SELECT mailbox, route, count(*) * max(undue.times), count(*) * max(undue.times),
               min(next_attempt_at), to_timestamp(avg(extract(epoch FROM next_attempt_at))::float),
               max(next_attempt_at), {_COSTS}
        FROM undue CROSS JOIN (
            SELECT * FROM incoming_emails WHERE next_attempt_at IS NOT NULL AND status = 'received'
            ORDER BY next_attempt_at LIMIT %(sample)s
        ) email {_FILES} GROUP BY mailbox, route
        UNION ALL
        -- What is reserved for those in flight counts as used already; files are charged as they go up.
        SELECT mailbox, route, count(*), 0, NULL, NULL, NULL, {_COSTS}
        FROM incoming_emails email {_FILES}
        WHERE lease_until IS NOT NULL AND (reserved_at IS NULL OR route = 'attachment') GROUP BY mailbox, route
    ), told AS (
        SELECT part.*, coalesce(pause.ends_at, now()) - now() AS paused_for,
               coalesce(pause.ends_at >= %(forever)s, false) AS paused
        FROM part LEFT JOIN LATERAL (
            SELECT max(paused_until) AS ends_at FROM (
                SELECT paused_until FROM mailboxes WHERE mailbox IN (part.mailbox, %(every)s)
                UNION ALL SELECT paused_until FROM routes WHERE route = part.route
            ) pauses WHERE paused_until > now()
        ) pause ON true
    )
    SELECT mailbox, coalesce(round(sum(emails) FILTER (WHERE NOT paused AND route = %(plain)s)), 0),
           coalesce(round(sum(emails) FILTER (WHERE NOT paused AND route = %(attached)s)), 0),
           coalesce(round(sum(emails) FILTER (WHERE paused)), 0), {_TOGETHER},
           coalesce(round(sum(later) FILTER (WHERE NOT paused)), 0),
           min(first_at) - now(),
           to_timestamp((sum(later * extract(epoch FROM mean_at)) / nullif(sum(later), 0))::float) - now(),
           max(last_at) - now(), coalesce(max(paused_for) FILTER (WHERE NOT paused), '0')
    FROM told GROUP BY mailbox ORDER BY sum(emails) DESC, mailbox LIMIT %(most)s
"""


def waiting(
    *,
    small_bytes: int,
    attach_json_bytes: int,
    range_bytes: int,
    sample: int = SAMPLE,
    most_mailboxes: int = MOST_MAILBOXES,
) -> list[Waiting]:
    """Return what is to be sent, the mailbox with most mail first.

    Mail in doubt is left out: it is looked up, and most of it was sent. So is what a worker sends at the moment.

    One statement, which reads an index entry of every waiting email and the rows of ``sample`` that are ready and as
    many that are not due, however many wait: for 1,000,000 emails of 10,000 mailboxes it takes a second or two.

    Args:
        small_bytes: Files up to this go up in one request, in base64,
        attach_json_bytes: with so much around them;
        range_bytes: larger ones in a session and a request for each range.
        most_mailboxes: At most so many are told of.
    """
    parameters = {
        "small": small_bytes,
        "attach_json": attach_json_bytes,
        "range": range_bytes,
        "most": most_mailboxes,
        "sample": sample,
        "forever": FOREVER,
        "every": EVERY,
        "plain": Route.PLAIN,
        "attached": Route.ATTACHED,
    }
    with transaction():
        # Compiling the statement takes several times as long as running it, whatever its estimated cost.
        rows("SET LOCAL jit = off")
        return [_waiting(*row) for row in rows(_WAITING, parameters)]


def _waiting(mailbox: str, *told: Any) -> Waiting:
    counts = [int(count) for count in told[:8]]
    first_in, mean_in, last_in, paused_for = told[8:]
    due_in = None if last_in is None else (first_in, mean_in, last_in)
    return Waiting._make((mailbox, *counts, due_in, paused_for))


def send_duration() -> timedelta | None:
    """Return how long a send takes, from its intent to its answer: the median of the latest.

    None if nothing was sent yet. It is as exact as the clocks of the workers and of PostgreSQL agree.
    """
    found: timedelta | None = rows(
        """
        SELECT percentile_disc(0.5) WITHIN GROUP (ORDER BY greatest(sent_at - intent_at, '0'))
        FROM (SELECT sent_at, intent_at FROM sent_emails WHERE status = 'sent' ORDER BY id DESC LIMIT %(latest)s) latest
        """,
        {"latest": _LATEST_SENDS},
    )[0][0]
    return found
