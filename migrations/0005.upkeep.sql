-- Upkeep: autovacuum by table, for an email is written five times in its life and then never again; an index less.
-- Every statement may run twice: yoyo marks a migration in a transaction of its own.
-- depends: 0004.budgets

-- By default a fifth of the table would have to be dead first: with millions of settled emails the indexes of what is
-- ready and leased would consist of entries of rows that are gone.
ALTER TABLE incoming_emails SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000);
ALTER TABLE sent_emails SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000);
ALTER TABLE outbox_events SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000);
ALTER TABLE worker_receipts SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000);
-- Few rows, each written again and again: a row's new version fits beside it.
ALTER TABLE mailboxes SET (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- Nothing looks a sending up by Graph's id (a copy in the archive is, in its own table), and each of an email's five
-- writes made an entry.
DROP INDEX IF EXISTS sent_emails_graph_message;
