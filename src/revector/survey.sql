-- name: trial_table
-- A temporary table for timing an index build; rolled back.
-- lock: none
CREATE TEMP TABLE rv_trial (v {type});

-- name: trial_rows
-- Random vectors.
-- lock: none
INSERT INTO pg_temp.rv_trial
SELECT ('[' || string_agg((random() - 0.5)::real::text, ',') || ']')::{type}
  FROM generate_series(1, %(rows)s) AS n, generate_series(1, %(dimension)s) GROUP BY n;

-- name: trial_index
-- The build that is timed.
-- lock: none
CREATE INDEX ON pg_temp.rv_trial USING {method} ({key} {opclass}){parameters};
