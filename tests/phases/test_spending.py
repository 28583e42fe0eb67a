"""Rate limits and a budget of a model behind an address: in the ledger, before the call, shared by every worker."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
import stamina

from fix_commands import command
from fix_provider import KEY, Answer, Stand, error, good, standing
from fix_tables import (
    advance,
    assert_exact,
    fill,
    following,
    knowledge_base,
    one,
    settings,
    stage_of,
    steering,
    until,
    vector,
)
from revector import Request
from revector.db import Database, Session
from revector.embed.spec import PROBES
from revector.errors import BudgetSpent, Interrupted, Outage, UsageError
from revector.spending import Purse, pause
from revector.throttle import Tuning

pytest.importorskip("openai", reason="the extra `openai` is not installed")

NEW = "openai:new-32"
REQUEST = Request(from_="hash:16", to=NEW)


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    with standing() as server, stamina.set_testing(True, attempts=2, cap=True):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield server


def tokens(stand: Stand, since: int = 0) -> int:
    """What the provider has charged for."""
    return sum(-(-len(text.encode()) // 4) for request in stand.requests[since:] for text in request["input"])


def spent(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    row = connection.execute(
        "SELECT coalesce(sum(tokens), 0)::int, coalesce(sum(requests), 0)::int FROM revector.spending"
    ).fetchone()
    assert row is not None
    return row


@pytest.mark.parametrize(
    ("limit", "share", "sizes"),
    [
        (600, 1, [1]),
        (3, 1, [1]),
        (2, 1, [1]),
        (100_000, 10_000, [9_000]),
        (40_000, 4_000, [*[100] * 400, 8_000]),
        (1_000_000, 100_000, [*[1_000] * 1_000, 100_000]),
        (1_000_000, 100_000, [100_000, 5_000]),
        (1_000, 100, [100, 37, 90]),
        (1_000, 100, [37, 1_000, 600, 1]),
    ],
)
def test_no_minute_holds_more_than_the_limit(limit: int, share: int, sizes: list[int]) -> None:
    """Sent as early as allowed for twenty minutes, large ones after small ones too; every window of a minute is counted."""
    now, ends, window, sent = 0.0, 0.0, deque[tuple[float, int]](), 0
    for size in itertools.cycle(sizes):
        lead, after = pause(size, limit, share)
        now = max(now, ends + lead) if sent else 0.0
        if now >= 1200:
            break
        window.append((now, size))
        sent += size
        while now - window[0][0] >= 60:
            window.popleft()
        assert sum(n for _, n in window) <= limit
        ends = now + after
    slowest = limit - share if max(sizes) <= share else (limit - share) / 2
    assert sent >= 20 * slowest - 2 * sum(sizes), "slower than it has to be"


def test_the_pause_follows_what_a_request_has_really_taken(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """60,000 a minute are 900 a second, as a tenth is left for the request at a minute's end."""
    knowledge_base(connection, 5)
    advance(dsn, "EXPANDED", Request(from_="hash:16", to="hash:32"))
    connection.execute("""UPDATE revector.migrations SET limits = '{"tokens_per_minute": 60000}'""")
    purse = Purse(Database(settings(dsn)), one(connection, "SELECT id FROM revector.migrations"), "kb")
    account = purse.account(2, NEW)

    def after(*, of: float) -> float:
        return float(one(connection, "SELECT extract(epoch FROM tokens_at)::float8 FROM revector.spending")) - of

    account.before(10)(10)
    settle = account.before(900)
    began = after(of=1.0)
    settle(2700)
    assert after(of=began) == pytest.approx(3, abs=0.01)
    assert account.most == 6000
    account.before(1)(1)
    assert account.most == 2000, "a batch shrinks as its texts turn out denser"
    connection.execute("UPDATE revector.spending SET density = 1")
    first = account.before(900)
    began = after(of=1.0)
    first(450)
    assert after(of=began) == pytest.approx(0.5, abs=0.01)
    first = account.before(900)
    second = account.before(900)
    began = after(of=1.0)
    first(450)
    assert after(of=began) == pytest.approx(1, abs=0.01), "others have begun at its end"
    second(0)
    assert after(of=began) == pytest.approx(0, abs=0.01)
    first = account.before(900)
    account.before(900)
    began = after(of=1.0)
    first(1800)
    assert after(of=began) == pytest.approx(2, abs=0.01)
    purse.close()


