"""No option is taken and then forgotten: each acts, is refused with the command that does, or is said to be idle."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from fix_commands import command
from fix_tables import (
    NEW,
    OLD,
    Halt,
    advance,
    following,
    halting,
    knowledge_base,
    one,
    stage_of,
    steering,
)

IDLE = "--without-follower has no effect now: "
LIVE = "Before VERIFIED the live model alone has a view, and nothing of its vectors is pending"


def exposed(connection: psycopg.Connection[Any]) -> int:
    return int(one(connection, "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'rv\\_kb\\_g%'"))


# -- expose ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [None, "PLANNED", "BACKFILLED", "ABORTED"])
def test_expose_before_verified_says_what_an_option_cannot_do(
    dsn: str, connection: psycopg.Connection[Any], stage: str | None
) -> None:
    """No follower is started and none is consented to: the wish is refused, the consent is said to be idle."""
    knowledge_base(connection, 5)
    if stage == "ABORTED":
        advance(dsn, "PLANNED")
        command(dsn, "abort", "kb").exits(0)
    elif stage:
        advance(dsn, stage)
    open_at = stage in ("PLANNED", "BACKFILLED")
    state = f"the migration is at {stage}" if open_at else "no migration is open"
    given = ("--from", OLD) if stage is None else ()
    assert command(dsn, "expose", "kb", "--follow", *given).exits(3).last == (
        f"refused: kb: {state}, so --follow has nothing to do\n"
        f"  {LIVE}; from VERIFIED on --follow keeps both models' views fresh. Nothing was changed.\n"
        "  next: leave it out: revector expose kb"
    )
    assert exposed(connection) == 0
    done = command(dsn, "expose", "kb", "--without-follower", *given).exits(0)
    assert f"{IDLE}{state}. {LIVE}; it is a consent for VERIFIED" in done.err
    assert exposed(connection) == 1
    other = command(dsn, "expose", "kb", "--text", "title").exits(3).last
    assert other == (
        "refused: kb: the migration embeds content, not title\n"
        "  A migration is open, and its plan says so. Nothing was changed.\n"
        "  next: leave --text out: revector expose kb"
        if open_at
        else "refused: kb: the text of embedding is on record as content, not title\n"
        "  Nothing was changed.\n  next: leave --text out: revector expose kb"
    )
    command(dsn, "expose", "kb", "--text", "content", "--from", OLD, "--vector", "embedding").exits(0)


@pytest.mark.parametrize("stage", ["VERIFIED", "SERVED", "CUT_OVER"])
def test_expose_from_verified_on(dsn: str, connection: psycopg.Connection[Any], stage: str) -> None:
    """The consent is asked for once, at VERIFIED; later, and beside a follower, it is said to be idle."""
    knowledge_base(connection, 5)
    advance(dsn, stage)
    assert "not title" in command(dsn, "expose", "kb", "--text", "title").exits(3).last
    if stage == "VERIFIED":
        with following(dsn, connection):
            told = command(dsn, "expose", "kb", "--without-follower").exits(0).err
        assert f"{IDLE}a follower is alive" in told
        assert stage_of(connection) == ("SERVED", None)
    else:
        told = command(dsn, "expose", "kb", "--without-follower").exits(0).err
        assert f"{IDLE}the migration is at {stage}. expose asks for a follower at VERIFIED alone" in told
    assert exposed(connection) == 2


# -- the other commands ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["cutover", "rollback"])
@pytest.mark.parametrize(
    "given",
    [
        ("--follow",),
        ("--without-follower",),
        ("--bare-writers-stopped",),
        ("--allow-pending", "1000"),
        ("--max-pause-ms", "100"),
        ("--attempts", "3"),
        ("--at", "23:59"),
        ("--when-file", "moment"),
    ],
    ids=lambda given: str(given[0]),
)
def test_check_is_not_given_what_a_swap_takes(dsn: str, verb: str, given: tuple[str, ...]) -> None:
    assert command(dsn, verb, "kb", "--check", "--json", *given).exits(2).err == (
        f"error: --check swaps nothing, so {given[0]} would do nothing\n"
        f"  next: leave it out: revector {verb} kb --check\n"
    )


def test_cutover_check_is_not_given_what_cutover_alone_takes(dsn: str) -> None:
    told = command(dsn, "cutover", "kb", "--check", "--refresh-old", "--allow-failed", "0").exits(2).err
    assert "so --refresh-old, --allow-failed would do nothing" in told


def test_options_that_want_another(dsn: str) -> None:
    """Also where the value given is the default's."""
    assert "--allow-pending: only with --cutover" in command(dsn, "run", "kb", "--allow-pending", "1000").exits(2).err
    assert command(dsn, "follow", "kb", "--once", "--health-every", "60").exits(2).err == (
        "error: --once writes no health lines, so --health-every would do nothing\n"
        "  next: leave it out: revector follow kb --once\n"
    )


def test_a_plan_says_what_it_makes_nothing_of(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 5, index="ivfflat")
    given = ("--from", OLD, "--to", NEW)
    told = command(dsn, "run", "kb", *given, "--cutover", "--follow", "--attempts", "3", "--dry-run", "-v").exits(0)
    assert "a dry run makes nothing of --cutover, --follow, --attempts: the run does" in told.err
    assert "makes nothing of" not in command(dsn, "run", "kb", *given, "--dry-run").exits(0).err
    advance(dsn, "PLANNED")
    for verb in ("plan", "run"):
        assert "--index same was not planned" in command(dsn, verb, "kb", "--index", "same").exits(3).last
    command(dsn, "abort", "kb").exits(0)
    connection.execute("CREATE VIEW shown AS SELECT embedding FROM kb")
    blocked = command(dsn, "plan", "kb", "--to", NEW, "--rehearse").exits(3)
    assert "--rehearse: nothing was tried, for preconditions are not met" in blocked.err


def test_what_a_later_stage_does_not_ask_for(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 5)
    advance(dsn, "VERIFIED")
    told = command(dsn, "run", "kb", "--allow-failed", "3").exits(0).err
    assert "--allow-failed has no effect now: verified already; revector cutover kb takes it" in told
    with following(dsn, connection):
        assert f"{IDLE}a follower is alive" in command(dsn, "cutover", "kb", "--without-follower").exits(0).err
    with pytest.raises(Halt), steering(dsn, observe=halting("finalize.close")) as migration:
        migration.finalize(quiet_for=0)
    told = command(dsn, "finalize", "kb", "--quiet-for", "0", "--allow-failed", "1", "--drop-backup").exits(0).err
    assert "--allow-failed, --quiet-for has no effect now: finalize has begun, and only goes on" in told
    assert "--drop-backup has no effect: this migration has made no backup" in told


def test_restore_goes_on_with_the_column_it_was_started_for(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 5)
    command(dsn, "run", "kb", "--from", OLD, "--to", NEW, "--backup").exits(0)
    command(dsn, "cutover", "kb", "--without-follower").exits(0)
    command(dsn, "finalize", "kb").exits(0)
    command(dsn, "restore", "kb").exits(0)
    told = command(dsn, "restore", "kb", "--vector", "other").exits(3).last
    assert "of embedding is open; other comes after it" in told
