"""The errors that an application can see because of us: those that are announced, when they are, and no others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import errors as pg

from fix_tables import NEW, OLD, advance, assert_exact, fill, knowledge_base, one, steering, vector
from revector.phases.expose import LIMITS

Client = psycopg.Connection[Any]
STAGES = ("before", "EXPANDED", "VERIFIED", "SERVED", "CUT_OVER", "SERVED again")


@contextmanager
def on(dsn: str, path: str = "public") -> Iterator[Client]:
    """A client that prepares every statement at its first use."""
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=0, options=f"-csearch_path={path}") as connection:
        yield connection


def copy_in(client: Client, columns: str) -> None:
    client.execute("DELETE FROM kb WHERE id = 900")
    with client.cursor().copy(f"COPY kb {columns} FROM STDIN") as copy:  # type: ignore[arg-type]
        copy.write_row((900, "title", "copied", "", "", vector(OLD, "copied")))


def search(client: Client, model: str) -> None:
    client.execute("SELECT id FROM kb ORDER BY embedding <=> %s::vector LIMIT 1", (vector(model, "x"),)).fetchall()


def write(client: Client, model: str, number: int) -> None:
    client.execute(
        "UPDATE kb SET content = %s, embedding = %s WHERE id = %s",
        (f"by {model}", vector(model, f"by {model}"), number),
    )


#: What a client of the old version does -> the SQLSTATE at each of the stages; the connection is kept throughout.
BARE: dict[str, tuple[Callable[[Client], Any], tuple[str | None, ...]]] = {
    "SELECT *, prepared": (
        lambda c: c.execute("SELECT * FROM kb WHERE id = 1").fetchall(),
        (None, "0A000", "0A000", "0A000", "0A000", "0A000"),
    ),
    "RETURNING *, prepared": (
        lambda c: c.execute("UPDATE kb SET note = 'n' WHERE id = 2 RETURNING *").fetchall(),
        (None, "0A000", "0A000", "0A000", "0A000", "0A000"),
    ),
    "COPY without a list": (lambda c: copy_in(c, ""), (None, "22P04", "22P04", "22P04", "22P04", "22P04")),
    "COPY with a list": (
        lambda c: copy_in(c, "(id, title, content, note, filler, embedding)"),
        (None, None, None, None, "22000", None),
    ),
    "INSERT SELECT *": (
        lambda c: c.execute("INSERT INTO archive SELECT * FROM kb WHERE id = 3"),
        (None, "42601", "42601", "42601", "42601", "42601"),
    ),
    "SELECT of listed columns": (
        lambda c: c.execute("SELECT id, content FROM kb WHERE id = 1").fetchall(),
        (None, None, None, None, None, None),
    ),
    "search": (lambda c: search(c, OLD), (None, None, None, None, "22000", None)),
    "write of text and vector": (lambda c: write(c, OLD, 4), (None, None, None, None, "22000", None)),
    "write of text alone": (
        lambda c: c.execute("UPDATE kb SET content = content || '.' WHERE id = 5"),
        (None, None, None, None, None, None),
    ),
    "positional INSERT": (
        lambda c: c.execute(
            "INSERT INTO kb VALUES ((SELECT max(id) + 1 FROM kb), 't', 'by position', '', '', %s)",
            (vector(OLD, "by position"),),
        ),
        (None, None, None, None, None, None),  # 23502 at CUT_OVER where the column was NOT NULL
    ),
}
#: The same through the old generation's view, which was made before expand.
VIEW = {name: step for name, (step, _) in BARE.items() if not name.startswith("COPY")}


@pytest.mark.parametrize("not_null", [True, False])
def test_each_stage_has_the_announced_errors_and_no_others(dsn: str, connection: Client, not_null: bool) -> None:
    """Clients of the old version by the bare name, by its view, and of the new version by the bare name after cutover."""
    knowledge_base(connection, 12, not_null=not_null)
    connection.execute("CREATE TABLE archive (LIKE kb)")
    with steering(dsn) as migration:
        migration.expose(from_=OLD)
    seen: dict[str, list[str | None]] = {name: [] for name in BARE}
    through: dict[str, list[str | None]] = {name: [] for name in VIEW}

    def state(step: Callable[[Client], Any], client: Client) -> str | None:
        try:
            step(client)
        except psycopg.Error as error:
            return error.sqlstate
        return None

    with ExitStack() as stack:
        bare = {name: stack.enter_context(on(dsn)) for name in BARE}
        view = {name: stack.enter_context(on(dsn, "rv_kb_g1,public")) for name in VIEW}
        for stage in STAGES:
            if stage == "SERVED again":
                with steering(dsn) as migration:
                    migration.rollback(without_follower=True)
            elif stage != "before":
                advance(dsn, stage)
            for name, (step, _) in BARE.items():
                seen[name].append(state(step, bare[name]))
            for name, step in VIEW.items():
                through[name].append(state(step, view[name]))
            if stage == "CUT_OVER":
                for step in (lambda c: search(c, NEW), lambda c: write(c, NEW, 6)):
                    with on(dsn) as new:
                        assert state(step, new) is None
                if not not_null:
                    # It lands in the old column, which is not the bare writer's: both are pending, and get filled.
                    row = BARE["positional INSERT"][0](connection).execute("SELECT max(id) FROM kb").fetchone()
                    pending = "SELECT embedding_g1 IS NULL AND embedding IS NULL FROM kb WHERE id = %s"
                    assert one(connection, pending, row[0])
            # Who connects anew prepares for the table as it is now.
            with on(dsn) as fresh:
                assert state(BARE["SELECT *, prepared"][0], fresh) is None
    expected = {name: states for name, (_, states) in BARE.items()}
    if not_null:
        expected["positional INSERT"] = (None, None, None, None, "23502", None)
    assert {name: tuple(states) for name, states in seen.items()} == expected
    assert {name: states for name, states in through.items() if any(states)} == {}
    fill(dsn, connection)
    assert_exact(connection, "kb", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=24)


#: What an end leaves of them, for who connects anew: the vector was the last column and is again, of the other model.
ENDED: dict[str, dict[str, str]] = {
    "abort": {},
    "finalize": {
        "COPY with a list": "22000",
        "COPY without a list": "22000",
        "INSERT SELECT *": "22000",
        "search": "22000",
        "write of text and vector": "22000",
        "positional INSERT": "22000",
    },
}


@pytest.mark.parametrize("command", ENDED)
def test_each_end_has_the_announced_errors_and_no_others(dsn: str, connection: Client, command: str) -> None:
    """After abort whoever connects anew has no error at all; after finalize the new version has none."""
    knowledge_base(connection, 12)
    connection.execute("CREATE TABLE archive (LIKE kb)")
    advance(dsn, "SERVED" if command == "abort" else "CUT_OVER")
    with steering(dsn) as migration:
        if command == "abort":
            migration.abort()
        else:
            migration.finalize(quiet_for=0)
    seen = {}
    for name, (step, _) in BARE.items():
        with on(dsn) as client:
            try:
                step(client)
            except psycopg.Error as error:
                seen[name] = error.sqlstate
    assert seen == ENDED[command]
    model = OLD if command == "abort" else NEW
    with on(dsn) as client:
        search(client, model)
        write(client, model, 6)


@pytest.mark.parametrize("path", ["public", "rv_kb_g1,public"])
def test_our_write_is_a_concurrent_update(dsn: str, connection: Client, path: str) -> None:
    """40001 under REPEATABLE READ and SERIALIZABLE for a row we wrote; READ COMMITTED sees nothing; xmin tokens miss."""
    knowledge_base(connection, 8)
    with steering(dsn) as migration:
        migration.expose(from_=OLD)
    advance(dsn, "EXPANDED")
    touch = "UPDATE kb SET note = 'mine' WHERE id = %s"
    token = one(connection, "SELECT xmin::text FROM kb WHERE id = 4")
    with ExitStack() as stack:
        clients = {}
        for level in ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"):
            client = clients[level] = stack.enter_context(on(dsn, path))
            client.execute(f"BEGIN ISOLATION LEVEL {level}")  # type: ignore[arg-type]
            client.execute("SELECT count(*) FROM kb").fetchall()
        advance(dsn, "BACKFILLED")
        told = {}
        for number, (level, client) in enumerate(clients.items()):
            try:
                told[level] = client.execute(touch, (number,)).rowcount
                client.execute("COMMIT")
            except psycopg.Error as error:
                told[level] = error.sqlstate
                client.execute("ROLLBACK")
                # Such an application repeats its transaction, and has no error the second time.
                client.execute(f"BEGIN ISOLATION LEVEL {level}")  # type: ignore[arg-type]
                assert client.execute(touch, (number,)).rowcount == 1
                client.execute("COMMIT")
    assert told == {"READ COMMITTED": 1, "REPEATABLE READ": "40001", "SERIALIZABLE": "40001"}
    optimistic = "UPDATE kb SET note = 'token' WHERE id = 4 AND xmin::text = %s"
    assert connection.execute(optimistic, (token,)).rowcount == 0
    assert connection.execute(optimistic, (one(connection, "SELECT xmin::text FROM kb WHERE id = 4"),)).rowcount == 1


def test_a_client_that_waits_less_than_the_pause(dsn: str, connection: Client) -> None:
    """55P03 for a lock_timeout shorter than the pause budget while the swap waits; without one, a moment's delay."""
    knowledge_base(connection, 8)
    advance(dsn, "SERVED")
    done = threading.Event()
    failed: list[BaseException] = []

    def swap() -> None:
        try:
            with steering(dsn) as migration:
                migration.cutover(without_follower=True)
        except BaseException as error:
            failed.append(error)
        done.set()

    with on(dsn) as holder, on(dsn) as hasty, on(dsn) as patient:
        hasty.execute("SET lock_timeout = '30ms'")
        holder.execute("BEGIN")
        holder.execute("UPDATE kb SET note = 'open' WHERE id = 1")
        thread = threading.Thread(target=swap)
        thread.start()
        states: set[str | None] = set()
        while not states and not done.is_set():
            try:
                hasty.execute("SELECT count(*) FROM kb").fetchall()
            except psycopg.Error as error:
                states.add(error.sqlstate)
            patient.execute("SELECT count(*) FROM kb").fetchall()
        holder.execute("COMMIT")
        thread.join()
    assert (states, failed) == ({"55P03"}, [])


