-- name: text_function
-- The text of a row, bound to its names when it is created: no caller's search_path can change what it means.
-- lock: none
CREATE FUNCTION revector.{function} ({arguments}) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN ({text})::text;

-- name: filter_function
-- Whether a row belongs to the migration, bound to its names when it is created.
-- lock: none
CREATE FUNCTION revector.{function} ({arguments}) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN ({inside})::boolean;

-- name: grant_text_function
-- Every writer's trigger calls it, also where default privileges take EXECUTE away from PUBLIC.
-- lock: none
GRANT EXECUTE ON FUNCTION revector.{function} ({types}) TO PUBLIC;

-- name: create_function
-- The trigger function; plain CREATE, so that one of the user's is never replaced.
-- lock: none
CREATE FUNCTION revector.{function} () RETURNS trigger LANGUAGE plpgsql AS {body};

-- name: replace_function
-- The trigger function's next version.
-- lock: SHARE ROW EXCLUSIVE or stronger on the table, taken by the caller in the same transaction
CREATE OR REPLACE FUNCTION revector.{function} () RETURNS trigger LANGUAGE plpgsql AS {body};

-- name: moving
-- An UPDATE that may move a row, so that its INSERT elsewhere keeps our doing: the key changed, or the leaf is not the table's own child.
-- lock: none
IF TG_OP OPERATOR(pg_catalog.=) 'UPDATE' AND ({key_changed} OR NOT EXISTS (
       SELECT FROM pg_catalog.pg_inherits i
        WHERE i.inhrelid OPERATOR(pg_catalog.=) TG_RELID AND i.inhparent OPERATOR(pg_catalog.=) {table}::pg_catalog.oid)) THEN
    PERFORM pg_catalog.set_config('revector.moved', {mark}, true);
  END IF;

-- name: moved
-- The second half of such an UPDATE, known by its text and vectors: they are right as they are.
-- lock: none
IF TG_OP OPERATOR(pg_catalog.=) 'INSERT' AND pg_catalog.current_setting('revector.moved', true) OPERATOR(pg_catalog.<>) '' THEN
    IF pg_catalog.current_setting('revector.moved') OPERATOR(pg_catalog.=) {mark} THEN
      PERFORM pg_catalog.set_config('revector.moved', '', true);
      RETURN NEW;
    END IF;
  END IF;

-- name: body_expanded
-- Before SERVED: the live column is never touched; the candidate becomes NULL when the text changes.
-- lock: none
BEGIN
  {moved}
  IF pg_catalog.current_setting('revector.writer', true) OPERATOR(pg_catalog.=) 'on' THEN
    IF TG_OP OPERATOR(pg_catalog.=) 'UPDATE' THEN
      IF {text_changed} THEN NEW.{candidate} := NULL; END IF;
    END IF;
    RETURN NEW;
  END IF;
  {outside}
  IF TG_OP OPERATOR(pg_catalog.=) 'INSERT' THEN
    IF pg_catalog.current_setting('session_replication_role') OPERATOR(pg_catalog.<>) 'replica' THEN
      NEW.{candidate} := NULL;
    END IF;
  ELSIF {text_changed} THEN
    NEW.{candidate} := NULL;
  ELSE
    NEW.{candidate} := OLD.{candidate};
  END IF;
  {moving}
  RETURN NEW;
END

-- name: body_served
-- From SERVED on: each writer owns one generation; what it did not write for a new text becomes NULL.
-- lock: none
DECLARE
  schema_name pg_catalog.name;
  owns_other boolean := false;
BEGIN
  {moved}
  IF pg_catalog.current_setting('revector.writer', true) OPERATOR(pg_catalog.=) 'on' THEN
    IF TG_OP OPERATOR(pg_catalog.=) 'UPDATE' THEN
      IF {text_changed} THEN NEW.{live} := NULL; NEW.{other} := NULL; END IF;
    END IF;
    RETURN NEW;
  END IF;
  FOREACH schema_name IN ARRAY pg_catalog.current_schemas(false) LOOP
    EXIT WHEN schema_name OPERATOR(pg_catalog.=) {live_views};
    IF schema_name OPERATOR(pg_catalog.=) {other_views} THEN owns_other := true; EXIT; END IF;
  END LOOP;
  {outside}
  IF TG_OP OPERATOR(pg_catalog.=) 'INSERT' THEN
    IF pg_catalog.current_setting('session_replication_role') OPERATOR(pg_catalog.<>) 'replica' THEN
      IF owns_other THEN NEW.{live} := NULL; ELSE NEW.{other} := NULL; END IF;
    END IF;
    {not_null}
  ELSIF owns_other THEN
    IF {text_changed} THEN
      IF NOT {other_changed} THEN NEW.{other} := NULL; END IF;
      NEW.{live} := NULL;
    ELSE
      NEW.{live} := OLD.{live};
    END IF;
  ELSE
    IF {text_changed} THEN
      IF NOT {live_changed} THEN NEW.{live} := NULL; END IF;
      NEW.{other} := NULL;
    ELSE
      NEW.{other} := OLD.{other};
    END IF;
  END IF;
  {moving}
  RETURN NEW;
END

