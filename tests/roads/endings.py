"""What must hold at any moment of a road, when it rests, and at its end; used by every test of roads."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql

from fix_tables import NEW, OLD, assert_exact, assert_no_leftovers, names, oid_of, one, stage_of

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
_BELONGINGS = """
    WITH mine AS (SELECT oid FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema$|revector$)')
    SELECT 'column ' || attname || ' ' || regexp_replace(format_type(atttypid, atttypmod), '^(vector).*', '\\1')
           || CASE WHEN attnotnull THEN ' NOT NULL' ELSE '' END
      FROM pg_attribute WHERE attrelid = %(table)s::oid AND attnum > 0 AND NOT attisdropped
    UNION ALL SELECT 'index ' || pg_get_indexdef(indexrelid) || CASE WHEN indisvalid THEN '' ELSE ' INVALID' END
      FROM pg_index WHERE indrelid = %(table)s::oid
    UNION ALL SELECT 'constraint ' || conname || ' ' || pg_get_constraintdef(oid)
      FROM pg_constraint WHERE conrelid = %(table)s::oid
    UNION ALL SELECT 'trigger ' || pg_get_triggerdef(oid)
      FROM pg_trigger WHERE tgrelid = %(table)s::oid AND NOT tgisinternal
    UNION ALL SELECT 'relation ' || relkind::text || ' ' || oid::regclass FROM pg_class WHERE relnamespace IN (TABLE mine)
    UNION ALL SELECT 'function ' || oid::regprocedure FROM pg_proc p WHERE pronamespace IN (TABLE mine)
       AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.classid = 'pg_proc'::regclass AND d.deptype = 'e')
    UNION ALL SELECT 'schema ' || nspname FROM pg_namespace WHERE oid IN (TABLE mine)
    UNION ALL SELECT 'settings ' || coalesce(array_to_string(reloptions, ','), '') FROM pg_class WHERE oid = %(table)s::oid
"""


def generations(connection: psycopg.Connection[Any], table: str = "kb") -> dict[str, str]:
    """Vector column -> the model that its vectors must be of."""
    return {column: MODEL_OF[kind] for column, kind in names(connection, table)[0].items()}


def assert_never_wrong(connection: psycopg.Connection[Any], table: str = "kb") -> None:
    """True at any moment: a vector of a managed generation is missing or right, never another text's.

    Once a migration closes, the trigger is gone and nobody manages the side that goes; one snapshot tells both.
    """
    managed = sql.SQL("true")
    if one(connection, "SELECT to_regclass('revector.migrations') IS NOT NULL"):
        managed = sql.SQL("(SELECT closing FROM revector.migrations ORDER BY id DESC LIMIT 1) IS DISTINCT FROM {}")
    for column, model in generations(connection, table).items():
        expression = sql.SQL("CASE WHEN {} IS NOT NULL AND {} THEN content END").format(
            sql.Identifier(column), managed.format("finalize" if model == OLD else "abort")
        )
        assert_exact(connection, table, expression.as_string(connection), {column: model}, at_least=0)


def assert_rests(connection: psycopg.Connection[Any], table: str = "kb", *, at_least: int = 1) -> None:
    """Nobody writes and the follower has come to its end: every row exact in every managed generation."""
    assert_exact(connection, table, "content", generations(connection, table), at_least=at_least)


def belongings(connection: psycopg.Connection[Any], table: str = "kb") -> set[str]:
    """What the database holds outside our schema, by name and definition; a vector's dimension is left out.

    Taken before a road and compared at its end: what is missing was the user's, what is more was left behind by us.
    """
    rows = connection.execute(_BELONGINGS, {"table": oid_of(connection, table)}).fetchall()
    return {told for (told,) in rows}


def assert_ended(
    connection: psycopg.Connection[Any],
    model: str,
    table: str = "kb",
    *,
    at_least: int = 1,
    before: set[str] | None = None,
) -> None:
    """After abort and finalize: one exact vector column under its own name, strict again, and nothing of ours.

    `before`: the `belongings` before the road, with what somebody else has changed since; they must be there again.
    """
    assert stage_of(connection)[0] in ("ABORTED", "FINALIZED")
    assert generations(connection, table) == {"embedding": model}
    assert_rests(connection, table, at_least=at_least)
    strict = "SELECT attnotnull FROM pg_attribute WHERE attrelid = %s::regclass AND attname = 'embedding'"
    assert one(connection, strict, table) is True, "NOT NULL was not given back"
    assert_no_leftovers(connection, table)
    assert_ledger_only(connection)
    if before is not None:
        after = belongings(connection, table)
        assert after == before, f"gone: {sorted(before - after)}; left behind: {sorted(after - before)}"


def ledger_tables(connection: psycopg.Connection[Any]) -> list[str]:
    return [name for (name,) in connection.execute(_LEDGER).fetchall()]


def assert_ledger_only(connection: psycopg.Connection[Any]) -> None:
    """Inside our schema: the ledger's own tables, as a database has them that never had a migration of this table."""
    assert set(ledger_tables(connection)) <= LEDGER, set(ledger_tables(connection)) - LEDGER
    views = one(connection, "SELECT count(*) FROM pg_namespace WHERE nspname ~ '^rv_'")
    assert views == 0
    assert one(connection, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
               " AND application_name ~ '^revector' AND state = 'idle in transaction'") == 0  # fmt: skip
