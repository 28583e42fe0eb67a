"""A knowledge base from nothing: the printed DDL, `init`, and `load` under cutovers, bad lines and odd names."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from fix_tables import assert_exact, embedder, oid_of, one, settings
from revector import Embedder
from revector.db import Database
from revector.embed import Identity, Refusal
from revector.errors import GateFailed, Interrupted, ModelChanged, Refused, RevectorError, UsageError
from revector.knowledge_base import RESERVED, Loaded, ddl, init, load, split_name
from revector.ledger import Ledger
from revector.work import Note, Observation, Progress

NAMES = ["Weird Table", "select", "x" * 63, "ü" * 31, "50% off", "it's {0}", 'app."Docs"', "app.docs"]


def database(dsn: str) -> Database:
    return Database(settings(dsn))


def written(path: Path, documents: Iterable[object]) -> Path:
    lines = [d if isinstance(d, bytes) else json.dumps(d).encode() for d in documents]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def document(number: int, text: str | None = None, **more: object) -> dict[str, object]:
    told = {"_id": f"d{number}", "title": f"Title {number}", "text": text or f"text {number} of subject {number % 7}"}
    return {**told, "metadata": {"n": number}, **more}


def loaded(dsn: str, path: Path, table: str = "kb", **options: Any) -> Loaded:
    return load(database(dsn), by_name, table, path, **options)


def by_name(identity: Identity) -> Embedder:
    return embedder(identity.model)


def shape(connection: psycopg.Connection[Any], table: str) -> list[tuple[Any, ...]]:
    """Columns, constraints and indexes, as the server prints them."""
    oid = connection.execute("SELECT to_regclass(%s)::oid", (table,)).fetchone()
    return connection.execute(
        "SELECT 'column', attname, format_type(atttypid, atttypmod), attnotnull::text,"
        "       (SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = attrelid AND adnum = attnum)"
        "  FROM pg_attribute WHERE attrelid = %(t)s::oid AND attnum > 0"
        " UNION ALL SELECT 'constraint', conname, pg_get_constraintdef(oid), '', ''"
        "  FROM pg_constraint WHERE conrelid = %(t)s::oid"
        " UNION ALL SELECT 'index', '', pg_get_indexdef(indexrelid), indisvalid::text, ''"
        "  FROM pg_index WHERE indrelid = %(t)s::oid"
        " ORDER BY 1, 2, 3",
        {"t": oid[0] if oid else None},
    ).fetchall()


def add_generation(connection: psycopg.Connection[Any], dsn: str, model: str, table: str = "kb") -> None:
    """A second generation beside the live one, as after a backfill; the model's vectors of the rows that are there."""
    new = embedder(model)
    oid = oid_of(connection, table)
    name = sql.Identifier(table)
    connection.execute(
        sql.SQL("ALTER TABLE {} ADD embedding_g2 vector({})").format(name, new.get_embedding_dimension())
    )
    for id_, content in connection.execute(sql.SQL("SELECT id, content FROM {}").format(name)).fetchall():
        connection.execute(
            sql.SQL("UPDATE {} SET embedding_g2 = %s WHERE id = %s").format(name),
            (str(new.encode([content])[0].tolist()), id_),
        )
    attnum = one(connection, "SELECT attnum FROM pg_attribute WHERE attrelid = %s AND attname = 'embedding_g2'", oid)
    with database(dsn).connect() as session:
        Ledger(session, oid).register(2, attnum, "content", new.identity(), live=False)


def flip(connection: psycopg.Connection[Any], table: str = "kb") -> None:
    """What cutover and rollback do to names and ledger, in one transaction."""
    name = sql.Identifier(table)
    with connection.transaction():
        connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(name))
        live = one(
            connection,
            "SELECT number FROM revector.generations WHERE live AND table_oid = %s",
            oid_of(connection, table),
        )
        rename = sql.SQL("ALTER TABLE {} RENAME COLUMN {} TO {}")
        connection.execute(rename.format(name, sql.Identifier("embedding"), sql.Identifier(f"embedding_g{live}")))
        connection.execute(rename.format(name, sql.Identifier(f"embedding_g{3 - live}"), sql.Identifier("embedding")))
        connection.execute(
            "UPDATE revector.generations SET live = NOT live WHERE table_oid = %s", (oid_of(connection, table),)
        )


