"""The only orchestrator: it takes the table's lock, loads the stage, runs the next phases and records what is proven."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import psycopg
from psycopg import sql

from revector import ledger as ledgers
from revector import trigger
from revector.carried import set_on
from revector.catalog import Dependent, Table, dependents, find_table, holding, publishing, read_server, read_table
from revector.db import DEFAULT_LIMITS, Database, PauseLimits, Session, block, raw, translated
from revector.errors import (
    Busy,
    GateFailed,
    InputRefused,
    Interrupted,
    KeyRejected,
    Outage,
    PauseBudgetMissed,
    Refused,
    RevectorError,
    ServerLost,
    UsageError,
)
from revector.follow import Follower
from revector.ledger import Event, Ledger, LiveGeneration, MigrationRow, Stage, Vigil
from revector.moment import AT_ONCE, Moment, wait
from revector.phases import backfill, backup, cutover, expand, expose, finalize, index, serve, verify
from revector.phases.expose import Side as ViewSide
from revector.plan import (
    DEFAULT_BATCH,
    Back,
    Consents,
    Draft,
    Estimate,
    ExposedView,
    Facts,
    Generation,
    Plan,
    Request,
    Source,
    differs,
    draft,
    estimate,
    own_name,
    with_consents,
)
from revector.rehearsal import Rehearsed, rehearse
from revector.settings import Settings
from revector.spending import MONEY, Purse, Spent, check_price, spent
from revector.survey import check_vector, identify, survey
from revector.throttle import NO_TUNING, Throttle, Tuning
from revector.work import STEPS, Effect, Note, Observer, Outcome, Phase, Recorded, Work, checked_models

__all__ = ["STEPS", "Migration", "Preview", "Result", "Status"]

#: Followers' heartbeats are written every 2 s; so long a command waits for the one that it has started itself.
_FOLLOWER_PATIENCE: Final = 30.0
#: Seconds between two looks at what is pending while a swap waits for its moment.
_LOOK_WHILE_WAITING: Final = 2.0
#: A table up to so many bytes is read whole for an exact figure of `status`; of a larger one it tells an estimate.
CHEAP: Final = 32 * 2**20
#: Rows that are counted through a pending index: by `status`, and by `status --check`, which only has to know of some.
_COUNTED: Final = (100_000, 1_000)
#: A pending row that waits longer than this (seconds) is an alert, and so long an alarm is one after its last sign.
LATE: Final = 60.0
ALARMING: Final = 3600.0
NO_CONSENTS: Final = Consents()
#: How long the old side must not have been written before it may be dropped, in seconds.
QUIET_FOR: Final = 3600.0
#: From this server version on `pg_stat_all_indexes` tells when an index was last scanned.
_TELLS_READS: Final = 160000
_PHASES: Final = ("preconditions", "backup", "expand", "backfill", "index", "verify")


@dataclass(frozen=True, slots=True)
class Preview:
    """What a run would do; nothing was changed."""

    draft: Draft
    facts: Facts
    estimate: Estimate
    #: (phase, statement) in the order of execution.
    statements: tuple[tuple[str, str], ...]
    batch_size: int

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.draft.plan


@dataclass(frozen=True, slots=True)
class Result:
    """What a command achieved, what is true now, and what comes next."""

    table: str
    command: str
    stage: Stage
    #: The model that answers under the bare name.
    answering: str
    summary: str
    #: The exact next command; empty when there is none.
    next: str
    figures: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether the candidate is proven, so that `cutover` is the next step."""
        return self.stage.reached(Stage.VERIFIED) and not self.stage.closed


#: How a figure is known: counted, estimated, or counted so far and no further.
Known = Literal["exact", "about", "at least"]
_NOT_ASKED: Final[tuple[None, Known]] = (None, "exact")


@dataclass(frozen=True, slots=True)
class Side:
    """One generation as `status` shows it."""

    column: str
    model: str
    dimension: int
    pending: int | None
    role: str = "live"
    #: Seconds since an application was last seen writing it, and since its indexes were last scanned; None: not known.
    written: float | None = None
    read: float | None = None
    #: The setting that makes a session one of this generation's, where it has a view.
    search_path: str | None = None
    #: How `pending` is known.
    known: Known = "exact"


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that somebody should look at now."""

    #: `trigger`, `follower_down`, `follower_trouble`, `follower_late`, `pending_index` or `wrong_model`.
    kind: str
    #: One sentence.
    what: str
    #: The exact next command, or what to do.
    next: str


@dataclass(frozen=True, slots=True)
class Status:
    """What is true now."""

    table: str
    stage: Stage | None
    closing: str | None
    live: Side | None
    other: Side | None
    #: Rows of the table; None, as the next two: not asked.
    rows: int | None
    blank: int | None
    failed: int | None
    followers: int
    next: str
    #: (name, bytes, seconds since it was made) of the backup table.
    backup: tuple[str, int, float] | None = None
    #: What `pause` and `tune` have set.
    tuning: Tuning = NO_TUNING
    #: (rows, share of HOT updates, share that the plan expected) of what the backfill has written.
    written: tuple[int, float, float | None] | None = None
    #: The followers that live.
    vigil: tuple[Vigil, ...] = ()
    #: What models behind an address were asked; None: nothing.
    spent: Spent | None = None
    #: What is wrong now; a monitor shows red when there is any.
    alerts: tuple[Alert, ...] = ()
    #: How `rows` is known.
    known: Known = "exact"

    @property
    def estimates(self) -> dict[str, Known]:
        """The figures that were not counted to the end, by their place in the JSON, and how each is known."""
        sides = (("live.pending", self.live), ("other.pending", self.other))
        known = {"rows.total": self.known} | {name: side.known for name, side in sides if side is not None}
        return {name: how for name, how in known.items() if how != "exact"}

    def to_json(self) -> dict[str, Any]:
        """The public format 1: keys are added, never renamed."""

        def side(s: Side | None, *, role: bool) -> dict[str, Any] | None:
            if s is None:
                return None
            told: dict[str, Any] = {"column": s.column, "model": s.model, "dimension": s.dimension}
            if role:
                told["role"] = s.role
            seen = {"written_s": _whole(s.written), "read_s": _whole(s.read)}
            return {**told, "pending": s.pending, **seen, "search_path": s.search_path}

        return {
            "format": 1,
            "table": self.table,
            "stage": str(self.stage) if self.stage else None,
            "live": side(self.live, role=False),
            "other": side(self.other, role=True),
            "rows": {"total": self.rows, "blank": self.blank, "failed": self.failed},
            "estimates": self.estimates,
            "followers": self.followers,
            "next": self.next,
            "closing": self.closing,
            "backup": None
            if self.backup is None
            else {"table": self.backup[0], "bytes": self.backup[1], "age_s": round(self.backup[2])},
            "spent": None
            if self.spent is None
            else {
                "tokens": self.spent.tokens,
                "requests": self.spent.requests,
                "cost": None if self.spent.cost is None else round(self.spent.cost, 6),
                "max_cost": self.spent.max_cost,
            },
            "alerts": [{"kind": a.kind, "what": a.what, "next": a.next} for a in self.alerts],
            "vigil": [
                {"host": f.host, "pid": f.pid, "active": f.active, "filled": f.filled, "oldest_s": round(f.oldest),
                 "trouble": f.trouble} for f in self.vigil
            ],
            "tuning": {"paused": self.tuning.paused, **self.tuning.to_json()},
            "backfill": None
            if self.written is None
            else dict(zip(("rows", "hot_share", "hot_expected"), self.written, strict=True)),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Exposed:
    """The views that a table has now, and how a session becomes one of a generation's."""

    table: str
    stage: Stage | None
    #: (model, `search_path` setting, whether the bare name answers with it).
    sides: tuple[tuple[str, str, bool], ...]
    summary: str
    figures: dict[str, Any]
    #: The exact next command.
    next: str


@dataclass(frozen=True, slots=True)
class Missing:
    """The rows that search would miss if the sides were swapped now."""

    table: str
    command: str
    #: The model that would answer.
    model: str
    #: Not filled yet; the follower does it.
    waiting: int
    #: That model refuses their text.
    refused: int
    #: They have a vector of the other model and no text to embed.
    without_text: int
    #: Outside `--where`, with a vector of the other model alone.
    outside: int
    followers: int

    @property
    def rows(self) -> int:
        """All of them."""
        return self.waiting + self.refused + self.without_text + self.outside

    def to_json(self) -> dict[str, Any]:
        """The public format 1: keys are added, never renamed."""
        return {
            "format": 1,
            "table": self.table,
            "command": self.command,
            "model": self.model,
            "missing": self.rows,
            "waiting": self.waiting,
            "refused": self.refused,
            "without_text": self.without_text,
            "outside": self.outside,
            "followers": self.followers,
        }


