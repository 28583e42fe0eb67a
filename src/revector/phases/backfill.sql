-- name: staged
-- Where a window's vectors wait to be written; the session's own.
-- lock: none
CREATE TEMP TABLE IF NOT EXISTS staged (tid tid NOT NULL, hash bigint NOT NULL, place int NOT NULL, a {type}, b {other_type});

-- name: clear
-- Empty it for the next window.
-- lock: none
TRUNCATE pg_temp.staged;

-- name: copy
-- Binary COPY; the text format cost 30 times more.
-- lock: none
COPY pg_temp.staged (tid, hash, place, a, b) FROM STDIN (FORMAT binary);

-- name: blocks
-- Size of a leaf in blocks; one that has been dropped has none.
-- lock: ACCESS SHARE
SELECT coalesce(pg_relation_size(%(table)s::oid), 0) / current_setting('block_size')::int AS blocks;

-- name: pending_count
-- How many rows have a text but no vector in this generation (a full scan before the pending index exists).
-- lock: ACCESS SHARE
SELECT count(*) FROM {table} AS t WHERE t.{column} IS NULL AND ({text}) IS NOT NULL;

-- name: read_window
-- The window's rows that have a text and no vector.
-- lock: ACCESS SHARE
SELECT t.ctid::text AS tid, ({text})::text AS text, hashtextextended(({text})::text COLLATE "C", 0) AS hash
  FROM ONLY {table} AS t
 WHERE t.ctid >= %(lo)s::tid AND t.ctid < %(hi)s::tid AND t.{column} IS NULL AND ({text}) IS NOT NULL;

-- name: enter
-- Every write transaction starts here: once we hold this, nobody can rename or drop the columns under us.
-- lock: ROW EXCLUSIVE
LOCK TABLE ONLY {table} IN ROW EXCLUSIVE MODE;

-- name: resolve
-- The present names of both generations' columns, by attribute number, whether the migration still wants us, and the leaf is its.
-- lock: none
WITH RECURSIVE above AS (
  SELECT %(relation)s::oid AS oid
  UNION ALL SELECT i.inhparent FROM above a JOIN pg_inherits i ON i.inhrelid = a.oid AND NOT i.inhdetachpending)
SELECT m.stage, m.closing, pg_stat_get_xact_tuples_hot_updated(%(relation)s::oid) AS hot,
       m.table_oid IN (SELECT oid FROM above) AS attached,
       (SELECT a.attname FROM pg_attribute a JOIN revector.generations g ON g.attnum = a.attnum AND g.table_oid = a.attrelid
         WHERE a.attrelid = m.table_oid AND g.number = %(old)s AND NOT a.attisdropped) AS old_column,
       (SELECT a.attname FROM pg_attribute a JOIN revector.generations g ON g.attnum = a.attnum AND g.table_oid = a.attrelid
         WHERE a.attrelid = m.table_oid AND g.number = %(new)s AND NOT a.attisdropped) AS new_column
  FROM revector.migrations m WHERE m.id = %(migration)s;

-- name: write_place
-- Write all staged rows that sit at one line-pointer offset: ctid locates, the hash of the text proves.
-- lock: ROW EXCLUSIVE
WITH locked AS MATERIALIZED (
  SELECT t.ctid AS tid, s.b AS vector FROM pg_temp.staged s JOIN ONLY {table} AS t ON t.ctid = s.tid
   WHERE s.place = %(place)s AND t.ctid >= %(lo)s::tid AND t.ctid < %(hi)s::tid AND t.{column} IS NULL
     AND hashtextextended(({text})::text COLLATE "C", 0) = s.hash
     FOR NO KEY UPDATE OF t SKIP LOCKED)
UPDATE ONLY {table} AS t SET {column} = l.vector FROM locked l
 WHERE t.ctid = l.tid AND t.ctid >= %(lo)s::tid AND t.ctid < %(hi)s::tid;

-- name: hot
-- HOT updates of the table; not yet flushed ones of earlier transactions count too, so differences tell.
-- lock: none
SELECT pg_stat_get_xact_tuples_hot_updated(%(table)s::oid) AS hot;

