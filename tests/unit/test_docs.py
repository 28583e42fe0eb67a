"""The documentation is held to the code: links, commands, options, stages, schemas, and the SQL of the last resort.

`PYTHONPATH=tests python tests/unit/test_docs.py` writes anew what is generated: parts of `docs/reference/status.md`, and the
examples' schemas.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import psycopg
import pytest

import revector.errors
from fix_tables import NEW, OLD, advance, assert_exact, assert_no_leftovers, body, fill, one, stage_of, steering, vector
from revector import Settings
from revector.embed.spec import KNOWN_MODELS
from revector.knowledge_base import Method, ddl
from revector.ledger import NEXT as NEXT_COMMAND
from revector.ledger import TRANSITIONS, Stage
from revector.work import STEPS

ROOT = Path(__file__).parents[2]
STATUS = ROOT / "docs/reference/status.md"
GUIDE = ROOT / "docs/how-to/upgrade.md"
EXAMPLES = ROOT / "examples/knowledge-base"
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
#: Options of other programs that our pages name.
FOREIGN = {"--local-dir", "--schema-only", "--table", "--exclude"}
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
    yield from (
        line.strip() for line in re.findall(r"^    \S.*$", prose(page), re.MULTILINE) if _OURS.match(line.strip())
    )
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
        words = re.sub(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*revector ?", "", re.split(r" #| \| | > ", line)[0]).split()
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
    linked = {
        (index.parent / link.split("#")[0]).resolve() for link in _LINK.findall(index.read_text(encoding="utf-8"))
    }
    assert {p for p in PAGES if p.is_relative_to(ROOT / "docs") and p != index} - linked == set()


# -- stages ------------------------------------------------------------------------------------------------------------


def diagram() -> str:
    """The stages as a diagram, from TRANSITIONS."""
    forward = [stage for stage in Stage if stage not in (Stage.FINALIZED, Stage.ABORTED)]
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {forward[0]}: run"]
    for stage, following in itertools.pairwise(forward):
        command = "run" if NEXT_COMMAND[stage] == "run" else "cutover"
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
        lines.append(f"| {stage} | " + " | ".join(cells) + f" | `{NEXT_COMMAND[stage]}` |")
    return "\n".join(lines)


def generated(text: str) -> str:
    """`text` with its generated parts made anew."""
    for part, made in (("diagram", diagram()), ("transitions", transitions())):
        begin, end = f"<!-- generated: {part} -->\n", "<!-- end -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = head + begin + made + "\n" + end + tail
    return text


def test_diagram_and_table_of_stages_are_current() -> None:
    text = STATUS.read_text(encoding="utf-8")
    assert text == generated(text), "run: PYTHONPATH=tests python tests/unit/test_docs.py"


def test_the_page_lists_every_event() -> None:
    """What the steps record, and what is recorded beside them: limits, pauses, consents, alarms."""
    source = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "src/revector").rglob("*.py")))
    beside = set(re.findall(r'(?:\.event|\.record|_tuned)\(\s*"([a-z_.]+)"', source))
    assert {"alarm", "paused", "load", "consent"} <= beside
    # A window's figures are in revector.windows.
    recorded = beside | set(STEPS) - {"backfill.window", "restore.window"}
    table = STATUS.read_text(encoding="utf-8").split("## Events")[1].split("\n## ")[0]
    listed = [
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`([a-z_.*]+)`", row)
    ]
    assert not {name for name in recorded if not any(fnmatch(name, pattern) for pattern in listed)}
    assert not {pattern for pattern in listed if not any(fnmatch(name, pattern) for name in recorded)}


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


SCHEMAS: dict[str, tuple[int, Method]] = {"schema_384.sql": (384, "ivfflat"), "schema_768.sql": (768, "hnsw")}


@pytest.mark.parametrize("file", SCHEMAS)
def test_the_example_schemas_are_what_the_program_prints(file: str) -> None:
    assert (EXAMPLES / file).read_text(encoding="utf-8") == ddl(*SCHEMAS[file])


@pytest.mark.parametrize(
    ("file", "model", "dimension"), [(".env.before", "all-MiniLM-L6-v2", 384), (".env.after", "all-mpnet-base-v2", 768)]
)
def test_the_example_settings_are_read(file: str, model: str, dimension: int) -> None:
    settings = Settings(_env_file=EXAMPLES / file)
    assert (settings.embedding_model, settings.embedding_dimension) == (model, dimension)
    assert KNOWN_MODELS[model] == dimension


def test_the_guide_replaces_every_usage_of_the_old_script() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for usage in ("--dry-run", "--batch-size 100", "--rollback"):
        assert f"`{OLD_SCRIPT} {usage}`" in text
    assert f"`{OLD_SCRIPT}`" in text


# -- the guide's SQL and Python (the only tests here that need PostgreSQL) ------------------------------------------------


def snippets(page: Path, language: str) -> list[str]:
    return [
        block["body"] for block in _FENCE.finditer(page.read_text(encoding="utf-8")) if block["language"] == language
    ]


def by_hand() -> str:
    found = re.search(
        r"<!-- by hand -->\n```sql\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert found is not None
    return found[1]


def at_cutover(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The guide's table, cut over from `OLD` to `NEW`, with both generations complete."""
    connection.execute(ddl(16))
    connection.execute("ALTER TABLE knowledge_base ALTER embedding SET NOT NULL")
    with connection.cursor().copy("COPY knowledge_base (id, content, embedding) FROM STDIN") as copy:
        for number in range(40):
            copy.write_row((f"d{number}", body(number), vector(OLD, body(number))))
    advance(dsn, "CUT_OVER", table="knowledge_base")