class Migration:
    """One table's migration: the library's front door.

    `open` takes the table's `steer` lock, so that two people cannot steer at once; with `steer=False` only `preview`,
    `status` and `events` may be called. Use it as a context manager.
    """

    def __init__(
        self,
        settings: Settings,
        table: str,
        *,
        observe: Observer = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
        steer: bool = True,
    ) -> None:
        self.settings = settings
        self.name = table
        #: The table as a command takes it.
        self.argument = shlex.quote(table)
        self.observe = observe
        self.stop = stop
        self.database = Database(settings)
        self.control = self.database.connect("control")
        try:
            with translated():
                self.oid = find_table(self.control, table)
                if ledgers.exists(self.control):
                    ledgers.ensure(self.control)
                # A process killed a moment ago holds its lock until the server has noticed.
                if steer and not self.control.wait_lock("steer", self.oid, seconds=2.0):
                    holder = self.control.holder("steer", self.oid)
                    raise Busy(
                        f"another revector command is steering {table} (server process {holder})",
                        why="Two at once could undo each other's steps. Nothing was changed.",
                        hint=f"wait for it, or look: revector status {table}",
                    )
        except BaseException:
            self.control.close()
            raise
        self.ledger = Ledger(self.control, self.oid)
        self._unfollow = threading.Event()
        self._purse: Purse | None = None
        self._started: tuple[Follower, threading.Thread] | None = None

    @classmethod
    def open(
        cls,
        settings: Settings,
        *,
        table: str,
        observe: Observer = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
        steer: bool = True,
    ) -> Migration:
        """Connect, find the table, take its `steer` lock. Raises `Busy` when another command holds it."""
        return cls(settings, table, observe=observe, stop=stop, steer=steer)

    def __enter__(self) -> Migration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop a follower of ours and close the connection; the lock goes with it."""
        self._stop_following()
        if self._purse is not None:
            self._purse.close()
        self.control.close()

    # -- look ---------------------------------------------------------------------------------------------------------

    def latest(self) -> MigrationRow | None:
        """The open migration, else the last closed one, else None."""
        return self.ledger.latest() if ledgers.exists(self.control) else None

    def preview(self, request: Request | None = None, *, to: str | None = None, from_: str | None = None) -> Preview:
        """What `run` would do, every statement and estimate included; changes nothing."""
        request = _asked(request, to, from_)
        with self._explained("plan"):
            row = self.latest()
            if row is not None and not row.stage.closed:
                _check_column(row, request, self.name)
                row = self.ledger.check_transition("run", row, self.name)
                request = _as_planned(row, request, self.name)
            facts = survey(self.control, self.name, request, self.settings, note=lambda text: self.observe(Note(text)))
            made = draft(request, facts)
            if row is not None and not row.stage.closed:
                made = replace(made, plan=row.plan, findings=tuple(f for f in made.findings if f.title != "names"))
            return Preview(
                made,
                facts,
                estimate(made.plan, facts),
                _statements(made.plan, facts),
                request.batch_size or DEFAULT_BATCH,
            )

    def rehearse(self, made: Draft) -> Rehearsed:
        """Try the short steps of this draft on the real table, and roll them back: see `rehearsal.rehearse`."""
        with translated(self._command("plan")):
            row = self.latest()
            if row is not None and not row.stage.closed:
                raise Refused(
                    f"{self.name}: a migration is open at {row.stage}, so its short steps are not rehearsed",
                    why="They are on the table already. Nothing was changed.",
                    hint=self._command("status"),
                )
            return rehearse(self.control, made.plan, read_table(self.control, self.oid))

    def status(self, *, check: bool = False) -> Status:
        """What is true now: which model answers, what is pending, what comes next.

        `check`: only what the alerts are made of, for a monitor; it never scans the table, however small.
        """
        with translated(self._command("status")):
            return self._status(check=check)

    def events(self, limit: int = 1000) -> list[Event]:
        """Every step with its figures, oldest first."""
        with translated(self._command("events")):
            return self.ledger.events(limit) if ledgers.exists(self.control) else []

    def missing(self, command: Literal["cutover", "rollback"]) -> Missing:
        """Which rows search would miss after `command`, if it came now; changes nothing."""
        with translated(self._command(command)):
            row = self.ledger.check_transition(command, self.latest(), self.name)
            work, plan = self._work(row), row.plan
            outgoing, incoming = (plan.old, plan.new) if command == "cutover" else (plan.new, plan.old)
            names = {
                "incoming": sql.Identifier(work.column(incoming) or incoming.column),
                "outgoing": sql.Identifier(work.column(outgoing) or outgoing.column),
            }
            parts = {"table": work.table, "text": raw(plan.text_sql)}
            without_text = block("migration", "without_text", inside=raw(plan.inside), **names, **parts)
            waiting = block("phases/backfill", "pending_unrefused", column=names["incoming"], **parts)
            return Missing(
                self.name,
                command,
                incoming.model.model,
                int(self.control.value(waiting, migration=row.id, generation=incoming.number, limit=2**62)),
                work.refused_rows(incoming),
                int(self.control.value(without_text)),
                work.outside_lost(outgoing, incoming),
                self.ledger.followers(),
            )

    # -- forward ------------------------------------------------------------------------------------------------------

    def run(
        self,
        request: Request | None = None,
        *,
        to: str | None = None,
        from_: str | None = None,
        observe: Observer | None = None,
        allow_failed: int = 0,
        cutover: bool = False,
        follow: bool = False,
        without_follower: bool = False,
        bare_writers_stopped: bool = False,
        allow_pending: int = 1000,
        limits: PauseLimits = DEFAULT_LIMITS,
        when: Moment = AT_ONCE,
        tuning: Mapping[str, float | None] | None = None,
        refresh: bool = False,
    ) -> Result:
        """Preconditions, backup if asked, expand, backfill, index, verify; resumes where an earlier run stopped.

        `to` and `from_` are short for a `Request` of these two; `observe` hears of this table's steps from now on;
        `tuning` is what `tune` would change, in force from the first write; `refresh` is as of `restore`.
        Raises `Refused` with every blocker, `GateFailed`, or a `Resumable` error; none of them changes what readers see.
        """
        request = _asked(request, to, from_)
        self.observe = observe or self.observe
        with self._explained("run"):
            self.observe(Phase(1, len(_PHASES), _PHASES[0]))
            before = self.latest()
            check_price(
                NO_TUNING if before is None or before.stage.closed else before.limits, tuning or {}, self.argument
            )
            row = self._opened(request, tuning or {})
            if tuning:
                row = self._tuned("tuned", row, tuning)
            if refresh:
                # In the ledger until it is done, so that whatever command goes on goes on with it.
                self.ledger.remember(refresh=True)
                row = self.latest() or row
            if cutover:
                # Checked first: nobody wants to learn after hours that the last step cannot be taken.
                self._check_follower("run --cutover", follow=follow, without_follower=without_follower)
                self._check_same_dimension(row, bare_writers_stopped, "cutover")
            work = self._work(row, allow_failed=allow_failed, allow_pending=allow_pending, limits=limits)
            work.catch_up = lambda numbers: backfill.catch_up(work, numbers, paced=True)
            outcome = self._phases(row, work, cutover=cutover)
        if cutover:
            return self.cutover(
                follow=follow,
                without_follower=without_follower,
                bare_writers_stopped=bare_writers_stopped,
                allow_failed=allow_failed,
                allow_pending=allow_pending,
                limits=limits,
                when=when,
            )
        return self._result("run", outcome)

    def cutover(
        self,
        *,
        follow: bool = False,
        without_follower: bool = False,
        bare_writers_stopped: bool = False,
        refresh_old: bool = False,
        allow_failed: int = 0,
        allow_pending: int = 1000,
        limits: PauseLimits = DEFAULT_LIMITS,
        when: Moment = AT_ONCE,
    ) -> Result:
        """Let the candidate answer. From VERIFIED it first goes to SERVED; then it catches up with no lock, and swaps.

        `limits` is what the lock may cost; `when` postpones the swap, and only the swap.
        """
        return self._swap(
            "cutover",
            back=False,
            follow=follow,
            without_follower=without_follower,
            bare_writers_stopped=bare_writers_stopped,
            refresh_old=refresh_old,
            allow_failed=allow_failed,
            allow_pending=allow_pending,
            limits=limits,
            when=when,
        )

    def rollback(
        self,
        *,
        follow: bool = False,
        without_follower: bool = False,
        bare_writers_stopped: bool = False,
        allow_pending: int = 1000,
        limits: PauseLimits = DEFAULT_LIMITS,
        when: Moment = AT_ONCE,
    ) -> Result:
        """Let the old model answer again: cutover with the sides swapped. Nothing written since is lost."""
        return self._swap(
            "rollback",
            back=True,
            follow=follow,
            without_follower=without_follower,
            bare_writers_stopped=bare_writers_stopped,
            allow_pending=allow_pending,
            limits=limits,
            when=when,
        )

    def restore(
        self,
        *,
        vector: str | None = None,
        batch_size: int | None = None,
        backup: bool = False,
        refresh: bool = False,
        consents: Consents = NO_CONSENTS,
        allow_failed: int = 0,
        limits: PauseLimits = DEFAULT_LIMITS,
        tuning: Mapping[str, float | None] | None = None,
    ) -> Result:
        """Go back after `finalize`: a migration to the model of a backup table, whose vectors unchanged rows take.

        `vector` chooses among several migrated columns; `refresh` embeds all rows before they are verified, and renews
        vectors that were stale in the backup; `tuning` is as of `run`. It ends as `run` does, at VERIFIED; raises what
        `run` raises.
        """
        with translated(self._command("restore")):
            row = self.latest()
            request = Request(vector=vector, batch_size=batch_size, backup=backup or None, consents=consents)
            if row is None or row.stage.closed:
                request = replace(request, **way_back(self.control, self.ledger, self.name, vector))
            elif row.plan.source is None:
                old = row.plan.old.model.model
                back = "rollback" if row.stage is Stage.CUT_OVER else None
                raise Refused(
                    f"{self.name}: a migration {old} -> {row.plan.new.model.model} is open at {row.stage}",
                    why=f"The vectors of {old} are still in the table; a backup is not needed. Nothing was changed.",
                    hint=self._command(row.closing or back or row.next),
                )
        return self.run(request, allow_failed=allow_failed, limits=limits, tuning=tuning, refresh=refresh)

    def expose(
        self,
        *,
        from_: str | None = None,
        text: str | None = None,
        vector: str | None = None,
        refresh: bool = False,
        follow: bool = False,
        without_follower: bool = False,
        limits: PauseLimits = DEFAULT_LIMITS,
    ) -> Exposed:
        """Give each generation a view schema of its own; before VERIFIED, and with no migration open, the live one.

        From VERIFIED on both generations are guarded and caught up first. `from_` (with `text` and `vector`) names
        the model of a table that revector does not know yet. `refresh` follows changes of the table and its grants.
        """
        with self._explained("expose"):
            row = self.latest()
            if row is not None and not row.stage.closed:
                return self._expose_open(
                    row,
                    from_=from_,
                    text=text,
                    vector=vector,
                    refresh=refresh,
                    follow=follow,
                    without_follower=without_follower,
                    limits=limits,
                )
            self._check_idle("no migration is open", follow=follow, without_follower=without_follower)
            table = read_table(self.control, self.oid)
            on_record = self._live_on_record(from_, text, vector)
            known = self.ledger.views() if ledgers.exists(self.control) else {}
            number = on_record.number if on_record else 1
            if on_record is None and ledgers.exists(self.control) and self.ledger.registered():
                number = self.ledger.next_number()
            schema = known[number].made_as if number in known else own_name(table.schema, table.name, number)
            expose.check(self.control, table, [schema], known, self._command("expose"))
            live = on_record or self._registered(table, number, from_=from_, text=text, vector=vector)
            self.ledger.migration = None
            side = ViewSide(live.number, schema, live.model.model, live.attnum)
            outcome = self._make_views(table, [side], live.column, frozenset({live.attnum}), None, refresh, limits)
        return self._exposed(table, outcome, row)

    def unexpose(self, *, limits: PauseLimits = DEFAULT_LIMITS) -> Exposed:
        """Drop this table's views; their clients work with the bare table from then on."""
        with self._explained("expose --drop"):
            row = self.latest()
            table = read_table(self.control, self.oid)
            if row is None or row.stage.closed:
                self.ledger.migration = None
            views = list(self.ledger.views().values()) if ledgers.exists(self.control) else []
            if not views:
                raise Refused(
                    f"{self.name} has no views of ours", why="Nothing was changed.", hint=self._command("status")
                )
            live = {generation.number for generation in self.ledger.lives()}
            for view in views:
                if view.schema is not None and view.number not in live:
                    whose = expose.searched_by(self.control, view.schema)
                    why = "Its sessions would get the bare table, which answers with the other model."
                    self._refuse_searching(whose, view.schema, why, "expose --drop")
            expose.check_droppable(self.control, views, self._command("expose --drop"))
            gone = self._drop_views("expose.drop", views, limits)
        return self._exposed(table, Outcome(f"{', '.join(gone) or 'nothing'} dropped", {"dropped": gone}), row)

    def finalize(
        self,
        *,
        allow_failed: int = 0,
        drop_backup: bool = False,
        quiet_for: float = QUIET_FOR,
        limits: PauseLimits = DEFAULT_LIMITS,
    ) -> Result:
        """Drop the old generation: the only step without a way back.

        Refused while the old side has written within `quiet_for` seconds, for somebody still uses it.
        """
        return self._close(
            "finalize", allow_failed=allow_failed, drop_backup=drop_backup, quiet_for=quiet_for, limits=limits
        )

    def abort(self, *, limits: PauseLimits = DEFAULT_LIMITS) -> Result:
        """Give up: drop the candidate; the table is as it was."""
        return self._close("abort", limits=limits)

    # -- steer what is running; none of these takes the table's `steer` lock ------------------------------------------

    def pause(self) -> MigrationRow:
        """Let the backfill wait, with no transaction open, until `resume`. Raises `Refused` from SERVED on."""
        with translated(self._command("pause")):
            row = self._steerable("pause")
            if row.stage in (Stage.SERVED, Stage.CUT_OVER):
                raise Refused(
                    f"{self.name}: there is no backfill to pause at {row.stage}",
                    why="The follower goes on: without it, rows that are written now would vanish from search."
                    " Nothing was changed.",
                    hint=f"slow it down: revector tune {self.argument} --max-rows-per-second N",
                )
            return self._tuned("paused", row, {"paused": True})

    def resume(self) -> MigrationRow:
        """Lift the pause; starts no work."""
        with translated(self._command("resume")):
            return self._tuned("resumed", self._steerable("resume"), {"paused": None})

    def tune(self, changes: Mapping[str, float | None], *, batch_size: int | None = None) -> MigrationRow:
        """Change fields of `Tuning` (None: no limit) and the batch size; workers act on it within a second or two.

        Raises `UsageError` when the changes do not fit the migration.
        """
        with translated(self._command("tune")):
            return self._tuned("tuned", self._steerable("tune"), changes, batch_size)

    def _steerable(self, command: str) -> MigrationRow:
        row = self.latest()
        if row is None or row.stage.closed:
            raise Refused(
                f"{self.name}: no migration is open, so there is nothing to {command}",
                why="Nothing was changed.",
                hint=self._command("status"),
            )
        return row

    def _tuned(
        self, step: str, row: MigrationRow, changes: Mapping[str, float | None], batch_size: int | None = None
    ) -> MigrationRow:
        check_price(row.limits, changes, self.argument)
        self._check_money(row.plan, changes)
        self.ledger.tune(step, dict(changes), batch_size)
        return self.latest() or row

    def _check_money(self, plan: Plan, changes: Mapping[str, float | None]) -> None:
        """Limits of a provider are refused where neither model has one."""
        models = [plan.old.model.model, plan.new.model.model]
        given = [flag for field, flag in MONEY.items() if changes.get(field) is not None]
        if given and not any(model.startswith("openai:") for model in models):
            raise UsageError(
                f"{', '.join(given)}: neither {models[0]} nor {models[1]} is asked over a network",
                why="Their requests cost nothing and have no limits. Nothing was changed.",
                hint=f"leave it out; to write more slowly: revector tune {self.argument} --max-rows-per-second N",
            )

    # -- the parts ----------------------------------------------------------------------------------------------------

    def _opened(self, request: Request, tuning: Mapping[str, float | None]) -> MigrationRow:
        """The open migration, checked against the options given, or a new one that nothing of it refuses."""
        row = self.latest()
        if row is not None and not row.stage.closed:
            _check_column(row, request, self.name)
            row = self.ledger.check_transition("run", row, self.name)
            request = _as_planned(row, request, self.name)
            plan = with_consents(row.plan, request.consents)
            self.ledger.settle(plan, request.batch_size or row.batch_size)
            if row.stage is not Stage.PLANNED:
                trigger.check(self.control, plan)
            check_vector(read_server(self.control))
            self.ledger.retry_failures()
            self.observe(Note(f"resuming {plan.old.model.model} -> {plan.new.model.model} at {row.stage}"))
            return self.latest() or row
        facts = survey(self.control, self.name, request, self.settings, note=lambda text: self.observe(Note(text)))
        made = draft(request, facts)
        if made.blockers:
            raise blocked(self.name, made)
        self._check_money(made.plan, tuning)
        self.observe(Note(f"{len(made.findings)} preconditions met"))
        self.observe(Effect("plan"))
        ledgers.ensure(self.control)
        row = self.ledger.open(made.plan, request.batch_size or DEFAULT_BATCH, rate=facts.measured.rate)
        self.ledger.remember(hot_share=round(estimate(made.plan, facts).hot_share, 3))
        self.observe(Recorded("plan", {"fingerprint": row.fingerprint}))
        return row

    def _phases(self, row: MigrationRow, work: Work, *, cutover: bool) -> Outcome:
        stage, plan = row.stage, row.plan
        outcome = Outcome("already verified")
        if stage.reached(Stage.VERIFIED):
            if work.allow_failed and not cutover:
                work.note(f"--allow-failed has no effect now: verified already; {self._command('cutover')} takes it")
            left = work.catch_up([plan.new.number])
            if row.refreshing:
                self._refresh_candidate(work)
            return Outcome("already verified; caught up", {"pending": dict(left)})
        steps: list[tuple[str, Stage, Callable[[], Outcome]]] = [
            ("backup", Stage.EXPANDED, lambda: self._backup(work)),
            ("expand", Stage.EXPANDED, lambda: expand.run(work)),
            ("backfill", Stage.BACKFILLED, lambda: self._backfill(work)),
            ("index", Stage.INDEXED, lambda: self._index(work, refresh=row.refreshing)),
            ("verify", Stage.VERIFIED, lambda: self._verify(work)),
        ]
        for number, (name, proven, phase) in enumerate(steps, 2):
            # At INDEXED the index is looked at again: a lost or INVALID one is what a failed verify asks to repair.
            again = name == "index" and stage is Stage.INDEXED
            if (stage.reached(proven) and not again) or (name == "backup" and plan.backup is None):
                continue
            work.check_stop()
            self.observe(Phase(number, len(_PHASES), name))
            outcome = phase()
            self.observe(Note(outcome.summary))
        return outcome

    def _backup(self, work: Work) -> Outcome:
        return backup.run(work, complete=self._recorded("backup.verify"))

    def _recorded(self, step: str) -> bool:
        """Whether this migration has taken a step."""
        return any(e.step == step and e.migration == self.ledger.migration for e in self.ledger.events())

    def _backfill(self, work: Work) -> Outcome:
        if not self.control.try_lock("windows", self.oid, shared=True):
            raise Busy(f"{self.name} is being closed by another command", hint=f"revector status {self.argument}")
        try:
            if work.plan.source is not None and not self._recorded("restore.copy"):
                work.note(backfill.restore(work).summary)
            return backfill.run(work)
        finally:
            if not self.control.connection.closed:
                self.control.unlock("windows", self.oid, shared=True)

    def _index(self, work: Work, *, refresh: bool) -> Outcome:
        """Build the index; what is stale is renewed first, so that a new index does not grow by it."""
        if refresh:
            self._refresh_candidate(work)
        return index.run(work)

    def _verify(self, work: Work) -> Outcome:
        trigger.check(self.control, work.plan)
        with work.step("verify.catch_up") as told:
            told["left"] = dict(work.catch_up([work.plan.new.number]))
        return verify.run(work)

    def _refresh_candidate(self, work: Work) -> None:
        self.observe(Note(backfill.refresh(work, work.plan.new, "restore.refresh", paced=True).summary))
        self.ledger.remember(refresh=False)

    def _swap(
        self,
        command: str,
        *,
        back: bool,
        follow: bool,
        without_follower: bool,
        bare_writers_stopped: bool,
        refresh_old: bool = False,
        allow_failed: int = 0,
        allow_pending: int,
        limits: PauseLimits,
        when: Moment,
    ) -> Result:
        with self._explained(command):
            row = self.ledger.check_transition(command, self.latest(), self.name)
            self._check_same_dimension(row, bare_writers_stopped, command)
            if row.refreshing and not back:
                raise Refused(
                    f"{self.name}: the vectors of {row.plan.new.model.model} are not all compared with their texts yet",
                    why="`restore --refresh` was asked for, and has not come to its end. Nothing was changed.",
                    hint=self._command(row.next),
                )
            work = self._work(row, allow_failed=allow_failed, allow_pending=allow_pending, limits=limits)

            def check_refused() -> None:
                if not back:
                    why = "Those rows would vanish from search."
                    self._check_refused(work, row.plan.new, allow_failed, command, why)

            def check() -> None:
                self._check_dependents(row, command)
                self._check_published(row, command)
                check_refused()
                self._check_follower(command, follow=follow, without_follower=without_follower)

            check()
            # The model that is left may be down, or gone: that is a reason to leave it, and must not bar the way.
            leaving = row.plan.new if back else row.plan.old
            work.catch_up = lambda numbers: backfill.catch_up(work, numbers, spared=leaving.number)
            with self._following(follow):
                if row.stage is Stage.VERIFIED:
                    trigger.check(self.control, row.plan)
                    self.observe(Note(serve.run(work).summary))
                both = [row.plan.old.number, row.plan.new.number]
                if refresh_old and not back:
                    self.observe(Note(backfill.refresh(work, row.plan.old, "cutover.refresh").summary))
                if not when.now:
                    self._wait(work, both, when)
                    check()
                with work.step(f"{command}.catch_up") as told:
                    left = work.catch_up(both)
                    told |= {"left": dict(left), "without_follower": without_follower}
                self._check_outside(work, back=back)
                # The model may have refused something only now.
                check_refused()
                if back:
                    self._tell_refused(work, row.plan.old)
                if any(left.values()):
                    self.observe(
                        Note(f"{max(left.values())} rows were written since, or are locked; the follower fills them")
                    )
                outcome = cutover.run(work, back=back)
        return self._result(command, outcome)

    def _expose_open(
        self,
        row: MigrationRow,
        *,
        from_: str | None,
        text: str | None,
        vector: str | None,
        refresh: bool,
        follow: bool,
        without_follower: bool,
        limits: PauseLimits,
    ) -> Exposed:
        plan, work = row.plan, self._work(row, limits=limits)
        _check_column(row, Request(vector=vector), self.name)
        if row.closing:
            raise Refused(
                f"{self.name} is being closed: {row.closing} has begun",
                why="Its views go. Nothing was changed.",
                hint=self._command(row.closing),
            )
        if from_ not in (None, plan.old.model.model):
            raise Refused(
                f"{self.name}: {plan.old.model.model} made the present vectors, not {from_}",
                why="A migration is open, and its plan says so. Nothing was changed.",
                hint=f"leave --from out: {self._command('expose')}",
            )
        if text not in (None, plan.text):
            raise Refused(
                f"{self.name}: the migration embeds {plan.text}, not {text}",
                why="A migration is open, and its plan says so. Nothing was changed.",
                hint=f"leave --text out: {self._command('expose')}",
            )
        table, known = read_table(self.control, self.oid), self.ledger.views()
        both = row.stage.reached(Stage.VERIFIED)
        if row.stage is not Stage.VERIFIED:
            state = f"the migration is at {row.stage}"
            self._check_idle(state, follow=follow and not both, without_follower=without_follower, guarded=both)
        generations = (plan.old, plan.new) if both else (plan.old,)
        schemas = [plan.view_schema(generation) for generation in generations]
        expose.check(self.control, table, schemas, known, self._command("expose"))
        if refresh:
            expose.check_droppable(self.control, list(known.values()), self._command("expose --refresh"))
        if row.stage is Stage.VERIFIED:
            self._check_follower("expose", follow=follow, without_follower=without_follower)
        with self._following(follow and both):
            if row.stage is Stage.VERIFIED:
                trigger.check(self.control, plan)
                self.observe(Note(serve.run(work).summary))
            if both and plan.new.number not in known:
                with work.step("expose.catch_up") as told:
                    left = told["left"] = dict(work.catch_up([plan.old.number, plan.new.number]))
                if missing := left[plan.new.number] + work.refused_rows(plan.new):
                    self.observe(
                        Note(
                            f"{missing} rows have no vector of {plan.new.model.model} yet: locked, written just now, or"
                            " refused by it; searches by its view miss them"
                        )
                    )
            numbers = {g.number: self.ledger.attnum(g.number) for g in (plan.old, plan.new)}
            sides = [
                ViewSide(generation.number, schema, generation.model.model, number)
                for generation, schema in zip(generations, schemas, strict=True)
                if (number := numbers[generation.number]) is not None
            ]
            hidden = frozenset(number for number in numbers.values() if number is not None)
            table = read_table(self.control, self.oid)
            outcome = self._make_views(table, sides, plan.column, hidden, row.id, refresh, limits)
        return self._exposed(table, outcome, self.latest())

    def _make_views(
        self,
        table: Table,
        sides: Sequence[ViewSide],
        column: str,
        hidden: frozenset[int],
        migration: int | None,
        refresh: bool,
        limits: PauseLimits,
    ) -> Outcome:
        return expose.run(
            self.control,
            self.ledger,
            table,
            sides,
            column,
            hidden,
            migration=migration,
            refresh=refresh,
            limits=limits,
            observe=self.observe,
        )

    def _check_idle(self, state: str, *, follow: bool, without_follower: bool, guarded: bool = False) -> None:
        """Options of `expose` that cannot act now: a wish is refused, a consent that is not asked for is said to be idle."""
        why = "Before VERIFIED the live model alone has a view, and nothing of its vectors is pending"
        if follow:
            raise Refused(
                f"{self.name}: {state}, so --follow has nothing to do",
                why=f"{why}; from VERIFIED on --follow keeps both models' views fresh. Nothing was changed.",
                hint=f"leave it out: {self._command('expose')}",
            )
        if without_follower:
            why = "expose asks for a follower at VERIFIED alone" if guarded else f"{why}; it is a consent for VERIFIED"
            self.observe(Note(f"--without-follower has no effect now: {state}. {why}"))

    def _live_on_record(self, from_: str | None, text: str | None, vector: str | None) -> LiveGeneration | None:
        """The live generation on record; refused where there are several, or another model or text is named."""
        lives = self.ledger.lives(vector) if ledgers.exists(self.control) else []
        if len(lives) > 1:
            several = "; ".join(f"{live.column}: {live.model.model}" for live in lives)
            raise Refused(
                f"{self.name} has several live models: {several}",
                why="One view cannot be of them all. Nothing was changed.",
                hint=f"name the column: revector expose {self.argument} --vector {lives[0].column}\n"
                "or, where they share it, expose once a migration is open",
            )
        if lives and from_ not in (None, lives[0].model.model):
            raise Refused(
                f"{self.name}: {lives[0].model.model} is on record for {lives[0].column}, not {from_}",
                why="Nothing was changed.",
                hint=f"leave --from out: {self._command('expose')}",
            )
        if lives and text not in (None, lives[0].text):
            raise Refused(
                f"{self.name}: the text of {lives[0].column} is on record as {lives[0].text}, not {text}",
                why="Nothing was changed.",
                hint=f"leave --text out: {self._command('expose')}",
            )
        return lives[0] if lives else None

    def _registered(
        self, table: Table, number: int, *, from_: str | None, text: str | None, vector: str | None
    ) -> LiveGeneration:
        """The live generation that the user names, compared with the vectors and put on record."""
        identity, said, column = identify(
            self.control,
            table,
            self.settings,
            from_=from_,
            text=text,
            vector=vector,
            note=lambda told: self.observe(Note(told)),
        )
        ledgers.ensure(self.control)
        self.ledger.register(number, column.number, said.given, identity, live=True)
        return LiveGeneration(number, column.number, said.given, identity, column.name, None)

    def _drop_views(self, step: str, views: Sequence[ExposedView], limits: PauseLimits) -> list[str]:
        gone = expose.drop(self.control, self.ledger, step, views, limits, self.observe)
        kept = [view.schema for view in views if view.schema is not None and view.schema not in gone]
        if gone:
            self.observe(Note(f"the view in {', '.join(gone)} is gone: whoever used it has the bare table now"))
        if kept:
            self.observe(Note(f"schema {', '.join(kept)} holds something that is not ours: it stays, without our view"))
        return gone

    def _close_views(self, row: MigrationRow, command: str, limits: PauseLimits) -> None:
        """What is left of both sides' views goes; abort leaves the live one to who had it before the migration."""
        plan = row.plan
        known = self.ledger.views()
        views = [view for number, view in known.items() if number in (plan.old.number, plan.new.number)]
        kept = [v for v in views if command == "abort" and v.number == plan.old.number and v.migration is None]
        self._drop_views(f"{command}.drop_views", [view for view in views if view not in kept], limits)
        for view in kept:
            self.observe(Note(f"{view.schema} stays: it was there before (revector expose {self.argument} --drop)"))

    def _departing_view(self, row: MigrationRow, command: str) -> sql.Identifier | None:
        """The view of the generation that goes, where it has one."""
        goes = row.plan.old if command == "finalize" else row.plan.new
        view = self.ledger.views().get(goes.number)
        return sql.Identifier(view.schema, view.view) if view and view.schema and view.view else None

    def _exposed(self, table: Table, outcome: Outcome, row: MigrationRow | None) -> Exposed:
        opened = row is not None and not row.stage.closed
        models = {live.number: live.model.model for live in self.ledger.lives()}
        if row is not None and opened:
            models |= {g.number: g.model.model for g in (row.plan.old, row.plan.new)}
        live = {generation.number for generation in self.ledger.lives()}
        sides = tuple(
            (models[number], self._search_path(view, table.schema), number in live)
            for number, view in self.ledger.views().items()
            if number in models and view.view is not None
        )
        following = (
            f"revector {row.next} {self.argument}"
            if row is not None and opened
            else f"revector plan {self.argument} --to MODEL"
        )
        stage = row.stage if row is not None else None
        return Exposed(self.name, stage, sides, outcome.summary, outcome.figures, following)

    def _search_path(self, view: ExposedView, schema: str) -> str:
        vectors = read_server(self.control).vector_schema
        return expose.search_path(self.control, view.schema or view.made_as, schema, *([vectors] if vectors else []))

    def _wait(self, work: Work, numbers: Sequence[int], when: Moment) -> None:
        """Everything slow is done; now only the moment is missing. Nothing is locked and no transaction is open."""
        for number in numbers:
            with suppress(RevectorError):  # catching up says what is wrong with it
                work.models[number]()
        work.catch_up(numbers)
        looked = time.monotonic()

        def meanwhile() -> None:
            nonlocal looked
            work.check_stop()
            if time.monotonic() - looked < _LOOK_WHILE_WAITING:
                return
            # A follower does it better; without one the moment must not find a day's work undone.
            if not self.ledger.followers():
                try:
                    work.catch_up(numbers)
                except Outage as error:
                    # It may have passed when the moment comes; if not, the swap is refused then.
                    work.note(f"{error}; asked again before the swap")
            looked = time.monotonic()

        seconds = wait(when, meanwhile=meanwhile, tell=work.note)
        work.check_stop()
        work.note(f"the moment has come, after {seconds:.0f} s")

    def _close(
        self,
        command: str,
        *,
        allow_failed: int = 0,
        drop_backup: bool = False,
        quiet_for: float = 0.0,
        limits: PauseLimits,
    ) -> Result:
        assert command in ("finalize", "abort")
        with self._explained(command):
            row = self.ledger.check_transition(command, self.latest(), self.name)
            plan = row.plan
            keep = plan.new if command == "finalize" else plan.old
            work = self._work(row, allow_failed=allow_failed, limits=limits)
            guarded = row.closing is None and row.stage in (Stage.SERVED, Stage.CUT_OVER)
            if drop_backup and plan.backup is None:
                self.observe(Note("--drop-backup has no effect: this migration has made no backup"))
            if command == "finalize" and row.closing:
                given = {"--allow-failed": allow_failed != 0, "--quiet-for": quiet_for != QUIET_FOR}
                if idle := ", ".join(name for name, said in given.items() if said):
                    self.observe(Note(f"{idle} has no effect now: finalize has begun, and only goes on"))

            def check_last(*, tell: bool) -> None:
                self._check_quiet(work, quiet_for, tell=tell)
                why = "The old vectors would be the last these rows have."
                self._check_refused(work, keep, allow_failed, command, why)

            if guarded and command == "finalize":
                trigger.check(self.control, plan)
                check_last(tell=True)
            if row.closing is None:
                self._check_views(row, command)
                self._check_holding(row, command)
            with self._catching_up(work, keep.number if guarded else None):
                if guarded:
                    with work.step(f"{command}.catch_up") as told:
                        told["left"] = dict(work.catch_up([keep.number]))
                    if command == "finalize":
                        # What was filled just now may be the old side's, and the model may have refused something only now.
                        check_last(tell=False)
                    self._check_outside(work, back=command == "abort")
                outcome = finalize.run(
                    work,
                    "finalize" if command == "finalize" else "abort",
                    str(row.stage),
                    row.closing,
                    self._departing_view(row, command),
                    self.ledger.retire_sql,
                    lambda: self._close_views(row, command, limits),
                    lambda: self._drop_backup(work) if drop_backup else None,
                )
            if command == "finalize" and (oid := self.ledger.owned().get(("backup", plan.backup or ""))):
                kept = self.control.row(block("work", "table_name"), table=oid)
                if kept is not None:
                    outcome = replace(outcome, figures={**outcome.figures, "backup": kept.relname})
        return self._result(command, outcome)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_same_dimension(self, row: MigrationRow, stopped: bool, command: str) -> None:
        old, new = row.plan.old.model, row.plan.new.model
        if old.dimension == new.dimension and not stopped:
            raise Refused(
                f"{self.name}: {old.model} and {new.model} both have {old.dimension} dimensions",
                why="A writer or reader of the bare table that still uses the other model would get wrong results, not an error.",
                hint=f"stop or upgrade them first, then: revector {command} {self.argument} --bare-writers-stopped",
            )
        if stopped:
            self.ledger.event("consent", {"bare_writers_stopped": True, "command": command})

    def _check_refused(self, work: Work, generation: Generation, allowed: int, command: str, why: str) -> None:
        refused = work.refused(generation)
        if len(refused) > allowed:
            model = generation.model.model
            raise GateFailed(
                f"{self.name}: {model} refuses {len(refused)} texts, {allowed} are allowed",
                why=f"{why} The first: {refused[0].error}. Nothing was changed.",
                hint=f"correct those texts, then: revector follow {self.argument} --once\n"
                f"or accept them: revector {command} {self.argument} --allow-failed {len(refused)}",
            )

    def _tell_refused(self, work: Work, generation: Generation) -> None:
        if refused := work.refused(generation):
            self.observe(
                Note(
                    f"{generation.model.model} refuses {len(refused)} texts: search does not find their rows until it takes"
                    f" them. The first: {refused[0].error}"
                )
            )

    def _check_outside(self, work: Work, *, back: bool) -> None:
        """Refuse to go forward where rows outside the filter would lose their vectors; going back says so."""
        outgoing, incoming = (work.plan.new, work.plan.old) if back else (work.plan.old, work.plan.new)
        lost = work.outside_lost(outgoing, incoming)
        if not lost:
            return
        told = f"{lost:,} rows outside --where {work.plan.filter} have a vector of {outgoing.model.model} alone"
        if back:
            self.observe(Note(f"{told}: they will not be found any more"))
            return
        raise Refused(
            f"{self.name}: {told}",
            why="They would vanish from search. Nothing was changed.",
            hint="they are locked by others: give the same command again"
            if work.plan.copies_outside
            else "set their vectors to NULL, or bring them inside, then give the same command again",
        )

    def _check_quiet(self, work: Work, quiet_for: float, *, tell: bool) -> None:
        """Say when each side was last written and read; refuse while the old one still is written."""
        plan, writes = work.plan, self.ledger.writes()
        if tell:
            for generation, answers in ((plan.new, True), (plan.old, False)):
                written, read = writes[generation.number][0], self._last_read(plan, generation, live=answers)
                known = self.control.connection.info.server_version >= _TELLS_READS
                self.observe(
                    Note(
                        f"{generation.model.model}: last written {_ago(written, 'not since SERVED')},"
                        f" last read {_ago(read, 'never' if known else 'unknown (PostgreSQL 16 or newer tells it)')}"
                    )
                )
        written, swapped = writes[plan.old.number]
        # Before the cutover the bare name was the old side's: that was no sign of life of an old version.
        if written is None or written >= quiet_for or (swapped is not None and written > swapped):
            return
        raise Refused(
            f"{self.name}: {plan.old.model.model} was written {_ago(written, '')}, within the last {_span(quiet_for)}",
            why="A version of the application still writes its vectors: it would fail, or search would miss its rows."
            " Nothing was changed.",
            hint=f"stop it, and in {_span(max(quiet_for - written, 1))}: revector finalize {self.argument}\n"
            f"or ask for less: revector finalize {self.argument} --quiet-for {_span(max(written // 2, 0))}",
        )

    def _last_read(self, plan: Plan, generation: Generation, *, live: bool) -> float | None:
        """Seconds since the vector indexes of a generation were last scanned; None: never, or not known."""
        if self.control.connection.info.server_version < _TELLS_READS:
            return None
        names = plan.index_names_of(generation, live=live)
        found = self.control.value(block("migration", "last_read"), table=plan.table_oid, names=names)
        return None if found is None else max(float(found), 0.0)

    @contextmanager
    def _catching_up(self, work: Work, number: int | None) -> Iterator[None]:
        """Keep one filler open, so that the lock is tried the moment after nothing was pending."""
        if number is None:
            yield
            return
        with backfill.Filler(work, [number]) as filler:
            work.catch_up = lambda _: filler.drain()
            yield

    def _drop_backup(self, work: Work) -> None:
        with work.step("finalize.drop_backup") as told:
            told["dropped"] = backup.drop(work)

    def _check_dependents(self, row: MigrationRow, command: str) -> None:
        table = read_table(self.control, self.oid)
        numbers = [self.ledger.attnum(generation.number) for generation in (row.plan.old, row.plan.new)]
        columns = [column for n in numbers if n is not None and (column := table.numbered(n)) is not None]
        settings = {column.name: set_on(self.control, self.oid, column.number) for column in columns}
        both = frozenset.intersection(*settings.values())
        # STORAGE PLAIN is left behind knowingly where the new model's vectors would not fit.
        left = {"STORAGE PLAIN"} if any("STORAGE PLAIN" in what for what, _ in row.plan.carried.left) else set()
        remedy = f"set it on both columns, or on neither: {', '.join(settings)}"
        for column in columns:
            found = [*dependents(self.control, table, column, row.plan.carried_names)]
            alone = sorted(settings[column.name] - both - left)
            found += [Dependent(f"{told} (set on {column.name} alone)", remedy) for told in alone]
            if found:
                raise Refused(
                    f"{self.name}: {len(found)} object(s) are tied to {column.name} and would stay behind: "
                    + "; ".join(d.description for d in found),
                    why="Nothing was changed.",
                    hint="\n".join(dict.fromkeys(d.remedy for d in found))
                    + f"\nthen: revector {command} {self.argument}",
                )

    def _check_published(self, row: MigrationRow, command: str) -> None:
        table = read_table(self.control, self.oid)
        column = table.column(row.plan.column)
        names = publishing(self.control, table, column)
        if names:
            rest = ", ".join(c.name for c in table.columns if c.name not in (column.name, row.plan.new.column))
            raise Refused(
                f"{self.name}: publication {', '.join(names)} sends {column.name} to subscribers",
                why="They know it by its name: they would stop at the rename, and going back would not heal them."
                " Nothing was changed.",
                hint=f"serve both versions by views instead: {self._command('expose')}\n"
                f"or publish without it: ALTER PUBLICATION {names[0]} SET TABLE {self.name} ({rest});"
                f" ALTER SUBSCRIPTION ... REFRESH PUBLICATION on each subscriber; then: revector {command} {self.argument}",
            )

    def _check_views(self, row: MigrationRow, command: str) -> None:
        """Nothing may be built on a view that goes; nor may a role be left with the setting of the side that goes."""
        plan = row.plan
        gone, views = (plan.old if command == "finalize" else plan.new), self.ledger.views()
        both = [view for number, view in views.items() if number in (plan.old.number, plan.new.number)]
        expose.check_droppable(self.control, both, self._command(command))
        if gone.number not in views:
            return
        whose = expose.searched_by(self.control, plan.view_schema(gone))
        if whose and command == "abort":
            self.observe(Note("\n".join(f"still to do: ALTER {name} RESET search_path;" for name in whose)))
        else:
            why = f"Its sessions ask for {gone.model.model}, which goes: they would fail."
            self._refuse_searching(whose, plan.view_schema(gone), why, command)

    def _refuse_searching(self, whose: Sequence[str], schema: str, why: str, command: str) -> None:
        """Refuse where the settings of roles or databases name the schema of a view that would go."""
        if whose:
            raise Refused(
                f"{self.name}: {', '.join(whose)} has {schema} in its search_path",
                why=f"{why} Nothing was changed.",
                hint="\n".join(f"ALTER {name} RESET search_path;" for name in whose)
                + f"\nthen: {self._command(command)}",
            )

    def _check_holding(self, row: MigrationRow, command: str) -> None:
        """Nothing may keep the departing column from being dropped: after the close there is no way but forward."""
        gone = row.plan.old if command == "finalize" else row.plan.new
        table, number = read_table(self.control, self.oid), self.ledger.attnum(gone.number)
        column = None if number is None else table.numbered(number)
        found = holding(self.control, table, column) if column is not None else ()
        if column is not None and found:
            raise Refused(
                f"{self.name}: {column.name} cannot be dropped: {'; '.join(d.description for d in found)}",
                why=f"It hangs on the vectors of {gone.model.model}, which go. Nothing was changed.",
                hint="\n".join(dict.fromkeys(d.remedy for d in found)) + f"\nthen: {self._command(command)}",
            )

    def _check_follower(self, command: str, *, follow: bool, without_follower: bool) -> None:
        if follow or self.ledger.followers():
            if without_follower:
                self.observe(Note("--without-follower has no effect now: a follower is alive"))
            return
        if without_follower:
            self.ledger.event("consent", {"without_follower": True})
            self.observe(
                Note(
                    "no follower runs: rows written from now on have no vector of the other model until one does,"
                    " and rollback would miss them"
                )
            )
            return
        troubled = [found.trouble for found in self.ledger.vigil() if found.trouble]
        if troubled:
            raise Refused(
                f"{self.name}: the follower is in trouble: {troubled[0]}",
                why="Until that is mended, rows edited after the swap vanish from the search of the model that fails."
                " Nothing was changed.",
                hint=f"mend it, or accept that on record: {self._command(command)} --without-follower",
            )
        raise Refused(
            f"{self.name}: no follower is alive",
            why="Without one, rows edited after the swap lose their vectors and vanish from search. Nothing was changed.",
            hint=f"in another terminal: revector follow {self.argument}\nor let this command stay and do it: --follow",
        )

    @contextmanager
    def _following(self, wanted: bool) -> Iterator[None]:
        """A follower of our own, alive before anything is switched; it goes on in `follow_on`."""
        if not wanted:
            yield
            return
        if self._started is None:
            stop = lambda: self.stop() or self._unfollow.is_set()  # noqa: E731
            follower = Follower(self.settings, self.oid, observe=self.observe, stop=stop)
            thread = threading.Thread(target=follower.run, daemon=True)
            self._started = follower, thread
            thread.start()
            deadline = time.monotonic() + _FOLLOWER_PATIENCE
            while not self.ledger.followers():
                if self.stop():
                    raise Interrupted()
                if time.monotonic() > deadline or not thread.is_alive():
                    raise ServerLost("the follower did not come up", hint=self._command("status"))
                time.sleep(0.1)
        try:
            yield
        except BaseException:
            self._stop_following()
            raise

    def _stop_following(self) -> None:
        if self._started is not None:
            self._unfollow.set()
            self._started[1].join()
            self._started = None
            self._unfollow.clear()

    def follow_on(self) -> int:
        """Stay in the foreground with the follower that a command with `follow=True` started; returns rows filled.

        The table's `steer` lock is given back first: rollback and finalize come from elsewhere while this follows.
        """
        if self._started is None:
            return 0
        self.control.unlock("steer", self.oid)
        follower, thread = self._started
        while thread.is_alive():
            thread.join(0.2)
        return follower.filled

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _work(
        self,
        row: MigrationRow,
        *,
        allow_failed: int = 0,
        allow_pending: int = 1000,
        limits: PauseLimits = DEFAULT_LIMITS,
    ) -> Work:
        def ledger_on(session: Session) -> Ledger:
            other = Ledger(session, self.oid)
            other.migration = row.id
            return other

        work = Work(
            plan=row.plan,
            database=self.database,
            control=self.control,
            ledger=self.ledger,
            ledger_on=ledger_on,
            models=checked_models(row.plan, self.settings, self._purse_of(row)),
            observe=self.observe,
            stop=self.stop,
            batch_size=row.batch_size,
            throttle=Throttle(row.limits),
            rate=float(row.facts.get("rate", 100.0)),
            allow_failed=allow_failed,
            allow_pending=allow_pending,
            limits=limits,
        )
        work.catch_up = lambda numbers: backfill.catch_up(work, numbers)
        return work

    @contextmanager
    def _explained(self, command: str) -> Iterator[None]:
        """PostgreSQL's errors become ours; a model's failure, or a lock not taken, says what is true and what comes next."""
        try:
            with translated(self._command(command)):
                yield
        except RevectorError as error:
            with suppress(psycopg.Error, RevectorError):  # the first error is the one that counts
                row = self.latest()
                if row is not None and not row.stage.closed:
                    row.explain(error, self._command(command))
                elif isinstance(error, KeyRejected | Outage | InputRefused):
                    _explain_unplanned(error)
                elif isinstance(error, PauseBudgetMissed) and (live := self.ledger.live()) is not None:
                    error.why = f"{error.why} {live.model.model} answers.".strip()
            raise

    def _purse_of(self, row: MigrationRow) -> Purse:
        """What this process counts its requests with."""
        if self._purse is None or self._purse.migration != row.id:
            if self._purse is not None:
                self._purse.close()
            self._purse = Purse(
                self.database, row.id, self.argument, stop=self.stop, note=lambda text: self.observe(Note(text))
            )
        return self._purse

    def _command(self, verb: str) -> str:
        return f"revector {verb} {self.argument}"

    def _result(self, command: str, outcome: Outcome) -> Result:
        with translated(self._command(command)):
            row = self.latest()
        assert row is not None
        answering = row.plan.new if row.stage in (Stage.CUT_OVER, Stage.FINALIZED) else row.plan.old
        following = "" if row.stage.closed else f"revector {row.next} {self.argument}"
        return Result(self.name, command, row.stage, answering.model.model, outcome.summary, following, outcome.figures)

    def _status(self, *, check: bool) -> Status:
        known = ledgers.exists(self.control)
        row, live = (self.latest(), self.ledger.live()) if known else (None, None)
        if row is not None and not row.stage.closed:
            return self._open_status(row, check=check)
        table = None if check else read_table(self.control, self.oid)
        side = path = None
        if live is not None:
            view = self.ledger.views().get(live.number) if table is not None else None
            if table is not None and view is not None and view.view:
                path = self._search_path(view, table.schema)
            side = Side(live.column, live.model.model, live.model.dimension, None, search_path=path)
        total, how = self._rows(table.identifier, cheap=self._cheap()) if table is not None else _NOT_ASKED
        tail = "" if live else " --from MODEL"
        return Status(
            self.name,
            row.stage if row else None,
            None,
            side,
            None,
            total,
            None,
            None,
            self.ledger.followers() if known else 0,
            f"revector plan {self.argument}{tail} --to MODEL",
            known=how,
        )

    def _cheap(self) -> bool:
        """Whether the table is so small that reading all of it costs next to nothing."""
        return int(self.control.value(block("migration", "weight"), table=self.oid)) <= CHEAP

    def _rows(self, table: sql.Composable, inside: str = "true", *, cheap: bool) -> tuple[int, Known]:
        """How many rows there are: counted in a small table, else as the planner takes it from the table's statistics."""
        if cheap:
            return int(self.control.value(block("migration", "rows", table=table, inside=raw(inside)))), "exact"
        told = self.control.value(block("migration", "estimate", table=table, inside=raw(inside)))
        return int(told[0]["Plan"]["Plan Rows"]), "about"

    def _pending(
        self, row: MigrationRow, work: Work, generation: Generation, column: str, *, check: bool, cheap: bool
    ) -> tuple[int | None, Known]:
        """Rows pending in a generation; None: it cannot be told without reading the table."""
        parts = {"table": work.table, "column": sql.Identifier(column), "text": raw(row.plan.text_sql)}
        indexed = self.control.value(
            block("phases/verify", "index"), table=self.oid, name=generation.pending_index
        )  # by its name, for REINDEX CONCURRENTLY leaves another OID
        if indexed or cheap:
            limit = _COUNTED[check]
            with self.control.transaction():
                # The planner may not know yet how few rows are pending; it must not read the others for that.
                self.control.execute("SET LOCAL enable_seqscan = off")
                found = int(self.control.value(
                    block("phases/backfill", "pending_unrefused", **parts),
                    migration=row.id, generation=generation.number, limit=limit + 1,
                ))  # fmt: skip
            return (limit, "at least") if found > limit else (found, "exact")
        if check or row.stage.reached(Stage.INDEXED):
            return _NOT_ASKED
        # Proven when every block has been seen; what was written since is not known before there is an index.
        share, rows = (0.0, 0) if row.stage.reached(Stage.BACKFILLED) else self.ledger.unswept()
        if rows is None:
            rows, _ = self._rows(work.table, row.plan.inside, cheap=False)
        return round(share * rows), "about"

    def _open_status(self, row: MigrationRow, *, check: bool) -> Status:
        plan = row.plan
        work = self._work(row)
        answering, other = (plan.new, plan.old) if row.stage is Stage.CUT_OVER else (plan.old, plan.new)
        guarded = row.stage in (Stage.SERVED, Stage.CUT_OVER)
        cheap = not check and self._cheap()
        writes, views, schema = ({}, {}, "") if check else (self.ledger.writes(), self.ledger.views(), work.schema)

        def side(generation: Generation, column: str, role: str) -> Side:
            model, answers = generation.model, generation is answering
            view = views.get(generation.number)
            # Before SERVED the live column is the application's; what is pending then is no alert.
            asked = guarded or not (answers or check)
            pending, known = (
                self._pending(row, work, generation, column, check=check, cheap=cheap) if asked else _NOT_ASKED
            )
            return Side(
                column,
                model.model,
                model.dimension,
                pending,
                role,
                writes.get(generation.number, (None, None))[0],
                None if check else self._last_read(plan, generation, live=answers),
                self._search_path(view, schema) if view is not None and view.view else None,
                known,
            )

        live = side(answering, work.column(answering) or plan.column, "live")
        role = "previous" if row.stage is Stage.CUT_OVER else "candidate"
        second = side(other, column, role) if (column := work.column(other)) is not None else None
        vigil = tuple(self.ledger.vigil())
        now = Status(
            self.name,
            row.stage,
            row.closing,
            live,
            second,
            None,
            None,
            None,
            self.ledger.followers(),
            f"revector {row.next} {self.argument}",
            tuning=row.limits,
            vigil=vigil,
            spent=spent(self.control, row.id, row.limits),
            alerts=self._alerts(row, [s for s in (live, second) if s is not None], vigil, guarded=guarded),
        )
        if check:
            return now
        rows, known = self._rows(work.table, cheap=cheap)
        text, inside = raw(plan.text_sql), raw(plan.inside)
        return replace(
            now,
            rows=rows,
            known=known,
            blank=self.control.value(block("migration", "blank", table=work.table, text=text, inside=inside))
            if cheap
            else None,
            failed=sum(f.kind != "blank" for f in self.ledger.failures(plan.new.number).values()),
            backup=self._saved(row),
            written=self._written(row),
        )

    def _saved(self, row: MigrationRow) -> tuple[str, int, float] | None:
        name = row.plan.backup
        if not name or not (oid := self.ledger.owned().get(("backup", name))):
            return None
        found = self.control.row(block("migration", "backup_state"), table=oid, migration=row.id)
        return (name, found.bytes, found.age) if found and found.bytes is not None else None

    def _written(self, row: MigrationRow) -> tuple[int, float, float | None] | None:
        rows, hot = self.ledger.hot()
        expected = row.facts.get("hot_share")
        return (rows, round(hot / rows, 3), expected) if rows else None

    def _alerts(
        self, row: MigrationRow, sides: Sequence[Side], vigil: Sequence[Vigil], *, guarded: bool
    ) -> tuple[Alert, ...]:
        """What is wrong where two generations are to be kept fresh."""
        found: list[Alert] = []
        if row.closing is None and row.stage is not Stage.PLANNED:
            try:
                trigger.check(self.control, row.plan)
            except Refused as error:
                what = str(error).removeprefix(f"{row.plan.table}: ")
                found.append(Alert("trigger", f"{what}. {error.why}", error.hint))
        if not guarded:
            return tuple(found)
        # What cannot be counted may be pending.
        waiting = [side for side in sides if side.pending != 0]
        rows = " and ".join(
            f"how many rows have no vector of {side.model} cannot be told without its index"
            if side.pending is None
            else f"{'' if side.known == 'exact' else f'{side.known} '}{side.pending:,}"
            f" {'row has' if side.pending == 1 else 'rows have'} no vector of {side.model}"
            for side in waiting
        )
        follow = f"revector follow {self.argument}"
        ailing = [f for f in vigil if f.trouble]
        if not any(f.active for f in vigil):
            if ailing:
                found.append(
                    Alert("follower_trouble", f"the follower is in trouble: {ailing[0].trouble}", _log(ailing[0]))
                )
            elif waiting:
                found.append(Alert("follower_down", f"no follower is alive, and {rows}: search misses them", follow))
        found += [
            Alert("follower_late", f"a row is pending for {f.oldest:.0f} s: locked, or the model is too slow", _log(f))
            for f in vigil if f.active and f.oldest >= LATE
        ]  # fmt: skip
        found += self._lost_indexes(row)
        if wrong := self.control.row(block("migration", "last_alarm"), migration=row.id, seconds=ALARMING):
            told = wrong.figures
            found.append(
                Alert(
                    "wrong_model",
                    f"{told['rows']:,} rows came with vectors of {told['written_by']} in place of {told['model']},"
                    f" {_ago(wrong.age, '')}",
                    "stop the version of the application that uses the wrong model",
                )
            )
        return tuple(found)

    def _lost_indexes(self, row: MigrationRow) -> Iterator[Alert]:
        """Without its pending index a generation's pending rows are found by reading the whole table."""
        work = self._work(row)
        for generation in (row.plan.old, row.plan.new):
            what = index.pending_trouble(self.control, row.plan, generation)
            column = work.column(generation)
            if what and column is not None:
                yield Alert(
                    "pending_index",
                    f"{what}: followers, cutover and rollback read the whole table to find what lacks a vector of"
                    f" {generation.model.model}",
                    index.pending_repair(
                        row.plan, generation, work.table, work.schema, column, there=what.endswith("INVALID")
                    ),
                )


