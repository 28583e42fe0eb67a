"""Build the candidate's vector indexes, its pending index, and fresh statistics.

Lock: SHARE UPDATE EXCLUSIVE (CONCURRENTLY): reads and writes go on. A crash leaves an INVALID index, which the next
run drops and builds again. The name is in the ledger before the index is: a leftover of ours is known as ours.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from psycopg import errors as pg
from psycopg import sql

from revector.carried import Twin
from revector.db import Session, block, raw, with_clause
from revector.errors import Interrupted, Refused
from revector.partitions import Leaf, Part, below, index_parts
from revector.plan import Generation, Plan, TargetIndex, own_name
from revector.work import Outcome, Progress, Work


class _Make(Protocol):
    """What renders the statement of one index on one relation; `root`: on a partitioned one, alone."""

    def __call__(self, table: sql.Composable, name: str, *, root: bool = False) -> sql.Composable: ...


def run(work: Work) -> Outcome:
    """Build what is not there yet; INDEXED is proven when all of it is valid."""
    plan, built = work.plan, []
    for number, target in enumerate(plan.indexes, 1):
        with work.step("index.build") as told:
            told |= {
                "index": target.name,
                "method": target.method,
                **_everywhere(work, target.name, f"_{number}", plan.new, partial(_vector_statement, plan, target)),
            }
            for statement in _statistics(work.schema, target.name, target):
                work.control.execute(statement)
            built.append(target.describe())
    names = plan.index_names_of(plan.new, live=False)[len(plan.indexes) :]
    for name, suffix, twin in zip(names, plan.twin_suffixes(plan.new), plan.carried.twins, strict=True):
        with work.step("index.build") as told:
            make = partial(_twin_statement, plan, twin)
            told |= {"index": name, "as": twin.live_name, **_everywhere(work, name, suffix, plan.new, make)}
            for statement in _statistics(work.schema, name, twin):
                work.control.execute(statement)
            built.append(f"{twin.live_name} again")
    _validate_checks(work)
    with work.step("index.pending") as told:
        for generation in (plan.new, plan.old):
            name = generation.pending_index
            make = partial(_pending_statement, plan, generation)
            told[name] = _everywhere(work, name, "_pending", generation, make)["built"]
    with work.step("index.analyze"):
        work.control.execute(block("phases/index", "analyze", table=work.table))
    with work.step("index", stage="INDEXED") as told:
        told["indexes"] = built
    return Outcome(f"{', '.join(built)} built and valid", {"indexes": built})


def statements(plan: Plan, table: sql.Composable, parts: Sequence[Part] = ()) -> list[sql.Composable]:
    """Everything that the phase executes, the vector indexes first; `parts`: what is below a partitioned table."""
    indexes: list[tuple[str, str, Generation, _Make]] = [
        *((t.name, f"_{n}", plan.new, partial(_vector_statement, plan, t)) for n, t in enumerate(plan.indexes, 1)),
        *(
            (name, suffix, plan.new, partial(_twin_statement, plan, twin))
            for name, suffix, twin in zip(
                plan.index_names_of(plan.new, live=False)[len(plan.indexes) :],
                plan.twin_suffixes(plan.new),
                plan.carried.twins,
                strict=True,
            )
        ),
        *((g.pending_index, "_pending", g, partial(_pending_statement, plan, g)) for g in (plan.new, plan.old)),
    ]
    twins = plan.index_names_of(plan.new, live=False)[len(plan.indexes) :]
    kept: dict[str, TargetIndex | Twin] = {
        **{target.name: target for target in plan.indexes},
        **dict(zip(twins, plan.carried.twins, strict=True)),
    }
    told: list[sql.Composable] = []
    for name, suffix, generation, make in indexes:
        told.append(make(table, name, root=plan.partitioned))
        names = {plan.table_oid: sql.Identifier(plan.schema, name)}
        for part in parts:
            own = own_name(part.schema, part.name, generation.number, suffix)
            names[part.oid] = sql.Identifier(part.schema, own)
            told.append(make(part.identifier, own, root=part.kind == "p"))
            told.append(block("phases/index", "attach", index=names[part.parent], part=names[part.oid]))
        told += _statistics(plan.schema, name, kept.get(name))
    return [*told, block("phases/index", "analyze", table=table)]


def _statistics(schema: str, name: str, like: TargetIndex | Twin | None) -> list[sql.Composable]:
    return [
        block(
            "phases/index", "statistics",
            index=sql.Identifier(schema, name), number=sql.Literal(number), target=sql.Literal(target),
        )
        for number, target in (like.statistics if like else ())
    ]  # fmt: skip


def _vector_statement(
    plan: Plan, target: TargetIndex, table: sql.Composable, name: str, *, root: bool = False
) -> sql.Composable:
    return block(
        "phases/index",
        "vector_root" if root else "vector_index",
        name=sql.Identifier(name),
        table=table,
        method=sql.Identifier(target.method),
        key=raw(target.key(sql.Identifier(plan.new.column).as_string(None))),
        opclass=raw(target.opclass),
        parameters=with_clause(target.parameters),
        placed=raw(target.placed),
        predicate=sql.SQL(" WHERE {}").format(raw(target.predicate)) if target.predicate else sql.SQL(""),
    )


def _twin_statement(plan: Plan, twin: Twin, table: sql.Composable, name: str, *, root: bool = False) -> sql.Composable:
    return block(
        "phases/index",
        "twin_root" if root else "twin_index",
        name=sql.Identifier(name),
        table=table,
        using=raw(twin.on(sql.Identifier(plan.new.column).as_string(None))),
    )


def _validate_checks(work: Work) -> None:
    """The candidate's CHECKs are known to hold where the live column's are."""
    plan = work.plan
    for name, check in zip(plan.check_names_of(plan.new, live=False), plan.carried.checks, strict=True):
        if check.valid:
            work.control.execute(block("phases/index", "validate", table=work.table, name=sql.Identifier(name)))


def _pending_statement(
    plan: Plan, generation: Generation, table: sql.Composable, name: str, *, root: bool = False
) -> sql.Composable:
    """The candidate has one, and so has the live generation, whose pending rows count from SERVED on.

    Where the column was NOT NULL, rows without a text are in it too: closing must find any row without a vector.
    """
    column = plan.new.column if generation.number == plan.new.number else plan.column
    parts = {"column": sql.Identifier(column), "has_text": _has_text(plan)}
    return block(
        "phases/index", "pending_root" if root else "pending_index", name=sql.Identifier(name), table=table, **parts
    )


def _has_text(plan: Plan) -> sql.Composable:
    return sql.SQL("") if plan.not_null else sql.SQL(" AND ({}) IS NOT NULL").format(raw(plan.text_sql))


def pending_trouble(session: Session, plan: Plan, generation: Generation) -> str:
    """What is wrong with a generation's pending index; empty: it is there and valid."""
    # By its name, for REINDEX CONCURRENTLY leaves another OID.
    valid = session.value(block("phases/verify", "index"), table=plan.table_oid, name=generation.pending_index)
    return "" if valid else f"the index {generation.pending_index} is {'missing' if valid is None else 'INVALID'}"


