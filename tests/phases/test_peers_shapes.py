"""How the best existing tool breaks on shapes of tables: each test guards one sentence of that list."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from fix_partitions import add, partitioned
from fix_tables import NEW, OLD, REQUEST, add_rows, advance, assert_exact, fill, knowledge_base, one, steering
from revector import Request
from revector.plan import hot_share


def updates(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    """(rows written, of these HOT) as the backfill counted them by the server's own counters."""
    told = one(connection, "SELECT figures FROM revector.events WHERE step = 'backfill'")
    return told["rows"], told["hot"]


@pytest.mark.parametrize("fillfactor", [100, 70])
@pytest.mark.parametrize("kind", ["plain", "partitioned"])
def test_peer_16_backfill_keeps_hot(dsn: str, connection: psycopg.Connection[Any], kind: str, fillfactor: int) -> None:
    """0 of 2,000 updates were HOT, and each one that is not also inserts into the old HNSW index."""
    if kind == "plain":
        table, tables, index = "kb", ["kb"], "kb_embedding_idx"
        knowledge_base(connection, 0)
    else:
        table, tables, index = "docs", ["docs_p0", "docs_p1", "docs_p2"], "docs_p0_embedding_idx"
        partitioned(connection, "list", 0)
    for name in tables:
        connection.execute(f"ALTER TABLE {name} SET (fillfactor = {fillfactor})")
        connection.execute(f"ALTER TABLE {name} ALTER note SET DEFAULT repeat('x', 800)")
    connection.execute(f"ALTER TABLE {table} ALTER note SET DEFAULT repeat('x', 800)")
    if kind == "plain":
        add_rows(connection, range(400), OLD)
    else:
        add(connection, range(400))
    connection.execute("VACUUM ANALYZE")
    before = one(connection, "SELECT pg_relation_size(%s::regclass)", index)
    advance(dsn, "BACKFILLED", Request(from_=OLD, to="hash:768"), table=table)
    written, hot = updates(connection)
    assert written == 400
    after = one(connection, "SELECT pg_relation_size(%s::regclass)", index)
    if fillfactor == 70:
        assert hot >= 0.97 * written, f"{hot} of {written} HOT"
        assert after == before, "entries were added to the old index"
    else:
        assert hot >= 0.75 * written, f"{hot} of {written} HOT"
        assert after <= 1.3 * before, f"the old index grew from {before} to {after} bytes"
    assert_exact(connection, table, "content", {"embedding": OLD, "embedding_g2": "hash:768"})


@pytest.mark.parametrize(
    ("filler", "rows", "new"), [(3900, 120, "hash:32"), (1900, 120, "hash:32"), (40, 800, "hash:8")]
)
def test_hot_share_is_what_the_plan_expects(
    dsn: str, connection: psycopg.Connection[Any], filler: int, rows: int, new: str
) -> None:
    """Wide rows (2 and 4 a page) and narrow ones (about 30): within 12 points of what `plan` tells beforehand."""
    knowledge_base(connection, rows, "hash:12", filler=filler)
    connection.execute("ALTER TABLE kb ALTER filler SET STORAGE PLAIN")
    connection.execute("VACUUM FULL kb")
    connection.execute("ANALYZE kb")
    request = Request(from_="hash:12", to=new)
    with steering(dsn) as migration:
        expected = migration.preview(request).estimate.hot_share
    advance(dsn, "BACKFILLED", request)
    updated, hot = updates(connection)
    assert updated == rows
    assert hot / updated >= expected - 0.12, f"{hot} of {updated} HOT, {expected:.2f} expected"
    assert 0 < expected < 1
    assert hot_share(0, 20, 1) == 0.0


def test_peer_20_partitions_and_composite_keys(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Unsupported: composite PK, partitions."""
    partitioned(connection, "two levels", 60)
    with steering(dsn, "docs") as migration:
        found = {f.title: f for f in migration.preview(REQUEST).draft.findings}
        assert found["table"].ok and "key id, tenant" in found["table"].finding
        assert "4 partitions by id, tenant" in found["table"].finding
    advance(dsn, "CUT_OVER", Request(from_=OLD, to=NEW, backup=True), table="docs")
    fill(dsn, connection, "docs")
    assert_exact(connection, "docs", "content", {"embedding": NEW, "embedding_g1": OLD}, at_least=60)
    kept = connection.execute("SELECT count(*), count(DISTINCT (id, tenant)) FROM docs_backup_16").fetchone()
    assert kept == (60, 60)
    with steering(dsn, "docs") as migration:
        migration.rollback(without_follower=True)
        migration.cutover(without_follower=True)
        migration.finalize(drop_backup=True)
    assert_exact(connection, "docs", "content", {"embedding": NEW}, at_least=60)
