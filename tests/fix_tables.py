"""Tables whose every vector is known exactly, a migration brought to any stage, and what must hold at the end of a road."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import numpy as np
import psycopg
from psycopg import sql

from revector import Embedder, Migration, Request, Settings
from revector.follow import Follower
from revector.work import Observation, Recorded

OLD, NEW = "hash:16", "hash:32"
REQUEST = Request(from_=OLD, to=NEW)
#: Stage -> the step whose ledger row proves it, and the command that takes it.
_PROVEN_BY = {
    "PLANNED": ("run", "plan"),
    "EXPANDED": ("run", "expand"),
    "BACKFILLED": ("run", "backfill"),
    "INDEXED": ("run", "index"),
    "VERIFIED": ("run", "verify"),
    "SERVED": ("cutover", "serve"),
    "CUT_OVER": ("cutover", "cutover"),
}

Index = Literal["hnsw", "ivfflat"]


class Halt(Exception):
    """Raised by an observer: the process ends here, as if it had been killed between two steps."""


@cache
def embedder(spec: str) -> Embedder:
    return Embedder(spec)


def vector(spec: str, text: str) -> str:
    """The model's vector of a text, as an SQL literal that keeps every bit."""
    return literal(embedder(spec).encode([text])[0])


def literal(values: Sequence[float] | np.ndarray[Any, Any]) -> str:
    return "[" + ",".join(f"{float(x):.9g}" for x in values) + "]"


def body(number: int) -> str:
    return f"row {number} tells of subject {number % 17} and of place {number * 7919 % 1009}"


def knowledge_base(
    connection: psycopg.Connection[Any],
    rows: int = 60,
    model: str = OLD,
    *,
    name: str = "kb",
    index: Index | None = "hnsw",
    not_null: bool = True,
    filler: int = 0,
    more: str = "",
) -> sql.Identifier:
    """`name`(id, title, content, note, filler, embedding) with `rows` rows, the model's vectors and an index.

    `filler` bytes a row make the pages as full as a test wants; `more` is DDL of further columns, `, x int` ...
    """
    table = sql.Identifier(name)
    dimension = embedder(model).get_embedding_dimension()
    connection.execute(
        sql.SQL(
            "CREATE TABLE {} (id int PRIMARY KEY, title text, content text, note text NOT NULL DEFAULT '',"
            " filler text NOT NULL DEFAULT '', embedding vector({}){}{})"
        ).format(table, sql.Literal(dimension), sql.SQL(" NOT NULL" if not_null else ""), sql.SQL(more))
    )
    add_rows(connection, range(rows), model, name=name, filler=filler)
    if index:
        connection.execute(
            sql.SQL("CREATE INDEX {} ON {} USING {} (embedding vector_cosine_ops){}").format(
                sql.Identifier(f"{name}_embedding_idx"),
                table,
                sql.SQL(index),
                sql.SQL(" WITH (lists = 4)" if index == "ivfflat" else ""),
            )
        )
    return table


def add_rows(
    connection: psycopg.Connection[Any],
    numbers: Sequence[int],
    model: str | None,
    *,
    name: str = "kb",
    filler: int = 0,
    text: Callable[[int], str | None] = body,
) -> None:
    """COPY rows in; `model=None` gives no vectors."""
    texts = [text(n) for n in numbers]
    vectors = [None] * len(texts) if model is None else [None if t is None else vector(model, t) for t in texts]
    statement = sql.SQL("COPY {} (id, title, content, filler, embedding) FROM STDIN").format(sql.Identifier(name))
    with connection.cursor().copy(statement) as copy:
        for number, written, given in zip(numbers, texts, vectors, strict=True):
            copy.write_row((number, f"title {number}", written, "x" * filler, given))


def settings(dsn: str) -> Settings:
    return Settings(database_url=dsn)


@contextmanager
def steering(
    dsn: str, table: str = "kb", observe: Callable[[Observation], None] = lambda _: None
) -> Iterator[Migration]:
    with Migration.open(settings(dsn), table=table, observe=observe) as migration:
        yield migration


