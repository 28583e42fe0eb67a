-- name: nearest
-- The nearest rows and the generation that answers, from one snapshot; one row without a hit where nothing is found.
-- lock: ACCESS SHARE
WITH live AS MATERIALIZED ({live}),
hits AS MATERIALIZED (
  SELECT {id} AS id, {title} AS title, {text} AS text, {distance} AS distance
    FROM {table} AS t
   WHERE t.{column} IS NOT NULL AND ({inside})
   ORDER BY {distance} LIMIT %(k)s)
SELECT live.number, live.model, live.other, hits.id, hits.title, hits.text, hits.distance::float8 AS distance
  FROM (SELECT) AS one LEFT JOIN live ON true LEFT JOIN hits ON true
 ORDER BY hits.distance NULLS LAST;

-- name: distance
-- How far a row is from the query; this very expression is what a vector index is found by.
-- lock: none
{key} OPERATOR({schema}.{operator}) %(vector)s::{type};

-- name: live
-- The generation that answers now, and one that a switch could make the answering one.
-- lock: none
SELECT g.number, g.model ->> 'model' AS model,
       (SELECT o.number FROM revector.migrations m JOIN revector.generations o USING (table_oid)
         WHERE m.table_oid = g.table_oid AND m.stage IN ('VERIFIED', 'SERVED', 'CUT_OVER') AND m.closing IS NULL
           AND NOT o.live AND o.attnum IS NOT NULL
         ORDER BY o.number DESC LIMIT 1) AS other
  FROM revector.generations g
  JOIN pg_attribute a ON a.attrelid = g.table_oid AND a.attnum = g.attnum AND NOT a.attisdropped
 WHERE g.table_oid = %(table)s::oid AND g.live AND a.attname = %(column)s AND g.filter IS NOT DISTINCT FROM %(filter)s::text;

-- name: no_ledger
-- The same where there is no ledger: -1 once somebody has made one.
-- lock: none
SELECT CASE WHEN to_regclass('revector.generations') IS NOT NULL THEN -1 END AS number, NULL::text AS model, NULL::int AS other;

-- name: model
-- The identity of a generation's model.
-- lock: none
SELECT model FROM revector.generations WHERE table_oid = %(table)s::oid AND number = %(number)s;

-- name: look_further
-- HNSW looks at no fewer candidates than hits are wanted; 40 is pgvector's default.
-- lock: none
SELECT set_config('hnsw.ef_search',
                  greatest(coalesce(nullif(current_setting('hnsw.ef_search', true), ''), '40')::int, %(wanted)s)::text, true);
