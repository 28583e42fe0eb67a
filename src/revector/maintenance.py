"""What concerns the ledger as a whole: its versions, the tables it knows, and its removal.

Nothing here touches a user's table.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from revector import ledger as ledgers
from revector.catalog import read_server
from revector.db import Database, Session, block, translated
from revector.errors import Refused
from revector.ledger import NEXT, VERSION, Ledger, Stage


@dataclass(frozen=True, slots=True)
class Versions:
    """What is installed where."""

    server: str
    #: None: the extension is not installed in this database.
    pgvector: str | None
    #: None: this database has no ledger.
    ledger: int | None
    #: The ledger version that this program writes.
    known_ledger: int = VERSION


def versions(database: Database) -> Versions:
    """The versions of server, extension and ledger; raises `ServerLost` and its like when there is no database."""
    with database.connect("version") as session:
        server = read_server(session)
        return Versions(server.version, server.vector_version, ledgers.version(session))


def known_tables(database: Database) -> list[str]:
    """Every table with a live generation or a migration, as a command takes it."""
    with translated("revector status"), database.connect("status") as session:
        if not ledgers.exists(session):
            return []
        ledgers.require(session)
        return [_name(session, row.oid) or str(row.oid) for row in session.rows(block("ledger", "known_tables"))]


def standing(database: Database, table: int) -> str:
    """In one sentence: how far the table's migration is, and which model answers; empty without a ledger."""
    with database.connect("status") as session:
        if not ledgers.exists(session):
            return ""
        row = Ledger(session, table).latest()
        if row is None:
            return ""
        return row.standing


def uninstall(database: Database) -> bool:
    """Drop schema `revector`; False: there was none. Refused while a migration of any table is open."""
    with translated("revector uninstall"), database.connect("uninstall") as session:
        if not ledgers.exists(session):
            return False
        ledgers.require(session)
        with session.transaction():
            # Nobody can open a migration between this look and the drop.
            session.execute("LOCK TABLE revector.migrations IN ACCESS EXCLUSIVE MODE")
            opened = [
                (name, row.stage, row.closing or NEXT[Stage(row.stage)])
                for row in session.rows(block("ledger", "all_open"))
                # A migration whose table was dropped has nothing left to lose.
                if (name := _name(session, row.table_oid)) is not None
            ]
            if opened:
                raise Refused(
                    "a migration is open: " + ", ".join(f"{name} at {stage}" for name, stage, _ in opened),
                    why="Without the ledger nobody could complete it or undo it. Nothing was changed.",
                    hint="\n".join(_ways_out(name, stage, verb) for name, stage, verb in opened)
                    + "\nthen: revector uninstall",
                )
            known = session.value("SELECT to_regclass('revector.views') IS NOT NULL")
            exposed = [
                (name, row.schema)
                for row in (session.rows(block("ledger", "all_views")) if known else ())
                if (name := _name(session, row.table_oid)) is not None
            ]
            if exposed:
                raise Refused(
                    "view schemas are exposed: " + ", ".join(f"{schema} of {name}" for name, schema in exposed),
                    why="Without the ledger nobody would know that they are ours. Nothing was changed.",
                    hint="\n".join(
                        f"revector expose {shlex.quote(name)} --drop" for name in dict.fromkeys(n for n, _ in exposed)
                    )
                    + "\nthen: revector uninstall",
                )
            session.execute(block("ledger", "uninstall"))
        return True


def _ways_out(name: str, stage: str, verb: str) -> str:
    table = shlex.quote(name)
    if verb in ("finalize", "abort"):
        return f"revector {verb} {table}"
    return f"revector abort {table}, or go on: revector {verb} {table}"


def _name(session: Session, oid: int) -> str | None:
    """The table's name as a command takes it, unquoted; None: it was dropped."""
    row = session.row(block("work", "table_name"), table=oid)
    if row is None:
        return None
    return str(row.relname) if row.nspname == "public" else f"{row.nspname}.{row.relname}"
