"""The one door to PostgreSQL: sessions that pin their own ground, named SQL, bounded waits, error translation."""

from __future__ import annotations

import logging
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import chain
from typing import Any, Final, Literal, LiteralString, cast

import psycopg
from psycopg import errors as pg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.generators import execute as results_of
from psycopg.pq import ExecStatus
from psycopg.rows import namedtuple_row

from revector.errors import (
    Interrupted,
    KeyRejected,
    NotReady,
    PauseBudgetMissed,
    Refused,
    Resumable,
    RevectorError,
    ServerLost,
    UsageError,
)
from revector.settings import Settings

#: Every statement that a session sends, parameters left out, at DEBUG: what `-v` shows.
_LOG: Final = logging.getLogger("revector.sql")

#: Longest wait + hold of one attempt at a lock that stalls the application, in milliseconds.
PAUSE_BUDGET_MS: Final = 200
#: Attempts at such a lock, with gaps under 400 ms between them.
PAUSE_ATTEMPTS: Final = 5
#: What may be asked for: below the first no server answers, above the second it is no pause any more.
PAUSE_BUDGETS: Final = (10, 10_000)
PAUSE_ATTEMPTS_RANGE: Final = (1, 100)
#: So often the work under the lock may overrun the budget before it counts as too much for it: once may be chance.
_OVERRUNS: Final = 2
#: So much of a statement is shown in a message.
_SHOWN: Final = 100
#: How long SHARE UPDATE EXCLUSIVE is waited for: autovacuum gives way after deadlock_timeout (1 s).
_SETTLE: Final = "5s"
#: Looks at a pooler before it counts as one that gives each client a session of its own.
_LOOKS: Final = 8
_DIRECT: Final = "set DATABASE_URL to the direct (not pooled) address of the database"
#: SQLSTATEs that our own checks raise inside a message, with texts of ours.
DOUBT: Final = "RV001"
PENDING: Final = "RV002"

Lock = Literal["steer", "windows", "follower"]
#: First half of the two-part advisory key; the second half is the table's OID.
_LOCK_CLASS: Final[dict[Lock, int]] = {"steer": 0x72760001, "windows": 0x72760002, "follower": 0x72760003}

Mode = Literal["ACCESS SHARE", "SHARE UPDATE EXCLUSIVE", "ACCESS EXCLUSIVE"]
_STRONGEST: Final = "AccessExclusiveLock"
_STRONG: Final = ("ShareUpdateExclusiveLock", "ShareLock", "ShareRowExclusiveLock", "ExclusiveLock", _STRONGEST)
#: The lock that we ask for -> those, as pg_locks writes them, that keep it from us.
_CONFLICTS: Final[dict[Mode, tuple[str, ...]]] = {
    "ACCESS SHARE": (_STRONGEST,),
    "SHARE UPDATE EXCLUSIVE": _STRONG,
    "ACCESS EXCLUSIVE": ("AccessShareLock", "RowShareLock", "RowExclusiveLock", *_STRONG),
}

#: What every session of ours pins, whatever the role or the database sets as default.
#: row_security = off: a policy that hides rows becomes an error, not a smaller table.
_GROUND: Final = {
    "search_path": "pg_catalog, pg_temp",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "row_security": "off",
    "lock_timeout": "5s",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "5s",
    "standard_conforming_strings": "on",
    "extra_float_digits": "1",
    "jit": "off",
}


@dataclass(frozen=True, slots=True)
class PauseLimits:
    """What a short lock may cost the application: wait + hold of one attempt in ms, and how many attempts."""

    budget_ms: int = PAUSE_BUDGET_MS
    attempts: int = PAUSE_ATTEMPTS

    def __post_init__(self) -> None:
        for name, value, (low, high) in (
            ("the pause budget in ms", self.budget_ms, PAUSE_BUDGETS),
            ("the number of attempts", self.attempts, PAUSE_ATTEMPTS_RANGE),
        ):
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}; it must be {low} to {high}")


#: What holds where nobody says otherwise.
DEFAULT_LIMITS: Final = PauseLimits()


