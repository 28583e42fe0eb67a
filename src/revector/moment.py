"""When something may happen: points in time and spans as they are typed, and waiting for the moment of a swap."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from revector.errors import UsageError

#: Seconds between two looks while waiting, and the first and the longest gap between two remarks about it.
_LOOK: Final = 0.2
_REMARKS: Final = (60.0, 1800.0)
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Moment:
    """When a swap may happen: not before `at`, and not before `file` exists. Neither: at once."""

    #: With its time zone.
    at: datetime | None = None
    file: Path | None = None

    @property
    def now(self) -> bool:
        """Whether nothing is waited for."""
        return self.at is None and self.file is None

    def missing(self, now: datetime) -> str:
        """What is still waited for, in words; empty when the moment has come."""
        if self.at is not None and now < self.at:
            return f"{self.at.astimezone():%Y-%m-%d %H:%M:%S %Z}"
        if self.file is not None and not self.file.exists():
            return f"the file {self.file}"
        return ""


AT_ONCE: Final = Moment()


def parse_time(text: str, now: datetime) -> datetime:
    """An ISO time, or HH:MM of today, in local time unless it names a zone; raises `UsageError`, also for the past."""
    hint = "for example --at 03:00, or --at 2031-01-31T03:00, or with a zone --at 2031-01-31T03:00+01:00"
    short = re.fullmatch(r"(\d{1,2}):(\d{2})", text.strip())
    try:
        if short:
            local = now.astimezone()
            at = local.replace(tzinfo=None, hour=int(short[1]), minute=int(short[2]), second=0, microsecond=0)
        else:
            at = datetime.fromisoformat(text.strip())
        at = at.astimezone()
    except (ValueError, OverflowError):
        raise UsageError(f"--at {text} is not a time", hint=hint) from None
    if at <= now:
        later = f"--at {(at + timedelta(days=1)):%Y-%m-%dT%H:%M}" if short else "leave --at out to do it now"
        raise UsageError(
            f"--at {text} is past: it is {now.astimezone():%Y-%m-%d %H:%M:%S %Z} here",
            why="Nothing was changed.",
            hint=f"for tomorrow: {later}" if short else later,
        )
    return at


def parse_span(text: str, option: str) -> float:
    """Seconds of `0`, `30s`, `10m`, `1h` or `2d`; raises `UsageError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match:
        return float(match[1]) * _UNITS[match[2]]
    if text.strip() == "0":
        return 0.0
    raise UsageError(f"{option} {text} is not a span of time", hint=f"{option} 0, 30s, 10m, 1h or 2d")


def wait(
    moment: Moment,
    *,
    meanwhile: Callable[[], None],
    tell: Callable[[str], None],
    clock: Callable[[], datetime] = lambda: datetime.now().astimezone(),
) -> float:
    """Wait for the moment; returns the seconds waited.

    `meanwhile` is called at every look, holds no lock when it returns, and raises to end the waiting.
    """
    began = told = time.monotonic()
    gap, last = _REMARKS[0], ""
    while missing := moment.missing(clock()):
        if missing != last:
            tell(f"waiting for {missing}; Ctrl-C leaves everything as it is")
            last, told, gap = missing, time.monotonic(), _REMARKS[0]
        elif time.monotonic() - told > gap:
            tell(f"still waiting for {missing}")
            told, gap = time.monotonic(), min(2 * gap, _REMARKS[1])
        meanwhile()
        time.sleep(_LOOK)
    return time.monotonic() - began
