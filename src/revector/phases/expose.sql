-- name: create_schema
-- A generation's own schema; whoever has it first in the search_path works with that generation.
-- lock: none
CREATE SCHEMA {schema};

-- name: comment_schema
-- It says what it is, and that it goes again.
-- lock: none
COMMENT ON SCHEMA {schema} IS {comment};

-- name: create_view
-- The table as that generation's model has it: rights and row policies are those of whoever asks.
-- lock: ACCESS SHARE
CREATE OR REPLACE VIEW {view} WITH (security_invoker = true) AS SELECT {columns} FROM {table} AS t;

-- name: drop_view
-- The view goes; the name means the table again for those who had it first in their search_path.
-- lock: ACCESS EXCLUSIVE on the view
DROP VIEW IF EXISTS {view};

-- name: drop_schema
-- Its schema goes with it; RESTRICT: what is not ours in it is never dropped.
-- lock: none
DROP SCHEMA {schema} RESTRICT;

-- name: may_create
-- The right to make or replace the view, for as long as this transaction lasts.
-- lock: none
GRANT CREATE ON SCHEMA {schema} TO {role};

-- name: usage_only
-- An application's CREATE TABLE must not land here: an error is better than a table nobody finds.
-- lock: none
REVOKE CREATE ON SCHEMA {schema} FROM {role};

-- name: revoke
-- What the table does not grant any more goes, before what it grants is given again.
-- lock: none
REVOKE ALL ON {view} FROM {role};

-- name: grant_usage
-- Who has a right on the table may look into the schema.
-- lock: none
GRANT USAGE ON SCHEMA {schema} TO {role};

-- name: grant
-- A right on the table, on the view as well.
-- lock: none
GRANT {privilege}{columns} ON {view} TO {role}{option};

-- name: facts
-- Who this is, what it may do here, and whose the schema names are.
-- lock: none
SELECT current_user AS role, current_database() AS database,
       has_database_privilege(current_database(), 'CREATE') AS may_create,
       (SELECT coalesce(array_agg(nspname::text), '{{}}') FROM pg_namespace WHERE nspname = ANY (%(schemas)s)) AS taken;

-- name: column_readers
-- Who may read only some columns: a view fails for them, for it reads them all.
-- lock: none
SELECT x.role, array_agg(x.name ORDER BY x.attnum) AS columns
  FROM (SELECT CASE WHEN g.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(g.grantee::regrole::name) END AS role,
               a.attname::text AS name, a.attnum,
               has_table_privilege(CASE WHEN g.grantee = 0 THEN 'public' ELSE g.grantee::regrole::name END, a.attrelid, 'SELECT') AS all_of_it
          FROM pg_attribute a CROSS JOIN LATERAL aclexplode(a.attacl) AS g
         WHERE a.attrelid = %(table)s::oid AND a.attnum > 0 AND NOT a.attisdropped AND g.privilege_type = 'SELECT') AS x
 WHERE NOT x.all_of_it GROUP BY x.role ORDER BY x.role;

-- name: grants
-- Who may do what with the table, or with some of its columns; role is NULL for PUBLIC.
-- lock: none
SELECT CASE WHEN g.grantee <> 0 THEN g.grantee::regrole::name::text END AS role, g.privilege_type AS privilege,
       g.is_grantable AS grantable, '{{}}'::text[] AS columns
  FROM pg_class c CROSS JOIN LATERAL aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) AS g
 WHERE c.oid = %(table)s::oid AND g.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
UNION ALL
SELECT CASE WHEN g.grantee <> 0 THEN g.grantee::regrole::name::text END, g.privilege_type, g.is_grantable,
       array_agg(a.attname::text ORDER BY a.attnum)
  FROM pg_attribute a CROSS JOIN LATERAL aclexplode(a.attacl) AS g
 WHERE a.attrelid = %(table)s::oid AND a.attnum > 0 AND NOT a.attisdropped AND g.privilege_type IN ('INSERT', 'UPDATE')
 GROUP BY 1, 2, 3
 ORDER BY 1 NULLS FIRST, 2;

-- name: granted
-- Who has a right on the view now; role is NULL for PUBLIC.
-- lock: none
SELECT DISTINCT CASE WHEN g.grantee <> 0 THEN g.grantee::regrole::name::text END AS role
  FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) AS g WHERE c.oid = %(view)s::oid;

-- name: shown
-- What a view shows: its columns in their order, and the attribute numbers of the table that it reads.
-- lock: none
SELECT ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = %(view)s::oid AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum) AS names,
       ARRAY(SELECT d.refobjsubid FROM pg_rewrite r JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
              WHERE r.ev_class = %(view)s::oid AND d.refobjid = %(table)s::oid AND d.refobjsubid > 0 ORDER BY 1) AS numbers;

-- name: same_name
-- What has the view's name in its schema.
-- lock: none
SELECT c.oid, c.relkind::text AS kind FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %(schema)s AND c.relname = %(name)s;

-- name: built_on
-- What somebody has built on the view, and would keep it from being dropped.
-- lock: none
SELECT DISTINCT pg_describe_object('pg_class'::regclass, r.ev_class, 0) AS description
  FROM pg_depend d JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
 WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = %(view)s::oid AND r.ev_class <> %(view)s::oid;

-- name: others_in
-- What else is in the schema.
-- lock: none
SELECT count(*) AS others FROM pg_depend d
 WHERE d.refclassid = 'pg_namespace'::regclass AND d.refobjid = %(schema)s::oid
   AND d.classid <> 'pg_default_acl'::regclass AND NOT (d.classid = 'pg_class'::regclass AND d.objid = %(view)s::oid);

-- name: search_path
-- Names of schemas as a search_path setting has them, quoted where they must be.
-- lock: none
SELECT string_agg(quote_ident(s.name), ',' ORDER BY s.place) FROM unnest(%(names)s::text[]) WITH ORDINALITY AS s (name, place);

-- name: searched_by
-- The roles, or databases, whose search_path setting names the schema.
-- lock: none
SELECT CASE WHEN s.setrole = 0 THEN 'DATABASE ' || quote_ident(d.datname) ELSE 'ROLE ' || quote_ident(r.rolname)
            || CASE WHEN s.setdatabase = 0 THEN '' ELSE ' IN DATABASE ' || quote_ident(d.datname) END END AS whose
  FROM pg_db_role_setting s
  LEFT JOIN pg_roles r ON r.oid = s.setrole LEFT JOIN pg_database d ON d.oid = s.setdatabase
 WHERE (s.setdatabase = 0 OR d.datname = current_database())
   AND EXISTS (SELECT FROM unnest(s.setconfig) AS c
                WHERE c LIKE 'search_path=%%'
                  AND %(schema)s::text = ANY (SELECT btrim(x, ' "') FROM unnest(string_to_array(substr(c, 13), ',')) AS x))
 ORDER BY 1;
