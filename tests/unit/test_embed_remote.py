"""`openai:NAME` against a stand-in server on this machine: every answer means what the table in `remote.py` says."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import stamina
from pydantic import SecretStr

from fix_provider import KEY, Answer, Stand, error, good, standing
from revector.embed import Embedder
from revector.embed.remote import _pause, _Unanswered
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

pytest.importorskip("openai", reason="the extra `openai` is not installed")


@pytest.fixture
def stand() -> Iterator[Stand]:
    with standing() as server, stamina.set_testing(True, attempts=3, cap=True):
        yield server


def everything(raised: RevectorError) -> str:
    return f"{raised} {raised.why} {raised.hint} {raised!r} {raised.__cause__!r}"


def test_vectors_arrive_in_the_order_of_the_texts(stand: Stand) -> None:
    stand.script = lambda request: (200, {}, {**good(request), "data": good(request)["data"][::-1]})
    texts = ["a longer text than the others", "b", "", "mid size"]
    embedder = stand.embedder()
    assert np.array_equal(embedder.encode(texts), Embedder("hash:8").encode(texts))
    assert embedder.get_embedding_dimension() == 8
    assert embedder.identity().revision == "stand-in-2026"
    assert set(stand.keys) == {f"Bearer {KEY}"}
    assert all("dimensions" not in request for request in stand.requests)


def test_base64_is_read_as_well(stand: Stand) -> None:
    def script(request: dict[str, Any]) -> Answer:
        body = good(request)
        for item in body["data"]:
            item["embedding"] = base64.b64encode(np.array(item["embedding"], dtype="<f4").tobytes()).decode()
        return 200, {}, body

    stand.script = script
    assert np.array_equal(stand.embedder().encode(["one", "two"]), Embedder("hash:8").encode(["one", "two"]))


def test_dimensions_are_sent_only_when_asked_for(stand: Stand) -> None:
    assert stand.embedder(dimension=4).encode(["x"]).shape == (1, 4)
    assert all(request["dimensions"] == 4 for request in stand.requests)


def test_a_server_that_ignores_the_dimension_is_refused_with_both_numbers(stand: Stand) -> None:
    stand.script = lambda request: (200, {}, good({"input": request["input"]}))
    with pytest.raises(DimensionMismatch, match="openai:stand-in gives 8 dimensions, not the 4 asked for"):
        stand.embedder(dimension=4).load()


def test_a_dimension_that_changes_later_is_refused(stand: Stand) -> None:
    embedder = stand.embedder()
    embedder.load()
    stand.script = lambda request: (200, {}, good({**request, "dimensions": 6}))
    with pytest.raises(DimensionMismatch, match="openai:stand-in gives 6 dimensions, not the 8 asked for"):
        embedder.encode(["x"])


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_a_passing_trouble_is_retried(stand: Stand, status: int) -> None:
    embedder = stand.embedder()
    embedder.load()
    troubles = iter([error(status, "later"), error(status, "later"), None])
    stand.script = lambda request: next(troubles)
    assert embedder.encode(["x"]).shape == (1, 8)
    assert len(stand.requests) == 4  # one at loading, three tries


def test_trouble_that_lasts_is_an_outage_with_a_bound(stand: Stand) -> None:
    stand.script = lambda request: error(503, f"down, {KEY}")
    with pytest.raises(Outage, match=f"openai:stand-in does not answer at {stand.url}") as raised:
        stand.embedder().load()
    assert "status 503: down, ***" in raised.value.why
    assert KEY not in everything(raised.value)
    assert len(stand.requests) == 3


def test_an_outage_is_never_blamed_on_the_input(stand: Stand) -> None:
    embedder = stand.embedder()
    embedder.load()
    stand.script = lambda request: error(500, "down")
    with pytest.raises(Outage):
        embedder.encode_isolating(["a", "b"], batch_size=2)


def test_no_server_is_an_outage() -> None:
    settings = Settings(_env_file=None, openai_base_url="http://user:hidden@127.0.0.1:9/v1?k=hidden")
    with stamina.set_testing(True, attempts=2, cap=True), pytest.raises(Outage) as raised:
        Embedder("openai:x", settings=settings).load()
    assert str(raised.value) == "openai:x does not answer at http://127.0.0.1:9/v1"
    assert "hidden" not in everything(raised.value)


def test_a_request_has_a_time_limit(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revector.embed.remote.REQUEST_SECONDS", 0.05)
    stand.script = lambda request: time.sleep(0.3)
    with pytest.raises(Outage) as raised:
        stand.embedder().load()
    assert "no answer within 0.05 s" in raised.value.why


def test_retry_after_is_honoured(stand: Stand) -> None:
    embedder = stand.embedder()
    embedder.load()
    troubles = iter([error(429, "slow down", **{"retry-after": "0.3"}), None])
    stand.script = lambda request: next(troubles)
    stamina.set_testing(False)  # the fixture's testing mode would skip the wait; its end restores the state
    start = time.monotonic()
    embedder.encode(["x"])
    assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", True),
        ("2.5", 2.5),
        ("0", True),
        ("-3", True),
        ("nan", True),
        ("Wed, 21 Oct 2026 07:28:00 GMT", True),
        ("61", False),
        ("inf", False),
    ],
)
def test_how_long_a_retry_waits(header: str, expected: bool | float) -> None:
    assert _pause(_Unanswered("x", why="", hint="", retry_after=header)) == expected


def test_only_an_unanswered_request_is_repeated() -> None:
    assert _pause(KeyRejected()) is False


@pytest.mark.parametrize("status", [401, 403])
def test_a_rejected_key_stops_at_once_and_is_not_printed(stand: Stand, status: int) -> None:
    stand.script = lambda request: error(status, f"Incorrect API key provided: {KEY[:6]}***{KEY[-4:]}.")
    with pytest.raises(KeyRejected) as raised:
        stand.embedder().load()
    assert str(raised.value) == f"openai:stand-in: {stand.url} rejected the key (status {status})"
    assert not any(part in everything(raised.value) for part in (KEY, KEY[:6], KEY[-4:]))
    assert len(stand.requests) == 1


def test_a_missing_key_is_noticed_before_openai_is_asked() -> None:
    with pytest.raises(KeyRejected, match="openai:x needs a key, and OPENAI_API_KEY is not set"):
        Embedder("openai:x", settings=Settings(_env_file=None, openai_api_key=SecretStr(""))).load()


def test_a_used_up_quota_is_not_retried(stand: Stand) -> None:
    stand.script = lambda request: error(429, "You exceeded your current quota", "insufficient_quota")
    with pytest.raises(UsageError, match="openai:stand-in: the quota is used up"):
        stand.embedder().load()
    assert len(stand.requests) == 1


def test_an_unknown_model_is_named(stand: Stand) -> None:
    stand.script = lambda request: error(404, "The model `stand-in` does not exist")
    with pytest.raises(ModelUnavailable, match=r"openai:stand-in: http.* has no such model") as raised:
        stand.embedder().load()
    assert raised.value.why == "The model `stand-in` does not exist"


@pytest.mark.parametrize(
    "body",
    [
        b"<html>hello</html>",
        {"data": "no"},
        {"data": []},
        {"data": [{"index": 0, "embedding": [0.1]}, {"index": 0, "embedding": [0.1]}]},
        {"data": [{"index": 0, "embedding": "?"}]},
        {"data": [{"index": 0, "embedding": []}]},
        {"data": [{"index": 0, "embedding": [[0.1]]}]},
        [],
    ],
)
def test_an_answer_without_the_right_vectors_is_refused(stand: Stand, body: Any) -> None:
    stand.script = lambda request: (200, {}, body)
    with pytest.raises(UsageError, match="does not speak the embeddings interface"):
        stand.embedder().load()


def test_a_missing_vector_is_noticed(stand: Stand) -> None:
    embedder = stand.embedder()
    embedder.load()
    stand.script = lambda request: (200, {}, good({"input": request["input"][1:]}))
    with pytest.raises(UsageError, match="3 texts were sent, vectors came for the positions"):
        embedder.encode(["a", "b", "c"])


def test_a_bad_address_is_refused() -> None:
    settings = Settings(_env_file=None, openai_base_url="localhost:8080")
    with pytest.raises(UsageError, match="OPENAI_BASE_URL is not an address"):
        Embedder("openai:x", settings=settings).load()


def refuse_poison(request: dict[str, Any]) -> Answer | None:
    if any("poison" in text for text in request["input"]):
        return error(400, "'$.input' is invalid")
    if "" in request["input"]:
        return error(400, "input cannot be an empty string")
    if any(len(text) > 1000 for text in request["input"]):
        return error(400, "This model's maximum context length is 8192 tokens")
    return None


def test_bad_inputs_are_isolated_and_the_others_get_their_vectors(stand: Stand) -> None:
    embedder = stand.embedder()
    stand.script = refuse_poison
    texts = [f"text {i}" for i in range(100)]
    texts[13], texts[14], texts[77], texts[99] = "poison", "poison 2", "", "long " * 300
    vectors, refused = embedder.encode_isolating(texts, batch_size=50)
    assert {i: r.kind for i, r in refused.items()} == {13: "refused", 14: "refused", 77: "blank", 99: "too_long"}
    assert refused[13].error == "openai:stand-in: '$.input' is invalid"
    assert np.isnan(vectors[list(refused)]).all()
    rest = [i for i in range(100) if i not in refused]
    assert np.array_equal(vectors[rest], Embedder("hash:8").encode([texts[i] for i in rest]))
    assert max(len(request["input"]) for request in stand.requests) == 50
    assert len(stand.requests) < 60


def test_a_batch_that_is_too_large_as_a_whole_is_halved_and_nothing_is_blamed(stand: Stand) -> None:
    embedder = stand.embedder()
    stand.script = lambda request: error(413, "batch size 4 > maximum 2") if len(request["input"]) > 2 else None
    vectors, refused = embedder.encode_isolating(["a", "b", "c", "d"], batch_size=4)
    assert refused == {}
    assert np.array_equal(vectors, Embedder("hash:8").encode(["a", "b", "c", "d"]))


def test_a_model_that_refuses_everything_is_configuration_and_not_bad_input(stand: Stand) -> None:
    embedder = stand.embedder()
    embedder.load()
    stand.requests.clear()
    stand.script = lambda request: error(400, f"unsupported parameter; request {len(stand.requests)}")
    with pytest.raises(UsageError, match=r"openai:stand-in refuses every text: .*unsupported parameter") as raised:
        embedder.encode_isolating(["a", "b", "c"], batch_size=2)
    assert not isinstance(raised.value, InputRefused)
    assert len(stand.requests) == 2


def test_rows_that_are_all_bad_stay_bad_rows(stand: Stand) -> None:
    """A second run tries only what failed in the first: the same refusals again, and still no configuration error."""
    embedder = stand.embedder()
    stand.script = refuse_poison
    _, refused = embedder.encode_isolating(["poison", "poison 2", "more poison"], batch_size=50)
    assert sorted(refused) == [0, 1, 2]


@pytest.mark.parametrize(
    ("vector", "kind"),
    [([0.0] * 8, "zero"), ([None] * 8, "not_finite"), ([1e39] + [0.0] * 7, "not_finite"), ([1e-20] * 8, "zero")],
)
def test_a_vector_that_cannot_be_stored_is_refused(stand: Stand, vector: list[float | None], kind: str) -> None:
    embedder = stand.embedder()

    def script(request: dict[str, Any]) -> Answer:
        body = good(request)
        for item, text in zip(body["data"], request["input"], strict=True):
            if text == "odd":
                item["embedding"] = vector
        return 200, {}, body

    stand.script = script
    with pytest.raises(InputRefused) as raised:
        embedder.encode(["fine", "odd"])
    assert raised.value.kind == kind
    _, refused = embedder.encode_isolating(["fine", "odd", "good"], batch_size=3)
    assert {i: r.kind for i, r in refused.items()} == {1: kind}


def test_tokens_are_an_estimate_and_the_window_is_known_for_openai_only(stand: Stand) -> None:
    embedder = stand.embedder()
    assert embedder.count_tokens(["", "abcd", "abcde", "ä" * 4]).tolist() == [0, 1, 2, 2]
    assert embedder.max_tokens() is None
