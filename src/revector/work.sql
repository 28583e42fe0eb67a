-- name: none_pending
-- Fails unless at most so many rows are pending; read through the pending index, under the caller's lock.
-- lock: none
DECLARE
  pending bigint;
BEGIN
  PERFORM pg_catalog.set_config('enable_seqscan', 'off', true);
  SELECT count(*) INTO pending FROM (
    SELECT FROM {table} AS t WHERE t.{column} IS NULL{has_text} LIMIT {allowed} + 1) AS few;
  IF pending > {allowed} THEN
    RAISE EXCEPTION '% rows or more are pending in {label}, % are allowed', pending, {allowed} USING ERRCODE = 'RV002';
  END IF;
END

-- name: nullable
-- Fails where one of these columns is NOT NULL, in the table or in a partition.
-- lock: none
DECLARE
  guilty text;
BEGIN
  SELECT a.attname INTO guilty FROM pg_catalog.pg_attribute a
   WHERE a.attname = ANY ({columns}) AND a.attnotnull AND NOT a.attisdropped
     AND (a.attrelid = {table}::oid OR a.attrelid IN (SELECT relid FROM pg_catalog.pg_partition_tree({table}::oid)))
   LIMIT 1;
  IF guilty IS NOT NULL THEN
    RAISE EXCEPTION '% became NOT NULL just now', guilty USING ERRCODE = 'RV001';
  END IF;
END

-- name: indexes_valid
-- Fails unless all of these indexes are there and valid.
-- lock: none
BEGIN
  IF (SELECT count(*) FROM pg_catalog.pg_index WHERE indexrelid = ANY ({oids}) AND indisvalid) <> {count} THEN
    RAISE EXCEPTION 'an index of {label} is missing or INVALID' USING ERRCODE = 'RV001';
  END IF;
END

-- name: column_name
-- The name that an attribute number has now.
-- lock: none
SELECT attname FROM pg_attribute WHERE attrelid = %(table)s::oid AND attnum = %(number)s AND NOT attisdropped;

-- name: table_name
-- The name that the table has now.
-- lock: none
SELECT nspname, relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE c.oid = %(table)s::oid;

-- name: drop_index
-- An index of ours goes without stopping anyone.
-- lock: SHARE UPDATE EXCLUSIVE
DROP INDEX CONCURRENTLY IF EXISTS {name};

-- name: refused
-- The texts that the model refuses and that rows still have.
-- lock: ACCESS SHARE
SELECT DISTINCT f.text_hash, f.kind, f.error
  FROM {table} AS t
  JOIN revector.failures f ON f.migration = %(migration)s AND f.generation = %(generation)s
   AND f.text_hash = hashtextextended(({text})::text COLLATE "C", 0)
 WHERE t.{column} IS NULL AND ({text}) IS NOT NULL AND f.kind <> 'blank';

-- name: refused_rows
-- Rows that are pending because the model refuses their text.
-- lock: ACCESS SHARE
SELECT count(*) FROM {table} AS t WHERE t.{column} IS NULL AND ({text}) IS NOT NULL
   AND EXISTS (SELECT FROM revector.failures f WHERE f.migration = %(migration)s AND f.generation = %(generation)s
                AND f.text_hash = hashtextextended(({text})::text COLLATE "C", 0));

-- name: outside_lost
-- Rows outside the filter that only the outgoing generation has a vector of.
-- lock: ACCESS SHARE
SELECT count(*) FROM {table} AS t WHERE t.{outgoing} IS NOT NULL AND t.{incoming} IS NULL AND ({inside}) IS NOT TRUE;
