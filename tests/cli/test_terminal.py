"""What goes to stderr: plain lines at sensible intervals off a terminal, one bar on it, and never an error of its own."""

from __future__ import annotations

import io
import os
import pty
from collections.abc import Iterator

import pytest

from revector.terminal import Meter, Terminal
from revector.work import Effect, Health, Note, Phase, Progress, Recorded


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_off_a_terminal_a_phase_has_a_line_every_ten_seconds(clock: Clock) -> None:
    out = io.StringIO()
    with Terminal(stream=out, now=clock) as terminal:
        terminal(Phase(4, 6, "backfill"))
        for second in range(26):
            clock.now = float(second)
            terminal(Progress("backfill", second * 100, 5000, "rows"))
        terminal(Note("2,500 rows embedded"))
        terminal(Phase(5, 6, "index"))
        terminal(Progress("index: building index: loading tuples", 1, 9, "blocks"))
    assert out.getvalue().splitlines() == [
        "[4/6] backfill",
        "      1,000 of 5,000 rows, 100/s, 0:40 left",
        "      2,000 of 5,000 rows, 100/s, 0:30 left",
        "      2,500 rows embedded",
        "[5/6] index",
    ]


def test_following_for_days_says_little(clock: Clock) -> None:
    out = io.StringIO()
    with Terminal(stream=out, now=clock) as terminal:
        for second in range(0, 130, 5):
            clock.now = float(second)
            terminal(Progress("follow", second, second, "rows filled"))
        terminal(Health("trouble", 120, 3, 44.4, 1, "the model is out"))
    assert out.getvalue() == (
        "  health: trouble: the model is out; 120 rows filled, 3 pending, oldest 44 s, 1 texts refused\n"
    )


def test_steps_are_shown_when_asked_for() -> None:
    for verbose, told in ((False, ""), (True, "  recorded: expand (hold_ms 1.5)\n")):
        out = io.StringIO()
        with Terminal(stream=out, verbose=verbose) as terminal:
            terminal(Effect("expand"))
            terminal(Recorded("expand", {"hold_ms": 1.5}))
        assert out.getvalue() == told


@pytest.mark.parametrize(
    ("statement", "lines"),
    [
        ("SELECT 1", []),
        ("SET lock_timeout = 0", []),
        ("INSERT INTO revector.events (step) VALUES ('x')", []),
        ("UPDATE revector.heartbeats SET at = now()", []),
        ('ALTER TABLE "kb" ADD COLUMN x int', ['  | ALTER TABLE "kb" ADD COLUMN x int']),
        ("UPDATE kb SET v = '" + "1," * 200 + "'", ["  | UPDATE kb SET v = '...'"]),
        (
            "BEGIN;\nSELECT clock_timestamp();\nSELECT set_config('statement_timeout', '1', true);\nLOCK TABLE kb;\nCOMMIT",
            ["  | BEGIN;", "  | LOCK TABLE kb;", "  | COMMIT"],
        ),
    ],
)
def test_only_statements_that_change_something_are_shown(statement: str, lines: list[str]) -> None:
    out = io.StringIO()
    with Terminal(stream=out, verbose=True) as terminal:
        terminal.statement(statement)
        terminal.statement(statement)  # once is enough
    assert out.getvalue().splitlines() == lines


def test_the_meter_counts_down() -> None:
    meter = Meter("rows")
    assert meter.told(0.0) == "0 rows"
    meter.add(0, 1000, 0.0)
    assert meter.told(5.0) == "0 of 1,000 rows"
    meter.add(100, 1000, 10.0)
    assert meter.told(10.0) == "100 of 1,000 rows, 10/s, 1:30 left"
    assert meter.told(40.0) == "100 of 1,000 rows, 10/s, 1:00 left"
    meter.add(1000, 1000, 100.0)
    assert meter.told(100.0) == "1,000 rows"


def test_a_meter_remembers_the_last_two_minutes() -> None:
    """A slow beginning does not darken the rest."""
    meter = Meter("rows")
    meter.add(0, 10**6, 0.0)
    for second in range(1000, 1300):
        meter.add((second - 1000) * 50, 10**6, float(second))
    assert meter.rate is not None and 49 < meter.rate < 51


def test_a_stream_that_nobody_reads_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out, Terminal(stream=out) as terminal:
        for _ in range(3):
            terminal(Note("x"))


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[io.TextIOWrapper, int]]:
    """A terminal of 60 columns, and the other end of it."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as out:
        yield out, ours
    os.close(ours)


def test_on_a_terminal_notes_are_wrapped_and_the_bar_is_taken_away(screen: tuple[io.TextIOWrapper, int]) -> None:
    out, ours = screen
    with Terminal(stream=out) as terminal:
        terminal(Phase(4, 6, "backfill"))
        terminal(Progress("backfill", 0, 100, "rows"))
        terminal(Progress("backfill", 50, 100, "rows"))
        terminal(Note("word " * 20))
        terminal(Phase(5, 6, "index"))
    text = os.read(ours, 100_000).decode()
    assert "[4/6] backfill" in text and "50 of 100 rows" in text
    assert "      word word" in text and "\r\n        word word" in text
    hidden, shown = text.rfind("\x1b[?25l"), text.rfind("\x1b[?25h")
    assert 0 <= hidden < shown, "the cursor is given back"
