-- The archive: sealed payloads, legal holds, retention, and what is under which key.
-- Every statement may run twice: yoyo marks a migration in a transaction of its own.
-- depends: 0006.stored
-- transactional: false

-- The data keys that payloads are sealed with, each wrapped by the key of BACKUP_KEYS that key_id names. A process makes
-- one an hour, so that a key change writes these rows and not the payloads.
CREATE TABLE IF NOT EXISTS payload_keys (
    id          uuid PRIMARY KEY,
    key_id      text NOT NULL,
    wrapped     bytea NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS payload_keys_wrapping_key ON payload_keys (key_id, id);

-- Emails that no purge touches. There is no cascade: the row of an email on hold cannot be deleted at all.
CREATE TABLE IF NOT EXISTS holds (
    incoming_email_id  uuid PRIMARY KEY REFERENCES incoming_emails (id),
    reason             text,
    placed_by          text NOT NULL,
    placed_at          timestamptz NOT NULL DEFAULT now()
);

-- When the content was deleted at the end of its retention; the rest of the row stays, so that the id stays known.
ALTER TABLE incoming_emails ADD COLUMN IF NOT EXISTS payload_purged_at timestamptz;
CREATE INDEX CONCURRENTLY IF NOT EXISTS incoming_emails_payload_kept ON incoming_emails (updated_at)
    WHERE status IN ('processed', 'failed', 'cancelled', 'expired') AND payload_purged_at IS NULL;
-- When the backup was deleted at the end of its retention: by this a backup that is missing is told from one that is not.
ALTER TABLE sent_emails ADD COLUMN IF NOT EXISTS backup_purged_at timestamptz;
CREATE INDEX CONCURRENTLY IF NOT EXISTS dlq_resolved ON dlq (resolved_at) WHERE status <> 'open';

-- What is under which key, and what a key change has left.
CREATE INDEX CONCURRENTLY IF NOT EXISTS stored_attachments_wrapping_key ON stored_attachments (key_id, id);
CREATE INDEX CONCURRENTLY IF NOT EXISTS email_backups_wrapping_key ON email_backups (key_id, id);
