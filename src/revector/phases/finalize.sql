-- name: not_null_named
-- NOT NULL comes back without a scan (PostgreSQL 18); from here on it holds for every write.
-- lock: ACCESS EXCLUSIVE
ALTER TABLE {table} ADD CONSTRAINT {name} NOT NULL {column} NOT VALID;

-- name: not_null_check
-- The same before PostgreSQL 18, by a CHECK that SET NOT NULL can rely on.
-- lock: ACCESS EXCLUSIVE
ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({column} IS NOT NULL) NOT VALID;

-- name: validate
-- The rows that were there before are checked, while reads and writes go on.
-- lock: SHARE UPDATE EXCLUSIVE, for a scan
ALTER TABLE {table} VALIDATE CONSTRAINT {name};

-- name: set_not_null
-- With the valid CHECK no scan is needed (PostgreSQL 15 to 17).
-- lock: ACCESS EXCLUSIVE
ALTER TABLE {table} ALTER COLUMN {column} SET NOT NULL;

-- name: drop_check
-- The CHECK has served.
-- lock: ACCESS EXCLUSIVE
ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name};

-- name: constraint_state
-- Whether the constraint is there, and valid.
-- lock: none
SELECT convalidated AS valid FROM pg_constraint WHERE conrelid = %(table)s::oid AND conname = %(name)s;

-- name: without_vector
-- Rows that NOT NULL would refuse and that nobody will fill: without a text, or refused by the model.
-- lock: ACCESS SHARE
SELECT count(*) AS rows FROM {table} AS t
 WHERE t.{column} IS NULL AND (({text}) IS NULL OR EXISTS (
       SELECT FROM revector.failures f WHERE f.migration = %(migration)s AND f.generation = %(generation)s
          AND f.text_hash = hashtextextended(({text})::text COLLATE "C", 0)));

-- name: drop_column
-- A column's values go; its heap space is reused as rows are updated.
-- lock: ACCESS EXCLUSIVE
ALTER TABLE {table} DROP COLUMN IF EXISTS {column};