def pending_repair(
    plan: Plan, generation: Generation, table: sql.Composable, schema: str, column: str, *, there: bool
) -> str:
    """The statements that bring a lost or INVALID pending index back, by the names of now."""
    name = generation.pending_index
    parts = {"name": sql.Identifier(name), "column": sql.Identifier(column), "has_text": _has_text(plan)}
    statements = [block("phases/index", "pending_whole" if plan.partitioned else "pending_index", table=table, **parts)]
    if there:
        where = sql.Identifier(schema, name)
        statements.insert(
            0,
            block("phases/index", "drop_whole", name=where)
            if plan.partitioned
            else block("work", "drop_index", name=where),
        )
    return "\n".join(f"{statement.as_string(None)};" for statement in statements)


def _everywhere(work: Work, name: str, suffix: str, generation: Generation, make: _Make) -> dict[str, object]:
    """One index of the whole table: of a partitioned one, the table's own first, then each partition's, attached.

    Once the table's own is there, the server makes its part on any partition that is created or attached later.
    """
    plan, table = work.plan, work.table
    if not plan.partitioned:
        return build(work, Leaf(plan.table_oid, work.schema, plan.table), name, make(table, name), generation)
    schema, built = work.schema, 0
    state = _state(work, schema, name, plan.table_oid)
    if state is None:
        _briefly(work, table, [make(table, name, root=True)], schema, name, generation)
        state = _state(work, schema, name, plan.table_oid)
    assert state is not None
    # A partition may be created while others are built, and may be dropped: the tree is read again before each.
    while (part := _without(work, state.oid)) is not None:
        try:
            built += _add_part(work, state.oid, part, suffix, generation, make)
        except pg.UndefinedTable:
            if any(other.oid == part.oid for other in below(work.control, plan.table_oid)):
                raise
    state = _state(work, schema, name, plan.table_oid)
    if state is None or not state.valid:
        raise Refused(f"index {name} is not valid after it was built", hint=f"revector run {plan.argument}")
    return {"built": built > 0, "parts": built}


