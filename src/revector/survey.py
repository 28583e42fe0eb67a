"""Collect the facts that a plan is made of: catalog, counts, samples, measured speeds. Changes nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from psycopg import sql

from revector.carried import Carried, read_carried, set_in_parts
from revector.catalog import (
    Column,
    Server,
    Table,
    Text,
    dependents,
    find_table,
    functions_naming,
    publishing,
    read_filter,
    read_server,
    read_table,
    read_text,
    sample_clause,
)
from revector.db import Session, block, raw, with_clause
from revector.embed import Embedder, Identity, known_models
from revector.errors import ModelUnavailable, Refused, UsageError
from revector.ledger import Ledger, MigrationRow, exists, require
from revector.partitions import built_otherwise, strict
from revector.plan import (
    DEFAULT_BATCH,
    VERIFY_THRESHOLD,
    Counts,
    Facts,
    Measured,
    Plan,
    Request,
    TargetIndex,
    draft,
    rights_finding,
)
from revector.settings import Settings
from revector.work import embedder_for

#: Texts of the real rows that the new model's speed is measured on, within so many seconds.
_SAMPLE: Final = 64
_SECONDS: Final = 10.0
#: Stored vectors that are compared with what the old model gives.
_COMPARED: Final = 24
_INDEX_ROWS: Final = 1000
_OLDEST_VECTOR: Final = (0, 5)


def survey(
    session: Session, name: str, request: Request, settings: Settings, *, note: Callable[[str], None] = lambda _: None
) -> Facts:
    """Everything that the plan needs to know.

    Raises `UsageError` for names and models that do not exist, `Refused` where there is no usable pgvector.
    """
    server = read_server(session)
    table = read_table(session, find_table(session, name))
    check_vector(server)
    if table.parent is not None:
        # Said first: what is missing for a partition would not be missing for the whole.
        raise Refused(
            f"{table.name} is a partition of {table.parent}",
            why="One column cannot have two names in one partitioned table. Nothing was changed.",
            hint=f"name the whole table: {table.parent}",
        )
    # What the survey itself needs is asked first; the others are in the list of preconditions.
    if not (table.owned and server.may_use_temp and table.may_index) or _hidden(server, table):
        raise _missing_right(server, table)
    column = table.vector_column(request.vector or _vector_column(table))
    known = exists(session)
    if known:
        require(session)
    ledger = Ledger(session, table.oid)
    lives = ledger.lives(column.name) if known else []
    live = next((g for g in lives if g.filter == request.where), None)
    where = read_filter(session, table, request.where) if request.where else None
    text = read_text(session, table, request.text or (live.text if live else "content")).within(where)
    if column.name in dict(text.columns):
        raise UsageError(
            f"--text or --where reads {column.name}, the vector column itself",
            why="Its name changes hands at cutover.",
            hint="choose rows and texts by other columns",
        )
    if request.key:
        for part in request.key.split(","):
            table.column(part)
        if frozenset(request.key.split(",")) not in table.unique:
            raise UsageError(
                f"--key {request.key} is not unique in {table.name}",
                why="A key must name exactly one row, by a unique index.",
                hint=f"leave --key out{'' if not table.key else ': the primary key is ' + ','.join(table.key)}",
            )
    if live is not None and request.from_ in (None, live.model.model):
        old = embedder_for(live.model, settings)
        note(f"loading {old.spec}")
        old.check_identity(live.model)
        old_identity = live.model
    else:
        if request.from_ is None:
            raise _no_from(table, column, [g.filter for g in lives if g.filter])
        old = Embedder(request.from_, settings=settings)
        note(f"loading {old.spec}")
        old_identity = old.identity()
    new, new_identity, downloads = _new_model(request, settings, note)
    if new_identity.model == old_identity.model:
        raise UsageError(
            f"{new_identity.model} answers already", hint=f"name another model: revector plan {name} --to MODEL"
        )
    counts = _counts(session, table, text, where, column)
    opened = ledger.latest() if known else None
    ours = ledger.owned() if opened and not opened.stage.closed else {}
    following = ledger.next_number() if known else 2
    # Another filter's generation may be registered already: this one's live generation then takes a number of its own.
    first = following if known and live is None and ledger.registered() else 1
    numbers = (live.number if live else first, following + (first == following))
    exposed = ledger.views().get(numbers[0]) if known else None
    carried = (
        opened.plan.carried
        if opened and not opened.stage.closed
        else read_carried(session, table, column, new_identity, server.vector_schema or "public")
    )
    measured = _measure(session, table, text, column, old, new, counts, request.batch_size or 50, note)
    facts = Facts(
        server=server,
        table=table,
        text=text,
        where=where,
        column=column,
        old=old_identity,
        new=new_identity,
        old_number=numbers[0],
        next_number=numbers[1],
        counts=counts,
        measured=measured,
        dependents=(
            *dependents(session, table, column, _carried_names(table, column, carried, opened)),
            *(() if opened and not opened.stage.closed else set_in_parts(session, table, column)),
        ),
        carried=carried,
        functions=functions_naming(session, table, column),
        taken=(),
        star_statements=_star_statements(session, table),
        index_sides=_index_sides(session, table, column, where),
        downloads=downloads,
        strict_parts=strict(session, table.oid, column.name) if table.partitions and column.not_null else (),
        built_otherwise=_built_otherwise(session, table, column),
        old_views=exposed.made_as if exposed else None,
        published=publishing(session, table, column),
    )
    preliminary = draft(request, facts)
    # An index that cannot be built is a blocker of the plan, not an error of timing it.
    buildable = not any(finding.title == "index" for finding in preliminary.blockers)
    return _with(facts, session, preliminary.plan, set(ours), buildable=buildable)


def _built_otherwise(session: Session, table: Table, column: Column) -> tuple[tuple[str, str, str], ...]:
    if not table.partitions:
        return ()
    return tuple(
        (index.name, partition, options)
        for index in table.indexes
        if index.covers_only(column)
        for partition, options in built_otherwise(session, index.oid)
    )


def identify(
    session: Session,
    table: Table,
    settings: Settings,
    *,
    from_: str | None,
    text: str | None,
    vector: str | None,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[Identity, Text, Column]:
    """The model of the present vectors of a table that revector does not know yet: named by the user, then compared.

    Raises `UsageError` where no model is named or its dimension is another, `Refused` where the vectors are not its.
    """
    server = read_server(session)
    check_vector(server)
    if table.owned and _hidden(server, table):
        raise _missing_right(server, table)
    column = table.vector_column(vector or _vector_column(table))
    if from_ is None:
        raise _no_from(table, column, [])
    said = read_text(session, table, text or "content")
    old = Embedder(from_, settings=settings)
    note(f"loading {old.spec}")
    identity = old.identity()
    if column.dimension not in (None, identity.dimension):
        raise UsageError(
            f"{identity.model} gives {identity.dimension} dimensions, {table.name}.{column.name} has {column.dimension}",
            why="These vectors cannot come from that model.",
            hint="name the model that made them with --from",
        )
    cosines = _cosines(session, table, said, column, old, DEFAULT_BATCH, note)
    agreeing = sum(cosine >= VERIFY_THRESHOLD for cosine in cosines)
    if agreeing < 0.5 * len(cosines):
        raise Refused(
            f"{agreeing} of {len(cosines)} sampled vectors of {table.name}.{column.name} are {identity.model}'s",
            why="Another model, prompt or text made them. Nothing was changed.",
            hint="correct --from or --text",
        )
    return identity, said, column


def _hidden(server: Server, table: Table) -> bool:
    """Whether a policy may hide rows from this role: then the first look at the text fails, and says something else."""
    return table.forces_row_security and not server.bypasses_rls


def _missing_right(server: Server, table: Table) -> Refused:
    missing = rights_finding(server, table)
    return Refused(missing.finding, why=f"{missing.why} Nothing was changed.", hint=missing.remedy)


def _new_model(
    request: Request, settings: Settings, note: Callable[[str], None]
) -> tuple[Embedder | None, Identity, str | None]:
    """The model to upgrade to, its identity, and what using it would download.

    For a way back it is the one on record; where it cannot be loaded any more, the backup's vectors may still do.
    """
    if request.back is None:
        own = request.to in (None, settings.embedding_model)
        new = Embedder(
            request.to or settings.embedding_model,
            dimension=settings.embedding_dimension if own else None,
            settings=settings,
        )
        downloads = new.download_needed()
        note(f"loading {new.spec}")
        return new, new.identity(), downloads
    model = request.back.model
    try:
        new = embedder_for(model, settings)
        downloads = new.download_needed()
        note(f"loading {new.spec}")
        new.check_identity(model)
    except ModelUnavailable as error:
        note(
            f"{model.model} cannot be loaded ({error}): unchanged rows take their vectors from {request.back.source.name},"
            " and the run stops where the model is needed, at changed rows or at verify"
        )
        return None, model, None
    return new, model, downloads


def _carried_names(table: Table, column: Column, carried: Carried, opened: MigrationRow | None) -> frozenset[str]:
    """Names of the indexes and CHECKs that do not stay behind; a new plan carries every valid vector index of the column."""
    if opened is not None and not opened.stage.closed:
        return opened.plan.carried_names
    vectors = {index.name for index in table.indexes if index.covers_only(column) and index.valid}
    return frozenset(vectors | {t.live_name for t in carried.twins} | {c.name for c in carried.checks})


def check_vector(server: Server) -> None:
    """Refuse a database without a pgvector that revector can work with."""
    if server.vector_version is None:
        raise Refused(
            f"pgvector is not installed in database {server.database}",
            why="The extension named vector is missing.",
            hint="as a superuser of that database: CREATE EXTENSION vector",
        )
    if tuple(int(n) for n in re.findall(r"\d+", server.vector_version)[:2]) < _OLDEST_VECTOR:
        raise Refused(
            f"pgvector {server.vector_version} is too old: revector needs 0.5 or newer",
            why="HNSW indexes came with 0.5.",
            hint="install a newer pgvector, then: ALTER EXTENSION vector UPDATE",
        )
    if server.standby:
        raise Refused(
            f"database {server.database} is a standby",
            why="It cannot be written to.",
            hint="set DATABASE_URL to the primary",
        )


def _vector_column(table: Table) -> str:
    vectors = [c.name for c in table.columns if c.is_vector or c.domain_over]
    if "embedding" in vectors:
        return "embedding"
    if len(vectors) == 1:
        return vectors[0]
    if not vectors:
        raise UsageError(
            f"{table.name} has no vector column", why=f"Its columns: {', '.join(c.name for c in table.columns)}."
        )
    raise UsageError(
        f"{table.name} has several vector columns: {', '.join(vectors)}", hint=f"name one: --vector {vectors[0]}"
    )


def _no_from(table: Table, column: Column, filters: Sequence[str]) -> UsageError:
    if filters:
        return UsageError(
            f"which rows of {table.name}? revector knows the models of: {'; '.join(filters)}",
            hint="name one of these with --where, or the model of the rows meant: --from MODEL",
        )
    models = known_models(column.dimension) if column.dimension else []
    return UsageError(
        f"which model made {table.name}.{column.name}, {column.type.rsplit('.', 1)[-1]}? revector does not know yet",
        why=f"Models of that dimension: {', '.join(models) or 'none that is well known'}.",
        hint=f"name it: --from {models[0] if models else 'MODEL'}",
    )


def _counts(session: Session, table: Table, text: Text, where: Text | None, column: Column) -> Counts:
    if not table.readable:
        return Counts(0, 0, 0, 0, 0, 0)
    inside = raw(where.canonical if where else "true")
    parts = {
        "table": table.identifier,
        "text": raw(text.canonical),
        "column": sql.Identifier(column.name),
        "inside": inside,
    }
    row = session.row(block("catalog", "texts", **parts))
    assert row is not None
    guilty: list[tuple[str, int]] = []
    if row.null_texts and len(text.columns) > 1:
        for name, _ in text.columns:
            statement = block(
                "catalog",
                "null_parts",
                table=table.identifier,
                text=raw(text.canonical),
                column=sql.Identifier(name),
                inside=inside,
            )
            guilty.append((name, int(session.value(statement))))
    return Counts(**row._asdict(), null_parts=tuple(guilty))


def _measure(
    session: Session,
    table: Table,
    text: Text,
    column: Column,
    old: Embedder,
    new: Embedder | None,
    counts: Counts,
    batch: int,
    note: Callable[[str], None],
) -> Measured:
    texts = _sampled(session, table, "sample_texts", _SAMPLE, text=raw(text.canonical))
    window = new.max_tokens() if new else None
    rate, tokens, too_long = None, 0.0, 0
    if texts and new:
        lengths = new.count_tokens([row.text for row in texts])
        tokens = float(lengths.mean())
        too_long = int((lengths > window).sum()) if window else 0
        note(f"measuring {new.spec} on {len(texts)} of your rows")
        rate = _rate(new, [row.text for row in texts], batch)
    cosines = _cosines(session, table, text, column, old, batch, note)
    refuses = new is not None and bool(counts.blank_texts) and bool(new.encode_isolating([" "], batch_size=1)[1])
    return Measured(len(texts), rate, tokens, too_long, window, cosines, 0.0, refuses)


def _cosines(
    session: Session,
    table: Table,
    text: Text,
    column: Column,
    old: Embedder,
    batch: int,
    note: Callable[[str], None],
) -> tuple[float, ...]:
    """How near the stored vectors of some rows are to what the model gives for their texts."""
    stored = _sampled(session, table, "sample", _COMPARED, text=raw(text.canonical), column=sql.Identifier(column.name))
    if not stored or column.dimension not in (None, old.get_embedding_dimension()):
        return ()
    note(f"comparing {len(stored)} stored vectors with {old.spec}'s")
    given = np.array([[float(x) for x in row.vector.strip("[]").split(",")] for row in stored], dtype=np.float32)
    fresh, _ = old.encode_isolating([row.text for row in stored], batch_size=batch)
    norms = np.linalg.norm(given, axis=1) * np.linalg.norm(fresh, axis=1)
    same = (given * fresh).sum(axis=1) / np.where(norms > 0, norms, 1)
    return tuple(float(c) for c in np.nan_to_num(same))


def _sampled(session: Session, table: Table, name: str, limit: int, **parts: sql.Composable) -> Sequence[Any]:
    if not table.readable:
        return ()
    method, percent = sample_clause(table, limit)
    statement = block("catalog", name, table=table.identifier, method=method, **parts)
    rows = session.rows(statement, percent=percent, seed=1, limit=limit)
    return rows or session.rows(
        block("catalog", name, table=table.identifier, method=sql.SQL("BERNOULLI"), **parts),
        percent=100.0,
        seed=1,
        limit=limit,
    )


def _rate(model: Embedder, texts: list[str], batch: int) -> float:
    """Documents a second, the first call (warm-up) left out."""
    model.encode_isolating(texts[:1], batch_size=1)
    began, done = time.monotonic(), 0
    size = max(1, min(batch, len(texts)))
    while done == 0 or (
        done < 4 * len(texts) and time.monotonic() - began < min(_SECONDS, 0.5 if done >= len(texts) else _SECONDS)
    ):
        some = texts[done % len(texts) :][:size]
        model.encode_isolating(some, batch_size=batch)
        done += len(some)
    return done / max(time.monotonic() - began, 1e-9)


def _with(facts: Facts, session: Session, plan: Plan, ours: set[tuple[str, str]], *, buildable: bool) -> Facts:
    """The facts that need the plan's names: what is taken, and what one index build costs."""
    index = _time_index(session, plan, plan.indexes[0]) if buildable else 0.0
    return replace(
        facts, taken=_taken(session, facts.table, plan, ours), measured=replace(facts.measured, index_seconds=index)
    )


