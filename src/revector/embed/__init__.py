"""Embedding models: one `Embedder` for every provider. Importing this imports neither NumPy nor a model."""

from __future__ import annotations

from revector.embed.embedder import Embedder, Meter
from revector.embed.spec import Identity, Refusal, Spec, known_models, parse

__all__ = ["Embedder", "Identity", "Meter", "Refusal", "Spec", "known_models", "parse"]
