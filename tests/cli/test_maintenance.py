"""The ledger as a whole: its versions, what it knows, its removal."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from fix_tables import NEW, OLD, advance, knowledge_base, oid_of, one, settings
from revector.db import Database
from revector.errors import Refused
from revector.maintenance import known_tables, standing, uninstall, versions


def test_without_a_ledger(dsn: str) -> None:
    database = Database(settings(dsn))
    assert known_tables(database) == [] and standing(database, 1) == "" and uninstall(database) is False
    found = versions(database)
    assert found.ledger is None and found.pgvector is not None and found.server


def test_what_the_ledger_knows(dsn: str, connection: psycopg.Connection[Any]) -> None:
    database = Database(settings(dsn))
    for name in ("Weird Table", "kb"):
        knowledge_base(connection, 20, name=name)
        advance(dsn, "EXPANDED", table=name)
    connection.execute("CREATE SCHEMA app; ALTER TABLE kb SET SCHEMA app")
    assert known_tables(database) == ["Weird Table", "app.kb"]
    assert standing(database, oid_of(connection, "Weird Table")) == f"The migration is at EXPANDED; {OLD} answers."
    assert versions(database).ledger == versions(database).known_ledger


def test_uninstall_is_refused_while_a_migration_is_open(dsn: str, connection: psycopg.Connection[Any]) -> None:
    database = Database(settings(dsn))
    for name in ("a", "b"):
        knowledge_base(connection, 20, name=name)
    advance(dsn, "CUT_OVER", table="a")
    advance(dsn, "EXPANDED", table="b")
    with pytest.raises(Refused) as refused:
        uninstall(database)
    assert str(refused.value) == "a migration is open: a at CUT_OVER, b at EXPANDED"
    assert refused.value.hint == (
        "revector finalize a\nrevector abort b, or go on: revector run b\nthen: revector uninstall"
    )
    assert standing(database, oid_of(connection, "a")) == f"The migration is at CUT_OVER; {NEW} answers."
    # A table that was dropped has nothing left to lose.
    connection.execute("DROP TABLE a, b")
    assert known_tables(database) == []
    assert uninstall(database) is True
    assert one(connection, "SELECT to_regnamespace('revector') IS NULL")


def test_a_newer_ledger_is_left_alone(dsn: str, connection: psycopg.Connection[Any]) -> None:
    database = Database(settings(dsn))
    knowledge_base(connection, 20)
    advance(dsn, "EXPANDED")
    connection.execute("UPDATE revector.ledger SET version = 99")
    for look in (uninstall, known_tables):
        with pytest.raises(Refused, match="has version 99; this program knows"):
            look(database)
    assert versions(database).ledger == 99
