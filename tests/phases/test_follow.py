"""The follower as a service: it comes back, others take over, it stays cheap and quick, and it says how it does."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray
from psycopg import sql

from fix_commands import command, ended, started
from fix_tables import (
    NEW,
    OLD,
    advance,
    assert_exact,
    embedder,
    fill,
    following,
    knowledge_base,
    oid_of,
    one,
    settings,
    steering,
    until,
    vector,
)
from revector import Request, db
from revector.db import Database, Session
from revector.embed import Embedder
from revector.embed.hashing import Hashing
from revector.embedded import Server
from revector.errors import KeyRejected, Outage
from revector.follow import Follower, managed
from revector.migration import Alert
from revector.phases import backfill
from revector.phases.backfill import Filler
from revector.throttle import Tuning
from revector.work import Health, Observation

ALL = {"embedding": NEW, "embedding_g1": OLD}


@contextmanager
def connected(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(dsn, autocommit=True) as opened:
        yield opened


def fresh(connection: psycopg.Connection[Any], number: int) -> bool:
    return bool(
        one(connection, "SELECT embedding IS NOT NULL AND embedding_g1 IS NOT NULL FROM kb WHERE id = %s", number)
    )


def edit(connection: psycopg.Connection[Any], number: int) -> None:
    connection.execute("UPDATE kb SET content = content || ' edited' WHERE id = %s", (number,))


@pytest.mark.roads
def test_it_comes_back_after_the_server_was_restarted(server: Server) -> None:
    """An immediate restart, and every one of its sessions cut: in both cases the follower goes on by itself."""
    with connected(server.dsn) as connection:
        connection.execute("CREATE EXTENSION vector")
        knowledge_base(connection, 20)
        advance(server.dsn, "CUT_OVER")
    follower = started(server.dsn, "follow", "kb", "--health-every", "1")
    with connected(server.dsn) as connection:
        until(lambda: one(connection, "SELECT count(*) FROM revector.heartbeats WHERE active"))
    server.restart("immediate")
    with connected(server.dsn) as connection:
        edit(connection, 1)
        until(lambda: fresh(connection, 1), 20)
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'revector%'"
        )
        edit(connection, 2)
        until(lambda: fresh(connection, 2), 10)
        until(
            lambda: one(
                connection, "SELECT count(*) FROM revector.heartbeats WHERE active AND at > now() - interval '3 s'"
            )
        )
        assert_exact(connection, "kb", "content", ALL)
    answer = ended(follower, signal.SIGTERM, seconds=5).exits(0)
    assert "health: active; " in answer.err and "trying again in 0.5 s" in answer.err
    assert "Traceback" not in answer.err and answer.out.startswith("following ended; ")


@pytest.mark.roads
def test_a_standby_takes_over_when_the_active_one_is_killed(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The lock is the server's: it is free the moment that the holder's connection is gone."""
    knowledge_base(connection, 20)
    advance(dsn, "CUT_OVER")
    followers = [started(dsn, "follow", "kb", "--health-every", "1")]
    until(lambda: one(connection, "SELECT count(*) FROM revector.heartbeats WHERE active"))
    followers.append(started(dsn, "follow", "kb", "--health-every", "1"))
    until(lambda: one(connection, "SELECT count(*) FROM revector.heartbeats") == 2)
    time.sleep(1.2)  # the standby loads its models
    assert "; 1 standing by" in command(dsn, "status", "kb").exits(0).out
    edit(connection, 1)
    until(lambda: fresh(connection, 1), 5)
    followers[0].kill()
    killed = time.monotonic()
    edit(connection, 2)
    until(lambda: fresh(connection, 2), 10)
    assert time.monotonic() - killed < 5
    assert followers[0].wait() == -signal.SIGKILL
    ended(followers[0])
    answer = ended(followers[1], signal.SIGTERM, seconds=5).exits(0)
    assert answer.out == "following ended; 1 rows filled\n"
    assert "health: standing by: another follower is active; 0 rows filled\n" in answer.err
    assert "health: active; " in answer.err
    assert_exact(connection, "kb", "content", ALL)


