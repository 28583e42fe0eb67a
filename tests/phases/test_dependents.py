"""What hangs on the vector column goes with its name, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from fix_partitions import partitioned, relations
from fix_tables import (
    NEW,
    OLD,
    REQUEST,
    add_rows,
    advance,
    assert_exact,
    assert_no_leftovers,
    fill,
    knowledge_base,
    oid_of,
    one,
    shape,
    steering,
    vector,
)
from revector.carried import conditions, templated
from revector.errors import Refused
from revector.phases import verify


@pytest.fixture(autouse=True)
def _look_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LOOK_AGAIN", 0.3)


@pytest.fixture
def reader(connection: psycopg.Connection[Any]) -> Iterator[str]:
    """A role that may read single columns."""
    name = f"reader_{connection.info.dbname}"
    connection.execute(f"CREATE ROLE {name}")
    yield name
    connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")
    connection.execute("DROP TABLE IF EXISTS kb CASCADE")
    connection.execute(f"DROP TABLESPACE IF EXISTS {name}")


def everything(connection: psycopg.Connection[Any], reader: str) -> None:
    """A table with all that can be carried."""
    knowledge_base(connection, 60, more=", tenant int NOT NULL DEFAULT 1")
    for statement in (
        "CREATE INDEX kb_tenant ON kb (tenant) WHERE embedding IS NOT NULL",
        "CREATE INDEX kb_cover ON kb (id) INCLUDE (embedding) WITH (fillfactor = 80)",
        'CREATE INDEX "kb norm" ON kb ((vector_norm(embedding)), title DESC)',
        "CREATE INDEX kb_inner ON kb USING hnsw (embedding vector_ip_ops) WITH (m = 8)",
        "CREATE INDEX kb_half ON kb USING hnsw ((embedding::halfvec(16)) halfvec_l2_ops)",
        "COMMENT ON INDEX kb_tenant IS 'by tenant'",
        "COMMENT ON INDEX kb_embedding_idx IS 'for search'",
        "ALTER TABLE kb ADD CONSTRAINT kb_unit CHECK (vector_norm(embedding) > 0.9)",
        "ALTER TABLE kb ADD CONSTRAINT kb_later CHECK (vector_norm(embedding) < 9) NOT VALID",
        "COMMENT ON COLUMN kb.embedding IS 'of the content'",
        "COMMENT ON CONSTRAINT kb_unit ON kb IS 'unit vectors'",
        "COMMENT ON CONSTRAINT kb_embedding_not_null ON kb IS 'always there'",
        'ALTER INDEX "kb norm" ALTER COLUMN 1 SET STATISTICS 333',
        "ALTER INDEX kb_half ALTER COLUMN 1 SET STATISTICS 9",
        'ALTER TABLE kb CLUSTER ON "kb norm"',
        "SET allow_in_place_tablespaces = on",
        f"CREATE TABLESPACE {reader} LOCATION ''",
        *(f"ALTER INDEX {name} SET TABLESPACE {reader}" for name in ("kb_tenant", "kb_cover", "kb_half")),
        "ALTER TABLE kb ADD CONSTRAINT kb_asserted CHECK (vector_norm(embedding) < 8) NOT ENFORCED",
        "ALTER TABLE kb ALTER embedding SET STATISTICS 77",
        "ALTER TABLE kb ALTER embedding SET STORAGE EXTENDED",
        "ALTER TABLE kb ALTER embedding SET COMPRESSION pglz",
        "ALTER TABLE kb ALTER embedding SET (n_distinct = -0.5)",
        f"GRANT SELECT (id, embedding), UPDATE (embedding) ON kb TO {reader}",
        "CREATE POLICY everybody ON kb USING (tenant > 0)",
        "CREATE VIEW titles AS SELECT id, title FROM kb",
    ):
        connection.execute(statement)


def complete(connection: psycopg.Connection[Any], table: str = "kb") -> dict[str, Any]:
    """All of it as sets; the vector type aside, which is to change, and the columns' order."""
    told = {name: {json.dumps(row, default=str) for row in rows} for name, rows in shape(connection, table).items()}
    parameters = {"t": oid_of(connection, table)}
    more = {
        "settings": "SELECT attname, attcompression::text, attoptions::text FROM pg_attribute"
        " WHERE attrelid = %(t)s::oid AND attnum > 0 AND NOT attisdropped",
        "defaults": "SELECT a.attname, pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef d"
        " JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum WHERE d.adrelid = %(t)s::oid",
        "policies": "SELECT polname, pg_get_expr(polqual, polrelid) FROM pg_policy WHERE polrelid = %(t)s::oid",
        "index comments": "SELECT c.relname, obj_description(c.oid, 'pg_class') FROM pg_index i"
        " JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = %(t)s::oid",
        "constraint comments": "SELECT conname, obj_description(oid, 'pg_constraint') FROM pg_constraint"
        " WHERE conrelid = %(t)s::oid",
        "index properties": "SELECT c.relname, i.indisclustered, i.indisreplident, t.spcname, c.reloptions::text,"
        " ARRAY(SELECT a.attstattarget FROM pg_attribute a WHERE a.attrelid = c.oid ORDER BY a.attnum)"
        " FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid LEFT JOIN pg_tablespace t ON t.oid = c.reltablespace"
        " WHERE i.indrelid = %(t)s::oid",
        "grants": "SELECT relacl::text FROM pg_class WHERE oid = %(t)s::oid",
    }
    for name, query in more.items():
        told[name] = {json.dumps(row, default=str) for row in connection.execute(query, parameters).fetchall()}
    return told


