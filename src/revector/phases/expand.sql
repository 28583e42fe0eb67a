-- name: add_column
-- The candidate's column: nullable, so no row is rewritten.
-- lock: ACCESS EXCLUSIVE
ALTER TABLE {table} ADD COLUMN {candidate} {type};

-- name: add_check
-- The live column's CHECK holds for the candidate's vectors too, from the first one on.
-- lock: ACCESS EXCLUSIVE
ALTER TABLE {table} ADD CONSTRAINT {name} CHECK ({condition}) {held};
