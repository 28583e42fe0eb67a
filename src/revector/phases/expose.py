"""One view schema per generation: a version of the application that puts it first in its search_path keeps its model.

Lock: ACCESS SHARE on the table; ACCESS EXCLUSIVE on a view of ours that is replaced or dropped, all of them and all
that follows within one pause budget. A view is bound to columns, not names, so it shows its generation through cutover
and rollback. Views, grants and ledger rows are one message: a crash leaves all of them or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from psycopg import sql

from revector.catalog import Table
from revector.db import PauseLimits, Session, block, in_attempts
from revector.errors import Refused
from revector.plan import ExposedView
from revector.work import Effect, Note, Observer, Outcome, Recorded

#: What a view cannot do, and the way round.
LIMITS: Final = (
    ("ON CONFLICT ON CONSTRAINT", "name the columns of the key: ON CONFLICT (COLUMN, ...)"),
    ("COPY of the view, in or out", "in: from a session with the plain search_path; out: COPY (SELECT ...) TO"),
    ("TRUNCATE", "the table by schema and name"),
    ("MERGE, before PostgreSQL 17", "INSERT ... ON CONFLICT (columns)"),
    ("ctid, xmin, WHERE CURRENT OF, TABLESAMPLE", "the key, or the table by schema and name"),
    ("pg_get_serial_sequence, which gives NULL", "give it the table by schema and name"),
    ("CREATE INDEX, ALTER TABLE and other DDL", "the application's own migrations keep the plain search_path"),
    ("DROP COLUMN or another type under a view", "move its users away, expose --drop, the change, expose"),
    ("columns or grants that the table gets later", "expose --refresh"),
    ("a view named with its schema", "use search_path alone: the trigger knows a writer's side by it"),
)


@dataclass(frozen=True, slots=True)
class Side:
    """A generation that is to have a view."""

    number: int
    #: The schema's name, and the model's for its comment.
    schema: str
    model: str
    #: Attribute number of its vector column.
    attnum: int


class Views(Protocol):
    """What this phase needs of the ledger; there need be no migration."""

    def views(self) -> dict[int, ExposedView]: ...  # noqa: D102
    def own_view_sql(self, number: int, schema: str, view: str, migration: int | None) -> sql.Composable: ...  # noqa: D102
    def disown_view_sql(self, number: int) -> sql.Composable: ...  # noqa: D102
    def record_sql(self, step: str, figures: dict[str, object]) -> list[sql.Composable]: ...  # noqa: D102


def run(
    session: Session,
    ledger: Views,
    table: Table,
    sides: Sequence[Side],
    column: str,
    hidden: frozenset[int],
    *,
    migration: int | None,
    refresh: bool,
    limits: PauseLimits,
    observe: Observer,
) -> Outcome:
    """Make the views that are missing; with `refresh` also make the others anew where table or grants have changed.

    `column` is the vector column's name in the views, `hidden` the attribute numbers of all managed generations.
    """
    known = ledger.views()
    made: list[str] = []
    stale: list[str] = []
    shut_out: dict[str, None] = {}
    for side in sides:
        shown = columns(table, side.attnum, column, hidden)
        present = known.get(side.number)
        fresh = present is not None and present.view == table.name and _is_fresh(session, table, present, shown)
        if present is not None and present.view is not None and not (refresh or fresh):
            stale.append(present.schema or side.schema)
        if present is not None and present.view is not None and not refresh:
            shut_out |= dict.fromkeys(_shut_out(session, table, present))
            continue
        schema = present.schema if present is not None and present.schema else side.schema
        drops, statements = _statements(session, table, side, schema, present, shown, fresh=fresh)
        figures: dict[str, object] = {"schema": schema, "generation": side.number}
        statements += [
            ledger.own_view_sql(side.number, schema, table.name, migration),
            *ledger.record_sql("expose", figures),
        ]
        views = [sql.Identifier(present.schema, present.view)] if present and present.schema and present.view else []
        observe(Effect("expose"))
        _patiently(session, drops, statements, views, table.identifier, limits, observe)
        observe(Recorded("expose", figures))
        made.append(schema)
    told = f"{', '.join(made)} made {'anew' if refresh and known else 'and granted'}" if made else "the views are there"
    if stale:
        told += f"; {', '.join(stale)}: not as the table is now (add --refresh)"
    if shut_out:
        # PostgreSQL passes over a schema without USAGE, silently: such a session gets the bare table.
        told += f"; {', '.join(shut_out)} may use the table and no view of ours: it gets the bare table (add --refresh)"
    return Outcome(told, {"made": made, "stale": stale, "shut_out": list(shut_out)})


def _shut_out(session: Session, table: Table, present: ExposedView) -> list[str]:
    """Roles that were given a right on the table since the view was granted."""
    rights = {row.role for row in session.rows(block("phases/expose", "grants"), table=table.oid)}
    return sorted(
        "PUBLIC" if role is None else role
        for role in rights
        - {row.role for row in session.rows(block("phases/expose", "granted"), view=present.view_oid)}
    )


def check(session: Session, table: Table, schemas: Sequence[str], known: dict[int, ExposedView], again: str) -> None:
    """Refuse, with every reason, where a view cannot stand in for the table."""
    row = session.row(block("phases/expose", "facts"), schemas=list(schemas))
    assert row is not None
    whole = table.identifier.as_string(session.connection)
    reasons: list[tuple[str, str, str]] = []
    if table.kind not in "rp" or table.persistence == "t" or table.parent is not None:
        kind = "a partition" if table.parent else "temporary" if table.persistence == "t" else "not a table"
        remedy = f"name the whole table: {table.parent}" if table.parent else "name a permanent table"
        reasons.append((f"{table.name} is {kind}", "A view stands in for a whole table.", remedy))
    if not table.owned:
        reasons.append(
            (
                f"role {row.role} does not own {table.name}",
                "The table's grants are copied to the views.",
                f'connect as "{table.owner}", or: GRANT "{table.owner}" TO "{row.role}"',
            )
        )
    missing = [name for name in schemas if name not in row.taken]
    if missing and not row.may_create:
        grant = sql.SQL("GRANT CREATE ON DATABASE {} TO {};").format(
            sql.Identifier(row.database), sql.Identifier(row.role)
        )
        reasons.append(
            (
                f"role {row.role} may not create a schema in {row.database}",
                "Each generation has a view schema of its own.",
                f"as the database's owner: {grant.as_string(session.connection)}",
            )
        )
    ours = {view.schema for view in known.values()}
    for name in (name for name in schemas if name in row.taken and name not in ours):
        other = sql.SQL("ALTER SCHEMA {} RENAME TO ...;").format(sql.Identifier(name)).as_string(session.connection)
        reasons.append((f"schema {name} exists and is not ours", "It will not be touched.", other))
    for view in known.values():
        if view.schema is not None and view.schema != view.made_as:
            back = sql.SQL("ALTER SCHEMA {} RENAME TO {};").format(
                sql.Identifier(view.schema), sql.Identifier(view.made_as)
            )
            reasons.append(
                (
                    f"schema {view.made_as} is called {view.schema} now",
                    "The trigger knows a writer's side by the name.",
                    back.as_string(session.connection),
                )
            )
    reasons += [
        (
            f"{reader.role} may read only {', '.join(reader.columns)} of {table.name}",
            "A view reads every column with the rights of whoever asks: it would fail for that role (42501).",
            f"GRANT SELECT ON {whole} TO {reader.role};",
        )
        for reader in session.rows(block("phases/expose", "column_readers"), table=table.oid)
    ]
    if reasons:
        raise Refused(
            f"{table.name}: a view cannot stand in: " + "; ".join(reason for reason, _, _ in reasons),
            why=" ".join(dict.fromkeys(why for _, why, _ in reasons)) + " Nothing was changed.",
            hint="\n".join(dict.fromkeys(remedy for _, _, remedy in reasons)) + f"\nthen: {again}",
        )


def columns(table: Table, attnum: int, name: str, hidden: frozenset[int]) -> tuple[tuple[int, str, str], ...]:
    """(attribute number, column, name in the view): the table's order, the vector where its first generation stands."""
    place = min((number for number in hidden | {attnum} if table.numbered(number)), default=attnum)
    shown: list[tuple[int, str, str]] = []
    for one in table.columns:
        if one.number == place:
            vector = table.numbered(attnum)
            assert vector is not None
            shown.append((attnum, vector.name, name))
        elif one.number not in hidden:
            shown.append((one.number, one.name, one.name))
    return tuple(shown)