-- name: in_the_way
-- The oldest snapshot, slot or prepared transaction that keeps pages from being pruned.
-- lock: none
SELECT what FROM (
  SELECT age(backend_xmin) AS age, format('session %s of %s (%s), %s, since %s', pid, usename, nullif(application_name, ''), state, xact_start::timestamp(0)) AS what
    FROM pg_stat_activity WHERE backend_xmin IS NOT NULL AND pid <> pg_backend_pid()
     AND (backend_type = 'client backend' AND datname = current_database() OR backend_type = 'walsender')
     AND application_name NOT LIKE 'revector %'
  UNION ALL SELECT age(xmin), format('replication slot %s', slot_name) FROM pg_replication_slots WHERE xmin IS NOT NULL
  UNION ALL SELECT age(transaction), format('prepared transaction %s', gid) FROM pg_prepared_xacts WHERE database = current_database()) AS holders
 ORDER BY age DESC LIMIT 1;

-- name: waiting
-- The leaves that have pending rows, through the parts of the pending index.
-- lock: ACCESS SHARE
SELECT DISTINCT t.tableoid AS oid FROM {table} AS t WHERE t.{column} IS NULL AND ({text}) IS NOT NULL;

-- name: names
-- Schema, table and column of generations, or NULL for a column that is gone; answered from the server's caches.
-- lock: none
SELECT g.number, (pg_identify_object_as_address('pg_class'::regclass, g.table_oid, g.attnum)).object_names AS names
  FROM revector.generations g
 WHERE g.table_oid = %(table)s::oid AND g.number = ANY (%(numbers)s) AND g.attnum IS NOT NULL;

-- name: pending_places
-- Where rows are pending in one generation, through its pending index; refused texts are skipped. As functions the bounds are no TID range scan.
-- lock: ACCESS SHARE
SELECT t.ctid::text AS tid FROM ONLY {table} AS t
 WHERE t.{column} IS NULL AND ({text}) IS NOT NULL AND tidgt(t.ctid, %(after)s::tid) AND tidlt(t.ctid, %(end)s::tid)
   AND NOT EXISTS (SELECT FROM revector.failures f WHERE f.migration = %(migration)s AND f.generation = %(generation)s
                    AND f.text_hash = hashtextextended(({text})::text COLLATE "C", 0))
 ORDER BY t.ctid LIMIT %(limit)s;

-- name: pending_texts
-- The rows at some of these places, with the generations they still lack and that do not refuse them. The tests stand outside, so that each place is looked up by itself.
-- lock: ACCESS SHARE
WITH found AS MATERIALIZED (
  SELECT t.ctid::text AS tid, ({text})::text AS text, hashtextextended(({text})::text COLLATE "C", 0) AS hash,
         ARRAY[CASE WHEN t.{old} IS NULL THEN %(old)s END, CASE WHEN t.{new} IS NULL THEN %(new)s END]::int[] AS lacking
    FROM ONLY {table} AS t WHERE t.ctid = ANY (%(tids)s::tid[]))
SELECT tid, text, hash, needed FROM found CROSS JOIN LATERAL (
  SELECT array_agg(number) AS needed FROM unnest(lacking) AS number
   WHERE number = ANY (%(wanted)s)
     AND NOT EXISTS (SELECT FROM revector.failures f WHERE f.migration = %(migration)s AND f.generation = number AND f.text_hash = hash)) AS open
 WHERE text IS NOT NULL AND needed IS NOT NULL;

-- name: given
-- The vectors that rows came with, where their texts are still those.
-- lock: ACCESS SHARE
SELECT t.ctid::text AS tid, t.{column}::real[] AS vector, md5(t.{column}::text) AS sum
  FROM unnest(%(tids)s::tid[], %(hashes)s::bigint[]) AS s (tid, hash) JOIN ONLY {table} AS t ON t.ctid = s.tid
 WHERE t.{column} IS NOT NULL AND hashtextextended(({text})::text COLLATE "C", 0) = s.hash;

-- name: clear_wrong
-- Make rows pending whose vector is still the wrong one that was read.
-- lock: ROW EXCLUSIVE
WITH locked AS MATERIALIZED (
  SELECT t.ctid AS tid FROM unnest(%(tids)s::tid[], %(sums)s::text[]) AS s (tid, sum) JOIN ONLY {table} AS t ON t.ctid = s.tid
   WHERE md5(t.{column}::text) = s.sum FOR NO KEY UPDATE OF t SKIP LOCKED)
UPDATE ONLY {table} AS t SET {column} = NULL FROM locked l WHERE t.ctid = l.tid RETURNING t.ctid;

