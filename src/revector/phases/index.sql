-- name: vector_index
-- A vector index on the candidate; writes go on meanwhile.
-- lock: SHARE UPDATE EXCLUSIVE, for long
CREATE INDEX CONCURRENTLY {name} ON {table} USING {method} ({key} {opclass}){parameters}{placed}{predicate};

-- name: vector_root
-- The same on a partitioned table alone: its parts are built one by one, and one of a later partition by the server.
-- lock: ACCESS EXCLUSIVE on the partitioned table alone, which holds no row
CREATE INDEX {name} ON ONLY {table} USING {method} ({key} {opclass}){parameters}{placed}{predicate};

-- name: twin_index
-- A secondary index that involves the vector column, on the candidate.
-- lock: SHARE UPDATE EXCLUSIVE, for long
CREATE INDEX CONCURRENTLY {name} ON {table} USING {using};

-- name: twin_root
-- The same on a partitioned table alone.
-- lock: ACCESS EXCLUSIVE on the partitioned table alone, which holds no row
CREATE INDEX {name} ON ONLY {table} USING {using};

-- name: validate
-- A CHECK of the candidate's, for the rows that the backfill wrote; reads and writes go on.
-- lock: SHARE UPDATE EXCLUSIVE, for a scan
ALTER TABLE {table} VALIDATE CONSTRAINT {name};

-- name: pending_index
-- The small index that finds a generation's pending rows; made after the sweeps, for with it no update is HOT.
-- lock: SHARE UPDATE EXCLUSIVE, for a scan
CREATE INDEX CONCURRENTLY {name} ON {table} ((1)) WHERE {column} IS NULL{has_text};

-- name: pending_root
-- The same on a partitioned table alone.
-- lock: ACCESS EXCLUSIVE on the partitioned table alone, which holds no row
CREATE INDEX {name} ON ONLY {table} ((1)) WHERE {column} IS NULL{has_text};

-- name: pending_whole
-- The same on a partitioned table and all below it, where an operator brings a lost one back.
-- lock: SHARE on every partition, for a scan
CREATE INDEX {name} ON {table} ((1)) WHERE {column} IS NULL{has_text};

-- name: drop_whole
-- The index of a partitioned table, which no server drops concurrently.
-- lock: ACCESS EXCLUSIVE on every partition, for a moment
DROP INDEX {name};

-- name: attach
-- A partition's index becomes part of the table's.
-- lock: ACCESS EXCLUSIVE on the partition, for a moment
ALTER INDEX {index} ATTACH PARTITION {part};

-- name: statistics
-- What ANALYZE is to gather about an expression of the index.
-- lock: SHARE UPDATE EXCLUSIVE on the index
ALTER INDEX {index} ALTER COLUMN {number} SET STATISTICS {target};

-- name: analyze
-- The planner learns the new column.
-- lock: SHARE UPDATE EXCLUSIVE
ANALYZE {table};

-- name: state
-- Whether an index of this name is there, on which table, and whether it is valid.
-- lock: none
SELECT c.oid, i.indisvalid AS valid, i.indrelid AS table_oid
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_index i ON i.indexrelid = c.oid
 WHERE n.nspname = %(schema)s AND c.relname = %(name)s;

-- name: progress
-- How far a CREATE INDEX of this table is.
-- lock: none
SELECT phase, CASE WHEN tuples_total > 0 THEN tuples_done ELSE blocks_done END AS done,
       CASE WHEN tuples_total > 0 THEN tuples_total ELSE blocks_total END AS total,
       CASE WHEN tuples_total > 0 THEN 'rows' ELSE 'blocks' END AS unit, lockers_total > lockers_done AS waiting,
       current_locker_pid AS locker
  FROM pg_stat_progress_create_index WHERE relid = %(table)s::oid AND pid = %(pid)s;
