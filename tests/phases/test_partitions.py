"""Partitioned tables down every road: each row's vectors right in every leaf, and every leaf as it was afterwards."""

from __future__ import annotations

import logging
from typing import Any

import psycopg
import pytest

from fix_partitions import KINDS, partitioned, relations, shapes, written
from fix_tables import (
    NEW,
    OLD,
    REQUEST,
    Halt,
    advance,
    assert_exact,
    assert_no_leftovers,
    body,
    fill,
    following,
    one,
    steering,
    until,
    vector,
)
from revector import Request
from revector.errors import Refused
from revector.phases import backfill, index, verify
from revector.work import Note, Recorded

ROWS = 60


@pytest.fixture(autouse=True)
def _look_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LOOK_AGAIN", 0.5)


def exact(connection: psycopg.Connection[Any], **columns: str) -> None:
    assert_exact(connection, "docs", "content", columns, at_least=ROWS)


def clean(connection: psycopg.Connection[Any]) -> None:
    for name in relations(connection):
        assert_no_leftovers(connection, name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_road_under_a_writer(dsn: str, connection: psycopg.Connection[Any], kind: str) -> None:
    """Run, cutover, rollback, cutover, finalize, while rows are written and moved between partitions."""
    partitioned(connection, kind, ROWS)
    before = shapes(connection)
    with written(dsn, ROWS) as writer:
        with steering(dsn, "docs") as migration:
            migration.run(REQUEST)
        with following(dsn, connection, "docs"):
            for command in ("cutover", "rollback", "cutover"):
                with steering(dsn, "docs") as migration:
                    getattr(migration, command)()
                writer.guarded = True
        late = KINDS[kind][2]
        if late:
            connection.execute(late)
            add_late(connection)
        assert writer.done > 10
    fill(dsn, connection, "docs")
    exact(connection, embedding=NEW, embedding_g1=OLD)
    with steering(dsn, "docs") as migration:
        migration.finalize()
    exact(connection, embedding=NEW)
    clean(connection)
    after = shapes(connection)
    if late:
        assert after.pop("docs_late")["constraints"]
    assert {name: wider(told) for name, told in before.items()} == after


def add_late(connection: psycopg.Connection[Any]) -> None:
    connection.execute(
        "INSERT INTO docs (id, tenant, content, embedding) VALUES (5000, 9, %s, %s)",
        (body(5000), vector(NEW, body(5000))),
    )


def wider(told: dict[str, Any]) -> dict[str, Any]:
    """The same relation with the new model's dimension."""
    columns = [
        tuple(x.replace("vector(16)", "vector(32)") if isinstance(x, str) else x for x in c) for c in told["columns"]
    ]
    return {**told, "columns": sorted(columns, key=str)}


ROWS_MOVED = (
    # (stage, statement, writer's view) -> which vectors of (live, other) are kept
    ("VERIFIED", "UPDATE docs SET tenant = 1 WHERE id = 4", (True, True)),
    ("SERVED", "UPDATE docs SET tenant = 1 WHERE id = 4", (True, True)),
    ("SERVED", "UPDATE docs SET tenant = 1, content = 'new text' WHERE id = 4", (False, False)),
)


@pytest.mark.parametrize(("stage", "statement", "kept"), ROWS_MOVED)
def test_a_row_that_moves_keeps_its_vectors(
    dsn: str, connection: psycopg.Connection[Any], stage: str, statement: str, kept: tuple[bool, bool]
) -> None:
    """An UPDATE that moves a row is an INSERT in the other partition; NOT NULL was relaxed, so it raises nothing."""
    partitioned(connection, "list", ROWS)
    advance(dsn, stage, table="docs")
    fill(dsn, connection, "docs")
    before = connection.execute(
        "SELECT tableoid, embedding::text, embedding_g2::text FROM docs WHERE id = 4"
    ).fetchone()
    connection.execute(statement)
    after = connection.execute("SELECT tableoid, embedding::text, embedding_g2::text FROM docs WHERE id = 4").fetchone()
    assert before is not None and after is not None and before[0] != after[0]
    assert (before[1] == after[1], before[2] == after[2]) == kept
    assert after[1:] == tuple(old if same else None for old, same in zip(before[1:], kept, strict=True))
    fill(dsn, connection, "docs")
    exact(connection, embedding=OLD, embedding_g2=NEW)


@pytest.mark.parametrize("when", ["PLANNED", "SERVED"])
def test_a_row_moves_below_a_partition_that_came_later(
    dsn: str, connection: psycopg.Connection[Any], when: str
) -> None:
    """What is attached after the plan may be divided by another column: a row that moves there is still no new row."""
    partitioned(connection, "list", ROWS)
    advance(dsn, when, table="docs")
    connection.execute(
        "CREATE TABLE docs_came (LIKE docs INCLUDING DEFAULTS) PARTITION BY LIST (note);"
        "ALTER TABLE docs_came ALTER embedding DROP NOT NULL;"
        "CREATE TABLE docs_came_a PARTITION OF docs_came FOR VALUES IN ('');"
        "CREATE TABLE docs_came_b PARTITION OF docs_came FOR VALUES IN ('b')"
    )
    if when == "PLANNED":
        connection.execute("ALTER TABLE docs_came ALTER embedding SET NOT NULL")
    connection.execute("ALTER TABLE docs DROP CONSTRAINT docs_pkey")
    connection.execute("ALTER TABLE docs ATTACH PARTITION docs_came FOR VALUES IN (8)")
    for n in (8000, 8001):
        connection.execute(
            "INSERT INTO docs (id, tenant, content, embedding) VALUES (%s, 8, %s, %s)",
            (n, body(n), vector(OLD, body(n))),
        )
    if when == "PLANNED":
        advance(dsn, "SERVED", table="docs")
    fill(dsn, connection, "docs")
    connection.execute("UPDATE docs SET note = 'b' WHERE id = 8000")
    connection.execute("UPDATE docs SET note = 'b', content = 'another text' WHERE id = 8001")
    rows = connection.execute(
        "SELECT tableoid::regclass::text, embedding IS NULL, embedding_g2 IS NULL FROM docs WHERE id >= 8000 ORDER BY id"
    ).fetchall()
    assert rows == [("docs_came_b", False, False), ("docs_came_b", True, True)]
    fill(dsn, connection, "docs")
    exact(connection, embedding=OLD, embedding_g2=NEW)


def test_an_insert_after_a_moving_update_is_still_an_insert(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Only the moved row bears the mark: the same transaction's own INSERT without a vector is refused as before."""
    partitioned(connection, "list", ROWS)
    advance(dsn, "SERVED", table="docs")
    with psycopg.connect(dsn) as application:
        application.execute("UPDATE docs SET tenant = 3 WHERE id = 4")  # the key changed, the partition did not
        application.execute("UPDATE docs SET tenant = 1 WHERE id = 4")
        with pytest.raises(psycopg.errors.NotNullViolation):
            application.execute("INSERT INTO docs (id, tenant, content) VALUES (7000, 1, 'no vector')")
    with psycopg.connect(dsn, autocommit=True) as application:
        given = vector(OLD, "a text")
        application.execute(
            "INSERT INTO docs (id, tenant, content, embedding) VALUES (7001, 1, 'a text', %s)", (given,)
        )
    fill(dsn, connection, "docs")
    exact(connection, embedding=OLD, embedding_g2=NEW)


@pytest.mark.parametrize("stage", ["PLANNED", "EXPANDED", "BACKFILLED", "INDEXED", "SERVED"])
def test_abort_leaves_every_partition_as_it_was(dsn: str, connection: psycopg.Connection[Any], stage: str) -> None:
    partitioned(connection, "two levels", ROWS)
    before = shapes(connection)
    advance(dsn, stage, table="docs")
    with steering(dsn, "docs") as migration:
        migration.abort()
    exact(connection, embedding=OLD)
    clean(connection)
    assert shapes(connection) == before


def test_partitions_come_and_go_meanwhile(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A partition attached with rows is filled, one created is indexed, one detached is left alone."""
    partitioned(connection, "list", ROWS)
    advance(dsn, "BACKFILLED", table="docs")
    connection.execute("CREATE TABLE docs_came (LIKE docs INCLUDING DEFAULTS)")
    for n in (8000, 8001):
        connection.execute(
            "INSERT INTO docs_came (id, tenant, content, embedding) VALUES (%s, 8, %s, %s)",
            (n, body(n), vector(OLD, body(n))),
        )
    connection.execute("ALTER TABLE docs ATTACH PARTITION docs_came FOR VALUES IN (8)")
    advance(dsn, "VERIFIED", table="docs")
    exact(connection, embedding=OLD, embedding_g2=NEW)
    connection.execute("CREATE TABLE docs_late PARTITION OF docs FOR VALUES IN (9)")
    connection.execute("ALTER TABLE docs DETACH PARTITION docs_p2")
    advance(dsn, "CUT_OVER", table="docs")
    connection.execute(
        "INSERT INTO docs (id, tenant, content, embedding) VALUES (9000, 9, 'late', %s)", (vector(NEW, "late"),)
    )
    fill(dsn, connection, "docs")
    assert_exact(connection, "docs", "content", {"embedding": NEW, "embedding_g1": OLD}, at_least=ROWS // 2)
    with steering(dsn, "docs") as migration:
        migration.finalize()
    clean(connection)
    # What was detached keeps its rows with the old vectors; our indexes on it are gone.
    assert_exact(connection, "docs_p2", "content", {"embedding": OLD})
    left = connection.execute(
        "SELECT relname FROM pg_class WHERE relname ~ '^rv_' AND relkind IN ('i', 'I')"
    ).fetchall()
    assert left == []
    for part in ("docs_came", "docs_late"):
        on = connection.execute("SELECT indexdef FROM pg_indexes WHERE tablename = %s", (part,)).fetchall()
        assert sum("hnsw" in definition for (definition,) in on) == 1


def test_a_table_without_partitions(dsn: str, connection: psycopg.Connection[Any]) -> None:
    connection.execute(
        "CREATE TABLE docs (id int, tenant int, content text, note text, embedding vector(16)) PARTITION BY LIST (tenant)"
    )
    advance(dsn, "CUT_OVER", table="docs")
    connection.execute("CREATE TABLE docs_p0 PARTITION OF docs FOR VALUES IN (0)")
    connection.execute(
        "INSERT INTO docs (id, tenant, content, embedding) VALUES (1, 0, 'first', %s)", (vector(NEW, "first"),)
    )
    fill(dsn, connection, "docs")
    assert_exact(connection, "docs", "content", {"embedding": NEW, "embedding_g1": OLD})
    with steering(dsn, "docs") as migration:
        migration.finalize()
    clean(connection)


def refusal(dsn: str, table: str = "docs", request: Request = REQUEST) -> str:
    with steering(dsn, table) as migration, pytest.raises(Refused) as caught:
        migration.run(request)
    return f"{caught.value} {caught.value.why} {caught.value.hint}"


def test_a_partition_by_itself_is_refused(dsn: str, connection: psycopg.Connection[Any]) -> None:
    partitioned(connection, "two levels", ROWS)
    assert "docs_p2_a is a partition of public.docs" in refusal(dsn, "docs_p2_a")
    assert "name the whole table: public.docs" in refusal(dsn, "docs_p2")


def test_a_foreign_partition_is_refused(dsn: str, connection: psycopg.Connection[Any]) -> None:
    partitioned(connection, "list", ROWS)
    connection.execute("CREATE FOREIGN DATA WRAPPER nowhere; CREATE SERVER far FOREIGN DATA WRAPPER nowhere")
    connection.execute("DROP INDEX docs_embedding_idx; ALTER TABLE docs DROP CONSTRAINT docs_pkey")
    connection.execute("CREATE FOREIGN TABLE docs_far PARTITION OF docs FOR VALUES IN (7) SERVER far")
    with steering(dsn, "docs") as migration:
        found = [f for f in migration.preview(REQUEST).draft.blockers if f.title == "table"]
    assert "docs_far" in found[0].finding and "DETACH PARTITION docs_far" in found[0].remedy


def test_what_one_partition_has_alone_is_refused(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """It would stay on the old column in that partition, and nobody would see it."""
    partitioned(connection, "list", ROWS)
    connection.execute("CREATE INDEX alone ON docs_p1 USING hnsw (embedding vector_l2_ops)")
    told = refusal(dsn)
    assert "index public.alone of partition docs_p1" in told and "ATTACH PARTITION" in told
    connection.execute("DROP INDEX alone; ALTER TABLE docs_p1 ADD CONSTRAINT long CHECK (vector_dims(embedding) > 3)")
    assert "constraint long on table public.docs_p1 of partition docs_p1" in refusal(dsn)


def test_index_numbers_of_one_partition_are_told(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """An attached index may have been built with other numbers than the table's; the new one has the table's everywhere."""
    partitioned(connection, "two levels", ROWS, index=False)
    connection.execute(
        "CREATE INDEX ON docs_p1 USING hnsw (embedding vector_cosine_ops) WITH (m = 8, ef_construction = 32)"
    )
    connection.execute("CREATE INDEX ON docs_p2_a USING hnsw (embedding vector_cosine_ops)")
    with steering(dsn, "docs") as migration:
        connection.execute(
            "CREATE INDEX docs_embedding_idx ON docs USING hnsw (embedding vector_cosine_ops)"
            " WITH (ef_construction = 32, m = 8)"
        )
        told = [f for f in migration.preview(REQUEST).draft.findings if f.title == "partition indexes"]
    assert len(told) == 1 and told[0].ok is None
    assert told[0].finding == "built with options of their own: docs_embedding_idx on docs_p2_a (default parameters)"


def test_a_trigger_of_one_partition_that_sorts_last_is_refused(dsn: str, connection: psycopg.Connection[Any]) -> None:
    partitioned(connection, "list", ROWS)
    connection.execute(
        "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
        'CREATE TRIGGER "~~late" BEFORE UPDATE ON docs_p1 FOR EACH ROW EXECUTE FUNCTION touch()'
    )
    assert 'ALTER TRIGGER "~~late" ON docs_p1 RENAME' in refusal(dsn)
    connection.execute('DROP TRIGGER "~~late" ON docs_p1')
    advance(dsn, "BACKFILLED", table="docs")
    connection.execute('CREATE TRIGGER "~~late" BEFORE UPDATE ON docs_p1 FOR EACH ROW EXECUTE FUNCTION touch()')
    assert "docs_p1: the trigger ~rv_docs_g2 is no longer the last to fire" in refusal(dsn)


def test_the_text_of_a_partition_may_stand_elsewhere(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Attribute numbers differ from partition to partition; nothing is read by the table's number there."""
    partitioned(connection, "list", ROWS)
    numbers = connection.execute(
        "SELECT DISTINCT attnum FROM pg_attribute WHERE attname = 'content' AND attrelid = ANY (%s)",
        ([connection.execute("SELECT %s::regclass::oid", (n,)).fetchone()[0] for n in ("docs_p0", "docs_p1")],),  # type: ignore[index]
    ).fetchall()
    assert len(numbers) == 2
    advance(dsn, "VERIFIED", table="docs")
    exact(connection, embedding=OLD, embedding_g2=NEW)


@pytest.mark.parametrize("command", ["run", "abort"])
@pytest.mark.parametrize("after", [0, 1, 2, 4])
def test_an_index_left_half_built_is_completed_or_dropped(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, after: int, command: str
) -> None:
    """The end may come between any two partitions: each run looks first at what is there and attached."""
    partitioned(connection, "two levels", ROWS)
    before = shapes(connection)
    advance(dsn, "BACKFILLED", table="docs")
    briefly, turns = index._briefly, iter(range(after))

    def halting(*arguments: Any) -> None:
        if next(turns, None) is None:
            raise Halt
        briefly(*arguments)

    with monkeypatch.context() as patch, steering(dsn, "docs") as migration, pytest.raises(Halt):
        patch.setattr(index, "_briefly", halting)
        migration.run(REQUEST)
    if command == "run":
        advance(dsn, "VERIFIED", table="docs")
        exact(connection, embedding=OLD, embedding_g2=NEW)
    with steering(dsn, "docs") as migration:
        migration.abort()
    clean(connection)
    assert shapes(connection) == before


def test_a_busy_partition_delays_its_index_and_is_named(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """An open transaction on one partition makes an attempt miss the budget; nobody waits longer than that for us."""
    partitioned(connection, "list", ROWS)
    advance(dsn, "BACKFILLED", table="docs")
    told: list[str] = []
    with psycopg.connect(dsn) as application:

        def observe(seen: Any) -> None:
            if isinstance(seen, Note):
                told.append(seen.text)
                if "was busy" in seen.text:
                    application.rollback()
            # CREATE INDEX CONCURRENTLY waits for older transactions: the application comes once it is done.
            if isinstance(seen, Recorded) and seen.step == "index.build":
                application.execute("SELECT count(*) FROM docs")

        with steering(dsn, "docs", observe) as migration:
            migration.run(REQUEST)
    assert any("was busy" in text and "In the way: session" in text for text in told)
    exact(connection, embedding=OLD, embedding_g2=NEW)


@pytest.mark.parametrize("how", ["ALTER TABLE docs DETACH PARTITION docs_p0", "DROP TABLE docs_p0"])
@pytest.mark.parametrize("when", ["windows", "encode"])
def test_a_partition_that_goes_while_it_is_filled(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, how: str, when: str
) -> None:
    """Between cutting and reading, or reading and writing: nothing more is written to it, and the rest goes on."""
    partitioned(connection, "list", ROWS)
    encode, gone = backfill.encode, []

    def going() -> None:
        if not gone:
            gone.append(connection.execute(how))

    def encoding(*arguments: Any) -> Any:
        if when == "encode":
            going()
        return encode(*arguments)

    def observe(seen: Any) -> None:
        if when == "windows" and isinstance(seen, Recorded) and seen.step == "backfill.windows":
            going()

    monkeypatch.setattr(backfill, "encode", encoding)
    with steering(dsn, "docs", observe) as migration:
        migration.run(REQUEST)
    assert gone
    assert_exact(connection, "docs", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=20)
    if "DETACH" in how:
        assert one(connection, "SELECT count(embedding_g2) FROM docs_p0") == 0
    with steering(dsn, "docs") as migration:
        migration.abort()
    clean(connection)


@pytest.mark.parametrize("command", ["follow", "cutover"])
def test_a_partition_dropped_while_pending_rows_are_filled(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Two partitions wait, and the second is dropped while the first one's rows are embedded: the walk goes on."""
    partitioned(connection, "list", ROWS)
    advance(dsn, "SERVED", table="docs")
    connection.execute("UPDATE docs SET content = content || ' again'")
    encode, gone = backfill.encode, []

    def encoding(*arguments: Any) -> Any:
        if not gone:
            gone.append(connection.execute("DROP TABLE docs_p2"))
        return encode(*arguments)

    monkeypatch.setattr(backfill, "encode", encoding)
    columns = {"embedding": OLD, "embedding_g2": NEW}
    if command == "follow":
        with following(dsn, connection, "docs"):
            until(lambda: gone and not one(connection, "SELECT count(*) FROM docs WHERE embedding_g2 IS NULL"))
    else:
        with steering(dsn, "docs") as migration:
            migration.cutover(without_follower=True)
        columns = {"embedding": NEW, "embedding_g1": OLD}
    assert gone
    assert_exact(connection, "docs", "content", columns, at_least=20)


@pytest.mark.parametrize("reads", ["blocks", "read_vectors", "moved"])
def test_a_partition_dropped_while_old_vectors_are_compared(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    """`--refresh-old` reads every partition: one that goes before such a read is nobody's any more."""
    partitioned(connection, "list", ROWS)
    stale = one(connection, "SELECT embedding::text FROM docs WHERE id = 4")
    connection.execute("UPDATE docs SET embedding = %s WHERE id = 8", (stale,))
    advance(dsn, "SERVED", table="docs")
    block, gone = backfill.block, []

    def dropping(module: str, name: str, **parts: Any) -> Any:
        if name == reads and (name == "blocks" or "docs_p2" in str(parts["table"])) and not gone:
            gone.append(connection.execute("DROP TABLE docs_p2"))
        return block(module, name, **parts)

    monkeypatch.setattr(backfill, "block", dropping)
    with steering(dsn, "docs") as migration:
        migration.cutover(without_follower=True, refresh_old=True)
    assert gone
    assert_exact(connection, "docs", "content", {"embedding": NEW, "embedding_g1": OLD}, at_least=20)


def test_a_partition_attached_with_not_null_is_refused_by_cutover(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    """From SERVED on an edited row has no vector for a moment: NOT NULL in one partition would be the writer's error."""
    partitioned(connection, "list", ROWS)
    advance(dsn, "SERVED", table="docs")
    connection.execute("CREATE TABLE docs_came (LIKE docs INCLUDING DEFAULTS)")
    connection.execute("ALTER TABLE docs_came ALTER embedding SET NOT NULL")
    connection.execute("ALTER TABLE docs ATTACH PARTITION docs_came FOR VALUES IN (8)")
    with steering(dsn, "docs") as migration, pytest.raises(Refused) as caught:
        migration.cutover(without_follower=True)
    assert "embedding is NOT NULL in partition docs_came" in str(caught.value)
    connection.execute(caught.value.hint.split(";")[0])
    with steering(dsn, "docs") as migration:
        migration.cutover(without_follower=True)
        migration.finalize()
    assert one(
        connection,
        "SELECT bool_and(attnotnull) FROM pg_attribute WHERE attname = 'embedding' AND attrelid IN"
        " (SELECT relid FROM pg_partition_tree('docs'))",
    )
    exact(connection, embedding=NEW)
    clean(connection)


def test_plan_shows_the_statements_of_every_partition(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """What `plan` prints for the index phase is what `run` then executes, as a set."""
    partitioned(connection, "two levels", ROWS)
    with steering(dsn, "docs") as migration:
        told = {statement for phase, statement in migration.preview(REQUEST).statements if phase == "index"}
        assert any("ON ONLY" in s for s in told)
        assert any(s.startswith("ALTER INDEX") and "rv_docs_p2_a_g2_1" in s for s in told)
    advance(dsn, "BACKFILLED", table="docs")
    executed: list[str] = []

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            executed.append(record.getMessage())

    logger, handler = logging.getLogger("revector.sql"), Told()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        advance(dsn, "INDEXED", table="docs")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    sent = "\n".join(executed)
    assert [statement for statement in told if statement not in sent] == []
