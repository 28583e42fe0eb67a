"""How the best existing tool breaks on the table's own objects; each test fails on that behaviour."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from fix_commands import command
from fix_tables import NEW, OLD, REQUEST, advance, assert_exact, fill, knowledge_base, one, shape, steering, vector
from revector.errors import Refused
from revector.phases import verify


@pytest.fixture(autouse=True)
def _look_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LOOK_AGAIN", 0.3)


def test_peer_01_not_null_column_takes_writes_after_cutover(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Peer: after cutover every INSERT and every text UPDATE of the application fails on the old column's NOT NULL."""
    knowledge_base(connection, 40, not_null=True)
    advance(dsn, "CUT_OVER")
    connection.execute("INSERT INTO kb (id, content, embedding) VALUES (900, 'new', %s)", (vector(NEW, "new"),))
    connection.execute("UPDATE kb SET content = 'edited' WHERE id = 3")
    fill(dsn, connection)
    assert_exact(connection, "kb", "content", {"embedding": NEW, "embedding_g1": OLD}, at_least=41)
    with pytest.raises(psycopg.errors.NotNullViolation):
        connection.execute("INSERT INTO kb (id, content) VALUES (901, 'without a vector')")
    with steering(dsn) as migration:
        migration.finalize()
    assert one(connection, "SELECT attnotnull FROM pg_attribute WHERE attname = 'embedding'")


def test_peer_10_columns_of_the_user_are_never_touched(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Peer: a user's own column named like the tool's is renamed and dropped by its status, rollback and cleanup."""
    names = ", embedding_old vector(16), embedding_new vector(16), embedding_g1 vector(16)"
    knowledge_base(connection, 20, more=names)
    connection.execute("UPDATE kb SET embedding_old = embedding, embedding_new = embedding, embedding_g1 = embedding")
    before = shape(connection)
    assert command(dsn, "status", "kb").exits(0).out.startswith("kb: revector does not know")
    for verb in ("rollback", "finalize", "abort", "cutover"):
        command(dsn, verb, "kb").exits(3)
    assert shape(connection) == before
    with steering(dsn) as migration, pytest.raises(Refused, match=r"names: taken: .*embedding_g1"):
        migration.run(REQUEST.__class__(from_=OLD, to=NEW, vector="embedding"))
    assert shape(connection) == before
    connection.execute("ALTER TABLE kb DROP embedding_g1")
    with steering(dsn) as migration:
        migration.run(REQUEST.__class__(from_=OLD, to=NEW, vector="embedding"))
        migration.cutover(without_follower=True)
        migration.finalize()
    assert one(connection, "SELECT count(*) FROM kb WHERE embedding_old = embedding_new") == 20


def test_peer_12_dependents_go_with_the_name_or_stop_the_plan(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Peer: generated column, halfvec expression index, CHECK and UPDATE OF trigger all stay on the old column, unsaid."""
    knowledge_base(connection, 20)
    connection.execute("CREATE INDEX kb_half ON kb USING hnsw ((embedding::halfvec(16)) halfvec_cosine_ops)")
    connection.execute("ALTER TABLE kb ADD CONSTRAINT kb_unit CHECK (vector_norm(embedding) > 0.9)")
    connection.execute("ALTER TABLE kb ADD norm float8 GENERATED ALWAYS AS (vector_norm(embedding)) STORED")
    with steering(dsn) as migration, pytest.raises(Refused, match="norm"):
        migration.run(REQUEST)
    connection.execute("ALTER TABLE kb DROP norm")
    with steering(dsn) as migration:
        migration.run(REQUEST)
        migration.cutover(without_follower=True)
    on = dict(connection.execute("SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'kb'").fetchall())
    assert "(embedding)::halfvec(32)" in on["kb_half"]
    check = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'kb_unit' AND convalidated"
    assert "vector_norm(embedding)" in one(connection, check)


def test_peer_13_index_settings_are_kept(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Peer: m=24, ef_construction=100 become the defaults, of several indexes one is built, lists follows local state."""
    knowledge_base(connection, 60, index=None)
    for name, how in {
        "kb_cosine": "hnsw (embedding vector_cosine_ops) WITH (m='24', ef_construction='100')",
        "kb_l2": "hnsw (embedding vector_l2_ops) WITH (m='5', ef_construction='40')",
        "kb_lists": "ivfflat (embedding vector_ip_ops) WITH (lists='7')",
    }.items():
        connection.execute(f"CREATE INDEX {name} ON kb USING {how}")
    before = connection.execute(
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'kb' ORDER BY 1"
    ).fetchall()
    with steering(dsn) as migration:
        migration.run(REQUEST.__class__(from_=OLD, to=NEW, index="same"))
        migration.cutover(without_follower=True)
        migration.finalize()
    assert (
        before
        == connection.execute("SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'kb' ORDER BY 1").fetchall()
    )


def test_peer_20_long_names_of_two_tables_do_not_meet(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Peer: a function's name without schema or hash, cut at 63 bytes, is replaced by another table's."""
    long = "t" * 61
    connection.execute("CREATE SCHEMA other")
    for table in (f"{long}_a", f"{long}_b"):
        knowledge_base(connection, 20, name=table, index=None)
    connection.execute(f'ALTER TABLE "{long}_b" SET SCHEMA other')
    connection.execute(f'ALTER TABLE other."{long}_b" RENAME TO "{long}_a"')
    for table in (f"public.{long}_a", f"other.{long}_a"):
        with steering(dsn, table) as migration:
            migration.run(REQUEST)
            migration.cutover(without_follower=True)
    assert one(connection, "SELECT count(DISTINCT tgfoid) FROM pg_trigger WHERE tgname LIKE '~%'") == 2
    with steering(dsn, f"public.{long}_a") as migration:
        migration.rollback(without_follower=True)
        migration.abort()
    connection.execute(f"UPDATE other.{long}_a SET content = 'edited' WHERE id = 1")
    assert one(connection, f"SELECT embedding IS NULL AND embedding_g1 IS NULL FROM other.{long}_a WHERE id = 1")
