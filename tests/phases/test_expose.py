"""View schemas: what they show through every switch, whom they are granted to, where they are refused, how they go."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import errors as pg
from psycopg import sql

from fix_tables import (
    NEW,
    OLD,
    REQUEST,
    add_rows,
    advance,
    assert_exact,
    assert_no_leftovers,
    body,
    fill,
    knowledge_base,
    one,
    shape,
    stage_of,
    steering,
    vector,
)
from revector import Request
from revector.db import Database, PauseLimits
from revector.errors import PauseBudgetMissed, Refused, UsageError
from revector.maintenance import uninstall
from revector.migration import Exposed
from revector.settings import Settings
from revector.work import Effect

G1, G2 = "rv_kb_g1,public", "rv_kb_g2,public"
BOTH = [(OLD, G1), (NEW, G2)]


def expose(dsn: str, table: str = "kb", **options: Any) -> Exposed:
    with steering(dsn, table) as migration:
        return migration.expose(**options)


def give(dsn: str, *commands: str, table: str = "kb") -> None:
    for command in commands:
        with steering(dsn, table) as migration:
            options = (
                {"quiet_for": 0} if command == "finalize" else {} if command == "abort" else {"without_follower": True}
            )
            getattr(migration, command)(**options)


@contextmanager
def on(dsn: str, path: str) -> Iterator[psycopg.Connection[Any]]:
    """A client of one version: every statement is prepared at once, as many drivers do."""
    with psycopg.connect(dsn, autocommit=True, prepare_threshold=0, options=f"-csearch_path={path}") as connection:
        yield connection


def schemas(connection: psycopg.Connection[Any]) -> set[str]:
    return {name for (name,) in connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'rv\\_%'")}


def assert_shown(client: psycopg.Connection[Any], model: str, at_least: int = 1) -> None:
    """Every row that this version sees has exactly its model's vector of its text."""
    rows = client.execute("SELECT content, embedding::text FROM kb").fetchall()
    assert len(rows) >= at_least
    for text, given in rows:
        assert given is not None, f"{model} has no vector for {text!r}"
        right = np.array(json.loads(vector(model, text)))
        assert np.abs(np.array(json.loads(given)) - right).max() < 1e-5, f"{model} shows another vector for {text!r}"


def columns_of(connection: psycopg.Connection[Any], relation: str) -> list[str]:
    return [
        c.name
        for c in connection.execute(sql.SQL("SELECT * FROM {} LIMIT 0").format(sql.SQL(relation))).description or ()
    ]


# -- what a view shows -------------------------------------------------------------------------------------------------


def test_an_old_version_that_was_moved_first_notices_nothing_at_all(
    dsn: str, connection: psycopg.Connection[Any]
) -> None:
    """Exposed before expand: prepared SELECT * and RETURNING * survive expand, both switches, abort, and a second try."""
    knowledge_base(connection, 12, more=", tag text DEFAULT 'none'")
    before = shape(connection)
    done = expose(dsn, from_=OLD)
    assert [(path, answers) for _, path, answers in done.sides] == [(G1, True)]
    assert shape(connection) == before
    with on(dsn, G1) as old:

        def works(turn: str) -> None:
            text = f"written {turn}"
            rows = old.execute("SELECT * FROM kb WHERE id < 3 ORDER BY id").fetchall()
            assert [len(row) for row in rows] == [7, 7, 7]
            row = old.execute(
                "UPDATE kb SET content = %s, embedding = %s WHERE id = 1 RETURNING *", (text, vector(OLD, text))
            ).fetchone()
            assert row is not None and (row[2], row[6]) == (text, "none")
            near = old.execute(
                "SELECT id FROM kb ORDER BY embedding <=> %s::vector LIMIT 1", (vector(OLD, text),)
            ).fetchone()
            assert near == (1,)

        works("at first")
        for stage in ("EXPANDED", "VERIFIED", "SERVED", "CUT_OVER"):
            advance(dsn, stage)
            works(stage)
            assert columns_of(connection, "rv_kb_g1.kb") == [
                "id",
                "title",
                "content",
                "note",
                "filler",
                "embedding",
                "tag",
            ]
        give(dsn, "rollback")
        works("after rollback")
        give(dsn, "abort")
        works("after abort")
        assert schemas(connection) == {"rv_kb_g1"}, "it was there before: abort leaves it"
        advance(dsn, "CUT_OVER")
        works("in the second migration")
        fill(dsn, connection)
        assert_exact(connection, "kb", "content", {"embedding_g1": OLD, "embedding": NEW})
        give(dsn, "finalize")
    assert_no_leftovers(connection)


