"""Change the embedding model behind a live PostgreSQL + pgvector table."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from revector.embed import Embedder
    from revector.migration import Migration
    from revector.plan import Request
    from revector.settings import Settings

__version__ = "0.1.0"
__all__ = ["Embedder", "Migration", "Request", "Settings", "__version__"]

#: The public names are loaded when they are used: `revector --help` needs neither NumPy nor psycopg.
_HOME = {
    "Embedder": "revector.embed",
    "Migration": "revector.migration",
    "Request": "revector.plan",
    "Settings": "revector.settings",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'revector' has no attribute {name!r}")
