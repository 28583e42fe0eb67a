"""Fill the candidate: windows of heap blocks are read, embedded with no transaction open, and written back.

Lock: ROW EXCLUSIVE, a few milliseconds at a time. A crash leaves rows NULL, which is the queue: the next run reads
them again. `ctid` locates a row and a hash of its text proves it, so no edit is overwritten by a stale vector. Rows
are written one line-pointer offset at a time, so that page pruning makes room and the update stays HOT.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from psycopg import errors as pg
from psycopg import sql

from revector.db import Session, block, raw
from revector.embed import Embedder, Refusal
from revector.errors import Closing, GateFailed, Interrupted, PauseBudgetMissed, Refused, RevectorError
from revector.partitions import Detached, Leaf
from revector.plan import Generation, Plan, cut_name, hot_share
from revector.throttle import LAG, PAUSED, Watch
from revector.work import Effect, Outcome, Progress, Recorded, Work

#: A window holds about this much encoding, so that a kill costs little paid work ...
_WINDOW_SECONDS: Final = 30.0
#: ... in so many blocks and at most about so many rows, so that memory does not grow with the table.
_WINDOW_BLOCKS: Final = (8, 512)
_WINDOW_ROWS: Final = 1000
#: The first sweep takes every row; two more take stragglers. What is left is the pending index's and the follower's.
_SWEEPS: Final = 3
#: The number under which the windows of a copy from a backup are kept, beside those of the sweeps.
_FROM_BACKUP: Final = -1
_LONGEST_GAP: Final = 5.0
#: How long a writer keeps asking for ROW EXCLUSIVE while somebody's DDL holds the table.
_LOCK_PATIENCE: Final = 120.0
#: Seconds between two notes in the ledger that a side has written.
_NOTED_EVERY: Final = 2.0
_FILL_LIMIT: Final = 256
#: A walk holds so many places of pending rows in memory: each reading of the pending index sorts all that is in it.
_PLACES: Final = 50_000
#: Rows move while they are listed: a list of places is used for so many seconds, or for so many times what its reading
#: took, so that reading costs a small share of a walk however much is pending.
_LISTED: Final = 1.0
_LISTED_TIMES: Final = 10
#: So many seconds `refresh` goes on looking for stale rows that it cannot write, with no fewer of them left.
_REFRESH_PATIENCE: Final = 60.0
#: A model that fails is asked again after so many seconds, and after twice as many each time, up to so many.
_TRY_AGAIN: Final = (1.0, 60.0)
#: Of rows that came with a vector, so many are embedded again to see whether it is right, every so many seconds.
_SAMPLE: Final = 8
_SAMPLE_EVERY: Final = 10.0
#: Vectors of one text by one model are more alike than this, whatever precision each side computes with.
_ALIKE: Final = 0.9
#: Attempts at a write-back between whose snapshot and lock rows are moved to other leaves.
_MOVES: Final = 20
#: Little-endian machines store what COPY wants big-endian; (type name) -> (element type, bytes of an element).
_ELEMENT: Final = {"vector": ">f4", "halfvec": ">f2"}

#: A writing session. 400 ms is below the server's deadlock_timeout, so that we always yield first.
#: synchronous_commit = off is safe: a lost commit leaves NULLs, and commits are lost only from the end.
_WRITER: Final = {
    "revector.writer": "on",
    "lock_timeout": "400ms",
    "synchronous_commit": "off",
    "enable_seqscan": "off",
}
#: A batch of pending rows is looked up place by place. Any other plan reads all that is pending for each batch: the
#: statistics say that the pending index is empty, as it mostly is.
_BY_PLACE: Final = {
    "enable_indexscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}


@dataclass(slots=True)
class Rows:
    """Rows that wait for vectors: n places in the heap, hashes and texts."""

    #: (n,) uint32 block numbers and (n,) uint16 line-pointer offsets.
    blocks: NDArray[np.uint32]
    places: NDArray[np.uint16]
    #: (n,) int64 hashes of the texts as the server computes them.
    hashes: NDArray[np.int64]
    texts: list[str]

    @classmethod
    def of(cls, rows: Sequence[Any]) -> Rows:
        """From (tid, text, hash) rows."""
        tids = np.array([row.tid[1:-1].split(",") for row in rows], dtype=np.int64).reshape(-1, 2)
        return cls(
            tids[:, 0].astype(np.uint32),
            tids[:, 1].astype(np.uint16),
            np.array([row.hash for row in rows], dtype=np.int64),
            [row.text for row in rows],
        )


@dataclass(slots=True)
class _Window:
    leaf: Leaf
    lo: int
    hi: int
    rows: Rows
    #: (n, dim) float32; NaN where there is no vector.
    vectors: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    complete: bool = True


def run(work: Work) -> Outcome:
    """Sweep the table up to three times; BACKFILLED is proven when a sweep has seen every block."""
    plan, began = work.plan, time.monotonic()
    total = work.control.value(block("phases/backfill", "pending_count", **_parts(work, plan.new)))
    figures: dict[str, Any] = {"rows": 0, "hot": 0, "hot_expected": 0.0, "encode_s": 0.0, "refused": 0}
    if total:
        embedder = work.models[plan.new.number]()
        work.ledger.release_leases()
        work.observe(Progress("backfill", 0, total, "rows"))
        for sweep in range(_SWEEPS):
            if sweep and not _any_pending(work):
                break
            _make_windows(work, sweep, total)
            with work.step("backfill.sweep") as told:
                told |= {"sweep": sweep, **_Sweep(work, sweep, embedder, total, figures).run()}
    elapsed = time.monotonic() - began
    rows = max(figures["rows"], 1)
    figures |= {
        "hot_share": round(figures["hot"] / rows, 3),
        "hot_expected": round(figures["hot_expected"] / rows, 3),
        "throttled_s": work.throttle.figures(),
        "seconds": round(elapsed, 3),
        "encoder_busy": round(figures["encode_s"] / elapsed, 3) if elapsed else 0.0,
    }
    if plan.copies_outside:
        with work.step("backfill.outside") as told:
            told["rows"] = copy_outside(work)
    refused = work.refused(plan.new)
    if len(refused) > work.allow_failed:
        raise GateFailed(
            f"{plan.new.model.model} refuses {len(refused)} texts; {work.allow_failed} are allowed",
            why=f"The first: {refused[0].error}. All other rows are embedded; {plan.old.model.model} still answers.",
            hint=f"correct those texts, or: revector run {plan.argument} --allow-failed {len(refused)}",
        )
    with work.step("backfill", stage="BACKFILLED") as told:
        told |= figures
    hot = f", {figures['hot_share']:.0%} HOT of {figures['hot_expected']:.0%} expected" if figures["rows"] else ""
    waited = "".join(f", {seconds:,.1f} s held back by {reason}" for reason, seconds in figures["throttled_s"].items())
    return Outcome(f"{figures['rows']:,} rows embedded in {elapsed:,.1f} s{hot}{waited}", figures)


def statements(plan: Plan, table: sql.Composable) -> list[sql.Composable]:
    """What writes a window, as the run sends it for each line-pointer offset."""
    parts = {"table": table, "column": sql.Identifier(plan.new.column), "text": raw(plan.text_sql)}
    return [
        block("phases/backfill", "read_window", **parts),
        block("phases/backfill", "enter", table=table),
        block("phases/backfill", "write_place", **parts),
    ]


def _parts(work: Work, generation: Generation, session: Session | None = None) -> dict[str, sql.Composable]:
    """What the statements of a generation need, about the whole table; `_rows_of` reads one leaf with them."""
    column = work.column(generation, session)
    if column is None:
        raise Refused(
            f"{work.plan.table}: the column of generation {generation.number} is gone",
            hint=f"revector status {work.plan.argument}",
        )
    return {"table": work.table, "column": sql.Identifier(column), "text": raw(work.plan.text_sql)}


def _blocks(session: Session, leaf: Leaf) -> int:
    return int(session.value(block("phases/backfill", "blocks"), table=leaf.oid))


def _rows_of(
    work: Work, session: Session, leaf: Leaf, name: str, parts: Mapping[str, sql.Composable], **where: object
) -> list[Any]:
    """Read rows of one leaf, under the name that it has now. Raises `Detached` when somebody has dropped it."""
    while True:
        try:
            return list(session.rows(block("phases/backfill", name, **{**parts, "table": leaf.identifier}), **where))
        except pg.UndefinedTable:
            if leaf.oid == work.plan.table_oid:
                raise
            now = next((other for other in work.leaves(session) if other.oid == leaf.oid), leaf)
            if now == leaf:
                raise Detached(leaf.name) from None
            leaf = now


def _any_pending(work: Work) -> bool:
    parts = _parts(work, work.plan.new)
    return bool(work.control.value(
        block("phases/backfill", "pending_unrefused", **parts),
        migration=work.ledger.migration, generation=work.plan.new.number, limit=1,
    ))  # fmt: skip


def _make_windows(work: Work, sweep: int, rows: int) -> None:
    """Cut every leaf into windows, also one that came since; `rows`: how many were pending when the backfill began."""
    cut = work.ledger.cut(sweep)
    sizes = {leaf: _blocks(work.control, leaf) for leaf in work.leaves() if leaf.oid not in cut}
    if not sizes:
        return
    blocks = sum(sizes.values())
    wanted = min(_WINDOW_SECONDS * work.rate, _WINDOW_ROWS) / max(rows / max(blocks, 1), 1)
    low, high = _WINDOW_BLOCKS
    with work.step("backfill.windows") as told:
        size = high if sweep else int(min(max(wanted, low), high))
        for leaf, end in sizes.items():
            work.ledger.make_windows(sweep, leaf.oid, size, end)
        told |= {"sweep": sweep, "rows": rows, "blocks": blocks, "window": size, "leaves": len(sizes)}


class _Sweep:
    """One pass over the table's windows: reading, embedding and writing overlap, with one window between each."""

    def __init__(self, work: Work, sweep: int, embedder: Embedder, total: int, figures: dict[str, Any]) -> None:
        self.work, self.sweep, self.embedder, self.total, self.figures = work, sweep, embedder, total, figures
        self.holder = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.halt = threading.Event()
        self.finished = threading.Event()
        #: What stopped the encoder; raised once everything embedded is written.
        self.failed: RevectorError | None = None
        #: Leaf OID -> the share of HOT updates that its rows' shape allows.
        self.expected: dict[int, float] = {}
        self.watch = watch(work, always=True)
        #: Why nothing moves at present, as it was last told.
        self._told = ""
        self.to_encode: queue.Queue[_Window | None] = queue.Queue(1)
        self.to_write: queue.Queue[_Window | None] = queue.Queue(1)

    def run(self) -> dict[str, Any]:
        """The sweep's figures. Raises what any of its threads raised first."""
        before = dict(self.figures)
        with self.watch.watching(), ThreadPoolExecutor(3, "revector") as pool:
            threads = [pool.submit(self._guarded, target) for target in (self._read, self._write, self._beat)]
            try:
                self._guarded(self._encode)
            finally:
                for thread in threads[:2]:
                    thread.exception()
                self.finished.set()
        for thread in threads:
            thread.result()
        if self.failed is not None:
            raise self.failed
        self.work.check_stop()
        return {name: round(self.figures[name] - before[name], 3) for name in ("rows", "hot", "encode_s", "refused")}

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException:
            self.halt.set()
            raise

    def _asked_to_stop(self) -> bool:
        return self.work.stop() or self.halt.is_set()

    def _put(self, to: queue.Queue[_Window | None], item: _Window | None) -> None:
        while not self.halt.is_set() and (to is self.to_write or self.failed is None):
            try:
                to.put(item, timeout=0.2)
            except queue.Full:
                continue
            return

    def _get(self, source: queue.Queue[_Window | None]) -> _Window | None:
        while not self.halt.is_set():
            try:
                return source.get(timeout=0.2)
            except queue.Empty:
                continue
        return None

    def _beat(self) -> None:
        """Leases live as long as this process; their windows are ours until they are done."""
        with self.work.database.connect("leases") as session:
            ledger = self.work.ledger_on(session)
            while not self.finished.wait(5.0):
                ledger.beat_leases(self.holder)

    def _read(self) -> None:
        work = self.work
        with work.database.connect("reader", enable_seqscan="off") as session:
            ledger = work.ledger_on(session)
            while not (self.halt.is_set() or self.failed or work.stop()) and (
                taken := ledger.lease(self.sweep, self.holder)
            ):
                relation, lo, hi = taken
                leaf = next((leaf for leaf in work.leaves(session) if leaf.oid == relation), None)
                if leaf is None:  # detached or dropped since: nothing is left to do in it
                    ledger.window_done(self.sweep, relation, lo, 0, 0)
                    continue
                parts = _parts(work, work.plan.new, session)
                try:
                    rows = _rows_of(work, session, leaf, "read_window", parts, lo=f"({lo},0)", hi=f"({hi},0)")
                except Detached:
                    ledger.window_done(self.sweep, relation, lo, 0, 0)
                    continue
                self._put(self.to_encode, _Window(leaf, lo, hi, Rows.of(rows)))
        self._put(self.to_encode, None)

    def _encode(self) -> None:
        refused = set(self.work.ledger.failures(self.work.plan.new.number))
        while (window := self._get(self.to_encode)) is not None:
            began = time.monotonic()
            window.vectors, window.complete = self._vectors(window.rows, refused)
            self.figures["encode_s"] += time.monotonic() - began
            self._put(self.to_write, window)
            if self.failed is not None:
                break
        self._put(self.to_write, None)

    def _vectors(self, rows: Rows, refused: set[int]) -> tuple[NDArray[np.float32], bool]:
        """Embed a window; when asked to stop, what is done so far is kept and the window stays open."""
        work = self.work
        vectors = np.full((len(rows.texts), work.plan.new.model.dimension), np.nan, np.float32)
        first: dict[str, int] = {}
        same = [first.setdefault(text, n) for n, text in enumerate(rows.texts)]
        order = sorted(
            (n for n in first.values() if int(rows.hashes[n]) not in refused), key=lambda n: len(rows.texts[n])
        )
        size = work.batch_size
        complete = True
        for start in range(0, len(order), size):
            # A pause, or Ctrl-C, waits for one batch at most: a slow model may take long for it. A pause stops the encoder
            # too: what it makes costs money, and waits in memory.
            if not work.throttle.hold(self._asked_to_stop, self._tell, only_pause=True) or self._asked_to_stop():
                complete = False
                break
            chosen = order[start : start + size]
            try:
                vectors[chosen], bad = encode(work, work.plan.new, self.embedder, [rows.texts[n] for n in chosen])
            except RevectorError as error:
                # What is embedded already is paid for: it is written before the error is raised.
                self.failed, complete = error, False
                break
            for position, refusal in bad.items():
                text_hash = int(rows.hashes[chosen[position]])
                work.ledger.fail(work.plan.new.number, text_hash, refusal.kind, refusal.error)
                refused.add(text_hash)
                self.figures["refused"] += 1
        return vectors[same], complete

    def _write(self) -> None:
        work, plan = self.work, self.work.plan
        gap, told_of_snapshot = 0.0, False
        with writer(work, enable_nestloop="off") as session:
            self.watch.pids.add(session.pid)
            ledger = work.ledger_on(session)
            while (window := self._get(self.to_write)) is not None:
                have = (
                    np.flatnonzero(np.isfinite(window.vectors[:, 0])) if len(window.vectors) else np.empty(0, np.intp)
                )
                stage_rows(session, plan, window.rows, have, new=window.vectors)
                written = hot = 0
                for place, lo, hi in self._writes(window, have):
                    try:
                        rows, share = self._write_place(session, window, place, lo, hi)
                    except Detached:
                        break
                    work.throttle.wrote(rows)
                    written, hot = written + rows, hot + share
                    self.figures["rows"] += rows
                    self._progress("backfill")
                    self._rest(gap)
                gap = self._next_gap(session, window, gap, hot / written if written else 1.0)
                if gap >= _LONGEST_GAP and not told_of_snapshot:
                    told_of_snapshot = True
                    holder = session.value(block("phases/backfill", "in_the_way"))
                    work.note(f"few updates are HOT; in the way: {holder or 'no snapshot that this role can see'}")
                self.figures["hot"] += hot
                self.figures["hot_expected"] += written * self.expected[window.leaf.oid]
                work.observe(Effect("backfill.window"))
                if window.complete:
                    ledger.window_done(self.sweep, window.leaf.oid, window.lo, written, hot)
                    work.observe(Recorded("backfill.window", {"lo": window.lo, "written": written, "hot": hot}))
                self._progress("backfill")

    def _writes(self, window: _Window, have: NDArray[np.intp]) -> Iterator[tuple[int, int, int]]:
        """What one statement after another writes: a line-pointer offset in the blocks lo..hi.

        The throttle is asked before each, and says how many rows it may have. When we are asked to stop while it holds us
        back, what is in hand is given up: it stays NULL, which is the queue.
        """
        rows = window.rows

        def may_go() -> bool:
            if self.work.throttle.hold(self._asked_to_stop, self._tell):
                return True
            window.complete = False
            return False

        places = (
            (place, np.sort(rows.blocks[have][rows.places[have] == place]).tolist())
            for place in np.unique(rows.places[have]).tolist()
        )
        return _passes(self.work, places, window.lo, window.hi, may_go)

    def _tell(self, reason: str) -> None:
        """The progress line says why nothing moves."""
        if reason == self._told:
            return
        self._told = reason
        _tell_held(self.work, reason)
        self._progress(f"backfill: {reason}" if reason else "backfill")

    def _progress(self, phase: str) -> None:
        self.work.observe(Progress(phase, min(self.figures["rows"], self.total), self.total, "rows"))

    def _write_place(self, session: Session, window: _Window, place: int, lo: int, hi: int) -> tuple[int, int]:
        parts = {"text": raw(self.work.plan.text_sql)}
        with entered(self.work, session, window.leaf) as at:
            column = at.columns[self.work.plan.new.number]
            statement = block("phases/backfill", "write_place", column=column, table=at.table, **parts)
            rows = at.write(statement, place=place, lo=f"({lo},0)", hi=f"({hi},0)")
            return rows, _hot_since(at, session, window.leaf)

    def _rest(self, gap: float) -> None:
        """The gap between two passes; when we are asked to stop, what is in hand is written without."""
        until = time.monotonic() + gap
        while (left := until - time.monotonic()) > 0 and not self._asked_to_stop():
            time.sleep(min(left, 0.1))

    def _next_gap(self, session: Session, window: _Window, gap: float, share: float) -> float:
        """Below half of the share that the row shape allows, double the gap between passes; else shrink it."""
        leaf = window.leaf
        if leaf.oid not in self.expected:
            row = session.row(
                "SELECT pg_relation_size(oid)::float8 / nullif(greatest(reltuples, 0), 0) AS bytes"
                " FROM pg_class WHERE oid = %(t)s::oid",
                t=leaf.oid,
            )
            if row is None or row.bytes is None:  # never analysed: the window tells
                blocks = len(np.unique(window.rows.blocks))
                size = max(8192 * blocks / max(len(window.rows.blocks), 1), 24.0)
            else:
                size = max(row.bytes, 24.0)
            width = 8 + self.work.plan.new.model.dimension * (4 if self.work.plan.column_type == "vector" else 2)
            self.expected[leaf.oid] = hot_share(size, 20 if size + width > 2032 else width, max(1.0, 8168 / size))
        if share < 0.5 * self.expected[leaf.oid]:
            return min(max(2 * gap, 0.02), _LONGEST_GAP)
        return gap / 2 if gap > 0.02 else 0.0


