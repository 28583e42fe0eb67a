"""`plan --rehearse`: the short steps on the real table, rolled back."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from typing import Any

import psycopg
import pytest

from fix_commands import command
from fix_tables import NEW, OLD, REQUEST, advance, body, knowledge_base, one, shape, steering, vector
from revector import rehearsal
from revector.errors import RevectorError

ASK = ("plan", "kb", "--from", OLD, "--to", NEW, "--rehearse")


def test_it_changes_nothing_and_says_how_long(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(
        connection, 40, more=", number int GENERATED ALWAYS AS IDENTITY, twice int GENERATED ALWAYS AS (id * 2) STORED"
    )
    rows = "SELECT md5(string_agg(k::text, ' ' ORDER BY id)) FROM kb k"
    before = (shape(connection), one(connection, rows), one(connection, "SELECT count(*) FROM pg_proc"))
    answer = command(dsn, *ASK).exits(0)
    assert "rehearsal: everything went well; the table was held for " in answer.out
    for part in ("lock", "expand", "expand: INSERT", "served: UPDATE", "cutover: SELECT", "rollback", "finalize"):
        assert f"\n  {part} " in answer.out, part
    assert (shape(connection), one(connection, rows), one(connection, "SELECT count(*) FROM pg_proc")) == before
    assert one(connection, "SELECT to_regnamespace('revector') IS NULL")
    told = command(dsn, *ASK, "--json").exits(0).json["rehearsal"]
    assert told["tried"] and 0 < told["held_ms"] < 1000


def test_an_empty_table(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 0)
    assert "were not tried: no row has a text and a vector" in command(dsn, *ASK).exits(0).out


@pytest.mark.parametrize(
    ("trouble", "part"),
    [
        ("CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN IF NEW.embedding IS NULL THEN"
         " RAISE 'no vector, no row'; END IF; RETURN NULL; END$$;"
         "CREATE TRIGGER t AFTER UPDATE ON kb FOR EACH ROW EXECUTE FUNCTION f()", "served: UPDATE"),
        ("CREATE FUNCTION f() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'no DDL here'; END$$;"
         "CREATE EVENT TRIGGER e ON ddl_command_start WHEN TAG IN ('ALTER TABLE') EXECUTE FUNCTION f()", "expand"),
    ],
)  # fmt: skip
def test_what_would_fail_is_named(dsn: str, connection: psycopg.Connection[Any], trouble: str, part: str) -> None:
    knowledge_base(connection, 20)
    connection.execute(trouble)
    before = shape(connection)
    answer = command(dsn, *ASK).exits(3)
    assert f"rehearsal: {part} fails: no " in answer.last and "Everything was rolled back." in answer.last
    connection.execute("DROP EVENT TRIGGER IF EXISTS e")
    assert shape(connection) == before


def test_it_gives_up_in_time(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Somebody uses the table: nobody else waits longer for the rehearsal than its limit."""
    knowledge_base(connection, 20)
    with psycopg.connect(dsn) as other:
        other.execute("UPDATE kb SET note = 'held' WHERE id = 1")
        began = time.monotonic()
        answer = command(dsn, *ASK)
        assert answer.code in (3, 4) and "the rehearsal did not fit" in answer.last, answer
        assert time.monotonic() - began < 20
        assert one(connection, "SELECT count(*) FROM pg_locks WHERE relation = 'kb'::regclass AND NOT granted") == 0


def test_not_while_a_migration_is_open(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 20)
    advance(dsn, "EXPANDED")
    assert "a migration is open at EXPANDED" in command(dsn, *ASK).exits(3).last


