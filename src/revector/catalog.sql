-- name: server
-- What the server, the extension and the session's rights allow.
-- lock: none
SELECT current_setting('server_version') AS version,
       current_setting('server_version_num')::int AS version_num,
       current_database() AS database,
       pg_is_in_recovery() AS standby,
       e.extversion AS vector_version,
       n.nspname AS vector_schema,
       has_database_privilege(current_database(), 'CREATE') AS may_create_schema,
       has_database_privilege(current_database(), 'TEMP') AS may_use_temp,
       to_regnamespace('revector') IS NOT NULL AS has_ledger,
       CASE WHEN current_setting('server_version_num')::int >= 150000
            THEN has_parameter_privilege('session_replication_role', 'SET') END AS may_be_replica,
       (SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user) AS bypasses_rls,
       current_user AS role
  FROM (SELECT) AS one
  LEFT JOIN pg_extension e ON e.extname = 'vector'
  LEFT JOIN pg_namespace n ON n.oid = e.extnamespace;

-- name: find_exact
-- Tables whose name is exactly this one, in the order of the user's search_path.
-- lock: none
SELECT c.oid FROM pg_class c
 WHERE c.relname = %(name)s AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
   AND c.relnamespace::regnamespace::text = ANY (SELECT quote_ident(s) FROM unnest(current_schemas(false)) AS s)
 ORDER BY array_position(current_schemas(false), (SELECT nspname FROM pg_namespace WHERE oid = c.relnamespace))
 LIMIT 1;

-- name: find_parsed
-- The relation that an SQL statement would mean by this name.
-- lock: none
SELECT to_regclass(%(name)s)::oid AS oid;

-- name: vector_tables
-- Every table with a vector column, for the error that says the name was wrong.
-- lock: none
SELECT DISTINCT n.nspname AS schema, c.relname AS name
  FROM pg_attribute a
  JOIN pg_class c ON c.oid = a.attrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_type t ON t.oid = a.atttypid
 WHERE t.typname IN ('vector', 'halfvec') AND NOT a.attisdropped AND c.relkind IN ('r', 'p')
   AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
 ORDER BY 1, 2 LIMIT 50;

-- name: table
-- The table itself.
-- lock: none
SELECT c.oid, n.nspname AS schema, c.relname AS name, c.relkind::text AS kind, c.relpersistence::text AS persistence,
       c.reltuples::float8 AS estimated_rows, pg_relation_size(c.oid) AS heap_bytes,
       pg_total_relation_size(c.oid) AS total_bytes,
       c.relrowsecurity AS row_security, c.relforcerowsecurity AS forces_row_security,
       has_schema_privilege(c.relnamespace, 'CREATE') AS may_index,
       pg_has_role(current_user, c.relowner, 'USAGE') AS owned, c.relowner::regrole::text AS owner,
       CASE WHEN c.reloftype <> 0 THEN c.reloftype::regtype::text END AS of_type,
       EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid) AS has_children,
       EXISTS (SELECT FROM pg_inherits WHERE inhrelid = c.oid) AS is_child
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.oid = %(table)s::oid;

-- name: columns
-- Its columns, dropped ones left out.
-- lock: none
SELECT a.attnum AS number, a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type, t.typname AS type_name,
       t.typtype::text AS type_kind, a.atttypmod AS typmod, a.attnotnull AS not_null, a.attgenerated::text AS generated,
       a.attidentity::text AS identity,
       (SELECT conname FROM pg_constraint k
         WHERE k.conrelid = a.attrelid AND k.contype = 'n' AND k.conkey = ARRAY[a.attnum] LIMIT 1) AS not_null_name,
       (SELECT obj_description(k.oid, 'pg_constraint') FROM pg_constraint k
         WHERE k.conrelid = a.attrelid AND k.contype = 'n' AND k.conkey = ARRAY[a.attnum] LIMIT 1) AS not_null_comment,
       col_description(a.attrelid, a.attnum) AS comment,
       CASE WHEN t.typtype = 'd' THEN (
         WITH RECURSIVE base AS (
           SELECT t.typbasetype AS oid, t.typtypmod AS typmod
           UNION ALL SELECT y.typbasetype, y.typtypmod FROM base b JOIN pg_type y ON y.oid = b.oid AND y.typtype = 'd')
         SELECT format_type(b.oid, b.typmod) FROM base b JOIN pg_type y ON y.oid = b.oid
          WHERE y.typname IN ('vector', 'halfvec')) END AS domain_over
  FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
 WHERE a.attrelid = %(table)s::oid AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum;