def _explain_unplanned(error: RevectorError) -> None:
    """Complete what a model's failure says where no migration is open: no plan was made, so nothing was done."""
    if "Nothing was changed" not in error.why:
        error.why = f"{error.why} Nothing was changed.".strip()
    if not error.hint:
        error.hint = "repair the model, or name another one with --from or --to"
    if "command" not in error.hint:
        error.hint += "\nthen the same command again"


def _log(follower: Vigil) -> str:
    return f"look at the follower's log on {follower.host} (process {follower.pid})"


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds)


def _span(seconds: float) -> str:
    """As `--quiet-for` takes it: `0`, `45s`, `10m`, `1h`, `2d`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size and not round(seconds) % size:
            return f"{round(seconds) // size}{unit}"
    return f"{round(seconds)}s" if round(seconds) else "0"


def _ago(seconds: float | None, nothing: str) -> str:
    if seconds is None:
        return nothing
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name} ago"
    return f"{seconds:.0f} s ago"


def way_back(session: Session, ledger: Ledger, name: str, vector: str | None) -> dict[str, Any]:
    """The parts of a `Request` that lead back to the newest backup; refused where there is none that can be used."""
    argument = shlex.quote(name)
    saved = ledger.backups() if ledgers.exists(session) else []
    if vector is not None:
        saved = [s for s in saved if s.plan.column == vector]
    if not saved:
        raise Refused(
            f"{name}: no migration of this table{f' and column {vector}' if vector else ''} has left a backup",
            why="Only `run --backup` makes one, before it changes anything. Nothing was changed.",
            hint=f"embed all rows with the old model: revector run {argument} --to MODEL",
        )
    lives = {(live.column, live.filter): live.model.model for live in ledger.lives()}
    usable = [
        s
        for s in saved
        if s.present and s.complete and lives.get((s.plan.column, s.plan.filter)) != s.plan.old.model.model
    ]
    if not usable:
        first = saved[0]
        model = first.plan.old.model.model
        if first.present and first.complete:
            raise Refused(
                f"{name}: {model}, whose vectors {first.present} holds, answers already",
                why="There is nothing to go back to. Nothing was changed.",
                hint=f"revector status {argument}",
            )
        raise Refused(
            f"{name}: the backup table {first.name} " + ("is incomplete" if first.present else "is gone"),
            why="Its vectors cannot be taken. Nothing was changed.",
            hint=f"embed all rows with the old model: revector run {argument} --to {model}",
        )
    chosen = usable[0]
    plan, table = chosen.plan, read_table(session, ledger.table)
    present = {column.name for column in table.columns}
    if gone := [key for key in plan.key if key not in present]:
        raise Refused(
            f"{name}: the key of {chosen.present} is {', '.join(plan.key)}, and the table has no {', '.join(gone)}",
            why="Without its key no vector of the backup can be given to its row. Nothing was changed.",
            hint=f"embed all rows with the old model: revector run {argument} --to {plan.old.model.model}",
        )
    if lost := sorted({*plan.key, "text_checksum", plan.column} - chosen.columns):
        raise Refused(
            f"{name}: the backup table {chosen.present} has no column {', '.join(lost)} any more",
            why="Somebody changed it. Nothing was changed.",
            hint=f"embed all rows with the old model: revector run {argument} --to {plan.old.model.model}",
        )
    source = Source(chosen.oid, chosen.present or chosen.name, plan.column, plan.key)
    return {
        "to": plan.old.model.model,
        "text": plan.text,
        "where": plan.filter,
        "vector": plan.column,
        "back": Back(source, plan.old.model, plan.live_indexes),
    }


def _asked(request: Request | None, to: str | None, from_: str | None) -> Request:
    asked = request or Request()
    return replace(asked, to=to or asked.to, from_=from_ or asked.from_)


def _check_column(row: MigrationRow, request: Request, name: str) -> None:
    """A table has one open migration: its other vector columns come after it."""
    plan = row.plan
    if request.vector in (None, plan.column):
        return
    following = row.next
    raise Refused(
        f"{name}: a migration {plan.old.model.model} -> {plan.new.model.model} of {plan.column} is open;"
        f" {request.vector} comes after it",
        why="One migration of a table at a time. Nothing was changed.",
        hint=f"complete it: revector {following} {plan.argument}"
        + ("" if row.closing or row.stage is Stage.CUT_OVER else f"\nor give it up: revector abort {plan.argument}"),
    )


def _as_planned(row: MigrationRow, request: Request, name: str) -> Request:
    """Omitted options take the open plan's values; a given one that differs is refused."""
    wrong = differs(row.plan, request)
    plan = row.plan
    if wrong:
        raise Refused(
            f"{name}: a migration {plan.old.model.model} -> {plan.new.model.model} is open with other options:"
            f" {', '.join(wrong)} was not planned",
            why="Half of the vectors would be of another plan. Nothing was changed.",
            hint=f"go on with it: revector run {plan.argument}\nor give it up first: revector abort {plan.argument}",
        )
    return replace(
        request,
        to=plan.new.model.model,
        from_=plan.old.model.model,
        text=plan.text,
        where=plan.filter,
        vector=plan.column,
        batch_size=request.batch_size or row.batch_size,
        backup=bool(plan.backup),
    )


