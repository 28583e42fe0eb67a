"""Each check of verify is failed once, by a table broken by hand between index and verify."""

from __future__ import annotations

from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from fix_partitions import partitioned
from fix_tables import (
    NEW,
    OLD,
    REQUEST,
    advance,
    assert_no_leftovers,
    body,
    knowledge_base,
    literal,
    stage_of,
    steering,
    vector,
)
from revector import Request
from revector.embed import Refusal
from revector.errors import GateFailed, Refused
from revector.phases import backfill, verify
from revector.work import Note, Observation, Recorded


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LOOK_AGAIN", 0.3)


def by_hand(connection: psycopg.Connection[Any], statement: str, *parameters: object) -> None:
    """Change vectors as only the worker may."""
    connection.execute("SET revector.writer = 'on'")
    connection.execute(statement, parameters or None)  # type: ignore[arg-type]
    connection.execute("RESET revector.writer")


def fails(dsn: str, connection: psycopg.Connection[Any], check: str, breaking: str = "", **options: Any) -> GateFailed:
    """verify fails by this check alone, names it, and leaves the stage where it was; `breaking` is done right before."""

    def observe(seen: Observation) -> None:
        if breaking and isinstance(seen, Recorded) and seen.step == "verify.catch_up":
            connection.execute(breaking)  # type: ignore[arg-type]

    with steering(dsn, observe=observe) as migration, pytest.raises(GateFailed) as caught:
        migration.run(REQUEST, **options)
    assert stage_of(connection) == ("INDEXED", None)
    assert "hash:16 still answers" in caught.value.why and caught.value.hint == "revector run kb"
    failed = connection.execute(
        "SELECT figures -> 'failed' FROM revector.events WHERE step = 'verify' ORDER BY id DESC LIMIT 1"
    )
    row = failed.fetchone()
    assert row is not None and row[0] == [check]
    return caught.value


def passes(dsn: str, connection: psycopg.Connection[Any], **options: Any) -> None:
    with steering(dsn) as migration:
        assert migration.run(REQUEST, **options).passed
    assert stage_of(connection) == ("VERIFIED", None)


