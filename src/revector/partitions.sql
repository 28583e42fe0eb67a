-- name: leaves
-- The relations that hold the table's rows: the table itself, or the leaves of a partitioned one.
-- lock: none
WITH RECURSIVE tree AS (
  SELECT c.oid, c.relkind FROM pg_class c WHERE c.oid = %(table)s::oid
  UNION ALL
  SELECT c.oid, c.relkind FROM tree t
    JOIN pg_inherits i ON i.inhparent = t.oid AND NOT i.inhdetachpending JOIN pg_class c ON c.oid = i.inhrelid
   WHERE t.relkind = 'p')
SELECT c.oid, n.nspname AS schema, c.relname AS name
  FROM tree t JOIN pg_class c ON c.oid = t.oid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' ORDER BY c.oid;

-- name: below
-- Everything below a partitioned table, parents before their partitions, with what it weighs.
-- lock: ACCESS SHARE, for its size
WITH RECURSIVE tree AS (
  SELECT i.inhrelid AS oid, i.inhparent AS parent, 1 AS level
    FROM pg_inherits i WHERE i.inhparent = %(table)s::oid AND NOT i.inhdetachpending
  UNION ALL
  SELECT i.inhrelid, i.inhparent, t.level + 1 FROM tree t
    JOIN pg_class c ON c.oid = t.oid AND c.relkind = 'p'
    JOIN pg_inherits i ON i.inhparent = t.oid AND NOT i.inhdetachpending)
SELECT t.oid, t.parent, n.nspname AS schema, c.relname AS name, c.relkind::text AS kind,
       greatest(c.reltuples, 0)::float8 AS estimated_rows, coalesce(pg_relation_size(c.oid), 0) AS heap_bytes,
       coalesce(pg_total_relation_size(c.oid), 0) AS total_bytes
  FROM tree t JOIN pg_class c ON c.oid = t.oid JOIN pg_namespace n ON n.oid = c.relnamespace
 ORDER BY t.level, c.oid;

-- name: key
-- The columns that decide where a row belongs, at every level.
-- lock: none
SELECT DISTINCT a.attname AS name
  FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.objid AND a.attnum = d.objsubid
 WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = d.objid
   AND d.objsubid > 0 AND d.refobjsubid = 0 AND d.deptype = 'i' AND d.objid = ANY (%(tables)s::oid[])
 ORDER BY 1;

-- name: parent
-- The topmost table that a partition belongs to.
-- lock: none
WITH RECURSIVE above AS (
  SELECT %(table)s::oid AS oid, 0 AS level
  UNION ALL SELECT i.inhparent, a.level + 1 FROM above a JOIN pg_inherits i ON i.inhrelid = a.oid
              JOIN pg_class c ON c.oid = a.oid AND c.relispartition)
SELECT n.nspname || '.' || c.relname AS name
  FROM above a JOIN pg_class c ON c.oid = a.oid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE a.level > 0 ORDER BY a.level DESC LIMIT 1;

-- name: own
-- What is tied to the vector column in one partition alone: the table's own objects reach every partition, these do not.
-- lock: none
SELECT c.relname AS partition, pg_describe_object(d.classid, d.objid, d.objsubid) AS description,
       x.indexrelid IS NOT NULL AS is_index
  FROM unnest(%(tables)s::oid[]) AS p (oid)
  JOIN pg_class c ON c.oid = p.oid
  JOIN pg_attribute a ON a.attrelid = p.oid AND a.attname = %(column)s AND NOT a.attisdropped
  JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = p.oid AND d.refobjsubid = a.attnum
  LEFT JOIN pg_index x ON d.classid = 'pg_class'::regclass AND x.indexrelid = d.objid
 WHERE NOT EXISTS (SELECT FROM pg_inherits i WHERE d.classid = 'pg_class'::regclass AND i.inhrelid = d.objid)
   AND NOT EXISTS (SELECT FROM pg_constraint k WHERE d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
                    AND (k.contype = 'n' OR k.coninhcount > 0))
   AND NOT EXISTS (SELECT FROM pg_trigger g WHERE d.classid = 'pg_trigger'::regclass AND g.oid = d.objid AND g.tgparentid <> 0)
 ORDER BY 1, 2;

