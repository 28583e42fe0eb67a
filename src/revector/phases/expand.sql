-- name: add_column
-- The candidate's column: nullable, so no row is rewritten.
-- lock: ACCESS EXCLUSIVE
ALTER TABLE {table} ADD COLUMN {candidate} {type};
