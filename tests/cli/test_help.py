"""The help: in the order of the work, complete, current in the docs, told without loading anything heavy.

`python tests/cli/test_help.py` writes `docs/reference/commands.md` anew.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from fix_commands import command, environment
from revector import cli

PAGE = Path(__file__).parents[2] / "docs/reference/commands.md"
ORDER = {
    "Start": ["demo", "schema", "init", "load"],
    "Forward": ["plan", "run", "follow", "expose", "cutover", "finalize"],
    "Back": ["abort", "rollback", "restore"],
    "Look": ["status", "events", "search"],
    "Remove": ["uninstall"],
}
COMMANDS = [name for names in ORDER.values() for name in names]


def help_of(name: str = "") -> str:
    group: Any = typer.main.get_command(cli.app)
    with group.make_context("revector", [], resilient_parsing=True) as outer:
        if not name:
            return str(group.get_help(outer))
        found = group.commands[name]
        with found.make_context(name, [], parent=outer, resilient_parsing=True) as context:
            return str(found.get_help(context))


def page() -> str:
    parts = [
        "# Commands\n\nEvery command's `--help`, in the order of the work. Stages and exit codes: [status](status.md)."
    ]
    parts += [f"## revector {name}".rstrip() + f"\n\n```text\n{help_of(name)}\n```" for name in ["", *COMMANDS]]
    return "\n\n".join(parts) + "\n"


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/cli/test_help.py"


def test_commands_stand_in_the_order_of_the_work() -> None:
    text = help_of()
    for title, names in ORDER.items():
        panel = text.split(f"\n{title}\n")[1].split("\n\n")[0]
        assert [line.split()[0] for line in panel.splitlines() if re.match(r"  \S", line)] == names
    assert [text.index(f"\n{title}\n") for title in ORDER] == sorted(text.index(f"\n{title}\n") for title in ORDER)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_it_does_what_it_changes_and_how(name: str) -> None:
    text = help_of(name)
    first, changes, example = text.split("\n\n")[1:4]
    assert "\n" not in first and first.endswith(".")
    assert changes.startswith(("Changes: ", "Changes nothing"))
    assert example.startswith(f"Example:\n  revector {name}")
    assert all(len(line) <= 80 for line in text.replace(example, "").splitlines())
    words = shlex.split(example.splitlines()[1].split(" |")[0])[1:]
    group: Any = typer.main.get_command(cli.app)
    group.commands[name].make_context(name, words[1:])  # it can be given as it stands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    group: Any = typer.main.get_command(cli.app)
    assert [p.name for p in group.commands[name].params if not getattr(p, "help", None)] == []


def test_the_defaults_that_the_help_tells_are_the_ones_that_hold() -> None:
    from revector.plan import DEFAULT_BATCH, DEFAULT_LISTS, HNSW_DEFAULTS
    from revector.settings import DEFAULT_MODEL

    text = " ".join(help_of("run").split())
    m, ef = dict(HNSW_DEFAULTS).values()
    assert f"--batch-size N Most texts in one encoder call. Default: {DEFAULT_BATCH}." in text
    for told in (f"Default: {m}, or", f"Default: {ef}, or", f"Default: {DEFAULT_LISTS}, or"):
        assert told in text
    assert f"absent: {DEFAULT_MODEL}" in help_of()
    group: Any = typer.main.get_command(cli.app)
    for one in group.commands.values():
        for option in one.params:
            told = re.search(r"Default: (\S+)\.$", str(getattr(option, "help", "")))
            if told and option.default not in (None, ()):
                assert str(option.default) == told[1], f"{one.name} {option.name}"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom revector import cli\nsys.argv = ['revector', *sys.argv[1:]]\n"
        "try: cli.main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'numpy', 'scipy', 'psycopg', 'torch', 'pydantic_settings', 'openai'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    for arguments in (["--help"], ["run", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment(None), check=True
        )
        assert done.stdout.endswith("HEAVY []\n")


def test_alone_it_prints_its_help() -> None:
    alone = command(None)
    assert (alone.code, alone.out, alone.err) == (0, help_of() + "\n", "")
    assert command(None, "cutover", "-h").out == help_of("cutover") + "\n"


@pytest.fixture
def _our_process() -> Iterator[None]:
    """What the program takes over in a process is given back."""
    hook, handlers = threading.excepthook, [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
    yield
    threading.excepthook = hook
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.mark.usefixtures("_our_process")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nonsense"], "error: No such command 'nonsense'.\n  next: revector --help\n"),
        (["cutover"], "error: Missing argument 'TABLE'.\n  next: revector cutover --help\n"),
        (
            ["run", "kb", "--follow"],
            "error: --follow: only with --cutover\n  next: add --cutover, or leave it to the command cutover\n",
        ),
        (
            ["cutover", "kb", "--follow", "--without-follower"],
            "error: --follow and --without-follower contradict each other\n  next: give one of them\n",
        ),
        (
            ["plan", "kb", "--lists", "7"],
            "error: --lists is for IVFFlat, and the new index would be HNSW\n"
            "  next: add --index ivfflat, or --index same\n",
        ),
        (
            ["plan", "kb", "--index", "ivfflat", "--m", "7"],
            "error: --m and --ef-construction are for HNSW, not for --index ivfflat\n  next: leave them out\n",
        ),
        (
            ["plan", "kb", "--m", "40", "--ef-construction", "64"],
            "error: --ef-construction 64 is less than twice --m 40\n  pgvector refuses such an HNSW index.\n"
            "  next: --ef-construction 80, or a smaller --m\n",
        ),
    ],
)  # fmt: skip
def test_wrong_usage_exits_2_and_says_what_next(
    arguments: list[str], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli._main(arguments) == 2
    assert capfd.readouterr().err == told


@pytest.mark.usefixtures("_our_process")
@pytest.mark.parametrize("arguments", [["run", "kb", "--batch-size", "0"], ["run", "kb", "--m", "1"], ["search", "kb"]])
def test_values_out_of_range_exit_2(arguments: list[str]) -> None:
    assert cli._main(arguments) == 2


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
