-- name: blank
-- Rows whose text is NULL or blank.
-- lock: ACCESS SHARE
SELECT count(*) FROM {table} AS t WHERE ({inside}) AND (({text}) IS NULL OR btrim(({text})::text, E' \t\n\r\f\v') = '');

-- name: weight
-- Bytes of a table with its partitions: heap and what is stored out of line, not the indexes.
-- lock: ACCESS SHARE
SELECT coalesce(sum(pg_table_size(oid)), 0)::bigint AS bytes
  FROM (SELECT %(table)s::oid AS oid UNION SELECT relid FROM pg_partition_tree(%(table)s::oid)) AS tree;

-- name: rows
-- How many rows there are, by reading them all: only of a small table.
-- lock: ACCESS SHARE
SELECT count(*) FROM {table} AS t WHERE {inside};

-- name: estimate
-- How many rows the planner expects: from the table's statistics and its present size; no row is read.
-- lock: ACCESS SHARE
EXPLAIN (FORMAT JSON) SELECT FROM {table} AS t WHERE {inside};

-- name: backup_state
-- Size of the backup table, and seconds since it was verified.
-- lock: none
SELECT pg_total_relation_size(%(table)s::oid::regclass) AS bytes,
       extract(epoch FROM clock_timestamp() - max(at))::float8 AS age
  FROM revector.events WHERE migration = %(migration)s AND step = 'backup.verify';

-- name: last_read
-- Seconds since one of these indexes, or a partition of one, was last scanned (PostgreSQL 16); our own searches count.
-- lock: none
SELECT extract(epoch FROM clock_timestamp() - max(s.last_idx_scan))::float8
  FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
  JOIN pg_stat_all_indexes s ON s.indexrelid = c.oid OR s.indexrelid IN (SELECT relid FROM pg_partition_tree(c.oid))
 WHERE i.indrelid = %(table)s::oid AND c.relname = ANY (%(names)s);

-- name: without_text
-- Rows that only the outgoing generation has a vector of, though they have no text: nobody will ever fill them.
-- lock: ACCESS SHARE, for a scan
SELECT count(*) FROM {table} AS t
 WHERE t.{outgoing} IS NOT NULL AND t.{incoming} IS NULL AND ({text}) IS NULL AND ({inside}) IS TRUE;

-- name: last_alarm
-- Rows that came with vectors of the wrong model lately, and seconds since the last of them.
-- lock: none
SELECT jsonb_build_object('rows', sum((figures ->> 'rows')::int), 'written_by', max(figures ->> 'written_by'),
                          'model', max(figures ->> 'model')) AS figures,
       extract(epoch FROM clock_timestamp() - max(at))::float8 AS age
  FROM revector.events WHERE migration = %(migration)s AND step = 'alarm'
   AND at > clock_timestamp() - %(seconds)s * interval '1 s' HAVING count(*) > 0;