class Meddling(Embedder):
    """An embedder during whose work something happens; it refuses every text that says so."""

    def __init__(self, spec: str, meanwhile: Callable[[], None] = lambda: None, times: int = 1) -> None:
        super().__init__(spec)
        self.meanwhile, self.times = meanwhile, times
        self.seen: list[list[str]] = []

    def encode_isolating(self, texts: Any, **options: Any) -> Any:
        self.seen.append(list(texts))
        if self.times > 0:
            self.times -= 1
            self.meanwhile()
        vectors, refused = super().encode_isolating(texts, **options)
        return vectors, refused | {i: Refusal("too_long", "too long") for i, t in enumerate(texts) if "REFUSE" in t}


# -- schema and init --------------------------------------------------------------------------------------------------


def test_the_printed_ddl_reads_like_written_by_hand() -> None:
    assert ddl(384, "ivfflat", table="select") == (
        "CREATE EXTENSION IF NOT EXISTS vector;\n\n"
        'CREATE TABLE "select" (\n'
        "    id text PRIMARY KEY,\n"
        "    title text,\n"
        "    content text NOT NULL,\n"
        "    metadata jsonb NOT NULL DEFAULT '{}',\n"
        "    embedding vector(384)\n"
        ");\n\n"
        "-- IVFFlat learns its lists from the rows that are there: best created after the first load.\n"
        'CREATE INDEX select_embedding_idx ON "select"\n'
        "    USING ivfflat (embedding vector_cosine_ops) WITH (lists = 100);\n"
    )
    assert (
        "ON knowledge_base\n    USING hnsw (embedding vector_cosine_ops) WITH (m = 16, ef_construction = 64);"
        in ddl(768)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("index", ["hnsw", "ivfflat"])
def test_init_and_load_make_what_the_ddl_says(
    dsn: str, connection: psycopg.Connection, tmp_path: Path, name: str, index: Any
) -> None:
    """The same columns, constraints and index, whichever way and whatever the name."""
    connection.execute("CREATE SCHEMA app")
    with pytest.MonkeyPatch.context() as quiet:
        quiet.setenv("PGOPTIONS", "-c client_min_messages=error")
        with psycopg.connect(dsn, autocommit=True) as psql:
            psql.execute(ddl(16, index, 5, name))
    schema, relation = split_name(name)
    full_name = sql.Identifier(*([schema] if schema else ["public"]), relation)
    printed = shape(connection, full_name.as_string(None))
    connection.execute(sql.SQL("DROP TABLE {}").format(full_name))
    made = init(database(dsn), embedder("hash:16"), name, index=index, lists=5)
    assert (made.schema, made.table, made.model, made.dimension) == (schema or "public", relation, "hash:16", 16)
    assert made.index_built == (index == "hnsw")
    done = loaded(dsn, written(tmp_path / "f.jsonl", map(document, range(30))), name)
    assert (done.rows, done.replaced, done.refused, done.model) == (30, 0, (), "hash:16")
    assert done.index == (None if index == "hnsw" else "ivfflat (lists=5)")
    assert shape(connection, full_name.as_string(None)) == printed
    assert_exact(connection, full_name, "content", {"embedding": "hash:16"}, at_least=30)


def test_reserved_words_are_the_servers(connection: psycopg.Connection) -> None:
    words = connection.execute("SELECT word FROM pg_get_keywords() WHERE catcode IN ('R', 'T')").fetchall()
    assert {w for (w,) in words} <= RESERVED


@pytest.mark.parametrize("name", ["", ".", "a.", '"a', 'a"b', '"a"."b"."c"', "y" * 64, "ü" * 32, "a\0"])
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        split_name(name)


def test_names_are_read_as_other_commands_read_them() -> None:
    assert split_name("Weird Table") == (None, "Weird Table")
    assert split_name("App.Docs") == ("App", "Docs")
    assert split_name('App."D.""x"') == ("app", 'D."x')
    assert split_name('"Docs"') == (None, "Docs")


def test_more_dimensions_than_an_index_takes_are_refused(dsn: str, connection: psycopg.Connection) -> None:
    with pytest.raises(Refused, match="at most 2000 dimensions, not 2001"):
        ddl(2001)
    with pytest.raises(Refused, match="at most 2000 dimensions, not 2001"):
        init(database(dsn), Embedder("hash:2001"), "kb")
    with pytest.raises(UsageError, match="1 to 32768 lists"):
        ddl(384, "ivfflat", 0)
    assert one(connection, "SELECT to_regclass('kb')") is None


def test_init_refuses_what_exists_and_says_what_it_is(dsn: str, connection: psycopg.Connection) -> None:
    init(database(dsn), embedder("hash:16"), "kb")
    connection.execute("CREATE TABLE vectors (id int, embedding vector(3))")
    connection.execute("CREATE VIEW seen AS SELECT 1 AS one")
    connection.execute("CREATE INDEX other_embedding_idx ON vectors (id)")
    for name, what, hint in (
        ("kb", "kb exists already: a table in schema public", "revector load kb FILE.jsonl"),
        (
            "vectors",
            "vectors exists already: a table in schema public",
            "revector plan vectors --from MODEL --to MODEL",
        ),
        ("seen", "seen exists already: a view in schema public", "revector init OTHER_NAME"),
        ("other", "other_embedding_idx exists already: an index in schema public", "revector init OTHER_NAME"),
    ):
        with pytest.raises(Refused) as refused:
            init(database(dsn), embedder("hash:16"), name)
        assert str(refused.value) == what
        assert hint in refused.value.hint
        assert "Nothing was changed." in refused.value.why
    assert one(connection, "SELECT count(*) FROM revector.generations") == 1
    with pytest.raises(UsageError, match="there is no schema 'nowhere'"):
        init(database(dsn), embedder("hash:16"), "nowhere.kb")


def test_init_is_all_or_nothing(dsn: str, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr(Ledger, "event", broken)
    connection.execute("DROP EXTENSION vector")
    with pytest.raises(Interrupted):
        init(database(dsn), embedder("hash:16"), "kb")
    assert one(connection, "SELECT to_regclass('kb')") is None
    assert one(connection, "SELECT to_regnamespace('revector')") is None
    assert one(connection, "SELECT count(*) FROM pg_extension WHERE extname = 'vector'") == 0
    monkeypatch.undo()
    assert init(database(dsn), embedder("hash:16"), "kb").extension_created
    assert not init(database(dsn), embedder("hash:16"), "kb2").extension_created


def test_init_stands_where_the_search_path_says(dsn: str, connection: psycopg.Connection) -> None:
    """The default schema is the user's, and pgvector may live in another one."""
    connection.execute(
        "DROP EXTENSION vector; CREATE SCHEMA ext; CREATE EXTENSION vector SCHEMA ext; CREATE SCHEMA app"
    )
    connection.execute(
        sql.SQL("ALTER DATABASE {} SET search_path = nowhere, app, public").format(
            sql.Identifier(one(connection, "SELECT current_database()"))
        )
    )
    assert init(database(dsn), embedder("hash:16"), "kb").schema == "app"
    assert one(connection, "SELECT to_regclass('app.kb') IS NOT NULL")


def test_without_the_right_the_command_for_it_is_told(dsn: str, connection: psycopg.Connection) -> None:
    user = f"rv_poor_{one(connection, 'SELECT pg_backend_pid()')}"
    init(database(dsn), embedder("hash:16"), "first")
    connection.execute("DROP TABLE first; DROP EXTENSION vector")
    connection.execute(
        sql.SQL(
            "CREATE ROLE {0} LOGIN; GRANT ALL ON SCHEMA revector TO {0}; GRANT ALL ON ALL TABLES IN SCHEMA revector TO {0}"
        ).format(sql.Identifier(user))
    )
    poor = psycopg.conninfo.make_conninfo(dsn, user=user)
    name = one(connection, "SELECT current_database()")
    try:
        with pytest.raises(Refused) as refused:
            init(database(poor), embedder("hash:16"), "kb")
        assert str(refused.value) == f"pgvector is not installed in database {name}, and {user} may not install it"
        assert refused.value.hint == f"as a superuser of database {name}: CREATE EXTENSION vector;"
        connection.execute("CREATE EXTENSION vector")
        with pytest.raises(Refused) as refused:
            init(database(poor), embedder("hash:16"), "kb")
        assert refused.value.hint == f"as the owner of the schema: GRANT CREATE ON SCHEMA public TO {user}"
    finally:
        connection.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(user)))


