"""A knowledge base from nothing: its DDL, the table with its live model registered, and documents loaded into it."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import shlex
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from psycopg import errors as pg
from psycopg import sql

from revector import ledger as ledgers
from revector.catalog import INDEX_LIMITS, Column, Server, Table, find_table, read_server, read_table
from revector.db import Database, Session, block, raw, translated, with_clause
from revector.embed import Embedder, Identity, Refusal
from revector.errors import GateFailed, Interrupted, Refused, RevectorError, UsageError
from revector.ledger import Ledger, LiveGeneration
from revector.plan import DEFAULT_BATCH, DEFAULT_LISTS, HNSW_DEFAULTS, NAME_BYTES, TargetIndex, cut_name
from revector.survey import check_vector
from revector.work import Note, Observer, Progress

Method = Literal["hnsw", "ivfflat"]

#: Documents that are embedded, sorted by length, and written in one transaction.
_CHUNK: Final = 256
#: A file up to this size is read once beforehand, to count its lines for the progress bar.
_CHEAP_BYTES: Final = 256 * 1024 * 1024
#: The most lists that pgvector's IVFFlat takes.
_MOST_LISTS: Final = 32768
_COLUMNS: Final = ("id", "title", "content", "metadata")
_PART: Final = re.compile(r'"((?:[^"]|"")+)"|([^".]+)')
_RESERVED: Final = """
    all analyse analyze and any array as asc asymmetric authorization binary both case cast check collate collation
    column concurrently constraint create cross current_catalog current_date current_role current_schema current_time
    current_timestamp current_user default deferrable desc distinct do else end except false fetch for foreign freeze
    from full grant group having ilike in initially inner intersect into is isnull join lateral leading left like limit
    localtime localtimestamp natural not notnull null offset on only or order outer overlaps placing primary references
    returning right select session_user similar some symmetric system_user table tablesample then to trailing true union
    unique user using variadic verbose when where window with"""
#: What PostgreSQL does not take as the name of a table without quotes (pg_get_keywords, R and T; a test compares).
RESERVED: Final = frozenset(_RESERVED.split())


#: U+0000 as JSON writes it: an odd number of backslashes stands before it.
_NUL: Final = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_TYPES: Final[dict[type, str]] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
}


@dataclass(frozen=True, slots=True)
class Registered:
    """A new knowledge base, and the model that answers."""

    schema: str
    table: str
    model: str
    dimension: int
    #: In words: `hnsw (m=16, ef_construction=64)`.
    index: str
    #: False: it is built at the end of the first load.
    index_built: bool
    #: Whether pgvector had to be created in this database.
    extension_created: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load has done."""

    #: Documents of the file that are in the table now.
    rows: int
    #: Those of them that replaced an earlier one with the same id.
    replaced: int
    #: (id, why): documents that the model has no vector for; they were not written.
    refused: tuple[tuple[str, Refusal], ...]
    seconds: float
    #: The model that made the vectors (of the last chunk, if a cutover came between).
    model: str
    #: The index that was built at the end, in words; None: none was due.
    index: str | None

    def require_all(self) -> None:
        """Raise `GateFailed`, naming the ids, when the model refused documents."""
        if not self.refused:
            return
        shown = ", ".join(f"{id_} ({refusal.kind})" for id_, refusal in self.refused[:10])
        more = f" and {len(self.refused) - 10} more" if len(self.refused) > 10 else ""
        raise GateFailed(
            f"{self.model} has no vector for {len(self.refused)} of {self.rows + len(self.refused)} documents",
            why=f"They were not written; {self.rows} others were. Refused: {shown}{more}. "
            f"The first: {self.refused[0][1].error}.",
            hint="correct these documents in the file, then repeat the command",
        )


@dataclass(frozen=True, slots=True)
class _Document:
    """One line of the file."""

    line: int
    id: str
    title: str | None
    content: str
    #: As JSON.
    metadata: str


# -- schema -----------------------------------------------------------------------------------------------------------