@pytest.mark.parametrize("failing", [False, True])
def test_a_client_that_stands_still_holds_nobody_up(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    """Frozen, or cut off, in the middle: the server ends it within its limit, after an error too."""
    knowledge_base(connection, 20)
    if failing:
        connection.execute(
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN IF NEW.embedding IS NULL THEN"
            " RAISE 'no vector, no row'; END IF; RETURN NULL; END$$;"
            "CREATE TRIGGER t AFTER UPDATE ON kb FOR EACH ROW EXECUTE FUNCTION f()"
        )
    waits: list[float] = []

    def read() -> None:
        with psycopg.connect(dsn, autocommit=True) as reader:
            while len(waits) < 40:
                began = time.monotonic()
                reader.execute("SELECT count(*) FROM kb")
                waits.append(time.monotonic() - began)
                time.sleep(0.05)

    real = psycopg.Connection.wait
    frozen = threading.Event()

    def wait(self: Any, generator: Any, *rest: Any) -> Any:
        # Once the big message is under way, this client neither reads nor sends anything for 2 s.
        if threading.current_thread() is threading.main_thread() and inside and not frozen.is_set():
            frozen.set()
            try:
                return real(self, generator, *rest)
            finally:
                time.sleep(2)
        return real(self, generator, *rest)

    inside: list[bool] = []
    sent = rehearsal._sent

    def noted(*arguments: Any) -> Any:
        inside.append(True)
        return sent(*arguments)

    monkeypatch.setattr(rehearsal, "_sent", noted)
    monkeypatch.setattr(psycopg.Connection, "wait", wait)
    thread = threading.Thread(target=read)
    with steering(dsn) as migration:
        draft = migration.preview(REQUEST).draft
        thread.start()
        try:
            with pytest.raises((RevectorError, psycopg.Error)) if failing else nullcontext():
                migration.rehearse(draft)
        finally:
            thread.join()
    assert frozen.is_set() and max(waits) < 1.1, max(waits)


def test_the_server_keeps_the_limit(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Slow triggers: more than the limit in all, though each is quick enough; a reader never waits longer."""
    knowledge_base(connection, 20)
    connection.execute(
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(0.4); RETURN NEW; END$$;"
        "CREATE TRIGGER t BEFORE UPDATE ON kb FOR EACH ROW EXECUTE FUNCTION f()"
    )
    before = shape(connection)
    answer = command(dsn, *ASK)
    assert answer.code == 4 and "did not fit in 1000 ms; longest: " in answer.last, answer
    assert shape(connection) == before


def test_what_fails_without_us_is_not_ours(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 20)
    connection.execute(
        "CREATE TABLE log (id int); CREATE RULE r AS ON INSERT TO kb DO ALSO INSERT INTO log VALUES (1);"
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'row is archived'; END$$;"
        "CREATE TRIGGER t BEFORE UPDATE ON kb FOR EACH ROW WHEN (OLD.id < 20) EXECUTE FUNCTION f()"
    )
    told = command(dsn, *ASK).exits(0).out
    assert "INSERT was not rehearsed: it fails on this table as it is: " in told
    assert "UPDATE was not rehearsed: it fails on this table as it is: row is archived" in told
    assert "\n  cutover: SELECT " in told and "served: UPDATE" not in told


def test_a_text_that_fills_its_column(dsn: str, connection: psycopg.Connection[Any]) -> None:
    connection.execute("CREATE TABLE kb (id int PRIMARY KEY, content varchar(30), embedding vector(16))")
    for number in range(20):
        text = body(number)[:30].ljust(30, ".")
        connection.execute("INSERT INTO kb VALUES (%s, %s, %s)", (number, text, vector(OLD, text)))
    assert "\n  served: UPDATE " in command(dsn, *ASK).exits(0).out


def test_a_deferred_constraint_is_met(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Its trigger fires at an application's COMMIT, and would not at a ROLLBACK."""
    knowledge_base(connection, 20)
    connection.execute(
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN IF NEW.embedding IS NULL THEN"
        " RAISE 'no vector, no row'; END IF; RETURN NULL; END$$;"
        "CREATE CONSTRAINT TRIGGER t AFTER UPDATE ON kb DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION f()"
    )
    assert "rehearsal: served: UPDATE fails: no vector, no row" in command(dsn, *ASK).exits(3).last
