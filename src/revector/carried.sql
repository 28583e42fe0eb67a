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
