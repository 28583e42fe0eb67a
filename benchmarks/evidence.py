"""`make evidence`: a full-size upgrade of a real handbook with writers running; every vector compared with its model's.

`gsa-tts-handbook` (2,828 chunks) under REVECTOR_DATA goes from bundled:minilm (384-d, IVFFlat) to bundled:minilm-768
(HNSW) with writers and a follower. After run, cutover, further edits and rollback, every row's vector in every managed
generation is compared with what its model gives for its present text. Writes evidence.json.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from revector import Embedder, Migration, Request, Settings
from revector.db import Database
from revector.embedded import create_database, embedded_server
from revector.follow import Follower
from revector.knowledge_base import init, load
from revector.work import Observation, Phase

HERE = Path(__file__).parent
TABLE = "knowledge_base"
OLD, NEW = "bundled:minilm", "bundled:minilm-768"
SAME = 0.999


class Truth:
    """What a model gives for a text; each text is embedded once, by an embedder that the product does not share."""

    def __init__(self, model: str) -> None:
        self.model, self.known = Embedder(model), dict[str, NDArray[np.float32]]()

    def of(self, texts: list[str]) -> NDArray[np.float32]:
        new = sorted(set(texts) - set(self.known))
        self.known |= zip(new, self.model.encode(new), strict=True) if new else {}
        return np.array([self.known[text] for text in texts])


@contextmanager
def writing(dsn: str, truth: Truth) -> Iterator[dict[str, int]]:
    """An application that edits, inserts and deletes by plain SQL; with a vector of its model, or text alone."""
    stop, count = threading.Event(), {"statements": 0, "other model answers": 0, "errors": 0}
    mine = f"new-{time.time_ns()}"

    def work() -> None:
        chance = random.Random(7)
        with psycopg.connect(dsn, autocommit=True) as connection:
            ids = [row[0] for row in connection.execute(f"SELECT id FROM {TABLE} ORDER BY id").fetchall()]
            turn, with_vector = 0, True
            while not stop.wait(0.1):
                turn += 1
                number = chance.choice(ids)
                text = f"Edited {turn}: travel needs an approval before the ticket is booked. {number}"
                given = str(truth.model.encode([text])[0].tolist()) if with_vector else None
                try:
                    count["statements"] += 1
                    if turn % 4 == 1:
                        connection.execute(
                            f"INSERT INTO {TABLE} (id, content, embedding) VALUES (%s, %s, %s)",
                            (f"{mine}-{turn}", text, given),
                        )
                    elif turn % 4 == 3:
                        connection.execute(f"DELETE FROM {TABLE} WHERE id = %s", (f"{mine}-{turn - 2}",))
                    elif given:
                        connection.execute(
                            f"UPDATE {TABLE} SET content = %s, embedding = %s WHERE id = %s", (text, given, number)
                        )
                    else:
                        connection.execute(f"UPDATE {TABLE} SET content = %s WHERE id = %s", (text, number))
                except psycopg.errors.DataException:
                    count["other model answers"] += 1
                    with_vector = False
                except psycopg.Error:
                    count["errors"] += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


def compare(dsn: str, columns: dict[str, Truth]) -> dict[str, Any]:
    """Every row against its models; rows without a vector count as wrong."""
    told: dict[str, Any] = {}
    with psycopg.connect(dsn) as connection:
        for column, truth in columns.items():
            rows = connection.execute(
                sql.SQL("SELECT content, {}::real[] FROM {}").format(sql.Identifier(column), sql.Identifier(TABLE))
            ).fetchall()
            right = truth.of([text for text, _ in rows])
            cosines = [
                0.0 if v is None else float(np.dot(v, r) / (np.linalg.norm(v) * np.linalg.norm(r)))
                for (_, v), r in zip(rows, right, strict=True)
            ]
            told[column] = {
                "model": truth.model.spec,
                "rows": len(rows),
                "wrong": sum(c < SAME for c in cosines),
                "lowest_cosine": round(min(cosines), 6),
            }
    return told


def drain(dsn: str) -> None:
    with Migration.open(Settings(database_url=dsn), table=TABLE, steer=False) as migration:
        Follower(Settings(database_url=dsn), migration.oid).once()


def main() -> None:
    folder = Path(os.environ["REVECTOR_DATA"]) / "gsa-tts-handbook"
    if not (folder / "corpus.jsonl.gz").exists():
        sys.exit(f"{folder}/corpus.jsonl.gz is missing: REVECTOR_DATA must hold the folder gsa-tts-handbook")
    old, new = Truth(OLD), Truth(NEW)
    checks: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    with embedded_server() as server:
        dsn = create_database(server, "evidence")
        database = Database(Settings(database_url=dsn))
        init(database, old.model, TABLE, index="ivfflat", lists=100)
        began = time.monotonic()
        loaded = load(database, lambda _: old.model, TABLE, folder / "corpus.jsonl.gz")
        seconds["load"] = time.monotonic() - began
        phase = ["", time.monotonic()]

        def observe(seen: Observation) -> None:
            if isinstance(seen, Phase):
                if phase[0]:
                    seconds[phase[0]] = time.monotonic() - float(phase[1])
                phase[:] = [seen.name, time.monotonic()]

        follower_stop = threading.Event()
        with Migration.open(Settings(database_url=dsn), table=TABLE, observe=observe) as migration:
            with writing(dsn, old) as before:
                migration.run(Request(to=NEW))
            seconds[str(phase[0])] = time.monotonic() - float(phase[1])
            busy = next(e.figures["encoder_busy"] for e in reversed(migration.events()) if e.step == "backfill")
            drain(dsn)
            checks["after run"] = compare(dsn, {"embedding": old, "embedding_g2": new})
            follower = Follower(Settings(database_url=dsn), migration.oid, stop=follower_stop.is_set)
            thread = threading.Thread(target=follower.run)
            thread.start()
            while not migration.ledger.followers():
                time.sleep(0.2)
            with writing(dsn, old) as during:
                time.sleep(3)
                cutover = migration.cutover()
                time.sleep(5)
            drain(dsn)
            checks["after cutover"] = compare(dsn, {"embedding_g1": old, "embedding": new})
            with writing(dsn, old) as after:
                time.sleep(10)
            drain(dsn)
            checks["after further edits"] = compare(dsn, {"embedding_g1": old, "embedding": new})
            rollback = migration.rollback()
            drain(dsn)
            checks["after rollback"] = compare(dsn, {"embedding": old, "embedding_g2": new})
            follower_stop.set()
            thread.join()
    report = {
        "rows_loaded": loaded.rows,
        "from": OLD,
        "to": NEW,
        "seconds": {name: round(spent, 1) for name, spent in seconds.items()},
        "encoder_busy": busy,
        "cutover_pause_ms": cutover.figures["pause_ms"],
        "rollback_pause_ms": rollback.figures["pause_ms"],
        "writers": {"during the run": before, "around cutover": during, "after cutover": after},
        "checks": checks,
    }
    (HERE / "evidence.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    if any(column["wrong"] for check in checks.values() for column in check.values()):
        sys.exit("FAILED: some vectors are not their model's")


if __name__ == "__main__":
    main()
