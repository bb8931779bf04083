-- Notices: new dead letters are told of, once a minute, on mail.events and to the operator's webhook.
-- Every statement may run twice: yoyo marks a migration in a transaction of its own.
-- depends: 0005.upkeep
-- transactional: false

-- When a notice told of the dead letter; NULL: none has.
ALTER TABLE dlq ADD COLUMN IF NOT EXISTS noticed_at timestamptz;
CREATE INDEX CONCURRENTLY IF NOT EXISTS dlq_unnoticed ON dlq (created_at) WHERE noticed_at IS NULL AND status = 'open';

CREATE TABLE IF NOT EXISTS dead_letter_notices (
    id             uuid PRIMARY KEY,
    -- What is told, to the byte: a signature covers it.
    body           json NOT NULL,
    published_at   timestamptz,
    delivered_at   timestamptz,
    -- When the webhook is tried next; NULL: it has taken the notice, or there was none when the notice was made.
    deliver_at     timestamptz,
    attempt_count  integer NOT NULL DEFAULT 0,
    last_error     text,
    claimed_until  timestamptz,
    created_at     timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS dead_letter_notices_unpublished ON dead_letter_notices (id) WHERE published_at IS NULL;
CREATE INDEX IF NOT EXISTS dead_letter_notices_undelivered ON dead_letter_notices (deliver_at)
    WHERE deliver_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS dead_letter_notices_created ON dead_letter_notices (created_at);
