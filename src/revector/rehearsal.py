"""Try the short steps on the real table in one transaction, and roll all of it back.

What is found so: a trigger, rule, policy, constraint or event trigger of the user's that fails with our column and our
trigger in place, and how long the short locks last on this table. Nothing is embedded, built, validated or kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import psycopg
from psycopg import sql

from revector import trigger
from revector.catalog import Table
from revector.db import Session, block, left_of, raw
from revector.errors import PauseBudgetMissed, Refused
from revector.phases import cutover, expand, serve
from revector.plan import Plan

#: Milliseconds for the whole, and for the wait until nobody uses the table.
LIMIT_MS: Final = 1000
_WAIT_MS: Final = 200
#: Milliseconds for which a client that stands still after an error may keep the transaction open.
_IDLE_MS: Final = 500
#: SQLSTATEs that say that a limit was met: lock, statement, transaction, idle.
_LIMITS: Final = ("55P03", "57014", "25P04", "25P03")
#: SQLSTATE of our own notices.
_PART: Final = "RV003"
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
    #: (verb, error) of those that fail on this table as it is; they were not rehearsed.
    failing: tuple[tuple[str, str], ...] = ()


def rehearse(session: Session, plan: Plan, table: Table, *, limit_ms: int = LIMIT_MS) -> Rehearsed:
    """Run the short DDL of every stage and an INSERT, UPDATE and SELECT in between, within `limit_ms` in all.

    All of it, BEGIN to ROLLBACK, is one message: the server keeps the limit, however slow or dead this client is.
    Raises `Refused` naming the part that failed, `PauseBudgetMissed` when the limit was too short.
    """
    name = table.identifier
    writes, failing = _control(session, plan, _writes(session, plan, table), limit_ms)
    statements = [*_begin(session, limit_ms), _says("lock"), block("rehearsal", "hold", table=name)]

    def part(told: str, run: list[sql.Composable]) -> None:
        statements.append(_says(told))
        statements.extend(part for statement in run for part in (left_of(limit_ms), statement))

    part("expand", [block("rehearsal", "schema"), *expand.statements(plan, name)])
    for stage, run in (
        ("expand", []),
        ("served", serve.statements(plan, name)),
        ("cutover", cutover.names(plan, name, plan.old, plan.new)),
        ("rollback", cutover.names(plan, name, plan.new, plan.old)),
    ):
        if run:
            part(stage, run)
        for verb, statement in writes:
            # While the candidate, which is empty here, has the bare name, the copied row would have no vector.
            if (stage, verb) != ("cutover", "INSERT"):
                part(f"{stage}: {verb}", _undone(statement))
    drop = block("phases/finalize", "drop_column", table=name, column=sql.Identifier(plan.new.column))
    part("finalize", [*trigger.drop(plan, name), drop])
    parts = _sent(session, plan, [*statements, _says("end"), sql.SQL("ROLLBACK")], limit_ms)
    return Rehearsed(tuple(parts), sum(ms for told, ms in parts if told != "lock"), bool(writes or failing), failing)


def _control(
    session: Session, plan: Plan, writes: list[tuple[str, sql.Composable]], limit_ms: int
) -> tuple[list[tuple[str, sql.Composable]], tuple[tuple[str, str], ...]]:
    """The writes on the table as it is: those that go well, and (verb, error) of those that fail without us too."""
    well: list[tuple[str, sql.Composable]] = []
    failing: list[tuple[str, str]] = []
    for verb, statement in writes:
        try:
            with session.rolled_back():
                session.message([*_begin(session, limit_ms), *_undone(statement), sql.SQL("ROLLBACK")])
            well.append((verb, statement))
        except psycopg.Error as error:
            if session.connection.closed or error.sqlstate in _LIMITS:
                raise _too_long(plan, limit_ms, [(verb, float(limit_ms))]) from error
            failing.append((verb, error.diag.message_primary or str(error)))
    return well, tuple(failing)


def _sent(session: Session, plan: Plan, statements: list[sql.Composable], limit_ms: int) -> list[tuple[str, float]]:
    """Send the message; the parts and their milliseconds, by the server's clock."""
    seen: list[tuple[str, float]] = []

    def heard(notice: psycopg.errors.Diagnostic) -> None:
        if notice.sqlstate == _PART and notice.message_primary:
            told, at = notice.message_primary.rsplit(" ", 1)
            seen.append((told, float(at)))

    session.connection.add_notice_handler(heard)
    try:
        with session.rolled_back():
            session.message(statements)
    except psycopg.Error as error:
        if error.sqlstate in _LIMITS:
            raise _too_long(plan, limit_ms, _lasted(seen)) from error
        if error.sqlstate is None or not seen:
            raise
        raise Refused(
            f"rehearsal: {seen[-1][0]} fails: {error.diag.message_primary}",
            why=f"{error.diag.context or 'The server refused it.'} Everything was rolled back.",
            hint=f"mend what the message names, then: revector plan {plan.argument} --to {plan.new.model.model} --rehearse",
        ) from error
    finally:
        session.connection.remove_notice_handler(heard)
    return _lasted(seen)