def check_droppable(session: Session, views: Sequence[ExposedView], again: str) -> None:
    """Refuse where somebody has built on a view of ours: dropping it would take that along."""
    built = {
        row.description: view.schema
        for view in views
        if view.view is not None
        for row in session.rows(block("phases/expose", "built_on"), view=view.view_oid)
    }
    if built:
        schemas = ", ".join(sorted({str(schema) for schema in built.values()}))
        raise Refused(
            f"{'; '.join(built)} is built on our view in {schemas}",
            why="Our view has to go, and would take it along. Nothing was changed.",
            hint=f"build it on the table, or drop it, then: {again}",
        )


def drop(
    session: Session,
    ledger: Views,
    step: str,
    views: Sequence[ExposedView],
    limits: PauseLimits,
    observe: Observer,
) -> list[str]:
    """Drop views with their schemas, all at once; what is not ours in a schema stays, and the schema with it."""
    gone: list[str] = []
    drops: list[sql.Composable] = []
    statements: list[sql.Composable] = []
    locked: list[sql.Composable] = []
    for view in views:
        others = session.value(block("phases/expose", "others_in"), schema=view.schema_oid, view=view.view_oid)
        if view.schema is None:
            continue
        if view.view is not None:
            locked.append(sql.Identifier(view.schema, view.view))
            drops.append(block("phases/expose", "drop_view", view=locked[-1]))
        if not others:
            statements.append(block("phases/expose", "drop_schema", schema=sql.Identifier(view.schema)))
            gone.append(view.schema)
    figures: dict[str, object] = {"dropped": gone}
    statements += [*(ledger.disown_view_sql(view.number) for view in views), *ledger.record_sql(step, figures)]
    observe(Effect(step))
    _patiently(session, drops, statements, locked, None, limits, observe)
    observe(Recorded(step, figures))
    return gone


