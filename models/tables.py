"""The tables as peewee models: for queries that are not hot, and to hold the schema against.

``migrations/`` makes the tables; these classes only describe them, and a test proves that they fit. Statements that
run for every email are plain SQL in the modules beside this one.
"""

from __future__ import annotations

import peewee

from models.database import database


class TimestampField(peewee.DateTimeField):
    """An instant with its time zone."""

    field_type = "TIMESTAMPTZ"


class JsonTextField(peewee.TextField):
    """JSON that is stored as it came."""

    field_type = "JSON"


class JsonField(peewee.Field):
    """JSON that is searched or amended; read as the value it stands for."""

    field_type = "JSONB"


class ByteaField(peewee.BlobField):
    """Bytes."""

    field_type = "BYTEA"


class _Row(peewee.Model):
    class Meta:
        database = database
        legacy_table_names = False


class IncomingEmail(_Row):
    """One accepted ``SendEmail``."""

    id = peewee.UUIDField(primary_key=True)
    publisher_message_id = peewee.TextField(unique=True)
    payload = JsonTextField()
    content_hash = ByteaField()
    status = peewee.TextField()
    route = peewee.TextField()
    mailbox = peewee.TextField()
    tenant = peewee.TextField(null=True)
    priority = peewee.SmallIntegerField()
    recipient_count = peewee.IntegerField()
    external_recipient_count = peewee.IntegerField(null=True)
    correlation_id = peewee.TextField(null=True)
    reply_to = peewee.TextField(null=True)
    traceparent = peewee.TextField(null=True)
    attempt_count = peewee.IntegerField()
    next_attempt_at = TimestampField(null=True)
    expires_at = TimestampField(null=True)
    lease_token = peewee.UUIDField(null=True)
    lease_until = TimestampField(null=True)
    reserved_at = TimestampField(null=True)
    draft_id = peewee.TextField(null=True)
    drafts_clean = peewee.BooleanField(null=True)
    drafts_looked_at = TimestampField(null=True)
    last_error = peewee.TextField(null=True)
    created_at = TimestampField()
    updated_at = TimestampField()
    payload_purged_at = TimestampField(null=True)

    class Meta:
        table_name = "incoming_emails"


class PayloadKey(_Row):
    """A data key that payloads are sealed with, wrapped under a key of the ring."""

    id = peewee.UUIDField(primary_key=True)
    key_id = peewee.TextField()
    wrapped = ByteaField()
    created_at = TimestampField()

    class Meta:
        table_name = "payload_keys"


class Hold(_Row):
    """An email that no purge touches, until an operator releases it."""

    incoming_email = peewee.ForeignKeyField(IncomingEmail, column_name="incoming_email_id", primary_key=True)
    reason = peewee.TextField(null=True)
    placed_by = peewee.TextField()
    placed_at = TimestampField()

    class Meta:
        table_name = "holds"


class WorkerReceipt(_Row):
    """A worker's word that it has an attempt in hand, and the scheduler's that it knows."""

    incoming_email = peewee.ForeignKeyField(IncomingEmail, column_name="incoming_email_id")
    attempt = peewee.IntegerField()
    received_at = TimestampField()
    acknowledged_at = TimestampField(null=True)

    class Meta:
        table_name = "worker_receipts"
        primary_key = peewee.CompositeKey("incoming_email", "attempt")


class FileUpload(_Row):
    """How far one attachment has got into its draft."""

    id = peewee.UUIDField(primary_key=True)
    incoming_email = peewee.ForeignKeyField(IncomingEmail, column_name="incoming_email_id")
    position = peewee.IntegerField()
    filename = peewee.TextField()
    size = peewee.BigIntegerField()
    upload_session_info = JsonField(null=True)
    uploaded_bytes = peewee.BigIntegerField()
    status = peewee.TextField()
    created_at = TimestampField()
    updated_at = TimestampField()

    class Meta:
        table_name = "file_uploads"


class SentEmail(_Row):
    """The intent to send an email, what became of it, and when its backup is due."""

    id = peewee.UUIDField(primary_key=True)
    incoming_email = peewee.ForeignKeyField(IncomingEmail, column_name="incoming_email_id", unique=True)
    graph_message_id = peewee.TextField(null=True)
    sent_at = TimestampField(null=True)
    status = peewee.TextField()
    response_metadata = JsonField()
    intent_at = TimestampField()
    backup_due_at = TimestampField(null=True)
    backup_lease_until = TimestampField(null=True)
    backup_attempt_count = peewee.IntegerField()
    backup_error = peewee.TextField(null=True)
    backup_purged_at = TimestampField(null=True)
    created_at = TimestampField()
    updated_at = TimestampField()

    class Meta:
        table_name = "sent_emails"


class EmailBackup(_Row):
    """The sealed MIME of one sent message."""

    id = peewee.UUIDField(primary_key=True)
    graph_message_id = peewee.TextField(unique=True)
    incoming_email = peewee.ForeignKeyField(IncomingEmail, column_name="incoming_email_id")
    compressed_blob = ByteaField()
    compression = peewee.TextField()
    size = peewee.BigIntegerField()
    compressed_size = peewee.BigIntegerField()
    checksum = peewee.TextField()
    key_id = peewee.TextField()
    expires_at = TimestampField()
    created_at = TimestampField()

    class Meta:
        table_name = "email_backups"