-- name: primary_key
-- The columns of the primary key, in its order.
-- lock: none
SELECT a.attname AS name
  FROM pg_index i
  CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY AS k (number, position)
  JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
 WHERE i.indrelid = %(table)s::oid AND i.indisprimary AND k.position <= i.indnkeyatts
 ORDER BY k.position;

-- name: unique_columns
-- The column sets that a unique, unconditional index guards.
-- lock: none
SELECT array_agg(a.attname::text ORDER BY k.position) AS names
  FROM pg_index i
  CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY AS k (number, position)
  JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number
 WHERE i.indrelid = %(table)s::oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
   AND k.position <= i.indnkeyatts
 GROUP BY i.indexrelid;

-- name: indexes
-- Its indexes with everything that a twin on another column needs.
-- lock: none
SELECT i.indexrelid AS oid, c.relname AS name, am.amname AS method, i.indisvalid AS valid,
       i.indkey::int2[]::int[] AS keys, i.indnkeyatts AS key_count,
       (SELECT quote_ident(n.nspname) || '.' || quote_ident(o.opcname)
          FROM pg_opclass o JOIN pg_namespace n ON n.oid = o.opcnamespace WHERE o.oid = i.indclass[0]) AS opclass,
       coalesce(c.reloptions, ARRAY[]::text[]) AS options,
       pg_get_expr(i.indpred, i.indrelid) AS predicate, pg_get_expr(i.indexprs, i.indrelid) AS expression,
       pg_relation_size(i.indexrelid) AS bytes, pg_get_indexdef(i.indexrelid) AS definition,
       i.indisexclusion AS excludes, i.indisclustered AS clustered,
       (SELECT spcname FROM pg_tablespace WHERE oid = c.reltablespace) AS tablespace,
       coalesce(has_tablespace_privilege(nullif(c.reltablespace, 0), 'CREATE'), true) AS placeable,
       ARRAY(SELECT ARRAY[a.attnum::int, a.attstattarget::int] FROM pg_attribute a
              WHERE a.attrelid = i.indexrelid AND coalesce(a.attstattarget, -1) >= 0 ORDER BY a.attnum) AS statistics
  FROM pg_index i
  JOIN pg_class c ON c.oid = i.indexrelid
  JOIN pg_am am ON am.oid = c.relam
 WHERE i.indrelid = %(table)s::oid
 ORDER BY c.relname;

-- name: triggers
-- Its triggers, PostgreSQL's internal ones left out.
-- lock: none
SELECT t.oid, t.tgname AS name, t.tgenabled::text AS enabled, t.tgtype::int AS type, t.tgattr::int2[]::int[] AS columns,
       t.tgfoid::oid AS function
  FROM pg_trigger t
 WHERE t.tgrelid = %(table)s::oid AND NOT t.tgisinternal
 ORDER BY t.tgname;

-- name: update_rules
-- Rules that rewrite an UPDATE of the table.
-- lock: none
SELECT rulename AS name FROM pg_rewrite WHERE ev_class = %(table)s::oid AND ev_type = '2' AND rulename <> '_RETURN';

-- name: publications
-- Publications of the table; columns is NULL where all columns are published.
-- lock: none
SELECT p.pubname AS name,
       (SELECT ARRAY(SELECT x::int FROM unnest(r.prattrs::int2[]) AS x) FROM pg_publication_rel r
         WHERE r.prpubid = p.oid AND r.prrelid = %(table)s::oid AND r.prattrs IS NOT NULL) AS columns
  FROM pg_publication p
  JOIN pg_publication_tables t ON t.pubname = p.pubname
  JOIN pg_class c ON c.oid = %(table)s::oid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE t.schemaname = n.nspname AND t.tablename = c.relname;

-- name: dependents
-- Everything that PostgreSQL ties to this attribute number.
-- lock: none
SELECT DISTINCT d.classid::regclass::text AS catalog, d.objid::oid AS oid,
       pg_describe_object(d.classid, d.objid, d.objsubid) AS description,
       CASE WHEN d.classid = 'pg_constraint'::regclass THEN k.contype::text END AS constraint_type, k.conname AS constraint_name,
       w.ev_class::oid AS view
  FROM pg_depend d
  LEFT JOIN pg_constraint k ON d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
  LEFT JOIN pg_rewrite w ON d.classid = 'pg_rewrite'::regclass AND w.oid = d.objid
 WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = %(table)s::oid AND d.refobjsubid = %(column)s
 ORDER BY 3;

