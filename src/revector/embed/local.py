"""Models that sentence-transformers runs on this machine: from the Hugging Face hub, its cache, or a folder."""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from revector.embed.spec import PROBES, similar_models
from revector.errors import ModelUnavailable, UsageError

#: How long the hub may take to say whether it has a model, seconds.
_HUB_SECONDS = 10.0
#: The weights of a model, in the layouts that are loaded.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
#: A tokenizer without a limit says 1e30.
_NO_WINDOW = 1_000_000_000


def download_needed(name: str) -> str | None:
    """What loading a model of the hub would download, None when the local cache holds it; no network is used."""
    if _cached(name) is not None:
        return None
    return f"{name} is not in the local cache: its weights would be downloaded from the Hugging Face hub"


class Local:
    """The provider of every sentence-transformers model; its own prompts and precision."""

    batch_size = 32
    pads = True

    def __init__(self, name: str, spec: str) -> None:
        """`name` is a hub name or an absolute path; `spec` is what the user calls it, for messages."""
        folder = Path(name) if name.startswith("/") else None
        if folder is not None and not folder.is_dir():
            raise ModelUnavailable(
                f"{spec} is not a folder", hint="name the folder that holds modules.json or config.json"
            )
        try:
            # The hub is asked first: its answer takes a moment, importing the library takes seconds.
            here = folder is not None or _cached(name) is not None
            if not here:
                _ask_hub(name, spec)
            with _quiet():
                from sentence_transformers import SentenceTransformer

                self._model: Any = SentenceTransformer(name, local_files_only=here)
        except ImportError as error:
            raise ModelUnavailable(
                f"{spec} cannot be loaded: {error.name or 'sentence-transformers'} is not installed",
                hint="pip install 'revector[local]'",
            ) from None
        except UsageError:
            raise
        # Whatever is wrong with a model's files surfaces as any type there is; all of it means "not this model".
        except Exception as error:
            raise ModelUnavailable(
                f"{spec} cannot be loaded: {_one_line(error)}", hint=_suggestion(name, spec, fetch=True)
            ) from None
        self._spec = spec
        self.revision = _revision(name, folder)
        prompts: dict[str, str | None] = dict(self._model.prompts or {})
        default = prompts.get(self._model.default_prompt_name or "") or ""
        self.document_prompt = prompts.get("document") or prompts.get("passage") or default
        self.query_prompt = prompts.get("query") or default
        # Counting (uncut) and encoding (cut) change a tokenizer's settings, so a thread that counts needs its own.
        self._counting: Any = copy.deepcopy(getattr(self._model[0], "tokenizer", None))
        self._count_lock = threading.Lock()
        self._encode_lock = threading.Lock()
        # Asked of the model and not of its configuration, which some models lack.
        self.dimension = self.encode([PROBES[0]], "", "document").shape[1]

    def max_tokens(self) -> int | None:
        """The model's window, in tokens."""
        window = self._model.max_seq_length
        return int(window) if window is not None and window < _NO_WINDOW else None

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokens of each text with those that frame it, uncut; (n,). Words where the model has no tokenizer."""
        if not texts:
            return np.empty(0, dtype=np.int64)
        with self._count_lock:
            if hasattr(self._counting, "encode_batch"):
                ids = [encoding.ids for encoding in self._counting.encode_batch(list(texts))]
            elif callable(self._counting):
                ids = self._counting(list(texts), truncation=False, padding=False, verbose=False)["input_ids"]
            else:
                ids = [text.split() for text in texts]
        return np.array([len(row) for row in ids], dtype=np.int64)

    def encode(self, texts: Sequence[str], prompt: str, kind: str) -> NDArray[np.float32]:
        """Vectors as the model makes them, (n, dimension) float32; a text beyond the window is cut to it."""
        import torch

        encode = self._model.encode_query if kind == "query" else self._model.encode_document
        try:
            with self._encode_lock:
                vectors = encode(list(texts), prompt=prompt, batch_size=len(texts), show_progress_bar=False)
        except torch.cuda.OutOfMemoryError:
            raise UsageError(
                f"{self._spec}: {len(texts)} texts at a time do not fit into the GPU's memory",
                hint=f"repeat the command with --batch-size {max(1, len(texts) // 2)}",
            ) from None
        return np.asarray(vectors, dtype=np.float32)


def _cached(name: str) -> Path | None:
    """The snapshot in the local cache that holds the model's weights, None when there is none."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    config = try_to_load_from_cache(name, "config.json") or try_to_load_from_cache(name, "modules.json")
    if not isinstance(config, str):
        return None
    snapshot = Path(config).parent
    # Modules of a model may keep their weights one folder down (0_StaticEmbedding/model.safetensors).
    return snapshot if any(next(snapshot.rglob(weights), None) for weights in _WEIGHTS) else None


def _ask_hub(name: str, spec: str) -> None:
    """Ask the hub once whether it has the model; loading would retry for over a minute when nobody answers."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except GatedRepoError:
        raise ModelUnavailable(
            f"{spec} needs its licence accepted", hint=f"accept it on the hub's page of {name}, then: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise ModelUnavailable(
            f"there is no model {spec}",
            why=f"The Hugging Face hub has no {name}, or it is private.",
            hint=_suggestion(name, spec, fetch=False),
        ) from None
    except OfflineModeIsEnabled:
        raise ModelUnavailable(
            f"{spec} is not in the local cache, and HF_HUB_OFFLINE forbids to download it",
            hint=_suggestion(name, spec, fetch=True),
        ) from None
    # The client's network errors have changed their base class with its HTTP library more than once.
    except Exception as error:
        raise ModelUnavailable(
            f"{spec} is not in the local cache, and the Hugging Face hub cannot be reached",
            why=f"{_one_line(error)}.",
            hint=_suggestion(name, spec, fetch=True),
        ) from None


def _suggestion(name: str, spec: str, *, fetch: bool) -> str:
    close = [known for known in similar_models(spec) if known != spec]
    lines = [f"did you mean {' or '.join(close)}?"] if close else []
    if fetch and not name.startswith("/"):
        lines.append(f"on a machine with network: hf download {name} --local-dir {spec.rsplit('/', 1)[-1]}")
        lines.append(f"then copy that folder here and name it as the model: ./{spec.rsplit('/', 1)[-1]}")
    lines.append("models that need no hub: bundled:minilm, bundled:minilm-768")
    return "\n".join(lines)


def _revision(name: str, folder: Path | None) -> str:
    """The hub's commit, or a hash of the first weights file of a folder."""
    if folder is None:
        snapshot = _cached(name)
        return snapshot.name if snapshot else ""
    weights = next((path for kind in _WEIGHTS for path in sorted(folder.rglob(kind))), None)
    if weights is None:
        return ""
    digest = blake2b(digest_size=16)
    with weights.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:200].rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' warnings, retries and progress bars off the terminal, and leave their settings as found."""
    loggers = [
        logging.getLogger(name)
        for name in ("transformers", "sentence_transformers", "huggingface_hub", "httpx", "httpx2")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hub: Any = importlib.import_module("huggingface_hub.utils")
        transformers: Any = importlib.import_module("transformers.utils.logging")
        hub_bars, bars = not hub.are_progress_bars_disabled(), transformers.is_progress_bar_enabled()
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            hub.disable_progress_bars()
            transformers.disable_progress_bar()
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if hub_bars:
                hub.enable_progress_bars()
            if bars:
                transformers.enable_progress_bar()