def test_each_view_shows_its_generation_under_the_same_name(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Both at once from SERVED on; columns in the order of the table, the other generation's not among them."""
    knowledge_base(connection, 10, more=", tag text")
    expose(dsn, from_=OLD)
    advance(dsn, "VERIFIED")
    # A row that is pending when the candidate's view comes would be missed by its searches.
    connection.execute("UPDATE kb SET content = 'edited', embedding = %s WHERE id = 2", (vector(OLD, "edited"),))
    done = expose(dsn, without_follower=True)
    assert stage_of(connection) == ("SERVED", None)
    assert [(model, path) for model, path, _ in done.sides] == BOTH
    assert one(connection, "SELECT count(*) FROM rv_kb_g2.kb WHERE embedding IS NULL") == 0
    for command in (None, "cutover", "rollback"):
        if command:
            give(dsn, command)
        with on(dsn, G1) as old, on(dsn, G2) as new:
            assert (
                columns_of(old, "kb")
                == columns_of(new, "kb")
                == ["id", "title", "content", "note", "filler", "embedding", "tag"]
            )
            for client, model in ((old, OLD), (new, NEW)):
                assert_shown(client, model)
    assert [
        g for (g,) in connection.execute("SELECT reloptions FROM pg_class WHERE relname = 'kb' AND relkind = 'v'")
    ] == [["security_invoker=true"]] * 2
    again = expose(dsn, without_follower=True)
    assert again.figures["made"] == []


@pytest.mark.parametrize("stage", ["PLANNED", "EXPANDED", "BACKFILLED"])
def test_before_verified_there_is_the_live_view_alone(
    dsn: str, connection: psycopg.Connection[Any], stage: str
) -> None:
    """The candidate is neither exposed nor shown; the stage is as it was; what came with the migration goes with it."""
    knowledge_base(connection, 5)
    advance(dsn, stage)
    done = expose(dsn)
    assert [(model, path) for model, path, _ in done.sides] == BOTH[:1]
    assert stage_of(connection) == (stage, None) and schemas(connection) == {"rv_kb_g1"}
    assert columns_of(connection, "rv_kb_g1.kb") == ["id", "title", "content", "note", "filler", "embedding"]
    with pytest.raises(Refused, match="made the present vectors, not hash:8"):
        expose(dsn, from_="hash:8")
    give(dsn, "abort")
    assert_no_leftovers(connection)


def test_who_writes_through_a_view_owns_its_generation(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """As given on the own side, pending on the other; and nothing of it needs the bare name to answer with that model."""
    knowledge_base(connection, 6)
    advance(dsn, "VERIFIED")
    expose(dsn, without_follower=True)
    for flip, columns in ((None, ("embedding", "embedding_g2")), ("cutover", ("embedding_g1", "embedding"))):
        if flip:
            give(dsn, flip)
        for number, (model, path) in enumerate(BOTH):
            text = f"by {model} after {flip}"
            with on(dsn, path) as client:
                client.execute(
                    "INSERT INTO kb (id, content, embedding) VALUES (%s, %s, %s)"
                    " ON CONFLICT (id) DO UPDATE SET content = excluded.content, embedding = excluded.embedding",
                    (number, text, vector(model, text)),
                )
            row = connection.execute(
                sql.SQL("SELECT {}, {} FROM kb WHERE id = %s").format(*map(sql.Identifier, columns)), (number,)
            ).fetchone()
            assert row is not None and [value is not None for value in row] == [model == OLD, model == NEW]
        fill(dsn, connection)
        assert_exact(connection, "kb", "content", dict(zip(columns, (OLD, NEW), strict=True)))


def test_partitioned_table(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """One view of the whole; a row that moves between partitions keeps both vectors."""
    connection.execute(
        "CREATE TABLE kb (id int, part int, content text, embedding vector(16), PRIMARY KEY (id, part)) PARTITION BY LIST (part);"
        " CREATE TABLE kb_1 PARTITION OF kb FOR VALUES IN (1); CREATE TABLE kb_2 PARTITION OF kb FOR VALUES IN (2)"
    )
    for number in range(8):
        connection.execute(
            "INSERT INTO kb VALUES (%s, %s, %s, %s)", (number, 1 + number % 2, body(number), vector(OLD, body(number)))
        )
    expose(dsn, from_=OLD)
    advance(dsn, "VERIFIED")
    expose(dsn, without_follower=True)
    with on(dsn, G1) as old, on(dsn, G2) as new:
        for flip in ("cutover", "rollback", "cutover"):
            give(dsn, flip)
            old.execute("UPDATE kb SET part = 3 - part WHERE id = 1")
            new.execute("UPDATE kb SET content = %s, embedding = %s WHERE id = 2", (flip, vector(NEW, flip)))
            fill(dsn, connection)
            assert_shown(old, OLD)
            assert_shown(new, NEW)
        with pytest.raises(Refused, match="a view cannot stand in: kb_1 is a partition"):
            expose(dsn, table="kb_1")
    give(dsn, "finalize")
    assert_no_leftovers(connection)


# -- names -------------------------------------------------------------------------------------------------------------


def test_long_and_odd_names(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A name of 63 bytes is cut and keeps a hash; quotes and blanks are quoted; other schemas are named."""
    long = "k" * 63
    connection.execute('CREATE SCHEMA "order"')
    knowledge_base(connection, 3)
    connection.execute('ALTER TABLE kb SET SCHEMA "order"')
    done = expose(dsn, "order.kb", from_=OLD)
    assert [path for _, path, _ in done.sides] == ['rv_order__kb_g1,"order",public']
    connection.execute("SET search_path = " + done.sides[0][1])  # type: ignore[arg-type]
    assert one(connection, "SELECT count(*) FROM kb") == 3
    with steering(dsn, "order.kb") as migration:
        migration.unexpose()
    connection.execute("RESET search_path")
    for name in (long, 'Odd "name'):
        knowledge_base(connection, 3, name=name, index=None)
        with steering(dsn, name) as migration:
            done = migration.expose(from_=OLD)
        ((_, path, _),) = done.sides
        with psycopg.connect(dsn, autocommit=True) as client:
            client.execute("SELECT set_config('search_path', %s, false)", (path,))
            assert one(client, f"SELECT count(*) FROM {sql.Identifier(name).as_string(client)}") == 3
            made = one(client, "SELECT current_schema()")
            assert len(made.encode()) <= 63 and made.startswith("rv_")
            # The program itself, with such a search_path, finds the table and not the view.
        with psycopg.connect(dsn, autocommit=True) as client:
            client.execute(sql.SQL("ALTER DATABASE {} SET search_path = {}, public").format(
                sql.Identifier(client.info.dbname), sql.Identifier(made)))  # fmt: skip
        with steering(dsn, name) as migration:
            assert migration.status().live is not None
            migration.unexpose()
    assert schemas(connection) == set()


def test_a_schema_that_is_not_ours_is_never_touched(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 3)
    connection.execute("CREATE SCHEMA rv_kb_g1; CREATE TABLE rv_kb_g1.precious (x int)")
    with pytest.raises(Refused, match="schema rv_kb_g1 exists and is not ours") as refused:
        expose(dsn, from_=OLD)
    assert "ALTER SCHEMA" in refused.value.hint
    with steering(dsn) as migration:
        made = migration.preview(REQUEST)
    assert [f.finding for f in made.draft.blockers] == ["taken: schema rv_kb_g1"]
    connection.execute("DROP SCHEMA rv_kb_g1 CASCADE")
    expose(dsn, from_=OLD)
    connection.execute("CREATE TABLE rv_kb_g1.precious (x int)")
    with steering(dsn) as migration:
        migration.unexpose()
    assert one(connection, "SELECT count(*) FROM rv_kb_g1.precious") == 0
    assert one(connection, "SELECT count(*) FROM pg_views WHERE schemaname = 'rv_kb_g1'") == 0


def test_a_renamed_table_keeps_its_side(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Exposed as kb, renamed, migrated as docs: the clients of rv_kb_g1 are still the old generation's."""
    knowledge_base(connection, 5)
    expose(dsn, from_=OLD)
    connection.execute("ALTER TABLE kb RENAME TO docs")
    advance(dsn, "CUT_OVER", table="docs")
    with on(dsn, G1) as old:
        old.execute("UPDATE kb SET content = 'new text', embedding = %s WHERE id = 1", (vector(OLD, "new text"),))
    assert one(connection, "SELECT embedding_g1 IS NOT NULL AND embedding IS NULL FROM docs WHERE id = 1")
    fill(dsn, connection, "docs")
    done = expose(dsn, table="docs", without_follower=True)
    assert [path for _, path, _ in done.sides] == [G1, "rv_docs_g2,public"]
    connection.execute("ALTER SCHEMA rv_kb_g1 RENAME TO mine")
    with pytest.raises(Refused, match="schema rv_kb_g1 is called mine now"):
        expose(dsn, table="docs", without_follower=True)
    give(dsn, "finalize", table="docs")
    assert_no_leftovers(connection, "docs")
    assert one(connection, "SELECT to_regnamespace('mine') IS NULL")


# -- rights ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def roles(connection: psycopg.Connection[Any]) -> Iterator[dict[str, str]]:
    number = one(connection, "SELECT pg_backend_pid()")
    names = {name: f"rv_test_{name}_{number}" for name in ("owner", "reader", "writer", "column", "nobody")}
    for name in names.values():
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(sql.Identifier(name)))
    yield names
    for name in names.values():
        connection.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(name)))
        connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


def test_grants_are_those_of_the_table(dsn: str, connection: psycopg.Connection[Any], roles: dict[str, str]) -> None:
    """USAGE and the same rights for each role, none for others, CREATE for nobody; row policies hold; --refresh follows."""
    knowledge_base(connection, 6)
    reader, writer, column, nobody = (sql.Identifier(roles[n]) for n in ("reader", "writer", "column", "nobody"))
    connection.execute(sql.SQL("GRANT SELECT ON kb TO {}, {}, {}").format(reader, writer, column))
    connection.execute(sql.SQL("GRANT INSERT, UPDATE, DELETE ON kb TO {}").format(writer))
    connection.execute(sql.SQL("GRANT UPDATE (note) ON kb TO {}").format(column))
    connection.execute("ALTER TABLE kb ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON kb USING (id < 4)")
    expose(dsn, from_=OLD)
    vector_literal = vector(OLD, "x")
    statements: dict[str, Any] = {
        "SELECT": "SELECT * FROM kb",
        "INSERT": sql.SQL(
            "INSERT INTO kb (id, content, embedding) VALUES (3, 'x', {}) ON CONFLICT (id) DO NOTHING"
        ).format(vector_literal),
        "UPDATE": "UPDATE kb SET content = content WHERE id = 1",
        "UPDATE note": "UPDATE kb SET note = 'n' WHERE id = 1",
        "DELETE": "DELETE FROM kb WHERE id = 2",
        "CREATE": "CREATE TABLE IF NOT EXISTS mine (x int)",
    }
    allowed = {
        "reader": {"SELECT"},
        "writer": {"SELECT", "INSERT", "UPDATE", "UPDATE note", "DELETE"},
        "column": {"SELECT", "UPDATE note"},
        "nobody": set(),
    }

    def may(role: str) -> set[str]:
        done = set()
        for name, statement in statements.items():
            with on(dsn, G1) as client:
                client.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(roles[role])))
                try:
                    client.execute(statement)
                    done.add(name)
                except (pg.InsufficientPrivilege, pg.UndefinedTable, pg.InvalidSchemaName):
                    pass
        return done

    for role, expected in allowed.items():
        assert may(role) == expected, role
    with on(dsn, G1) as client:
        client.execute(sql.SQL("SET ROLE {}").format(reader))
        assert one(client, "SELECT count(*) FROM kb") == 3, "the row policy of the table holds"
    connection.execute(sql.SQL("REVOKE UPDATE, DELETE ON kb FROM {}; GRANT SELECT ON kb TO {}").format(writer, nobody))
    with on(dsn, G1) as client:
        client.execute(sql.SQL("SET ROLE {}").format(nobody))
        assert one(client, "SELECT current_schemas(false)") == ["public"], "it is passed over without a word"
    assert expose(dsn).summary.endswith(
        f"{roles['nobody']} may use the table and no view of ours: it gets the bare table (add --refresh)"
    )
    expose(dsn, refresh=True)
    assert expose(dsn).summary == "the views are there"
    assert (may("writer"), may("nobody")) == ({"SELECT", "INSERT"}, {"SELECT"})


