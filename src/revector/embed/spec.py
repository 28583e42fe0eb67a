"""What a model is called, what it is, and why it refuses a text: names and records, no model is loaded here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from revector.errors import UsageError

#: The fixed texts whose vectors identify a model. Never changed: every ledger holds vectors of exactly these.
PROBES = (
    "The library opens at nine and closes at six.",
    "How do I restore a table from last night's backup?",
    "def area(radius): return 3.14159 * radius ** 2",
    "Die Straße zum Bahnhof ist bis Montag gesperrt.",
)

#: Well-known models and their dimensions, for suggestions only: a loaded model states its own.
KNOWN_MODELS: Mapping[str, int] = {
    "bundled:static": 384,
    "bundled:minilm": 384,
    "bundled:minilm-768": 768,
    "all-MiniLM-L6-v2": 384,
    "all-MiniLM-L12-v2": 384,
    "all-mpnet-base-v2": 768,
    "all-distilroberta-v1": 768,
    "multi-qa-MiniLM-L6-cos-v1": 384,
    "multi-qa-mpnet-base-dot-v1": 768,
    "multi-qa-mpnet-base-cos-v1": 768,
    "paraphrase-MiniLM-L6-v2": 384,
    "paraphrase-multilingual-MiniLM-L12-v2": 384,
    "paraphrase-multilingual-mpnet-base-v2": 768,
    "BAAI/bge-small-en-v1.5": 384,
    "BAAI/bge-base-en-v1.5": 768,
    "BAAI/bge-large-en-v1.5": 1024,
    "BAAI/bge-m3": 1024,
    "intfloat/e5-small-v2": 384,
    "intfloat/e5-base-v2": 768,
    "intfloat/e5-large-v2": 1024,
    "intfloat/multilingual-e5-small": 384,
    "intfloat/multilingual-e5-base": 768,
    "intfloat/multilingual-e5-large": 1024,
    "thenlper/gte-small": 384,
    "thenlper/gte-base": 768,
    "mixedbread-ai/mxbai-embed-large-v1": 1024,
    "openai:text-embedding-3-small": 1536,
    "openai:text-embedding-3-large": 3072,
    "openai:text-embedding-ada-002": 1536,
}

_BUNDLED = ("static", "minilm", "minilm-768")
#: The organisation whose models go by their short names.
_SHORT = "sentence-transformers/"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Spec:
    """Which provider, and which of its models."""

    kind: Literal["hash", "bundled", "local", "folder", "openai"]
    #: What the provider calls it: a dimension, a bundled name, a hub name, an absolute path, an API name.
    name: str
    #: The dimension, where the name alone settles it.
    dimension: int | None = None

    def __str__(self) -> str:
        """The one canonical spelling, which the ledger keeps: `parse(str(spec)) == spec`."""
        if self.kind == "local":
            return self.name.removeprefix(_SHORT)
        return self.name if self.kind == "folder" else f"{self.kind}:{self.name}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a model has no vector for one text."""

    #: `blank`, `too_long`, `refused`, `not_finite` or `zero`.
    kind: str
    #: The model's own words, short, without secrets.
    error: str


@dataclass(frozen=True, slots=True)
class Identity:
    """What a model is, proven by what it answers."""

    #: The canonical spec.
    model: str
    #: Hub commit, hash of the weights, package version, or "" where there is none.
    revision: str
    dimension: int
    #: What stands before each stored text.
    document_prompt: str
    #: What stands before each query.
    query_prompt: str
    #: Whether the probes' vectors have length 1 (within 0.001).
    normalised: bool
    #: The vectors of `PROBES` as documents, 6 significant digits.
    probes: tuple[tuple[float, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "probes": [list(probe) for probe in self.probes]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Identity:
        """The inverse of `to_json`; keys that a newer revector added are ignored."""
        known = {name: value[name] for name in cls.__slots__}
        return cls(**{**known, "probes": tuple(tuple(float(x) for x in probe) for probe in value["probes"])})


def parse(text: str) -> Spec:
    """Understand a model name: `hash:N`, `bundled:NAME`, `openai:NAME`, a folder, or a name on the hub.

    A folder starts with `/`, `./`, `../` or `~`, so that a name means the same in every working directory.
    Raises `UsageError` for anything that cannot be a model's name; whether the model exists shows on loading.
    """
    text = text.strip()
    if not text:
        raise UsageError("no model is named", hint="name one, for example: all-mpnet-base-v2")
    if text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        return Spec("folder", str(Path(text).expanduser().absolute().resolve()))
    prefix, colon, name = text.partition(":")
    if not colon and prefix in ("hash", "bundled", "openai"):
        raise UsageError(f"{text} needs the model after a colon", hint=_example(prefix))
    if not colon:
        return _hub(text)
    if prefix == "hash":
        if not re.fullmatch(r"0*[1-9][0-9]*", name, re.ASCII):
            raise UsageError(f"{text}: the dimension is a whole number from 1 on", hint=_example(prefix))
        return Spec("hash", str(int(name)), int(name))
    if prefix == "bundled":
        if name not in _BUNDLED:
            raise UsageError(
                f"{text}: there is no such bundled model", hint=_near(text, [f"bundled:{n}" for n in _BUNDLED])
            )
        return Spec("bundled", name, KNOWN_MODELS[text])
    if prefix == "openai":
        if not name or re.search(r"\s", name):
            raise UsageError(f"{text} names no model of the provider", hint=_example(prefix))
        return Spec("openai", name)
    raise UsageError(
        f"{text}: {prefix}: is no kind of model",
        why="Before a colon stands hash, bundled or openai; every other name is a model on the hub or a folder.",
        hint=_near(prefix, ["hash:", "bundled:", "openai:"]),
    )


def known_models(dimension: int) -> list[str]:
    """Well-known models of this dimension, the ones that need no download first."""
    return [name for name, known in KNOWN_MODELS.items() if known == dimension]


def similar_models(name: str) -> list[str]:
    """Well-known models whose names look like this one, best first."""
    by_lower = {known.lower(): known for known in KNOWN_MODELS}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.75)]


def _hub(text: str) -> Spec:
    if not _HUB_NAME.fullmatch(text):
        raise UsageError(
            f"{text!r} cannot be a model's name",
            why="A model on the hub is written name or organisation/name; a folder starts with ./ or /.",
            hint=_near(text, list(KNOWN_MODELS)),
        )
    return Spec("local", text if "/" in text else _SHORT + text)


def _example(prefix: str) -> str:
    names = {"hash": "hash:768", "bundled": "bundled:minilm", "openai": "openai:text-embedding-3-small"}
    return f"for example: {names[prefix]}"


def _near(text: str, names: list[str]) -> str:
    close = difflib.get_close_matches(text, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"one of: {', '.join(names[:3])}"
