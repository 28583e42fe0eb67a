-- name: present
-- The ledger, whose it is, and whether this role may read it; no row where there is none.
-- lock: none
SELECT c.relowner::regrole::text AS owner, quote_ident(current_user) AS role, has_table_privilege(c.oid, 'SELECT') AS readable,
       (SELECT rolsuper FROM pg_roles WHERE oid = c.relowner) AS super, to_regrole('revector_ledger') IS NULL AS unnamed
  FROM pg_class c WHERE c.oid = to_regclass('revector.ledger');

-- name: tables
-- The ledger's tables, for a role that may not read them.
-- lock: none
SELECT c.oid::regclass::text AS name FROM pg_class c
 WHERE c.relnamespace = to_regnamespace('revector') AND c.relkind = 'r' ORDER BY c.oid;

-- name: version
-- The ledger's version.
-- lock: none
SELECT version FROM revector.ledger;

-- name: create
-- Version 1: everything revector remembers. USAGE for PUBLIC lets writers' triggers call the text function; no table is granted.
-- lock: none
CREATE SCHEMA revector;
GRANT USAGE ON SCHEMA revector TO PUBLIC;
CREATE TABLE revector.ledger (
    version int NOT NULL, one bool PRIMARY KEY DEFAULT true CHECK (one),
    updated timestamptz NOT NULL DEFAULT now());
INSERT INTO revector.ledger (version) VALUES (1);
CREATE TABLE revector.generations (
    table_oid oid NOT NULL, number int NOT NULL, attnum int, text_given text NOT NULL, model jsonb NOT NULL,
    live bool NOT NULL, retired timestamptz, wanted_index jsonb,
    PRIMARY KEY (table_oid, number));
CREATE UNIQUE INDEX one_live_generation ON revector.generations (table_oid, attnum) WHERE live;
CREATE TABLE revector.migrations (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, table_oid oid NOT NULL, plan jsonb NOT NULL,
    fingerprint text NOT NULL, stage text NOT NULL, closing text, batch_size int NOT NULL,
    verified jsonb, facts jsonb NOT NULL DEFAULT '{{}}',
    opened timestamptz NOT NULL DEFAULT now(), changed timestamptz NOT NULL DEFAULT now());
CREATE UNIQUE INDEX one_open_migration ON revector.migrations (table_oid) WHERE stage NOT IN ('ABORTED', 'FINALIZED');
CREATE TABLE revector.objects (
    migration bigint NOT NULL, kind text NOT NULL, name text NOT NULL, oid oid NOT NULL, generation int,
    PRIMARY KEY (migration, kind, name));
CREATE TABLE revector.windows (
    migration bigint NOT NULL, sweep int NOT NULL, lo bigint NOT NULL, hi bigint NOT NULL,
    holder text, heartbeat timestamptz, done timestamptz, written int, hot int,
    PRIMARY KEY (migration, sweep, lo));
CREATE TABLE revector.failures (
    migration bigint NOT NULL, generation int NOT NULL, text_hash bigint NOT NULL, kind text NOT NULL,
    error text NOT NULL, at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (migration, generation, text_hash));
CREATE TABLE revector.heartbeats (
    worker uuid PRIMARY KEY, table_oid oid NOT NULL, kind text NOT NULL, active bool NOT NULL, pid int NOT NULL,
    host text NOT NULL, at timestamptz NOT NULL DEFAULT now());
CREATE TABLE revector.events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, table_oid oid NOT NULL, migration bigint,
    at timestamptz NOT NULL DEFAULT clock_timestamp(), who text NOT NULL DEFAULT session_user,
    step text NOT NULL, figures jsonb NOT NULL DEFAULT '{{}}');
CREATE INDEX ON revector.events (table_oid, id);

