-- The first schema. Every statement may run twice: yoyo marks a migration in a transaction of its own.
-- depends:

CREATE TABLE IF NOT EXISTS incoming_emails (
    id                    uuid PRIMARY KEY,
    publisher_message_id  text NOT NULL UNIQUE,
    payload               json NOT NULL,
    content_hash          bytea NOT NULL,
    status                text NOT NULL DEFAULT 'received' CHECK (status IN
                              ('received', 'dispatched', 'processing', 'processed', 'failed', 'cancelled', 'expired')),
    route                 text NOT NULL CHECK (route IN ('attachment', 'no-attachment')),
    mailbox               text NOT NULL,
    tenant                text,
    priority              smallint NOT NULL DEFAULT 1,
    recipient_count       integer NOT NULL,
    correlation_id        text,
    reply_to              text,
    traceparent           text,
    attempt_count         integer NOT NULL DEFAULT 0,
    -- Not before this instant; NULL means ready now. What is not yet due stays out of the index of ready mail.
    next_attempt_at       timestamptz,
    expires_at            timestamptz,
    -- Who works on the mail, until when. The token is drawn by the worker's claim; a dispatch has a lease without one.
    lease_token           uuid,
    lease_until           timestamptz,
    draft_id              text,
    last_error            text,
    created_at            timestamptz NOT NULL DEFAULT now(),
    updated_at            timestamptz NOT NULL DEFAULT now()
);

-- Ready mail, by route and mailbox: the scheduler takes turns among mailboxes by skipping through it.
CREATE INDEX IF NOT EXISTS incoming_emails_ready ON incoming_emails (route, mailbox, priority, id)
    WHERE status IN ('received', 'processing') AND lease_until IS NULL AND next_attempt_at IS NULL;
CREATE INDEX IF NOT EXISTS incoming_emails_due ON incoming_emails (next_attempt_at)
    WHERE next_attempt_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS incoming_emails_leased ON incoming_emails (lease_until)
    WHERE lease_until IS NOT NULL;
CREATE INDEX IF NOT EXISTS incoming_emails_expiring ON incoming_emails (expires_at)
    WHERE expires_at IS NOT NULL AND status = 'received';

CREATE TABLE IF NOT EXISTS worker_receipts (
    incoming_email_id  uuid NOT NULL REFERENCES incoming_emails (id) ON DELETE CASCADE,
    attempt            integer NOT NULL,
    received_at        timestamptz NOT NULL DEFAULT now(),
    acknowledged_at    timestamptz,
    PRIMARY KEY (incoming_email_id, attempt)
);

CREATE TABLE IF NOT EXISTS file_uploads (
    id                   uuid PRIMARY KEY,
    incoming_email_id    uuid NOT NULL REFERENCES incoming_emails (id) ON DELETE CASCADE,
    position             integer NOT NULL,
    filename             text NOT NULL,
    size                 bigint NOT NULL,
    upload_session_info  jsonb,
    uploaded_bytes       bigint NOT NULL DEFAULT 0,
    status               text NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'uploading', 'uploaded')),
    created_at           timestamptz NOT NULL DEFAULT now(),
    updated_at           timestamptz NOT NULL DEFAULT now(),
    UNIQUE (incoming_email_id, position)
);

