-- name: rename_column
-- The bare name answers with the other generation from here on.
-- lock: ACCESS EXCLUSIVE
ALTER TABLE {table} RENAME COLUMN {column} TO {name};

-- name: rename_index
-- The index keeps the name that the user's own statements know.
-- lock: SHARE UPDATE EXCLUSIVE on the index
ALTER INDEX {index} RENAME TO {name};

-- name: comment
-- The column's comment goes with the name.
-- lock: SHARE UPDATE EXCLUSIVE
COMMENT ON COLUMN {column} IS {comment};

-- name: flip
-- The ledger's live generation, in the same transaction as the names. Who wrote the table under the old names has ended.
-- lock: none
UPDATE revector.generations SET live = (number = {live}), settled = NOT EXISTS (SELECT FROM {relation} AS t WHERE t.{incoming} IS NULL AND ({text}) IS NOT NULL),
       swapped = pg_snapshot_xmax(pg_current_snapshot())::xid
 WHERE table_oid = {table}::oid AND number IN ({old}, {new});

-- name: move_others
-- Generations of other filters' rows, which both columns hold, are found under the bare name from here on.
-- lock: none
UPDATE revector.generations o SET attnum = i.attnum
  FROM revector.generations i
 WHERE o.table_oid = {table}::oid AND o.live AND o.number NOT IN ({old}, {new})
   AND i.table_oid = o.table_oid AND i.number = {live}
   AND o.attnum = (SELECT g.attnum FROM revector.generations g
                    WHERE g.table_oid = o.table_oid AND g.number IN ({old}, {new}) AND g.number <> {live});

-- name: indexes_named
-- Which of these indexes the table has.
-- lock: none
SELECT c.oid, c.relname AS name
  FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
 WHERE i.indrelid = %(table)s::oid AND c.relname = ANY (%(names)s);

-- name: rename_check
-- The CHECK keeps the name that the application's error handling knows.
-- lock: ACCESS EXCLUSIVE
ALTER TABLE {table} RENAME CONSTRAINT {check} TO {name};

-- name: comments
-- The comments of these indexes.
-- lock: none
SELECT c.relname AS name, obj_description(c.oid, 'pg_class') AS comment
  FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
 WHERE i.indrelid = %(table)s::oid AND c.relname = ANY (%(names)s) AND obj_description(c.oid, 'pg_class') IS NOT NULL;

-- name: comment_index
-- The index's comment goes with the name.
-- lock: SHARE UPDATE EXCLUSIVE on the index
COMMENT ON INDEX {index} IS {comment};

-- name: check_comments
-- The comments of these CHECKs.
-- lock: none
SELECT conname AS name, obj_description(oid, 'pg_constraint') AS comment FROM pg_constraint
 WHERE conrelid = %(table)s::oid AND conname = ANY (%(names)s) AND obj_description(oid, 'pg_constraint') IS NOT NULL;

-- name: comment_check
-- The CHECK's comment goes with the name.
-- lock: SHARE UPDATE EXCLUSIVE
COMMENT ON CONSTRAINT {check} ON {table} IS {comment};

-- name: clustered
-- Which of these indexes CLUSTER orders the table by.
-- lock: none
SELECT c.relname AS name FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
 WHERE i.indrelid = %(table)s::oid AND c.relname = ANY (%(names)s) AND i.indisclustered;

-- name: cluster_on
-- The mark goes with the name; nothing is ordered now.
-- lock: SHARE UPDATE EXCLUSIVE
ALTER TABLE {table} CLUSTER ON {index};
