"""The swap, the way back, and both ways to close: what each leaves, and everything that must refuse or change nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray
from psycopg import sql

from fix_tables import (
    NEW,
    OLD,
    REQUEST,
    Halt,
    advance,
    assert_exact,
    assert_no_leftovers,
    embedder,
    fill,
    following,
    halting,
    knowledge_base,
    names,
    oid_of,
    one,
    shape,
    stage_of,
    steering,
    until,
    vector,
)
from revector import Embedder, Request, trigger
from revector.db import PauseLimits
from revector.embed.hashing import Hashing
from revector.errors import GateFailed, InputRefused, PauseBudgetMissed, Refused
from revector.ledger import TRANSITIONS
from revector.phases import backfill
from revector.work import Effect, Note, Observation, Progress, Recorded

BEFORE = {"embedding": OLD, "embedding_g2": NEW}
AFTER = {"embedding_g1": OLD, "embedding": NEW}
#: Migration commands with what they need to run without a follower.
COMMANDS: dict[str, dict[str, Any]] = {
    "cutover": {"without_follower": True},
    "rollback": {"without_follower": True},
    "finalize": {},
    "abort": {},
}


def give(dsn: str, command: str, **options: Any) -> Any:
    with steering(dsn) as migration:
        return getattr(migration, command)(**{**COMMANDS.get(command, {}), **options})


# -- the swap ---------------------------------------------------------------------------------------------------------


def test_names_through_cutover_rollback_cutover_finalize(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The live column and its index always have the user's names; the other side has ours; twice is as once."""
    knowledge_base(connection, 40)
    connection.execute("COMMENT ON COLUMN kb.embedding IS 'what search reads'")
    before = (
        {"embedding": "vector(16)", "embedding_g2": "vector(32)"},
        {
            "kb_embedding_idx": "embedding",
            "rv_kb_g2_1": "embedding_g2",
            "rv_kb_g1_pending": "WHERE (embedding IS NULL)",
            "rv_kb_g2_pending": "WHERE (embedding_g2 IS NULL)",
        },
    )
    after = (
        {"embedding_g1": "vector(16)", "embedding": "vector(32)"},
        {
            "rv_kb_g1_1": "embedding_g1",
            "kb_embedding_idx": "embedding",
            "rv_kb_g1_pending": "WHERE (embedding_g1 IS NULL)",
            "rv_kb_g2_pending": "WHERE (embedding IS NULL)",
        },
    )
    comments = "SELECT col_description('kb'::regclass, attnum) FROM pg_attribute WHERE attrelid = 'kb'::regclass AND attname = "
    advance(dsn, "VERIFIED")
    assert names(connection) == before
    for command, expected, stage, answering in (
        ("cutover", after, "CUT_OVER", NEW),
        ("rollback", before, "SERVED", OLD),
        ("cutover", after, "CUT_OVER", NEW),
        ("rollback", before, "SERVED", OLD),
        ("cutover", after, "CUT_OVER", NEW),
    ):
        result = give(dsn, command)
        assert (names(connection), str(result.stage), result.answering) == (expected, stage, answering)
        assert one(connection, comments + "'embedding'") == "what search reads"
        other = "embedding_g1" if stage == "CUT_OVER" else "embedding_g2"
        assert one(connection, comments + f"'{other}'") is None
        assert_exact(connection, "kb", "content", AFTER if stage == "CUT_OVER" else BEFORE, at_least=40)
    give(dsn, "finalize")
    assert names(connection) == ({"embedding": "vector(32)"}, {"kb_embedding_idx": "embedding"})
    assert one(connection, comments + "'embedding'") == "what search reads"
    assert_no_leftovers(connection)


