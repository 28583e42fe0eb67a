"""How the best existing tool breaks where two versions of an application meet: each test guards one sentence of that list."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import psycopg
import pytest

from fix_tables import (
    NEW,
    OLD,
    add_rows,
    advance,
    assert_exact,
    assert_no_leftovers,
    embedder,
    fill,
    following,
    knowledge_base,
    one,
    steering,
    vector,
)
from revector.phases import verify

ROWS = 120


class Instance:
    """One running instance of a version of the application: it knows its model, its search_path and nothing else."""

    def __init__(self, dsn: str, name: str, model: str, path: str, seed: int) -> None:
        self.model, self.name, self.seed = model, name, seed
        self.dsn, self.path = dsn, path
        self.statements = 0
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Instance:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        chance = random.Random(self.seed)
        with psycopg.connect(
            self.dsn, autocommit=True, prepare_threshold=0, options=f"-csearch_path={self.path}"
        ) as connection:
            turn = 0
            while not self._stop.wait(0.003):
                turn += 1
                try:
                    self._turn(connection, chance, turn)
                except psycopg.Error as error:
                    self.errors.append(f"{error.sqlstate} {error}")

    def _turn(self, connection: psycopg.Connection[Any], chance: random.Random, turn: int) -> None:
        number, text = chance.randrange(ROWS), f"{self.name} wrote this in turn {turn}"
        given = vector(self.model, text)
        kind = turn % 6
        if kind == 0:
            rows = connection.execute(
                "SELECT id, content FROM kb ORDER BY embedding <=> %s::vector LIMIT 5", (given,)
            ).fetchall()
            assert len(rows) == 5
        elif kind == 1:
            connection.execute("UPDATE kb SET content = %s, embedding = %s WHERE id = %s", (text, given, number))
        elif kind == 2:
            connection.execute(
                "INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s) ON CONFLICT (id) DO UPDATE"
                " SET content = excluded.content, embedding = excluded.embedding",
                (ROWS + number, text, given),
            )
        elif kind == 3:
            # What an ORM does: read the whole row, change one attribute, write all of them back.
            with connection.transaction():
                row = connection.execute(
                    "SELECT title, content, note, filler, embedding FROM kb WHERE id = %s FOR UPDATE", (number,)
                ).fetchone()
                assert row is not None
                connection.execute(
                    "UPDATE kb SET title = %s, content = %s, note = %s, filler = %s, embedding = %s WHERE id = %s",
                    (f"title {turn}", *row[1:], number),
                )
        elif kind == 4:
            connection.execute("DELETE FROM kb WHERE id = %s", (ROWS + number,))
        else:
            row = connection.execute("SELECT * FROM kb WHERE id = %s", (number,)).fetchone()
            assert row is not None and len(row) == 6
            held = row[5]
            if held is not None:
                assert held.count(",") + 1 == embedder(self.model).get_embedding_dimension()
        self.statements += 1


def test_peer_07_both_versions_run_before_and_after_the_switch(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the rename all old-model inserts and queries error until the app is redeployed; the new app cannot run before it.

    Here one instance of each version runs the whole time, from before the candidate exists (the old one) and from
    SERVED on (the new one), through cutover, rollback and cutover: 0 errors, and every vector exact for both.
    """
    monkeypatch.setattr(verify, "LOOK_AGAIN", 0.5)
    knowledge_base(connection, 0)
    add_rows(connection, range(ROWS), OLD)
    with steering(dsn) as migration:
        migration.expose(from_=OLD)
    with Instance(dsn, "the old version", OLD, "rv_kb_g1,public", 7) as old:
        advance(dsn, "VERIFIED")
        with following(dsn, connection):
            with steering(dsn) as migration:
                migration.expose()
            with Instance(dsn, "the new version", NEW, "rv_kb_g2,public", 8) as new:
                for command in ("cutover", "rollback", "cutover"):
                    before = (old.statements, new.statements)
                    with steering(dsn) as migration:
                        getattr(migration, command)()
                    while old.statements < before[0] + 20 or new.statements < before[1] + 20:
                        assert not (old.errors or new.errors)
                        threading.Event().wait(0.01)
    assert (old.errors, new.errors) == ([], [])
    fill(dsn, connection)
    assert_exact(connection, "kb", "content", {"embedding_g1": OLD, "embedding": NEW}, at_least=ROWS)
    # What each version finds is what its model finds among the same texts: the routing has no part in it.
    for path, model in (("rv_kb_g1,public", OLD), ("rv_kb_g2,public", NEW)):
        texts = [text for (text,) in connection.execute("SELECT content FROM kb ORDER BY id")]
        question = embedder(model).encode(["the old version"])[0]
        best = texts[int(np.argmax(embedder(model).encode(texts) @ question))]
        with psycopg.connect(dsn, autocommit=True, options=f"-csearch_path={path}") as client:
            client.execute("SET enable_indexscan = off")
            found = one(
                client,
                "SELECT content FROM kb ORDER BY embedding <=> %s::vector LIMIT 1",
                vector(model, "the old version"),
            )
        assert found == best
    with steering(dsn) as migration:
        migration.finalize(quiet_for=0)
    assert_no_leftovers(connection)
