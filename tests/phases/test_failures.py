"""Every way in which a model can fail, in every phase that asks one: what is said, what is true, and that it goes on.

The models are `openai:` ones at a stand-in on this machine that embeds as `hash:N` does, so every vector is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
import stamina

from fix_commands import command as run_command
from fix_provider import KEY, Answer, Stand, error, good, standing
from fix_tables import (
    Halt,
    advance,
    assert_exact,
    halting,
    knowledge_base,
    oid_of,
    one,
    settings,
    shape,
    stage_of,
    steering,
    vector,
)
from revector import Request
from revector.embed import remote
from revector.embed.spec import PROBES
from revector.errors import (
    DimensionMismatch,
    GateFailed,
    InputRefused,
    KeyRejected,
    Outage,
    RevectorError,
    UsageError,
)
from revector.follow import Follower
from revector.phases import verify
from revector.work import Note, Observation

pytest.importorskip("openai", reason="the extra `openai` is not installed")

OLD, NEW = "openai:old-16", "openai:new-32"
REQUEST = Request(from_=OLD, to=NEW)
EXACT = {"openai:old-16": "hash:16", "openai:new-32": "hash:32"}


def changed(change: Callable[[list[Any]], None]) -> Callable[[dict[str, Any]], Answer]:
    """A good answer with something done to its vectors."""

    def script(request: dict[str, Any]) -> Answer:
        body = good(request)
        change(body["data"])
        return 200, {}, body

    return script


def every(vector: Callable[[list[float]], list[float]]) -> Callable[[dict[str, Any]], Answer]:
    def change(data: list[Any]) -> None:
        for item in data:
            item["embedding"] = vector(item["embedding"])

    return changed(change)


def late(request: dict[str, Any]) -> Answer:
    time.sleep(0.5)
    return 200, {}, good(request)


@dataclass(frozen=True)
class Kind:
    """What the provider does, and the error that it becomes; `refusal`: rows are blamed, one by one."""

    answer: Callable[[dict[str, Any]], Answer | None]
    raised: type[RevectorError]
    refusal: bool = False


KINDS = {
    "401": Kind(lambda _: error(401, f"Incorrect API key provided: {KEY}"), KeyRejected),
    "403": Kind(lambda _: error(403, f"{KEY} may not use this model"), KeyRejected),
    "429": Kind(lambda _: error(429, "slow down"), Outage),
    "429, soon": Kind(lambda _: error(429, "slow down", **{"retry-after": "0.01"}), Outage),
    "429, in an hour": Kind(lambda _: error(429, "slow down", **{"retry-after": "3600"}), Outage),
    "quota": Kind(lambda _: error(429, "you are broke", "insufficient_quota"), UsageError),
    "500": Kind(lambda _: error(500, f"internal error, key {KEY}"), Outage),
    "503": Kind(lambda _: error(503, "overloaded"), Outage),
    "time-out": Kind(late, Outage),
    "hung up": Kind(lambda _: (0, {}, b""), Outage),
    "dimension": Kind(every(lambda v: v[:-1]), DimensionMismatch),
    "too few": Kind(changed(lambda data: data.pop()), UsageError),
    "NaN": Kind(every(lambda v: [float("nan"), *v[1:]]), GateFailed, refusal=True),
    "infinite": Kind(every(lambda v: [float("inf"), *v[1:]]), GateFailed, refusal=True),
    "zero": Kind(every(lambda v: [0.0] * len(v)), GateFailed, refusal=True),
}


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    monkeypatch.setattr(remote, "REQUEST_SECONDS", 0.25)
    monkeypatch.setattr(verify, "LOOK_AGAIN", 0.0)
    with standing() as server, stamina.set_testing(True, attempts=2, cap=True):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield server


def migrating(command: str, **options: Any) -> Callable[[str, int], Any]:
    def give(dsn: str, table: int) -> Any:
        with steering(dsn) as migration:
            return getattr(migration, command)(**options)

    return give


def follow(dsn: str, table: int) -> int:
    return Follower(settings(dsn), table).once()


@dataclass(frozen=True)
class Phase:
    """A stage, the command that embeds there, the stage that it leads to, and who answers before and after."""

    stage: str
    give: Callable[[str, int], Any]
    reached: str
    command: str
    backup: bool = False


PHASES = {
    "backfill": Phase("EXPANDED", migrating("run"), "VERIFIED", "revector run kb"),
    "verify": Phase("INDEXED", migrating("run"), "VERIFIED", "revector run kb"),
    "follow before": Phase("VERIFIED", follow, "VERIFIED", "revector follow kb --once"),
    "expose": Phase("VERIFIED", migrating("expose", without_follower=True), "SERVED", "revector expose kb"),
    "cutover": Phase("VERIFIED", migrating("cutover", without_follower=True), "CUT_OVER", "revector cutover kb"),
    "follow after": Phase("CUT_OVER", follow, "CUT_OVER", "revector follow kb --once"),
    "rollback": Phase("CUT_OVER", migrating("rollback", without_follower=True), "SERVED", "revector rollback kb"),
    "finalize": Phase("CUT_OVER", migrating("finalize", quiet_for=0), "FINALIZED", "revector finalize kb"),
    "abort": Phase("SERVED", migrating("abort"), "ABORTED", "revector abort kb"),
    "restore": Phase("EXPANDED", migrating("restore"), "VERIFIED", "revector restore kb", backup=True),
}


def pending(connection: psycopg.Connection[Any]) -> int:
    """Rows that lack a vector of any generation there is."""
    columns = [
        name
        for (name,) in connection.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'kb'::regclass AND attname LIKE 'embedding%'"
            " AND NOT attisdropped AND attnum > 0"
        )
    ]
    return int(one(connection, f"SELECT count(*) FROM kb WHERE num_nulls({', '.join(columns)}) > 0"))


def live_model(connection: psycopg.Connection[Any]) -> str:
    return str(one(connection, "SELECT model ->> 'model' FROM revector.generations WHERE live"))


@pytest.mark.parametrize("name", PHASES)
def test_every_failure_of_a_model_in_every_phase(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand, name: str
) -> None:
    phase = PHASES[name]
    knowledge_base(connection, 12)
    if phase.backup:
        with steering(dsn) as migration:
            migration.run(Request(from_=OLD, to=NEW, backup=True))
            migration.cutover(without_follower=True)
            migration.finalize(quiet_for=0)
        connection.execute("UPDATE kb SET content = content || ' edited' WHERE id < 4")
        with pytest.raises(Halt), steering(dsn, observe=halting("expand")) as migration:
            migration.restore()
        assert stage_of(connection)[0] == phase.stage
    else:
        advance(dsn, phase.stage, REQUEST)
    stage, answers = stage_of(connection), live_model(connection)
    for number, (kind, case) in enumerate(KINDS.items()):
        if name in ("rollback", "expose") and case.refusal:
            continue  # going back and showing are not refused for them: the next test; it is told how many rows miss
        edit(connection, number % 12, kind)
        waiting = pending(connection)
        assert waiting, "there is nothing to embed, so nothing is proven"
        stand.script = lambda request, case=case: None if probes(request) else case.answer(request)  # type: ignore[misc]
        asked = len(stand.requests)
        if case.refusal and phase.give is follow:
            assert phase.give(dsn, oid_of(connection)) == 0, kind
            refused = one(connection, "SELECT count(*) FROM revector.failures")
            assert refused, kind
        else:
            with pytest.raises(RevectorError) as caught:
                phase.give(dsn, oid_of(connection))
            check(kind, case, phase, caught.value)
        assert len(stand.requests) > asked, f"{kind}: nothing was asked"
        if name in ("cutover", "expose"):  # it went on to SERVED first, which is proven
            stage = ("SERVED", None)
        assert stage_of(connection) == stage, kind
        assert live_model(connection) == answers, kind
        assert one(connection, "SELECT count(*) FROM pg_namespace WHERE nspname ~ '^rv_'") == 0, f"{kind}: half exposed"
        assert pending(connection) >= (1 if case.refusal or phase.backup else waiting), (
            f"{kind}: something wrong was written"
        )
    stand.script = lambda request: None
    if name in ("cutover", "finalize", "abort"):
        follow(dsn, oid_of(connection))  # as their refusals say: texts that were refused are tried again
    phase.give(dsn, oid_of(connection))
    assert stage_of(connection)[0] == phase.reached
    assert pending(connection) == 0
    sides = {
        column: EXACT[model]
        for column, model in connection.execute(
            "SELECT a.attname, g.model ->> 'model' FROM revector.generations g JOIN pg_attribute a"
            " ON a.attrelid = g.table_oid AND a.attnum = g.attnum WHERE NOT a.attisdropped"
        ).fetchall()
    }
    assert_exact(connection, "kb", "content", sides, at_least=12)
    assert KEY not in str(connection.execute("SELECT figures FROM revector.events").fetchall())
    assert KEY not in str(connection.execute("SELECT error FROM revector.failures").fetchall())


def edit(connection: psycopg.Connection[Any], number: int, kind: str) -> None:
    """Before SERVED the live vector is the application's own business, and it gives one; from then on it need not."""
    text = f"row {number}, when the model's failure was: {kind}"
    connection.execute("DELETE FROM revector.failures")
    connection.execute("UPDATE kb SET content = %s WHERE id = %s", (text, number))
    if stage_of(connection)[0] not in ("SERVED", "CUT_OVER"):
        given = vector(EXACT[live_model(connection)], text)
        connection.execute("UPDATE kb SET embedding = %s WHERE id = %s", (given, number))


