"""Every refusal in full: what, why, the exact next command, and the exit code. Nothing is changed by any of them."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from fix_commands import command, environment, in_process
from fix_tables import NEW, OLD, advance, knowledge_base, one
from revector.embedded import Server

FROM_TO = ("--from", OLD, "--to", NEW)


def test_names_that_are_not_there(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 20)
    database = one(connection, "SELECT current_database()")
    for name, near in (("kbx", "; did you mean 'kb'?"), ("no such table", "")):
        assert command(dsn, "status", name).exits(2).err == (
            f"error: there is no table {name!r} in database {database!r}{near}\n"
            "  Tables with a vector column here: kb.\n"
        )
    assert command(dsn, "plan", "kb", *FROM_TO, "--vector", "embeding").exits(2).err == (
        "error: kb has no column 'embeding'; did you mean 'embedding'?\n"
        "  Its vector columns: embedding. All columns: id, title, content, note, filler, embedding.\n"
    )
    assert command(dsn, "plan", "kb", "--to", NEW).exits(2).last.startswith("error: which model made kb.embedding")
    assert command(dsn, "plan", "kb", "--from", OLD, "--to", "hash:none").exits(2).last == (
        "error: hash:none: the dimension is a whole number from 1 on\n  next: for example: hash:768"
    )
    assert one(connection, "SELECT to_regnamespace('revector') IS NULL")


def test_no_database_to_talk_to(dsn: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nobody = f"postgresql://someone:hushhush@127.0.0.1:{port}/db"
    lost = command(nobody, "run", "kb", *FROM_TO).exits(4)
    assert lost.out == "" and lost.err.startswith("stopped: the database cannot be reached\n  libpq says: ")
    assert "\n  next: start the server, or set DATABASE_URL in the environment or .env" in lost.err
    wrong = make_conninfo(dsn, dbname="no_such_database")
    assert command(wrong, "status").exits(2).err.startswith("error: database 'no_such_database' does not exist")
    unknown = make_conninfo(dsn, user="no_such_role")
    assert command(unknown, "status").exits(2).err.startswith("error: role 'no_such_role' does not exist")
    nonsense = command("hushhush nonsense", "status").exits(2)
    assert nonsense.err.startswith("error: DATABASE_URL is not a connection string\n")
    number = command(dsn, "status", env={"EMBEDDING_DIMENSION": "many"}).exits(2)
    assert number.err.startswith("error: EMBEDDING_DIMENSION is not usable: ")
    for answer in (lost, nonsense):
        assert "hushhush" not in answer.out + answer.err


def test_a_wrong_password(server: Server) -> None:
    """A server that asks for passwords: the one given is wrong, and is not printed."""
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute("ALTER ROLE postgres PASSWORD 'the-right-one'")
        (server.data / "pg_hba.conf").write_text("local all all scram-sha-256\n")
        connection.execute("SELECT pg_reload_conf()")
        connection.execute("SELECT pg_sleep(0.3)")
    wrong = make_conninfo(server.dsn, password="hush-hush")
    answer = command(wrong, "plan", "kb", *FROM_TO).exits(2)
    assert answer.out == "" and answer.err == (
        "error: the database rejected the user or the password\n  Nothing was read or changed.\n"
        "  next: set DATABASE_URL in the environment or .env, or libpq's PGHOST, PGPORT, PGUSER, PGDATABASE\n"
    )
    right = make_conninfo(server.dsn, password="the-right-one")
    assert command(right, "status").exits(0).out.startswith("revector knows no table")


@pytest.mark.parametrize(
    ("stage", "verb", "told"),
    [
        (
            None, "cutover",
            "refused: kb: no migration has been started\n  Nothing was changed.\n  next: revector plan kb --to MODEL\n",
        ),
        (
            None, "follow",
            "refused: kb: no migration is open, so there is nothing to follow\n"
            "  A follower fills the vectors of an open migration, from EXPANDED on. Nothing was changed.\n"
            "  next: revector plan kb --to MODEL\n",
        ),
        (
            "EXPANDED", "cutover",
            f"refused: kb: cutover is not possible at EXPANDED\n"
            f"  It is possible at VERIFIED, SERVED. {OLD} answers. Nothing was changed.\n  next: revector run kb\n",
        ),
        (
            "VERIFIED", "finalize",
            f"refused: kb: finalize is not possible at VERIFIED\n"
            f"  It is possible at CUT_OVER. {OLD} answers. Nothing was changed.\n  next: revector cutover kb\n",
        ),
        (
            "VERIFIED", "rollback",
            f"refused: kb: rollback is not possible at VERIFIED\n"
            f"  It is possible at CUT_OVER. {OLD} answers. Nothing was changed.\n  next: revector cutover kb\n",
        ),
        (
            "VERIFIED", "cutover",
            "refused: kb: no follower is alive\n"
            "  Without one, rows edited after the swap lose their vectors and vanish from search. Nothing was changed.\n"
            "  next: in another terminal: revector follow kb\n        or let this command stay and do it: --follow\n",
        ),
        (
            "CUT_OVER", "abort",
            f"refused: kb: abort is not possible at CUT_OVER\n  It is possible at PLANNED, EXPANDED, BACKFILLED, INDEXED,"
            f" VERIFIED, SERVED. {NEW} answers. Nothing was changed.\n  next: revector finalize kb\n",
        ),
        (
            "CUT_OVER", "uninstall",
            "refused: a migration is open: kb at CUT_OVER\n  Without the ledger nobody could complete it or undo it."
            " Nothing was changed.\n  next: revector finalize kb\n        then: revector uninstall\n",
        ),
    ],
)  # fmt: skip
def test_out_of_order(dsn: str, connection: psycopg.Connection[Any], stage: str | None, verb: str, told: str) -> None:
    knowledge_base(connection, 20)
    if stage:
        advance(dsn, stage)
    before = one(connection, "SELECT to_regclass('revector.migrations')") and one(
        connection, "SELECT max(changed)::text || count(*) FROM revector.migrations"
    )
    answer = command(dsn, verb, *([] if verb == "uninstall" else ["kb"])).exits(3)
    assert (answer.out, answer.err) == ("", told)
    if before:
        assert one(connection, "SELECT max(changed)::text || count(*) FROM revector.migrations") == before


def test_another_command_or_plan_is_in_the_way(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 20)
    advance(dsn, "VERIFIED")
    assert command(dsn, "run", "kb", "--to", "hash:48").exits(3).last == (
        f"refused: kb: a migration {OLD} -> {NEW} is open with other options: --to hash:48 was not planned\n"
        "  Half of the vectors would be of another plan. Nothing was changed.\n"
        "  next: go on with it: revector run kb\n        or give it up first: revector abort kb"
    )
    oid = one(connection, "SELECT 'kb'::regclass::oid::int")
    connection.execute("SELECT pg_advisory_lock(%s, %s)", (0x72760001, oid))
    busy = command(dsn, "cutover", "kb").exits(3)
    assert busy.err == (
        f"refused: another revector command is steering kb (server process {connection.info.backend_pid})\n"
        "  Two at once could undo each other's steps. Nothing was changed.\n"
        "  next: wait for it, or look: revector status kb\n"
    )
    assert command(dsn, "status", "kb").exits(0).out.startswith("kb: VERIFIED\n")


def test_a_blocked_plan_lists_every_blocker(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 20, more=", embedding_g2 int")
    connection.execute("CREATE VIEW shown AS SELECT id, embedding FROM kb")
    plan = command(dsn, "plan", "kb", *FROM_TO).exits(3)
    blockers = [line for line in plan.out.splitlines() if " ✗ " in line]
    assert len(blockers) == 2 and "names" in blockers[1]
    assert plan.out.endswith("Blocked: 2 preconditions are not met (✗ above).\n")
    assert plan.out.count("remedy: ") == 3  # two blockers, and the column order
    assert plan.last == (
        "refused: kb: 2 preconditions are not met\n  Each is listed in the plan with its remedy. Nothing was changed.\n"
        f"  next: when they are met: revector run kb --from {OLD} --to {NEW}"
    )
    as_json = command(dsn, "plan", "kb", *FROM_TO, "--json").exits(3).json
    assert as_json["blocked"] and as_json["next"] is None
    assert [f["title"] for f in as_json["findings"] if f["ok"] is False] == ["dependents", "names"]
    run = command(dsn, "run", "kb", *FROM_TO).exits(3)
    assert run.out == "" and "refused: kb: 2 precondition(s) not met: " in run.err
    assert one(connection, "SELECT to_regnamespace('revector') IS NULL")


# -- defects and secrets -----------------------------------------------------------------------------------------------

DEFECT = (
    "import revector.maintenance as m\n"
    "def known_tables(database):\n"
    "    raise RuntimeError('lost: ' + database._conninfo + ' and sk-hush-key')\n"
    "m.known_tables = known_tables"
)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://someone:hush%20hush@db.example/x",
        "postgresql+psycopg://someone:hushhush@db.example/x",
        "host=db.example user=someone password='hush hush'",
        "postgresql://db.example/x?user=someone&password=hushhush",
    ],
)
def test_a_defect_is_one_line_and_its_details_hold_no_secret(address: str) -> None:
    answer = in_process(DEFECT, address, "status", env={"OPENAI_API_KEY": "sk-hush-key", "PGPASSWORD": "hush-pg"})
    answer.exits(70)
    line = answer.err.removesuffix("\n")
    assert answer.out == "" and "\n" not in line
    assert line.startswith("defect: this is an error of revector itself (RuntimeError); the details are in ")
    details = Path(line.rsplit(" ", 1)[1])
    text = details.read_text(encoding="utf-8")
    assert details.stat().st_mode & 0o077 == 0
    details.unlink()
    assert "Traceback" in text and "known_tables" in text and "lost: " in text
    assert "hush" not in text


def test_the_password_shows_nowhere(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The server trusts everybody here, so a password in the address is never asked for; nor is it ever shown."""
    knowledge_base(connection, 20)
    secret = make_conninfo(**{**conninfo_to_dict(dsn), "password": "hush-hush"})
    answers = [
        command(secret, "run", "kb", *FROM_TO, "-v", env={"OPENAI_API_KEY": "sk-hush"}).exits(0),
        command(secret, "events", "kb", "-v").exits(0),
        command(secret, "finalize", "kb", "-v").exits(3),
    ]
    dump = [row for (name,) in connection.execute(
        "SELECT quote_ident(relname) FROM pg_class WHERE relnamespace = 'revector'::regnamespace AND relkind = 'r'"
    ).fetchall() for row in connection.execute(f"SELECT t::text FROM revector.{name} AS t").fetchall()]  # fmt: skip
    assert dump
    assert "hush" not in "".join(a.out + a.err for a in answers) + str(dump)


def test_a_reader_that_goes_away_is_no_error(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 20)
    for streams in ("", "2>&1"):
        shell = f'"{sys.executable}" -m revector.cli plan kb --from {OLD} --to {NEW} {streams} | head -1; echo ${{PIPESTATUS[0]}}'
        done = subprocess.run(
            ["bash", "-c", shell], capture_output=True, text=True, env=environment(dsn), timeout=60, check=True
        )
        assert done.stdout.splitlines()[-1] == "0"
        assert "Error" not in done.stderr and "Traceback" not in done.stderr