def test_column_grants_and_missing_rights_are_refused(
    dsn: str, connection: psycopg.Connection[Any], roles: dict[str, str]
) -> None:
    """Refused with the GRANT that helps; after it, an owner without any other right exposes and finalizes."""
    knowledge_base(connection, 5)
    owner, reader = sql.Identifier(roles["owner"]), roles["reader"]
    connection.execute(sql.SQL("ALTER TABLE kb OWNER TO {}; GRANT CREATE ON SCHEMA public TO {}").format(owner, owner))
    connection.execute(sql.SQL("GRANT SELECT (id, content) ON kb TO {}").format(sql.Identifier(reader)))
    before = shape(connection)
    mine = psycopg.conninfo.make_conninfo(dsn, user=roles["owner"], password="x")
    with pytest.raises(Refused) as refused:
        expose(mine, from_=OLD)
    assert f"{reader} may read only id, content of kb" in str(refused.value)
    assert f"role {roles['owner']} may not create a schema" in str(refused.value)
    assert shape(connection) == before and one(connection, "SELECT to_regnamespace('revector') IS NULL")
    for line in refused.value.hint.splitlines():
        if "GRANT" in line:
            connection.execute(line.partition("owner: ")[2] or line)
    expose(mine, from_=OLD)
    with on(mine, G1) as client:
        with pytest.raises(pg.InsufficientPrivilege):
            client.execute("CREATE TABLE IF NOT EXISTS sessions (x int)")
        assert one(client, "SELECT count(*) FROM kb") == 5
    advance(mine, "VERIFIED", Request(from_=OLD, to=NEW))
    expose(mine, without_follower=True)
    give(mine, "cutover", "finalize")
    assert_no_leftovers(connection)


