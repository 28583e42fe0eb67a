"""`hash:N`: feature hashing of words into N dimensions; the same vector on every machine, no model needed.

Every word adds +1 or -1 to one dimension. The text as a whole adds odd multiples of 1/2048 to up to eight
neighbouring dimensions, so texts with the same words in another order differ too.

Why it is never zero: words add whole numbers, the text adds an odd multiple of 1/2048, and the two cannot cancel.
Why it is exact: all sums are multiples of 1/2048 and their squares fit into a double, so no order of summation
rounds (up to tens of thousands of repeats of one word); square root and division are correctly rounded by IEEE 754.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\w+")
#: Dimensions that the text as a whole touches.
_SPREAD = 8
#: Cached words; the cache starts anew beyond it, so memory does not grow with the table.
_CACHED_WORDS = 200_000
#: Sums held at a time (doubles): bounds the memory of one call at any N.
_BLOCK = 4_000_000


class Hashing:
    """The provider of `hash:N`."""

    revision = "1"
    document_prompt = ""
    query_prompt = ""
    #: Small enough for the sums to stay in the processor's cache.
    batch_size = 64
    #: A text costs the same in any batch, so nothing is gained by sorting.
    pads = False

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self._words = _Words()

    def max_tokens(self) -> int | None:
        """No window: every word counts."""
        return None

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Words of each text; (n,)."""
        return np.array([len(_WORD.findall(text)) for text in texts], dtype=np.int64)

    def encode(self, texts: Sequence[str], prompt: str, kind: str) -> NDArray[np.float32]:
        """Unit vectors, (n, dimension) float32; words are lower-cased runs of `\\w`.

        Stable across processes, machines and Python versions, except that a newer Unicode may call a newly
        assigned character a letter.
        """
        result = np.empty((len(texts), self.dimension), dtype=np.float32)
        rows = max(1, _BLOCK // self.dimension)
        for start in range(0, len(texts), rows):
            block = [prompt + text for text in texts[start : start + rows]]
            result[start : start + len(block)] = self._block(block)
        return result

    def _block(self, texts: list[str]) -> NDArray[np.float64]:
        if len(self._words) > _CACHED_WORDS:
            self._words.clear()
        words = [_WORD.findall(text.lower()) for text in texts]
        counts = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        look_up = self._words.__getitem__
        hashes = np.fromiter((h for row in words for h in map(look_up, row)), dtype=np.int64, count=int(counts.sum()))
        digests = b"".join(blake2b(t.encode(), digest_size=8 + _SPREAD).digest() for t in texts)
        whole = np.frombuffer(digests, dtype=np.uint8).reshape(len(texts), 8 + _SPREAD)

        spread = min(_SPREAD, self.dimension)
        first = np.ascontiguousarray(whole[:, :8]).view("<u8")[:, 0] % np.uint64(self.dimension)
        columns = (first.astype(np.int64)[:, None] + np.arange(spread)) % self.dimension
        rows = np.arange(len(texts))
        slots = np.concatenate(
            [
                np.repeat(rows, counts) * self.dimension + (hashes >> 1) % self.dimension,
                (rows[:, None] * self.dimension + columns).ravel(),
            ]
        )
        amounts = np.concatenate([(hashes & 1) * 2.0 - 1.0, (whole[:, 8 : 8 + spread].ravel() * 2.0 - 255.0) / 2048.0])
        sums = np.bincount(slots, weights=amounts, minlength=len(texts) * self.dimension)
        sums = sums.reshape(len(texts), self.dimension)
        vectors: NDArray[np.float64] = sums / np.sqrt(np.square(sums).sum(axis=1, keepdims=True))
        return vectors


class _Words(dict[str, int]):
    """The hash of each word seen (63 bits, so that it fits a signed 64-bit integer)."""

    def __missing__(self, word: str) -> int:
        value = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little") >> 1
        self[word] = value
        return value
