"""SIGKILL at every named step, after its effect and after its ledger row; then the same command; then every row right."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest
import victim
from psycopg import sql

from revector import Embedder, Migration, Settings
from revector.follow import Follower
from revector.ledger import Stage
from revector.work import STEPS

OLD, NEW = Embedder("hash:16"), Embedder("hash:32")
ROWS = 150
#: command -> the commands before it; its steps start with its name, `run`'s with those of its phases.
ROADS: dict[str, tuple[str, ...]] = {
    "run": (),
    "expose": ("run",),
    "unexpose": ("run", "expose"),
    "cutover": ("run", "expose"),
    "rollback": ("run", "expose", "cutover"),
    "abort": ("run", "expose", "cutover", "rollback"),
    "finalize": ("run", "expose", "cutover"),
    "restore": ("run", "cutover", "finalize_keeping"),
}
#: command -> the versions that work on their generation's view while it is killed: the side that goes is announced.
VERSIONS: dict[str, tuple[str, ...]] = {
    "unexpose": ("old",),
    "cutover": ("old", "new"),
    "rollback": ("old", "new"),
    "abort": ("old",),
    "finalize": ("new",),
}
OF_RUN = ("plan", "backup", "expand", "backfill", "index", "verify")


def road_of(step: str) -> str:
    if step == "expose.drop":
        return "unexpose"
    head = step.partition(".")[0]
    return "run" if head in OF_RUN else "cutover" if head == "serve" else head


def before(step: str) -> tuple[str, ...]:
    return ("run",) if step == "serve" else ROADS[road_of(step)]


def vector(model: Embedder, text: str) -> str:
    return str(model.encode([text])[0].tolist())


def make(connection: psycopg.Connection) -> None:
    connection.execute(
        "CREATE TABLE kb (id int PRIMARY KEY, content text NOT NULL, filler text, embedding vector(16) NOT NULL)"
    )
    texts = [f"text {n} of the table" for n in range(ROWS)]
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO kb VALUES (%s, %s, repeat('x', 700), %s)",
            [(n, text, str(v.tolist())) for n, (text, v) in enumerate(zip(texts, OLD.encode(texts), strict=True))],
        )
    connection.execute("CREATE INDEX kb_embedding_idx ON kb USING hnsw (embedding vector_l2_ops) WITH (m = 8)")


@contextmanager
def writing(dsn: str) -> Iterator[list[str]]:
    """An application that inserts, edits and deletes by ordinary SQL, with its model's vector or without."""
    stop, errors = threading.Event(), []

    def work() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            turn = 0
            while not stop.wait(0.004):
                turn += 1
                number, text = turn * 37 % ROWS, f"edit {turn} of a row"
                for model in (OLD, NEW):
                    given = vector(model, text)
                    try:
                        if turn % 5 == 0:
                            connection.execute(
                                "INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s)",
                                (1000 + turn, text, given),
                            )
                        elif turn % 5 == 1:
                            connection.execute("DELETE FROM kb WHERE id = %s", (1000 + turn - 6,))
                        else:
                            connection.execute(
                                "UPDATE kb SET content = %s, embedding = %s WHERE id = %s", (text, given, number)
                            )
                        break
                    except psycopg.errors.DataException:
                        continue  # the other model answers now
                    except psycopg.Error as error:
                        errors.append(str(error))
                        break

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield errors
    finally:
        stop.set()
        thread.join()


