"""Observations -> stderr: progress bars on a terminal, plain lines elsewhere. stdout is left to the answers."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TextIO

from revector.report import clock, figure
from revector.work import Effect, Health, Note, Observation, Phase, Progress, Recorded

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

#: Seconds between two lines about one phase, off a terminal; a follower's health line speaks for itself.
_EVERY: Final = 10.0
#: Seconds of the past that the rate is taken from.
_MEMORY: Final = 120.0
#: Statements that change something; the rest only look.
_CHANGES: Final = re.compile(
    r"\s*(CREATE|ALTER|DROP|INSERT|UPDATE|DELETE|TRUNCATE|COMMENT|GRANT|REVOKE|ANALYZE|COPY|DO|LOCK|WITH|BEGIN|SAVEPOINT)\b",
    re.IGNORECASE,
)
#: The ledger's own rows: what they record is told already, and heartbeats would drown everything else.
_LEDGER: Final = re.compile(r"\s*(INSERT INTO|UPDATE|DELETE FROM) revector\.", re.IGNORECASE)
#: Clocks and limits inside a message.
_SETTING: Final = re.compile(r"\s*SELECT (clock_timestamp|set_config)\(")
_LITERAL: Final = re.compile(r"'(?:[^']|'')*'")
_LONG: Final = 160


class Meter:
    """How far, how fast, how long still."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.done = 0
        self.total = 0
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, done: int, total: int, now: float) -> None:
        """So much is done at this moment."""
        self.done, self.total = done, total
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _MEMORY:
            self._seen.popleft()

    @property
    def rate(self) -> float | None:
        """Units a second of late; None: too early to tell."""
        if len(self._seen) < 2:
            return None
        (began, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - began) if now > began and last > first else None

    def left(self, now: float) -> float | None:
        """Seconds left, counted down from the last observation."""
        if self.rate is None or self.done >= self.total:
            return None
        return max(0.0, (self.total - self.done) / self.rate - (now - self._seen[-1][0]))

    def told(self, now: float) -> str:
        """`4,000 of 20,000 rows, 812/s, 0:20 left`."""
        parts = [
            f"{self.done:,} {self.unit}" if self.total <= self.done else f"{self.done:,} of {self.total:,} {self.unit}"
        ]
        if self.rate is not None and self.total > self.done:
            parts.append(f"{self.rate:,.0f}/s" if self.rate >= 10 else f"{self.rate:.1f}/s")
        if (left := self.left(now)) is not None:
            parts.append(f"{clock(left)} left")
        return ", ".join(parts)


