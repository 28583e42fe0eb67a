"""The package's architecture, as tests: who may import whom, who may open a connection, how SQL is written."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import revector.errors

PACKAGE = Path(revector.errors.__file__).parent

#: Part of the package -> the parts it may import. A module that is not named belongs to its folder's part; one that
#: is in neither has to be entered here first, which is the moment to ask where it belongs.
ALLOWED: dict[str, set[str]] = {
    # leaves
    "errors": set(),
    "corpus": set(),
    "settings": {"errors"},
    "quality": {"errors"},
    "moment": {"errors"},
    "embedded": {"errors"},
    "embed": {"errors", "settings"},
    # the database, and what is decided about it
    "db": {"errors", "settings", "embed", "quality"},
    "partitions": {"errors", "db"},
    "throttle": {"errors", "settings", "db"},
    "catalog": {"errors", "settings", "embed", "quality", "db", "partitions"},
    "carried": {"errors", "embed", "db", "catalog"},
    "plan": {"errors", "settings", "embed", "quality", "catalog", "carried", "partitions"},
    # what is done; neither a phase nor what it is given knows the ledger
    "trigger": {"errors", "db", "catalog", "plan"},
    "spending": {"errors", "settings", "embed", "db", "throttle"},
    "work": {"errors", "spending", "settings", "embed", "db", "catalog", "plan", "partitions", "throttle"},
    "phases": {
        "carried",
        "errors",
        "settings",
        "embed",
        "quality",
        "db",
        "catalog",
        "plan",
        "trigger",
        "work",
        "partitions",
        "throttle",
    },
    # what is remembered of it, and who stands on that
    "ledger": {"errors", "settings", "embed", "db", "plan", "throttle"},
    "search": {"errors", "settings", "embed", "db", "catalog", "plan", "ledger", "work"},
    "knowledge_base": {"errors", "settings", "embed", "db", "catalog", "plan", "ledger", "search", "work", "survey"},
    "survey": {"carried", "errors", "settings", "embed", "db", "catalog", "plan", "ledger", "work", "partitions"},
    "follow": {
        "errors",
        "settings",
        "embed",
        "db",
        "catalog",
        "plan",
        "ledger",
        "work",
        "phases",
        "trigger",
        "throttle",
        "spending",
    },
    "rehearsal": {"errors", "db", "catalog", "plan", "trigger", "phases"},
    "migration": {"carried", "rehearsal", "errors", "spending", "settings", "embed", "quality", "db", "catalog", "plan"}
    | {"trigger", "work", "phases", "ledger", "search", "survey", "follow", "moment", "throttle"},
    # what is told of it; `report` imports the outcomes for their types alone
    "maintenance": {"errors", "settings", "embed", "db", "catalog", "plan", "ledger"},
    "report": {
        "rehearsal",
        "errors",
        "plan",
        "ledger",
        "search",
        "knowledge_base",
        "maintenance",
        "migration",
        "throttle",
        "spending",
    },
    "terminal": {"errors", "work", "report"},
    # who asks for it
    "demo": {"errors", "settings", "embed", "db", "catalog", "plan", "report", "work"}
    | {"ledger", "search", "follow", "migration", "knowledge_base", "corpus", "embedded"},
    "cli": {"errors", "settings", "embed", "quality", "db", "catalog", "plan", "report", "work", "phases"}
    | {"terminal", "maintenance", "moment"}
    | {"ledger", "search", "survey", "follow", "migration", "knowledge_base", "demo", "embedded"},
    "__main__": {"cli"},
}
#: Pure parts: no database driver, not even its types.
PURE = {"plan", "quality", "report", "embed", "errors", "settings", "corpus", "embedded"}

MODULES = sorted(PACKAGE.rglob("*.py"))
BLOCK = re.compile(r"^-- name:", re.MULTILINE)
HEADER = re.compile(r"-- name: [a-z][a-z0-9_]*\n-- \S.*\n-- lock: \S.*\n(?!-- lock:)")


def part_of(path: Path) -> str:
    """`phases/expand.py` belongs to `phases`; the package's own `__init__.py` to `revector`."""
    first = path.relative_to(PACKAGE).parts[0]
    return "revector" if first == "__init__.py" else first.removesuffix(".py")


