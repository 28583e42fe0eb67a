"""How the best existing tool breaks when its model does: each test guards one sentence of that list."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import stamina

from fix_commands import command, ended, started, until
from fix_provider import KEY, Answer, Stand, error, good, standing
from fix_tables import advance, assert_exact, knowledge_base, one, stage_of, steering
from revector import Request
from revector.embed import Embedder
from revector.embed.spec import PROBES
from revector.errors import GateFailed, KeyRejected, Outage, Refused, RevectorError, UsageError

pytest.importorskip("openai", reason="the extra `openai` is not installed")

OLD, NEW = "hash:16", "openai:new-32"
REQUEST = Request(from_=OLD, to=NEW)
SIDES = {"embedding": OLD, "embedding_g2": "hash:32"}


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    with standing() as server, stamina.set_testing(True, attempts=2, cap=True):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield server


def to_rows(answer: Callable[[dict[str, Any]], Answer]) -> Callable[[dict[str, Any]], Answer | None]:
    """The probes are answered well, so that it happens in the middle of the work."""
    return lambda request: None if set(request["input"]) <= set(PROBES) else answer(request)


def vectors(vector: Callable[[str], list[float]]) -> Callable[[dict[str, Any]], Answer]:
    def script(request: dict[str, Any]) -> Answer:
        body = good(request)
        for item, text in zip(body["data"], request["input"], strict=True):
            item["embedding"] = vector(text)
        return 200, {}, body

    return script


@pytest.mark.parametrize(("status", "raised"), [(401, KeyRejected), (503, Outage)])
def test_peer_02_a_total_failure_of_the_provider_is_no_success(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand, status: int, raised: type[RevectorError]
) -> None:
    """A bad key for all 600 rows: "Apply complete", exit 0, an index on an empty column, 1,208 requests."""
    knowledge_base(connection, 600)
    advance(dsn, "EXPANDED", REQUEST)
    stand.script = to_rows(lambda request: error(status, f"no: {KEY}"))
    asked = len(stand.requests)
    with pytest.raises(raised) as caught, steering(dsn) as migration:
        migration.run()
    assert caught.value.exit_code != 0 and "EXPANDED" in caught.value.why
    assert len(stand.requests) - asked <= 20, "one failure is not paid for once a row"
    assert stage_of(connection) == ("EXPANDED", None)
    assert one(connection, "SELECT count(*) FROM revector.failures") == 0, "no row is to blame"
    assert one(connection, "SELECT count(*) FROM pg_index WHERE indrelid = 'kb'::regclass") == 2, "an index was built"
    with pytest.raises(Refused, match="cutover is not possible at EXPANDED"), steering(dsn) as migration:
        migration.cutover(without_follower=True)


def test_peer_03_refused_rows_are_tried_again_and_never_swapped_in(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand
) -> None:
    """Rejected rows are never retried; then cutover --allow-missing swapped in a column with 0 of 600 vectors."""
    knowledge_base(connection, 60)
    stand.script = to_rows(
        lambda request: error(400, "bad input") if any("7" in t for t in request["input"]) else (200, {}, good(request))
    )
    with pytest.raises(GateFailed, match="refuses") as caught, steering(dsn) as migration:
        migration.run(REQUEST)
    refused = one(connection, "SELECT count(*) FROM kb WHERE embedding_g2 IS NULL")
    assert 0 < refused < 60 and f"--allow-failed {refused}" in caught.value.hint
    stand.script = lambda request: None
    with steering(dsn) as migration:
        migration.run()
    assert one(connection, "SELECT count(*) FROM revector.failures") == 0
    assert_exact(connection, "kb", "content", SIDES, at_least=60)
    with steering(dsn) as migration:
        migration.abort()
    stand.script = to_rows(vectors(lambda text: [float("nan")] * 32))
    for step in ("run", "run", "cutover"):
        with pytest.raises((GateFailed, Refused)), steering(dsn) as migration:
            if step == "run":
                migration.run(REQUEST, allow_failed=60)
            else:
                migration.cutover(without_follower=True, allow_failed=60)
    assert stage_of(connection) == ("INDEXED", None)
    assert_exact(connection, "kb", "content", {"embedding": OLD}, at_least=60)


@pytest.mark.parametrize(
    ("vector", "told"),
    [
        (lambda text: [0.0] * 32, "the vector is zero"),
        (lambda text: [float("nan")] * 32, "not finite"),
        (lambda text: [1.0] + [0.0] * 31, "collapsed|not one of its own|different texts|reproduced"),
        (lambda text: Embedder("hash:32").encode([text[::-1]])[0].tolist(), "reproduced|cosine"),
    ],
    ids=["zero", "nan", "the same for all", "of another text"],
)
def test_peer_14_what_the_model_answers_is_checked(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand, vector: Callable[[str], list[float]], told: str
) -> None:
    """A provider that returns all-zero vectors: complete, Ready. No check for NaN, zero, duplicates or re-embedding."""
    knowledge_base(connection, 60)
    stand.script = to_rows(vectors(vector))
    if "reproduced" in told and "collapsed" not in told:
        advance(dsn, "BACKFILLED", REQUEST)
        stand.script = lambda request: None
    with pytest.raises(GateFailed) as caught, steering(dsn) as migration:
        migration.run(REQUEST)
    assert re.search(told, f"{caught.value} {caught.value.why}")
    assert not stage_of(connection)[0].startswith("VERIFIED")
    with pytest.raises(Refused), steering(dsn) as migration:
        migration.cutover(without_follower=True)


def test_peer_14_a_zero_vector_from_elsewhere_fails_verify(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand
) -> None:
    knowledge_base(connection, 60)
    advance(dsn, "INDEXED", REQUEST)
    connection.execute("SET revector.writer = 'on'")
    connection.execute("UPDATE kb SET embedding_g2 = array_fill(0, '{32}')::vector WHERE id = 7")
    with pytest.raises(GateFailed, match="1 zero vectors"), steering(dsn) as migration:
        migration.run()
    assert stage_of(connection) == ("INDEXED", None)


def test_peer_15_a_strict_server_and_a_model_that_nobody_knows(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand
) -> None:
    """`dimensions` is always sent, which strict servers reject with 400; then every row counts as bad."""
    knowledge_base(connection, 30)
    stand.script = lambda request: (
        error(400, "Model does not support matryoshka representation") if "dimensions" in request else None
    )
    request = Request(from_=OLD, to="openai:in-house/unheard-of-24")
    with steering(dsn) as migration:
        result = migration.run(request)
    assert result.passed and result.next == "revector cutover kb"
    assert all("dimensions" not in request for request in stand.requests)
    assert_exact(connection, "kb", "content", {"embedding": OLD, "embedding_g2": "hash:24"}, at_least=30)


def test_peer_15_a_refusal_of_everything_is_a_wrong_configuration(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand
) -> None:
    """When even a harmless text is refused, no row is blamed, and it is said what is wrong."""
    knowledge_base(connection, 30)
    advance(dsn, "EXPANDED", REQUEST)
    texts = iter(range(10_000))
    stand.script = lambda request: error(400, "unsupported parameter") if next(texts) > 1 else None
    with pytest.raises(UsageError, match="refuses every text") as caught, steering(dsn) as migration:
        migration.run()
    assert "revector run kb" in caught.value.hint
    assert one(connection, "SELECT count(*) FROM revector.failures") == 0


@pytest.mark.roads
def test_peer_19_the_budget_is_the_databases(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spend cap is per directory, not per database: another folder, or another machine, starts at nothing."""
    knowledge_base(connection, 60)
    run = ("run", "kb", "--from", OLD, "--to", NEW, "--batch-size", "5")
    money = ("--price-per-million-tokens", "10000", "--max-cost", "5")
    command(dsn, *run, *money).exits(4)
    charged = one(connection, "SELECT sum(tokens) FROM revector.spending")
    for folder in ("elsewhere", "and elsewhere"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        command(dsn, *run).exits(4)
    assert one(connection, "SELECT sum(tokens) FROM revector.spending") <= 500
    assert charged > 250, "it stopped long before the budget was spent"
    filled = one(connection, "SELECT count(*) FROM kb WHERE embedding_g2 IS NOT NULL")
    assert 0 < filled < 60


def test_peer_19_no_text_is_cut_and_other_scripts_are_counted(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand
) -> None:
    """Text over 24,000 characters is cut silently; four characters a token is far off for Chinese."""
    knowledge_base(connection, 5)
    long = "a sentence of the longest text there is. " * 1000
    connection.execute("UPDATE kb SET content = %s, embedding = array_fill(1, '{16}')::vector WHERE id = 0", (long,))
    with steering(dsn) as migration:
        migration.run(Request(from_=OLD, to="openai:text-embedding-3-small-32"))
    sent = {text for request in stand.requests for text in request["input"]}
    assert long in sent and max(map(len, sent)) == len(long)
    chinese = "数据库中的向量必须与其文本保持一致" * 10
    assert int(stand.embedder().count_tokens([chinese])[0]) >= 0.7 * len(chinese)


@pytest.mark.roads
def test_peer_19_sigterm_is_handled(dsn: str, connection: psycopg.Connection[Any], stand: Stand) -> None:
    """SIGTERM is unhandled: what is paid for and not written is lost."""
    knowledge_base(connection, 60)
    stand.script = lambda request: _slowly(request)
    run = started(dsn, "run", "kb", "--from", OLD, "--to", NEW, "--batch-size", "1")
    until(
        lambda: (
            one(connection, "SELECT to_regclass('revector.spending') IS NOT NULL")
            and one(connection, "SELECT coalesce(sum(requests), 0) FROM revector.spending") > 12
        )
    )
    answer = ended(run, signal.SIGTERM).exits(4)
    assert "Traceback" not in answer.err and answer.last.startswith("stopped: ")
    filled = one(connection, "SELECT count(*) FROM kb WHERE embedding_g2 IS NOT NULL")
    assert filled > 0, "what was embedded was thrown away"
    stand.script = lambda request: None
    command(dsn, "run", "kb").exits(0)
    assert_exact(connection, "kb", "content", SIDES, at_least=60)


def _slowly(request: dict[str, Any]) -> Answer:
    time.sleep(0.03)
    return 200, {}, good(request)
