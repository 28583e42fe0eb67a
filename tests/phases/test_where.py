"""`--where`: only some rows are migrated, and whatever happens to the others is exact too."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import psycopg
import pytest

from fix_commands import command
from fix_tables import (
    Halt,
    advance,
    assert_no_leftovers,
    body,
    embedder,
    following,
    halting,
    oid_of,
    one,
    settings,
    steering,
    until,
    vector,
)
from revector import Embedder, Migration, Request
from revector.db import Database
from revector.embed.hashing import Hashing
from revector.errors import Interrupted, Refused, UsageError
from revector.follow import Follower
from revector.plan import Consents
from revector.search import Searcher
from revector.work import Effect, Note, Observation, Progress, Recorded

OLD, NEW, OTHER = "hash:16", "hash:32", "hash:8"
INSIDE = Request(from_=OLD, to=NEW, where="tenant = 'a'")


def shared(
    connection: psycopg.Connection[Any], kind: str = "vector", rows: int = 40, other: str | None = OTHER
) -> None:
    """Two tenants in one table: a's vectors are OLD's; b's are another model's, or missing."""
    connection.execute(f"CREATE TABLE kb (id int PRIMARY KEY, tenant text, content text, embedding {kind})")
    for number in range(rows):
        text = body(number)
        mine = number % 2 == 0
        given = vector(OLD, text) if mine else vector(other, text) if other else None
        connection.execute("INSERT INTO kb VALUES (%s, %s, %s, %s)", (number, "a" if mine else "b", text, given))


def index(connection: psycopg.Connection[Any]) -> None:
    connection.execute(
        "CREATE INDEX kb_a ON kb USING hnsw ((embedding::vector(16)) vector_l2_ops) WITH (m = 8) WHERE tenant = 'a'"
    )


def check(connection: psycopg.Connection[Any], columns: dict[str, str], outside: str | None = OTHER) -> None:
    """Rows inside have each model's vector of their text; rows outside have the same one in every generation."""
    for column, model in columns.items():
        for tenant, text, stored in connection.execute(f"SELECT tenant, content, {column}::text FROM kb"):
            right = vector(model, text) if tenant == "a" else vector(outside, text) if outside else None
            assert (stored and numbers(stored)) == (right and numbers(right)), (column, tenant, text)


def numbers(text: str) -> Sequence[float]:
    return [float(np.float32(x)) for x in text.strip("[]").split(",")]


def write(connection: psycopg.Connection[Any], turn: int, model: str) -> None:
    """Edits inside and outside, moves in both directions, inserts and deletes, each as its application would."""

    def put(number: int, tenant: str, text: str, given: str) -> None:
        connection.execute(
            "UPDATE kb SET tenant = %s, content = %s, embedding = %s WHERE id = %s",
            (tenant, text, vector(given, text), number),
        )

    base = 1000 * turn
    put(0, "a", f"edited inside {turn}", model)
    put(1, "b", f"edited outside {turn}", OTHER)
    put(2, "b", f"moved out {turn}", OTHER)
    put(3, "a", f"moved in {turn}", model)
    connection.execute("UPDATE kb SET tenant = 'a' WHERE id = 5")
    for number, tenant, given in ((base + 1, "a", model), (base + 2, "b", OTHER)):
        text = f"new {number}"
        connection.execute(
            "INSERT INTO kb (id, tenant, content, embedding) VALUES (%s, %s, %s, %s)",
            (number, tenant, text, vector(given, text)),
        )
    connection.execute("INSERT INTO kb (id, tenant, content) VALUES (%s, 'a', %s)", (base + 3, f"new {base + 3}"))
    connection.execute("DELETE FROM kb WHERE id = %s", (10 + turn,))
    connection.execute("UPDATE kb SET content = 'edited without a vector', embedding = embedding WHERE id = 4")


def settle(dsn: str, connection: psycopg.Connection[Any]) -> None:
    Follower(settings(dsn), oid_of(connection)).once()


