-- name: holders
-- Who holds a lock on the table, or on a partition of it, that stands in the way of ours; the oldest first.
-- lock: none
SELECT format('session %s of %s, %s%s', a.pid, coalesce(a.usename::text, a.backend_type),
              CASE WHEN a.query LIKE 'autovacuum: %' THEN a.query
                   ELSE concat_ws(', ', nullif(a.application_name, ''), a.state) END,
              ' since ' || to_char(a.xact_start, 'HH24:MI:SS')) AS who,
       a.query LIKE 'autovacuum: %(to prevent wraparound)' AS wraparound
  FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE l.locktype = 'relation' AND l.granted AND l.pid <> pg_backend_pid()
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.relation IN (SELECT {table}::regclass::oid UNION SELECT relid::oid FROM pg_partition_tree({table}::regclass))
   AND a.application_name NOT LIKE 'revector %'
 GROUP BY a.pid, a.usename, a.backend_type, a.query, a.application_name, a.state, a.xact_start
 ORDER BY a.xact_start NULLS LAST LIMIT 3;