def test_second_migration_after_the_first(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """After finalize, and after abort, the next migration starts from what is there, with numbers of its own."""
    knowledge_base(connection, 30)
    advance(dsn, "CUT_OVER")
    give(dsn, "finalize")
    advance(dsn, "VERIFIED", Request(to="hash:24"))
    give(dsn, "abort")
    advance(dsn, "CUT_OVER", Request(to="hash:48"))
    assert_exact(connection, "kb", "content", {"embedding_g2": NEW, "embedding": "hash:48"}, at_least=30)
    give(dsn, "finalize")
    assert_exact(connection, "kb", "content", {"embedding": "hash:48"}, at_least=30)
    assert_no_leftovers(connection)


def test_pause_is_measured_and_short(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The pause that is reported is what a reader at full speed could have waited, and is on record."""
    knowledge_base(connection, 200)
    advance(dsn, "SERVED")
    stop, longest = threading.Event(), [0.0]

    def read() -> None:
        with psycopg.connect(dsn, autocommit=True) as reader:
            while not stop.is_set():
                began = time.monotonic()
                reader.execute("SELECT id, content FROM kb WHERE id = 7").fetchall()
                longest[0] = max(longest[0], time.monotonic() - began)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        told = [give(dsn, command).figures for command in ("cutover", "rollback", "cutover")]
    finally:
        stop.set()
        thread.join()
    assert all(0 < f["hold_ms"] <= f["pause_ms"] < 200 and f["attempt"] >= 1 for f in told)
    assert longest[0] < 1.0
    recorded = connection.execute(
        "SELECT figures FROM revector.events WHERE step = 'pause' ORDER BY id DESC LIMIT 3"
    ).fetchall()
    assert [round(row[0]["hold_ms"], 1) for row in recorded] == [f["hold_ms"] for f in reversed(told)]


def test_budget_is_on_wait_and_hold_together(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Several statements that each stay below the budget must not exceed it together."""
    knowledge_base(connection, 5)
    with steering(dsn) as migration:
        slow = [sql.SQL("SELECT pg_sleep(0.12)")] * 3
        with pytest.raises(PauseBudgetMissed):
            migration.database.pause(migration.control, sql.Identifier("public", "kb"), slow, attempts=1)


def test_writes_after_each_swap_are_right_in_both(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Inserts, edits and deletes after cutover are there, and right, after rollback, and the other way round."""
    knowledge_base(connection, 60)
    advance(dsn, "VERIFIED")
    with following(dsn, connection):
        key = 1000
        for command, columns, live in (
            ("cutover", AFTER, NEW), ("rollback", BEFORE, OLD), ("cutover", AFTER, NEW),
        ):  # fmt: skip
            give(dsn, command, without_follower=False)
            key += 10
            connection.execute("DELETE FROM kb WHERE id = %s", (key % 60,))
            for number in range(3):
                text = f"{command} {key + number}"
                connection.execute(
                    "INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s)",
                    (key + number, text, vector(live, text)),
                )
            connection.execute("UPDATE kb SET content = content || ' edited' WHERE id % 7 = 0")
            text = f"with vector {key}"
            connection.execute("UPDATE kb SET content = %s, embedding = %s WHERE id = 5", (text, vector(live, text)))
            pending = sql.SQL("SELECT count(*) FROM kb WHERE {} IS NULL OR {} IS NULL").format(
                *map(sql.Identifier, columns)
            )
            until(lambda pending=pending: one(connection, pending) == 0)  # type: ignore[misc]
            assert_exact(connection, "kb", "content", columns, at_least=59)
    assert one(connection, "SELECT count(*) FROM kb WHERE id >= 1000") == 9


def test_writes_without_a_follower_are_caught_up_by_the_swap(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Even with no follower, the catch-up of the next command fills what was written since the last."""
    knowledge_base(connection, 40)
    advance(dsn, "CUT_OVER")
    connection.execute("UPDATE kb SET content = 'after cutover ' || id WHERE id < 20")
    give(dsn, "rollback")
    assert_exact(connection, "kb", "content", BEFORE, at_least=40)
    connection.execute("UPDATE kb SET content = 'after rollback ' || id WHERE id < 20")
    give(dsn, "cutover")
    assert_exact(connection, "kb", "content", AFTER, at_least=40)


def test_refresh_old_renews_stale_live_vectors(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Vectors that were stale before us are made right on request, so that rollback answers with right ones."""
    knowledge_base(connection, 60)
    connection.execute("UPDATE kb SET embedding = (SELECT embedding FROM kb WHERE id = 59) WHERE id < 10")
    connection.execute("UPDATE kb SET content = 'edited without its vector ' || id WHERE id BETWEEN 10 AND 14")
    advance(dsn, "VERIFIED")
    told: list[str] = []
    with steering(dsn, observe=lambda seen: told.append(seen.text) if isinstance(seen, Note) else None) as migration:
        migration.cutover(without_follower=True, refresh_old=True)
    assert any(text.startswith("15 stale vectors") for text in told)
    figures = one(connection, "SELECT figures FROM revector.events WHERE step = 'cutover.refresh'")
    assert figures == {"model": OLD, "rows": 60, "renewed": 15, "refused": 0}
    assert_exact(connection, "kb", "content", AFTER, at_least=60)


def test_refresh_old_misses_no_row_that_moves_or_is_locked(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """An UPDATE takes stale rows to where the scan has been; another session holds a stale row for half a second."""
    knowledge_base(connection, 300, filler=600)
    connection.execute("UPDATE kb SET embedding = (SELECT embedding FROM kb WHERE id = 7) WHERE id > 200")
    advance(dsn, "VERIFIED")
    with psycopg.connect(dsn) as other:

        def disturb(seen: Observation) -> None:
            if isinstance(seen, Progress) and seen.phase == "refresh" and seen.done == 3:
                other.execute("SELECT FROM kb WHERE id = 251 FOR UPDATE")
                connection.execute("UPDATE kb SET note = 'moved' WHERE id % 2 = 0")
                threading.Timer(0.5, other.commit).start()

        with steering(dsn, observe=disturb) as migration:
            migration.cutover(without_follower=True, refresh_old=True)
    assert_exact(connection, "kb", "content", AFTER, at_least=300)


def test_refresh_old_meets_rows_that_move_while_the_model_loads(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is measured once the model answers: what is written meanwhile lies behind its old end."""
    knowledge_base(connection, 300, filler=600)
    connection.execute("UPDATE kb SET embedding = (SELECT embedding FROM kb WHERE id = 7) WHERE id > 280")
    advance(dsn, "SERVED")
    original = Embedder._make

    def make(self: Embedder) -> Any:
        if self.spec == OLD:
            connection.execute("UPDATE kb SET note = 'moved'")
        return original(self)

    monkeypatch.setattr(Embedder, "_make", make)
    with steering(dsn) as migration:
        migration.cutover(without_follower=True, refresh_old=True)
    assert_exact(connection, "kb", "content", AFTER, at_least=300)


def test_refresh_old_ends_while_rows_are_written_all_the_time(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that never rests is no reason to give up: what was right once stays right."""
    monkeypatch.setattr(backfill, "_REFRESH_PATIENCE", 0.2)
    knowledge_base(connection, 600)
    connection.execute("UPDATE kb SET embedding = (SELECT embedding FROM kb WHERE id = 7) WHERE id > 580")
    advance(dsn, "SERVED")
    encode = Hashing.encode

    def disturbed(self: Hashing, given: Sequence[str], prompt: str, kind: str) -> NDArray[np.float32]:
        connection.execute("UPDATE kb SET note = 'moved' WHERE id < 580")
        return encode(self, given, prompt, kind)

    monkeypatch.setattr(Hashing, "encode", disturbed)
    with steering(dsn) as migration:
        migration.cutover(without_follower=True, refresh_old=True)
    assert_exact(connection, "kb", "content", AFTER, at_least=600)


def test_refresh_old_embeds_what_it_renewed_only_once(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own writes are no news; what an application writes over them is."""
    knowledge_base(connection, 300, filler=600)
    connection.execute("UPDATE kb SET embedding = (SELECT embedding FROM kb WHERE id = 7) WHERE id > 200")
    advance(dsn, "SERVED")
    texts: list[str] = []
    encode = Hashing.encode

    def counting(self: Hashing, given: Sequence[str], prompt: str, kind: str) -> NDArray[np.float32]:
        texts.extend(text for text in given if self.dimension == 16 and text.startswith("row "))
        return encode(self, given, prompt, kind)

    def disturb(seen: Observation) -> None:
        if isinstance(seen, Progress) and seen.phase == "refresh" and seen.done == 3:
            connection.execute("UPDATE kb SET note = 'again' WHERE id < 4")

    with steering(dsn, observe=disturb) as migration:
        monkeypatch.setattr(Hashing, "encode", counting)
        migration.cutover(without_follower=True, refresh_old=True)
    # The four are met where they went, by the scan or after it, or by both.
    assert 300 + 4 <= len(texts) <= 300 + 8
    assert_exact(connection, "kb", "content", AFTER, at_least=300)


def test_refresh_old_names_what_the_old_model_refuses(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can say whether such a vector is right. It answers at present: it stays, and is told or allowed."""
    knowledge_base(connection, 60)
    connection.execute("UPDATE kb SET content = 'forbidden', embedding = %s WHERE id = 3", (vector(OLD, "forbidden"),))
    connection.execute("UPDATE kb SET embedding = (SELECT embedding FROM kb WHERE id = 7) WHERE id = 9")
    advance(dsn, "SERVED")
    encode = Hashing.encode

    def picky(self: Hashing, given: Sequence[str], prompt: str, kind: str) -> NDArray[np.float32]:
        if self.dimension == 16 and "forbidden" in given:
            raise InputRefused("no such text, please", kind="refused")
        return encode(self, given, prompt, kind)

    monkeypatch.setattr(Hashing, "encode", picky)
    told: list[str] = []
    with steering(dsn, observe=lambda seen: told.append(seen.text) if isinstance(seen, Note) else None) as migration:
        with pytest.raises(GateFailed, match=f"{OLD} refuses 1 texts, so their vectors cannot be compared") as caught:
            migration.cutover(without_follower=True, refresh_old=True)
        assert "revector cutover kb --refresh-old --allow-failed 1" in caught.value.hint
        assert stage_of(connection) == ("SERVED", None)
        migration.cutover(without_follower=True, refresh_old=True, allow_failed=1)
    monkeypatch.undo()
    assert any("their vectors stay as they are" in text for text in told)
    assert_exact(connection, "kb", "content", AFTER, at_least=60)


def test_refresh_old_misses_no_row_of_a_table_that_is_rewritten(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """VACUUM FULL takes rows to where the scan has been, and they look as old as they were."""
    knowledge_base(connection, 400, filler=600)
    connection.execute("UPDATE kb SET embedding = (SELECT embedding FROM kb WHERE id = 7) WHERE id > 340")
    advance(dsn, "SERVED")
    connection.execute("DELETE FROM kb WHERE id BETWEEN 100 AND 250")

    rewritten = []

    def rewrite(seen: Observation) -> None:
        if isinstance(seen, Progress) and seen.phase == "refresh" and seen.done == 4 < seen.total and not rewritten:
            rewritten.append(seen)
            connection.execute("VACUUM FULL kb")

    with steering(dsn, observe=rewrite) as migration:
        migration.cutover(without_follower=True, refresh_old=True)
    assert rewritten
    assert_exact(connection, "kb", "content", AFTER, at_least=249)


def test_refresh_old_gives_up_before_it_switches(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale row that stays locked is named by number, and the old model goes on answering."""
    monkeypatch.setattr(backfill, "_REFRESH_PATIENCE", 0.2)
    knowledge_base(connection, 40)
    connection.execute("UPDATE kb SET embedding = (SELECT embedding FROM kb WHERE id = 7) WHERE id = 9")
    advance(dsn, "SERVED")
    with psycopg.connect(dsn) as other, steering(dsn) as migration:
        other.execute("SELECT FROM kb WHERE id = 9 FOR UPDATE")
        with pytest.raises(Refused, match="1 stale vector belongs to a row that another session has locked"):
            migration.cutover(without_follower=True, refresh_old=True)
        assert stage_of(connection) == ("SERVED", None)
        other.rollback()
        migration.cutover(without_follower=True, refresh_old=True)
    assert_exact(connection, "kb", "content", AFTER, at_least=40)


# -- refusals that change nothing -------------------------------------------------------------------------------------


def unchanged(connection: psycopg.Connection[Any], before: dict[str, list[Any]], stage: str) -> None:
    assert shape(connection) == before
    assert stage_of(connection) == (stage, None)


@pytest.mark.parametrize(
    ("command", "start", "stage"), [("cutover", "SERVED", "SERVED"), ("rollback", "CUT_OVER", "CUT_OVER")]
)
def test_refused_while_more_is_pending_than_allowed(
    dsn: str, connection: psycopg.Connection[Any], command: str, start: str, stage: str
) -> None:
    """Rows written after the catch-up are counted against the allowance."""
    knowledge_base(connection, 40)
    advance(dsn, start)
    before = shape(connection)

    def edit(seen: Observation) -> None:
        if isinstance(seen, Recorded) and seen.step == f"{command}.catch_up":
            connection.execute("UPDATE kb SET content = content || '.' WHERE id < 5")

    with steering(dsn, observe=edit) as migration, pytest.raises(Refused, match=r"pending.* 4 are allowed") as caught:
        getattr(migration, command)(without_follower=True, allow_pending=4)
    assert command in caught.value.hint
    unchanged(connection, before, stage)
    with steering(dsn, observe=edit) as migration:
        getattr(migration, command)(without_follower=True, allow_pending=5)
    fill(dsn, connection)
    assert_exact(connection, "kb", "content", AFTER if command == "cutover" else BEFORE, at_least=40)


def test_pending_rows_that_are_seen_stop_nobody(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """What can be refused without the lock is refused without it, though an open transaction would keep it from us."""
    knowledge_base(connection, 40)
    advance(dsn, "SERVED")
    with psycopg.connect(dsn) as other:

        def edit(seen: Observation) -> None:
            if isinstance(seen, Effect) and seen.step == "cutover":
                connection.execute("UPDATE kb SET content = content || '.' WHERE id < 5")
                other.execute("UPDATE kb SET note = 'held' WHERE id = 20")

        with steering(dsn, observe=edit) as migration, pytest.raises(Refused, match=r"pending.* 4 are allowed"):
            migration.cutover(without_follower=True, allow_pending=4)


def test_pending_rows_are_counted_under_the_lock(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Rows of a transaction that ends while we wait for its lock are counted as well."""
    knowledge_base(connection, 40)
    advance(dsn, "SERVED")
    before = shape(connection)
    waiting = (
        "SELECT count(*) FROM pg_locks WHERE relation = 'kb'::regclass AND mode = 'AccessExclusiveLock' AND NOT granted"
    )

    def end(other: psycopg.Connection[Any]) -> None:
        with psycopg.connect(dsn, autocommit=True) as watching:
            until(lambda: one(watching, waiting))
        other.commit()

    with psycopg.connect(dsn) as other:
        thread = threading.Thread(target=end, args=(other,))

        def edit(seen: Observation) -> None:
            if isinstance(seen, Effect) and seen.step == "cutover":
                other.execute("UPDATE kb SET content = content || '.' WHERE id < 5")
                thread.start()

        with steering(dsn, observe=edit) as migration, pytest.raises(Refused, match=r"pending.* 4 are allowed"):
            migration.cutover(without_follower=True, allow_pending=4, limits=PauseLimits(2000, 1))
        thread.join()
    unchanged(connection, before, "SERVED")


def test_refused_without_a_follower(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """No follower, an old heartbeat, one that stands by and `once` all count as none; consent is recorded."""
    knowledge_base(connection, 20)
    advance(dsn, "VERIFIED")
    before = shape(connection)
    fill(dsn, connection)
    beat = (
        "INSERT INTO revector.heartbeats (worker, table_oid, kind, active, pid, host, at)"
        " VALUES (gen_random_uuid(), %s, 'follower', %s, 1, 'h', now() - %s::interval)"
    )
    connection.execute(beat, (oid_of(connection), True, "11 s"))
    connection.execute(beat, (oid_of(connection), False, "0 s"))
    connection.execute(beat, (1, True, "0 s"))
    with pytest.raises(Refused, match="no follower is alive") as caught:
        give(dsn, "cutover", without_follower=False)
    assert "revector follow kb" in caught.value.hint and "--follow" in caught.value.hint
    unchanged(connection, before, "VERIFIED")
    give(dsn, "cutover")
    assert (
        one(connection, "SELECT count(*) FROM revector.events WHERE step = 'consent' AND figures ? 'without_follower'")
        == 1
    )


def test_follow_starts_one_that_outlives_the_swap(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """`--follow` brings its own follower before SERVED, and it fills what is written after the swap."""
    knowledge_base(connection, 20)
    advance(dsn, "VERIFIED")
    with steering(dsn) as migration:
        migration.cutover(follow=True)
        connection.execute("UPDATE kb SET content = 'edited after the swap' WHERE id = 3")
        until(lambda: one(connection, "SELECT embedding IS NOT NULL AND embedding_g1 IS NOT NULL FROM kb WHERE id = 3"))
        migration.rollback()
    assert_exact(connection, "kb", "content", BEFORE, at_least=20)


@pytest.mark.parametrize("statement", ["SELECT 1 FROM kb LIMIT 1", "UPDATE kb SET note = 'open' WHERE id = 1"])
@pytest.mark.parametrize(
    ("command", "start"), [("cutover", "VERIFIED"), ("cutover", "SERVED"), ("rollback", "CUT_OVER")]
)
def test_open_transaction_makes_the_swap_missed_and_changes_nothing(
    dsn: str, connection: psycopg.Connection[Any], command: str, start: str, statement: str
) -> None:
    """A transaction that stays open is never waited for: every attempt gives up in time, and all is as it was."""
    knowledge_base(connection, 20)
    advance(dsn, start)
    before = shape(connection)
    with psycopg.connect(dsn) as idle:
        idle.execute(statement)  # type: ignore[arg-type]
        began = time.monotonic()
        with pytest.raises(PauseBudgetMissed):
            give(dsn, command)
        assert time.monotonic() - began < 5
        unchanged(connection, before, start)
        connection.execute("SET lock_timeout = '300ms'")
        connection.execute("UPDATE kb SET note = 'still at work' WHERE id = 2")
    give(dsn, command)
    assert_exact(connection, "kb", "content", AFTER if command == "cutover" else BEFORE, at_least=20)


def test_missed_budget_names_who_is_in_the_way_and_the_next_command(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    """Every stop says what, why, and the exact next command."""
    knowledge_base(connection, 20)
    advance(dsn, "SERVED")
    with psycopg.connect(dsn, application_name="nightly report") as idle:
        idle.execute("SELECT 1 FROM kb LIMIT 1")
        with pytest.raises(PauseBudgetMissed) as caught:
            give(dsn, "cutover")
        assert f"In the way: session {idle.info.backend_pid} of " in caught.value.why
        assert "nightly report, idle in transaction since " in caught.value.why
    assert caught.value.why.endswith(f"Nothing changed. The migration is at SERVED; {OLD} answers.")
    assert "revector cutover kb" in caught.value.hint


def test_pending_rows_at_the_swap_say_which_model_answers_and_what_comes_next(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    knowledge_base(connection, 20)
    advance(dsn, "SERVED")

    def write(seen: object) -> None:
        if isinstance(seen, Effect) and seen.step == "cutover.catch_up":
            connection.execute("UPDATE kb SET content = 'written just now' WHERE id = 3")

    with pytest.raises(Refused) as caught, steering(dsn, observe=write) as migration:
        migration.cutover(without_follower=True, allow_pending=0)
    assert str(caught.value) == f"1 rows or more are pending in {NEW}, 0 are allowed"
    assert caught.value.why == f"Nothing was changed. The migration is at SERVED; {OLD} answers."
    assert caught.value.hint == "the same command again: revector cutover kb"


def test_edit_in_flight_at_served_is_not_missed(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The trigger's new rule waits for statements under the old one: no stale live vector stays behind."""
    knowledge_base(connection, 20)
    advance(dsn, "VERIFIED")
    with psycopg.connect(dsn) as writer:
        writer.execute("UPDATE kb SET content = 'under the old rule' WHERE id = 1")
        with pytest.raises(PauseBudgetMissed):
            give(dsn, "cutover")
        assert stage_of(connection) == ("VERIFIED", None)
        writer.rollback()
        writer.execute(
            "UPDATE kb SET content = 'under the old rule', embedding = %s WHERE id = 1",
            (vector(OLD, "under the old rule"),),
        )
        writer.commit()
    give(dsn, "cutover")
    assert_exact(connection, "kb", "content", AFTER, at_least=20)


@pytest.mark.parametrize(
    ("command", "start", "index"), [("cutover", "SERVED", "rv_kb_g2_1"), ("rollback", "CUT_OVER", "rv_kb_g1_1")]
)
def test_invalid_index_is_refused(
    dsn: str, connection: psycopg.Connection[Any], command: str, start: str, index: str
) -> None:
    """A side whose index cannot be used is never let to answer: every search would read the whole table."""
    knowledge_base(connection, 20)
    advance(dsn, start)
    before = shape(connection)
    connection.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", (index,))
    with pytest.raises(Refused, match=r"index .* missing or INVALID"):
        give(dsn, command)
    connection.execute("UPDATE pg_index SET indisvalid = true WHERE indexrelid = %s::regclass", (index,))
    unchanged(connection, before, start)
    connection.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(index)))
    with pytest.raises(Refused, match=r"index .* missing or INVALID"):
        give(dsn, command)


DEPENDENTS = {
    "view": ("CREATE VIEW of_kb AS SELECT id, embedding FROM kb", "of_kb"),
    "materialized view": ("CREATE MATERIALIZED VIEW of_kb AS SELECT id, embedding FROM kb", "of_kb"),
    "column grant": ("GRANT SELECT (embedding) ON kb TO PUBLIC", "SELECT for PUBLIC (set on embedding alone)"),
    "statistics target": ("ALTER TABLE kb ALTER embedding SET STATISTICS 7", "statistics target 7 (set on embedding alone)"),
    "storage": ("ALTER TABLE kb ALTER embedding SET STORAGE plain", "STORAGE PLAIN (set on embedding alone)"),
    "compression": ("ALTER TABLE kb ALTER embedding SET COMPRESSION pglz", "COMPRESSION pglz (set on embedding alone)"),
    "attribute option": ("ALTER TABLE kb ALTER embedding SET (n_distinct = 100)", "n_distinct=100"),
    "check": ("ALTER TABLE kb ADD CONSTRAINT unit CHECK (vector_norm(embedding) < 2)", "constraint unit"),
    "default": ("ALTER TABLE kb ALTER embedding SET DEFAULT array_fill(1, ARRAY[16])::vector", "default value"),
    "generated column": (
        "ALTER TABLE kb ADD norm float8 GENERATED ALWAYS AS (vector_norm(embedding)) STORED", "norm"),
    "publication of all columns": ("CREATE PUBLICATION whole FOR TABLE kb", "publication whole"),
    "publication of all tables": ("CREATE PUBLICATION everything FOR ALL TABLES", "publication everything"),
    "partial btree": ("CREATE INDEX done ON kb (note) WHERE embedding IS NOT NULL", "done"),
    "INCLUDE column": ("CREATE INDEX carrying ON kb (note) INCLUDE (embedding)", "carrying"),
    "expression index": ("CREATE INDEX measured ON kb (vector_norm(embedding))", "measured"),
    "binary-quantised index": (
        "CREATE INDEX quantised ON kb USING hnsw ((binary_quantize(embedding)::bit(16)) bit_hamming_ops)", "quantised"),
    "UPDATE OF trigger": (
        "CREATE TRIGGER watch BEFORE UPDATE OF embedding ON kb FOR EACH ROW"
        " EXECUTE FUNCTION suppress_redundant_updates_trigger()", "watch"),
    "WHEN of a trigger": (
        "CREATE TRIGGER watch BEFORE UPDATE ON kb FOR EACH ROW WHEN (OLD.embedding IS NULL)"
        " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "watch"),
    "policy": ("CREATE POLICY seen ON kb USING (embedding IS NOT NULL)", "seen"),
    "function with a parsed body": (
        "CREATE FUNCTION nearest() RETURNS int LANGUAGE sql BEGIN ATOMIC"
        " SELECT id FROM kb ORDER BY embedding <-> embedding LIMIT 1; END",
        "nearest"),
    "rule": ("CREATE RULE never AS ON DELETE TO kb WHERE OLD.embedding IS NULL DO INSTEAD NOTHING", "never"),
    "extended statistics": ("CREATE STATISTICS pair ON note, (vector_dims(embedding)) FROM kb", "pair"),
}  # fmt: skip


#: What a plan carries, if it is there when the plan is made.
CARRIED = ("column grant", "statistics target", "storage", "compression", "attribute option", "check", "partial btree",
           "INCLUDE column", "expression index")  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*wal_level.*")
@pytest.mark.parametrize("kind", DEPENDENTS)
def test_dependent_is_named_and_refused(dsn: str, connection: psycopg.Connection[Any], kind: str) -> None:
    """What a rename would leave behind is found before anything is changed, and again right before the swap."""
    statement, name = DEPENDENTS[kind]
    knowledge_base(connection, 20)
    made = shape(connection)
    if kind not in CARRIED:
        connection.execute(statement)  # type: ignore[arg-type]
        with steering(dsn) as migration:
            with pytest.raises(Refused, match="precondition") as caught:
                migration.run(REQUEST)
            assert name in str(caught.value) and "Nothing was changed" in caught.value.why and caught.value.hint
        assert one(connection, "SELECT to_regnamespace('revector') IS NULL"), "a refused run leaves no trace"
        undo(connection, kind)
        assert shape(connection)["columns"] == made["columns"]
    advance(dsn, "VERIFIED")
    connection.execute(statement)  # type: ignore[arg-type]
    before = shape(connection)
    with pytest.raises(Refused, match="tied to") as caught:
        give(dsn, "cutover")
    assert name in str(caught.value) and "revector cutover kb" in caught.value.hint
    unchanged(connection, before, "VERIFIED")


def undo(connection: psycopg.Connection[Any], kind: str) -> None:
    statements = {
        "view": "DROP VIEW of_kb",
        "materialized view": "DROP MATERIALIZED VIEW of_kb",
        "default": "ALTER TABLE kb ALTER embedding DROP DEFAULT",
        "generated column": "ALTER TABLE kb DROP norm",
        "publication of all columns": "DROP PUBLICATION whole",
        "publication of all tables": "DROP PUBLICATION everything",
        "binary-quantised index": "DROP INDEX quantised",
        "UPDATE OF trigger": "DROP TRIGGER watch ON kb",
        "WHEN of a trigger": "DROP TRIGGER watch ON kb",
        "policy": "DROP POLICY seen ON kb",
        "function with a parsed body": "DROP FUNCTION nearest",
        "rule": "DROP RULE never ON kb",
        "extended statistics": "DROP STATISTICS pair",
    }
    connection.execute(statements[kind])  # type: ignore[arg-type]


def test_vector_index_made_after_the_plan_is_not_lost(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Carried or refused, never lost: finalize must not drop an index of the user's that nobody rebuilt."""
    knowledge_base(connection, 20)
    advance(dsn, "VERIFIED")
    connection.execute("CREATE INDEX later ON kb USING hnsw (embedding vector_l2_ops)")
    with pytest.raises(Refused, match="later"):
        give(dsn, "cutover")


class Salted(Hashing):
    """Another model of the same dimension."""

    def encode(self, texts: Sequence[str], prompt: str, kind: str) -> NDArray[np.float32]:
        return super().encode([f"salt {text}" for text in texts], prompt, kind)


@pytest.fixture
def same_dimension(monkeypatch: pytest.MonkeyPatch) -> str:
    original = Embedder._make

    def make(self: Embedder) -> Any:
        return Salted(16) if self.spec == "openai:salted" else original(self)

    monkeypatch.setattr(Embedder, "_make", make)
    embedder.cache_clear()
    return "openai:salted"


def test_equal_dimensions_need_the_bare_writers_stopped(
    dsn: str, connection: psycopg.Connection[Any], same_dimension: str
) -> None:
    """Where a wrong model gives no error but nonsense, both swaps ask for a promise, and record it."""
    knowledge_base(connection, 30)
    advance(dsn, "VERIFIED", Request(from_=OLD, to=same_dimension))
    before = shape(connection)
    for command, after in (
        ("cutover", {"embedding_g1": OLD, "embedding": same_dimension}),
        ("rollback", {"embedding": OLD, "embedding_g2": same_dimension}),
    ):
        with pytest.raises(Refused, match="both have 16 dimensions") as caught:
            give(dsn, command)
        assert caught.value.hint.endswith(f"revector {command} kb --bare-writers-stopped")
        if command == "cutover":
            unchanged(connection, before, "VERIFIED")
        give(dsn, command, bare_writers_stopped=True)
        assert_exact(connection, "kb", "content", after, at_least=30)
        consents = "SELECT count(*) FROM revector.events WHERE step = 'consent' AND figures ->> 'command' = %s"
        assert one(connection, consents, command) == 1


def test_commands_out_of_order(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A command that does not fit the stage is refused with the one that does, and changes nothing."""
    knowledge_base(connection, 20)
    for command in COMMANDS:
        with pytest.raises(Refused, match="no migration has been started"):
            give(dsn, command)
    following_command = {"PLANNED": "run", "EXPANDED": "run", "BACKFILLED": "run", "INDEXED": "run", "VERIFIED": "cutover",
                         "SERVED": "cutover", "CUT_OVER": "finalize"}  # fmt: skip
    for stage, right in following_command.items():
        advance(dsn, stage)
        before = shape(connection)
        for command in COMMANDS:
            if stage in TRANSITIONS[command]:
                continue
            with pytest.raises(Refused, match=f"{command} is not possible at {stage}") as caught:
                give(dsn, command)
            assert caught.value.hint == f"revector {right} kb"
            unchanged(connection, before, stage)
    with steering(dsn) as migration, pytest.raises(Refused, match="run is not possible at CUT_OVER"):
        migration.run(REQUEST)
    give(dsn, "finalize")
    for command in COMMANDS:
        with pytest.raises(Refused, match=f"{command} is not possible at FINALIZED") as caught:
            give(dsn, command)
        assert caught.value.hint == "revector plan kb --to MODEL"


# -- closing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["close", "validate", "drop_indexes", "drop_column"])
@pytest.mark.parametrize(("command", "start"), [("finalize", "CUT_OVER"), ("abort", "SERVED")])
def test_crash_while_closing_leaves_one_way(
    dsn: str, connection: psycopg.Connection[Any], command: str, start: str, step: str
) -> None:
    """Once writes are unguarded nothing but the same command goes on; it completes, with NOT NULL under its old name."""
    knowledge_base(connection, 30)
    connection.execute("ALTER TABLE kb ALTER embedding DROP NOT NULL")
    connection.execute('ALTER TABLE kb ADD CONSTRAINT "must Have" NOT NULL embedding')
    original = shape(connection)
    advance(dsn, start)
    with pytest.raises(Halt), steering(dsn, observe=halting(f"{command}.{step}")) as migration:
        getattr(migration, command)()
    assert stage_of(connection) == (start, command)
    others = [(name, lambda m, name=name: getattr(m, name)(**COMMANDS[name])) for name in COMMANDS if name != command]
    for name, call in [*others, ("run", lambda m: m.run(REQUEST))]:
        with steering(dsn) as migration, pytest.raises(Refused, match=f"{command} has begun") as caught:
            call(migration)
        assert caught.value.hint == f"revector {command} kb", name
    assert fill(dsn, connection) == 0, "followers have nothing to do any more"
    with steering(dsn) as migration:
        status = migration.status().to_json()
    assert (status["closing"], status["next"]) == (command, f"revector {command} kb")
    give(dsn, command)
    assert_no_leftovers(connection)
    if command == "abort":
        assert shape(connection) == original
    assert (
        one(connection, "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'must Have'")
        == "NOT NULL embedding"
    )
    assert_exact(connection, "kb", "content", {"embedding": NEW if command == "finalize" else OLD}, at_least=30)


@pytest.mark.parametrize("not_null", [True, False])
@pytest.mark.parametrize("stage", ["PLANNED", "EXPANDED", "BACKFILLED", "INDEXED", "VERIFIED", "SERVED"])
def test_abort_leaves_the_table_as_it_was(
    dsn: str, connection: psycopg.Connection[Any], stage: str, not_null: bool
) -> None:
    """From every stage, abort gives back columns, constraints, indexes and triggers as they were, and right vectors."""
    knowledge_base(connection, 40, index="ivfflat", not_null=not_null)
    connection.execute(
        "CREATE TRIGGER mine BEFORE UPDATE ON kb FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
    )
    before = shape(connection)
    advance(dsn, stage)
    if stage == "SERVED":
        connection.execute("UPDATE kb SET content = 'edited at SERVED' WHERE id < 5")
    result = give(dsn, "abort")
    assert result.answering == OLD
    assert shape(connection) == before
    assert_no_leftovers(connection)
    assert_exact(connection, "kb", "content", {"embedding": OLD}, at_least=40)
    with pytest.raises(Refused, match="ABORTED"):
        give(dsn, "abort")


def test_abort_after_rollback(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A rolled-back migration is SERVED again, and can be given up without a trace."""
    knowledge_base(connection, 40)
    before = shape(connection)
    advance(dsn, "CUT_OVER")
    connection.execute("UPDATE kb SET content = 'edited while the new one answered' WHERE id < 5")
    give(dsn, "rollback")
    give(dsn, "abort")
    assert shape(connection) == before
    assert_exact(connection, "kb", "content", {"embedding": OLD}, at_least=40)
    assert_no_leftovers(connection)


@pytest.mark.parametrize("not_null", [True, False])
def test_finalize_never_leaves_a_pending_row_behind(
    dsn: str, connection: psycopg.Connection[Any], not_null: bool
) -> None:
    """A row written between the last catch-up and the lock is filled first, or keeps the way back open; it is never lost."""
    knowledge_base(connection, 30, not_null=not_null)
    advance(dsn, "CUT_OVER")

    def edit(seen: Observation) -> None:
        if isinstance(seen, Effect) and seen.step == "finalize.close":
            connection.execute("UPDATE kb SET content = content || '.' WHERE id = 1")

    with steering(dsn, observe=edit) as migration, suppress(Refused, GateFailed):
        migration.finalize()
    if stage_of(connection)[0] == "CUT_OVER":
        assert stage_of(connection) == ("CUT_OVER", None)
        give(dsn, "rollback")
        assert_exact(connection, "kb", "content", BEFORE, at_least=30)
    else:
        assert_exact(connection, "kb", "content", {"embedding": NEW}, at_least=30)
        assert_no_leftovers(connection)


def test_finalize_under_a_writer_that_gives_no_vectors(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A steady trickle of edits without vectors must not keep finalize from ever finding nothing pending."""
    knowledge_base(connection, 100)
    advance(dsn, "CUT_OVER")
    stop, died = threading.Event(), []

    def write() -> None:
        with psycopg.connect(dsn, autocommit=True) as writer:
            number = 0
            while not stop.wait(0.04):
                number += 1
                try:
                    writer.execute("UPDATE kb SET content = %s WHERE id = %s", (f"edit {number}", number % 100))
                except psycopg.Error as error:
                    died.append(error)

    with following(dsn, connection):
        thread = threading.Thread(target=write)
        thread.start()
        try:
            give(dsn, "finalize")
        finally:
            stop.set()
            thread.join()
    assert died == []
    assert_no_leftovers(connection)


class Picky(Hashing):
    """A model that refuses texts with one word, and blank ones."""

    def encode(self, texts: Sequence[str], prompt: str, kind: str) -> NDArray[np.float32]:
        if any("forbidden" in text or not text.strip() for text in texts):
            raise InputRefused("no such text, please", kind="refused")
        return super().encode(texts, prompt, kind)


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hash:32` refuses some texts."""
    original = Embedder._make

    def make(self: Embedder) -> Any:
        return Picky(32) if self.spec == NEW else original(self)

    monkeypatch.setattr(Embedder, "_make", make)


@pytest.mark.usefixtures("picky")
@pytest.mark.parametrize("text", ["a forbidden text", "   "])
@pytest.mark.parametrize("copies", [1, 3])
def test_refused_texts_within_the_allowance_do_not_block(
    dsn: str, connection: psycopg.Connection[Any], text: str, copies: int
) -> None:
    """Rows whose text the model refuses are outside pending, however many rows share that text."""
    knowledge_base(connection, 30, not_null=False)
    for number in range(copies):
        connection.execute(
            "INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s)", (900 + number, text, vector(OLD, text))
        )
    with steering(dsn) as migration:
        migration.run(REQUEST, allow_failed=1)
        migration.cutover(without_follower=True, allow_failed=1, allow_pending=0)
        migration.finalize(allow_failed=1)
    assert_no_leftovers(connection)


@pytest.mark.usefixtures("picky")
def test_refused_texts_above_the_allowance(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """cutover and finalize hold to the allowance; nothing is switched or dropped over texts that would vanish."""
    knowledge_base(connection, 30, not_null=False)
    connection.execute(
        "INSERT INTO kb (id, content, embedding) VALUES (900, 'forbidden', %s)", (vector(OLD, "forbidden"),)
    )
    with steering(dsn) as migration:
        migration.run(REQUEST, allow_failed=1)
        with pytest.raises(GateFailed, match="refuses 1 texts, 0 are allowed"):
            migration.cutover(without_follower=True)
        assert stage_of(connection) == ("VERIFIED", None)
        migration.cutover(without_follower=True, allow_failed=1)
        with pytest.raises(GateFailed, match="refuses 1 texts"):
            migration.finalize()
        assert stage_of(connection) == ("CUT_OVER", None)


# -- NOT NULL by someone else ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["live", "other"])
@pytest.mark.parametrize("not_null", [False, True])
@pytest.mark.parametrize(
    ("command", "start"),
    [("cutover", "VERIFIED"), ("expose", "VERIFIED"), ("cutover", "SERVED"), ("rollback", "CUT_OVER")],
)
def test_not_null_by_someone_else_is_refused(
    dsn: str, connection: psycopg.Connection[Any], command: str, start: str, not_null: bool, column: str
) -> None:
    """From SERVED on the other version's vector is NULL for a moment: NOT NULL would be the application's error (23502)."""
    knowledge_base(connection, 20, not_null=not_null)
    advance(dsn, start)
    name = "embedding" if column == "live" else "embedding_g1" if start == "CUT_OVER" else "embedding_g2"
    connection.execute(f"ALTER TABLE kb ALTER {name} SET NOT NULL")  # type: ignore[arg-type]
    before = shape(connection)
    if not_null and column == "live" and start == "VERIFIED":
        give(dsn, command, without_follower=True)  # as it was planned: serve relaxes it
    else:
        with pytest.raises(Refused, match=f"{name} is NOT NULL") as caught:
            give(dsn, command, without_follower=True)
        unchanged(connection, before, start)
        relax, told, again = caught.value.hint.splitlines()
        assert relax == f'ALTER TABLE "public"."kb" ALTER COLUMN "{name}" DROP NOT NULL;'
        assert ("give NOT NULL back" in told) is not_null and ("SET NOT NULL" in told) is not not_null
        assert again == "then the same command again"
        connection.execute(relax)
        give(dsn, command, without_follower=True)
    live, other = (NEW, OLD) if stage_of(connection)[0] == "CUT_OVER" else (OLD, NEW)
    connection.execute("INSERT INTO kb (id, content, embedding) VALUES (900, 'new', %s)", (vector(live, "new"),))
    connection.execute("UPDATE kb SET content = 'edited' WHERE id = 1")
    fill(dsn, connection)
    columns = {"embedding": live, "embedding_g1" if live == NEW else "embedding_g2": other}
    assert_exact(connection, "kb", "content", columns, at_least=21)


@pytest.mark.parametrize(("command", "start"), [("serve", "VERIFIED"), ("cutover", "SERVED"), ("rollback", "CUT_OVER")])
def test_not_null_at_the_last_moment_is_seen_under_the_lock(
    dsn: str, connection: psycopg.Connection[Any], command: str, start: str
) -> None:
    knowledge_base(connection, 20, not_null=False)
    advance(dsn, start)

    def strict(seen: Observation) -> None:
        if isinstance(seen, Effect) and seen.step == command:
            connection.execute("ALTER TABLE kb ALTER embedding SET NOT NULL")

    with (
        steering(dsn, observe=strict) as migration,
        pytest.raises(Refused, match="became NOT NULL") as caught,
    ):
        getattr(migration, "cutover" if command == "serve" else command)(without_follower=True)
    assert "the same command again" in caught.value.hint
    assert stage_of(connection) == (start, None)


def test_not_null_given_back_by_someone_else_is_no_obstacle_to_finalize(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    """Who sets NOT NULL on the column that stays has done what finalize would do."""
    knowledge_base(connection, 20)
    advance(dsn, "CUT_OVER")
    connection.execute("ALTER TABLE kb ALTER embedding SET NOT NULL")
    give(dsn, "finalize")
    assert one(
        connection, "SELECT attnotnull FROM pg_attribute WHERE attrelid = 'kb'::regclass AND attname = 'embedding'"
    )
    assert_no_leftovers(connection)


# -- what hangs on the column that goes --------------------------------------------------------------------------------


#: What keeps a column from being dropped: how it is made on the column, and the statement that takes it away.
HANGING = {
    "view": ("CREATE VIEW seen AS SELECT id, {} FROM kb", "DROP VIEW public.seen;"),
    "materialized view": (
        "CREATE MATERIALIZED VIEW seen AS SELECT id, {} FROM kb",
        "DROP MATERIALIZED VIEW public.seen;",
    ),
    "generated column": (
        "ALTER TABLE kb ADD seen int GENERATED ALWAYS AS (vector_dims({})) STORED",
        "generated column",
    ),
    "UPDATE OF trigger": (
        "CREATE TRIGGER seen AFTER UPDATE OF {} ON kb FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "trigger seen",
    ),
}


@pytest.mark.parametrize("kind", HANGING)
@pytest.mark.parametrize(("command", "start"), [("abort", "VERIFIED"), ("abort", "SERVED"), ("finalize", "CUT_OVER")])
def test_what_hangs_on_the_column_that_goes_is_named_first(
    dsn: str, connection: psycopg.Connection[Any], command: str, start: str, kind: str
) -> None:
    """DROP COLUMN would fail with the trigger gone already; refused before anything is changed, with what to drop."""
    knowledge_base(connection, 20)
    advance(dsn, start)
    statement, told = HANGING[kind]
    gone = "embedding_g1" if command == "finalize" else "embedding_g2"
    connection.execute(statement.format(gone))  # type: ignore[arg-type]
    connection.execute(f"CREATE INDEX by_itself ON kb ((vector_dims({gone})))")  # type: ignore[arg-type]
    connection.execute(f"ALTER TABLE kb ADD CONSTRAINT goes CHECK ({gone} IS NULL OR id >= 0)")  # type: ignore[arg-type]
    before = shape(connection)
    with pytest.raises(Refused, match=f"{gone} cannot be dropped.*seen") as caught:
        give(dsn, command)
    assert "Nothing was changed" in caught.value.why and caught.value.hint.endswith(f"then: revector {command} kb")
    assert told in caught.value.hint + str(caught.value) and "by_itself" not in str(caught.value)
    unchanged(connection, before, start)
    connection.execute(
        {"generated column": "ALTER TABLE kb DROP seen", "UPDATE OF trigger": "DROP TRIGGER seen ON kb"}.get(
            kind, caught.value.hint.splitlines()[0]
        )  # type: ignore[arg-type]
    )
    give(dsn, command)
    assert_no_leftovers(connection)


@pytest.mark.parametrize(("command", "start"), [("abort", "SERVED"), ("finalize", "CUT_OVER")])
def test_what_came_to_hang_on_it_after_the_close_is_named(
    dsn: str, connection: psycopg.Connection[Any], command: str, start: str
) -> None:
    """A view made between the close and DROP COLUMN is no defect of ours: it is named, and the same command goes on."""
    knowledge_base(connection, 20)
    advance(dsn, start)
    gone = "embedding_g1" if command == "finalize" else "embedding_g2"

    def build(seen: Observation) -> None:
        if isinstance(seen, Recorded) and seen.step == f"{command}.close":
            connection.execute(f"CREATE VIEW late AS SELECT {gone} FROM kb")  # type: ignore[arg-type]

    with steering(dsn, observe=build) as migration, pytest.raises(Refused) as caught:
        getattr(migration, command)()
    assert "view public.late depends on column" in caught.value.why and f"revector {command} kb" in caught.value.hint
    assert stage_of(connection) == (start, command)
    connection.execute("DROP VIEW late")
    give(dsn, command)
    assert_no_leftovers(connection)


# -- the outside world ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["VERIFIED", "CUT_OVER"])
def test_reindex_concurrently_is_no_obstacle(dsn: str, connection: psycopg.Connection[Any], when: str) -> None:
    """REINDEX TABLE CONCURRENTLY is routine maintenance: every command goes on after it."""
    knowledge_base(connection, 40)
    advance(dsn, when)
    connection.execute("REINDEX TABLE CONCURRENTLY kb")
    if when == "VERIFIED":
        give(dsn, "cutover")
    give(dsn, "rollback")
    give(dsn, "cutover")
    give(dsn, "finalize")
    assert names(connection) == ({"embedding": "vector(32)"}, {"kb_embedding_idx": "embedding"})
    assert_no_leftovers(connection)


@pytest.mark.parametrize(
    "statement", ["ALTER TABLE kb RENAME TO kb2", "CREATE SCHEMA elsewhere; ALTER TABLE kb SET SCHEMA elsewhere"]
)
def test_table_that_moves_meanwhile(dsn: str, connection: psycopg.Connection[Any], statement: str) -> None:
    """The table is its OID: under another name or in another schema it is the same table."""
    knowledge_base(connection, 30)
    advance(dsn, "VERIFIED")
    connection.execute(statement)  # type: ignore[arg-type]
    name = "kb2" if "kb2" in statement else "elsewhere.kb"
    with steering(dsn, name) as migration:
        migration.cutover(without_follower=True)
        migration.rollback(without_follower=True)
        migration.cutover(without_follower=True)
        migration.finalize()
    connection.execute("SET search_path = elsewhere, public")
    assert names(connection, name.split(".")[-1]) == ({"embedding": "vector(32)"}, {"kb_embedding_idx": "embedding"})


@pytest.mark.parametrize("once", [False, True])
def test_follower_between_name_and_query_survives_a_swap(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, once: bool
) -> None:
    """A swap between the follower's resolving a column's name and its reading it must not end the follower."""
    knowledge_base(connection, 30)
    advance(dsn, "SERVED")
    connection.execute("UPDATE kb SET content = content || '.' WHERE id < 5")
    original, begun, swapped, main = backfill._parts, [], threading.Event(), threading.current_thread()

    def parts(*arguments: Any) -> Any:
        found = original(*arguments)
        follows = once or threading.current_thread() is not main
        if not begun and follows and found["column"] == sql.Identifier("embedding_g2"):
            begun.append(True)
            with steering(dsn) as migration:
                migration.cutover(without_follower=True)
            swapped.set()
        return found

    monkeypatch.setattr(backfill, "_parts", parts)
    if once:
        fill(dsn, connection)
    else:
        with following(dsn, connection):
            until(lambda: swapped.is_set() and one(connection, "SELECT count(embedding) = 30 FROM kb"))
            connection.execute("UPDATE kb SET content = content || '!' WHERE id < 5")
            until(lambda: one(connection, "SELECT count(embedding) = 30 AND count(embedding_g1) = 30 FROM kb"))
    assert_exact(connection, "kb", "content", AFTER, at_least=30)


def test_follower_ends_cleanly_when_the_migration_is_closed(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower that is about to write when finalize closes the migration ends by itself, with no error."""
    knowledge_base(connection, 30)
    advance(dsn, "CUT_OVER")
    original, closed = backfill.stage_rows, threading.Event()
    main = threading.current_thread()

    def stage(*arguments: Any, **keywords: Any) -> None:
        original(*arguments, **keywords)
        if threading.current_thread() is not main:
            assert closed.wait(20)

    monkeypatch.setattr(backfill, "stage_rows", stage)
    with following(dsn, connection):
        connection.execute("UPDATE kb SET content = 'just before the end' WHERE id = 1")
        time.sleep(1)
        give(dsn, "finalize")
        closed.set()
        time.sleep(1)
    assert_exact(connection, "kb", "content", {"embedding": NEW}, at_least=30)


def test_follower_is_not_alarmed_by_a_closing(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trigger that finalize has dropped is no reason for a follower to cry out and to advise an abort."""
    knowledge_base(connection, 30)
    advance(dsn, "CUT_OVER")
    original, turns, main = trigger.check, [], threading.current_thread()

    def check(*arguments: Any) -> None:
        if threading.current_thread() is not main:
            turns.append(True)
            if len(turns) == 8:  # it has told that it lives by then
                with steering(dsn) as migration:
                    migration.finalize()
        original(*arguments)

    monkeypatch.setattr(trigger, "check", check)
    with following(dsn, connection):
        until(lambda: stage_of(connection)[0] == "FINALIZED")
        time.sleep(0.5)


def test_text_cleared_at_the_last_moment_does_not_trap_finalize(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A row that loses its text, and with it its vector, just before the lock must not leave a closing that cannot end."""
    knowledge_base(connection, 30)
    advance(dsn, "CUT_OVER")

    def clear(seen: Observation) -> None:
        if isinstance(seen, Effect) and seen.step == "finalize.close":
            connection.execute("UPDATE kb SET content = NULL WHERE id = 1")

    with steering(dsn, observe=clear) as migration, pytest.raises((Refused, GateFailed)):
        migration.finalize()
    assert stage_of(connection) == ("CUT_OVER", None)


def test_crash_before_the_backup_is_dropped(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """`finalize --drop-backup` killed right before its last step can be repeated, like any other command."""
    knowledge_base(connection, 30)
    advance(dsn, "CUT_OVER", Request(from_=OLD, to=NEW, backup=True))
    with pytest.raises(Halt), steering(dsn, observe=halting("finalize.drop_backup")) as migration:
        migration.finalize(drop_backup=True)
    give(dsn, "finalize", drop_backup=True)
    assert one(connection, "SELECT to_regclass('kb_backup_16') IS NULL")


def test_two_equal_indexes_are_carried_or_refused(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """An IVFFlat beside an HNSW index of the same parameters as its replacement: neither name may vanish silently."""
    knowledge_base(connection, 30, index="ivfflat")
    connection.execute(
        "CREATE INDEX second ON kb USING hnsw (embedding vector_cosine_ops) WITH (m = 16, ef_construction = 64)"
    )
    advance(dsn, "CUT_OVER")
    give(dsn, "finalize")
    assert set(names(connection)[1]) == {"kb_embedding_idx", "second"}


def test_swap_that_cannot_write_the_ledger_leaves_no_half(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Names, trigger function and ledger commit together: a failure of the last undoes the first."""
    knowledge_base(connection, 20)
    advance(dsn, "SERVED")
    before = shape(connection)
    function = "SELECT prosrc FROM pg_proc WHERE proname = 'rv_kb_g2'"
    source = one(connection, function)
    connection.execute(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.step = 'cutover' THEN RAISE 'disk full' USING ERRCODE = '53100'; END IF; RETURN NEW; END $$;"
        "CREATE TRIGGER fail BEFORE INSERT ON revector.events FOR EACH ROW EXECUTE FUNCTION fail()"
    )
    with pytest.raises(Exception, match="disk full"):
        give(dsn, "cutover")
    unchanged(connection, before, "SERVED")
    assert one(connection, function) == source
    connection.execute("DROP TRIGGER fail ON revector.events; DROP FUNCTION fail()")
    give(dsn, "cutover")


def test_renamed_column_is_refused(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A column that somebody renamed is not swapped by its name."""
    knowledge_base(connection, 20)
    advance(dsn, "SERVED")
    connection.execute("ALTER TABLE kb RENAME embedding_g2 TO candidate")
    with pytest.raises(Refused, match="not where this migration left them"):
        give(dsn, "cutover")
    connection.execute("ALTER TABLE kb RENAME candidate TO embedding_g2")
    give(dsn, "cutover")


def test_ledger_knows_no_live_follower_of_another_table(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Followers are counted a table; one of another table is no reason to swap this one."""
    knowledge_base(connection, 20)
    knowledge_base(connection, 20, name="other")
    advance(dsn, "VERIFIED")
    advance(dsn, "VERIFIED", table="other")
    with following(dsn, connection, "other"), pytest.raises(Refused, match="no follower is alive"):
        give(dsn, "cutover", without_follower=False)
