"""Names of models: what is understood, what is refused and how, and identities as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from revector.embed import Embedder, Identity, known_models, parse
from revector.embed.spec import KNOWN_MODELS
from revector.errors import DimensionMismatch, ModelChanged, UsageError
from revector.settings import Settings


@pytest.mark.parametrize(
    ("text", "kind", "canonical"),
    [
        ("hash:768", "hash", "hash:768"),
        (" hash:007 ", "hash", "hash:7"),
        ("bundled:minilm-768", "bundled", "bundled:minilm-768"),
        ("all-mpnet-base-v2", "local", "all-mpnet-base-v2"),
        ("sentence-transformers/all-mpnet-base-v2", "local", "all-mpnet-base-v2"),
        ("BAAI/bge-small-en-v1.5", "local", "BAAI/bge-small-en-v1.5"),
        ("openai:text-embedding-3-small", "openai", "openai:text-embedding-3-small"),
        ("openai:nomic-embed-text:v1.5", "openai", "openai:nomic-embed-text:v1.5"),
        ("/models/mine", "folder", "/models/mine"),
    ],
)
def test_a_name_has_one_canonical_spelling(text: str, kind: str, canonical: str) -> None:
    spec = parse(text)
    assert (spec.kind, str(spec)) == (kind, canonical)
    assert parse(str(spec)) == spec


def test_a_folder_means_the_same_in_every_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(parse("./model")) == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "no model is named", "name one, for example: all-mpnet-base-v2"),
        ("hash", "hash needs the model after a colon", "for example: hash:768"),
        ("hash:0", "hash:0: the dimension is a whole number from 1 on", "for example: hash:768"),
        ("hash:x", "hash:x: the dimension is a whole number from 1 on", "for example: hash:768"),
        ("hash:-1", "hash:-1: the dimension is a whole number from 1 on", "for example: hash:768"),
        ("hash:٣", "hash:٣: the dimension is a whole number from 1 on", "for example: hash:768"),
        ("bundled:minlm", "bundled:minlm: there is no such bundled model", "did you mean bundled:minilm?"),
        ("openai:", "openai: names no model of the provider", "for example: openai:text-embedding-3-small"),
        ("opnai:x", "opnai:x: opnai: is no kind of model", "did you mean openai:?"),
        ("all mpnet base v2", "'all mpnet base v2' cannot be a model's name", "did you mean all-mpnet-base-v2?"),
        ("a/b/c", "'a/b/c' cannot be a model's name", "one of: bundled:static, bundled:minilm, bundled:minilm-768"),
    ],
)
def test_nonsense_is_refused_with_a_way_out(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Embedder(text)
    assert (str(refusal.value), refusal.value.hint) == (message, hint)


def test_models_of_a_dimension_are_named() -> None:
    assert known_models(384)[:3] == ["bundled:static", "bundled:minilm", "all-MiniLM-L6-v2"]
    assert "all-mpnet-base-v2" in known_models(768)
    assert known_models(7) == []


def test_a_wrong_dimension_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(DimensionMismatch, match="bundled:minilm gives 384 dimensions, not the 768 asked for"):
        Embedder("bundled:minilm", dimension=768)


def test_importing_the_package_imports_no_numbers_and_no_driver() -> None:
    heavy = "{'numpy', 'scipy', 'torch', 'psycopg', 'openai', 'sentence_transformers'}"
    code = f"import sys, revector.embed, revector.embed.spec; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_identity_survives_json() -> None:
    identity = Embedder("hash:16", query_prompt="query: ").identity()
    assert identity.normalised
    assert (identity.model, identity.dimension, identity.query_prompt) == ("hash:16", 16, "query: ")
    value = json.loads(json.dumps(identity.to_json()))
    assert Identity.from_json(value) == identity
    assert Identity.from_json({**value, "added_later": 1}) == identity


def test_the_same_model_passes_and_another_one_is_refused() -> None:
    recorded = Embedder("hash:64").identity()
    Embedder("hash:64").check_identity(recorded)
    with pytest.raises(
        ModelChanged, match="hash:65 is not the model that was recorded: it gives 65 dimensions"
    ) as other:
        Embedder("hash:65").check_identity(recorded)
    assert other.value.hint.startswith("make hash:64 (revision 1) answer again")
    with pytest.raises(ModelChanged, match="its document prompt is 'passage: ', recorded is ''"):
        Embedder("hash:64", document_prompt="passage: ").check_identity(recorded)
    with pytest.raises(ModelChanged, match="its query prompt is 'query: ', recorded is ''"):
        Embedder("hash:64", query_prompt="query: ").check_identity(recorded)


def test_a_model_that_answers_differently_under_the_same_name_is_refused() -> None:
    recorded = Embedder("hash:64").identity().to_json()
    recorded["probes"][2] = recorded["probes"][1]
    with pytest.raises(ModelChanged, match=r"its vector of a probe text has cosine -?0"):
        Embedder("hash:64").check_identity(Identity.from_json(recorded))


def test_a_probe_just_above_the_threshold_is_the_same_model() -> None:
    recorded = Embedder("hash:2").identity().to_json()
    x, y = recorded["probes"][0]
    recorded["probes"][0] = [x - 0.03 * y, y + 0.03 * x]  # turned by 0.03: cosine 0.99955
    Embedder("hash:2").check_identity(Identity.from_json(recorded))
    recorded["probes"][0] = [x - 0.06 * y, y + 0.06 * x]  # turned by 0.06: cosine 0.9982
    with pytest.raises(ModelChanged, match=r"cosine 0\.998"):
        Embedder("hash:2").check_identity(Identity.from_json(recorded))


def test_the_example_explains_every_setting_and_its_models_are_real() -> None:
    example = (Path(__file__).parents[2] / ".env.example").read_text()
    set_here = re.findall(r"^([A-Z_]+)=", example, re.MULTILINE)
    assert sorted(set_here) == sorted(name.upper() for name in Settings.model_fields)
    rows = re.findall(r"^#   (\S+:\S+|\S+-\S+)\s+\d+ M\s+(\d+)", example, re.MULTILINE)
    assert len(rows) == 6
    assert all(KNOWN_MODELS[name] == int(dimension) for name, dimension in rows)