@dataclass(frozen=True, slots=True)
class Block:
    """One named SQL block of a `.sql` file."""

    name: str
    purpose: str
    lock: str
    text: LiteralString


@cache
def load_sql(name: str) -> dict[str, Block]:
    """Read the named blocks of `src/revector/<name>.sql`.

    A block starts with `-- name: x`, then a one-line purpose, then `-- lock: y`.
    """
    text = resources.files("revector").joinpath(f"{name}.sql").read_text(encoding="utf-8")
    blocks: dict[str, Block] = {}
    for part in re.split(r"^-- name: ", text, flags=re.MULTILINE)[1:]:
        title, purpose, lock, body = part.split("\n", 3)
        blocks[title.strip()] = Block(
            title.strip(),
            purpose.removeprefix("-- ").strip(),
            lock.removeprefix("-- lock: ").strip(),
            body.strip().removesuffix(";"),
        )
    return blocks


def block(file: str, name: str, /, **parts: sql.Composable) -> sql.Composed:
    """The block `name` of `file` with its `{placeholders}` filled by identifiers and composed SQL."""
    return sql.SQL(load_sql(file)[name].text).format(**parts)


def raw(text: str) -> sql.SQL:
    """SQL text that the server itself has printed or parsed alone (a deparsed expression, a type name)."""
    return sql.SQL(text)


def with_clause(parameters: Sequence[tuple[str, str]]) -> sql.Composable:
    """` WITH (name = value, ...)`, or nothing where an index has the server's defaults."""
    if not parameters:
        return sql.SQL("")
    pairs = (sql.SQL("{} = {}").format(sql.Identifier(name), sql.Literal(value)) for name, value in parameters)
    return sql.SQL(" WITH ({})").format(sql.SQL(", ").join(pairs))