#: The first words of each limit -> (what fails through the view, its error, what works in its place).
WAYS: dict[str, tuple[str, type[psycopg.Error] | None, str]] = {
    "ON CONFLICT ON CONSTRAINT": (
        "INSERT INTO kb (id, content, embedding) VALUES (1, 'x', {v}) ON CONFLICT ON CONSTRAINT kb_pkey DO NOTHING",
        pg.UndefinedObject,
        "INSERT INTO kb (id, content, embedding) VALUES (1, 'x', {v}) ON CONFLICT (id) DO NOTHING",
    ),
    "COPY": ("COPY kb TO STDOUT", pg.WrongObjectType, "COPY (SELECT * FROM kb) TO STDOUT"),
    "TRUNCATE": ("TRUNCATE kb", pg.WrongObjectType, "TRUNCATE public.kb"),
    "ctid, xmin": ("SELECT ctid, xmin FROM kb", pg.UndefinedColumn, "SELECT id, ctid, xmin FROM public.kb"),
    "TABLESAMPLE": (
        "SELECT id FROM kb TABLESAMPLE BERNOULLI (50)",
        pg.FeatureNotSupported,
        "SELECT id FROM public.kb TABLESAMPLE BERNOULLI (50)",
    ),
    "pg_get_serial_sequence": (
        "SELECT pg_get_serial_sequence('kb', 'number')",
        None,
        "SELECT pg_get_serial_sequence('public.kb', 'number')",
    ),
    "CREATE INDEX": (
        "CREATE INDEX ON kb (note)",
        pg.WrongObjectType,
        "SET search_path = public; CREATE INDEX ON kb (note); SET search_path = rv_kb_g1, public",
    ),
}


