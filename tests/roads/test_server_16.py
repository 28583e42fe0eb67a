"""The whole way on PostgreSQL 16 with pgvector 0.6.2, and as an owner who is no superuser."""

from __future__ import annotations

import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fix_commands import command
from fix_tables import (
    NEW,
    OLD,
    REQUEST,
    assert_exact,
    assert_no_leftovers,
    body,
    fill,
    following,
    knowledge_base,
    one,
    shape,
    stage_of,
    steering,
    vector,
)
from revector import embedded
from revector.embedded import Server, create_database, embedded_server
from revector.phases import verify

FOUND = find_spec("pgserver")
pytestmark = [
    pytest.mark.roads,
    pytest.mark.skipif(FOUND is None, reason="the package pgserver (PostgreSQL 16, pgvector 0.6.2) is not installed"),
]


@pytest.fixture(autouse=True)
def _look_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LOOK_AGAIN", 0.3)


def make_data(programs: Path, folder: Path, account: str | None) -> None:
    """`initdb` of PostgreSQL 16 knows no built-in locale provider."""
    subprocess.run(
        [programs / "initdb", "-D", folder / "data", "-U", "postgres", "-E", "UTF8", "--locale=C", "--auth=trust"],
        capture_output=True, check=True, **embedded._identity(folder, account),
    )  # fmt: skip


@pytest.fixture(scope="module")
def server_16() -> Iterator[Server]:
    assert FOUND is not None and FOUND.origin is not None
    with pytest.MonkeyPatch.context() as patch:
        programs = Path(FOUND.origin).parent / "pginstall" / "bin"
        patch.setattr(embedded, "find_programs", lambda: programs)
        patch.setattr(embedded, "_initialise", make_data)
        running = embedded_server(options={"fsync": "off"})
        server = running.__enter__()
    try:
        yield server
    finally:
        running.__exit__(None, None, None)


@pytest.fixture
def dsn(server_16: Server, request: pytest.FixtureRequest) -> str:
    dsn = create_database(server_16, f"t{abs(hash(request.node.name))}")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION vector")
    return dsn


@pytest.fixture
def newest(server: Server) -> str:
    """A database of the server that comes with the package."""
    return create_database(server, "newest")