def _add_part(work: Work, index: int, part: Part, suffix: str, generation: Generation, make: _Make) -> bool:
    """Build the part of an index that one partition lacks, and attach it; says whether it had to be built."""
    name, built = own_name(part.schema, part.name, generation.number, suffix), False
    statements: list[sql.Composable] = []
    if part.kind == "r":
        built = bool(build(work, part, name, make(part.identifier, name), generation)["built"])
    elif _state(work, part.schema, name, part.oid) is None:
        statements.append(make(part.identifier, name, root=True))
    above = index_parts(work.control, index)[part.parent]
    statements.append(block("phases/index", "attach", index=above.identifier, part=sql.Identifier(part.schema, name)))
    _briefly(work, part.identifier, statements, part.schema, name, generation)
    return built


def _without(work: Work, index: int) -> Part | None:
    """The first partition that has no part of this index yet, parents first."""
    work.check_stop()
    present = index_parts(work.control, index)
    return next((part for part in below(work.control, work.plan.table_oid) if part.oid not in present), None)


def _briefly(
    work: Work,
    relation: sql.Composable,
    statements: list[sql.Composable],
    schema: str,
    name: str,
    generation: Generation,
) -> None:
    """Make or attach one index while nobody uses that one relation, within the pause budget."""
    work.ledger.own("index", name, 0, generation.number)
    work.database.pause(
        work.control,
        relation,
        statements,
        settle=True,
        alone=True,
        budget_ms=work.limits.budget_ms,
        attempts=work.limits.attempts,
        observe=work.note,
    )
    state = work.control.row(block("phases/index", "state"), schema=schema, name=name)
    work.ledger.own("index", name, state.oid if state else 0, generation.number)


def _state(work: Work, schema: str, name: str, relation: int) -> Any | None:
    """The index of this name, if there is one; refused when it is not ours or on another relation."""
    state = work.control.row(block("phases/index", "state"), schema=schema, name=name)
    if state is not None and (("index", name) not in work.ledger.owned() or state.table_oid != relation):
        raise Refused(
            f"{schema}.{name} exists and is not revector's",
            why="It is not in the ledger, so it is yours and is not touched.",
            hint=f"rename or drop it, then: revector run {work.plan.argument}",
        )
    return state


def build(
    work: Work, relation: Leaf | Part, name: str, statement: sql.Composable, generation: Generation
) -> dict[str, object]:
    """Make one index of ours, unless it is there and valid; an INVALID one of ours is dropped first."""
    schema = relation.schema
    state = _state(work, schema, name, relation.oid)
    if state is not None:
        if state.valid:
            return {"built": False}
        work.note(f"index {name} was left INVALID; building it again")
        work.drop_index(name, schema)
    work.ledger.own("index", name, 0, generation.number)
    with _watched(work, relation.oid):
        # lock_timeout = 0: CONCURRENTLY waits for old transactions, and blocks nobody while it waits.
        work.control.execute("SET lock_timeout = 0")
        try:
            work.control.execute(statement)
        except pg.QueryCanceled:
            if work.stop():
                raise Interrupted(why=f"Index {name} is left unfinished; the next run builds it again.") from None
            raise
        finally:
            if not work.control.connection.closed:
                work.control.execute("SET lock_timeout = '5s'")
    state = work.control.row(block("phases/index", "state"), schema=schema, name=name)
    if state is None or not state.valid:
        raise Refused(f"index {name} is not valid after it was built", hint=f"revector run {work.plan.argument}")
    work.ledger.own("index", name, state.oid, generation.number)
    return {"built": True, "statements": [statement.as_string(None)]}


@contextmanager
def _watched(work: Work, relation: int) -> Iterator[None]:
    """Tell how far CREATE INDEX is, and cancel it when the user asks to stop."""
    done = threading.Event()
    pid = work.control.connection.info.backend_pid

    def watch() -> None:
        with work.database.connect("progress") as session:
            told = 0
            while not done.wait(0.5):
                if work.stop():
                    session.execute("SELECT pg_cancel_backend(%(pid)s)", pid=pid)
                    return
                row = session.row(block("phases/index", "progress"), table=relation, pid=pid)
                if row is None:
                    continue
                if row.waiting and row.locker and row.locker != told:
                    told = row.locker
                    work.note(f"waiting for session {row.locker} to end its transaction; nobody waits for us")
                if row.total:
                    work.observe(Progress(f"index: {row.phase}", row.done, row.total, row.unit))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
