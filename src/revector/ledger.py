"""The ledger in schema `revector`: stages and transitions, generations, windows, failures, heartbeats, events."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from psycopg import errors as pg
from psycopg import sql
from psycopg.types.json import Jsonb

from revector.db import Session, block
from revector.embed.spec import Identity
from revector.errors import (
    BudgetSpent,
    GateFailed,
    LedgerUnreadable,
    ModelChanged,
    NotReady,
    Outage,
    PauseBudgetMissed,
    Refused,
    RevectorError,
    UsageError,
)
from revector.plan import ExposedView, Plan, TargetIndex
from revector.throttle import Tuning

#: The ledger version that this program writes. Version n is reached by the block `upgrade_to_<n>` of ledger.sql.
VERSION: Final = 2
#: Key of the transaction lock under which the ledger is created and upgraded.
_LEDGER_LOCK: Final = 0x72760000


class Stage(StrEnum):
    """What has been proven true so far."""

    PLANNED = "PLANNED"
    EXPANDED = "EXPANDED"
    BACKFILLED = "BACKFILLED"
    INDEXED = "INDEXED"
    VERIFIED = "VERIFIED"
    SERVED = "SERVED"
    CUT_OVER = "CUT_OVER"
    FINALIZED = "FINALIZED"
    ABORTED = "ABORTED"

    @property
    def closed(self) -> bool:
        """Whether the migration is over."""
        return self in (Stage.FINALIZED, Stage.ABORTED)

    def reached(self, other: Stage) -> bool:
        """Whether `other` is proven already (on the way forward)."""
        return _ORDER.index(self) >= _ORDER.index(other)


_ORDER = [
    Stage.PLANNED, Stage.EXPANDED, Stage.BACKFILLED, Stage.INDEXED, Stage.VERIFIED, Stage.SERVED, Stage.CUT_OVER,
    Stage.FINALIZED, Stage.ABORTED,
]  # fmt: skip

#: command -> the stages from which it may be given.
TRANSITIONS: Final[dict[str, tuple[Stage, ...]]] = {
    "run": (Stage.PLANNED, Stage.EXPANDED, Stage.BACKFILLED, Stage.INDEXED, Stage.VERIFIED, Stage.SERVED),
    "cutover": (Stage.VERIFIED, Stage.SERVED),
    "rollback": (Stage.CUT_OVER,),
    "abort": (Stage.PLANNED, Stage.EXPANDED, Stage.BACKFILLED, Stage.INDEXED, Stage.VERIFIED, Stage.SERVED),
    "finalize": (Stage.CUT_OVER,),
}

#: stage -> the command that leads on.
NEXT: Final[dict[Stage, str]] = {
    Stage.PLANNED: "run",
    Stage.EXPANDED: "run",
    Stage.BACKFILLED: "run",
    Stage.INDEXED: "run",
    Stage.VERIFIED: "cutover",
    Stage.SERVED: "cutover",
    Stage.CUT_OVER: "finalize",
    Stage.FINALIZED: "plan",
    Stage.ABORTED: "plan",
}


@dataclass(frozen=True, slots=True)
class LiveGeneration:
    """A registered live generation."""

    number: int
    attnum: int
    text: str
    model: Identity
    column: str
    #: The condition of the rows that it is of; None: all of them.
    filter: str | None


@dataclass(frozen=True, slots=True)
class MigrationRow:
    """One migration as the ledger holds it."""

    id: int
    table_oid: int
    plan: Plan
    fingerprint: str
    stage: Stage
    closing: str | None
    batch_size: int
    verified: dict[str, Any] | None
    facts: dict[str, Any]
    limits: Tuning
    opened: datetime
    changed: datetime

    @property
    def refreshing(self) -> bool:
        """Whether the candidate's vectors are still to be compared with their texts, as `restore --refresh` asked."""
        return bool(self.facts.get("refresh"))

    @property
    def next(self) -> str:
        """The command that leads on."""
        return self.closing or ("run" if self.refreshing and self.stage in TRANSITIONS["run"] else NEXT[self.stage])

    @property
    def standing(self) -> str:
        """In one sentence: how far it is, and which model answers."""
        answering = self.plan.new if self.stage in (Stage.CUT_OVER, Stage.FINALIZED) else self.plan.old
        return f"The migration is at {self.stage}; {answering.model.model} answers."

    def explain(self, error: RevectorError, command: str) -> None:
        """Complete what a model's failure, or a lock that was not taken, says: what is true now, and the next command."""
        told = (UsageError, GateFailed, ModelChanged, NotReady, Outage, BudgetSpent, PauseBudgetMissed)
        if not isinstance(error, told) or self.stage.closed:
            return
        if "answers" not in error.why:
            error.why = f"{error.why} {self.standing}".strip()
        if "revector " not in error.hint or "revector tune" in error.hint:
            error.hint = f"{error.hint}\nthen the same command again: {command}".strip()