@contextmanager
def on_views(dsn: str, versions: Sequence[str]) -> Iterator[list[str]]:
    """A client for each of these versions, on its generation's view with its own model: nothing may fail there."""
    stop, errors, turns = threading.Event(), [], Counter[str]()

    def work(version: str) -> None:
        path, model = ("rv_kb_g1", OLD) if version == "old" else ("rv_kb_g2", NEW)
        with psycopg.connect(dsn, autocommit=True, options=f"-csearch_path={path},public") as client:
            while not stop.wait(0.01):
                turns[version] += 1
                text = f"turn {turns[version]} of the {version} version"
                try:
                    client.execute(
                        "UPDATE kb SET content = %s, embedding = %s WHERE id = %s",
                        (text, vector(model, text), turns[version] * 41 % ROWS),
                    )
                    client.execute("SELECT id FROM kb ORDER BY embedding <-> %s LIMIT 3", (vector(model, text),))
                except psycopg.Error as error:
                    errors.append(f"{version}: {error}")

    threads = [threading.Thread(target=work, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    try:
        yield errors
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert all(turns[version] > 5 for version in versions), turns


def kill(dsn: str, command: str, step: str, moment: str) -> None:
    """Give the command to a process that kills itself there."""
    killed = subprocess.run(
        [sys.executable, Path(victim.__file__), dsn, command, step, moment],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, f"{step} did not happen: {killed.stderr[-600:]}"


def settle(dsn: str, table: int) -> None:
    Follower(Settings(database_url=dsn), table).once()


def assert_exact(connection: psycopg.Connection, columns: dict[str, Embedder]) -> None:
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    rows = connection.execute(sql.SQL("SELECT content, {} FROM kb").format(names)).fetchall()
    assert len(rows) >= ROWS
    for position, (name, model) in enumerate(columns.items(), 1):
        expected = model.encode([row[0] for row in rows])
        for row, right in zip(rows, expected, strict=True):
            assert row[position] is not None, f"{name} has no vector for {row[0]!r}"
            stored = [float(x) for x in row[position].strip("[]").split(",")]
            assert max(abs(a - b) for a, b in zip(stored, right, strict=True)) < 1e-5, f"{name} is stale: {row[0]!r}"


def proceed(dsn: str, commands: tuple[str, ...]) -> None:
    for name in commands:
        with Migration.open(Settings(database_url=dsn), table="kb") as migration:
            victim.command(migration, name)


def finish_and_check(dsn: str, connection: psycopg.Connection, command: str) -> None:
    """Whatever was killed: the table ends right, and nothing of ours is left behind."""
    with Migration.open(Settings(database_url=dsn), table="kb") as migration:
        stage = migration.latest().stage  # type: ignore[union-attr]
        expected = {
            "run": Stage.VERIFIED,
            "expose": Stage.SERVED,
            "unexpose": Stage.SERVED,
            "cutover": Stage.CUT_OVER,
            "rollback": Stage.SERVED,
            "abort": Stage.ABORTED,
            "finalize": Stage.FINALIZED,
            "restore": Stage.VERIFIED,
        }
        assert stage is expected[command]
        settle(dsn, migration.oid)
        if command in ("expose", "unexpose"):
            assert set(migration.ledger.views()) == ({1, 2} if command == "expose" else set())
        if command == "restore":
            assert_exact(connection, {"embedding": NEW, "embedding_g3": OLD})
            migration.cutover(without_follower=True)
            migration.finalize()
        elif stage is Stage.VERIFIED:
            assert_exact(connection, {"embedding": OLD, "embedding_g2": NEW})
        elif stage is Stage.CUT_OVER:
            assert_exact(connection, {"embedding_g1": OLD, "embedding": NEW})
            migration.finalize(drop_backup=True)
        elif stage is Stage.SERVED:
            assert_exact(connection, {"embedding": OLD, "embedding_g2": NEW})
        stage = migration.latest().stage  # type: ignore[union-attr]
        if not stage.closed:
            migration.abort()
    assert_exact(connection, {"embedding": NEW if stage is Stage.FINALIZED and command != "restore" else OLD})
    leftovers = connection.execute(
        "SELECT relname FROM pg_class WHERE relname LIKE 'rv\\_%' UNION SELECT tgname FROM pg_trigger WHERE NOT tgisinternal"
        " UNION SELECT attname FROM pg_attribute WHERE attrelid = 'kb'::regclass AND attname LIKE '%\\_g_'"
        " UNION SELECT nspname FROM pg_namespace WHERE nspname LIKE 'rv\\_%'"
        " UNION SELECT proname FROM pg_proc WHERE pronamespace = 'revector'::regnamespace"
    ).fetchall()
    assert leftovers == []
    definition = connection.execute("SELECT indexdef FROM pg_indexes WHERE indexname = 'kb_embedding_idx'").fetchone()
    assert (
        definition is not None
        and "hnsw" in definition[0]
        and "vector_l2_ops" in definition[0]
        and "'8'" in definition[0]
    )
    not_null = connection.execute(
        "SELECT attnotnull FROM pg_attribute WHERE attrelid = 'kb'::regclass AND attname = 'embedding'"
    ).fetchone()
    assert not_null == (True,)


#: Steps that need a condition of their own to happen, and the test that stands for each.
ELSEWHERE: dict[str, str] = {
    "backfill.outside": "tests/phases/test_where.py::test_killed_while_rows_outside_are_copied",
}
CASES = [
    pytest.param(step, moment, id=f"{step}-{moment}", marks=[] if step == "backfill.window" else [pytest.mark.roads])
    for step in STEPS
    for moment in ("effect", "recorded")
    if step not in ELSEWHERE
]


@pytest.mark.parametrize(("step", "moment"), CASES)
def test_killed_and_given_again(dsn: str, connection: psycopg.Connection, step: str, moment: str) -> None:
    """A process killed at any named step is completed by the same command, under a live writer."""
    make(connection)
    command = road_of(step)
    with writing(dsn) as errors, ExitStack() as stack:
        proceed(dsn, before(step))
        versions = VERSIONS.get(command, ()) if step != "serve" else ()
        on_view = stack.enter_context(on_views(dsn, versions))
        kill(dsn, command, step, moment)
        with Migration.open(Settings(database_url=dsn), table="kb") as migration:
            row = migration.latest()
            done = row is not None and row.stage.closed
        if not done and not (moment == "recorded" and step in ("cutover", "rollback", "expose.drop")):
            proceed(dsn, (command,))
    assert (errors, on_view) == ([], [])
    finish_and_check(dsn, connection, command)


#: Where a migration stands before SERVED -> the step of `run` that a process is killed at to leave it there.
BEFORE_SERVED = {
    "planned": "plan",
    "expanded": "expand",
    "mid backfill": "backfill.window",
    "indexed": "index",
    "verified": "verify",
}
#: The steps of an abort that nothing is to be caught up for: no trigger has ever cleared a live vector.
OF_EARLY_ABORT = ("abort.close", "abort.drop_views", "abort.drop_indexes", "abort.drop_column", "abort")


@pytest.mark.roads
@pytest.mark.parametrize("place", BEFORE_SERVED)
def test_abort_before_served_killed_at_each_of_its_steps(dsn: str, connection: psycopg.Connection, place: str) -> None:
    """From wherever a run stopped, an abort that is killed at one step after another comes to its end."""
    make(connection)
    with writing(dsn) as errors, on_views(dsn, ["old"]) as on_view:
        kill(dsn, "run", "plan", "recorded")
        proceed(dsn, ("expose",))
        if place != "planned":
            kill(dsn, "run", BEFORE_SERVED[place], "recorded")
        for step in OF_EARLY_ABORT:
            if step == "abort.drop_column" and place == "planned":
                continue  # there is none
            kill(dsn, "abort", step, "effect")
            if step != "abort":
                kill(dsn, "abort", step, "recorded")
        proceed(dsn, ("abort",))
    assert (errors, on_view) == ([], [])
    finish_and_check(dsn, connection, "abort")


@pytest.mark.roads
def test_second_cutover_killed_at_each_of_its_steps(dsn: str, connection: psycopg.Connection) -> None:
    """There, back and there again: what a first cutover left behind is no step of the second."""
    make(connection)
    with writing(dsn) as errors:
        proceed(dsn, ("run", "expose", "cutover", "rollback"))
        with on_views(dsn, ["old", "new"]) as on_view:
            for moment in ("effect", "recorded"):
                kill(dsn, "cutover", "cutover.catch_up", moment)
            kill(dsn, "cutover", "cutover", "effect")
            kill(dsn, "cutover", "cutover", "recorded")
            for moment in ("effect", "recorded"):
                kill(dsn, "rollback", "rollback.catch_up", moment)
            kill(dsn, "rollback", "rollback", "effect")
            kill(dsn, "rollback", "rollback", "recorded")
            proceed(dsn, ("cutover",))
    assert (errors, on_view) == ([], [])
    finish_and_check(dsn, connection, "cutover")


MESSAGES = (
    "expand",
    "serve",
    "expose",
    "expose.drop",
    "cutover",
    "rollback",
    "abort.close",
    "abort.drop_views",
    "abort.drop_column",
    "finalize.close",
    "finalize.drop_column",
)


@pytest.mark.roads
@pytest.mark.parametrize("step", MESSAGES)
def test_server_session_lost_inside_a_message(dsn: str, connection: psycopg.Connection, step: str) -> None:
    """Effect and ledger row of a one-message step commit together: losing the session between them leaves neither."""
    make(connection)
    command = road_of(step)
    proceed(dsn, before(step))
    if command == "run":
        kill(dsn, "run", "plan", "recorded")
    connection.execute(
        sql.SQL(
            "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF NEW.step = {} THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; RETURN NEW; END $$"
        ).format(sql.Literal(step))
    )
    connection.execute("CREATE TRIGGER die BEFORE INSERT ON revector.events FOR EACH ROW EXECUTE FUNCTION die()")
    was = connection.execute("SELECT stage, closing FROM revector.migrations").fetchall()
    killed = subprocess.run(
        [sys.executable, Path(victim.__file__), dsn, command, "none", "effect"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ServerLost" in killed.stderr
    if step.endswith("close") or "." not in step:
        assert (
            connection.execute("SELECT stage, closing FROM revector.migrations").fetchall() == was
            or step in ("cutover", "expose")  # SERVED comes first
        )
    connection.execute("DROP TRIGGER die ON revector.events; DROP FUNCTION die()")
    proceed(dsn, (command,))
    finish_and_check(dsn, connection, command)


@pytest.mark.roads
@pytest.mark.parametrize(("command", "side", "model"), [("abort", "rv_kb_g2", NEW), ("finalize", "rv_kb_g1", OLD)])
def test_killed_after_close_with_a_writer_on_the_view_that_goes(
    dsn: str, connection: psycopg.Connection, command: str, side: str, model: Embedder
) -> None:
    """Once the trigger is gone nobody writes through the departing view: it would leave the kept vector stale for good."""
    make(connection)
    proceed(dsn, ROADS[command])
    road = {"finalize": "finalize_at_once"}.get(command, command)  # the side that goes is not quiet
    stop, turns, fell = threading.Event(), [], []

    def write() -> None:
        with psycopg.connect(dsn, autocommit=True, options=f"-csearch_path={side},public") as client:
            while not stop.wait(0.04):
                turns.append(text := f"turn {len(turns)} through the view")
                try:
                    client.execute(
                        "UPDATE kb SET content = %s, embedding = %s WHERE id = %s",
                        (text, vector(model, text), len(turns) % ROWS),
                    )
                except psycopg.errors.DataException:
                    fell.append(text)  # announced: with its view gone it has the bare table, which wants other vectors

    thread = threading.Thread(target=write)
    thread.start()
    try:
        kill(dsn, road, f"{command}.close", "recorded")
        refused = len(fell)
        deadline = time.monotonic() + 10
        while len(fell) < refused + 5:
            assert time.monotonic() < deadline, "it still writes through the departing view, unguarded"
            time.sleep(0.02)
        proceed(dsn, (road,))
    finally:
        stop.set()
        thread.join()
    assert len(turns) > len(fell), "it never wrote while its view was there"
    finish_and_check(dsn, connection, command)


def test_every_step_has_a_kill_test() -> None:
    """A step that nobody kills is a step that nobody knows to be safe."""
    assert {case.values[0] for case in CASES} | set(ELSEWHERE) == set(STEPS)
