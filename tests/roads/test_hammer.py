"""Four clients hammer the bare table through the whole way; when they rest, every vector of every generation is right."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql

from fix_tables import (
    NEW,
    OLD,
    REQUEST,
    assert_exact,
    assert_no_leftovers,
    body,
    fill,
    following,
    knowledge_base,
    oid_of,
    one,
    stage_of,
    steering,
    until,
    vector,
)
from revector.errors import GateFailed, PauseBudgetMissed, Refused
from revector.follow import Follower
from revector.phases import verify

MODELS = {16: OLD, 32: NEW}
ROWS = 400
AFTER = {"embedding_g1": OLD, "embedding": NEW}
BEFORE = {"embedding": OLD, "embedding_g2": NEW}


class WrongModel(Exception):
    """A swap came between: the vector is the other model's, and the server said so."""


class Client:
    """An application on the bare name that writes the vector of the model that answers now, or none."""

    def __init__(self, dsn: str, seed: int) -> None:
        self.dsn, self.random = dsn, random.Random(seed)
        self.key = 20_000 * (seed + 1)
        self.kinds: Counter[str] = Counter()
        #: At most so many seconds between two statements.
        self.pace = 0.006
        self.swapped = 0
        self.died: list[BaseException] = []
        #: Statements that take a vector stay away from it while this is set: nothing else tells equal from right.
        self.bare = [k for k in dir(self) if k.startswith("do_")]

    def work(self, stop: threading.Event) -> None:
        try:
            with psycopg.connect(self.dsn, autocommit=True, prepare_threshold=None) as connection:
                while not stop.wait(self.random.random() * self.pace):
                    kind = self.random.choice(self.bare)
                    try:
                        with connection.transaction():
                            getattr(self, kind)(connection)
                        self.kinds[kind] += 1
                    except psycopg.errors.DataException as error:
                        # Announced for the bare name: a vector of the model that answered before a swap.
                        if error.sqlstate != "22000":
                            raise
                        self.swapped += 1
        except BaseException as error:
            self.died.append(error)

    def row(self) -> int:
        return self.random.randrange(ROWS)

    def text(self) -> str:
        return body(self.random.randrange(100_000))

    def vector(self, connection: psycopg.Connection[Any], text: str) -> str:
        """By the model that answers now; a swap before it is written gives a server error."""
        dimension = one(
            connection,
            "SELECT atttypmod FROM pg_attribute WHERE attrelid = 'kb'::regclass AND attname = 'embedding'",
        )
        return vector(MODELS[dimension], text)

    def do_insert(self, connection: psycopg.Connection[Any]) -> None:
        self.key, text = self.key + 1, self.text()
        given = self.vector(connection, text)
        connection.execute("INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s)", (self.key, text, given))

    def do_text(self, connection: psycopg.Connection[Any]) -> None:
        connection.execute("UPDATE kb SET content = %s WHERE id = %s", (self.text(), self.row()))

    def do_text_and_vector(self, connection: psycopg.Connection[Any]) -> None:
        text = self.text()
        given = self.vector(connection, text)
        connection.execute("UPDATE kb SET content = %s, embedding = %s WHERE id = %s", (text, given, self.row()))

    def do_vector_only(self, connection: psycopg.Connection[Any]) -> None:
        row = connection.execute("SELECT id, content FROM kb WHERE id = %s FOR UPDATE", (self.row(),)).fetchone()
        if row is not None:
            given = self.vector(connection, row[1])
            connection.execute("UPDATE kb SET embedding = %s WHERE id = %s", (given, row[0]))

    def do_text_then_vector(self, connection: psycopg.Connection[Any]) -> None:
        text, number = self.text(), self.row()
        # A row that somebody deletes meanwhile may be another one, of the same id, for the second statement.
        if connection.execute("UPDATE kb SET content = %s WHERE id = %s", (text, number)).rowcount:
            connection.execute("UPDATE kb SET embedding = %s WHERE id = %s", (self.vector(connection, text), number))

    def do_vector_then_text(self, connection: psycopg.Connection[Any]) -> None:
        text, number = self.text(), self.row()
        connection.execute("UPDATE kb SET embedding = %s WHERE id = %s", (self.vector(connection, text), number))
        connection.execute("UPDATE kb SET content = %s WHERE id = %s", (text, number))

    def do_save(self, connection: psycopg.Connection[Any]) -> None:
        """An ORM's full-row save: every column as it was read, the text new, the vector new or as read.

        The row is locked while it is in the ORM's hands: a vector read before somebody else's edit and written back
        after it is another value than the row holds, which is trusted as any vector of the owner's is.
        """
        row = connection.execute(
            "SELECT id, title, note, filler, embedding FROM kb WHERE id = %s FOR UPDATE", (self.row(),)
        ).fetchone()
        if row is None:
            return
        text = self.text()
        given = self.vector(connection, text) if self.random.random() < 0.5 else row[4]
        connection.execute(
            "UPDATE kb SET id = %s, title = %s, note = %s, filler = %s, content = %s, embedding = %s WHERE id = %s",
            (*row[:4], text, given, row[0]),
        )

    def do_note(self, connection: psycopg.Connection[Any]) -> None:
        connection.execute("UPDATE kb SET note = left(note || 'x', 20) WHERE id = %s", (self.row(),))

    def do_same_text(self, connection: psycopg.Connection[Any]) -> None:
        connection.execute("UPDATE kb SET content = content, note = 'same' WHERE id = %s", (self.row(),))

    def do_delete(self, connection: psycopg.Connection[Any]) -> None:
        connection.execute("DELETE FROM kb WHERE id = %s", (self.key - self.random.randrange(9),))

    def do_on_conflict(self, connection: psycopg.Connection[Any]) -> None:
        text, number = self.text(), self.row()
        given = self.vector(connection, text)
        connection.execute(
            "INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s)"
            " ON CONFLICT (id) DO UPDATE SET content = excluded.content, embedding = excluded.embedding",
            (number, text, given),
        )

    def do_copy(self, connection: psycopg.Connection[Any]) -> None:
        texts = [self.text() for _ in range(3)]
        given = [self.vector(connection, text) for text in texts]
        with connection.cursor().copy("COPY kb (id, content, embedding) FROM STDIN") as copy:
            for text, written in zip(texts, given, strict=True):
                self.key += 1
                copy.write_row((self.key, text, written))

    def do_move(self, connection: psycopg.Connection[Any]) -> None:
        """A row that is deleted and comes back with another text in the same transaction."""
        number, text = self.row(), self.text()
        given = self.vector(connection, text)
        connection.execute("DELETE FROM kb WHERE id = %s", (number,))
        connection.execute(
            "INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING", (number, text, given)
        )


