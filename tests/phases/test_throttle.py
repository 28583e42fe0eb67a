"""How fast the backfill writes: the operator's limits, and backing off where the application suffers."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fix_commands import command
from fix_tables import (
    NEW,
    OLD,
    REQUEST,
    advance,
    assert_exact,
    following,
    knowledge_base,
    one,
    settings,
    steering,
    until,
)
from revector import Migration, Request
from revector.db import Database
from revector.embedded import Server, _identity, create_database, embedded_server
from revector.errors import Interrupted, Refused
from revector.phases import backfill
from revector.throttle import BLOCKED, Throttle, Watch
from revector.work import Note, Observation, Progress

#: Transactions of ours that stay open; a look at the locks, ten times a second, is over in a moment.
OURS = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'revector %' AND"
    " (state LIKE 'idle in transaction%' OR xact_start < clock_timestamp() - interval '400 ms')"
)
WRITTEN = "SELECT count(embedding_g2) FROM kb"


class Run:
    """`run` in a thread, and what it says."""

    def __init__(self, dsn: str, request: Request = REQUEST, **options: Any) -> None:
        self.notes: list[str] = []
        self.stopped = threading.Event()
        self.error: BaseException | None = None
        self._dsn, self._request, self._options = dsn, request, options
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        def observe(seen: Observation) -> None:
            if isinstance(seen, Note):
                self.notes.append(seen.text)

        try:
            with Migration.open(
                settings(self._dsn), table="kb", observe=observe, stop=self.stopped.is_set
            ) as migration:
                migration.run(self._request, **self._options)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Run:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextmanager
def steered(dsn: str) -> Iterator[Migration]:
    """Another terminal, while the table's lock is held by a run."""
    with Migration.open(settings(dsn), table="kb", steer=False) as migration:
        yield migration