# -- after the table has changed ---------------------------------------------------------------------------------------


def test_refresh_after_the_application_changed_its_table(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A column more, a column less, another type: told before, and shown after; DDL under a view goes by --drop."""
    knowledge_base(connection, 4, more=", tag text")
    advance(dsn, "VERIFIED")
    expose(dsn, without_follower=True)
    connection.execute("ALTER TABLE kb ADD COLUMN author text DEFAULT 'a'")
    done = expose(dsn, without_follower=True)
    assert (done.figures["made"], done.figures["stale"]) == ([], ["rv_kb_g1", "rv_kb_g2"])
    with on(dsn, G1) as old, on(dsn, G2) as new:
        for client in (old, new):
            with pytest.raises(pg.UndefinedColumn):
                client.execute("SELECT author FROM kb")
        expose(dsn, refresh=True, without_follower=True)
        give(dsn, "cutover")
        for client, model in ((old, OLD), (new, NEW)):
            assert one(client, "SELECT author FROM kb LIMIT 1") == "a"
            assert columns_of(client, "kb") == [
                "id",
                "title",
                "content",
                "note",
                "filler",
                "embedding",
                "tag",
                "author",
            ]
            assert_shown(client, model)
    for statement in ("ALTER TABLE kb DROP COLUMN tag", "ALTER TABLE kb ALTER COLUMN tag TYPE varchar(9)"):
        with pytest.raises((pg.DependentObjectsStillExist, pg.FeatureNotSupported)):
            connection.execute(statement)
    with steering(dsn) as migration:
        migration.unexpose()
    connection.execute("ALTER TABLE kb DROP COLUMN tag")
    expose(dsn, without_follower=True)
    assert columns_of(connection, "rv_kb_g1.kb") == ["id", "title", "content", "note", "filler", "embedding", "author"]


# -- the end -----------------------------------------------------------------------------------------------------------


def test_abort_and_finalize_leave_nothing(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Views made within a migration go with it; what is built on them, or a role's setting, is told first."""
    knowledge_base(connection, 5)
    advance(dsn, "VERIFIED")
    expose(dsn, without_follower=True)
    give(dsn, "abort")
    assert_no_leftovers(connection)
    advance(dsn, "VERIFIED")
    expose(dsn, without_follower=True)
    give(dsn, "cutover")
    connection.execute("CREATE VIEW report AS SELECT id, content FROM rv_kb_g1.kb")
    with pytest.raises(Refused, match=r"view public\.report is built on our view in rv_kb_g1"):
        give(dsn, "finalize")
    connection.execute("DROP VIEW report")
    role = sql.Identifier(f"rv_test_app_{connection.info.backend_pid}")
    connection.execute(sql.SQL("CREATE ROLE {0}; ALTER ROLE {0} SET search_path = rv_kb_g1, public").format(role))
    try:
        with pytest.raises(Refused, match="has rv_kb_g1 in its search_path") as refused:
            give(dsn, "finalize")
        assert stage_of(connection) == ("CUT_OVER", None)
        connection.execute(refused.value.hint.splitlines()[0])
        with on(dsn, "rv_kb_g3,public") as new:
            text = one(new, "SELECT content FROM kb WHERE id = 2")
            give(dsn, "finalize")
            # With the view gone, its clients have the bare table, which answers with their model.
            found = new.execute("SELECT id FROM kb ORDER BY embedding <=> %s::vector LIMIT 1", (vector(NEW, text),))
            assert found.fetchone() == (2,)
    finally:
        connection.execute(sql.SQL("DROP ROLE {}").format(role))
    assert_no_leftovers(connection)


def test_a_reader_that_stays_delays_but_breaks_nothing(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """An open transaction that read the view keeps it; finalize stops within its budget and goes on when asked again."""
    knowledge_base(connection, 5)
    advance(dsn, "VERIFIED")
    expose(dsn, without_follower=True)
    give(dsn, "cutover")
    with on(dsn, G2) as client:
        client.execute("BEGIN")
        client.execute("DECLARE c CURSOR FOR SELECT id FROM kb")
        with pytest.raises(PauseBudgetMissed), steering(dsn) as migration:
            migration.unexpose(limits=PauseLimits(50, 2))
        assert schemas(connection) == {"rv_kb_g1", "rv_kb_g2"}
        client.execute("COMMIT")
    give(dsn, "finalize")
    assert_no_leftovers(connection)


def granted(connection: psycopg.Connection[Any], count: int) -> list[str]:
    """So many roles that may read the table: each is a statement of expose."""
    roles = [f"reader_{connection.info.dbname}_{number}" for number in range(count)]
    for role in roles:
        connection.execute(f"CREATE ROLE {role}")  # type: ignore[arg-type]
        connection.execute(f"GRANT SELECT ON kb TO {role}")  # type: ignore[arg-type]
    return roles


def test_long_work_that_nobody_waits_for_has_no_limit(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A first view, or new grants on one, lock nothing that anybody reads: 150 granted roles need no larger budget."""
    knowledge_base(connection, 5)
    advance(dsn, "VERIFIED")
    roles = granted(connection, 150)
    try:
        expose(dsn, without_follower=True, limits=PauseLimits(10, 3))
        connection.execute(f"REVOKE SELECT ON kb FROM {roles[0]}")  # type: ignore[arg-type]
        expose(dsn, refresh=True, without_follower=True, limits=PauseLimits(10, 3))
    finally:
        for role in roles:
            connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")  # type: ignore[arg-type]


def test_table_that_is_locked_delays_a_first_view(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """No view of ours is in the way then: the holder of the table is named."""
    knowledge_base(connection, 5)
    advance(dsn, "VERIFIED")
    told: list[str] = []

    def heard(seen: object) -> None:
        if isinstance(seen, Effect) and seen.step == "expose":
            holder.execute("LOCK TABLE kb IN ACCESS EXCLUSIVE MODE")
        told.append(str(seen))

    with (
        psycopg.connect(dsn, application_name="somebody's DDL") as holder,
        steering(dsn, observe=heard) as migration,
        pytest.raises(PauseBudgetMissed, match="no attempt of 2 got the lock within 50 ms") as caught,
    ):
        migration.expose(without_follower=True, limits=PauseLimits(50, 2))
    assert "CREATE OR REPLACE VIEW" in caught.value.why and "In the way: session " in caught.value.why
    assert "somebody's DDL" in caught.value.why and not any("view was busy" in note for note in told)


def test_view_whose_work_is_too_much_is_no_busy_view(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A view that is replaced is away until its grants are back: too many of them are told with a budget that fits."""
    knowledge_base(connection, 5)
    advance(dsn, "VERIFIED")
    expose(dsn, without_follower=True)
    connection.execute("ALTER TABLE kb ADD COLUMN tag text")
    roles = granted(connection, 600)
    told: list[str] = []
    try:
        with (
            steering(dsn, observe=lambda seen: told.append(str(seen))) as migration,
            pytest.raises(PauseBudgetMissed, match=r"the lock was had after .* but the work under it needs") as caught,
        ):
            migration.expose(refresh=True, without_follower=True, limits=PauseLimits(50, 3))
        assert caught.value.fits_ms is not None and not any("busy" in note for note in told)
        expose(dsn, refresh=True, without_follower=True, limits=PauseLimits(caught.value.fits_ms, 3))
        assert one(connection, "SELECT count(tag) FROM rv_kb_g1.kb") == 0
    finally:
        for role in roles:
            connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["drop", "refresh"])
def test_one_reader_waits_for_no_more_than_the_budget(dsn: str, connection: psycopg.Connection[Any], how: str) -> None:
    """One view is held for two thirds of the budget, the other one longer: who reads the first waits for one budget."""
    budget = 450
    knowledge_base(connection, 5)
    advance(dsn, "VERIFIED")
    expose(dsn, without_follower=True)
    if how == "refresh":
        connection.execute("ALTER TABLE kb ADD COLUMN tag text")
    stop, longest = threading.Event(), [0.0]

    def read() -> None:
        with on(dsn, "public") as client:
            while not stop.is_set():
                began = time.monotonic()
                with suppress(pg.UndefinedTable):
                    client.execute("SELECT count(*) FROM rv_kb_g1.kb")
                longest[0] = max(longest[0], time.monotonic() - began)
                time.sleep(0.005)

    reader = threading.Thread(target=read)
    told: list[str] = []
    with psycopg.connect(dsn) as first, psycopg.connect(dsn, application_name="a long report") as second:
        first.execute("SELECT count(*) FROM rv_kb_g1.kb")
        second.execute("SELECT count(*) FROM rv_kb_g2.kb")
        release = threading.Timer(budget / 1500, first.rollback)
        reader.start()
        try:
            with steering(dsn, observe=lambda seen: told.append(str(seen))) as migration:
                release.start()
                with pytest.raises(
                    PauseBudgetMissed, match=f"no attempt of 1 got the lock within {budget} ms"
                ) as caught:
                    if how == "drop":
                        migration.unexpose(limits=PauseLimits(budget, 1))
                    else:
                        migration.expose(refresh=True, limits=PauseLimits(budget, 1))
        finally:
            release.join()
            stop.set()
            reader.join()
    assert "a long report, idle in transaction since" in caught.value.why
    assert caught.value.why.endswith(f"The migration is at SERVED; {OLD} answers.")
    assert caught.value.hint.endswith("revector expose --drop kb" if how == "drop" else "revector expose kb")
    assert any("attempt 1 of 1" in note and "a long report" in note for note in told)
    assert longest[0] * 1000 < budget + 120, f"{longest[0] * 1000:.0f} ms"
    assert schemas(connection) == {"rv_kb_g1", "rv_kb_g2"}
    with steering(dsn) as migration:
        migration.unexpose()
    assert schemas(connection) == set()


def test_uninstall_wants_the_views_gone(dsn: str, connection: psycopg.Connection[Any]) -> None:
    knowledge_base(connection, 3)
    expose(dsn, from_=OLD)
    database = Database(Settings(database_url=dsn))
    with pytest.raises(Refused, match="view schemas are exposed: rv_kb_g1 of kb"):
        uninstall(database)
    with steering(dsn) as migration:
        migration.unexpose()
        with pytest.raises(Refused, match="kb has no views of ours"):
            migration.unexpose()
    assert uninstall(database)


# -- refused, and told -------------------------------------------------------------------------------------------------


def test_expose_needs_to_know_the_live_model(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """--from is compared with the vectors; a model on record is kept; SERVED is not reached without a follower."""
    knowledge_base(connection, 5)
    with pytest.raises(UsageError, match=r"which model made kb\.embedding"):
        expose(dsn)
    with pytest.raises(UsageError, match="has 16"):
        expose(dsn, from_=NEW)
    connection.execute("UPDATE kb SET content = 'another text than that of the vector'")
    with pytest.raises(Refused, match="0 of 5 sampled vectors"):
        expose(dsn, from_=OLD)
    connection.execute("TRUNCATE kb")
    add_rows(connection, range(5), OLD)
    assert one(connection, "SELECT to_regnamespace('revector') IS NULL")
    expose(dsn, from_=OLD)
    expose(dsn)
    with pytest.raises(Refused, match="hash:16 is on record"):
        expose(dsn, from_="hash:8")
    advance(dsn, "VERIFIED", Request(to=NEW))
    with pytest.raises(Refused, match="no follower is alive"):
        expose(dsn)
    assert stage_of(connection) == ("VERIFIED", None)
    assert schemas(connection) == {"rv_kb_g1"}


def test_status_tells_the_setting_of_each_side(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """search_path, never an address; None where there is no view."""
    knowledge_base(connection, 3)
    advance(dsn, "VERIFIED")

    def told() -> list[str | None]:
        with steering(dsn) as migration:
            told = migration.status().to_json()
        assert "postgresql://" not in str(told) and "host=" not in str(told)
        return [told["live"]["search_path"], told["other"]["search_path"]]

    assert told() == [None, None]
    expose(dsn, without_follower=True)
    assert told() == [G1, G2]
    give(dsn, "cutover")
    assert told() == [G2, G1]


def test_published_tables_are_switched_by_views_alone(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """A column list with the vector in it: run and expose go on, the bare name is not renamed under its subscribers."""
    knowledge_base(connection, 5)
    connection.execute("CREATE PUBLICATION outside FOR TABLE kb (id, content, embedding)")
    with steering(dsn) as migration:
        found = migration.preview(REQUEST).draft.findings
    assert [f.ok for f in found if f.title == "publications"] == [None]
    advance(dsn, "VERIFIED")
    expose(dsn, without_follower=True)
    with on(dsn, G2) as new:
        assert_shown(new, NEW)
    with pytest.raises(Refused, match="publication outside sends embedding to subscribers") as refused:
        give(dsn, "cutover")
    connection.execute(refused.value.hint.split("without it: ")[1].split(";")[0])
    give(dsn, "cutover", "finalize")
    assert_no_leftovers(connection)


def test_two_vector_columns_have_views_of_their_own(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """One generation's view shows the other vector column as it is; it steps aside while that one is upgraded."""
    knowledge_base(connection, 5, index=None, more=", title_vector vector(8)")
    connection.execute("UPDATE kb SET note = title")
    for number in range(5):
        connection.execute(
            "UPDATE kb SET title_vector = %s WHERE id = %s", (vector("hash:8", f"title {number}"), number)
        )
    expose(dsn, from_=OLD, vector="embedding")
    request = Request(from_="hash:8", to="hash:16", vector="title_vector", text="title")
    with pytest.raises(Refused, match="rv_kb_g1") as refused, steering(dsn) as migration:
        migration.run(request)
    assert "revector expose kb --drop" in refused.value.hint
    with steering(dsn) as migration:
        migration.unexpose()
    advance(dsn, "VERIFIED", request)
    done = expose(dsn, without_follower=True)
    assert len(done.sides) == 2
    for _, path, _ in done.sides:
        with on(dsn, path) as client:
            assert columns_of(client, "kb")[-2:] == ["embedding", "title_vector"]
            assert one(client, "SELECT count(*) FROM kb WHERE title_vector IS NULL") == 0
    give(dsn, "cutover", "finalize")
    assert_no_leftovers(connection)


def test_rows_outside_a_filter_are_the_same_in_both_views(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """`--where` on a column without a dimension: a client of either view writes its own rows, and those outside once."""
    connection.execute("CREATE TABLE kb (id int PRIMARY KEY, tenant text, content text, embedding vector)")
    for number in range(8):
        connection.execute(
            "INSERT INTO kb VALUES (%s, %s, %s, %s)",
            (number, "ab"[number % 2], body(number), vector(OLD, body(number))),
        )
    advance(dsn, "VERIFIED", Request(from_=OLD, to=NEW, where="tenant = 'a'"))
    done = expose(dsn, without_follower=True)
    for flip in ("cutover", "rollback"):
        give(dsn, flip)
        for model, path, _ in done.sides:
            text = f"by {model} after {flip}"
            with on(dsn, path) as client:
                client.execute("UPDATE kb SET content = %s, embedding = %s WHERE id = 2", (text, vector(model, text)))
                client.execute("UPDATE kb SET content = %s, embedding = %s WHERE id = 3", (text, vector(OLD, text)))
            for _, other, _ in done.sides:
                with on(dsn, other) as client:
                    assert one(client, "SELECT embedding = %s::vector FROM kb WHERE id = 3", vector(OLD, text))
        fill(dsn, connection)
        for model, path, _ in done.sides:
            with on(dsn, path) as client:
                text = one(client, "SELECT content FROM kb WHERE id = 2")
                assert one(client, "SELECT embedding = %s::vector FROM kb WHERE id = 2", vector(model, text))


def test_a_role_that_is_left_on_the_side_that_goes(dsn: str, connection: psycopg.Connection[Any]) -> None:
    """Abort does not wait for it, and says what is still to do."""
    knowledge_base(connection, 3)
    advance(dsn, "VERIFIED")
    expose(dsn, without_follower=True)
    role = sql.Identifier(f"rv_test_app_{connection.info.backend_pid}")
    connection.execute(sql.SQL("CREATE ROLE {0}; ALTER ROLE {0} SET search_path = rv_kb_g2, public").format(role))
    notes: list[str] = []
    try:
        with steering(dsn, observe=lambda seen: notes.append(str(seen))) as migration:
            # Without its view it would get the other model's answers under the bare name.
            with pytest.raises(Refused, match="has rv_kb_g2 in its search_path"):
                migration.unexpose()
            migration.abort()
    finally:
        connection.execute(sql.SQL("DROP ROLE {}").format(role))
    assert any("still to do: ALTER ROLE" in note for note in notes)
    assert_no_leftovers(connection)