def widened(told: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {row.replace("vector(16)", "vector(32)").replace("halfvec(16)", "halfvec(32)") for row in rows}
        for name, rows in told.items()
    }


@contextmanager
def without_scans(connection: psycopg.Connection[Any]) -> Iterator[None]:
    connection.execute("SET enable_seqscan = off")
    yield
    connection.execute("RESET enable_seqscan")


def used(connection: psycopg.Connection[Any], query: str) -> str:
    with without_scans(connection):
        return json.dumps(one(connection, f"EXPLAIN (FORMAT JSON) {query}"))


def test_everything_is_carried(dsn: str, connection: psycopg.Connection[Any], reader: str) -> None:
    """Before the run and after finalize the table is the same, as sets; the queries that used an index use it again."""
    everything(connection, reader)
    before = complete(connection)
    with steering(dsn) as migration:
        told = [f.finding for f in migration.preview(REQUEST).draft.findings if f.title == "dependents"]
        migration.run(REQUEST)
    assert told == [
        "carried with embedding: index kb norm, index kb_cover, index kb_tenant, CHECK kb_asserted, CHECK kb_later,"
        " CHECK kb_unit,"
        f" statistics target 77, STORAGE EXTENDED, COMPRESSION pglz, n_distinct=-0.5, SELECT for {reader}, UPDATE for {reader}"
    ]
    tenants = "SELECT id FROM kb WHERE tenant = 1 AND embedding IS NOT NULL"
    half = f"SELECT id FROM kb ORDER BY embedding::halfvec(32) <-> '{vector(NEW, 'x')}' LIMIT 3"
    with steering(dsn) as migration:
        migration.cutover(without_follower=True)
    assert '"kb_tenant"' in used(connection, tenants) and '"kb_half"' in used(connection, half)
    with steering(dsn) as migration:
        migration.rollback(without_follower=True)
    assert '"kb_tenant"' in used(connection, tenants), used(connection, tenants)
    now = complete(connection)
    for name in ("index comments", "constraint comments", "index properties", "constraints"):
        assert before[name] - now[name] <= {row for row in before[name] if "not_null" in row}, name
    with steering(dsn) as migration:
        migration.cutover(without_follower=True)
    connection.execute("UPDATE kb SET content = 'edited' WHERE id = 5")
    with pytest.raises(psycopg.errors.CheckViolation, match="kb_unit"):
        connection.execute(f"UPDATE kb SET embedding = '[{','.join(['0.01'] * 32)}]' WHERE id = 6")
    fill(dsn, connection)
    with steering(dsn) as migration:
        migration.finalize()
    assert_exact(connection, "kb", "content", {"embedding": NEW}, at_least=60)
    assert_no_leftovers_but(connection)
    after, wanted = complete(connection), widened(before)
    assert {name: after[name] ^ wanted[name] for name in wanted if after[name] != wanted[name]} == {}
    assert "'edited'" not in "".join(map(str, after.values()))


