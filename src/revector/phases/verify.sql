-- name: totals
-- One pass over the generation: rows, vectors and zero vectors.
-- lock: ACCESS SHARE
SELECT count(*) AS rows, count(t.{column}) AS vectors,
       count(*) FILTER (WHERE {schema}.{norm}(t.{column}) = 0) AS zero
  FROM {table} AS t WHERE ({inside});

-- name: sample
-- A random sample of rows that have both a text and a vector.
-- lock: ACCESS SHARE
SELECT t.ctid::text AS tid, ({text})::text AS text, t.{column}::real[] AS vector
  FROM {table} AS t TABLESAMPLE {method} (%(percent)s) REPEATABLE (%(seed)s)
 WHERE ({text}) IS NOT NULL AND t.{column} IS NOT NULL ORDER BY random() LIMIT %(limit)s;

-- name: explain
-- The plan of a search as an application would send it.
-- lock: ACCESS SHARE
EXPLAIN (VERBOSE, FORMAT JSON) SELECT t.ctid FROM {table} AS t {where} ORDER BY {key} OPERATOR({schema}.{operator}) %(vector)s::{type} LIMIT 10;

-- name: search
-- The ten smallest distances, by whatever plan the session's settings leave.
-- lock: ACCESS SHARE
SELECT {key} OPERATOR({schema}.{operator}) %(vector)s::{type} AS distance FROM {table} AS t {where}
 ORDER BY {key} OPERATOR({schema}.{operator}) %(vector)s::{type} LIMIT 10;

-- name: pending
-- Pending rows that the model has not refused, so that two looks can be compared.
-- lock: ACCESS SHARE
SELECT t.tableoid, t.ctid::text AS tid, hashtextextended(({text})::text COLLATE "C", 0) AS hash FROM {table} AS t
 WHERE t.{column} IS NULL AND ({text}) IS NOT NULL
   AND NOT EXISTS (SELECT FROM revector.failures f WHERE f.migration = %(migration)s AND f.generation = %(generation)s
                    AND f.text_hash = hashtextextended(({text})::text COLLATE "C", 0));

-- name: long_texts
-- Texts of a range of blocks that have more bytes than the model's window has tokens; no shorter one can exceed it.
-- lock: ACCESS SHARE
SELECT ({text})::text AS text FROM ONLY {table} AS t
 WHERE t.ctid >= %(lo)s::tid AND t.ctid < %(hi)s::tid AND octet_length(({text})::text) > %(window)s;

-- name: blocks
-- Size of the table in blocks.
-- lock: none
SELECT pg_relation_size(%(table)s::oid) / current_setting('block_size')::int AS blocks;

-- name: index
-- Whether an index is valid.
-- lock: none
SELECT i.indisvalid AS valid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
 WHERE i.indrelid = %(table)s::oid AND c.relname = %(name)s;

-- name: index_oid
-- The index of this name on the table.
-- lock: none
SELECT c.oid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
 WHERE i.indrelid = %(table)s::oid AND c.relname = %(name)s;
