"""What an application calls: embed the question with the model that is live, and search the column it fills.

The generation is read in the same statement as the hits are. A cutover between embedding and searching therefore
shows, as another generation or as an error about dimensions, and the search is repeated with the other model.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import errors as pg
from psycopg import sql

from revector import ledger as ledgers
from revector.catalog import Column, Table, find_table, read_filter, read_server, read_table, read_text
from revector.db import Database, Session, block, raw, translated
from revector.embed import Embedder, Identity, known_models, parse
from revector.errors import DimensionMismatch, LedgerUnreadable, Refused, UsageError
from revector.ledger import Ledger, LiveGeneration
from revector.settings import Settings
from revector.work import embedder_for as default_embedder

#: Once is enough for a cutover; a third time covers a rollback that follows while the other model is being loaded.
_ATTEMPTS: Final = 3
#: pgvector's bounds of hnsw.ef_search.
_DEFAULT_EF, _MOST_EF = 40, 1000
#: Operator class -> (operator, distance -> score).
_OPERATORS: Final[dict[str, tuple[str, Callable[[float], float]]]] = {
    "cosine": ("<=>", lambda distance: 1.0 - distance),
    "l2": ("<->", lambda distance: distance),
    "ip": ("<#>", lambda distance: -distance),
    "l1": ("<+>", lambda distance: distance),
}
#: What a cutover between embedding and searching looks like, where it is an error: other dimensions, another column,
#: a changed plan, a ledger that was uninstalled.
_MOVED: Final = (pg.DataException, pg.UndefinedColumn, pg.FeatureNotSupported, pg.UndefinedTable)


@dataclass(frozen=True, slots=True)
class Hit:
    """One row found."""

    #: The values of the key columns (else of `id`), joined by commas; the ctid where the table has neither.
    id: str
    #: Cosine similarity or inner product: higher is nearer. For L2 and L1 indexes the distance: lower is nearer.
    score: float
    #: What pgvector's operator gives; lower is nearer.
    distance: float
    #: What was embedded, whole.
    text: str
    #: The column `title`, where the table has one.
    title: str | None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The nearest rows, nearest first, and the model that chose them."""

    #: None: revector does not know the table.
    generation: int | None
    model: str
    hits: tuple[Hit, ...]
    #: From the question to the hits, embedding included.
    milliseconds: float
    #: Whether a cutover or rollback came between embedding and searching, so that it was done again.
    repeated: bool


@dataclass(frozen=True, slots=True)
class _Target:
    """What is searched, as one look at the catalog showed it."""

    #: None: revector does not know the table.
    generation: int | None
    identity: Identity | None
    statement: sql.Composable
    table: int
    column: str
    #: The filter whose rows are searched; None: all.
    filter: str | None
    dimension: int | None
    score: Callable[[float], float]


def search(
    database: Database,
    settings: Settings,
    table: str,
    text: str,
    *,
    k: int = 10,
    model: str | None = None,
    column: str | None = None,
    where: str | None = None,
    embedder_for: Callable[[Identity], Embedder] | None = None,
) -> SearchResult:
    """Search once. An application that searches more than once keeps a `Searcher`."""
    with Searcher(
        database, settings, table, model=model, column=column, where=where, embedder_for=embedder_for
    ) as searcher:
        return searcher.search(text, k=k)