def _passes(
    work: Work, places: Iterable[tuple[int, Sequence[int]]], lo: int, hi: int, may_go: Callable[[], bool]
) -> Iterator[tuple[int, int, int]]:
    """Line-pointer offset by offset the ranges of blocks to write at once: as many rows as the throttle allows by then.

    `places`: each offset with the blocks that have something to write at it.
    """
    for place, blocks in places:
        first, at = 0, lo
        while first < len(blocks):
            if not may_go():
                return
            end = first + (work.throttle.most() or len(blocks))
            until = hi if end >= len(blocks) else blocks[end]
            yield place, at, until
            first, at = end, until


def _tell_held(work: Work, reason: str) -> None:
    """Say why nothing is written at present; "": it goes on."""
    if reason == PAUSED:
        work.note(f"paused; it goes on after: revector resume {work.plan.argument}")
    elif reason:
        work.note(f"held back by {reason}")


def encode(
    work: Work, generation: Generation, embedder: Embedder, texts: list[str]
) -> tuple[NDArray[np.float32], dict[int, Any]]:
    """Vectors of the texts, (n, dim) float32 with NaN rows for refused inputs, and the refusals by position."""
    vectors, refusals = embedder.encode_isolating(texts, batch_size=work.batch_size)
    if vectors.shape != (len(texts), generation.model.dimension):
        raise Refused(
            f"{generation.model.model} gave vectors of shape {vectors.shape}, not {(len(texts), generation.model.dimension)}"
        )
    return vectors, refusals


