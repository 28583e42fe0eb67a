-- name: live
-- The live generation and its model, read in the same statement as the hits: a cutover falls before both or after both.
-- lock: ACCESS SHARE
WITH live AS (
  SELECT g.number FROM revector.generations g
    JOIN pg_attribute a ON a.attrelid = g.table_oid AND a.attnum = g.attnum AND a.attname = {column_name}
   WHERE g.table_oid = {table_oid}::oid AND g.live),
hits AS (
  SELECT {key} AS id, {title} AS title, ({text})::text AS text,
         t.{column} OPERATOR({schema}.{operator}) %(query)s::{type} AS distance
    FROM {table} AS t WHERE t.{column} IS NOT NULL
   ORDER BY t.{column} OPERATOR({schema}.{operator}) %(query)s::{type} LIMIT %(k)s)
SELECT live.number, hits.id, hits.title, hits.text, hits.distance FROM live LEFT JOIN hits ON true ORDER BY hits.distance;

-- name: unregistered
-- The same on a table that the ledger does not know.
-- lock: ACCESS SHARE
SELECT NULL::int AS number, {key} AS id, {title} AS title, ({text})::text AS text,
       t.{column} OPERATOR({schema}.{operator}) %(query)s::{type} AS distance
  FROM {table} AS t WHERE t.{column} IS NOT NULL
 ORDER BY t.{column} OPERATOR({schema}.{operator}) %(query)s::{type} LIMIT %(k)s;
