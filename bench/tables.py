"""Fills the tables as a fleet would have left them that has sent so much and has so much waiting.

Rows are of the size and the order of real ones: ids grow with time, the publishers' ids and Graph's do not. Mail that
is settled has its receipt, its events and its copy in the archive, one of two hundred has failed and is a dead letter,
and one of twenty has an attachment. Of what waits, one of ten is not due before tomorrow. What a fleet has in hand at a
time is the same however much there is: some mails of mailboxes of their own, and some backups that are not yet due.
Tenants and priorities are not told apart.
"""

from __future__ import annotations

import hashlib
import uuid
from typing import NamedTuple

import psycopg2

IN_HAND = 16
#: One of so many that are settled has failed.
FAILED_EVERY = 200
#: So many mails wait for each mailbox at least: more than one look of the scheduler reads of a mailbox.
_WAITING_PER_MAILBOX = 8
_BACKUPS_TO_COME = 64


class Filling(NamedTuple):
    """How much there is."""

    emails: int
    waiting: int
    mailboxes: int

    @property
    def settled(self) -> int:
        return self.emails - self.waiting

    @property
    def waiting_mailboxes(self) -> int:
        return max(1, min(self.mailboxes, self.waiting // _WAITING_PER_MAILBOX))


# Mail n of %(emails)s, one a second until now. Whatever depends on n alone is written out where it is needed.
_AT = "(now() - (%(emails)s - n) * interval '1 second')"
_RANDOM = "md5(n::text)"
_TIME = "lpad(to_hex((extract(epoch FROM instant) * 1000)::bigint), 12, '0')"
_ID = f"({_TIME} || '7' || left({_RANDOM}, 3) || '8' || substr({_RANDOM}, 4, 15))::uuid"
_OTHER_ID = f"({_TIME} || '7' || right({_RANDOM}, 3) || '9' || substr({_RANDOM}, 4, 15))::uuid"
_GRAPH_ID = f"('AAMkAGI2TG93AAA=' || md5(n || 'graph') || {_RANDOM} || 'AAAAAAEMAAAiIsqMbYjsT5e')"
_FAILED = f"n %% {FAILED_EVERY} = 0"
_ATTACHED = "(hashint4(n) & 65535) %% 20 = 0"
#: Where an id depends on the instant; the transaction's now() is the same in all of its statements.
_SETTLED = f"(SELECT n, {_AT} AS instant FROM generate_series(1, %(settled)s) n) settled"
_SENT = f"{_SETTLED} WHERE NOT {_FAILED}"
_BODY = "The quarterly figures are ready. "

_FILL = f"""
    INSERT INTO incoming_emails (id, publisher_message_id, payload, content_hash, status, route, mailbox, priority,
        recipient_count, external_recipient_count, attempt_count, next_attempt_at, expires_at, created_at, updated_at)
    SELECT {_ID}, ({_RANDOM}::uuid)::text,
           json_build_object(
               'publisher_message_id', ({_RANDOM}::uuid)::text, 'from', mailbox, 'subject', 'Figures ' || n,
               'to', json_build_array('reader' || n || '@fabrikam.example'),
               'body', json_build_object('contentType', 'text', 'content', repeat('{_BODY}', 12))),
           decode({_RANDOM} || md5(n || 'content'), 'hex'),
           CASE WHEN n > %(settled)s THEN 'received' WHEN {_FAILED} THEN 'failed' ELSE 'processed' END,
           CASE WHEN {_ATTACHED} THEN 'attachment' ELSE 'no-attachment' END, mailbox, 1, 1, 1, (n <= %(settled)s)::int,
           CASE WHEN n > %(settled)s AND n %% 10 = 0 THEN now() + interval '1 day' END,
           CASE WHEN n %% 50 = 0 THEN now() + interval '2 days' END, instant, instant
    FROM (SELECT n, {_AT} AS instant, 'mailbox' || CASE WHEN n > %(settled)s THEN n %% %(waiting_mailboxes)s
                                                        ELSE n %% %(mailboxes)s END || '@contoso.example' AS mailbox
          FROM generate_series(1, %(emails)s) n) mail;

    INSERT INTO worker_receipts (incoming_email_id, attempt, received_at, acknowledged_at)
    SELECT {_ID}, 1, instant, instant FROM {_SETTLED};

    INSERT INTO file_uploads (id, incoming_email_id, position, filename, size, uploaded_bytes, status, created_at)
    SELECT {_OTHER_ID}, {_ID}, 0, n || '.pdf', 200000, 200000, 'uploaded', instant FROM {_SENT} AND {_ATTACHED};

    INSERT INTO sent_emails (id, incoming_email_id, graph_message_id, sent_at, status, response_metadata, intent_at,
                             backup_due_at, created_at, updated_at)
    SELECT {_OTHER_ID}, {_ID}, {_GRAPH_ID}, instant, 'sent',
           jsonb_build_object('evidence', jsonb_build_array(jsonb_build_object(
               'at', instant, 'asked', 'send', 'status', 202, 'client_request_id', {_RANDOM}::uuid))),
           instant, CASE WHEN n > %(settled)s - {_BACKUPS_TO_COME} THEN now() + interval '1 day' END, instant, instant
    FROM {_SENT};

    INSERT INTO email_backups (id, graph_message_id, incoming_email_id, compressed_blob, compression, size,
                               compressed_size, checksum, key_id, expires_at, created_at)
    SELECT {_OTHER_ID}, {_GRAPH_ID}, {_ID}, decode(repeat({_RANDOM}, 20), 'hex'), 'gzip', 900, 320,
           {_RANDOM} || {_RANDOM}, 'bench', now() + interval '1 year', instant
    FROM {_SENT} AND n <= %(settled)s - {_BACKUPS_TO_COME};

    INSERT INTO outbox_events (id, incoming_email_id, type, body, claimed_until, published_at, created_at)
    SELECT md5(n || type)::uuid, {_ID}, type, json_build_object('publisher_message_id', {_RANDOM}, 'type', type,
                                                                'incoming_email_id', {_ID}, 'at', instant),
           instant, instant, instant
    FROM (SELECT n, {_AT} AS instant,
                 unnest(CASE WHEN n > %(settled)s THEN array['SendEmailReceived']
                             WHEN {_FAILED} THEN array['SendEmailReceived', 'SendEmailFailed']
                             ELSE array['SendEmailReceived', 'SendEmailSent'] END) AS type
          FROM generate_series(1, %(emails)s) n) told;

    INSERT INTO dlq (id, incoming_email_id, reason, attempts, last_error, mailbox, message_id, queue_name, actor_name,
                     body, mirrored_at, created_at)
    SELECT {_OTHER_ID}, {_ID}, 'rejected', 1, '400 ErrorInvalidRecipients', 'mailbox@contoso.example',
           ({_RANDOM}::uuid)::text, 'send_plain', 'send_plain', decode(repeat({_RANDOM}, 20), 'hex'), instant, instant
    FROM {_SETTLED} WHERE {_FAILED};

    INSERT INTO incoming_emails (id, publisher_message_id, payload, content_hash, status, route, mailbox, priority,
                                 recipient_count, attempt_count, lease_token, lease_until)
    SELECT md5(n || 'in hand')::uuid, 'in-hand-' || n, '{{}}', '', 'processing', 'no-attachment',
           'in-hand' || n || '@contoso.example', 1, 1, 1, md5(n || 'lease')::uuid, now() + interval '1 day'
    FROM generate_series(1, {IN_HAND}) n;
"""


def publisher_message_id(number: int) -> str:
    """Return the publisher's id of a mail; they count from 1, the oldest."""
    return str(uuid.UUID(hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()))


def fill(url: str, filling: Filling) -> None:
    """Fill the empty tables of a database, and have it vacuumed and analysed.

    Its user must be a superuser: foreign keys hold by construction, and to look each of them up would take longer than
    all the rest.
    """
    connection = psycopg2.connect(url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute("SET session_replication_role = replica")
            cursor.execute(
                _FILL,
                {
                    **filling._asdict(),
                    "settled": filling.settled,
                    "waiting_mailboxes": filling.waiting_mailboxes,
                },
            )
        connection.autocommit = True
        connection.cursor().execute("VACUUM ANALYZE")
        connection.cursor().execute("CHECKPOINT")
    finally:
        connection.close()
