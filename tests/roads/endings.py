"""What must hold at any moment of a road, when it rests, and at its end; used by every test of roads."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql

from fix_tables import NEW, OLD, assert_exact, assert_no_leftovers, names, one, stage_of

#: The models of the roads differ in dimension, so that a column's type tells whose vectors it must hold.
MODEL_OF = {"vector(16)": OLD, "vector(32)": NEW}
#: The ledger's own tables.
LEDGER = {"ledger", "generations", "migrations", "objects", "windows", "failures", "heartbeats", "events", "spending",
          "views"}  # fmt: skip
#: All that may be in schema `revector` once nothing is open, kept backup tables aside.
_LEDGER = """
    SELECT c.relname FROM pg_class c WHERE c.relnamespace = to_regnamespace('revector')
       AND c.relkind IN ('r', 'p', 'v', 'm') AND c.relname !~ '^backup_' ORDER BY 1
"""


def generations(connection: psycopg.Connection[Any], table: str = "kb") -> dict[str, str]:
    """Vector column -> the model that its vectors must be of."""
    return {column: MODEL_OF[kind] for column, kind in names(connection, table)[0].items()}


def assert_never_wrong(connection: psycopg.Connection[Any], table: str = "kb") -> None:
    """True at any moment: a vector is missing or right, never another text's."""
    for column, model in generations(connection, table).items():
        expression = sql.SQL("CASE WHEN {} IS NOT NULL THEN content END").format(sql.Identifier(column))
        assert_exact(connection, table, expression.as_string(connection), {column: model}, at_least=0)


def assert_rests(connection: psycopg.Connection[Any], table: str = "kb", *, at_least: int = 1) -> None:
    """Nobody writes and the follower has come to its end: every row exact in every managed generation."""
    assert_exact(connection, table, "content", generations(connection, table), at_least=at_least)


def assert_ended(connection: psycopg.Connection[Any], model: str, table: str = "kb", *, at_least: int = 1) -> None:
    """After abort and finalize: one exact vector column under its own name, strict again, and nothing of ours."""
    assert stage_of(connection)[0] in ("ABORTED", "FINALIZED")
    assert generations(connection, table) == {"embedding": model}
    assert_rests(connection, table, at_least=at_least)
    strict = "SELECT attnotnull FROM pg_attribute WHERE attrelid = %s::regclass AND attname = 'embedding'"
    assert one(connection, strict, table) is True, "NOT NULL was not given back"
    assert_no_leftovers(connection, table)
    assert_ledger_only(connection)


def ledger_tables(connection: psycopg.Connection[Any]) -> list[str]:
    return [name for (name,) in connection.execute(_LEDGER).fetchall()]


def assert_ledger_only(connection: psycopg.Connection[Any]) -> None:
    """Inside our schema: the ledger's own tables, as a database has them that never had a migration of this table."""
    assert set(ledger_tables(connection)) <= LEDGER, set(ledger_tables(connection)) - LEDGER
    views = one(connection, "SELECT count(*) FROM pg_namespace WHERE nspname ~ '^rv_'")
    assert views == 0
    assert one(connection, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
               " AND application_name ~ '^revector' AND state = 'idle in transaction'") == 0  # fmt: skip