# -- load -------------------------------------------------------------------------------------------------------------


def test_the_same_id_replaces(dsn: str, connection: psycopg.Connection, tmp_path: Path) -> None:
    init(database(dsn), embedder("hash:16"), "kb")
    first = [document(n) for n in range(600)]
    assert loaded(dsn, written(tmp_path / "f.jsonl", first), batch_size=7).rows == 600
    again = [document(n, f"edited {n}", title=None, metadata={"again": [n]}) for n in range(590, 610)]
    again.append(document(609, "the last one counts"))
    done = loaded(dsn, written(tmp_path / "g.jsonl", again))
    assert (done.rows, done.replaced) == (21, 11)
    assert one(connection, "SELECT count(*) FROM kb") == 610
    row = connection.execute("SELECT title, content, metadata FROM kb WHERE id = 'd595'").fetchone()
    assert row == (None, "edited 595", {"again": [595]})
    row = connection.execute("SELECT title, content, metadata FROM kb WHERE id = 'd609'").fetchone()
    assert row == ("Title 609", "Title 609\nthe last one counts", {"n": 609})
    assert_exact(connection, "kb", "content", {"embedding": "hash:16"}, at_least=610)
    done = loaded(dsn, tmp_path / "f.jsonl")
    assert (done.rows, done.replaced) == (600, 600)
    assert_exact(connection, "kb", "content", {"embedding": "hash:16"}, at_least=610)


