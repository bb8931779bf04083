-- Ready mail without external recipients, by lane: what goes on while the tenant's limit of these is used up.
-- Every statement may run twice: yoyo marks a migration in a transaction of its own.
-- depends: 0003.operators

CREATE INDEX IF NOT EXISTS incoming_emails_internal_lanes
    ON incoming_emails (route, mailbox, (coalesce(tenant, '')), priority, id)
    WHERE status = 'received' AND lease_until IS NULL AND next_attempt_at IS NULL AND external_recipient_count = 0;