-- name: upgrade_to_2
-- Version 2: what is steered while a migration works (rates, money, a pause).
-- lock: ACCESS EXCLUSIVE on the ledger's own tables
ALTER TABLE revector.migrations ADD COLUMN limits jsonb NOT NULL DEFAULT '{{}}';
ALTER TABLE revector.windows ADD COLUMN relation oid;
UPDATE revector.windows w SET relation = m.table_oid FROM revector.migrations m WHERE m.id = w.migration;
DELETE FROM revector.windows WHERE relation IS NULL;
ALTER TABLE revector.windows DROP CONSTRAINT windows_pkey, ADD PRIMARY KEY (migration, sweep, relation, lo);
ALTER TABLE revector.generations ADD COLUMN filter text;
ALTER TABLE revector.generations ADD COLUMN written timestamptz, ADD COLUMN swapped xid, ADD COLUMN settled boolean NOT NULL DEFAULT true;
ALTER TABLE revector.heartbeats ADD COLUMN filled bigint NOT NULL DEFAULT 0;
ALTER TABLE revector.heartbeats ADD COLUMN oldest real NOT NULL DEFAULT 0;
ALTER TABLE revector.heartbeats ADD COLUMN trouble text;
CREATE TABLE revector.spending (
    migration bigint NOT NULL, generation int NOT NULL, tokens bigint NOT NULL DEFAULT 0, requests bigint NOT NULL DEFAULT 0,
    tokens_at timestamptz, requests_at timestamptz, density float8 NOT NULL DEFAULT 1, PRIMARY KEY (migration, generation));
DROP INDEX revector.one_live_generation;
CREATE UNIQUE INDEX one_live_generation ON revector.generations (table_oid, attnum, coalesce(filter, '')) WHERE live;
CREATE TABLE revector.views (
    table_oid oid NOT NULL, number int NOT NULL, schema_oid oid NOT NULL UNIQUE, schema_name text NOT NULL,
    view_oid oid NOT NULL UNIQUE, migration bigint, made timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (table_oid, number));

-- name: set_version
-- Record an upgrade of the ledger.
-- lock: none
UPDATE revector.ledger SET version = %(version)s, updated = now();

-- name: live
-- The live generations of a table's vector column: one, or one a filter.
-- lock: none
SELECT g.number, g.attnum, g.text_given, g.model, a.attname AS column_name, g.filter
  FROM revector.generations g
  JOIN pg_attribute a ON a.attrelid = g.table_oid AND a.attnum = g.attnum AND NOT a.attisdropped
 WHERE g.table_oid = %(table)s::oid AND g.live AND (%(column)s::text IS NULL OR a.attname = %(column)s)
 ORDER BY g.number;

-- name: attnum
-- The attribute number of a generation's column.
-- lock: none
SELECT attnum FROM revector.generations WHERE table_oid = %(table)s::oid AND number = %(number)s;

-- name: next_number
-- The first generation number that this table has not used; at least 2, for the live one is 1 before it is registered.
-- lock: none
SELECT coalesce(max(number), 1) + 1 AS number FROM revector.generations WHERE table_oid = %(table)s::oid;

-- name: register
-- Remember a generation.
-- lock: none
INSERT INTO revector.generations (table_oid, number, attnum, text_given, model, live, filter)
VALUES (%(table)s::oid, %(number)s, %(attnum)s, %(text)s, %(model)s, %(live)s, %(filter)s)
ON CONFLICT (table_oid, number) DO UPDATE SET attnum = excluded.attnum, text_given = excluded.text_given, model = excluded.model, live = excluded.live, filter = excluded.filter;

-- name: want_index
-- Remember an index that cannot be built yet (IVFFlat needs rows), or forget it once it is there.
-- lock: none
UPDATE revector.generations SET wanted_index = %(index)s WHERE table_oid = %(table)s::oid AND number = %(number)s;

-- name: wanted_index
-- The index that a generation still waits for.
-- lock: none
SELECT wanted_index FROM revector.generations
 WHERE table_oid = %(table)s::oid AND number = %(number)s AND wanted_index IS NOT NULL;

