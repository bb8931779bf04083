-- Budgets: what goes on while a budget is nearly used up, or that of external recipients is.
-- Every statement may run twice: yoyo marks a migration in a transaction of its own.
-- depends: 0003.operators

-- While the mailbox is full, mail with at least so many recipients is passed over: 1 is all. Of '*': external ones.
ALTER TABLE mailboxes ADD COLUMN IF NOT EXISTS full_from integer NOT NULL DEFAULT 1;
-- Ready mail without external recipients, by lane.
CREATE INDEX IF NOT EXISTS incoming_emails_internal_lanes
    ON incoming_emails (route, mailbox, (coalesce(tenant, '')), priority, id)
    WHERE status = 'received' AND lease_until IS NULL AND next_attempt_at IS NULL AND external_recipient_count = 0;
