"""The command line as a user has it: a process of its own, its two streams and its exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import revector

#: Processes that the present test has started and not yet seen the end of.
STARTED: list[subprocess.Popen[str]] = []
PROGRAM = [sys.executable, "-m", "revector.cli"]


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be JSON and nothing else."""
        return json.loads(self.out)

    def exits(self, code: int) -> Self:
        assert self.code == code, f"exit code {self.code}, not {code}\n{self.out}\n{self.err}"
        return self

    @property
    def last(self) -> str:
        """The error at the end of stderr, from its label on."""
        starts = [n for n, line in enumerate(self.err.splitlines()) if line.split(":")[0] in LABELS]
        return "\n".join(self.err.splitlines()[starts[-1] :]) if starts else ""


LABELS = ("refused", "error", "stopped", "failed", "defect")


def environment(dsn: str | None, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The test's own, with this database, and the package that is being tested."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("COLUMNS", "PYTHONWARNINGS"))}
    package = str(Path(revector.__file__).parents[1])
    own["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [own.get("PYTHONPATH")])])
    own["TMPDIR"] = str(Path.cwd())  # the details of a defect go with the test's folder
    return own | ({"DATABASE_URL": dsn} if dsn else {}) | dict(more or {})


def command(dsn: str | None, *arguments: str, env: Mapping[str, str] | None = None) -> Answer:
    """Run one command to its end."""
    done = subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, env=environment(dsn, env), timeout=120, check=False
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def started(dsn: str, *arguments: str, code: str = "") -> subprocess.Popen[str]:
    """Start a command that will be interrupted; `code` runs before it."""
    program = [sys.executable, "-c", _script(code, arguments)] if code else [*PROGRAM, *arguments]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(dsn))
    STARTED.append(process)
    return process


def ended(process: subprocess.Popen[str], *signals: signal.Signals, seconds: float = 30) -> Answer:
    """Send the signals, and wait for the end."""
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    out, err = process.communicate(timeout=seconds)
    STARTED.remove(process)
    return Answer(process.returncode, out, err)


def in_process(code: str, dsn: str | None, *arguments: str, env: Mapping[str, str] | None = None) -> Answer:
    """Run the program after `code`, which may put a defect into it."""
    done = subprocess.run(
        [sys.executable, "-c", _script(code, arguments)],
        capture_output=True,
        text=True,
        env=environment(dsn, env),
        timeout=60,
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def _script(code: str, arguments: Sequence[str]) -> str:
    return f"import sys\n{code}\nfrom revector import cli\nsys.argv = ['revector', *{list(arguments)!r}]\ncli.main()\n"


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)
