"""`openai:NAME`: models behind OpenAI's embeddings interface, at `OPENAI_BASE_URL` (TEI, vLLM, Ollama speak it too).

What an answer means (the HTTP status, then what we do):

    429, 408, 409, 425, 5xx, no answer     retried with backoff and jitter, Retry-After honoured; then `Outage`
    429 insufficient_quota, 402            `UsageError`: waiting does not pay a bill
    401, 403                               `KeyRejected`
    404                                    `ModelUnavailable`
    400, 413, 422                          `InputRefused`: the caller halves the batch
    anything else, or no vectors in it     `UsageError`: not such a server

The key, and what the provider says about it, never reaches a message.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import stamina
from numpy.typing import NDArray

from revector.embed.embedder import Meter
from revector.embed.spec import PROBES
from revector.errors import (
    DimensionMismatch,
    InputRefused,
    KeyRejected,
    ModelUnavailable,
    Outage,
    RevectorError,
    UsageError,
)
from revector.settings import Settings

#: One request may take this long, seconds.
REQUEST_SECONDS = 60.0
#: A request is tried this often, within this many seconds in all; then it is an outage.
ATTEMPTS = 6
RETRY_SECONDS = 180.0
#: A server that asks for a longer pause than this (seconds) is taken to be out, so that the run stops and says so.
LONGEST_PAUSE = 60.0

# stamina logs each retry as a warning; without a handler of the application's own that would reach the terminal.
logging.getLogger("stamina").addHandler(logging.NullHandler())

_TRANSIENT = frozenset({408, 409, 425, 429})
_REFUSED = frozenset({400, 413, 422})
_TOO_LONG = re.compile(
    r"maximum context length|too long|max(imum)? .{0,20}(tokens|length)|must have less than|context_length",
    re.IGNORECASE,
)
#: Windows of OpenAI's own models; other servers do not tell.
_WINDOWS = {"text-embedding-3-small": 8191, "text-embedding-3-large": 8191, "text-embedding-ada-002": 8191}


class Remote:
    """The provider of `openai:NAME`; constructing it sends one probe text, which shows the dimension."""

    document_prompt = ""
    query_prompt = ""
    #: The interface takes 2048 texts a request; fewer cost less to repeat.
    batch_size = 128
    pads = True

    def __init__(
        self,
        name: str,
        settings: Settings,
        *,
        dimensions: int | None,
        meter: Meter | None = None,
        attempts: int | None = None,
    ) -> None:
        """`dimensions` is sent as such, when it is given; `meter` is asked around each request. Raises as `encode` does."""
        try:
            import openai
        except ImportError:
            raise ModelUnavailable(
                f"openai:{name} cannot be loaded: openai is not installed", hint="pip install 'revector[openai]'"
            ) from None
        self._name = name
        self._key = settings.openai_api_key.get_secret_value()
        url = urlsplit(settings.openai_base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UsageError(
                "OPENAI_BASE_URL is not an address",
                hint="write it like https://api.openai.com/v1 or http://localhost:8080/v1",
            )
        if not self._key and url.hostname == "api.openai.com":
            raise KeyRejected(
                f"openai:{name} needs a key, and OPENAI_API_KEY is not set",
                hint="set OPENAI_API_KEY in the environment or .env",
            )
        #: Where it answers, without user, password or query: safe to print.
        self._where = f"{url.scheme}://{url.hostname}" + (f":{url.port}" if url.port else "") + url.path
        self._openai = openai
        self._asked = dimensions
        self._meter = meter
        self._attempts = attempts or ATTEMPTS
        # Servers of one's own often want no key, but the client wants one; an empty header would be malformed.
        self._client = openai.OpenAI(
            api_key=self._key or "none", base_url=settings.openai_base_url, max_retries=0, timeout=REQUEST_SECONDS
        )
        #: What the server calls the model that answered.
        self.revision = ""
        self.dimension = 0
        self.dimension = self.encode([PROBES[0]], "", "document").shape[1]

    def max_tokens(self) -> int | None:
        """The window in tokens of OpenAI's own models; None for others."""
        return _WINDOWS.get(self._name)

    def count_tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """An estimate, (n,): a token for every four bytes of UTF-8, rounded up; the real tokenizer is the server's."""
        return np.array([-(-len(text.encode()) // 4) for text in texts], dtype=np.int64)

    def encode(self, texts: Sequence[str], prompt: str, kind: str) -> NDArray[np.float32]:
        """One request, repeated as the table above says: (n, dimension) float32 in the order of `texts`.

        Raises `InputRefused`, `Outage`, `KeyRejected`, `ModelUnavailable`, `DimensionMismatch`, `UsageError`.
        """
        inputs = [prompt + text for text in texts]
        for attempt in stamina.retry_context(
            _pause, attempts=self._attempts, timeout=RETRY_SECONDS, wait_initial=0.5, wait_max=20.0, wait_jitter=1.0
        ):
            with attempt:
                body = self._metered(inputs)
        vectors = self._read(body, len(texts))
        if self.dimension and vectors.shape[1] != self.dimension:
            raise DimensionMismatch(
                f"openai:{self._name}", vectors.shape[1], self.dimension, why=f"{self._where} changed its answers."
            )
        return vectors

    def _metered(self, inputs: list[str]) -> str:
        """One request, counted before it is sent; what the server refuses costs nothing, what it does not answer may."""
        if self._meter is None:
            return self._post(inputs)
        tokens = int(self.count_tokens(inputs).sum())
        settle = self._meter.before(tokens)
        try:
            body = self._post(inputs)
        except RevectorError as error:
            if not (isinstance(error, _Unanswered) and error.unanswered):
                settle(0)
            raise
        settle(_usage(body))
        return body

    def _post(self, inputs: list[str]) -> str:
        """One request; what goes wrong is translated here, before a retry logs it, so that no log holds a secret."""
        options: dict[str, Any] = {} if self._asked is None else {"dimensions": self._asked}
        try:
            # Plain numbers: every server can send them, while some refuse the client's default, base64.
            answer = self._client.embeddings.with_raw_response.create(
                model=self._name, input=inputs, encoding_format="float", **options
            )
        except self._openai.APIError as error:
            failure = self._translate(error)
        else:
            return str(answer.http_response.text)
        # Out here, so that the provider's own error, which may hold the key, is not even this one's context.
        raise failure

    def _translate(self, error: Any) -> RevectorError:
        model = f"openai:{self._name}"
        if isinstance(error, self._openai.APIConnectionError):
            unanswered = not _never_sent(error)
            if isinstance(error, self._openai.APITimeoutError):
                return self._outage(f"no answer within {REQUEST_SECONDS:g} s", unanswered=unanswered)
            return self._outage("the connection broke" if unanswered else "no connection", unanswered=unanswered)
        if not isinstance(error, self._openai.APIStatusError):
            return self._no_server(type(error).__name__)
        status, said = error.status_code, self._said(error)
        if status == 402 or error.code == "insufficient_quota":
            return UsageError(
                f"{model}: the quota is used up",
                why=said,
                hint="raise the quota at the provider, then repeat the command",
            )
        if status in _TRANSIENT or status >= 500:
            return self._outage(f"status {status}: {said}", error.response.headers.get("retry-after", ""))
        if status in (401, 403):
            # The provider's own words may hold part of the key.
            return KeyRejected(
                f"{model}: {self._where} rejected the key (status {status})",
                hint="set OPENAI_API_KEY to a key that may use this model",
            )
        if status == 404:
            return ModelUnavailable(
                f"{model}: {self._where} has no such model",
                why=said,
                hint="correct the model's name or OPENAI_BASE_URL",
            )
        if status in _REFUSED:
            long = status == 413 or _TOO_LONG.search(said)
            return InputRefused(f"{model}: {said}", kind="too_long" if long else "refused")
        return self._no_server(f"status {status}: {said}")

    def _outage(self, reason: str, retry_after: str = "", *, unanswered: bool = False) -> _Unanswered:
        return _Unanswered(
            f"openai:{self._name} does not answer at {self._where}",
            why=f"The last of up to {self._attempts} tries: {reason}. What is done is kept.",
            hint="repeat the command when the provider answers again",
            retry_after=retry_after,
            unanswered=unanswered,
        )

    def _no_server(self, reason: str) -> UsageError:
        return UsageError(
            f"{self._where} does not speak the embeddings interface: {reason}",
            hint="correct OPENAI_BASE_URL; it usually ends in /v1",
        )

    def _said(self, error: Any) -> str:
        """The server's words, one short line, without the key should they hold it."""
        words = error.body.get("message") if isinstance(error.body, dict) else None
        text = " ".join(str(words or error.message).split())
        return (text.replace(self._key, "***") if self._key else text)[:200]

    def _read(self, body: str, count: int) -> NDArray[np.float32]:
        """The vectors of an answer in the order of the texts, (count, d) float32."""
        try:
            answer = json.loads(body)
            items = sorted(answer["data"], key=lambda item: item["index"])
            indices = [item["index"] for item in items]
            rows = [_vector(item["embedding"]) for item in items]
        except (ValueError, KeyError, TypeError, binascii.Error):
            raise self._no_server("its answer holds no vectors") from None
        if indices != list(range(count)):
            raise self._no_server(f"{count} texts were sent, vectors came for the positions {indices[:5]}...")
        if len({len(row) for row in rows}) != 1:
            raise self._no_server("its vectors have different dimensions")
        self.revision = str(answer.get("model") or "")
        return np.stack(rows)


class _Unanswered(Outage):
    """The model's provider does not answer."""

    def __init__(self, what: str, *, why: str, hint: str, retry_after: str, unanswered: bool = False) -> None:
        super().__init__(what, why=why, hint=hint)
        #: Whether the server may have done the work, and charge for it.
        self.unanswered = unanswered
        #: The server's header of that name, "" where there was none.
        self.retry_after = retry_after


def _never_sent(error: Any) -> bool:
    """Whether there was no connection to send the request over; else the server may have done the work.

    By the names of the classes: which HTTP library has them depends on openai's version.
    """
    return any(kind.__name__ in ("ConnectError", "ConnectTimeout") for kind in type(error.__cause__).__mro__)


def _pause(error: Exception) -> bool | float:
    """Whether to try again: False, True (after the usual backoff), or the seconds that the server asks for."""
    if not isinstance(error, _Unanswered):
        return False
    try:
        seconds = float(error.retry_after)
    except ValueError:  # absent, or a date, which the backoff serves as well
        return True
    if 0 < seconds <= LONGEST_PAUSE:
        return seconds
    return not seconds > LONGEST_PAUSE


def _usage(body: str) -> int | None:
    """The tokens that the server says it has charged for; None: it does not say."""
    try:
        told = json.loads(body)["usage"]["total_tokens"]
        return int(told) if told > 0 else None
    except (ValueError, KeyError, TypeError):
        return None


def _vector(value: str | list[float | None]) -> NDArray[np.float32]:
    """A vector from numbers or from base64 of little-endian float32; null, which some servers send for NaN, is NaN."""
    if isinstance(value, str):
        vector = np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4").astype(np.float32)
    else:
        with np.errstate(
            over="ignore"
        ):  # too large for float32 becomes infinite, which the check of every vector finds
            vector = np.array(value, dtype=np.float64).astype(np.float32)
    if vector.ndim != 1 or not len(vector):
        raise ValueError("not a vector")
    return vector
