"""Points in time and spans as people type them, and waiting for a moment."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from revector.db import PauseLimits
from revector.errors import UsageError
from revector.moment import AT_ONCE, Moment, parse_span, parse_time, wait

NOW = datetime(2031, 1, 31, 14, 30).astimezone()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("15:00", NOW.replace(hour=15, minute=0)),
        ("2031-02-01T03:00", datetime(2031, 2, 1, 3).astimezone()),
        ("2031-02-01 03:00:30", datetime(2031, 2, 1, 3, 0, 30).astimezone()),
        ("2031-02-01T03:00+05:00", datetime.fromisoformat("2031-02-01T03:00+05:00")),
        ("2031-02-01T03:00Z", datetime.fromisoformat("2031-02-01T03:00+00:00")),
    ],
)
def test_times(text: str, expected: datetime) -> None:
    assert parse_time(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "noon", "25:00", "14:61", "2031-13-01", "tomorrow 03:00"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match="is not a time") as caught:
        parse_time(text, NOW)
    assert "--at 03:00" in caught.value.hint


def test_the_past_is_refused_with_tomorrow() -> None:
    with pytest.raises(UsageError, match=r"--at 03:00 is past: it is 2031-01-31 14:30:00") as caught:
        parse_time("03:00", NOW)
    assert caught.value.hint == "for tomorrow: --at 2031-02-01T03:00"
    with pytest.raises(UsageError, match="is past"):
        parse_time("2031-01-31T14:30", NOW)


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("30s", 30), ("10m", 600), ("1h", 3600), ("1.5h", 5400), ("2d", 172800)]
)
def test_spans(text: str, seconds: float) -> None:
    assert parse_span(text, "--quiet-for") == seconds


@pytest.mark.parametrize("text", ["", "1", "h", "-1h", "1 h", "1w"])
def test_what_is_no_span(text: str) -> None:
    with pytest.raises(UsageError, match="--quiet-for"):
        parse_span(text, "--quiet-for")


def test_both_conditions_are_waited_for(tmp_path: Path) -> None:
    """First the time, then the file; it is told what is waited for, and `meanwhile` may end it."""
    told: list[str] = []
    clock = [NOW]
    file = tmp_path / "go"

    def meanwhile() -> None:
        clock[0] += timedelta(seconds=30)
        if clock[0] > NOW + timedelta(seconds=90):
            file.touch()

    wait(Moment(NOW + timedelta(seconds=60), file), meanwhile=meanwhile, tell=told.append, clock=lambda: clock[0])
    assert len(told) == 2 and told[0].startswith("waiting for 2031-01-31 14:31:00")
    assert told[1] == f"waiting for the file {file}; Ctrl-C leaves everything as it is"

    def leave() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wait(Moment(file=tmp_path / "never"), meanwhile=leave, tell=told.append)
    assert AT_ONCE.now and wait(AT_ONCE, meanwhile=leave, tell=told.append) < 1


@pytest.mark.parametrize(("budget", "attempts"), [(9, 5), (10_001, 5), (200, 0), (200, 101)])
def test_limits_have_a_range(budget: int, attempts: int) -> None:
    with pytest.raises(UsageError, match="it must be"):
        PauseLimits(budget, attempts)
