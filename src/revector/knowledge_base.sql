-- name: extension
-- pgvector, where it is missing.
-- lock: none
CREATE EXTENSION IF NOT EXISTS vector{schema};

-- name: table
-- The knowledge base; printed by `schema`, run by `init`.
-- lock: none
CREATE TABLE {table} (
    id text PRIMARY KEY,
    title text,
    content text NOT NULL,
    metadata jsonb NOT NULL DEFAULT '{{}}',
    embedding {type}
);

-- name: index
-- Its vector index, on an empty table.
-- lock: SHARE, for an instant
CREATE INDEX {name} ON {table}
    USING {method} (embedding {opclass}) WITH ({parameters});

-- name: index_after_load
-- The vector index that learns from the rows of the first load; writes go on meanwhile.
-- lock: SHARE UPDATE EXCLUSIVE, for long
CREATE INDEX CONCURRENTLY {name} ON {table} USING {method} ({column} {opclass}){parameters};

-- name: drop_index
-- What an interrupted build has left.
-- lock: SHARE UPDATE EXCLUSIVE
DROP INDEX CONCURRENTLY {name};

-- name: analyze
-- The planner learns the rows.
-- lock: SHARE UPDATE EXCLUSIVE
ANALYZE {table};

-- name: any_row
-- Whether the table has a row.
-- lock: ACCESS SHARE
SELECT EXISTS (SELECT FROM {table}) AS found;

-- name: default_schema
-- Where CREATE TABLE without a schema puts a table; NULL: the search_path names no schema that exists.
-- lock: none
SELECT current_schema();

-- name: schema_exists
-- Whether there is a schema of this name.
-- lock: none
SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = %(schema)s) AS found;

-- name: attnum
-- The attribute number of the new table's vector column.
-- lock: none
SELECT attrelid AS table_oid, attnum FROM pg_attribute
 WHERE attrelid = (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                    WHERE n.nspname = %(schema)s AND c.relname = %(name)s) AND attname = 'embedding';

-- name: enter
-- Every write transaction starts here: while we hold this, no cutover can change which model answers.
-- lock: ROW EXCLUSIVE
LOCK TABLE ONLY {table} IN ROW EXCLUSIVE MODE;

-- name: write
-- Write a chunk; the same id replaces. Sorted by id, so that two loads cannot wait for each other in a circle.
-- lock: ROW EXCLUSIVE
WITH given AS MATERIALIZED (
  SELECT g.id::{id_type} AS id, g.title, g.content, g.metadata::{metadata_type} AS metadata, g.vector::{type} AS vector
    FROM unnest(%(ids)s::text[], %(titles)s::text[], %(contents)s::text[], %(metadata)s::text[], %(vectors)s::text[])
      AS g (id, title, content, metadata, vector)),
written AS (
  INSERT INTO {table} (id, title, content, metadata, {column})
  SELECT id, title, content, metadata, vector FROM given ORDER BY id
      ON CONFLICT (id) DO UPDATE SET title = excluded.title, content = excluded.content, metadata = excluded.metadata,
         {column} = excluded.{column}
  RETURNING 1)
SELECT (SELECT count(*) FROM written) AS written, (SELECT count(*) FROM given g JOIN {table} t ON t.id = g.id) AS replaced;