def blocked(name: str, made: Draft) -> Refused:
    """One refusal that names every blocker with its remedy."""
    lines = [f"{f.title}: {f.finding}" for f in made.blockers]
    return Refused(
        f"{name}: {len(lines)} precondition(s) not met: " + "; ".join(lines),
        why=" ".join(f.why for f in made.blockers if f.why) + " Nothing was changed.",
        hint="\n".join(f.remedy for f in made.blockers if f.remedy),
    )


def _statements(plan: Plan, facts: Facts) -> tuple[tuple[str, str], ...]:
    table = facts.table.identifier
    renames = cutover.index_renames(plan, plan.schema, plan.old, plan.new)
    below = facts.table.partitions.parts if facts.table.partitions else ()
    leaf = next((part.identifier for part in below if part.kind == "r"), table)
    parts: Sequence[tuple[str, Sequence[sql.Composable]]] = (
        ("backup", backup.statements(plan, table) if plan.backup else ()),
        ("expand", expand.statements(plan, table)),
        ("backfill, for each window and line pointer", backfill.statements(plan, leaf)),
        ("index", index.statements(plan, table, below)),
        ("cutover: served", serve.statements(plan, table)),
        (
            "cutover",
            [
                *cutover.swap(plan, table, plan.old, plan.new),
                *renames.values(),
                *cutover.check_renames(plan, table, plan.old, plan.new),
            ],
        ),
        ("finalize", finalize.statements(plan, table, facts.server.version_num)),
    )
    return tuple((phase, statement.as_string(None)) for phase, statements in parts for statement in statements)
