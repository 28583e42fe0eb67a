"""Search as an application calls it: no cutover, rollback or lost connection is seen by its user."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql
from test_knowledge_base import NAMES, add_generation, database, document, flip, loaded, written

from fix_tables import advance, body, embedder, fill, knowledge_base, oid_of, one, settings, steering, until
from revector import Embedder
from revector.db import Database
from revector.embed import Identity
from revector.errors import DimensionMismatch, KeyRejected, Refused, ServerLost, UsageError
from revector.knowledge_base import init, split_name
from revector.search import Searcher, SearchResult, search


@pytest.fixture
def table(dsn: str, tmp_path: Any) -> str:
    """`kb` with 30 documents of hash:16 under HNSW."""
    init(database(dsn), embedder("hash:16"), "kb")
    loaded(dsn, written(tmp_path / "f.jsonl", map(document, range(30))))
    return "kb"


def found(dsn: str, name: str, text: str, **options: Any) -> SearchResult:
    return search(database(dsn), settings(dsn), name, text, embedder_for=by_name, **options)


def by_name(identity: Identity) -> Embedder:
    return embedder(identity.model)


@contextmanager
def searching(dsn: str, name: str = "kb", **options: Any) -> Iterator[Searcher]:
    with Searcher(database(dsn), settings(dsn), name, **{"embedder_for": by_name, **options}) as searcher:
        yield searcher


def content(number: int) -> str:
    told = document(number)
    return f"{told['title']}\n{told['text']}"


class Meddling(Embedder):
    """An embedder that lets something happen between embedding a question and searching with it."""

    def __init__(self, spec: str, meanwhile: Callable[[], None], times: int = 1) -> None:
        super().__init__(spec)
        self.meanwhile, self.times = meanwhile, times
        self.questions = 0

    def encode(self, texts: Any, *, kind: Any = "document") -> Any:
        vectors = super().encode(texts, kind=kind)
        if kind == "query":
            self.questions += 1
            if self.times > 0:
                self.times -= 1
                self.meanwhile()
        return vectors


def test_the_nearest_rows_and_who_chose_them(dsn: str, table: str) -> None:
    result = found(dsn, table, content(7), k=5)
    assert (result.generation, result.model, result.repeated) == (1, "hash:16", False)
    assert result.milliseconds > 0
    assert len(result.hits) == 5
    best = result.hits[0]
    assert (best.id, best.title, best.text) == ("d7", "Title 7", content(7))
    assert best.score == pytest.approx(1.0)
    assert [h.score for h in result.hits] == sorted((h.score for h in result.hits), reverse=True)
    assert all(h.score == pytest.approx(1 - h.distance) for h in result.hits)


def test_rows_without_a_vector_are_never_found(dsn: str, connection: psycopg.Connection, table: str) -> None:
    connection.execute("UPDATE kb SET embedding = NULL WHERE id <> 'd3'")
    assert [h.id for h in found(dsn, table, content(7)).hits] == ["d3"]
    connection.execute("DELETE FROM kb")
    result = found(dsn, table, content(7))
    assert (result.generation, result.model, result.hits) == (1, "hash:16", ())


@pytest.mark.parametrize("name", NAMES)
def test_odd_names(dsn: str, connection: psycopg.Connection, tmp_path: Any, name: str) -> None:
    connection.execute("CREATE SCHEMA app")
    init(database(dsn), embedder("hash:16"), name)
    loaded(dsn, written(tmp_path / "f.jsonl", map(document, range(5))), name)
    assert found(dsn, name, content(2)).hits[0].id == "d2"
    assert found(dsn, name, content(2), k=50).hits[0].id == "d2"
    schema, relation = split_name(name)
    with psycopg.connect(dsn, autocommit=True) as second:
        second.execute(
            sql.SQL("ALTER TABLE {} RENAME COLUMN embedding TO {}").format(
                sql.Identifier(schema or "public", relation), sql.Identifier("100% of {0} it's")
            )
        )
    assert found(dsn, name, content(2)).hits[0].id == "d2"


@pytest.mark.parametrize("other", ["hash:32", "hash:16"])
def test_a_cutover_between_embedding_and_searching_is_not_seen(
    dsn: str, connection: psycopg.Connection, table: str, other: str
) -> None:
    """By the error about dimensions, or by the generation where the dimensions are equal: it repeats once."""
    add_generation(connection, dsn, other)
    with psycopg.connect(dsn, autocommit=True) as second:
        old = Meddling("hash:16", lambda: flip(second))
        new = Meddling(other, lambda: None, 0)
        models = iter([old, new])
        with searching(dsn, embedder_for=lambda _: next(models)) as searcher:
            result = searcher.search(content(7), k=3)
            assert (result.generation, result.model, result.repeated) == (2, other, True)
            assert result.hits[0].id == "d7"
            assert result.hits[0].score == pytest.approx(1.0)
            assert (old.questions, new.questions) == (1, 1)
            again = searcher.search(content(8), k=100)
            assert (again.generation, again.repeated, again.hits[0].id) == (2, False, "d8")
            flip(second)
            back = searcher.search(content(9))
            assert (back.generation, back.repeated, back.hits[0].id) == (1, True, "d9")
            assert (old.questions, new.questions) == (2, 3), "the models stay loaded"


def test_a_rollback_right_after_the_cutover_is_not_seen_either(
    dsn: str, connection: psycopg.Connection, table: str
) -> None:
    add_generation(connection, dsn, "hash:32")
    with psycopg.connect(dsn, autocommit=True) as second:
        models = {m: Meddling(m, lambda: flip(second)) for m in ("hash:16", "hash:32")}
        with searching(dsn, embedder_for=lambda identity: models[identity.model]) as searcher:
            result = searcher.search(content(7))
            assert (result.generation, result.repeated, result.hits[0].id) == (1, True, "d7")


def test_switching_for_ever_ends_in_a_refusal(dsn: str, connection: psycopg.Connection, table: str) -> None:
    add_generation(connection, dsn, "hash:16")
    with psycopg.connect(dsn, autocommit=True) as second:
        model = Meddling("hash:16", lambda: flip(second), times=100)
        with (
            searching(dsn, embedder_for=lambda _: model) as searcher,
            pytest.raises(Refused, match="changed its model 3 times"),
        ):
            searcher.search(content(7))


def test_one_search_after_another_through_many_switches(dsn: str, connection: psycopg.Connection, table: str) -> None:
    add_generation(connection, dsn, "hash:32")
    stop, flips, generations = threading.Event(), 0, set()
    with psycopg.connect(dsn, autocommit=True) as second:

        def flipping() -> None:
            nonlocal flips
            while not stop.wait(0.1):
                flip(second)
                flips += 1

        thread = threading.Thread(target=flipping)
        thread.start()
        try:
            with searching(dsn) as searcher:
                deadline = time.monotonic() + 3
                number = 0
                while time.monotonic() < deadline:
                    result = searcher.search(content(number % 30), k=1 if number % 2 else 60)
                    assert result.hits[0].id == f"d{number % 30}"
                    assert result.model == {1: "hash:16", 2: "hash:32"}[result.generation or 0]
                    generations.add(result.generation)
                    number += 1
        finally:
            stop.set()
            thread.join()
    assert flips > 5
    assert generations == {1, 2}


def test_a_real_migration_is_not_seen(dsn: str, connection: psycopg.Connection) -> None:
    """From a table that revector does not know to cutover and rollback, through one searcher; never an error.

    Once the switch is near, the other model is loaded before it is needed.
    """
    knowledge_base(connection)
    asked: list[str] = []

    def slowly(identity: Identity) -> Embedder:
        asked.append(identity.model)
        return embedder(identity.model)

    with searching(dsn, model="hash:16", embedder_for=slowly) as searcher:
        result = searcher.search(body(7))
        assert (result.generation, result.model, result.hits[0].id, asked) == (None, "hash:16", "7", [])
        advance(dsn, "EXPANDED")
        result = searcher.search(body(7))
        assert (result.generation, result.repeated, result.hits[0].id, asked) == (1, True, "7", ["hash:16"])
        advance(dsn, "VERIFIED")
        assert not searcher.search(body(8)).repeated
        until(lambda: asked == ["hash:16", "hash:32"])
        advance(dsn, "CUT_OVER")
        result = searcher.search(body(9), k=50)
        assert (result.generation, result.model, result.repeated, result.hits[0].id) == (2, "hash:32", True, "9")
        connection.execute("UPDATE kb SET content = 'something else entirely' WHERE id = 9")
        assert "9" not in [h.id for h in searcher.search("something else entirely", k=60).hits]
        fill(dsn, connection)
        assert searcher.search("something else entirely").hits[0].id == "9"
        with steering(dsn) as migration:
            migration.rollback(without_follower=True)
        result = searcher.search("something else entirely")
        assert (result.generation, result.repeated, result.hits[0].id) == (1, True, "9")
        assert asked == ["hash:16", "hash:32"]


def test_a_model_that_could_not_be_loaded_beforehand_is_tried_again(
    dsn: str, connection: psycopg.Connection, table: str
) -> None:
    add_generation(connection, dsn, "hash:32")
    failures = iter([KeyRejected()])

    def sometimes(identity: Identity) -> Embedder:
        if identity.model == "hash:32":
            for error in failures:
                raise error
        return embedder(identity.model)

    with searching(dsn, embedder_for=sometimes) as searcher:
        flip(connection)
        with pytest.raises(KeyRejected):
            searcher.search(content(7))
        assert searcher.search(content(7)).hits[0].id == "d7"


@pytest.mark.parametrize(
    ("opclass", "score"),
    [
        ("vector_cosine_ops", lambda d: 1 - d),
        ("vector_l2_ops", lambda d: d),
        ("vector_ip_ops", lambda d: -d),
        ("vector_l1_ops", lambda d: d),
    ],
)
def test_the_operator_is_the_indexs(
    dsn: str, connection: psycopg.Connection, opclass: str, score: Callable[[float], float]
) -> None:
    """And the index is used."""
    knowledge_base(connection, index=None)
    connection.execute(sql.SQL("CREATE INDEX ON kb USING hnsw (embedding {})").format(sql.Identifier(opclass)))
    with searching(dsn, model="hash:16") as searcher:
        result = searcher.search(body(7))
        assert result.hits[0].id == "7"
        assert [h.score for h in result.hits] == [score(h.distance) for h in result.hits]
        connection.execute("ANALYZE kb")
        assert [h.distance for h in result.hits] == sorted(h.distance for h in result.hits)
        searcher._session.execute("SET enable_seqscan = off")
        plan = searcher._session.rows(
            sql.SQL("EXPLAIN ") + searcher._target.statement, vector=str([1.0] * 16), k=10, table=0, column=""
        )
        assert any("Index Scan using kb_embedding_idx" in row[0] for row in plan)


def test_more_hits_than_hnsw_gives_by_itself(dsn: str, connection: psycopg.Connection) -> None:
    knowledge_base(connection, rows=3000)
    connection.execute("ANALYZE kb")
    with searching(dsn, model="hash:16") as searcher:
        searcher._session.execute("SET enable_seqscan = off")
        assert len(searcher.search(body(7), k=200).hits) == 200
        assert len(searcher.search(body(7), k=40).hits) == 40
        assert searcher._session.value("SHOW hnsw.ef_search") == "40", "raised for that one search"
        searcher._session.execute("SET hnsw.ef_search = 300")
        assert len(searcher.search(body(7), k=41).hits) == 41


def test_halfvec_schema_composite_key_and_no_key(dsn: str, connection: psycopg.Connection) -> None:
    connection.execute("DROP EXTENSION vector; CREATE SCHEMA ext; CREATE EXTENSION vector SCHEMA ext")
    connection.execute("CREATE TABLE kb (a int, b text, note text, v ext.halfvec(16), PRIMARY KEY (b, a))")
    for number in range(5):
        told = str(embedder("hash:16").encode([body(number)])[0].tolist())
        connection.execute("INSERT INTO kb VALUES (%s, 'x', %s, %s)", (number, body(number), told))
    connection.execute("CREATE INDEX ON kb USING hnsw (v ext.halfvec_l2_ops)")
    hit = found(dsn, "kb", body(3), model="hash:16", column="v").hits[0]
    assert (hit.id, hit.title, hit.text) == ("x,3", None, body(3))
    assert hit.distance == pytest.approx(0, abs=1e-2)
    connection.execute("ALTER TABLE kb DROP CONSTRAINT kb_pkey")
    assert found(dsn, "kb", body(3), model="hash:16").hits[0].id == "(0,4)"
    connection.execute("CREATE VIEW seen AS SELECT a AS id, note AS content, v FROM kb")
    assert found(dsn, "seen", body(3), model="hash:16").hits[0].id == "3"


def test_without_a_ledger_the_model_has_to_be_named(dsn: str, connection: psycopg.Connection) -> None:
    knowledge_base(connection, rows=3, index=None)
    connection.execute("ALTER TABLE kb ALTER embedding TYPE vector(384) USING NULL, ALTER embedding DROP NOT NULL")
    with pytest.raises(UsageError) as error:
        found(dsn, "kb", "x")
    assert str(error.value) == "which model made kb.embedding, with 384 dimensions? revector does not know this table"
    assert "bundled:static, bundled:minilm, all-MiniLM-L6-v2" in error.value.why
    assert error.value.hint == "name it: revector search kb QUESTION --model bundled:static"
    with pytest.raises(DimensionMismatch, match="hash:16 gives 16 dimensions, not the 384 asked for"):
        found(dsn, "kb", "x", model="hash:16")
    with pytest.raises(UsageError, match="there is no table 'kbx'"):
        found(dsn, "kbx", "x", model="hash:16")
    connection.execute("ALTER TABLE kb ADD embedding2 vector(3), ADD v vector(3), DROP embedding")
    with pytest.raises(UsageError, match="several vector columns: embedding2, v"):
        found(dsn, "kb", "x", model="hash:3")


def test_questions_that_are_none(dsn: str, table: str) -> None:
    with searching(dsn) as searcher:
        with pytest.raises(UsageError, match="nothing to search for"):
            searcher.search(" \n")
        with pytest.raises(UsageError, match="at least 1"):
            searcher.search("x", k=0)
    with pytest.raises(UsageError, match=r"kb.embedding is searched with hash:16, not with hash:17"):
        found(dsn, table, "x", model="hash:17")
    assert found(dsn, table, content(1), model="hash:016").hits[0].id == "d1"


def test_a_column_of_another_model_than_recorded_is_an_error(
    dsn: str, connection: psycopg.Connection, table: str
) -> None:
    """Not a cutover: it does not go away by repeating."""
    with searching(dsn) as searcher:
        connection.execute("ALTER TABLE kb ALTER embedding TYPE vector(3) USING '[1,2,3]'::vector(3)")
        with pytest.raises(Refused, match="different vector dimensions 3 and 16") as error:
            searcher.search(content(1))
    assert error.value.hint == "revector status kb"


def test_a_lost_connection_is_made_anew(dsn: str, connection: psycopg.Connection, table: str) -> None:
    with searching(dsn) as searcher:
        for k in (3, 60):
            before = searcher._session.pid
            connection.execute("SELECT pg_terminate_backend(%s, 5000)", (before,))
            assert searcher.search(content(7), k=k).hits[0].id == "d7"
            assert searcher._session.pid != before


def test_a_lost_server_is_said(
    dsn: str, connection: psycopg.Connection, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ServerLost

    with searching(dsn) as searcher:
        connection.execute("SELECT pg_terminate_backend(%s, 5000)", (searcher._session.pid,))
        monkeypatch.setattr(Database, "connect", unreachable)
        with pytest.raises(ServerLost):
            searcher.search(content(7))
        monkeypatch.undo()
        assert searcher.search(content(7)).hits[0].id == "d7"


def test_an_applications_role_needs_three_tables_of_the_ledger(
    dsn: str, connection: psycopg.Connection, table: str
) -> None:
    """The refusal holds the grant; row level security applies to what is found."""
    user = f"rv_app_{one(connection, 'SELECT pg_backend_pid()')}"
    role = sql.Identifier(user)
    connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    app = psycopg.conninfo.make_conninfo(dsn, user=user)
    try:
        with pytest.raises(Refused, match=r"missing right: role .* may not read revector's ledger") as error:
            found(app, table, content(7))
        grant = error.value.hint.removeprefix("as their owner: ").splitlines()[0]
        connection.execute(grant)
        with pytest.raises(Refused, match="missing right: permission denied for table kb"):
            found(app, table, content(7))
        connection.execute(sql.SQL("GRANT SELECT ON kb TO {}").format(role))
        assert len(found(app, table, content(7)).hits) == 10
        connection.execute("ALTER TABLE kb ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON kb USING (id IN ('d1', 'd2'))")
        assert {h.id for h in found(app, table, content(7)).hits} == {"d1", "d2"}
    finally:
        connection.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


def test_the_ledger_may_go(dsn: str, connection: psycopg.Connection, table: str) -> None:
    with searching(dsn) as searcher:
        connection.execute("DROP SCHEMA revector CASCADE")
        with pytest.raises(UsageError, match="revector does not know this table"):
            searcher.search(content(7))
    assert oid_of(connection)
