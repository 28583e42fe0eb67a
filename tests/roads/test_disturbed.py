"""Whole roads under clients of both versions, disturbed in every phase: nobody notices, and every row ends right."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from endings import MODEL_OF, assert_ended, assert_never_wrong, assert_rests, belongings, generations
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from test_hammer import Client

from fix_tables import (
    NEW,
    OLD,
    Halt,
    assert_exact,
    fill,
    halting,
    knowledge_base,
    one,
    stage_of,
    steering,
    until,
    vector,
)
from revector import Request
from revector.embedded import Server, create_database
from revector.errors import Resumable
from revector.phases import backfill, verify
from revector.plan import Consents
from revector.work import Effect, Observation, Recorded

ROWS = 120
#: Rows and fewest blocks in a window of the backfill's first sweep; the table has four times as many or more.
WINDOW_ROWS, WINDOW_BLOCKS = 30, (2, 512)
SEED = int(os.environ.get("REVECTOR_SEED", "20"))
REQUEST = Request(from_=OLD, to=NEW, batch_size=16, consents=Consents(include_null=True))
#: The roads of the issue, aborts at each stage beside them. A command stands for the process that an operator starts.
ROADS = {
    "complete": ("run", "expose", "cutover", "finalize"),
    "there and back": ("run", "expose", "cutover", "rollback", "cutover", "rollback", "abort"),
}
#: Statements that leave another text's vector where no trigger guards it, as they do without revector.
STALE = ("do_text", "do_vector_then_text", "do_save")
ABORTED_AT = ("plan", "expand", "backfill", "index", "verify", "serve", "rollback")


class Version(Client):
    """An application of one version on its generation's view: every statement must succeed, whatever happens."""

    def __init__(self, dsn: str, seed: int, model: str) -> None:
        super().__init__(dsn, seed)
        self.model = model
        self.bare = [kind for kind in self.bare if kind != "do_copy"]  # announced: no COPY through a view

    def vector(self, connection: psycopg.Connection[Any], text: str) -> str:
        return vector(self.model, text)

    def row(self) -> int:
        return self.random.randrange(ROWS)

    def work(self, stop: threading.Event) -> None:
        path = "rv_kb_g1" if self.model == OLD else "rv_kb_g2"
        # Every edit leaves a dead element in the HNSW index, and a scan that meets only those finds nothing: it goes on.
        options = f"-csearch_path={path},public -chnsw.iterative_scan=relaxed_order"
        self.dsn = psycopg.conninfo.make_conninfo(self.dsn, options=options)
        super().work(stop)
        if self.swapped:
            self.died.append(AssertionError(f"{self.swapped} errors of a wrong dimension on {path}"))

    def do_search(self, connection: psycopg.Connection[Any]) -> None:
        asked = vector(self.model, self.text())
        found = connection.execute("SELECT id FROM kb ORDER BY embedding <=> %s::vector LIMIT 3", (asked,)).fetchall()
        assert found, "a search found nothing"

    def do_merge(self, connection: psycopg.Connection[Any]) -> None:
        text = self.text()
        connection.execute(
            "MERGE INTO kb USING (SELECT %s::int AS id, %s::text AS content, %s::vector AS embedding) s ON kb.id = s.id"
            " WHEN MATCHED THEN UPDATE SET content = s.content, embedding = s.embedding",
            (self.row(), text, vector(self.model, text)),
        )

    def do_returning(self, connection: psycopg.Connection[Any]) -> None:
        connection.execute("UPDATE kb SET note = 'seen' WHERE id = %s RETURNING id, content, embedding", (self.row(),))


class Vector(sqlalchemy.types.UserDefinedType[str]):
    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "vector"

    def bind_expression(self, bindvalue: Any) -> Any:
        return sqlalchemy.cast(bindvalue, self)

    def column_expression(self, column: Any) -> Any:
        return sqlalchemy.cast(column, sqlalchemy.Text)


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "kb"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str | None]
    content: Mapped[str | None]
    note: Mapped[str]
    embedding: Mapped[str | None] = mapped_column(Vector())