def imports_of(tree: ast.AST, package: str) -> set[str]:
    """The full names of everything imported anywhere in it, also inside functions and `if TYPE_CHECKING`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            steps = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*steps, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def imports_in(path: Path) -> set[str]:
    package = ".".join(["revector", *path.relative_to(PACKAGE).parts[:-1]])
    return imports_of(ast.parse(path.read_text(encoding="utf-8")), package)


def own_parts(imports: set[str]) -> set[str]:
    parts = {name.split(".")[1] for name in imports if name.startswith("revector.")}
    return parts - {"__version__"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "revector":  # the public names, loaded lazily: nothing is imported at the top but for type checkers
        tree = ast.parse(path.read_text(encoding="utf-8"))
        eager = {name for node in tree.body if not isinstance(node, ast.If) for name in imports_of(node, "revector")}
        assert own_parts(eager) == set()
        return
    assert part in ALLOWED, f"{part} is new: enter it into ALLOWED"
    forbidden = own_parts(imports_in(path)) - ALLOWED[part] - {part}
    assert not forbidden, f"{name_of(path)} must not import {', '.join(sorted(forbidden))}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "phases").glob("*.py")), ids=name_of)
def test_phases_know_no_other_phase(path: Path) -> None:
    if path.name == "__init__.py":
        names = {name for name in imports_in(path) if name.startswith("revector.phases.")}
        assert not names, "the package of the phases holds their common words, not a list of them"
        return
    siblings = {other.stem for other in path.parent.glob("*.py")} - {"__init__"}
    used = {name.split(".")[2] for name in imports_in(path) if name.startswith("revector.phases.")}
    assert not used & siblings


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) in PURE], ids=name_of)
def test_pure_parts_do_not_know_the_driver(path: Path) -> None:
    drivers = {name for name in imports_in(path) if name.split(".")[0] in ("psycopg", "pgvector")}
    assert not drivers


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_db_opens_connections(path: Path) -> None:
    if name_of(path) == "db.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    opened = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "connect"
        and isinstance(node.value, ast.Name | ast.Attribute)
        and ast.unparse(node.value).split(".")[-1] in ("psycopg", "Connection", "AsyncConnection")
    ]
    assert not opened, f"line {opened[0]} opens a connection; that is db.py's door"
    taken = {"psycopg.connect", "psycopg.Connection.connect", "psycopg.AsyncConnection"} & imports_in(path)
    assert not taken


def test_corpus_needs_the_standard_library_alone() -> None:
    foreign = {name.split(".")[0] for name in imports_in(PACKAGE / "corpus.py")} - set(sys.stdlib_module_names)
    assert not foreign


def test_the_table_itself_goes_one_way() -> None:
    """No circle among the parts, so that there is an order in which the package can be read."""
    left = dict(ALLOWED)
    while left:
        free = {part for part, uses in left.items() if not uses & left.keys()}
        assert free, f"a circle among {', '.join(sorted(left))}"
        left = {part: uses for part, uses in left.items() if part not in free}


def headless_blocks(text: str) -> list[str]:
    """The first lines of blocks without name, one-line purpose and lock, in that order."""
    starts = [match.start() for match in BLOCK.finditer(text)]
    bad = [text[start:].split("\n", 1)[0] for start in starts if not HEADER.match(text, start)]
    before = text[: starts[0]] if starts else text
    if any(line.strip() and not line.startswith("--") for line in before.splitlines()):
        bad.insert(0, "statements before the first `-- name:`")
    return bad


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.sql")), ids=name_of)
def test_every_sql_block_says_what_it_does_and_what_it_locks(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert headless_blocks(text) == []
    names = re.findall(r"^-- name: (\S+)", text, re.MULTILINE)
    assert names, "a file of SQL is a file of named blocks"
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("-- name: good\n-- What it is for.\n-- lock: none\nSELECT 1;\n", []),
        ("-- A remark on the file.\n\n-- name: good\n-- Why.\n-- lock: SHARE\nSELECT 1;\n", []),
        ("-- name: no_lock\n-- Why.\nSELECT 1;\n", ["-- name: no_lock"]),
        ("-- name: empty_lock\n-- Why.\n-- lock:\nSELECT 1;\n", ["-- name: empty_lock"]),
        ("-- name: no_purpose\n-- lock: none\nSELECT 1;\n", ["-- name: no_purpose"]),
        ("-- name: two_lines\n-- Why.\n-- And why.\n-- lock: none\nSELECT 1;\n", ["-- name: two_lines"]),
        ("-- name: Odd Name\n-- Why.\n-- lock: none\nSELECT 1;\n", ["-- name: Odd Name"]),
        ("SELECT 1;\n-- name: late\n-- Why.\n-- lock: none\nSELECT 1;\n", ["statements before the first `-- name:`"]),
    ],
)
def test_a_block_without_its_header_is_refused(text: str, bad: list[str]) -> None:
    assert headless_blocks(text) == bad


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from revector.phases import expand", {"phases"}),
        ("from revector import cli", {"cli"}),
        ("from .cli import main", {"cli"}),
        ("from . import cli", {"cli"}),
        ("def late():\n    import revector.cli", {"cli"}),
        ("import json", set()),
    ],
)
def test_the_walk_sees_every_kind_of_import(source: str, expected: set[str]) -> None:
    assert own_parts(imports_of(ast.parse(source), "revector")) == expected
