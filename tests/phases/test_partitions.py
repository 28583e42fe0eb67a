"""Partitioned tables down every road: each row's vectors right in every leaf, and every leaf as it was afterwards."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from fix_partitions import KINDS, partitioned, relations, shapes, written
from fix_tables import (
    NEW,
    OLD,
    REQUEST,
    assert_exact,
    assert_no_leftovers,
    body,
    fill,
    following,
    steering,
    vector,
)
from revector.phases import verify

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
