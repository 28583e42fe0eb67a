"""The trigger's truth table, row by row: what each statement of each writer leaves in each generation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import sql

from fix_tables import (
    NEW,
    OLD,
    REQUEST,
    add_rows,
    advance,
    assert_exact,
    fill,
    knowledge_base,
    literal,
    one,
    steering,
    vector,
)
from revector import Request
from revector.errors import Refused
from revector.plan import own_name

NUMBERS = itertools.count(10_000)
#: What a column holds after a statement.
GIVEN, PENDING, KEPT = "given", "NULL", "old"


@dataclass(frozen=True)
class Case:
    """Statements of one writer, and what they leave: (own, other) when guarded, (live, candidate) before SERVED."""

    name: str
    statements: tuple[str, ...]
    served: tuple[str, str]
    expanded: tuple[str, str]
    #: `SET name = value` before them.
    setting: str = ""
    #: Whether the row exists before.
    exists: bool = True


COPY = "COPY {table} (id, content, {own}, {other}) FROM STDIN"
INSERT = "INSERT INTO {table} (id, content, {own}, {other}) VALUES (%(id)s, %(new)s, %(own)s, %(other)s)"
CASES = [
    Case("INSERT, both given", (INSERT,), (GIVEN, PENDING), (GIVEN, PENDING), exists=False),
    Case("INSERT, own given", ("INSERT INTO {table} (id, content, {own}) VALUES (%(id)s, %(new)s, %(own)s)",),
         (GIVEN, PENDING), (GIVEN, PENDING), exists=False),
    Case("INSERT, none given", ("INSERT INTO {table} (id, content) VALUES (%(id)s, %(new)s)",),
         (PENDING, PENDING), (PENDING, PENDING), exists=False),
    Case("INSERT, the other's given", ("INSERT INTO {table} (id, content, {other}) VALUES (%(id)s, %(new)s, %(other)s)",),
         (PENDING, PENDING), (PENDING, PENDING), exists=False),
    Case("INSERT under replica", (INSERT,), (GIVEN, GIVEN), (GIVEN, GIVEN), "session_replication_role = replica", exists=False),
    Case("COPY", (COPY,), (GIVEN, PENDING), (GIVEN, PENDING), exists=False),
    Case("COPY under replica", (COPY,), (GIVEN, GIVEN), (GIVEN, GIVEN), "session_replication_role = replica", exists=False),
    Case("ON CONFLICT, insert part", (INSERT + " ON CONFLICT (id) DO UPDATE SET content = excluded.content",),
         (GIVEN, PENDING), (GIVEN, PENDING), exists=False),
    Case("ON CONFLICT, update part with own vector",
         (INSERT + " ON CONFLICT (id) DO UPDATE SET content = excluded.content, {own} = excluded.{own},"
          " {other} = excluded.{other}",),
         (GIVEN, PENDING), (GIVEN, PENDING)),
    Case("ON CONFLICT, update part with the text alone",
         (INSERT + " ON CONFLICT (id) DO UPDATE SET content = excluded.content",), (PENDING, PENDING), (KEPT, PENDING)),
    Case("ON CONFLICT, update part with the same text",
         (INSERT + " ON CONFLICT (id) DO UPDATE SET content = {table}.content",), (KEPT, KEPT), (KEPT, KEPT)),
    Case("MERGE, insert part",
         ("MERGE INTO {table} AS t USING (VALUES (%(id)s, %(new)s, %(own)s::vector, %(other)s::vector)) AS s (id, text, a, b)"
          " ON t.id = s.id"
          " WHEN MATCHED THEN UPDATE SET content = s.text, {own} = s.a"
          " WHEN NOT MATCHED THEN INSERT (id, content, {own}, {other}) VALUES (s.id, s.text, s.a, s.b)",),
         (GIVEN, PENDING), (GIVEN, PENDING), exists=False),
    Case("MERGE, update part",
         ("MERGE INTO {table} AS t USING (VALUES (%(id)s, %(new)s, %(own)s::vector, %(other)s::vector)) AS s (id, text, a, b)"
          " ON t.id = s.id"
          " WHEN MATCHED THEN UPDATE SET content = s.text, {own} = s.a, {other} = s.b WHEN NOT MATCHED THEN DO NOTHING",),
         (GIVEN, PENDING), (GIVEN, PENDING)),
    Case("text and own vector changed", ("UPDATE {table} SET content = %(new)s, {own} = %(own)s WHERE id = %(id)s",),
         (GIVEN, PENDING), (GIVEN, PENDING)),
    Case("text changed alone", ("UPDATE {table} SET content = %(new)s WHERE id = %(id)s",),
         (PENDING, PENDING), (KEPT, PENDING)),
    Case("text changed, own vector set to the same value",
         ("UPDATE {table} SET content = %(new)s, {own} = {own} WHERE id = %(id)s",), (PENDING, PENDING), (KEPT, PENDING)),
    Case("full-row save of a new text",
         ("UPDATE {table} SET id = id, title = title, content = %(new)s, note = note, filler = filler, {own} = {own},"
          " {other} = {other} WHERE id = %(id)s",), (PENDING, PENDING), (KEPT, PENDING)),
    Case("full-row save of a new text with its vector and a stale other",
         ("UPDATE {table} SET id = id, title = title, content = %(new)s, note = note, filler = filler, {own} = %(own)s,"
          " {other} = %(other)s WHERE id = %(id)s",), (GIVEN, PENDING), (GIVEN, PENDING)),
    Case("text changed, the other's vector in the SET list",
         ("UPDATE {table} SET content = %(new)s, {other} = %(other)s WHERE id = %(id)s",), (PENDING, PENDING), (KEPT, PENDING)),
    Case("re-embedding: own vector changed", ("UPDATE {table} SET {own} = %(own)s WHERE id = %(id)s",),
         (GIVEN, KEPT), (GIVEN, KEPT)),
    Case("the other's vector changed", ("UPDATE {table} SET {other} = %(other)s WHERE id = %(id)s",),
         (KEPT, KEPT), (KEPT, KEPT)),
    Case("both vectors changed", ("UPDATE {table} SET {own} = %(own)s, {other} = %(other)s WHERE id = %(id)s",),
         (GIVEN, KEPT), (GIVEN, KEPT)),
    Case("the other's vector set to NULL", ("UPDATE {table} SET {other} = NULL WHERE id = %(id)s",), (KEPT, KEPT), (KEPT, KEPT)),
    Case("text, then vector",
         ("UPDATE {table} SET content = %(new)s WHERE id = %(id)s", "UPDATE {table} SET {own} = %(own)s WHERE id = %(id)s"),
         (GIVEN, PENDING), (GIVEN, PENDING)),
    Case("vector, then text",
         ("UPDATE {table} SET {own} = %(own)s WHERE id = %(id)s", "UPDATE {table} SET content = %(new)s WHERE id = %(id)s"),
         (PENDING, PENDING), (GIVEN, PENDING)),
    Case("own vector set to NULL", ("UPDATE {table} SET {own} = NULL WHERE id = %(id)s",), (PENDING, KEPT), (PENDING, KEPT)),
    Case("text set to NULL", ("UPDATE {table} SET content = NULL WHERE id = %(id)s",), (PENDING, PENDING), (KEPT, PENDING)),
    Case("text set to NULL with a vector", ("UPDATE {table} SET content = NULL, {own} = %(own)s WHERE id = %(id)s",),
         (GIVEN, PENDING), (GIVEN, PENDING)),
    Case("other columns only", ("UPDATE {table} SET note = 'x', title = 'y' WHERE id = %(id)s",), (KEPT, KEPT), (KEPT, KEPT)),
    Case("the same text again", ("UPDATE {table} SET content = content || '' WHERE id = %(id)s",), (KEPT, KEPT), (KEPT, KEPT)),
    Case("text changed only in case", ("UPDATE {table} SET content = upper(content) WHERE id = %(id)s",),
         (PENDING, PENDING), (KEPT, PENDING)),
    Case("text changed under replica", ("UPDATE {table} SET content = %(new)s WHERE id = %(id)s",),
         (PENDING, PENDING), (KEPT, PENDING), "session_replication_role = replica"),
    Case("own vector changed under replica", ("UPDATE {table} SET {own} = %(own)s WHERE id = %(id)s",),
         (GIVEN, KEPT), (GIVEN, KEPT), "session_replication_role = replica"),
    Case("worker, text unchanged", ("UPDATE {table} SET {own} = %(own)s, {other} = %(other)s WHERE id = %(id)s",),
         (GIVEN, GIVEN), (GIVEN, GIVEN), "revector.writer = 'on'"),
    Case("worker, text changed",
         ("UPDATE {table} SET content = %(new)s, {own} = %(own)s, {other} = %(other)s WHERE id = %(id)s",),
         (PENDING, PENDING), (GIVEN, PENDING), "revector.writer = 'on'"),
    Case("text changed and changed back",
         ("UPDATE {table} SET note = content WHERE id = %(id)s", "UPDATE {table} SET content = %(new)s WHERE id = %(id)s",
          "UPDATE {table} SET content = note WHERE id = %(id)s"), (PENDING, PENDING), (KEPT, PENDING)),
]  # fmt: skip


@dataclass(frozen=True)
class Writer:
    """Who writes: its search_path, the column that it owns, the other one, and their models."""

    path: str
    own: str
    other: str
    own_model: str
    other_model: str


WRITERS = {
    "EXPANDED": {"bare": Writer("public", "embedding", "embedding_g2", OLD, NEW)}
    | {f"view of g{n}": Writer(f"rv_kb_g{n}, public", "embedding", "embedding_g2", OLD, NEW) for n in (1, 2)},
    "SERVED": {
        "bare": Writer("public", "embedding", "embedding_g2", OLD, NEW),
        "view of g1": Writer("rv_kb_g1, public", "embedding", "embedding_g2", OLD, NEW),
        "view of g2": Writer("rv_kb_g2, public", "embedding_g2", "embedding", NEW, OLD),
        "both views, g2 first": Writer("other, rv_kb_g2, rv_kb_g1, public", "embedding_g2", "embedding", NEW, OLD),
        "both views, g1 first": Writer("rv_kb_g1, rv_kb_g2, public", "embedding", "embedding_g2", OLD, NEW),
        "another table's view": Writer("rv_other_g2, public", "embedding", "embedding_g2", OLD, NEW),
    },
    "CUT_OVER": {
        "bare": Writer("public", "embedding", "embedding_g1", NEW, OLD),
        "view of g1": Writer("rv_kb_g1, public", "embedding_g1", "embedding", OLD, NEW),
        "view of g2": Writer("rv_kb_g2, public", "embedding", "embedding_g1", NEW, OLD),
    },
}


def play(connection: psycopg.Connection[Any], case: Case, writer: Writer) -> tuple[str, str]:
    """Run a case's statements on a row of its own; what the two columns hold then."""
    number = next(NUMBERS)
    old = {writer.own: vector(writer.own_model, "old"), writer.other: vector(writer.other_model, "old")}
    given = {writer.own: vector(writer.own_model, "given"), writer.other: vector(writer.other_model, "given")}
    parts = {
        "table": sql.Identifier("public", "kb"),
        "own": sql.Identifier(writer.own),
        "other": sql.Identifier(writer.other),
    }
    if case.exists:
        connection.execute("SET revector.writer = 'on'")
        connection.execute(
            sql.SQL("INSERT INTO {table} (id, content, {own}, {other}) VALUES (%s, 'a Text', %s, %s)").format(**parts),
            (number, old[writer.own], old[writer.other]),
        )
        connection.execute("RESET revector.writer")
    connection.execute(f"SET search_path = {writer.path}")  # type: ignore[arg-type]
    if case.setting:
        connection.execute(f"SET {case.setting}")  # type: ignore[arg-type]
    for statement in case.statements:
        text = sql.SQL(statement).format(**parts)  # type: ignore[arg-type]
        if statement is COPY:
            with connection.cursor().copy(text) as copy:
                copy.write_row((number, "new text", given[writer.own], given[writer.other]))
        else:
            parameters = {"id": number, "new": "new text", "own": given[writer.own], "other": given[writer.other]}
            connection.execute(text, parameters)
    connection.execute("RESET ALL")
    row = connection.execute(
        sql.SQL("SELECT {own}::text, {other}::text FROM {table} WHERE id = %s").format(**parts), (number,)
    ).fetchone()
    assert row is not None

    def means(column: str, value: str | None) -> str:
        if value is None:
            return PENDING
        held = connection.execute(
            "SELECT %s::vector = %s::vector, %s::vector = %s::vector", (value, given[column], value, old[column])
        ).fetchone()
        return {(True, False): GIVEN, (False, True): KEPT}.get(held or (False, False), "something else")

    return means(writer.own, row[0]), means(writer.other, row[1])