class Searcher:
    """One connection and the loaded models of a table; for one thread at a time. Use it as a context manager.

    `where` is needed where several filters have a model of their own, and searches that filter's rows alone.
    `model` is needed, and taken, only for a table that revector does not know. Row level security applies: it finds
    what the role may read. While a migration could switch, the other model is loaded in the background, so that
    the first search after the switch does not wait for it.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        table: str,
        *,
        model: str | None = None,
        column: str | None = None,
        where: str | None = None,
        embedder_for: Callable[[Identity], Embedder] | None = None,
    ) -> None:
        self.database = database
        self.settings = settings
        self.name = table
        self._given_model = model
        self._given_column = column
        self._given_filter = where
        self._embedder_for = embedder_for or (lambda identity: default_embedder(identity, settings))
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="revector-model")
        #: (generation, name) -> the model, loaded or being loaded; generation None: the given one.
        self._models: dict[tuple[int | None, str], Future[Embedder]] = {}
        #: The generation whose model is being loaded beforehand.
        self._prepared: int | None = None
        self._command = f"revector search {shlex.quote(table)} QUESTION"
        self._session = self._connect()
        try:
            with translated(self._command), self._readable():
                self._target = self._look()
                self._check_given()
                self._model(self._target)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection and let the models go."""
        self._session.close()
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._models.clear()

    def search(self, text: str, k: int = 10) -> SearchResult:
        """The `k` rows whose vectors are nearest to the text's; rows without a vector are never found.

        An HNSW index gives at most 1,000. A lost connection is made anew once. Raises `ServerLost`, `UsageError` for
        an empty text, and what the model raises.
        """
        if not text.strip():
            raise UsageError("there is nothing to search for", hint=self._command)
        if k < 1:
            raise UsageError(f"-k {k}: at least 1")
        began = time.perf_counter()
        with translated(self._command), self._readable():
            try:
                found = self._search(text, k)
            except psycopg.OperationalError:
                if not self._session.connection.closed:
                    raise
                self._session = self._connect()
                found = self._search(text, k)
        rows, target, repeated = found
        model = self._model(target)
        hits = tuple(
            Hit(r.id, target.score(r.distance), r.distance, r.text or "", r.title) for r in rows if r.id is not None
        )
        return SearchResult(target.generation, model.spec, hits, (time.perf_counter() - began) * 1000, repeated)

    def _search(self, text: str, k: int) -> tuple[Sequence[Any], _Target, bool]:
        """Embed and search until both saw the same generation."""
        for attempt in range(1, _ATTEMPTS + 1):
            target = self._target
            vector = self._model(target).encode([text], kind="query")[0].tolist()
            literal = f"[{','.join(f'{x:.9g}' for x in vector)}]"
            try:
                rows = self._nearest(target, literal, k)
            except _MOVED as error:
                if attempt == _ATTEMPTS:
                    raise self._contradiction(target, error) from error
                self._look_again()
                continue
            model = target.identity.model if target.identity else None
            if (rows[0].number, rows[0].model) == (target.generation, model):
                self._prepare(rows[0].other)
                return rows, target, attempt > 1
            self._look_again()
        raise Refused(
            f"{self.name} changed its model {_ATTEMPTS} times during one search",
            why="Somebody switches back and forth; each time the other model answered.",
            hint=f"the same command again: {self._command}",
        )

    def _nearest(self, target: _Target, vector: str, k: int) -> Sequence[Any]:
        values = {"vector": vector, "k": k, "table": target.table, "column": target.column, "filter": target.filter}
        if k <= _DEFAULT_EF:
            return self._session.rows(target.statement, **values)
        with self._session.transaction():
            self._session.execute(block("search", "look_further"), wanted=min(k, _MOST_EF))
            return self._session.rows(target.statement, **values)

    def _contradiction(self, target: _Target, error: psycopg.Error) -> Exception:
        """The statement fails however often it is repeated: no cutover is to blame."""
        message = error.diag.message_primary or str(error)
        if not isinstance(error, pg.DataException):
            return error
        return Refused(
            f"{self.name}.{target.column} cannot be searched with {self._model(target).spec}: {message}",
            why="The column's vectors are not of the model that is recorded for it.",
            hint=f"revector status {shlex.quote(self.name)}",
        )

    # -- models -------------------------------------------------------------------------------------------------------

    def _model(self, target: _Target) -> Embedder:
        """The target's model, proven to be the recorded one before its first vector is used."""
        return self._start(target.generation, target.identity).result()

    def _start(self, generation: int | None, identity: Identity | None) -> Future[Embedder]:
        """Begin to load a model, unless that was done; one that could not be loaded is tried again."""
        key = (generation, identity.model if identity else self._given_model or "")
        known = self._models.get(key)
        if known is None or (known.done() and (known.cancelled() or known.exception() is not None)):
            known = self._models[key] = self._loader.submit(self._load, identity)
        return known

    def _load(self, identity: Identity | None) -> Embedder:
        if identity is not None:
            embedder = self._embedder_for(identity)
            embedder.check_identity(identity)
            return embedder
        assert self._given_model is not None
        embedder = Embedder(self._given_model, settings=self.settings)
        embedder.load()
        return embedder

    def _prepare(self, other: int | None) -> None:
        """Load the model that a cutover or rollback would let answer, before it does."""
        if other is None or other == self._prepared:
            return
        self._prepared = other
        identity = self._session.value(block("search", "model"), table=self._target.table, number=other)
        if identity is not None:
            self._start(other, Identity.from_json(identity))

    # -- the catalog --------------------------------------------------------------------------------------------------

    def _connect(self) -> Session:
        # Unlike the sessions that change something, this one reads what its role may see.
        return self.database.connect("search", row_security="on")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Say what the role has to be given to search."""
        try:
            yield
        except (pg.InsufficientPrivilege, LedgerUnreadable) as error:
            role = sql.Identifier(self._session.connection.info.user).as_string(None)
            told = error.diag.message_primary if isinstance(error, psycopg.Error) else error
            raise Refused(
                f"missing right: {told}",
                why="A search reads the table, and in revector's ledger which model answers.",
                hint="as their owner: GRANT SELECT ON revector.ledger, revector.generations, revector.migrations"
                f" TO {role};\nand on the table itself",
            ) from None

    def _look_again(self) -> None:
        self._target = self._look()
        self._prepared = None
        if self._target.identity is None:
            self._check_given()

    def _look(self) -> _Target:
        """What is to be searched now."""
        session = self._session
        server = read_server(session)
        if server.vector_schema is None:
            raise Refused(
                f"pgvector is not installed in database {server.database}",
                hint="as a superuser of that database: CREATE EXTENSION vector;",
            )
        table = read_table(session, find_table(session, self.name))
        ledgers.require(session)
        ledger = Ledger(session, table.oid) if ledgers.exists(session) else None
        column = self._column(table, ledger)
        live = self._live(ledger.lives(column.name)) if ledger else None
        text = self._text(table, ledger, live.text) if ledger and live else _guessed_text(table)
        opclass = next((i.opclass for i in table.indexes if i.valid and i.covers_only(column)), "vector_cosine_ops")
        metric = opclass.rpartition(".")[2].strip('"').split("_")[1]
        operator, score = _OPERATORS.get(metric, _OPERATORS["cosine"])
        inside = live.filter if live else self._given_filter
        key, kind = _key_of(table, column, live.model.dimension if live else None, server.vector_schema)
        parts = {
            "table": table.identifier,
            "column": sql.Identifier(column.name),
            "inside": self._inside(table, ledger, inside),
            "distance": block(
                "search",
                "distance",
                key=key,
                schema=sql.Identifier(server.vector_schema),
                operator=raw(operator),
                type=kind,
            ),
            "id": _key(table),
            "title": raw("t.title::text") if any(c.name == "title" for c in table.columns) else raw("NULL::text"),
            "text": sql.SQL("({})::text").format(text),
            "live": block("search", "live" if ledger else "no_ledger"),
        }
        return _Target(
            live.number if live else None,
            live.model if live else None,
            block("search", "nearest", **parts),
            table.oid,
            column.name,
            inside,
            column.dimension,
            score,
        )

    def _live(self, known: Sequence[LiveGeneration]) -> LiveGeneration | None:
        """The live generation of the filter that is searched; the only one, where none is named."""
        for generation in known:
            if len(known) == 1 and self._given_filter is None:
                return generation
            if generation.filter == self._given_filter:
                return generation
        if not known:
            return None
        filters = [g.filter for g in known if g.filter]
        raise UsageError(
            f"which rows of {self.name}? revector knows the models of: {'; '.join(filters) or 'the whole table'}",
            why="Vectors of different models cannot be compared with one question.",
            hint=f"{self._command} --where {shlex.quote(filters[0])}"
            if filters
            else f"leave --where out: {self._command}",
        )

    def _column(self, table: Table, ledger: Ledger | None) -> Column:
        """The vector column: the given one, the only live one, `embedding`, or the only one."""
        if self._given_column:
            return table.vector_column(self._given_column)
        if ledger and len(known := {g.column for g in ledger.lives()}) == 1:
            return table.vector_column(known.pop())
        vectors = [c.name for c in table.columns if c.is_vector]
        if "embedding" in vectors or len(vectors) == 1:
            return table.column("embedding" if "embedding" in vectors else vectors[0])
        if not vectors:
            raise UsageError(
                f"{self.name} has no vector column", why=f"Its columns: {', '.join(c.name for c in table.columns)}."
            )
        raise UsageError(
            f"{self.name} has several vector columns: {', '.join(vectors)}",
            hint=f"name one: {self._command} --vector {vectors[0]}",
        )

    def _text(self, table: Table, ledger: Ledger, given: str) -> sql.Composable:
        """The text expression as the server wrote it down, so that the caller's search_path cannot change it."""
        if any(c.name == given for c in table.columns):
            return sql.Identifier("t", given)
        row = ledger.latest()
        if row is not None and row.plan.text == given:
            return raw(row.plan.text_sql)
        return raw(read_text(self._session, table, given).canonical)

    def _inside(self, table: Table, ledger: Ledger | None, given: str | None) -> sql.Composable:
        """The filter as the server wrote it down, which is also the predicate of the index that is made for it."""
        if given is None:
            return sql.SQL("true")
        row = ledger.latest() if ledger else None
        if row is not None and row.plan.filter == given:
            return raw(row.plan.inside)
        return raw(read_filter(self._session, table, given).canonical)

    def _check_given(self) -> None:
        """Hold a given model against what the ledger says, or against the column's dimension."""
        target, given = self._target, self._given_model
        if target.identity is not None:
            if given is not None and str(parse(given)) != target.identity.model:
                raise UsageError(
                    f"{self.name}.{target.column} is searched with {target.identity.model}, not with {given}",
                    why="Vectors of two models cannot be compared.",
                    hint=f"leave --model out: {self._command}",
                )
            return
        models = known_models(target.dimension) if target.dimension else []
        dimension = f"{target.dimension} dimensions" if target.dimension else "no declared dimension"
        if given is None:
            raise UsageError(
                f"which model made {self.name}.{target.column}, with {dimension}? revector does not know this table",
                why=f"Models of that dimension: {', '.join(models) or 'none that is well known'}.",
                hint=f"name it: {self._command} --model {models[0] if models else 'MODEL'}",
            )
        model = self._model(target)
        if target.dimension not in (None, model.get_embedding_dimension()):
            assert target.dimension is not None
            raise DimensionMismatch(
                model.spec,
                model.get_embedding_dimension(),
                target.dimension,
                why=f"{self.name}.{target.column} has {dimension}; models of that dimension:"
                f" {', '.join(models) or 'none that is well known'}.",
                hint=f"name the model that made them: {self._command} --model {models[0] if models else 'MODEL'}",
            )