def _taken(session: Session, table: Table, plan: Plan, ours: set[tuple[str, str]]) -> tuple[str, ...]:
    found = [f"column {c.name}" for c in table.columns if c.name in (plan.new.column, plan.old.column)]
    found += [f"trigger {t.name}" for t in table.triggers if t.name == plan.trigger and ("trigger", t.name) not in ours]
    for name in (
        *(i.name for i in plan.indexes),
        *(i.name for i in plan.live_indexes),
        plan.new.pending_index,
        plan.old.pending_index,
    ):
        if ("index", name) not in ours and session.row(
            block("catalog", "relation_named"), schema=plan.schema, name=name
        ):
            found.append(f"relation {name}")
    known = {view.made_as for view in Ledger(session, table.oid).views().values()} if exists(session) else set()
    for name in (plan.view_schema(plan.old), plan.view_schema(plan.new)):
        # The trigger takes whoever has a schema of this name in the search_path for a client of that generation.
        if name not in known and session.row(block("catalog", "schema_named"), name=name):
            found.append(f"schema {name}")
    for name in plan.functions:
        if ("function", name) not in ours and session.row(block("catalog", "function_named"), name=name):
            found.append(f"function revector.{name}")
    if (
        plan.backup
        and ("backup", plan.backup) not in ours
        and session.row(block("catalog", "relation_named"), schema=plan.schema, name=plan.backup)
    ):
        found.append(f"relation {plan.backup}")
    return tuple(found)