def test_a_rollback_says_which_rows_the_old_model_refuses(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand
) -> None:
    """The way back is not barred by a few rows; they are filled once the model takes them."""
    knowledge_base(connection, 12)
    advance(dsn, "CUT_OVER", REQUEST)
    connection.execute("UPDATE kb SET content = 'new ' || id WHERE id < 2")
    nan = KINDS["NaN"].answer
    stand.script = lambda request: nan(request) if request["model"] == "old-16" and not probes(request) else None
    notes: list[Observation] = []
    with steering(dsn, observe=notes.append) as migration:
        migration.rollback(without_follower=True)
    told = f"{OLD} refuses 2 texts: search does not find their rows until it takes them"
    assert any(isinstance(note, Note) and note.text.startswith(told) for note in notes)
    stand.script = lambda request: None
    assert follow(dsn, oid_of(connection)) == 2
    assert_exact(connection, "kb", "content", {"embedding": "hash:16", "embedding_g2": "hash:32"}, at_least=12)


def probes(request: dict[str, Any]) -> bool:
    return all(text in PROBES for text in request["input"])


def check(kind: str, case: Kind, phase: Phase, raised: RevectorError) -> None:
    """One error: its kind, and that it says what is true and what to do, and no secret."""
    assert isinstance(raised, case.raised), f"{kind}: {raised!r}"
    assert raised.exit_code == case.raised.exit_code
    everything = f"{raised} {raised.why} {raised.hint} {raised!r} {raised.__cause__!r} {raised.__context__!r}"
    assert KEY not in everything, kind
    assert "answer" in f"{raised.why} {raised}", f"{kind}: which model answers is not said: {raised.why}"
    assert "revector " in raised.hint, f"{kind}: no next command in {raised.hint!r}"