def watch(work: Work, *, always: bool = False) -> Watch:
    """What feeds the work's throttle, `always` or only while somebody writes; it also keeps the batch size as `tune` sets it."""

    def batch_size(size: int) -> None:
        work.batch_size = size

    return Watch(
        work.database, work.throttle, work.ledger.migration, always=always, batch_size=batch_size, note=work.note
    )


@contextmanager
def writer(work: Work, **ground: str) -> Iterator[Session]:
    """A session whose writes are ours: the trigger trusts them, and the user's triggers do not fire where allowed."""
    with work.database.connect("writer", **_WRITER, **ground) as session:
        if session.value("SELECT has_parameter_privilege('session_replication_role', 'SET')"):
            session.execute("SET session_replication_role = replica")
        types = {
            "type": raw(work.plan.vector_sql_type(work.plan.old)),
            "other_type": raw(work.plan.vector_sql_type(work.plan.new)),
        }
        session.execute(block("phases/backfill", "staged", **types))
        yield session


@dataclass(frozen=True, slots=True)
class _Entered:
    """What is true inside a write transaction."""

    table: sql.Identifier
    #: Generation number -> the name that its column has now.
    columns: dict[int, sql.Identifier]
    #: HOT updates that the session had made before.
    hot: int
    session: Session
    #: Whether an UPDATE of the application's can move rows to another leaf.
    moves: bool
    #: Whether both generations are ours to fill.
    served: bool

    def write(self, statement: sql.Composable, **params: object) -> int:
        """Run a write-back; returns the rows written."""
        return int(self._tried(lambda: self.session.execute(statement, **params), 0))

    def ask(self, statement: sql.Composable, **params: object) -> list[Any]:
        """Run a write-back that tells something of what it wrote; returns its rows."""
        return list(self._tried(lambda: self.session.rows(statement, **params), ()))

    def _tried(self, run: Callable[[], Any], nothing: Any) -> Any:
        """Run a write-back where rows may move.

        A row that is moved to another leaf between our snapshot and our lock is an error even where locked rows are
        skipped; a new statement has a new snapshot, which does not see it. What is left after so many stays pending.
        """
        if not self.moves:
            return run()
        for _ in range(_MOVES):
            with suppress(pg.SerializationFailure), self.session.transaction():
                return run()
        return nothing


@contextmanager
def entered(work: Work, session: Session, leaf: Leaf, patience: float = _LOCK_PATIENCE) -> Iterator[_Entered]:
    """A write transaction in one leaf: ROW EXCLUSIVE first, then the names that the columns have now.

    SQL planned before a cutover would write the old model's vectors into the new column, hence the order. The leaf's
    lock is enough: a rename on the table needs every leaf. Raises `Closing` when the migration no longer wants writes,
    `Detached` when the leaf is not the table's any more.
    """
    with session.transaction():
        table = leaf.identifier if leaf.oid != work.plan.table_oid else work.table_on(session)
        _enter(work, session, table, leaf, patience)
        row = session.row(
            block("phases/backfill", "resolve"),
            relation=leaf.oid,
            migration=work.ledger.migration,
            old=work.plan.old.number,
            new=work.plan.new.number,
        )
        if row is None or row.closing or row.stage in ("FINALIZED", "ABORTED", "PLANNED") or not row.new_column:
            raise Closing(
                f"{work.plan.table}: the migration is being closed",
                why="Nothing more is written.",
                hint=f"revector status {work.plan.argument}",
            )
        if not row.attached:
            raise Detached(leaf.name)
        columns = {work.plan.old.number: row.old_column, work.plan.new.number: row.new_column}
        names = {number: sql.Identifier(name) for number, name in columns.items() if name}
        served = row.stage in ("SERVED", "CUT_OVER")
        yield _Entered(table, names, row.hot, session, leaf.oid != work.plan.table_oid, served)


def _enter(work: Work, session: Session, table: sql.Identifier, leaf: Leaf, patience: float) -> None:
    """Wait for ROW EXCLUSIVE in slices of lock_timeout: only somebody's DDL can be in the way."""
    deadline = time.monotonic() + patience
    while True:
        try:
            with session.transaction():
                session.execute(block("phases/backfill", "enter", table=table))
            return
        except pg.UndefinedTable:
            if leaf.oid == work.plan.table_oid:
                raise
            raise Detached(leaf.name) from None
        except (pg.LockNotAvailable, pg.DeadlockDetected):
            work.check_stop()
            if time.monotonic() > deadline:
                raise PauseBudgetMissed(
                    f"{work.plan.table} has been locked against writing for {patience:.0f} s",
                    why="Somebody's DDL holds it. Nothing is lost.",
                ) from None
            time.sleep(0.2)