class Session:
    """One connection of ours, in autocommit mode, on pinned ground."""

    def __init__(self, connection: psycopg.Connection[Any], user_path: str) -> None:
        self.connection = connection
        #: The search_path that the role and database give; the user's names and expressions resolve in it.
        self.user_path = user_path

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; its locks and temporary tables go with it."""
        self.connection.close()

    @property
    def pid(self) -> int:
        """The server process of this session."""
        return self.connection.info.backend_pid

    def rows(self, statement: sql.Composable | LiteralString, /, **params: object) -> Sequence[Any]:
        """Run one statement and return its rows as named tuples (none for a statement without a result)."""
        cursor = self._execute(statement, params)
        return cursor.fetchall() if cursor.description else ()

    def row(self, statement: sql.Composable | LiteralString, /, **params: object) -> Any | None:
        """The first row, or None."""
        cursor = self._execute(statement, params)
        return cursor.fetchone() if cursor.description else None

    def value(self, statement: sql.Composable | LiteralString, /, **params: object) -> Any:
        """The first column of the first row, or None."""
        row = self.row(statement, **params)
        return row[0] if row else None

    def alone(self, statement: sql.Composable) -> Any:
        """The first value of a statement that contains the user's own SQL: the extended protocol takes exactly one."""
        row = self.connection.execute(statement.as_string(self.connection), binary=True).fetchone()
        return row[0] if row else None

    def execute(self, statement: sql.Composable | LiteralString, /, **params: object) -> int:
        """Run one statement and return the number of rows it touched."""
        return self._execute(statement, params).rowcount

    def _execute(self, statement: sql.Composable | LiteralString, params: dict[str, object]) -> psycopg.Cursor[Any]:
        text = statement if isinstance(statement, str) else statement.as_string(self.connection)
        _LOG.debug("%s", text)
        if params:
            # A `%` of a user's name or expression is text, not a placeholder of ours.
            known = "|".join(map(re.escape, params))
            text = re.sub(rf"%(?!\((?:{known})\)[sbt])", "%%", text)
        return self.connection.execute(text, params or None, prepare=False)

    def message(self, statements: Sequence[sql.Composable]) -> list[Any]:
        """Send statements as one simple-protocol message; return the first row of each that returned rows.

        One message means that no round trip, and no death of this client, can lengthen the locks inside it.
        """
        text = sql.SQL(";\n").join(statements).as_string(self.connection)
        _LOG.debug("%s", text)
        cursor = self.connection.execute(text)
        rows: list[Any] = []
        while True:
            if cursor.description:
                rows.append(cursor.fetchone())
            if not cursor.nextset():
                return rows

    def outcome(self, statements: Sequence[sql.Composable]) -> tuple[list[str | None], psycopg.Error | None]:
        """Send one message as `message` does; the first value of each answer, as text, up to the error if there is one.

        A cursor forgets the answers that came before an error, and nothing public of psycopg gives them: hence
        `generators.execute` and `error_from_result`, which are not of its documented interface (3.2.0 to 3.3 have them).
        """
        text = sql.SQL(";\n").join(statements).as_string(self.connection)
        _LOG.debug("%s", text)
        self.connection.pgconn.send_query(text.encode())
        answers: list[str | None] = []
        for result in self.connection.wait(results_of(self.connection.pgconn)):
            if result.status == ExecStatus.FATAL_ERROR:
                return answers, pg.error_from_result(result)
            value = result.get_value(0, 0) if result.ntuples else None
            answers.append(None if value is None else value.decode())
        return answers, None

    @contextmanager
    def rolled_back(self) -> Iterator[None]:
        """After an error inside a message its end was not reached: no transaction stays open behind this block."""
        try:
            yield
        finally:
            if not self.connection.closed and self.connection.info.transaction_status != 0:
                self.connection.rollback()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction of this session (a savepoint inside another)."""
        with self.connection.transaction():
            yield

    def try_lock(self, lock: Lock, table: int, *, shared: bool = False) -> bool:
        """Take a session advisory lock of this table if it is free."""
        function = "pg_try_advisory_lock_shared" if shared else "pg_try_advisory_lock"
        return bool(
            self.value(
                sql.SQL("SELECT {}(%(class)s::int, %(table)s::oid::bigint::bit(32)::int)").format(
                    sql.Identifier(function)
                ),
                **{"class": _LOCK_CLASS[lock], "table": table},
            )
        )

    def wait_lock(self, lock: Lock, table: int, *, seconds: float) -> bool:
        """Take an exclusive session advisory lock, trying for so many seconds."""
        deadline = time.monotonic() + seconds
        while not self.try_lock(lock, table):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def unlock(self, lock: Lock, table: int, *, shared: bool = False) -> None:
        """Give a session advisory lock back."""
        function = "pg_advisory_unlock_shared" if shared else "pg_advisory_unlock"
        self.execute(
            sql.SQL("SELECT {}(%(class)s::int, %(table)s::oid::bigint::bit(32)::int)").format(sql.Identifier(function)),
            **{"class": _LOCK_CLASS[lock], "table": table},
        )

    def holder(self, lock: Lock, table: int) -> int | None:
        """The process id of the session that holds an advisory lock of this table, if any."""
        return cast(
            "int | None",
            self.value(
                "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2"
                " AND classid = %(class)s::bigint AND objid = %(table)s::oid"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) LIMIT 1",
                **{"class": _LOCK_CLASS[lock], "table": table},
            ),
        )


class Database:
    """Where the sessions come from. Holds the connection string; never prints it."""

    def __init__(self, settings: Settings) -> None:
        self._conninfo = settings.database_url.get_secret_value()
        self._checked_for_pooler = False

    def connect(self, purpose: str = "steer", **ground: str) -> Session:
        """Open a session on pinned ground; `ground` overrides or adds settings.

        Raises `ServerLost` (unreachable), `KeyRejected` (wrong password or role), `UsageError` (no such database).
        """
        try:
            connection: psycopg.Connection[Any] = psycopg.connect(
                self._conninfo,
                autocommit=True,
                prepare_threshold=None,
                row_factory=namedtuple_row,
                application_name=f"revector {purpose}",
                fallback_application_name="revector",
                connect_timeout=conninfo_to_dict(self._conninfo).get("connect_timeout", 10),
                client_encoding="utf8",
            )
        except psycopg.ProgrammingError:
            raise UsageError(
                "DATABASE_URL is not a connection string",
                why="Expected postgresql://user:password@host:5432/database, or libpq keywords such as 'dbname=x host=y'.",
                hint="correct DATABASE_URL in the environment or .env",
            ) from None
        except psycopg.OperationalError as error:
            raise _connect_error(error) from None
        try:
            return self._on_ground(connection, ground)
        except psycopg.OperationalError as error:
            connection.close()
            raise _connect_error(error) from None
        except BaseException:
            connection.close()
            raise

    def _on_ground(self, connection: psycopg.Connection[Any], ground: dict[str, str]) -> Session:
        """Pin a new connection's settings, once it is sure that they stay with us."""
        if connection.info.server_version < 150000:
            raise Refused(
                f"PostgreSQL {connection.info.parameter_status('server_version')} is too old: revector needs 15 or newer",
                why="Views without security_invoker (new in 15) would leak columns and bypass row level security.",
                hint="upgrade the server, or point DATABASE_URL at another",
            )
        # Before anything that a server session keeps: behind a pooler it would stay there, for the application.
        if not self._checked_for_pooler:
            self._refuse_pooler(connection)
            self._checked_for_pooler = True
        user_path = _one(connection, "SHOW search_path")
        settings = {**_GROUND, **ground}
        pairs = sql.SQL(", ").join(sql.SQL("({}, {})").format(name, value) for name, value in settings.items())
        connection.execute(
            sql.SQL("SELECT set_config(name, value, false) FROM (VALUES {}) AS v (name, value)").format(pairs)
        )
        return Session(connection, user_path)

    def _refuse_pooler(self, connection: psycopg.Connection[Any]) -> None:
        """Refuse a transaction pooler: session locks and settings would silently land in other sessions.

        A pooler hands out a process id of its own; when it differs from the server's, one second client that opens
        transactions shows whether the server session stays ours. A pooler gives the session that came back last or
        first: asked both while the other is in its transaction and just after, one of us meets another one. Several
        times, for under load other clients come between.
        """
        first = _one(connection, "SELECT pg_backend_pid()")
        if first == connection.info.backend_pid:
            return
        try:
            with psycopg.connect(
                self._conninfo,
                row_factory=namedtuple_row,
                prepare_threshold=None,
                application_name="revector steer",
                connect_timeout=conninfo_to_dict(self._conninfo).get("connect_timeout", 10),
            ) as other:
                for _ in range(_LOOKS):
                    shared = _one(other, "SELECT pg_backend_pid()") == first
                    during = not shared and _one(connection, "SELECT pg_backend_pid()")
                    other.rollback()
                    if shared or (during, _one(connection, "SELECT pg_backend_pid()")) != (first, first):
                        raise Refused(
                            "this address is a transaction pooler",
                            why="revector holds session locks and settings, which a transaction pooler hands to other"
                            " clients. Nothing was changed.",
                            hint=_DIRECT,
                        )
        except psycopg.Error as error:
            raise Refused(
                "this address is a pooler that gives revector no sessions of its own",
                why=f"It said: {_first_line(error)}. revector needs several sessions at once, with transactions in them."
                " Nothing was changed.",
                hint=_DIRECT,
            ) from error

    def pause(
        self,
        session: Session,
        table: sql.Composable,
        statements: Sequence[sql.Composable],
        *,
        settle: bool = False,
        checks: Sequence[sql.Composable] = (),
        alone: bool = False,
        views: Sequence[sql.Composable] = (),
        budget_ms: int = PAUSE_BUDGET_MS,
        attempts: int = PAUSE_ATTEMPTS,
        observe: Callable[[str], None] = lambda _: None,
    ) -> Pause:
        """Run `statements` under ACCESS EXCLUSIVE on `table` within the pause budget, or change nothing.

        With `settle`, SHARE UPDATE EXCLUSIVE is taken first (it cancels autovacuum and blocks nobody) and kept
        between attempts. Then come `checks`, those of the statements that only look: what the server must load to
        answer them (PL/pgSQL, pgvector, rows of the catalog) is not loaded under the lock. `alone` leaves out the
        partitions of a partitioned table. `views` of the table are locked before it, in the order of those who write
        through them. Work that needs more than the budget by itself is not tried more than twice.
        Raises `PauseBudgetMissed`.
        """
        whole = sql.SQL("ONLY {}" if alone else "{}").format(table)
        begin: list[sql.Composable] = [
            sql.SQL("BEGIN"),
            sql.SQL("SET LOCAL idle_in_transaction_session_timeout = '2s'"),
        ]
        if settle:
            begin += [
                sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(_SETTLE)),
                sql.SQL("LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE").format(whole),
            ]
        begin += checks
        lock = sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(sql.SQL(", ").join([*views, whole]))
        with session.rolled_back():
            try:
                session.message(begin)
            except pg.LockNotAvailable:
                session.connection.rollback()
                raise PauseBudgetMissed(
                    f"SHARE UPDATE EXCLUSIVE on {table.as_string(None)} was not to be had within {_SETTLE}",
                    why=f"VACUUM, CREATE INDEX or other DDL holds the table; nobody waited for us."
                    f" {in_the_way(session, 'SHARE UPDATE EXCLUSIVE', [table])}",
                ) from None
            return in_attempts(
                session,
                [lock],
                statements,
                limits=PauseLimits(budget_ms, attempts),
                begin=sql.SQL("SAVEPOINT attempt"),
                undo=sql.SQL("ROLLBACK TO attempt"),
                busy="the table",
                locked=[table, *views],
                observe=observe,
            )


