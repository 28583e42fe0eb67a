"""Let the other generation answer: two renames in one message. Rollback is the same code with the sides swapped.

Lock: SHARE UPDATE EXCLUSIVE first (it ends autovacuum and blocks nobody), then ACCESS EXCLUSIVE within the pause
budget. Under the lock nothing is embedded, built or scanned. A crash leaves all of it or nothing; so does any doubt.
"""

from __future__ import annotations

from psycopg import sql

from revector import trigger
from revector.db import block, raw
from revector.errors import Refused
from revector.plan import Generation, Plan
from revector.work import Outcome, Work


def run(work: Work, *, back: bool = False) -> Outcome:
    """Swap: CUT_OVER (or SERVED again, with `back`) is proven by the commit itself.

    Raises `Refused` when more rows are pending than allowed or an index is not valid, `PauseBudgetMissed` when the
    lock was not to be had; in both cases nothing has changed.
    """
    plan = work.plan
    outgoing, incoming = (plan.new, plan.old) if back else (plan.old, plan.new)
    trigger.check(work.control, plan)
    if work.column(outgoing) != plan.column or work.column(incoming) != incoming.column:
        raise Refused(
            f"{plan.table}: the columns {plan.column} and {incoming.column} are not where this migration left them",
            why="Somebody renamed or dropped one of them. Nothing was changed.",
            hint=f"revector status {plan.argument}",
        )
    columns = (plan.column, incoming.column)
    work.refuse_not_null(columns)
    incoming_names = plan.index_names_of(incoming, live=False)
    present = _present(work, incoming_names)
    if missing := sorted(set(incoming_names) - set(present)):
        raise Refused(
            f"{plan.table}: index {', '.join(missing)} of {incoming.model.model} is missing or INVALID",
            why="Searches would read the whole table. Nothing was changed.",
            hint=f"build it again on column {incoming.column} under that name, or: revector abort {plan.argument}",
        )
    renames = index_renames(plan, work.schema, outgoing, incoming)
    here = _present(work, list(renames))
    checks = [
        work.nullable(columns),
        work.none_pending(incoming, incoming.column, work.allow_pending + work.refused_rows(incoming)),
        work.indexes_valid(incoming, list(present.values())),
    ]
    statements = [
        *swap(plan, work.table, outgoing, incoming),
        *(statement for name, statement in renames.items() if name in here),
        *check_renames(plan, work.table, outgoing, incoming),
        *_move_comment(work, outgoing),
        *_move_index_comments(work, outgoing, incoming),
        *_move_check_comments(work, outgoing),
        *_move_cluster_mark(work, outgoing, incoming),
    ]
    name = "rollback" if back else "cutover"
    before, after = ("CUT_OVER", "SERVED") if back else ("SERVED", "CUT_OVER")
    pause = work.pause(name, statements, checks=checks, stages=[before], stage=after)
    figures = {
        "pause_ms": round(pause.total_ms, 1),
        "wait_ms": round(pause.wait_ms, 1),
        "hold_ms": round(pause.hold_ms, 1),
        "attempt": pause.attempt,
    }
    return Outcome(f"{incoming.model.model} answers; the pause was {pause.total_ms:.0f} ms", figures)


def names(plan: Plan, table: sql.Composable, outgoing: Generation, incoming: Generation) -> list[sql.Composable]:
    """The renames, and the trigger function for the new names."""

    def rename(column: str, name: str) -> sql.Composable:
        return block(
            "phases/cutover", "rename_column", table=table, column=sql.Identifier(column), name=sql.Identifier(name)
        )

    return [
        rename(plan.column, outgoing.column),
        rename(incoming.column, plan.column),
        trigger.served(plan, incoming, plan.column, outgoing.column),
    ]


def swap(plan: Plan, table: sql.Composable, outgoing: Generation, incoming: Generation) -> list[sql.Composable]:
    """The names, and the ledger's live generation."""
    numbers = {"live": incoming.number, "old": plan.old.number, "new": plan.new.number, "table": plan.table_oid}
    pending = {"relation": table, "incoming": sql.Identifier(plan.column), "text": raw(plan.text_sql)}
    return [
        *names(plan, table, outgoing, incoming),
        block("phases/cutover", "flip", **{k: sql.Literal(v) for k, v in numbers.items()}, **pending),
        *(
            [block("phases/cutover", "move_others", **{k: sql.Literal(v) for k, v in numbers.items()})]
            if plan.filter
            else []
        ),
    ]