def _begin(session: Session, limit_ms: int) -> list[sql.Composable]:
    """A transaction whose limits the server keeps, also after an error, and when this client stands still."""
    limits = {
        "lock_timeout": f"{_WAIT_MS}ms",
        "statement_timeout": f"{limit_ms}ms",
        "idle_in_transaction_session_timeout": f"{_IDLE_MS}ms",
        "client_min_messages": "notice",
    }
    if session.connection.info.server_version >= 170000:
        limits["transaction_timeout"] = f"{limit_ms + 100}ms"
    return [
        sql.SQL("BEGIN"),
        *(sql.SQL("SET LOCAL {} = {}").format(sql.Identifier(k), sql.Literal(v)) for k, v in limits.items()),
    ]


def _says(part: str) -> sql.Composable:
    """Which part comes now: an error does not tell, and what came before it is lost."""
    body = sql.SQL("BEGIN RAISE NOTICE USING ERRCODE = {}, MESSAGE = {} || extract(epoch FROM clock_timestamp()); END")
    return sql.SQL("DO {}").format(
        sql.Literal(body.format(sql.Literal(_PART), sql.Literal(f"{part} ")).as_string(None))
    )


def _lasted(seen: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Milliseconds of each part, from its beginning to the next one's; the last one's end is not known."""
    return [(told, (after - at) * 1000) for (told, at), (_, after) in pairwise(seen)]


def _undone(statement: sql.Composable) -> list[sql.Composable]:
    """One statement of an application's, undone at once, so that the next one meets the row as it was."""
    return [
        sql.SQL("SAVEPOINT tried"),
        statement,
        sql.SQL("SET CONSTRAINTS ALL IMMEDIATE"),
        sql.SQL("ROLLBACK TO tried"),
    ]


def _writes(session: Session, plan: Plan, table: Table) -> list[tuple[str, sql.Composable]]:
    """(verb, statement) of what an application does with one row; none where the table has no such row."""
    column = sql.Identifier(plan.column)
    row = session.row(block("rehearsal", "row", table=table.identifier, text=raw(plan.text_sql), column=column))
    if row is None:
        return []
    columns = sql.SQL(", ").join(sql.Identifier(c.name) for c in table.columns if not c.generated)
    # In a partitioned table a place alone does not name one row, but any row of that place will do.
    parts = {"table": table.identifier, "columns": columns, "tid": sql.Literal(row.tid)}
    told: list[tuple[str, sql.Composable]] = [("INSERT", block("rehearsal", "insert", **parts))]
    texts = {name for name, _ in plan.text_columns}
    part = next((c.name for c in table.columns if c.name in texts and c.type_name in _TEXTS and not c.generated), None)
    if part is not None:
        told.append(("UPDATE", block("rehearsal", "update", **parts, part=sql.Identifier(part))))
    search = block("rehearsal", "select", column=column, schema=sql.Identifier(plan.vector_schema), **parts)
    return [*told, ("SELECT", search)]


def _too_long(plan: Plan, limit_ms: int, parts: list[tuple[str, float]]) -> PauseBudgetMissed:
    slowest = max(parts, key=lambda part: part[1], default=("lock", 0.0))
    return PauseBudgetMissed(
        f"the rehearsal did not fit in {limit_ms} ms; longest: {slowest[0]}, {slowest[1]:.0f} ms",
        why="Everything was rolled back. Somebody may have held the table.",
        hint=f"again at a quieter moment: revector plan {plan.argument} --to {plan.new.model.model} --rehearse",
    )