def halting(step: str, kind: type[Observation] = Recorded) -> Callable[[Observation], None]:
    """An observer that ends the process at a step."""

    def observe(seen: Observation) -> None:
        if isinstance(seen, kind) and seen.step == step:
            raise Halt(step)

    return observe


def advance(dsn: str, stage: str, request: Request = REQUEST, table: str = "kb", **options: Any) -> None:
    """Bring a table from where it is to a stage, with no follower."""
    for command in ("run", "cutover"):
        last, step = _PROVEN_BY[stage]
        observe = halting(step) if command == last else lambda _: None
        try:
            with steering(dsn, table, observe) as migration:
                if command == "run":
                    migration.run(request)
                else:
                    migration.cutover(without_follower=True, **options)
        except Halt:
            return
        if command == last:
            return


def stage_of(connection: psycopg.Connection[Any]) -> tuple[str, str | None]:
    row = connection.execute("SELECT stage, closing FROM revector.migrations ORDER BY id DESC LIMIT 1").fetchone()
    assert row is not None
    return row


def oid_of(connection: psycopg.Connection[Any], table: str = "kb") -> int:
    row = connection.execute(
        sql.SQL("SELECT {}::regclass::oid").format(sql.Literal(_quoted(connection, table)))
    ).fetchone()
    assert row is not None
    return int(row[0])


def fill(dsn: str, connection: psycopg.Connection[Any], table: str = "kb") -> int:
    """What a follower would do now, once."""
    return Follower(settings(dsn), oid_of(connection, table)).once()


@contextmanager
def following(dsn: str, connection: psycopg.Connection[Any], table: str = "kb") -> Iterator[Follower]:
    """A follower in a thread, alive by the ledger when the block begins; what ends it early fails the test."""
    stop, died = threading.Event(), []
    follower = Follower(settings(dsn), oid_of(connection, table), stop=stop.is_set)

    def run() -> None:
        try:
            follower.run()
        except BaseException as error:
            died.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(lambda: one(connection, "SELECT count(*) FROM revector.heartbeats WHERE active") or died, 20)
        if died:
            raise died[0]
        yield follower
    finally:
        stop.set()
        thread.join()
    if died:
        raise AssertionError(f"the follower died: {died[0]!r}") from died[0]


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def one(connection: psycopg.Connection[Any], query: str | sql.Composable, *parameters: object) -> Any:
    row = connection.execute(query, parameters or None).fetchone()
    assert row is not None
    return row[0]


def assert_exact(
    connection: psycopg.Connection[Any],
    table: str | sql.Identifier,
    text_expression: str,
    columns: Mapping[str, str],
    *,
    at_least: int = 1,
) -> None:
    """Every row that has a text has, in each column, exactly its model's vector of that text."""
    names = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in columns)
    rows = connection.execute(
        sql.SQL("SELECT ctid::text, ({})::text, {} FROM {} WHERE ({}) IS NOT NULL").format(
            sql.SQL(text_expression), names, table if isinstance(table, sql.Identifier) else sql.Identifier(table),
            sql.SQL(text_expression),
        )
    ).fetchall()  # fmt: skip
    assert len(rows) >= at_least, f"only {len(rows)} rows with a text"
    if not rows:
        return
    for position, (name, spec) in enumerate(columns.items(), 2):
        missing = [row[1] for row in rows if row[position] is None]
        assert not missing, f"{name}: {len(missing)} of {len(rows)} rows have no vector, such as {missing[0]!r}"
        stored = np.array([[float(x) for x in row[position][1:-1].split(",")] for row in rows])
        expected = embedder(spec).encode([row[1] for row in rows]).astype(np.float64)
        assert stored.shape == expected.shape, f"{name}: vectors of shape {stored.shape}, not {expected.shape}"
        cosines = (stored * expected).sum(axis=1)
        cosines /= np.linalg.norm(stored, axis=1) * np.linalg.norm(expected, axis=1)
        wrong = [(row[0], row[1]) for row, cosine in zip(rows, cosines, strict=True) if not cosine >= 0.99999]
        assert not wrong, f"{name}: {len(wrong)} of {len(rows)} rows hold another text's vector, such as {wrong[0]}"