@contextmanager
def hammered(dsn: str, seed: int) -> Iterator[list[Client]]:
    stop = threading.Event()
    clients = [Client(dsn, 10 * seed + n) for n in range(4)]
    threads = [threading.Thread(target=client.work, args=(stop,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield clients
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def patiently(dsn: str, command: str, seconds: float = 60, **options: Any) -> Any:
    """What an operator does: a missed pause, or rows written in between, mean the same command again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with steering(dsn) as migration:
                return getattr(migration, command)(**options)
        except (PauseBudgetMissed, Refused, GateFailed) as error:
            if time.monotonic() > deadline or (isinstance(error, Refused) and "pending" not in str(error)):
                raise
            time.sleep(0.3)


@contextmanager
def kept_following(dsn: str, connection: psycopg.Connection[Any]) -> Iterator[list[BaseException]]:
    """A follower under a supervisor, as in production: when it dies, it is started again, and the death is noted."""
    stop, deaths = threading.Event(), []
    table = oid_of(connection)

    def run() -> None:
        while not stop.is_set():
            try:
                Follower(verify_settings(dsn), table, stop=stop.is_set).run()
                stop.wait(0.2)
            except BaseException as error:
                deaths.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(lambda: one(connection, "SELECT count(*) FROM revector.heartbeats WHERE active"), 20)
        yield deaths
    finally:
        stop.set()
        thread.join()


def verify_settings(dsn: str) -> Any:
    from fix_tables import settings

    return settings(dsn)


def drained(dsn: str, connection: psycopg.Connection[Any], columns: dict[str, str]) -> None:
    """The clients rest: the follower comes to an end, and then every vector is exact."""
    pending = sql.SQL("SELECT count(*) FROM kb WHERE {}").format(
        sql.SQL(" OR ").join(sql.SQL("{} IS NULL").format(sql.Identifier(name)) for name in columns)
    )
    until(lambda: one(connection, pending) == 0, 30)
    assert_exact(connection, "kb", "content", columns, at_least=ROWS // 2)


def hammer(dsn: str, connection: psycopg.Connection[Any], seed: int, seconds: float) -> None:
    knowledge_base(connection, ROWS, filler=400)
    counted: Counter[str] = Counter()

    @contextmanager
    def clients(turn: int, *, swaps: bool = True) -> Iterator[None]:
        with hammered(dsn, 100 * seed + turn) as working:
            yield
            time.sleep(seconds)
        assert [client.died for client in working] == [[]] * 4
        for client in working:
            counted.update(client.kinds)
            assert swaps or not client.swapped, f"{client.swapped} vectors were refused where nothing swaps"

    with clients(0, swaps=False), steering(dsn) as migration:
        migration.run(REQUEST)
    fill(dsn, connection)
    # Before SERVED the live column is the application's own affair, stale vectors and all.
    assert_exact(connection, "kb", "content", {"embedding_g2": NEW}, at_least=ROWS // 2)
    with kept_following(dsn, connection) as deaths:
        with clients(1):
            patiently(dsn, "cutover", refresh_old=True)
        drained(dsn, connection, AFTER)
        with clients(2):
            patiently(dsn, "rollback")
        drained(dsn, connection, BEFORE)
        with clients(3):
            patiently(dsn, "cutover")
            patiently(dsn, "rollback")
            patiently(dsn, "cutover")
        drained(dsn, connection, AFTER)
        with clients(4, swaps=False):
            # A row that was locked since before the swap, and is written then, looks as if the old side had written it.
            patiently(dsn, "finalize", quiet_for=0)
            assert stage_of(connection)[0] == "FINALIZED"
    assert_no_leftovers(connection)
    missing = [kind for kind in dir(Client) if kind.startswith("do_") and not counted[kind]]
    assert missing == []
    assert deaths == [], f"the follower died {len(deaths)} times: {deaths[0]!r}"


def test_hammered_for_a_short_while(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way under four clients of every kind of statement ends with every vector right in both generations."""
    monkeypatch.setattr(verify, "LOOK_AGAIN", 1.0)
    hammer(dsn, connection, 1, 0.7)


@pytest.mark.roads
@pytest.mark.parametrize("seed", [2, 3, 4, 5])
def test_hammered(dsn: str, connection: psycopg.Connection[Any], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for longer, with other seeds."""
    monkeypatch.setattr(verify, "LOOK_AGAIN", 1.0)
    hammer(dsn, connection, seed, 4.0)


@pytest.mark.roads
def test_many_flips(dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty swaps back and forth under load with one follower throughout."""
    monkeypatch.setattr(verify, "LOOK_AGAIN", 1.0)
    knowledge_base(connection, ROWS, filler=400)
    with steering(dsn) as migration:
        migration.run(REQUEST)
    with following(dsn, connection):
        for turn in range(10):
            with hammered(dsn, 1000 + turn) as clients:
                patiently(dsn, "cutover", refresh_old=turn == 0)
                time.sleep(0.3)
                patiently(dsn, "rollback")
            assert [client.died for client in clients] == [[]] * 4
            drained(dsn, connection, BEFORE)
