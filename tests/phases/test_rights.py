"""Roles: who may run revector on which table, and what a missing right says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from fix_commands import command
from fix_tables import NEW, OLD, knowledge_base

RUN = ("--from", OLD, "--to", NEW)


@pytest.fixture
def roles(connection: psycopg.Connection[Any]) -> Iterator[tuple[str, str]]:
    """Two roles that own a table each, `first` and `second`, and have every right but one another's."""
    database = connection.info.dbname
    pair = (f"{database}_a", f"{database}_b")
    for role, table in zip(pair, ("first", "second"), strict=True):
        connection.execute(
            f"CREATE ROLE {role} LOGIN; GRANT CREATE ON SCHEMA public TO {role};"
            f"GRANT CREATE ON DATABASE {database} TO {role};"
            f"GRANT SET ON PARAMETER session_replication_role TO {role}"
        )
        knowledge_base(connection, 20, name=table)
        connection.execute(f"ALTER TABLE {table} OWNER TO {role}")
    yield pair
    connection.execute(f"DROP OWNED BY {', '.join(pair)} CASCADE")
    for role in pair:
        connection.execute(f"REVOKE ALL ON PARAMETER session_replication_role FROM {role}; DROP ROLE {role}")


def test_a_second_owner_is_told_the_grant(
    dsn: str, connection: psycopg.Connection[Any], roles: tuple[str, str]
) -> None:
    first, second = (make_conninfo(dsn, user=role) for role in roles)
    command(first, "run", "first", *RUN).exits(0)
    grant = f"GRANT {roles[0]} TO {roles[1]}"
    for verb in (("plan", "second", *RUN), ("run", "second", *RUN), ("status", "second")):
        said = command(second, *verb).exits(3).last
        assert f"it belongs to role {roles[0]}" in said and grant in said
    connection.execute(grant)
    command(second, "run", "second", *RUN).exits(0)
    command(second, "cutover", "second", "--without-follower").exits(0)
    command(second, "finalize", "second").exits(0)
    command(first, "abort", "first").exits(0)


def test_a_ledger_of_a_superuser_gets_a_role_of_its_own(
    dsn: str, connection: psycopg.Connection[Any], roles: tuple[str, str]
) -> None:
    """Nobody is told to make the second owner a member of a superuser; what is told leads to the end."""
    command(dsn, "run", "first", *RUN).exits(0)
    second = make_conninfo(dsn, user=roles[1])
    said = command(second, "run", "second", *RUN).exits(3).last
    assert "GRANT postgres" not in said
    statements = said.partition("as a superuser:\n")[2]
    try:
        connection.execute(statements)
        command(second, "run", "second", *RUN).exits(0)
        command(second, "cutover", "second", "--without-follower").exits(0)
        command(second, "finalize", "second").exits(0)
        command(dsn, "abort", "first").exits(0)
    finally:
        connection.execute("REASSIGN OWNED BY revector_ledger TO postgres; DROP ROLE revector_ledger")


def test_a_forced_policy_is_named(dsn: str, connection: psycopg.Connection[Any], roles: tuple[str, str]) -> None:
    connection.execute("ALTER TABLE first ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    own = make_conninfo(dsn, user=roles[0])
    for verb in ("plan", "run"):
        said = command(own, verb, "first", *RUN).exits(3).last
        assert "first forces row level security on its owner" in said
        assert f'ALTER ROLE "{roles[0]}" BYPASSRLS' in said
    connection.execute(f"ALTER ROLE {roles[0]} BYPASSRLS")
    command(own, "run", "first", *RUN).exits(0)


def test_nobody_but_the_owner_reads_the_backup(
    dsn: str, connection: psycopg.Connection[Any], roles: tuple[str, str]
) -> None:
    """Default privileges of the schema give new tables away, and the copy has no policies."""
    connection.execute(
        f"ALTER DEFAULT PRIVILEGES FOR ROLE {roles[0]} IN SCHEMA public GRANT SELECT ON TABLES TO PUBLIC;"
        f"ALTER DEFAULT PRIVILEGES FOR ROLE {roles[0]} IN SCHEMA public GRANT ALL ON TABLES TO {roles[1]};"
        "ALTER TABLE first ENABLE ROW LEVEL SECURITY"
    )
    own, other = (make_conninfo(dsn, user=role) for role in roles)
    command(own, "run", "first", *RUN, "--backup").exits(0)
    with psycopg.connect(other, autocommit=True) as session:
        for told in ("SELECT FROM first_backup_16", "DELETE FROM first_backup_16"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                session.execute(told)
    row = connection.execute(
        "SELECT relrowsecurity, has_table_privilege(%s, oid, 'SELECT') FROM pg_class WHERE relname = 'first_backup_16'",
        (roles[1],),
    ).fetchone()
    assert row == (True, False)
    command(own, "cutover", "first", "--without-follower").exits(0)
    command(own, "finalize", "first").exits(0)
    command(own, "restore", "first").exits(0)
