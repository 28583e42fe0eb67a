"""What an application calls: embed the query with the live model, search the live column, never notice a cutover."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from typing import Final

from psycopg import errors as pg
from psycopg import sql

from revector import ledger as ledgers
from revector.catalog import Column, Index, Table, find_table, read_server, read_table, read_text
from revector.db import Database, Session, block, raw, translated
from revector.embed import Embedder, Identity, known_models
from revector.errors import ServerLost, UsageError
from revector.ledger import Ledger
from revector.settings import Settings
from revector.work import embedder_for

#: Distance operator by the metric in an operator class's name; cosine where there is no index.
OPERATORS: Final = {"cosine": "<=>", "l2": "<->", "ip": "<#>", "l1": "<+>"}
#: hnsw.ef_search of an untouched server; more hits than that need a longer candidate list (pgvector's README).
_EF_SEARCH: Final = 40
_LONGEST_LIST: Final = 1000


@dataclass(frozen=True, slots=True)
class Hit:
    """One row that was found."""

    #: The key's columns joined by a comma; the place in the heap where there is no key.
    id: str
    title: str | None
    text: str
    distance: float
    #: Cosine similarity where the metric is cosine, else the negative distance: higher is nearer.
    score: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search found, and by which model."""

    #: None on a table that the ledger does not know.
    generation: int | None
    model: str
    hits: tuple[Hit, ...]
    milliseconds: float
    #: Whether the generation changed between embedding and searching, so that both were done again.
    repeated: bool


@dataclass(frozen=True, slots=True)
class _Target:
    """What is searched: a column, how, and by whose vectors."""

    generation: int | None
    model: Embedder
    text: str
    statement: sql.Composable


class Searcher:
    """Searches one table over one connection; the model of each generation is loaded once.

    On a table that the ledger does not know, `model` must name the model that made its vectors.
    """

    def __init__(
        self, database: Database, settings: Settings, table: str, *, model: str | None = None, column: str | None = None
    ) -> None:
        self.database, self.settings, self.name = database, settings, table
        self._model, self._column = model, column
        self._models: dict[str, Embedder] = {}
        self._session: Session | None = database.connect("search")
        self._target: _Target | None = None

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def search(self, text: str, k: int = 10) -> SearchResult:
        """The k nearest rows. Raises `UsageError`, `InputRefused`, `ServerLost` after one reconnection."""
        if k < 1:
            raise UsageError(f"-k {k}: at least one hit must be asked for")
        began = time.monotonic()
        try:
            found = self._search(text, k)
        except (pg.OperationalError, ServerLost):
            self.close()
            self._session, self._target = self.database.connect("search"), None
            found = self._search(text, k)
        generation, model, hits, repeated = found
        return SearchResult(generation, model, hits, (time.monotonic() - began) * 1000, repeated)

    def _search(self, text: str, k: int) -> tuple[int | None, str, tuple[Hit, ...], bool]:
        with translated(f"revector search {shlex.quote(self.name)}"):
            session = self._session or self.database.connect("search")
            self._session = session
            for attempt in (1, 2):
                target = self._target or self._read_target(session)
                self._target = target
                query = target.model.encode([text], kind="query")[0]
                try:
                    rows = self._execute(session, target, "[" + ",".join(f"{x:.8g}" for x in query.tolist()) + "]", k)
                except (pg.DataException, pg.UndefinedColumn, pg.UndefinedTable, pg.FeatureNotSupported):
                    # A swap came between: the column has another dimension now, or another name.
                    self._target = None
                    if attempt == 2:
                        raise
                    continue
                if rows is not None:
                    return target.generation, target.model.spec, rows, attempt == 2
                self._target = None
            raise ServerLost(
                f"{self.name}: the live generation changed twice during one search",
                hint=f"revector search {shlex.quote(self.name)} {shlex.quote(text)}",
            )

    def _execute(self, session: Session, target: _Target, query: str, k: int) -> tuple[Hit, ...] | None:
        """The hits; None when another generation answered than the one whose model embedded the query."""
        if k > _EF_SEARCH:
            with session.transaction():
                session.execute("SELECT set_config('hnsw.ef_search', %(n)s, true)", n=str(min(k, _LONGEST_LIST)))
                rows = session.rows(target.statement, query=query, k=k)
        else:
            rows = session.rows(target.statement, query=query, k=k)
        if target.generation is not None and (not rows or rows[0].number != target.generation):
            return None
        cosine = "<=>" in target.statement.as_string(None)
        return tuple(
            Hit(r.id, r.title, r.text, r.distance, 1 - r.distance if cosine else -r.distance) for r in rows if r.id is not None
        )

    def _read_target(self, session: Session) -> _Target:
        table = read_table(session, find_table(session, self.name))
        known = ledgers.exists(session)
        live = Ledger(session, table.oid).live(self._column) if known else None
        if live is not None and self._model in (None, live.model.model):
            column = table.column(live.column)
            text = read_text(session, table, live.text).canonical
            return _Target(live.number, self._embedder(live.model), text, _statement(session, table, column, text, known=True))
        column = table.vector_column(self._column or _only_vector(table))
        if self._model is None:
            models = known_models(column.dimension) if column.dimension else []
            raise UsageError(
                f"which model made {table.name}.{column.name}? revector does not know this table",
                why=f"Models of its dimension: {', '.join(models) or 'none that is well known'}.",
                hint=f"revector search {shlex.quote(self.name)} TEXT --model {models[0] if models else 'MODEL'}",
            )
        if self._model not in self._models:
            self._models[self._model] = Embedder(self._model, dimension=column.dimension, settings=self.settings)
        content = next((c.name for c in table.columns if c.name in ("content", "text", "body")), table.columns[0].name)
        text = sql.Identifier("t", content).as_string(None) + "::text"
        return _Target(None, self._models[self._model], text, _statement(session, table, column, text, known=False))

    def _embedder(self, identity: Identity) -> Embedder:
        if identity.model not in self._models:
            embedder = embedder_for(identity, self.settings)
            embedder.check_identity(identity)
            self._models[identity.model] = embedder
        return self._models[identity.model]


def _only_vector(table: Table) -> str:
    vectors = [c.name for c in table.columns if c.is_vector]
    return "embedding" if "embedding" in vectors or not vectors else vectors[0]


def _statement(session: Session, table: Table, column: Column, text: str, *, known: bool) -> sql.Composable:
    parts = [sql.SQL("t.{}::text").format(sql.Identifier(name)) for name in table.key]
    key = sql.SQL("concat_ws(',', {})").format(sql.SQL(", ").join(parts)) if parts else sql.SQL("t.ctid::text")
    titled = any(c.name == "title" for c in table.columns)
    return block(
        "search",
        "live" if known else "unregistered",
        table=table.identifier,
        table_oid=sql.Literal(table.oid),
        key=key,
        title=sql.SQL("t.title::text") if titled else sql.SQL("NULL::text"),
        text=raw(text),
        column=sql.Identifier(column.name),
        column_name=sql.Literal(column.name),
        schema=sql.Identifier(read_server(session).vector_schema or "public"),
        operator=raw(_operator(table.indexes, column)),
        # No dimension: after a swap a wrong one must be an error of the comparison, which is answered by looking again.
        type=sql.Identifier(read_server(session).vector_schema or "public", column.type_name),
    )


def _operator(indexes: tuple[Index, ...], column: Column) -> str:
    for index in indexes:
        if index.covers_only(column):
            return next((o for metric, o in OPERATORS.items() if f"_{metric}_ops" in index.opclass), "<=>")
    return "<=>"