@dataclass(frozen=True, slots=True)
class SavedGeneration:
    """A backup table that a closed migration made; its plan's old generation is what it holds."""

    plan: Plan
    oid: int
    #: Its name when it was made, and now; None: it is gone.
    name: str
    present: str | None
    complete: bool
    columns: frozenset[str]


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the log."""

    id: int
    at: datetime
    who: str
    step: str
    figures: dict[str, Any]
    migration: int | None


@dataclass(frozen=True, slots=True)
class Failure:
    """A text that a model refuses."""

    text_hash: int
    kind: str
    error: str


@dataclass(frozen=True, slots=True)
class Vigil:
    """A follower that lives."""

    host: str
    pid: int
    #: Whether it fills rows; one that stands by, or is in trouble, does not.
    active: bool
    filled: int
    #: Seconds that the oldest pending row that it knows has been waiting.
    oldest: float
    #: What keeps it from its work.
    trouble: str | None


def exists(session: Session) -> bool:
    """Whether this database has a ledger. Raises `LedgerUnreadable` where it is another role's."""
    row = session.row(block("ledger", "present"))
    if row is not None and not row.readable:
        give = f"as {row.owner}, or as a superuser: GRANT {row.owner} TO {row.role}"
        if row.super:  # membership in a superuser is no right to hand out
            owned = ["SCHEMA revector", *(f"TABLE {table.name}" for table in session.rows(block("ledger", "tables")))]
            statements = [
                *(["CREATE ROLE revector_ledger"] if row.unnamed else []),
                *(f"ALTER {what} OWNER TO revector_ledger" for what in owned),
                f"GRANT revector_ledger TO {row.role}",
            ]
            give = "as a superuser:" + "".join(f"\n  {statement};" for statement in statements)
        raise LedgerUnreadable(
            f"role {row.role} may not read revector's ledger in this database: it belongs to role {row.owner}",
            why="All tables of a database share the ledger, schema revector. Nothing was changed.",
            hint=give,
        )
    return row is not None


def version(session: Session) -> int | None:
    """The version of this database's ledger; None: there is none."""
    return int(session.value(block("ledger", "version"))) if exists(session) else None


def require(session: Session) -> None:
    """Refuse a ledger that a newer program has upgraded."""
    present = version(session)
    if present is not None and present > VERSION:
        raise Refused(
            f"the ledger in this database has version {present}; this program knows {VERSION}",
            why="A newer revector has upgraded it. Nothing was changed.",
            hint="pip install --upgrade revector",
        )


def ensure(session: Session, upgrades: Sequence[sql.Composable] = ()) -> None:
    """Create the ledger, or upgrade it to this program's version, in one transaction.

    `upgrades` are statements beyond those that this program knows, one a version.
    """
    steps = [*(block("ledger", f"upgrade_to_{number}") for number in range(2, VERSION + 1)), *upgrades]
    target = 1 + len(steps)
    with session.transaction():
        session.execute("SELECT pg_advisory_xact_lock(%(key)s)", key=_LEDGER_LOCK)
        present = version(session)
        if present is None:
            try:
                session.message([block("ledger", "create")])
            except pg.DuplicateSchema:
                raise Refused(
                    "this database has a schema named revector that is not ours",
                    why="The ledger needs that name. Nothing was changed.",
                    hint="rename that schema",
                ) from None
            present = 1
        if present > target:
            require(session)
        for number in range(present + 1, target + 1):
            session.execute(steps[number - 2])
            session.execute(block("ledger", "set_version"), version=number)