def test_rows_outside_keep_one_vector_in_both_generations(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A column without a dimension (LangChain's table): both tenants are searchable before and after every switch."""
    shared(connection)
    index(connection)
    with steering(dsn) as migration:
        migration.run(INSIDE)
        check(connection, {"embedding": OLD, "embedding_g2": NEW})
    for turn, name in enumerate(("cutover", "rollback", "cutover"), 1):
        with following(dsn, connection), steering(dsn) as migration:
            getattr(migration, name)()
        model = NEW if name == "cutover" else OLD
        write(connection, turn, model)
        # A row that moves in with another model's vector is embedded anew, by both models.
        settle(dsn, connection)
        columns = (
            {"embedding": NEW, "embedding_g1": OLD} if name == "cutover" else {"embedding": OLD, "embedding_g2": NEW}
        )
        check(connection, columns)
    connection.execute("SET enable_seqscan = off")
    explained = connection.execute(
        f"EXPLAIN SELECT id FROM kb WHERE tenant = 'a' ORDER BY embedding::vector(32) <-> '{vector(NEW, 'x')}' LIMIT 3"
    ).fetchall()
    assert "kb_a" in str(explained)
    with steering(dsn) as migration:
        migration.finalize()
    check(connection, {"embedding": NEW})
    assert_no_leftovers(connection)
    definition = one(connection, "SELECT pg_get_indexdef('kb_a'::regclass)")
    assert "vector(32)" in definition
    assert "m='8'" in definition
    assert "tenant = 'a'" in definition


@pytest.mark.parametrize("predicate", ["tenant = 'a'", "content <> ''", ""])
def test_three_migrations_leave_the_index_as_one_did(
    dsn: str, connection: psycopg.Connection[Any], predicate: str
) -> None:
    """The filter is put into the index once; what asks for it already is not touched."""
    shared(connection, other=OLD)
    where = f" WHERE {predicate}" if predicate else ""
    connection.execute(f"CREATE INDEX kb_a ON kb USING hnsw ((embedding::vector(16)) vector_l2_ops){where}")
    seen = [one(connection, "SELECT pg_get_expr(indpred, indrelid) FROM pg_index WHERE indexrelid = 'kb_a'::regclass")]
    for to in (NEW, "hash:24", "hash:12"):
        request = Request(from_=OLD, to=to, where="tenant = 'a'") if to == NEW else Request(to=to, where="tenant = 'a'")
        with steering(dsn) as migration:
            migration.run(request)
            migration.cutover(without_follower=True)
            migration.finalize()
        seen.append(
            one(connection, "SELECT pg_get_expr(indpred, indrelid) FROM pg_index WHERE indexrelid = 'kb_a'::regclass")
        )
    before, *after = seen
    assert len(set(after)) == 1
    assert str(after[0]).count("tenant") == 1
    assert after[0] == before or predicate != "tenant = 'a'"


def test_an_index_of_others_that_is_empty_yet_stays_theirs(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Nobody is tenant c today: with the filter added its index could never hold a row."""
    shared(connection)
    index(connection)
    connection.execute("CREATE INDEX kb_c ON kb USING hnsw ((embedding::vector(8)) vector_l2_ops) WHERE tenant = 'c'")
    before = one(connection, "SELECT pg_get_indexdef('kb_c'::regclass)")
    with steering(dsn) as migration:
        migration.run(INSIDE)
        migration.cutover(without_follower=True)
        migration.finalize()
    assert one(connection, "SELECT pg_get_indexdef('kb_c'::regclass)") == before
    assert_no_leftovers(connection)


def test_a_row_that_moves_before_served(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """In: the live vector stays the application's, the candidate becomes pending. Out: the candidate takes the live one."""
    shared(connection)
    advance(dsn, "VERIFIED", INSIDE)
    connection.execute("UPDATE kb SET tenant = 'a' WHERE id = 1")
    connection.execute("UPDATE kb SET tenant = 'b' WHERE id = 2")
    rows = dict(connection.execute("SELECT id, embedding_g2::text FROM kb WHERE id IN (1, 2)").fetchall())
    assert rows[1] is None
    assert rows[2] == one(connection, "SELECT embedding::text FROM kb WHERE id = 2")
    settle(dsn, connection)
    assert numbers(one(connection, "SELECT embedding_g2::text FROM kb WHERE id = 1")) == numbers(vector(NEW, body(1)))
    assert numbers(one(connection, "SELECT embedding::text FROM kb WHERE id = 1")) == numbers(vector(OTHER, body(1)))


@pytest.mark.parametrize("stage", ["EXPANDED", "SERVED"])
def test_a_replicated_edit_outside_reaches_both_generations(
    dsn: str, connection: psycopg.Connection[Any], stage: str
) -> None:
    """session_replication_role = replica spares an INSERT what it brings; an UPDATE never leaves the old vector behind."""
    shared(connection)
    advance(dsn, stage, INSIDE)
    with psycopg.connect(dsn, autocommit=True) as session:
        session.execute("SET session_replication_role = replica")
        for number, tenant in ((1, "b"), (2, "b"), (3, "a")):
            text = f"edited by an apply worker {number}"
            session.execute(
                "UPDATE kb SET tenant = %s, content = %s, embedding = %s WHERE id = %s",
                (tenant, text, vector(OTHER if tenant == "b" else OLD, text), number),
            )
        rows = session.execute(
            "SELECT embedding::text = embedding_g2::text FROM kb WHERE id < 4 ORDER BY id"
        ).fetchall()
        assert [same for (same,) in rows][1:] == [True, True, None]
        session.execute("UPDATE kb SET embedding = NULL WHERE id = 1")
        assert one(connection, "SELECT embedding_g2 IS NULL FROM kb WHERE id = 1")
        text = one(connection, "SELECT content FROM kb WHERE id = 1")
        session.execute("UPDATE kb SET embedding = %s WHERE id = 1", (vector(OTHER, text),))
    if stage == "EXPANDED":
        advance(dsn, "SERVED", INSIDE)
    with steering(dsn) as migration:
        migration.cutover(without_follower=True)
        settle(dsn, connection)
        check(connection, {"embedding": NEW, "embedding_g1": OLD})
        migration.finalize()
    check(connection, {"embedding": NEW})


def test_a_row_outside_that_was_locked_during_the_backfill_is_copied_later(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    """SELECT FOR UPDATE changes nothing, so no trigger copies that row: catch-up does, or cutover is refused."""
    shared(connection)
    advance(dsn, "EXPANDED", INSIDE)
    with psycopg.connect(dsn) as holder:
        holder.execute("SELECT FROM kb WHERE id = 1 FOR UPDATE")
        advance(dsn, "BACKFILLED", INSIDE)
        assert one(connection, "SELECT count(*) FROM kb WHERE tenant = 'b' AND embedding_g2 IS NULL") == 1
    with steering(dsn) as migration:
        migration.run()
        check(connection, {"embedding": OLD, "embedding_g2": NEW})
        connection.execute("SET session_replication_role = replica; ALTER TABLE kb DISABLE TRIGGER ALL")
        connection.execute("UPDATE kb SET embedding_g2 = NULL WHERE id = 1")
        name = one(connection, "SELECT tgname FROM pg_trigger WHERE tgname LIKE '~rv%'")
        connection.execute(f'ALTER TABLE kb ENABLE ALWAYS TRIGGER "{name}"')
        work = migration._work(migration.latest())
        assert work.outside_lost(work.plan.old, work.plan.new) == 1
        with pytest.raises(Refused, match="1 rows outside --where tenant = 'a' have a vector of hash:16 alone"):
            migration._check_outside(work, back=False)


@pytest.mark.parametrize("moment", [Effect, Recorded])
def test_killed_while_rows_outside_are_copied(
    dsn: str, connection: psycopg.Connection[Any], moment: type[Observation]
) -> None:
    """Ended at that step, given again: nothing is missing."""
    shared(connection)
    with pytest.raises(Halt), steering(dsn, observe=halting("backfill.outside", moment)) as migration:
        migration.run(INSIDE)
    connection.execute("UPDATE kb SET content = 'edited meanwhile' WHERE id IN (2, 3)")
    connection.execute("UPDATE kb SET embedding = %s WHERE id = 3", (vector(OTHER, "edited meanwhile"),))
    connection.execute("UPDATE kb SET embedding = %s WHERE id = 2", (vector(OLD, "edited meanwhile"),))
    with steering(dsn) as migration:
        migration.run()
    check(connection, {"embedding": OLD, "embedding_g2": NEW})


def nearly_all_outside(connection: psycopg.Connection[Any], rows: int = 1600) -> None:
    """Eight rows a page, one of a hundred inside, and an index on the others."""
    connection.execute("CREATE TABLE kb (id int PRIMARY KEY, tenant text, content text, embedding vector, filler text)")
    with connection.cursor().copy("COPY kb FROM STDIN") as copy:
        for n in range(rows):
            mine = n % 100 == 0
            copy.write_row((n, "ab"[not mine], body(n), vector(OLD if mine else OTHER, body(n)), "x" * 800))
    connection.execute("CREATE INDEX kb_b ON kb USING hnsw ((embedding::vector(8)) vector_l2_ops) WHERE tenant = 'b'")
    connection.execute("VACUUM ANALYZE kb")


def test_rows_outside_are_copied_in_heap_order(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Their copying is nearly all the writing in a shared table: it is HOT, it shows, and the plan counts it."""
    nearly_all_outside(connection)
    seen: list[Observation] = []
    with steering(dsn, observe=seen.append) as migration:
        preview = migration.preview(INSIDE)
        assert preview.estimate.bytes_added > 1584 * 4 * 16
        migration.run(INSIDE)
    assert [o for o in seen if isinstance(o, Progress) and o.phase == "rows outside" and o.done == o.total]
    check(connection, {"embedding": OLD, "embedding_g2": NEW})

    def share() -> float:
        connection.execute("SELECT pg_stat_clear_snapshot()")
        return float(one(connection, "SELECT n_tup_hot_upd::float8 / greatest(n_tup_upd, 1) FROM pg_stat_user_tables"
                                     " WHERE relname = 'kb' AND n_tup_upd >= 1600 UNION ALL SELECT 0"))  # fmt: skip

    until(lambda: share() > 0.6)


def test_rows_outside_are_copied_as_fast_as_the_operator_allows(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A pause holds the copying, a stop during it is obeyed, and a limit of rows per second counts for it."""
    shared(connection, rows=120)
    copied = "SELECT count(embedding_g2) FROM kb WHERE tenant = 'b'"
    stop, notes = threading.Event(), []
    with pytest.raises(Halt), steering(dsn, observe=halting("backfill.sweep")) as migration:
        migration.run(INSIDE)
    connection.execute("""UPDATE revector.migrations SET limits = '{"paused": true}'""")

    def observe(seen: Observation) -> None:
        if isinstance(seen, Note) and "paused" in seen.text:
            notes.append(seen.text)
            assert one(connection, copied) == 0
            stop.set()

    with pytest.raises(Interrupted), Migration.open(
        settings(dsn), table="kb", observe=observe, stop=stop.is_set
    ) as migration:  # fmt: skip
        migration.run()
    assert notes
    connection.execute("""UPDATE revector.migrations SET limits = '{"max_rows_per_second": 40}'""")
    began = time.monotonic()
    with steering(dsn, observe=halting("backfill.outside")) as migration, pytest.raises(Halt):
        migration.run()
    assert one(connection, copied) == 60
    assert time.monotonic() - began > 1.0


def test_rows_move_in_and_out_under_writers_and_switches(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Three writers move and edit rows on both sides while the generations change places: all is exact at the end."""
    shared(connection)
    index(connection)
    stop, errors = threading.Event(), []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        with psycopg.connect(dsn, autocommit=True) as session:
            while not stop.wait(0.002):
                number, text = chance.randrange(40), f"text {chance.random()}"
                given = vector(OTHER, text)
                statement, values = chance.choice([
                    ("UPDATE kb SET tenant = 'b', content = %s, embedding = %s WHERE id = %s", (text, given, number)),
                    ("UPDATE kb SET tenant = 'a', content = %s, embedding = NULL WHERE id = %s", (text, number)),
                    ("UPDATE kb SET content = %s, embedding = embedding WHERE id = %s AND tenant = 'a'", (text, number)),
                    ("UPDATE kb SET content = %s, embedding = %s WHERE id = %s AND tenant = 'b'", (text, given, number)),
                    ("DELETE FROM kb WHERE id = %s AND id > 30", (number,)),
                    ("INSERT INTO kb (id, tenant, content, embedding) VALUES (%s, 'b', %s, %s)"
                     " ON CONFLICT (id) DO UPDATE SET tenant = 'b', content = excluded.content,"
                     " embedding = excluded.embedding", (number, text, given)),
                ])  # fmt: skip
                try:
                    session.execute(statement, values)
                except psycopg.Error as error:
                    errors.append(error)

    writers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in writers:
        thread.start()
    try:
        with steering(dsn) as migration:
            migration.run(replace(INSIDE, consents=Consents(include_null=True)))
        with following(dsn, connection):
            for name in ("cutover", "rollback", "cutover"):
                with steering(dsn) as migration:
                    getattr(migration, name)()
    finally:
        stop.set()
        for thread in writers:
            thread.join()
    assert errors == []
    settle(dsn, connection)
    check(connection, {"embedding": NEW, "embedding_g1": OLD})


def test_two_tenants_one_after_the_other(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Each filter has a model of its own on record, found under the bare name whichever column holds it."""
    shared(connection)
    advance(dsn, "CUT_OVER", INSIDE)
    with steering(dsn) as migration:
        migration.finalize()
        with pytest.raises(UsageError, match=r"which rows of kb\? revector knows the models of: tenant = 'a'"):
            migration.preview(Request(to="hash:64"))
        migration.run(Request(from_=OTHER, to="hash:64", where="tenant = 'b'"))
    with following(dsn, connection), steering(dsn) as migration:
        migration.cutover()
        migration.rollback()
        migration.cutover()
    settle(dsn, connection)
    check(connection, {"embedding": NEW}, "hash:64")
    with steering(dsn) as migration:
        migration.finalize()
    check(connection, {"embedding": NEW}, "hash:64")
    kept = [d for (d,) in connection.execute("SELECT indexdef FROM pg_indexes WHERE indexdef LIKE '%hnsw%'")]
    assert sorted(("tenant = 'a'" in d, "vector(32)" in d, "vector(64)" in d) for d in kept) == [
        (False, False, True),
        (True, True, False),
    ]
    database = Database(settings(dsn))
    for tenant, model in (("a", NEW), ("b", "hash:64")):
        with Searcher(database, settings(dsn), "kb", where=f"tenant = '{tenant}'") as searcher:
            found = searcher.search(body(6 if tenant == "a" else 7), k=1)
        assert (found.model, found.hits[0].id) == (model, "6" if tenant == "a" else "7")
    with pytest.raises(UsageError, match="which rows of kb"), Searcher(database, settings(dsn), "kb"):
        pass
    with steering(dsn) as migration:
        migration.run(Request(to="hash:24", where="tenant = 'a'"))
        migration.abort()
    check(connection, {"embedding": NEW}, "hash:64")


def test_a_declared_dimension_takes_rows_outside_only_without_a_vector(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    """A row outside with a vector would vanish at the switch: refused by plan, by cutover and by finalize."""
    shared(connection, "vector(16)", other=OLD)
    answer = command(dsn, "plan", "kb", "--from", OLD, "--to", NEW, "--where", "tenant = 'a'").exits(3)
    assert "20 rows outside have a vector" in " ".join(answer.out.split())
    connection.execute("UPDATE kb SET embedding = NULL WHERE tenant = 'b'")
    answer = command(dsn, "plan", "kb", "--from", OLD, "--to", NEW, "--where", "tenant = 'a'").exits(0)
    assert (
        answer.out.splitlines()[-1]
        == """next: revector run kb --from hash:16 --to hash:32 --where 'tenant = '"'"'a'"'"''"""
    )
    with steering(dsn) as migration:
        migration.run(INSIDE)
    check(connection, {"embedding": OLD, "embedding_g2": NEW}, None)
    assert one(connection, "SELECT count(*) FROM kb WHERE embedding_g2 IS NOT NULL") == 20
    connection.execute("UPDATE kb SET embedding = %s WHERE id = 1", (vector(OLD, body(1)),))
    with following(dsn, connection), steering(dsn) as migration:
        with pytest.raises(Refused, match="1 rows outside --where tenant = 'a' have a vector of hash:16 alone"):
            migration.cutover()
        connection.execute("UPDATE kb SET tenant = 'a' WHERE id = 1")
        connection.execute("UPDATE kb SET tenant = 'b' WHERE id = 2")
        migration.cutover()
    settle(dsn, connection)
    check(connection, {"embedding": NEW, "embedding_g1": OLD}, None)
    with steering(dsn) as migration:
        migration.finalize()
    assert_no_leftovers(connection)


class Salted(Hashing):
    """Another model of as many dimensions."""

    def encode(self, texts: Sequence[str], prompt: str, kind: str) -> Any:
        return super().encode([f"salt {text}" for text in texts], prompt, kind)


def test_a_declared_dimension_that_both_models_have(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One column type takes both models' vectors: rows outside keep their one vector there too, on both sides."""
    make, new = Embedder._make, "openai:salted"
    monkeypatch.setattr(Embedder, "_make", lambda self: Salted(16) if self.spec == new else make(self))
    embedder.cache_clear()
    shared(connection, "vector(16) NOT NULL", other=OLD)
    connection.execute("CREATE INDEX kb_all ON kb USING hnsw (embedding vector_l2_ops)")
    with steering(dsn) as migration:
        migration.run(Request(from_=OLD, to=new, where="tenant = 'a'"))
    check(connection, {"embedding": OLD, "embedding_g2": new}, OLD)
    for turn, name in enumerate(("cutover", "rollback", "cutover"), 1):
        with following(dsn, connection), steering(dsn) as migration:
            getattr(migration, name)(bare_writers_stopped=True)
        model = new if name == "cutover" else OLD
        for number, tenant, given in ((0, "a", model), (1, "b", OLD), (2, "b", OLD), (3, "a", model)):
            text = f"edited {turn}"
            connection.execute(
                "UPDATE kb SET tenant = %s, content = %s, embedding = %s WHERE id = %s",
                (tenant, text, vector(given, text), number),
            )
        settle(dsn, connection)
        other = {"embedding_g1": OLD} if name == "cutover" else {"embedding_g2": new}
        check(connection, {"embedding": model, **other}, OLD)
    with steering(dsn) as migration:
        migration.finalize()
    check(connection, {"embedding": new}, OLD)
    assert_no_leftovers(connection)
    assert "WHERE" not in one(connection, "SELECT pg_get_indexdef('kb_all'::regclass)")


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("tenant", "gives text, not boolean"),
        ("random() < 0.5", "is not IMMUTABLE"),
        ("embedding IS NOT NULL", "reads embedding, the vector column itself"),
        ("true", "reads no column of kb"),
        ("tenant = 'a'; DROP TABLE kb", "contains ';'"),
        ("nobody = 1", 'column "nobody" does not exist'),
        ("id IN (SELECT 1)", "uses a sub-query"),
    ],
)
def test_bad_filters_are_refused_by_name(dsn: str, connection: psycopg.Connection[Any], where: str, told: str) -> None:
    """What the filter may not be is said before anything is changed."""
    shared(connection, "vector(16)", other=None)
    answer = command(dsn, "plan", "kb", "--from", OLD, "--to", NEW, "--where", where).exits(2)
    assert told in " ".join(answer.err.split())


def test_another_filter_does_not_resume(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The filter is part of the open plan: an omitted one is the plan's, another one is refused."""
    shared(connection)
    advance(dsn, "EXPANDED", INSIDE)
    with steering(dsn) as migration:
        with pytest.raises(Refused, match="--where tenant = 'b' was not planned"):
            migration.run(Request(where="tenant = 'b'"))
        migration.run()
    check(connection, {"embedding": OLD, "embedding_g2": NEW})


def test_a_column_without_a_dimension_and_without_a_filter(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The candidate declares none either; its index casts to the new model's dimension."""
    shared(connection, other=OLD)
    connection.execute("CREATE INDEX kb_all ON kb USING hnsw ((embedding::vector(16)) vector_cosine_ops)")
    advance(dsn, "CUT_OVER", Request(from_=OLD, to=NEW))
    with Searcher(Database(settings(dsn)), settings(dsn), "kb") as searcher:
        assert searcher.search(body(9), k=1).hits[0].id == "9"
    with steering(dsn) as migration:
        migration.finalize()
    check(connection, {"embedding": NEW}, NEW)
    assert_no_leftovers(connection)
    assert "vector(32)" in one(connection, "SELECT pg_get_indexdef('kb_all'::regclass)")