-- name: open
-- Open a migration.
-- lock: none
INSERT INTO revector.migrations (table_oid, plan, fingerprint, stage, batch_size)
VALUES (%(table)s::oid, %(plan)s, %(fingerprint)s, 'PLANNED', %(batch_size)s) RETURNING id;

-- name: opened
-- The open migration of a table, else its last one.
-- lock: none
SELECT id, table_oid, plan, fingerprint, stage, closing, batch_size, verified, facts, limits, opened, changed
  FROM revector.migrations WHERE table_oid = %(table)s::oid ORDER BY id DESC LIMIT 1;

-- name: all_open
-- Every open migration, with its table's present name.
-- lock: none
SELECT m.id, m.table_oid, c.oid::regclass::text AS name, m.stage, m.closing
  FROM revector.migrations m LEFT JOIN pg_class c ON c.oid = m.table_oid
 WHERE m.stage NOT IN ('ABORTED', 'FINALIZED') ORDER BY m.id;

-- name: known_tables
-- Every table with a live generation or a migration.
-- lock: none
SELECT DISTINCT c.oid FROM pg_class c
 WHERE c.oid IN (SELECT table_oid FROM revector.generations WHERE live UNION SELECT table_oid FROM revector.migrations)
 ORDER BY 1;

-- name: advance
-- Move a migration to a stage.
-- lock: none
UPDATE revector.migrations SET stage = %(stage)s, changed = now() WHERE id = %(migration)s;

-- name: settle
-- Replace the plan (consents), and the settings outside its fingerprint.
-- lock: none
UPDATE revector.migrations SET plan = %(plan)s, batch_size = %(batch_size)s WHERE id = %(migration)s;

-- name: remember
-- Keep facts that later steps need.
-- lock: none
UPDATE revector.migrations SET facts = facts || %(facts)s WHERE id = %(migration)s;

-- name: own
-- Remember an object as ours, by OID.
-- lock: none
INSERT INTO revector.objects (migration, kind, name, oid, generation)
VALUES (%(migration)s, %(kind)s, %(name)s, %(oid)s::oid, %(generation)s)
ON CONFLICT (migration, kind, name) DO UPDATE SET oid = excluded.oid;

-- name: disown
-- Forget an object.
-- lock: none
DELETE FROM revector.objects WHERE migration = %(migration)s AND kind = %(kind)s AND name = %(name)s;

-- name: owned
-- The objects that are ours.
-- lock: none
SELECT kind, name, oid, generation FROM revector.objects WHERE migration = %(migration)s ORDER BY kind, name;

-- name: backups
-- The backup tables that closed migrations left, newest first; complete: they were verified. Their columns as they are.
-- lock: none
SELECT m.plan, o.oid, o.name, c.relname AS present,
       EXISTS (SELECT FROM revector.events e WHERE e.migration = m.id AND e.step = 'backup.verify') AS complete,
       ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = o.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns
  FROM revector.migrations m JOIN revector.objects o ON o.migration = m.id AND o.kind = 'backup'
  LEFT JOIN pg_class c ON c.oid = o.oid
 WHERE m.table_oid = %(table)s::oid AND m.stage IN ('FINALIZED', 'ABORTED') ORDER BY m.id DESC;

-- name: views
-- The view schemas of a table, by OID: a schema or view that is gone, or has another name now, shows as such.
-- lock: none
SELECT w.number, w.schema_oid, w.schema_name AS made_as, n.nspname AS schema, w.view_oid, c.relname AS view, w.migration
  FROM revector.views w
  LEFT JOIN pg_namespace n ON n.oid = w.schema_oid
  LEFT JOIN pg_class c ON c.oid = w.view_oid AND c.relkind = 'v' AND c.relnamespace = w.schema_oid
 WHERE w.table_oid = %(table)s::oid ORDER BY w.number;

-- name: all_views
-- The tables that have view schemas of ours, with the schemas.
-- lock: none
SELECT w.table_oid, n.nspname AS schema FROM revector.views w JOIN pg_namespace n ON n.oid = w.schema_oid ORDER BY 1, 2;

