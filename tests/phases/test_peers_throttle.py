"""How the best existing tool loads the server: each test guards one sentence of that list."""

from __future__ import annotations

import threading
import time
from typing import Any

import psycopg
import pytest

from fix_commands import command
from fix_tables import NEW, OLD, REQUEST, advance, assert_exact, knowledge_base, one, steering, until
from revector.phases import backfill
from revector.work import Note, Observation, Recorded

WRITTEN = "SELECT count(embedding_g2) FROM kb"
ALIVE = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'revector%'"


def test_peer_17_encoder_never_waits_for_the_database(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serial loop fetch -> embed -> write: while somebody's lock holds up all writes, three windows are embedded."""
    monkeypatch.setattr(backfill, "_WINDOW_BLOCKS", (2, 2))
    knowledge_base(connection, 400, filler=500)
    advance(dsn, "EXPANDED")
    windows: list[int] = []
    original = backfill.encode

    def encode(work: Any, generation: Any, model: Any, texts: list[str]) -> Any:
        windows.append(len(texts))
        return original(work, generation, model, texts)

    monkeypatch.setattr(backfill, "encode", encode)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with steering(dsn) as migration:
                migration.run(REQUEST)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    with psycopg.connect(dsn) as theirs:
        theirs.execute("LOCK TABLE kb IN SHARE MODE")
        thread.start()
        # One is being written, one waits to be written, one has just been embedded.
        until(lambda: len(windows) >= 3 or failed)
        time.sleep(0.3)
        embedded, written = len(windows), one(connection, WRITTEN)
    thread.join(30)
    assert not thread.is_alive() and not failed
    assert (embedded, written) == (3, 0)
    assert_exact(connection, "kb", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=400)


def test_peer_17_throttling_by_load(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """No throttling by load: a run that makes a session wait says whom, writes in smaller pieces, and goes on."""
    knowledge_base(connection, 100, filler=500)
    advance(dsn, "EXPANDED")
    # Our writes take as long as on a server that is too busy: 40 ms a row, up to ten rows at a time.
    connection.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF current_setting('revector.writer', true) = 'on' THEN PERFORM pg_sleep(0.04); END IF; RETURN NEW; END $$;"
        " CREATE TRIGGER a_slow BEFORE UPDATE ON kb FOR EACH ROW EXECUTE FUNCTION slow();"
        " ALTER TABLE kb ENABLE ALWAYS TRIGGER a_slow"
    )
    notes: list[str] = []
    figures: dict[str, Any] = {}
    ended = threading.Event()

    def observe(seen: Observation) -> None:
        if isinstance(seen, Note) and seen.text.startswith("held back"):
            notes.append(seen.text)
            ended.set()
        if isinstance(seen, Recorded) and seen.step == "backfill":
            figures.update(seen.figures)

    def application() -> None:
        with psycopg.connect(dsn, autocommit=True) as session:
            while not ended.wait(0.005):
                session.execute("SELECT FROM kb WHERE id % 10 = 0 FOR UPDATE")

    client = threading.Thread(target=application)
    client.start()
    try:
        with steering(dsn, observe=observe) as migration:
            migration.run(REQUEST)
    finally:
        ended.set()
        client.join()
    assert figures["hot_expected"] > 0.5, "the table was never analysed"
    assert notes and notes[0].startswith("held back by sessions waiting for us: process "), notes
    assert figures["throttled_s"]["sessions waiting for us"] > 0
    assert_exact(connection, "kb", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=100)


def test_peer_18_no_full_scans_for_pending_counts(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """pending_count is a seq scan at start, after each pass, on Ctrl-C, three more in --check: ours go by the index."""
    knowledge_base(connection, 4000, filler=200)
    connection.execute("ALTER TABLE kb SET (autovacuum_enabled = off)")
    advance(dsn, "VERIFIED")
    connection.execute("VACUUM ANALYZE kb")
    connection.execute("UPDATE kb SET content = content || '!' WHERE id < 5")

    def read() -> tuple[int, int]:
        # A session tells what it has read before it leaves this list.
        until(lambda: one(connection, ALIVE) == 0)
        row = connection.execute(
            "SELECT seq_tup_read, (SELECT sum(idx_scan) FROM pg_stat_user_indexes i WHERE i.relid = t.relid"
            " AND indexrelname LIKE '%pending%') FROM pg_stat_user_tables t WHERE relname = 'kb'"
        ).fetchone()
        assert row is not None
        return row[0], row[1] or 0

    # status reads the table once, for the texts that are blank: no index can know them.
    for arguments, code, most in (
        (["cutover", "kb", "--check"], 1, 0),
        (["follow", "kb", "--once"], 0, 0),
        (["status", "kb"], 0, 4000),
    ):
        before = read()
        command(dsn, *arguments).exits(code)
        scanned, looked = (after - was for after, was in zip(read(), before, strict=True))
        assert scanned <= most and looked > 0, (arguments, scanned, looked)
    assert_exact(connection, "kb", "content", {"embedding_g2": NEW}, at_least=4000)
