"""How the best existing tool breaks applications that write; each test fails on that behaviour."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from fix_tables import (
    NEW,
    OLD,
    REQUEST,
    Halt,
    advance,
    assert_exact,
    body,
    fill,
    following,
    halting,
    knowledge_base,
    one,
    steering,
    vector,
)
from revector.embed.hashing import Hashing
from revector.errors import RevectorError
from revector.phases import verify


@pytest.fixture(autouse=True)
def _look_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LOOK_AGAIN", 0.3)


@contextmanager
def slowest_write(dsn: str) -> Iterator[list[float]]:
    """One row gets a new text over and over, so that it is pending at every moment; how long each edit took, seconds."""
    stop, times = threading.Event(), [0.0]

    def write() -> None:
        with psycopg.connect(dsn, autocommit=True) as session:
            while not stop.wait(0.005):
                began = time.monotonic()
                session.execute("UPDATE kb SET content = 'text ' || %s WHERE id = 1", (len(times),))
                times.append(time.monotonic() - began)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield times
    finally:
        stop.set()
        thread.join()


def test_peer_04_nothing_is_embedded_under_a_lock(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peer: stragglers are embedded inside the lock; a slow endpoint of 5 s stalls all writes for 5.1 s."""
    knowledge_base(connection, 40)
    advance(dsn, "SERVED")
    connection.execute("UPDATE kb SET content = content || ' edited' WHERE id > 20")
    quick = Hashing.encode

    def slow(self: Hashing, *given: Any, **named: Any) -> Any:
        time.sleep(1.0)
        return quick(self, *given, **named)

    monkeypatch.setattr(Hashing, "encode", slow)
    with slowest_write(dsn) as times, steering(dsn) as migration:
        migration.cutover(without_follower=True)
    assert max(times) < 0.8 and len(times) > 100
    monkeypatch.undo()
    fill(dsn, connection)
    assert_exact(connection, "kb", "content", {"embedding": NEW, "embedding_g1": OLD}, at_least=40)


def test_peer_06_rollback_loses_nothing(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Peer: 50 inserts and 50 edits after the cutover have no vector after the rollback, and vanish from search."""
    knowledge_base(connection, 100)
    advance(dsn, "CUT_OVER")
    with following(dsn, connection):
        for number in range(50):
            connection.execute(
                "INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s)",
                (1000 + number, body(1000 + number), vector(NEW, body(1000 + number))),
            )
            connection.execute("UPDATE kb SET content = %s WHERE id = %s", (body(5000 + number), number))
        connection.execute("DELETE FROM kb WHERE id BETWEEN 60 AND 69")
        with steering(dsn) as migration:
            migration.rollback()
    assert_exact(connection, "kb", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=140)
    for number in (1007, 5007):
        nearest = "SELECT content FROM kb ORDER BY embedding <=> %s LIMIT 1"
        assert connection.execute(nearest, (vector(OLD, body(number)),)).fetchone() == (body(number),)
    assert one(connection, "SELECT count(*) FROM kb WHERE id BETWEEN 60 AND 69") == 0


def test_peer_08_transactions_of_many_rows_in_reverse_order(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Peer: an ordinary multi-row transaction kills it with a deadlock, or is the deadlock's victim itself."""
    knowledge_base(connection, 300)
    stop, errors, done = threading.Event(), [], [0]

    def write(seed: int) -> None:
        chance = random.Random(seed)
        with psycopg.connect(dsn) as session:
            while not stop.is_set():
                first = chance.randrange(20, 280)
                try:
                    for number in range(first, first - 12, -1):
                        session.execute("UPDATE kb SET note = 'held' WHERE id = %s", (number,))
                        time.sleep(0.001)
                    session.commit()
                    done[0] += 1
                except psycopg.Error as error:
                    session.rollback()
                    # Among themselves these writers go the same way round, so that they cannot deadlock.
                    errors.append(repr(error))

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    for thread in writers:
        thread.start()
    try:
        with steering(dsn) as migration:
            migration.run(REQUEST)
    finally:
        stop.set()
        for thread in writers:
            thread.join()
    assert errors == [] and done[0] > 5
    fill(dsn, connection)
    assert_exact(connection, "kb", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=300)


def test_peer_09_a_changed_model_is_refused(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peer: half the rows by model A, then B of the same size behind the same name: plan, apply and cutover go on."""
    knowledge_base(connection, 200, filler=1500)
    with pytest.raises(Halt), steering(dsn, observe=halting("backfill.window")) as migration:
        migration.run(REQUEST)
    written = one(connection, "SELECT count(embedding_g2) FROM kb")
    true = Hashing.encode

    def other(self: Hashing, *given: Any, **named: Any) -> Any:
        return true(self, *given, **named)[:, ::-1].copy()

    with monkeypatch.context() as patch:
        patch.setattr(Hashing, "encode", other)
        with steering(dsn) as migration, pytest.raises(RevectorError, match="hash:"):
            migration.run(REQUEST)
    assert one(connection, "SELECT count(embedding_g2) FROM kb") == written
    with steering(dsn) as migration:
        migration.run(REQUEST)
    assert_exact(connection, "kb", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=200)


def test_peer_11_no_edit_escapes_the_trigger(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Peer: text that another trigger computes, and writes under session_replication_role = replica, keep stale vectors."""
    knowledge_base(connection, 20)
    connection.execute(
        "CREATE FUNCTION compose() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN NEW.content := NEW.title || ' and ' || NEW.note; RETURN NEW; END$$;"
        "CREATE TRIGGER compose BEFORE UPDATE OF title ON kb FOR EACH ROW EXECUTE FUNCTION compose()"
    )
    advance(dsn, "CUT_OVER")
    connection.execute("UPDATE kb SET title = 'another' WHERE id = 3")
    with connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")
        connection.execute("UPDATE kb SET content = 'replicated' WHERE id = 4")
    stale = "SELECT count(*) FROM kb WHERE id IN (3, 4) AND (embedding IS NOT NULL OR embedding_g1 IS NOT NULL)"
    assert one(connection, stale) == 0
    fill(dsn, connection)
    assert_exact(connection, "kb", "content", {"embedding": NEW, "embedding_g1": OLD}, at_least=20)