def stage_rows(
    session: Session,
    plan: Plan,
    rows: Rows,
    chosen: NDArray[np.intp],
    *,
    old: NDArray[np.float32] | None = None,
    new: NDArray[np.float32] | None = None,
) -> None:
    """Put rows and their vectors into the session's temporary table, by binary COPY.

    `old` and `new` are (n, dim) float32 arrays parallel to `rows`; a generation that is None, or a row that is NaN in
    it, is staged as NULL. Format: PostgreSQL manual, COPY, "Binary Format"; pgvector src/vector.c, vector_recv.
    """
    session.execute(block("phases/backfill", "clear"))
    if not len(chosen):
        return
    element = _ELEMENT[plan.column_type]
    with session.connection.cursor().copy(block("phases/backfill", "copy")) as copy:
        copy.write(b"PGCOPY\n\xff\r\n\0" + bytes(8))
        for has_old in (False, True):
            for has_new in (False, True):
                part = [n for n in chosen.tolist() if _has(old, n) == has_old and _has(new, n) == has_new]
                if part and (has_old or has_new):
                    copy.write(
                        _records(rows, np.array(part), element, old if has_old else None, new if has_new else None)
                    )
        copy.write(b"\xff\xff")


def _has(vectors: NDArray[np.float32] | None, n: int) -> bool:
    return vectors is not None and bool(np.isfinite(vectors[n, 0]))


def _records(
    rows: Rows, part: NDArray[np.int64], element: str, old: NDArray[np.float32] | None, new: NDArray[np.float32] | None
) -> bytes:
    fields: list[tuple[str, str] | tuple[str, str, tuple[int, ...]]] = [
        ("fields", ">i2"), ("tid_len", ">i4"), ("block", ">u4"), ("place16", ">u2"),
        ("hash_len", ">i4"), ("hash", ">i8"), ("place_len", ">i4"), ("place", ">i4"),
    ]  # fmt: skip
    for name, vectors in (("a", old), ("b", new)):
        fields.append((f"{name}_len", ">i4"))
        if vectors is not None:
            fields += [(f"{name}_dim", ">i2"), (f"{name}_unused", ">i2"), (name, element, (vectors.shape[1],))]
    records = np.zeros(len(part), dtype=fields)
    records["fields"], records["tid_len"], records["hash_len"], records["place_len"] = 5, 6, 8, 4
    records["block"], records["place16"] = rows.blocks[part], rows.places[part]
    records["hash"], records["place"] = rows.hashes[part], rows.places[part]
    for name, vectors in (("a", old), ("b", new)):
        if vectors is None:
            records[f"{name}_len"] = -1
        else:
            records[f"{name}_len"] = 4 + vectors.shape[1] * int(element[-1])
            records[f"{name}_dim"] = vectors.shape[1]
            records[name] = vectors[part]
    return records.tobytes()


@dataclass(frozen=True, slots=True)
class Trouble:
    """A model that fails: the error, since when, and when it is asked again (by the monotonic clock)."""

    error: RevectorError
    since: float
    wait: float
    again: float


@dataclass(slots=True)
class _Way:
    """One way through all that is pending in some generations: where a walk is cut short, the next one goes on."""

    #: (leaf, place, hash of the text) -> when a look found it pending first: on the way before, and on this one.
    seen: dict[tuple[int, str, int], float] = field(default_factory=dict)
    met: dict[tuple[int, str, int], float] = field(default_factory=dict)
    #: The leaf that it has come to (0: it has not begun), the place in it, and the leaf's blocks when it came there.
    leaf: int = 0
    after: tuple[int, int] = (0, 0)
    end: int | None = None
    #: Places ahead in this leaf -> when they were listed first.
    ahead: dict[tuple[int, int], float] = field(default_factory=dict)
    #: The swap that was not settled when it began, and how many rows it has not filled since, or may have missed.
    swapped: str | None = None
    skipped: int = 0
    #: Leaves that somebody's DDL held, and their names.
    locked: dict[int, str] = field(default_factory=dict)

    def comes_to(self, leaf: int) -> None:
        """Begin with a leaf; 0: it is through, and the next walk begins anew."""
        self.leaf, self.after, self.end, self.ahead = leaf, (0, 0), None, {}

    def leaves_out(self, leaf: Leaf) -> None:
        """Pass a locked leaf; what is known to wait there goes on waiting."""
        self.locked[leaf.oid] = leaf.name
        self.skipped += 1
        self.met |= {key: since for key, since in self.seen.items() if key[0] == leaf.oid}


