-- name: checks
-- CHECK constraints that read this column, and how many columns each reads.
-- lock: none
SELECT conname AS name, convalidated AS valid, cardinality(conkey) AS columns, pg_get_expr(conbin, conrelid) AS expression,
       connoinherit AS alone, coalesce((to_jsonb(k) ->> 'conenforced')::boolean, true) AS enforced
  FROM pg_constraint k
 WHERE conrelid = %(table)s::oid AND contype = 'c' AND %(column)s::int2 = ANY (conkey) AND conparentid = 0
 ORDER BY conname;

-- name: accepts
-- What a CHECK says of one value; NULL counts as yes.
-- lock: none
SELECT ({expression}) IS NOT FALSE AS accepted FROM (SELECT %(vector)s::{type} AS {column}) AS r;

-- name: settings
-- What is set on the column itself.
-- lock: none
SELECT CASE WHEN coalesce(a.attstattarget, -1) >= 0 THEN a.attstattarget::int END AS statistics,
       CASE WHEN a.attstorage <> t.typstorage THEN a.attstorage::text END AS storage,
       nullif(a.attcompression::text, '') AS compression, coalesce(a.attoptions, ARRAY[]::text[]) AS options
  FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
 WHERE a.attrelid = %(table)s::oid AND a.attnum = %(column)s;

-- name: grants
-- Rights on the column itself.
-- lock: none
SELECT CASE WHEN x.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(x.grantee)) END AS grantee,
       x.privilege_type AS privilege, x.is_grantable AS grantable
  FROM pg_attribute a CROSS JOIN aclexplode(a.attacl) AS x
 WHERE a.attrelid = %(table)s::oid AND a.attnum = %(column)s
 ORDER BY 1, 2;

-- name: set_in_parts
-- What partitions have set on their vector column, or on what hangs on it, and nothing spreads from the table to them.
-- lock: none
WITH part AS (
  SELECT c.oid, c.relname, a.attnum FROM pg_class c
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = %(column)s AND NOT a.attisdropped
   WHERE c.oid = ANY (%(tables)s::oid[])),
index AS (
  SELECT p.relname, x.indexrelid AS oid, x.indisclustered, i.relname AS name, i.reltablespace, w.reltablespace AS above
    FROM part p JOIN pg_index x ON x.indrelid = p.oid JOIN pg_class i ON i.oid = x.indexrelid
    JOIN pg_inherits h ON h.inhrelid = i.oid JOIN pg_class w ON w.oid = h.inhparent
   WHERE EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = i.oid
                  AND d.refclassid = 'pg_class'::regclass AND d.refobjid = p.oid AND d.refobjsubid = p.attnum))
SELECT relname AS partition, 'comment of column ' || %(column)s AS told FROM part WHERE col_description(oid, attnum) IS NOT NULL
UNION ALL
SELECT p.relname, 'comment of constraint ' || k.conname FROM part p JOIN pg_constraint k ON k.conrelid = p.oid
 WHERE p.attnum = ANY (k.conkey) AND k.contype IN ('c', 'n') AND obj_description(k.oid, 'pg_constraint') IS NOT NULL
UNION ALL
SELECT relname, 'comment of index ' || name FROM index WHERE obj_description(oid, 'pg_class') IS NOT NULL
UNION ALL
SELECT relname, 'CLUSTER ON ' || name FROM index WHERE indisclustered
UNION ALL
SELECT relname, 'tablespace of index ' || name FROM index WHERE reltablespace <> above
UNION ALL
SELECT DISTINCT i.relname, 'statistics target of index ' || i.name FROM index i JOIN pg_attribute a ON a.attrelid = i.oid
 WHERE coalesce(a.attstattarget, -1) >= 0
 ORDER BY 1, 2;

-- name: part_columns
-- The vector column's attribute number in each partition.
-- lock: none
SELECT c.oid, c.relname AS partition, a.attnum AS number FROM pg_class c
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = %(column)s AND NOT a.attisdropped
 WHERE c.oid = ANY (%(tables)s::oid[]) ORDER BY 2;
