"""`plan --rehearse`: the short steps on the real table, rolled back."""

from __future__ import annotations

import time
from typing import Any

import psycopg
import pytest

from fix_commands import command
from fix_tables import NEW, OLD, advance, knowledge_base, one, shape

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