def _key_of(table: Table, column: Column, dimension: int | None, schema: str) -> tuple[sql.Composable, sql.Composable]:
    """The column as its index has it, and its type: through a cast where only such an index is there to use."""
    bare, own = sql.Identifier("t", column.name), sql.Identifier(schema, column.type_name)
    valid = [i for i in table.indexes if i.valid and i.covers_only(column)]
    cast = next((c for c in (i.cast(column) for i in valid) if c and c[1] == (dimension or column.dimension)), None)
    if column.dimension is not None:
        if cast is None or any(i.keys == (column.number,) for i in valid):
            return bare, own
        dimension = column.dimension
    elif dimension is None:
        return bare, own
    kind = raw(cast[0]) if cast else own
    return sql.SQL("(({})::{}({}))").format(bare, kind, sql.Literal(dimension)), kind


def _key(table: Table) -> sql.Composable:
    key = table.key or tuple(c.name for c in table.columns if c.name == "id")
    if not key:
        return raw("t.ctid::text" if table.kind in "rpm" else "''")
    columns = sql.SQL(", ").join(sql.Identifier("t", name) for name in key)
    return sql.SQL("concat_ws(',', {})").format(columns)


def _guessed_text(table: Table) -> sql.Composable:
    """What to show of a table that revector does not know: `content`, or its first text column that is no key."""
    texts = [c.name for c in table.columns if c.type_name in ("text", "varchar", "bpchar") and c.name not in table.key]
    name = "content" if "content" in texts else texts[0] if texts else None
    return raw("''") if name is None else sql.Identifier("t", name)