def ddl(dimension: int, index: Method = "hnsw", lists: int = DEFAULT_LISTS, table: str = "knowledge_base") -> str:
    """The DDL of a knowledge base, to be read or run with psql. `init` runs the same statements."""
    _check(dimension, index, lists)
    schema, name = split_name(table)
    target = _target_index(index, lists, name, "vector_cosine_ops")
    full_name = _plain(name) if schema is None else sql.SQL("{}.{}").format(_plain(schema), _plain(name))
    when = (
        "-- IVFFlat learns its lists from the rows that are there: best created after the first load.\n"
        if index == "ivfflat"
        else ""
    )
    statements = [
        block("knowledge_base", "extension", schema=sql.SQL("")),
        block("knowledge_base", "table", table=full_name, type=raw(f"vector({dimension})")),
        raw(when) + _index_statement(target, full_name, _plain(target.name)),
    ]
    return ";\n\n".join(s.as_string(None) for s in statements) + ";\n"


def split_name(name: str) -> tuple[str | None, str]:
    """(schema or None, table) of a name that does not exist yet.

    `Weird Table` and `select` are exact names, `app.docs` is schema and table, and with double quotes it is read as
    SQL reads it.
    """
    if '"' in name:
        found = _PART.match(name)
        parts: list[str] = []
        position = 0
        while found:
            parts.append(found[1].replace('""', '"') if found[1] is not None else found[2].strip().lower())
            position = found.end()
            found = _PART.match(name, position + 1) if name[position : position + 1] == "." else None
        valid = position == len(name)
    else:
        parts, valid = name.split(".", 1), True
    if not valid or len(parts) > 2 or not all(parts) or "\0" in name:
        raise UsageError(
            f"{name!r} cannot be the name of a table", hint="revector init knowledge_base, or SCHEMA.knowledge_base"
        )
    for part in parts:
        if len(part.encode(errors="replace")) > NAME_BYTES:
            raise UsageError(
                f"the name {part!r} is too long",
                why=f"PostgreSQL's names have at most {NAME_BYTES} bytes; it has {len(part.encode(errors='replace'))}.",
            )
    return (parts[0], parts[1]) if len(parts) == 2 else (None, parts[0])


def _plain(name: str) -> sql.Composable:
    """A name as one would write it: quoted only when it has to be."""
    if re.fullmatch(r"[a-z_][a-z0-9_]*", name) and name not in RESERVED:
        return raw(name)
    return sql.Identifier(name)


def _check(dimension: int, index: str, lists: int) -> None:
    limit = INDEX_LIMITS["vector"]
    if dimension > limit:
        raise Refused(
            f"a vector index takes at most {limit} dimensions, not {dimension}",
            why=f"This is pgvector's limit for the type vector, with {index} and any other index; "
            "without an index every search would read the whole table.",
            hint="name a model of fewer dimensions, or ask the provider for fewer: EMBEDDING_DIMENSION",
        )
    if dimension < 1:
        raise UsageError(f"a vector has at least one dimension, not {dimension}")
    if index == "ivfflat" and not 1 <= lists <= _MOST_LISTS:
        raise UsageError(f"--lists {lists}: IVFFlat takes 1 to {_MOST_LISTS} lists")


def _target_index(index: Method, lists: int, table: str, opclass: str) -> TargetIndex:
    name = cut_name(table, "_embedding_idx")
    parameters = HNSW_DEFAULTS if index == "hnsw" else (("lists", str(lists)),)
    return TargetIndex(index, opclass, parameters, name, name)


def _index_statement(target: TargetIndex, table: sql.Composable, name: sql.Composable) -> sql.Composable:
    return block(
        "knowledge_base",
        "index",
        name=name,
        table=table,
        method=raw(target.method),
        opclass=raw(target.opclass),
        parameters=raw(", ".join(f"{key} = {value}" for key, value in target.parameters)),
    )


# -- init -------------------------------------------------------------------------------------------------------------