class StoredAttachment(_Row):
    """An attachment that is stored with us; its sealed content is in the store, under the id."""

    id = peewee.UUIDField(primary_key=True)
    name = peewee.TextField()
    content_type = peewee.TextField()
    size = peewee.BigIntegerField(null=True)
    sha256 = peewee.TextField(null=True)
    key_id = peewee.TextField()
    header = ByteaField()
    created_by = peewee.TextField()
    created_at = TimestampField()
    expires_at = TimestampField()
    stored_at = TimestampField(null=True)
    deleting_at = TimestampField(null=True)

    class Meta:
        table_name = "stored_attachments"


class StoredAttachmentUse(_Row):
    """That an email has a stored attachment."""

    stored_attachment = peewee.ForeignKeyField(StoredAttachment, column_name="stored_attachment_id")
    incoming_email = peewee.ForeignKeyField(IncomingEmail, column_name="incoming_email_id")

    class Meta:
        table_name = "stored_attachment_uses"
        primary_key = peewee.CompositeKey("stored_attachment", "incoming_email")


class OutboxEvent(_Row):
    """An event that is true; ``published_at`` says whether the world has been told."""

    id = peewee.UUIDField(primary_key=True)
    incoming_email = peewee.ForeignKeyField(IncomingEmail, column_name="incoming_email_id")
    type = peewee.TextField()
    body = JsonTextField()
    correlation_id = peewee.TextField(null=True)
    reply_to = peewee.TextField(null=True)
    traceparent = peewee.TextField(null=True)
    claimed_until = TimestampField()
    published_at = TimestampField(null=True)
    created_at = TimestampField()

    class Meta:
        table_name = "outbox_events"


class DeadLetter(_Row):
    """A message that an actor gave up on: the only source of replay."""

    id = peewee.UUIDField(primary_key=True)
    incoming_email = peewee.ForeignKeyField(IncomingEmail, column_name="incoming_email_id", null=True)
    reason = peewee.TextField()
    attempts = peewee.IntegerField()
    last_error = peewee.TextField(null=True)
    status = peewee.TextField()
    mailbox = peewee.TextField(null=True)
    message_id = peewee.TextField(unique=True)
    queue_name = peewee.TextField()
    actor_name = peewee.TextField(null=True)
    body = ByteaField(null=True)
    mirrored_at = TimestampField(null=True)
    resolved_at = TimestampField(null=True)
    resolved_by = peewee.TextField(null=True)
    noticed_at = TimestampField(null=True)
    created_at = TimestampField()

    class Meta:
        table_name = "dlq"


class DeadLetterNotice(_Row):
    """What was told, or is to be, of dead letters that were new."""

    id = peewee.UUIDField(primary_key=True)
    body = JsonTextField()
    published_at = TimestampField(null=True)
    delivered_at = TimestampField(null=True)
    deliver_at = TimestampField(null=True)
    attempt_count = peewee.IntegerField()
    last_error = peewee.TextField(null=True)
    claimed_until = TimestampField(null=True)
    created_at = TimestampField()

    class Meta:
        table_name = "dead_letter_notices"


class Mailbox(_Row):
    """What is known of a sending mailbox besides its mail: pauses and its own limits. ``*`` is every mailbox."""

    mailbox = peewee.TextField(primary_key=True)
    paused_until = TimestampField(null=True)
    pause_reason = peewee.TextField(null=True)
    paused_by = peewee.TextField(null=True)
    refusal_count = peewee.IntegerField()
    limits = JsonField()
    full_until = TimestampField(null=True)
    full_from = peewee.IntegerField(default=1)
    full_reason = peewee.TextField(null=True)
    slowed = JsonField()
    last_tenant = peewee.TextField(null=True)
    updated_at = TimestampField()

    class Meta:
        table_name = "mailboxes"


class PausedRoute(_Row):
    """An operator's pause of all mail of a route."""

    route = peewee.TextField(primary_key=True)
    paused_until = TimestampField(null=True)
    pause_reason = peewee.TextField(null=True)
    paused_by = peewee.TextField(null=True)
    updated_at = TimestampField()

    class Meta:
        table_name = "routes"


class FleetLimit(_Row):
    """How much of a kind may be in flight in the whole fleet, where an operator has set it."""

    name = peewee.TextField(primary_key=True)
    value = peewee.IntegerField()
    updated_at = TimestampField()

    class Meta:
        table_name = "fleet_limits"


class AuditEntry(_Row):
    """Who did what to which email, mailbox or setting."""

    id = peewee.UUIDField(primary_key=True)
    at = TimestampField()
    who = peewee.TextField()
    action = peewee.TextField()
    subject = peewee.TextField()
    detail = JsonField()

    class Meta:
        table_name = "audit_log"


TABLES = (
    IncomingEmail,
    PayloadKey,
    Hold,
    WorkerReceipt,
    FileUpload,
    SentEmail,
    EmailBackup,
    StoredAttachment,
    StoredAttachmentUse,
    OutboxEvent,
    DeadLetter,
    DeadLetterNotice,
    Mailbox,
    PausedRoute,
    FleetLimit,
    AuditEntry,
)
