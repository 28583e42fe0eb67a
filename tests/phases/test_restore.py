"""The way back after finalize: unchanged rows take their vectors from the backup table, the rest are embedded."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg import sql

from fix_commands import command
from fix_tables import (
    NEW,
    OLD,
    Halt,
    advance,
    assert_exact,
    assert_no_leftovers,
    embedder,
    fill,
    halting,
    knowledge_base,
    one,
    settings,
    shape,
    stage_of,
    steering,
    vector,
)
from revector import Embedder, Migration, Request
from revector.embed.hashing import Hashing
from revector.errors import GateFailed, InputRefused, Interrupted, ModelUnavailable, Outage, Refused
from revector.throttle import Throttle, Tuning
from revector.work import Effect, Note, Observation, Progress, Recorded

WITH_BACKUP = Request(from_=OLD, to=NEW, backup=True)
BEFORE, AFTER = {"embedding": NEW, "embedding_g3": OLD}, {"embedding": OLD, "embedding_g2": NEW}


def finalized(dsn: str, connection: psycopg.Connection[Any], rows: int = 120, **options: Any) -> None:
    """A table whose upgrade is finalized, with its backup kept."""
    knowledge_base(connection, rows, **options)
    advance(dsn, "CUT_OVER", WITH_BACKUP)
    with steering(dsn) as migration:
        migration.finalize()


def counted(monkeypatch: pytest.MonkeyPatch, spec: str = OLD) -> list[str]:
    """The texts that a model is asked to embed from now on, its probes included."""
    texts: list[str] = []
    original = Embedder._make

    class Counting(Hashing):
        def encode(self, given: Any, prompt: str, kind: str) -> Any:
            texts.extend(given)
            return super().encode(given, prompt, kind)

    def make(self: Embedder) -> Any:
        return Counting(int(spec.partition(":")[2])) if self.spec == spec else original(self)

    monkeypatch.setattr(Embedder, "_make", make)
    return texts


def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old model refuses one text from now on."""
    encode = Hashing.encode

    def picky(self: Hashing, given: Sequence[str], prompt: str, kind: str) -> Any:
        if self.dimension == 16 and "forbidden" in given:
            raise InputRefused("no such text, please", kind="refused")
        return encode(self, given, prompt, kind)

    monkeypatch.setattr(Hashing, "encode", picky)


