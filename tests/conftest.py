"""Real PostgreSQL for every test that asks for it: one server a session, one database a test.

The server is the embedded one, or an existing one with `pytest --test-dsn URL` (its role makes and drops databases).
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from revector.embedded import Server, embedded_server, find_programs
from revector.errors import UsageError

#: Variables that would let a developer's own database, models or keys into a test.
OUTSIDE = ("DATABASE_URL", "PG", "EMBEDDING_", "OPENAI_")
#: A crash of the machine may lose the test server's data; the rest is as in production.
TUNING = {"fsync": "off", "shared_buffers": "128MB", "max_connections": "200"}
NUMBERS = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--test-dsn", metavar="URL", help="test on this server instead of the embedded one")


def pytest_report_header(config: pytest.Config) -> str:
    given = config.getoption("--test-dsn")
    if given:
        with psycopg.connect(given) as connection:
            row = connection.execute(
                "SELECT current_setting('server_version'),"
                " (SELECT default_version FROM pg_available_extensions WHERE name = 'vector')"
            ).fetchone()
        assert row is not None
        return f"PostgreSQL {row[0]}, pgvector {row[1]} (--test-dsn)"
    try:
        programs = find_programs()
    except UsageError as error:
        return f"PostgreSQL: {error}; {error.hint}"
    version = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    control = programs.parent.joinpath("share", "postgresql", "extension", "vector.control").read_text()
    vector = control.split("default_version = '")[1].split("'")[0]
    return f"PostgreSQL {version.split()[-1]}, pgvector {vector} (embedded)"


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(OUTSIDE)]:
            patch.delenv(name)
        yield


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `.env` of the developer's is read: every test stands in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def server_dsn(request: pytest.FixtureRequest, _clean_environment: None) -> Iterator[str]:
    """A database from which others are made and dropped."""
    given = request.config.getoption("--test-dsn")
    if given:
        yield given
        return
    with embedded_server(options=TUNING) as server:
        yield server.dsn


@pytest.fixture(scope="session")
def _maintenance(server_dsn: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="session")
def _template(server_dsn: str, _maintenance: psycopg.Connection) -> Iterator[str]:
    name = f"rv_template_{os.getpid()}"
    _maintenance.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        with psycopg.connect(in_database(server_dsn, name), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        yield name
    finally:
        _drop(_maintenance, name)


@pytest.fixture
def dsn(server_dsn: str, _maintenance: psycopg.Connection, _template: str) -> Iterator[str]:
    """A fresh database with pgvector, dropped after the test whoever is still connected."""
    name = f"rv_test_{os.getpid()}_{next(NUMBERS)}"
    _maintenance.execute(
        sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(_template))
    )
    try:
        yield in_database(server_dsn, name)
    finally:
        _drop(_maintenance, name)


@pytest.fixture
def connection(dsn: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection to this test's database."""
    with psycopg.connect(dsn, autocommit=True) as opened:
        yield opened


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of the test's own, with safe settings, for tests that restart or crash it."""
    with embedded_server() as own:
        yield own


def in_database(dsn: str, name: str) -> str:
    if "://" in dsn:
        return urlsplit(dsn)._replace(path=f"/{quote(name, safe='')}").geturl()
    return make_conninfo(dsn, dbname=name)


def _drop(connection: psycopg.Connection, name: str) -> None:
    connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