def init(
    database: Database,
    embedder: Embedder,
    table: str,
    *,
    index: Method = "hnsw",
    lists: int = DEFAULT_LISTS,
) -> Registered:
    """Create a knowledge base and register its live model; one transaction, all of it or nothing.

    Raises `Refused` when a relation of that name exists, or when pgvector is missing and this role may not create it.
    """
    given_schema, name = split_name(table)
    _check(embedder.get_embedding_dimension(), index, lists)
    identity = embedder.identity()
    with translated(f"revector init {shlex.quote(table)}"), database.connect("init") as session:
        server = read_server(session)
        if server.vector_version is not None or server.standby:
            check_vector(server)
        default = _default_schema(session)
        schema = _existing_schema(session, given_schema or default, table)
        with session.transaction():
            ledgers.ensure(session)
            _refuse_existing(session, schema, name, table)
            created = server.vector_version is None
            if created:
                server = _create_extension(session, server, default or "public")
            assert server.vector_schema is not None
            type_, opclass = (
                sql.Identifier(server.vector_schema, word).as_string(None) for word in ("vector", "vector_cosine_ops")
            )
            target = _target_index(index, lists, name, opclass)
            _refuse_existing(session, schema, target.name, table)
            full_name = sql.Identifier(schema, name)
            try:
                session.execute(
                    block("knowledge_base", "table", table=full_name, type=raw(f"{type_}({identity.dimension})"))
                )
            except pg.InsufficientPrivilege as error:
                raise Refused(
                    f"missing right: {error.diag.message_primary}",
                    why="Nothing was changed.",
                    hint=f"as the owner of the schema: GRANT CREATE ON SCHEMA {_plain(schema).as_string(None)}"
                    f" TO {_plain(server.role).as_string(None)}",
                ) from None
            made = session.row(block("knowledge_base", "attnum"), schema=schema, name=name)
            assert made is not None
            ledger = Ledger(session, made.table_oid)
            ledger.register(1, made.attnum, "content", identity, live=True)
            built = index == "hnsw"
            if built:
                session.execute(_index_statement(target, full_name, sql.Identifier(target.name)))
            else:
                ledger.want_index(1, target)
            ledger.event("init", {"model": identity.model, "index": target.describe()})
    return Registered(schema, name, identity.model, identity.dimension, target.describe(), built, created)


def _default_schema(session: Session) -> str | None:
    with session.transaction():
        session.execute("SELECT set_config('search_path', %(path)s, true)", path=session.user_path)
        schema = session.value(block("knowledge_base", "default_schema"))
    return None if schema is None else str(schema)


def _existing_schema(session: Session, schema: str | None, table: str) -> str:
    if schema is None:
        raise UsageError(
            "the search_path names no schema that exists, so a table has no place to go",
            why=f"search_path is {session.user_path}.",
            hint=f"name the schema: revector init {shlex.quote(f'public.{table}')}",
        )
    if not session.value(block("knowledge_base", "schema_exists"), schema=schema):
        raise UsageError(
            f"there is no schema {schema!r}",
            why="Nothing was changed.",
            hint=f"CREATE SCHEMA {_plain(schema).as_string(None)};",
        )
    return schema


def _refuse_existing(session: Session, schema: str, name: str, table: str) -> None:
    """Refuse when a relation of that name is there: it is somebody's."""
    found = session.row(block("catalog", "relation_named"), schema=schema, name=name)
    if found is None:
        return
    argument = shlex.quote(table)
    other = "choose another name: revector init OTHER_NAME"
    what = f"{name} exists already: {_KINDS.get(found.kind, 'a relation')} in schema {schema}"
    if (live := Ledger(session, found.oid).live()) is not None:
        raise Refused(
            what,
            why=f"revector knows it, and {live.model.model} answers. Nothing was changed.",
            hint=f"load documents into it: revector load {argument} FILE.jsonl\nor {other}",
        )
    vectors = [c.name for c in _columns(session, found.oid) if c.is_vector] if found.kind in "rp" else []
    if vectors:
        raise Refused(
            what,
            why=f"It has vectors in {', '.join(vectors)}; revector does not know of which model. Nothing was changed.",
            hint=f"upgrade its model: revector plan {argument} --from MODEL --to MODEL\nor {other}",
        )
    raise Refused(what, why="It is yours, and is not touched. Nothing was changed.", hint=other)


