"""What is true in the database now: the table, its columns, indexes, triggers and whatever hangs on a column."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from psycopg import errors as pg
from psycopg import sql

from revector.db import Session, block, raw
from revector.errors import ExpressionRefused, Refused, UsageError
from revector.partitions import Partitions, own_objects, parent_name, read_partitions

#: Vector types that a generation can have, and the most dimensions that their indexes take (pgvector's README).
INDEX_LIMITS = {"vector": 2000, "halfvec": 4000}
#: Bits of pg_trigger.tgtype (PostgreSQL: src/include/catalog/pg_trigger.h).
_ROW, _BEFORE, _INSERT, _UPDATE = 1, 2, 4, 16


@dataclass(frozen=True, slots=True)
class Server:
    """The server, the extension and what this role may do."""

    version: str
    version_num: int
    database: str
    standby: bool
    #: None: pgvector is not installed in this database.
    vector_version: str | None
    vector_schema: str | None
    may_create_schema: bool
    may_use_temp: bool
    has_ledger: bool
    may_be_replica: bool
    bypasses_rls: bool
    role: str


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    number: int
    name: str
    #: As format_type prints it, schema-qualified: `public.vector(384)`.
    type: str
    #: Bare type name: `vector`.
    type_name: str
    #: `b` base, `d` domain, ...
    type_kind: str
    typmod: int
    not_null: bool
    generated: str
    identity: str
    not_null_name: str | None
    comment: str | None
    not_null_comment: str | None = None
    #: The vector type that its type is a domain over; None: it is of no such domain.
    domain_over: str | None = None

    @property
    def is_vector(self) -> bool:
        """Whether it can be the column of a generation."""
        return self.type_name in INDEX_LIMITS

    @property
    def dimension(self) -> int | None:
        """The declared dimension; None for `vector` without one."""
        return self.typmod if self.typmod > 0 else None


@dataclass(frozen=True, slots=True)
class Index:
    """One index, with what a twin of it on another column needs."""

    oid: int
    name: str
    method: str
    valid: bool
    keys: tuple[int, ...]
    #: Schema-qualified.
    opclass: str
    parameters: tuple[tuple[str, str], ...]
    predicate: str | None
    expression: str | None
    bytes: int
    definition: str
    #: Whether it is that of an exclusion constraint, which its definition does not say.
    excludes: bool = False
    #: Whether CLUSTER orders the table by it.
    clustered: bool = False
    #: Where it lies; None: where the database's relations do.
    tablespace: str | None = None
    #: Whether this role may put another one there.
    placeable: bool = True
    #: (number, target) of its columns that have a statistics target of their own.
    statistics: tuple[tuple[int, int], ...] = ()

    def covers_only(self, column: Column) -> bool:
        """Whether this is a vector index of that column and of nothing else."""
        mentions = self.predicate is not None and re.search(rf"\b{re.escape(column.name)}\b", self.predicate)
        if self.method not in ("hnsw", "ivfflat") or mentions:
            return False
        return self.keys == (column.number,) or self.cast(column) is not None

    @property
    def unique(self) -> bool:
        """Whether no two rows may have the same key."""
        return self.definition.startswith("CREATE UNIQUE ")

    def cast(self, column: Column) -> tuple[str, int] | None:
        """The type, its dimension left out, and the dimension that the index casts the column to; None: it does not.

        A column without a declared dimension cannot be indexed otherwise (pgvector's README).
        """
        name = re.escape(sql.Identifier(column.name).as_string(None))
        bare = re.escape(column.name)
        cast = rf"\(?\(?(?:{name}|{bare})\)?::((?:[^()]+\.)?(?:vector|halfvec))\((\d+)\)\)?"
        found = re.fullmatch(cast, self.expression or "")
        return (found[1], int(found[2])) if found and self.keys == (0,) else None


@dataclass(frozen=True, slots=True)
class Trigger:
    """One trigger of the user's, or ours."""

    oid: int
    name: str
    enabled: str
    type: int
    #: Attribute numbers of `UPDATE OF`; empty: every UPDATE.
    columns: tuple[int, ...]
    #: The partition that it is on; None: the table.
    partition: str | None = None

    @property
    def before_row(self) -> bool:
        """Whether it can change the row that ours sees."""
        return bool(self.type & _ROW and self.type & _BEFORE and self.type & (_INSERT | _UPDATE))

    @property
    def on_any_update(self) -> bool:
        """Whether our write-back would fire it (a row trigger on UPDATE that names no columns, or a statement one)."""
        return bool(self.type & _UPDATE) and not self.columns


@dataclass(frozen=True, slots=True)
class Dependent:
    """Something that is tied to the vector column and would stay behind on a rename."""

    description: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Text:
    """An expression over one row, the text or the filter: as the user wrote it and as PostgreSQL stores it."""

    given: str
    #: Deparsed by the server, names qualified, generated columns replaced by what generates them.
    canonical: str
    #: (name, type) of the columns that it reads.
    columns: tuple[tuple[str, str], ...]

    def within(self, where: Text | None) -> Text:
        """The same text, NULL for rows outside the filter: what has no text is never pending."""
        if where is None:
            return self
        columns = dict(self.columns) | dict(where.columns)
        return Text(
            self.given,
            f"CASE WHEN ({where.canonical}) THEN ({self.canonical})::text END",
            tuple(columns.items()),
        )


@dataclass(frozen=True, slots=True)
class Table:
    """The user's table."""

    oid: int
    schema: str
    name: str
    kind: str
    persistence: str
    estimated_rows: float
    heap_bytes: int
    total_bytes: int
    row_security: bool
    forces_row_security: bool
    #: Whether this role may create indexes in the table's schema.
    may_index: bool
    owned: bool
    owner: str
    has_children: bool
    is_child: bool
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    unique: tuple[frozenset[str], ...]
    indexes: tuple[Index, ...]
    triggers: tuple[Trigger, ...]
    update_rules: tuple[str, ...]
    #: The tree below a partitioned table; None: the table is not partitioned.
    partitions: Partitions | None = None
    #: The partitioned table that it is a partition of.
    parent: str | None = None
    #: The type that its columns come from (`CREATE TABLE ... OF`).
    of_type: str | None = None

    def column(self, name: str) -> Column:
        """The column of that name; `UsageError` names near ones."""
        for column in self.columns:
            if column.name == name:
                return column
        near = difflib.get_close_matches(name, [c.name for c in self.columns], n=1)
        vectors = [c.name for c in self.columns if c.is_vector]
        raise UsageError(
            f"{self.name} has no column {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
            why=f"Its vector columns: {', '.join(vectors) or 'none'}. All columns: {', '.join(c.name for c in self.columns)}.",
        )

    def vector_column(self, name: str) -> Column:
        """The vector column of that name."""
        column = self.column(name)
        if column.domain_over is not None:
            plain = sql.SQL("ALTER TABLE {} ALTER COLUMN {} TYPE {}").format(
                self.identifier, sql.Identifier(name), raw(column.domain_over)
            )
            raise Refused(
                f"{self.name}.{name} is of {column.type}, a domain over {column.domain_over}",
                why="Its conditions are the domain's: they cannot be relaxed while a vector is pending, nor take another"
                " dimension. Nothing was changed.",
                hint=f"give the column the type itself: {plain.as_string(None)}",
            )
        if not column.is_vector:
            vectors = [c.name for c in self.columns if c.is_vector]
            raise UsageError(
                f"{self.name}.{name} is of type {column.type}, not a vector",
                why=f"Its vector columns: {', '.join(vectors) or 'none'}.",
                hint=f"name it with --vector {vectors[0]}" if vectors else "",
            )
        return column

    def numbered(self, number: int) -> Column | None:
        """The column with that attribute number, if it still exists."""
        return next((c for c in self.columns if c.number == number), None)

    @property
    def readable(self) -> bool:
        """Whether its rows can be counted and sampled here."""
        return self.kind == "r" or (self.partitions is not None and all(p.kind != "f" for p in self.partitions.parts))

    @property
    def identifier(self) -> sql.Identifier:
        """Schema and name, quoted."""
        return sql.Identifier(self.schema, self.name)


def read_server(session: Session) -> Server:
    """The server's facts."""
    row = session.row(block("catalog", "server"))
    assert row is not None
    return Server(**row._asdict())


@contextmanager
def _as_user(session: Session) -> Iterator[None]:
    """Names resolve in the user's own search_path; nothing can be written."""
    with session.transaction():
        session.execute("SELECT set_config('search_path', %(path)s, true)", path=session.user_path)
        session.execute("SET TRANSACTION READ ONLY")
        yield


def find_table(session: Session, name: str) -> int:
    """The OID of the table that the user means.

    `name` is an exact name (`Weird Table`, `select`), schema.name, or what SQL would understand ("quoted", folded).
    """
    with _as_user(session):
        oid = session.value(block("catalog", "find_exact"), name=name)
        if oid is None and "." in name:
            schema, _, table = name.partition(".")
            row = session.row(block("catalog", "relation_named"), schema=schema, name=table)
            oid = row.oid if row and row.kind in "rpvmf" else None
    if oid is None:
        try:
            with _as_user(session):
                oid = session.value(block("catalog", "find_parsed"), name=name)
        except (pg.InvalidName, pg.UndefinedObject, pg.SyntaxError):
            oid = None
    if oid is not None:
        # With a view schema of ours first in the search_path, the name means the view; the table behind it is meant.
        behind = session.value(block("catalog", "behind_view"), view=oid) if _knows_views(session) else None
        return int(behind or oid)
    known = [
        row.name if row.schema == "public" else f"{row.schema}.{row.name}"
        for row in session.rows(block("catalog", "vector_tables"))
    ]
    near = difflib.get_close_matches(name, known, n=1)
    database = session.value("SELECT current_database()")
    raise UsageError(
        f"there is no table {name!r} in database {database!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        why=f"Tables with a vector column here: {', '.join(known) or 'none'}.",
    )


def read_table(session: Session, oid: int) -> Table:
    """Everything about the table but its dependents; consistent, from one snapshot."""
    with session.transaction():
        session.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        row = session.row(block("catalog", "table"), table=oid)
        if row is None:
            raise Refused("the table does not exist any more")
        told = row._asdict()
        tree = read_partitions(session, oid) if row.kind == "p" else None
        if tree is not None:
            # The table itself holds no row: what it weighs is what its partitions weigh.
            told |= {
                name: sum(getattr(part, name) for part in tree.parts)
                for name in ("estimated_rows", "heap_bytes", "total_bytes")
            }
        own = [part.oid for part in tree.parts] if tree else []
        return Table(
            **told,
            partitions=tree,
            parent=parent_name(session, oid) if row.is_child else None,
            columns=tuple(Column(**c._asdict()) for c in session.rows(block("catalog", "columns"), table=oid)),
            key=tuple(r.name for r in session.rows(block("catalog", "primary_key"), table=oid)),
            unique=tuple(frozenset(r.names) for r in session.rows(block("catalog", "unique_columns"), table=oid)),
            indexes=tuple(
                Index(
                    oid=i.oid,
                    name=i.name,
                    method=i.method,
                    valid=i.valid,
                    keys=tuple(i.keys),
                    opclass=i.opclass,
                    parameters=tuple(tuple(option.split("=", 1)) for option in i.options),
                    predicate=i.predicate,
                    expression=i.expression,
                    bytes=i.bytes,
                    definition=i.definition,
                    excludes=i.excludes,
                    clustered=i.clustered,
                    tablespace=i.tablespace,
                    placeable=i.placeable,
                    statistics=tuple((number, target) for number, target in i.statistics),
                )
                for i in session.rows(block("catalog", "indexes"), table=oid)
            ),
            triggers=(
                *(
                    Trigger(t.oid, t.name, t.enabled, t.type, tuple(t.columns))
                    for t in session.rows(block("catalog", "triggers"), table=oid)
                ),
                *(
                    Trigger(t.oid, t.name, t.enabled, t.type, tuple(t.columns), t.partition)
                    for t in (session.rows(block("partitions", "triggers"), tables=own) if own else ())
                ),
            ),
            update_rules=tuple(r.name for r in session.rows(block("catalog", "update_rules"), table=oid)),
        )


def read_text(session: Session, table: Table, given: str) -> Text:
    """Let the server parse the user's text expression alone, and say how it stores it.

    Refused by name: several statements, sub-queries, aggregates, set-returning and window functions, functions that
    are not IMMUTABLE, and results that are not text. Nothing is changed: what is created is rolled back.
    """
    text, type_name = _read_expression(session, table, given, "--text")
    if type_name not in ("text", "character varying", "character"):
        raise ExpressionRefused(
            f"--text {given!r} gives {type_name}, not text", why="A model reads text.", hint=f"--text '({given})::text'"
        )
    if not text.columns:
        raise ExpressionRefused(
            f"--text {given!r} reads no column of {table.name}", why="Every row would have the same text."
        )
    return text


def read_filter(session: Session, table: Table, given: str) -> Text:
    """The same for the condition that rows are chosen by; its result must be boolean."""
    where, type_name = _read_expression(session, table, given, "--where")
    if type_name != "boolean":
        raise ExpressionRefused(
            f"--where {given!r} gives {type_name}, not boolean",
            why="It says of each row whether it belongs to the migration.",
            hint="write a condition, such as --where \"tenant = 'a'\"",
        )
    if not where.columns:
        raise ExpressionRefused(
            f"--where {given!r} reads no column of {table.name}", why="Every row would be in it, or none."
        )
    return where


def _read_expression(session: Session, table: Table, given: str, option: str) -> tuple[Text, str]:
    """The expression as the server stores it, and the name of its type."""
    generated = {r.name: r.expression for r in session.rows(block("catalog", "generated"), table=table.oid)}
    columns = sql.SQL(", ").join(
        sql.SQL("({}) AS {}").format(raw(generated[c.name]), sql.Identifier(c.name))
        if c.name in generated
        else sql.Identifier("r", c.name)
        for c in table.columns
    )
    if ";" in re.sub(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"", "", given):
        raise ExpressionRefused(f"{option} {given!r} contains ';'", why="It must be one SQL expression over one row.")
    parts = {"text": raw(given), "table": table.identifier, "alias": sql.Identifier(table.name)}
    try:
        with _as_user(session):
            explained = session.alone(block("catalog", "flatten", columns=columns, **parts))
    except pg.UndefinedColumn as error:
        raise ExpressionRefused(
            f"{option}: {error.diag.message_primary}",
            why=f"Columns of {table.name}: {', '.join(c.name for c in table.columns)}.",
            hint="give the column or expression that holds the text: --text COLUMN" if option == "--text" else "",
        ) from None
    except (pg.ProgrammingError, pg.DataError, pg.NotSupportedError) as error:
        raise ExpressionRefused(
            f"{option} {given!r} is not an expression over one row: {error.diag.message_primary}",
            why="It must be one SQL expression such as content, or title || E'\\n' || body.",
        ) from None
    plan = explained[0]["Plan"]
    # A partitioned table has no rows of its own to scan.
    if (
        plan["Node Type"] != ("Result" if table.partitions else "Seq Scan")
        or "Plans" in plan
        or len(plan["Output"]) != 1
    ):
        raise ExpressionRefused(
            f"{option} {given!r} uses {_what_it_uses(plan)}",
            why="It must be computed from one row alone, so that a trigger can tell when it changed.",
        )
    flat = plan["Output"][0]
    type_name = ""
    with session.transaction():
        session.execute("SELECT set_config('search_path', %(path)s, true)", path=f"{session.user_path}, pg_temp")
        session.execute(block("catalog", "scratch", table=table.identifier))
        try:
            with session.transaction():
                session.execute(block("catalog", "scratch_index", text=raw(flat)))
        except (pg.InvalidObjectDefinition, pg.UndefinedObject, pg.ProgrammingError, pg.NotSupportedError) as error:
            names = sorted({n.rsplit(".", 1)[-1].strip('"') for n in re.findall(r"([\w.\"]+)\(", flat)})
            guilty = [r.name for r in session.rows(block("catalog", "not_immutable"), names=names)]
            raise ExpressionRefused(
                f"{option} {given!r} cannot be indexed: {', '.join(f'{n}()' for n in guilty) or error.diag.message_primary}"
                + (" is not IMMUTABLE" if guilty else ""),
                why="The index that finds pending rows needs an IMMUTABLE expression."
                + (" Use a || ' ' || b with coalesce(b, '') in place of concat_ws." if "concat_ws" in guilty else ""),
            ) from None
        session.execute("SELECT set_config('search_path', 'pg_catalog, pg_temp', true)")
        stored = session.row(block("catalog", "canonical"))
        assert stored is not None
        type_name = session.value(
            "SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = 'pg_temp.rv_scratch'::regclass AND attnum = 1"
        )
        session.execute("DROP TABLE pg_temp.r")
    types = {c.name: c.type for c in table.columns}
    return Text(given, stored.text or "", tuple((name, types[name]) for name in stored.columns)), type_name


def _what_it_uses(plan: dict[str, object]) -> str:
    text = str(plan)
    if "InitPlan" in text or "SubPlan" in text or "Join" in text:
        return "a sub-query"
    if plan["Node Type"] == "WindowAgg":
        return "a window function"
    if plan["Node Type"] == "Aggregate":
        return "an aggregate"
    if "ProjectSet" in text:
        return "a set-returning function"
    return "more than one row or column"


def dependents(session: Session, table: Table, column: Column, carried: frozenset[str]) -> tuple[Dependent, ...]:
    """Everything tied to the column that a rename would leave behind; NOT NULL and what is carried aside.

    `carried`: names of indexes and CHECKs. (By name: REINDEX CONCURRENTLY gives an index a new OID.)
    """
    indexes = {i.oid: i for i in table.indexes}
    found: list[Dependent] = []
    views = own_views(session, table.oid)
    bound = own_views(session, table.oid, column.number)
    for row in session.rows(block("catalog", "dependents"), table=table.oid, column=column.number):
        # What a column list publishes is asked for by name below, and by `publishing`.
        if row.view in bound or row.catalog == "pg_publication_rel":
            continue
        if row.view in views:
            # It is of another vector column's generation, and shows this one as any other column.
            remedy = f"revector expose {table.name} --drop, and expose again when this column's upgrade is closed"
            found.append(Dependent(row.description, remedy))
            continue
        index = indexes.get(row.oid) if row.catalog == "pg_class" else None
        if row.constraint_type == "n" or (index.name if index else row.constraint_name) in carried:
            continue
        found.append(Dependent(row.description, _remedy(row, index, table, column)))
    found += [
        Dependent(
            f"publication {publication.name} publishes every column of the table",
            "publish a column list without the vector column, and re-sync the subscribers",
        )
        for publication in session.rows(block("catalog", "publications"), table=table.oid)
        if publication.columns is None
    ]
    if table.partitions is not None:
        found += _own_dependents(session, table, column)
    return tuple(found)


def holding(session: Session, table: Table, column: Column) -> tuple[Dependent, ...]:
    """What DROP COLUMN would fail over; our view of that column's generation aside, which goes first."""
    tables = [table.oid, *(part.oid for part in (table.partitions.parts if table.partitions else ()))]
    ours = own_views(session, table.oid, column.number)
    kinds = {
        "pg_attrdef": "drop that generated column",
        "pg_rewrite": "drop that rule",
        "pg_trigger": f"create that trigger without {column.name} in UPDATE OF and in WHEN",
        "pg_policy": f"write that policy without {column.name}",
        "pg_proc": "drop that function, or give it a body in quotes",
        "pg_publication_rel": f"publish the table without {column.name}",
    }
    return tuple(
        Dependent(row.description, row.statement or kinds.get(row.catalog, f"drop it: {row.description}"))
        for row in session.rows(block("catalog", "holding"), tables=tables, column=column.name)
        if row.view not in ours
    )


def own_views(session: Session, table: int, column: int | None = None) -> frozenset[int]:
    """The views that `expose` made of a table; with `column`, of the generation in that attribute number alone.

    They are bound to their generation's column, and a rename is what they are for.
    """
    if not _knows_views(session):
        return frozenset()
    return frozenset(row.view_oid for row in session.rows(block("catalog", "own_views"), table=table, column=column))


def _knows_views(session: Session) -> bool:
    return session.value(block("catalog", "knows_views")) is True


def publishing(session: Session, table: Table, column: Column) -> tuple[str, ...]:
    """The publications whose column list has this column: their subscribers know it by its name, and stop at a rename."""
    rows = session.rows(block("catalog", "publications"), table=table.oid)
    return tuple(row.name for row in rows if row.columns is not None and column.number in row.columns)


def _remedy(row: Any, index: Index | None, table: Table, column: Column) -> str:
    """What to do about something that cannot be carried."""
    later = "and create it again after finalize"
    if row.constraint_type == "x" or (index is not None and index.excludes):
        own = sql.Identifier(index.name if index else row.constraint_name)
        drop = sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(table.identifier, own).as_string(None)
        return f"{drop}, {later}: it would go on comparing the old vectors"
    if index is not None:
        if index.unique:
            return "drop it: two rows may have the same text, and so the same vector"
        if not index.valid:
            name = sql.Identifier(table.schema, index.name).as_string(None)
            if table.partitions is not None:
                return (
                    f"it is INVALID, not on every partition: build what is missing, each with ALTER INDEX {name} ATTACH"
                    f" PARTITION ..., or DROP INDEX {name}"
                )
            return f"it is INVALID: REINDEX INDEX CONCURRENTLY {name}, or DROP INDEX {name}"
        if index.method in ("hnsw", "ivfflat") and index.predicate is not None:
            return f"create it again without {column.name} in its WHERE (a vector index never holds NULLs), and drop this one"
        return f"drop it, {later} for the new dimension"
    match row.catalog:
        case "pg_rewrite":
            return f"drop the view or rule, {later}: it would go on showing the old vectors"
        case "pg_proc":
            return f"drop the function, {later}, or give it a body in quotes, which finds columns by name"
        case "pg_trigger":
            return f"create the trigger without {column.name} in UPDATE OF and in WHEN"
        case "pg_policy":
            return f"write the policy without {column.name}"
        case "pg_attrdef" if row.description.startswith(f"default value for column {column.name} of "):
            return f"drop the default: it is a vector of the old model, or {later.removeprefix('and ')}"
        case "pg_attrdef":
            return f"drop the generated column, {later}: it is computed from the old vectors"
        case "pg_statistic_ext":
            return f"drop the statistics, {later}"
        case "pg_constraint" if row.constraint_type == "c":
            return (
                f"drop the CHECK, {later}: it reads other columns too, or refuses NULL, which a pending row has,"
                " or refuses the new model's vectors"
            )
    return f"drop it, {later}"


def _own_dependents(session: Session, table: Table, column: Column) -> list[Dependent]:
    """What hangs on the column in one partition alone."""
    return [
        Dependent(
            f"{own.description} of partition {own.partition}",
            "make it part of an index of the whole table (CREATE INDEX ... ON ONLY, ALTER INDEX ... ATTACH PARTITION), or drop it"
            if own.is_index
            else "drop it, or publish the table without its vector column",
        )
        for own in own_objects(session, table.oid, column.name)
    ]


def functions_naming(session: Session, table: Table, column: Column) -> tuple[str, ...]:
    """Functions that read or write the column by name, or all columns: a warning, for only their text tells.

    A trigger's function need not name its table.
    """
    rows = session.rows(
        block("catalog", "functions_naming"),
        table_name=re.escape(table.name),
        column_name=re.escape(column.name),
        tables=[table.oid, *(part.oid for part in (table.partitions.parts if table.partitions else ()))],
    )
    return tuple(row.name for row in rows)


def sample_clause(table: Table, wanted: int) -> tuple[sql.SQL, float]:
    """TABLESAMPLE method and percentage that give about twice the wanted rows without reading a large table whole."""
    rows = max(table.estimated_rows, 0.0)
    if rows < 50_000:
        return sql.SQL("BERNOULLI"), 100.0 if rows < 4 * wanted else min(100.0, 300.0 * wanted / rows)
    return sql.SQL("SYSTEM"), max(min(100.0, 300.0 * wanted / rows), 0.01)
