-- name: holders
-- Who holds one of these locks on these relations or their partitions: what never gives way first, then the oldest.
-- lock: none
SELECT format('session %s of %s, %s%s', a.pid, coalesce(a.usename::text, a.backend_type),
              CASE WHEN a.query LIKE 'autovacuum: %' THEN a.query
                   ELSE concat_ws(', ', nullif(a.application_name, ''), a.state) END,
              ' since ' || to_char(a.xact_start, 'HH24:MI:SS')) AS who,
       a.query LIKE 'autovacuum: %(to prevent wraparound)' AS wraparound
  FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE l.locktype = 'relation' AND l.granted AND l.pid <> pg_backend_pid()
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.mode = ANY ({modes}::text[])
   AND l.relation IN (SELECT to_regclass(n) FROM unnest({relations}::text[]) AS n
                      UNION SELECT p.relid FROM unnest({relations}::text[]) AS n, pg_partition_tree(to_regclass(n)) AS p)
   AND a.application_name NOT LIKE 'revector %'
 GROUP BY a.pid, a.usename, a.backend_type, a.query, a.application_name, a.state, a.xact_start
 ORDER BY wraparound DESC NULLS LAST, a.xact_start NULLS LAST LIMIT 3;
