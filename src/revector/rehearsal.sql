-- name: schema
-- The trigger's functions live here; it goes with the rollback where there is no ledger yet.
-- lock: none
CREATE SCHEMA IF NOT EXISTS revector;

-- name: hold
-- What every short step takes; readers and writers wait for as long as the rehearsal lasts.
-- lock: ACCESS EXCLUSIVE
LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE;

-- name: row
-- A row to try things on.
-- lock: ACCESS SHARE
SELECT ctid::text AS tid FROM {table} WHERE ({text}) IS NOT NULL AND {column} IS NOT NULL LIMIT 1;

-- name: insert
-- The row once more: defaults, CHECKs and BEFORE triggers are met; that its key is taken is no error.
-- lock: ROW EXCLUSIVE
INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM {table} AS t WHERE t.ctid = {tid}::tid LIMIT 1
ON CONFLICT DO NOTHING;

-- name: update
-- An edit of its text, which grows no longer.
-- lock: ROW EXCLUSIVE
UPDATE {table} AS t SET {part} = left({part}::text, -1) || CASE right({part}::text, 1) WHEN '.' THEN ',' ELSE '.' END
 WHERE t.ctid = {tid}::tid;

-- name: select
-- A search, as an application sends it; its answer is a number, so that no slow client keeps the server waiting.
-- lock: ACCESS SHARE
SELECT count(*) FROM (SELECT {columns} FROM {table} AS t ORDER BY t.{column} OPERATOR({schema}.<->) (SELECT {column} FROM {table} WHERE {column} IS NOT NULL LIMIT 1) LIMIT 1) AS found;
