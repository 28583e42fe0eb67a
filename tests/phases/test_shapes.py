"""Every supported shape of table down the whole road, with an application that writes and a follower."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg import sql

from fix_tables import (
    REQUEST,
    advance,
    assert_exact,
    assert_no_leftovers,
    body,
    fill,
    following,
    one,
    shape,
    stage_of,
    steering,
    vector,
)
from revector import Request
from revector.errors import Refused
from revector.phases import verify

ROWS = 40
OPERATORS = {"cosine": "<=>", "l2": "<->", "ip": "<#>"}


@dataclass(frozen=True)
class Shape:
    """One kind of table: `kb`(n, title, content, ..., embedding), its key, its text and its indexes."""

    #: Everything of the CREATE TABLE but `n`, `title`, `content` and `embedding`.
    more: str = ""
    text: str = "content"
    #: The text of a row as the application computes it.
    compute: Callable[[str, str], str] = lambda title, content: content
    indexes: tuple[str, ...] = ("CREATE INDEX kb_embedding_idx ON kb USING hnsw (embedding vector_cosine_ops)",)
    #: (index, metric) of the searches that must still use their index under the live name.
    searched: tuple[tuple[str, str], ...] = (("kb_embedding_idx", "cosine"),)
    type: str = "vector"
    old: str = "hash:16"
    new: str = "hash:32"
    rows: int = ROWS
    not_null: bool = True
    #: Whether the column declares its dimension.
    dimension: bool = True
    #: Server version from which the shape exists.
    since: int = 150000
    #: What the column is cast to where it is searched.
    cast: str = ""


def both(title: str, content: str) -> str:
    return f"{title}\n{content}"


SHAPES = {
    "composite key": Shape(", tenant int NOT NULL DEFAULT 1, PRIMARY KEY (tenant, n)"),
    "uuid key": Shape(", id uuid PRIMARY KEY DEFAULT gen_random_uuid()"),
    "text key": Shape(", slug text PRIMARY KEY DEFAULT 'key of ' || md5(random()::text)"),
    "no key": Shape(),
    "nullable column": Shape(", id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY", not_null=False),
    "l2": Shape(
        indexes=("CREATE INDEX kb_embedding_idx ON kb USING hnsw (embedding vector_l2_ops)",),
        searched=(("kb_embedding_idx", "l2"),),
    ),
    "inner product": Shape(
        indexes=("CREATE INDEX kb_embedding_idx ON kb USING hnsw (embedding vector_ip_ops) WITH (m = 8)",),
        searched=(("kb_embedding_idx", "ip"),),
    ),
    "halfvec": Shape(
        type="halfvec", indexes=("CREATE INDEX kb_embedding_idx ON kb USING hnsw (embedding halfvec_cosine_ops)",)
    ),
    "no dimension": Shape(
        dimension=False,
        indexes=("CREATE INDEX kb_embedding_idx ON kb USING hnsw ((embedding::vector(16)) vector_cosine_ops)",),
    ),
    "halfvec without a dimension": Shape(
        type="halfvec", dimension=False,
        indexes=("CREATE INDEX kb_embedding_idx ON kb USING hnsw ((embedding::halfvec(16)) halfvec_cosine_ops)",),
    ),
    "searched as halfvec": Shape(
        indexes=("CREATE INDEX kb_embedding_idx ON kb USING hnsw ((embedding::halfvec(16)) halfvec_cosine_ops)",),
        cast="halfvec",
    ),
    "several indexes": Shape(
        indexes=(
            "CREATE INDEX kb_cosine ON kb USING hnsw (embedding vector_cosine_ops) WITH (m = 8, ef_construction = 32)",
            "CREATE INDEX kb_l2 ON kb USING hnsw (embedding vector_l2_ops)",
            "CREATE INDEX kb_ip_even ON kb USING hnsw (embedding vector_ip_ops) WHERE n % 2 = 0",
            "CREATE INDEX kb_ip_odd ON kb USING hnsw (embedding vector_ip_ops) WHERE n % 2 = 1",
        ),
        searched=(("kb_cosine", "cosine"), ("kb_l2", "l2"), ("kb_ip_even", "ip WHERE n % 2 = 0")),
    ),
    "no index": Shape(indexes=()),
    "stored generated text": Shape(
        r", whole text GENERATED ALWAYS AS (title || E'\n' || content) STORED", text="whole", compute=both
    ),
    "virtual generated text": Shape(
        r", whole text GENERATED ALWAYS AS (title || E'\n' || content) VIRTUAL", text="whole", compute=both,
        since=180000,
    ),
    "text of two columns": Shape(text=r"title || E'\n' || content", compute=both),
    "wide rows": Shape(", filler text STORAGE PLAIN NOT NULL DEFAULT repeat('x', 5000)"),
    "narrow rows": Shape(old="hash:8", new="hash:12", rows=200),
    "one row": Shape(rows=1),
    "no row": Shape(rows=0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _look_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LOOK_AGAIN", 0.5)


def make(connection: psycopg.Connection[Any], made: Shape) -> None:
    dimension = f"({made.old.partition(':')[2]})" if made.dimension else ""
    strict = " NOT NULL" if made.not_null else ""
    connection.execute(
        f"CREATE TABLE kb (n int NOT NULL, title text, content text,"
        f" embedding {made.type}{dimension}{strict}{made.more})"
    )
    for n in range(made.rows):
        given = vector(made.old, made.compute(f"title {n}", body(n)))
        connection.execute(
            "INSERT INTO kb (n, title, content, embedding) VALUES (%s, %s, %s, %s)", (n, f"title {n}", body(n), given)
        )
    for index in made.indexes:
        connection.execute(index)


@dataclass
class Application:
    """What one at work is told where its column takes both models' vectors: there a wrong one is no error."""

    model: str
    #: Held while it writes; who holds it has stopped the writers of the bare name.
    writing: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def edited(dsn: str, made: Shape) -> Iterator[Application]:
    """An application that inserts, edits and deletes with the vector of whichever model answers."""
    stop, errors, told = threading.Event(), [], Application(made.old)

    def work() -> None:
        choose, turn = random.Random(3), 0
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not stop.wait(0.005):
                turn += 1
                number, title, content = choose.randrange(max(made.rows, 1)), f"title at {turn}", f"edit {turn} of it"
                kind = choose.randrange(5)
                with told.writing:
                    for model in (made.old, made.new) if made.dimension else (told.model,):
                        given = vector(model, made.compute(title, content))
                        try:
                            if kind == 0 and made.rows != 1:
                                connection.execute(
                                    "INSERT INTO kb (n, title, content, embedding) VALUES (%s, %s, %s, %s)",
                                    (1000 + turn, title, content, given),
                                )
                            elif kind == 1:
                                connection.execute("DELETE FROM kb WHERE n BETWEEN 1000 AND %s", (1000 + turn - 30,))
                            else:
                                connection.execute(
                                    "UPDATE kb SET title = %s, content = %s, embedding = %s WHERE n = %s",
                                    (title, content, given, number),
                                )
                            break
                        except psycopg.errors.DataException:
                            continue  # the other model answers now
                        except psycopg.Error as error:
                            errors.append(f"{type(error).__name__}: {error}")
                            break

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield told
    finally:
        stop.set()
        thread.join()
    assert errors == []


