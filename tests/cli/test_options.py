"""No option is taken and then forgotten: each acts, is refused with the command that does, or is said to be idle."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from fix_commands import command
from fix_tables import OLD, advance, following, knowledge_base, one, stage_of

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
