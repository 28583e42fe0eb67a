"""The ledger's versions, and who may talk to which."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql

from revector import Migration, Request, Settings, ledger
from revector.db import Database
from revector.errors import Refused


def table(connection: psycopg.Connection) -> None:
    connection.execute("CREATE TABLE kb (id int PRIMARY KEY, content text, embedding vector(8))")


def test_newer_program_upgrades_in_one_transaction_while_a_migration_is_open(
    dsn: str, connection: psycopg.Connection
) -> None:
    """An upgrade keeps the open migration; one that fails changes nothing, its version included."""
    table(connection)
    with Migration.open(Settings(database_url=dsn), table="kb") as migration:
        migration.run(Request(from_="hash:8", to="hash:16"))
    with Database(Settings(database_url=dsn)).connect() as session:
        with pytest.raises(psycopg.errors.UndefinedTable):
            ledger.ensure(
                session,
                [sql.SQL("ALTER TABLE revector.events ADD note text"), sql.SQL("ALTER TABLE nowhere ADD x int")],
            )
        assert ledger.version(session) == ledger.VERSION
        assert not session.rows(
            "SELECT FROM pg_attribute WHERE attrelid = 'revector.events'::regclass AND attname = 'note'"
        )
        ledger.ensure(session, [sql.SQL("ALTER TABLE revector.events ADD note text")])
        assert ledger.version(session) == ledger.VERSION + 1
        assert session.value("SELECT stage FROM revector.migrations") == "VERIFIED"


def test_a_ledger_of_version_1_is_upgraded_by_the_next_command(
    dsn: str, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open migration of an older program goes on under this one."""
    table(connection)
    with Database(Settings(database_url=dsn)).connect() as session:
        monkeypatch.setattr(ledger, "VERSION", 1)
        ledger.ensure(session)
        assert ledger.version(session) == 1
        monkeypatch.undo()
        with Migration.open(Settings(database_url=dsn), table="kb") as migration:
            assert ledger.version(session) == ledger.VERSION
            migration.run(Request(from_="hash:8", to="hash:16"))


def test_older_program_refuses_by_name(dsn: str, connection: psycopg.Connection) -> None:
    """A program that does not know the ledger's version touches nothing."""
    table(connection)
    with Database(Settings(database_url=dsn)).connect() as session:
        ledger.ensure(session)
    connection.execute("UPDATE revector.ledger SET version = version + 1")
    with pytest.raises(Refused, match=rf"has version {ledger.VERSION + 1}; this program knows {ledger.VERSION}"):
        Migration.open(Settings(database_url=dsn), table="kb")


def test_a_schema_of_that_name_is_the_users(dsn: str, connection: psycopg.Connection) -> None:
    """A schema named revector that is not ours is refused, never used."""
    connection.execute("CREATE SCHEMA revector")
    with Database(Settings(database_url=dsn)).connect() as session, pytest.raises(Refused, match="that is not ours"):
        ledger.ensure(session)


def test_the_library_in_three_verbs(dsn: str, connection: psycopg.Connection) -> None:
    """The sketch that the README shows: preview, run, cutover; plan at CUT_OVER says what comes next instead."""
    table(connection)
    heard: list[object] = []
    with Migration.open(Settings(database_url=dsn), table="kb") as migration:
        assert migration.preview(from_="hash:8", to="hash:16").plan.new.model.model == "hash:16"
        assert migration.run(from_="hash:8", to="hash:16", observe=heard.append).passed
        migration.cutover(without_follower=True)
        with pytest.raises(Refused, match="run is not possible at CUT_OVER"):
            migration.preview(to="hash:16")
    assert heard
