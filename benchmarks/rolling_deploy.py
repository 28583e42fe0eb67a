"""A rolling deploy under load: ten instances of two versions on one table, through cutover, rollback and cutover.

`python benchmarks/rolling_deploy.py [SECONDS]` starts a PostgreSQL of its own and prints what the instances saw: statements
and errors, the slowest statement, and how long a row that one version wrote took to be found by the other one.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time

import psycopg

from revector import Embedder, Migration, Settings
from revector.embedded import embedded_server
from revector.follow import Follower

ROWS, INSTANCES, RATE = 5000, 10, 5.0
MODELS = {"old": Embedder("hash:384"), "new": Embedder("hash:768")}
PATHS = {"old": "rv_kb_g1,public", "new": "rv_kb_g2,public"}


class Instance(threading.Thread):
    """One instance: it knows its model and its search_path."""

    def __init__(self, dsn: str, number: int, version: str) -> None:
        super().__init__(daemon=True)
        self.dsn, self.number, self.version = dsn, number, version
        self.statements, self.errors, self.slowest = 0, list[str](), 0.0
        self.seen: list[float] = []
        self.stop = threading.Event()

    def run(self) -> None:
        """About `RATE` turns a second until stopped: a search, a write, and on some turns a look from the other side."""
        chance = random.Random(self.number)
        other = "new" if self.version == "old" else "old"
        with contextlib.ExitStack() as stack:
            mine, theirs = (
                stack.enter_context(psycopg.connect(self.dsn, autocommit=True, options=f"-csearch_path={PATHS[v]}"))
                for v in (self.version, other)
            )
            turn = 0
            while not self.stop.wait(chance.expovariate(RATE)):
                turn += 1
                row = chance.randrange(ROWS)
                text = f"{self.version} instance {self.number}, turn {turn}"
                self._give(mine, "SELECT id FROM kb ORDER BY embedding <=> %s::vector LIMIT 10", (self._vector(text),))
                given = (text, self._vector(text), row)
                self._give(mine, "UPDATE kb SET content = %s, embedding = %s WHERE id = %s", given)
                if turn % 10 == 0:
                    self._wait_until_found(theirs, other, row, text)

    def _wait_until_found(self, theirs: psycopg.Connection, other: str, row: int, text: str) -> None:
        began = time.monotonic()
        while time.monotonic() - began < 10:
            if self.stop.is_set():
                return
            found = theirs.execute("SELECT content, embedding IS NOT NULL FROM kb WHERE id = %s", (row,)).fetchone()
            if found is None or found[0] != text:
                return  # somebody else has written it since
            if found[1]:
                self.seen.append(time.monotonic() - began)
                return
            time.sleep(0.02)
        self.errors.append(f"not found by {other} within 10 s")

    def _vector(self, text: str) -> str:
        return str(MODELS[self.version].encode([text])[0].tolist())

    def _give(self, connection: psycopg.Connection, statement: str, values: tuple[object, ...]) -> None:
        began = time.monotonic()
        try:
            connection.execute(statement, values)  # type: ignore[arg-type]
        except psycopg.Error as error:
            self.errors.append(f"{error.sqlstate} {error}")
        self.statements += 1
        self.slowest = max(self.slowest, time.monotonic() - began)


def main() -> None:
    """Ten instances of the old version; one, five, ten of the new; the bare name is switched three times meanwhile."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    with embedded_server(options={"fsync": "off", "max_connections": "100"}) as server:
        settings = Settings(database_url=server.dsn)
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
            connection.execute("CREATE TABLE kb (id int PRIMARY KEY, content text, embedding vector(384) NOT NULL)")
            texts = [f"row {number}" for number in range(ROWS)]
            with connection.cursor().copy("COPY kb FROM STDIN") as copy:
                for number, (text, vector) in enumerate(zip(texts, MODELS["old"].encode(texts), strict=True)):
                    copy.write_row((number, text, str(vector.tolist())))
            connection.execute("CREATE INDEX ON kb USING hnsw (embedding vector_cosine_ops)")
        with Migration.open(settings, table="kb") as migration:
            migration.expose(from_="hash:384")
            migration.run(to="hash:768")
            oid = migration.oid
        ended = threading.Event()
        follower = threading.Thread(target=Follower(settings, oid, stop=ended.is_set).run, daemon=True)
        follower.start()
        time.sleep(3)
        with Migration.open(settings, table="kb") as migration:
            migration.expose()
        running = [Instance(server.dsn, number, "old") for number in range(INSTANCES)]
        over: list[Instance] = []
        for one in running:
            one.start()
        pauses = []
        for share, command in ((1, "cutover"), (5, "rollback"), (10, "cutover")):
            for number in range(share):
                if running[number].version == "old":
                    running[number].stop.set()
                    running[number].join()
                    over.append(running[number])
                    running[number] = Instance(server.dsn, 100 + number, "new")
                    running[number].start()
            time.sleep(seconds / 6)
            with Migration.open(settings, table="kb") as migration:
                pauses.append(getattr(migration, command)().figures["pause_ms"])
            time.sleep(seconds / 6)
        for one in running:
            one.stop.set()
        for one in running:
            one.join()
        every = over + running
        ended.set()
        follower.join()
        errors = [error for one in every for error in one.errors]
        seen = sorted(wait for one in every for wait in one.seen)
        print(f"{sum(one.statements for one in every):,} statements, {len(errors)} errors {errors[:3] or ''}")
        print(
            f"slowest statement {max(one.slowest for one in every) * 1000:.0f} ms; pauses {', '.join(map(str, pauses))} ms"
        )
        print(
            f"found by the other version: {len(seen)} rows, median {seen[len(seen) // 2]:.2f} s,"
            f" 95 % {seen[int(len(seen) * 0.95)]:.2f} s, longest {seen[-1]:.2f} s"
        )


if __name__ == "__main__":
    main()