@pytest.fixture
def connection(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(dsn, autocommit=True) as opened:
        yield opened


@contextmanager
def written(dsn: str) -> Iterator[list[str]]:
    """An application that gives its own model's vectors, whichever answers."""
    stop, errors, choose = threading.Event(), [], random.Random(16)

    def work() -> None:
        with psycopg.connect(dsn, autocommit=True) as session:
            while not stop.wait(0.005):
                text, number = f"text {choose.random()}", choose.randrange(60)
                for model in (OLD, NEW):
                    try:
                        session.execute(
                            "UPDATE kb SET content = %s, embedding = %s WHERE id = %s",
                            (text, vector(model, text), number),
                        )
                        break
                    except psycopg.errors.DataException:
                        continue
                    except psycopg.Error as error:
                        errors.append(repr(error))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield errors
    finally:
        stop.set()
        thread.join()


def test_the_whole_way(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """NOT NULL comes back through a CHECK, which goes again; the table's shape is as it was, but for the dimension."""
    assert connection.info.server_version // 10_000 == 16
    knowledge_base(connection, 60)
    connection.execute("CREATE INDEX kb_some ON kb (title) WHERE embedding IS NOT NULL")
    before = shape(connection)
    with written(dsn) as errors:
        with steering(dsn) as migration:
            migration.run(REQUEST)
        with following(dsn, connection):
            for verb in ("cutover", "rollback", "cutover"):
                with steering(dsn) as migration:
                    getattr(migration, verb)()
    assert errors == []
    fill(dsn, connection)
    assert_exact(connection, "kb", "content", {"embedding": NEW, "embedding_g1": OLD}, at_least=60)
    connection.execute("INSERT INTO kb (id, content, embedding) VALUES (900, 'x', %s)", (vector(NEW, "x"),))
    with steering(dsn) as migration:
        migration.finalize(quiet_for=0)
    assert_exact(connection, "kb", "content", {"embedding": NEW}, at_least=61)
    assert_no_leftovers(connection)
    after = shape(connection)
    for name in before:
        assert {str(row).replace("vector(16)", "vector(32)") for row in before[name]} == {str(r) for r in after[name]}
    assert one(connection, "SELECT attnotnull FROM pg_attribute WHERE attname = 'embedding'")


def test_abort(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 40)
    before = shape(connection)
    with steering(dsn) as migration:
        migration.run(REQUEST)
        migration.cutover(without_follower=True)
        migration.rollback(without_follower=True)
        migration.abort()
    assert shape(connection) == before
    assert_exact(connection, "kb", "content", {"embedding": OLD}, at_least=40)
    assert_no_leftovers(connection)


def test_restore(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The way back after finalize, with the vectors of the backup; and the way there rehearsed."""
    knowledge_base(connection, 40)
    before = shape(connection)
    rehearsed = command(dsn, "plan", "kb", "--from", OLD, "--to", NEW, "--rehearse").exits(0)
    assert "rehearsal: everything went well" in rehearsed.out and shape(connection) == before
    command(dsn, "run", "kb", "--from", OLD, "--to", NEW, "--backup").exits(0)
    command(dsn, "cutover", "kb", "--without-follower").exits(0)
    command(dsn, "finalize", "kb").exits(0)
    assert "40 vectors taken from kb_backup_16" in command(dsn, "restore", "kb").exits(0).err
    command(dsn, "cutover", "kb", "--without-follower").exits(0)
    command(dsn, "finalize", "kb").exits(0)
    assert_exact(connection, "kb", "content", {"embedding": OLD}, at_least=40)
    assert_no_leftovers(connection)


@pytest.mark.parametrize("which", ["16", "newest"])
def test_what_a_server_lacks_is_found_and_named(which: str, request: pytest.FixtureRequest) -> None:
    """HNSW above 2,000 dimensions needs halfvec, which came with pgvector 0.7: it takes 4,000."""
    dsn = request.getfixturevalue("dsn" if which == "16" else "newest")
    ask = ("plan", "kb", "--from", OLD, "--to", "hash:2500")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        pgvector = one(connection, "SELECT extversion FROM pg_extension WHERE extname = 'vector'")
        knowledge_base(connection, 20)
        told = command(dsn, *ask).exits(3)
        assert "vector indexes take at most 2000 dimensions, hash:2500 has 2500" in " ".join(told.out.split())
        if one(connection, "SELECT to_regtype('halfvec') IS NULL"):
            server = one(connection, "SHOW server_version").split()[0]
            assert which == "16" and f"PostgreSQL {server}" in told.err + told.out
            assert f"pgvector {pgvector}" in told.err + told.out
            pytest.skip(f"pgvector {pgvector} has no halfvec, which came with 0.7: nothing further to try on it")
        assert which == "newest"
        connection.execute(
            "DROP INDEX kb_embedding_idx; ALTER TABLE kb ALTER embedding TYPE halfvec(16);"
            "CREATE INDEX kb_embedding_idx ON kb USING hnsw (embedding halfvec_cosine_ops)"
        )
        command(dsn, *ask).exits(0)
        command(dsn, "run", *ask[1:]).exits(0)
        command(dsn, "cutover", "kb", "--without-follower").exits(0)
        command(dsn, "finalize", "kb").exits(0)
        kind = (
            "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = 'kb'::regclass AND attname = %s"
        )
        assert one(connection, kind, "embedding") == "halfvec(2500)"


def test_an_owner_who_is_no_superuser(server_16: Server, dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Each refusal prints the GRANT that helps; with exactly these it goes to the end."""
    database = connection.info.dbname
    role = f"owner_{database}"
    connection.execute(f"CREATE ROLE {role} LOGIN")
    knowledge_base(connection, 40)
    connection.execute(
        "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.note := ''touched''; RETURN NEW; END';"
        "CREATE TRIGGER touched BEFORE UPDATE ON kb FOR EACH ROW EXECUTE FUNCTION touch()"
    )
    connection.execute(f"ALTER TABLE kb OWNER TO {role}")
    connection.execute(f"REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC")
    own = dsn.replace("postgres@", f"{role}@")
    granted = []
    for _ in range(8):
        answer = command(own, "run", "kb", "--from", OLD, "--to", NEW, "--backup")
        if answer.code == 0:
            break
        assert answer.code == 3, answer
        grants = [line.strip() for line in answer.err.splitlines() if "GRANT " in line or "ALTER ROLE" in line]
        assert grants, answer.err
        statement = grants[0][grants[0].index("GRANT ") :].split(", or")[0]
        assert statement not in granted, answer.err
        granted.append(statement)
        connection.execute(statement)
    assert answer.code == 0 and len(granted) >= 3, granted
    for verb in (
        ("cutover", "--without-follower"),
        ("rollback", "--without-follower"),
        ("cutover", "--without-follower"),
    ):
        command(own, verb[0], "kb", *verb[1:]).exits(0)
    command(own, "follow", "kb", "--once").exits(0)
    command(own, "search", "kb", body(3)).exits(0)
    command(own, "expose", "kb").exits(0)
    command(own, "expose", "kb", "--drop").exits(0)
    command(own, "finalize", "kb").exits(0)
    assert_exact(connection, "kb", "content", {"embedding": NEW}, at_least=40)
    command(own, "restore", "kb").exits(0)
    command(own, "cutover", "kb", "--without-follower").exits(0)
    command(own, "finalize", "kb").exits(0)
    assert_exact(connection, "kb", "content", {"embedding": OLD}, at_least=40)
    command(own, "plan", "kb", "--to", NEW, "--rehearse").exits(0)
    # Given up where both generations are guarded already: exposed, and never cut over.
    command(own, "run", "kb", "--to", NEW).exits(0)
    command(own, "expose", "kb", "--without-follower").exits(0)
    assert stage_of(connection)[0] == "SERVED"
    command(own, "abort", "kb").exits(0)
    assert_exact(connection, "kb", "content", {"embedding": OLD}, at_least=40)
    assert one(connection, "SELECT count(*) FROM kb WHERE note = 'touched'") == 0
