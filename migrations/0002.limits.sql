-- Limits: send budget that is reserved before the dispatch, turns among tenants, limits and pauses at run time.
-- Every statement may run twice: yoyo marks a migration in a transaction of its own.
-- depends: 0001.schema

-- Recipients outside the organisation; NULL, of mail from before this column, counts every recipient as such.
ALTER TABLE incoming_emails ADD COLUMN IF NOT EXISTS external_recipient_count integer;
-- When send budget was reserved for the dispatch, by Redis's clock; NULL: none is.
ALTER TABLE incoming_emails ADD COLUMN IF NOT EXISTS reserved_at timestamptz;

-- Ready mail by lane: the scheduler takes turns among mailboxes and, within one, among tenants and priorities.
CREATE INDEX IF NOT EXISTS incoming_emails_lanes
    ON incoming_emails (route, mailbox, (coalesce(tenant, '')), priority, id)
    WHERE status = 'received' AND lease_until IS NULL AND next_attempt_at IS NULL;
-- Mail in doubt whose look-up is due: it needs no send budget and takes no turns.
CREATE INDEX IF NOT EXISTS incoming_emails_look_ups ON incoming_emails (route, updated_at)
    WHERE status = 'processing' AND lease_until IS NULL AND next_attempt_at IS NULL;
DROP INDEX IF EXISTS incoming_emails_ready;

-- Nothing is sent from the mailbox before this instant, for its send budget is used up; look-ups and backups go on.
ALTER TABLE mailboxes ADD COLUMN IF NOT EXISTS full_until timestamptz;
ALTER TABLE mailboxes ADD COLUMN IF NOT EXISTS full_reason text;
-- Limits that were lowered because Graph kept throttling: {"sends": {"limit": 18, "at": 1760000000000, "strikes": 3}}.
ALTER TABLE mailboxes ADD COLUMN IF NOT EXISTS slowed jsonb NOT NULL DEFAULT '{}';
-- The tenant that was served last: turns within the mailbox go on behind it.
ALTER TABLE mailboxes ADD COLUMN IF NOT EXISTS last_tenant text;
CREATE INDEX IF NOT EXISTS mailboxes_full ON mailboxes (full_until) WHERE full_until IS NOT NULL;

-- An operator's pauses of a whole route. The mailbox '*' of mailboxes stands for every mailbox.
CREATE TABLE IF NOT EXISTS routes (
    route         text PRIMARY KEY CHECK (route IN ('attachment', 'no-attachment')),
    paused_until  timestamptz,
    pause_reason  text,
    paused_by     text,
    updated_at    timestamptz NOT NULL DEFAULT now()
);
