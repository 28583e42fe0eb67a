"""The documentation is held to the code: links, commands, options, stages, schemas, and the SQL of the last resort.

`python tests/unit/test_docs.py` writes anew what is generated in `docs/reference/status.md`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

import revector.errors
from revector import Embedder
from revector.ledger import NEXT, TRANSITIONS, Stage

ROOT = Path(__file__).parents[2]
STATUS = ROOT / "docs/reference/status.md"
GUIDE = ROOT / "docs/how-to/upgrade.md"
EXAMPLES = ROOT / "examples/knowledge-base"
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
#: Options of other programs that our pages name.
FOREIGN = {"--local-dir", "--schema-only", "--table", "--format", "--extra-index-url", "--test-dsn"}
#: A command of the old script, never ours.
OLD_SCRIPT = "python upgrade.py"

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]\n]+\]\(([^)\s]+)\)")
_OURS = re.compile(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*revector(?: |$)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def commands_of(page: Path) -> Iterator[str]:
    """What a reader would type: inline code that begins with `revector`, and such lines of fenced blocks."""
    text = page.read_text(encoding="utf-8")
    for block in _FENCE.finditer(text):
        lines = block["body"].replace("\\\n", " ").splitlines()
        yield from (line.strip() for line in lines if _OURS.match(line.strip()))
    yield from (line.strip() for line in re.findall(r"^    \S.*$", prose(page), re.MULTILINE) if _OURS.match(line.strip()))
    yield from (span for span in _SPAN.findall(prose(page)) if _OURS.match(span))


# -- what the command line knows ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """Command -> its options, by introspection; "" stands for the program itself."""
    import typer

    from revector import cli

    group: Any = typer.main.get_command(cli.app)

    def of(command: Any) -> set[str]:
        flags = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")}
        return flags | {"--help"}

    return {"": of(group), **{known: of(command) for known, command in group.commands.items()}}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_and_option_that_a_page_names_exists(page: Path, options: dict[str, set[str]]) -> None:
    wrong = []
    for line in commands_of(page):
        words = re.sub(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*revector ?", "", line.split(" #")[0]).split()
        command = words[0] if words and not words[0].startswith("-") else ""
        if command not in options:
            wrong.append(f"{line}: no command {command!r}")
            continue
        for word in words:
            flag = word.split("=")[0].rstrip(".,;:)")
            if flag.startswith("-") and flag not in options[command]:
                wrong.append(f"{line}: {command or 'revector'} has no option {flag}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_option_named_alone_belongs_to_some_command(page: Path, options: dict[str, set[str]]) -> None:
    known = set().union(*options.values()) | FOREIGN
    named = {span.split()[0].split("=")[0] for span in _SPAN.findall(prose(page)) if span.startswith("--")}
    assert named - known == set()


# -- links -------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_internal_links_resolve(page: Path) -> None:
    broken = []
    for link in _LINK.findall(prose(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs/README.md"
    linked = {(index.parent / link.split("#")[0]).resolve() for link in _LINK.findall(index.read_text(encoding="utf-8"))}
    assert {p for p in PAGES if p.is_relative_to(ROOT / "docs") and p != index} - linked == set()


# -- stages ------------------------------------------------------------------------------------------------------------


def diagram() -> str:
    """The stages as a diagram, from TRANSITIONS."""
    forward = [stage for stage in Stage if stage not in (Stage.FINALIZED, Stage.ABORTED)]
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {forward[0]}: run"]
    for stage, following in zip(forward, forward[1:], strict=False):
        command = next(c for c in ("run", "cutover") if stage in TRANSITIONS[c] and (c != "run" or stage.running))
        lines.append(f"    {stage} --> {following}: {command}")
    for command, end in (("rollback", Stage.SERVED), ("finalize", Stage.FINALIZED), ("abort", Stage.ABORTED)):
        lines += [f"    {stage} --> {end}: {command}" for stage in TRANSITIONS[command]]
    lines += [f"    {stage} --> [*]" for stage in Stage if stage.closed]
    return "\n".join([*lines, "```"])


def transitions() -> str:
    """Stage by command, from TRANSITIONS and NEXT."""
    lines = ["| stage | " + " | ".join(TRANSITIONS) + " | the command that leads on |"]
    lines.append("|---" * (len(TRANSITIONS) + 2) + "|")
    for stage in Stage:
        cells = ["yes" if stage in stages else "" for stages in TRANSITIONS.values()]
        lines.append(f"| {stage} | " + " | ".join(cells) + f" | `{NEXT[stage]}` |")
    return "\n".join(lines)


def generated(text: str) -> str:
    """`text` with its generated parts made anew."""
    for part, made in (("diagram", diagram()), ("transitions", transitions())):
        text, count = re.subn(
            rf"(<!-- generated: {part} -->\n).*?(<!-- end -->)", lambda m, made=made: m[1] + made + "\n" + m[2], text, flags=re.DOTALL
        )
        assert count == 1, part
    return text


def test_diagram_and_table_of_stages_are_current() -> None:
    text = STATUS.read_text(encoding="utf-8")
    assert text == generated(text), "run: python tests/unit/test_docs.py"


def test_every_stage_is_explained() -> None:
    text = STATUS.read_text(encoding="utf-8")
    assert [stage for stage in Stage if f"| {stage} | " not in text] == []


# -- errors ------------------------------------------------------------------------------------------------------------


def error_classes() -> list[type[revector.errors.RevectorError]]:
    return [
        found
        for _, found in inspect.getmembers(revector.errors, inspect.isclass)
        if issubclass(found, revector.errors.RevectorError)
    ]


@pytest.mark.parametrize("error", error_classes(), ids=lambda e: e.__name__)
def test_every_error_class_has_a_docstring_of_its_own(error: type) -> None:
    assert (error.__dict__.get("__doc__") or "").strip().endswith(".")


def test_the_page_lists_every_error_under_its_exit_code() -> None:
    rows = dict(re.findall(r"^\| (\d+) \|.*\|([^|\n]*)\|$", STATUS.read_text(encoding="utf-8"), re.MULTILINE))
    told = {error: int(code) for code, cell in rows.items() for error in _SPAN.findall(cell)}
    assert told == {error.__name__: error.exit_code for error in error_classes()}


# -- the examples ------------------------------------------------------------------------------------------------------


def test_the_guide_replaces_every_usage_of_the_old_script() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for usage in ("--dry-run", "--batch-size 100", "--rollback"):
        assert f"`{OLD_SCRIPT} {usage}`" in text
    assert f"`{OLD_SCRIPT}`" in text


if __name__ == "__main__":
    STATUS.write_text(generated(STATUS.read_text(encoding="utf-8")), encoding="utf-8")