-- name: own_view
-- Remember a generation's view and its schema as ours, by OID.
-- lock: none
INSERT INTO revector.views (table_oid, number, schema_oid, schema_name, view_oid, migration)
SELECT {table}::oid, {number}, n.oid, n.nspname, c.oid, {migration}
  FROM pg_namespace n JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = {view}
 WHERE n.nspname = {schema}
ON CONFLICT (table_oid, number) DO UPDATE SET schema_oid = excluded.schema_oid, schema_name = excluded.schema_name, view_oid = excluded.view_oid;

-- name: disown_view
-- Forget a generation's view.
-- lock: none
DELETE FROM revector.views WHERE table_oid = {table}::oid AND number = {number};

-- name: event
-- Append one event.
-- lock: none
INSERT INTO revector.events (table_oid, migration, step, figures)
VALUES (%(table)s::oid, %(migration)s, %(step)s, %(figures)s);

-- name: events
-- The events of a table, oldest first.
-- lock: none
SELECT id, at, who, step, figures, migration FROM revector.events
 WHERE table_oid = %(table)s::oid ORDER BY id DESC LIMIT %(limit)s;

-- name: make_windows
-- Cut a leaf's blocks into windows, once a sweep.
-- lock: none
INSERT INTO revector.windows (migration, sweep, relation, lo, hi)
SELECT %(migration)s, %(sweep)s, %(relation)s::oid, lo, least(lo + %(blocks)s, %(end)s)
  FROM generate_series(0, greatest(%(end)s::bigint - 1, 0), %(blocks)s::bigint) AS lo
ON CONFLICT DO NOTHING;

-- name: cut
-- The leaves that a sweep has cut into windows.
-- lock: none
SELECT DISTINCT relation FROM revector.windows WHERE migration = %(migration)s AND sweep = %(sweep)s;

-- name: unswept
-- The share of the blocks that the first pass over the rows has still to see, and how many rows were pending when it began.
-- lock: none
SELECT coalesce(coalesce(sum(hi - lo) FILTER (WHERE done IS NULL), 0) / nullif(sum(hi - lo), 0), 1)::float8 AS share,
       (SELECT (figures ->> 'rows')::bigint FROM revector.events
         WHERE migration = %(migration)s AND step = 'backfill.windows' ORDER BY id LIMIT 1) AS rows
  FROM revector.windows
 WHERE migration = %(migration)s
   AND sweep = (SELECT max(sweep) FROM revector.windows WHERE migration = %(migration)s AND sweep <= 0);

-- name: hot
-- Rows that the backfill has written, and how many of these updates were HOT.
-- lock: none
SELECT coalesce(sum(written), 0)::bigint AS written, coalesce(sum(hot), 0)::bigint AS hot FROM revector.windows
 WHERE migration = %(migration)s;