class Filler:
    """Fills pending rows of the managed generations through their pending indexes: catch-up and follower share it."""

    def __init__(
        self,
        work: Work,
        numbers: Sequence[int],
        *,
        enduring: bool = False,
        paced: bool = False,
        patience: float | None = None,
    ) -> None:
        self.work = work
        #: Seconds after which a leaf that somebody's DDL holds is left for the next way; None: whoever fills waits for it.
        self.patience = patience
        #: Whether the throttle is asked before each write. A command that waits to swap or to close is in a hurry.
        self.paced = paced
        #: The generations to fill: the new one before SERVED, both from then on.
        self.numbers = tuple(numbers)
        #: Whether a model that fails is left alone for a while, and the other one's rows are filled.
        self.enduring = enduring
        #: Generation number -> what is wrong with its model. Who does not endure is told when all else is written.
        self.troubles: dict[int, Trouble] = {}
        #: Generations -> the way through what is pending in them. A model that fails has one of its own.
        self._ways: dict[tuple[int, ...], _Way] = {}
        #: Whether the last walk ended because its time was up.
        self.cut = False
        waits = {} if patience is None else {"lock_timeout": f"{patience:.0f}s"}
        self.reader = work.database.connect("follower", enable_seqscan="off", **waits)
        self._writer = writer(work, **_BY_PLACE)
        self.session = self._writer.__enter__()
        self.written = 0
        #: Why nothing may be written at present, as it was last told.
        self._held = ""
        #: Generation number -> when its last write was noted.
        self._noted: dict[int, float] = {}
        #: (leaf, hash of the text) of rows whose other half a failing model still owes.
        self._halves: set[tuple[int, int]] = set()
        #: Rows that came with a vector of the wrong model, and when such a sample was embedded last.
        self.alarms = 0
        self._sampled = float("-inf")
        self.watch = watch(work)
        self.watch.pids.add(self.session.pid)
        self._watching = self.watch.watching()
        if paced:
            self._watching.__enter__()

    def __enter__(self) -> Filler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both sessions."""
        if self.paced:
            self._watching.__exit__(None, None, None)
        self.reader.close()
        self._writer.__exit__(None, None, None)

    def pending(self, number: int, limit: int = 1_000_000) -> int:
        """How many rows are pending in this generation and not refused by its model, counted up to `limit`."""
        statement = block(
            "phases/backfill", "pending_unrefused", **_parts(self.work, self.work.plan.generation(number), self.reader)
        )
        return int(self.reader.value(statement, migration=self.work.ledger.migration, generation=number, limit=limit))

    def walk(self, within: float | None = None) -> int:
        """One walk through all that is pending now, leaf by leaf in heap order; returns the rows written.

        After `within` seconds it ends, and the next walk goes on there: whoever is pending behind it is met when it
        begins anew. A locked row is skipped and met again on the next way, so a locked head cannot starve the rest. A
        model that fails keeps nobody from the other generation's rows. Raises what failed, at the end, unless this endures.
        """
        self.cut = False
        # Only who was held up at the last write asks before reading: a throttle that is asked looks at the database.
        if self._held and not self._may_write():
            return 0
        swapped = self.work.ledger_on(self.session).unsettled(self.work.plan.old.number)
        due = [number for number in self.troubles if time.monotonic() >= self.troubles[number].again]
        sound = tuple(number for number in self.numbers if number not in self.troubles)
        self._part_ways([sound, *((number,) for number in self.troubles)])
        walked = [sound] if sound else []
        written = self._walk_all(sound, swapped, within) if sound else 0
        for number in due:
            if number in self.numbers:
                walked.append((number,))
                written += self._walk_all((number,), swapped, within)
            else:  # counted on, though not filled yet
                self._prove(number)
        if self.troubles:
            if not self.enduring:
                raise self.troubles.popitem()[1].error
            for way in self._ways.values():
                way.skipped += 1
            return written
        # What was pending at the swap is no sign of the old side; a row that was locked may still be such a one.
        ways = [self._ways[numbers] for numbers in walked]
        if swapped is not None and all(not w.leaf and not w.skipped and w.swapped == swapped for w in ways):
            self.work.ledger_on(self.session).settle_swap(swapped)
        return written

    def _part_ways(self, wanted: Sequence[tuple[int, ...]]) -> None:
        """A model that fails, or answers again, changes who is filled together; since when rows wait is kept."""
        known: dict[tuple[int, str, int], float] = {}
        for numbers in [numbers for numbers in self._ways if numbers not in wanted]:
            way = self._ways.pop(numbers)
            known |= way.seen | way.met
        for numbers in wanted:
            self._ways.setdefault(numbers, _Way(seen=dict(known)))

    def prove(self, numbers: Sequence[int]) -> None:
        """Load and check these models now, so that whoever counts on this counts on models that answer."""
        for number in numbers:
            self._prove(number)

    def _prove(self, number: int) -> None:
        try:
            self.work.models[number]()
        except Interrupted:
            raise
        except RevectorError as error:
            self._in_trouble(number, error)
        else:
            self.troubles.pop(number, None)

    def oldest(self) -> float:
        """Seconds since a look first found something pending that is not filled yet; 0: nothing waits."""
        first = [trouble.since for trouble in self.troubles.values()]
        for way in self._ways.values():
            first += [*way.seen.values(), *way.met.values(), *way.ahead.values()]
        return max(0.0, time.monotonic() - min(first)) if first else 0.0

    def _walk_all(self, numbers: tuple[int, ...], swapped: str | None, within: float | None) -> int:
        way, until = self._ways[numbers], None if within is None else time.monotonic() + within
        names = self._names()
        leaves = self.work.leaves(self.reader) if self.work.plan.partitioned else (self._table,)
        here = [n for n, leaf in enumerate(leaves) if leaf.oid == way.leaf]
        if not here:
            way.comes_to(0)
            way.swapped, way.skipped = swapped, 0
        ahead = leaves[here[0] :] if here else leaves
        waiting = {leaf.oid for leaf in leaves}
        if len(leaves) > 1:
            with self._unless_locked():
                waiting = self._waiting(numbers, names) | {way.leaf}
            ahead = tuple(leaf for leaf in ahead if leaf.oid in waiting)
        way.locked = {oid: name for oid, name in way.locked.items() if oid in waiting}
        before = self.written
        for n, leaf in enumerate(ahead):
            if leaf.oid != way.leaf:
                way.comes_to(leaf.oid)
                if n and self._over(until):
                    break
            through = True
            with self._unless_locked(partial(way.leaves_out, leaf)):
                through = self._walk(way, leaf, numbers, names, until)
            if not through:
                break
        else:
            way.comes_to(0)
            way.seen, way.met = way.met, {}
        return self.written - before

    @contextmanager
    def _unless_locked(self, tell: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Leave off where somebody's DDL is in the way, for the other leaves' sake; who has patience waits, and raises."""
        try:
            yield
        except (pg.LockNotAvailable, PauseBudgetMissed):
            if self.patience is None:
                raise
            tell()

    def _entered(self, leaf: Leaf, patience: float | None = None) -> AbstractContextManager[_Entered]:
        given = self.patience if patience is None else patience
        return entered(self.work, self.session, leaf, _LOCK_PATIENCE if given is None else given)

    def locked(self) -> list[str]:
        """The leaves that the last look found locked."""
        return sorted({name for way in self._ways.values() for name in way.locked.values()})

    def _over(self, until: float | None) -> bool:
        self.cut = self.cut or (until is not None and time.monotonic() >= until)
        return self.cut

    def _names(self) -> dict[int, sql.Identifier]:
        """Generation number -> the name that its column has now, from the server's caches: an idle look reads little."""
        plan = self.work.plan
        rows = self.reader.rows(
            block("phases/backfill", "names"), table=plan.table_oid, numbers=[plan.old.number, plan.new.number]
        )
        found = {row.number: row.names for row in rows if row.names}
        for number in self.numbers:
            if number not in found:
                raise Refused(
                    f"{plan.table}: the column of generation {number} is gone", hint=f"revector status {plan.argument}"
                )
            schema, name, _ = found[number]
            self._table = Leaf(plan.table_oid, schema, name)
        return {number: sql.Identifier(names[2]) for number, names in found.items()}

    def _waiting(self, numbers: Sequence[int], names: Mapping[int, sql.Identifier]) -> set[int]:
        """The leaves with pending rows, asked at once: most of many have none."""
        parts = {"table": self._table.identifier, "text": raw(self.work.plan.text_sql)}
        return {
            row.oid
            for number in numbers
            for row in self.reader.rows(block("phases/backfill", "waiting", column=names[number], **parts))
        }

    def _walk(
        self, way: _Way, leaf: Leaf, numbers: Sequence[int], names: Mapping[int, sql.Identifier], until: float | None
    ) -> bool:
        """Go on through one leaf: where rows are pending is read for a second or more, what they hold batch by batch.

        Returns whether the leaf's end was reached.
        """
        try:
            if leaf.oid in way.locked:
                with self._entered(leaf, 0.0):  # before texts are embedded, which may cost money
                    del way.locked[leaf.oid]
            if way.end is None:
                # What is written behind the present end is for the next way: writers as fast as the model must not hold us.
                way.end = _blocks(self.reader, leaf)
            while True:
                asked = time.monotonic()
                places, last = self._places(leaf, numbers, names, way.after, way.end)
                read = time.monotonic()
                before, way.ahead = way.ahead, {place: way.ahead.get(place, read) for place in places}
                # What has left its place may be pending where this way has been already.
                way.skipped += len(before.keys() - way.ahead.keys())
                soon = read + _LISTED_TIMES * (read - asked)
                good, moved = max(soon, read + _LISTED), False
                while places:
                    # Who has met a row's empty place looks for the row as soon as the share allows.
                    if time.monotonic() >= (soon if moved else good):
                        break
                    limit = min(_FILL_LIMIT, (self.work.throttle.most() if self.paced else None) or _FILL_LIMIT)
                    some, places = places[:limit], places[limit:]
                    if self.work.stop():
                        return False
                    batch = self._texts(leaf, numbers, names, some)
                    # A row that has left its place may be pending at another one, which this way does not meet.
                    way.skipped += len(some) - len(batch)
                    moved = moved or len(batch) < len(some)
                    if batch:
                        now = time.monotonic()
                        keys = [(leaf.oid, r.tid, r.hash) for r in batch]
                        for key in keys:
                            way.met[key] = way.met.get(key) or way.seen.pop(key, way.ahead.get(_place(key[1]), now))
                        if self.paced and not self._may_write():
                            return False
                        needed = {number: {r.tid for r in batch if number in r.needed} for number in numbers}
                        count = self._fill(leaf, batch, needed)
                        way.skipped += len(batch) - count
                        if count == len(batch) and not self.troubles.keys() & set(numbers):
                            for key in keys:
                                del way.met[key]
                        self.work.throttle.wrote(count)
                    way.after = some[-1]
                    for place in some:
                        del way.ahead[place]
                    if all(number in self.troubles for number in numbers) or (places and self._over(until)):
                        return False
                else:
                    if last is None:
                        return True
                    # Who is pending beyond what was listed may come to be behind us unseen.
                    way.after, way.skipped = last, way.skipped + 1
                    if self._over(until):
                        return False
        except Detached:
            return True

    def _wanted(self, numbers: Sequence[int]) -> list[int]:
        return [number for number in numbers if number not in self.troubles or len(numbers) == 1]

    def _places(
        self, leaf: Leaf, numbers: Sequence[int], names: Mapping[int, sql.Identifier], after: tuple[int, int], end: int
    ) -> tuple[list[tuple[int, int]], tuple[int, int] | None]:
        """The places of rows pending in any of these generations, in heap order; and where to go on, None: these are all."""
        found: set[tuple[int, int]] = set()
        ends = []
        text = raw(self.work.plan.text_sql)
        for number in self._wanted(numbers):
            rows = _rows_of(
                self.work, self.reader, leaf, "pending_places", {"column": names[number], "text": text},
                after=_tid(after), end=f"({end},0)", migration=self.work.ledger.migration,
                generation=number, limit=_PLACES,
            )  # fmt: skip
            found.update(_place(row.tid) for row in rows)
            if len(rows) == _PLACES:
                ends.append(_place(rows[-1].tid))
        # Beyond the nearest end one generation has not been read yet.
        last = min(ends, default=None)
        return sorted(place for place in found if last is None or place <= last), last

    def _texts(
        self, leaf: Leaf, numbers: Sequence[int], names: Mapping[int, sql.Identifier], places: Sequence[tuple[int, int]]
    ) -> list[Any]:
        """(tid, text, hash, needed) of the rows that are at these places now and still lack one of these generations."""
        plan = self.work.plan
        new = names[plan.new.number]
        parts = {"old": names.get(plan.old.number, new), "new": new, "text": raw(plan.text_sql)}
        return _rows_of(
            self.work, self.reader, leaf, "pending_texts", parts,
            tids=[_tid(place) for place in places], old=plan.old.number, new=plan.new.number,
            wanted=self._wanted(numbers), migration=self.work.ledger.migration,
        )  # fmt: skip

    def _may_write(self) -> bool:
        """Wait for the throttle. Who endures waits for no resume and no standby: the stage may have moved on meanwhile."""
        throttle = self.work.throttle
        # From SERVED on these rows are missing from search until they are filled.
        urgent = self.work.plan.old.number in self.numbers
        if self.enduring:
            reason = throttle.wait(urgent=urgent)[1]
            held = throttle.words(reason) if reason in (PAUSED, LAG) else ""
            if held and not self._held:
                _tell_held(self.work, held)
            self._held = held
            if held:
                return False
        return throttle.hold(self.work.stop, partial(_tell_held, self.work), urgent=urgent)

    def drain(self) -> dict[int, int]:
        """Walk until nothing is pending, or what is pending no longer shrinks (locked by others, or written meanwhile).

        Returns generation number -> rows left.
        """
        before: int | None = None
        while True:
            written = self.walk()
            self.work.check_stop()
            left = {number: self.pending(number) for number in self.numbers}
            total = sum(left.values())
            if not total or (before is not None and total >= before):
                return left
            before = total
            if not written:
                time.sleep(0.5)

    def _fill(self, leaf: Leaf, batch: list[Any], needed: dict[int, set[str]]) -> int:
        plan, rows = self.work.plan, Rows.of(batch)
        vectors = {
            number: np.full((len(batch), plan.generation(number).model.dimension), np.nan, np.float32)
            for number in self.numbers
        }
        for number, places in needed.items():
            chosen = [n for n, r in enumerate(batch) if r.tid in places]
            try:
                self._embed(number, rows, chosen, vectors[number])
            except Interrupted:
                raise
            except RevectorError as error:
                # What is embedded already is paid for: it is written before anybody is told.
                self._in_trouble(number, error)
            else:
                if chosen:
                    self.troubles.pop(number, None)
        here = {(leaf.oid, int(text_hash)) for text_hash in rows.hashes}
        ours = here & self._halves
        if self.troubles:
            self._halves |= here
        if len(self.numbers) > 1 and plan.confusable:
            self._inspect(leaf, rows, batch, needed, vectors)
        old, new = vectors.get(plan.old.number), vectors.get(plan.new.number)
        stage_rows(self.session, plan, rows, np.arange(len(batch)), old=old, new=new)
        with self._entered(leaf) as at:
            parts = {"table": at.table, "text": raw(plan.text_sql), "new": at.columns[plan.new.number]}
            if at.served:
                told = at.ask(block("phases/backfill", "fill", old=at.columns[plan.old.number], **parts))
                count = sum(int(row.rows) for row in told)
                # A row that we have filled by halves lacks the other half because of us.
                if not ours:
                    self._note_writes(told)
                elif not self.troubles:
                    self._halves -= ours
            else:
                count = at.write(block("phases/backfill", "fill_candidate", **parts))
        self.written += count
        return count

    def _embed(self, number: int, rows: Rows, chosen: list[int], vectors: NDArray[np.float32]) -> None:
        """Embed some of the rows into their places of `vectors`; refused texts are recorded, and stay NaN."""
        generation = self.work.plan.generation(number)
        for start in range(0, len(chosen), self.work.batch_size):
            if self.work.stop():
                return
            some = chosen[start : start + self.work.batch_size]
            embedder = self.work.models[number]()
            vectors[some], bad = encode(self.work, generation, embedder, [rows.texts[n] for n in some])
            for position, refusal in bad.items():
                self.work.ledger_on(self.session).fail(
                    number, int(rows.hashes[some[position]]), refusal.kind, refusal.error
                )

    def _inspect(
        self,
        leaf: Leaf,
        rows: Rows,
        batch: list[Any],
        needed: Mapping[int, set[str]],
        vectors: Mapping[int, NDArray[np.float32]],
    ) -> None:
        """Alarm when the vector that a row came with is of the wrong model, and make that row pending.

        Where both models' vectors fit one column nothing else would show it. A row that lacks only one side's vector came
        with the other's: is that what the missing side's model has just given for this text, the writer used the wrong
        model. Of the rest a sample is embedded again, for a third model could have been at work.
        """
        plan = self.work.plan
        for own, other in ((plan.old, plan.new), (plan.new, plan.old)):
            mine, theirs = needed.get(own.number, set()), needed.get(other.number, set())
            chosen = [n for n, r in enumerate(batch) if r.tid in theirs - mine and _has(vectors[other.number], n)]
            if not chosen or own.number in self.troubles:
                continue
            tids, hashes = [batch[n].tid for n in chosen], [int(rows.hashes[n]) for n in chosen]
            parts = _parts(self.work, own, self.reader)
            given = {r.tid: r for r in _rows_of(self.work, self.reader, leaf, "given", parts, tids=tids, hashes=hashes)}
            theirs_of = {
                n: _cosine(given[batch[n].tid].vector, vectors[other.number][n])
                for n in chosen
                if batch[n].tid in given
            }
            suspects = [n for n, cosine in theirs_of.items() if cosine >= _ALIKE]
            rest = [n for n in theirs_of if n not in suspects][:_SAMPLE]
            if time.monotonic() - self._sampled < _SAMPLE_EVERY:
                rest = []
            elif rest:
                self._sampled = time.monotonic()
            if not suspects + rest:
                continue
            try:
                fresh, _ = encode(
                    self.work, own, self.work.models[own.number](), [rows.texts[n] for n in suspects + rest]
                )
            except RevectorError as error:
                self._in_trouble(own.number, error)
                continue
            wrong = set()
            for n, vector in zip(suspects + rest, fresh, strict=True):
                right = _cosine(given[batch[n].tid].vector, vector)
                if np.isfinite(vector[0]) and (theirs_of[n] > right if n in suspects else right < _ALIKE):
                    wrong.add(n)
            by = other.model.model if wrong & set(suspects) else "another model"
            if wrong:
                self._alarm(leaf, own, by, [given[batch[n].tid] for n in sorted(wrong)])

    def _alarm(self, leaf: Leaf, generation: Generation, by: str, found: list[Any]) -> None:
        """Make the rows pending, unless somebody has written them meanwhile, and say so on record."""
        with self._entered(leaf) as at:
            cleared = at.ask(
                block("phases/backfill", "clear_wrong", table=at.table, column=at.columns[generation.number]),
                tids=[r.tid for r in found],
                sums=[r.sum for r in found],
            )
        if not cleared:
            return
        model = generation.model.model
        self.alarms += len(cleared)
        self.work.ledger_on(self.session).record("alarm", {"model": model, "rows": len(cleared), "written_by": by})
        self.work.note(
            f"ALARM: {len(cleared)} rows were written with vectors of {by} as if they were of {model}; they are embedded"
            " again. A version of the application uses the wrong model: stop it, for it also searches with it"
        )

    def _in_trouble(self, number: int, error: RevectorError) -> None:
        """Leave a failing model alone for a while: twice as long each time."""
        now, before = time.monotonic(), self.troubles.get(number)
        wait = _TRY_AGAIN[0] if before is None else min(2 * before.wait, _TRY_AGAIN[1])
        self.troubles[number] = Trouble(error, now if before is None else before.since, wait, now + wait)

    def _note_writes(self, told: Sequence[Any]) -> None:
        """Remember that a side wrote: a row that lacks only the other side's vector got its own from an application."""
        for row in told:
            generation = {"old": self.work.plan.old, "new": self.work.plan.new}.get(row.side)
            if (
                generation is None
                or time.monotonic() - self._noted.get(generation.number, -_NOTED_EVERY) < _NOTED_EVERY
            ):
                continue
            if self.work.ledger_on(self.session).note_write(generation.number, row.newest):
                self._noted[generation.number] = time.monotonic()