class Orm(Version):
    """SQLAlchemy: reads a row under a lock, changes it, and saves every column of it."""

    counted = "orm save"
    #: How often it gives the text's vector; else it saves the one that it has read, as an ORM does.
    gives = 0.7

    def path(self) -> str:
        return f"{'rv_kb_g1' if self.model == OLD else 'rv_kb_g2'},public"

    def model_of(self, session: Session) -> str:
        return self.model

    def work(self, stop: threading.Event) -> None:
        engine = sqlalchemy.create_engine(
            "postgresql+psycopg://",
            creator=lambda: psycopg.connect(self.dsn, options=f"-csearch_path={self.path()}"),
            isolation_level="READ COMMITTED",
        )
        try:
            while not stop.wait(self.random.random() * 0.006):
                with Session(engine) as session, session.begin():
                    entry = session.get(Entry, self.row(), with_for_update=True)
                    if entry is None:
                        continue
                    entry.content = self.text()
                    if self.random.random() < self.gives:
                        entry.embedding = vector(self.model_of(session), entry.content)
                    for column in ("title", "content", "note", "embedding"):
                        sqlalchemy.orm.attributes.flag_modified(entry, column)
                self.kinds[self.counted] += 1
        except BaseException as error:
            self.died.append(error)
        finally:
            engine.dispose()


class BareOrm(Orm):
    """The same by the bare name, of the version whose model answers: the row that it has locked holds off a swap."""

    counted = "orm save by the bare name"

    def __init__(self, dsn: str, seed: int, *, gives: float = 0.7) -> None:
        super().__init__(dsn, seed, "")
        self.gives = gives

    def path(self) -> str:
        return "public"

    def model_of(self, session: Session) -> str:
        kind = (
            "SELECT format_type(atttypid, atttypmod) FROM pg_attribute"
            " WHERE attrelid = 'kb'::regclass AND attname = 'embedding'"
        )
        return MODEL_OF[session.scalar(sqlalchemy.text(kind)) or ""]


class Reader(Client):
    """The bare name before anything is exposed: every statement of the old version with its own vector."""

    def __init__(self, dsn: str, seed: int) -> None:
        super().__init__(dsn, seed)
        self.bare = [kind for kind in self.bare if kind not in STALE]
        #: Whether the model behind the bare name changes while this one works: a vector of the other one is refused.
        self.swaps = False

    def work(self, stop: threading.Event) -> None:
        super().work(stop)
        if self.swapped and not self.swaps:
            self.died.append(AssertionError(f"{self.swapped} vectors were refused where nothing swaps"))

    def row(self) -> int:
        return self.random.randrange(ROWS)


