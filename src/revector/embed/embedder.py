"""One face for every model: names, vectors that are safe to store, and proof of which model answers.

NumPy and the providers are imported at first use: `revector --help` passes through here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from revector.embed.spec import PROBES, Identity, Refusal, parse
from revector.errors import DimensionMismatch, InputRefused, Interrupted, ModelChanged, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from revector.settings import Settings

#: What a text is to the model: something stored, or something searched for.
Kind = Literal["document", "query"]

#: Two answers of one model are at least this alike (cosine), whatever machine or batch they come from.
SAME_MODEL = 0.999
#: A vector shorter than this has no direction to speak of, and pgvector's float32 cosine of it is noise.
_SHORTEST = 1e-12


class Meter(Protocol):
    """Counts the requests of a model behind an address, and holds them back where there are limits."""

    #: Tokens that one request of several texts should not pass; None: no limit.
    most: int | None

    def before(self, tokens: int) -> Callable[[int | None], None]:
        """A request of about so many tokens is to be sent: wait, or raise. The result wants to know what it has cost.

        None: not known.
        """


class Provider(Protocol):
    """What `Embedder` needs of a loaded model."""

    #: Known after loading.
    dimension: int
    #: Hub commit, hash of the weights, package version, or "".
    revision: str
    #: The model's own prompts; "" where it has none.
    document_prompt: str
    query_prompt: str
    #: Texts that one call takes when nobody asks for fewer.
    batch_size: int
    #: Whether a batch costs as much as its longest text times its size, so that sorting pays.
    pads: bool

    def max_tokens(self) -> int | None:
        """The window, None where there is none or it is unknown."""

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokens of each text, uncut; (n,)."""

    def encode(self, texts: Sequence[str], prompt: str, kind: Kind) -> NDArray[np.float32]:
        """One batch, unchecked; (n, dimension) float32. `InputRefused` when the model refuses the batch."""


def _never() -> bool:
    return False


