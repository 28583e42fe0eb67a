"""What a phase is given (`Work`), and what it tells while it works (`Observation`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from psycopg import sql

from revector.db import DEFAULT_LIMITS, Database, Pause, PauseLimits, Session, block, raw
from revector.embed import Embedder, Identity, Meter
from revector.errors import Interrupted, Refused
from revector.partitions import Leaf, leaves, not_null_in
from revector.plan import Generation, Plan
from revector.settings import Settings
from revector.spending import Purse
from revector.throttle import Throttle

#: Every step that changes something, in order. Each ends with its row in the ledger; a kill test stands for each.
STEPS: Final = (
    "plan",
    "backup.create", "backup.copy", "backup.verify",
    "expand",
    "restore.windows", "restore.window", "restore.copy",
    "backfill.windows", "backfill.window", "backfill.sweep", "backfill.outside", "backfill",
    "restore.refresh",
    "index.build", "index.pending", "index.analyze", "index",
    "verify.catch_up", "verify",
    "serve",
    "expose.catch_up", "expose", "expose.drop",
    "cutover.refresh", "cutover.catch_up", "cutover",
    "rollback.catch_up", "rollback",
    "abort.catch_up", "abort.close", "abort.drop_views", "abort.validate", "abort.drop_indexes", "abort.drop_column", "abort",
    "finalize.catch_up", "finalize.close", "finalize.drop_views", "finalize.validate", "finalize.drop_indexes",
    "finalize.drop_column", "finalize.drop_backup", "finalize",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase begins."""

    number: int
    total: int
    name: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the present phase is."""

    phase: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something the user should read."""

    text: str


@dataclass(frozen=True, slots=True)
class Effect:
    """A step has had its effect; its ledger row is not written (for a one-message step: neither is there yet)."""

    step: str


@dataclass(frozen=True, slots=True)
class Recorded:
    """A step's effect and its ledger row are both there."""

    step: str
    figures: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Health:
    """How a follower does; told from time to time, and whenever its state changes."""

    #: `active`, `standing by` or `trouble`.
    state: str
    #: Rows filled since it was started.
    filled: int
    #: Rows pending now; None: not counted.
    pending: int | None
    #: Seconds that the oldest known pending row has been waiting.
    oldest: float
    #: Texts that a model refuses.
    refused: int
    #: What is wrong, or what it waits for.
    why: str = ""


Observation = Phase | Progress | Note | Effect | Recorded | Health
Observer = Callable[[Observation], None]


