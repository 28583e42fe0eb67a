"""The trigger that makes NULL the queue: which vectors a write leaves, and which it makes pending.

Its rules, statement by statement, stand in docs/explanation/trigger.md. The functions live in schema `revector`, are
named from the table, and use nothing that a caller's search_path could change.
"""

from __future__ import annotations

from typing import Literal

from psycopg import sql

from revector.db import Session, block, raw
from revector.errors import Refused
from revector.plan import Generation, Plan


def create(plan: Plan, table: sql.Composable) -> list[sql.Composable]:
    """The trigger and its functions as they are before SERVED; the candidate's column must exist."""
    trigger, function = sql.Identifier(plan.trigger), sql.Identifier(plan.function)
    arguments = sql.SQL(", ").join(sql.SQL("{} {}").format(sql.Identifier(n), raw(t)) for n, t in plan.text_columns)
    candidate = sql.Identifier(plan.new.column)
    outside: sql.Composable = sql.SQL("")
    if plan.copies_outside:
        live = sql.Identifier(plan.column)
        outside = block("trigger", "outside_expanded", inside=_inside(plan), live=live, candidate=candidate) + sql.SQL(
            ";"
        )
    body = block(
        "trigger",
        "body_expanded",
        text_changed=_text_changed(plan),
        candidate=candidate,
        outside=outside,
        **_movement(plan, plan.column, plan.new.column),
    )
    return [
        block(
            "trigger",
            "text_function",
            function=sql.Identifier(plan.text_function),
            arguments=arguments,
            text=raw(plan.text_sql),
        ),
        block("trigger", "grant_text_function", function=sql.Identifier(plan.text_function), types=_types(plan)),
        *_filter_function(plan, arguments),
        _function("create_function", plan, body),
        block("trigger", "create_trigger", table=table, trigger=trigger, function=function),
        block("trigger", "enable_trigger", table=table, trigger=trigger),
    ]


def served(plan: Plan, live: Generation, live_column: str, other_column: str) -> sql.Composable:
    """The trigger function from SERVED on; `live` is the generation that has the bare name.

    Replace it only under SHARE ROW EXCLUSIVE or stronger: an UPDATE under the old rule may still be in flight.
    """
    other = plan.old if live.number == plan.new.number else plan.new
    live_name, other_name = sql.Identifier(live_column), sql.Identifier(other_column)
    not_null: sql.Composable = sql.SQL("")
    if plan.not_null:
        not_null = block(
            "trigger", "not_null", live=live_name, other=other_name, column=sql.Literal(plan.column)
        ) + sql.SQL(";")
    outside: sql.Composable = sql.SQL("")
    if plan.copies_outside:
        outside = block(
            "trigger", "outside_served", inside=_inside(plan), live=live_name, other=other_name, not_null=not_null
        ) + sql.SQL(";")
    body = block(
        "trigger",
        "body_served",
        text_changed=_text_changed(plan),
        live=live_name,
        other=other_name,
        live_changed=_changed(live_name),
        other_changed=_changed(other_name),
        live_views=sql.Literal(plan.view_schema(live)),
        other_views=sql.Literal(plan.view_schema(other)),
        not_null=not_null,
        outside=outside,
        **_movement(plan, live_column, other_column),
    )
    return _function("replace_function", plan, body)


def drop(plan: Plan, table: sql.Composable) -> list[sql.Composable]:
    """Drop the trigger and its functions."""
    return [
        block("trigger", "drop_trigger", table=table, trigger=sql.Identifier(plan.trigger)),
        block("trigger", "drop_function", function=sql.Identifier(plan.function)),
        block("trigger", "drop_text_function", function=sql.Identifier(plan.text_function), types=_types(plan)),
        *(
            [
                block(
                    "trigger", "drop_filter_function", function=sql.Identifier(plan.filter_function), types=_types(plan)
                )
            ]
            if plan.copies_outside
            else []
        ),
    ]


def check(session: Session, plan: Plan) -> None:
    """Refuse to go on when the trigger is missing, silenced, or no longer the last: writes may have been missed."""
    if not plan.partitioned and session.value(block("trigger", "guarded"), table=plan.table_oid, trigger=plan.trigger):
        return
    row = session.row(block("trigger", "alive"), table=plan.table_oid, trigger=plan.trigger)
    if row is None:
        return
    table, name = sql.Identifier(row.schema, row.relation), sql.Identifier(plan.trigger)
    enable = block("trigger", "enable_trigger", table=table, trigger=name).as_string(None)
    create = block("trigger", "create_trigger", table=table, trigger=name, function=sql.Identifier(plan.function))
    if row.always is None:
        problem, repair = "is missing", f"{create.as_string(None)}; {enable};"
    elif not row.always:
        problem, repair = "is not enabled ALWAYS", f"{enable};"
    else:
        problem, repair = "is no longer the last to fire", "rename the trigger that sorts after it"
    raise Refused(
        f"{row.relation}: the trigger {plan.trigger} {problem}",
        why="Someone changed the table's triggers; edits since then may have kept vectors of their old texts.",
        hint=f"{repair}\n{_clearing(session, plan)}\nthen give the same command again",
    )