def test_status_is_red_while_nobody_fills_what_search_misses(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 20)
    advance(dsn, "CUT_OVER")
    assert not alerts(dsn)
    connection.execute("UPDATE kb SET content = 'new' WHERE id < 3")
    told = command(dsn, "status", "kb", "--json").exits(0).json
    assert told["alerts"] == [
        {
            "kind": "follower_down",
            "what": f"no follower is alive, and 3 rows have no vector of {NEW} and 3 rows have no vector of {OLD}:"
            " search misses them",
            "next": "revector follow kb",
        }
    ]
    answer = command(dsn, "status", "kb", "--check").exits(1)
    assert "\n  ALERT      no follower is alive, and 3 rows" in answer.out
    assert answer.last.endswith("next: revector follow kb")
    with following(dsn, connection):
        until(lambda: fresh(connection, 1))
        told = command(dsn, "status", "kb", "--check", "--json").exits(0).json
        assert told["alerts"] == [] and told["vigil"][0]["active"] and told["vigil"][0]["pid"] == os.getpid()
    connection.execute(
        "INSERT INTO revector.heartbeats (worker, table_oid, kind, active, pid, host, oldest)"
        " VALUES (gen_random_uuid(), 'kb'::regclass, 'follower', true, 7, 'here', 61)"
    )
    (late,) = alerts(dsn)
    assert late.kind == "follower_late" and late.next == "look at the follower's log on here (process 7)"


def alerts(dsn: str) -> Sequence[Alert]:
    with steering(dsn) as migration:
        return migration.status().alerts


def an_idle_poll(dsn: str, connection: psycopg.Connection[Any]) -> list[tuple[str, str, Any]]:
    """Exactly what the follower sends from one look to the next: (session, statement, parameters)."""
    sent: list[tuple[str, str, Any]] = []
    original = Session._execute

    def spy(self: Session, statement: Any, params: Any) -> Any:
        name = self.connection.info.get_parameters()["application_name"]
        if name.startswith("revector ") and name != "revector heartbeat":
            sent.append((name, statement if isinstance(statement, str) else statement.as_string(None), params))
        return original(self, statement, params)

    def begins() -> list[int]:
        return [n for n, (_, text, _) in enumerate(sent) if "FROM revector.migrations WHERE table_oid" in text]

    with following(dsn, connection):
        time.sleep(0.8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "_execute", spy)
            until(lambda: len(begins()) > 1)
    return sent[begins()[0] : begins()[1]]


