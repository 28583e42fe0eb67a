"""The follower: fills pending rows of every managed generation until it is told to stop.

It polls the pending indexes (a handful of buffers when idle), embeds with no transaction open, and writes as the
backfill does. One follower a table is active; others stand by with their models loaded. It says that it lives every
2 s, reconnects when the server is lost, leaves a failing model alone for a while without neglecting the other one, and
stops by itself when the migration is being closed.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Final

import psycopg
from psycopg import errors as pg

from revector import trigger
from revector.db import Database, Session
from revector.embed import Embedder
from revector.errors import Closing, Interrupted, Refused, Resumable, RevectorError, ServerLost
from revector.ledger import Ledger, MigrationRow, Stage
from revector.phases import index
from revector.phases.backfill import Filler
from revector.plan import Plan
from revector.settings import Settings
from revector.spending import Purse
from revector.throttle import Throttle
from revector.work import Health, Note, Observer, Progress, Work, checked_models

#: Seconds between two looks at the pending indexes, between two heartbeats, and between two health lines.
POLL: Final = 0.5
BEAT: Final = 2.0
HEALTH: Final = 60.0
#: A walk through many pending rows is cut after so many seconds, to say how it goes and to look at the stage.
TURN: Final = 2.0
#: Seconds between two looks whether the pending indexes are there. Without them a walk reads the whole table: then
#: the follower rests so many times as long as it took.
_LOOK_AT_INDEXES: Final = 5.0
_REST_TIMES: Final = 10
#: Somebody's DDL is waited for so long; then the other partitions' rows have their turn.
_PATIENCE: Final = 1.0
#: A loop that has not come round for so long is not alive, whatever its heartbeat thread says.
_STUCK: Final = 120.0
#: Seconds between two attempts to come back: the first, and the longest.
_WAITS: Final = (0.5, 10.0)
#: A request is sent so often at a time: while it is repeated, the other model's rows wait.
_ATTEMPTS: Final = 2
#: Pending rows are counted for the health line up to this.
_MANY: Final = 100_000
#: A machine that loses its power must not hold the lock for the two hours that TCP waits by default.
_KEEPALIVE: Final = {"tcp_keepalives_idle": "5", "tcp_keepalives_interval": "2", "tcp_keepalives_count": "3"}


def managed(row: MigrationRow) -> tuple[int, ...]:
    """The generations that are kept fresh at this stage: the candidate, and from SERVED on the live one too."""
    if row.closing or row.stage.closed or row.stage is Stage.PLANNED:
        return ()
    if row.stage in (Stage.SERVED, Stage.CUT_OVER):
        return (row.plan.old.number, row.plan.new.number)
    return (row.plan.new.number,)


class Follower:
    """Keeps one table's generations fresh."""

    def __init__(
        self,
        settings: Settings,
        table: int,
        *,
        observe: Observer = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
        health_every: float = HEALTH,
    ) -> None:
        self.settings = settings
        self.database = Database(settings)
        self.table = table
        self.observe = observe
        self.stop = stop
        self.health_every = health_every
        self.worker = str(uuid.uuid4())
        #: Whether it holds the follower lock.
        self.active = False
        self.filled = 0
        #: What keeps it from its work; empty: nothing.
        self.trouble = ""
        #: Seconds that the oldest known pending row has been waiting, at the last look.
        self.oldest = 0.0
        self._turned = time.monotonic()
        self._told = (float("-inf"), "", "")
        self._wait = _WAITS[0]
        #: The pending indexes that are lost, and when they were looked at.
        self._unindexed: list[str] = []
        self._indexes_seen = float("-inf")
        self._ended = threading.Event()
        #: What the heartbeat tells has changed.
        self._changed = threading.Event()
        #: The plan's fingerprint, and its models: loaded and proven once, however often the server is lost.
        self._models: tuple[str, Mapping[int, Callable[[], Embedder]]] = ("", {})
        self._purse: Purse | None = None

    def run(self) -> int:
        """Follow until stopped, or until the migration is closed; returns the rows filled.

        Raises what no waiting mends: a rejected key when no other model is left to fill with, a trigger that is gone.
        """
        beats = threading.Thread(target=self._beat, daemon=True)
        beats.start()
        try:
            while not self.stop():
                try:
                    if not self._session():
                        break
                except Interrupted:
                    break
                except (
                    Resumable,
                    psycopg.OperationalError,
                    psycopg.InterfaceError,
                    pg.ReadOnlySqlTransaction,
                ) as error:
                    self._lost(error)
        finally:
            self._ended.set()
            self._changed.set()
            beats.join()
            self.close()
        return self.filled

    def once(self) -> int:
        """Fill what is pending now, without being a follower that cutover counts on; returns the rows filled."""
        with self.database.connect("follow once") as control, closing(self):
            work = self._work(control)
            if work is None:
                return 0
            row, ready = work
            # Who asks for it wants refused texts tried again: the model may have been at fault.
            ready.ledger.retry_failures()
            with self._explained(row), Filler(ready, managed(row), paced=True) as filler:
                for last in (False, False, True):
                    try:
                        filler.drain()
                        break
                    except (pg.UndefinedColumn, pg.UndefinedTable):
                        # A swap came between a column's name and its reading; the names are looked up again.
                        if last:
                            raise
                return filler.written

    @contextmanager
    def _explained(self, row: MigrationRow) -> Iterator[None]:
        try:
            yield
        except RevectorError as error:
            row.explain(error, f"revector follow {row.plan.argument} --once")
            raise

    def close(self) -> None:
        """Close the session that counts requests."""
        if self._purse is not None:
            self._purse.close()

    def _work(self, control: Session) -> tuple[MigrationRow, Work] | None:
        ledger = Ledger(control, self.table)
        row = ledger.latest()
        if row is None or not managed(row):
            return None
        if self._models[0] != row.fingerprint:
            if self._purse is not None:
                self._purse.close()
            self._purse = Purse(
                self.database,
                row.id,
                row.plan.argument,
                stop=self._still,
                note=lambda text: self.observe(Note(text)),
            )
            self._models = (row.fingerprint, checked_models(row.plan, self.settings, self._purse, _ATTEMPTS))

        def ledger_on(session: Session) -> Ledger:
            other = Ledger(session, self.table)
            other.migration = ledger.migration
            return other

        return row, Work(
            plan=row.plan,
            database=self.database,
            control=control,
            ledger=ledger,
            ledger_on=ledger_on,
            models=self._models[1],
            observe=self.observe,
            stop=self._still,
            batch_size=row.batch_size,
            throttle=Throttle(row.limits),
        )

    def _session(self) -> bool:
        """Follow over one connection; False when there is nothing left to follow."""
        with self.database.connect("follower control", **_KEEPALIVE) as control:
            if not self._locked(control):
                return False
            found = self._work(control)
            if found is None:
                self.observe(Note("no migration is open on this table: nothing to follow"))
                return False
            row, work = found
            ledger = Ledger(control, self.table)
            # The model may have been at fault when it refused them.
            work.ledger.retry_failures()
            numbers: tuple[int, ...] = ()
            filler: Filler | None = None
            proven = False
            try:
                while not self.stop():
                    row = ledger.latest() or row
                    if row.id != work.ledger.migration and managed(row):
                        return True  # one migration was closed and the next begun within a turn of ours
                    work.throttle.tuning, work.batch_size = row.limits, row.batch_size
                    if managed(row) != numbers:
                        if not managed(row):
                            self.observe(Note("the migration is closed, or being closed: following ends"))
                            return False
                        numbers = managed(row)
                        if filler is not None:
                            filler.close()
                        filler = Filler(work, numbers, enduring=True, paced=True, patience=_PATIENCE)
                        proven = False
                    assert filler is not None
                    begins = not proven and row.stage.reached(Stage.INDEXED)
                    if begins:
                        # Who is counted on must be able to embed, not only to wait; a swap counts on both models.
                        filler.prove([row.plan.old.number, row.plan.new.number])
                        proven = True
                    try:
                        trigger.check(control, row.plan)
                        if begins and not filler.troubles:
                            self._stand(active=True, trouble="")  # whatever its first walk finds to do
                        if row.stage.reached(Stage.INDEXED):
                            self._look_at_indexes(control, row.plan, numbers)
                        began = time.monotonic()
                        # Before that the sweeps fill the candidate, and there is no index to poll.
                        written = self._walk(filler) if row.stage.reached(Stage.INDEXED) else 0
                    except Refused:
                        # A closing drops the trigger and the column, and says so in the ledger; anything else is
                        # somebody's doing.
                        if managed(ledger.latest() or row):
                            raise
                        continue
                    except pg.LockNotAvailable:
                        # No session is lost by it; reading waits in the lock's queue, so this does not spin.
                        self._stand(active=self.active, trouble=f"{row.plan.table} is locked by somebody's DDL")
                        self._tell("trouble", self.trouble)
                        self._turned = time.monotonic()
                        self._rest(0.1)
                        continue
                    self._seen(filler)
                    if written:
                        self.filled += written
                        self.observe(Progress("follow", self.filled, self.filled, "rows filled"))
                    self._tell_health(filler, counted=row.stage.reached(Stage.INDEXED))
                    self._turned = time.monotonic()
                    if self._unindexed:
                        self._rest(min(max(POLL, _REST_TIMES * (self._turned - began)), HEALTH))
                    elif not filler.cut:
                        self._rest(POLL)
            finally:
                self._stand(active=False)
                if filler is not None:
                    filler.close()
        return False

    def _locked(self, control: Session) -> bool:
        """Take the follower's lock, or stand by until its holder is gone; False: stopped meanwhile."""
        loaded = False
        while not control.try_lock("follower", self.table):
            self._turned = time.monotonic()
            self._stand(active=False, trouble="")
            self._tell("standing by", "another follower is active")
            if not loaded and (found := self._work(control)) is not None:
                loaded = True
                for number in managed(found[0]):
                    try:
                        found[1].models[number]()
                    except RevectorError as error:
                        self.observe(Note(f"{error}; asked again when this follower takes over"))
            self._rest(1.0)
            if self.stop():
                return False
        return True

    def _walk(self, filler: Filler) -> int:
        """One walk; a swap or a closing that comes in its way is seen on the next turn."""
        try:
            return filler.walk(TURN)
        except (pg.UndefinedColumn, pg.UndefinedTable, Closing):
            return 0

    def _look_at_indexes(self, control: Session, plan: Plan, numbers: Sequence[int]) -> None:
        if time.monotonic() - self._indexes_seen >= _LOOK_AT_INDEXES or self._unindexed:
            lost = (index.pending_trouble(control, plan, plan.generation(number)) for number in numbers)
            self._unindexed = [what for what in lost if what]
            self._indexes_seen = time.monotonic()

    def _still(self) -> bool:
        """Whether to stop; who asks is not stuck, however long a batch or a wait takes."""
        self._turned = time.monotonic()
        return self.stop()

    def _seen(self, filler: Filler) -> None:
        """Note how it stands after a look. Raises when nothing can be filled, and no waiting will mend that."""
        self._wait, self.oldest = _WAITS[0], filler.oldest()
        errors = [trouble.error for trouble in filler.troubles.values()]
        barred = [filler.troubles[number].error for number in filler.numbers if number in filler.troubles]
        if len(barred) == len(filler.numbers) and not any(isinstance(error, Resumable) for error in barred):
            raise barred[0]
        troubles = [f"{error}. {error.why}".rstrip(". ") for error in errors]
        troubles += self._unindexed
        if locked := filler.locked():
            troubles.append(f"{', '.join(locked)} {'is' if len(locked) == 1 else 'are'} locked by somebody's DDL")
        self._stand(active=True, trouble="; ".join(troubles))

    def _stand(self, *, active: bool, trouble: str | None = None) -> None:
        """How it stands now; the heartbeat tells a change at once, for others wait for it. Trouble None: as before."""
        before = self.active, self.trouble
        self.active, self.trouble = active, self.trouble if trouble is None else trouble
        if (self.active, self.trouble) != before:
            self._changed.set()

    def _lost(self, error: Exception) -> None:
        """The database is away, or something that will pass: wait, twice as long each time."""
        if isinstance(error, pg.LockNotAvailable | pg.DeadlockDetected):
            trouble = "a lock was not to be had"
        elif isinstance(error, Resumable) and not isinstance(error, ServerLost):
            trouble = str(error)
        else:
            trouble = f"the database was lost ({type(error).__name__})"
        self._stand(active=False, trouble=trouble)
        self.observe(Note(f"{self.trouble}; trying again in {self._wait:.1f} s"))
        self._rest(self._wait)
        self._wait = min(2 * self._wait, _WAITS[1])

    def _tell_health(self, filler: Filler, *, counted: bool) -> None:
        """The health line: at once when something has changed, else from time to time."""
        state = "trouble" if self.trouble else "active"
        at, before, why = self._told
        if (before, why) == (state, self.trouble) and time.monotonic() - at < self.health_every:
            return
        try:
            countable = counted and not filler.locked()
            pending = sum(filler.pending(number, _MANY) for number in filler.numbers) if countable else None
        except (Refused, pg.UndefinedColumn, pg.UndefinedTable, pg.LockNotAvailable):
            return  # a swap, a closing or somebody's DDL came between; the next turn tells
        failures = sum(len(filler.work.ledger.failures(number)) for number in filler.numbers)
        self._told = (time.monotonic(), state, self.trouble)
        self.observe(Health(state, self.filled, pending, self.oldest, failures, self.trouble))

    def _tell(self, state: str, why: str) -> None:
        if self._told[1:] != (state, why) or time.monotonic() - self._told[0] >= self.health_every:
            self._told = (time.monotonic(), state, why)
            self.observe(Health(state, self.filled, None, 0.0, 0, why))

    def _rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.stop():
            time.sleep(min(0.1, seconds))

    def _beat(self) -> None:
        """Heartbeats through a session of their own, for one long batch must not look like death."""
        session: Session | None = None
        try:
            while not self._ended.is_set():
                try:
                    if session is None:
                        session = self.database.connect("heartbeat")
                    stuck = time.monotonic() - self._turned >= _STUCK
                    Ledger(session, self.table).beat(
                        self.worker,
                        os.getpid(),
                        active=self.active and not stuck and not self.trouble,
                        filled=self.filled,
                        oldest=self.oldest,
                        trouble="a step takes longer than two minutes" if stuck and self.active else self.trouble,
                    )
                    self._changed.wait(BEAT)
                    # Before the state is read again, so that no change is missed.
                    self._changed.clear()
                except (RevectorError, psycopg.Error):
                    if session is not None:
                        session.close()
                    session = None
                    self._ended.wait(BEAT)
            if session is not None:
                Ledger(session, self.table).gone(self.worker)
        except (RevectorError, psycopg.Error):
            pass  # the server is gone; an old heartbeat counts for nothing after 10 s
        finally:
            if session is not None:
                session.close()