-- name: fill
-- Write one batch of pending rows, both generations of a row at once; tells which side's vector was the one that was there.
-- lock: ROW EXCLUSIVE
WITH locked AS MATERIALIZED (
  SELECT t.ctid AS tid, s.a, s.b, t.xmin AS version,
         CASE WHEN t.{old} IS NULL AND t.{new} IS NOT NULL THEN 'new' WHEN t.{new} IS NULL AND t.{old} IS NOT NULL THEN 'old' END AS side
    FROM pg_temp.staged s JOIN ONLY {table} AS t ON t.ctid = s.tid
   WHERE ((t.{old} IS NULL AND s.a IS NOT NULL) OR (t.{new} IS NULL AND s.b IS NOT NULL))
     AND hashtextextended(({text})::text COLLATE "C", 0) = s.hash
     FOR NO KEY UPDATE OF t SKIP LOCKED), filled AS (
UPDATE ONLY {table} AS t
   SET {old} = CASE WHEN t.{old} IS NULL THEN l.a ELSE t.{old} END, {new} = CASE WHEN t.{new} IS NULL THEN l.b ELSE t.{new} END
  FROM locked l WHERE t.ctid = l.tid RETURNING l.side, l.version)
SELECT side, count(*) AS rows, (array_agg(version ORDER BY age(version)))[1]::text AS newest FROM filled GROUP BY side;

-- name: fill_candidate
-- The same before SERVED, when the live column is not ours to touch.
-- lock: ROW EXCLUSIVE
WITH locked AS MATERIALIZED (
  SELECT t.ctid AS tid, s.b FROM pg_temp.staged s JOIN ONLY {table} AS t ON t.ctid = s.tid
   WHERE t.{new} IS NULL AND s.b IS NOT NULL AND hashtextextended(({text})::text COLLATE "C", 0) = s.hash
     FOR NO KEY UPDATE OF t SKIP LOCKED)
UPDATE ONLY {table} AS t SET {new} = l.b FROM locked l WHERE t.ctid = l.tid;

-- name: pending_unrefused
-- How many rows are pending and not refused, counted through the pending index and no further than the limit.
-- lock: ACCESS SHARE
SELECT count(*) FROM (
  SELECT FROM {table} AS t WHERE t.{column} IS NULL AND ({text}) IS NOT NULL
     AND NOT EXISTS (SELECT FROM revector.failures f WHERE f.migration = %(migration)s AND f.generation = %(generation)s
                      AND f.text_hash = hashtextextended(({text})::text COLLATE "C", 0)) LIMIT %(limit)s) AS pending;

-- name: read_vectors
-- Rows of a range of blocks that have both a text and a vector.
-- lock: ACCESS SHARE
SELECT t.ctid::text AS tid, ({text})::text AS text, hashtextextended(({text})::text COLLATE "C", 0) AS hash, t.{column}::real[] AS vector,
       t.xmin::text AS xid
  FROM ONLY {table} AS t
 WHERE t.ctid >= %(lo)s::tid AND t.ctid < %(hi)s::tid AND t.{column} IS NOT NULL AND ({text}) IS NOT NULL;

-- name: files
-- The files that leaves are in: VACUUM FULL and the like write a new one.
-- lock: none
SELECT oid, pg_relation_filenode(oid)::bigint AS file FROM pg_class WHERE oid = ANY (%(leaves)s::oid[]);

-- name: now
-- Every transaction from this one on may still write.
-- lock: none
SELECT pg_snapshot_xmin(pg_current_snapshot())::xid::text;

-- name: moved
-- Row versions that others have written since, and those at some places: of one snapshot, kept when it has ended.
-- lock: ACCESS SHARE
DECLARE moved NO SCROLL CURSOR WITH HOLD FOR
SELECT t.ctid::text AS tid, ({text})::text AS text, hashtextextended(({text})::text COLLATE "C", 0) AS hash, t.{column}::real[] AS vector
  FROM ONLY {table} AS t
 WHERE (age(t.xmin) <= age(%(since)s::xid) AND t.xmin <> ALL (%(ours)s::xid[]) OR t.ctid = ANY (%(places)s::tid[]))
   AND t.{column} IS NOT NULL AND ({text}) IS NOT NULL;

-- name: fetch_moved
-- The next of them.
-- lock: none
FETCH 256 FROM moved;

-- name: close_moved
-- All have been read.
-- lock: none
CLOSE moved;

