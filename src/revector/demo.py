"""The guided tour: a real table, a real upgrade, a reader and a writer at work. It calls what the commands call."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import psycopg
from pydantic import SecretStr

from revector.corpus import standard_library
from revector.db import Database, Session, block
from revector.embed import Embedder
from revector.embedded import create_database, embedded_server
from revector.errors import UsageError
from revector.knowledge_base import init, load
from revector.migration import Migration
from revector.plan import Request
from revector.search import Searcher
from revector.settings import Settings
from revector.work import Observation, Observer, Phase

TABLE: Final = "knowledge_base"
QUESTIONS: Final = (
    "run another program and capture what it prints",
    "remove duplicates from a list but keep the order",
    "wait for several tasks to finish at the same time",
)
#: Pause between two writes, and between two searches, in seconds: an application, not a load test.
_WRITE_EVERY: Final = 0.4
_SEARCH_EVERY: Final = 0.1


@dataclass(slots=True)
class _Reader:
    """Searches through everything that happens, and remembers how it went."""

    answered: int = 0
    failed: list[str] = field(default_factory=list)
    longest: float = 0.0
    repeated: int = 0


@dataclass(slots=True)
class _Writer:
    """Edits, inserts and deletes rows by plain SQL, as an application does."""

    written: int = 0
    #: Statements refused because the bare table answered with the other dimension; given again without a vector.
    adapted: int = 0
    failed: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Clock:
    """Seconds of each phase, heard from the run itself."""

    inner: Observer
    seconds: dict[str, float] = field(default_factory=dict)
    _phase: str = ""
    _since: float = 0.0

    def __call__(self, seen: Observation) -> None:
        if isinstance(seen, Phase):
            self.close()
            self._phase, self._since = seen.name, time.monotonic()
        self.inner(seen)

    def close(self) -> None:
        """The present phase is over."""
        if self._phase:
            self.seconds[self._phase] = time.monotonic() - self._since
            self._phase = ""


def run_demo(
    settings: Settings,
    *,
    from_: str = "bundled:static",
    to: str = "bundled:minilm-768",
    rows: int | None = None,
    keep: bool = False,
    print_: Callable[[str], None],
    observe: Observer,
    stop: Callable[[], bool],
) -> None:
    """Start PostgreSQL, load documents, upgrade their model while they are read and written, go back, go forth."""
    if rows is not None and rows < 20:
        raise UsageError("--rows: the demo needs 20 rows or more")
    old = Embedder(from_, settings=settings)
    print_(f"Starting PostgreSQL with pgvector, and loading {from_} ...")
    old.load()
    with embedded_server(keep=keep) as server:
        dsn = create_database(server, "revector_demo")
        settings = settings.model_copy(update={"database_url": SecretStr(dsn)})
        database = Database(settings)
        init(database, old, TABLE, index="ivfflat", lists=100 if rows is None else max(1, min(100, rows // 26)))
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "standard_library.jsonl"
            _write_corpus(path, rows)
            loaded = load(database, lambda _: old, TABLE, path, observe=observe, stop=stop)
        print_(
            f"{loaded.rows:,} pieces of Python's own documentation loaded in {time.monotonic() - began:.0f} s, IVFFlat."
        )
        with Searcher(database, settings, TABLE) as searcher:
            before = [searcher.search(question, k=3) for question in QUESTIONS]
        clock, stopping = _Clock(observe), threading.Event()
        reader, writer = _Reader(), _Writer()
        pauses: list[tuple[str, float]] = []
        with (
            _working(settings, old, reader, writer, stopping),
            Migration.open(settings, table=TABLE, observe=clock, stop=stop) as migration,
        ):
            print_(f"\nA reader and a writer are at work. Upgrading to {to} beneath them:")
            migration.run(Request(to=to))
            clock.close()
            for command, swap in (
                ("cutover", migration.cutover),
                ("rollback", migration.rollback),
                ("cutover again", migration.cutover),
            ):
                result = swap(follow=True)
                pauses.append((command, float(result.figures["pause_ms"])))
                print_(f"{command}: {result.summary}")
                time.sleep(1.0)
            with Searcher(database, settings, TABLE) as searcher:
                after = [searcher.search(question, k=3) for question in QUESTIONS]
            stopping.set()
        for question, then, now in zip(QUESTIONS, before, after, strict=True):
            print_(f"\n{question!r}")
            print_(f"  {then.model:<22}" + ", ".join(hit.id for hit in then.hits))
            print_(f"  {now.model:<22}" + ", ".join(hit.id for hit in now.hits))
        _print_table(print_, loaded.rows, clock.seconds, pauses, reader, writer)
        if keep:
            print_(f"\nThe server stays up. Connect:\n  {server.how_to_connect}\n  export DATABASE_URL='{dsn}'")
            print_(
                f"Then, for example: revector status {TABLE}\nStop it:\n  " + server.how_to_stop.replace("\n", "\n  ")
            )
        else:
            print_("\nOn a table of yours: revector plan TABLE --from MODEL --to MODEL")


def _write_corpus(path: Path, rows: int | None) -> None:
    with path.open("w", encoding="utf-8") as file:
        for document in standard_library(rows):
            told = asdict(document)
            file.write(json.dumps({"_id": told.pop("id"), **told}) + "\n")


@contextmanager
def _working(
    settings: Settings, old: Embedder, reader: _Reader, writer: _Writer, stopping: threading.Event
) -> Iterator[None]:
    threads = [
        threading.Thread(target=_read, args=(settings, reader, stopping), daemon=True),
        threading.Thread(target=_write, args=(settings, old, writer, stopping), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def _read(settings: Settings, reader: _Reader, stopping: threading.Event) -> None:
    with Searcher(Database(settings), settings, TABLE) as searcher:
        turn = 0
        while not stopping.wait(_SEARCH_EVERY):
            try:
                found = searcher.search(QUESTIONS[turn % len(QUESTIONS)], k=3)
                if not found.hits:
                    reader.failed.append("no hit")
                reader.answered += 1
                reader.repeated += found.repeated
                reader.longest = max(reader.longest, found.milliseconds)
            except Exception as error:  # the demo counts what an application would see, whatever it is
                reader.failed.append(f"{type(error).__name__}: {error}")
            turn += 1


def _write(settings: Settings, old: Embedder, writer: _Writer, stopping: threading.Event) -> None:
    """Write texts with the old model's vectors while they fit; once they do not, leave the vectors to the follower."""
    with Database(settings).connect("demo writer", search_path="public") as session:
        ids = [row.id for row in session.rows(block("demo", "ids"))]
        turn, with_vector = 0, True
        while not stopping.wait(_WRITE_EVERY):
            number = ids[turn * 7 % len(ids)]
            text = f"Note {turn} on {number}: seen and approved."
            try:
                _one_write(session, turn, number, text, old if with_vector else None)
                writer.written += 1
            except psycopg.DataError:
                with_vector = False
                writer.adapted += 1
                _one_write(session, turn, number, text, None)
                writer.written += 1
            except psycopg.Error as error:
                writer.failed.append(f"{type(error).__name__}: {error}")
            turn += 1