def test_a_rate_is_kept(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """400 rows at 200 a second take two seconds, whatever the model could do; the figures say what it was held back by."""
    knowledge_base(connection, 400)
    times: list[tuple[float, int]] = []

    def observe(seen: Observation) -> None:
        if isinstance(seen, Progress) and seen.phase == "backfill":
            times.append((time.monotonic(), seen.done))

    with steering(dsn, observe=observe) as migration:
        migration.run(REQUEST, tuning={"max_rows_per_second": 200})
        status = migration.status()
    moving = [(at, done) for at, done in times if done > 0]
    (began, first), (ended, last) = moving[0], next((at, done) for at, done in moving if done == 400)
    assert first <= 40
    assert (last - first) / (ended - began) == pytest.approx(200, rel=0.1)
    assert status.tuning.max_rows_per_second == 200 and status.written is not None and status.written[0] == 400
    figures = one(connection, "SELECT figures FROM revector.events WHERE step = 'backfill'")
    assert figures["throttled_s"]["rows per second"] > 1
    assert 0 <= figures["hot_share"] <= 1 and 0 <= figures["hot_expected"] <= 1
    assert_exact(connection, "kb", "content", {"embedding_g2": NEW}, at_least=400)


def test_pause_and_resume_from_another_terminal(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Within two seconds nothing is written and no transaction is open; resume starts what waits, and nothing else."""
    knowledge_base(connection, 600)
    with Run(dsn, tuning={"max_rows_per_second": 100}) as run:
        until(lambda: one(connection, "SELECT to_regclass('revector.windows') IS NOT NULL"))
        until(lambda: one(connection, "SELECT count(*) FROM pg_attribute WHERE attname = 'embedding_g2'"))
        until(lambda: one(connection, WRITTEN) > 20)
        told = command(dsn, "pause", "kb").exits(0)
        assert told.out.startswith("kb: paused; 100 rows/s") and "next: revector resume kb" in told.out
        until(lambda: any("paused; it goes on after: revector resume kb" in note for note in run.notes), 2)
        time.sleep(0.2)
        before = one(connection, WRITTEN)
        assert before < 600
        for _ in range(10):
            time.sleep(0.1)
            assert one(connection, OURS) == 0
        assert one(connection, WRITTEN) == before
        assert "paused" in command(dsn, "status", "kb").exits(0).out
        command(dsn, "tune", "kb", "--max-rows-per-second", "none").exits(0)
        assert one(connection, WRITTEN) == before
        told = command(dsn, "resume", "kb").exits(0)
        assert told.out.startswith("kb: not paused; no limits")
        run.thread.join(20)
        assert run.error is None
    assert_exact(connection, "kb", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=600)
    assert command(dsn, "resume", "kb").exits(0).out.startswith("kb: not paused")
    assert one(connection, "SELECT count(*) FROM revector.events WHERE step IN ('paused', 'resumed')") == 3


def test_a_pause_waits_for_one_batch_of_a_slow_model(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model makes costs money: after a pause it is asked for nothing but what it had begun."""
    asked: list[int] = []
    real = backfill.encode

    def slow(work: Any, generation: Any, embedder: Any, texts: list[str], **more: Any) -> Any:
        asked.append(len(texts))
        time.sleep(0.6)
        return real(work, generation, embedder, texts, **more)

    monkeypatch.setattr(backfill, "encode", slow)
    knowledge_base(connection, 200)
    with Run(dsn, request=replace(REQUEST, batch_size=10)) as run:
        until(lambda: len(asked) > 2)
        with steered(dsn) as other:
            other.pause()
        time.sleep(1.2)  # the batch that is at work, and a look at the limits every half second
        before = len(asked)
        time.sleep(1.5)
        assert len(asked) == before and max(asked) == 10
        run.stopped.set()
        began = time.monotonic()
        run.thread.join(20)
        assert time.monotonic() - began < 2


def test_a_paused_run_can_be_stopped_and_a_new_one_waits(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 40)
    advance(dsn, "EXPANDED")
    with steered(dsn) as other:
        other.pause()
    with Run(dsn) as run:
        until(lambda: any("paused" in note for note in run.notes))
    assert isinstance(run.error, Interrupted)
    assert one(connection, WRITTEN) == 0
    with steered(dsn) as other:
        assert not other.resume().limits.paused
    assert one(connection, WRITTEN) == 0


def test_pause_is_refused_where_rows_would_vanish(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """From SERVED on the follower is what keeps rows in search; a rate holds it, a pause does not."""
    knowledge_base(connection, 40)
    told = command(dsn, "pause", "kb").exits(3)
    assert "no migration is open" in told.last and "revector status kb" in told.last
    advance(dsn, "VERIFIED")
    with steered(dsn) as other:
        other.pause()
    with steering(dsn) as migration:
        migration.cutover(without_follower=True)
        with pytest.raises(Refused, match="no backfill to pause at CUT_OVER"):
            migration.pause()
        migration.tune({"max_rows_per_second": 30})
    connection.execute("UPDATE kb SET content = content || '!'")
    began = time.monotonic()
    with following(dsn, connection):
        until(lambda: one(connection, "SELECT count(*) FROM kb WHERE embedding IS NULL OR embedding_g1 IS NULL") == 0)
    assert time.monotonic() - began > 1.0
    assert_exact(connection, "kb", "content", {"embedding": NEW, "embedding_g1": OLD}, at_least=40)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to change was given"),
        (["--max-rows-per-second", "0"], "--max-rows-per-second 0: a number above 0, or none"),
        (["--max-rows-per-second", "many"], "--max-rows-per-second many: a number above 0, or none"),
        (["--max-lag", "-1"], "--max-lag -1: a number above 0, or none"),
        (["--max-lag", "nan"], "--max-lag nan: a number above 0, or none"),
    ],
)
def test_bad_values(arguments: list[str], said: str) -> None:
    assert said in command(None, "tune", "kb", *arguments).exits(2).last


def test_we_back_off_when_a_session_waits_for_us(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """An application session that waits 100 ms on one of our locks makes the pauses between writes grow, and is named."""
    knowledge_base(connection, 10)
    advance(dsn, "EXPANDED")
    number = one(connection, "SELECT max(id) FROM revector.migrations")
    throttle = Throttle()
    throttle.wrote(64)
    watch = Watch(Database(settings(dsn)), throttle, number)
    with (
        psycopg.connect(dsn) as ours,
        psycopg.connect(dsn) as theirs,
        Database(settings(dsn)).connect("watch") as looks,
    ):
        watch.pids.add(ours.info.backend_pid)
        ours.execute("UPDATE kb SET note = 'held' WHERE id = 1")
        waiting = threading.Thread(target=lambda: theirs.execute("UPDATE kb SET note = 'waits' WHERE id = 1"))
        waiting.start()
        try:
            time.sleep(0.25)
            watch.look(looks, standbys=False)
            reason, most, told = throttle.wait()[1], throttle.most(), throttle.words(BLOCKED)
        finally:
            ours.rollback()
            waiting.join()
        assert (reason, most) == (BLOCKED, 32)
        assert f"process {theirs.info.backend_pid} for " in told
        for _ in range(4):
            watch.look(looks, standbys=False)
        time.sleep(0.2)
        assert throttle.wait() == (0.0, "")


# -- a real standby ----------------------------------------------------------------------------------------------------


@contextmanager
def standby(server: Server, tmp: Path) -> Iterator[str]:
    """A streaming standby of the server; gives its DSN."""
    programs, place, run = server.programs, server.folder / "standby", server.folder / "srun"
    who = _identity(server.folder, server.account)

    def program(*command: Any) -> None:
        subprocess.run([str(c) for c in command], check=True, capture_output=True, timeout=60, **who)

    primary = server.dsn.split("host=")[1].split("&")[0].replace("%2F", "/")
    run.mkdir(mode=0o700)
    if server.account:
        import shutil

        shutil.chown(run, server.account)
    program(
        programs / "pg_basebackup", "-h", primary, "-U", "postgres", "-D", place, "-R", "-X", "stream", "-c", "fast"
    )
    options = f"-k {run} -c unix_socket_directories={run} -c listen_addresses= -c hot_standby=on"
    program(programs / "pg_ctl", "-D", place, "-l", server.folder / "standby.log", "-w", "-o", options, "start")
    try:
        yield f"postgresql://postgres@/postgres?host={run}&port=5432"
    finally:
        program(programs / "pg_ctl", "-D", place, "-m", "immediate", "stop")


@pytest.mark.roads
def test_late_standby_stops_the_backfill(tmp_path: Path) -> None:
    """Replay stands still on a real standby: after the limit nothing more is written, and it goes on when replay does."""
    with embedded_server(options={"fsync": "off"}) as server:
        dsn = create_database(server, "app")
        with psycopg.connect(dsn, autocommit=True) as connection, standby(server, tmp_path) as second:
            connection.execute("CREATE EXTENSION vector")
            knowledge_base(connection, 1500)
            with psycopg.connect(second, autocommit=True) as replica:
                replica.execute("SELECT pg_wal_replay_pause()")
                until(lambda: one(replica, "SELECT pg_get_wal_replay_pause_state()") == "paused")
                with Run(dsn, tuning={"max_rows_per_second": 100, "max_lag": 2}) as run:
                    until(lambda: any("replication lag: walreceiver is" in note for note in run.notes), 30)
                    time.sleep(0.3)
                    before = one(connection, WRITTEN)
                    time.sleep(1.5)
                    assert one(connection, WRITTEN) == before < 1500
                    assert one(connection, OURS) == 0
                    replica.execute("SELECT pg_wal_replay_resume()")
                    with steered(dsn) as other:
                        other.tune({"max_rows_per_second": None})
                    run.thread.join(60)
                    assert run.error is None
            assert_exact(connection, "kb", "content", {"embedding_g2": NEW}, at_least=1500)
