"""Embedding models: one `Embedder` for every provider. Importing this imports neither NumPy nor a model."""

from __future__ import annotations

from revector.embed.embedder import Embedder
from revector.embed.spec import Identity, Refusal, Spec, known_models, parse

__all__ = ["Embedder", "Identity", "Refusal", "Spec", "known_models", "parse"]