class Terminal:
    """The observer of the command line. Use it as a context manager; it is safe to call from any thread."""

    def __init__(
        self, *, verbose: bool = False, stream: TextIO | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.verbose = verbose
        self._stream = stream or sys.stderr
        self._now = now
        self._lock = threading.RLock()
        self._phase = ""
        self._meter: Meter | None = None
        self._meter_of = ""
        self._told = 0.0
        self._statements: set[str] = set()
        self._console: Console | None = _console(self._stream) if self._stream.isatty() else None
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._handler: _Statements | None = None
        self._ailing = False

    def __enter__(self) -> Terminal:
        if self.verbose:
            self._handler = _Statements(self)
            log = logging.getLogger("revector.sql")
            log.addHandler(self._handler)
            log.setLevel(logging.DEBUG)
            log.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()
        if self._handler is not None:
            logging.getLogger("revector.sql").removeHandler(self._handler)
            logging.getLogger("revector.sql").setLevel(logging.NOTSET)

    def __call__(self, seen: Observation) -> None:
        """Show one observation."""
        with self._lock:
            if isinstance(seen, Phase):
                self.rest()
                self._phase = seen.name
                self._statements.clear()
                self._line(f"[{seen.number}/{seen.total}] {seen.name}", bold=True)
            elif isinstance(seen, Progress):
                self._progress(seen)
            elif isinstance(seen, Note):
                self.note(seen.text)
            elif isinstance(seen, Recorded) and self.verbose:
                self.note(f"recorded: {seen.step}{_figures(seen.figures)}")
            elif isinstance(seen, Health):
                # On a terminal the line of progress says how it goes, and a remark what is wrong.
                if self._console is None or seen.state != "active" or self._ailing:
                    self.note(health(seen))
                self._ailing = seen.state == "trouble"
            elif isinstance(seen, Effect):
                pass  # its `Recorded` follows

    def note(self, text: str) -> None:
        """One remark, below the phase that it belongs to."""
        indent = "      " if self._phase else "  "
        with self._lock:
            for paragraph in text.splitlines():
                self._line(_wrapped(paragraph, indent, self._width()))

    def say(self, text: str, *, alarming: str = "") -> None:
        """Print an answer on stdout, with no bar in its way; lines that begin with `alarming` are red on a terminal."""
        with self._lock:
            self.rest()
            if alarming and sys.stdout.isatty() and "NO_COLOR" not in os.environ:
                lines = text.splitlines()
                text = "\n".join(f"\x1b[31m{line}\x1b[0m" if line.startswith(alarming) else line for line in lines)
            write(sys.stdout, text + "\n")

    def statement(self, text: str) -> None:
        """A statement that was sent, unless it only looks, or stands here already."""
        if not _CHANGES.match(text) or _LEDGER.match(text):
            return
        # A long literal of one line is data; of several lines it is the body of a function.
        text = _LITERAL.sub(lambda m: m[0] if len(m[0]) < _LONG or "\n" in m[0] else "'...'", text)
        key = re.sub(r"\d+", "0", text)
        with self._lock:
            if key in self._statements:
                return
            self._statements.add(key)
            indent = "      " if self._phase else "  "
            for line in text.splitlines():
                if line.strip() and not _SETTING.match(line):
                    self._line(f"{indent}| {line.rstrip()}")

    def rest(self) -> None:
        """Take the bar away; the next progress makes a new one."""
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = self._task = None
            self._meter = None

    def _progress(self, seen: Progress) -> None:
        now = self._now()
        if self._meter is None or (self._console is not None and self._bars is None) or self._meter_of != seen.phase:
            self.rest()
            self._meter, self._meter_of, self._told = Meter(seen.unit), seen.phase, now
        assert self._meter is not None
        self._meter.add(seen.done, seen.total, now)
        if self._console is not None:
            self._draw(seen, self._meter)
            return
        if now - self._told >= _EVERY and seen.phase != "follow":
            self._told = now
            name = self._named(seen)
            self.note(f"{name}: {self._meter.told(now)}" if name else self._meter.told(now))

    def _draw(self, seen: Progress, meter: Meter) -> None:
        if self._bars is None:
            self._bars = _bars(self._console, lambda: meter.told(self._now()), endless=seen.total <= seen.done)
            name = self._named(seen)
            # The columns stand one blank apart.
            self._task = self._bars.add_task(f"      {name}" if name else "     ", total=max(seen.total, 1))
            self._bars.start()
        assert self._task is not None
        self._bars.update(self._task, completed=seen.done, total=max(seen.total, 1))

    def _named(self, seen: Progress) -> str:
        """What is going on, without the phase that stands above it: `index: building index: loading tuples` is long."""
        name = seen.phase.rsplit(": ", 1)[-1]
        return "" if name == self._phase else name

    def _line(self, text: str, *, bold: bool = False) -> None:
        if self._console is None:
            write(self._stream, text + "\n")
            return
        try:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True, style="bold" if bold else None)
        except OSError:
            self._console.quiet = True

    def _width(self) -> int:
        """Columns to wrap at; None of a file's business, where one remark stays one line."""
        return shutil.get_terminal_size().columns if self._console is not None else 0


def health(now: Health) -> str:
    """One line for a log: `health: active; 12,345 rows filled, 0 pending, oldest 0 s, 0 texts refused`."""
    parts = [f"{now.filled:,} rows filled"]
    if now.pending is not None:
        parts += [f"{now.pending:,} pending", f"oldest {now.oldest:.0f} s", f"{now.refused:,} texts refused"]
    why = f": {now.why}" if now.why else ""
    return f"health: {now.state}{why}; {', '.join(parts)}"


class _Statements(logging.Handler):
    """Hands the statements that `db.py` logs to the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self.terminal.statement(record.getMessage())


def write(stream: TextIO, text: str) -> None:
    """Write; a reader that has gone away (`| head`) is no reason to stop."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        silence(stream)


def silence(stream: TextIO) -> None:
    """Nobody reads this stream any more: what is still written to it vanishes, also at exit."""
    with open(os.devnull, "w", encoding="utf-8") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), stream.fileno())


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream)


def _bars(console: Console | None, told: Callable[[], str], *, endless: bool) -> Bars:
    from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column
    from rich.text import Text

    class Told(ProgressColumn):
        """The meter's words, made anew with each frame, so that the time left counts down."""

        def render(self, task: Task) -> Text:
            return Text(told())

    shape: tuple[ProgressColumn, ...] = (SpinnerColumn(),) if endless else (BarColumn(bar_width=18),)
    return RichProgress(
        TextColumn("{task.description}", markup=False), *shape, Told(Column(no_wrap=True)), console=console, transient=True,
        redirect_stdout=False, redirect_stderr=False, refresh_per_second=4,
    )  # fmt: skip


def _wrapped(text: str, indent: str, width: int) -> str:
    if not width or len(indent) + len(text) <= width:
        return indent + text
    return textwrap.fill(
        text,
        max(width, 40),
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _figures(figures: Mapping[str, Any]) -> str:
    told = ", ".join(f"{name} {figure(value)}" for name, value in figures.items())
    return f" ({told})" if told else ""
