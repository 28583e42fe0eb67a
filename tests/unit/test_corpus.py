"""The demo's corpus is the same set of ids on every Python, and needs nothing but the standard library."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from revector import corpus
from revector.corpus import LONGEST, Document, pieces, standard_library

LOADER = """
import importlib.util, json, sys, time
spec = importlib.util.spec_from_file_location("corpus", sys.argv[1])
module = sys.modules["corpus"] = importlib.util.module_from_spec(spec)
start = time.perf_counter()
spec.loader.exec_module(module)
documents = [[d.id, d.text] for d in module.standard_library()]
seconds = time.perf_counter() - start
# What an import may do to a terminal or to a user.
unwanted = sorted({"antigravity", "readline", "this", "tkinter"} & set(sys.modules))
json.dump({"documents": documents, "seconds": seconds, "unwanted": unwanted}, sys.stdout)
"""


def interpreters() -> list[str]:
    """Every Python from 3.11 on that can be found here, by its real path."""
    names = ["python3", *(f"python3.{minor}" for minor in range(11, 20))]
    candidates = [sys.executable, *(shutil.which(name) for name in names), *(f"/usr/bin/{name}" for name in names)]
    candidates += sorted(map(str, Path.home().glob(".pyenv/versions/*/bin/python")))
    found: dict[str, str] = {}
    for candidate in candidates:
        if not candidate or not Path(candidate).exists():
            continue
        # A pyenv shim exists for versions that are not selected: asking is the only way to know.
        asked = subprocess.run(
            [candidate, "-I", "-c", "import sys; print(sys.version_info[:2] >= (3, 11), sys.base_prefix)"],
            capture_output=True,
            text=True,
        )
        usable, _, prefix = asked.stdout.strip().partition(" ")
        if asked.returncode == 0 and usable == "True":
            found.setdefault(prefix, candidate)
    return list(found.values())


@cache
def here() -> tuple[Document, ...]:
    return tuple(standard_library())


def test_holds_about_2600_documents() -> None:
    assert 2_500 <= len(here()) <= 2_700


def test_ids_and_texts_are_unique() -> None:
    assert len({d.id for d in here()}) == len(here())
    assert len({d.text for d in here()}) == len(here())


def test_documents_are_short_clean_texts() -> None:
    for document in here():
        assert document.text == document.text.strip("\n").rstrip()
        assert "\x00" not in document.text, "PostgreSQL cannot store it"
        assert " at 0x" not in document.text, "an address differs on every run"
        assert document.id.partition("#")[0] == document.title
        assert document.title.startswith(document.metadata["module"])
    assert sum(len(d.text) > LONGEST for d in here()) < 20, "only a single paragraph may be longer"


def test_is_deterministic() -> None:
    assert tuple(standard_library()) == here()


@pytest.mark.parametrize("limit", [0, 1, 300])
def test_limit_takes_the_first(limit: int) -> None:
    assert tuple(standard_library(limit)) == here()[:limit]


def test_every_listed_name_is_found() -> None:
    listed = {
        f"{module}.{name}".rstrip(".") + (f"#{number}" if number > 1 else "")
        for module, names in corpus._listed()
        for name, count in names
        for number in range(1, count + 1)
    }
    assert listed == {d.id for d in here()}


def test_long_text_is_cut_at_paragraphs() -> None:
    paragraphs = ["a" * 700, "b" * 400, "    c" * 20, "d" * 1300]
    assert pieces("\n\n".join(paragraphs)) == ["a" * 700 + "\n\n" + "b" * 400, "    c" * 20, "d" * 1300]
    assert pieces("one\n   \n\n    two") == ["one\n\n    two"]
    assert pieces("") == []


@pytest.mark.parametrize("python", interpreters())
def test_every_python_has_the_same_ids(python: str) -> None:
    source = str(Path(corpus.__file__))
    done = subprocess.run([python, "-I", "-W", "error", "-c", LOADER, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["unwanted"] == []
    assert found["seconds"] < 3
    texts = [text for _, text in found["documents"]]
    assert len(set(texts)) == len(texts)
    assert [name for name, _ in found["documents"]] == [d.id for d in here()]
