-- Drafts that nobody sends any more: which emails may have left one, and whether it was looked for.
-- Every statement may run twice: yoyo marks a migration in a transaction of its own.
-- depends: 0005.upkeep
-- transactional: false

-- True: nothing is left in the mailbox; false: something may be; NULL: nobody has looked.
ALTER TABLE incoming_emails ADD COLUMN IF NOT EXISTS drafts_clean boolean;
ALTER TABLE incoming_emails ADD COLUMN IF NOT EXISTS drafts_looked_at timestamptz;

-- The condition is that of models/leftovers.py. A mail that was sent at its first attempt is never in it.
CREATE INDEX CONCURRENTLY IF NOT EXISTS incoming_emails_leftovers ON incoming_emails (coalesce(drafts_looked_at, updated_at))
    WHERE drafts_clean IS NOT TRUE AND status IN ('processed', 'failed', 'cancelled', 'expired') AND (
        drafts_clean IS FALSE
        OR (route = 'attachment' OR draft_id IS NOT NULL) AND (attempt_count > 1 OR status <> 'processed')
    );

CREATE INDEX CONCURRENTLY IF NOT EXISTS file_uploads_sessions ON file_uploads (id) WHERE upload_session_info IS NOT NULL;
