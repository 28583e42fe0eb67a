"""Copy key, text checksum and old vector to a table of their own, before anything is changed.

Lock: ACCESS SHARE. One REPEATABLE READ transaction reads both the copy's rows and the checksum they are verified by,
so writers cannot come between. Nobody but the owner may read the copy. A crash leaves an incomplete copy that the
ledger knows as ours; it is made anew.
"""

from __future__ import annotations

from psycopg import sql

from revector.db import block, raw
from revector.errors import GateFailed, Refused
from revector.plan import Plan
from revector.work import Outcome, Work


def run(work: Work, *, complete: bool) -> Outcome:
    """Make and verify the copy unless `complete` says that an earlier run did; refuse a name that is not ours."""
    plan = work.plan
    assert plan.backup is not None
    state = work.control.row(block("phases/backup", "state"), schema=plan.schema, name=plan.backup)
    ours = work.ledger.owned().get(("backup", plan.backup))
    if state is not None and state.oid != ours:
        raise Refused(
            f"{plan.schema}.{plan.backup} exists and is not this migration's backup",
            why="It may be the only copy of something; it is not touched.",
            hint=f"rename it: ALTER TABLE {plan.backup} RENAME TO ...",
        )
    if state is not None and complete:
        return Outcome(f"{plan.backup} is complete", {"bytes": state.bytes})
    parts = _parts(plan, work.table)
    with work.step("backup.create") as told, work.control.transaction():
        work.control.execute(block("phases/backup", "drop", backup=parts["backup"]))
        work.control.execute(block("phases/backup", "create", **parts))
        work.control.execute(_protect(parts))
        comment = sql.Literal(
            f"revector: vectors of {plan.old.model.model} before the upgrade to {plan.new.model.model}"
        )
        work.control.execute(block("phases/backup", "own", backup=parts["backup"], comment=comment))
        row = work.control.row(block("phases/backup", "state"), schema=plan.schema, name=plan.backup)
        assert row is not None
        work.ledger.own("backup", plan.backup, row.oid)
        told["table"] = plan.backup
    with work.step("backup.copy") as told, work.control.transaction():
        work.control.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        told["rows"] = work.control.execute(block("phases/backup", "copy", **parts))
        source = work.control.row(block("phases/backup", "checksum", **parts))
    with work.step("backup.verify") as told:
        copied = work.control.row(block("phases/backup", "backup_checksum", **parts))
        assert source is not None and copied is not None
        if tuple(source) != tuple(copied):
            raise GateFailed(
                f"the backup {plan.backup} does not equal its source: {copied.rows} rows of {source.rows}",
                hint=f"revector run {plan.argument}",
            )
        told |= {"rows": copied.rows, "checksum": copied.checksum}
    return Outcome(f"{copied.rows:,} vectors copied to {plan.backup} and verified", {"rows": copied.rows})


def statements(plan: Plan, table: sql.Composable) -> list[sql.Composable]:
    """Everything that backup executes."""
    parts = _parts(plan, table)
    return [block("phases/backup", "create", **parts), _protect(parts), block("phases/backup", "copy", **parts)]


def drop(work: Work) -> bool:
    """Drop the copy if it is this migration's own."""
    plan = work.plan
    if plan.backup is None:
        return False
    state = work.control.row(block("phases/backup", "state"), schema=plan.schema, name=plan.backup)
    if state is None or state.oid != work.ledger.owned().get(("backup", plan.backup)):
        return False
    work.control.execute(block("phases/backup", "drop", backup=sql.Identifier(plan.schema, plan.backup)))
    return True


def _protect(parts: dict[str, sql.Composable]) -> sql.Composable:
    """Close the new copy, in the transaction that makes it: nobody has read it before."""
    names = {name: sql.Literal(parts[name].as_string(None)) for name in ("backup", "table")}
    return sql.SQL("DO {}").format(sql.Literal(block("phases/backup", "protect", **names).as_string(None)))


def _parts(plan: Plan, table: sql.Composable) -> dict[str, sql.Composable]:
    key = sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(name)) for name in plan.key)
    backup = sql.Identifier(plan.schema, plan.backup or "")
    return {
        "table": table,
        "backup": backup,
        "key": key,
        "text": raw(plan.text_sql),
        "column": sql.Identifier(plan.column),
    }