def _clearing(session: Session, plan: Plan) -> str:
    """How to make rows pending by hand: as our own write, for the trigger lets nobody else clear the other generation."""
    row = session.row(
        block("trigger", "vector_columns"), table=plan.table_oid, old=plan.old.number, new=plan.new.number
    )
    assert row is not None
    # Before SERVED the live vectors are the application's own, and nobody would fill them.
    names = [row.new_column, row.old_column] if row.stage in ("SERVED", "CUT_OVER") else [row.new_column]
    cleared = sql.SQL(", ").join(sql.SQL("{} = NULL").format(sql.Identifier(name)) for name in names if name)
    table = sql.Identifier(row.schema, row.relation)
    return (
        sql.SQL(
            "make the rows that were edited meanwhile pending (no WHERE: all of them):\n"
            "  BEGIN; SET LOCAL revector.writer = 'on'; UPDATE {} SET {} WHERE ...; COMMIT;"
        )
        .format(table, cleared)
        .as_string(None)
    )


def _types(plan: Plan) -> sql.Composable:
    return sql.SQL(", ").join(raw(t) for _, t in plan.text_columns)


def _function(name: str, plan: Plan, body: sql.Composable) -> sql.Composable:
    return block("trigger", name, function=sql.Identifier(plan.function), body=sql.Literal(body.as_string(None)))


def _filter_function(plan: Plan, arguments: sql.Composable) -> list[sql.Composable]:
    if not plan.copies_outside:
        return []
    function = sql.Identifier(plan.filter_function)
    return [
        block("trigger", "filter_function", function=function, arguments=arguments, inside=raw(plan.inside)),
        block("trigger", "grant_text_function", function=function, types=_types(plan)),
    ]


def _text_changed(plan: Plan) -> sql.Composable:
    old, new = (_of_row(plan, plan.text_function, row) for row in ("OLD", "NEW"))
    return sql.SQL("pg_catalog.record_image_ne(ROW({}), ROW({}))").format(old, new)


def _inside(plan: Plan) -> sql.Composable:
    return _of_row(plan, plan.filter_function, "NEW")


def _of_row(plan: Plan, function: str, row: Literal["OLD", "NEW"]) -> sql.Composable:
    columns = sql.SQL(", ").join(sql.SQL("{}.{}").format(sql.SQL(row), sql.Identifier(n)) for n, _ in plan.text_columns)
    return sql.SQL("revector.{} ({})").format(sql.Identifier(function), columns)


def _movement(plan: Plan, *columns: str) -> dict[str, sql.Composable]:
    """What lets a row keep its vectors when an UPDATE moves it to another partition, which is an INSERT there.

    The UPDATE leaves a mark of the row's text and vectors in its transaction; an INSERT that bears it is the same row,
    or one that is as right. Only a change of the table's key moves a row out of a partition of the table itself; what the
    levels below go by may have been attached after the plan, so there every UPDATE leaves its mark. Nothing of it is in
    the functions of a table that is not partitioned.
    """
    if not plan.partitioned:
        return {"moving": sql.SQL(""), "moved": sql.SQL("")}
    new = sql.SQL("NEW")
    vectors = [sql.SQL("NEW.{}").format(sql.Identifier(name)) for name in columns]
    mark = sql.SQL("pg_catalog.md5(ROW({})::pg_catalog.text)").format(
        sql.SQL(", ").join([_of_row(plan, plan.text_function, "NEW"), *vectors])
    )
    keys = [sql.Identifier(name) for name in plan.partition_key]
    key_changed = sql.SQL("pg_catalog.record_image_ne(ROW({}), ROW({}))").format(
        *(sql.SQL(", ").join(sql.SQL("{}.{}").format(row, k) for k in keys) for row in (sql.SQL("OLD"), new))
    )
    return {
        "moving": block(
            "trigger",
            "moving",
            mark=mark,
            key_changed=key_changed if keys else sql.SQL("true"),
            table=sql.Literal(plan.table_oid),
        )
        + sql.SQL(";"),
        "moved": block("trigger", "moved", mark=mark) + sql.SQL(";"),
    }


def _changed(column: sql.Identifier) -> sql.Composable:
    return sql.SQL("pg_catalog.record_image_ne(ROW(OLD.{0}), ROW(NEW.{0}))").format(column)
