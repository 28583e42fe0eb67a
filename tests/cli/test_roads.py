"""Commands in the order of the work, as a user gives them: answers on stdout, progress on stderr, JSON alone."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fix_commands import command, ended, started, until
from fix_tables import NEW, OLD, assert_exact, assert_no_leftovers, knowledge_base, one

FROM_TO = ("--from", OLD, "--to", NEW)


def test_forward_back_and_forward_again(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """run, cutover, rollback, cutover, finalize, uninstall with a follower of its own process."""
    knowledge_base(connection, 300, index="ivfflat")
    run = command(dsn, "run", "kb", *FROM_TO, "--backup").exits(0)
    assert [line for line in run.err.splitlines() if line.startswith("[")] == [
        "[1/6] preconditions", "[2/6] backup", "[3/6] expand", "[4/6] backfill", "[5/6] index", "[6/6] verify",
    ]  # fmt: skip
    assert "      300 vectors copied to kb_backup_16 and verified" in run.err.splitlines()
    assert run.out.startswith(f"kb is VERIFIED; {OLD} answers.\n")
    assert "complete                  300 of 300 rows have a vector" in run.out
    assert "\nnext: revector cutover kb\n" in run.out and run.out.endswith("\nback: revector abort kb\n")

    follower = started(dsn, "follow", "kb")
    until(lambda: one(connection, "SELECT count(*) FROM revector.heartbeats WHERE active"))
    there = command(dsn, "cutover", "kb").exits(0)
    assert there.out.startswith(f"kb is CUT_OVER; {NEW} answers.\n")
    assert re.search(r"^  the pause was \d+ ms; ", there.out, re.MULTILINE)
    assert "\nnext: revector finalize kb\n" in there.out and there.out.endswith("\nback: revector rollback kb\n")
    connection.execute("UPDATE kb SET content = 'changed after the cutover' WHERE id < 5")
    back = command(dsn, "rollback", "kb").exits(0)
    assert back.out.startswith(f"kb is SERVED; {OLD} answers.\n")
    assert_exact(connection, "kb", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=300)
    command(dsn, "cutover", "kb", "--allow-pending", "0").exits(0)

    status = command(dsn, "status", "kb").exits(0)
    assert status.out.splitlines()[0] == "kb: CUT_OVER"
    assert re.search(r"^  backup     kb_backup_16, [\d.]+ KiB, made ", status.out, re.MULTILINE)
    assert status.out.endswith("next: revector finalize kb\n")
    finalized = command(dsn, "finalize", "kb", "--drop-backup").exits(0)
    assert finalized.out.startswith(f"kb is FINALIZED; {NEW} answers.\n")
    followed = ended(follower).exits(0)
    assert re.fullmatch(r"following ended; \d+ rows filled\n", followed.out)
    assert "the migration is closed, or being closed: following ends" in followed.err
    assert one(connection, "SELECT to_regclass('kb_backup_16') IS NULL")
    assert_no_leftovers(connection)
    assert_exact(connection, "kb", "content", {"embedding": NEW}, at_least=300)

    assert command(dsn, "uninstall").exits(0).out == "schema revector is gone\n"
    assert command(dsn, "uninstall").exits(0).out == "this database has no ledger: nothing to remove\n"
    assert one(connection, "SELECT count(*) FROM kb") == 300


def test_json_is_alone_on_stdout(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 60)
    before = command(dsn, "status", "kb", "--json").exits(0).json
    assert (before["format"], before["table"], before["stage"], before["live"]) == (1, "kb", None, None)
    plan = command(dsn, "plan", "kb", *FROM_TO, "--json", "-v", "--price-per-million-tokens", "2").exits(0)
    assert (
        plan.err and plan.json["blocked"] is False and plan.json["next"] == f"revector run kb --from {OLD} --to {NEW}"
    )
    assert plan.json["rows"] == 60 and plan.json["cost"]["tokens"] == plan.json["tokens"] / 1e6 * 2
    assert any("ADD COLUMN" in s["sql"] for s in plan.json["statements"])
    assert one(connection, "SELECT to_regnamespace('revector') IS NULL"), "plan changes nothing"

    command(dsn, "run", "kb", *FROM_TO).exits(0)
    status = command(dsn, "status", "kb", "--json").exits(0).json
    for side in ("live", "other"):  # when it was last read depends on the server's statistics
        assert status[side].pop("written_s") is None and status[side].pop("search_path") is None
        assert "read_s" in status[side]
        del status[side]["read_s"]
    backfill = status.pop("backfill")
    assert backfill["rows"] == 60 and 0 <= backfill["hot_share"] <= 1 and 0 <= backfill["hot_expected"] <= 1
    assert status == {
        "format": 1,
        "table": "kb",
        "stage": "VERIFIED",
        "live": {"column": "embedding", "model": OLD, "dimension": 16, "pending": None},
        "other": {"column": "embedding_g2", "model": NEW, "dimension": 32, "role": "candidate", "pending": 0},
        "rows": {"total": 60, "blank": 0, "failed": 0},
        "estimates": {},
        "followers": 0,
        "next": "revector cutover kb",
        "closing": None,
        "backup": None,
        "tuning": {"paused": False},
        "spent": None,
        "alerts": [],
        "vigil": [],
    }
    every = command(dsn, "status", "--json").exits(0).json
    assert every["format"] == 1 and [t["table"] for t in every["tables"]] == ["kb"]
    log = command(dsn, "events", "kb", "--json").exits(0).json
    assert [e["step"] for e in log["events"]][:2] == ["plan", "expand"] and log["events"][-1]["step"] == "verify"
    found = command(dsn, "search", "kb", "row 7 tells", "-k", "3", "--json").exits(0).json
    assert found["model"] == OLD and len(found["hits"]) == 3


def test_a_knowledge_base_from_nothing(dsn: str, connection: psycopg.Connection[Any], tmp_path: Path) -> None:
    """schema, init, load, search: and again, which replaces."""
    ddl = command(None, "schema", "--model", OLD, "--index", "ivfflat", "--lists", "7").exits(0).out
    assert "embedding vector(16)" in ddl and "WITH (lists = 7)" in ddl
    assert command(None, "schema", env={"EMBEDDING_MODEL": NEW}).exits(0).out.count("vector(32)") == 1

    made = command(dsn, "init", "docs", "--model", OLD, "--index", "ivfflat", "--lists", "4").exits(0)
    assert made.out.splitlines() == [
        f"public.docs is created; {OLD} (16 dimensions) is its live model.",
        "  index ivfflat (lists=4), built at the end of the first load",
        "next: revector load docs FILE.jsonl",
    ]
    file = tmp_path / "docs.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf-8") as out:
        for n in range(120):
            out.write(json.dumps({"_id": f"d{n}", "title": f"title {n}", "text": f"about subject {n % 7}"}) + "\n")
    loaded = command(dsn, "load", "docs", str(file), "--batch-size", "16").exits(0)
    assert re.match(rf"120 rows loaded into docs with {OLD} in [\d.]+ s", loaded.out)
    assert "  index ivfflat (lists=4) is built\n" in loaded.out
    again = command(dsn, "load", "docs", str(file)).exits(0)
    assert "  120 of them replaced a row of the same id\n" in again.out
    assert one(connection, "SELECT count(*) FROM docs") == 120
    found = command(dsn, "search", "docs", "title 7 about subject 0", "-k", "2").exits(0)
    assert re.search(r"^  1  \d\.\d{3}  d7$", found.out, re.MULTILINE)
    assert re.search(rf"^2 hits by {OLD} in \d+ ms$", found.out, re.MULTILINE)
    assert "next: revector plan docs --to MODEL" in command(dsn, "status").exits(0).out


def test_run_goes_on_to_the_cutover_and_stays(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """`run --cutover --follow` stays in the foreground, and leaves the steering to others."""
    knowledge_base(connection, 60)
    staying = started(dsn, "run", "kb", *FROM_TO, "--cutover", "--follow")
    until(lambda: one(connection, "SELECT to_regclass('revector.migrations') IS NOT NULL"))
    until(lambda: one(connection, "SELECT count(*) FROM revector.migrations WHERE stage = 'CUT_OVER'"), 60)
    connection.execute("UPDATE kb SET content = 'edited while it stays' WHERE id < 9")
    until(lambda: one(connection, "SELECT count(*) FROM kb WHERE embedding IS NULL OR embedding_g1 IS NULL") == 0)
    until(lambda: command(dsn, "rollback", "kb").code == 0)
    end = ended(staying, signal.SIGTERM).exits(0)
    assert end.out.startswith(f"kb is CUT_OVER; {NEW} answers.\n")
    assert end.out.endswith("following ended; 9 rows filled\n")
    assert "following kb; Ctrl-C ends it" in end.err


def test_dry_run_is_plan_and_verbose_shows_steps_and_statements(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 40)
    planned = command(dsn, "plan", "kb", *FROM_TO).exits(0).out
    dry = command(dsn, "run", "kb", *FROM_TO, "--cutover", "--dry-run").exits(0).out
    measured = re.compile(r"^  (speed|time.*|storage) .*$", re.MULTILINE)
    assert measured.sub("", planned) == measured.sub("", dry)
    assert planned.endswith(f"\nnext: revector run kb --from {OLD} --to {NEW}\n")

    run = command(dsn, "run", "kb", *FROM_TO, "-v").exits(0)
    assert '      | ALTER TABLE "public"."kb" ADD COLUMN "embedding_g2" "public".vector(32);' in run.err.splitlines()
    assert "      recorded: expand" in run.err
    # Every statement of the plan that changes the table's shape was sent, word for word.
    sent = " ".join(line.split("| ", 1)[1] for line in run.err.splitlines() if line.strip().startswith("| "))
    statements = planned.split("  -- expand\n")[1].split("  -- cutover")[0]
    for line in statements.splitlines():
        if re.match(r"  (ALTER|CREATE TRIGGER|CREATE INDEX|ANALYZE)", line):
            assert line.strip().removesuffix(";") in sent


@pytest.mark.parametrize("name", ["Weird Table", "app.docs", "per%cent"])
def test_the_next_command_can_be_pasted(dsn: str, connection: psycopg.Connection[Any], name: str) -> None:
    """Names that the shell or SQL would read differently: every hint names the table so that it is found again."""
    if name == "app.docs":
        knowledge_base(connection, 30, name="docs")
        connection.execute("CREATE SCHEMA app; ALTER TABLE docs SET SCHEMA app")
    else:
        knowledge_base(connection, 30, name=name)
    plan = command(dsn, "plan", name, *FROM_TO).exits(0)
    following = plan.out.splitlines()[-1].removeprefix("next: ")
    for answers in (OLD, NEW):
        words = shlex.split(following)
        assert words[0] == "revector"
        done = command(dsn, *words[1:], *(["--without-follower"] if words[1] == "cutover" else [])).exits(0)
        assert f"; {answers} answers." in done.out
        following = next(line for line in done.out.splitlines() if line.startswith("next: ")).removeprefix("next: ")
    listed = command(dsn, "status").exits(0).out
    assert listed.startswith(f"{name}: CUT_OVER\n")
    refused = command(dsn, "uninstall").exits(3)
    assert f"  next: revector finalize {shlex.quote(name)}\n" in refused.err


def test_version_tells_the_database_s_versions_too(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 20)
    program, ledger, server, vector = command(dsn, "--version").exits(0).out.splitlines()
    assert re.fullmatch(r"revector \d+\.\d+\.\d+", program) and ledger == "ledger     none yet"
    assert server.startswith("PostgreSQL ") and re.fullmatch(r"pgvector   \d+\.\d+\.\d+", vector)
    command(dsn, "run", "kb", *FROM_TO).exits(0)
    assert "\nledger     version 2\n" in command(dsn, "--version").exits(0).out
    nowhere = command("postgresql://nobody@127.0.0.1:9/nothing", "--version").exits(0)
    assert nowhere.out.splitlines() == [program] and nowhere.err == ""


def test_both_sides_by_views(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """What `expose` prints is what a session sets, and the next command is the right one."""
    knowledge_base(connection, 12)
    command(dsn, "expose", "kb").exits(2)
    first = command(dsn, "expose", "kb", "--from", OLD).exits(0)
    assert "    set        search_path=rv_kb_g1,public\n" in first.out and "ON CONFLICT ON CONSTRAINT" in first.out
    assert first.out.endswith("next: revector plan kb --to MODEL\n")
    command(dsn, "run", "kb", "--to", NEW).exits(0)
    refused = command(dsn, "expose", "kb").exits(3)
    assert "no follower is alive" in refused.err
    both = command(dsn, "expose", "kb", "--without-follower").exits(0)
    assert both.out.endswith("next: revector cutover kb\n")
    shown = command(dsn, "status", "kb").exits(0)
    assert (
        "search_path=rv_kb_g1,public  (live)\n" in shown.out
        and "search_path=rv_kb_g2,public  (candidate)\n" in shown.out
    )
    again = command(dsn, "expose", "kb", "--refresh").exits(0)
    assert again.out.startswith("kb: rv_kb_g1, rv_kb_g2 made anew.\n") and "ON CONFLICT" not in again.out
    command(dsn, "expose", "kb", "--drop", "--refresh").exits(2)
    gone = command(dsn, "expose", "kb", "--drop").exits(0)
    assert gone.out == "kb: rv_kb_g1, rv_kb_g2 dropped.\nnext: revector cutover kb\n"