@pytest.mark.parametrize("rows", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_an_idle_poll_touches_few_buffers(dsn: str, connection: psycopg.Connection[Any], rows: int) -> None:
    """All statements from one look to the next, catalog and ledger included, with what planning them reads."""
    knowledge_base(connection, 20, index=None)
    advance(dsn, "CUT_OVER")
    for (name,) in connection.execute(
        "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam"
        " WHERE i.indrelid = 'kb'::regclass AND a.amname = 'hnsw'"
    ).fetchall():
        connection.execute(f'DROP INDEX "{name}"')  # a million rows would take it minutes, and no poll reads it
    connection.execute("SET revector.writer = 'on'")
    connection.execute(
        "INSERT INTO kb (id, content, embedding, embedding_g1) SELECT n, 'text ' || n, array_fill(n::real, '{32}')::vector,"
        " array_fill(n::real, '{16}')::vector FROM generate_series(100, 99 + %s) AS n",
        (rows,),
    )
    assert one(connection, "SELECT count(*) FROM kb WHERE embedding IS NULL OR embedding_g1 IS NULL") == 0
    connection.execute("VACUUM ANALYZE kb")
    polled = an_idle_poll(dsn, connection)
    assert sum("IS NULL AND" in text for _, text, _ in polled) == 2, polled
    executing = planning = 0
    database = Database(settings(dsn))
    with (
        database.connect("control") as control,
        database.connect("reader", enable_seqscan="off", enable_tidscan="off") as reader,
    ):
        for name, text, params in polled:
            session = control if name == "revector follower control" else reader
            for _ in range(2):  # by the second time the session's caches are as warm as the follower's
                told = session.row(sql.SQL("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + text), **params)[0][0]
            executing += buffers(told["Plan"])
            planning += buffers(told.get("Planning", {}))
    print(f"{rows:,} rows: {executing} buffers by {len(polled)} statements, and {planning} by planning them")
    assert executing + planning < 20


def buffers(part: dict[str, int]) -> int:
    return part.get("Shared Hit Blocks", 0) + part.get("Shared Read Blocks", 0)


def test_a_committed_row_is_searchable_by_the_other_version_within_two_seconds(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    """50 writes a second for 2 s, by both versions in turn: from the commit to both vectors being there."""
    knowledge_base(connection, 120)
    advance(dsn, "CUT_OVER")
    committed: dict[int, float] = {}
    waited: dict[int, float] = {}
    done = threading.Event()

    def watch() -> None:
        with psycopg.connect(dsn, autocommit=True) as other:
            while not (done.is_set() and len(waited) == len(committed)):
                open_ = [n for n in list(committed) if n not in waited]
                rows = other.execute(
                    "SELECT id FROM kb WHERE id = ANY (%s) AND embedding IS NOT NULL AND embedding_g1 IS NOT NULL",
                    (open_,),
                ).fetchall()
                now = time.monotonic()
                waited.update({n: now - committed[n] for (n,) in rows})
                if done.is_set() and now - max(committed.values()) > 20:
                    return
                time.sleep(0.01)

    with following(dsn, connection):
        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.monotonic()
        for n in range(100):
            time.sleep(max(0.0, began + n / 50 - time.monotonic()))
            text = f"written at {n}"
            if n % 2:
                connection.execute(
                    "INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s)", (1000 + n, text, vector(NEW, text))
                )
                committed[1000 + n] = time.monotonic()
            else:
                connection.execute(
                    "UPDATE kb SET content = %s, embedding = %s WHERE id = %s", (text, vector(NEW, text), n)
                )
                committed[n] = time.monotonic()
        done.set()
        watcher.join()
    assert len(waited) == 100
    times = sorted(waited.values())
    print(f"p50 {statistics.median(times):.2f} s, max {times[-1]:.2f} s")
    assert times[-1] < 2
    assert_exact(connection, "kb", "content", ALL, at_least=170)


def test_a_failing_model_does_not_keep_the_other_ones_rows(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Search with the model that works misses nothing; the rest is filled once the other one is back."""
    knowledge_base(connection, 600)
    advance(dsn, "CUT_OVER")
    away = threading.Event()
    away.set()
    seen: list[Observation] = []
    stop = threading.Event()
    follower = Follower(settings(dsn), oid_of(connection), observe=seen.append, stop=stop.is_set, health_every=0.5)
    work = follower._work

    def failing(control: Session) -> Any:
        row, made = work(control)  # type: ignore[misc]
        right = made.models[row.plan.old.number]

        def model() -> Any:
            if away.is_set():
                raise Outage("the old model is out")
            return right()

        made.models = {**made.models, row.plan.old.number: model}
        return row, made

    follower._work = failing  # type: ignore[method-assign]
    thread = threading.Thread(target=follower.run)
    thread.start()
    try:
        connection.execute("UPDATE kb SET content = content || ' edited'")
        until(lambda: one(connection, "SELECT count(*) FROM kb WHERE embedding IS NULL") == 0)
        assert one(connection, "SELECT count(*) FROM kb WHERE embedding_g1 IS NULL") == 600
        until(lambda: any(isinstance(s, Health) and s.state == "trouble" and s.pending == 600 for s in seen))
        until(
            lambda: one(connection, "SELECT count(*) FROM revector.heartbeats WHERE trouble = 'the old model is out'")
        )
        told = command(dsn, "status", "kb", "--json").exits(0).json["alerts"]
        assert [(a["kind"], a["what"]) for a in told] == [
            ("follower_trouble", "the follower is in trouble: the old model is out")
        ]
        away.clear()
        until(lambda: one(connection, "SELECT count(*) FROM kb WHERE embedding_g1 IS NULL") == 0)
        until(lambda: isinstance(seen[-1], Health) and seen[-1].state == "active")
    finally:
        stop.set()
        thread.join()
    assert_exact(connection, "kb", "content", ALL)
    assert one(connection, "SELECT count(*) FROM revector.generations WHERE written IS NOT NULL") == 0, (
        "rows that the follower filled by halves were taken for an application's writes"
    )


def test_it_ends_when_no_model_is_left_that_waiting_would_mend(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 5)
    advance(dsn, "VERIFIED")
    follower = Follower(settings(dsn), oid_of(connection))

    def rejected() -> Any:
        raise KeyRejected

    follower._models = (one(connection, "SELECT fingerprint FROM revector.migrations"), {1: rejected, 2: rejected})
    with pytest.raises(KeyRejected):
        follower.run()
    assert one(connection, "SELECT count(*) FROM revector.heartbeats") == 0


def test_vectors_of_the_wrong_model_raise_an_alarm_and_are_replaced(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models have 16 dimensions: no error stops an old version that writes the bare table after the cutover."""
    new = same_dimension(monkeypatch)
    knowledge_base(connection, 20)
    advance(dsn, "VERIFIED", Request(from_=OLD, to=new))
    with steering(dsn) as migration:
        migration.cutover(without_follower=True, bare_writers_stopped=True)
    sides = {"embedding": new, "embedding_g1": OLD}
    insert = "INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s)"
    connection.execute(insert, (100, "by the new version", vector(new, "by the new version")))
    fill(dsn, connection)
    assert one(connection, "SELECT count(*) FROM revector.events WHERE step = 'alarm'") == 0, "a false alarm"
    for number in (101, 102):
        connection.execute(insert, (number, f"by the old {number}", vector(OLD, f"by the old {number}")))
    connection.execute(insert, (103, "by a third", vector(OLD, "of something else altogether")))
    connection.execute(insert, (104, "by the new", vector(new, "by the new")))
    fill(dsn, connection)
    fill(dsn, connection)
    told = one(connection, "SELECT array_agg(figures ORDER BY id) FROM revector.events WHERE step = 'alarm'")
    assert told == [{"model": new, "rows": 3, "written_by": OLD}]
    assert_exact(connection, "kb", "content", sides, at_least=25)
    with steering(dsn) as migration:
        (alert,) = migration.status().alerts
    assert alert.kind == "wrong_model" and alert.what.startswith(
        f"3 rows came with vectors of {OLD} in place of {new}, "
    )


class Salted(Hashing):
    """Another model of the same dimension."""

    def encode(self, texts: Sequence[str], prompt: str, kind: str) -> NDArray[np.float32]:
        return super().encode([f"salt {' salt '.join(text.split())}" for text in texts], prompt, kind)


def same_dimension(monkeypatch: pytest.MonkeyPatch) -> str:
    original = Embedder._make

    def make(self: Embedder) -> Any:
        return Salted(16) if self.spec == "openai:salted" else original(self)

    monkeypatch.setattr(Embedder, "_make", make)
    embedder.cache_clear()
    return "openai:salted"


def test_a_pause_before_the_swap_does_not_outlive_it(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A follower that a pause holds back sees that the stage has moved on: from SERVED on its rows are urgent."""
    knowledge_base(connection, 20)
    advance(dsn, "VERIFIED")
    with following(dsn, connection):
        with steering(dsn) as migration:
            migration.pause()
        text = "edited while it was paused"
        connection.execute("UPDATE kb SET content = %s, embedding = %s WHERE id = 1", (text, vector(OLD, text)))
        time.sleep(1.5)
        assert one(connection, "SELECT embedding_g2 IS NULL FROM kb WHERE id = 1")
        with steering(dsn) as migration:
            migration.cutover()
        connection.execute("UPDATE kb SET content = 'edited after the cutover' WHERE id = 2")
        until(lambda: fresh(connection, 1) and fresh(connection, 2), 4)
    assert_exact(connection, "kb", "content", ALL, at_least=20)


def test_a_bulk_edit_is_walked_through_once(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """What it costs to find a pending row does not grow with how many others are pending."""
    rows = 4000
    knowledge_base(connection, 20, index=None)
    advance(dsn, "CUT_OVER")
    connection.execute("SET revector.writer = 'on'")
    connection.execute(
        "INSERT INTO kb (id, content) SELECT n, 'text ' || n FROM generate_series(100, 99 + %s) AS n", (rows,)
    )
    connection.execute("VACUUM ANALYZE kb")
    assert fill(dsn, connection) == rows
    assert_exact(connection, "kb", "content", ALL, at_least=rows)
    read = (
        "SELECT max(s.idx_tup_read) FROM pg_stat_user_indexes s JOIN pg_index i USING (indexrelid)"
        " WHERE s.relname = 'kb' AND i.indpred IS NOT NULL"
    )
    until(lambda: one(connection, read) >= rows)
    # The walk reads each once, and so do the count after it and the next walk, until the server knows them dead.
    assert one(connection, read) <= 4 * rows


def test_the_ledger_tells_at_once_who_is_active(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Also of a standby that takes over: `cutover` and `status` do not wait for the next heartbeat."""
    knowledge_base(connection, 20)
    advance(dsn, "CUT_OVER")
    stops = [threading.Event(), threading.Event()]
    followers = [Follower(settings(dsn), oid_of(connection), stop=stop.is_set) for stop in stops]
    threads = [threading.Thread(target=follower.run) for follower in followers]
    active = "SELECT count(*) FROM revector.heartbeats WHERE active AND worker = %s"
    try:
        for follower, thread, before in zip(followers, threads, (None, stops[0]), strict=True):
            thread.start()
            if before is not None:
                until(lambda: one(connection, "SELECT count(*) FROM revector.heartbeats") == 2)
                before.set()
            until(lambda f=follower: f.active)  # type: ignore[misc]
            until(lambda f=follower: one(connection, active, f.worker), 1)  # type: ignore[misc]
    finally:
        for stop in stops:
            stop.set()
        for thread in threads:
            thread.join()


def test_a_lock_that_is_not_to_be_had_is_no_lost_database(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's DDL holds the table: the follower says so, keeps its sessions, and goes on the moment that it ends."""
    monkeypatch.setitem(db._GROUND, "lock_timeout", "300ms")
    knowledge_base(connection, 20)
    advance(dsn, "CUT_OVER")
    held = "kb is locked by somebody's DDL"
    with following(dsn, connection) as follower:
        seen: list[Observation] = []
        follower.observe = seen.append
        sessions = "SELECT array_agg(pid) FROM pg_stat_activity WHERE application_name LIKE 'revector%'"
        before = set(one(connection, sessions))
        edit(connection, 1)
        with psycopg.connect(dsn) as other:
            other.execute("LOCK TABLE kb IN ACCESS EXCLUSIVE MODE")
            until(lambda: any(isinstance(s, Health) and s.why == held for s in seen))
            until(lambda: one(connection, "SELECT count(*) FROM revector.heartbeats WHERE trouble = %s", held), 1)
        until(lambda: fresh(connection, 1), 2)
        until(lambda: one(connection, "SELECT count(*) FROM revector.heartbeats WHERE active AND trouble IS NULL"), 2)
        assert before <= set(one(connection, sessions))
    assert not [s for s in seen if "lost" in str(s)]
    assert_exact(connection, "kb", "content", ALL)


def test_a_row_that_moves_during_a_walk_is_met_by_it(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow model, and an update of another column meanwhile: where rows are pending is read again every second."""
    knowledge_base(connection, 12)
    advance(dsn, "CUT_OVER")
    monkeypatch.setattr(backfill, "_FILL_LIMIT", 4)
    original, walks = Filler._fill, []

    def slow(self: Filler, *args: Any) -> int:
        walks.append(args)
        if len(walks) == 1:
            connection.execute("UPDATE kb SET note = 'moved' WHERE id IN (6, 9)")
            time.sleep(1.1)
        return original(self, *args)

    monkeypatch.setattr(Filler, "_fill", slow)
    with filling(dsn, connection) as filler, psycopg.connect(dsn) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM kb")  # nothing is pruned: a row moves on, not back
        connection.execute("UPDATE kb SET content = content || ' edited'")
        assert filler.walk() == 12
    assert_exact(connection, "kb", "content", ALL)


def test_places_are_read_in_pieces_of_what_memory_holds(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generations lack vectors in different rows, so that the pieces end at different places, and rows move."""
    knowledge_base(connection, 20)
    advance(dsn, "CUT_OVER")
    connection.execute("SET revector.writer = 'on'")
    connection.execute("UPDATE kb SET embedding = NULL WHERE id % 3 = 0")
    connection.execute("UPDATE kb SET embedding_g1 = NULL WHERE id % 2 = 0 OR id > 16")
    monkeypatch.setattr(backfill, "_PLACES", 3)
    monkeypatch.setattr(backfill, "_FILL_LIMIT", 2)
    original, batches = Filler._fill, []

    def moving(self: Filler, leaf: Any, batch: list[Any], needed: Any) -> int:
        batches.append(len(batch))
        connection.execute("UPDATE kb SET note = note || 'm' WHERE id = %s", (len(batches),))
        return original(self, leaf, batch, needed)

    monkeypatch.setattr(Filler, "_fill", moving)
    fill(dsn, connection)
    assert len(batches) > 6 and max(batches) == 2
    assert_exact(connection, "kb", "content", ALL, at_least=20)


@contextmanager
def filling(dsn: str, connection: psycopg.Connection[Any]) -> Iterator[Filler]:
    """The filler of a follower that is not running, to be driven step by step."""
    follower = Follower(settings(dsn), oid_of(connection))
    with Database(settings(dsn)).connect("control") as control:
        found = follower._work(control)
        assert found is not None
        with closing(follower), Filler(found[1], managed(found[0]), enduring=True, paced=True) as filler:
            yield filler


def test_a_follower_with_much_to_do_is_counted_and_says_how_late_it_is(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    """Its first walk alone would take 12 s: who is filling is alive, and rows that it has not come to wait."""
    knowledge_base(connection, 600, index=None)
    advance(dsn, "CUT_OVER")
    connection.execute("UPDATE kb SET content = content || ' edited'")
    with steering(dsn) as migration:
        migration.tune({"max_rows_per_second": 50})
    pending = "SELECT count(*) FROM kb WHERE embedding IS NULL"
    with following(dsn, connection):
        assert one(connection, pending) > 400
        assert not alerts(dsn)
        until(lambda: one(connection, "SELECT oldest FROM revector.heartbeats") > 4)
        assert one(connection, pending) > 100
        until(lambda: not one(connection, pending))
        until(lambda: one(connection, "SELECT oldest FROM revector.heartbeats") == 0)
    assert_exact(connection, "kb", "content", ALL)


def test_a_walk_that_is_cut_goes_on_where_it_ended(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked rows keep their age and nobody waiting; only a whole way without them settles what a swap left open."""
    knowledge_base(connection, 12)
    advance(dsn, "CUT_OVER")
    connection.execute("UPDATE revector.generations SET swapped = pg_current_xact_id()::xid, settled = false")
    connection.execute("UPDATE kb SET content = content || ' edited'")
    settled = "SELECT bool_and(settled) FROM revector.generations"
    monkeypatch.setattr(backfill, "_FILL_LIMIT", 4)
    with filling(dsn, connection) as filler:
        with psycopg.connect(dsn) as other:
            other.execute("SELECT FROM kb WHERE id < 4 FOR UPDATE")
            assert [(filler.walk(0.0), filler.cut) for _ in range(4)] == [(0, True), (4, True), (4, False), (0, False)]
            time.sleep(0.5)
            assert filler.walk(0.0) == 0 and filler.oldest() > 0.5
        assert not one(connection, settled)
        assert filler.walk(0.0) == 4 and not filler.cut
        assert one(connection, settled)
        assert filler.oldest() == 0
    assert_exact(connection, "kb", "content", ALL)


@pytest.mark.parametrize("mode", ["ACCESS EXCLUSIVE", "SHARE"])
def test_a_locked_partition_keeps_nobody_from_the_others(
    dsn: str, connection: psycopg.Connection[Any], mode: str
) -> None:
    """Somebody's DDL holds one leaf: it is named, its rows wait, and those of the other leaves do not."""
    connection.execute(
        "CREATE TABLE kb (id int PRIMARY KEY, content text, note text NOT NULL DEFAULT '', embedding vector(16))"
        " PARTITION BY RANGE (id)"
    )
    connection.execute("CREATE TABLE kb_a PARTITION OF kb FOR VALUES FROM (0) TO (100)")
    connection.execute("CREATE TABLE kb_b PARTITION OF kb FOR VALUES FROM (100) TO (200)")
    for n in (*range(10), *range(100, 110)):
        text = f"row {n} tells of subject {n % 7}"
        connection.execute("INSERT INTO kb VALUES (%s, %s, '', %s)", (n, text, vector(OLD, text)))
    advance(dsn, "CUT_OVER")
    there = "SELECT embedding IS NOT NULL AND embedding_g1 IS NOT NULL FROM ONLY kb_b WHERE id = 105"
    edit(connection, 3)
    with psycopg.connect(dsn) as other:
        other.execute(sql.SQL("LOCK TABLE kb_a IN " + mode + " MODE"))
        with following(dsn, connection) as follower:
            seen: list[Observation] = []
            follower.observe = seen.append
            for _ in range(2):
                connection.execute("UPDATE ONLY kb_b SET content = content || ' edited' WHERE id = 105")
                until(lambda: one(connection, there), 4)
            until(lambda: follower.trouble == "kb_a is locked by somebody's DDL", 4)
            until(lambda: any(isinstance(s, Health) and s.why == follower.trouble for s in seen), 4)
            other.commit()
            until(lambda: fresh(connection, 3) and not follower.trouble, 4)
    assert_exact(connection, "kb", "content", ALL, at_least=20)


def test_a_paused_follower_does_not_look_for_what_it_may_not_fill(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is pending may be much, and the pause long; how long it waits is told nevertheless."""
    knowledge_base(connection, 12)
    advance(dsn, "VERIFIED")
    connection.execute("SET revector.writer = 'on'")
    connection.execute("UPDATE kb SET embedding_g2 = NULL")
    original, looks = Filler._places, []

    def counted(self: Filler, *args: Any) -> Any:
        looks.append(args)
        return original(self, *args)

    monkeypatch.setattr(Filler, "_places", counted)
    with filling(dsn, connection) as filler:
        filler.work.throttle.tuning = Tuning(paused=True)
        assert [filler.walk() for _ in range(3)] == [0, 0, 0] and len(looks) == 1
        time.sleep(0.1)
        assert filler.oldest() > 0.1
        filler.work.throttle.tuning = Tuning()
        assert filler.walk() == 12


def test_a_lost_pending_index_is_an_alert_and_costs_no_scan_at_every_poll(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    """With a living follower too; the statements that the alert gives bring it back under the names of now."""
    knowledge_base(connection, 20)
    advance(dsn, "CUT_OVER")
    with following(dsn, connection) as follower:
        connection.execute("DROP INDEX rv_kb_g2_pending")
        (alert,) = [a for a in alerts(dsn) if a.kind == "pending_index"]
        assert alert.what.startswith("the index rv_kb_g2_pending is missing") and NEW in alert.what
        until(lambda: follower.trouble == "the index rv_kb_g2_pending is missing", 8)
        edit(connection, 1)
        until(lambda: fresh(connection, 1))
        connection.execute(alert.next)
        until(lambda: not follower.trouble, 8)
    assert not alerts(dsn)
    connection.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'rv_kb_g1_pending'::regclass")
    (alert,) = alerts(dsn)
    assert "rv_kb_g1_pending is INVALID" in alert.what
    for statement in alert.next.split("\n"):
        connection.execute(statement)
    assert not alerts(dsn)
    assert_exact(connection, "kb", "content", ALL)
