"""`make bench`: every figure is a ratio against a baseline measured in the same run; writes results.json."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psycopg
from pgvector.psycopg import register_vector

import serving
from revector import Embedder, Migration, Request, Settings
from revector.embedded import create_database, embedded_server
from serving import Row

HERE = Path(__file__).parent
#: Rows of the database-side comparison, and bytes of text in each.
ROWS, BYTES = 20_000, 1_000
OLD, NEW = "hash:384", "hash:768"
RUNS = 3


def texts(count: int) -> list[str]:
    words = ["window", "lease", "vector", "heap", "offset", "prune", "snapshot", "pending", "follower", "row", "page"]
    made = []
    for n in range(count):
        text = f"document {n}"
        k = n
        while len(text) < BYTES:
            k = (k * 1103515245 + 12345) % 2**31
            text += " " + words[k % len(words)] + str(k % 997)
        made.append(text[:BYTES])
    return made


def make_table(connection: psycopg.Connection[Any], rows: int, *, index: bool = True) -> None:
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    register_vector(connection)
    connection.execute("DROP TABLE IF EXISTS kb; DROP SCHEMA IF EXISTS revector CASCADE")
    connection.execute("CREATE TABLE kb (id bigint PRIMARY KEY, content text NOT NULL, embedding vector(384))")
    documents = texts(rows)
    vectors = Embedder(OLD).encode(documents)
    with connection.cursor().copy("COPY kb FROM STDIN (FORMAT binary)") as copy:
        copy.set_types(["int8", "text", "vector"])
        for n, (text, vector) in enumerate(zip(documents, vectors, strict=True)):
            copy.write_row((n, text, vector))
    if index:
        connection.execute("CREATE INDEX kb_embedding_idx ON kb USING hnsw (embedding vector_cosine_ops)")
    connection.execute("VACUUM ANALYZE kb")


def our_way(dsn: str) -> dict[str, Any]:
    """The figures of a run's backfill."""
    with Migration.open(Settings(database_url=dsn), table="kb") as migration:
        migration.run(Request(from_=OLD, to=NEW))
        return next(e.figures for e in reversed(migration.events()) if e.step == "backfill")


def database_side(dsn: str) -> list[Row]:
    ours, usual, hot = [], [], []
    with psycopg.connect(dsn, autocommit=True) as connection:
        for _ in range(RUNS):
            make_table(connection, ROWS)
            figures = our_way(dsn)
            ours.append(figures["rows"] / figures["seconds"])
            hot.append(figures["hot"] / figures["rows"])
            make_table(connection, ROWS)
            usual.append(serving.usual_way(dsn, serving.Size(ROWS, OLD, NEW)))
    ratio = statistics.median(a / b for a, b in zip(ours, usual, strict=True))
    share = statistics.median(hot)
    return [
        Row(
            "backfill, live HNSW 384-d",
            statistics.median(ours),
            "rows/s",
            statistics.median(usual),
            ratio,
            ">= 3 times",
            ratio >= 3,
        ),
        Row("backfill, HOT updates", share, "share", None, None, ">= 0.80", share >= 0.8),
    ]


def memory(dsn: str) -> list[Row]:
    """Peak memory of the whole process that runs the migration, each size in a process of its own."""
    peaks = {}
    for rows in (5_000, 20_000):
        with psycopg.connect(dsn, autocommit=True) as connection:
            make_table(connection, rows, index=False)
        done = subprocess.run([sys.executable, __file__, "--peak", dsn], check=True, capture_output=True, text=True)
        peaks[rows] = float(done.stdout)
    ratio = peaks[20_000] / peaks[5_000]
    return [
        Row(
            "peak memory at 20,000 rows",
            peaks[20_000],
            "MiB",
            peaks[5_000],
            ratio,
            "<= 1.2 times that at 5,000",
            ratio <= 1.2,
        )
    ]


def encoder(dsn: str) -> list[Row]:
    """Share of the backfill's time in which a real model encodes."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        make_table(connection, 1_500, index=False)
    with Migration.open(Settings(database_url=dsn), table="kb") as migration:
        migration.run(Request(from_=OLD, to="bundled:minilm"))
        busy = next(e.figures["encoder_busy"] for e in reversed(migration.events()) if e.step == "backfill")
    return [
        Row("encoder busy, bundled:minilm, 1,500 rows", busy, "share of backfill", None, None, ">= 0.90", busy >= 0.9)
    ]


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        our_way(sys.argv[2])
        # VmHWM begins anew with the program; ru_maxrss would count the parent that forked it.
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
        return
    with embedded_server(options=serving.SERVER) as server:
        dsn = create_database(server, "bench")
        rows = [*database_side(dsn), *memory(dsn), *encoder(dsn), *serving.rows(server, serving.Size())]
        with psycopg.connect(dsn) as connection:
            version = connection.execute(
                "SELECT current_setting('server_version'), extversion FROM pg_extension WHERE extname = 'vector'"
            ).fetchone()
    report = {
        "machine": {"cpu_count": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "versions": {"python": platform.python_version(), "postgresql": version[0], "pgvector": version[1]}
        if version
        else {},
        "runs": RUNS,
        "rows": [asdict(row) for row in rows],
    }
    (HERE / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print("\n".join(serving.tell(row) for row in rows))
    if not all(row.met for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
