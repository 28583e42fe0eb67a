CREATE EXTENSION IF NOT EXISTS vector;

CREATE TABLE knowledge_base (
    id text PRIMARY KEY,
    title text,
    content text NOT NULL,
    metadata jsonb NOT NULL DEFAULT '{}',
    embedding vector(768)
);

CREATE INDEX knowledge_base_embedding_idx ON knowledge_base
    USING hnsw (embedding vector_cosine_ops) WITH (m = 16, ef_construction = 64);