-- name: holding
-- What keeps a column, here or in a partition, from being dropped; what goes with the column by itself is not among it.
-- lock: none
SELECT DISTINCT d.classid::regclass::text AS catalog,
       regexp_replace(pg_describe_object(d.classid, d.objid, d.objsubid), '^rule "?_RETURN"? on ', '') AS description,
       w.ev_class::oid AS view,
       CASE c.relkind WHEN 'v' THEN 'DROP VIEW ' WHEN 'm' THEN 'DROP MATERIALIZED VIEW ' END
       || quote_ident(n.nspname) || '.' || quote_ident(c.relname) || ';' AS statement
  FROM pg_attribute a
  JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = a.attrelid AND d.refobjsubid = a.attnum
  LEFT JOIN pg_rewrite w ON d.classid = 'pg_rewrite'::regclass AND w.oid = d.objid
  LEFT JOIN pg_class c ON c.oid = w.ev_class
  LEFT JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE a.attname = %(column)s AND NOT a.attisdropped AND a.attrelid = ANY (%(tables)s::oid[])
   AND NOT EXISTS (SELECT FROM pg_depend o
                    WHERE o.classid = d.classid AND o.objid = d.objid AND o.objsubid = d.objsubid AND o.refclassid = d.refclassid
                      AND o.refobjid = d.refobjid AND o.refobjsubid = d.refobjsubid AND o.deptype <> 'n')
 ORDER BY 2;

-- name: functions_naming
-- Functions whose body names the table and the column (or `*`), or, of a trigger of the table, the column alone.
-- lock: none
SELECT p.oid::regprocedure::text AS name
  FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang
 WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'revector') AND l.lanname NOT IN ('internal', 'c')
   AND (p.prosrc ~ ('\m' || %(table_name)s || '\M')
             AND (p.prosrc ~ ('\m' || %(column_name)s || '\M') OR p.prosrc ~ '[^/(]\*[^/)]')
        OR p.prosrc ~ ('\m' || %(column_name)s || '\M')
             AND p.oid IN (SELECT tgfoid FROM pg_trigger WHERE tgrelid = ANY (%(tables)s::oid[]) AND NOT tgisinternal))
 ORDER BY 1;

-- name: star_statements
-- Prepared or recorded statements that read the table with `*` and break when a column is added.
-- lock: none
SELECT left(query, 200) AS query FROM {statements}
 WHERE query ~* %(pattern)s AND query !~* 'revector' LIMIT 5;

-- name: relation_named
-- Whether a relation of this name exists in this schema, and which.
-- lock: none
SELECT c.oid, c.relkind::text AS kind FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %(schema)s AND c.relname = %(name)s;

-- name: function_named
-- Whether a function of this name exists in schema revector.
-- lock: none
SELECT p.oid FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
 WHERE n.nspname = 'revector' AND p.proname = %(name)s;

-- name: schema_named
-- Whether there is a schema of this name.
-- lock: none
SELECT oid FROM pg_namespace WHERE nspname = %(name)s;

-- name: texts
-- One pass over the table: how many rows, texts and vectors of each kind there are, inside the filter and outside.
-- lock: ACCESS SHARE
SELECT count(*) FILTER (WHERE x.inside) AS rows,
       count(*) FILTER (WHERE x.inside AND x.text IS NULL) AS null_texts,
       count(*) FILTER (WHERE x.inside AND btrim(x.text, E' \t\n\r\f\v') = '') AS blank_texts,
       count(*) FILTER (WHERE x.inside AND x.vector IS NULL) AS null_vectors,
       count(*) FILTER (WHERE x.inside AND x.vector IS NULL AND x.text IS NOT NULL) AS texts_without_vector,
       coalesce(sum(octet_length(x.text)), 0)::bigint AS text_bytes,
       count(*) FILTER (WHERE NOT x.inside) AS outside,
       count(*) FILTER (WHERE NOT x.inside AND x.vector IS NOT NULL) AS outside_vectors
  FROM (SELECT ({text})::text AS text, {column} AS vector, ({inside}) IS TRUE AS inside FROM {table}) AS x;

