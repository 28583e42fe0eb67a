"""Rollback without loss, what `--check` counts, and what keeps `finalize` from dropping vectors that somebody still writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from fix_commands import command
from fix_tables import (
    NEW,
    OLD,
    advance,
    assert_exact,
    assert_no_leftovers,
    body,
    fill,
    following,
    knowledge_base,
    one,
    shape,
    stage_of,
    steering,
    until,
    vector,
)
from revector import Embedder
from revector.embed.hashing import Hashing
from revector.errors import InputRefused, Refused
from revector.phases import finalize
from revector.search import Searcher
from revector.work import Note, Recorded, Work

BEFORE = {"embedding": OLD, "embedding_g2": NEW}
AFTER = {"embedding_g1": OLD, "embedding": NEW}


def old_view(connection: psycopg.Connection[Any]) -> None:
    """The view of the old version, as `expose` makes it: the vector column's name shows generation 1."""
    connection.execute(
        "CREATE SCHEMA rv_kb_g1; CREATE VIEW rv_kb_g1.kb WITH (security_invoker = true) AS"
        " SELECT id, title, content, note, filler, embedding_g1 AS embedding FROM public.kb"
    )


@contextmanager
def old_version(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(dsn, autocommit=True, options="-csearch_path=rv_kb_g1,public") as opened:
        yield opened


# -- rollback loses nothing -------------------------------------------------------------------------------------------


def test_rollback_keeps_what_both_versions_wrote(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Inserts, edits and deletes after cutover, by both versions at once: there, exact, and found with the old model."""
    knowledge_base(connection, 100)
    advance(dsn, "CUT_OVER")
    old_view(connection)
    stop, died = threading.Event(), []

    def write(model: str, options: str, base: int) -> None:
        try:
            with psycopg.connect(dsn, autocommit=True, options=options) as own:
                for turn in range(60):
                    if stop.is_set():
                        return
                    text = f"{model} wrote {turn}"
                    if turn % 3 == 0:
                        own.execute(
                            "INSERT INTO kb (id, title, content, note, filler, embedding) VALUES (%s, '', %s, '', '', %s)",
                            (base + turn, text, vector(model, text)),
                        )
                    elif turn % 3 == 1:
                        own.execute("UPDATE kb SET content = %s WHERE id = %s", (text, turn + base % 7))
                    else:
                        own.execute(
                            "DELETE FROM kb WHERE id = %s", (base + turn - 2,) if turn % 2 else (40 + turn // 2,)
                        )
        except BaseException as error:
            died.append(error)

    with following(dsn, connection):
        writers = [
            threading.Thread(target=write, args=(NEW, "", 1000)),
            threading.Thread(target=write, args=(OLD, "-csearch_path=rv_kb_g1,public", 2000)),
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert died == []
        connection.execute("DROP SCHEMA rv_kb_g1 CASCADE")
        until(lambda: one(connection, "SELECT count(*) FROM kb WHERE embedding IS NULL OR embedding_g1 IS NULL") == 0)
        told = command(dsn, "rollback", "kb", "--check", "--json").exits(0).json
        assert (told["missing"], told["followers"], told["model"]) == (0, 1, OLD)
        with steering(dsn) as migration:
            migration.rollback()
    assert_exact(connection, "kb", "content", BEFORE, at_least=80)
    written = connection.execute("SELECT id, content FROM kb WHERE id >= 1000 ORDER BY id").fetchall()
    assert any(key < 2000 for key, _ in written) and any(key >= 2000 for key, _ in written)
    from revector.db import Database
    from revector.settings import Settings

    settings = Settings(database_url=dsn)
    with Searcher(Database(settings), settings, "kb") as searcher:
        for key, text in written[::5]:
            found = searcher.search(text, 3)
            assert found.model == OLD and str(key) in [str(hit.id) for hit in found.hits]


# -- what would be missing --------------------------------------------------------------------------------------------


class Picky(Hashing):
    def encode(self, texts: Any, prompt: str, kind: str) -> Any:
        if any("forbidden" in text for text in texts):
            raise InputRefused("no such text, please", kind="refused")
        return super().encode(texts, prompt, kind)


def test_rollback_check_counts_what_search_would_miss(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting, refused and textless rows, each by its name; nothing is changed; 0 once they are filled."""
    knowledge_base(connection, 40, not_null=False)
    original = Embedder._make
    monkeypatch.setattr(Embedder, "_make", lambda self: Picky(16) if self.spec == OLD else original(self))
    advance(dsn, "CUT_OVER")
    connection.execute(
        "INSERT INTO kb (id, content, embedding) VALUES (900, 'a forbidden text', %s)",
        (vector(NEW, "a forbidden text"),),
    )
    fill(dsn, connection)
    connection.execute("INSERT INTO kb (id, embedding) VALUES (901, %s)", (vector(NEW, "nothing"),))
    connection.execute("UPDATE kb SET content = content || '.' WHERE id < 3")
    before = shape(connection), one(connection, "SELECT count(*) FROM revector.events")
    with steering(dsn) as migration:
        found = migration.missing("rollback")
    assert (found.waiting, found.refused, found.without_text, found.outside, found.rows) == (3, 1, 1, 0, 5)
    said = command(dsn, "rollback", "kb", "--check").exits(1)
    assert said.out.startswith("kb: after rollback hash:16 answers, and search misses 5 rows.\n")
    assert "  wait for the follower  3\n" in said.out and said.out.endswith("followers alive        0\n")
    assert said.last.splitlines()[0] == "failed: kb: search would miss 5 rows after rollback"
    assert "revector follow kb --once" in said.last
    told = command(dsn, "rollback", "kb", "--check", "--json").exits(1).json
    assert (told["format"], told["missing"], told["waiting"], told["refused"]) == (1, 5, 3, 1)
    assert (shape(connection), one(connection, "SELECT count(*) FROM revector.events")) == before
    connection.execute("DELETE FROM kb WHERE id >= 900")
    fill(dsn, connection)
    assert command(dsn, "rollback", "kb", "--check").exits(0).out == (
        "kb: after rollback hash:16 answers, and search misses no row.\nnext: revector rollback kb\n"
    )


def test_cutover_check_is_the_same_with_the_sides_swapped(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 40)
    assert "no migration has been started" in command(dsn, "cutover", "kb", "--check").exits(3).err
    advance(dsn, "VERIFIED")
    assert command(dsn, "cutover", "kb", "--check", "--json").exits(0).json["missing"] == 0
    connection.execute("UPDATE kb SET content = content || '.' WHERE id < 7")
    assert command(dsn, "cutover", "kb", "--check", "--json").exits(1).json["waiting"] == 7
    assert stage_of(connection)[0] == "VERIFIED"
    assert "rollback is not possible at VERIFIED" in command(dsn, "rollback", "kb", "--check").exits(3).err
    assert "--json: only with --check" in command(dsn, "cutover", "kb", "--json").exits(2).err


# -- finalize waits until the old side is quiet -----------------------------------------------------------------------


def test_bare_writers_are_no_sign_of_the_old_version(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The bare name is the new side's after cutover, however much is written, and what it was before does not count."""
    knowledge_base(connection, 40)
    advance(dsn, "SERVED")
    connection.execute("UPDATE kb SET content = 'x', embedding = %s WHERE id = 1", (vector(OLD, "x"),))
    fill(dsn, connection)
    with steering(dsn) as migration:
        assert migration.status().live.written is not None  # type: ignore[union-attr]
        connection.execute("UPDATE kb SET content = 'y', embedding = %s WHERE id = 2", (vector(OLD, "y"),))
        migration.cutover(without_follower=True)
    connection.execute("UPDATE kb SET content = 'z', embedding = %s WHERE id = 3", (vector(NEW, "z"),))
    fill(dsn, connection)
    with steering(dsn) as migration:
        now = migration.status()
        assert now.live is not None and now.live.written is not None and now.live.written < 60
        migration.finalize()
    assert_no_leftovers(connection)


def test_rows_left_pending_by_the_swap_are_no_sign_either(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A row that the old side wrote before the cutover, and that is filled after it, was written under the bare name."""
    knowledge_base(connection, 40)
    advance(dsn, "SERVED")

    def write(seen: Any) -> None:
        if getattr(seen, "step", "") == "cutover.catch_up" and type(seen).__name__ == "Recorded":
            connection.execute("UPDATE kb SET content = 'late', embedding = %s WHERE id < 3", (vector(OLD, "late"),))

    with steering(dsn, observe=write) as migration:
        migration.cutover(without_follower=True)
    connection.execute("UPDATE kb SET note = 'touched since' WHERE id = 2")
    assert one(connection, "SELECT count(*) FROM kb WHERE embedding IS NULL AND embedding_g1 IS NOT NULL") == 3
    fill(dsn, connection)
    assert one(connection, "SELECT written IS NULL FROM revector.generations WHERE number = 1")
    with steering(dsn) as migration:
        migration.finalize()


@pytest.mark.parametrize("statement", ["insert", "update"])
@pytest.mark.parametrize("follower", [True, False])
def test_refused_while_the_old_side_writes(
    dsn: str, connection: psycopg.Connection[Any], statement: str, follower: bool
) -> None:
    """A write through the old version's view is seen when its row is filled, at the latest by finalize itself."""
    knowledge_base(connection, 40)
    advance(dsn, "CUT_OVER")
    old_view(connection)
    with old_version(dsn) as old:
        if statement == "insert":
            old.execute(
                "INSERT INTO kb (id, title, content, note, filler, embedding) VALUES (900, '', 'theirs', '', '', %s)",
                (vector(OLD, "theirs"),),
            )
        else:
            old.execute("UPDATE kb SET content = 'theirs', embedding = %s WHERE id = 5", (vector(OLD, "theirs"),))
    connection.execute("DROP SCHEMA rv_kb_g1 CASCADE")
    if follower:
        fill(dsn, connection)
    refused = command(dsn, "finalize", "kb").exits(3)
    assert refused.last.startswith(f"refused: kb: {OLD} was written ")
    assert "within the last 1h" in refused.last and "revector finalize kb --quiet-for" in refused.last
    assert f"{NEW}: last written not since SERVED, last read" in refused.err
    assert stage_of(connection) == ("CUT_OVER", None)
    now = command(dsn, "status", "kb", "--json").exits(0).json
    assert now["live"]["written_s"] is None and 0 <= now["other"]["written_s"] < 60
    assert "written " in command(dsn, "status", "kb").exits(0).out
    time.sleep(1.1)
    command(dsn, "finalize", "kb", "--quiet-for", "1h").exits(3)
    command(dsn, "finalize", "kb", "--quiet-for", "soon").exits(2)
    command(dsn, "finalize", "kb", "--quiet-for", "1s").exits(0)
    assert_exact(connection, "kb", "content", {"embedding": NEW}, at_least=40)
    assert_no_leftovers(connection)


def test_quiet_for_nothing_finalizes_at_once(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 20)
    advance(dsn, "CUT_OVER")
    old_view(connection)
    with old_version(dsn) as old:
        old.execute("UPDATE kb SET content = 'theirs', embedding = %s WHERE id = 5", (vector(OLD, "theirs"),))
    connection.execute("DROP SCHEMA rv_kb_g1 CASCADE")
    with steering(dsn) as migration:
        with pytest.raises(Refused, match="was written"):
            migration.finalize()
        migration.finalize(quiet_for=0)
    assert_exact(connection, "kb", "content", {"embedding": NEW}, at_least=20)


def test_last_read_is_told(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Reads are those of the vector indexes, by the server's statistics."""
    if connection.info.server_version < 160000:
        pytest.skip("pg_stat_all_indexes.last_idx_scan came with PostgreSQL 16")
    knowledge_base(connection, 40)
    advance(dsn, "CUT_OVER")
    connection.execute("SELECT pg_stat_reset()")
    told: list[str] = []
    with steering(dsn, observe=lambda s: told.append(s.text) if isinstance(s, Note) else None) as migration:
        assert migration.status().other.read is None  # type: ignore[union-attr]
        with connection.transaction():
            connection.execute("SET LOCAL enable_seqscan = off")
            connection.execute("SELECT id FROM kb ORDER BY embedding_g1 <=> %s LIMIT 3", (vector(OLD, body(1)),))
        connection.execute("SELECT pg_stat_force_next_flush()")
        until(lambda: migration.status().other.read is not None)  # type: ignore[union-attr]
        migration.finalize()
    assert any(
        text.startswith(f"{OLD}: last written not since SERVED, last read ") and "s ago" in text for text in told
    )
    assert any(text.startswith(f"{NEW}: ") and text.endswith("last read never") for text in told)


# -- what finalize drops, and what it waits for -----------------------------------------------------------------------


def test_old_vector_index_goes_before_the_lock(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The user's vector index is dropped CONCURRENTLY, as ours are; one that reads other columns goes with the column."""
    knowledge_base(connection, 20)
    advance(dsn, "CUT_OVER")
    connection.execute("CREATE INDEX other ON kb (note) WHERE embedding_g1 IS NOT NULL")
    left: list[list[str]] = []

    def look(seen: Any) -> None:
        if isinstance(seen, Recorded) and seen.step == "finalize.drop_indexes":
            found = connection.execute("SELECT indexname FROM pg_indexes WHERE tablename = 'kb' ORDER BY 1").fetchall()
            left.append([name for (name,) in found])

    with steering(dsn, observe=look) as migration:
        migration.finalize()
    assert left == [["kb_embedding_idx", "kb_pkey", "other"]]
    assert_no_leftovers(connection)


@pytest.mark.parametrize("not_null", [True, False])
@pytest.mark.parametrize(("closing", "start", "keep"), [("finalize", "CUT_OVER", NEW), ("abort", "SERVED", OLD)])
def test_writers_that_never_pause_are_named(
    dsn: str,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    closing: str,
    start: str,
    keep: str,
    not_null: bool,
) -> None:
    """Rows that become pending as fast as they are filled: the refusal says who does it, and how to go on."""
    monkeypatch.setattr(finalize, "_ATTEMPTS", 2)
    knowledge_base(connection, 20, not_null=not_null)
    advance(dsn, start)
    original = Work.pause

    def pause(self: Work, name: str, *arguments: Any, **options: Any) -> Any:
        if name == f"{closing}.close":
            connection.execute("UPDATE kb SET content = content || '.' WHERE id = 1")
        return original(self, name, *arguments, **options)

    monkeypatch.setattr(Work, "pause", pause)
    with steering(dsn) as migration, pytest.raises(Refused, match="rows without a vector") as caught:
        getattr(migration, closing)()
    assert keep in str(caught.value) and "writes texts without their vectors" in caught.value.why
    assert "stop" in caught.value.hint and caught.value.hint.endswith(f"revector {closing} kb")
    assert stage_of(connection) == (start, None)
