-- name: ids
-- What the writer edits.
-- lock: ACCESS SHARE
SELECT id FROM knowledge_base ORDER BY id;

-- name: content
-- The text to edit.
-- lock: ACCESS SHARE
SELECT content FROM knowledge_base WHERE id = %(id)s;

-- name: edit_with_vector
-- An edit by an application that embeds for itself.
-- lock: ROW EXCLUSIVE
UPDATE knowledge_base SET content = %(text)s, embedding = %(vector)s WHERE id = %(id)s;

-- name: edit
-- An edit of the text alone; the follower fills the vectors.
-- lock: ROW EXCLUSIVE
UPDATE knowledge_base SET content = %(text)s WHERE id = %(id)s;

-- name: insert_with_vector
-- A new row by an application that embeds for itself.
-- lock: ROW EXCLUSIVE
INSERT INTO knowledge_base (id, title, content, embedding) VALUES (%(id)s, 'note', %(text)s, %(vector)s);

-- name: insert
-- A new row; the follower fills the vectors.
-- lock: ROW EXCLUSIVE
INSERT INTO knowledge_base (id, title, content) VALUES (%(id)s, 'note', %(text)s);

-- name: delete
-- A row goes.
-- lock: ROW EXCLUSIVE
DELETE FROM knowledge_base WHERE id = %(id)s;