def _cosine(given: Sequence[float], vector: NDArray[np.float32]) -> float:
    """Cosine of two vectors; -1 where they cannot be compared."""
    stored = np.array(given, dtype=np.float64)
    if stored.shape != vector.shape:
        return -1.0
    norms = float(np.linalg.norm(stored) * np.linalg.norm(vector))
    return float(stored @ vector.astype(np.float64)) / norms if norms > 0 else -1.0


def _place(tid: str) -> tuple[int, int]:
    number, _, place = tid[1:-1].partition(",")
    return int(number), int(place)


def _hot_since(at: _Entered, session: Session, leaf: Leaf) -> int:
    """HOT updates of this write transaction."""
    return int(session.value(block("phases/backfill", "hot"), table=leaf.oid)) - at.hot


def _tid(place: tuple[int, int]) -> str:
    return f"({place[0]},{place[1]})"


class _Copier:
    """Copies vectors that the server has already: staged window by window, written one line-pointer offset at a time."""

    def __init__(self, work: Work, session: Session, *, paced: bool) -> None:
        self.work, self.session, self.paced = work, session, paced

    def window(
        self, leaf: Leaf, lo: int, hi: int, stage: str, parts: Mapping[str, sql.Composable],
        statement: Callable[[_Entered], sql.Composable],
    ) -> tuple[int, int]:  # fmt: skip
        """Stage a window's rows with one statement, write them with the other; returns the rows written, and how many HOT."""
        ends, written, hot = {"lo": f"({lo},0)", "hi": f"({hi},0)"}, 0, 0
        self.session.execute(block("phases/backfill", "clear"))
        with suppress(Detached):
            self.session.execute(block("phases/backfill", "joins"), by_key="on", by_range="off")
            _rows_of(self.work, self.session, leaf, stage, parts, **ends)
            self.session.execute(block("phases/backfill", "joins"), by_key="off", by_range="on")
            places = [(row.place, row.blocks) for row in self.session.rows(block("phases/backfill", "staged_places"))]
            for place, first, end in _passes(self.work, places, lo, hi, self._may_go):
                with entered(self.work, self.session, leaf) as at:
                    count = at.write(statement(at), place=place, lo=f"({first},0)", hi=f"({end},0)")
                    hot += _hot_since(at, self.session, leaf)
                self.work.throttle.wrote(count)
                written += count
        return written, hot

    def _may_go(self) -> bool:
        """Wait until the next write may begin. Raises `Interrupted` when asked to stop: the window is met again."""
        if self.paced:
            self.work.throttle.hold(self.work.stop, partial(_tell_held, self.work))
        self.work.check_stop()
        return True


