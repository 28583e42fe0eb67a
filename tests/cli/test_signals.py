"""Ctrl-C and SIGTERM at any moment: the command says what is true, and the same command goes on."""

from __future__ import annotations

import signal
from typing import Any

import psycopg
import pytest

from fix_commands import command, ended, started, until
from fix_tables import NEW, OLD, advance, assert_exact, knowledge_base, one

FROM_TO = ("--from", OLD, "--to", NEW)
AGAIN = f"  next: the same command again: revector run kb --from {OLD} --to {NEW}"


def filled(connection: psycopg.Connection[Any]) -> Any:
    return one(connection, "SELECT to_regclass('revector.windows') IS NOT NULL") and one(
        connection, "SELECT count(*) FROM revector.windows"
    )


def test_a_run_that_is_stopped_goes_on(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 4000, filler=500, index=None)
    run = started(dsn, "run", "kb", *FROM_TO)
    until(lambda: filled(connection))
    answer = ended(run, signal.SIGINT).exits(4)
    assert answer.out == "" and "\nstopping at the next safe point (again: at once)\n" in answer.err
    lines = answer.last.splitlines()
    assert lines[0] == "stopped: Interrupted; the same command goes on where it stopped."
    assert lines[1].endswith(f"; {OLD} answers.") and "The migration is at " in lines[1]
    assert lines[2] == AGAIN
    again = command(dsn, "run", "kb", *FROM_TO).exits(0)
    assert "resuming" in again.err and again.out.startswith("kb is VERIFIED")
    assert_exact(connection, "kb", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=4000)


def test_the_second_press_ends_it_at_once(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Whatever the command is busy with: here, with something that never ends and never looks at the flag."""
    busy = (
        "import time\nfrom revector import Migration\n"
        "def abort(self, **options):\n    print('busy', flush=True)\n    while True: time.sleep(1)\n"
        "Migration.abort = abort"
    )
    knowledge_base(connection, 20)
    advance(dsn, "EXPANDED")
    abort = started(dsn, "abort", "kb", code=busy)
    assert abort.stdout is not None
    assert abort.stdout.readline() == "busy\n", ended(abort).err
    answer = ended(abort, signal.SIGINT, signal.SIGINT, seconds=5).exits(4)
    assert answer.err == (
        "\nstopping at the next safe point (again: at once)\n"
        "\nstopped at once; the same command goes on where it stopped\n"
    )


def test_a_press_too_many_does_not_change_the_exit_code(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Signals in quick succession, on a real run: whichever comes first, the code is 4 and the same command goes on."""
    knowledge_base(connection, 4000, filler=500, index=None)
    run = started(dsn, "run", "kb", *FROM_TO)
    until(lambda: filled(connection))
    answer = ended(run, *[signal.SIGINT] * 8, seconds=5).exits(4)
    assert answer.out == "" and "Traceback" not in answer.err
    command(dsn, "run", "kb", *FROM_TO).exits(0)


def test_while_a_command_only_reads_it_ends_at_once(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The table is locked by somebody, so that the plan waits."""
    knowledge_base(connection, 20)
    with psycopg.connect(dsn) as other:
        other.execute("LOCK TABLE kb IN ACCESS EXCLUSIVE MODE")
        for verb in ("plan", "run"):
            waiting = started(dsn, verb, "kb", *FROM_TO)
            until(lambda: one(connection, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
            answer = ended(waiting, signal.SIGINT, seconds=5).exits(4)
            assert answer.last == (
                "stopped: Interrupted; the same command goes on where it stopped.\n  Nothing is lost.\n"
                f"  next: the same command again: revector {verb} kb --from {OLD} --to {NEW}"
            )
    assert one(connection, "SELECT to_regnamespace('revector') IS NULL")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_follow_ends_cleanly(dsn: str, connection: psycopg.Connection[Any], number: signal.Signals) -> None:
    knowledge_base(connection, 20)
    advance(dsn, "VERIFIED")
    follower = started(dsn, "follow", "kb")
    until(lambda: one(connection, "SELECT count(*) FROM revector.heartbeats WHERE active"))
    connection.execute("UPDATE kb SET content = 'new' WHERE id < 3")
    until(lambda: one(connection, "SELECT count(*) FROM kb WHERE embedding_g2 IS NULL") == 0)
    answer = ended(follower, number).exits(0)
    assert answer.out == "following ended; 3 rows filled\n"
    assert one(connection, "SELECT count(*) FROM revector.heartbeats") == 0
    connection.execute("UPDATE kb SET content = 'newer' WHERE id < 5")
    assert command(dsn, "follow", "kb", "--once").exits(0).out == "5 rows filled\n"


def test_the_server_goes_away_and_the_same_command_goes_on(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 4000, filler=500, index=None)
    run = started(dsn, "run", "kb", *FROM_TO)
    until(lambda: filled(connection))
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name LIKE 'revector%' AND datname = current_database()"
    )
    answer = ended(run).exits(4)
    assert answer.last.splitlines()[-1] == AGAIN and "Traceback" not in answer.err
    command(dsn, "run", "kb", *FROM_TO).exits(0)