def test_a_provider_that_is_not_there(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connection refused, at the command line: exit code, message, next command, no secret."""
    knowledge_base(connection, 5)
    advance(dsn, "CUT_OVER", REQUEST)
    connection.execute("UPDATE kb SET content = 'new' WHERE id = 1")
    stand.script = lambda request: error(401, f"Incorrect API key provided: {KEY}")
    rejected = run_command(dsn, "rollback", "kb", "--without-follower").exits(2)
    assert rejected.last == (
        f"error: openai:old-16: {stand.url} rejected the key (status 401)\n"
        "  The migration is at CUT_OVER; openai:new-32 answers.\n"
        "  next: set OPENAI_API_KEY to a key that may use this model\n"
        "        then the same command again: revector rollback kb"
    )
    assert KEY not in rejected.out + rejected.err


@pytest.mark.parametrize(("stage", "command", "left"), [("CUT_OVER", "rollback", NEW), ("SERVED", "cutover", OLD)])
def test_the_model_that_is_left_bars_no_way(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand, stage: str, command: str, left: str
) -> None:
    """A model that is down, or was shut down for good, is the reason to leave it: the other one's rows are filled first."""
    knowledge_base(connection, 12)
    advance(dsn, stage, REQUEST)
    connection.execute("UPDATE kb SET content = 'new ' || id WHERE id < 3")
    gone = left.removeprefix("openai:")
    stand.script = lambda request: error(503, "shut down") if request["model"] == gone else None
    notes: list[Observation] = []
    with steering(dsn, observe=notes.append) as migration:
        getattr(migration, command)(without_follower=True)
    told = f"{left} fails, and 3 rows stay without its vector until it answers: "
    assert any(isinstance(note, Note) and note.text.startswith(told) for note in notes)
    live, other = (EXACT[NEW], "embedding_g1") if command == "cutover" else (EXACT[OLD], "embedding_g2")
    assert_exact(connection, "kb", "content", {"embedding": live}, at_least=12)
    assert one(connection, f"SELECT count(*) FROM kb WHERE {other} IS NULL") == 3


@pytest.mark.parametrize("failing", [OLD, NEW])
@pytest.mark.parametrize("command", ["preview", "run"])
def test_a_model_that_fails_before_anything_is_planned(
    dsn: str, connection: psycopg.Connection[Any], stand: Stand, command: str, failing: str
) -> None:
    """A plan asks both models: whichever fails, and however, it says what to do, and the table is as it was."""
    knowledge_base(connection, 12)
    before = shape(connection)
    model = failing.removeprefix("openai:")
    for kind, case in KINDS.items():
        if kind == "dimension" and failing == NEW:
            continue  # nobody has said how many it should give: it is a model of so many
        stand.script = lambda request, case=case: case.answer(request) if request["model"] == model else None  # type: ignore[misc]
        if kind == "dimension" and command == "preview":
            with steering(dsn) as migration:
                assert [f.title for f in migration.preview(REQUEST).draft.blockers] == ["dimensions"]
            continue
        with pytest.raises(RevectorError) as caught, steering(dsn) as migration:
            getattr(migration, command)(REQUEST)
        raised = caught.value
        everything = f"{raised} {raised.why} {raised.hint} {raised!r} {raised.__cause__!r} {raised.__context__!r}"
        assert KEY not in everything, kind
        assert failing in everything or stand.url in everything, f"{kind}: which model is not said"
        assert raised.hint, f"{kind}: what to do is not said"
        if isinstance(raised, KeyRejected | Outage | InputRefused):
            assert "Nothing was changed." in raised.why, f"{kind}: {raised.why}"
            assert "command" in raised.hint, f"{kind}: {raised.hint}"
        assert shape(connection) == before, kind
        assert not registered(connection), kind
    stand.script = lambda request: None
    with steering(dsn) as migration:
        assert migration.run(REQUEST).passed


def registered(connection: psycopg.Connection[Any]) -> bool:
    """Whether a migration, or a model of this table, is on record."""
    if one(connection, "SELECT to_regclass('revector.migrations') IS NULL"):
        return False
    return bool(one(connection, "SELECT EXISTS (TABLE revector.migrations) OR EXISTS (TABLE revector.generations)"))
