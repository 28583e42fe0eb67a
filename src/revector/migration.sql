-- name: blank
-- Rows whose text is NULL or blank.
-- lock: ACCESS SHARE
SELECT count(*) FROM {table} AS t WHERE ({inside}) AND (({text}) IS NULL OR btrim(({text})::text, E' \t\n\r\f\v') = '');

-- name: backup_state
-- Size of the backup table, and seconds since it was verified.
-- lock: none
SELECT pg_total_relation_size(%(table)s::oid::regclass) AS bytes,
       extract(epoch FROM clock_timestamp() - max(at))::float8 AS age
  FROM revector.events WHERE migration = %(migration)s AND step = 'backup.verify';