CREATE TABLE IF NOT EXISTS sent_emails (
    id                    uuid PRIMARY KEY,
    incoming_email_id     uuid NOT NULL UNIQUE REFERENCES incoming_emails (id) ON DELETE CASCADE,
    graph_message_id      text,
    sent_at               timestamptz,
    -- 'sending' is the committed intent; 'not_sent' is an intent whose mail was proven absent.
    status                text NOT NULL CHECK (status IN ('sending', 'in_doubt', 'sent', 'not_sent')),
    response_metadata     jsonb NOT NULL DEFAULT '{}',
    intent_at             timestamptz NOT NULL,
    -- When the backup is next looked at; NULL once it is stored or has failed for good.
    backup_due_at         timestamptz,
    backup_lease_until    timestamptz,
    backup_attempt_count  integer NOT NULL DEFAULT 0,
    backup_error          text,
    created_at            timestamptz NOT NULL DEFAULT now(),
    updated_at            timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS sent_emails_backup_due ON sent_emails (backup_due_at)
    WHERE backup_due_at IS NOT NULL AND backup_lease_until IS NULL;
CREATE INDEX IF NOT EXISTS sent_emails_backup_leased ON sent_emails (backup_lease_until)
    WHERE backup_lease_until IS NOT NULL;
CREATE INDEX IF NOT EXISTS sent_emails_graph_message ON sent_emails (graph_message_id);
CREATE INDEX IF NOT EXISTS sent_emails_in_doubt ON sent_emails (intent_at) WHERE status IN ('sending', 'in_doubt');

CREATE TABLE IF NOT EXISTS email_backups (
    id                 uuid PRIMARY KEY,
    graph_message_id   text NOT NULL UNIQUE,
    incoming_email_id  uuid NOT NULL REFERENCES incoming_emails (id),
    compressed_blob    bytea NOT NULL,
    compression        text NOT NULL,
    size               bigint NOT NULL,
    compressed_size    bigint NOT NULL,
    checksum           text NOT NULL,
    key_id             text NOT NULL,
    expires_at         timestamptz NOT NULL,
    created_at         timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS email_backups_incoming_email ON email_backups (incoming_email_id);
CREATE INDEX IF NOT EXISTS email_backups_expiry ON email_backups (expires_at);
-- Sealed bytes do not compress again; PostgreSQL should not try.
ALTER TABLE email_backups ALTER COLUMN compressed_blob SET STORAGE EXTERNAL;

CREATE TABLE IF NOT EXISTS outbox_events (
    id                 uuid PRIMARY KEY,
    incoming_email_id  uuid NOT NULL REFERENCES incoming_emails (id) ON DELETE CASCADE,
    type               text NOT NULL,
    body               json NOT NULL,
    correlation_id     text,
    reply_to           text,
    traceparent        text,
    -- Until then the event is its writer's to publish; afterwards the scheduler's sweep takes it.
    claimed_until      timestamptz NOT NULL,
    published_at       timestamptz,
    created_at         timestamptz NOT NULL DEFAULT now(),
    UNIQUE (incoming_email_id, type)
);
CREATE INDEX IF NOT EXISTS outbox_events_unpublished ON outbox_events (claimed_until) WHERE published_at IS NULL;

CREATE TABLE IF NOT EXISTS dlq (
    id                 uuid PRIMARY KEY,
    incoming_email_id  uuid REFERENCES incoming_emails (id) ON DELETE CASCADE,
    reason             text NOT NULL,
    attempts           integer NOT NULL DEFAULT 0,
    last_error         text,
    status             text NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'replayed', 'discarded')),
    mailbox            text,
    message_id         text NOT NULL UNIQUE,
    queue_name         text NOT NULL,
    actor_name         text,
    body               bytea,
    mirrored_at        timestamptz,
    resolved_at        timestamptz,
    resolved_by        text,
    created_at         timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS dlq_open ON dlq (created_at) WHERE status = 'open';
CREATE INDEX IF NOT EXISTS dlq_incoming_email ON dlq (incoming_email_id);

CREATE TABLE IF NOT EXISTS mailboxes (
    mailbox        text PRIMARY KEY,
    -- Nothing is dispatched before this instant. An operator's pause has no end: 'infinity'.
    paused_until   timestamptz,
    pause_reason   text,
    paused_by      text,
    -- Consecutive refusals of the mailbox itself (denied, unknown, unlicensed); 0 once it answers.
    refusal_count  integer NOT NULL DEFAULT 0,
    limits         jsonb NOT NULL DEFAULT '{}',
    updated_at     timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS mailboxes_paused ON mailboxes (paused_until) WHERE paused_until IS NOT NULL;

CREATE TABLE IF NOT EXISTS audit_log (
    id       uuid PRIMARY KEY,
    at       timestamptz NOT NULL DEFAULT now(),
    who      text NOT NULL,
    action   text NOT NULL,
    subject  text NOT NULL,
    detail   jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX IF NOT EXISTS audit_log_at ON audit_log (at);
