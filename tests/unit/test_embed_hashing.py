"""`hash:N` is exact, fast and never zero: the tests of everything else stand on it."""

from __future__ import annotations

import random
import time
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from revector.embed import Embedder
from revector.embed.hashing import Hashing
from revector.errors import InputRefused, Interrupted, UsageError

TEXTS = [
    "",
    " ",
    "!?",
    "backup",
    "Backup",
    "restore a table",
    "a table restore",
    "Straße 北京 naïve",
    "x " * 3000,
    "\x01",
]


def test_vectors_are_the_same_on_every_machine_and_python_version() -> None:
    # Changing these digests changes every stored hash vector: raise `Hashing.revision` if it is ever meant.
    digests = {n: sha256(Embedder(f"hash:{n}").encode(TEXTS).tobytes()).hexdigest()[:16] for n in (1, 3, 8, 768)}
    assert digests == {1: "0c9fd1d2541f534b", 3: "69e6a56667e77c18", 8: "d15d5594b92a75fd", 768: "eae3b1c98b7226c4"}


@given(st.lists(st.text(max_size=60), max_size=12), st.integers(1, 40))
def test_every_text_has_a_unit_vector_that_does_not_depend_on_its_batch(texts: list[str], dimension: int) -> None:
    embedder = Embedder(f"hash:{dimension}")
    vectors = embedder.encode(texts)
    assert vectors.shape == (len(texts), dimension)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    alone = [embedder.encode([text])[0] for text in texts]
    assert all(np.array_equal(one, row) for one, row in zip(alone, vectors, strict=True))


def test_signs_that_cancel_leave_the_part_of_the_whole_text() -> None:
    provider = Hashing(1)
    up = next(w for w in map(str, range(99)) if provider.encode([w], "", "document")[0, 0] > 0)
    down = next(w for w in map(str, range(99)) if provider.encode([w], "", "document")[0, 0] < 0)
    assert abs(Embedder("hash:1").encode([f"{up} {down}"])[0, 0]) == 1


def test_different_texts_have_different_vectors() -> None:
    words = [f"w{i}" for i in range(50)]
    rng = random.Random(0)
    texts = list({" ".join(rng.sample(words, 4)) for _ in range(20_000)})
    for dimension in (8, 768):
        assert len({row.tobytes() for row in Embedder(f"hash:{dimension}").encode(texts)}) == len(texts)


def test_shared_words_make_texts_alike() -> None:
    query, near, far = Embedder("hash:768").encode(
        ["restore a table", "how to restore the table", "annual leave policy"]
    )
    assert query @ near > 0.4 > 0.2 > query @ far


def test_a_cache_that_starts_anew_changes_no_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Embedder("hash:32").encode(TEXTS)
    monkeypatch.setattr("revector.embed.hashing._CACHED_WORDS", 1)
    embedder = Embedder("hash:32")
    assert np.array_equal(np.vstack([embedder.encode([text]) for text in TEXTS]), expected)


def test_blocks_change_no_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Embedder("hash:32").encode(TEXTS)
    monkeypatch.setattr("revector.embed.hashing._BLOCK", 100)
    assert np.array_equal(Embedder("hash:32").encode(TEXTS), expected)


def test_at_least_20_000_texts_a_second() -> None:
    rng = random.Random(1)
    texts = [" ".join(f"w{rng.randrange(20_000)}" for _ in range(rng.randint(10, 20))) for _ in range(5_000)]
    embedder = Embedder("hash:768")
    seconds = []
    for _ in range(3):
        start = time.process_time()
        embedder.encode_isolating(texts, batch_size=50)
        seconds.append(time.process_time() - start)
    assert len(texts) / min(seconds) > 20_000


def test_prompts_stand_before_the_text() -> None:
    prompted = Embedder("hash:64", document_prompt="passage: ", query_prompt="query: ")
    plain = Embedder("hash:64")
    assert np.array_equal(prompted.encode(["x"]), plain.encode(["passage: x"]))
    assert np.array_equal(prompted.encode(["x"], kind="query"), plain.encode(["query: x"]))


def test_no_texts_give_no_vectors() -> None:
    embedder = Embedder("hash:5")
    assert embedder.encode([]).shape == (0, 5)
    vectors, refused = embedder.encode_isolating([], batch_size=50)
    assert vectors.shape == (0, 5)
    assert refused == {}


def test_facts_about_the_model() -> None:
    embedder = Embedder("hash:5")
    assert embedder.get_embedding_dimension() == 5
    assert embedder.get_model_name() == embedder.spec == "hash:5"
    assert embedder.max_tokens() is None
    assert embedder.count_tokens(["two words", "", "\udcff"]).tolist() == [2, 0, 0]
    assert embedder.download_needed() is None


def test_one_text_instead_of_a_list_is_refused() -> None:
    with pytest.raises(UsageError, match="encode takes a list of texts, not one text"):
        Embedder("hash:5").encode("text")


def test_stray_bytes_of_a_shell_are_refused_and_isolated() -> None:
    embedder = Embedder("hash:5")
    with pytest.raises(InputRefused, match="hash:5: the text is not valid Unicode"):
        embedder.encode(["fine", "not \udcff fine"])
    vectors, refused = embedder.encode_isolating(["fine", "not \udcff fine", "good"], batch_size=50)
    assert {i: r.kind for i, r in refused.items()} == {1: "refused"}
    assert np.isnan(vectors[1]).all()
    assert np.array_equal(vectors[[0, 2]], embedder.encode(["fine", "good"]))


def test_stop_ends_between_batches() -> None:
    asked = iter([False, False, True])
    with pytest.raises(Interrupted):
        Embedder("hash:5").encode_isolating(["a", "b", "c", "d"], batch_size=1, stop=lambda: next(asked))
