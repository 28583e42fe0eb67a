"""Build the candidate's vector indexes, its pending index, and fresh statistics.

Lock: SHARE UPDATE EXCLUSIVE (CONCURRENTLY): reads and writes go on. A crash leaves an INVALID index, which the next
run drops and builds again. The name is in the ledger before the index is: a leftover of ours is known as ours.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from psycopg import errors as pg
from psycopg import sql

from revector.db import block, raw, with_clause
from revector.errors import Interrupted, Refused
from revector.plan import Generation, Plan, TargetIndex
from revector.work import Outcome, Progress, Work


def run(work: Work) -> Outcome:
    """Build what is not there yet; INDEXED is proven when all of it is valid."""
    built = []
    for target, statement in zip(work.plan.indexes, statements(work.plan, work.table), strict=False):
        with work.step("index.build") as told:
            told |= {
                "index": target.name,
                "method": target.method,
                **build(work, target.name, statement, work.plan.new),
            }
            built.append(target.describe())
    with work.step("index.pending") as told:
        for generation, statement in zip(
            (work.plan.new, work.plan.old), _pending_statements(work.plan, work.table), strict=True
        ):
            told[generation.pending_index] = build(work, generation.pending_index, statement, generation)["built"]
    with work.step("index.analyze"):
        work.control.execute(block("phases/index", "analyze", table=work.table))
    with work.step("index", stage="INDEXED") as told:
        told["indexes"] = built
    return Outcome(f"{', '.join(built)} built and valid", {"indexes": built})


def statements(plan: Plan, table: sql.Composable) -> list[sql.Composable]:
    """Everything that the phase executes, the vector indexes first."""
    return [
        *(_vector_statement(plan, target, table) for target in plan.indexes),
        *_pending_statements(plan, table),
        block("phases/index", "analyze", table=table),
    ]


def _vector_statement(plan: Plan, target: TargetIndex, table: sql.Composable) -> sql.Composable:
    return block(
        "phases/index",
        "vector_index",
        name=sql.Identifier(target.name),
        table=table,
        method=sql.Identifier(target.method),
        key=raw(target.key(sql.Identifier(plan.new.column).as_string(None))),
        opclass=raw(target.opclass),
        parameters=with_clause(target.parameters),
        predicate=sql.SQL(" WHERE {}").format(raw(target.predicate)) if target.predicate else sql.SQL(""),
    )


def _pending_statements(plan: Plan, table: sql.Composable) -> list[sql.Composable]:
    """One for the candidate, and one for the live generation, whose pending rows count from SERVED on.

    Where the column was NOT NULL, rows without a text are in it too: closing must find any row without a vector.
    """
    has_text = sql.SQL("") if plan.not_null else sql.SQL(" AND ({}) IS NOT NULL").format(raw(plan.text_sql))
    return [
        block(
            "phases/index",
            "pending_index",
            name=sql.Identifier(name),
            table=table,
            column=sql.Identifier(column),
            has_text=has_text,
        )
        for name, column in ((plan.new.pending_index, plan.new.column), (plan.old.pending_index, plan.column))
    ]


def build(work: Work, name: str, statement: sql.Composable, generation: Generation) -> dict[str, object]:
    """Make one index of ours, unless it is there and valid; an INVALID one of ours is dropped first."""
    schema = work.schema
    state = work.control.row(block("phases/index", "state"), schema=schema, name=name)
    if state is not None:
        if ("index", name) not in work.ledger.owned() or state.table_oid != work.plan.table_oid:
            raise Refused(
                f"{schema}.{name} exists and is not revector's",
                why="It is not in the ledger, so it is yours and is not touched.",
                hint=f"rename or drop it, then: revector run {work.plan.argument}",
            )
        if state.valid:
            return {"built": False}
        work.note(f"index {name} was left INVALID; building it again")
        work.drop_index(name)
    work.ledger.own("index", name, 0, generation.number)
    with _watched(work):
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
def _watched(work: Work) -> Iterator[None]:
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
                row = session.row(block("phases/index", "progress"), table=work.plan.table_oid, pid=pid)
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