-- name: renew
-- Put the right vector in the place of a stale one, which is right on whatever row has that text; tells where it was, and which transaction wrote it.
-- lock: ROW EXCLUSIVE
WITH locked AS MATERIALIZED (
  SELECT t.ctid AS tid, s.{staged} AS vector FROM pg_temp.staged s JOIN ONLY {table} AS t ON t.ctid = s.tid
   WHERE hashtextextended(({text})::text COLLATE "C", 0) = s.hash
     FOR NO KEY UPDATE OF t SKIP LOCKED)
UPDATE ONLY {table} AS t SET {column} = l.vector FROM locked l WHERE t.ctid = l.tid
RETURNING l.tid::text AS tid, t.xmin::text AS xid;

-- name: clear_refused
-- Take the vectors of texts that the model refuses, where the rows still have these texts; tells as `renew` does.
-- lock: ROW EXCLUSIVE
WITH locked AS MATERIALIZED (
  SELECT t.ctid AS tid FROM unnest(%(tids)s::tid[], %(hashes)s::bigint[]) AS r (tid, hash) JOIN ONLY {table} AS t ON t.ctid = r.tid
   WHERE hashtextextended(({text})::text COLLATE "C", 0) = r.hash FOR NO KEY UPDATE OF t SKIP LOCKED)
UPDATE ONLY {table} AS t SET {column} = NULL FROM locked l WHERE t.ctid = l.tid
RETURNING l.tid::text AS tid, t.xmin::text AS xid;

-- name: stage_outside
-- Stage a window's rows outside the filter whose one vector the candidate does not have yet.
-- lock: ACCESS SHARE
INSERT INTO pg_temp.staged (tid, hash, place)
SELECT t.ctid, 0, (t.ctid::text::point)[1]::int FROM ONLY {table} AS t
 WHERE t.ctid >= %(lo)s::tid AND t.ctid < %(hi)s::tid AND t.{column} IS NULL AND t.{live} IS NOT NULL AND ({inside}) IS NOT TRUE;

-- name: copy_outside
-- Copy the one vector of the staged rows at one line-pointer offset; read again under the row's lock, so that no newer one is overwritten.
-- lock: ROW EXCLUSIVE
WITH locked AS MATERIALIZED (
  SELECT t.ctid AS tid FROM pg_temp.staged s JOIN ONLY {table} AS t ON t.ctid = s.tid
   WHERE s.place = %(place)s AND t.ctid >= %(lo)s::tid AND t.ctid < %(hi)s::tid
     AND t.{new} IS NULL AND t.{old} IS NOT NULL AND ({inside}) IS NOT TRUE
     FOR NO KEY UPDATE OF t SKIP LOCKED)
UPDATE ONLY {table} AS t SET {new} = t.{old} FROM locked l
 WHERE t.ctid = l.tid AND t.ctid >= %(lo)s::tid AND t.ctid < %(hi)s::tid;

-- name: backup_key
-- Each window looks its rows up in the backup by their key.
-- lock: SHARE on the backup
CREATE INDEX IF NOT EXISTS {name} ON {backup} ({key});

-- name: stage_backup
-- Stage the backup's vectors of a window's rows whose key and text are what they were.
-- lock: ACCESS SHARE
INSERT INTO pg_temp.staged (tid, hash, place, b)
SELECT t.ctid, hashtextextended(({text})::text COLLATE "C", 0), (t.ctid::text::point)[1]::int, b.{vector}
  FROM ONLY {table} AS t JOIN {backup} AS b ON {same_key} AND b.text_checksum = md5(({text})::text)
 WHERE t.ctid >= %(lo)s::tid AND t.ctid < %(hi)s::tid AND t.{column} IS NULL AND ({text}) IS NOT NULL AND b.{vector} IS NOT NULL;

-- name: joins
-- How the session joins: staging looks rows up by a key, and writing scans a range of blocks, for only such a scan prunes pages.
-- lock: none
SELECT set_config('enable_nestloop', %(by_key)s, false) AS nestloop, set_config('enable_hashjoin', %(by_range)s, false) AS hashjoin,
       set_config('enable_mergejoin', %(by_range)s, false) AS mergejoin;

-- name: staged_places
-- The line-pointer offsets that have something staged, and in which blocks.
-- lock: none
SELECT place, array_agg((tid::text::point)[0]::bigint ORDER BY tid) AS blocks FROM pg_temp.staged GROUP BY place ORDER BY place;
