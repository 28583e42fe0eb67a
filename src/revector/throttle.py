"""How fast we may write: the operator's limits, and backing off where the database or the application suffers.

`Throttle` is arithmetic on a clock: a writer asks it before each write how long to wait, and why. `Watch` feeds it from
the database through a session of its own, so that a change made in another terminal counts within a second or two.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import psycopg

from revector.db import Database, Session, block
from revector.errors import RevectorError

#: Seconds between two looks at limits and locks, and between two at the standbys.
LOOK: Final = 0.5
LOOK_AT_STANDBYS: Final = 2.0
#: A wait of 100 ms and a little more must not end unseen between two looks.
LOOK_AT_LOCKS: Final = 0.1
#: Standbys may be so late, seconds, unless the operator says otherwise; writing goes on below half of it.
MAX_LAG: Final = 10.0
#: The pauses between writes while others wait for our locks, seconds.
_SHORTEST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
#: A limited rate is kept over about so many seconds: one write is no more than that.
_GRAIN: Final = 0.2

#: A writer that has not asked for so many seconds does not write at present.
_OF_LATE: Final = 5.0

#: Why a writer waits.
PAUSED: Final = "paused"
RATE: Final = "rows per second"
LAG: Final = "replication lag"
BLOCKED: Final = "sessions waiting for us"


@dataclass(frozen=True, slots=True)
class Tuning:
    """What the operator has set for one migration; None: no limit."""

    #: The backfill waits until `resume`.
    paused: bool = False
    max_rows_per_second: float | None = None
    #: Seconds that a standby may be late; None: 10; 0: standbys are not looked at.
    max_lag: float | None = None
    tokens_per_minute: int | None = None
    requests_per_minute: int | None = None
    #: Money: what a million tokens costs, and what the migration may cost in all, in the same currency.
    price: float | None = None
    max_cost: float | None = None

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Tuning:
        """From the ledger's column; keys of a newer program are not ours."""
        return cls(**{name: told[name] for name in cls.__slots__ if name in told})

    def to_json(self) -> dict[str, Any]:
        """What is set, and nothing else."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}


NO_TUNING: Final = Tuning()


class Throttle:
    """One writer's brake. Safe to use from several threads: one writes, one watches."""

    def __init__(self, tuning: Tuning | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._tuning = tuning or Tuning()
        #: When somebody last wanted to write, by the clock.
        self.asked = float("-inf")
        #: Reason -> seconds waited for it.
        self.waited: dict[str, float] = {}
        self._counted_to = now()
        self._free_at = now()
        self._last = 0
        self._lagging = ""
        self._pause = 0.0
        self._pause_until = now()
        self._blocker = ""
        self._most: int | None = None

    @property
    def tuning(self) -> Tuning:
        """What the operator has set."""
        return self._tuning

    @tuning.setter
    def tuning(self, limits: Tuning) -> None:
        with self._lock:
            rate, before = limits.max_rows_per_second, self._tuning.max_rows_per_second
            self._tuning = limits
            if rate != before:
                # What the old rate still owed is counted anew.
                owed = self._last / rate if rate else 0.0
                self._free_at = min(self._free_at, self._now() + owed)

    def wait(self, *, urgent: bool = False) -> tuple[float, str]:
        """Seconds to wait before the next write, and why; (0, "") when there is no reason to.

        An urgent write, without which search would miss rows, is held up neither by a pause nor by late standbys.
        """
        with self._lock:
            self.asked = now = self._now()
            if self._tuning.paused and not urgent:
                return LOOK, PAUSED
            if self._lagging and not urgent:
                return LOOK, LAG
            if self._pause_until > now:
                return self._pause_until - now, BLOCKED
            if self._tuning.max_rows_per_second and self._free_at > now:
                return self._free_at - now, RATE
            return 0.0, ""

    def most(self) -> int | None:
        """Rows that one write may have now; None: as many as it likes."""
        with self._lock:
            rate = self._tuning.max_rows_per_second
            both = [n for n in (max(1, int(rate * _GRAIN)) if rate else None, self._most) if n is not None]
            return min(both, default=None)

    def wanted(self) -> bool:
        """Whether somebody wanted to write of late."""
        return self._now() - self.asked < _OF_LATE

    def wrote(self, rows: int) -> None:
        """So many rows have been written just now."""
        with self._lock:
            now = self._now()
            self._last = rows
            if rate := self._tuning.max_rows_per_second:
                # Time lost since, in the write itself above all, is made good; idle time is not saved up.
                self._free_at = max(self._free_at, now - _GRAIN) + rows / rate
            if self._pause:
                self._pause_until = now + self._pause

    def blocked(self, who: str) -> None:
        """A look at the locks: `who` waits for us, or nobody does (""). The pauses double, and shrink again."""
        with self._lock:
            self._blocker = who
            if who:
                self._pause = min(max(2 * self._pause, _SHORTEST_PAUSE), _LONGEST_PAUSE)
                self._pause_until = self._now() + self._pause
                self._most = max(1, (self._most or max(self._last, 2)) // 2)
            else:
                self._pause = self._pause / 2 if self._pause > _SHORTEST_PAUSE else 0.0
                if self._most is not None:
                    self._most = 2 * self._most if self._pause or self._most < 512 else None

    def lag(self, seconds: float, who: str = "") -> None:
        """A look at the standbys: the latest is so late."""
        with self._lock:
            most = MAX_LAG if self._tuning.max_lag is None else self._tuning.max_lag
            if most and seconds > (most / 2 if self._lagging else most):
                self._lagging = f"{who} is {seconds:.0f} s late"
            else:
                self._lagging = ""

    def words(self, reason: str) -> str:
        """The reason with what is known about it."""
        with self._lock:
            more = {LAG: self._lagging, BLOCKED: self._blocker}.get(reason, "")
        return f"{reason}: {more}" if more else reason

    def hold(
        self,
        stop: Callable[[], bool],
        tell: Callable[[str], None] = lambda _: None,
        *,
        urgent: bool = False,
        only_pause: bool = False,
    ) -> bool:
        """Wait until the next write may begin; False: asked to stop meanwhile. No transaction may be open.

        `tell` hears of each reason as it begins, and "" when the wait is over; waits that only keep a rate are not told.
        """
        told = ""
        try:
            while True:
                seconds, reason = self.wait(urgent=urgent)
                if not seconds or (only_pause and reason != PAUSED):
                    return True
                if stop():
                    return False
                if reason != told and reason != RATE:
                    told = reason
                    tell(self.words(reason))
                began = self._now()
                time.sleep(min(seconds, 0.1))
                with self._lock:  # two threads that wait at once wait no longer than one
                    more = self._now() - max(began, self._counted_to)
                    self.waited[reason] = self.waited.get(reason, 0.0) + max(more, 0.0)
                    self._counted_to = self._now()
        finally:
            if told:
                tell("")

    def figures(self) -> dict[str, float]:
        """Seconds waited, by reason."""
        return {reason: round(seconds, 1) for reason, seconds in self.waited.items() if seconds >= 0.05}


class Standbys:
    """How late the standbys are.

    The server's own `replay_lag` stands still while replay does, so the age of the oldest WAL that a standby has not
    replayed is measured here as well: every look notes how far the WAL had come.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._heads: deque[tuple[float, int]] = deque(maxlen=10_000)
        #: Whether the columns are there but hidden from this role.
        self.hidden = False

    def lag(self, rows: Sequence[Any]) -> tuple[float, str]:
        """The greatest lag in seconds and whose it is, from rows of `standbys`."""
        now = self._now()
        self.hidden = any(row.state is None for row in rows)
        seen = [row for row in rows if row.state is not None]
        worst, who = 0.0, ""
        for row in seen:
            behind = next((now - at for at, head in self._heads if row.place is not None and head > row.place), 0.0)
            # A standby that has everything may still show the lag of what came before.
            told = row.lag or 0.0 if row.place is None or row.place < row.head else 0.0
            if max(behind, told) > worst:
                worst, who = max(behind, told), row.name
        if seen:
            self._heads.append((now, seen[0].head))
            places = [row.place for row in seen if row.place is not None]
            while len(self._heads) > 1 and places and self._heads[0][1] <= min(places):
                self._heads.popleft()
        else:
            self._heads.clear()
        return worst, who


class Watch:
    """Feeds a `Throttle` from the database in a thread of its own, `always` or while somebody writes."""

    def __init__(
        self,
        database: Database,
        throttle: Throttle,
        migration: int | None,
        *,
        always: bool = False,
        batch_size: Callable[[int], None] = lambda _: None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.database, self.throttle, self.migration = database, throttle, migration
        #: Whether to look also while nobody writes: a model may take long for what is to be written next.
        self._always = always
        self._batch_size, self._note = batch_size, note
        #: The server processes of our writers.
        self.pids: set[int] = set()
        self._standbys = Standbys()
        self._told_hidden = False
        #: Whether somebody was seen waiting for us since the last full look.
        self._blocked = False

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Look for as long as the block lasts; a session that is lost is opened again, and is no reason to stop."""
        ended = threading.Event()
        thread = threading.Thread(target=self._run, args=(ended,), daemon=True, name="revector watch")
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join()

    def _run(self, ended: threading.Event) -> None:
        session: Session | None = None
        looked = looked_at_standbys = 0.0
        try:
            while not ended.wait(LOOK_AT_LOCKS if session is not None else 0.05):
                if not (self._always or self.throttle.wanted()):
                    continue
                try:
                    if session is None or session.connection.closed:
                        session = self.database.connect("watch")
                    if time.monotonic() - looked < LOOK:
                        self.glance(session)
                        continue
                    looked = time.monotonic()
                    standbys = time.monotonic() - looked_at_standbys >= LOOK_AT_STANDBYS
                    looked_at_standbys = time.monotonic() if standbys else looked_at_standbys
                    self.look(session, standbys=standbys)
                    continue
                except (RevectorError, psycopg.OperationalError):
                    pass  # the server is away, or full: the writers see it too
                except psycopg.Error as error:
                    self._note(f"nobody watches locks and standbys: {str(error).splitlines()[0]}")
                    return
                ended.wait(LOOK_AT_STANDBYS)
        finally:
            if session is not None:
                session.close()

    def glance(self, session: Session) -> None:
        """Look at the locks alone; between two full looks the pauses grow once, however long somebody waits."""
        if self.pids and not self._blocked:
            found = session.row(block("throttle", "blocked"), ours=list(self.pids))
            if found is not None:
                self._blocked = True
                self.throttle.blocked(f"process {found.pid} for {1000 * found.seconds:.0f} ms")

    def look(self, session: Session, *, standbys: bool) -> None:
        """One look at the limits, at who waits for us, and at the standbys."""
        row = session.row(block("throttle", "limits"), migration=self.migration)
        if row is not None:
            self.throttle.tuning = Tuning.from_json(row.limits)
            self._batch_size(row.batch_size)
        self.glance(session)
        if self.pids and not self._blocked:
            self.throttle.blocked("")
        self._blocked = False
        if standbys:
            late, who = self._standbys.lag(session.rows(block("throttle", "standbys")))
            self.throttle.lag(late, who)
            if self._standbys.hidden and not self._told_hidden:
                self._told_hidden = True
                self._note(
                    "there are standbys, but this role may not see how late they are, so replication lag slows nothing"
                    " down; to change that: GRANT pg_monitor TO the role that revector uses"
                )