class Ledger:
    """The ledger of one table, through one session."""

    def __init__(self, session: Session, table: int) -> None:
        self.session = session
        self.table = table
        #: Id of the migration that events belong to; None before there is one.
        self.migration: int | None = None

    def _rows(self, name: str, /, **params: object) -> Sequence[Any]:
        return self.session.rows(block("ledger", name), **params)

    def _run(self, name: str, /, **params: object) -> None:
        self.session.execute(block("ledger", name), **params)

    def live(self, column: str | None = None) -> LiveGeneration | None:
        """The live generation (of that vector column), if there is exactly one."""
        found = self.lives(column)
        return found[0] if len(found) == 1 else None

    def lives(self, column: str | None = None) -> list[LiveGeneration]:
        """Every live generation (of that vector column); several, where each is of its own rows or column."""
        return [
            LiveGeneration(r.number, r.attnum, r.text_given, Identity.from_json(r.model), r.column_name, r.filter)
            for r in self._rows("live", table=self.table, column=column)
        ]

    def latest(self) -> MigrationRow | None:
        """The open migration, else the last closed one."""
        rows = self._rows("opened", table=self.table)
        if not rows:
            return None
        row = rows[0]
        self.migration = row.id
        told = {"plan": Plan.from_json(row.plan), "stage": Stage(row.stage), "limits": Tuning.from_json(row.limits)}
        return MigrationRow(**{**row._asdict(), **told})

    def next_number(self) -> int:
        """The number of the next generation."""
        return int(self._rows("next_number", table=self.table)[0].number)

    def attnum(self, number: int) -> int | None:
        """The attribute number of a generation's column."""
        rows = self._rows("attnum", table=self.table, number=number)
        return rows[0].attnum if rows else None

    def registered(self) -> bool:
        """Whether the table has, or had, any generation."""
        return self.next_number() > 2 or bool(self.lives())

    def register(
        self, number: int, attnum: int | None, text: str, model: Identity, *, live: bool, where: str | None = None
    ) -> None:
        """Remember a generation."""
        self._run(
            "register",
            table=self.table,
            number=number,
            attnum=attnum,
            text=text,
            model=Jsonb(model.to_json()),
            live=live,
            filter=where,
        )

    def want_index(self, number: int, index: TargetIndex | None) -> None:
        """Remember an index that a generation is to have once it has rows; None: it is there, or not wanted any more."""
        self._run("want_index", table=self.table, number=number, index=Jsonb(asdict(index)) if index else None)

    def wanted_index(self, number: int) -> TargetIndex | None:
        """The index that a generation still waits for."""
        rows = self._rows("wanted_index", table=self.table, number=number)
        if not rows:
            return None
        told = rows[0].wanted_index
        return TargetIndex(**{**told, "parameters": tuple((name, value) for name, value in told["parameters"])})

    def open(self, plan: Plan, batch_size: int, rate: float | None) -> MigrationRow:
        """Open a migration at PLANNED, and register its live generation; `rate`: documents a second, as measured."""
        with self.session.transaction():
            attnum = self.session.value(
                "SELECT attnum FROM pg_attribute WHERE attrelid = %(table)s::oid AND attname = %(name)s AND NOT attisdropped",
                table=self.table,
                name=plan.column,
            )
            self.register(plan.old.number, attnum, plan.text, plan.old.model, live=True, where=plan.filter)
            self.migration = self._rows(
                "open",
                table=self.table,
                plan=Jsonb(plan.to_json()),
                fingerprint=plan.fingerprint(),
                batch_size=batch_size,
            )[0].id
            if rate:
                self.remember(rate=rate)
            self.event(
                "plan", {"old": plan.old.model.model, "new": plan.new.model.model, "fingerprint": plan.fingerprint()}
            )
        row = self.latest()
        assert row is not None
        return row

    def settle(self, plan: Plan, batch_size: int) -> None:
        """Record consents given later, and the batch size."""
        self._run("settle", migration=self.migration, plan=Jsonb(plan.to_json()), batch_size=batch_size)

    def tune(self, step: str, limits: dict[str, Any], batch_size: int | None = None) -> None:
        """Set limits, forget those given as None, and say so in the events; workers read it within a second."""
        with self.session.transaction():
            self.session.execute(
                block("throttle", "tune"), migration=self.migration, limits=Jsonb(limits), batch_size=batch_size
            )
            self.event(step, limits | ({"batch_size": batch_size} if batch_size else {}))

    def hot(self) -> tuple[int, int]:
        """(rows, HOT updates among them) of the windows that are done."""
        row = self._rows("hot", migration=self.migration)[0]
        return row.written, row.hot

    def unswept(self) -> tuple[float, int | None]:
        """(share of the blocks that the first pass has not seen, rows pending when it began; None: not known)."""
        row = self._rows("unswept", migration=self.migration)[0]
        return row.share, row.rows

    def remember(self, **facts: object) -> None:
        """Keep facts that later steps need."""
        self._run("remember", migration=self.migration, facts=Jsonb(facts))

    def event(self, step: str, figures: dict[str, Any] | None = None) -> None:
        """Append an event."""
        self._run("event", table=self.table, migration=self.migration, step=step, figures=Jsonb(figures or {}))

    def record(self, step: str, figures: dict[str, Any], stage: str | None = None) -> None:
        """Append a step's event and, with it, the stage that it proves."""
        with self.session.transaction():
            if stage:
                self._run("advance", migration=self.migration, stage=stage)
            self.event(step, figures)

    def record_sql(
        self, step: str, figures: dict[str, Any], stage: str | None = None, closing: str | None = None
    ) -> list[sql.Composable]:
        """What `record` does, as statements for a message that also holds the effect."""
        statements: list[sql.Composable] = []
        if stage or closing:
            assert self.migration is not None
            statements.append(
                sql.SQL(
                    "UPDATE revector.migrations SET stage = coalesce({}, stage), closing = {}, changed = now() WHERE id = {}"
                ).format(sql.Literal(stage), sql.Literal(closing), sql.Literal(self.migration))
            )
        statements.append(
            sql.SQL(
                "INSERT INTO revector.events (table_oid, migration, step, figures) VALUES ({}::oid, {}, {}, {})"
            ).format(
                sql.Literal(self.table), sql.Literal(self.migration), sql.Literal(step), sql.Literal(Jsonb(figures))
            )
        )
        return statements

    def guard_sql(self, stages: Iterable[str], closing: str | None = None) -> sql.Composable:
        """A statement that fails unless the migration is still where this command saw it."""
        assert self.migration is not None
        body = sql.SQL(
            "BEGIN IF NOT EXISTS (SELECT FROM revector.migrations"
            " WHERE id = {} AND stage = ANY ({}) AND closing IS NOT DISTINCT FROM {})"
            " THEN RAISE EXCEPTION 'another command has moved this migration on' USING ERRCODE = 'RV001'; END IF; END"
        ).format(sql.Literal(self.migration), sql.Literal(list(map(str, stages))), sql.Literal(closing))
        return sql.SQL("DO {}").format(sql.Literal(body.as_string(self.session.connection)))

    def own(self, kind: str, name: str, oid: int, generation: int | None = None) -> None:
        """Remember an object as ours."""
        self._run("own", migration=self.migration, kind=kind, name=name, oid=oid, generation=generation)

    def disown(self, kind: str, name: str) -> None:
        """Forget an object."""
        self._run("disown", migration=self.migration, kind=kind, name=name)

    def owned(self) -> dict[tuple[str, str], int]:
        """The objects that are ours: (kind, name) -> OID."""
        if self.migration is None:
            return {}
        return {(r.kind, r.name): r.oid for r in self._rows("owned", migration=self.migration)}

    def backups(self) -> list[SavedGeneration]:
        """The backup tables that closed migrations of this table left, newest first, dropped ones included."""
        return [
            SavedGeneration(Plan.from_json(r.plan), r.oid, r.name, r.present, r.complete, frozenset(r.columns))
            for r in self._rows("backups", table=self.table)
        ]

    def views(self) -> dict[int, ExposedView]:
        """Generation number -> its view, for those that have one."""
        return {r.number: ExposedView(**r._asdict()) for r in self._rows("views", table=self.table)}

    def own_view_sql(self, number: int, schema: str, view: str, migration: int | None) -> sql.Composable:
        """A statement that remembers a view and its schema as ours; `migration`: the open one, None: it outlives them."""
        told = {"table": self.table, "number": number, "schema": schema, "view": view, "migration": migration}
        return block("ledger", "own_view", **{name: sql.Literal(value) for name, value in told.items()})

    def disown_view_sql(self, number: int) -> sql.Composable:
        """A statement that forgets a view."""
        return block("ledger", "disown_view", table=sql.Literal(self.table), number=sql.Literal(number))

    def events(self, limit: int = 1000) -> list[Event]:
        """The table's events, oldest first."""
        return [Event(**r._asdict()) for r in reversed(self._rows("events", table=self.table, limit=limit))]

    def make_windows(self, sweep: int, relation: int, blocks: int, end: int) -> None:
        """Cut blocks 0..end of a leaf into windows."""
        self._run("make_windows", migration=self.migration, sweep=sweep, relation=relation, blocks=blocks, end=end)

    def cut(self, sweep: int) -> frozenset[int]:
        """The leaves that a sweep has cut into windows, by OID."""
        return frozenset(row.relation for row in self._rows("cut", migration=self.migration, sweep=sweep))

    def release_leases(self) -> None:
        """Give back leases of processes that no longer live."""
        self._run("release_leases", migration=self.migration)

    def failures(self, generation: int) -> dict[int, Failure]:
        """The texts that this generation's model refuses, by hash."""
        rows = self._rows("failed", migration=self.migration, generation=generation)
        return {r.text_hash: Failure(r.text_hash, r.kind, r.error) for r in rows}

    def unsettled(self, generation: int) -> str | None:
        """The transaction of the last swap, while rows that were pending then may still be pending."""
        rows = self._rows("unsettled", table=self.table, number=generation)
        return rows[0].swapped if rows else None

    def settle_swap(self, swapped: str) -> None:
        """Say that every row which was pending at this swap has been met since."""
        self._run("settle_swap", table=self.table, swapped=swapped)

    def note_write(self, generation: int, version: str) -> bool:
        """Remember that an application has written a generation; `version`: xmin of the newest row that shows it.

        False while the row may have been pending at the last swap: under the old names its writer was the other side.
        """
        statement = block("ledger", "note_write")
        told = {"table": self.table, "number": generation, "version": version}
        return self.session.execute(statement, **told) > 0

    def writes(self) -> dict[int, tuple[float | None, float | None]]:
        """Generation number -> seconds since an application last wrote it, and since the last swap; None: never."""
        rows = self._rows("activity", table=self.table, migration=self.migration)
        return {r.number: (r.written, r.swapped) for r in rows}

    def fail(self, generation: int, text_hash: int, kind: str, error: str) -> None:
        """Record a text that a model refuses."""
        self._run(
            "fail", migration=self.migration, generation=generation, text_hash=text_hash, kind=kind, error=error[:500]
        )

    def lease(self, sweep: int, holder: str) -> tuple[int, int, int] | None:
        """Take the next free window: its leaf, its first block and the one after its last."""
        rows = self._rows("lease", migration=self.migration, sweep=sweep, holder=holder)
        return (rows[0].relation, rows[0].lo, rows[0].hi) if rows else None

    def beat_leases(self, holder: str) -> None:
        """Say that this holder's windows are being worked on."""
        self._run("beat_leases", migration=self.migration, holder=holder)

    def window_done(self, sweep: int, relation: int, lo: int, written: int, hot: int) -> None:
        """A window is written."""
        self._run(
            "window_done",
            migration=self.migration,
            sweep=sweep,
            relation=relation,
            lo=lo,
            written=written,
            hot=hot,
        )

    def expand_sql(self, plan: Plan) -> list[sql.Composable]:
        """The candidate and the objects that expand made, as statements for the same message."""
        table, migration = sql.Literal(plan.table_oid), sql.Literal(self.migration)
        functions = sql.Literal(list(plan.functions))
        return [
            sql.SQL(
                "INSERT INTO revector.generations (table_oid, number, attnum, text_given, model, live, filter)"
                " SELECT attrelid, {}, attnum, {}, {}, false, {} FROM pg_attribute WHERE attrelid = {}::oid AND attname = {}"
            ).format(
                sql.Literal(plan.new.number),
                sql.Literal(plan.text),
                sql.Literal(Jsonb(plan.new.model.to_json())),
                sql.Literal(plan.filter),
                table,
                sql.Literal(plan.new.column),
            ),
            sql.SQL(
                "INSERT INTO revector.objects (migration, kind, name, oid)"
                " SELECT {}, 'function', proname, oid FROM pg_proc"
                " WHERE pronamespace = 'revector'::regnamespace AND proname = ANY ({})"
                " UNION ALL SELECT {}, 'trigger', tgname, oid FROM pg_trigger WHERE tgrelid = {}::oid AND tgname = {}"
            ).format(migration, functions, migration, table, sql.Literal(plan.trigger)),
        ]

    def retire_sql(self, generation: int) -> list[sql.Composable]:
        """Statements that mark a generation as gone."""
        return [
            sql.SQL(
                "UPDATE revector.generations SET attnum = NULL, live = false, retired = now()"
                " WHERE table_oid = {}::oid AND number = {}"
            ).format(sql.Literal(self.table), sql.Literal(generation))
        ]

    def retry_failures(self) -> None:
        """Forget refusals, so that a new run tries them again."""
        self._run("retry_failures", migration=self.migration)

    def followers(self) -> int:
        """Active followers alive by the server's clock."""
        return int(self._rows("followers", table=self.table)[0].alive)

    def beat(
        self, worker: str, pid: int, *, active: bool, filled: int = 0, oldest: float = 0.0, trouble: str = ""
    ) -> None:
        """Say that a follower lives, how many rows it has filled, and how long the oldest pending one waits (seconds)."""
        self._run(
            "beat",
            worker=worker,
            table=self.table,
            active=active,
            pid=pid,
            host=socket.gethostname(),
            filled=filled,
            oldest=oldest,
            trouble=trouble[:500] or None,
        )

    def vigil(self) -> list[Vigil]:
        """The followers that have been heard of in the last 10 s, the active one first."""
        return [Vigil(**row._asdict()) for row in self._rows("vigil", table=self.table)]

    def gone(self, worker: str) -> None:
        """Say that a follower stopped."""
        self._run("gone", worker=worker)

    def check_transition(self, command: str, row: MigrationRow | None, name: str) -> MigrationRow:
        """Refuse a command that does not fit the stage, naming the next one."""
        if row is None:
            raise Refused(
                f"{name}: no migration has been started",
                why="Nothing was changed.",
                hint=f"revector plan {shlex.quote(name)} --to MODEL",
            )
        if row.closing and row.closing != command and not row.stage.closed:
            raise Refused(
                f"{name}: {row.closing} has begun and must be completed",
                why=f"The trigger is gone since then, so {command} could lose writes.",
                hint=f"revector {row.closing} {shlex.quote(name)}",
            )
        if row.stage not in TRANSITIONS[command]:
            live = row.plan.new if row.stage in (Stage.CUT_OVER, Stage.FINALIZED) else row.plan.old
            table = shlex.quote(name)
            after = f"revector {NEXT[row.stage]} {table}" + (" --to MODEL" if row.stage.closed else "")
            if command == "rollback" and row.stage is Stage.FINALIZED and ("backup", row.plan.backup) in self.owned():
                after = f"revector restore {table}\n  (it takes the vectors of {row.plan.old.model.model} from {row.plan.backup})"
            raise Refused(
                f"{name}: {command} is not possible at {row.stage}",
                why=f"It is possible at {', '.join(TRANSITIONS[command])}. {live.model.model} answers. Nothing was changed.",
                hint=after,
            )
        return row