@contextmanager
def at_work(clients: Sequence[Client], counted: Counter[str]) -> Iterator[None]:
    stop = threading.Event()
    threads = [threading.Thread(target=client.work, args=(stop,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield
        time.sleep(0.3)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert [client.died for client in clients if client.died] == []
    for client in clients:
        counted.update(client.kinds)


def call(migration: Any, command: str) -> None:
    if command == "run":
        migration.run(REQUEST)
    elif command == "run --backup":
        migration.run(replace(REQUEST, backup=True))
    elif command == "restore":
        migration.restore()
    elif command == "finalize":
        migration.finalize(quiet_for=0)
    elif command == "abort":
        migration.abort()
    else:
        migration.__getattribute__(command)(without_follower=True)


def patiently(dsn: str, command: str, observe: Callable[[Observation], None] = lambda _: None) -> int:
    """What an operator does: an answer that says "the same command again" is followed. How often it was."""
    goal = {"cutover": "CUT_OVER", "rollback": "SERVED", "abort": "ABORTED", "finalize": "FINALIZED"}.get(command)
    for turn in range(40):
        try:
            with steering(dsn, "kb", observe) as migration:
                row = migration.latest()
                if turn and row is not None and row.stage == goal and (row.stage.closed or row.closing is None):
                    return turn
                call(migration, command)
                return turn
        except Resumable as error:
            assert error.hint, f"{error} says no next command"
            time.sleep(0.1)
    raise AssertionError(f"{command} did not come to its end in 40 turns")


def both(dsn: str, seed: int) -> list[Client]:
    on_views = [Version(dsn, seed, OLD), Version(dsn, seed + 1, NEW), Orm(dsn, seed + 2, OLD), Orm(dsn, seed + 3, NEW)]
    return [*on_views, BareOrm(dsn, seed + 4)]


def staying(dsn: str, seed: int, command: str) -> list[Client]:
    """The version that stays, on its view and bare, while finalize or abort closes; its edits bring their vectors along.

    The trigger goes first: an edit without a vector leaves the old one then, as it does without revector.
    """
    client = Version(dsn, seed, NEW if command == "finalize" else OLD)
    client.bare = [kind for kind in client.bare if kind not in STALE]
    return [client, BareOrm(dsn, seed + 1, gives=1.0)]


def road(
    dsn: str,
    connection: psycopg.Connection[Any],
    commands: Sequence[str],
    act: Callable[[str], None],
    *,
    clients: bool = True,
) -> Counter[str]:
    """Go a road, `act(command)` taking each command, with clients all the way; then the final checks."""
    knowledge_base(connection, ROWS, filler=300)
    before = belongings(connection)
    counted: Counter[str] = Counter()
    exposed = False
    for turn, command in enumerate(commands):
        ending = command in ("abort", "finalize")
        # Before anything is served a saved vector of another text stays, as it does without revector.
        old = [*([Reader(dsn, 10 * turn + 1)] if command == "run" else []), BareOrm(dsn, 10 * turn + 2, gives=1.0)]
        working = old if not exposed else staying(dsn, 10 * turn, command) if ending else both(dsn, 10 * turn)
        with at_work(working if clients else [], counted):
            act(command)
        exposed = exposed or command == "expose"
        if command != "expose" and not ending and stage_of(connection)[0] in ("SERVED", "CUT_OVER"):
            fill(dsn, connection)
            assert_rests(connection, at_least=ROWS // 2)
        else:
            assert_never_wrong(connection)
    assert_ended(connection, NEW if commands[-1] == "finalize" else OLD, at_least=ROWS // 2, before=before)
    print(f"seed {SEED}: {sum(counted.values())} statements, {dict(counted)}")
    return counted


def started(*arguments: str) -> subprocess.Popen[str]:
    """`main` below, in a process of its own that has come as far as its first line."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, Path(__file__), *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.fixture(autouse=True)
def _small_and_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backfill of several windows, so that what strikes at the first one strikes an unfinished backfill."""
    monkeypatch.setattr(backfill, "_WINDOW_BLOCKS", WINDOW_BLOCKS)
    monkeypatch.setattr(backfill, "_WINDOW_ROWS", WINDOW_ROWS)
    monkeypatch.setattr(verify, "LOOK_AGAIN", 0.3)


def assert_in_the_middle(connection: psycopg.Connection[Any]) -> None:
    """Some rows have been written into the candidate, and some have not."""
    pending, rows = connection.execute("SELECT count(*) - count(embedding_g2), count(*) FROM kb").fetchone() or (0, 0)
    assert 0 < pending < rows, f"{pending} of {rows} rows are pending: the backfill is not under way"


@pytest.mark.roads
@pytest.mark.parametrize("name", ROADS)
def test_road(name: str, dsn: str, connection: psycopg.Connection[Any]) -> None:
    """No statement of either version fails on the whole way, there and back."""
    counted = road(dsn, connection, ROADS[name], lambda command: bool(patiently(dsn, command)) and None)
    assert counted[Orm.counted] and counted[BareOrm.counted] and counted["do_merge"] and counted["do_search"]


@pytest.mark.roads
@pytest.mark.parametrize("stage", ABORTED_AT)
def test_aborted_at(stage: str, dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Abort at each stage, with a writer: the old model, its strictness and its index, and nothing of ours."""

    class Enough(Exception):
        pass

    step = "backfill.window" if stage == "backfill" else stage

    def enough(seen: Observation) -> None:
        if isinstance(seen, Recorded) and seen.step == step:
            if step == "backfill.window":
                assert_in_the_middle(connection)
            raise Enough

    knowledge_base(connection, ROWS)
    before = belongings(connection)
    counted: Counter[str] = Counter()
    commands = {"serve": ("run", "cutover"), "rollback": ("run", "cutover", "rollback")}.get(stage, ("run",))
    writer = Reader(dsn, SEED)
    writer.swaps = "cutover" in commands and stage != "serve"
    with at_work([writer], counted):
        for command in commands:
            try:
                patiently(dsn, command, enough)
            except Enough:
                break
        patiently(dsn, "abort")
    assert_ended(connection, OLD, at_least=ROWS // 2, before=before)


def once_at(steps: Sequence[str], strike: Callable[[], object], dsn: str, kinds: Any = (Effect, Recorded)) -> Any:
    """An observer that strikes the first time that each step is seen; a window's is in the middle of the backfill."""
    struck: set[str] = set()

    def observe(seen: Observation) -> None:
        if (
            isinstance(seen, kinds)
            and seen.step in steps
            and (key := f"{seen.step} {type(seen).__name__}") not in struck
        ):
            if seen.step == "backfill.window":
                with psycopg.connect(dsn, autocommit=True) as connection:
                    assert_in_the_middle(connection)
            struck.add(key)
            strike()

    observe.struck = struck  # type: ignore[attr-defined]
    return observe


IN_EACH = ("expand", "backfill.window", "index.build", "verify", "serve", "cutover", "rollback", "finalize.close",
           "finalize.drop_indexes")  # fmt: skip


def cut_ours(connection: psycopg.Connection[Any]) -> None:
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name LIKE 'revector%%'"
    )


@pytest.mark.roads
def test_connections_are_cut_in_each_phase(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """pg_terminate_backend of everything of ours, before and after the ledger row of each phase: the same command goes on."""
    observe = once_at(IN_EACH, lambda: cut_ours(connection), dsn)
    commands = ("run", "expose", "cutover", "rollback", "cutover", "finalize")
    road(dsn, connection, commands, lambda command: bool(patiently(dsn, command, observe)) and None)
    assert {key.split()[0] for key in observe.struck} == set(IN_EACH)


#: A road under crashes: its commands, the steps that a crash strikes at, the model at its end, the backup kept.
CRASHES = {
    "finalize": (("run", "expose", "cutover", "rollback", "cutover", "finalize"), IN_EACH, NEW, set[str]()),
    "abort": (
        ("run --backup", "expose", "abort"),
        ("backup.create", "backup.copy", "backup.verify", "expose.catch_up", "expose", "abort.close",
         "abort.validate", "abort.drop_indexes", "abort.drop_column", "abort"),
        OLD,
        {"relation r kb_backup_16"},
    ),
    "restore": (
        ("run --backup", "cutover", "finalize", "restore", "cutover", "finalize"),
        ("restore.windows", "restore.window", "restore.copy", "finalize.validate", "finalize.drop_column"),
        OLD,
        {"relation r kb_backup_16", "relation i kb_backup_16_key"},
    ),
}  # fmt: skip


@pytest.mark.roads
@pytest.mark.parametrize("name", CRASHES)
def test_server_crashes_in_each_phase(name: str, server: Server) -> None:
    """The server restarted in immediate mode in each phase: WAL replay and the same command lead to the end."""
    commands, steps, model, kept = CRASHES[name]
    dsn = create_database(server, "kb")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
        knowledge_base(connection, ROWS)
        before = belongings(connection)
    observe = once_at(steps, lambda: server.restart("immediate"), dsn, Effect)
    for command in commands:
        patiently(dsn, command, observe)
        with psycopg.connect(dsn, autocommit=True) as connection:
            assert_never_wrong(connection)
    assert {key.split()[0] for key in observe.struck} == set(steps)
    with psycopg.connect(dsn, autocommit=True) as connection:
        assert_ended(connection, model, at_least=ROWS, before=before | kept)


@pytest.mark.roads
@pytest.mark.parametrize("number", [pytest.param(n, marks=[pytest.mark.slow] if n >= 5 else []) for n in range(30)])
def test_killed_at_a_random_moment(number: int, dsn: str, connection: psycopg.Connection[Any]) -> None:
    """SIGKILL at moments that nobody chose, once in each command of a road; the same command again."""
    chance = random.Random(SEED * 1000 + number)
    print(f"REVECTOR_SEED={SEED}, moment {number}")
    name = chance.choice(list(ROADS))

    def act(command: str) -> None:
        process = started(dsn, command)
        time.sleep(chance.random() * (1.5 if command == "run" else 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert_never_wrong(connection)
        if process.returncode == 0:
            return
        row = None
        if not one(connection, "SELECT to_regclass('revector.migrations') IS NULL"):
            row = connection.execute(
                "SELECT stage, closing FROM revector.migrations ORDER BY id DESC LIMIT 1"
            ).fetchone()
        goal = {"cutover": "CUT_OVER", "rollback": "SERVED", "abort": "ABORTED", "finalize": "FINALIZED"}.get(command)
        if row is None or row[0] != goal or (row[1] is not None and command in ("cutover", "rollback")):
            patiently(dsn, command)

    road(dsn, connection, ROADS[name], act)


@pytest.mark.roads
@pytest.mark.parametrize("command", ["abort", "finalize"])
def test_once_it_closes_only_what_stays_is_managed(command: str, dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Between the end of the trigger and of the departing column, edits leave that one as it was, and the rest is right."""
    knowledge_base(connection, ROWS)
    for before in ("run", "expose", "cutover") if command == "finalize" else ("run", "expose"):
        patiently(dsn, before)
    fill(dsn, connection)
    with suppress(Halt), steering(dsn, "kb", halting(f"{command}.close")) as migration:
        call(migration, command)
    assert stage_of(connection)[1] == command
    stays, path = (NEW, "rv_kb_g2") if command == "finalize" else (OLD, "rv_kb_g1")
    with psycopg.connect(dsn, options=f"-csearch_path={path},public", autocommit=True) as client:
        client.execute("UPDATE kb SET content = 'edited', embedding = %s WHERE id = 5", (vector(stays, "edited"),))
    assert_never_wrong(connection)
    departing = next(column for column, model in generations(connection).items() if model != stays)
    with pytest.raises(AssertionError, match="another text's vector"):
        assert_exact(connection, "kb", "content", {departing: generations(connection)[departing]})
    patiently(dsn, command)
    assert_ended(connection, stays, at_least=ROWS)


@pytest.mark.roads
def test_transactions_in_reverse_order(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Applications that lock many rows in reverse order, and hold them, are never the victim of a deadlock with us."""
    monkeypatch.setattr(verify, "LOOK_AGAIN", 3.0)  # a client that waits for the processor holds its rows meanwhile
    stop, errors, done = threading.Event(), [], []

    def work(first: int) -> None:
        with psycopg.connect(dsn, autocommit=True) as application:
            while not stop.wait(0.05):
                try:
                    with application.transaction():
                        for number in range(first + 30, first, -1):
                            application.execute("UPDATE kb SET note = 'held' WHERE id = %s", (number,))
                        time.sleep(0.05)
                    done.append(first)
                except psycopg.Error as error:
                    errors.append(error)

    def act(command: str) -> None:
        seen = len(done)
        patiently(dsn, command)
        until(lambda: len(done) > seen + 3)

    knowledge_base(connection, ROWS)
    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 40, 80)]
    for thread in threads:
        thread.start()
    try:
        for command in ("run", "cutover", "rollback", "cutover"):
            act(command)
        fill(dsn, connection)
        act("finalize")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert_ended(connection, NEW, at_least=ROWS)


#: The cutover's own event comes last in its message: the lock is held for as long as its row takes, within the budget.
_SLOW_EVENT = """
    CREATE FUNCTION public.slow_event() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_sleep(0.12); RETURN NEW; END $$;
    CREATE TRIGGER slow_event BEFORE INSERT ON revector.events FOR EACH ROW WHEN (NEW.step = 'cutover')
        EXECUTE FUNCTION public.slow_event()
"""
_HELD_BY_OURS = """
    SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
      JOIN pg_stat_activity a ON a.pid = l.pid
     WHERE c.relname = 'kb' AND c.relkind = 'r' AND l.mode = 'AccessExclusiveLock' AND l.granted
       AND a.application_name ~ '^revector' AND a.wait_event = 'PgSleep'
"""


@pytest.mark.roads
def test_stopped_while_it_holds_the_lock(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A process stopped (SIGSTOP) while it holds ACCESS EXCLUSIVE blocks nobody for long: the server goes on without it."""
    knowledge_base(connection, ROWS)
    before = belongings(connection)
    patiently(dsn, "run")
    patiently(dsn, "expose")
    connection.execute(_SLOW_EVENT)
    process = started(dsn, "cutover")
    try:
        while not one(connection, _HELD_BY_OURS):
            assert process.poll() is None, "the lock was never seen"
        process.send_signal(signal.SIGSTOP)
        slowest = 0.0
        for number in range(20):
            began = time.monotonic()
            connection.execute("UPDATE kb SET note = 'still works' WHERE id = %s", (number,))
            slowest = max(slowest, time.monotonic() - began)
        assert Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
        assert slowest < 1.0, f"an application's statement took {slowest:.1f} s"
        # Nothing is left held either, once the server has ended the session's transaction, if one is open still.
        ours = (
            "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE l.relation = 'kb'::regclass"
            " AND a.application_name ~ '^revector'"
        )
        until(lambda: not one(connection, ours), 8)
        stage, live = stage_of(connection)[0], generations(connection)["embedding"]
        assert (stage, live) in (("CUT_OVER", NEW), ("SERVED", OLD)), "half of a cutover was committed"
    finally:
        process.kill()
        process.communicate()
    connection.execute("DROP TRIGGER slow_event ON revector.events; DROP FUNCTION public.slow_event()")
    if stage == "SERVED":  # the budget ran out on a busy machine, so the server undid the attempt
        patiently(dsn, "cutover")
    fill(dsn, connection)
    assert_rests(connection, at_least=ROWS)
    patiently(dsn, "finalize")
    assert_ended(connection, NEW, at_least=ROWS, before=before)


@pytest.mark.roads
def test_long_snapshot_and_rewritten_pages(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report's long snapshot over the backfill, VACUUM FULL between a window's read and its write: no row is missed."""
    knowledge_base(connection, ROWS, filler=300)
    before = belongings(connection)
    connection.execute("DELETE FROM kb WHERE id % 9 = 0")  # so that every row moves when the pages are rewritten
    reporter = psycopg.connect(dsn)
    reporter.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    # It holds a snapshot, and no lock on the table, for which VACUUM FULL would wait.
    assert one(reporter, "SELECT count(*) FROM pg_class")
    encoded, moved = 0, []
    places = "SELECT id, ctid::text FROM kb WHERE embedding_g2 IS NULL"
    encode = backfill.encode

    def encode_rewritten(*given: Any, **named: Any) -> Any:
        """The rows have been read and are not written yet."""
        nonlocal encoded
        encoded += 1
        if encoded in (1, 3):
            stood = dict(connection.execute(places).fetchall())
            connection.execute("VACUUM FULL kb")
            after = dict(connection.execute(places).fetchall())
            moved.append(sum(stood[number] != after[number] for number in stood.keys() & after.keys()))
        return encode(*given, **named)

    def observe(observed: Observation) -> None:
        if isinstance(observed, Recorded) and observed.step == "backfill" and not reporter.closed:
            reporter.close()  # CREATE INDEX CONCURRENTLY waits for it, and says so

    monkeypatch.setattr(backfill, "encode", encode_rewritten)
    # No update is HOT under that snapshot: the backfill would rest for minutes.
    monkeypatch.setattr(backfill, "_LONGEST_GAP", 0.05)
    counted: Counter[str] = Counter()
    writer = Reader(dsn, SEED)
    writer.pace = 0.1  # what it updates cannot be pruned: the table swells
    try:
        with at_work([writer], counted):
            patiently(dsn, "run", observe)
    finally:
        reporter.close()
    # The second rewrite puts the rows in another file, where the snapshot keeps the dead ones: few or none move.
    assert len(moved) == 2 and moved[0] > ROWS // 2, f"rows that a rewrite moved under an open window: {moved}"
    assert_never_wrong(connection)
    patiently(dsn, "cutover")
    connection.execute("VACUUM FULL kb")
    patiently(dsn, "rollback")
    fill(dsn, connection)
    assert_rests(connection, at_least=ROWS // 2)
    patiently(dsn, "abort")
    assert_ended(connection, OLD, at_least=ROWS // 2, before=before)


FOREIGN = (
    "ALTER TABLE kb ADD COLUMN more int DEFAULT 3",
    "CREATE INDEX kb_title ON kb (title)",
    "ALTER TABLE kb ALTER COLUMN title TYPE varchar(200)",
)
#: What those make, as `belongings` tells it.
FOREIGN_LEAVES = {
    "column more integer",
    "column title character varying(200)",
    "index CREATE INDEX kb_title ON public.kb USING btree (title)",
    "relation i kb_title",
}


@pytest.mark.roads
@pytest.mark.parametrize("step", ["expand", "backfill.window", "index", "serve", "cutover"])
def test_ddl_by_someone_else(step: str, dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A column, an index and another type of another column, added by someone else in any phase, are theirs to the end."""
    knowledge_base(connection, ROWS)
    before = belongings(connection)
    observe = once_at((step,), lambda: [connection.execute(statement) for statement in FOREIGN], dsn, Recorded)
    for command in ("run", "cutover", "rollback", "cutover"):
        patiently(dsn, command, observe)
    assert observe.struck
    fill(dsn, connection)
    assert_rests(connection, at_least=ROWS)
    patiently(dsn, "finalize")
    assert_ended(connection, NEW, at_least=ROWS, before=before - {"column title text"} | FOREIGN_LEAVES)
    assert one(connection, "SELECT sum(more) FROM kb") == 3 * ROWS
    assert one(connection, "SELECT to_regclass('kb_title') IS NOT NULL")


@pytest.mark.roads
@pytest.mark.parametrize("step", ["backfill", "cutover"])
def test_renamed_by_someone_else(step: str, dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A table that gets another name in between is refused or worked on; with its name back it goes on to the end."""
    knowledge_base(connection, ROWS)
    before = belongings(connection)
    observe = once_at((step,), lambda: connection.execute("ALTER TABLE kb RENAME TO renamed"), dsn, Recorded)
    for command in ("run", "cutover"):
        try:
            patiently(dsn, command, observe)
        except Exception as error:
            assert getattr(error, "hint", None), f"{error!r} says no next command"
        if one(connection, "SELECT to_regclass('kb') IS NULL"):
            connection.execute("ALTER TABLE renamed RENAME TO kb")
        if command == "run" or stage_of(connection)[0] != "CUT_OVER":
            patiently(dsn, command)
    fill(dsn, connection)
    assert_rests(connection, at_least=ROWS)
    patiently(dsn, "finalize")
    assert_ended(connection, NEW, at_least=ROWS, before=before)


def main() -> None:
    """A process of one command, for tests that kill it or stop it."""
    dsn, command = sys.argv[1:]
    backfill._WINDOW_BLOCKS, backfill._WINDOW_ROWS, verify.LOOK_AGAIN = WINDOW_BLOCKS, WINDOW_ROWS, 0.3
    print("ready", flush=True)
    with steering(dsn) as migration:
        call(migration, command)


if __name__ == "__main__":
    main()
