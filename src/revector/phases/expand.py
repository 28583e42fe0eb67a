"""Add the candidate's column and the trigger that keeps it honest.

Lock: ACCESS EXCLUSIVE on the table for one message, within the pause budget. A crash leaves all of it or nothing.
"""

from __future__ import annotations

from psycopg import sql

from revector import trigger
from revector.db import block, raw
from revector.plan import Plan
from revector.work import Outcome, Work


def run(work: Work) -> Outcome:
    """Expand: EXPANDED is proven by the commit itself."""
    pause = work.pause(
        "expand",
        [*statements(work.plan, work.table), *work.ledger.expand_sql(work.plan)],
        stages=["PLANNED"],
        stage="EXPANDED",
    )
    return Outcome(
        f"column {work.plan.new.column} and its trigger added; writers waited {pause.total_ms:.0f} ms at most",
        {"pause_ms": round(pause.total_ms, 1)},
    )


def statements(plan: Plan, table: sql.Composable) -> list[sql.Composable]:
    """Everything that expand executes."""
    candidate = sql.Identifier(plan.new.column)
    column = block(
        "phases/expand", "add_column", table=table, candidate=candidate, type=raw(plan.column_sql_type(plan.new))
    )
    checks = [
        block(
            "phases/expand", "add_check", table=table, name=sql.Identifier(name),
            condition=raw(check.on(candidate.as_string(None))),
            held=raw("NOT VALID" if check.enforced else "NOT ENFORCED"),
        )
        for name, check in zip(plan.check_names_of(plan.new, live=False), plan.carried.checks, strict=True)
    ]  # fmt: skip
    return [column, *checks, *plan.carried.settings_on(table, plan.new.column), *trigger.create(plan, table)]