-- name: published
-- Publications that name a partition.
-- lock: none
SELECT DISTINCT p.pubname AS name, c.relname AS partition
  FROM pg_publication_tables p
  JOIN pg_class c ON c.relname = p.tablename JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = p.schemaname
 WHERE c.oid = ANY (%(tables)s::oid[]) ORDER BY 1, 2;

-- name: differing
-- Generated columns that a partition computes otherwise than the table does.
-- lock: none
SELECT c.relname AS partition, a.attname AS name
  FROM pg_attribute a
  JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
  JOIN pg_attribute b ON b.attname = a.attname AND b.attrelid = ANY (%(tables)s::oid[])
  JOIN pg_class c ON c.oid = b.attrelid
  JOIN pg_attrdef e ON e.adrelid = b.attrelid AND e.adnum = b.attnum
 WHERE a.attrelid = %(table)s::oid AND a.attgenerated <> '' AND NOT a.attisdropped
   AND pg_get_expr(d.adbin, d.adrelid) <> pg_get_expr(e.adbin, e.adrelid)
 ORDER BY 1, 2;

-- name: triggers
-- Triggers that partitions have of their own.
-- lock: none
SELECT t.oid, t.tgname AS name, t.tgenabled::text AS enabled, t.tgtype::int AS type, t.tgattr::int2[]::int[] AS columns,
       t.tgfoid::oid AS function, c.relname AS partition
  FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
 WHERE t.tgrelid = ANY (%(tables)s::oid[]) AND NOT t.tgisinternal AND t.tgparentid = 0
 ORDER BY t.tgname;

-- name: index_parts
-- An index and those below it, by the relation that each is on.
-- lock: none
WITH RECURSIVE tree AS (
  SELECT %(index)s::oid AS oid
  UNION ALL SELECT i.inhrelid FROM tree t JOIN pg_inherits i ON i.inhparent = t.oid)
SELECT x.indrelid AS relation, c.oid, n.nspname AS schema, c.relname AS name, x.indisvalid AS valid
  FROM tree t JOIN pg_class c ON c.oid = t.oid JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_index x ON x.indexrelid = t.oid;

-- name: index_options
-- Partitions whose part of an index was built with other options than the index itself.
-- lock: none
WITH RECURSIVE tree AS (
  SELECT %(index)s::oid AS oid
  UNION ALL SELECT i.inhrelid FROM tree t JOIN pg_inherits i ON i.inhparent = t.oid), options AS (
  SELECT c.oid, ARRAY(SELECT o FROM unnest(c.reloptions) AS o ORDER BY o) AS options FROM tree t JOIN pg_class c ON c.oid = t.oid)
SELECT p.relname AS partition, coalesce(nullif(array_to_string(o.options, ', '), ''), 'default parameters') AS options
  FROM options o JOIN options root ON root.oid = %(index)s::oid JOIN pg_index x ON x.indexrelid = o.oid
  JOIN pg_class p ON p.oid = x.indrelid
 WHERE o.options <> root.options AND p.relkind = 'r'
 ORDER BY 1;

-- name: strict
-- Partitions whose NOT NULL on the column is their own, or has another name than the table's (PostgreSQL 18).
-- lock: none
SELECT k.conrelid AS oid, k.conname AS name
  FROM pg_constraint k JOIN pg_attribute a ON a.attrelid = k.conrelid AND k.conkey = ARRAY[a.attnum]
 WHERE k.contype = 'n' AND k.conrelid = ANY (%(tables)s::oid[]) AND a.attname = %(column)s
   AND (k.conislocal OR k.conname IS DISTINCT FROM (
        SELECT t.conname FROM pg_constraint t JOIN pg_attribute b ON b.attrelid = t.conrelid AND t.conkey = ARRAY[b.attnum]
         WHERE t.contype = 'n' AND t.conrelid = %(table)s::oid AND b.attname = %(column)s))
 ORDER BY 1;

-- name: not_null_in
-- The first of these relations in which one of these columns is NOT NULL.
-- lock: none
SELECT c.oid, n.nspname AS schema, c.relname AS name, a.attname AS column
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE a.attrelid = ANY (%(tables)s::oid[]) AND a.attname = ANY (%(columns)s) AND a.attnotnull AND NOT a.attisdropped
 ORDER BY array_position(%(tables)s::oid[], c.oid) LIMIT 1;
