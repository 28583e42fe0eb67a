-- name: create
-- The copy's table: the key's columns, a checksum of the text, the old vector.
-- lock: ACCESS SHARE
CREATE TABLE {backup} AS
SELECT {key}, md5(({text})::text) AS text_checksum, t.{column} AS {column} FROM {table} AS t WHERE false;

-- name: protect
-- Only the owner may read the copy, whatever the schema's default privileges give away, and policies of the table hold here too.
-- lock: ACCESS EXCLUSIVE on the copy
DECLARE grantee text;
BEGIN
  FOR grantee IN
    SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END
      FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = {backup}::regclass AND a.grantee <> c.relowner
  LOOP
    EXECUTE format('REVOKE ALL ON TABLE %s FROM %s CASCADE', {backup}::regclass, grantee);
  END LOOP;
  IF (SELECT relrowsecurity FROM pg_class WHERE oid = {table}::regclass) THEN
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', {backup}::regclass);
  END IF;
END

-- name: own
-- The copy says what it is.
-- lock: none
COMMENT ON TABLE {backup} IS {comment};

-- name: copy
-- Copy key, text checksum and old vector of every row, from one snapshot.
-- lock: ACCESS SHARE
INSERT INTO {backup} SELECT {key}, md5(({text})::text), t.{column} FROM {table} AS t;

-- name: checksum
-- Count and an order-independent checksum of keys, texts and vectors.
-- lock: ACCESS SHARE
SELECT count(*) AS rows,
       coalesce(sum(hashtextextended(ROW({key}, md5(({text})::text), t.{column})::text, 0)::numeric), 0)::text AS checksum
  FROM {table} AS t;

-- name: backup_checksum
-- The same of the copy.
-- lock: ACCESS SHARE
SELECT count(*) AS rows,
       coalesce(sum(hashtextextended(ROW({key}, t.text_checksum, t.{column})::text, 0)::numeric), 0)::text AS checksum
  FROM {backup} AS t;

-- name: state
-- Which relation has the backup's name.
-- lock: none
SELECT c.oid, pg_total_relation_size(c.oid) AS bytes FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %(schema)s AND c.relname = %(name)s;

-- name: drop
-- The copy goes.
-- lock: ACCESS EXCLUSIVE on the copy
DROP TABLE IF EXISTS {backup};
