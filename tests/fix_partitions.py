"""Partitioned tables of every kind whose vectors are known, their writers, and what a user would see changed in them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg

from fix_tables import NEW, OLD, body, shape, vector

#: kind -> the partition key, and the DDL of its partitions. The second one of each is attached, with other attribute
#: numbers and a NOT NULL of another name; the last is created or attached while a migration works.
KINDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "list": (
        "LIST (tenant)",
        ("CREATE TABLE docs_p0 PARTITION OF docs FOR VALUES IN (0, 3)",
         "ATTACH docs_p1 FOR VALUES IN (1)",
         "CREATE TABLE docs_p2 PARTITION OF docs FOR VALUES IN (2)"),
        "CREATE TABLE docs_late PARTITION OF docs FOR VALUES IN (9)",
    ),
    "range": (
        "RANGE (tenant)",
        ("CREATE TABLE docs_p0 PARTITION OF docs FOR VALUES FROM (0) TO (1)",
         "ATTACH docs_p1 FOR VALUES FROM (1) TO (3)",
         "CREATE TABLE docs_p2 PARTITION OF docs FOR VALUES FROM (3) TO (4)"),
        "CREATE TABLE docs_late PARTITION OF docs FOR VALUES FROM (9) TO (10)",
    ),
    "hash": (
        "HASH (tenant)",
        ("CREATE TABLE docs_p0 PARTITION OF docs FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
         "ATTACH docs_p1 FOR VALUES WITH (MODULUS 2, REMAINDER 1)"),
        "",
    ),
    "two levels": (
        "LIST (tenant)",
        ("CREATE TABLE docs_p0 PARTITION OF docs FOR VALUES IN (0, 3)",
         "ATTACH docs_p1 FOR VALUES IN (1)",
         "CREATE TABLE docs_p2 PARTITION OF docs FOR VALUES IN (2) PARTITION BY RANGE (id)",
         "CREATE TABLE docs_p2_a PARTITION OF docs_p2 FOR VALUES FROM (0) TO (30)",
         "CREATE TABLE docs_p2_b PARTITION OF docs_p2 FOR VALUES FROM (30) TO (1000000)"),
        "CREATE TABLE docs_late PARTITION OF docs FOR VALUES IN (9)",
    ),
}  # fmt: skip
#: Tenants that every kind has a partition for.
TENANTS = 4


def partitioned(
    connection: psycopg.Connection[Any], kind: str, rows: int = 60, *, not_null: bool = True, index: bool = True
) -> None:
    """`docs`(id, tenant, content, note, embedding), its partitions, `rows` rows and an HNSW index of the whole."""
    by, parts, _ = KINDS[kind]
    strict = " NOT NULL" if not_null else ""
    connection.execute(
        "CREATE TABLE docs (id int NOT NULL, tenant int NOT NULL, content text, note text NOT NULL DEFAULT '',"
        f" embedding vector(16){strict}, PRIMARY KEY (id, tenant)) PARTITION BY {by}"
    )
    for part in parts:
        if not part.startswith("ATTACH"):
            connection.execute(part)
            continue
        _, name, bounds = part.split(" ", 2)
        named = f" CONSTRAINT {name}_strict NOT NULL" if not_null else ""
        connection.execute(
            f"CREATE TABLE {name} (junk int, note text NOT NULL DEFAULT '', embedding vector(16){named},"
            " content text, tenant int NOT NULL, id int NOT NULL)"
        )
        connection.execute(f"ALTER TABLE {name} DROP COLUMN junk")
        connection.execute(f"ALTER TABLE docs ATTACH PARTITION {name} {bounds}")
    add(connection, range(rows))
    if index:
        connection.execute(
            "CREATE INDEX docs_embedding_idx ON docs USING hnsw (embedding vector_cosine_ops) WITH (m = 8)"
        )


def add(connection: psycopg.Connection[Any], numbers: Sequence[int], *, tenant: int | None = None) -> None:
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO docs (id, tenant, content, embedding) VALUES (%s, %s, %s, %s)",
            [(n, n % TENANTS if tenant is None else tenant, body(n), vector(OLD, body(n))) for n in numbers],
        )


@dataclass
class Writer:
    """An application by ordinary SQL, its own model's vector or none, rows moved between partitions as well."""

    dsn: str
    rows: int
    errors: list[str] = field(default_factory=list)
    done: int = 0
    #: Whether it may write a text without a vector: before SERVED its old vector would stay, as without revector.
    guarded: bool = False

    def run(self, stop: threading.Event) -> None:
        choose = random.Random(7)
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            while not stop.wait(0.004):
                self.done += 1
                number, text = choose.randrange(self.rows), f"text {self.done} was written while it worked"
                for model in (OLD, NEW):
                    try:
                        self.write(
                            connection, choose.randrange(8 if self.guarded else 6), number, text, vector(model, text)
                        )
                        break
                    except psycopg.errors.DataException:
                        continue  # the other model answers now
                    except psycopg.Error as error:
                        self.errors.append(f"{type(error).__name__}: {error}")
                        break

    def write(self, connection: psycopg.Connection[Any], kind: int, number: int, text: str, given: str) -> None:
        tenant = self.done % TENANTS
        statements: dict[int, tuple[str, tuple[Any, ...]]] = {
            0: ("INSERT INTO docs (id, tenant, content, embedding) VALUES (%s, %s, %s, %s)",
                (1000 + self.done, tenant, text, given)),
            1: ("UPDATE docs SET content = %s, embedding = %s WHERE id = %s", (text, given, number)),
            2: ("UPDATE docs SET tenant = %s, content = %s, embedding = %s WHERE id = %s", (tenant, text, given, number)),
            3: ("UPDATE docs SET tenant = %s WHERE id = %s", (tenant, number)),
            4: ("UPDATE docs SET note = %s WHERE id = %s", (text, number)),
            5: ("DELETE FROM docs WHERE id = %s", (1000 + self.done - 20,)),
            6: ("UPDATE docs SET content = %s WHERE id = %s", (text, number)),
            7: ("UPDATE docs SET tenant = %s, content = %s WHERE id = %s", (tenant, text, number)),
        }  # fmt: skip
        connection.execute(*statements[kind])


@contextmanager
def written(dsn: str, rows: int, kind: Callable[[str, int], Writer] = Writer) -> Iterator[Writer]:
    """The writer at work; an error of its ends the test."""
    stop, writer = threading.Event(), kind(dsn, rows)
    thread = threading.Thread(target=writer.run, args=(stop,))
    thread.start()
    try:
        yield writer
    finally:
        stop.set()
        thread.join()
    assert writer.errors == []


def relations(connection: psycopg.Connection[Any]) -> list[str]:
    """The table and everything below it."""
    found = connection.execute(
        "WITH RECURSIVE tree AS (SELECT 'docs'::regclass::oid AS oid UNION ALL"
        " SELECT i.inhrelid FROM tree t JOIN pg_inherits i ON i.inhparent = t.oid)"
        " SELECT relname FROM tree JOIN pg_class c USING (oid) ORDER BY 1"
    ).fetchall()
    return [name for (name,) in found]


def shapes(connection: psycopg.Connection[Any]) -> dict[str, Any]:
    """What a user would see changed in any of the relations; columns as a set, for the vector's place is told."""
    told = {}
    for name in relations(connection):
        here = shape(connection, name)
        told[name] = {**here, "columns": sorted(here["columns"], key=str)}
    return told