def test_everything_of_a_partitioned_table_is_carried(
    dsn: str, connection: psycopg.Connection[Any], reader: str
) -> None:
    """The table and each of its partitions are the same at the end, as sets."""
    partitioned(connection, "list", 60)
    for statement in (
        "CREATE INDEX docs_tenant ON docs (tenant) WHERE embedding IS NOT NULL",
        "CREATE INDEX docs_norm ON docs ((vector_norm(embedding)), note DESC)",
        "COMMENT ON INDEX docs_tenant IS 'by tenant'",
        "COMMENT ON INDEX docs_embedding_idx IS 'for search'",
        "ALTER TABLE docs ADD CONSTRAINT docs_unit CHECK (vector_norm(embedding) > 0.9)",
        "COMMENT ON CONSTRAINT docs_unit ON docs IS 'unit vectors'",
        "COMMENT ON CONSTRAINT docs_embedding_not_null ON docs IS 'always there'",
        "COMMENT ON COLUMN docs.embedding IS 'of the content'",
        "ALTER TABLE docs ALTER embedding SET STATISTICS 77",
        "ALTER TABLE docs ALTER embedding SET STORAGE EXTENDED",
        f"GRANT SELECT (id, embedding) ON docs TO {reader}",
    ):
        connection.execute(statement)
    before = {name: complete(connection, name) for name in relations(connection)}
    with steering(dsn, "docs") as migration:
        migration.run(REQUEST)
        migration.cutover(without_follower=True)
        migration.rollback(without_follower=True)
        migration.cutover(without_follower=True)
        migration.finalize()
    assert_no_leftovers(connection, "docs")
    for name, was in before.items():
        after, wanted = complete(connection, name), widened(was)
        assert {n: after[n] ^ wanted[n] for n in wanted if after[n] != wanted[n]} == {}, name


OF_ONE_PARTITION = {
    "GRANT SELECT (embedding) ON docs_p0 TO {reader}": "SELECT for {reader} of partition docs_p0",
    "ALTER TABLE docs_p0 ALTER embedding SET STATISTICS 78": "statistics target 78 of partition docs_p0",
    "ALTER TABLE docs_p0 ALTER embedding SET STORAGE MAIN": "STORAGE MAIN of partition docs_p0",
    "ALTER TABLE docs_p0 ALTER embedding SET (n_distinct = -0.5)": "n_distinct=-0.5 of partition docs_p0",
    "COMMENT ON COLUMN docs_p0.embedding IS 'old years'": "comment of column embedding of partition docs_p0",
    "COMMENT ON INDEX docs_p0_embedding_idx IS 'part'": "comment of index docs_p0_embedding_idx of partition docs_p0",
    "COMMENT ON CONSTRAINT docs_embedding_not_null ON docs_p0 IS 'x'": (
        "comment of constraint docs_embedding_not_null of partition docs_p0"),
}  # fmt: skip


@pytest.mark.parametrize("statement", OF_ONE_PARTITION)
def test_what_one_partition_has_set_is_refused_by_name(
    dsn: str, connection: psycopg.Connection[Any], reader: str, statement: str
) -> None:
    partitioned(connection, "list", 12)
    connection.execute("ALTER TABLE docs ALTER embedding SET STATISTICS 77")
    connection.execute(statement.format(reader=reader))
    with steering(dsn, "docs") as migration:
        (found,) = migration.preview(REQUEST).draft.blockers
    assert found.finding == OF_ONE_PARTITION[statement].format(reader=reader)
    assert found.remedy == "unset it in docs_p0, and set it there again after finalize"


def assert_no_leftovers_but(connection: psycopg.Connection[Any]) -> None:
    """`kb_later` was NOT VALID before, and is so still."""
    assert one(connection, "SELECT NOT convalidated FROM pg_constraint WHERE conname = 'kb_later'")
    connection.execute("ALTER TABLE kb VALIDATE CONSTRAINT kb_later")
    assert_no_leftovers(connection, keep=["kb_asserted"])
    connection.execute("ALTER TABLE kb DROP CONSTRAINT kb_later")
    connection.execute("ALTER TABLE kb ADD CONSTRAINT kb_later CHECK (vector_norm(embedding) < 9) NOT VALID")


@pytest.mark.parametrize("stage", ["EXPANDED", "INDEXED", "SERVED"])
def test_abort_leaves_the_table_as_it_was(
    dsn: str, connection: psycopg.Connection[Any], reader: str, stage: str
) -> None:
    everything(connection, reader)
    before = complete(connection)
    advance(dsn, stage)
    fill(dsn, connection)
    with steering(dsn) as migration:
        migration.abort()
    assert complete(connection) == before
    assert_no_leftovers_but(connection)