-- name: lease
-- Take the next window that nobody holds, or whose holder has not been heard of for 30 s.
-- lock: none
UPDATE revector.windows w SET holder = %(holder)s, heartbeat = clock_timestamp()
 WHERE (migration, sweep, relation, lo) = (
       SELECT migration, sweep, relation, lo FROM revector.windows
        WHERE migration = %(migration)s AND sweep = %(sweep)s AND done IS NULL
          AND (holder IS NULL OR heartbeat < clock_timestamp() - interval '30 s')
        ORDER BY relation, lo LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING w.relation, w.lo, w.hi;

-- name: release_leases
-- Give back what a process that no longer lives had taken; the caller holds `steer`, and no worker holds `windows`.
-- lock: none
UPDATE revector.windows SET holder = NULL WHERE migration = %(migration)s AND done IS NULL AND holder IS NOT NULL;

-- name: beat_leases
-- Say that the windows held by this worker are being worked on.
-- lock: none
UPDATE revector.windows SET heartbeat = clock_timestamp()
 WHERE migration = %(migration)s AND holder = %(holder)s AND done IS NULL;

-- name: window_done
-- A window is written.
-- lock: none
UPDATE revector.windows SET done = clock_timestamp(), written = %(written)s, hot = %(hot)s
 WHERE migration = %(migration)s AND sweep = %(sweep)s AND relation = %(relation)s::oid AND lo = %(lo)s;

-- name: unsettled
-- The last swap, while rows that were pending at that moment may still be pending.
-- lock: none
SELECT swapped::text FROM revector.generations WHERE table_oid = %(table)s::oid AND number = %(number)s AND NOT settled;

-- name: settle_swap
-- Every row that was pending at this swap has been met since.
-- lock: none
UPDATE revector.generations SET settled = true WHERE table_oid = %(table)s::oid AND swapped = %(swapped)s::xid;

-- name: note_write
-- Remember that an application wrote a generation. Rows from before the last swap tell of writers under the old names.
-- lock: none
UPDATE revector.generations SET written = clock_timestamp()
 WHERE table_oid = %(table)s::oid AND number = %(number)s
   AND settled AND (swapped IS NULL OR age(%(version)s::xid) <= age(swapped));

-- name: activity
-- Seconds since each generation was last seen written, and since the last swap.
-- lock: none
SELECT g.number, extract(epoch FROM clock_timestamp() - g.written)::float8 AS written,
       extract(epoch FROM clock_timestamp() - (
         SELECT e.at FROM revector.events e
          WHERE e.table_oid = %(table)s::oid AND e.migration = %(migration)s AND e.step IN ('cutover', 'rollback')
          ORDER BY e.id DESC LIMIT 1))::float8 AS swapped
  FROM revector.generations g WHERE g.table_oid = %(table)s::oid;

-- name: fail
-- Record texts that the model refuses.
-- lock: none
INSERT INTO revector.failures (migration, generation, text_hash, kind, error)
VALUES (%(migration)s, %(generation)s, %(text_hash)s, %(kind)s, %(error)s)
ON CONFLICT (migration, generation, text_hash) DO UPDATE SET kind = excluded.kind, error = excluded.error, at = clock_timestamp();

-- name: failed
-- Hashes of the texts that a generation's model refuses.
-- lock: none
SELECT text_hash, kind, error FROM revector.failures WHERE migration = %(migration)s AND generation = %(generation)s;

-- name: retry_failures
-- A new run tries refused texts again.
-- lock: none
DELETE FROM revector.failures WHERE migration = %(migration)s;

-- name: beat
-- A follower says that it is alive.
-- lock: none
INSERT INTO revector.heartbeats (worker, table_oid, kind, active, pid, host, at, filled, oldest, trouble)
VALUES (%(worker)s::uuid, %(table)s::oid, 'follower', %(active)s, %(pid)s, %(host)s, clock_timestamp(),
        %(filled)s, %(oldest)s, %(trouble)s)
ON CONFLICT (worker) DO UPDATE SET active = excluded.active, at = clock_timestamp(), filled = excluded.filled,
       oldest = excluded.oldest, trouble = excluded.trouble;

-- name: vigil
-- The followers whose heartbeat is younger than 10 s by the server's clock, active or not.
-- lock: none
SELECT host, pid, active, filled, oldest::float8 AS oldest, trouble FROM revector.heartbeats
 WHERE table_oid = %(table)s::oid AND at > clock_timestamp() - interval '10 s' ORDER BY active DESC, trouble, at;

-- name: gone
-- A follower stopped.
-- lock: none
DELETE FROM revector.heartbeats WHERE worker = %(worker)s::uuid OR at < clock_timestamp() - interval '1 day';

-- name: followers
-- Active followers whose heartbeat is younger than 10 s by the server's clock.
-- lock: none
SELECT count(*) AS alive FROM revector.heartbeats
 WHERE table_oid = %(table)s::oid AND active AND at > clock_timestamp() - interval '10 s';

-- name: uninstall
-- Remove the ledger; only when no migration is open.
-- lock: none
DROP SCHEMA revector CASCADE;
