"""The follower: fills pending rows of every managed generation until it is told to stop.

It polls the pending indexes (0.1 ms when idle), embeds with no transaction open, and writes as the backfill does.
One follower a table is active; others stand by. It says that it lives every 2 s, reconnects when the server is lost,
and stops by itself when the migration is being closed.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Final

import psycopg
from psycopg import errors as pg

from revector import trigger
from revector.db import Database, Session
from revector.errors import Closing, Refused, RevectorError, ServerLost
from revector.ledger import Ledger, MigrationRow, Stage
from revector.phases.backfill import Filler
from revector.settings import Settings
from revector.work import Note, Observer, Progress, Work, checked_models

#: Seconds between two looks at the pending indexes, and between two heartbeats.
POLL: Final = 0.5
BEAT: Final = 2.0
#: A loop that has not come round for so long is not alive, whatever its heartbeat thread says.
_STUCK: Final = 120.0
_LONGEST_WAIT: Final = 10.0


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
    ) -> None:
        self.settings = settings
        self.database = Database(settings)
        self.table = table
        self.observe = observe
        self.stop = stop
        self.worker = str(uuid.uuid4())
        #: Whether it holds the follower lock.
        self.active = False
        self.filled = 0
        self._turned = time.monotonic()
        self._ended = threading.Event()

    def run(self) -> int:
        """Follow until stopped, or until the migration is closed; returns the rows filled."""
        wait = POLL
        beats = threading.Thread(target=self._beat, daemon=True)
        beats.start()
        try:
            while not self.stop():
                try:
                    if not self._session():
                        break
                    wait = POLL
                except (ServerLost, psycopg.OperationalError) as error:
                    self.active = False
                    self.observe(Note(f"the database was lost ({type(error).__name__}); trying again in {wait:.0f} s"))
                    self._rest(wait)
                    wait = min(2 * wait, _LONGEST_WAIT)
        finally:
            self._ended.set()
            beats.join()
        return self.filled

    def once(self) -> int:
        """Fill what is pending now, without being a follower that cutover counts on; returns the rows filled."""
        with self.database.connect("follow once") as control:
            work = self._work(control)
            if work is None:
                return 0
            row, ready = work
            with Filler(ready, managed(row)) as filler:
                for last in (False, False, True):
                    try:
                        filler.drain()
                        break
                    except (pg.UndefinedColumn, pg.UndefinedTable):
                        # A swap came between a column's name and its reading; the names are looked up again.
                        if last:
                            raise
                return filler.written

    def _work(self, control: Session) -> tuple[MigrationRow, Work] | None:
        ledger = Ledger(control, self.table)
        row = ledger.latest()
        if row is None or not managed(row):
            return None

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
            models=checked_models(row.plan, self.settings),
            observe=self.observe,
            stop=self.stop,
            batch_size=row.batch_size,
        )

    def _session(self) -> bool:
        """Follow over one connection; False when there is nothing left to follow."""
        with self.database.connect("follower control") as control:
            while not control.try_lock("follower", self.table):
                self._turned = time.monotonic()
                self._rest(1.0)
                if self.stop():
                    return False
            found = self._work(control)
            if found is None:
                self.observe(Note("no migration is open on this table: nothing to follow"))
                return False
            row, work = found
            ledger = Ledger(control, self.table)
            numbers: tuple[int, ...] = ()
            filler: Filler | None = None
            try:
                while not self.stop():
                    row = ledger.latest() or row
                    if managed(row) != numbers:
                        if not managed(row):
                            self.observe(Note("the migration is closed, or being closed: following ends"))
                            return False
                        numbers = managed(row)
                        if filler is not None:
                            filler.close()
                        filler = Filler(work, numbers)
                    assert filler is not None
                    try:
                        trigger.check(control, row.plan)
                    except Refused:
                        # A closing drops the trigger and says so in the ledger; anything else is somebody's doing.
                        if managed(ledger.latest() or row):
                            raise
                        continue
                    self.active = True
                    # Before that the sweeps fill the candidate, and there is no index to poll.
                    if row.stage.reached(Stage.INDEXED) and (written := self._walk(filler)):
                        self.filled += written
                        self.observe(Progress("follow", self.filled, self.filled, "rows filled"))
                    self._turned = time.monotonic()
                    self._rest(POLL)
            finally:
                self.active = False
                if filler is not None:
                    filler.close()
        return False

    def _walk(self, filler: Filler) -> int:
        """One walk; a swap or a closing that comes in its way is seen on the next turn."""
        try:
            return filler.walk()
        except (pg.UndefinedColumn, pg.UndefinedTable, Closing):
            return 0

    def _rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.stop():
            time.sleep(min(0.1, seconds))

    def _beat(self) -> None:
        """Heartbeats through a session of their own, for one long batch must not look like death."""
        session: Session | None = None
        try:
            while not self._ended.wait(0 if session is None else BEAT):
                try:
                    if session is None:
                        session = self.database.connect("heartbeat")
                    alive = self.active and time.monotonic() - self._turned < _STUCK
                    Ledger(session, self.table).beat(self.worker, os.getpid(), active=alive)
                except (RevectorError, psycopg.Error):
                    session = None
                    self._ended.wait(BEAT)
            if session is not None:
                Ledger(session, self.table).gone(self.worker)
        except (RevectorError, psycopg.Error):
            pass  # the server is gone; an old heartbeat counts for nothing after 10 s
        finally:
            if session is not None:
                session.close()