def function_source(connection: psycopg.Connection[Any]) -> str:
    return str(one(connection, "SELECT pg_get_functiondef('revector.rv_knowledge_base_g2()'::regprocedure)"))


def test_the_rollback_by_hand_does_what_the_command_does(dsn: str, connection: psycopg.Connection[Any]) -> None:
    at_cutover(dsn, connection)
    with steering(dsn, "knowledge_base") as migration:
        migration.rollback(without_follower=True)
        expected = function_source(connection)
        migration.cutover(without_follower=True)
    connection.execute("UPDATE knowledge_base SET content = content || ' edited after the cutover' WHERE id = 'd3'")
    assert fill(dsn, connection, "knowledge_base") == 1

    connection.execute(by_hand())

    assert function_source(connection) == expected
    assert stage_of(connection) == ("SERVED", None)
    assert_exact(connection, "knowledge_base", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=40)
    connection.execute("UPDATE knowledge_base SET content = content || ' and once more' WHERE id = 'd4'")
    assert one(connection, "SELECT embedding IS NULL AND embedding_g2 IS NULL FROM knowledge_base WHERE id = 'd4'")
    assert fill(dsn, connection, "knowledge_base") == 1
    with steering(dsn, "knowledge_base") as migration:
        assert migration.status().next == "revector cutover knowledge_base"
        migration.cutover(without_follower=True)
        migration.finalize()
    assert_exact(connection, "knowledge_base", "content", {"embedding": NEW}, at_least=40)
    assert_no_leftovers(connection, "knowledge_base")


def test_the_guides_other_statements_run(dsn: str, connection: psycopg.Connection[Any]) -> None:
    at_cutover(dsn, connection)
    pages = [GUIDE, STATUS, ROOT / "docs/explanation/what-if.md"]
    statements = [text for page in pages for text in snippets(page, "sql") if text != by_hand()]
    assert len(statements) >= 7
    for text in statements:
        assert connection.execute(text).description is not None, text
    row = connection.execute(next(text for text in statements if "AS norm_max" in text)).fetchone()
    assert row is not None and (row[0], row[2], row[3], row[4], row[5]) == (40, 0, 32, 32, 0)


@pytest.mark.parametrize("file", ["validate.py", "measure.py"])
def test_the_guides_scripts_run(file: str, dsn: str, connection: psycopg.Connection[Any], tmp_path: Path) -> None:
    at_cutover(dsn, connection)
    found = re.search(
        rf"<!-- {file} -->\n```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert found is not None
    script = tmp_path / file
    script.write_text(found[1], encoding="utf-8")
    environment = os.environ | {"DATABASE_URL": dsn}
    done = subprocess.run([sys.executable, script, NEW], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"validate.py": "40 of 40 rows", "measure.py": "warm database"}[file] in done.stdout
    wrong = subprocess.run([sys.executable, script, OLD], env=environment, capture_output=True, text=True)
    assert wrong.returncode != 0


if __name__ == "__main__":
    STATUS.write_text(generated(STATUS.read_text(encoding="utf-8")), encoding="utf-8")
    for file, arguments in SCHEMAS.items():
        (EXAMPLES / file).write_text(ddl(*arguments), encoding="utf-8")