def make_view_schemas(connection: psycopg.Connection[Any]) -> None:
    """What the trigger goes by is the name alone; `plan` refuses to start where it is taken."""
    for name in ("rv_kb_g1", "rv_kb_g2", "rv_other_g2", "other"):
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))


@pytest.mark.parametrize("stage", WRITERS)
def test_truth_table(dsn: str, connection: psycopg.Connection[Any], stage: str) -> None:
    """Each statement leaves what mechanism.md says, for each owner, and afterwards every pending row can be filled."""
    knowledge_base(connection, 20, not_null=False)
    advance(dsn, stage)
    make_view_schemas(connection)
    wrong = []
    for owner, writer in WRITERS[stage].items():
        for case in CASES:
            expected = case.expanded if stage == "EXPANDED" else case.served
            got = play(connection, case, writer)
            if got != expected:
                wrong.append(f"{owner}: {case.name}: {got}, not {expected}")
    assert wrong == []


@pytest.mark.parametrize("stage", ["SERVED", "CUT_OVER"])
def test_insert_without_a_vector_fails_as_not_null_did(
    dsn: str, connection: psycopg.Connection[Any], stage: str
) -> None:
    """The relaxed NOT NULL is missed by nobody: same SQLSTATE, message and fields on INSERT; an UPDATE never fails."""
    knowledge_base(connection, 20)
    statements = (
        "INSERT INTO kb (id, content) VALUES (900, 'no vector')",
        "INSERT INTO kb (id, content) VALUES (1, 'no vector') ON CONFLICT (id) DO UPDATE SET content = excluded.content",
        "INSERT INTO kb (id) VALUES (901)",
    )

    def errors() -> list[tuple[Any, ...]]:
        told = []
        for statement in statements:
            with pytest.raises(psycopg.errors.NotNullViolation) as caught:
                connection.execute(statement)  # type: ignore[arg-type]
            diag = caught.value.diag
            told.append(
                (
                    diag.sqlstate,
                    diag.severity,
                    diag.message_primary,
                    diag.column_name,
                    diag.table_name,
                    diag.schema_name,
                )
            )
        return told

    before = errors()
    advance(dsn, stage)
    assert errors() == before
    connection.execute("UPDATE kb SET content = 'no vector' WHERE id = 1")
    connection.execute("UPDATE kb SET content = 'cleared', embedding = NULL WHERE id = 2")
    fill(dsn, connection)
    columns = {"embedding": OLD, "embedding_g2": NEW} if stage == "SERVED" else {"embedding_g1": OLD, "embedding": NEW}
    assert_exact(connection, "kb", "content", columns, at_least=20)


