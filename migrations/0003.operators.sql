-- What operators look for: who changed something, which mailboxes refuse us.
-- Every statement may run twice: yoyo marks a migration in a transaction of its own.
-- depends: 0002.limits

CREATE INDEX IF NOT EXISTS audit_log_subject ON audit_log (subject, at);
CREATE INDEX IF NOT EXISTS mailboxes_refusing ON mailboxes (mailbox) WHERE refusal_count > 0;
