CREATE EXTENSION IF NOT EXISTS vector;

CREATE TABLE knowledge_base (
    id text PRIMARY KEY,
    title text,
    content text NOT NULL,
    metadata jsonb NOT NULL DEFAULT '{}',
    embedding vector(384)
);

-- IVFFlat learns its lists from the rows that are there: best created after the first load.
CREATE INDEX knowledge_base_embedding_idx ON knowledge_base
    USING ivfflat (embedding vector_cosine_ops) WITH (lists = 100);