def uses(connection: psycopg.Connection[Any], made: Shape, model: str) -> None:
    """Each search that had an index has it still, by its old name."""
    connection.execute("SET enable_seqscan = off")
    for index, metric in made.searched if made.rows and (made.indexes or model == made.new) else ():
        operator, _, condition = metric.partition(" ")
        kind = made.cast or ("" if made.dimension else made.type)
        cast = f"::{kind}({model.partition(':')[2]})" if kind else ""
        plan = connection.execute(
            f"EXPLAIN SELECT n FROM kb {condition} ORDER BY embedding{cast} {OPERATORS[operator]}"
            f" '{vector(model, 'anything')}' LIMIT 3"
        ).fetchall()
        assert index in "\n".join(line for (line,) in plan), (index, plan)
    connection.execute("RESET enable_seqscan")


def present(told: dict[str, list[Any]], old: str, new: str) -> dict[str, list[Any]]:
    """The shape with the new model's dimension in place of the old one's; the column's place is told, not kept."""
    was, now = (f"({model.partition(':')[2]})" for model in (old, new))
    columns = [tuple(x.replace(was, now) if isinstance(x, str) else x for x in column) for column in told["columns"]]
    indexes = [(definition.replace(was, now), valid) for definition, valid in told["indexes"]]
    return {**told, "columns": sorted(columns, key=str), "indexes": sorted(indexes)}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_goes_the_whole_road(dsn: str, connection: psycopg.Connection[Any], name: str) -> None:
    """Run, cutover, rollback, cutover, finalize: every vector right at each stop, every index used, nothing left."""
    made = SHAPES[name]
    if connection.info.server_version < made.since:
        pytest.skip(f"{name}: PostgreSQL {made.since // 10000}")
    make(connection, made)
    before = shape(connection)
    request = Request(from_=made.old, to=made.new, text=made.text)
    at_least = min(made.rows, 1)

    def exact(**columns: str) -> None:
        fill(dsn, connection)
        assert_exact(connection, "kb", made.text, columns, at_least=at_least)

    with edited(dsn, made) as application:
        with steering(dsn) as migration:
            assert migration.preview(request).draft.blockers == ()
            migration.run(request)
            assert migration.status().next == "revector cutover kb"
        with following(dsn, connection):
            for command in ("cutover", "rollback", "cutover"):
                with steering(dsn) as migration, nullcontext() if made.dimension else application.writing:
                    getattr(migration, command)()
                    application.model = made.new if command == "cutover" else made.old
    exact(embedding=made.new, embedding_g1=made.old)
    uses(connection, made, made.new)
    with steering(dsn) as migration:
        migration.rollback(without_follower=True)
    exact(embedding=made.old, embedding_g2=made.new)
    uses(connection, made, made.old)
    with steering(dsn) as migration:
        migration.cutover(without_follower=True)
        migration.finalize()
        assert migration.status().stage == "FINALIZED"
    assert_exact(connection, "kb", made.text, {"embedding": made.new}, at_least=at_least)
    uses(connection, made, made.new)
    assert_no_leftovers(connection)
    after = shape(connection)
    if not made.indexes:
        after["indexes"] = [row for row in after["indexes"] if "hnsw" not in row[0]]
    assert present(before, made.old, made.new) == present(after, made.new, made.new)