def test_every_check_has_a_figure(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """What passed is told and recorded with its figure, not only that it passed."""
    knowledge_base(connection, 60)
    told: list[str] = []
    with steering(dsn, observe=lambda seen: told.append(seen.text) if isinstance(seen, Note) else None) as migration:
        figures = migration.run(REQUEST).figures
    assert list(figures) == [
        "complete", "refused", "zero", "reproduced", "distinct", "index rv_kb_g2_1",
        "index rv_kb_g2_1 answers", "length",
    ]  # fmt: skip
    assert "60 of 60 rows have a vector" in figures["complete"]
    assert "lowest cosine 1.00000" in figures["reproduced"] and "recall@10" in figures["index rv_kb_g2_1 answers"]
    assert all(f"{name}: {figure}" in told for name, figure in figures.items())


def test_row_that_stays_pending(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A row that has no vector in two looks, though nobody refused it, fails verify; once free it is filled and passes."""
    knowledge_base(connection, 40)
    advance(dsn, "INDEXED")
    by_hand(connection, "UPDATE kb SET embedding_g2 = NULL WHERE id = 7")
    with psycopg.connect(dsn) as holder:
        holder.execute("SELECT 1 FROM kb WHERE id = 7 FOR UPDATE")
        assert "39 of 40 rows have a vector, 1 stuck pending" in str(fails(dsn, connection, "complete"))
    passes(dsn, connection)


def test_rows_that_are_pending_for_a_moment(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Rows pending in one look only are the writers' normal traffic."""
    knowledge_base(connection, 40)
    advance(dsn, "INDEXED")
    connection.execute("UPDATE kb SET content = content || '.' WHERE id < 9")
    passes(dsn, connection)


def test_zero_vector(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A zero vector has no direction: cosine search never finds its row."""
    knowledge_base(connection, 400)
    advance(dsn, "INDEXED")
    by_hand(connection, "UPDATE kb SET embedding_g2 = %s WHERE id = 399", literal([0.0] * 32))
    with steering(dsn) as migration, pytest.raises(GateFailed, match="zero: 1 zero vectors"):
        migration.run(REQUEST)
    assert stage_of(connection) == ("INDEXED", None)


def test_collapsed_vectors(dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says the same of every text reproduces well, and is useless."""
    knowledge_base(connection, 60)
    advance(dsn, "INDEXED")
    by_hand(connection, "UPDATE kb SET embedding_g2 = %s", vector(NEW, "always the same"))
    monkeypatch.setattr(verify, "_reproduced", lambda *_: verify.Check("reproduced", "not looked at", True))
    assert "1 different vectors of 60 different texts" in str(fails(dsn, connection, "distinct"))


def test_sample_that_does_not_reproduce(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """One stale vector in a small table is found by embedding the sample again."""
    knowledge_base(connection, 60)
    advance(dsn, "INDEXED")
    by_hand(connection, "UPDATE kb SET embedding_g2 = %s WHERE id = 31", vector(NEW, "another text"))
    assert "59 of 60 sampled rows" in str(fails(dsn, connection, "reproduced"))
    by_hand(connection, "UPDATE kb SET embedding_g2 = NULL WHERE id = 31")
    passes(dsn, connection)


def test_sample_reaches_the_end_of_the_table(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The sample is spread over the whole table: a stale last half is found."""
    knowledge_base(connection, 2000)
    connection.execute("ANALYZE kb")
    advance(dsn, "INDEXED")
    by_hand(
        connection,
        "UPDATE kb AS a SET embedding_g2 = b.embedding_g2 FROM kb AS b WHERE a.id >= 1000 AND b.id = a.id - 1",
    )
    connection.execute("CLUSTER kb USING kb_pkey")
    fails(dsn, connection, "reproduced")


@pytest.mark.parametrize(
    "breaking",
    ["UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'rv_kb_g2_1'::regclass", "DROP INDEX rv_kb_g2_1"],
)
def test_index_missing_or_invalid(dsn: str, connection: psycopg.Connection[Any], breaking: str) -> None:
    """An index that went invalid, or away, after it was built fails verify; the command that the hint names repairs it."""
    knowledge_base(connection, 40)
    advance(dsn, "INDEXED")
    assert "missing or INVALID" in str(fails(dsn, connection, "index rv_kb_g2_1", breaking))
    passes(dsn, connection)


def test_index_that_the_search_cannot_use(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A valid index that the search query does not use is as good as none."""
    knowledge_base(connection, 40)
    advance(dsn, "INDEXED")
    name = sql.Identifier(connection.info.dbname)
    connection.execute(sql.SQL("ALTER DATABASE {} SET enable_indexscan = off").format(name))
    connection.execute(sql.SQL("ALTER DATABASE {} SET random_page_cost = 1e9").format(name))
    fails(dsn, connection, "index rv_kb_g2_1 answers")
    connection.execute(sql.SQL("ALTER DATABASE {} RESET ALL").format(name))
    passes(dsn, connection)


def test_exact_scan_is_stated_below_10000_rows_and_fails_above(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planner that prefers an exact scan is right on a small table, and a failure on a large one."""
    knowledge_base(connection, 40)
    advance(dsn, "INDEXED")
    monkeypatch.setattr(verify, "_MUST_USE_INDEX", 10)
    assert "prefers an exact scan" in str(fails(dsn, connection, "index rv_kb_g2_1 answers"))
    monkeypatch.setattr(verify, "_MUST_USE_INDEX", 40)
    passes(dsn, connection)


def test_refused_texts_above_the_allowance(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that the model refuses count against the allowance in verify too, when they came after the backfill."""
    knowledge_base(connection, 40)
    advance(dsn, "INDEXED")
    connection.execute("UPDATE kb SET content = 'forbidden' WHERE id IN (3, 4)")
    original = backfill.encode

    def encode(work: Any, generation: Any, embedder: Any, texts: list[str]) -> Any:
        vectors, refusals = original(work, generation, embedder, texts)
        for position, text in enumerate(texts):
            if text == "forbidden":
                vectors[position] = float("nan")
                refusals[position] = Refusal("refused", "no such text, please")
        return vectors, refusals

    monkeypatch.setattr(backfill, "encode", encode)
    assert "1 texts refused by the model, 0 allowed" in str(fails(dsn, connection, "refused"))
    passes(dsn, connection, allow_failed=1)


def test_rows_without_text_are_complete(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A row that has no text needs no vector."""
    knowledge_base(connection, 40, not_null=False)
    connection.execute("INSERT INTO kb (id, content) SELECT n, NULL FROM generate_series(100, 109) AS n")
    passes(dsn, connection)


def test_empty_table(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A table of no rows is verified, with nothing to look at."""
    knowledge_base(connection, 0)
    passes(dsn, connection)


def test_trigger_gone_before_verify(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Edits made while the trigger was away cannot be seen: verify does not even begin."""
    knowledge_base(connection, 40)
    advance(dsn, "INDEXED")
    connection.execute('DROP TRIGGER "~rv_kb_g2" ON kb')
    with steering(dsn) as migration, pytest.raises(Refused, match="is missing"):
        migration.run(REQUEST)
    assert stage_of(connection) == ("INDEXED", None)


def test_partial_index_on_the_partition_key(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Its condition rules partitions out of the search: only those that are searched must use their part of it."""
    partitioned(connection, "list", 60, index=False)
    connection.execute("CREATE INDEX docs_t1 ON docs USING hnsw (embedding vector_cosine_ops) WHERE tenant = 1")
    advance(dsn, "INDEXED", table="docs")
    with steering(dsn, "docs") as migration:
        assert migration.run(REQUEST).passed
    assert stage_of(connection) == ("VERIFIED", None)


def test_partition_that_is_searched_without_its_part(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A part that the planner does not see is missed, though the others are used."""
    partitioned(connection, "list", 60, index=False)
    connection.execute("CREATE INDEX docs_t1 ON docs USING hnsw (embedding vector_cosine_ops) WHERE tenant IN (1, 2)")
    breaking = "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'rv_docs_p1_g2_1'::regclass"
    advance(dsn, "INDEXED", table="docs")

    def observe(seen: Observation) -> None:
        if isinstance(seen, Recorded) and seen.step == "verify.catch_up":
            connection.execute(breaking)

    with steering(dsn, "docs", observe) as migration, pytest.raises(GateFailed, match="rv_docs_g2_1 answers"):
        migration.run(REQUEST)


def test_where_on_the_partition_key_of_a_column_without_a_dimension(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    """One tenant's partition is migrated; all three are exact, and the index is the same at the end."""
    connection.execute(
        "CREATE TABLE kb (id int, tenant text, content text, embedding vector, PRIMARY KEY (id, tenant))"
        " PARTITION BY LIST (tenant); CREATE TABLE kb_a PARTITION OF kb FOR VALUES IN ('a');"
        " CREATE TABLE kb_rest PARTITION OF kb DEFAULT"
    )
    for number in range(30):
        spec = (OLD, "hash:8", "hash:8")[number % 3]
        row = (number, "abc"[number % 3], body(number), vector(spec, body(number)))
        connection.execute("INSERT INTO kb VALUES (%s, %s, %s, %s)", row)
    connection.execute("CREATE INDEX kb_i ON kb USING hnsw ((embedding::vector(16)) vector_l2_ops) WHERE tenant = 'a'")
    with steering(dsn) as migration:
        migration.run(Request(from_=OLD, to=NEW, where="tenant = 'a'"))
        migration.cutover(without_follower=True)
        migration.finalize()
    found = connection.execute("SELECT tenant, content, embedding::text FROM kb").fetchall()
    assert len(found) == 30
    for tenant, text, stored in found:
        right = vector(NEW if tenant == "a" else "hash:8", text)
        assert np.allclose(*([float(x) for x in v[1:-1].split(",")] for v in (stored, right)))
    assert_no_leftovers(connection)