class Embedder:
    """A model by name, loaded at first use.

    `dimension` is the one expected (for `openai:` it is asked for as `dimensions`). A prompt given here
    replaces the model's own. `attempts` is how often a request is sent before it is an outage, for those who have a
    patience of their own. Safe to share between threads.
    """

    def __init__(
        self,
        spec: str,
        *,
        dimension: int | None = None,
        settings: Settings | None = None,
        document_prompt: str = "",
        query_prompt: str = "",
        meter: Meter | None = None,
        attempts: int | None = None,
    ) -> None:
        self._parsed = parse(spec)
        #: The canonical spelling.
        self.spec = str(self._parsed)
        self._asked = dimension
        self._settings = settings
        self._meter = meter
        self._attempts = attempts
        self._prompts = {"document": document_prompt, "query": query_prompt}
        self._provider: Provider | None = None
        self._loading = threading.Lock()
        if self._parsed.dimension is not None:
            self._check_dimension(self._parsed.dimension)

    def load(self) -> None:
        """Load the model, once.

        Raises `ModelUnavailable`, `DimensionMismatch`, and for a provider also `KeyRejected` and `Outage`.
        """
        self._loaded()

    def get_embedding_dimension(self) -> int:
        """The dimension of every vector; loads the model unless its name settles it."""
        return self._parsed.dimension or self._loaded().dimension

    def get_model_name(self) -> str:
        """The canonical spec."""
        return self.spec

    def max_tokens(self) -> int | None:
        """The model's window in tokens, None where there is none or it is unknown; loads the model."""
        return self._loaded().max_tokens()

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokens of each text, uncut and without prompt; (n,) int64. An estimate for `openai:`, words for `hash:`."""
        valid = [text if _is_unicode(text) else text.encode(errors="replace").decode() for text in texts]
        return self._loaded().count_tokens(valid)

    def encode(self, texts: Sequence[str], *, kind: Kind = "document") -> NDArray[np.float32]:
        """Vectors that are safe to store: (n, dimension) float32, each finite and not zero, in the order of `texts`.

        Raises `InputRefused` when the model refuses a text or has no usable vector for it, `Outage`,
        `KeyRejected`, `ModelUnavailable`, `DimensionMismatch`.
        """
        import numpy as np

        if isinstance(texts, str):
            raise UsageError("encode takes a list of texts, not one text", hint="encode([text])")
        provider = self._loaded()
        result = np.empty((len(texts), provider.dimension), dtype=np.float32)
        for batch in self._batches(texts, provider.batch_size):
            result[batch] = self._encode_batch([texts[i] for i in batch], kind)
        return result

    def encode_isolating(
        self, texts: Sequence[str], *, batch_size: int, stop: Callable[[], bool] = _never
    ) -> tuple[NDArray[np.float32], dict[int, Refusal]]:
        """Vectors of documents, and the texts that the model refuses: ((n, dimension) float32, index -> why).

        The rows of refused texts are NaN. A refused batch is halved until the bad input stands alone. Before the
        first halving a probe text is sent: when the model refuses that one in the same words, the
        configuration is wrong and not the input (`UsageError`), and nothing is blamed on the rows.
        Raises as `encode` does except `InputRefused`, and `Interrupted` once `stop()` is true
        (asked between batches; a batch is the most that is lost).
        """
        import numpy as np

        result = np.full((len(texts), self._loaded().dimension), np.nan, dtype=np.float32)
        refused: dict[int, Refusal] = {}
        probed = False
        waiting = self._batches(texts, batch_size)[::-1]
        while waiting:
            if stop():
                raise Interrupted
            batch = waiting.pop()
            try:
                result[batch] = self._encode_batch([texts[i] for i in batch], "document")
            except InputRefused as refusal:
                if not probed:
                    self._blame_input(refusal)
                    probed = True
                if len(batch) == 1:
                    refused[batch[0]] = Refusal(refusal.kind, str(refusal))
                else:
                    half = len(batch) // 2
                    waiting += [batch[half:], batch[:half]]
        return result, refused

    def identity(self) -> Identity:
        """What the model is, from its answers to the probe texts; loads the model."""
        import numpy as np

        vectors = self.encode(PROBES)
        norms = np.linalg.norm(vectors, axis=1)
        return Identity(
            model=self.spec,
            revision=self._loaded().revision,
            dimension=vectors.shape[1],
            document_prompt=self._prompt("document"),
            query_prompt=self._prompt("query"),
            normalised=bool(np.all(np.abs(norms - 1) < 1e-3)),
            probes=tuple(tuple(float(f"{x:.6g}") for x in vector) for vector in vectors.tolist()),
        )

    def check_identity(self, expected: Identity) -> None:
        """Prove that the model which answers now is the one recorded; `ModelChanged` when it is not.

        Dimension, prompts and normalisation are equal, and each probe's cosine is at least 0.999. Name and revision
        are not compared: a mirror or a copy in a folder is the same model, and a retrained one is not.
        """
        if (difference := _difference(self.identity(), expected)) is None:
            return
        revision = f" (revision {expected.revision})" if expected.revision else ""
        raise ModelChanged(
            f"{self.spec} is not the model that was recorded: {difference}",
            why="Vectors of two models cannot be compared: a column filled by both would answer with nonsense, "
            "and no error would show it. None of its vectors was used.",
            hint=f"make {expected.model}{revision} answer again, or upgrade to the present one as a new model",
        )

    def download_needed(self) -> str | None:
        """One sentence that says what using the model would download, None when nothing; loads nothing."""
        if self._parsed.kind != "local":
            return None
        from revector.embed import local

        return local.download_needed(self._parsed.name)

    def _make(self) -> Provider:
        kind, name = self._parsed.kind, self._parsed.name
        if kind == "hash":
            from revector.embed.hashing import Hashing

            return Hashing(int(name))
        if kind == "bundled":
            from revector.embed.bundled import MiniLM, Static

            return Static() if name == "static" else MiniLM(with_cls=name == "minilm-768")
        if kind == "openai":
            from revector.embed.remote import Remote
            from revector.settings import Settings

            return Remote(
                name,
                self._settings or Settings.load(),
                dimensions=self._asked,
                meter=self._meter,
                attempts=self._attempts,
            )
        from revector.embed.local import Local

        return Local(name, self.spec)

    def _loaded(self) -> Provider:
        with self._loading:
            if self._provider is None:
                provider = self._make()
                self._check_dimension(provider.dimension)
                self._provider = provider
            return self._provider

    def _check_dimension(self, actual: int) -> None:
        if self._asked is not None and actual != self._asked:
            raise DimensionMismatch(
                self.spec,
                actual,
                self._asked,
                hint=f"set EMBEDDING_DIMENSION to {actual}, leave it out, or name another model",
            )

    def _prompt(self, kind: Kind) -> str:
        provider = self._loaded()
        return self._prompts[kind] or (provider.document_prompt if kind == "document" else provider.query_prompt)

    def _batches(self, texts: Sequence[str], size: int) -> list[list[int]]:
        """Indices in batches; where padding costs, the longest first, so that memory runs out at once or never."""
        order = list(range(len(texts)))
        provider = self._loaded()
        if provider.pads and len(texts) > 1:
            tokens = self.count_tokens(texts)
            order.sort(key=lambda i: -int(tokens[i]))
            if self._meter is not None and self._meter.most is not None:
                return _cut(order, tokens, size, self._meter.most)
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _encode_batch(self, texts: list[str], kind: Kind) -> NDArray[np.float32]:
        """One call of the model, every vector checked; `InputRefused` names the first text that has none."""
        import numpy as np

        for text in texts:
            if not _is_unicode(text):
                raise InputRefused(f"{self.spec}: the text is not valid Unicode", kind="refused")
        provider = self._loaded()
        try:
            vectors = provider.encode(texts, self._prompt(kind), kind)
        except InputRefused as refusal:
            if len(texts) == 1 and not texts[0].strip():
                refusal.kind = "blank"
            raise
        if vectors.shape != (len(texts), provider.dimension):
            raise DimensionMismatch(
                self.spec, vectors.shape[-1], provider.dimension, why="Its answers changed their dimension."
            )
        # In double precision: the square of a large float32 is infinite in single.
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
        for row in np.flatnonzero(~(np.isfinite(norms) & (norms > _SHORTEST))):
            if not np.isfinite(norms[row]):
                raise InputRefused(f"{self.spec}: the vector is not finite", kind="not_finite")
            if not texts[row].strip():
                raise InputRefused(f"{self.spec}: a blank text has no vector", kind="blank")
            raise InputRefused(f"{self.spec}: the vector is zero", kind="zero")
        return vectors

    def _blame_input(self, refusal: InputRefused) -> None:
        """Return when the model takes a harmless text, so that the refused one is to blame."""
        try:
            self._encode_batch([PROBES[0]], "document")
        except InputRefused:
            raise UsageError(
                f"{self.spec} refuses every text: {refusal}",
                why="It refuses a harmless probe text as well, so no row is to blame and none was recorded as failed.",
                hint="correct the model's name or settings, then repeat the command",
            ) from None


def _cut(order: list[int], tokens: NDArray[np.int64], size: int, most: int) -> list[list[int]]:
    """Batches of at most `size` texts and, where it is several, about `most` tokens."""
    batches: list[list[int]] = []
    room = 0
    for i in order:
        if not batches or len(batches[-1]) == size or tokens[i] > room:
            batches.append([])
            room = most
        batches[-1].append(i)
        room -= int(tokens[i])
    return batches


def _is_unicode(text: str) -> bool:
    """Whether the text can be encoded at all: PostgreSQL's can, an argument of a shell may hold stray bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _difference(actual: Identity, expected: Identity) -> str | None:
    """The first difference that makes it another model, in words."""
    import numpy as np

    if actual.dimension != expected.dimension:
        return f"it gives {actual.dimension} dimensions, recorded are {expected.dimension}"
    if actual.document_prompt != expected.document_prompt:
        return f"its document prompt is {actual.document_prompt!r}, recorded is {expected.document_prompt!r}"
    if actual.query_prompt != expected.query_prompt:
        return f"its query prompt is {actual.query_prompt!r}, recorded is {expected.query_prompt!r}"
    if actual.normalised != expected.normalised:
        return f"its vectors are {'' if actual.normalised else 'not '}of length 1, unlike the recorded ones"
    ours, theirs = np.array(actual.probes), np.array(expected.probes)
    cosines = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    worst = int(cosines.argmin())
    if cosines[worst] >= SAME_MODEL:
        return None
    return f"its vector of a probe text has cosine {cosines[worst]:.4f} to the recorded one (needed: {SAME_MODEL})"