def _one_write(session: Session, turn: int, number: str, note: str, model: Embedder | None) -> None:
    kind = turn % 4
    if kind == 3:
        session.execute(block("demo", "delete"), id=f"demo-note-{turn - 2}")
        return
    text = note if kind == 1 else f"{session.value(block('demo', 'content'), id=number)} {note}"
    given = {"id": f"demo-note-{turn}" if kind == 1 else number, "text": text}
    if model is not None:
        given["vector"] = str(model.encode([text])[0].tolist())
    verb = "insert" if kind == 1 else "edit"
    session.execute(block("demo", verb if model is None else f"{verb}_with_vector"), **given)


def _print_table(
    print_: Callable[[str], None],
    rows: int,
    seconds: dict[str, float],
    pauses: list[tuple[str, float]],
    reader: _Reader,
    writer: _Writer,
) -> None:
    lines = [("rows", f"{rows:,}"), *((f"{phase}, s", f"{spent:.1f}") for phase, spent in seconds.items())]
    lines += [(f"{command}, lock ms", f"{pause:.0f}") for command, pause in pauses]
    lines += [
        ("searches answered", f"{reader.answered:,}"),
        ("searches failed", f"{len(reader.failed)}"),
        ("longest search, ms", f"{reader.longest:.0f}"),
        ("rows written meanwhile", f"{writer.written:,}"),
        ("writes failed", f"{len(writer.failed)}"),
    ]
    print_("")
    for name, value in lines:
        print_(f"  {name:<28}{value:>10}")
    for problem in (*reader.failed[:3], *writer.failed[:3]):
        print_(f"  ! {problem}")
