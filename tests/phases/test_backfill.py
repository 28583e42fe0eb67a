"""The backfill under everything that can happen between reading a text and writing its vector."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray

from fix_tables import (
    NEW,
    OLD,
    REQUEST,
    add_rows,
    advance,
    assert_exact,
    body,
    embedder,
    knowledge_base,
    one,
    stage_of,
    steering,
    vector,
)
from revector import Embedder, Request
from revector.embed.hashing import Hashing
from revector.errors import DimensionMismatch, GateFailed, InputRefused, Interrupted, Outage
from revector.phases import backfill, verify
from revector.work import Effect, Note, Observation, Recorded

BOTH = {"embedding": OLD, "embedding_g2": NEW}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LOOK_AGAIN", 0.5)


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], None]], None]:
    """Call a function with the texts of each batch of the backfill, after they were read and before they are written."""
    original = backfill.encode

    def patch(happen: Callable[[list[str]], None]) -> None:
        def encode(work: Any, generation: Any, model: Any, texts: list[str]) -> Any:
            found = original(work, generation, model, texts)
            happen(texts)
            return found

        monkeypatch.setattr(backfill, "encode", encode)

    return patch


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backfill, "_WINDOW_BLOCKS", (2, 2))


def run(
    dsn: str, observe: Callable[[Observation], None] = lambda _: None, request: Request = REQUEST, **options: Any
) -> Any:
    with steering(dsn, observe=observe) as migration:
        return migration.run(request, **options)


# -- speed ------------------------------------------------------------------------------------------------------------


def test_hot_share_with_a_live_index(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Eight rows a page, a live HNSW index, a candidate that is toasted: at least 80 % of the updates touch no index."""
    knowledge_base(connection, 3000, filler=760)
    connection.execute("ANALYZE kb")
    pages = one(connection, "SELECT pg_relation_size('kb') / 8192")
    assert 7.5 <= 3000 / pages <= 8.5
    told: dict[str, Any] = {}

    def observe(seen: Observation) -> None:
        if isinstance(seen, Recorded) and seen.step == "backfill":
            told.update(seen.figures)

    run(dsn, observe, Request(from_=OLD, to="hash:768"))
    assert told["rows"] == 3000
    assert told["hot"] / told["rows"] >= 0.80, f"{100 * told['hot'] / told['rows']:.0f} % HOT"
    assert_exact(connection, "kb", "content", {"embedding_g2": "hash:768"}, at_least=3000)


