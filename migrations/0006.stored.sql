-- Attachments that are stored with mailfleet, and which emails use them.
-- Every statement may run twice: yoyo marks a migration in a transaction of its own.
-- depends: 0005.upkeep

CREATE TABLE IF NOT EXISTS stored_attachments (
    id            uuid PRIMARY KEY,
    name          text NOT NULL,
    content_type  text NOT NULL,
    -- Bytes of the plain content, and its SHA-256 in hex; NULL until it is stored whole.
    size          bigint,
    sha256        text,
    key_id        text NOT NULL,
    -- The header of the sealed stream; its segments are in the store, under the id.
    header        bytea NOT NULL,
    created_by    text NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    expires_at    timestamptz NOT NULL,
    stored_at     timestamptz,
    -- Since when it is nobody's any more: its file is being deleted, and then the row.
    deleting_at   timestamptz
);
CREATE INDEX IF NOT EXISTS stored_attachments_expiry ON stored_attachments (expires_at);
CREATE INDEX IF NOT EXISTS stored_attachments_deleting ON stored_attachments (id) WHERE deleting_at IS NOT NULL;

CREATE TABLE IF NOT EXISTS stored_attachment_uses (
    stored_attachment_id  uuid NOT NULL REFERENCES stored_attachments (id) ON DELETE CASCADE,
    incoming_email_id     uuid NOT NULL REFERENCES incoming_emails (id) ON DELETE CASCADE,
    PRIMARY KEY (stored_attachment_id, incoming_email_id)
);
CREATE INDEX IF NOT EXISTS stored_attachment_uses_email ON stored_attachment_uses (incoming_email_id);