@contextmanager
def _copier(work: Work, *, paced: bool) -> Iterator[_Copier]:
    """A copier and its session; a paced one asks the throttle before each write."""
    with writer(work) as session, _watched(work, session, wanted=paced):
        yield _Copier(work, session, paced=paced)


@contextmanager
def _watched(work: Work, session: Session, *, wanted: bool) -> Iterator[None]:
    """Look, for the throttle, at standbys and at who waits for this session."""
    if not wanted:
        yield
        return
    looking = watch(work)
    looking.pids.add(session.pid)
    with looking.watching():
        yield


def copy_outside(work: Work, *, paced: bool = True) -> int:
    """Give each row outside the filter its one vector in the candidate too; returns the rows written.

    A row that somebody has locked is left: the trigger copies what its owner writes, and the next call meets the rest.
    """
    inside, step = raw(work.plan.inside), _WINDOW_BLOCKS[1]
    windows = [(leaf, lo) for leaf in work.leaves() for lo in range(0, _blocks(work.control, leaf), step)]

    def statement(at: _Entered) -> sql.Composable:
        old, new = at.columns[work.plan.old.number], at.columns[work.plan.new.number]
        return block("phases/backfill", "copy_outside", table=at.table, old=old, new=new, inside=inside)

    written = 0
    with _copier(work, paced=paced) as copier:
        for done, (leaf, lo) in enumerate(windows, 1):
            work.check_stop()
            live = sql.Identifier(work.column(work.plan.old) or "")
            parts = {**_parts(work, work.plan.new), "live": live, "inside": inside}
            written += copier.window(leaf, lo, lo + step, "stage_outside", parts, statement)[0]
            work.observe(Progress("rows outside", done, len(windows), "windows"))
    return written


def restore(work: Work) -> Outcome:
    """Take the vectors of unchanged rows from the backup table; what is changed or new is left to the backfill.

    A row is unchanged when its key is in the backup and its text has the checksum that the backup has. It is written as
    a window of the backfill is: `ctid` locates, the hash of the text proves, locked rows are skipped, and only NULL is
    overwritten. Raises `Refused` when the backup is gone.
    """
    plan, source = work.plan, work.plan.source
    assert source is not None
    found = work.control.row(block("work", "table_name"), table=source.oid)
    if found is None:
        raise Refused(
            f"the backup table {source.name} is gone",
            why="This migration was to take its vectors from there; the rows that it has not filled yet need the model.",
            hint=f"revector abort {plan.argument}\nthen embed all rows: revector run {plan.argument} --to {plan.new.model.model}",
        )
    backup = sql.Identifier(found.nspname, found.relname)
    keys = [sql.Identifier(name) for name in source.key]
    with work.step("restore.windows") as told:
        name = sql.Identifier(cut_name(found.relname, "_key"))
        work.control.execute(block("phases/backfill", "backup_key", name=name, backup=backup, key=_listed(keys)))
        cut = work.ledger.cut(_FROM_BACKUP)
        sizes = {leaf: _blocks(work.control, leaf) for leaf in work.leaves() if leaf.oid not in cut}
        for leaf, end in sizes.items():
            work.ledger.make_windows(_FROM_BACKUP, leaf.oid, _WINDOW_BLOCKS[1], end)
        told |= {"backup": found.relname, "blocks": sum(sizes.values())}
    total = work.control.value(block("phases/backfill", "pending_count", **_parts(work, plan.new)))
    work.ledger.release_leases()
    same = sql.SQL(" AND ").join(sql.SQL("b.{0} = t.{0}").format(name) for name in keys)
    parts = {"backup": backup, "vector": sql.Identifier(source.column), "same_key": same}
    copied, holder = 0, f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    text = raw(plan.text_sql)

    def statement(to: _Entered) -> sql.Composable:
        return block("phases/backfill", "write_place", column=to.columns[plan.new.number], table=to.table, text=text)

    with _copier(work, paced=True) as copier:
        while taken := work.ledger.lease(_FROM_BACKUP, holder):
            work.check_stop()
            relation, lo, hi = taken
            at = next((leaf for leaf in work.leaves() if leaf.oid == relation), None)
            every = {**_parts(work, plan.new), **parts}
            written, hot = (0, 0) if at is None else copier.window(at, lo, hi, "stage_backup", every, statement)
            copied += written
            work.observe(Effect("restore.window"))
            work.ledger.window_done(_FROM_BACKUP, relation, lo, written, hot)
            work.observe(Recorded("restore.window", {"lo": lo, "written": written}))
            work.observe(Progress("restore", min(copied, total), total, "rows"))
    with work.step("restore.copy") as told:
        told |= {"backup": found.relname, "rows": copied, "left": total - copied}
    left = f"; {total - copied:,} are new or changed and are embedded" if total > copied else ""
    return Outcome(f"{copied:,} vectors taken from {found.relname}{left}", {"copied": copied})


def _listed(names: Sequence[sql.Composable]) -> sql.Composable:
    return sql.SQL(", ").join(names)


def catch_up(work: Work, numbers: Sequence[int], *, paced: bool = False, spared: int | None = None) -> dict[int, int]:
    """Fill what is pending in these generations, with no lock held; returns what is left, as `Filler.drain` does.

    A failing model is raised once all else is written; that of generation `spared` is only told.
    """
    if work.plan.copies_outside:
        copy_outside(work, paced=paced)
    with Filler(work, numbers, enduring=spared is not None, paced=paced) as filler:
        left = filler.drain()
        for number, trouble in filler.troubles.items():
            if number != spared:
                raise trouble.error
            model = work.plan.generation(number).model.model
            work.note(
                f"{model} fails, and {left[number]:,} rows stay without its vector until it answers: {trouble.error}"
            )
        return left


def refresh(work: Work, generation: Generation, step: str, *, paced: bool = False) -> Outcome:
    """Renew every vector of a generation that is not the model's of its row's text.

    Only of a managed one, for the trigger lets no new one arise there: a row that was right once stays so. The throttle
    is asked where `paced`. The right vector is written in the stale one's place, so a row is never without. A row that
    is updated meanwhile goes to another place, which may have been read already, and one that is locked cannot be
    written: both are looked at again, until no stale one is left; so is all of a leaf that is new, or was rewritten.
    Raises `Refused` when that gets no further.

    A text that the model refuses cannot be compared. In the candidate its vector becomes NULL, as if it had been
    refused at once. In the live column it stays, for it may be right, and the rows must not vanish from search: more
    such texts than are allowed raise `GateFailed`, the others are told.
    """
    with work.step(step) as told:
        told |= _refreshed(work, generation, paced=paced)
    return Outcome(f"{told['renewed']:,} stale vectors of {generation.model.model} renewed", told)


