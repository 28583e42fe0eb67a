-- name: limits
-- What the workers of a migration are held to now.
-- lock: none
SELECT limits, batch_size FROM revector.migrations WHERE id = %(migration)s;

-- name: tune
-- Replace some of the limits; a key whose value is null goes.
-- lock: none
UPDATE revector.migrations SET limits = jsonb_strip_nulls(limits || %(limits)s), batch_size = coalesce(%(batch_size)s, batch_size)
 WHERE id = %(migration)s;

-- name: blocked
-- Sessions of others that have waited for 100 ms or longer for a lock that one of ours holds.
-- lock: none
WITH waiting AS MATERIALIZED (
  SELECT DISTINCT l.pid, l.waitstart FROM pg_locks l JOIN pg_stat_activity a USING (pid)
   WHERE NOT l.granted AND l.waitstart < clock_timestamp() - interval '100 ms'
     AND l.pid <> ALL (%(ours)s::int[]) AND a.application_name NOT LIKE 'revector %'
     AND a.datname = current_database())
SELECT pid, extract(epoch FROM clock_timestamp() - waitstart)::float8 AS seconds FROM waiting
 WHERE pg_blocking_pids(pid) && %(ours)s::int[] ORDER BY seconds DESC LIMIT 1;

-- name: standbys
-- Who receives our WAL: how late it says it is, and how far it has come; without pg_monitor the columns are NULL.
-- lock: none
SELECT pid, coalesce(nullif(application_name, ''), usename, 'a standby') AS name, state,
       extract(epoch FROM greatest(write_lag, flush_lag, replay_lag))::float8 AS lag,
       (coalesce(replay_lsn, write_lsn, sent_lsn) - '0/0')::bigint AS place,
       (pg_current_wal_insert_lsn() - '0/0')::bigint AS head
  FROM pg_stat_replication WHERE state IS NULL OR state IN ('catchup', 'streaming');