def test_what_a_view_cannot_do_and_the_way_round(dsn: str, connection: Client) -> None:
    """Each limit that `expose` prints fails as it says, and its way round works; what it does not list works."""
    knowledge_base(connection, 6, more=", number int GENERATED BY DEFAULT AS IDENTITY")
    with steering(dsn) as migration:
        migration.expose(from_=OLD)
    told = " ".join(cannot for cannot, _ in LIMITS)
    with on(dsn, "rv_kb_g1,public") as client:
        values = {"v": "'" + vector(OLD, "x") + "'"}
        for statement in (
            "SELECT id FROM kb WHERE id = 1 FOR UPDATE",
            "INSERT INTO kb (id, content, embedding) VALUES (50, 'x', {v}) RETURNING number",
            "INSERT INTO kb (id, content, embedding) VALUES (50, 'x', {v}) ON CONFLICT (id) DO UPDATE SET note = 'again'",
            "UPDATE kb SET note = 'u' WHERE id = 50 RETURNING *",
            "DELETE FROM kb WHERE id = 50",
            "EXPLAIN SELECT id FROM kb ORDER BY embedding <=> {v}::vector LIMIT 3",
        ):
            client.execute(statement.format(**values))  # type: ignore[arg-type]
        merge = (
            "MERGE INTO kb USING (VALUES (51)) AS s (id) ON kb.id = s.id WHEN MATCHED THEN UPDATE SET note = 'merged'"
        )
        if client.info.server_version >= 170000:
            client.execute(merge)
        else:
            with pytest.raises(pg.FeatureNotSupported):
                client.execute(merge)
        for words, (fails, error, works) in WAYS.items():
            assert words in told, words
            if error is None:
                assert one(client, fails) is None
                assert one(client, works) is not None
                continue
            with pytest.raises(error):
                client.execute(fails.format(**values))  # type: ignore[arg-type]
            for part in works.format(**values).split("; "):
                if part.startswith("COPY"):
                    with client.cursor().copy(part) as copy:  # type: ignore[arg-type]
                        assert len(list(copy)) == 6
                elif part.startswith("TRUNCATE"):
                    with client.transaction(force_rollback=True):
                        client.execute(part)  # type: ignore[arg-type]
                else:
                    client.execute(part)  # type: ignore[arg-type]
        for statement in ("BEGIN", "DECLARE c CURSOR FOR SELECT id FROM kb", "FETCH c"):
            client.execute(statement)  # type: ignore[arg-type]
        with pytest.raises((pg.FeatureNotSupported, pg.InvalidCursorState, pg.InvalidCursorName, pg.WrongObjectType)):
            client.execute("UPDATE kb SET note = 'c' WHERE CURRENT OF c")
