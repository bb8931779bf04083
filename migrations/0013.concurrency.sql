-- How much may be in flight in the whole fleet, where an operator has set it in the place of the settings.
-- Every statement may run twice: yoyo marks a migration in a transaction of its own.
-- depends: 0012.finding

-- By the names of the settings. Not among mailboxes.limits: the limiter of an earlier version would not know them.
CREATE TABLE IF NOT EXISTS fleet_limits (
    name        text PRIMARY KEY,
    value       integer NOT NULL CHECK (value > 0),
    updated_at  timestamptz NOT NULL DEFAULT now()
);
