-- name: enter
-- A generation's account, empty at first.
-- lock: none
INSERT INTO revector.spending (migration, generation) VALUES (%(migration)s, %(generation)s) ON CONFLICT DO NOTHING;

-- name: look
-- The accounts of a migration with its limits, locked until what the next request takes is committed.
-- lock: none
SELECT s.generation, s.tokens, s.density, m.limits,
       extract(epoch FROM s.tokens_at - clock_timestamp())::float8 AS tokens_wait,
       extract(epoch FROM s.requests_at - clock_timestamp())::float8 AS requests_wait
  FROM revector.spending s JOIN revector.migrations m ON m.id = s.migration
 WHERE s.migration = %(migration)s ORDER BY s.generation FOR UPDATE OF s;

-- name: take
-- Count a request before it is sent; the next one may follow after these pauses. When the tokens' pause ends is the answer.
-- lock: none
UPDATE revector.spending SET tokens = tokens + %(tokens)s, requests = requests + 1,
       tokens_at = clock_timestamp() + %(tokens_pause)s * interval '1 s',
       requests_at = clock_timestamp() + %(requests_pause)s * interval '1 s'
 WHERE migration = %(migration)s AND generation = %(generation)s RETURNING tokens_at;

-- name: correct
-- Put what a request has really cost in the place of the estimate; its pause is corrected too.
-- lock: none
UPDATE revector.spending SET tokens = greatest(tokens + %(more)s, 0), density = greatest(density, %(density)s),
       tokens_at = tokens_at + greatest(%(pause)s, CASE WHEN tokens_at = %(pause_ends)s THEN %(pause)s ELSE 0 END) * interval '1 s'
 WHERE migration = %(migration)s AND generation = %(generation)s;

-- name: spent
-- What a migration has asked for so far.
-- lock: none
SELECT coalesce(sum(tokens), 0)::bigint AS tokens, coalesce(sum(requests), 0)::bigint AS requests
  FROM revector.spending WHERE migration = %(migration)s;