_KINDS: Final = {
    "r": "a table",
    "p": "a partitioned table",
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
    "i": "an index",
    "I": "an index",
    "S": "a sequence",
    "c": "a type",
}


def _create_extension(session: Session, server: Server, schema: str) -> Server:
    """The server with pgvector in this database, where that is allowed."""
    try:
        with session.transaction():
            session.execute(
                block("knowledge_base", "extension", schema=sql.SQL(" SCHEMA {}").format(sql.Identifier(schema)))
            )
    except pg.InsufficientPrivilege:
        raise Refused(
            f"pgvector is not installed in database {server.database}, and {server.role} may not install it",
            why="Nothing was changed.",
            hint=f"as a superuser of database {server.database}: CREATE EXTENSION vector;",
        ) from None
    except (pg.FeatureNotSupported, pg.UndefinedFile):
        raise Refused(
            "pgvector is not installed on this server",
            why="The server has no extension named vector. Nothing was changed.",
            hint="install pgvector on the server (https://github.com/pgvector/pgvector#installation), then repeat this",
        ) from None
    server = read_server(session)
    check_vector(server)
    return server


# -- load -------------------------------------------------------------------------------------------------------------


def load(
    database: Database,
    embedder_for: Callable[[Identity], Embedder],
    table: str,
    path: Path,
    *,
    batch_size: int = DEFAULT_BATCH,
    observe: Observer = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Loaded:
    """Load FILE.jsonl[.gz] (`_id`, `title`, `text`, `metadata`) with the live model's vectors; the same id replaces.

    What was loaded before an error stays. Raises `UsageError` for a line that is no document, with its number,
    and whatever the model or the database raises.
    """
    command = f"revector load {shlex.quote(table)} {shlex.quote(str(path))}"
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: at least 1")
    if not path.is_file():
        raise UsageError(f"there is no file {path}", hint=f"revector load {shlex.quote(table)} FILE.jsonl")
    with translated(command):
        session = database.connect("load", lock_timeout="60s")
    with session:
        loader: _Loader | None = None
        try:
            with translated(command):
                loader = _Loader(session, embedder_for, table, path, batch_size, observe, stop)
                return loader.run()
        except RevectorError as error:
            if loader is not None and loader.started:
                stay = f"{loader.rows} rows are loaded and stay." if loader.rows else "No row was loaded."
                error.why = f"{error.why} {stay}".strip()
            error.hint = error.hint or f"the same command again: {command}"
            raise


class _Loader:
    """One load: reads, embeds with no transaction open, and writes with the model that is live at that moment."""

    def __init__(
        self,
        session: Session,
        embedder_for: Callable[[Identity], Embedder],
        table: str,
        path: Path,
        batch_size: int,
        observe: Observer,
        stop: Callable[[], bool],
    ) -> None:
        self.session = session
        self.path = path
        self.batch_size = batch_size
        self.observe = observe
        self.stop = stop
        self._embedder_for = embedder_for
        self._models: dict[Identity, Embedder] = {}
        self.name = table
        self.table = _known_table(session, table)
        self.ledger = Ledger(session, self.table.oid)
        self.live = self._live()
        self.started = False
        self.read = self.rows = self.replaced = self.total = 0
        self.refused: list[tuple[str, Refusal]] = []

    def run(self) -> Loaded:
        """Load the whole file."""
        began = time.monotonic()
        self._model(self.live)
        self.total = _count_lines(self.path)
        self.started = True
        for chunk in _chunks(_documents(self.path), max(_CHUNK, self.batch_size)):
            self._chunk(chunk)
        index = self._build_wanted_index()
        self.ledger.event(
            "load", {"file": self.path.name, "rows": self.rows, "replaced": self.replaced, "refused": len(self.refused)}
        )
        return Loaded(
            self.rows,
            self.replaced,
            tuple(self.refused),
            time.monotonic() - began,
            self.live.model.model,
            index,
        )

    def _live(self) -> LiveGeneration:
        live = self.ledger.live()
        if live is None:
            raise _unknown(self.name)
        return live

    def _model(self, live: LiveGeneration) -> Embedder:
        """The live model, proven once to be the one recorded."""
        if live.model not in self._models:
            embedder = self._embedder_for(live.model)
            embedder.check_identity(live.model)
            self._models[live.model] = embedder
        return self._models[live.model]

    def _chunk(self, documents: list[_Document]) -> None:
        """Embed and write; once more when a cutover came between, for then another model answers."""
        latest = {d.id: d for d in documents}
        wanted = sorted(latest.values(), key=lambda d: -len(d.content))
        while True:
            if self.stop():
                raise Interrupted
            vectors, refused = self._embed(wanted)
            with self.session.transaction():
                self.session.execute(block("knowledge_base", "enter", table=self.table.identifier))
                present = self._live()
                if (present.number, present.model) == (self.live.number, self.live.model):
                    written, replaced = self._write([d for d in wanted if d.id in vectors], vectors, present)
                    break
            self.observe(Note(f"{present.model.model} answers now: these texts are embedded again"))
            self.live = present
        # An earlier document with the same id was replaced before it was written.
        twice = sum(d is not latest[d.id] and d.id in vectors for d in documents)
        self.read += len(documents)
        self.rows += written + twice
        self.replaced += replaced + twice
        self.refused += refused
        self._tell(0)

    def _embed(self, documents: list[_Document]) -> tuple[dict[str, str], list[tuple[str, Refusal]]]:
        """Vectors by id, as PostgreSQL reads them, and what the model refuses."""
        model = self._model(self.live)
        vectors: dict[str, str] = {}
        refused: list[tuple[str, Refusal]] = []
        for start in range(0, len(documents), self.batch_size):
            batch = documents[start : start + self.batch_size]
            made, bad = model.encode_isolating([d.content for d in batch], batch_size=self.batch_size, stop=self.stop)
            for position, (document, vector) in enumerate(zip(batch, made.tolist(), strict=True)):
                if position in bad:
                    refused.append((document.id, bad[position]))
                else:
                    # Nine digits keep every bit of a float32.
                    vectors[document.id] = f"[{','.join(f'{x:.9g}' for x in vector)}]"
            self._tell(start + len(batch))
        return vectors, refused

    def _write(self, documents: list[_Document], vectors: dict[str, str], live: LiveGeneration) -> tuple[int, int]:
        if not documents:
            return 0, 0
        types = {c.name: c.type for c in _columns(self.session, self.table.oid)}
        try:
            row = self.session.row(
                block(
                    "knowledge_base",
                    "write",
                    table=self.table.identifier,
                    column=sql.Identifier(live.column),
                    type=raw(types[live.column]),
                    id_type=raw(types["id"]),
                    metadata_type=raw(types["metadata"]),
                ),
                ids=[d.id for d in documents],
                titles=[d.title for d in documents],
                contents=[d.content for d in documents],
                metadata=[d.metadata for d in documents],
                vectors=[vectors[d.id] for d in documents],
            )
        except (pg.DataError, pg.IntegrityError) as error:
            lines = [d.line for d in documents]
            raise UsageError(
                f"{self.path}: {self.name} refuses a document of lines {min(lines)} to {max(lines)}:"
                f" {error.diag.message_primary}",
                why=error.diag.message_detail or "",
                hint="correct it in the file, then repeat the command",
            ) from None
        assert row is not None
        return int(row.written), int(row.replaced)

    def _tell(self, embedded: int) -> None:
        done = self.read + embedded
        self.observe(Progress("load", done, max(self.total, done) if self.total else 0, "rows"))

    def _build_wanted_index(self) -> str | None:
        """Build the index that `init` promised, now that there are rows for it to learn from."""
        live = self._live()
        wanted = self.ledger.wanted_index(live.number)
        if wanted is None or not self.session.value(
            block("knowledge_base", "any_row", table=self.table.identifier),
        ):
            return None
        later = f"index {wanted.describe()} is not built: another revector command is at work; the next load builds it"
        if not self.session.try_lock("steer", self.table.oid):
            self.observe(Note(later))
            return None
        try:
            row = self.ledger.latest()
            self.ledger.migration = None
            if row is not None and not row.stage.closed:
                self.observe(Note(later))
                return None
            table = read_table(self.session, self.table.oid)
            column = table.numbered(live.attnum)
            if column is not None and not any(i.valid and i.covers_only(column) for i in table.indexes):
                self._build(table, wanted, live)
            self.ledger.want_index(live.number, None)
            return wanted.describe()
        finally:
            if not self.session.connection.closed:
                self.session.unlock("steer", self.table.oid)

    def _build(self, table: Table, wanted: TargetIndex, live: LiveGeneration) -> None:
        found = self.session.row(block("catalog", "relation_named"), schema=table.schema, name=wanted.name)
        again = f"revector load {shlex.quote(self.name)} {shlex.quote(str(self.path))}"
        if found is not None and found.oid not in {i.oid for i in table.indexes if not i.valid}:
            raise Refused(
                f"{table.schema}.{wanted.name} exists and is not the index that init promised",
                why="All rows are loaded; only the index is missing.",
                hint=f"rename or drop it, then: {again}",
            )
        self.observe(Note(f"building {wanted.describe()}; reads and writes go on"))
        # lock_timeout = 0: CONCURRENTLY waits for old transactions, and blocks nobody while it waits.
        self.session.execute("SET lock_timeout = 0")
        with self._cancelled_on_stop():
            try:
                if found is not None:
                    name = sql.Identifier(table.schema, wanted.name)
                    self.session.execute(block("knowledge_base", "drop_index", name=name))
                self.session.execute(
                    block(
                        "knowledge_base",
                        "index_after_load",
                        name=sql.Identifier(wanted.name),
                        table=table.identifier,
                        method=sql.Identifier(wanted.method),
                        column=sql.Identifier(live.column),
                        opclass=raw(wanted.opclass),
                        parameters=with_clause(wanted.parameters),
                    )
                )
                self.session.execute(block("knowledge_base", "analyze", table=table.identifier))
            except pg.QueryCanceled:
                if self.stop():
                    raise Interrupted(why="The index is left unfinished; the next load builds it.") from None
                raise
            except pg.ProgramLimitExceeded as error:
                raise Refused(
                    f"the index cannot be built: {error.diag.message_primary}",
                    why="IVFFlat sorts the vectors of all its lists in memory.",
                    hint=f"ALTER ROLE CURRENT_USER SET maintenance_work_mem = '1GB';\nthen: {again}",
                ) from None

    @contextmanager
    def _cancelled_on_stop(self) -> Iterator[None]:
        """End the running statement when the user asks to stop."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                if self.stop():
                    self.session.connection.cancel_safe()
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _known_table(session: Session, name: str) -> Table:
    """The table, if documents can be loaded into it."""
    try:
        oid = find_table(session, name)
    except UsageError as error:
        error.hint = error.hint or f"create it: revector init {shlex.quote(name)}"
        raise
    table = read_table(session, oid)
    if table.kind not in "rp":
        raise UsageError(f"{name} is {_KINDS.get(table.kind, 'not a table')}; documents are loaded into tables")
    ledgers.require(session)
    if not ledgers.exists(session) or Ledger(session, oid).live() is None:
        raise _unknown(name)
    missing = [c for c in _COLUMNS if c not in {column.name for column in table.columns}]
    if missing:
        raise UsageError(
            f"{name} has no column {', '.join(missing)}",
            why=f"load writes {', '.join(_COLUMNS)} and the vector; {name} has {', '.join(c.name for c in table.columns)}.",
            hint="write its rows with your own program, or make a knowledge base: revector init OTHER_NAME",
        )
    if frozenset({"id"}) not in table.unique:
        raise UsageError(
            f"{name}.id is not unique", why="load replaces the row of the same id.", hint="add a unique index on it"
        )
    return table


def _unknown(name: str) -> Refused:
    return Refused(
        f"revector does not know {name}",
        why="The ledger does not say which model its vectors are of. Nothing was changed.",
        hint=f"make a knowledge base of its own: revector init OTHER_NAME\n"
        f"or upgrade the model of this table: revector plan {shlex.quote(name)} --from MODEL --to MODEL",
    )


def _columns(session: Session, table: int) -> tuple[Column, ...]:
    return tuple(Column(**c._asdict()) for c in session.rows(block("catalog", "columns"), table=table))


# -- the file ---------------------------------------------------------------------------------------------------------


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _count_lines(path: Path) -> int:
    """Lines of the file; 0 where counting would take long, or where reading fails (the reader will say so)."""
    if path.stat().st_size > _CHEAP_BYTES:
        return 0
    lines, last = 0, b"\n"
    try:
        with _open(path) as file:
            while part := file.read(1 << 20):
                lines += part.count(b"\n")
                last = part[-1:]
    except (OSError, EOFError, zlib.error):
        return 0
    return lines + (last != b"\n")


def _chunks(documents: Iterable[_Document], size: int) -> Iterator[list[_Document]]:
    """Lists of so many documents; those before a bad line come before its error."""
    chunk: list[_Document] = []
    try:
        for document in documents:
            chunk.append(document)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except UsageError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _documents(path: Path) -> Iterator[_Document]:
    """The documents of the file; `UsageError` names the line that is none. Blank lines are passed over."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield _document(number, line)
    except _BadLine as bad:
        raise UsageError(
            f"{path}, line {number}: {bad}",
            why='A line is one JSON object: {"_id": "...", "title": "...", "text": "...", "metadata": {...}}.',
            hint="correct the line, then repeat the command",
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read after line {number}: {error}") from None


class _BadLine(Exception):
    """Why a line is not a document."""


def _document(number: int, line: bytes) -> _Document:
    try:
        told = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise _BadLine("not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _BadLine(f"not JSON ({error})") from None
    if not isinstance(told, dict):
        raise _BadLine(f"{_TYPES.get(type(told), 'null')}, not a JSON object")
    for key in ("_id", "text"):
        if told.get(key) is None:
            raise _BadLine(f"no {key!r}")
    id_, title, text, metadata = told["_id"], told.get("title"), told["text"], told.get("metadata")
    if isinstance(id_, int) and not isinstance(id_, bool):
        id_ = str(id_)
    for key, value in (("_id", id_), ("title", "" if title is None else title), ("text", text)):
        if not isinstance(value, str):
            raise _BadLine(f"{key!r} is {_TYPES.get(type(value), 'null')}, not a string")
    if not id_:
        raise _BadLine("'_id' is empty")
    if metadata is not None and not isinstance(metadata, dict):
        raise _BadLine(f"'metadata' is {_TYPES[type(metadata)]}, not an object")
    try:
        document = _Document(
            number,
            id_,
            title or None,
            f"{title}\n{text}" if title else text,
            json.dumps(metadata or {}, ensure_ascii=False, allow_nan=False),
        )
        stored = f"{document.id}{document.content}{document.metadata}"
        stored.encode()
    except UnicodeEncodeError:
        raise _BadLine("half a surrogate pair, which is no text") from None
    except ValueError:
        raise _BadLine("a number in 'metadata' is too large") from None
    if "\0" in stored or (b"u0000" in line and _NUL.search(document.metadata)):
        raise _BadLine("the character U+0000, which PostgreSQL cannot store")
    return document


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