-- name: outside_expanded
-- Outside the filter one vector for both (before SERVED the application's); a replicated INSERT keeps what it brings.
-- lock: none
IF {inside} IS NOT TRUE
     AND (TG_OP OPERATOR(pg_catalog.=) 'UPDATE' OR pg_catalog.current_setting('session_replication_role') OPERATOR(pg_catalog.<>) 'replica') THEN
    NEW.{candidate} := NEW.{live};
    RETURN NEW;
  END IF;

-- name: outside_served
-- From SERVED on: the vector that the writer's own generation has.
-- lock: none
IF {inside} IS NOT TRUE
     AND (TG_OP OPERATOR(pg_catalog.=) 'UPDATE' OR pg_catalog.current_setting('session_replication_role') OPERATOR(pg_catalog.<>) 'replica') THEN
    IF owns_other THEN NEW.{live} := NEW.{other}; ELSE NEW.{other} := NEW.{live}; END IF;
    IF TG_OP OPERATOR(pg_catalog.=) 'INSERT' THEN
      {not_null}
    END IF;
    RETURN NEW;
  END IF;

-- name: not_null
-- The relaxed NOT NULL, for INSERT only: the same error as the constraint gave.
-- lock: none
IF NEW.{live} IS NULL AND NEW.{other} IS NULL THEN
      RAISE not_null_violation USING
        MESSAGE = pg_catalog.format('null value in column "%s" of relation "%s" violates not-null constraint', {column}::pg_catalog.text, TG_TABLE_NAME),
        COLUMN = {column}, TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA;
    END IF;

-- name: create_trigger
-- The one trigger; its name sorts last.
-- lock: SHARE ROW EXCLUSIVE
CREATE TRIGGER {trigger} BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION revector.{function} ();

-- name: enable_trigger
-- It fires for replicated rows and for our own writes too.
-- lock: SHARE ROW EXCLUSIVE
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger};

-- name: drop_trigger
-- The table's writes are no longer looked at.
-- lock: ACCESS EXCLUSIVE
DROP TRIGGER IF EXISTS {trigger} ON {table};

-- name: drop_function
-- The functions go with the trigger.
-- lock: none
DROP FUNCTION IF EXISTS revector.{function} ();

-- name: drop_text_function
-- The functions go with the trigger.
-- lock: none
DROP FUNCTION IF EXISTS revector.{function} ({types});

-- name: drop_filter_function
-- The functions go with the trigger.
-- lock: none
DROP FUNCTION IF EXISTS revector.{function} ({types});

-- name: guarded
-- Whether our trigger fires ALWAYS and last on a table without partitions; asked twice a second, so it reads little.
-- lock: none
SELECT coalesce(bool_or(t.tgname = %(trigger)s AND t.tgenabled = 'A'), false)
   AND NOT coalesce(bool_or(NOT t.tgisinternal AND t.tgtype & 3 = 3 AND t.tgtype & 20 <> 0 AND t.tgenabled <> 'D'
                            AND t.tgname::text COLLATE "C" > %(trigger)s COLLATE "C"), false) AS fine
  FROM pg_trigger t WHERE t.tgrelid = %(table)s::oid;

-- name: alive
-- The relations on which our trigger is missing, does not fire ALWAYS, or is not the last of the row's BEFORE triggers.
-- lock: none
WITH RECURSIVE tree AS (
  SELECT c.oid, c.relkind FROM pg_class c WHERE c.oid = %(table)s::oid
  UNION ALL
  SELECT c.oid, c.relkind FROM tree p
    JOIN pg_inherits i ON i.inhparent = p.oid AND NOT i.inhdetachpending JOIN pg_class c ON c.oid = i.inhrelid
   WHERE p.relkind = 'p')
SELECT n.nspname AS schema, c.relname AS relation, found.always, found.last
  FROM tree p JOIN pg_class c ON c.oid = p.oid JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN LATERAL (
    SELECT t.tgenabled = 'A' AS always,
           NOT EXISTS (SELECT FROM pg_trigger o WHERE o.tgrelid = t.tgrelid AND NOT o.tgisinternal AND o.oid <> t.oid
                        AND o.tgtype & 3 = 3 AND o.tgtype & 20 <> 0 AND o.tgenabled <> 'D'
                        AND o.tgname::text COLLATE "C" > t.tgname::text COLLATE "C") AS last
      FROM pg_trigger t WHERE t.tgrelid = p.oid AND t.tgname = %(trigger)s) AS found ON true
 WHERE (found.always AND found.last) IS NOT TRUE
 LIMIT 1;

-- name: vector_columns
-- The table, the stage, and the names that the two generations' columns have now.
-- lock: none
SELECT n.nspname AS schema, c.relname AS relation,
       (SELECT m.stage FROM revector.migrations m WHERE m.table_oid = c.oid ORDER BY m.id DESC LIMIT 1) AS stage,
       (SELECT a.attname FROM pg_attribute a JOIN revector.generations g ON g.attnum = a.attnum AND g.table_oid = a.attrelid
         WHERE a.attrelid = c.oid AND g.number = %(old)s AND NOT a.attisdropped) AS old_column,
       (SELECT a.attname FROM pg_attribute a JOIN revector.generations g ON g.attnum = a.attnum AND g.table_oid = a.attrelid
         WHERE a.attrelid = c.oid AND g.number = %(new)s AND NOT a.attisdropped) AS new_column
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %(table)s::oid;