def _refreshed(work: Work, generation: Generation, *, paced: bool) -> dict[str, Any]:
    with writer(work) as session, _watched(work, session, wanted=paced):
        refresher = _Refresher(work, session, generation, paced=paced)
        since = ""
        #: Leaf -> the file that all of its windows were read in: a rewrite takes rows elsewhere, as old as they were.
        walked: dict[int, int] = {}
        fewest, got_further = 0, _unheld(work)
        for again in itertools.count():
            left, refresher.left = refresher.left, set()
            # Before the leaves are measured, and with the model loaded: what moves behind an end is looked for again.
            began, renewed, files = _now(work), refresher.renewed, _files(work)
            refresher.walk([leaf for leaf, file in files.items() if walked.get(leaf.oid) != file])
            for leaf, file in files.items():
                if walked.get(leaf.oid) == file:
                    refresher.moved(leaf, since, [tid for relation, tid in left if relation == leaf.oid])
            before, walked = walked, {leaf.oid: file for leaf, file in files.items()}
            rows = len(refresher.left)
            if not rows and all(before.get(leaf.oid) == file for leaf, file in _files(work).items()):
                break
            if rows < fewest or refresher.renewed > renewed or before != walked:
                fewest, got_further = rows, _unheld(work)
            elif _unheld(work) - got_further > _REFRESH_PATIENCE:
                raise Refused(
                    f"{work.plan.table}: {_stale_and_locked(rows)}",
                    why=f"Where {generation.model.model} answers, search would find them by texts that they no longer have."
                    " Nothing was switched.",
                    hint="when those transactions have ended, give the same command again",
                )
            since = began
            time.sleep(min(0.05 * again, 1.0))
    _tell_kept(work, generation, list(refresher.kept.values()))
    figures = {"rows": refresher.read, "renewed": refresher.renewed, "refused": len(refresher.refused)}
    return {"model": generation.model.model, **figures}


def _tell_kept(work: Work, generation: Generation, refused: Sequence[Refusal]) -> None:
    if not refused:
        return
    told = f"{generation.model.model} refuses {len(refused)} texts"
    if len(refused) > work.allow_failed:
        raise GateFailed(
            f"{told}, so their vectors cannot be compared; {work.allow_failed} are allowed",
            why=f"The first: {refused[0].error}. All other vectors are their texts'. Nothing was switched.",
            hint="correct those texts, or leave their vectors as they are:"
            f" revector cutover {work.plan.argument} --refresh-old --allow-failed {len(refused)}",
        )
    work.note(f"{told}; their vectors stay as they are. The first: {refused[0].error}")


class _Refresher:
    """Compares rows with one model's vectors of their texts, and writes those that differ."""

    def __init__(self, work: Work, session: Session, generation: Generation, *, paced: bool) -> None:
        self.work, self.session, self.generation, self.paced = work, session, generation, paced
        self._embedder = work.models[generation.number]()
        #: Rows compared and renewed so far.
        self.read = self.renewed = 0
        #: Hashes of the texts that the model refuses.
        self.refused: set[int] = set()
        #: (leaf, place) of stale rows that could not be written since this was last emptied.
        self.left: set[tuple[int, str]] = set()
        #: Hash of the text -> why the model refuses it, where its vector was left.
        self.kept: dict[int, Refusal] = {}
        #: The transactions that renewed rows: what they wrote is right, and is not looked at again.
        self._ours: set[str] = set()

    def walk(self, leaves: Sequence[Leaf]) -> None:
        """Renew what is stale in all of these leaves."""
        size = _WINDOW_BLOCKS[0]
        windows = [(leaf, lo) for leaf in leaves for lo in range(0, _blocks(self.work.control, leaf), size)]
        for done, (leaf, lo) in enumerate(windows, 1):
            self._window(leaf, lo, lo + size)
            self.work.observe(Progress("refresh", done, len(windows), "windows"))

    def _window(self, leaf: Leaf, lo: int, hi: int) -> None:
        self._may_go()
        parts, ends = _parts(self.work, self.generation), {"lo": f"({lo},0)", "hi": f"({hi},0)"}
        with suppress(Detached):
            found = _rows_of(self.work, self.work.control, leaf, "read_vectors", parts, **ends)
            self._renew(leaf, [row for row in found if row.xid not in self._ours])

    def moved(self, leaf: Leaf, since: str, places: Sequence[str]) -> None:
        """Renew what is stale among the rows written since, and at these places.

        The server keeps what one snapshot shows of them, so that a row which moves all the time is met all the same.
        """
        control, parts = self.work.control, _parts(self.work, self.generation)
        try:
            _rows_of(self.work, control, leaf, "moved", parts, since=since, ours=list(self._ours), places=list(places))
        except Detached:
            return
        try:
            while found := control.rows(block("phases/backfill", "fetch_moved")):
                self._may_go()
                self._renew(leaf, found)
        except Detached:
            return
        finally:
            if not control.connection.closed:
                control.execute(block("phases/backfill", "close_moved"))

    def _may_go(self) -> None:
        if self.paced:
            self.work.throttle.hold(self.work.stop, partial(_tell_held, self.work))
        self.work.check_stop()

    def _renew(self, leaf: Leaf, found: Sequence[Any]) -> None:
        work, plan, generation = self.work, self.work.plan, self.generation
        if not found:
            return
        self.read += len(found)
        rows = Rows.of(found)
        fresh, refusals = encode(work, generation, self._embedder, rows.texts)
        self._refused(leaf, found, refusals)
        stored = np.array([row.vector for row in found], dtype=np.float32)
        norms = np.linalg.norm(stored, axis=1) * np.linalg.norm(fresh, axis=1)
        # Where the text was refused it is NaN, which is below no threshold.
        cosines = (stored * fresh).sum(axis=1) / np.where(norms > 0, norms, 1)
        stale = np.flatnonzero(cosines < plan.verify_threshold)
        new = generation.number == plan.new.number
        parts = {"staged": sql.Identifier("b" if new else "a"), "text": raw(plan.text_sql)}
        for some in self._slices(stale.tolist()):
            stage_rows(self.session, plan, rows, np.array(some), **{"new" if new else "old": fresh})
            with entered(work, self.session, leaf) as at:
                column = at.columns[generation.number]
                written = at.ask(block("phases/backfill", "renew", table=at.table, column=column, **parts))
            self.renewed += len(written)
            self._wrote(leaf, [found[n].tid for n in some], written)

    def _refused(self, leaf: Leaf, found: Sequence[Any], refusals: Mapping[int, Refusal]) -> None:
        """Take the vector of refused texts from the candidate; remember those of the live column."""
        if not refusals:
            return
        work, number = self.work, self.generation.number
        self.refused |= {found[n].hash for n in refusals}
        if number != work.plan.new.number:
            self.kept |= {found[n].hash: refusal for n, refusal in refusals.items() if refusal.kind != "blank"}
            return
        for n, refusal in refusals.items():
            work.ledger.fail(number, found[n].hash, refusal.kind, refusal.error)
        parts = {"text": raw(work.plan.text_sql)}
        for some in self._slices(list(refusals)):
            tids, hashes = [found[n].tid for n in some], [found[n].hash for n in some]
            with entered(work, self.session, leaf) as at:
                statement = block(
                    "phases/backfill", "clear_refused", table=at.table, column=at.columns[number], **parts
                )
                written = at.ask(statement, tids=tids, hashes=hashes)
            self._wrote(leaf, tids, written)

    def _slices(self, rows: Sequence[int]) -> Iterator[Sequence[int]]:
        """As many rows at once as the throttle allows by then."""
        while rows:
            self._may_go()
            most = (self.work.throttle.most() if self.paced else None) or len(rows)
            yield rows[:most]
            rows = rows[most:]

    def _wrote(self, leaf: Leaf, wanted: Sequence[str], written: Sequence[Any]) -> None:
        self.work.throttle.wrote(len(written))
        self._ours |= {row.xid for row in written}
        places = {row.tid for row in written}
        self.left |= {(leaf.oid, tid) for tid in wanted if tid not in places}


def _files(work: Work) -> dict[Leaf, int]:
    """The leaves, each with the file that its rows are in now."""
    leaves = work.leaves()
    rows = work.control.rows(block("phases/backfill", "files"), leaves=[leaf.oid for leaf in leaves])
    files = {row.oid: row.file for row in rows}
    return {leaf: files.get(leaf.oid, 0) for leaf in leaves}


def _unheld(work: Work) -> float:
    """Seconds by a clock that stands still while the throttle holds us back."""
    return time.monotonic() - sum(work.throttle.waited.values())


def _now(work: Work) -> str:
    return str(work.control.value(block("phases/backfill", "now")))


def _stale_and_locked(rows: int) -> str:
    if rows == 1:
        return "1 stale vector belongs to a row that another session has locked, or writes all the time"
    return f"{rows:,} stale vectors belong to rows that other sessions have locked, or write all the time"