def two_columns(connection: psycopg.Connection[Any]) -> None:
    """A table with a vector column of its title and one of its content."""
    connection.execute(
        "CREATE TABLE kb (id int PRIMARY KEY, title text, content text, of_title vector(16), of_content vector(24))"
    )
    for n in range(ROWS):
        connection.execute(
            "INSERT INTO kb VALUES (%s, %s, %s, %s, %s)",
            (n, f"title {n}", body(n), vector("hash:16", f"title {n}"), vector("hash:24", body(n))),
        )


def test_two_vector_columns_one_after_the_other(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Each column has its own live generation; the second migration of a table is refused while one is open."""
    two_columns(connection)
    connection.execute("CREATE INDEX kb_title ON kb USING hnsw (of_title vector_cosine_ops)")
    connection.execute("CREATE INDEX kb_content ON kb USING hnsw (of_content vector_l2_ops)")
    title = Request(from_="hash:16", to="hash:32", text="title", vector="of_title")
    content = Request(from_="hash:24", to="hash:40", text="content", vector="of_content")
    advance(dsn, "CUT_OVER", title)
    with steering(dsn) as migration, pytest.raises(Refused) as caught:
        migration.run(content)
    told = str(caught.value)
    assert "a migration hash:16 -> hash:32 of of_title is open; of_content comes after it" in told
    assert "revector finalize kb" in caught.value.hint
    with steering(dsn) as migration:
        migration.finalize()
    connection.execute("UPDATE kb SET title = 'another', of_title = %s WHERE id = 1", (vector("hash:32", "another"),))
    advance(dsn, "CUT_OVER", content)
    fill(dsn, connection)
    assert_exact(connection, "kb", "content", {"of_content": "hash:40", "of_content_g3": "hash:24"})
    assert_exact(connection, "kb", "title", {"of_title": "hash:32"})
    with steering(dsn) as migration:
        migration.finalize()
    live = connection.execute(
        "SELECT a.attname, g.number, g.model ->> 'model' FROM revector.generations g JOIN pg_attribute a"
        " ON a.attrelid = g.table_oid AND a.attnum = g.attnum WHERE g.live ORDER BY 1"
    ).fetchall()
    assert [(column, model) for column, _, model in live] == [("of_content", "hash:40"), ("of_title", "hash:32")]
    assert len({number for _, number, _ in live}) == 2
    assert_no_leftovers(connection)
    # And the first one again, whose live generation is known: no --from.
    advance(dsn, "VERIFIED", Request(to="hash:20", vector="of_title"))
    assert_exact(connection, "kb", "title", {"of_title": "hash:32"})
    with steering(dsn) as migration:
        migration.abort()
    assert stage_of(connection)[0] == "ABORTED"
    assert one(connection, "SELECT count(*) FROM revector.generations WHERE live") == 2
    assert_no_leftovers(connection)


def test_a_typed_table_is_refused(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """No column can be added to it; after the statement that the plan names it is as any other."""
    connection.execute("CREATE TYPE kind AS (id int, content text, embedding vector(16))")
    connection.execute("CREATE TABLE kb OF kind (PRIMARY KEY (id))")
    with steering(dsn) as migration:
        (found,) = migration.preview(REQUEST).draft.blockers
        assert "kb is a table of type public.kind" in found.finding
        connection.execute(found.remedy)
        migration.run(REQUEST)


@pytest.mark.parametrize(
    "domain", ["CREATE DOMAIN v AS vector(16)", "CREATE DOMAIN w AS vector(16); CREATE DOMAIN v AS w"]
)
def test_a_domain_over_vector_is_refused(dsn: str, connection: psycopg.Connection[Any], domain: str) -> None:
    connection.execute(domain)
    connection.execute("CREATE TABLE kb (id int PRIMARY KEY, content text, embedding v)")
    with steering(dsn) as migration:
        with pytest.raises(Refused, match=r"a domain over public\.vector\(16\)") as caught:
            migration.preview(REQUEST)
        connection.execute(caught.value.hint.partition(": ")[2])
        migration.run(REQUEST)


def test_two_vector_columns_each_down_the_whole_road(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Run, cutover, rollback, cutover, finalize of one column and then of the other, with a writer of both at work."""
    dimensions = {"of_title": ("hash:16", "hash:32"), "of_content": ("hash:24", "hash:40")}
    two_columns(connection)
    stop, errors, turns = threading.Event(), [], itertools.count()

    def work() -> None:
        with psycopg.connect(dsn, autocommit=True) as session:
            while not stop.wait(0.01):
                turn = next(turns)
                for column, models in dimensions.items():
                    text = f"{column} at {turn}"
                    for model in models:
                        try:
                            session.execute(
                                sql.SQL("UPDATE kb SET {} = %s, {} = %s WHERE id = %s").format(
                                    sql.Identifier(column.removeprefix("of_")), sql.Identifier(column)
                                ),
                                (text, vector(model, text), turn % ROWS),
                            )
                            break
                        except psycopg.errors.DataException:
                            continue  # the other model answers now
                        except psycopg.Error as error:
                            errors.append(error)
                            break

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for column, (old, new) in dimensions.items():
            with steering(dsn) as migration:
                migration.run(Request(from_=old, to=new, text=column.removeprefix("of_"), vector=column))
            with following(dsn, connection):
                for command in ("cutover", "rollback", "cutover"):
                    with steering(dsn) as migration:
                        getattr(migration, command)()
            with steering(dsn) as migration:
                migration.finalize()
    finally:
        stop.set()
        thread.join()
    assert errors == []
    assert next(turns) > 20
    assert_exact(connection, "kb", "title", {"of_title": "hash:32"}, at_least=ROWS)
    assert_exact(connection, "kb", "content", {"of_content": "hash:40"}, at_least=ROWS)
    assert_no_leftovers(connection)