class LedgerView(Protocol):
    """What phases need of the ledger."""

    migration: int | None

    def record(self, step: str, figures: dict[str, Any], stage: str | None = None) -> None: ...  # noqa: D102
    def record_sql(  # noqa: D102
        self, step: str, figures: dict[str, Any], stage: str | None = None, closing: str | None = None
    ) -> list[sql.Composable]: ...
    def guard_sql(self, stages: Sequence[str], closing: str | None = None) -> sql.Composable: ...  # noqa: D102
    def own(self, kind: str, name: str, oid: int, generation: int | None = None) -> None: ...  # noqa: D102
    def disown(self, kind: str, name: str) -> None: ...  # noqa: D102
    def owned(self) -> dict[tuple[str, str], int]: ...  # noqa: D102
    def attnum(self, number: int) -> int | None: ...  # noqa: D102
    def make_windows(self, sweep: int, relation: int, blocks: int, end: int) -> None: ...  # noqa: D102
    def cut(self, sweep: int) -> frozenset[int]: ...  # noqa: D102
    def release_leases(self) -> None: ...  # noqa: D102
    def retry_failures(self) -> None: ...  # noqa: D102
    def failures(self, generation: int) -> Mapping[int, Any]: ...  # noqa: D102
    def unsettled(self, generation: int) -> str | None: ...  # noqa: D102
    def settle_swap(self, swapped: str) -> None: ...  # noqa: D102
    def note_write(self, generation: int, version: str) -> bool: ...  # noqa: D102
    def fail(self, generation: int, text_hash: int, kind: str, error: str) -> None: ...  # noqa: D102
    def lease(self, sweep: int, holder: str) -> tuple[int, int, int] | None: ...  # noqa: D102
    def beat_leases(self, holder: str) -> None: ...  # noqa: D102
    def window_done(self, sweep: int, relation: int, lo: int, written: int, hot: int) -> None: ...  # noqa: D102
    def expand_sql(self, plan: Plan) -> list[sql.Composable]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a phase has to say at its end."""

    #: One line for the user.
    summary: str
    figures: dict[str, Any] = field(default_factory=dict)


def _in_format(text: str) -> sql.Composable:
    """Text for the inside of a RAISE format, where a quote and a percent sign are written twice."""
    return raw(text.replace("'", "''").replace("%", "%%"))


def checked_models(
    plan: Plan, settings: Settings, purse: Purse | None = None, attempts: int | None = None
) -> dict[int, Callable[[], Embedder]]:
    """Generation number -> its model: loaded at first use, and proven to be the plan's before its first vector.

    What a model behind an address is asked is counted in the purse.
    """

    def source(generation: Generation) -> Callable[[], Embedder]:
        lock = threading.Lock()
        ready: list[Embedder] = []

        def model() -> Embedder:
            with lock:
                if not ready:
                    account = purse.account(generation.number, generation.model.model) if purse else None
                    embedder = embedder_for(generation.model, settings, account, attempts)
                    embedder.check_identity(generation.model)
                    ready.append(embedder)
            return ready[0]

        return model

    return {generation.number: source(generation) for generation in (plan.old, plan.new)}


def embedder_for(
    identity: Identity, settings: Settings, meter: Meter | None = None, attempts: int | None = None
) -> Embedder:
    """The model of a recorded identity; `dimensions` is asked of a provider only where the settings ask for it."""
    asked = settings.embedding_dimension if settings.embedding_dimension == identity.dimension else None
    return Embedder(
        identity.model,
        dimension=asked,
        settings=settings,
        document_prompt=identity.document_prompt,
        query_prompt=identity.query_prompt,
        meter=meter,
        attempts=attempts,
    )


@dataclass(slots=True)
class Work:
    """Everything a phase may use: the plan, the sessions, the ledger, the models, and someone to tell."""

    plan: Plan
    database: Database
    #: The session that holds `steer`; short statements and DDL.
    control: Session
    ledger: LedgerView
    #: The same ledger through another session: each thread has its own.
    ledger_on: Callable[[Session], LedgerView]
    #: Generation number -> its model, checked against the plan before its first vector is used.
    models: Mapping[int, Callable[[], Embedder]]
    #: Fills what is pending in these generations, with no lock held; returns what is left.
    catch_up: Callable[[Sequence[int]], Mapping[int, int]] = lambda _: {}
    observe: Observer = lambda _: None
    stop: Callable[[], bool] = lambda: False
    batch_size: int = 50
    #: Documents a second that the new model was measured at.
    rate: float = 100.0
    allow_failed: int = 0
    allow_pending: int = 1000
    #: What each short lock may cost the application.
    limits: PauseLimits = DEFAULT_LIMITS
    #: Asked before each write of the backfill and of the follower.
    throttle: Throttle = field(default_factory=Throttle)

    @property
    def table(self) -> sql.Identifier:
        """The table, by the name it has now."""
        return self.table_on(self.control)

    @property
    def schema(self) -> str:
        """The schema that the table and its indexes are in now."""
        row = self.control.row(block("work", "table_name"), table=self.plan.table_oid)
        return str(row.nspname) if row else self.plan.schema

    def table_on(self, session: Session) -> sql.Identifier:
        """The table's present name, read through that session."""
        row = session.row(block("work", "table_name"), table=self.plan.table_oid)
        return sql.Identifier(row.nspname, row.relname) if row else sql.Identifier(self.plan.schema, self.plan.table)

    def leaves(self, session: Session | None = None) -> tuple[Leaf, ...]:
        """The relations that hold the rows now: the table itself, or the leaves of a partitioned one."""
        return leaves(session or self.control, self.plan.table_oid)

    def column(self, generation: Generation, session: Session | None = None) -> str | None:
        """The name that a generation's column has now, resolved from its attribute number; None: it is gone."""
        number = self.ledger.attnum(generation.number)
        if number is None:
            return None
        name = (session or self.control).value(block("work", "column_name"), table=self.plan.table_oid, number=number)
        return str(name) if name is not None else None

    def check_stop(self) -> None:
        """Stop between two steps when the user has asked for it."""
        if self.stop():
            raise Interrupted()

    def note(self, text: str) -> None:
        """Tell the user something."""
        self.observe(Note(text))

    @contextmanager
    def step(self, name: str, stage: str | None = None) -> Iterator[dict[str, Any]]:
        """A step whose effect and ledger row cannot commit together: the body makes the effect, or sees it is there."""
        assert name in STEPS, name
        figures: dict[str, Any] = {}
        yield figures
        self.observe(Effect(name))
        self.ledger.record(name, figures, stage)
        self.observe(Recorded(name, figures))

    def pause(
        self,
        name: str,
        statements: Sequence[sql.Composable],
        *,
        stages: Sequence[str],
        checks: Sequence[sql.Composable] = (),
        stage: str | None = None,
        closing: str | None = None,
        was_closing: str | None = None,
        views: Sequence[sql.Composable] = (),
        figures: dict[str, Any] | None = None,
    ) -> Pause:
        """A step whose effect and ledger row are one message under ACCESS EXCLUSIVE, within the pause budget.

        It fails inside the lock, changing nothing, unless the migration is still at one of `stages` and `checks` pass;
        what they refuse already without the lock is refused before anybody waits. `views` of the table are locked as
        well.
        """
        assert name in STEPS, name
        statements = [*checks, *statements]
        told = {**(figures or {}), "statements": [statement.as_string(None) for statement in statements]}
        self.observe(Effect(name))
        pause = self.database.pause(
            self.control,
            self.table,
            [
                self.ledger.guard_sql(stages, was_closing),
                *statements,
                *self.ledger.record_sql(name, told, stage, closing),
            ],
            settle=True,
            checks=checks,
            views=views,
            budget_ms=self.limits.budget_ms,
            attempts=self.limits.attempts,
            observe=self.note,
        )
        cost = {"step": name, "wait_ms": round(pause.wait_ms, 1), "hold_ms": round(pause.hold_ms, 1)}
        self.ledger.record("pause", {**cost, "total_ms": round(pause.total_ms, 1), "attempt": pause.attempt})
        self.observe(Recorded(name, cost))
        return pause

    def refuse_not_null(self, columns: Sequence[str]) -> None:
        """Refuse where one of these columns is NOT NULL: from SERVED on a vector is NULL until the follower has filled it."""
        plan = self.plan
        found = not_null_in(self.control, plan.table_oid, columns)
        if found is None:
            return
        where, column = found
        relax = block("phases/serve", "drop_not_null", table=where.identifier, column=sql.Identifier(column))
        back = "finalize and abort give NOT NULL back"
        if not plan.not_null:
            set_again = block(
                "phases/finalize", "set_not_null", table=where.identifier, column=sql.Identifier(plan.column)
            )
            back = f"the plan found none, so it is yours to give back after finalize or abort: {set_again.as_string(None)};"
        part = where.oid != plan.table_oid
        raise Refused(
            f"{plan.table}: {column} is NOT NULL"
            + (f" in partition {where.name}, which was attached so" if part else ""),
            why="Somebody made it so since the plan. A text that is written without the other model's vector would be"
            " refused (23502), for that vector is NULL until the follower has filled it. Nothing was changed.",
            hint=f"{relax.as_string(None)};\n{back}\nthen the same command again",
        )

    def nullable(self, columns: Sequence[str]) -> sql.Composable:
        """A statement that fails where one of these columns is NOT NULL; it reads the catalog, under the caller's lock."""
        body = block(
            "work",
            "nullable",
            table=sql.Literal(self.plan.table_oid),
            columns=sql.SQL("{}::name[]").format(sql.Literal(list(columns))),
        )
        return sql.SQL("DO {}").format(sql.Literal(body.as_string(None)))

    def none_pending(
        self, generation: Generation, column: str, allowed: int, *, also_without_text: bool = False
    ) -> sql.Composable:
        """A statement that fails when more than `allowed` rows are pending in a generation whose column has that name.

        Refused texts are counted in, for nothing is scanned under the lock: add `refused_rows` to `allowed`.
        """
        body = block(
            "work",
            "none_pending",
            table=self.table,
            column=sql.Identifier(column),
            has_text=sql.SQL("" if also_without_text else " AND ({}) IS NOT NULL").format(raw(self.plan.text_sql)),
            allowed=sql.Literal(allowed),
            label=_in_format(generation.model.model),
        )
        return sql.SQL("DO {}").format(sql.Literal(body.as_string(None)))

    def refused(self, generation: Generation) -> list[Any]:
        """The texts that this model refuses and that rows still have (text_hash, kind, error); blank ones left out."""
        statement = block(
            "work",
            "refused",
            table=self.table,
            column=sql.Identifier(self.column(generation) or generation.column),
            text=raw(self.plan.text_sql),
        )
        return list(self.control.rows(statement, migration=self.ledger.migration, generation=generation.number))

    def refused_rows(self, generation: Generation) -> int:
        """How many rows have no vector because the model refuses their text; one text may stand in many rows."""
        statement = block(
            "work",
            "refused_rows",
            table=self.table,
            column=sql.Identifier(self.column(generation) or generation.column),
            text=raw(self.plan.text_sql),
        )
        return int(self.control.value(statement, migration=self.ledger.migration, generation=generation.number))

    def outside_lost(self, outgoing: Generation, incoming: Generation) -> int:
        """How many rows outside the filter have a vector in the outgoing generation alone; they would vanish."""
        if self.plan.filter_sql is None:
            return 0
        statement = block(
            "work",
            "outside_lost",
            table=self.table,
            outgoing=sql.Identifier(self.column(outgoing) or outgoing.column),
            incoming=sql.Identifier(self.column(incoming) or incoming.column),
            inside=raw(self.plan.inside),
        )
        return int(self.control.value(statement))

    def indexes_valid(self, generation: Generation, oids: Sequence[int]) -> sql.Composable:
        """A statement that fails unless these indexes are there and valid."""
        body = block(
            "work",
            "indexes_valid",
            oids=sql.SQL("{}::oid[]").format(sql.Literal(list(oids))),
            count=sql.Literal(len(oids)),
            label=_in_format(generation.model.model),
        )
        return sql.SQL("DO {}").format(sql.Literal(body.as_string(None)))

    def drop_index(self, name: str, schema: str | None = None, *, theirs: bool = False) -> None:
        """Drop an index of ours without stopping anyone; one that is not in the ledger stays, but with `theirs`."""
        if not theirs and ("index", name) not in self.ledger.owned():
            return
        # lock_timeout = 0: CONCURRENTLY waits for old transactions, and blocks nobody while it waits.
        self.control.execute("SET lock_timeout = 0")
        try:
            self.control.execute(block("work", "drop_index", name=sql.Identifier(schema or self.schema, name)))
        finally:
            if not self.control.connection.closed:
                self.control.execute("SET lock_timeout = '5s'")
        self.ledger.disown("index", name)
