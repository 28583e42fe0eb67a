-- name: leaves
-- The relations that hold the table's rows: the table itself, or the leaves of a partitioned one.
-- lock: none
WITH RECURSIVE tree AS (
  SELECT c.oid, c.relkind FROM pg_class c WHERE c.oid = %(table)s::oid
  UNION ALL
  SELECT c.oid, c.relkind FROM tree t
    JOIN pg_inherits i ON i.inhparent = t.oid AND NOT i.inhdetachpending JOIN pg_class c ON c.oid = i.inhrelid
   WHERE t.relkind = 'p')
SELECT c.oid, n.nspname AS schema, c.relname AS name
  FROM tree t JOIN pg_class c ON c.oid = t.oid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind <> 'p' ORDER BY c.oid;
