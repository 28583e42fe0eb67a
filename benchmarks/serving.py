"""What an application notices of a migration, beside the usual way: rename at once, UPDATE by id.

`python benchmarks/serving.py [ROWS [OLD NEW]]` prints these rows alone; `make bench` has them at 20,000 rows and `make
bench-full` at 1 and 5 million with vectors of 8 and 16 dimensions.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
from pgvector.psycopg import register_vector

from revector import Embedder, Migration, Request, Settings
from revector.embedded import Server, create_database, embedded_server
from revector.errors import PauseBudgetMissed
from revector.follow import Follower
from revector.work import Observation, Recorded

#: Bytes of text in a row: with the vectors out of line (384 and 768 dimensions; those of bench-full are in line), eight rows
#: fit a page, and 0.4 kB of it stay free. At 950 pages are full to the last row: 65 % of the updates are HOT then, not 87.5 %.
BYTES = 900
BUDGET_MS = 200
STATEMENTS = 20_000
#: Writers during the swaps; one alone could not keep to its share beside transactions of 50 ms and the swaps' waits.
WRITERS, WRITES_A_SECOND = 12, 100
SERVER = {"max_connections": "100", "maintenance_work_mem": "1GB"}
#: At full size as a server of that size is set up: tables, graphs and their builds in memory, checkpoints far apart.
LARGE = SERVER | {"maintenance_work_mem": "4GB", "shared_buffers": "8GB", "max_wal_size": "16GB"}
#: Rows a second of our backfill while it is searched.
BACKFILL_PACE = 500


@dataclass
class Row:
    """One line of results.json."""

    name: str
    value: float
    unit: str
    baseline: float | None
    ratio: float | None
    target: str
    met: bool


@dataclass
class Size:
    """How large the tables are, and the two models."""

    rows: int = 20_000
    old: str = "hash:384"
    new: str = "hash:768"


def text_of(number: int) -> str:
    return (f"document {number} tells of subject {number % 97} and place {number * 7919 % 1009} " * 20)[:BYTES]


class Tables:
    """Databases with `kb` in them, each a copy of one that is made once: `size.rows` rows and HNSW."""

    def __init__(self, server: Server, size: Size) -> None:
        self.server, self.size, self.copies = server, size, 0
        self.template = f"made_{size.rows}_{size.old.replace(':', '_')}"
        with psycopg.connect(create_database(server, self.template), autocommit=True) as connection:
            self._make(connection)

    def _make(self, connection: psycopg.Connection[Any]) -> None:
        connection.execute("CREATE EXTENSION vector")
        register_vector(connection)
        old = Embedder(self.size.old)
        connection.execute(
            f"CREATE TABLE kb (id bigint PRIMARY KEY, content text NOT NULL, embedding vector({old.get_embedding_dimension()}))"
        )
        # The text stays in its row, so that the shape does not depend on how well it compresses.
        connection.execute("ALTER TABLE kb ALTER content SET STORAGE PLAIN")
        with connection.cursor().copy("COPY kb FROM STDIN (FORMAT binary)") as copy:
            copy.set_types(["int8", "text", "vector"])
            for first in range(0, self.size.rows, 10_000):
                numbers = range(first, min(first + 10_000, self.size.rows))
                documents = [text_of(n) for n in numbers]
                for number, text, vector in zip(numbers, documents, old.encode(documents), strict=True):
                    copy.write_row((number, text, vector))
        connection.execute("CREATE INDEX kb_embedding_idx ON kb USING hnsw (embedding vector_cosine_ops) WITH (m = 8)")
        connection.execute("VACUUM ANALYZE kb")

    def copy(self) -> str:
        """A new database with the table as it was made."""
        self.copies += 1
        name = f"{self.template}_{self.copies}"
        with psycopg.connect(self.server.dsn, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {self.template} STRATEGY file_copy")
        return self.server.dsn_of(name)

    def drop(self, dsn: str) -> None:
        """Remove a copy, so that five million rows fit the disk."""
        name = psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]
        with psycopg.connect(self.server.dsn, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def usual_way(dsn: str, size: Size) -> float:
    """A script: SELECT a batch, embed it, UPDATE each row by id, commit; returns its rows a second."""
    model, done = Embedder(size.new), 0
    model.load()
    with psycopg.connect(dsn, autocommit=True) as connection:
        register_vector(connection)
        connection.execute(f"ALTER TABLE kb ADD COLUMN usual vector({model.get_embedding_dimension()})")
        began = time.monotonic()
        while batch := connection.execute(
            "SELECT id, content FROM kb WHERE usual IS NULL AND id >= %s ORDER BY id LIMIT 50", (done,)
        ).fetchall():
            vectors = model.encode([text for _, text in batch])
            with connection.transaction(), connection.cursor() as cursor:
                cursor.executemany(
                    "UPDATE kb SET usual = %s WHERE id = %s", [(v, n) for (n, _), v in zip(batch, vectors, strict=True)]
                )
            done = batch[-1][0] + 1
        return done / (time.monotonic() - began)


class Done(Exception):
    """The step that was asked for has been taken."""


def our_way(dsn: str, size: Size, *, until: str = "", tuning: dict[str, float | None] | None = None) -> None:
    """`run`, as far as the step `until`."""

    def observe(seen: Observation) -> None:
        if isinstance(seen, Recorded) and seen.step == until:
            raise Done

    settings = Settings(database_url=dsn)
    with contextlib.suppress(Done), Migration.open(settings, table="kb", observe=observe) as migration:
        migration.run(Request(from_=size.old, to=size.new), tuning=tuning)


@contextlib.contextmanager
def following(dsn: str) -> Iterator[None]:
    """A follower, as a service would run it."""
    stop = threading.Event()
    with psycopg.connect(dsn) as connection:
        oid = connection.execute("SELECT 'kb'::regclass::oid").fetchone()[0]  # type: ignore[index]
    thread = threading.Thread(target=Follower(Settings(database_url=dsn), oid, stop=stop.is_set).run)
    thread.start()
    try:
        with psycopg.connect(dsn, autocommit=True) as connection:
            alive = "SELECT count(*) FROM revector.heartbeats WHERE active"
            while not connection.execute(alive).fetchone()[0]:  # type: ignore[index]
                time.sleep(0.05)
        yield
    finally:
        stop.set()
        thread.join()


# -- errors ------------------------------------------------------------------------------------------------------------


@dataclass
class Client:
    """One instance of a version of the application, with its own model; `path`: its search_path."""

    dsn: str
    model: str
    path: str
    seed: int
    rows: int
    statements: int = 0
    errors: list[str] = field(default_factory=list)
    #: What ended it before it was told to stop.
    died: BaseException | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.died = error

    def _work(self) -> None:
        chance, embedder = random.Random(self.seed), Embedder(self.model)
        with psycopg.connect(self.dsn, autocommit=True, options=f"-csearch_path={self.path}") as connection:
            register_vector(connection)
            while not self.stop.is_set():
                text, row = f"client {self.seed} wrote {chance.random()}", chance.randrange(self.rows)
                vector = embedder.encode([text])[0]
                for statement, values in (
                    ("SELECT id FROM kb ORDER BY embedding <=> %s LIMIT 5", (vector,)),
                    ("UPDATE kb SET content = %s, embedding = %s WHERE id = %s", (text, vector, row)),
                    ("UPDATE kb SET content = %s WHERE id = %s", (text + ".", chance.randrange(self.rows))),
                    ("INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s) ON CONFLICT (id)"
                     " DO UPDATE SET content = excluded.content, embedding = excluded.embedding",
                     (self.rows + chance.randrange(500), text, vector)),
                    ("SELECT content FROM kb WHERE id = %s", (row,)),
                    ("DELETE FROM kb WHERE id = %s", (self.rows + chance.randrange(500),)),
                ):  # fmt: skip
                    self.statements += 1
                    try:
                        connection.execute(statement, values)
                    except psycopg.Error as error:
                        self.errors.append(f"{error.sqlstate} {error}")


@contextlib.contextmanager
def at_work(clients: list[Client]) -> Iterator[None]:
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for client in clients:
            client.stop.set()
        for thread in threads:
            thread.join()
    # Outside the `finally`, so that it hides nothing that went wrong in the block.
    if dead := [repr(client.died) for client in clients if client.died]:
        raise RuntimeError(f"{len(dead)} of {len(clients)} clients died: {dead[0]}")


def errors(dsn: str, filled: str, size: Size) -> Row:
    """Both versions on their views through the whole way and a rollback, against a rename at once.

    `dsn`: where the table is as it was made; `filled`: where the usual way has filled its new column.
    """
    settings = Settings(database_url=dsn)
    with Migration.open(settings, table="kb") as migration:
        migration.expose(from_=size.old)
    old = [Client(dsn, size.old, "rv_kb_g1,public", seed, size.rows) for seed in (1, 2)]
    new = [Client(dsn, size.new, "rv_kb_g2,public", seed, size.rows) for seed in (3, 4)]
    with at_work(old):
        our_way(dsn, size)
        with following(dsn):
            with Migration.open(settings, table="kb") as migration:
                migration.expose()
            with at_work(new):
                while sum(client.statements for client in old + new) < STATEMENTS:
                    for command in ("cutover", "rollback", "cutover"):
                        with Migration.open(settings, table="kb") as migration:
                            getattr(migration, command)()
                        time.sleep(1.0)
                    with Migration.open(settings, table="kb") as migration:
                        migration.rollback()
    count = sum(client.statements for client in old + new)
    failed = [error for client in old + new for error in client.errors]
    for error in failed[:3]:
        print(error)

    with psycopg.connect(filled, autocommit=True) as connection:
        rows = connection.execute("SELECT count(*) FROM kb").fetchone()[0]  # type: ignore[index]
        bare = [Client(filled, "hash:8", "public", seed, rows) for seed in (1, 2)]
        with at_work(bare):
            with connection.transaction():
                connection.execute("ALTER TABLE kb RENAME COLUMN embedding TO before")
                connection.execute("ALTER TABLE kb RENAME COLUMN usual TO embedding")
            time.sleep(2.0)  # until the new version is deployed
        with connection.transaction():
            connection.execute("ALTER TABLE kb RENAME COLUMN embedding TO usual")
            connection.execute("ALTER TABLE kb RENAME COLUMN before TO embedding")
    usual = sum(len(client.errors) for client in bare)
    return Row(
        f"client errors in {count:,} statements, whole way with rollback",
        len(failed),
        "errors",
        usual,
        None,
        "0 of at least 20,000",
        not failed and count >= STATEMENTS,
    )


# -- the pause ---------------------------------------------------------------------------------------------------------


def pauses(dsn: str, filled: str, size: Size) -> list[Row]:
    """Ten swaps under 100 writes a second, each in an application transaction of 50 ms.

    `dsn`: where the table is VERIFIED or SERVED; `filled`: where the usual way has its second column.
    """
    stop = threading.Event()
    died: list[BaseException] = []
    #: How many transactions each writer has committed.
    committed = [0] * WRITERS

    def write(dsn: str, rows: int, seed: int) -> None:
        chance, began = random.Random(seed), time.monotonic()
        try:
            with psycopg.connect(dsn) as connection:
                while not stop.is_set():
                    values = (f"text {chance.random()}", chance.randrange(rows))
                    connection.execute("UPDATE kb SET content = %s WHERE id = %s", values)
                    time.sleep(0.05)
                    connection.commit()
                    committed[seed] += 1
                    # By the clock, so that one that had to wait catches up; the writers begin spread over a turn.
                    due = began + (committed[seed] + seed / WRITERS) * WRITERS / WRITES_A_SECOND
                    stop.wait(max(0.0, due - time.monotonic()))
        except BaseException as error:
            died.append(error)

    @contextlib.contextmanager
    def writing(dsn: str) -> Iterator[None]:
        with psycopg.connect(dsn) as connection:
            rows = connection.execute("SELECT count(*) FROM kb").fetchone()[0]  # type: ignore[index]
        stop.clear()
        committed[:] = [0] * WRITERS
        threads = [threading.Thread(target=write, args=(dsn, rows, seed)) for seed in range(WRITERS)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            reached = sum(committed) / (time.monotonic() - began)
            stop.set()
            for thread in threads:
                thread.join()
        if died:
            raise RuntimeError(f"{len(died)} of {WRITERS} writers died: {died[0]!r}")
        if not 0.9 * WRITES_A_SECOND <= reached <= 1.1 * WRITES_A_SECOND:
            raise RuntimeError(
                f"{reached:.0f} writes a second were made, not {WRITES_A_SECOND}: the pauses tell nothing"
            )

    with psycopg.connect(dsn, autocommit=True) as connection:
        last = "SELECT coalesce(max(id), 0) FROM revector.events"
        before = connection.execute(last).fetchone()[0]  # type: ignore[index]
        missed = 0
        with following(dsn), writing(dsn):
            for command in ("cutover", "rollback") * 5:
                time.sleep(0.5)
                while True:
                    try:
                        with Migration.open(Settings(database_url=dsn), table="kb") as migration:
                            getattr(migration, command)()
                        break
                    except PauseBudgetMissed:
                        missed += 1
                        if missed == 10:
                            raise
        told = connection.execute(
            "SELECT (figures->>'total_ms')::float8, (figures->>'hold_ms')::float8 FROM revector.events"
            " WHERE step = 'pause' AND figures->>'step' IN ('cutover', 'rollback') AND id > %s ORDER BY id",
            (before,),
        ).fetchall()
    usual = []
    with psycopg.connect(filled, autocommit=True) as connection, writing(filled):
        for _ in range(10):
            time.sleep(0.5)
            began = time.monotonic()
            with connection.transaction():
                connection.execute("ALTER TABLE kb RENAME COLUMN embedding TO before")
                connection.execute("ALTER TABLE kb RENAME COLUMN usual TO embedding")
            usual.append((time.monotonic() - began) * 1000)
            connection.execute("ALTER TABLE kb RENAME COLUMN embedding TO usual")
            connection.execute("ALTER TABLE kb RENAME COLUMN before TO embedding")
    totals, holds = [total for total, _ in told], [hold for _, hold in told]
    middle = statistics.median(totals)
    tail = f" ({missed} more commands missed the budget)" if missed else ""
    return [
        Row("swap, lock held, longest of 10", max(holds), "ms", None, None, "<= 10 ms", max(holds) <= 10),
        Row(f"swap, wait + hold, longest of 10{tail}", max(totals), "ms", max(usual), None,
            f"<= {BUDGET_MS} ms (the budget)", max(totals) <= BUDGET_MS and not missed),
        Row("swap, wait + hold, median of 10", middle, "ms", statistics.median(usual), None, "< 60 ms", middle < 60),
    ]  # fmt: skip


# -- search while it works ---------------------------------------------------------------------------------------------


def searched(dsn: str, size: Size, working: Callable[[], bool]) -> float:
    """95th percentile, ms, of searches with the old model while `working` says so."""
    chance, model, times = random.Random(95), Embedder(size.old), []
    vectors = model.encode([text_of(chance.randrange(size.rows)) for _ in range(200)])
    with psycopg.connect(dsn, autocommit=True) as connection:
        register_vector(connection)
        while working():
            began = time.monotonic()
            connection.execute(
                "SELECT id FROM kb ORDER BY embedding <=> %s LIMIT 10", (chance.choice(list(vectors)),)
            ).fetchall()
            times.append((time.monotonic() - began) * 1000)
            time.sleep(0.005)
    return float(statistics.quantiles(times, n=20)[-1])


def _begun(connection: psycopg.Connection[Any], column: str) -> bool:
    """Whether the first rows have been written; both ways begin there."""
    there = "SELECT count(*) FROM pg_attribute WHERE attrelid = 'kb'::regclass AND attname = %s"
    if not connection.execute(there, (column,)).fetchone()[0]:  # type: ignore[index]
        return False
    return bool(connection.execute(f"SELECT count({column}) FROM kb WHERE id < 1000").fetchone()[0])  # type: ignore[index]


def _written(connection: psycopg.Connection[Any], column: str) -> int:
    return int(connection.execute(f"SELECT count({column}) FROM kb").fetchone()[0])  # type: ignore[index]


def _at_its_pace(written: int, seconds: float, *, whole: bool) -> None:
    """A backfill that stands still, or is done at once, tells nothing about the searches beside it."""
    if not whole:
        raise RuntimeError("the backfill ended before every row was written")
    if not 0.6 * BACKFILL_PACE <= written / seconds <= 1.4 * BACKFILL_PACE:
        raise RuntimeError(f"the backfill wrote {written / seconds:.0f} rows a second, not about {BACKFILL_PACE}")


def search_beside(tables: Tables, runs: int) -> Row:
    """Search by the old version during a backfill at 500 rows a second, against idle and against the usual way."""
    size = tables.size

    def idle(dsn: str) -> float:
        ends = time.monotonic() + 6
        return searched(dsn, size, lambda: time.monotonic() < ends)

    ratios, ours, usual = [], [], []
    for _ in range(runs):
        for kind, column in (("ours", "embedding_g2"), ("usual", "usual")):
            dsn = tables.copy()
            with psycopg.connect(dsn, autocommit=True) as connection:
                before = idle(dsn)
                with subprocess.Popen([sys.executable, __file__, f"--{kind}", dsn, size.old, size.new]) as process:
                    while not _begun(connection, column):
                        time.sleep(0.05)
                    began, first = time.monotonic(), _written(connection, column)
                    ends = time.monotonic() + 12
                    p95 = searched(dsn, size, lambda p=process, e=ends: p.poll() is None and time.monotonic() < e)
                    seconds, ended = time.monotonic() - began, process.poll()
                    written = _written(connection, column)
                    process.kill()
            tables.drop(dsn)
            if ended:
                raise RuntimeError(f"the backfill ({kind}) ended with status {ended} while it was searched")
            if kind == "ours":
                _at_its_pace(written - first, seconds, whole=ended is None or written == size.rows)
                ours.append(p95)
                ratios.append(p95 / before)
            else:
                usual.append(p95)
    ratio = statistics.median(ratios)
    return Row(
        f"search p95 of the old version during the backfill (idle {statistics.median(ours) / ratio:.2f} ms)",
        statistics.median(ours), "ms", statistics.median(usual), ratio, "<= 1.25 times idle", ratio <= 1.25,
    )  # fmt: skip


# -- VACUUM ------------------------------------------------------------------------------------------------------------


def vacuum(tables: Tables, runs: int) -> Row:
    """VACUUM of the table right after its backfill, with the live HNSW index and no old snapshot."""

    def seconds(way: Callable[[str], object]) -> float:
        dsn = tables.copy()
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("ALTER TABLE kb SET (autovacuum_enabled = off)")
            way(dsn)
            began = time.monotonic()
            connection.execute("VACUUM kb")
            took = time.monotonic() - began
        tables.drop(dsn)
        return took

    ours, usual = [], []
    for _ in range(runs):
        ours.append(seconds(lambda dsn: our_way(dsn, tables.size, until="backfill")))
        usual.append(seconds(lambda dsn: usual_way(dsn, tables.size)))
    ratio = statistics.median(a / b for a, b in zip(ours, usual, strict=True))
    return Row("VACUUM after the backfill", statistics.median(ours), "s", statistics.median(usual), ratio,
               "<= 1/3 of the usual way's", ratio <= 1 / 3)  # fmt: skip


def rows(server: Server, size: Size, runs: int = 3) -> Iterator[Row]:
    """All of them, each as soon as it is measured; the usual way's renames are measured on a small table."""
    tables, small = Tables(server, size), Tables(server, Size(min(size.rows, 2_000), "hash:8", "hash:16"))
    filled, served = small.copy(), tables.copy()
    usual_way(filled, small.size)
    yield search_beside(tables, runs)
    if size.rows <= Size.rows:
        # The whole way of a small table leaves `make bench` quick.
        yield errors(small.copy(), filled, small.size)
        our_way(served, size)
    else:
        yield errors(served, filled, size)
    yield from pauses(served, filled, size)
    tables.drop(served)
    yield vacuum(tables, runs)


def tell(row: Row) -> str:
    """One line for the terminal."""
    beside = "" if row.baseline is None else f", the usual way {row.baseline:,.2f}"
    ratio = "" if row.ratio is None else f", ratio {row.ratio:.2f}"
    return f"{'met   ' if row.met else 'MISSED'} {row.name}: {row.value:,.2f} {row.unit}{beside}{ratio} (target {row.target})"


def main() -> int:
    if sys.argv[1:2] in (["--ours"], ["--usual"]):
        kind, dsn, old, new = sys.argv[1:]
        size = Size(0, old, new)
        if kind == "--ours":
            our_way(dsn, size, until="backfill", tuning={"max_rows_per_second": BACKFILL_PACE})
        else:
            usual_way(dsn, size)
        return 0
    size = Size(*([int(sys.argv[1]), *sys.argv[2:4]] if sys.argv[1:] else []))
    large = size.rows > 100_000
    with embedded_server(options=LARGE if large else SERVER) as server:
        met = True
        for row in rows(server, size, runs=1 if large else 3):
            print(tell(row), flush=True)
            met = met and row.met
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