def _index_sides(
    session: Session, table: Table, column: Column, where: Text | None
) -> tuple[tuple[str, int, int], ...]:
    """On which side of the filter the rows of each vector index are; asked where one column holds both sides' vectors."""
    if where is None or column.dimension is not None:
        return ()
    found = []
    for index in table.indexes:
        if index.covers_only(column):
            row = session.row(
                block(
                    "catalog",
                    "sides",
                    table=table.identifier,
                    column=sql.Identifier(column.name),
                    inside=raw(where.canonical),
                    predicate=raw(index.predicate or "true"),
                )
            )
            assert row is not None
            found.append((index.name, row.inside, row.outside))
    return tuple(found)


def _star_statements(session: Session, table: Table) -> tuple[str, ...]:
    schema = session.value(
        "SELECT nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = 'pg_stat_statements'"
    )
    if schema is None or "pg_stat_statements" not in str(session.value("SHOW shared_preload_libraries")):
        return ()
    statement = block("catalog", "star_statements", statements=sql.Identifier(schema, "pg_stat_statements"))
    pattern = (
        rf"(select|returning)\s+(\w+\.)?\*.*\m{re.escape(table.name)}\M|\m{re.escape(table.name)}\M.*returning\s+\*"
    )
    return tuple(row.query for row in session.rows(statement, pattern=pattern))


class _RolledBack(Exception):
    """Ends a transaction whose effects are not wanted."""


def _time_index(session: Session, plan: Plan, target: TargetIndex) -> float:
    """Seconds to build the target index on 1,000 random vectors, in a temporary table that is rolled back."""
    seconds = 0.0
    parts = {
        "type": raw(plan.vector_sql_type(plan.new)),
        "method": sql.Identifier(target.method),
        "opclass": raw(target.opclass),
    }
    try:
        with session.transaction():
            session.execute(block("survey", "trial_table", **parts))
            session.execute(
                block("survey", "trial_rows", **parts), rows=_INDEX_ROWS, dimension=plan.new.model.dimension
            )
            began = time.monotonic()
            trial = {"key": raw(target.key("v")), "parameters": with_clause(target.parameters)}
            session.execute(block("survey", "trial_index", **trial, **parts))
            seconds = time.monotonic() - began
            raise _RolledBack
    except _RolledBack:
        pass
    return seconds