REFUSED = {
    "CREATE VIEW vectors AS SELECT id, embedding FROM kb": ("view public.vectors", "drop the view or rule"),
    "CREATE UNIQUE INDEX kb_unique ON kb (embedding)": ("index public.kb_unique", "drop it: two rows may have the same text"),
    "CREATE INDEX kb_partial ON kb USING hnsw (embedding vector_l2_ops) WHERE embedding IS NOT NULL": (
        "index public.kb_partial", "a vector index never holds NULLs"),
    "CREATE INDEX kb_bits ON kb USING hnsw ((binary_quantize(embedding)::bit(16)) bit_hamming_ops)": (
        "index public.kb_bits", "for the new dimension"),
    "ALTER TABLE kb ADD CHECK (vector_dims(embedding) = 16)": ("constraint kb_embedding_check", "refuses the new model's"),
    "CREATE FUNCTION narrow(v vector) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$BEGIN"
    " IF public.vector_dims(v) <> 16 THEN RAISE 'only 16'; END IF; RETURN true; END$$;"
    "ALTER TABLE kb ADD CHECK (narrow(embedding))": ("constraint kb_embedding_check", "refuses the new model's"),
    "ALTER TABLE kb ADD CHECK (embedding IS NOT NULL)": ("constraint kb_embedding_check", "refuses NULL"),
    "ALTER TABLE kb ADD CHECK (title = 'draft' OR embedding IS NOT NULL)": ("constraint kb_check", "reads other columns"),
    "ALTER TABLE kb ADD norm float8 GENERATED ALWAYS AS (vector_norm(embedding)) STORED": (
        "default value for column norm", "generated column"),
    "ALTER TABLE kb ALTER embedding SET DEFAULT array_fill(0.1, ARRAY[16])::vector": ("default value", "drop the default"),
    "CREATE POLICY p ON kb USING (embedding IS NOT NULL)": ("policy p", "write the policy without"),
    "CREATE STATISTICS s ON id, embedding FROM kb": ("statistics object public.s", "drop the statistics"),
    "CREATE FUNCTION pg_temp_f() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(embedding) FROM kb; END": (
        "function public.pg_temp_f()", "body in quotes"),
    "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
    "CREATE TRIGGER on_vector BEFORE UPDATE OF embedding ON kb FOR EACH ROW EXECUTE FUNCTION touch()": (
        "trigger on_vector", "without embedding in UPDATE OF"),
    "ALTER TABLE kb ADD CONSTRAINT kb_once EXCLUDE USING btree (embedding WITH =, id WITH =)": (
        "constraint kb_once", 'DROP CONSTRAINT "kb_once"'),
    "ALTER TABLE kb ADD CONSTRAINT kb_once EXCLUDE USING btree ((vector_norm(embedding)) WITH =, id WITH =)": (
        "index public.kb_once", 'DROP CONSTRAINT "kb_once"'),
    "CREATE PUBLICATION p FOR TABLE kb": ("publication p", "column list without the vector column"),
}  # fmt: skip


@pytest.mark.parametrize("statement", REFUSED, ids=[REFUSED[s][0] + str(n) for n, s in enumerate(REFUSED)])
def test_what_cannot_be_carried_is_refused_by_name(
    dsn: str, connection: psycopg.Connection[Any], statement: str
) -> None:
    knowledge_base(connection, 20)
    connection.execute(statement)
    what, remedy = REFUSED[statement]
    with steering(dsn) as migration, pytest.raises(Refused) as caught:
        migration.run(REQUEST)
    told = f"{caught.value} {caught.value.why} {caught.value.hint}"
    assert what in told and remedy in told, told
    assert one(connection, "SELECT to_regnamespace('revector') IS NULL")


