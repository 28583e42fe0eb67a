"""What `status` reads: exact where that is cheap, marked as an estimate where it is not, and no scan for a monitor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql

from fix_commands import command
from fix_tables import NEW, OLD, REQUEST, Halt, advance, knowledge_base, one, settings, steering
from revector import migration as migrations
from revector import report
from revector.db import Database, Session
from revector.work import Observation, Progress

STAGES = ("PLANNED", "EXPANDED", "BACKFILLED", "INDEXED", "VERIFIED", "SERVED", "CUT_OVER")


def more_rows(connection: psycopg.Connection[Any], first: int, last: int) -> None:
    """Rows that lack nothing, as the follower would leave them, each with 500 bytes of text."""
    connection.execute("SET revector.writer = 'on'")
    connection.execute(
        "INSERT INTO kb (id, content, embedding, embedding_g1) SELECT n, repeat('text ' || n, 60),"
        " array_fill(n::real, '{32}')::vector, array_fill(n::real, '{16}')::vector FROM generate_series(%s::int, %s::int) AS n",
        (first, last),
    )
    connection.execute("RESET revector.writer")
    connection.execute("VACUUM ANALYZE kb")


@contextmanager
def sent() -> Iterator[list[tuple[str, Any]]]:
    """What our sessions ask meanwhile: (statement, parameters)."""
    asked: list[tuple[str, Any]] = []
    original = Session._execute

    def spy(self: Session, statement: Any, params: Any) -> Any:
        asked.append((statement if isinstance(statement, str) else statement.as_string(None), params))
        return original(self, statement, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "_execute", spy)
        yield asked


def scans(part: dict[str, Any]) -> list[tuple[str, str]]:
    """(kind of scan, relation) of every scan in a plan."""
    own = [(part["Node Type"], part["Relation Name"])] if "Relation Name" in part else []
    return own + [scan for below in part.get("Plans", ()) for scan in scans(below)]


def cost(dsn: str, asked: list[tuple[str, Any]]) -> tuple[int, list[tuple[str, str]]]:
    """Buffers that these statements touch when they are asked again, planning included, and their scans of `kb`."""
    touched, found = 0, []
    with Database(settings(dsn)).connect("control") as session, session.transaction():
        for text, params in asked:
            if not text.lstrip().startswith(("SELECT", "WITH", "INSERT", "UPDATE", "DELETE")):
                session.execute(sql.SQL(text))
                continue
            for _ in range(2):  # by the second time the session's caches are warm
                told = session.row(sql.SQL("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + text), **params)[0][0]
            for part in (told["Plan"], told.get("Planning", {})):
                touched += part.get("Shared Hit Blocks", 0) + part.get("Shared Read Blocks", 0)
            found += [scan for scan in scans(told["Plan"]) if scan[1] == "kb"]
    return touched, found


def seq_scans(connection: psycopg.Connection[Any]) -> int:
    connection.execute("SELECT pg_stat_force_next_flush()")
    return int(one(connection, "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'kb'"))


def test_a_monitor_reads_no_table(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """`status --check` touches as many buffers on 20,000 rows as on 200, and scans no table at any stage."""
    knowledge_base(connection, 20, index=None)
    for stage in STAGES:
        advance(dsn, stage)
        with sent() as asked, steering(dsn) as migration:
            assert migration.status(check=True).stage == stage
        assert "Seq Scan" not in {kind for kind, _ in cost(dsn, asked)[1]}, stage
    touched = []
    for first, last in ((100, 299), (300, 20_099)):
        more_rows(connection, first, last)
        with sent() as asked, steering(dsn) as migration:
            assert migration.status(check=True).alerts == ()
        buffers, found = cost(dsn, asked)
        assert [kind for kind, _ in found] == ["Index Scan", "Index Scan"], found
        touched.append(buffers)
    few, many = touched
    assert many <= few + 10, touched
    assert many < 250, touched
    before = seq_scans(connection)
    command(dsn, "status", "kb", "--check").exits(0)
    assert seq_scans(connection) == before


def test_a_monitor_is_told_of_pending_rows_without_counting_them_all(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    knowledge_base(connection, 60)
    advance(dsn, "CUT_OVER")
    connection.execute("UPDATE kb SET content = 'new' WHERE id < 20")
    monkeypatch.setattr(migrations, "_COUNTED", (15, 5))
    with steering(dsn) as migration:
        now = migration.status(check=True)
        (alert,) = now.alerts
        assert alert.what.startswith(
            f"no follower is alive, and at least 5 rows have no vector of {NEW} and at least 5"
        )
        assert now.to_json()["estimates"] == {"live.pending": "at least", "other.pending": "at least"}
        assert now.to_json()["rows"] == {"total": None, "blank": None, "failed": None}
        whole = migration.status()
    assert (whole.rows, whole.live and whole.live.pending) == (60, 15)
    assert "-d  at least 15 pending" in report.status(whole)
    connection.execute("DROP INDEX rv_kb_g1_pending")
    with steering(dsn) as migration:
        now = migration.status(check=True)
    assert now.other is not None and now.other.pending is None
    assert f"how many rows have no vector of {OLD} cannot be told without its index" in now.alerts[0].what


def test_a_large_table_is_estimated_and_said_to_be(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stage of a large table makes `status` read it; what it takes from statistics and windows is told as such."""
    knowledge_base(connection, 3000, filler=300)
    connection.execute("ALTER TABLE kb SET (autovacuum_enabled = off)")
    connection.execute("VACUUM ANALYZE kb")
    monkeypatch.setattr(migrations, "CHEAP", 0)
    advance(dsn, "EXPANDED")
    told = []

    def look() -> migrations.Status:
        with sent() as asked, steering(dsn, "kb") as migration:
            now = migration.status()
        assert "Seq Scan" not in {kind for kind, _ in cost(dsn, asked)[1]}
        return now

    now = look()
    assert now.known == "about" and now.rows is not None and abs(now.rows - 3000) < 300 and now.blank is None
    assert now.other is not None and now.other.pending == now.rows
    assert f"  about {now.rows:,} of {now.rows:,} pending\n" in report.status(now)
    assert now.to_json()["estimates"] == {"rows.total": "about", "other.pending": "about"}

    def observe(seen: Observation) -> None:
        if isinstance(seen, Progress) and seen.phase == "backfill" and seen.done >= 1000:
            raise Halt

    with pytest.raises(Halt), steering(dsn, observe=observe) as migration:
        migration.run(REQUEST)
    now = look()
    really = one(connection, "SELECT count(*) FROM kb WHERE embedding_g2 IS NULL")
    assert 0 < really < 3000
    assert now.other is not None and now.other.pending is not None and abs(now.other.pending - really) < 600
    for stage in STAGES[2:]:
        advance(dsn, stage)
        now = look()
        assert now.other is not None and now.other.pending == 0
        assert now.other.known == ("about" if stage == "BACKFILLED" else "exact")
        told.append(report.status(now))
    assert "\n  rows       about 3," in told[-1] and "  0 pending\n" in told[-1]


def test_a_small_table_is_counted(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 60, not_null=False)
    connection.execute("UPDATE kb SET content = ' ' WHERE id < 3")
    for stage, pending in (("EXPANDED", 60), ("VERIFIED", 0)):
        advance(dsn, stage)
        told = command(dsn, "status", "kb", "--json").exits(0).json
        assert told["rows"]["total"] == 60 and told["estimates"] == {}
        assert told["other"]["pending"] == pending
