-- Finding: what operators look for most, emails that were given up, cancelled or too late, without reading all others.
-- Every statement may run twice: yoyo marks a migration in a transaction of its own.
-- depends: 0005.upkeep
-- transactional: false

-- The other statuses have none: each would cost every email an entry for each of its five writes. Those in flight and
-- in doubt are few and have indexes; among the rest one is found by its age.
CREATE INDEX CONCURRENTLY IF NOT EXISTS incoming_emails_outcomes ON incoming_emails (status, id)
    WHERE status IN ('failed', 'cancelled', 'expired');
