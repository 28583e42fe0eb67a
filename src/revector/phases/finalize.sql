-- name: drop_view
-- The view of the side that goes, before the trigger: nobody writes through it unguarded. RESTRICT: nothing goes along.
-- lock: ACCESS EXCLUSIVE on the view and on the table
DROP VIEW IF EXISTS {view} RESTRICT;

-- name: not_null_named
-- NOT NULL comes back without a scan (PostgreSQL 18); from here on it holds for every write.
-- lock: ACCESS EXCLUSIVE
ALTER TABLE {table} ADD CONSTRAINT {name} NOT NULL {column} NOT VALID;

-- name: not_null_check
-- The same before PostgreSQL 18, by a CHECK that SET NOT NULL can rely on.
-- lock: ACCESS EXCLUSIVE
ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({column} IS NOT NULL) NOT VALID;

-- name: comment_not_null
-- Its comment comes back with it.
-- lock: SHARE UPDATE EXCLUSIVE
COMMENT ON CONSTRAINT {name} ON {table} IS {comment};

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

-- name: indexes_of
-- Which of these indexes the table has.
-- lock: none
SELECT c.oid, c.relname AS name
  FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
 WHERE i.indrelid = %(table)s::oid AND c.relname = ANY (%(names)s);

-- name: index_named
-- The index of this name.
-- lock: none
SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %(schema)s AND c.relname = %(name)s AND c.relkind IN ('i', 'I');

-- name: rename_index
-- A partition's index takes the name that its users know.
-- lock: SHARE UPDATE EXCLUSIVE on the index
ALTER INDEX {index} RENAME TO {name};

-- name: drop_index_of_all
-- An index of a partitioned table goes, with its part on every partition.
-- lock: ACCESS EXCLUSIVE
DROP INDEX IF EXISTS {name};

-- name: standing_alone
-- An index of ours that is no part of another, on a partition that is or was the table's.
-- lock: none
SELECT n.nspname AS schema, c.relname AS name
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_index x ON x.indexrelid = c.oid
 WHERE c.relkind = 'i' AND c.relname = %(name)s AND (c.oid = %(index)s::oid OR x.indrelid = ANY (%(tables)s::oid[]))
   AND NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = c.oid);