def test_a_text_of_many_tokens_gets_its_turn(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A single text may be more than a batch. It waits until it fits into the minute, and those of others wait for it."""
    knowledge_base(connection, 5)
    advance(dsn, "EXPANDED", Request(from_="hash:16", to="hash:32"))
    connection.execute("""UPDATE revector.migrations SET limits = '{"tokens_per_minute": 60000}'""")
    number = one(connection, "SELECT id FROM revector.migrations")
    stop, ended = threading.Event(), threading.Event()
    large = Purse(Database(settings(dsn)), number, "kb", stop=stop.is_set)
    small = Purse(Database(settings(dsn)), number, "kb", stop=ended.is_set)

    def others() -> None:
        account = small.account(2, NEW)
        with suppress(Interrupted):
            while True:
                account.before(90)

    other = threading.Thread(target=others)
    other.start()
    until(lambda: spent(connection)[1] > 3)
    account, began = large.account(2, NEW), time.monotonic()
    settle = account.before(7800)
    assert 2 <= time.monotonic() - began < 20
    settle(60)

    def interrupt() -> None:
        until(lambda: spent(connection)[0] > 50_000)
        stop.set()

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(Interrupted):
        account.before(50_000)
    ended.set()
    other.join()
    interrupting.join()
    counted, requests = spent(connection)
    assert counted == 90 * (requests - 2) + 60, "what was counted and not sent costs nothing"
    large.close()
    small.close()


def test_two_processes_share_the_limit(dsn: str, connection: psycopg.Connection[Any], stand: Stand) -> None:
    """Requests are granted one by one, whoever asks: two purses, as two processes have them."""
    knowledge_base(connection, 5)
    advance(dsn, "EXPANDED", REQUEST)
    connection.execute("""UPDATE revector.migrations SET limits = '{"requests_per_minute": 1200}'""")
    row = one(connection, "SELECT id FROM revector.migrations")
    granted: list[float] = []
    ended = time.monotonic() + 2

    def work() -> None:
        purse = Purse(Database(settings(dsn)), row, "kb")
        account = purse.account(2, NEW)
        while time.monotonic() < ended:
            account.before(10)
            granted.append(time.monotonic())
        purse.close()

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    granted.sort()
    assert 15 < len(granted) <= 2 * 20 + 4
    assert max(sum(1 for g in granted if a <= g < a + 1) for a in granted) <= 21
    assert spent(connection) == (10 * len(granted), len(granted))


def test_a_run_stops_before_it_passes_its_budget_and_goes_on(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand
) -> None:
    knowledge_base(connection, 60)
    run = ("run", "kb", "--from", "hash:16", "--to", NEW, "--batch-size", "5")
    told = command(dsn, *run, "--max-cost", "1").exits(2)
    assert told.last.startswith("error: --max-cost needs a price above 0") and "revector" in told.last
    assert one(connection, "SELECT to_regnamespace('revector') IS NULL"), "it was refused before anything was made"
    before = len(stand.requests)
    stopped = command(dsn, *run, "--price-per-million-tokens", "10000", "--max-cost", "5").exits(4)
    assert stopped.last.startswith(f"stopped: {NEW}: the next request would cost ")
    assert " of 5 are spent" in stopped.last and "next: allow more: revector tune kb --max-cost " in stopped.last
    assert "The migration is at EXPANDED; hash:16 answers." in stopped.last
    charged, requests = spent(connection)
    assert charged * 10000 / 1e6 <= 5
    assert stage_of(connection) == ("EXPANDED", None)
    there = one(connection, "SELECT count(*) FROM kb WHERE embedding_g2 IS NOT NULL")
    assert 0 < there < 60, "what was paid for is written"
    assert len(stand.requests) - before >= requests
    status = command(dsn, "status", "kb", "--json").exits(0).json
    assert status["spent"] == {
        "tokens": charged,
        "requests": requests,
        "cost": round(charged / 100, 6),
        "max_cost": 5.0,
    }
    tuned = command(dsn, "tune", "kb", "--max-cost", "100").exits(0)
    assert "100.00 in all" in tuned.out
    command(dsn, *run).exits(0)
    assert stage_of(connection) == ("VERIFIED", None)
    assert_exact(connection, "kb", "content", {"embedding": "hash:16", "embedding_g2": "hash:32"}, at_least=60)
    again = spent(connection)[0] - charged
    assert again < charged * 4, "rows that were paid for were embedded again"


def test_restore_has_a_budget_too(dsn: str, connection: psycopg.Connection[Any], stand: Stand) -> None:
    """Rows that changed since the backup are asked of the old model: the limits of `run` hold for them, by `restore` itself."""
    old = "openai:old-16"
    knowledge_base(connection, 60)
    advance(dsn, "CUT_OVER", Request(from_=old, to="hash:32", backup=True))
    with steering(dsn) as migration:
        migration.finalize()
    for number, text in connection.execute("SELECT id, 'changed: ' || content FROM kb WHERE id > 5").fetchall():
        connection.execute(
            "UPDATE kb SET content = %s, embedding = %s WHERE id = %s", (text, vector("hash:32", text), number)
        )
    restore = ("restore", "kb", "--batch-size", "5")
    command(dsn, *restore, "--max-cost", "1").exits(2)
    limits = ("--max-requests-per-minute", "6000", "--max-tokens-per-minute", "1000000")
    money = ("--price-per-million-tokens", "10000", "--max-cost", "5")
    stopped = command(dsn, *restore, *money, *limits).exits(4)
    assert stopped.last.startswith(f"stopped: {old}: the next request would cost ")
    assert "next: allow more: revector tune kb --max-cost " in stopped.last
    assert spent(connection)[0] * 10000 / 1e6 <= 5
    command(dsn, *restore, "--max-cost", "100").exits(0)
    assert one(connection, "SELECT limits FROM revector.migrations ORDER BY id DESC LIMIT 1") == {
        "price": 10000,
        "max_cost": 100,
        "requests_per_minute": 6000,
        "tokens_per_minute": 1000000,
    }
    assert stage_of(connection) == ("VERIFIED", None)
    assert_exact(connection, "kb", "content", {"embedding_g3": "hash:16"}, at_least=60)


def dense(request: dict[str, Any]) -> Answer:
    """Three tokens for every one that we estimate, as where texts are no English prose."""
    body = good(request)
    body["usage"] = {"total_tokens": 3 * body["usage"]["total_tokens"]}
    return 200, {}, body


def test_a_budget_holds_where_texts_are_denser_than_estimated(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand
) -> None:
    """What the probes cost tells how dense the provider counts, before the first batch is sent."""
    knowledge_base(connection, 60)
    advance(dsn, "EXPANDED", REQUEST)
    stand.script, since = dense, len(stand.requests)
    begun = spent(connection)[0]
    with steering(dsn) as migration:
        migration.tune({"price": 10000.0, "max_cost": 8.0}, batch_size=25)
    with pytest.raises(BudgetSpent, match="the next request would cost"), steering(dsn) as migration:
        migration.run()
    assert spent(connection)[0] == begun + 3 * tokens(stand, since)
    assert spent(connection)[0] * 10000 / 1e6 <= 8


def test_a_budget_is_passed_by_one_request_at_most(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """The first dense text passes it, in each of two workers at once; what the ledger has learnt holds for both."""
    knowledge_base(connection, 5)
    advance(dsn, "EXPANDED", Request(from_="hash:16", to="hash:32"))
    connection.execute("""UPDATE revector.migrations SET limits = '{"price": 10000, "max_cost": 10}'""")
    number = one(connection, "SELECT id FROM revector.migrations")
    purses = [Purse(Database(settings(dsn)), number, "kb") for _ in range(2)]
    accounts = [purse.account(2, NEW) for purse in purses]
    accounts[0].before(100)(300)
    accounts[1].before(10)(500)  # too few to tell
    with pytest.raises(BudgetSpent, match="the next request would cost 3, and 8 of 10 are spent"):
        accounts[1].before(100)
    under_way = [account.before(30) for account in accounts]
    for settle in under_way:
        settle(300)
    assert spent(connection) == (1400, 4)
    for account in accounts:
        with pytest.raises(BudgetSpent):
            account.before(1)
    for purse in purses:
        purse.close()


def test_tokens_are_counted_even_when_the_write_fails(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    knowledge_base(connection, 20)
    advance(dsn, "EXPANDED", REQUEST)
    before, since = spent(connection), len(stand.requests)
    original = Session._execute

    def failing(self: Session, statement: Any, params: Any) -> Any:
        text = statement if isinstance(statement, str) else statement.as_string(None)
        if "UPDATE ONLY" in text:
            raise psycopg.errors.DiskFull("no space left on device")
        return original(self, statement, params)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_execute", failing)
        with pytest.raises(Exception, match="resources"), steering(dsn) as migration:
            migration.run()
    assert one(connection, "SELECT count(*) FROM kb WHERE embedding_g2 IS NOT NULL") == 0
    assert spent(connection)[0] - before[0] == tokens(stand, since) > 100
    assert spent(connection)[1] - before[1] == len(stand.requests) - since


def test_every_attempt_counts_and_only_what_is_answered_costs(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand
) -> None:
    knowledge_base(connection, 5)
    advance(dsn, "VERIFIED", REQUEST)
    before, since = spent(connection), len(stand.requests)
    connection.execute("UPDATE kb SET content = 'new' WHERE id = 1")
    stand.script = lambda request: None if set(request["input"]) <= set(PROBES) else error(503, "overloaded")
    with pytest.raises(Outage):
        fill(dsn, connection)
    charged = sum(
        -(-len(text.encode()) // 4)
        for request in stand.requests[since:]
        if set(request["input"]) <= set(PROBES)
        for text in request["input"]
    )
    assert spent(connection) == (before[0] + charged, before[1] + len(stand.requests) - since)


def test_a_request_that_a_server_took_and_never_answered_keeps_its_estimate(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have done the work before it hung up; one that no server took has cost nothing."""
    knowledge_base(connection, 5)
    advance(dsn, "VERIFIED", REQUEST)
    before, since = spent(connection), len(stand.requests)
    connection.execute("UPDATE kb SET content = 'new' WHERE id = 1")
    stand.script = lambda request: None if set(request["input"]) <= set(PROBES) else (0, {}, b"")
    with pytest.raises(Outage):
        fill(dsn, connection)
    assert spent(connection) == (before[0] + tokens(stand, since), before[1] + len(stand.requests) - since)
    before = spent(connection)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(Outage):
        fill(dsn, connection)
    assert spent(connection)[0] == before[0]
    assert spent(connection)[1] > before[1]


def test_limits_that_do_not_fit_are_refused(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A limit that would do nothing is not taken."""
    knowledge_base(connection, 5)
    advance(dsn, "EXPANDED", Request(from_="hash:16", to="hash:32"))
    with steering(dsn) as migration:
        for change in ({"requests_per_minute": 5}, {"tokens_per_minute": 5}, {"price": 1.0, "max_cost": 5}):
            with pytest.raises(UsageError, match="neither hash:16 nor hash:32 is asked over a network"):
                migration.tune(change)
        with pytest.raises(UsageError, match="--max-cost needs a price"):
            migration.tune({"max_cost": 5})
        row = migration.latest()
        assert row is not None and row.limits == Tuning()


def test_a_limit_that_holds_back_can_be_interrupted_and_lifted(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 5)
    advance(dsn, "EXPANDED", Request(from_="hash:16", to="hash:32"))
    connection.execute("""UPDATE revector.migrations SET limits = '{"tokens_per_minute": 10}'""")
    stop, notes = threading.Event(), list[str]()
    number = one(connection, "SELECT id FROM revector.migrations")
    purse = Purse(Database(settings(dsn)), number, "kb", stop=stop.is_set, note=notes.append)
    account = purse.account(2, NEW)
    account.before(100)
    began = time.monotonic()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Interrupted):
        account.before(100)
    assert time.monotonic() - began < 2
    assert notes == [f"held back by the limit of 10 tokens a minute for {NEW}; it goes on by itself"]
    stop.clear()
    threading.Timer(0.3, lambda: connection.execute("UPDATE revector.migrations SET limits = '{}'")).start()
    account.before(100)
    assert 0.2 < time.monotonic() - began < 4
    connection.execute("""UPDATE revector.migrations SET limits = '{"price": 10, "max_cost": 0.0025}'""")
    account.before(50)
    with pytest.raises(BudgetSpent, match=r"cost 0\.001, and 0\.0025 of 0\.0025 are spent"):
        account.before(100)
    purse.close()


def test_an_account_whose_first_request_is_refused_is_asked_again(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    """What the refusal rolls back is no account that is there."""
    knowledge_base(connection, 5)
    advance(dsn, "EXPANDED", Request(from_="hash:16", to="hash:32"))
    connection.execute("""UPDATE revector.migrations SET limits = '{"price": 10, "max_cost": 0.0025}'""")
    purse = Purse(Database(settings(dsn)), one(connection, "SELECT id FROM revector.migrations"), "kb")
    account = purse.account(2, NEW)
    for _ in range(2):
        with pytest.raises(BudgetSpent):
            account.before(1000)
    account.before(250)
    purse.close()
    assert spent(connection) == (250, 1)


def test_a_follower_whose_budget_is_spent_fills_the_other_models_rows(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand
) -> None:
    """It says so, waits, and goes on when more is allowed."""
    knowledge_base(connection, 20)
    advance(dsn, "CUT_OVER", REQUEST)
    with steering(dsn) as migration:
        # Enough for the probes that prove the model, and not for twenty rows.
        proof = sum(-(-len(text.encode()) // 4) for text in (*PROBES, PROBES[0]))
        migration.tune({"price": 1000.0, "max_cost": (spent(connection)[0] + proof + 10) / 1000})
        with following(dsn, connection):
            connection.execute("UPDATE kb SET content = 'new ' || id")
            until(lambda: one(connection, "SELECT count(*) FROM kb WHERE embedding_g1 IS NULL") == 0)
            until(lambda: one(connection, "SELECT count(*) FROM revector.heartbeats WHERE trouble IS NOT NULL"))
            assert one(connection, "SELECT count(*) FROM kb WHERE embedding IS NULL") == 20
            (alert,) = migration.status().alerts
            assert alert.kind == "follower_trouble" and "the next request would cost" in alert.what
            migration.tune({"max_cost": 100.0})
            until(lambda: one(connection, "SELECT count(*) FROM kb WHERE embedding IS NULL") == 0)
    assert_exact(connection, "kb", "content", {"embedding_g1": "hash:16", "embedding": "hash:32"}, at_least=20)
