"""What a swap may cost and when it happens: the pause budget, the attempts, and a moment that is waited for."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors as pg
from psycopg import sql

from fix_commands import command, ended, started, until
from fix_tables import (
    NEW,
    OLD,
    Halt,
    advance,
    assert_exact,
    following,
    halting,
    knowledge_base,
    one,
    shape,
    stage_of,
    steering,
    vector,
)
from revector.db import PauseLimits, in_the_way, left_of
from revector.embedded import embedded_server
from revector.errors import Interrupted, PauseBudgetMissed, Refused
from revector.moment import Moment
from revector.work import Note, Observation, Recorded

BEFORE = {"embedding": OLD, "embedding_g2": NEW}
AFTER = {"embedding_g1": OLD, "embedding": NEW}


@contextmanager
def threads(*targets: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run each until the block ends; what one dies of fails the test."""
    stop, died = threading.Event(), []

    def guarded(target: Callable[[threading.Event], None]) -> None:
        try:
            target(stop)
        except BaseException as error:
            died.append(error)

    running = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in running:
            thread.join()
    assert died == []


# -- what it may cost -------------------------------------------------------------------------------------------------


def test_budget_and_attempts_are_those_asked_for(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A table that is never free costs attempts x budget and no more, and the holder is named."""
    knowledge_base(connection, 20)
    advance(dsn, "SERVED")
    before = shape(connection)
    told: list[str] = []
    with psycopg.connect(dsn, application_name="a long report") as holder:
        holder.execute("SELECT 1 FROM kb LIMIT 1")
        with steering(dsn, observe=lambda s: told.append(s.text) if isinstance(s, Note) else None) as migration:
            began = time.monotonic()
            with pytest.raises(PauseBudgetMissed, match="no attempt of 2 got the lock within 40 ms") as caught:
                migration.cutover(without_follower=True, limits=PauseLimits(40, 2))
            assert time.monotonic() - began < 4
    assert "a long report" in caught.value.why and "idle in transaction" in caught.value.why
    missed = [text for text in told if text.startswith("attempt ")]
    assert [text.split(":")[0] for text in missed] == ["attempt 1 of 2", "attempt 2 of 2"]
    assert all("a long report" in text for text in missed)
    assert shape(connection) == before and stage_of(connection) == ("SERVED", None)


def test_a_wider_budget_outlasts_a_statement(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Half a second of waiting is too much by default, and what was asked for here: one attempt, and it succeeds."""
    knowledge_base(connection, 20)
    advance(dsn, "SERVED")

    def hold(stop: threading.Event) -> None:
        with psycopg.connect(dsn) as holder:
            while not stop.is_set():
                holder.execute("SELECT count(*), pg_sleep(0.5) FROM kb WHERE id = 1 GROUP BY id")
                holder.commit()

    with threads(hold), steering(dsn) as migration:
        time.sleep(0.2)
        done = migration.cutover(without_follower=True, limits=PauseLimits(3000, 1))
    assert done.figures["attempt"] == 1 and done.figures["pause_ms"] < 3000
    recorded = one(connection, "SELECT figures FROM revector.events WHERE step = 'pause' ORDER BY id DESC LIMIT 1")
    assert recorded["step"] == "cutover" and recorded["total_ms"] == done.figures["pause_ms"]


def test_every_short_lock_takes_the_limits(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Expand, served, finalize and abort wait as long as they were told to, as the swap does."""
    knowledge_base(connection, 20)

    def missed(name: str, **options: Any) -> None:
        with psycopg.connect(dsn) as holder, steering(dsn) as migration:
            holder.execute("SELECT 1 FROM kb LIMIT 1")
            with pytest.raises(PauseBudgetMissed, match="no attempt of 1 got the lock within 30 ms"):
                getattr(migration, name)(limits=PauseLimits(30, 1), **options)

    advance(dsn, "PLANNED")
    missed("run", from_=OLD, to=NEW)
    assert stage_of(connection)[0] == "PLANNED"
    advance(dsn, "VERIFIED")
    missed("cutover", without_follower=True)
    missed("abort")
    assert stage_of(connection) == ("VERIFIED", None)
    advance(dsn, "CUT_OVER")
    missed("rollback", without_follower=True)
    missed("finalize")
    assert stage_of(connection) == ("CUT_OVER", None)


def test_work_that_does_not_fit_is_no_busy_table(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The lock was had; what needs more than the budget is said with a budget that fits, after two attempts of the many."""
    knowledge_base(connection, 5)
    told: list[str] = []
    with steering(dsn) as migration:
        name, slow = sql.Identifier("public", "kb"), [sql.SQL("SELECT pg_sleep(0.1)")] * 5

        def pause(**options: Any) -> Any:
            return migration.database.pause(migration.control, name, slow, observe=told.append, **options)

        with pytest.raises(PauseBudgetMissed, match=r"the lock was had after \d+ ms, but the work under it") as caught:
            pause(budget_ms=150, attempts=20)
        assert len(told) == 1 and told[0].startswith("attempt 1 of 20: the lock was had after ")
        assert "statement 2 of 5" in caught.value.why and "held the table" not in caught.value.why
        assert caught.value.fits_ms in (600, 700)
        assert pause(budget_ms=caught.value.fits_ms).attempt == 1
        with pytest.raises(PauseBudgetMissed, match="the lock was had"):
            pause(budget_ms=150, attempts=1)


def test_work_that_fits_is_tried_until_the_table_is_quiet(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Twice the wait for the lock took what the work needed: that is a busy table, and the third attempt succeeds."""
    knowledge_base(connection, 5)
    waited = (
        "SELECT count(*) FROM pg_locks WHERE relation = 'kb'::regclass AND NOT granted"
        " AND waitstart < clock_timestamp() - interval '450 ms'"
    )
    told: list[str] = []
    with psycopg.connect(dsn) as holder:

        def hold(text: str = "") -> None:
            told.append(text)
            if len(told) < 3:
                holder.execute("SELECT 1 FROM kb LIMIT 1")

        def let_go(stop: threading.Event) -> None:
            with psycopg.connect(dsn, autocommit=True) as own:
                while not stop.wait(0.005):
                    if one(own, waited):
                        holder.rollback()

        hold()
        with steering(dsn) as migration, threads(let_go):
            name, work = sql.Identifier("public", "kb"), [sql.SQL("SELECT pg_sleep(0.65)")]
            done = migration.database.pause(migration.control, name, work, budget_ms=1000, observe=hold)
    assert done.attempt == 3 and len(told) == 3
    assert all("the lock was had after " in text and "did not fit in the rest" in text for text in told[1:])


def test_lock_that_the_work_waits_for_is_no_work(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Another relation's lock inside the work: no larger budget is advised, and the statement that waited is named."""
    knowledge_base(connection, 5)
    connection.execute("CREATE TABLE other (id int)")
    told: list[str] = []
    with psycopg.connect(dsn) as holder, steering(dsn) as migration:
        holder.execute("SELECT 1 FROM other")
        name, work = sql.Identifier("public", "kb"), [sql.SQL("LOCK TABLE public.other IN ACCESS EXCLUSIVE MODE")] * 2
        with pytest.raises(PauseBudgetMissed, match="no attempt of 3 got all its locks within 100 ms") as caught:
            migration.database.pause(migration.control, name, work, budget_ms=100, attempts=3, observe=told.append)
    assert len(told) == 3 and all("ms, statement 1 of 2 waited for a lock" in text for text in told)
    assert "LOCK TABLE public.other IN ACCESS EXCLUSIVE MODE" in caught.value.why
    assert caught.value.fits_ms is None and "held the table" not in caught.value.why


def test_many_short_statements_share_the_budget(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """When nothing is left of it the next statement is not begun, however short it is."""
    knowledge_base(connection, 5)
    with steering(dsn) as migration:
        started = [sql.SQL("BEGIN"), left_of(20), sql.SQL("SELECT 1")]
        migration.control.message([*started, sql.SQL("ROLLBACK")])
        with migration.control.rolled_back(), pytest.raises(pg.QueryCanceled):
            migration.control.message(
                [
                    *started,
                    sql.SQL("SET LOCAL statement_timeout = 0"),
                    sql.SQL("SELECT pg_sleep(0.03)"),
                    left_of(20),
                    sql.SQL("SELECT 1"),
                ]
            )


def test_cut_off_after_the_last_statement_is_told_as_the_last(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock that closes an attempt may be what is cut off: there is no fifth statement of four."""
    knowledge_base(connection, 5)
    with steering(dsn) as migration:
        outcome = migration.control.outcome

        def all_but_the_clock(statements: Sequence[sql.Composable]) -> tuple[list[str | None], psycopg.Error | None]:
            answers, error = outcome(statements)
            return answers + ["0"] * (len(statements) - 2 - len(answers)), error

        monkeypatch.setattr(migration.control, "outcome", all_but_the_clock)
        with pytest.raises(PauseBudgetMissed, match="the lock was had") as caught:
            work = [sql.SQL("SELECT pg_sleep(1)")] * 4
            migration.database.pause(migration.control, sql.Identifier("public", "kb"), work, budget_ms=100, attempts=1)
    assert "it came to statement 4 of 4" in caught.value.why


def test_attempts_that_missed_in_two_ways_say_both(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Once the work was too long, then the table was busy: it is not said that no attempt got the lock."""
    knowledge_base(connection, 5)
    with (
        psycopg.connect(dsn, application_name="a long report") as holder,
        steering(dsn) as migration,
        pytest.raises(PauseBudgetMissed, match="no attempt of 3 was done within 100 ms; 1 of them got the") as caught,
    ):
        migration.database.pause(
            migration.control,
            sql.Identifier("public", "kb"),
            [sql.SQL("SELECT pg_sleep(0.2)")],
            budget_ms=100,
            attempts=3,
            observe=lambda _: holder.execute("SELECT 1 FROM kb LIMIT 1"),
        )
    assert "a long report" in caught.value.why
    assert caught.value.fits_ms == 200


def test_many_partitions_say_the_budget_that_they_need(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The message names the command with a budget that works, in the place of the one that was given."""
    connection.execute("CREATE TABLE kb (id int, content text, embedding vector(16)) PARTITION BY LIST (id)")
    for number in range(200):
        connection.execute(f"CREATE TABLE kb_{number} PARTITION OF kb FOR VALUES IN ({number})")
    for number in range(30):
        text = f"row {number}"
        connection.execute("INSERT INTO kb VALUES (%s, %s, %s)", (number, text, vector(OLD, text)))
    given = ("run", "--from", OLD, "--to", NEW)
    missed = command(dsn, *given, "--max-pause-ms=10", "--", "kb").exits(4)
    # Taking 201 locks may be more than a tenth of 10 ms: then it counts as a wait.
    assert re.search(r"but the work under it needs more than (what that left of )?the budget of 10 ms", missed.err)
    words = missed.last.rpartition("a budget that fits: revector ")[2].split()
    fits = int(words.pop(2))
    assert words == ["run", "--max-pause-ms", *given[1:], "--", "kb"] and 20 <= fits <= 10_000
    assert stage_of(connection) == ("PLANNED", None)
    with pytest.raises(Halt), steering(dsn, observe=halting("expand", Recorded)) as migration:
        migration.run(from_=OLD, to=NEW, limits=PauseLimits(fits))
    assert stage_of(connection) == ("EXPANDED", None)


def test_vacuum_that_does_not_end_is_named(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The lock that is waited for first blocks nobody, and when it is not to be had the error says who has it."""
    knowledge_base(connection, 20)
    advance(dsn, "SERVED")
    with psycopg.connect(dsn, application_name="nightly") as holder:
        holder.execute("LOCK TABLE kb IN SHARE UPDATE EXCLUSIVE MODE")
        with steering(dsn) as migration, pytest.raises(PauseBudgetMissed, match="SHARE UPDATE EXCLUSIVE") as caught:
            migration.cutover(without_follower=True)
    assert "nightly" in caught.value.why and "Nothing changed" in caught.value.why


def test_readers_are_not_named_where_they_are_not_in_the_way(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """SHARE UPDATE EXCLUSIVE passes readers and writers: only who keeps it from us is named, however late it came."""
    knowledge_base(connection, 20)
    advance(dsn, "SERVED")
    with ExitStack() as open_:
        for number in range(4):
            reader = open_.enter_context(psycopg.connect(dsn, application_name=f"reader {number}"))
            reader.execute("SELECT 1 FROM kb LIMIT 1")
        holder = open_.enter_context(psycopg.connect(dsn, application_name="nightly"))
        holder.execute("LOCK TABLE kb IN SHARE UPDATE EXCLUSIVE MODE")
        with steering(dsn) as migration, pytest.raises(PauseBudgetMissed, match="SHARE UPDATE EXCLUSIVE") as caught:
            migration.cutover(without_follower=True)
    assert "nightly" in caught.value.why and "reader" not in caught.value.why


def test_vacuum_that_does_not_give_way_is_named_before_others(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """It is not the oldest that is called such a VACUUM. (A statement that fails stays in view, with its transaction's locks.)"""
    knowledge_base(connection, 5)
    with ExitStack() as open_, steering(dsn) as migration:
        for number in range(4):
            reader = open_.enter_context(psycopg.connect(dsn, application_name=f"reader {number}"))
            reader.execute("SELECT 1 FROM kb LIMIT 1")
        vacuum = open_.enter_context(psycopg.connect(dsn))
        pid = vacuum.info.backend_pid
        vacuum.execute("LOCK TABLE kb IN SHARE UPDATE EXCLUSIVE MODE; SAVEPOINT kept")
        with pytest.raises(pg.SyntaxError):
            vacuum.execute("autovacuum: VACUUM public.kb (to prevent wraparound)")
        told = in_the_way(migration.control, "ACCESS EXCLUSIVE", [sql.Identifier("public", "kb")])
    assert told.startswith(f"session {pid} of ") and "such a VACUUM does not give way" in told


@pytest.mark.roads
def test_two_renames_under_vacuum_autovacuum_and_long_statements(tmp_path: Path) -> None:
    """Twice cutover and rollback, once beside a running autovacuum, once beside VACUUM in a loop and slow statements."""
    tuning = {"fsync": "off", "autovacuum_naptime": "1s"}
    slow = (
        "autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0,"
        " autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1"
    )
    with embedded_server(options=tuning) as server, psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
        knowledge_base(connection, 400, filler=700)
        advance(server.dsn, "SERVED")

        def vacuum(stop: threading.Event) -> None:
            with psycopg.connect(server.dsn, autocommit=True) as own:
                while not stop.wait(0.02):
                    own.execute("VACUUM kb")

        def report(stop: threading.Event) -> None:
            with psycopg.connect(server.dsn, autocommit=True) as own:
                while not stop.wait(0.1):
                    own.execute("SELECT count(*), max(s::text) FROM (SELECT pg_sleep(0.15) AS s FROM kb LIMIT 1) AS t")

        def write(stop: threading.Event) -> None:
            with psycopg.connect(server.dsn, autocommit=True) as own:
                number = 0
                while not stop.wait(0.01):
                    number += 1
                    own.execute("UPDATE kb SET content = %s WHERE id = %s", (f"edit {number}", number % 400))

        pauses: list[float] = []

        def swap(name: str) -> None:
            with steering(server.dsn) as migration:
                done = getattr(migration, name)(limits=PauseLimits(200, 20))
            pauses.append(done.figures["pause_ms"])

        at_work = (
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'autovacuum worker' AND query LIKE '%.kb%'"
        )
        with threads(write, report), following(server.dsn, connection):
            connection.execute(f"ALTER TABLE kb SET ({slow})")  # type: ignore[arg-type]
            for name in ("cutover", "rollback"):
                until(lambda: one(connection, at_work))
                swap(name)
            connection.execute("ALTER TABLE kb SET (autovacuum_enabled = off)")
            with threads(vacuum):
                for name in ("cutover", "rollback"):
                    swap(name)
        with steering(server.dsn) as migration:
            migration.cutover(without_follower=True)
        assert len(pauses) == 4 and max(pauses) < 260, pauses
        assert_exact(connection, "kb", "content", AFTER, at_least=400)


# -- when it happens --------------------------------------------------------------------------------------------------


def test_the_swap_waits_for_its_moment(dsn: str, connection: psycopg.Connection[Any], tmp_path: Path) -> None:
    """All that is slow is done before; while it waits it keeps catching up, holds no lock and leaves no transaction open."""
    knowledge_base(connection, 60)
    advance(dsn, "VERIFIED")
    told: list[str] = []
    file = tmp_path / "go"
    pending = "SELECT count(*) FROM kb WHERE embedding IS NULL OR embedding_g2 IS NULL"

    def swap(_: threading.Event) -> None:
        with steering(dsn, observe=lambda s: told.append(s.text) if isinstance(s, Note) else None) as migration:
            migration.cutover(without_follower=True, when=Moment(file=file))

    with threads(swap):
        until(lambda: any(text.startswith(f"waiting for the file {file}") for text in told))
        assert stage_of(connection) == ("SERVED", None)
        connection.execute("UPDATE kb SET content = content || '!' WHERE id < 20")
        assert one(connection, pending) == 20
        until(lambda: one(connection, pending) == 0)
        for _ in range(20):
            time.sleep(0.05)
            open_for_long = connection.execute(
                "SELECT query FROM pg_stat_activity WHERE application_name LIKE 'revector%' AND datname = current_database()"
                " AND state LIKE 'idle in transaction%' AND now() - xact_start > interval '200 ms'"
            ).fetchall()
            assert open_for_long == []
        connection.execute("SET lock_timeout = '100ms'")
        connection.execute("ALTER TABLE kb ADD COLUMN added int; ALTER TABLE kb DROP COLUMN added")
        connection.execute("SET lock_timeout = 0")
        assert stage_of(connection) == ("SERVED", None)
        file.touch()
        until(lambda: stage_of(connection) == ("CUT_OVER", None), 10)
    assert_exact(connection, "kb", "content", AFTER, at_least=60)


def test_at_a_time(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Not before its time, and soon after."""
    knowledge_base(connection, 20)
    advance(dsn, "CUT_OVER")
    at = datetime.now().astimezone() + timedelta(seconds=2)
    with steering(dsn) as migration:
        migration.rollback(without_follower=True, when=Moment(at=at))
    happened = one(connection, "SELECT at FROM revector.events WHERE step = 'rollback' ORDER BY id DESC LIMIT 1")
    assert timedelta(0) <= happened - at < timedelta(seconds=3)


@pytest.mark.parametrize("change", ["follower", "dependent", "column"])
def test_conditions_are_checked_again_at_the_moment(
    dsn: str, connection: psycopg.Connection[Any], tmp_path: Path, change: str
) -> None:
    """What was true hours ago may not be true now: the swap is refused, and nothing has changed."""
    knowledge_base(connection, 20)
    advance(dsn, "VERIFIED")
    file = tmp_path / "go"
    caught: list[BaseException] = []

    def observe(seen: Observation) -> None:
        if isinstance(seen, Note) and seen.text.startswith("waiting for"):
            if change == "dependent":
                connection.execute("CREATE VIEW of_kb AS SELECT embedding FROM kb")
            elif change == "column":
                connection.execute("ALTER TABLE kb RENAME embedding_g2 TO elsewhere")
            else:
                connection.execute("DELETE FROM revector.heartbeats")
            file.touch()

    beat = (
        "INSERT INTO revector.heartbeats (worker, table_oid, kind, active, pid, host)"
        " VALUES (gen_random_uuid(), 'kb'::regclass, 'follower', true, 1, 'h')"
    )
    connection.execute(beat)
    with steering(dsn, observe=observe) as migration:
        try:
            migration.cutover(without_follower=change != "follower", when=Moment(file=file))
        except Refused as error:
            caught.append(error)
    expected = {"follower": "no follower is alive", "dependent": "of_kb", "column": "not where this migration left"}
    assert len(caught) == 1 and expected[change] in str(caught[0])
    assert stage_of(connection) == ("SERVED", None)


def test_ctrl_c_while_it_waits(dsn: str, connection: psycopg.Connection[Any], tmp_path: Path) -> None:
    """Interrupted, exit 4, the same names as before, and the same command goes on."""
    knowledge_base(connection, 20)
    advance(dsn, "VERIFIED")
    columns = shape(connection)["columns"]
    file = tmp_path / "go"
    waiting = started(dsn, "cutover", "kb", "--without-follower", "--when-file", str(file))
    until(lambda: stage_of(connection)[0] == "SERVED")
    until(lambda: one(connection, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'revector control'"))
    time.sleep(1)
    assert waiting.poll() is None
    answer = ended(waiting, signal.SIGINT, seconds=10).exits(4)
    assert f"waiting for the file {file}; Ctrl-C leaves everything as it is" in answer.err
    assert (
        f"{OLD} answers" in answer.last and f"revector cutover kb --without-follower --when-file {file}" in answer.last
    )
    assert [c[0] for c in shape(connection)["columns"]] == [c[0] for c in columns]
    file.touch()
    command(dsn, "cutover", "kb", "--without-follower", "--when-file", str(file)).exits(0)
    assert stage_of(connection)[0] == "CUT_OVER"


def test_run_goes_on_to_a_postponed_cutover(dsn: str, connection: psycopg.Connection[Any], tmp_path: Path) -> None:
    knowledge_base(connection, 20)
    file = tmp_path / "go"
    file.touch()
    options = ("--cutover", "--without-follower", "--when-file", str(file), "--max-pause-ms", "500", "--attempts", "9")
    command(dsn, "run", "kb", "--from", OLD, "--to", NEW, *options).exits(0)
    assert stage_of(connection)[0] == "CUT_OVER"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--at", "noon"), "--at noon is not a time"),
        (("--at", "2001-01-01T00:00"), "--at 2001-01-01T00:00 is past"),
        (("--max-pause-ms", "9"), "'--max-pause-ms': Input should be greater than or equal to 10"),
        (("--attempts", "0"), "'--attempts': Input should be greater than or equal to 1"),
    ],
)
def test_what_is_refused_before_anything_is_done(dsn: str, arguments: tuple[str, ...], told: str) -> None:
    for verb in ("cutover", "rollback"):
        assert told in command(dsn, verb, "kb", *arguments).exits(2).err
    only = command(dsn, "run", "kb", "--when-file", "x").exits(2).err
    assert "--when-file: only with --cutover" in only


def test_a_stop_while_waiting_ends_the_library_call(
    dsn: str, connection: psycopg.Connection[Any], tmp_path: Path
) -> None:
    knowledge_base(connection, 20)
    advance(dsn, "SERVED")
    with steering(dsn) as migration:
        migration.stop = lambda: True
        with pytest.raises(Interrupted):
            migration.cutover(without_follower=True, when=Moment(file=tmp_path / "never"))
    assert stage_of(connection) == ("SERVED", None)