def assert_no_leftovers(connection: psycopg.Connection[Any], table: str = "kb", *, keep: Sequence[str] = ()) -> None:
    """After abort and finalize nothing of ours is left but the ledger; `keep`: names of the user's own."""
    found = connection.execute(
        """
        SELECT 'column ' || attname FROM pg_attribute
         WHERE attrelid = %(table)s::oid AND NOT attisdropped AND attname ~ '_g[0-9]+$'
        UNION ALL SELECT 'trigger ' || tgname FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
         WHERE NOT tgisinternal AND (tgname ~ '^~?rv_' OR p.pronamespace = 'revector'::regnamespace)
        UNION ALL SELECT 'function ' || oid::regprocedure FROM pg_proc
         WHERE pronamespace = 'revector'::regnamespace OR proname ~ '^rv_'
        UNION ALL SELECT 'relation ' || oid::regclass FROM pg_class
         WHERE relname ~ '^rv_' AND relnamespace <> 'revector'::regnamespace
        UNION ALL SELECT 'constraint ' || conname FROM pg_constraint
         WHERE conrelid = %(table)s::oid AND (conname ~ '^rv_' OR conname ~ '_g[0-9]+' OR NOT convalidated)
        UNION ALL SELECT 'invalid index ' || indexrelid::regclass FROM pg_index
         WHERE indrelid = %(table)s::oid AND NOT indisvalid
        UNION ALL SELECT 'schema ' || nspname FROM pg_namespace WHERE nspname ~ '^rv_'
        """,
        {"table": oid_of(connection, table)},
    ).fetchall()
    assert [name for (name,) in found if name.split(" ", 1)[1] not in keep] == []


def shape(connection: psycopg.Connection[Any], table: str = "kb") -> dict[str, list[Any]]:
    """Everything about a table that a user would see changed: columns, constraints, indexes, triggers, comments, grants."""
    parameters = {"table": oid_of(connection, table)}
    queries = {
        "columns": "SELECT attname, format_type(atttypid, atttypmod), attnotnull, attstorage, attacl::text, attstattarget,"
        " col_description(attrelid, attnum) FROM pg_attribute WHERE attrelid = %(table)s::oid AND attnum > 0"
        " AND NOT attisdropped ORDER BY attnum",
        "constraints": "SELECT conname, contype, convalidated, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE conrelid = %(table)s::oid ORDER BY conname",
        "indexes": "SELECT pg_get_indexdef(indexrelid), indisvalid FROM pg_index WHERE indrelid = %(table)s::oid ORDER BY 1",
        "triggers": "SELECT pg_get_triggerdef(oid), tgenabled FROM pg_trigger WHERE tgrelid = %(table)s::oid"
        " AND NOT tgisinternal ORDER BY 1",
    }
    return {name: connection.execute(query, parameters).fetchall() for name, query in queries.items()}


def names(connection: psycopg.Connection[Any], table: str = "kb") -> tuple[dict[str, str], dict[str, str]]:
    """(vector column -> type, index -> the column or predicate it is on) as they are now."""
    parameters = {"table": oid_of(connection, table)}
    columns = connection.execute(
        "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = %(table)s::oid"
        " AND NOT attisdropped AND attnum > 0 AND atttypid = 'vector'::regtype",
        parameters,
    ).fetchall()
    indexes = connection.execute(
        "SELECT c.relname, CASE WHEN i.indpred IS NULL THEN pg_get_indexdef(i.indexrelid, 1, true)"
        " ELSE 'WHERE ' || pg_get_expr(i.indpred, i.indrelid) END FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " WHERE i.indrelid = %(table)s::oid AND NOT i.indisprimary",
        parameters,
    ).fetchall()
    return dict(columns), dict(indexes)


def _quoted(connection: psycopg.Connection[Any], table: str) -> str:
    return sql.Identifier(table).as_string(connection)