def test_snapshot_in_the_way_is_named(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old snapshot keeps pages from being pruned: the run goes on, and says which session it is."""
    monkeypatch.setattr(backfill, "_LONGEST_GAP", 0.02)
    knowledge_base(connection, 600, filler=760)
    connection.execute("ANALYZE kb")
    told: list[str] = []
    with psycopg.connect(dsn) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1")

        def observe(seen: Observation) -> None:
            if isinstance(seen, Note):
                told.append(seen.text)
            if isinstance(seen, Recorded) and seen.step == "backfill":
                old.rollback()

        run(dsn, observe, Request(from_=OLD, to="hash:768"))
        pid = old.info.backend_pid
    assert any(f"session {pid} " in text for text in told), told


def test_identical_texts_are_embedded_once(
    dsn: str,
    connection: psycopg.Connection[Any],
    during: Callable[[Callable[[list[str]], None]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within a window, a text that stands in many rows is paid for once."""
    monkeypatch.setattr(backfill, "_WINDOW_BLOCKS", (512, 512))
    knowledge_base(connection, 0)
    add_rows(connection, range(300), OLD, text=lambda n: body(n % 10))
    encoded: list[str] = []
    during(encoded.extend)
    run(dsn)
    assert sorted(encoded) == sorted({body(n) for n in range(10)})
    assert_exact(connection, "kb", "content", BOTH, at_least=300)


@pytest.mark.parametrize("analyzed", [True, False])
def test_window_is_bounded_in_rows(dsn: str, connection: psycopg.Connection[Any], analyzed: bool) -> None:
    """Memory, and what a kill costs, do not grow with the table: a window holds about 2,000 rows at most."""
    knowledge_base(connection, 0, index="ivfflat", more=", UNIQUE (id, note)")
    connection.execute("DROP INDEX kb_embedding_idx; ALTER TABLE kb SET (autovacuum_enabled = off)")
    add_rows(connection, range(6000), OLD)
    if analyzed:
        connection.execute("ANALYZE kb")
    written: list[int] = []

    def observe(seen: Observation) -> None:
        if isinstance(seen, Recorded) and seen.step == "backfill.window":
            written.append(seen.figures["written"])

    run(dsn, observe)
    assert sum(written) == 6000
    assert max(written) <= 3000


# -- what happens between reading and writing ---------------------------------------------------------------------------


@pytest.mark.usefixtures("small_windows")
def test_edited_row_never_gets_the_vector_of_its_old_text(
    dsn: str, connection: psycopg.Connection[Any], during: Callable[[Callable[[list[str]], None]], None]
) -> None:
    """Rows edited while their texts are embedded stay pending after the window is written, and are swept up later."""
    knowledge_base(connection, 200, filler=500)
    edited: list[int] = []

    def edit(texts: list[str]) -> None:
        numbers = [int(text.split()[1]) for text in texts if text.startswith("row ")][::3]
        edited.extend(numbers)
        connection.execute("UPDATE kb SET content = 'edited ' || content WHERE id = ANY (%s)", (numbers,))

    during(edit)
    seen_null = []

    def observe(seen: Observation) -> None:
        if isinstance(seen, Effect) and seen.step == "backfill.window":
            count = "SELECT count(*) FROM kb WHERE embedding_g2 IS NULL AND content LIKE 'edited %'"
            seen_null.append(one(connection, count))
            stale = connection.execute(
                "SELECT content, embedding_g2::text FROM kb WHERE embedding_g2 IS NOT NULL"
            ).fetchall()
            held = np.array([[float(x) for x in row[1][1:-1].split(",")] for row in stale])
            expected = embedder(NEW).encode([row[0] for row in stale])
            assert np.abs(held - expected).max() < 1e-5

    run(dsn, observe)
    assert edited and max(seen_null) > 0
    assert_exact(connection, "kb", "content", {"embedding_g2": NEW}, at_least=200)


def test_two_rows_that_swap_their_texts(
    dsn: str, connection: psycopg.Connection[Any], during: Callable[[Callable[[list[str]], None]], None]
) -> None:
    """Texts that change places between reading and writing, and one that is deleted and inserted anew, end right."""
    knowledge_base(connection, 60)
    done = []

    def swap(_: list[str]) -> None:
        if not done:
            done.append(True)
            connection.execute(
                "UPDATE kb AS a SET content = b.content FROM kb AS b WHERE a.id < 20 AND b.id = 19 - a.id"
            )
            connection.execute("WITH gone AS (DELETE FROM kb WHERE id = 50 RETURNING *) SELECT 1 FROM gone")
            add_rows(connection, [50], OLD, text=lambda _: body(51))
            # VACUUM frees line pointers, and the rows that come back take them: the same ctid, another text.
            connection.execute("DELETE FROM kb WHERE id BETWEEN 20 AND 39")
            connection.execute("VACUUM kb")
            add_rows(connection, range(20, 40), OLD, text=lambda n: body(1000 + n))

    during(swap)
    run(dsn)
    assert_exact(connection, "kb", "content", {"embedding_g2": NEW}, at_least=60)


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("statement", ["VACUUM FULL kb", "CLUSTER kb USING kb_pkey"])
def test_rewrite_of_the_table_puts_no_vector_on_a_wrong_row(
    dsn: str, connection: psycopg.Connection[Any], during: Callable[[Callable[[list[str]], None]], None], statement: str
) -> None:
    """VACUUM FULL renumbers every row while texts are embedded: no row gets another one's vector, none is forgotten."""
    knowledge_base(connection, 0)
    order = list(range(300))
    random.Random(3).shuffle(order)
    add_rows(connection, order, OLD, filler=300)
    connection.execute("DELETE FROM kb WHERE id % 3 = 0")
    calls = []

    def rewrite(_: list[str]) -> None:
        calls.append(True)
        if len(calls) in (1, 3):
            connection.execute(statement)  # type: ignore[arg-type]

    during(rewrite)
    run(dsn)
    assert len(calls) >= 3
    assert_exact(connection, "kb", "content", BOTH, at_least=200)


def test_locked_row_is_skipped_and_filled_later(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The worker never waits for a row: the rest is written, and the locked one is met again when it is free."""
    knowledge_base(connection, 60)
    at_end: list[int] = []
    with psycopg.connect(dsn) as holder:

        def observe(seen: Observation) -> None:
            if isinstance(seen, Recorded) and seen.step == "expand":
                holder.execute("SELECT 1 FROM kb WHERE id IN (7, 8) FOR UPDATE")
            if isinstance(seen, Recorded) and seen.step == "backfill":
                at_end.append(one(connection, "SELECT count(*) FROM kb WHERE embedding_g2 IS NULL"))
                holder.rollback()

        run(dsn, observe)
    assert at_end == [2]
    assert_exact(connection, "kb", "content", BOTH, at_least=60)


def test_ddl_in_the_way_is_waited_for(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Somebody's short DDL on the table delays the worker, and does not end it."""
    knowledge_base(connection, 60)
    timers = []

    def observe(seen: Observation) -> None:
        if isinstance(seen, Recorded) and seen.step == "backfill.windows" and not timers:
            holder = psycopg.connect(dsn)
            holder.execute("LOCK TABLE kb IN SHARE ROW EXCLUSIVE MODE")
            timers.append(threading.Timer(1.5, holder.close))
            timers[0].start()

    run(dsn, observe)
    assert timers
    timers[0].join()
    assert_exact(connection, "kb", "content", BOTH, at_least=60)


def test_repeatable_read_as_the_default_of_the_database(
    dsn: str, connection: psycopg.Connection[Any], during: Callable[[Callable[[list[str]], None]], None]
) -> None:
    """Sessions pin READ COMMITTED: a default of REPEATABLE READ, read only, or a short timeout changes nothing for us."""
    name = connection.info.dbname
    for setting in ("default_transaction_isolation = 'repeatable read'", "default_transaction_read_only = on",
                    "statement_timeout = '50ms'", "search_path = ''", "row_security = off",
                    "extra_float_digits = -5"):  # fmt: skip
        connection.execute(f'ALTER DATABASE "{name}" SET {setting}')  # type: ignore[arg-type]
    knowledge_base(connection, 200)
    edits = iter(["UPDATE kb SET content = content || '.' WHERE id % 10 = 0"])
    during(lambda _: [connection.execute(statement) for statement in edits] and None)  # type: ignore[arg-type]
    with steering(dsn, "public.kb") as migration:
        migration.run(REQUEST)
    assert_exact(connection, "kb", "content", {"embedding_g2": NEW}, at_least=200)


def test_users_triggers_do_not_fire(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Where the server allows it, our write-back fires no trigger of the user's: no `updated_at` is bumped."""
    knowledge_base(connection, 60, more=", updated_at timestamptz DEFAULT '2020-01-01'")
    connection.execute(
        "CREATE FUNCTION bump() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.updated_at := now(); RETURN NEW; END $$;"
        "CREATE TRIGGER bump BEFORE UPDATE ON kb FOR EACH ROW EXECUTE FUNCTION bump()"
    )
    run(dsn)
    assert one(connection, "SELECT count(*) FROM kb WHERE updated_at > '2020-01-02'") == 0
    assert_exact(connection, "kb", "content", BOTH, at_least=60)


# -- live writers -----------------------------------------------------------------------------------------------------


class Writer:
    """An application: seeded random statements of every kind, with its model's right vector or with none."""

    def __init__(self, dsn: str, seed: int, rows: int) -> None:
        self.dsn, self.random, self.rows = dsn, random.Random(seed), rows
        self.key = 100_000 * (seed + 1)
        self.died: list[BaseException] = []
        self.statements = 0

    def work(self, stop: threading.Event) -> None:
        try:
            with psycopg.connect(self.dsn, autocommit=True) as connection:
                while not stop.wait(self.random.random() * 0.02):
                    self.step(connection)
                    self.statements += 1
        except BaseException as error:
            self.died.append(error)

    def step(self, connection: psycopg.Connection[Any]) -> None:
        pick = self.random
        number, self.key = pick.randrange(self.rows), self.key + 1
        text = body(pick.randrange(10_000))
        given = vector(OLD, text)
        kind = pick.randrange(9)
        if kind == 0:
            connection.execute("INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s)", (self.key, text, given))
        elif kind == 1:
            connection.execute("UPDATE kb SET content = %s, embedding = %s WHERE id = %s", (text, given, number))
        elif kind == 2:
            connection.execute("DELETE FROM kb WHERE id = %s", (self.key - 5,))
        elif kind == 3:
            connection.execute(
                "INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s)"
                " ON CONFLICT (id) DO UPDATE SET content = excluded.content, embedding = excluded.embedding",
                (number, text, given),
            )
        elif kind == 4:
            with connection.transaction():
                connection.execute("UPDATE kb SET content = %s WHERE id = %s", (text, number))
                connection.execute("UPDATE kb SET embedding = %s WHERE id = %s", (given, number))
        elif kind == 5:
            row = connection.execute("SELECT id, title FROM kb WHERE id = %s", (number,)).fetchone()
            if row is not None:
                connection.execute(
                    "UPDATE kb SET id = %s, title = %s, content = %s, note = 'saved', embedding = %s WHERE id = %s",
                    (row[0], row[1], text, given, number),
                )
        elif kind == 6:
            with connection.cursor().copy("COPY kb (id, content, embedding) FROM STDIN") as copy:
                copy.write_row((self.key, text, given))
        elif kind == 7:
            connection.execute("UPDATE kb SET note = note || '.' WHERE id = %s", (number,))
        else:
            connection.execute(
                "MERGE INTO kb USING (VALUES (%s::int, %s, %s::vector)) AS s (id, text, v) ON kb.id = s.id"
                " WHEN MATCHED THEN UPDATE SET content = s.text, embedding = s.v"
                " WHEN NOT MATCHED THEN INSERT (id, content, embedding) VALUES (s.id, s.text, s.v)",
                (number, text, given),
            )


@contextmanager
def writing(dsn: str, rows: int, seeds: Sequence[int]) -> Iterator[list[Writer]]:
    stop = threading.Event()
    writers = [Writer(dsn, seed, rows) for seed in seeds]
    threads = [threading.Thread(target=w.work, args=(stop,)) for w in writers]
    for thread in threads:
        thread.start()
    try:
        yield writers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("seed", [1, 2])
def test_four_writers_of_every_kind(
    dsn: str, connection: psycopg.Connection[Any], during: Callable[[Callable[[list[str]], None]], None], seed: int
) -> None:
    """Whatever is written during the run, from the first step on, every row ends with the right vector in both columns."""
    knowledge_base(connection, 1500, filler=300)
    during(lambda texts: threading.Event().wait(0.0005 * len(texts)) and None)
    with writing(dsn, 1500, [10 * seed + n for n in range(4)]) as writers:
        run(dsn)
    assert [w.died for w in writers] == [[], [], [], []]
    assert sum(w.statements for w in writers) > 200
    run(dsn)
    assert_exact(connection, "kb", "content", BOTH, at_least=1500)


# -- models that fail -------------------------------------------------------------------------------------------------


class Odd(Hashing):
    """`hash:32` that does what a test wants with some texts."""

    def __init__(self, answer: Callable[[Sequence[str], NDArray[np.float32]], NDArray[np.float32]]) -> None:
        super().__init__(32)
        self.answer = answer

    def encode(self, texts: Sequence[str], prompt: str, kind: str) -> NDArray[np.float32]:
        return self.answer(texts, super().encode(texts, prompt, kind))


Answer = Callable[[Sequence[str], NDArray[np.float32]], NDArray[np.float32]]


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer | None], None]:
    """Replace what `hash:32` answers; None: itself again."""
    original = Embedder._make

    def patch(answer: Answer | None) -> None:
        def make(self: Embedder) -> Any:
            return Odd(answer) if self.spec == NEW and answer is not None else original(self)

        monkeypatch.setattr(Embedder, "_make", make)

    vector(NEW, "loaded before it is patched")
    return patch


def refuse(texts: Sequence[str], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    if any("forbidden" in text for text in texts):
        raise InputRefused("no such text, please", kind="refused")
    return vectors


def test_refused_input_is_isolated(
    dsn: str, connection: psycopg.Connection[Any], odd: Callable[[Answer | None], None]
) -> None:
    """One text that the model refuses costs one row: ledgered, counted against the allowance, tried again next time."""
    knowledge_base(connection, 60)
    connection.execute(
        "UPDATE kb SET content = 'a forbidden text', embedding = %s WHERE id = 17", (vector(OLD, "a forbidden text"),)
    )
    odd(refuse)
    with pytest.raises(GateFailed, match="refuses 1 texts; 0 are allowed") as caught:
        run(dsn)
    assert caught.value.exit_code == 1 and caught.value.hint.endswith("--allow-failed 1")
    assert stage_of(connection) == ("EXPANDED", None)
    assert connection.execute("SELECT id FROM kb WHERE embedding_g2 IS NULL").fetchall() == [(17,)]
    ledgered = connection.execute("SELECT generation, kind, error FROM revector.failures").fetchall()
    assert ledgered == [(2, "refused", "no such text, please")]
    with steering(dsn) as migration:
        status = migration.status().to_json()
    assert status["rows"]["failed"] == 1 and status["other"]["pending"] == 0
    assert run(dsn, allow_failed=1).passed
    odd(None)
    assert run(dsn).passed
    assert one(connection, "SELECT count(*) FROM revector.failures") == 0
    assert_exact(connection, "kb", "content", BOTH, at_least=60)


@pytest.mark.parametrize("kind", ["not_finite", "zero"])
def test_unusable_vector_is_never_written(
    dsn: str, connection: psycopg.Connection[Any], odd: Callable[[Answer | None], None], kind: str
) -> None:
    """A NaN, infinite or zero vector is a refused input of its row, and no other row suffers."""
    knowledge_base(connection, 60)
    connection.execute(
        "UPDATE kb SET content = 'cursed', embedding = %s WHERE id IN (17, 18)", (vector(OLD, "cursed"),)
    )

    def curse(texts: Sequence[str], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        for position, text in enumerate(texts):
            if text == "cursed":
                vectors[position, 5:] = np.nan if kind == "not_finite" else 0
                vectors[position, :5] = 0.5 if kind == "not_finite" else 0
        return vectors

    odd(curse)
    with pytest.raises(GateFailed, match="refuses 1 texts"):
        run(dsn)
    assert connection.execute("SELECT id FROM kb WHERE embedding_g2 IS NULL ORDER BY id").fetchall() == [(17,), (18,)]
    assert connection.execute("SELECT kind FROM revector.failures").fetchall() == [(kind,)]
    assert run(dsn, allow_failed=1).passed


def test_wrong_dimension_is_never_written(
    dsn: str, connection: psycopg.Connection[Any], odd: Callable[[Answer | None], None]
) -> None:
    """A model that changes its dimension half-way stops the run; nothing of it is written, and the next run goes on."""
    knowledge_base(connection, 60)
    advance(dsn, "EXPANDED")
    odd(lambda texts, vectors: vectors[:, :31] if any(t.startswith("row 33 ") for t in texts) else vectors)
    with pytest.raises(DimensionMismatch):
        run(dsn)
    assert stage_of(connection) == ("EXPANDED", None)
    odd(None)
    assert run(dsn).passed
    assert_exact(connection, "kb", "content", BOTH, at_least=60)


@pytest.mark.usefixtures("small_windows")
def test_outage_stops_and_the_next_run_goes_on(
    dsn: str,
    connection: psycopg.Connection[Any],
    odd: Callable[[Answer | None], None],
    during: Callable[[Callable[[list[str]], None]], None],
) -> None:
    """An outage half-way stops with exit code 4; windows that were done are not embedded again."""
    knowledge_base(connection, 400, filler=300)
    connection.execute("ANALYZE kb")
    first: list[str] = []
    second: list[str] = []

    def fail(texts: Sequence[str], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(first) > 250:
            raise Outage("the provider does not answer")
        return vectors

    advance(dsn, "EXPANDED")
    odd(fail)
    during(lambda texts: first.extend(texts))
    with pytest.raises(Outage) as caught:
        run(dsn)
    assert caught.value.exit_code == 4
    assert stage_of(connection) == ("EXPANDED", None)
    done = one(connection, "SELECT count(*) FROM revector.windows WHERE done IS NOT NULL")
    written = one(connection, "SELECT count(*) FROM kb WHERE embedding_g2 IS NOT NULL")
    assert done > 0 and written > 0
    odd(None)
    during(lambda texts: second.extend(texts))
    assert run(dsn).passed
    assert len(second) == 400 - written, "what was written before the outage is paid for once"
    assert_exact(connection, "kb", "content", BOTH, at_least=400)


def test_outage_names_the_next_command(
    dsn: str, connection: psycopg.Connection[Any], odd: Callable[[Answer | None], None]
) -> None:
    """Every stop says the exact next command."""
    knowledge_base(connection, 60)
    advance(dsn, "EXPANDED")

    def fail(texts: Sequence[str], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        if texts[0].startswith("row "):
            raise Outage("the provider does not answer")
        return vectors

    odd(fail)
    with pytest.raises(Outage) as caught:
        run(dsn)
    assert "revector run kb" in caught.value.hint


@pytest.mark.usefixtures("small_windows")
def test_interrupted_run_keeps_what_it_has(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Asked to stop, the run writes what is embedded, stops with exit code 4, and the next one completes."""
    knowledge_base(connection, 400, filler=300)
    advance(dsn, "EXPANDED")
    seen_windows = []

    def observe(seen: Observation) -> None:
        if isinstance(seen, Recorded) and seen.step == "backfill.window":
            seen_windows.append(seen)

    with steering(dsn, observe=observe) as migration:
        migration.stop = lambda: len(seen_windows) >= 2
        with pytest.raises(Interrupted) as caught:
            migration.run(REQUEST)
    assert caught.value.exit_code == 4
    written = one(connection, "SELECT count(*) FROM kb WHERE embedding_g2 IS NOT NULL")
    assert 0 < written < 400
    assert run(dsn).passed
    assert_exact(connection, "kb", "content", BOTH, at_least=400)


def test_rows_added_behind_the_last_window_are_found(
    dsn: str, connection: psycopg.Connection[Any], during: Callable[[Callable[[list[str]], None]], None]
) -> None:
    """Rows that land in blocks which did not exist when the windows were cut get their vectors in the same run."""
    knowledge_base(connection, 60, filler=300)
    added: list[int] = []

    def add(_: list[str]) -> None:
        if not added:
            added.extend(range(5000, 5400))
            add_rows(connection, added, OLD, filler=300)

    during(add)
    run(dsn)
    assert added
    assert_exact(connection, "kb", "content", BOTH, at_least=460)