def test_an_invalid_vector_index_is_refused_by_plan(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """CREATE INDEX CONCURRENTLY that failed leaves one; cutover would refuse it after the whole run."""
    knowledge_base(connection, 20)
    connection.execute("CREATE INDEX kb_second ON kb USING hnsw (embedding vector_l2_ops) WHERE id > 3")
    connection.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'kb_second'::regclass")
    with steering(dsn) as migration:
        (found,) = migration.preview(REQUEST).draft.blockers
        assert "kb_second" in found.finding
        assert 'REINDEX INDEX CONCURRENTLY "public"."kb_second"' in found.remedy
        assert 'DROP INDEX "public"."kb_second"' in found.remedy
        connection.execute('REINDEX INDEX CONCURRENTLY "public"."kb_second"')
        migration.run(REQUEST)
        migration.cutover(without_follower=True)


def test_a_partitioned_index_that_is_not_everywhere_is_refused(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Its numbers and its metric were replaced by the defaults."""
    partitioned(connection, "list", 20, index=False)
    connection.execute("CREATE INDEX docs_l2 ON ONLY docs USING hnsw (embedding vector_l2_ops) WITH (m = 8)")
    with steering(dsn, "docs") as migration:
        (found,) = migration.preview(REQUEST).draft.blockers
    assert "docs_l2" in found.finding
    assert 'DROP INDEX "public"."docs_l2"' in found.remedy
    assert 'ALTER INDEX "public"."docs_l2" ATTACH PARTITION' in found.remedy


def test_plain_storage_is_carried_only_where_it_fits(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 10)
    connection.execute("ALTER TABLE kb ALTER embedding SET STORAGE PLAIN")
    with steering(dsn) as migration:
        wide = migration.preview(replace(REQUEST, to="hash:1024"))
        assert not wide.draft.blockers
        assert any("STORAGE PLAIN" in f.finding and "fit its page" in f.finding for f in wide.draft.findings)
        migration.run(REQUEST)
    assert one(connection, "SELECT attstorage FROM pg_attribute WHERE attname = 'embedding_g2'") == "p"


def test_column_order_is_told(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 10, more=", tenant int")
    with steering(dsn) as migration:
        assert any(
            f.title == "column order" and "embedding is the last column" in f.finding
            for f in migration.preview(REQUEST).draft.findings
        )


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("btree (tenant) WHERE (embedding IS NOT NULL)", "btree (tenant) WHERE ({column} IS NOT NULL)"),
        ("btree (public.embedding(embedding))", "btree (public.embedding({column}))"),
        ("btree (title) WHERE (title <> 'embedding'::text)", "btree (title) WHERE (title <> 'embedding'::text)"),
        ('btree ("embedding", x."embedding")', 'btree ({column}, x."embedding")'),
        ("btree (a) INCLUDE (embedding, embedding_old)", "btree (a) INCLUDE ({column}, embedding_old)"),
        ("btree ((a)::embedding)", "btree ((a)::embedding)"),
    ],
)
def test_only_the_column_itself_is_replaced(expression: str, wanted: str) -> None:
    assert templated(expression, "embedding") == wanted


def test_two_migrations_one_after_the_other(dsn: str, connection: psycopg.Connection[Any], reader: str) -> None:
    """What was carried once is carried again."""
    everything(connection, reader)
    before = complete(connection)
    for request in (REQUEST, type(REQUEST)(to=OLD)):
        with steering(dsn) as migration:
            migration.run(request)
            migration.cutover(without_follower=True)
            migration.finalize()
    assert complete(connection) == before
    add_rows(connection, range(900, 905), OLD)


@pytest.mark.parametrize(
    ("predicate", "wanted"),
    [
        ("((tenant = 'a'::text))", {"tenant = 'a'::text"}),
        ("((tenant = 'a) AND ('::text) AND (id > 3))", {"tenant = 'a) AND ('::text", "id > 3"}),
        ("(((a) AND (b)) AND c)", {"a", "b", "c"}),
        ("((a AND b) OR (c))", {"(a AND b) OR (c)"}),
        ("(lower(a) = ANY (b))", {"lower(a) = ANY (b)"}),
    ],
)
def test_what_a_predicate_asks_for(predicate: str, wanted: set[str]) -> None:
    assert conditions(predicate) == wanted


@pytest.mark.parametrize(
    ("statement", "warned"),
    [
        ("CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.embedding := NEW.embedding; RETURN NEW; END';"
         "CREATE TRIGGER a BEFORE INSERT ON kb FOR EACH ROW EXECUTE FUNCTION f()", True),
        ("CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.embedding := NULL; RETURN NEW; END'", False),
        ("CREATE FUNCTION f() RETURNS SETOF kb LANGUAGE sql AS 'SELECT * FROM kb'", True),
        ("CREATE FUNCTION f() RETURNS SETOF kb LANGUAGE sql AS 'SELECT k.* FROM kb AS k'", True),
        ("CREATE FUNCTION f() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) /* of all */ FROM kb'", False),
        ("CREATE FUNCTION f() RETURNS bigint LANGUAGE sql AS 'SELECT count(embedding) FROM kb'", True),
    ],
)  # fmt: skip
def test_functions_that_only_their_text_ties_to_the_column(
    dsn: str, connection: psycopg.Connection[Any], statement: str, warned: bool
) -> None:
    knowledge_base(connection, 10)
    connection.execute(statement)
    with steering(dsn) as migration:
        drafted = migration.preview(REQUEST).draft
    assert not drafted.blockers
    assert [
        f.finding.startswith("public.f() name(s) embedding") for f in drafted.findings if f.title == "functions"
    ] == ([True] if warned else [])