def _patiently(
    session: Session,
    drops: Sequence[sql.Composable],
    statements: Sequence[sql.Composable],
    views: Sequence[sql.Composable],
    table: sql.Composable | None,
    limits: PauseLimits,
    observe: Observer,
) -> None:
    """Effect and ledger rows in one message; whoever reads a view waits for all of it no longer than the budget.

    The drops come first: they are the locks. (LOCK TABLE of a view would lock the table as well.) Without them nobody
    can wait for us, and what follows may take its time.
    """
    with session.rolled_back():
        in_attempts(
            session,
            drops,
            statements,
            limits=limits,
            begin=sql.SQL("BEGIN"),
            undo=sql.SQL("ROLLBACK"),
            busy="a view",
            locked=views,
            read=[] if table is None else [table],
            observe=lambda text: observe(Note(text)),
        )


def search_path(session: Session, *schemas: str) -> str:
    """The setting that makes a session one of this generation's, its schema being the first: `rv_kb_g2,public`."""
    return str(session.value(block("phases/expose", "search_path"), names=list(dict.fromkeys(schemas))))


def searched_by(session: Session, schema: str) -> list[str]:
    """`ROLE app`: whose settings name the schema."""
    return [row.whose for row in session.rows(block("phases/expose", "searched_by"), schema=schema)]


def _is_fresh(session: Session, table: Table, present: ExposedView, shown: Sequence[tuple[int, str, str]]) -> bool:
    row = session.row(block("phases/expose", "shown"), view=present.view_oid, table=table.oid)
    assert row is not None
    return list(row.names) == [name for _, _, name in shown] and set(row.numbers) == {number for number, _, _ in shown}


def _statements(
    session: Session,
    table: Table,
    side: Side,
    schema: str,
    present: ExposedView | None,
    shown: Sequence[tuple[int, str, str]],
    *,
    fresh: bool,
) -> tuple[list[sql.Composable], list[sql.Composable]]:
    """Everything that makes, or makes anew, one generation's view: what has to go first, and the rest."""
    names = {"schema": sql.Identifier(schema), "view": sql.Identifier(schema, table.name)}
    me = sql.SQL("CURRENT_USER")
    drops: list[sql.Composable] = []
    statements: list[sql.Composable] = []
    if present is None or present.schema is None:
        comment = sql.Literal(f"revector: {table.name} as generation {side.number} ({side.model}) has it")
        statements += [
            block("phases/expose", "create_schema", schema=names["schema"]),
            block("phases/expose", "comment_schema", schema=names["schema"], comment=comment),
        ]
    statements.append(block("phases/expose", "may_create", schema=names["schema"], role=me))
    there = session.row(block("phases/expose", "same_name"), schema=schema, name=table.name)
    if there is not None and there.kind != "v":
        raise Refused(
            f"{schema}.{table.name} is not a view of ours",
            why="Somebody put it into our schema; it is not touched. Nothing was changed.",
            hint=f"rename or drop it, then: revector expose {table.name} --refresh",
        )
    if present is not None and present.schema and present.view and present.view != table.name:
        drops.append(block("phases/expose", "drop_view", view=sql.Identifier(present.schema, present.view)))
    if not fresh:
        if there is not None:
            # CREATE OR REPLACE can only append; another shape of table needs another view.
            drops.append(block("phases/expose", "drop_view", view=names["view"]))
        selected = sql.SQL(", ").join(
            sql.SQL("t.{}").format(sql.Identifier(given))
            if given == name
            else sql.SQL("t.{} AS {}").format(sql.Identifier(given), sql.Identifier(name))
            for _, given, name in shown
        )
        statements.append(
            block("phases/expose", "create_view", view=names["view"], columns=selected, table=table.identifier)
        )
    elif there is not None:
        statements += [
            block("phases/expose", "revoke", view=names["view"], role=_role(row.role))
            for row in session.rows(block("phases/expose", "granted"), view=there.oid)
        ]
    visible = {name for _, _, name in shown}
    granted = session.rows(block("phases/expose", "grants"), table=table.oid)
    for row in granted:
        of = [name for name in row.columns if name in visible]
        if row.columns and not of:
            continue
        statements.append(
            block(
                "phases/expose",
                "grant",
                privilege=sql.SQL(row.privilege),
                columns=sql.SQL(" ({})").format(sql.SQL(", ").join(map(sql.Identifier, of))) if of else sql.SQL(""),
                view=names["view"],
                role=_role(row.role),
                option=sql.SQL(" WITH GRANT OPTION" if row.grantable and row.role else ""),
            )
        )
    roles = dict.fromkeys(row.role for row in granted)
    statements += [block("phases/expose", "grant_usage", schema=names["schema"], role=_role(role)) for role in roles]
    statements.append(block("phases/expose", "usage_only", schema=names["schema"], role=me))
    return drops, statements


def _role(name: str | None) -> sql.Composable:
    return sql.SQL("PUBLIC") if name is None else sql.Identifier(name)