-- name: sides
-- How many rows of an index are inside the filter, and how many outside.
-- lock: ACCESS SHARE
SELECT count(*) FILTER (WHERE ({inside}) IS TRUE) AS inside, count(*) FILTER (WHERE ({inside}) IS NOT TRUE) AS outside
  FROM {table} WHERE ({predicate}) AND {column} IS NOT NULL;

-- name: null_parts
-- How many rows have no text because of each column that it is made of.
-- lock: ACCESS SHARE
SELECT count(*) AS rows FROM {table} WHERE ({inside}) AND ({text}) IS NULL AND {column} IS NULL;

-- name: sample
-- A random sample of rows that have a text, with the vector of one column.
-- lock: ACCESS SHARE
SELECT ctid::text AS ctid, ({text})::text AS text, {column}::text AS vector, octet_length(({text})::text) AS bytes
  FROM {table} TABLESAMPLE {method} (%(percent)s) REPEATABLE (%(seed)s)
 WHERE ({text}) IS NOT NULL AND {column} IS NOT NULL ORDER BY random() LIMIT %(limit)s;

-- name: sample_texts
-- A random sample of texts.
-- lock: ACCESS SHARE
SELECT ({text})::text AS text
  FROM {table} TABLESAMPLE {method} (%(percent)s) REPEATABLE (%(seed)s)
 WHERE ({text}) IS NOT NULL ORDER BY random() LIMIT %(limit)s;

-- name: flatten
-- How the server itself writes the expression, generated columns replaced by what generates them.
-- lock: ACCESS SHARE
EXPLAIN (VERBOSE, COSTS OFF, FORMAT JSON)
SELECT ({text}
) FROM (SELECT {columns} FROM ONLY {table} AS r) AS {alias};


-- name: scratch
-- An empty twin of the table in which the expression is tried as an index expression; rolled back.
-- lock: ACCESS SHARE
CREATE TEMP TABLE r (LIKE {table});

-- name: scratch_index
-- The server refuses here what the pending index could not hold: anything that is not IMMUTABLE.
-- lock: none
CREATE INDEX rv_scratch ON pg_temp.r (({text}));

-- name: canonical
-- The expression as PostgreSQL stores it, every name qualified, and the columns it reads.
-- lock: none
SELECT pg_get_indexdef(i.indexrelid, 1, false) AS text,
       ARRAY(SELECT a.attname::text FROM pg_depend d JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = d.refobjsubid
              WHERE d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid AND d.refobjid = i.indrelid
                AND d.refobjsubid > 0 ORDER BY a.attnum) AS columns
  FROM pg_index i WHERE i.indexrelid = 'pg_temp.rv_scratch'::regclass;

-- name: not_immutable
-- Those of these function names that are not IMMUTABLE.
-- lock: none
SELECT DISTINCT proname AS name FROM pg_proc WHERE proname = ANY (%(names)s) AND provolatile <> 'i' ORDER BY 1;

-- name: generated
-- The generation expressions of the table's generated columns.
-- lock: none
SELECT a.attname AS name, pg_get_expr(d.adbin, d.adrelid) AS expression
  FROM pg_attribute a JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE a.attrelid = %(table)s::oid AND a.attgenerated <> '' AND NOT a.attisdropped;

-- name: knows_views
-- Whether this database's ledger knows of views, and this role may read it.
-- lock: none
SELECT has_schema_privilege('revector', 'USAGE') AND has_table_privilege('revector.views', 'SELECT')
  FROM pg_class WHERE oid = to_regclass('revector.views');

-- name: own_views
-- The views of a table that are ours; of a generation that lies in one column, where it is given.
-- lock: none
SELECT w.view_oid FROM revector.views w
  LEFT JOIN revector.generations g ON g.table_oid = w.table_oid AND g.number = w.number
 WHERE w.table_oid = %(table)s::oid AND (%(column)s::int IS NULL OR g.attnum = %(column)s::int);

-- name: behind_view
-- The table that a view of ours shows.
-- lock: none
SELECT w.table_oid FROM revector.views w JOIN pg_class c ON c.oid = w.view_oid WHERE w.view_oid = %(view)s::oid AND c.relkind = 'v';
