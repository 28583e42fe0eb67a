"""Try the short steps on the real table in one transaction, and roll all of it back.

What is found so: a trigger, rule, policy, constraint or event trigger of the user's that fails with our column and our
trigger in place, and how long the short locks last on this table. Nothing is embedded, built, validated or kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import psycopg
from psycopg import errors as pg
from psycopg import sql

from revector import trigger
from revector.catalog import Table
from revector.db import Session, block, raw
from revector.errors import PauseBudgetMissed, Refused
from revector.phases import cutover, expand, serve
from revector.plan import Plan

#: Milliseconds for the whole, and for the wait until nobody uses the table.
LIMIT_MS: Final = 1000
_WAIT_MS: Final = 200
#: Types that an edit of one letter makes no difference to.
_TEXTS: Final = ("text", "varchar", "bpchar")


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """How long each part took; everything was rolled back."""

    #: (part, milliseconds) in the order of execution.
    parts: tuple[tuple[str, float], ...]
    #: Milliseconds for which the table was held.
    total_ms: float
    #: Whether there was a row with a text and a vector to try INSERT, UPDATE and SELECT on.
    tried: bool


def rehearse(session: Session, plan: Plan, table: Table, *, limit_ms: int = LIMIT_MS) -> Rehearsed:
    """Run the short DDL of every stage and an INSERT, UPDATE and SELECT in between, within `limit_ms` in all.

    Raises `Refused` naming the part that failed, `PauseBudgetMissed` when the limit was too short. In every case, also
    when this process is killed, the server rolls back.
    """
    name = table.identifier
    parts: list[tuple[str, float]] = []
    deadline = time.monotonic() + limit_ms / 1000

    def did(part: str, run: Callable[[], Any]) -> Any:
        """One part, within what is left of the limit."""
        left = int((deadline - time.monotonic()) * 1000)
        if left < 1:
            raise _too_long(plan, limit_ms, parts)
        began = time.monotonic()
        try:
            session.execute("SELECT set_config('statement_timeout', %(ms)s, true)", ms=f"{left}ms")
            value = run()
        except (pg.QueryCanceled, pg.LockNotAvailable) as error:
            raise _too_long(plan, limit_ms, [*parts, (part, (time.monotonic() - began) * 1000)]) from error
        except psycopg.Error as error:
            raise Refused(
                f"rehearsal: {part} fails: {error.diag.message_primary}",
                why=f"{error.diag.context or 'The server refused it.'} Everything was rolled back.",
                hint="mend what the message names, then: "
                f"revector plan {plan.argument} --to {plan.new.model.model} --rehearse",
            ) from error
        parts.append((part, (time.monotonic() - began) * 1000))
        return value

    def all_of(statements: list[sql.Composable]) -> Callable[[], Any]:
        return lambda: [session.execute(statement) for statement in statements]

    with session.connection.transaction(force_rollback=True):
        session.execute("SELECT set_config('lock_timeout', %(ms)s, true)", ms=f"{_WAIT_MS}ms")
        did("lock", lambda: session.execute(block("rehearsal", "hold", table=name)))
        began = time.monotonic()
        did("expand", all_of([block("rehearsal", "schema"), *expand.statements(plan, name)]))
        writes = _writes(session, plan, table)
        for stage, statements in (
            ("expand", []),
            ("served", serve.statements(plan, name)),
            ("cutover", cutover.names(plan, name, plan.old, plan.new)),
            ("rollback", cutover.names(plan, name, plan.new, plan.old)),
        ):
            if statements:
                did(stage, all_of(statements))
            for verb, statement, values in writes:
                # While the candidate, which is empty here, has the bare name, the copied row would have no vector.
                if (stage, verb) != ("cutover", "INSERT"):
                    did(f"{stage}: {verb}", partial(_tried, session, statement, values))
        candidate = sql.Identifier(plan.new.column)
        drop = block("phases/finalize", "drop_column", table=name, column=candidate)
        did("finalize", all_of([*trigger.drop(plan, name), drop]))
        held = (time.monotonic() - began) * 1000
    return Rehearsed(tuple(parts), held, bool(writes))


def _tried(session: Session, statement: sql.Composable, values: dict[str, Any]) -> None:
    """One statement of an application's, undone at once, so that the next one meets the row as it was."""
    with session.connection.transaction(force_rollback=True):
        session.execute(statement, **values)


def _writes(session: Session, plan: Plan, table: Table) -> list[tuple[str, sql.Composable, dict[str, Any]]]:
    """(verb, statement, values) of what an application does with one row; none where the table has no such row."""
    column = sql.Identifier(plan.column)
    row = session.row(block("rehearsal", "row", table=table.identifier, text=raw(plan.text_sql), column=column))
    if row is None:
        return []
    columns = sql.SQL(", ").join(sql.Identifier(c.name) for c in table.columns if not c.generated)
    parts = {"table": table.identifier, "columns": columns}
    # In a partitioned table a place alone does not name one row, but any row of that place will do.
    told: list[tuple[str, sql.Composable, dict[str, Any]]] = [
        ("INSERT", block("rehearsal", "insert", **parts), {"tid": row.tid})
    ]
    texts = {name for name, _ in plan.text_columns}
    part = next((c.name for c in table.columns if c.name in texts and c.type_name in _TEXTS and not c.generated), None)
    if part is not None:
        update = block("rehearsal", "update", table=table.identifier, part=sql.Identifier(part))
        told.append(("UPDATE", update, {"tid": row.tid}))
    search = block("rehearsal", "select", column=column, schema=sql.Identifier(plan.vector_schema), **parts)
    return [*told, ("SELECT", search, {})]


def _too_long(plan: Plan, limit_ms: int, parts: list[tuple[str, float]]) -> PauseBudgetMissed:
    slowest = max(parts, key=lambda part: part[1], default=("lock", 0.0))
    return PauseBudgetMissed(
        f"the rehearsal did not fit in {limit_ms} ms; longest: {slowest[0]}, {slowest[1]:.0f} ms",
        why="Everything was rolled back. Somebody may have held the table.",
        hint=f"again at a quieter moment: revector plan {plan.argument} --to {plan.new.model.model} --rehearse",
    )
