"""From here on both generations are kept fresh, so that either can answer: what makes rollback lossless.

Lock: ACCESS EXCLUSIVE for one message, which relaxes NOT NULL and replaces the trigger function. A crash leaves all
of it or nothing. It comes before any switch, and changes nothing for readers.
"""

from __future__ import annotations

from psycopg import sql

from revector import trigger
from revector.db import block
from revector.partitions import below, strict
from revector.plan import Plan
from revector.work import Outcome, Work


def run(work: Work) -> Outcome:
    """Guard both generations: SERVED is proven by the commit itself.

    Raises `Refused` where somebody has made a vector column NOT NULL since the plan.
    """
    plan = work.plan
    columns = (plan.column, plan.new.column)
    # What the plan has found is relaxed here; what somebody has added since is theirs to take back.
    work.refuse_not_null(columns[1:] if plan.not_null else columns)
    relaxed = [*statements(plan, work.table), *_own(work)]
    pause = work.pause("serve", [*relaxed, work.nullable(columns)], stages=["VERIFIED"], stage="SERVED")
    return Outcome(
        f"both generations are guarded; writers waited {pause.total_ms:.0f} ms at most",
        {"pause_ms": round(pause.total_ms, 1)},
    )


def statements(plan: Plan, table: sql.Composable) -> list[sql.Composable]:
    """Everything that serve executes."""
    relaxed = (
        [block("phases/serve", "drop_not_null", table=table, column=sql.Identifier(plan.column))]
        if plan.not_null
        else []
    )
    return [*relaxed, trigger.served(plan, plan.old, plan.column, plan.new.column)]


def _own(work: Work) -> list[sql.Composable]:
    """The same for the partitions whose NOT NULL is their own: the table's does not reach it."""
    plan = work.plan
    if not (plan.partitioned and plan.not_null):
        return []
    found = dict(strict(work.control, plan.table_oid, plan.column))
    return [
        block("phases/serve", "drop_not_null", table=part.identifier, column=sql.Identifier(plan.column))
        for part in below(work.control, plan.table_oid)
        if part.oid in found
    ]
