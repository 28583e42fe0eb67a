-- name: drop_not_null
-- A text edit makes both vectors NULL until the follower has filled them; finalize gives NOT NULL back.
-- lock: ACCESS EXCLUSIVE
ALTER TABLE {table} ALTER COLUMN {column} DROP NOT NULL;