def test_gzip_blank_lines_byte_order_mark_and_no_last_newline(
    dsn: str, connection: psycopg.Connection, tmp_path: Path
) -> None:
    init(database(dsn), embedder("hash:16"), "kb")
    path = tmp_path / "f.jsonl.gz"
    told = b"\xef\xbb\xbf" + b"\r\n\n".join(json.dumps(d, ensure_ascii=False).encode() for d in map(document, range(5)))
    path.write_bytes(gzip.compress(told + b'\n{"_id": 7, "text": "a \xe2\x80\xa8 b \\u20ac \\\\u0000"}'))
    seen: list[Observation] = []
    assert loaded(dsn, path, observe=seen.append).rows == 6
    assert one(connection, "SELECT content FROM kb WHERE id = '7'") == "a \u2028 b € \\u0000"
    progress = [o for o in seen if isinstance(o, Progress)]
    assert (progress[-1].phase, progress[-1].done, progress[-1].unit) == ("load", 6, "rows")
    assert progress[-1].total >= 6


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "not JSON"),
        (b"[1]", "a list, not a JSON object"),
        (b"null", "null, not a JSON object"),
        (b'{"text": "x"}', "no '_id'"),
        (b'{"_id": "a"}', "no 'text'"),
        (b'{"_id": "", "text": "x"}', "'_id' is empty"),
        (b'{"_id": true, "text": "x"}', "'_id' is true or false, not a string"),
        (b'{"_id": "a", "text": ["x"]}', "'text' is a list, not a string"),
        (b'{"_id": "a", "text": "x", "title": 5}', "'title' is a number, not a string"),
        (b'{"_id": "a", "text": "x", "metadata": "m"}', "'metadata' is a string, not an object"),
        (b'{"_id": "a", "text": "x", "metadata": {"m": NaN}}', "NaN is not JSON"),
        (b'{"_id": "a", "text": "x", "metadata": {"m": 1e999}}', "a number in 'metadata' is too large"),
        (b'{"_id": "a", "text": "x\\u0000"}', "the character U+0000"),
        (b'{"_id": "a", "text": "x", "metadata": {"m": "\\\\\\u0000"}}', "the character U+0000"),
        (b'{"_id": "a", "text": "x\\ud800"}', "half a surrogate pair"),
        (b'{"_id": "a", "text": "x", "metadata": {"m": "\\ud800"}}', "half a surrogate pair"),
        (b'{"_id": "a", "text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_and_the_rows_before_it_stay(
    dsn: str, connection: psycopg.Connection, tmp_path: Path, line: bytes, problem: str
) -> None:
    init(database(dsn), embedder("hash:16"), "kb")
    path = written(tmp_path / "f.jsonl", [document(1), document(2), line, document(3)])
    with pytest.raises(UsageError) as error:
        loaded(dsn, path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert problem in str(error.value)
    assert error.value.why.endswith("2 rows are loaded and stay.")
    assert one(connection, "SELECT count(*) FROM kb") == 2


def test_a_damaged_archive_is_an_error_with_its_line(dsn: str, tmp_path: Path) -> None:
    init(database(dsn), embedder("hash:16"), "kb")
    path = tmp_path / "f.jsonl.gz"
    whole = gzip.compress(b"".join(json.dumps(document(n)).encode() + b"\n" for n in range(5000)))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cannot be read after line") as error:
        loaded(dsn, path)
    assert "rows are loaded and stay" in error.value.why
    (tmp_path / "g.jsonl.gz").write_bytes(b"no archive")
    with pytest.raises(UsageError, match="cannot be read after line 0"):
        loaded(dsn, tmp_path / "g.jsonl.gz")
    with pytest.raises(UsageError, match="there is no file"):
        loaded(dsn, tmp_path / "none.jsonl")


def test_what_the_table_refuses_is_named(dsn: str, connection: psycopg.Connection, tmp_path: Path) -> None:
    init(database(dsn), embedder("hash:16"), "kb")
    connection.execute("ALTER TABLE kb ADD CONSTRAINT short CHECK (length(content) < 50)")
    path = written(tmp_path / "f.jsonl", [document(1), document(2, "long " * 20)])
    with pytest.raises(
        UsageError, match=r'kb refuses a document of lines 1 to 2: .* violates check constraint "short"'
    ):
        loaded(dsn, path)
    assert one(connection, "SELECT count(*) FROM kb") == 0


def test_refused_texts_are_told_and_the_others_loaded(dsn: str, connection: psycopg.Connection, tmp_path: Path) -> None:
    init(database(dsn), embedder("hash:16"), "kb")
    loaded(dsn, written(tmp_path / "f.jsonl", [document(3)]))
    model = Meddling("hash:16")
    documents = [document(n, "REFUSE this" if n in (3, 5) else None) for n in range(10)]
    done = load(database(dsn), lambda _: model, "kb", written(tmp_path / "g.jsonl", documents), batch_size=4)
    assert (done.rows, done.replaced, dict(done.refused).keys()) == (8, 0, {"d3", "d5"})
    assert one(connection, "SELECT array_agg(id ORDER BY id) FROM kb") == [f"d{n}" for n in range(10) if n != 5]
    assert one(connection, "SELECT content FROM kb WHERE id = 'd3'") == "Title 3\ntext 3 of subject 3"
    with pytest.raises(GateFailed, match="hash:16 has no vector for 2 of 10 documents") as error:
        done.require_all()
    assert "d3 (too_long)" in error.value.why
    assert "d5 (too_long)" in error.value.why
    assert max(map(len, model.seen)) == 4
    loaded(dsn, tmp_path / "f.jsonl").require_all()


@pytest.mark.parametrize("other", ["hash:32", "hash:16"])
def test_a_cutover_between_embedding_and_writing_embeds_again(
    dsn: str, connection: psycopg.Connection, tmp_path: Path, other: str
) -> None:
    """No vector of the old model gets into the new model's column; equal dimensions would hide it."""
    init(database(dsn), embedder("hash:16"), "kb")
    loaded(dsn, written(tmp_path / "f.jsonl", map(document, range(10))))
    add_generation(connection, dsn, other)
    if other == "hash:16":  # equal dimensions: only the ledger tells the two apart
        connection.execute(
            "UPDATE revector.generations SET model = jsonb_set(model, '{model}', '\"other\"') WHERE number = 2"
        )
    with psycopg.connect(dsn, autocommit=True) as second:
        old = Meddling("hash:16", lambda: flip(second))
        new = Meddling(other)
        seen: list[Observation] = []
        done = load(
            database(dsn),
            lambda identity: old if identity.model == "hash:16" else new,
            "kb",
            written(tmp_path / "g.jsonl", map(document, range(5, 15))),
            observe=seen.append,
        )
    assert len(old.seen) == len(new.seen) == 1
    assert (done.rows, done.replaced, done.model) == (10, 5, "other" if other == "hash:16" else other)
    assert any(isinstance(o, Note) and "answers now" in o.text for o in seen)
    assert_exact(connection, "kb", "content", {"embedding": other}, at_least=15)
    assert one(connection, "SELECT count(*) FROM kb WHERE embedding_g1 IS NULL") == 5


def test_cutovers_during_a_long_load(dsn: str, connection: psycopg.Connection, tmp_path: Path) -> None:
    """Back and forth at any moment: every row has exactly the vector of the model whose column it was written to."""
    init(database(dsn), embedder("hash:16"), "kb")
    add_generation(connection, dsn, "hash:32")
    path = written(tmp_path / "f.jsonl", map(document, range(6000)))
    stop, flips = threading.Event(), 0
    with psycopg.connect(dsn, autocommit=True) as second:

        def flipping() -> None:
            nonlocal flips
            while not stop.wait(0.15):
                flip(second)
                flips += 1

        thread = threading.Thread(target=flipping)
        thread.start()
        try:
            done = loaded(dsn, path)
        finally:
            stop.set()
            thread.join()
        if one(connection, "SELECT number FROM revector.generations WHERE live") == 2:
            flip(second)
    assert done.rows == 6000
    assert flips
    rows = connection.execute("SELECT content, embedding IS NULL, embedding_g2 IS NULL FROM kb").fetchall()
    assert all(a != b for _, a, b in rows), "each row was written once, by one model"
    for column, model in (("embedding", "hash:16"), ("embedding_g2", "hash:32")):
        assert_exact(connection, "kb", f"CASE WHEN {column} IS NOT NULL THEN content END", {column: model}, at_least=0)


def test_another_model_behind_the_name_is_refused(dsn: str, connection: psycopg.Connection, tmp_path: Path) -> None:
    init(database(dsn), embedder("hash:16"), "kb")
    with pytest.raises(ModelChanged) as error:
        load(database(dsn), lambda _: embedder("hash:32"), "kb", written(tmp_path / "f.jsonl", [document(1)]))
    assert "loaded" not in error.value.why
    assert one(connection, "SELECT count(*) FROM kb") == 0


def test_ivfflat_is_built_once_after_the_first_load(dsn: str, connection: psycopg.Connection, tmp_path: Path) -> None:
    init(database(dsn), embedder("hash:16"), "kb", index="ivfflat", lists=3)
    empty = written(tmp_path / "empty.jsonl", [])
    assert loaded(dsn, empty).index is None, "there is nothing to learn from yet"
    path = written(tmp_path / "f.jsonl", map(document, range(50)))
    with database(dsn).connect() as other:
        assert other.try_lock("steer", oid_of(connection))
        seen: list[Observation] = []
        assert loaded(dsn, path, observe=seen.append).index is None
        assert "is not built" in " ".join(o.text for o in seen if isinstance(o, Note))
    assert loaded(dsn, path).index == "ivfflat (lists=3)"
    assert loaded(dsn, path).index is None
    index = "SELECT indexdef FROM pg_indexes WHERE indexname = 'kb_embedding_idx'"
    assert one(connection, index).endswith("USING ivfflat (embedding vector_cosine_ops) WITH (lists='3')")
    assert one(connection, "SELECT count(*) FROM pg_indexes WHERE tablename = 'kb'") == 2


def test_ivfflat_left_unfinished_is_built_again(dsn: str, connection: psycopg.Connection, tmp_path: Path) -> None:
    init(database(dsn), embedder("hash:16"), "kb", index="ivfflat", lists=3)
    path = written(tmp_path / "f.jsonl", map(document, range(50)))
    wanted = one(connection, "SELECT wanted_index::text FROM revector.generations")
    loaded(dsn, path)
    old = one(connection, "SELECT 'kb_embedding_idx'::regclass::oid")
    connection.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s", (old,))
    connection.execute("UPDATE revector.generations SET wanted_index = %s", (wanted,))
    assert loaded(dsn, path).index == "ivfflat (lists=3)"
    assert one(connection, "SELECT 'kb_embedding_idx'::regclass::oid") != old
    assert one(connection, "SELECT indisvalid FROM pg_index WHERE indexrelid = 'kb_embedding_idx'::regclass")


def test_somebody_elses_index_of_that_name_stays(dsn: str, connection: psycopg.Connection, tmp_path: Path) -> None:
    init(database(dsn), embedder("hash:16"), "kb", index="ivfflat", lists=3)
    connection.execute("CREATE INDEX kb_embedding_idx ON kb (title)")
    with pytest.raises(
        Refused, match=r"public.kb_embedding_idx exists and is not the index that init promised"
    ) as error:
        loaded(dsn, written(tmp_path / "f.jsonl", map(document, range(5))))
    assert "5 rows are loaded and stay." in error.value.why
    connection.execute("DROP INDEX kb_embedding_idx")
    assert loaded(dsn, tmp_path / "f.jsonl").index


def test_stopping_keeps_what_was_written(dsn: str, connection: psycopg.Connection, tmp_path: Path) -> None:
    init(database(dsn), embedder("hash:16"), "kb")
    path = written(tmp_path / "f.jsonl", map(document, range(2000)))
    seen: list[Progress] = []
    with pytest.raises(Interrupted) as error:
        loaded(dsn, path, observe=seen.append, stop=lambda: bool(seen) and seen[-1].done > 700)
    rows = one(connection, "SELECT count(*) FROM kb")
    assert rows in (512, 768)
    assert error.value.why == f"{rows} rows are loaded and stay."
    assert error.value.hint == f"the same command again: revector load kb {path}"
    assert loaded(dsn, path).rows == 2000
    assert [o.total for o in seen] == [2000] * len(seen)


def test_tables_that_load_cannot_write_to(dsn: str, connection: psycopg.Connection, tmp_path: Path) -> None:
    path = written(tmp_path / "f.jsonl", [document(1)])
    connection.execute("CREATE TABLE other (id text, embedding vector(16))")

    def refusal(table: str) -> RevectorError:
        with pytest.raises(RevectorError) as error:
            loaded(dsn, path, table)
        return error.value

    assert isinstance(refusal("other"), Refused)
    assert "revector init OTHER_NAME" in refusal("other").hint
    init(database(dsn), embedder("hash:16"), "kb")
    assert str(refusal("other")) == "revector does not know other"
    assert refusal("nowhere").hint == "create it: revector init nowhere"
    connection.execute("ALTER TABLE kb DROP COLUMN title, DROP COLUMN metadata")
    assert str(refusal("kb")) == "kb has no column title, metadata"
    assert isinstance(refusal("kb"), UsageError)
    connection.execute("ALTER TABLE kb ADD title text, ADD metadata jsonb, DROP CONSTRAINT kb_pkey")
    assert str(refusal("kb")) == "kb.id is not unique"


def test_two_loads_at_once(dsn: str, connection: psycopg.Connection, tmp_path: Path) -> None:
    """The same ids in opposite order: neither waits for the other in a circle."""
    init(database(dsn), embedder("hash:16"), "kb")
    documents = [document(n) for n in range(2000)]
    paths = [written(tmp_path / "f.jsonl", documents), written(tmp_path / "g.jsonl", documents[::-1])]
    failed: list[BaseException] = []

    def work(path: Path) -> None:
        try:
            loaded(dsn, path)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert_exact(connection, "kb", "content", {"embedding": "hash:16"}, at_least=2000)