def test_view_writer_inserts_into_a_column_that_was_not_null(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """An instance of either version that gives its own model's vector is never told that the other's is missing."""
    knowledge_base(connection, 20)
    for stage, columns in (("SERVED", ("embedding", "embedding_g2")), ("CUT_OVER", ("embedding_g1", "embedding"))):
        advance(dsn, stage)
        if stage == "SERVED":
            make_view_schemas(connection)
        for number, (column, model) in enumerate(zip(columns, (OLD, NEW), strict=True), 1):
            key = next(NUMBERS)
            connection.execute(f"SET search_path = rv_kb_g{number}, public")  # type: ignore[arg-type]
            connection.execute(
                sql.SQL("INSERT INTO kb (id, content, {}) VALUES (%s, %s, %s)").format(sql.Identifier(column)),
                (key, f"by g{number}", vector(model, f"by g{number}")),
            )
            with pytest.raises(psycopg.errors.NotNullViolation):
                connection.execute("INSERT INTO kb (id, content) VALUES (%s, 'x')", (next(NUMBERS),))
            connection.execute("RESET ALL")
    fill(dsn, connection)
    assert_exact(connection, "kb", "content", {"embedding_g1": OLD, "embedding": NEW}, at_least=24)


EVIL = """
CREATE SCHEMA evil;
CREATE FUNCTION evil.strike(text, text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked by ='; END $$;
CREATE FUNCTION evil.join(text, text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked by ||'; END $$;
CREATE FUNCTION evil.same(name, text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked by name ='; END $$;
CREATE FUNCTION evil.rows(record, record) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked by record <>'; END $$;
CREATE FUNCTION evil.vectors(public.vector, public.vector) RETURNS boolean
LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked by vector ='; END $$;
CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.strike);
CREATE OPERATOR evil.<> (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.strike);
CREATE OPERATOR evil.= (LEFTARG = name, RIGHTARG = text, FUNCTION = evil.same);
CREATE OPERATOR evil.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.join);
CREATE OPERATOR evil.= (LEFTARG = record, RIGHTARG = record, FUNCTION = evil.rows);
CREATE OPERATOR evil.= (LEFTARG = public.vector, RIGHTARG = public.vector, FUNCTION = evil.vectors);
CREATE FUNCTION evil.lower(text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked by lower'; END $$;
CREATE FUNCTION evil.current_setting(text, boolean) RETURNS text
LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked by current_setting'; END $$;
CREATE FUNCTION evil.current_setting(text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked by current_setting'; END $$;
CREATE FUNCTION evil.current_schemas(boolean) RETURNS name[]
LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked by current_schemas'; END $$;
CREATE FUNCTION evil.format(text, text, text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE 'hijacked by format'; END $$;
CREATE DOMAIN evil.text AS integer;
CREATE DOMAIN evil.name AS integer;
CREATE DOMAIN evil.bool AS integer;
CREATE DOMAIN evil.vector AS integer;
"""


@pytest.mark.parametrize("stage", ["EXPANDED", "SERVED", "CUT_OVER"])
def test_hostile_search_path(dsn: str, connection: psycopg.Connection[Any], stage: str) -> None:
    """A caller's search_path changes neither what the text means nor what a comparison does."""
    knowledge_base(connection, 20)
    expression = "lower(coalesce(title, '')) || ' ' || content"
    for number in range(20):
        text = one(connection, f"SELECT {expression} FROM kb WHERE id = {number}")
        connection.execute("UPDATE kb SET embedding = %s WHERE id = %s", (vector(OLD, text), number))
    advance(dsn, stage, Request(from_=OLD, to=NEW, text=expression))
    live, other = (NEW, "embedding_g1") if stage == "CUT_OVER" else (OLD, "embedding_g2")
    if stage == "EXPANDED":
        connection.execute("SET revector.writer = 'on'")
        connection.execute("UPDATE kb SET embedding_g2 = %s", (vector(NEW, "filled"),))
        connection.execute("RESET revector.writer")
    connection.execute(EVIL)
    connection.execute("SET search_path = evil, pg_catalog")
    given = vector(live, "title of 900 edited")
    connection.execute("UPDATE public.kb SET note = 'unchanged' WHERE id OPERATOR(pg_catalog.=) 1")
    connection.execute("UPDATE public.kb SET content = 'edited' WHERE id OPERATOR(pg_catalog.=) 2")
    connection.execute("UPDATE public.kb SET title = 'Edited' WHERE id OPERATOR(pg_catalog.=) 3")
    connection.execute("UPDATE public.kb SET title = 'TITLE 4' WHERE id OPERATOR(pg_catalog.=) 4")
    connection.execute(
        "INSERT INTO public.kb (id, title, content, embedding) VALUES (900, 'Title of 900', 'edited', %s)", (given,)
    )
    connection.execute("RESET search_path")
    pending = connection.execute(
        sql.SQL("SELECT id FROM kb WHERE {} IS NULL ORDER BY id").format(sql.Identifier(other))
    ).fetchall()
    assert [n for (n,) in pending] == [2, 3, 900], "row 4's text is the same, for lower() makes it so"
    if stage != "EXPANDED":
        fill(dsn, connection)
        columns = {"embedding": live, other: OLD if live == NEW else NEW}
        assert_exact(connection, "kb", expression, columns, at_least=21)


@pytest.mark.parametrize("stage", ["EXPANDED", "SERVED"])
def test_text_of_two_columns(dsn: str, connection: psycopg.Connection[Any], stage: str) -> None:
    """An edit of either part is an edit; a move of a character from one part to the other is one too."""
    expression = "title || E'\\n' || content"
    knowledge_base(connection, 0, index=None)
    for number in range(20):
        text = f"title {number}\nbody {number}"
        connection.execute(
            "INSERT INTO kb (id, title, content, embedding) VALUES (%s, %s, %s, %s)",
            (number, f"title {number}", f"body {number}", vector(OLD, text)),
        )
    advance(dsn, stage, Request(from_=OLD, to=NEW, text=expression))
    if stage == "EXPANDED":
        connection.execute("SET revector.writer = 'on'")
        connection.execute("UPDATE kb SET embedding_g2 = %s", (vector(NEW, "filled"),))
        connection.execute("RESET revector.writer")
    connection.execute("UPDATE kb SET title = 'x' WHERE id = 1")
    connection.execute("UPDATE kb SET content = 'x' WHERE id = 2")
    connection.execute("UPDATE kb SET note = 'x' WHERE id = 3")
    connection.execute("UPDATE kb SET title = E'title 4\\nbody', content = '4' WHERE id = 4")
    connection.execute("UPDATE kb SET title = content, content = title WHERE id = 5")
    connection.execute("UPDATE kb SET title = NULL WHERE id = 6")
    pending = connection.execute("SELECT id FROM kb WHERE embedding_g2 IS NULL ORDER BY id").fetchall()
    assert [n for (n,) in pending] == [1, 2, 4, 5, 6]
    if stage == "SERVED":
        fill(dsn, connection)
        assert_exact(connection, "kb", expression, {"embedding": OLD, "embedding_g2": NEW}, at_least=19)
        assert one(connection, "SELECT embedding IS NULL AND embedding_g2 IS NULL FROM kb WHERE id = 6"), (
            "it has no text"
        )


@pytest.mark.parametrize("kind", ["STORED", "VIRTUAL"])
def test_generated_text(dsn: str, connection: psycopg.Connection[Any], kind: str) -> None:
    """A generated text column is looked through: its edit is seen, and an edit of anything else is not one."""
    if kind == "VIRTUAL" and connection.info.server_version < 180000:
        pytest.skip("virtual generated columns came with PostgreSQL 18")
    connection.execute(
        "CREATE TABLE kb (id int PRIMARY KEY, title text, content text, note text, embedding vector(16) NOT NULL,"
        f" full_text text GENERATED ALWAYS AS (coalesce(title, '') || ': ' || coalesce(content, '')) {kind})"
    )
    for number in range(20):
        given = vector(OLD, f"title {number}: body {number}")
        connection.execute(
            "INSERT INTO kb VALUES (%s, %s, %s, '', %s)", (number, f"title {number}", f"body {number}", given)
        )
    request = Request(from_=OLD, to=NEW, text="full_text")
    columns = {"embedding": OLD, "embedding_g2": NEW}
    advance(dsn, "EXPANDED", request)
    connection.execute("UPDATE kb SET note = 'x'")
    advance(dsn, "VERIFIED", request)
    assert_exact(connection, "kb", "full_text", columns, at_least=20)
    connection.execute("UPDATE kb SET note = 'y'")
    assert one(connection, "SELECT count(*) FROM kb WHERE embedding_g2 IS NULL") == 0, "a note is no text"
    for stage in ("SERVED", "CUT_OVER"):
        advance(dsn, stage, request)
        connection.execute("UPDATE kb SET note = note || 'z'")
        pending = "SELECT count(*) FROM kb WHERE num_nulls(VARIADIC ARRAY[{}]::text[]) > 0"
        counted = sql.SQL(pending).format(sql.SQL(", ").join(map(sql.Identifier, columns)))
        if stage == "CUT_OVER":
            columns = {"embedding_g1": OLD, "embedding": NEW}
            counted = sql.SQL(pending).format(sql.SQL(", ").join(map(sql.Identifier, columns)))
        assert one(connection, counted) == 0
        connection.execute("UPDATE kb SET title = 'edited at ' || %s WHERE id < 5", (stage,))
        assert one(connection, counted) == 5
        fill(dsn, connection)
        assert_exact(connection, "kb", "full_text", columns, at_least=20)


QUOTED = 'Weird "T" 100%'


def test_names_that_need_quoting(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Names with quotes, blanks, per cent signs and braces go through every phase as they are."""
    table = sql.Identifier(QUOTED)
    connection.execute(
        sql.SQL(
            'CREATE TABLE {} ("select" int PRIMARY KEY, "the text %s {{x}}" text, note text, "My Vec%" vector(16) NOT NULL)'
        ).format(table)
    )
    for number in range(20):
        values = sql.SQL(", ").join(map(sql.Literal, (number, f"text {number}", "", vector(OLD, f"text {number}"))))
        connection.execute(sql.SQL("INSERT INTO {} VALUES ({})").format(table, values))
    connection.execute(sql.SQL('CREATE INDEX "My %Index" ON {} USING hnsw ("My Vec%" vector_cosine_ops)').format(table))
    expression = '"the text %s {x}"'
    request = Request(from_=OLD, to=NEW, text=expression, vector="My Vec%")

    def check(columns: dict[str, str]) -> None:
        connection.execute(sql.SQL("UPDATE {} SET note = 'x' WHERE \"select\" < 9").format(table))
        connection.execute(
            sql.SQL('UPDATE {} SET "the text %s {{x}}" = "the text %s {{x}}" || \' edited\' WHERE "select" < 4').format(
                table
            )
        )
        fill(dsn, connection, QUOTED)
        assert_exact(connection, table, expression, columns, at_least=20)

    advance(dsn, "SERVED", request, QUOTED)
    check({"My Vec%": OLD, "My Vec%_g2": NEW})
    advance(dsn, "CUT_OVER", request, QUOTED)
    check({"My Vec%_g1": OLD, "My Vec%": NEW})
    with steering(dsn, QUOTED) as migration:
        migration.rollback(without_follower=True)
    check({"My Vec%": OLD, "My Vec%_g2": NEW})
    with steering(dsn, QUOTED) as migration:
        migration.cutover(without_follower=True)
        migration.finalize()
    assert_exact(connection, table, expression, {"My Vec%": NEW}, at_least=20)
    assert one(connection, "SELECT count(*) FROM pg_indexes WHERE indexname = 'My %Index'") == 1


def test_name_of_63_bytes_in_a_schema_of_its_own(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Names at PostgreSQL's limit are cut with a hash, so that none of ours collides with another."""
    table, column = "ü" * 31 + "t", "v" * 63
    connection.execute('CREATE SCHEMA "über all"')
    connection.execute(
        sql.SQL("CREATE TABLE {} (id int PRIMARY KEY, content text, {} vector(16))").format(
            sql.Identifier("über all", table), sql.Identifier(column)
        )
    )
    connection.execute(
        sql.SQL("INSERT INTO {} VALUES (1, 'a text', %s)").format(sql.Identifier("über all", table)),
        (vector(OLD, "a text"),),
    )
    whole = f"über all.{table}"
    with steering(dsn, whole) as migration:
        migration.run(REQUEST)
        migration.cutover(without_follower=True)
        migration.rollback(without_follower=True)
        migration.cutover(without_follower=True)
        migration.finalize()
    assert_exact(connection, sql.Identifier("über all", table), "content", {column: NEW})
    assert len(own_name("über all", table, 2).encode()) <= 63


def test_trimming_trigger_of_the_users(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A user's BEFORE trigger runs first: we compare and embed the text that is stored, not the one that was sent."""
    knowledge_base(connection, 20)
    connection.execute(
        "CREATE FUNCTION trim_text() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN NEW.content := btrim(NEW.content); RETURN NEW; END $$;"
        "CREATE TRIGGER zz_trim BEFORE INSERT OR UPDATE ON kb FOR EACH ROW EXECUTE FUNCTION trim_text()"
    )
    advance(dsn, "EXPANDED")
    connection.execute(
        "UPDATE kb SET content = '  edited early ', embedding = %s WHERE id = 1", (vector(OLD, "edited early"),)
    )
    advance(dsn, "SERVED")
    connection.execute("UPDATE kb SET content = '  ' || content || '  ' WHERE id = 2")
    assert one(connection, "SELECT embedding IS NOT NULL AND embedding_g2 IS NOT NULL FROM kb WHERE id = 2"), (
        "trimmed: the same"
    )
    connection.execute("UPDATE kb SET content = '  edited late ' WHERE id = 3")
    connection.execute("INSERT INTO kb (id, content, embedding) VALUES (99, ' new ', %s)", (vector(OLD, "new"),))
    fill(dsn, connection)
    assert_exact(connection, "kb", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=21)
    assert one(connection, "SELECT count(*) FROM kb WHERE content <> btrim(content)") == 0


def test_trigger_that_would_run_after_ours_is_refused(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A trigger that could change the text after we looked is found by plan, and again at every later step."""
    knowledge_base(connection, 20)
    late = (
        'CREATE TRIGGER "~~late" BEFORE UPDATE ON kb FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()'
    )
    connection.execute(late)
    with steering(dsn) as migration, pytest.raises(Refused, match="~~late sort"):
        migration.run(REQUEST)
    connection.execute('DROP TRIGGER "~~late" ON kb')
    advance(dsn, "VERIFIED")
    connection.execute(late)
    with steering(dsn) as migration, pytest.raises(Refused, match="no longer the last"):
        migration.cutover(without_follower=True)
    connection.execute('DROP TRIGGER "~~late" ON kb')
    connection.execute('ALTER TABLE kb DISABLE TRIGGER "~rv_kb_g2"')
    with steering(dsn) as migration, pytest.raises(Refused, match="not enabled ALWAYS"):
        migration.cutover(without_follower=True)
    connection.execute('DROP TRIGGER "~rv_kb_g2" ON kb')
    with steering(dsn) as migration, pytest.raises(Refused, match="is missing"):
        migration.cutover(without_follower=True)


@pytest.mark.parametrize("stage", ["VERIFIED", "CUT_OVER"])
def test_the_remedy_for_a_silenced_trigger_leaves_nothing_stale(
    dsn: str, connection: psycopg.Connection[Any], stage: str
) -> None:
    """What the refusal prints is executed to the letter; status is red until then."""
    knowledge_base(connection, 20)
    advance(dsn, stage)
    connection.execute('ALTER TABLE kb DISABLE TRIGGER "~rv_kb_g2"')
    column, model = ("embedding", OLD) if stage == "VERIFIED" else ("embedding", NEW)
    connection.execute(
        f"UPDATE kb SET content = 'unseen ' || id, {column} = %s WHERE id = 3", (vector(model, "unseen 3"),)
    )
    with steering(dsn) as migration:
        assert [alert.kind for alert in migration.status().alerts] == ["trigger"]
        with pytest.raises(Refused, match="not enabled ALWAYS") as refused:
            migration.rollback(without_follower=True) if stage == "CUT_OVER" else migration.cutover(
                without_follower=True
            )
    enable, _, clear, _ = refused.value.hint.splitlines()
    connection.execute(enable)
    for statement in clear.replace("WHERE ...", "WHERE id = 3").strip().rstrip(";").split("; "):
        connection.execute(statement)
    fill(dsn, connection)
    columns = (
        {"embedding": NEW, "embedding_g1": OLD} if stage == "CUT_OVER" else {"embedding": OLD, "embedding_g2": NEW}
    )
    assert_exact(connection, "kb", "content", columns, at_least=20)
    with steering(dsn) as migration:
        assert not [alert for alert in migration.status().alerts if alert.kind == "trigger"]


@pytest.fixture
def role(connection: psycopg.Connection[Any]) -> Iterator[str]:
    """An application's role: it may write rows and nothing else."""
    name = f"app_{connection.info.dbname}"
    connection.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(name)))
    yield name
    connection.execute("RESET ROLE")
    connection.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(sql.Identifier(name)))


@pytest.mark.parametrize("hardened", [False, True])
def test_application_needs_no_new_right(
    dsn: str, connection: psycopg.Connection[Any], role: str, hardened: bool
) -> None:
    """A role that could write the table before can write it at every stage, also where PUBLIC may execute nothing by default."""
    knowledge_base(connection, 20)
    connection.execute(sql.SQL("GRANT SELECT, INSERT, UPDATE, DELETE ON kb TO {}").format(sql.Identifier(role)))
    if hardened:
        connection.execute("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
    for stage in ("EXPANDED", "SERVED", "CUT_OVER"):
        advance(dsn, stage)
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
        live = NEW if stage == "CUT_OVER" else OLD
        text = f"written at {stage}"
        connection.execute("UPDATE kb SET content = %s, embedding = %s WHERE id = 1", (text, vector(live, text)))
        connection.execute(
            "INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s)", (next(NUMBERS), text, vector(live, text))
        )
        connection.execute("RESET ROLE")
    fill(dsn, connection)
    assert_exact(connection, "kb", "content", {"embedding_g1": OLD, "embedding": NEW}, at_least=23)


def test_row_without_text_gets_no_vector_and_no_place_in_the_queue(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    """A NULL text is never pending; when it gets a text later, it gets its vectors."""
    knowledge_base(connection, 20, not_null=False)
    add_rows(connection, range(100, 105), None, text=lambda _: None)
    advance(dsn, "SERVED")
    with steering(dsn) as migration:
        status = migration.status().to_json()
    assert status["other"]["pending"] == 0 and status["live"]["pending"] == 0 and status["rows"]["blank"] == 5
    connection.execute("UPDATE kb SET content = 'at last' WHERE id = 100")
    assert fill(dsn, connection) == 1
    assert_exact(connection, "kb", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=21)


def test_same_value_in_another_storage_is_no_edit(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A text that is stored compressed, out of line or plain is the same text."""
    knowledge_base(connection, 20)
    long = " ".join(f"word{n}" for n in range(3000))
    connection.execute("INSERT INTO kb (id, content, embedding) VALUES (500, %s, %s)", (long, literal([1.0] * 16)))
    advance(dsn, "SERVED")
    connection.execute("UPDATE kb SET content = %s WHERE id = 500", (long,))
    connection.execute("ALTER TABLE kb ALTER content SET STORAGE external")
    connection.execute("UPDATE kb SET content = content || '' WHERE id = 500")
    assert one(connection, "SELECT embedding IS NOT NULL AND embedding_g2 IS NOT NULL FROM kb WHERE id = 500")