def in_attempts(
    session: Session,
    locks: Sequence[sql.Composable],
    work: Sequence[sql.Composable],
    *,
    limits: PauseLimits,
    begin: sql.Composable,
    undo: sql.Composable,
    busy: str,
    locked: Sequence[sql.Composable],
    read: Sequence[sql.Composable] = (),
    observe: Callable[[str], None],
) -> Pause:
    """Take `locks` and do `work` under them within the pause budget, so often as `limits` allow, or change nothing.

    Each attempt, `begin` to COMMIT, is one message; `undo` ends one that failed. The statements share the budget: a
    lock_timeout alone would grant all of it to each. Without `locks` nobody can wait for us: then it is only the limit
    of our own waiting. `busy` is what `locks` are on and `locked` its names; the work itself reads `read`.
    Raises `PauseBudgetMissed`.
    """
    budget_ms, attempts = limits.budget_ms, limits.attempts
    clock = sql.SQL("SELECT 1000 * extract(epoch FROM clock_timestamp())")
    opened = [begin, sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(f"{budget_ms}ms"))]
    before = [*opened, clock, *(part for lock in locks for part in (left_of(budget_ms), lock)), clock]
    under = [[_left_for_work(budget_ms), statement] if locks else [statement] for statement in work]
    attempt = [*before, *chain.from_iterable(under), clock, sql.SQL("COMMIT")]
    why, overruns, cut, waited_inside = "", 0, list[PauseBudgetMissed](), False
    for number in range(1, attempts + 1):
        sent = time.monotonic()
        answers, error = session.outcome(attempt)
        total = (time.monotonic() - sent) * 1000
        done = len(answers) - len(before)
        had = float(answers[len(before) - 1] or 0) if done >= 0 else 0
        wait = had - float(answers[len(opened)] or 0) if done >= 0 else total
        if error is None:
            return Pause(total, wait, float(answers[-2] or 0) - had, number)
        if not isinstance(error, pg.LockNotAvailable) and not (locks and isinstance(error, pg.QueryCanceled)):
            raise error
        session.message([undo])
        # The closing clock may be cut off as well.
        step = min(done // (2 if locks else 1) + 1, len(work))
        if done < 0:
            why = in_the_way(session, "ACCESS EXCLUSIVE", locked)
            told = f"{busy} was busy for {total:.0f} ms. {why}"
        elif isinstance(error, pg.LockNotAvailable):
            waited_inside = True
            waiting = " ".join(work[step - 1].as_string(session.connection).split())
            holders = in_the_way(session, "ACCESS SHARE", read)
            why = f"Another transaction held what this waits for: {waiting[:_SHOWN]}. {holders}"
            told = f"statement {step} of {len(work)} waited for a lock. {why}"
            if locks:
                told = f"the lock was had after {wait:.0f} ms, {told}"
        else:
            # Nearly all of the budget went into the work itself: no quieter moment will make it fit.
            alone = wait < budget_ms / 10 and total - wait > 0.8 * budget_ms
            cut.append(_too_much(wait, total - wait, budget_ms, step, len(work), alone=alone))
            overruns += alone
            if overruns == min(_OVERRUNS, attempts):
                raise cut[-1]
            told = f"the lock was had after {wait:.0f} ms, the work under it did not fit in the rest of {budget_ms} ms"
        observe(f"attempt {number} of {attempts}: {told}")
        if number < attempts:
            time.sleep(random.uniform(0.1, 0.35))
    if len(cut) == attempts:
        raise cut[-1]
    if cut:
        raise PauseBudgetMissed(
            f"no attempt of {attempts} was done within {budget_ms} ms; {len(cut)} of them got the lock and not all work done",
            why=f"{cut[-1].why} The others: {why}",
            fits_ms=cut[-1].fits_ms,
        )
    what = "all its locks" if waited_inside and locks else "the lock"
    raise PauseBudgetMissed(f"no attempt of {attempts} got {what} within {budget_ms} ms", why=why)


def _too_much(
    wait_ms: float, worked_ms: float, budget_ms: int, step: int, of: int, *, alone: bool
) -> PauseBudgetMissed:
    """What is said of an attempt that had the lock and was cut off in statement `step` of its work.

    The budget that is named is what all of them need at that pace, rounded up, with room for a wait and for slower ones.
    `alone`: the wait for the lock took next to nothing of the budget.
    """
    needed = max(2 * budget_ms, wait_ms + 1.5 * worked_ms * of / step)
    unit = 10 ** math.floor(math.log10(needed))
    largest = budget_ms == PAUSE_BUDGETS[1]
    larger = f"a larger budget does{', but none is allowed' if largest else ''}"
    return PauseBudgetMissed(
        f"the lock was had after {wait_ms:.0f} ms, but the work under it needs more than"
        f" {'' if alone else 'what that left of '}the budget of {budget_ms} ms",
        why=f"In {worked_ms:.0f} ms it came to statement {step} of {of}: "
        + (
            f"more attempts would not help, {larger}. Many partitions or indexes make it long. Nothing changed."
            if alone
            else f"a quieter moment helps, and {larger}. Nothing changed."
        ),
        fits_ms=None if largest else min(math.ceil(needed / unit) * unit, PAUSE_BUDGETS[1]),
    )


def in_the_way(session: Session, mode: Mode, relations: Sequence[sql.Composable]) -> str:
    """Who kept this lock on one of `relations` from us, as far as this role may see."""
    parts = {"modes": list(_CONFLICTS[mode]), "relations": [part.as_string(session.connection) for part in relations]}
    try:
        with session.transaction():
            holders = session.rows(block("db", "holders", **{name: sql.Literal(part) for name, part in parts.items()}))
    except psycopg.Error:
        holders = ()
    for row in holders:
        if row.wraparound:
            return f"{row.who}: such a VACUUM does not give way. Nothing changed; wait for its end."
    if holders:
        return f"In the way: {'; '.join(row.who for row in holders)}. Nothing changed."
    if mode == "ACCESS SHARE":
        return "Nothing changed."
    return "Another transaction held the table: a long statement, an open transaction or VACUUM. Nothing changed."


def left_of(budget_ms: int) -> sql.Composable:
    """What is left of the budget since the message arrived becomes the limit of the next statement.

    Nothing left is the end (QueryCanceled): else many short statements would each have their millisecond.
    """
    return sql.SQL("SELECT {} FROM ({}) AS rest").format(_LIMIT, _left(budget_ms))


def _left_for_work(budget_ms: int) -> sql.Composable:
    """As `left_of`, and a lock that the statement waits for from its beginning is given up a tenth earlier.

    So it ends as LockNotAvailable: after QueryCanceled nobody can tell waiting from working.
    """
    return sql.SQL("SELECT {}, set_config('lock_timeout', greatest(1, ms - {})::text, true) FROM ({}) AS rest").format(
        _LIMIT, sql.Literal(max(1, budget_ms // 10)), _left(budget_ms)
    )


_LIMIT: Final = sql.SQL(
    "CASE WHEN ms < 1 THEN pg_cancel_backend(pg_backend_pid())::text"
    " ELSE set_config('statement_timeout', ms::text, true) END"
)


def _left(budget_ms: int) -> sql.Composable:
    return sql.SQL(
        "SELECT ({} - 1000 * extract(epoch FROM clock_timestamp() - statement_timestamp()))::int AS ms"
    ).format(sql.Literal(budget_ms))


@dataclass(frozen=True, slots=True)
class Pause:
    """What one short lock cost."""

    #: Sending to commit as this client saw it, in ms: the upper bound of what anyone waited for us.
    total_ms: float
    #: Waiting for the lock, in ms, by the server's clock.
    wait_ms: float
    #: Holding it up to the commit, in ms, by the server's clock.
    hold_ms: float
    #: Which attempt succeeded.
    attempt: int


def _one(connection: psycopg.Connection[Any], query: LiteralString) -> Any:
    row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def _connect_error(error: psycopg.OperationalError) -> RevectorError:
    text = str(error)
    target = "set DATABASE_URL in the environment or .env, or libpq's PGHOST, PGPORT, PGUSER, PGDATABASE"
    if re.search(
        r"password authentication failed|no password supplied|authentication failed|no pg_hba.conf entry", text
    ):
        return KeyRejected(
            "the database rejected the user or the password", why="Nothing was read or changed.", hint=target
        )
    if match := re.search(r'(database|role) "([^"]*)" does not exist', text):
        return UsageError(f"{match[1]} {match[2]!r} does not exist on this server", hint=target)
    reason = re.sub(r"(password|user)=\S+", r"\1=***", " ".join(text.split()))
    return ServerLost(
        "the database cannot be reached", why=f"libpq says: {reason}", hint=f"start the server, or {target}"
    )


@contextmanager
def translated(command: str = "") -> Iterator[None]:
    """Turn PostgreSQL's errors into ours where we can say something better; `command` is the next one to give."""
    again = command and f"the same command again: {command}"
    try:
        yield
    except Resumable as error:
        if isinstance(error, PauseBudgetMissed) and error.fits_ms:
            again = again and f"{again} --max-pause-ms {error.fits_ms}"
        error.hint = error.hint or again
        raise
    except KeyboardInterrupt:
        raise Interrupted(why="Nothing is lost.", hint=again) from None
    except (pg.AdminShutdown, pg.CrashShutdown, pg.CannotConnectNow, pg.IdleInTransactionSessionTimeout) as error:
        raise ServerLost("the database went away", why=_first_line(error), hint=again) from error
    except (pg.LockNotAvailable, pg.DeadlockDetected, pg.QueryCanceled) as error:
        raise PauseBudgetMissed(why=_first_line(error), hint=again) from error
    except (pg.DiskFull, pg.OutOfMemory, pg.TooManyConnections) as error:
        raise ServerLost(f"the server is out of resources: {_first_line(error)}", hint=again) from error
    except pg.DependentObjectsStillExist as error:
        raise Refused(
            _first_line(error),
            why=f"{(error.diag.message_detail or 'Something hangs on it').rstrip('.')}. Nothing of this step was changed.",
            hint=f"drop what depends on it, then {again or 'the same command again'}",
        ) from error
    except pg.InsufficientPrivilege as error:
        raise Refused(
            f"missing right: {_first_line(error)}",
            why="Nothing of this step was changed.",
            hint="run as the table's owner; it may need the role that owns schema revector: GRANT that role TO this one",
        ) from error
    except psycopg.Error as error:
        if error.sqlstate in (DOUBT, PENDING):
            raise NotReady(_first_line(error), why="Nothing was changed.", hint=again) from error
        if error.sqlstate is None or error.sqlstate.startswith(("08", "57")):
            raise ServerLost("the connection to the database was lost", why=_first_line(error), hint=again) from error
        raise


def _first_line(error: psycopg.Error) -> str:
    return (error.diag.message_primary or str(error).strip() or type(error).__name__).splitlines()[0]
