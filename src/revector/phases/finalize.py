"""Keep one generation, drop the other. Abort is the same code with the sides swapped.

Lock: ACCESS EXCLUSIVE for two short messages within the pause budget, SHARE UPDATE EXCLUSIVE in between. The message
that drops the trigger also commits `closing`: from then on nothing but this command can go on, for writes are no
longer guarded. The view of the side that goes is dropped by the same message: a write through it would set a text and
leave the vector that stays as it was. A crash leaves a prefix of the steps; each looks first at what is already done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal

import psycopg
from psycopg import sql

from revector import trigger
from revector.catalog import read_table
from revector.db import PENDING, block, raw
from revector.errors import Busy, GateFailed, NotReady
from revector.partitions import below, index_parts
from revector.plan import Generation, Plan, cut_name, own_name
from revector.work import Outcome, Work

Command = Literal["finalize", "abort"]

#: Attempts to find a moment in which nothing is pending.
_ATTEMPTS: Final = 30


def run(
    work: Work,
    command: Command,
    stage: str,
    closing: str | None,
    view: sql.Identifier | None,
    retire: Callable[[int], list[sql.Composable]],
    drop_views: Callable[[], None],
    before_last: Callable[[], None],
) -> Outcome:
    """Close the migration from `stage`; FINALIZED or ABORTED is proven by the last step.

    `view` is that of the generation that goes. `retire` gives the ledger statements that mark a generation as gone;
    `drop_views` is done before its column goes (the other side's view, the schemas), `before_last` before the last step.
    """
    plan = work.plan
    keep, drop = (plan.new, plan.old) if command == "finalize" else (plan.old, plan.new)
    guarded = stage in ("SERVED", "CUT_OVER")
    if closing is None:
        if guarded and plan.not_null:
            _refuse_without_vector(work, keep, command)
        _close(work, command, stage, keep, view, guarded)
    # A worker or follower that is writing right now ends its transaction first and sees `closing` in its next.
    if not work.control.wait_lock("windows", plan.table_oid, seconds=60):
        raise Busy(f"a worker still writes to {plan.table}", hint=f"stop it, then: revector {command} {plan.argument}")
    drop_views()
    if guarded and plan.not_null:
        _validate(work, command)
    doomed = (keep.pending_index, drop.pending_index, *_vector_indexes(plan, drop))
    with work.step(f"{command}.drop_indexes"):
        if plan.partitioned:
            _drop_from_partitions(work, command, stage, keep, drop, doomed)
        else:
            for name in doomed:
                work.drop_index(name)
            for name in _replaced(work, drop):
                work.drop_index(name, theirs=True)
    column = work.column(drop)
    if column is not None:
        statements = [block("phases/finalize", "drop_column", table=work.table, column=sql.Identifier(column))]
        work.pause(f"{command}.drop_column", statements, stages=[stage], closing=command, was_closing=command)
    before_last()
    with work.step(command, stage="FINALIZED" if command == "finalize" else "ABORTED"):
        for statement in retire(drop.number):
            work.control.execute(statement)
    work.control.unlock("windows", plan.table_oid)
    return Outcome(f"{keep.model.model} answers; the vectors of {drop.model.model} are gone")


def statements(plan: Plan, table: sql.Composable, server_version: int) -> list[sql.Composable]:
    """Everything that finalize executes, as the plan shows it."""
    column = sql.Identifier(plan.column)
    name = sql.Identifier(_constraint(plan))
    add = "not_null_named" if server_version >= 180000 else "not_null_check"
    back = [
        block("phases/finalize", add, table=table, name=name, column=column),
        *_not_null_comment(plan, table),
        block("phases/finalize", "validate", table=table, name=name),
    ]
    doomed = (plan.new.pending_index, plan.old.pending_index)
    return [
        *trigger.drop(plan, table),
        *(back if plan.not_null else []),
        *(
            block("phases/finalize", "drop_index_of_all", name=sql.Identifier(plan.schema, name))
            if plan.partitioned
            else block("work", "drop_index", name=sql.Identifier(plan.schema, name))
            for name in doomed
        ),
        block("phases/finalize", "drop_column", table=table, column=sql.Identifier(plan.old.column)),
    ]


def _close(
    work: Work, command: Command, stage: str, keep: Generation, view: sql.Identifier | None, guarded: bool
) -> None:
    plan, table = work.plan, work.table
    column = work.column(keep)
    statements = trigger.drop(plan, table) if stage != "PLANNED" else []
    views = [view] if view is not None else []
    statements = [*(block("phases/finalize", "drop_view", view=view) for view in views), *statements]
    checks: list[sql.Composable] = []
    if guarded and column:
        refused = 0 if plan.not_null else work.refused_rows(keep)
        checks.append(work.none_pending(keep, column, refused, also_without_text=plan.not_null))
        if plan.not_null:
            add = "not_null_named" if work.control.connection.info.server_version >= 180000 else "not_null_check"
            statements += _strict(work, column)
            statements.append(
                block(
                    "phases/finalize",
                    add,
                    table=table,
                    name=sql.Identifier(_constraint(plan)),
                    column=sql.Identifier(column),
                )
            )
            statements += _not_null_comment(plan, table)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            work.pause(f"{command}.close", statements, checks=checks, stages=[stage], closing=command, views=views)
            return
        except psycopg.Error as error:
            # Writers who give no vectors keep rows pending; between two of them there is a moment without any.
            if error.sqlstate != PENDING:
                raise
            if attempt == _ATTEMPTS:
                model = keep.model.model
                raise NotReady(
                    f"{plan.table}: {_ATTEMPTS} attempts found rows without a vector of {model} each time",
                    why="Somebody writes texts without their vectors as fast as they are filled, or has such a row locked."
                    " With the trigger gone those rows would keep none. Nothing was changed.",
                    hint=f"stop those writers for a moment, or let them give the vectors of {model}; then:"
                    f" revector {command} {plan.argument}",
                ) from error
            work.check_stop()
            if plan.not_null:
                _refuse_without_vector(work, keep, command)
            work.catch_up([keep.number])


def _not_null_comment(plan: Plan, table: sql.Composable) -> list[sql.Composable]:
    if plan.not_null_comment is None:
        return []
    name, comment = sql.Identifier(_constraint(plan)), sql.Literal(plan.not_null_comment)
    return [block("phases/finalize", "comment_not_null", table=table, name=name, comment=comment)]


def _strict(work: Work, column: str) -> list[sql.Composable]:
    """NOT NULL under its own name, for the partitions that had it so; the table's is merged into it."""
    names = dict(work.plan.strict_parts)
    return [
        block(
            "phases/finalize",
            "not_null_named",
            table=part.identifier,
            name=sql.Identifier(names[part.oid]),
            column=sql.Identifier(column),
        )
        for part in (below(work.control, work.plan.table_oid) if names else ())
        if part.oid in names
    ]


def _constraint(plan: Plan) -> str:
    return plan.not_null_name or own_name(plan.schema, plan.table, plan.new.number, "_not_null")


def _validate(work: Work, command: Command) -> None:
    """NOT NULL is proven for the rows that were there before; before PostgreSQL 18 a CHECK proves it."""
    plan, name = work.plan, sql.Identifier(_constraint(work.plan))
    state = work.control.row(block("phases/finalize", "constraint_state"), table=plan.table_oid, name=_constraint(plan))
    with work.step(f"{command}.validate"):
        if state is not None and not state.valid:
            work.control.execute(block("phases/finalize", "validate", table=work.table, name=name))
        if state is not None and work.control.connection.info.server_version < 180000:
            column = sql.Identifier(plan.column)
            work.pause(
                f"{command}.validate",
                [
                    block("phases/finalize", "set_not_null", table=work.table, column=column),
                    block("phases/finalize", "drop_check", table=work.table, name=name),
                ],
                stages=["SERVED", "CUT_OVER"],
                closing=command,
                was_closing=command,
            )


def _refuse_without_vector(work: Work, keep: Generation, command: Command) -> None:
    """NOT NULL must be given back: every row needs a vector, also one whose text is NULL or refused."""
    column = work.column(keep)
    assert column is not None
    statement = block(
        "phases/finalize",
        "without_vector",
        table=work.table,
        column=sql.Identifier(column),
        text=raw(work.plan.text_sql),
    )
    count = work.control.value(statement, migration=work.ledger.migration, generation=keep.number)
    if count:
        raise GateFailed(
            f"{count} rows of {work.plan.table} have no vector of {keep.model.model}, and {work.plan.column} was NOT NULL",
            why="Their text is NULL, or refused by the model. Nothing was changed.",
            hint=f"give them a text or delete them (SELECT ... WHERE {column} IS NULL),"
            f" then: revector {command} {work.plan.argument}",
        )


def _drop_from_partitions(
    work: Work, command: Command, stage: str, keep: Generation, drop: Generation, doomed: Sequence[str]
) -> None:
    """CONCURRENTLY is not to be had for the index of a partitioned table: all of them go in one short message."""
    plan, owned = work.plan, work.ledger.owned()
    found = work.control.rows(block("phases/finalize", "indexes_of"), table=plan.table_oid, names=list(doomed))
    present = {row.name: row.oid for row in found}
    for number, (kept, dropped) in enumerate(
        zip(plan.index_names_of(keep, live=True), _matching(plan, drop, keep), strict=True), 1
    ):
        if command == "finalize":
            _hand_over_names(work, kept, present.get(dropped or ""), keep, drop, f"_{number}")
    ours = [name for name in doomed if name in present and ("index", name) in owned]
    statements = [
        block("phases/finalize", "drop_index_of_all", name=sql.Identifier(work.schema, name)) for name in ours
    ]
    if statements:
        work.pause(f"{command}.drop_indexes", statements, stages=[stage], closing=command, was_closing=command)
    # What is left of ours hangs on a partition that was never attached to, or was detached from, the table's index.
    tables = [part.oid for part in below(work.control, plan.table_oid)]
    for name, oid in [(name, oid) for (kind, name), oid in owned.items() if kind == "index"]:
        left = work.control.row(block("phases/finalize", "standing_alone"), name=name, index=oid, tables=tables)
        if left is not None:
            work.drop_index(left.name, left.schema)
        elif name in ours:
            work.ledger.disown("index", name)


def _matching(plan: Plan, drop: Generation, keep: Generation) -> list[str | None]:
    """For each index that stays, the one that it replaces, if there was one."""
    dropped = dict(zip(plan.index_names_of(drop, live=True), _vector_indexes(plan, drop), strict=True))
    return [dropped.get(name) for name in plan.index_names_of(keep, live=True)]


def _hand_over_names(
    work: Work, kept: str, dropped: int | None, keep: Generation, drop: Generation, suffix: str
) -> None:
    """Let each partition's new index take the name of the one that goes; nothing but the two names is locked."""
    plan = work.plan
    root = work.control.value(block("phases/finalize", "index_named"), schema=work.schema, name=kept)
    if root is None:
        return
    outgoing = index_parts(work.control, dropped) if dropped is not None else {}
    parts = {part.oid: part for part in below(work.control, plan.table_oid)}
    for relation, index in index_parts(work.control, root).items():
        part = parts.get(relation)
        if part is None or index.name != own_name(part.schema, part.name, keep.number, suffix):
            continue
        old = outgoing.get(relation)
        renames = [(index, old.name if old else cut_name(f"{part.name}_{plan.column}", "_idx"))]
        if old is not None:
            renames.insert(0, (old, own_name(part.schema, part.name, drop.number, suffix)))
        with work.control.transaction():
            for this, name in renames:
                work.control.execute(
                    block("phases/finalize", "rename_index", index=this.identifier, name=sql.Identifier(name))
                )


def _replaced(work: Work, drop: Generation) -> list[str]:
    """The user's vector indexes that the plan replaced, as far as they are of the departing column and nothing else.

    They would go with the column; so they go as ours do, and the last short lock has nothing but a column to drop.
    """
    column = work.column(drop)
    if column is None:
        return []
    table, names = read_table(work.control, work.plan.table_oid), _vector_indexes(work.plan, drop)
    departing = table.column(column)
    return [index.name for index in table.indexes if index.name in names and index.covers_only(departing)]


def _vector_indexes(plan: Plan, generation: Generation) -> list[str]:
    return plan.index_names_of(generation, live=False)
