"""What will be done, decided once: (request, facts) -> findings and a frozen `Plan`. No I/O, no clock, no randomness."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from revector.carried import NOTHING_CARRIED, Carried, carried_from_json, conditions, placed
from revector.catalog import INDEX_LIMITS, Column, Dependent, Index, Server, Table, Text
from revector.embed.spec import Identity
from revector.errors import Refused
from revector.partitions import Partitions

FORMAT: Final = 1
#: PostgreSQL's limit on names (NAMEDATALEN - 1), in bytes.
NAME_BYTES: Final = 63
#: Defaults of pgvector's HNSW, and of the IVFFlat that we create.
HNSW_DEFAULTS: Final = (("m", "16"), ("ef_construction", "64"))
DEFAULT_LISTS: Final = 100
DEFAULT_BATCH: Final = 50
VERIFY_THRESHOLD: Final = 0.999
#: Partitions above which the plan warns of the pause budget.
MANY_PARTITIONS: Final = 200

IndexChoice = Literal["auto", "same", "hnsw", "ivfflat"]


@dataclass(frozen=True, slots=True)
class Consents:
    """What the user accepted, on record."""

    accept_triggers: bool = False
    include_null: bool = False


@dataclass(frozen=True, slots=True)
class Source:
    """A backup table that the candidate's vectors are taken from where key and text are still the same."""

    oid: int
    #: Its name when the plan was made, for people; the OID is what counts.
    name: str
    #: Its vector column, and the columns of its key.
    column: str
    key: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Back:
    """A way back after finalize: where the vectors are, which model made them, how they were indexed."""

    source: Source
    model: Identity
    indexes: tuple[LiveIndex, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for; None: not said."""

    to: str | None = None
    from_: str | None = None
    text: str | None = None
    #: Only these rows are migrated: a condition over one row.
    where: str | None = None
    vector: str | None = None
    key: str | None = None
    batch_size: int | None = None
    index: IndexChoice | None = None
    m: int | None = None
    ef_construction: int | None = None
    lists: int | None = None
    backup: bool | None = None
    consents: Consents = field(default_factory=Consents)
    #: Only `restore` asks for it: `to` is then a model on record, and a backup table has vectors of it.
    back: Back | None = None


@dataclass(frozen=True, slots=True)
class TargetIndex:
    """One vector index that the candidate will have."""

    method: str
    #: Schema-qualified operator class.
    opclass: str
    parameters: tuple[tuple[str, str], ...]
    #: Its name while its generation is not live.
    name: str
    #: The name it has while its generation is live.
    live_name: str
    predicate: str | None = None
    #: What is indexed in place of the bare column, which stands in it as `{column}`.
    expression: str | None = None
    #: Whether it serves rows outside the filter, whose vectors stay what they are.
    outside: bool = False
    #: The clause that puts it where the live one lies; empty: where the database's relations do.
    placed: str = ""
    #: (number, target) of its columns that have a statistics target of their own.
    statistics: tuple[tuple[int, int], ...] = ()

    def key(self, column: str) -> str:
        """What is indexed and searched by, as SQL; `column`: the quoted name."""
        return f"({self.expression.replace('{column}', column)})" if self.expression else column

    @property
    def key_type(self) -> str | None:
        """The type that the column is cast to; None: it is indexed as it is."""
        return self.expression.rpartition("::")[2] if self.expression else None

    def describe(self) -> str:
        """In words: `hnsw (m=16, ef_construction=64)`."""
        parameters = ", ".join(f"{name}={value}" for name, value in self.parameters) or "default parameters"
        return f"{self.method} ({parameters})" + (f" WHERE {self.predicate}" if self.predicate else "")


@dataclass(frozen=True, slots=True)
class LiveIndex:
    """One vector index of the generation that was live when the plan was made."""

    oid: int
    #: The user's name for it, and its name while its generation is not live.
    live_name: str
    name: str
    #: How it was built, so that `restore` can build it so again; empty in plans of older programs.
    method: str = ""
    parameters: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ExposedView:
    """A generation's view, in a schema of its own, as the ledger and the catalog have it."""

    number: int
    schema_oid: int
    #: The schema's name when it was made, which the trigger knows it by, and now; None: it is gone.
    made_as: str
    schema: str | None
    view_oid: int
    #: The view's name now; None: it is gone.
    view: str | None
    #: The migration that was open when it was made; None: none was, and it outlives an abort.
    migration: int | None


@dataclass(frozen=True, slots=True)
class Generation:
    """One vector column and the model that fills it."""

    number: int
    model: Identity
    #: Its column's name while it is not live.
    column: str
    #: Name of the index that finds its pending rows.
    pending_index: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The frozen plan that the phases read; JSON in the ledger."""

    table_oid: int
    schema: str
    table: str
    #: Key columns; empty: none.
    key: tuple[str, ...]
    #: The text expression as the user gave it and as PostgreSQL stores it (NULL for rows outside the filter), and the
    #: columns it reads with their types.
    text: str
    text_sql: str
    text_columns: tuple[tuple[str, str], ...]
    #: The vector column's name while live, its type name and the schema of that type.
    column: str
    column_type: str
    vector_schema: str
    old: Generation
    new: Generation
    indexes: tuple[TargetIndex, ...]
    live_indexes: tuple[LiveIndex, ...]
    #: Whether the live column was NOT NULL, and that constraint's name (PostgreSQL 18).
    not_null: bool
    not_null_name: str | None
    #: Name of the trigger; `~` sorts after every ASCII letter, so that it runs last.
    trigger: str
    #: Name of the trigger function, in schema revector.
    function: str
    #: Name of the backup table; None: none wanted.
    backup: str | None
    consents: Consents
    #: The condition that rows are chosen by, as the user gave it and as PostgreSQL stores it; None: every row.
    filter: str | None = None
    filter_sql: str | None = None
    #: Whether the column's type declares a dimension.
    declared: bool = True
    precision: str = "fp32"
    #: Whether the table is partitioned, and the columns that decide where a row belongs.
    partitioned: bool = False
    partition_key: tuple[str, ...] = ()
    #: (OID, constraint) of the partitions whose NOT NULL has a name of its own (PostgreSQL 18).
    strict_parts: tuple[tuple[int, str], ...] = ()
    #: The comment on the NOT NULL constraint.
    not_null_comment: str | None = None
    verify_threshold: float = VERIFY_THRESHOLD
    #: The backup table that `restore` takes vectors from; None: an upgrade.
    source: Source | None = None
    #: The old generation's view schema, where it was exposed before the plan was made, maybe under another table name.
    old_views: str | None = None
    #: What else goes with the vector column's name.
    carried: Carried = NOTHING_CARRIED
    format: int = FORMAT

    @property
    def argument(self) -> str:
        """The table as a command takes it: with its schema outside `public`, quoted for the shell where needed."""
        return shlex.quote(self.table if self.schema == "public" else f"{self.schema}.{self.table}")

    def view_schema(self, generation: Generation) -> str:
        """The schema of that generation's view, whether it is there or not: by it the trigger knows a writer's side."""
        if generation.number == self.old.number and self.old_views:
            return self.old_views
        return own_name(self.schema, self.table, generation.number)

    @property
    def text_function(self) -> str:
        """Name of the function that computes the text of a row, in schema revector."""
        return own_name(self.schema, self.table, self.new.number, "_text")

    @property
    def index_names(self) -> frozenset[str]:
        """Every name that an index of this migration's has at any stage."""
        sides = ((self.old, True), (self.old, False), (self.new, True), (self.new, False))
        names = {name for generation, live in sides for name in self.index_names_of(generation, live=live)}
        return frozenset(names | {self.old.pending_index, self.new.pending_index})

    @property
    def carried_names(self) -> frozenset[str]:
        """Every name that an index or CHECK of this migration's has at any stage."""
        checks = {
            name for g in (self.old, self.new) for live in (True, False) for name in self.check_names_of(g, live=live)
        }
        return self.index_names | checks

    def index_names_of(self, generation: Generation, *, live: bool) -> list[str]:
        """The names of a generation's indexes while it is live, or while it is not: the vector indexes first."""
        indexes = self.indexes if generation.number == self.new.number else self.live_indexes
        if live:
            return [index.live_name for index in indexes] + [twin.live_name for twin in self.carried.twins]
        own = (
            own_name(self.schema, self.table, generation.number, suffix) for suffix in self.twin_suffixes(generation)
        )
        return [index.name for index in indexes] + list(own)

    def twin_suffixes(self, generation: Generation) -> list[str]:
        """What the names of a generation's secondary indexes end with while it is not live."""
        first = len(self.indexes if generation.number == self.new.number else self.live_indexes) + 1
        return [f"_{first + n}" for n in range(len(self.carried.twins))]

    def check_names_of(self, generation: Generation, *, live: bool) -> list[str]:
        """The names of a generation's CHECKs while it is live, or while it is not."""
        if live:
            return [check.name for check in self.carried.checks]
        numbers = range(1, len(self.carried.checks) + 1)
        return [own_name(self.schema, self.table, generation.number, f"_check_{n}") for n in numbers]

    def generation(self, number: int) -> Generation:
        """The old or the new generation, by its number."""
        return self.old if number == self.old.number else self.new

    @property
    def inside(self) -> str:
        """The condition, as SQL, that a row belongs to the migration."""
        return self.filter_sql or "true"

    @property
    def copies_outside(self) -> bool:
        """Whether rows outside the filter keep one vector in both generations; one column type takes both models."""
        return self.filter_sql is not None and self.confusable

    @property
    def confusable(self) -> bool:
        """Whether one column takes both models' vectors, so that a wrong one is no error."""
        return self.old.model.dimension == self.new.model.dimension or not self.declared

    @property
    def filter_function(self) -> str:
        """Name of the function that says whether a row is inside, in schema revector."""
        return own_name(self.schema, self.table, self.new.number, "_where")

    @property
    def functions(self) -> tuple[str, ...]:
        """Every function that expand makes, in schema revector."""
        made = (self.function, self.text_function)
        return (*made, self.filter_function) if self.copies_outside else made

    def vector_sql_type(self, generation: Generation) -> str:
        """The type of that generation's vectors, such as `public.vector(768)`."""
        return f'"{self.vector_schema}".{self.column_type}({generation.model.dimension})'

    def column_sql_type(self, generation: Generation) -> str:
        """The type of that generation's column: that of its vectors, without the dimension where none was declared."""
        return self.vector_sql_type(generation) if self.declared else f'"{self.vector_schema}".{self.column_type}'

    def fingerprint(self) -> str:
        """Hash of what must not change while the migration is open."""
        told = {
            "table": self.table_oid,
            "key": self.key,
            "text": self.text_sql,
            "filter": self.filter,
            "column": [self.column, self.column_type],
            "models": [self.old.model.to_json(), self.new.model.to_json()],
            "precision": self.precision,
            "indexes": [(i.method, i.opclass, i.parameters, i.predicate, i.expression) for i in self.indexes],
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, for the ledger."""
        told = asdict(self)
        for side in ("old", "new"):
            told[side]["model"] = getattr(self, side).model.to_json()
        return told

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Plan:
        """The plan that the ledger holds; `Refused` when a newer program wrote it."""
        if told["format"] > FORMAT:
            raise Refused(
                f"the plan in the ledger has format {told['format']}; this program knows {FORMAT}",
                hint="use the revector version that opened the migration, or a newer one",
            )

        def generation(g: Mapping[str, Any]) -> Generation:
            return Generation(g["number"], Identity.from_json(g["model"]), g["column"], g["pending_index"])

        def pairs(value: Any) -> tuple[tuple[str, str], ...]:
            return tuple((str(a), str(b)) for a, b in value)

        def numbers(value: Any) -> tuple[tuple[int, int], ...]:
            return tuple((int(a), int(b)) for a, b in value)

        def source(value: Mapping[str, Any] | None) -> Source | None:
            return None if value is None else Source(**{**value, "key": tuple(value["key"])})

        return cls(
            **{
                **told,
                "key": tuple(told["key"]),
                "text_columns": pairs(told["text_columns"]),
                "old": generation(told["old"]),
                "new": generation(told["new"]),
                "indexes": tuple(
                    TargetIndex(
                        **{**i, "parameters": pairs(i["parameters"]), "statistics": numbers(i.get("statistics", ()))}
                    )
                    for i in told["indexes"]
                ),
                "live_indexes": tuple(
                    LiveIndex(**{**i, "parameters": pairs(i.get("parameters", ()))}) for i in told["live_indexes"]
                ),
                "consents": Consents(**told["consents"]),
                "source": source(told.get("source")),
                "carried": carried_from_json(told.get("carried")),
                "partition_key": tuple(told.get("partition_key", ())),
                "strict_parts": tuple((int(oid), str(name)) for oid, name in told.get("strict_parts", ())),
            }
        )


@dataclass(frozen=True, slots=True)
class Counts:
    """One pass over the table."""

    rows: int
    null_texts: int
    blank_texts: int
    null_vectors: int
    texts_without_vector: int
    text_bytes: int
    #: (column, rows whose text is NULL because this column is).
    null_parts: tuple[tuple[str, int], ...] = ()
    #: Rows outside the filter, and those of them that have a vector; the figures above are of the rows inside.
    outside: int = 0
    outside_vectors: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """What a sample of the real rows showed."""

    texts: int
    #: Documents a second of the new model on this machine; None: not measured (no rows).
    rate: float | None
    #: Mean tokens of a text by the new model's tokenizer, and how many sampled texts exceed its window.
    tokens: float
    too_long: int
    window: int | None
    #: Cosines between the stored vectors and the old model's, for the sample; empty: no vectors.
    old_cosines: tuple[float, ...]
    #: Seconds to build the target index on 1,000 random vectors.
    index_seconds: float
    #: Whether the new model has no vector for a blank text (asked only where there are blank texts).
    refuses_blank: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was read; the plan is a pure function of it and of the request."""

    server: Server
    table: Table
    #: NULL for rows outside the filter.
    text: Text
    column: Column
    old: Identity
    new: Identity
    next_number: int
    old_number: int
    counts: Counts
    measured: Measured
    dependents: tuple[Dependent, ...]
    functions: tuple[str, ...]
    #: Objects that have a name of ours without being ours.
    taken: tuple[str, ...]
    star_statements: tuple[str, ...]
    #: What using the new model would download.
    downloads: str | None
    #: The condition that rows are chosen by; None: every row.
    where: Text | None = None
    #: What goes with the vector column's name.
    carried: Carried = NOTHING_CARRIED
    #: (index, its rows inside the filter, its rows outside), for a column that holds both.
    index_sides: tuple[tuple[str, int, int], ...] = ()
    #: (OID, constraint) of the partitions whose NOT NULL has a name of its own.
    strict_parts: tuple[tuple[int, str], ...] = ()
    #: (index, partition, options) where a partition's part of a vector index was built with other options than it.
    built_otherwise: tuple[tuple[str, str, str], ...] = ()
    #: The view schema of the present vectors, where they are exposed already.
    old_views: str | None = None
    #: Publications that send the vector column to subscribers, by a column list.
    published: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """One precondition with what was found."""

    title: str
    finding: str
    #: None: a warning, not a blocker.
    ok: bool | None = True
    why: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """The findings, and the plan if nothing blocks it."""

    findings: tuple[Finding, ...]
    plan: Plan

    @property
    def blockers(self) -> tuple[Finding, ...]:
        """The findings that refuse a run."""
        return tuple(f for f in self.findings if f.ok is False)


def cut_name(name: str, suffix: str = "") -> str:
    """`name` + `suffix` within PostgreSQL's 63 bytes: a longer name is cut and keeps a hash of the whole."""
    room = NAME_BYTES - len(suffix.encode())
    if len(name.encode()) <= room:
        return name + suffix
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name.encode()[: room - 9].decode(errors="ignore") + "_" + digest + suffix


def own_name(schema: str, table: str, generation: int, suffix: str = "") -> str:
    """The name `rv_<table>_g<n><suffix>`; tables outside `public` carry their schema."""
    return cut_name(f"rv_{table}" if schema == "public" else f"rv_{schema}__{table}", f"_g{generation}{suffix}")


def draft(request: Request, facts: Facts) -> Draft:
    """Decide: the numbered preconditions, each with its finding, and the plan."""
    plan = _plan(request, facts)
    return Draft(tuple(_findings(request, facts, plan)), plan)


def _plan(request: Request, facts: Facts) -> Plan:
    table, column = facts.table, facts.column

    def named(number: int, suffix: str = "") -> str:
        return own_name(table.schema, table.name, number, suffix)

    live = [i for i in table.indexes if i.covers_only(column) and i.valid]
    targets = _target_indexes(request, facts, live)
    return Plan(
        table_oid=table.oid,
        schema=table.schema,
        table=table.name,
        key=tuple(request.key.split(",")) if request.key else table.key,
        text=facts.text.given,
        text_sql=facts.text.canonical,
        text_columns=facts.text.columns,
        column=column.name,
        column_type=column.type_name,
        vector_schema=facts.server.vector_schema or "public",
        old=Generation(
            facts.old_number,
            facts.old,
            cut_name(column.name, f"_g{facts.old_number}"),
            named(facts.old_number, "_pending"),
        ),
        new=Generation(
            facts.next_number,
            facts.new,
            cut_name(column.name, f"_g{facts.next_number}"),
            named(facts.next_number, "_pending"),
        ),
        indexes=targets,
        live_indexes=tuple(
            LiveIndex(i.oid, i.name, named(facts.old_number, f"_{n}"), i.method, i.parameters)
            for n, i in enumerate(live, 1)
        ),
        not_null=column.not_null,
        not_null_name=column.not_null_name,
        not_null_comment=column.not_null_comment,
        trigger=cut_name("~" + named(facts.next_number)),
        function=named(facts.next_number),
        backup=cut_name(f"{table.name}_backup", f"_{facts.old.dimension}") if request.backup else None,
        consents=request.consents,
        source=request.back.source if request.back else None,
        filter=facts.where.given if facts.where else None,
        filter_sql=facts.where.canonical if facts.where else None,
        declared=column.dimension is not None,
        partitioned=table.partitions is not None,
        partition_key=table.partitions.key if table.partitions else (),
        strict_parts=facts.strict_parts,
        old_views=facts.old_views,
        carried=facts.carried,
    )


def _target_indexes(request: Request, facts: Facts, live: list[Index]) -> tuple[TargetIndex, ...]:
    """`auto`: every HNSW index as it is; IVFFlat, or none, becomes HNSW. `same` keeps IVFFlat too."""
    choice: IndexChoice = request.index or "auto"
    hnsw: tuple[tuple[str, str], ...] = (
        ("m", str(request.m or 16)),
        # pgvector asks for ef_construction >= 2 * m.
        ("ef_construction", str(request.ef_construction or max(64, 2 * (request.m or 16)))),
    )
    ivfflat: tuple[tuple[str, str], ...] = (("lists", str(request.lists or DEFAULT_LISTS)),)
    default_opclass = f'"{facts.server.vector_schema or "public"}".{facts.column.type_name}_cosine_ops'

    def given(method: str, parameters: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        """The user's own numbers win over those of the index that is rebuilt."""
        asked = {"m": request.m, "ef_construction": request.ef_construction, "lists": request.lists}
        names = ("m", "ef_construction") if method == "hnsw" else ("lists",)
        return tuple({**dict(parameters), **{n: str(asked[n]) for n in names if asked[n] is not None}}.items())

    def named(number: int) -> str:
        return own_name(facts.table.schema, facts.table.name, facts.next_number, f"_{number}")

    recorded = {was.live_name: was for was in (request.back.indexes if request.back else ()) if was.method}
    targets: list[TargetIndex] = []
    for number, index in enumerate(live, 1):
        method, parameters = index.method, given(index.method, index.parameters)
        if choice in ("hnsw", "ivfflat") and index.method != choice:
            method, parameters = choice, hnsw if choice == "hnsw" else ivfflat
        elif was := recorded.get(index.name):
            method, parameters = was.method, given(was.method, was.parameters)
        elif choice == "auto" and index.method == "ivfflat":
            method, parameters = "hnsw", hnsw
        targets.append(
            _fitting(
                TargetIndex(
                    method,
                    index.opclass,
                    parameters,
                    named(number),
                    index.name,
                    index.predicate,
                    placed=placed(index),
                    statistics=index.statistics,
                ),
                facts,
                index,
            )
        )
    if all(target.outside for target in targets):
        method = "ivfflat" if choice == "ivfflat" else "hnsw"
        name = cut_name(f"{facts.table.name}_{facts.column.name}", "_idx")
        if any(index.name == name for index in facts.table.indexes):
            name = cut_name(f"{facts.table.name}_{facts.column.name}", f"_g{facts.next_number}_idx")
        parameters = hnsw if method == "hnsw" else ivfflat
        own = TargetIndex(method, default_opclass, parameters, named(len(targets) + 1), name)
        targets.append(_fitting(own, facts, None))
    return tuple(sorted(targets, key=lambda target: target.outside))


def _fitting(target: TargetIndex, facts: Facts, live: Index | None) -> TargetIndex:
    """The index as the candidate can have it: a column without a dimension is indexed through a cast, by model."""
    if facts.column.dimension is not None:
        cast = live.cast(facts.column) if live else None
        return target if cast is None else replace(target, expression=f"({{column}})::{cast[0]}({facts.new.dimension})")
    own = f'"{facts.server.vector_schema or "public"}".{facts.column.type_name}'
    kind, dimension = (live and live.cast(facts.column)) or (own, facts.old.dimension)
    predicate, wanted = target.predicate, facts.where.canonical if facts.where is not None else None
    # With what it asks for already, the index is the chosen rows' own, and stays as its owner wrote it.
    chosen = wanted is not None and predicate is not None and conditions(wanted) <= conditions(predicate)
    # Of a predicate of its own under which no chosen row is: it would be an index that nothing could be found in.
    others = predicate is not None and not chosen
    if live is not None and any(
        name == live.name and not inside and (outside or others) for name, inside, outside in facts.index_sides
    ):
        kept = dict(live.parameters)
        return replace(
            target,
            method=live.method,
            parameters=tuple(kept.items()),
            expression=f"({{column}})::{kind}({dimension})",
            outside=True,
        )
    if wanted is not None and not chosen:
        predicate = f"{predicate} AND {wanted}" if predicate else wanted
    return replace(target, expression=f"({{column}})::{kind}({facts.new.dimension})", predicate=predicate)


def _findings(request: Request, facts: Facts, plan: Plan) -> list[Finding]:
    server, table, column, counts, measured = facts.server, facts.table, facts.column, facts.counts, facts.measured
    found: list[Finding] = [
        Finding("server", f"PostgreSQL {server.version}, pgvector {server.vector_version}"),
        _table_finding(table),
        rights_finding(server, table),
        Finding(
            "vector column", f"{table.name}.{column.name}, {column.type}" + (", NOT NULL" if column.not_null else "")
        ),
        _dimension_finding(facts, plan),
        *_filter_findings(facts, plan),
        _text_finding(table, facts.text, counts),
        _null_vector_finding(request, facts),
        _window_finding(measured, facts.new),
        _old_model_finding(facts, plan),
        _index_limit_finding(plan),
        _trigger_finding(facts, plan),
        *_dependent_findings(facts),
        *_publication_findings(facts),
    ]
    if facts.taken:
        found.append(
            Finding(
                "names",
                f"taken: {', '.join(facts.taken)}",
                False,
                "An object with a name of ours is not in our ledger: it is yours and will not be touched.",
                "rename or drop it",
            )
        )
    else:
        found.append(Finding("names", f"free: column {plan.new.column}, trigger and functions {plan.function}"))
    if plan.backup:
        found.append(
            Finding("backup", f"key {', '.join(plan.key)}; copies to {plan.backup}")
            if plan.key
            else Finding(
                "backup",
                "the table has no key",
                False,
                "A copy without a key cannot be put back.",
                "name unique columns with --key, or leave out --backup",
            )
        )
    if facts.built_otherwise:
        told = [f"{index} on {partition} ({options})" for index, partition, options in facts.built_otherwise[:3]]
        more = f", and {rest} more" if (rest := len(facts.built_otherwise) - len(told)) > 0 else ""
        found.append(
            Finding(
                "partition indexes",
                f"built with options of their own: {', '.join(told)}{more}",
                None,
                "The new index has the table's options on every partition.",
                "choose them with --m and --ef-construction, or --lists, or build these partitions' indexes again after finalize",
            )
        )
    if facts.star_statements:
        found.append(
            Finding(
                "SELECT *",
                f"{len(facts.star_statements)} recorded or prepared statement(s), such as: {facts.star_statements[0]}",
                None,
                "A prepared SELECT * fails once (0A000) when a column is added, until its connection is renewed.",
                f"list the columns, reconnect after expand, or use its view first: revector expose {plan.argument}",
            )
        )
    found.append(Finding("downloads", facts.downloads or f"nothing; {facts.new.model} is at hand"))
    return found


def _table_finding(table: Table) -> Finding:
    name = f"{table.schema}.{table.name}"
    kinds = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}
    if table.kind in kinds:
        return Finding(
            "table",
            f"{name} is {kinds[table.kind]}",
            False,
            "revector upgrades plain and partitioned tables.",
            "name the table behind it",
        )
    if table.persistence == "t":
        return Finding(
            "table", f"{name} is temporary", False, "Other sessions cannot see it.", "name a permanent table"
        )
    if table.of_type is not None:
        return Finding(
            "table",
            f"{name} is a table of type {table.of_type}",
            False,
            "Its columns are the type's: none can be added to it alone.",
            f"ALTER TABLE {table.identifier.as_string(None)} NOT OF",
        )
    if table.parent is not None:
        return Finding(
            "table",
            f"{name} is a partition of {table.parent}",
            False,
            "One column cannot have two names in one partitioned table.",
            f"name the whole table: {table.parent}",
        )
    if table.partitions is None and (table.has_children or table.is_child):
        return Finding(
            "table",
            f"{name} has inheritance parents or children",
            False,
            "A trigger does not reach inheritance children.",
            "make it a plain or a partitioned table",
        )
    told = f"{name}, key {', '.join(table.key) or 'none'}, {table.total_bytes / 2**20:,.1f} MiB"
    return _partitions_finding(name, told, table.partitions) if table.partitions else Finding("table", told)


def _partitions_finding(name: str, told: str, partitions: Partitions) -> Finding:
    foreign = [part.name for part in partitions.parts if part.kind == "f"]
    if foreign:
        return Finding(
            "table",
            f"{name} has foreign tables as partitions: {', '.join(foreign)}",
            False,
            "Neither a trigger nor an index of ours reaches a foreign table.",
            f"detach it first: ALTER TABLE {name} DETACH PARTITION {foreign[0]}",
        )
    if partitions.differing:
        column, part = partitions.differing[0]
        return Finding(
            "table",
            f"partition {part} generates {column} otherwise than {name} does",
            False,
            "One text expression would read other texts there than the application sees.",
            f"give {part}.{column} the table's generation expression",
        )
    count = len(partitions.leaves)
    told = f"{told}, {count} partition{'s' if count != 1 else ''} by {', '.join(partitions.key) or 'an expression'}"
    if count > MANY_PARTITIONS:
        return Finding(
            "table",
            told,
            None,
            "Every short lock takes all partitions at once: with many of them one attempt may not fit the pause budget.",
            "no attempt that misses the budget changes anything; detach partitions that are no longer searched",
        )
    return Finding("table", told)


def rights_finding(server: Server, table: Table) -> Finding:
    """Whether this role may do all of it; a refusal names the one GRANT that is missing first."""
    if not table.owned:
        return Finding(
            "rights",
            f"role {server.role} does not own {table.name}",
            False,
            "Adding a column needs its owner.",
            f'connect as "{table.owner}", or: GRANT "{table.owner}" TO "{server.role}"',
        )
    if not server.may_create_schema and not server.has_ledger:
        return Finding(
            "rights",
            f"role {server.role} may not create a schema in {server.database}",
            False,
            "The ledger lives in a schema of its own, revector.",
            f'GRANT CREATE ON DATABASE "{server.database}" TO "{server.role}"',
        )
    if not table.may_index:
        return Finding(
            "rights",
            f"role {server.role} may not create anything in schema {table.schema}",
            False,
            "Indexes live in the table's schema.",
            f'GRANT CREATE ON SCHEMA "{table.schema}" TO "{server.role}"',
        )
    if not server.may_use_temp:
        return Finding(
            "rights",
            f"role {server.role} may not use temporary tables",
            False,
            "Vectors are staged in one.",
            f'GRANT TEMPORARY ON DATABASE "{server.database}" TO "{server.role}"',
        )
    if table.forces_row_security and not server.bypasses_rls:
        return Finding(
            "rights",
            f"{table.name} forces row level security on its owner",
            False,
            "Hidden rows would never get a new vector.",
            f'ALTER ROLE "{server.role}" BYPASSRLS',
        )
    return Finding(
        "rights",
        f"role {server.role} owns the table"
        + ("" if server.may_be_replica else "; may not set session_replication_role"),
    )


def _dimension_finding(facts: Facts, plan: Plan) -> Finding:
    declared = facts.column.dimension
    if declared is not None and declared != facts.old.dimension:
        return Finding(
            "dimensions",
            f"{facts.old.model} gives {facts.old.dimension} dimensions, {facts.column.name} has {declared}",
            False,
            "These vectors cannot come from that model.",
            "name the model that made them with --from",
        )
    text = f"{facts.old.dimension} ({facts.old.model}) -> {facts.new.dimension} ({facts.new.model})"
    if facts.old.dimension == facts.new.dimension:
        return Finding(
            "dimensions",
            text,
            None,
            "With equal dimensions nothing stops an application that still writes or searches with the old model after"
            " cutover: results would be wrong, not an error.",
            "stop or upgrade writers of the bare table first; cutover asks for --bare-writers-stopped",
        )
    return Finding("dimensions", text)


def _filter_findings(facts: Facts, plan: Plan) -> list[Finding]:
    """What the filter takes, and what becomes of the rows that it leaves out."""
    if facts.where is None:
        return []
    counts, column = facts.counts, facts.column
    told = f"{facts.where.given}: {counts.rows:,} of {counts.rows + counts.outside:,} rows"
    if not plan.copies_outside:
        if counts.outside_vectors:
            return [
                Finding(
                    "filter",
                    f"{told}; {counts.outside_vectors:,} rows outside have a vector",
                    False,
                    f"{column.name} takes {column.dimension} dimensions only: after cutover those rows would have no"
                    " vector under that name, and vanish from search.",
                    "leave --where out, or give the other rows a table or a column of their own",
                )
            ]
        return [Finding("filter", f"{told}; the others have no vector, and get none")]
    kept = f"the others keep their vector, in both generations ({counts.outside_vectors:,} are copied)"
    found = [Finding("filter", f"{told}; {kept}")]
    both = [name for name, inside, outside in facts.index_sides if inside and outside]
    if both:
        found.append(
            Finding(
                "filter",
                f"index {', '.join(both)} serves rows inside and outside",
                None,
                "The new index holds the chosen rows only: after cutover searches among the others read every one of them.",
                f"first give them an index of their own: CREATE INDEX CONCURRENTLY ... ON {facts.table.name} ... WHERE ...",
            )
        )
    return found


def _text_finding(table: Table, text: Text, counts: Counts) -> Finding:
    told = f"{text.given}: {counts.rows:,} rows, {counts.null_texts:,} NULL, {counts.blank_texts:,} blank"
    guilty = [(name, n) for name, n in counts.null_parts if n]
    if guilty and len(text.columns) > 1:
        parts = ", ".join(f"{name} ({n:,})" for name, n in guilty)
        return Finding(
            "text",
            told,
            None,
            f"Rows have no text because one part is NULL: {parts}; they get no vector.",
            f"write coalesce({guilty[0][0]}, '') in --text to include them",
        )
    return Finding("text", told)


def _null_vector_finding(request: Request, facts: Facts) -> Finding:
    counts, column = facts.counts, facts.column
    without = counts.texts_without_vector
    if column.not_null and counts.null_texts:
        return Finding(
            "vectors",
            f"{column.name} is NOT NULL, and {counts.null_texts:,} rows have no text",
            False,
            "They would end without a vector, so NOT NULL could not be given back at finalize.",
            "give them a text (or use coalesce in --text), or drop NOT NULL from the column",
        )
    if column.not_null and facts.measured.refuses_blank:
        return Finding(
            "vectors",
            f"{column.name} is NOT NULL, {counts.blank_texts:,} texts are blank, and {facts.new.model} has no vector for them",
            False,
            "They would end without a vector, so NOT NULL could not be given back at finalize.",
            "give them a text, or drop NOT NULL from the column",
        )
    if without and not request.consents.include_null:
        return Finding(
            "vectors",
            f"{without:,} rows have a text but no vector",
            False,
            "They may be drafts, or the application's own queue: revector would give them a vector.",
            "--include-null embeds them too",
        )
    return Finding(
        "vectors",
        f"{counts.rows - counts.null_vectors:,} of {counts.rows:,} rows have one"
        + (f"; {without:,} more will get one" if without else ""),
    )


def _window_finding(measured: Measured, new: Identity) -> Finding:
    if measured.window is None:
        return Finding("length", f"mean {measured.tokens:.0f} tokens; {new.model} has no window")
    told = (
        f"mean {measured.tokens:.0f} tokens; {measured.too_long} of {measured.texts} sampled texts exceed"
        f" {new.model}'s window of {measured.window}"
    )
    if measured.too_long:
        return Finding(
            "length",
            told,
            None,
            "The model reads only the beginning of those texts.",
            "split long texts into chunks if search must find their ends",
        )
    return Finding("length", told)


def _old_model_finding(facts: Facts, plan: Plan) -> Finding:
    cosines = facts.measured.old_cosines
    if not cosines:
        return Finding("old model", "no vectors to compare yet", None if facts.counts.rows else True)
    agreeing = sum(c >= plan.verify_threshold for c in cosines)
    told = f"{agreeing} of {len(cosines)} sampled vectors are {facts.old.model}'s (cosine >= {plan.verify_threshold})"
    if agreeing < 0.5 * len(cosines):
        return Finding(
            "old model",
            told,
            False,
            f"Median cosine {sorted(cosines)[len(cosines) // 2]:.3f}: another model, prompt or text made these vectors.",
            "correct --from or --text",
        )
    if agreeing < len(cosines):
        return Finding(
            "old model",
            told,
            None,
            "The others are stale, or of another text; rollback would answer with them.",
            "cutover --refresh-old re-embeds them",
        )
    return Finding("old model", told)


def _index_limit_finding(plan: Plan) -> Finding:
    kinds = {(index.key_type or plan.column_type).rpartition(".")[2].partition("(")[0] for index in plan.indexes}
    limit, kind = min((INDEX_LIMITS[kind], kind) for kind in kinds)
    dimension = plan.new.model.dimension
    told = "; ".join(f"{i.describe()} {i.opclass.rsplit('.', 1)[-1]}" for i in plan.indexes)
    if dimension > limit:
        return Finding(
            "index",
            f"{told}: {kind} indexes take at most {limit} dimensions, {plan.new.model.model} has {dimension}",
            False,
            "Without an index every search would read the whole table.",
            "choose a model of fewer dimensions, or set EMBEDDING_DIMENSION where the model can shorten its vectors",
        )
    for index in plan.indexes:
        numbers = {
            "m": 16,
            "ef_construction": 64,
            **{name: int(value) for name, value in index.parameters if value.isdigit()},
        }
        if index.method == "hnsw" and numbers["ef_construction"] < 2 * numbers["m"]:
            return Finding(
                "index",
                f"{told}: ef_construction is below 2 * m",
                False,
                "pgvector refuses to build such an index.",
                f"--ef-construction {2 * numbers['m']}",
            )
    return Finding("index", told)


def _trigger_finding(facts: Facts, plan: Plan) -> Finding:
    # One of our name is ours, or `names` refuses it.
    others = [t for t in facts.table.triggers if t.enabled != "D" and t.name != plan.trigger]
    later = [t for t in others if t.before_row and t.name.encode() > plan.trigger.encode()]
    if later:
        return Finding(
            "triggers",
            f"{', '.join(t.name for t in later)} sort(s) after ours",
            False,
            "It could change the text after we looked.",
            f'ALTER TRIGGER "{later[0].name}" ON {later[0].partition or facts.table.name} RENAME TO ...',
        )
    fired = [t.name for t in others if t.on_any_update] + list(facts.table.update_rules)
    if fired and not facts.server.may_be_replica and not plan.consents.accept_triggers:
        return Finding(
            "triggers",
            f"writing vectors would fire {', '.join(fired)}",
            False,
            "This role may not set session_replication_role, which would keep them quiet.",
            f'GRANT SET ON PARAMETER session_replication_role TO "{facts.server.role}", or accept them with --accept-triggers',
        )
    return Finding(
        "triggers",
        f"{len(others)} of the table's own"
        + ("" if not fired or not facts.server.may_be_replica else "; ours will not fire them"),
    )


def _dependent_findings(facts: Facts) -> list[Finding]:
    found = [
        Finding(
            "dependents",
            d.description,
            False,
            f"It is tied to {facts.column.name} and would stay on the old column.",
            d.remedy,
        )
        for d in facts.dependents
    ]
    if facts.functions:
        found.append(
            Finding(
                "functions",
                f"{', '.join(facts.functions[:5])} name(s) {facts.column.name}, or every column of {facts.table.name}",
                None,
                "After cutover they see the new model's vectors under that name, and until finalize one column more.",
                "check what they do",
            )
        )
    if facts.carried.told:
        found.append(Finding("dependents", f"carried with {facts.column.name}: {', '.join(facts.carried.told)}"))
    found += [Finding("dependents", what, None, "It is not carried.", remedy) for what, remedy in facts.carried.left]
    if not found:
        found.append(Finding("dependents", f"nothing else hangs on {facts.column.name}"))
    if facts.column.number != max(c.number for c in facts.table.columns):
        found.append(
            Finding(
                "column order",
                f"after finalize {facts.column.name} is the last column",
                None,
                "SELECT * and COPY show it there, and an INSERT without a column list must give it last.",
                "name the columns in statements that rely on their order",
            )
        )
    return found


def _publication_findings(facts: Facts) -> list[Finding]:
    if not facts.published:
        return []
    return [
        Finding(
            "publications",
            f"{', '.join(facts.published)} publish(es) {facts.column.name}",
            None,
            "Its subscribers would stop at the rename, and rollback would not heal them: cutover is refused, while both"
            " versions can be served by views.",
            f"serve by views: revector expose {facts.table.name}; for cutover publish without {facts.column.name} first",
        )
    ]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the run will take; every figure follows from the sample."""

    rows: int
    tokens: int
    rate: float | None
    backfill_seconds: float | None
    index_seconds: float
    verify_seconds: float
    bytes_before: int
    bytes_added: int
    hot_share: float


def estimate(plan: Plan, facts: Facts) -> Estimate:
    """Time per phase and storage, from the measured sample."""
    rows = facts.counts.rows - facts.counts.null_texts
    dimension = plan.new.model.dimension
    width = 4 if plan.column_type == "vector" else 2
    vector = width * dimension + 8
    # HNSW: one element and one neighbour tuple a row, whole tuples on 8 kB pages (pgvector: src/hnsw.h).
    index = 0
    for target in plan.indexes:
        m = int(dict(target.parameters).get("m", 16))
        element = vector + 72 + (2 * m * 6 + 20 if target.method == "hnsw" else 0)
        index += math.ceil(rows / max(1, 8152 // element)) * 8192
    scale = (rows / 1000) * max(1.0, math.log(max(rows, 2)) / math.log(1000))
    tuple_bytes = facts.table.heap_bytes / max(facts.counts.rows + facts.counts.outside, 1)
    per_page = max(1.0, 8168 / max(tuple_bytes, 1))
    added = vector if tuple_bytes + vector < 2032 else 20
    rate = facts.measured.rate
    heap = rows * (_toasted(vector) if added < vector else vector)
    if plan.copies_outside:  # as wide as the old model's, for want of a better guess
        copy = width * plan.old.model.dimension + 8
        heap += facts.counts.outside_vectors * (_toasted(copy) if tuple_bytes + copy >= 2032 else copy)
    return Estimate(
        rows=rows,
        tokens=round(rows * facts.measured.tokens),
        rate=rate,
        backfill_seconds=rows / rate if rate else None,
        index_seconds=facts.measured.index_seconds * scale,
        verify_seconds=min(rows, 200) / rate if rate else 0.0,
        bytes_before=facts.table.total_bytes,
        bytes_added=heap + index,
        hot_share=hot_share(tuple_bytes, added, per_page),
    )


def _toasted(size: int) -> int:
    """Bytes that a value of so many bytes takes out of line: chunks of 1,996 bytes, whole values on 8 kB pages."""
    chunks = math.ceil(size / 1996)
    whole = size + 40 * chunks
    return (8192 // max(1, 8160 // whole) if whole <= 8160 else whole) + 40 * chunks


def hot_share(tuple_bytes: float, added_bytes: float, rows_per_page: float) -> float:
    """Expected share of HOT updates when written in offset order: s/(s+g) - 1/n."""
    if tuple_bytes <= 0:
        return 0.0
    return max(0.0, tuple_bytes / (tuple_bytes + added_bytes) - 1 / max(rows_per_page, 1))


def differs(plan: Plan, request: Request) -> list[str]:
    """The given options that contradict an open migration's plan; omitted ones take the plan's values."""
    said: list[tuple[str, object, object]] = [
        ("--to", request.to, plan.new.model.model),
        ("--from", request.from_, plan.old.model.model),
        ("--text", request.text, plan.text),
        ("--where", request.where, plan.filter),
        ("--vector", request.vector, plan.column),
        ("--key", request.key and tuple(request.key.split(",")), plan.key),
        ("--backup", request.backup or None, bool(plan.backup)),
    ]
    wrong = [
        f"{name} {given if not isinstance(given, tuple) else ','.join(given)}"
        for name, given, planned in said
        if given is not None and given != planned
    ]
    parameters = dict(plan.indexes[0].parameters) if plan.indexes else {}
    if request.index in ("hnsw", "ivfflat") and any(i.method != request.index for i in plan.indexes):
        wrong.append(f"--index {request.index}")
    planned, live = ({i.method for i in indexes} for indexes in (plan.indexes, plan.live_indexes))
    if request.index == "same" and "ivfflat" in live - planned:
        wrong.append("--index same")
    for name in ("m", "ef_construction", "lists"):
        given = getattr(request, name)
        if given is not None and parameters.get(name) != str(given):
            wrong.append(f"--{name.replace('_', '-')} {given}")
    return wrong


def with_consents(plan: Plan, consents: Consents) -> Plan:
    """The plan with consents added; one given stays given."""
    merged = Consents(
        plan.consents.accept_triggers or consents.accept_triggers, plan.consents.include_null or consents.include_null
    )
    return replace(plan, consents=merged)