def test_unchanged_rows_are_copied_and_the_rest_embedded(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edited, new, deleted and re-keyed rows; then the whole road back: verify, cutover, rollback, cutover, finalize."""
    finalized(dsn, connection, 300)
    new = "a text of after finalize"
    connection.execute("UPDATE kb SET content = content || ' edited', embedding = %s WHERE id = 5", (
        vector(NEW, one(connection, "SELECT content || ' edited' FROM kb WHERE id = 5")),))  # fmt: skip
    connection.execute("INSERT INTO kb (id, content, embedding) VALUES (900, %s, %s)", (new, vector(NEW, new)))
    connection.execute("DELETE FROM kb WHERE id = 7")
    connection.execute("UPDATE kb SET id = 901 WHERE id = 9")
    connection.execute("UPDATE kb SET note = 'another column' WHERE id < 5")
    texts = counted(monkeypatch)
    with steering(dsn) as migration:
        done = migration.restore()
        assert (str(done.stage), done.answering) == ("VERIFIED", NEW)
        assert_exact(connection, "kb", "content", BEFORE, at_least=300)
        copied = one(connection, "SELECT figures FROM revector.events WHERE step = 'restore.copy'")
        assert (copied["rows"], copied["left"], copied["backup"]) == (297, 3, "kb_backup_16")
        told = migration.status().written
        assert told is not None and told[0] == 300 and told[1] > 0.3, "the copy's HOT updates are not counted"
        embedded = {t for t in texts if t in (new,) or t.endswith("edited") or "row 9 " in t}
        assert len(embedded) == 3
        migration.cutover(without_follower=True)
        migration.rollback(without_follower=True)
        migration.cutover(without_follower=True)
        assert_exact(connection, "kb", "content", {"embedding": OLD, "embedding_g2": NEW}, at_least=300)
        migration.finalize()
    assert_exact(connection, "kb", "content", {"embedding": OLD}, at_least=300)
    assert_no_leftovers(connection)
    assert one(
        connection, "SELECT attnotnull FROM pg_attribute WHERE attrelid = 'kb'::regclass AND attname = 'embedding'"
    )


def test_a_changed_text_never_takes_the_backups_vector(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Texts that change while the copy is at work, and rows that somebody has locked, are the backfill's."""
    finalized(dsn, connection, 200)
    holder = psycopg.connect(dsn)

    def observe(seen: Observation) -> None:
        if isinstance(seen, Recorded) and seen.step == "restore.windows":
            connection.execute("UPDATE kb SET content = content || ' late' WHERE id % 3 = 0")
            holder.execute("SELECT 1 FROM kb WHERE id = 1 FOR UPDATE")
        elif isinstance(seen, Effect) and seen.step == "restore.copy":
            assert one(connection, "SELECT embedding_g3 IS NULL FROM kb WHERE id = 1")
            holder.close()

    with steering(dsn, observe=observe) as migration:
        migration.restore()
    fill(dsn, connection)
    assert one(connection, "SELECT figures ->> 'rows' FROM revector.events WHERE step = 'restore.copy'") == "132"
    assert_exact(connection, "kb", "content", {"embedding_g3": OLD}, at_least=200)


def test_the_copy_is_as_fast_as_the_operator_allows(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A pause holds it, a stop during the pause is obeyed, and a limit of rows per second counts for it."""
    finalized(dsn, connection)
    with pytest.raises(Halt), steering(dsn, observe=halting("restore.windows")) as migration:
        migration.restore()
    connection.execute("""UPDATE revector.migrations SET limits = '{"paused": true}' WHERE closing IS NULL""")
    copied, stop = "SELECT count(embedding_g3) FROM kb", threading.Event()

    def observe(seen: Observation) -> None:
        if isinstance(seen, Note) and "paused" in seen.text:
            stop.set()

    with (
        pytest.raises(Interrupted),
        Migration.open(settings(dsn), table="kb", observe=observe, stop=stop.is_set) as migration,
    ):
        migration.restore()
    assert stop.is_set() and one(connection, copied) == 0
    connection.execute(
        """UPDATE revector.migrations SET limits = '{"max_rows_per_second": 80}' WHERE closing IS NULL"""
    )
    began = time.monotonic()
    with pytest.raises(Halt), steering(dsn, observe=halting("restore.copy")) as migration:
        migration.restore()
    assert one(connection, copied) == 120
    assert time.monotonic() - began > 1.0
    with steering(dsn) as migration:
        migration.restore()
    assert_exact(connection, "kb", "content", BEFORE, at_least=120)


def test_the_command_takes_a_limit_of_rows(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """As `run` does: in force from the first write, and kept with the migration."""
    finalized(dsn, connection)
    command(dsn, "restore", "kb", "--max-rows-per-second", "60").exits(0)
    assert one(connection, "SELECT limits FROM revector.migrations ORDER BY id DESC LIMIT 1") == {
        "max_rows_per_second": 60
    }
    seconds = one(
        connection,
        "SELECT extract(epoch FROM max(at) - min(at)) FROM revector.events WHERE step IN ('restore.windows', 'restore.copy')",
    )
    assert seconds > 1.4
    assert_exact(connection, "kb", "content", BEFORE, at_least=120)


def test_a_local_model_costs_nothing(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A budget of money is refused by name where neither model is asked over a network."""
    finalized(dsn, connection, 20)
    refused = command(dsn, "restore", "kb", "--max-tokens-per-minute", "600").exits(2)
    assert "--max-tokens-per-minute: neither hash:32 nor hash:16 is asked over a network" in refused.err
    wants = command(dsn, "restore", "kb", "--max-cost", "1").exits(2)
    assert "--price-per-million-tokens" in wants.err
    assert stage_of(connection)[0] == "FINALIZED", "a migration was opened by a command that changed nothing"


def test_a_backup_of_stale_vectors_says_how_to_go_on(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """What was stale when the backup was made is so in it: verify fails, and the command it names renews those rows."""
    knowledge_base(connection, 120, index="ivfflat")
    connection.execute("UPDATE kb SET content = content || ' (edited, its vector not renewed)' WHERE id % 10 = 0")
    advance(dsn, "VERIFIED", WITH_BACKUP)
    with steering(dsn) as migration:
        migration.cutover(without_follower=True, refresh_old=True)
        migration.finalize()
    failed = command(dsn, "restore", "kb").exits(1)
    assert "kb_backup_16 has vectors that were stale when it was made" in failed.err
    words = failed.last.partition("renew those: revector ")[2].splitlines()[0].split()
    assert words == ["restore", "kb", "--refresh"]
    done = command(dsn, *words, "--max-rows-per-second", "500").exits(0)
    assert f"12 stale vectors of {OLD} renewed" in done.err and done.out.startswith("kb is VERIFIED")
    assert_exact(connection, "kb", "content", BEFORE, at_least=120)
    command(dsn, "cutover", "kb", "--without-follower").exits(0)
    command(dsn, "finalize", "kb").exits(0)
    assert_exact(connection, "kb", "content", {"embedding": OLD}, at_least=120)
    assert "ivfflat" in one(connection, "SELECT indexdef FROM pg_indexes WHERE indexname = 'kb_embedding_idx'")
    assert_no_leftovers(connection)


def test_refresh_from_the_start(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Asked for at once, also where the sample of verify would have met none; and again at VERIFIED, where nothing is stale."""
    finalized(dsn, connection, 120)
    connection.execute(
        "UPDATE kb_backup_16 AS b SET embedding = (SELECT embedding FROM kb_backup_16 WHERE id = 4) WHERE b.id = 3"
    )
    told: list[str] = []

    def observe(seen: Observation) -> None:
        if isinstance(seen, Note) and "stale" in seen.text:
            told.append(seen.text)
        elif isinstance(seen, Recorded) and seen.step == "index.build":
            told.append("index")

    with steering(dsn, observe=observe) as migration:
        migration.restore(refresh=True)
        assert_exact(connection, "kb", "content", BEFORE, at_least=120)
        migration.restore(refresh=True)
    # Before the index is built: it does not grow by what is renewed.
    assert told == [f"1 stale vectors of {OLD} renewed", "index", f"0 stale vectors of {OLD} renewed"]
    events = connection.execute("SELECT figures FROM revector.events WHERE step = 'restore.refresh' ORDER BY id")
    assert [figures for (figures,) in events] == [
        {"model": OLD, "rows": 120, "renewed": renewed, "refused": 0} for renewed in (1, 0)
    ]


@pytest.mark.parametrize("stage", ["INDEXED", "VERIFIED"])
def test_refresh_goes_on_with_the_command_that_a_failure_names(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """It is kept in the ledger until it is done: `run` goes on with it, and `cutover` does not go past it."""
    finalized(dsn, connection, 120)
    at = halting("index" if stage == "INDEXED" else "verify")
    with suppress(Halt), steering(dsn, observe=at) as migration:
        migration.restore()
    assert stage_of(connection)[0] == stage
    connection.execute("SET revector.writer = 'on'")
    connection.execute("UPDATE kb SET embedding_g3 = (SELECT embedding_g3 FROM kb WHERE id = 4) WHERE id = 3")
    connection.execute("RESET revector.writer")
    encode = Hashing.encode

    def away(self: Hashing, given: Sequence[str], prompt: str, kind: str) -> Any:
        if self.dimension == 16 and any(text.startswith("row ") for text in given):
            raise Outage("the model is away")
        return encode(self, given, prompt, kind)

    with monkeypatch.context() as patch:
        patch.setattr(Hashing, "encode", away)
        with steering(dsn) as migration, pytest.raises(Outage) as caught:
            migration.restore(refresh=True)
    assert caught.value.hint.endswith("the same command again: revector run kb")
    with steering(dsn) as migration:
        assert migration.status().next == "revector run kb"
        if stage == "VERIFIED":
            with pytest.raises(Refused, match="not all compared with their texts") as refused:
                migration.cutover(without_follower=True)
            assert refused.value.hint == "revector run kb"
        assert str(migration.run().stage) == "VERIFIED"
        assert_exact(connection, "kb", "content", BEFORE, at_least=120)
        assert migration.status().next == "revector cutover kb"
        migration.cutover(without_follower=True)


def test_refresh_counts_what_the_model_refuses(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copied vector of a text that the model refuses cannot be proven right: it is none, and the allowance counts it."""
    knowledge_base(connection, 60)
    connection.execute("UPDATE kb SET content = 'forbidden', embedding = %s WHERE id = 3", (vector(OLD, "forbidden"),))
    advance(dsn, "CUT_OVER", WITH_BACKUP)
    with steering(dsn) as migration:
        migration.finalize()
    refusing(monkeypatch)
    with steering(dsn) as migration:
        with pytest.raises(GateFailed, match="1 texts refused by the model, 0 allowed"):
            migration.restore(refresh=True)
        assert one(connection, "SELECT array_agg(id) FROM kb WHERE embedding_g3 IS NULL") == [3]
        assert str(migration.restore(allow_failed=1).stage) == "VERIFIED"
        with pytest.raises(GateFailed, match="refuses 1 texts"):
            migration.cutover(without_follower=True)


def test_refresh_writes_as_few_rows_at_once_as_the_operator_allows(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    finalized(dsn, connection, 120)
    with steering(dsn) as migration:
        migration.restore()
        connection.execute("SET revector.writer = 'on'")
        connection.execute("UPDATE kb SET embedding_g3 = (SELECT embedding_g3 FROM kb WHERE id = 4) WHERE id < 40")
        connection.execute("RESET revector.writer")
        sizes: list[int] = []
        wrote = Throttle.wrote

        def counting(self: Throttle, rows: int) -> None:
            sizes.append(rows)
            wrote(self, rows)

        monkeypatch.setattr(Throttle, "wrote", counting)
        migration.restore(refresh=True, tuning={"max_rows_per_second": 60})
    most = Throttle(Tuning(max_rows_per_second=60)).most()
    assert most is not None and sum(sizes) == 39 and max(sizes) <= most
    assert_exact(connection, "kb", "content", BEFORE, at_least=120)


@pytest.mark.parametrize("key", ["composite", "text", "uuid"])
def test_keys_of_other_kinds(dsn: str, connection: psycopg.Connection[Any], key: str) -> None:
    knowledge_base(connection, 60)
    if key == "composite":
        connection.execute("ALTER TABLE kb DROP CONSTRAINT kb_pkey, ADD PRIMARY KEY (title, id)")
    elif key == "text":
        connection.execute("ALTER TABLE kb DROP CONSTRAINT kb_pkey, ADD PRIMARY KEY (title)")
    else:
        connection.execute(
            'ALTER TABLE kb DROP CONSTRAINT kb_pkey, ADD "the Key" uuid DEFAULT gen_random_uuid() NOT NULL'
        )
        connection.execute('ALTER TABLE kb ADD PRIMARY KEY ("the Key")')
    advance(dsn, "CUT_OVER", WITH_BACKUP)
    with steering(dsn) as migration:
        migration.finalize()
        migration.restore()
    assert one(connection, "SELECT figures ->> 'rows' FROM revector.events WHERE step = 'restore.copy'") == "60"
    assert_exact(connection, "kb", "content", BEFORE, at_least=60)


def test_a_partitioned_table(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A row keeps its key when it moves to another leaf."""
    connection.execute(
        "CREATE TABLE kb (id int, content text, embedding vector(16), PRIMARY KEY (id)) PARTITION BY HASH (id)"
    )
    for number in range(3):
        connection.execute(
            sql.SQL("CREATE TABLE {} PARTITION OF kb FOR VALUES WITH (MODULUS 3, REMAINDER {})").format(
                sql.Identifier(f"kb_{number}"), number
            )
        )
    for number in range(90):
        text = f"row {number}"
        connection.execute("INSERT INTO kb VALUES (%s, %s, %s)", (number, text, vector(OLD, text)))
    connection.execute("CREATE INDEX kb_embedding_idx ON kb USING hnsw (embedding vector_cosine_ops)")
    advance(dsn, "CUT_OVER", WITH_BACKUP)
    with steering(dsn) as migration:
        migration.finalize()
        migration.restore()
    assert one(connection, "SELECT figures ->> 'rows' FROM revector.events WHERE step = 'restore.copy'") == "90"
    assert_exact(connection, "kb", "content", BEFORE, at_least=90)


@pytest.mark.parametrize("step", ["restore.windows", "restore.window", "restore.copy"])
@pytest.mark.parametrize("kind", [Effect, Recorded])
def test_ended_in_the_middle_it_goes_on(
    dsn: str, connection: psycopg.Connection[Any], step: str, kind: type[Observation]
) -> None:
    """`restore` again, or `run`: the windows that are done are not read again, and every row is right."""
    finalized(dsn, connection, 200)
    for number, again in enumerate(("restore", "run")):
        with pytest.raises(Halt), steering(dsn, observe=halting(step, kind)) as migration:
            migration.restore()
        assert stage_of(connection)[0] == "EXPANDED"
        with steering(dsn) as migration:
            getattr(migration, again)()
        name = f"embedding_g{3 + number}"
        assert_exact(connection, "kb", "content", {"embedding": NEW, name: OLD}, at_least=200)
        with steering(dsn) as migration:
            migration.abort()


def test_progress_is_told(dsn: str, connection: psycopg.Connection[Any]) -> None:
    finalized(dsn, connection, 50)
    seen: list[Progress] = []
    with steering(dsn, observe=lambda s: seen.append(s) if isinstance(s, Progress) else None) as migration:
        migration.restore()
    told = [p for p in seen if p.phase == "restore"]
    assert told and (told[-1].done, told[-1].total) == (50, 50)


def test_indexes_come_back_as_they_were(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """IVFFlat became HNSW on the way there; on the way back it is IVFFlat with its lists again, under its name."""
    finalized(dsn, connection, 60, index="ivfflat")
    assert "hnsw" in one(connection, "SELECT indexdef FROM pg_indexes WHERE indexname = 'kb_embedding_idx'")
    with steering(dsn) as migration:
        migration.restore()
        migration.cutover(without_follower=True)
        migration.finalize()
    definition = one(connection, "SELECT indexdef FROM pg_indexes WHERE indexname = 'kb_embedding_idx'")
    assert "ivfflat" in definition and "lists='4'" in definition
    assert_no_leftovers(connection)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_no_backup(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Nothing was ever migrated; migrated without a backup; the backup dropped; each is named, and nothing changes."""
    knowledge_base(connection, 20)
    refused = command(dsn, "restore", "kb").exits(3)
    assert "kb: no migration of this table has left a backup" in refused.err
    advance(dsn, "CUT_OVER")
    with steering(dsn) as migration:
        migration.finalize()
        with pytest.raises(Refused, match="has left a backup") as caught:
            migration.restore()
        assert caught.value.hint == "embed all rows with the old model: revector run kb --to MODEL"
    advance(dsn, "CUT_OVER", Request(to="hash:24", backup=True))
    with steering(dsn) as migration:
        migration.finalize()
        before = shape(connection)
        connection.execute("ALTER TABLE kb_backup_32 RENAME TO kept")
        with pytest.raises(Refused, match="no column") as caught:
            connection.execute("ALTER TABLE kept RENAME text_checksum TO other")
            migration.restore()
        connection.execute("DROP TABLE kept")
        with pytest.raises(Refused, match="backup table kb_backup_32 is gone") as caught:
            migration.restore()
        assert f"revector run kb --to {NEW}" in caught.value.hint
        assert shape(connection) == before and stage_of(connection)[0] == "FINALIZED"


def test_a_backup_of_another_table_is_not_taken(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A table of the right name that this table's migration has not made is the user's own."""
    finalized(dsn, connection, 20)
    knowledge_base(connection, 20, name="other")
    with steering(dsn, "other") as migration, pytest.raises(Refused, match="other: no migration of this table"):
        migration.restore()
    connection.execute("ALTER TABLE kb_backup_16 RENAME TO moved; CREATE TABLE kb_backup_16 (LIKE moved)")
    with steering(dsn) as migration:
        migration.restore()
    copied = one(connection, "SELECT figures FROM revector.events WHERE step = 'restore.copy'")
    assert (copied["backup"], copied["rows"]) == ("moved", 20)


def test_a_key_that_is_gone(dsn: str, connection: psycopg.Connection[Any]) -> None:
    finalized(dsn, connection, 20)
    connection.execute("ALTER TABLE kb RENAME id TO number")
    with steering(dsn) as migration, pytest.raises(Refused, match="the key of kb_backup_16 is id") as caught:
        migration.restore()
    assert "has no id" in str(caught.value) and f"--to {OLD}" in caught.value.hint


def test_while_the_old_vectors_are_still_there(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 20)
    advance(dsn, "CUT_OVER", WITH_BACKUP)
    with steering(dsn) as migration, pytest.raises(Refused, match="is open at CUT_OVER") as caught:
        migration.restore()
    assert caught.value.hint == "revector rollback kb"


def test_nothing_to_go_back_to(dsn: str, connection: psycopg.Connection[Any]) -> None:
    finalized(dsn, connection, 20)
    with steering(dsn) as migration:
        migration.restore()
        migration.cutover(without_follower=True)
        migration.finalize()
        with pytest.raises(Refused, match="answers already"):
            migration.restore()


# -- a model that cannot be loaded any more ---------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [False, True])
def test_without_its_model_it_goes_as_far_as_the_backup_does(
    dsn: str, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """All is copied; where the model is needed (a changed row, else verify) it stops by name, and goes on when it is back."""
    finalized(dsn, connection, 60)
    if changed:
        connection.execute("UPDATE kb SET content = 'changed', embedding = %s WHERE id = 3", (vector(NEW, "changed"),))
    original = Embedder._make

    def make(self: Embedder) -> Any:
        if self.spec == OLD:
            raise ModelUnavailable("the folder of hash:16 is empty", hint="fetch it")
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "_make", make)
        embedder.cache_clear()
        with steering(dsn) as migration, pytest.raises(ModelUnavailable, match="the folder of hash:16 is empty"):
            migration.restore()
    assert stage_of(connection)[0] == ("EXPANDED" if changed else "INDEXED")
    assert one(connection, "SELECT count(*) FROM kb WHERE embedding_g3 IS NULL") == int(changed)
    with steering(dsn) as migration:
        assert str(migration.restore().stage) == "VERIFIED"
    assert_exact(connection, "kb", "content", BEFORE, at_least=60)


def test_the_commands_say_the_way(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 30)
    command(dsn, "run", "kb", "--from", OLD, "--to", NEW, "--backup").exits(0)
    command(dsn, "cutover", "kb", "--without-follower").exits(0)
    there = command(dsn, "finalize", "kb").exits(0)
    assert there.out.endswith("back: revector restore kb (takes the old vectors from kb_backup_16)\n")
    late = command(dsn, "rollback", "kb").exits(3)
    assert late.err.endswith(
        f"next: revector restore kb\n          (it takes the vectors of {OLD} from kb_backup_16)\n"
    )
    back = command(dsn, "restore", "kb").exits(0)
    assert "30 vectors taken from kb_backup_16" in back.err and back.out.startswith(f"kb is VERIFIED; {NEW} answers.")
    assert "\nnext: revector cutover kb\n" in back.out
