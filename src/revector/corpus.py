"""About 2,600 short English texts that every machine has: the docstrings of Python's own standard library.

The texts are read from the running interpreter; which ones is written down in `corpus_ids.txt`, so that the ids are
the same on every Python. The file imports nothing but the standard library.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Final

#: A docstring longer than this is cut at paragraph borders; the second piece of `name` is `name#2`.
LONGEST: Final = 1200

_BORDER: Final = re.compile(r"\n(?:[ \t]*\n)+")
_IDS: Final = Path(__file__).with_name("corpus_ids.txt")


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus."""

    #: The qualified name, with `#2`, `#3`, ... for the later pieces of a long docstring.
    id: str
    #: The qualified name.
    title: str
    #: The docstring, or a piece of it, without its indentation.
    text: str
    #: `module`: where it comes from; `kind`: module, class or function.
    metadata: dict[str, str] = field(default_factory=dict)


def standard_library(limit: int | None = None) -> Iterator[Document]:
    """Yield the corpus, always in the same order; the first `limit` documents, or all.

    A text that occurs twice counts once. What this interpreter lacks (an optional module, a docstring stripped by
    `-OO`) is left out.
    """
    seen: set[str] = set()
    for module_name, names in _listed():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        for name, count in names:
            if limit is not None and len(seen) >= limit:
                return
            found = _find(module, name)
            title = f"{module_name}.{name}" if name else module_name
            for number, text in enumerate(pieces(_docstring(found))[:count], start=1):
                if text in seen or (limit is not None and len(seen) >= limit):
                    continue
                seen.add(text)
                kind = "module" if not name else "class" if isinstance(found, type) else "function"
                yield Document(
                    id=title if number == 1 else f"{title}#{number}",
                    title=title,
                    text=text,
                    metadata={"module": module_name, "kind": kind},
                )


def pieces(docstring: str) -> list[str]:
    """Cut a text at paragraph borders into pieces of at most `LONGEST` characters, where a paragraph allows it."""
    found: list[str] = []
    for paragraph in _BORDER.split(docstring):
        if found and len(found[-1]) + 2 + len(paragraph) <= LONGEST:
            found[-1] += "\n\n" + paragraph
        elif paragraph.strip():
            found.append(paragraph)
    return [piece.strip("\n").rstrip() for piece in found]


def _listed() -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Yield each module with the names in it and how many pieces of each; the name '' is the module itself."""
    for line in _IDS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            module, *words = line.split()
            yield module, [_listed_name(word) for word in words]


def _listed_name(word: str) -> tuple[str, int]:
    name, _, count = word.partition("*")
    return name.strip("."), int(count or 1)


def _find(module: ModuleType, name: str) -> object:
    """Look a name up without running any code of the module: no `__getattr__`, no property."""
    found: object = module
    for part in name.split(".") if name else ():
        found = inspect.getattr_static(found, part, None)
        if isinstance(found, staticmethod | classmethod):
            found = found.__func__
    return found


def _docstring(found: object) -> str:
    # A class's own: `__doc__` asked of a class without one would be its base's.
    text = vars(found).get("__doc__") if isinstance(found, type) else getattr(found, "__doc__", None)
    return inspect.cleandoc(text) if isinstance(text, str) else ""
