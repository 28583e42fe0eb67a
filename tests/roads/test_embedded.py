"""The embedded server ends with its caller, however that ends, unless it was told to stay."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest

from revector import embedded
from revector.embedded import create_database, embedded_server
from revector.errors import Refused, UsageError

CALLER = """
import sys, time
from pathlib import Path
from revector.embedded import embedded_server
with embedded_server(keep=sys.argv[1] == "keep") as server:
    print(server.folder, server.dsn, server.how_to_stop.replace(chr(10), ";"), sep="\\t", flush=True)
    if sys.argv[1] == "keep":
        sys.exit()
    time.sleep(60)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the server's account can reach; pytest's own are closed to it when root runs the tests."""
    with TemporaryDirectory(prefix="rv-test-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name)


def answers(dsn: str) -> bool:
    try:
        psycopg.connect(dsn, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def wait_until_gone(path: Path) -> None:
    limit = time.monotonic() + 20
    while path.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    assert not path.exists()


def test_temporary_server_is_private_and_leaves_nothing() -> None:
    with embedded_server() as server:
        assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700
        dsn = create_database(server, 'an "odd" name/50%')
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
            row = connection.execute("SELECT current_database(), current_setting('listen_addresses')").fetchone()
            assert row == ('an "odd" name/50%', "")
        with pytest.raises(UsageError, match="cannot be made"):
            create_database(server, "postgres")
    assert not server.folder.exists()


def test_temporary_folder_goes_where_others_may_not_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with embedded_server() as server:
        assert server.folder.parent == folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("seconds", [0.2, 0.5, 0.8])
def test_nothing_is_left_by_a_caller_killed_while_it_starts(seconds: float, folder: Path) -> None:
    folder.chmod(0o777)
    environment = {**os.environ, "TMPDIR": str(folder)}
    command = [sys.executable, "-c", CALLER, "stop"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as caller:
        time.sleep(seconds)
        caller.kill()
    limit = time.monotonic() + 20
    while list(folder.rglob("*")) and time.monotonic() < limit:
        time.sleep(0.05)
    # Killed in the instant before the guard stands, it leaves its empty folder.
    assert [path for path in folder.rglob("*") if not path.is_dir()] == []


def test_folder_keeps_its_data_and_is_refused_while_it_is_in_use(folder: Path) -> None:
    place = folder / "it's a long, odd name" / ("x" * 80)  # too long for a socket: that goes elsewhere
    folder.joinpath(place.parent.name).mkdir(mode=0o755)
    with embedded_server(place, options={"work_mem": "7MB"}) as server:
        create_database(server, "kept")
        with pytest.raises(Refused, match="already runs in"), embedded_server(place):
            pass
        assert answers(server.dsn), "the refused second one must not stop the first"
    assert not answers(server.dsn)
    with embedded_server(place, options={"work_mem": "7MB"}) as server, psycopg.connect(server.dsn_of("kept")) as again:
        assert again.execute("SHOW work_mem").fetchone() == ("7MB",)


def test_folder_with_other_files_is_not_touched(folder: Path) -> None:
    folder.joinpath("letter.txt").write_text("mine")
    before = folder.stat().st_mode
    with pytest.raises(UsageError, match="holds other files"), embedded_server(folder):
        pass
    assert folder.stat().st_mode == before
    assert [entry.name for entry in folder.iterdir()] == ["letter.txt"]


def test_immediate_restart_is_a_crash_that_keeps_what_was_committed() -> None:
    with embedded_server() as server:
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute("CREATE TABLE t AS SELECT 1 AS a")
            server.restart("immediate")
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
        with psycopg.connect(server.dsn) as connection:
            assert connection.execute("SELECT a FROM t").fetchone() == (1,)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_server_ends_with_a_caller_that_is_killed(number: signal.Signals) -> None:
    command = [sys.executable, "-c", CALLER, "stop"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as caller:
        assert caller.stdout is not None
        place, dsn, _ = caller.stdout.readline().split("\t")
        assert answers(dsn)
        os.killpg(caller.pid, number)
    wait_until_gone(Path(place))
    assert not answers(dsn)


def test_kept_server_outlives_its_caller_and_stops_as_it_says() -> None:
    done = subprocess.run([sys.executable, "-c", CALLER, "keep"], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    place, dsn, how_to_stop = done.stdout.strip().split("\t")
    stop, remove = how_to_stop.split(";")
    try:
        assert answers(dsn)
    finally:
        subprocess.run(["/bin/sh", "-c", stop], check=True)
        wait_until_gone(Path(place) / "data" / "postmaster.pid")
        subprocess.run(["/bin/sh", "-c", remove], check=True)
    assert not Path(place).exists()


def test_programs_behind_a_closed_folder_are_copied_not_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root runs the server as another account")
    package = embedded.find_programs().parent.parent
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    closed.joinpath("site").mkdir()
    for name in (package.name, f"{package.name}.libs"):
        subprocess.run(["cp", "-r", package.parent / name, closed / "site" / name], check=True)
    programs = closed / "site" / package.name / embedded.find_programs().parent.name / "bin"
    monkeypatch.setattr(embedded, "find_programs", lambda: programs)
    with embedded_server() as server:
        assert answers(server.dsn)
        assert server.programs.is_relative_to(server.folder)
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert not server.folder.exists()


def test_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="is not installed") as caught, embedded_server():
        pass
    assert caught.value.hint == "pip install 'revector[embedded]'"
