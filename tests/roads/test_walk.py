"""A walk of commands and writes at random: at every step no vector is wrong, and every walk can be ended cleanly."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from endings import assert_ended, assert_never_wrong, assert_rests, belongings, generations
from hypothesis import HealthCheck, note, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg import sql

from fix_tables import NEW, OLD, REQUEST, Halt, body, fill, halting, knowledge_base, one, stage_of, steering, vector
from revector.errors import RevectorError
from revector.phases import backfill, verify

ROWS = 12
SEED = int(os.environ.get("REVECTOR_SEED", "3"))
#: A command may be killed at these; the same command, or another one that the state allows, comes next.
STOPS = ("expand", "backfill.window", "backfill", "index.build", "index", "verify", "serve", "expose", "cutover",
         "rollback", "abort.close", "abort.drop_views", "abort.drop_column", "finalize.close", "finalize.drop_views",
         "finalize.validate", "finalize.drop_column")  # fmt: skip


#: Where a walk begins; chance alone would seldom come past VERIFIED.
STARTS = ((), ("run",), ("run", "expose"), ("run", "cutover"), ("run", "expose", "cutover", "rollback"))


def machine(connection: psycopg.Connection[Any], dsn: str, seen: set[str]) -> type[RuleBasedStateMachine]:
    class Walk(RuleBasedStateMachine):
        @initialize(start=st.sampled_from(STARTS))
        def begin(self, start: tuple[str, ...]) -> None:
            connection.execute("DROP TABLE IF EXISTS kb CASCADE; DROP SCHEMA IF EXISTS revector CASCADE")
            for (name,) in connection.execute("SELECT nspname FROM pg_namespace WHERE nspname ~ '^rv_'").fetchall():
                connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(name)))
            knowledge_base(connection, ROWS, filler=1500)  # four rows a page
            self.before = belongings(connection)
            self.key, self.turn = 1000, 0
            for command in start:
                getattr(self, command)(stop=None)

        def state(self) -> tuple[str, str | None]:
            if one(connection, "SELECT to_regclass('revector.migrations') IS NULL"):
                return "NONE", None
            row = connection.execute(
                "SELECT stage, closing FROM revector.migrations ORDER BY id DESC LIMIT 1"
            ).fetchone()
            return row or ("NONE", None)

        def open(self) -> bool:
            return self.state()[0] not in ("NONE", "ABORTED", "FINALIZED")

        def give(self, command: str, stop: str | None, call: Callable[[Any], object]) -> None:
            """A refusal must say what to do; anything else is a defect."""
            note(f"{self.state()} {command} stop={stop}")
            try:
                with steering(dsn, "kb", halting(stop) if stop else lambda _: None) as migration:
                    call(migration)
            except Halt:
                pass
            except RevectorError as error:
                assert error.hint, f"{command}: {error} says no next command"
                note(f"  {type(error).__name__}: {error}")

        stops = st.one_of(st.none(), st.none(), st.sampled_from(STOPS))

        @rule(stop=stops)
        def run(self, stop: str | None) -> None:
            # The table's own model now: finalize and restore make it the other one.
            column, model = next((c, m) for c, m in generations(connection).items() if c == "embedding")
            assert column
            if not self.open() and model == NEW:
                return self.restore(stop)
            return self.give("run", stop, lambda m: m.run(REQUEST))

        @rule(stop=stops)
        def cutover(self, stop: str | None) -> None:
            self.give("cutover", stop, lambda m: m.cutover(without_follower=True))

        @rule(stop=stops)
        def rollback(self, stop: str | None) -> None:
            self.give("rollback", stop, lambda m: m.rollback(without_follower=True))

        @rule(stop=stops)
        def expose(self, stop: str | None) -> None:
            self.give("expose", stop, lambda m: m.expose(without_follower=True))

        @rule()
        def unexpose(self) -> None:
            self.give("unexpose", None, lambda m: m.unexpose())

        @rule()
        def pause(self) -> None:
            if self.state()[0] not in ("EXPANDED", "PLANNED"):  # a paused run waits; nobody resumes it here
                self.give("pause", None, lambda m: m.pause())
            self.give("resume", None, lambda m: m.resume())

        @precondition(lambda self: self.open())
        @rule(stop=stops)
        def abort(self, stop: str | None) -> None:
            self.give("abort", stop, lambda m: m.abort())

        @precondition(lambda self: self.open())
        @rule(stop=stops)
        def finalize(self, stop: str | None) -> None:
            self.give("finalize", stop, lambda m: m.finalize(quiet_for=0))

        def restore(self, stop: str | None) -> None:
            self.give("restore", stop, lambda m: m.restore())

        @rule()
        def follow(self) -> None:
            if self.open() and self.state()[1] is None:
                fill(dsn, connection)

        @rule(view=st.booleans(), kind=st.integers(0, 7), row=st.integers(0, ROWS - 1), count=st.integers(1, 4))
        def write(self, view: bool, kind: int, row: int, count: int) -> None:
            """An application of the version that its search_path names, or of the bare name."""
            schemas = [n for (n,) in connection.execute("SELECT nspname FROM pg_namespace WHERE nspname ~ '^rv_'")]
            path = schemas[row % len(schemas)] if view and schemas else "public"
            guarded = self.state()[0] in ("SERVED", "CUT_OVER") and self.state()[1] is None
            with psycopg.connect(dsn, autocommit=True, options=f"-csearch_path={path},public") as client:
                model = _model(client)
                for _ in range(count):
                    self.turn += 1
                    self.key += 1
                    text = f"{body(self.turn)} in turn {self.turn}"
                    given, other = vector(model, text), vector(model, f"another {text}")
                    number = row
                    note(f"  write {kind} on {path} ({model}) row {row}")
                    if kind == 0:
                        client.execute("INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s)",
                                       (self.key, text, given))  # fmt: skip
                    elif kind == 1:
                        client.execute(
                            "UPDATE kb SET content = %s, embedding = %s WHERE id = %s", (text, given, number)
                        )
                    elif kind == 2:
                        client.execute("DELETE FROM kb WHERE id = %s", (self.key - 1,))
                    elif kind == 3:
                        client.execute("INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s) ON CONFLICT (id)"
                                       " DO UPDATE SET content = excluded.content, embedding = excluded.embedding",
                                       (number, text, given))  # fmt: skip
                    elif kind == 4:
                        client.execute("UPDATE kb SET note = %s WHERE id = %s", (text, number))
                    elif kind == 5 and guarded:
                        client.execute("UPDATE kb SET content = %s WHERE id = %s", (text, number))
                    elif kind == 6 and guarded:  # vector first, its text in a second statement
                        with client.transaction():
                            client.execute("UPDATE kb SET embedding = %s WHERE id = %s", (other, number))
                            client.execute("UPDATE kb SET content = %s WHERE id = %s", (text, number))
                    elif kind == 7 and guarded:
                        client.execute("UPDATE kb SET embedding = NULL WHERE id = %s", (number,))

        @invariant()
        def never_wrong(self) -> None:
            assert_never_wrong(connection)
            stage, closing = self.state()
            seen.add(stage)
            if stage in ("SERVED", "CUT_OVER") and closing is None:
                fill(dsn, connection)
                assert_rests(connection, at_least=1)
            if stage in ("ABORTED", "FINALIZED"):
                self.ended()

        def ended(self) -> None:
            for (name,) in connection.execute("SELECT nspname FROM pg_namespace WHERE nspname ~ '^rv_'").fetchall():
                assert name  # exposed after the end: the live generation's view alone
                with steering(dsn) as migration:
                    migration.unexpose()
                break
            assert_ended(connection, generations(connection)["embedding"], before=self.before)

        def teardown(self) -> None:
            if not hasattr(self, "key"):
                return
            stage, closing = self.state()
            if stage in ("NONE", "ABORTED", "FINALIZED"):
                return
            with steering(dsn) as migration:
                if closing == "finalize":
                    migration.finalize(quiet_for=0)
                elif closing == "abort" or stage != "CUT_OVER":
                    migration.abort()
                else:
                    migration.rollback(without_follower=True)
            if stage == "CUT_OVER" and closing is None:
                with steering(dsn) as migration:
                    migration.abort()
            assert stage_of(connection)[0] in ("ABORTED", "FINALIZED")
            self.ended()

    return Walk


def _model(client: psycopg.Connection[Any]) -> str:
    """The model of what the name `kb` shows to this session, by its type."""
    return {16: OLD, 32: NEW}[one(client, "SELECT atttypmod FROM pg_attribute WHERE attrelid = 'kb'::regclass"
                                  " AND attname = 'embedding'")]  # fmt: skip


def walk(dsn: str, connection: psycopg.Connection[Any], examples: int, steps: int) -> None:
    print(f"REVECTOR_SEED={SEED}")
    chosen = settings(max_examples=examples, stateful_step_count=steps, deadline=None, database=None,
                      suppress_health_check=list(HealthCheck), print_blob=True)  # fmt: skip
    seen: set[str] = set()
    run_state_machine_as_test(seeded(SEED)(machine(connection, dsn, seen)), settings=chosen)
    assert seen >= {"VERIFIED", "SERVED", "CUT_OVER"}, f"these walks came no further than {seen}"


@pytest.fixture(autouse=True)
def _small_and_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """One page is a window, so that an end at `backfill.window` leaves a backfill that is not done."""
    monkeypatch.setattr(backfill, "_WINDOW_BLOCKS", (1, 512))
    monkeypatch.setattr(backfill, "_WINDOW_ROWS", 4)
    monkeypatch.setattr(verify, "LOOK_AGAIN", 0.2)


@pytest.mark.roads
def test_walk(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Commands, ends of the process and writes in any order leave no vector wrong, and the table can always be closed."""
    walk(dsn, connection, 25, 15)


@pytest.mark.roads
@pytest.mark.slow
def test_long_walk(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The same, for a hundred longer walks."""
    walk(dsn, connection, 100, 30)
