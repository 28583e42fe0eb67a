"""A real pgbouncer in front of the server: revector refuses it, and the application behind it notices nothing."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest

from fix_commands import command
from fix_tables import NEW, OLD, knowledge_base, one, settings
from revector import embedded
from revector.db import Database
from revector.embedded import Server, create_database
from revector.errors import Refused

#: Debian's package puts it where only root's PATH looks.
PROGRAM = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
pytestmark = [
    pytest.mark.roads,
    pytest.mark.skipif(
        PROGRAM is None, reason="the program pgbouncer is not installed (Debian: apt install pgbouncer)"
    ),
]

Pooled = Callable[..., str]


@pytest.fixture
def dsn(server: Server) -> str:
    dsn = create_database(server, "app")
    with psycopg.connect(dsn, autocommit=True) as opened:
        opened.execute("CREATE EXTENSION vector")
        knowledge_base(opened, 40)
    return dsn


@pytest.fixture
def pooled(server: Server, dsn: str) -> Iterator[Pooled]:
    """Start a pgbouncer in front of the database; the answer is its address."""
    started: list[subprocess.Popen[bytes]] = []

    def start(mode: str, *, size: int) -> str:
        place = server.folder / f"pooler{len(started)}"
        place.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        accounts = place / "accounts"
        accounts.write_text('"postgres" ""\n')
        options = place / "pgbouncer.ini"
        # As it is delivered, but for the places, the mode, the size and a short wait. It keeps no Unix socket.
        options.write_text(
            "[databases]\n"
            f"app = host={one_host(dsn)} port=5432 dbname=app user=postgres\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = any\nauth_file = {accounts}\nlogfile = {place / 'log'}\n"
            f"pool_mode = {mode}\ndefault_pool_size = {size}\nquery_wait_timeout = 3\n"
        )
        for path in (place, accounts, options):
            embedded._give(path, server.account)  # it refuses to run as root, as PostgreSQL does
        assert PROGRAM is not None
        process = subprocess.Popen(
            [PROGRAM, options], stderr=subprocess.DEVNULL, **embedded._identity(server.folder, server.account)
        )
        started.append(process)
        address = f"postgresql://postgres@127.0.0.1:{port}/app"
        for _ in range(100):
            try:
                psycopg.connect(address, connect_timeout=2).close()
                return address
            except psycopg.OperationalError:
                assert process.poll() is None, (place / "log").read_text()
                time.sleep(0.1)
        raise AssertionError((place / "log").read_text())

    yield start
    for process in started:
        process.terminate()
        process.wait(10)


def one_host(dsn: str) -> str:
    return str(psycopg.conninfo.conninfo_to_dict(dsn)["host"])


@contextmanager
def application(address: str, clients: int) -> Iterator[tuple[list[str], list[int]]]:
    """Clients that search and write all the time: their errors, and how many statements there were."""
    stop, errors, done = threading.Event(), [], [0] * clients

    def work(number: int) -> None:
        choose = random.Random(number)
        with psycopg.connect(address, autocommit=True, prepare_threshold=None) as session:
            while not stop.is_set():
                try:
                    session.execute("SELECT count(*) FROM kb")
                    session.execute("UPDATE kb SET note = 'seen' WHERE id = %s", (choose.randrange(40),))
                    done[number] += 2
                except psycopg.Error as error:
                    errors.append(str(error).splitlines()[0])
                time.sleep(choose.random() * 0.006)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield errors, done
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def refused(address: str, *arguments: str) -> str:
    answer = command(address, *arguments).exits(3)
    assert "next: set DATABASE_URL to the direct (not pooled) address of the database" in answer.last, answer
    return answer.last


PLAN = ("plan", "kb", "--from", OLD, "--to", NEW)


@pytest.mark.parametrize("clients", [0, 6])
@pytest.mark.parametrize("size", [1, 4])
def test_in_transaction_mode_it_is_refused_and_the_application_keeps_its_settings(
    pooled: Pooled, dsn: str, size: int, clients: int
) -> None:
    address = pooled("transaction", size=size)
    with application(address, clients) as (errors, done):
        for arguments in (PLAN, ("run", *PLAN[1:]), ("status", "kb")):
            assert refused(address, *arguments).startswith("refused: this address is a transaction pooler")
        # Whatever the other clients do at that moment: never taken for an address of sessions.
        for _ in range(100):
            with pytest.raises(Refused, match="transaction pooler"):
                Database(settings(address)).connect()
        time.sleep(0.3)  # whatever was left behind in a pooled session has met a client by now
    assert errors == []
    assert not clients or min(done) > 20
    with psycopg.connect(address, autocommit=True) as pool, psycopg.connect(dsn, autocommit=True) as direct:
        for name in ("search_path", "row_security", "jit", "lock_timeout", "idle_in_transaction_session_timeout"):
            assert one(pool, f"SHOW {name}") == one(direct, f"SHOW {name}"), name
        assert one(direct, "SELECT to_regnamespace('revector') IS NULL")
        assert one(direct, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


@pytest.mark.parametrize(("mode", "size"), [("statement", 4), ("session", 1)])
def test_one_that_gives_no_sessions_is_refused(pooled: Pooled, dsn: str, mode: str, size: int) -> None:
    address = pooled(mode, size=size)
    with application(address, 6 if mode == "statement" else 0) as (errors, _):
        said = refused(address, *PLAN)
    assert "pooler" in said and errors == []


def test_in_session_mode_it_works(pooled: Pooled, dsn: str) -> None:
    """Every client has a server session of its own: two are enough to find that out, a few more to migrate."""
    command(pooled("session", size=2), *PLAN).exits(0)
    command(pooled("session", size=20), "run", *PLAN[1:]).exits(0)