def _present(work: Work, names: list[str]) -> dict[str, int]:
    """Those of the indexes that the table has, by name; REINDEX CONCURRENTLY may have given them new OIDs."""
    rows = work.control.rows(block("phases/cutover", "indexes_named"), table=work.plan.table_oid, names=names)
    return {row.name: row.oid for row in rows}


def index_renames(plan: Plan, schema: str, outgoing: Generation, incoming: Generation) -> dict[str, sql.Composable]:
    """Present name -> its rename: each outgoing index takes its own name, each incoming one its live name."""
    renames: dict[str, sql.Composable] = {}
    for generation, live in ((outgoing, True), (incoming, False)):
        now, then = plan.index_names_of(generation, live=live), plan.index_names_of(generation, live=not live)
        for name, wanted in zip(now, then, strict=True):
            parts = {"index": sql.Identifier(schema, name), "name": sql.Identifier(wanted)}
            renames[name] = block("phases/cutover", "rename_index", **parts)
    return renames


def check_renames(
    plan: Plan, table: sql.Composable, outgoing: Generation, incoming: Generation
) -> list[sql.Composable]:
    """Each CHECK's name goes over to the incoming column's."""
    return [
        block("phases/cutover", "rename_check", table=table, check=sql.Identifier(now), name=sql.Identifier(then))
        for generation, live in ((outgoing, True), (incoming, False))
        for now, then in zip(
            plan.check_names_of(generation, live=live), plan.check_names_of(generation, live=not live), strict=True
        )
    ]


def _move_index_comments(work: Work, outgoing: Generation, incoming: Generation) -> list[sql.Composable]:
    """The comment of an index stays with its name."""
    plan = work.plan
    shared = set(plan.index_names_of(incoming, live=True))
    after = dict(zip(plan.index_names_of(outgoing, live=True), plan.index_names_of(outgoing, live=False), strict=True))
    names = [name for name in after if name in shared]
    told: list[tuple[str, sql.Composable]] = []
    for row in work.control.rows(block("phases/cutover", "comments"), table=plan.table_oid, names=names):
        told += [(row.name, sql.Literal(row.comment)), (after[row.name], sql.SQL("NULL"))]
    return [
        block("phases/cutover", "comment_index", index=sql.Identifier(work.schema, name), comment=comment)
        for name, comment in told
    ]


def _move_check_comments(work: Work, outgoing: Generation) -> list[sql.Composable]:
    """The comment of a CHECK stays with its name."""
    plan = work.plan
    after = dict(zip(plan.check_names_of(outgoing, live=True), plan.check_names_of(outgoing, live=False), strict=True))
    rows = work.control.rows(block("phases/cutover", "check_comments"), table=plan.table_oid, names=list(after))
    return [
        block("phases/cutover", "comment_check", table=work.table, check=sql.Identifier(name), comment=comment)
        for row in rows
        for name, comment in ((row.name, sql.Literal(row.comment)), (after[row.name], sql.SQL("NULL")))
    ]


def _move_cluster_mark(work: Work, outgoing: Generation, incoming: Generation) -> list[sql.Composable]:
    """CLUSTER without a name goes on ordering the table by the index of the same name."""
    plan = work.plan
    names = [n for n in plan.index_names_of(outgoing, live=True) if n in plan.index_names_of(incoming, live=True)]
    return [
        block("phases/cutover", "cluster_on", table=work.table, index=sql.Identifier(row.name))
        for row in work.control.rows(block("phases/cutover", "clustered"), table=plan.table_oid, names=names)
    ]


def _move_comment(work: Work, outgoing: Generation) -> list[sql.Composable]:
    plan = work.plan
    number = work.ledger.attnum(outgoing.number)
    comment = work.control.value("SELECT col_description(%(t)s::oid, %(n)s)", t=plan.table_oid, n=number)
    if comment is None:
        return []
    words = {plan.column: sql.Literal(comment), outgoing.column: sql.SQL("NULL")}
    return [
        block(
            "phases/cutover", "comment", column=sql.SQL("{}.{}").format(work.table, sql.Identifier(name)), comment=text
        )
        for name, text in words.items()
    ]
