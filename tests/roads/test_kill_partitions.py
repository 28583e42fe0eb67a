"""The same on a partitioned table: SIGKILL where its steps differ from a plain table's, then the same command again."""

from __future__ import annotations

import psycopg
import pytest
import test_kill

from revector import Migration, Settings

#: The steps that go from partition to partition, or make and drop what cannot be made CONCURRENTLY on the whole.
STEPS = (
    "backfill.windows",
    "backfill.window",
    "index.build",
    "index.pending",
    "serve",
    "cutover",
    "abort.drop_indexes",
    "finalize.close",
    "finalize.drop_indexes",
    "finalize.drop_column",
)


def make(connection: psycopg.Connection) -> None:
    """What test_kill migrates, in three partitions by the hash of its key."""
    connection.execute(
        "CREATE TABLE kb (id int PRIMARY KEY, content text NOT NULL, filler text, embedding vector(16) NOT NULL)"
        " PARTITION BY HASH (id)"
    )
    for remainder in range(3):
        connection.execute(
            f"CREATE TABLE kb_p{remainder} PARTITION OF kb FOR VALUES WITH (MODULUS 3, REMAINDER {remainder})"
        )
    texts = [f"text {n} of the table" for n in range(test_kill.ROWS)]
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO kb VALUES (%s, %s, repeat('x', 700), %s)",
            [(n, text, test_kill.vector(test_kill.OLD, text)) for n, text in enumerate(texts)],
        )
    connection.execute("CREATE INDEX kb_embedding_idx ON kb USING hnsw (embedding vector_l2_ops) WITH (m = 8)")


@pytest.mark.roads
@pytest.mark.parametrize("moment", ["effect", "recorded"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_and_given_again(dsn: str, connection: psycopg.Connection, step: str, moment: str) -> None:
    make(connection)
    command = test_kill.road_of(step)
    with test_kill.writing(dsn) as errors:
        test_kill.proceed(dsn, test_kill.before(step))
        test_kill.kill(dsn, command, step, moment)
        with Migration.open(Settings(database_url=dsn), table="kb") as migration:
            row = migration.latest()
            done = row is not None and row.stage.closed
        if not done and not (moment == "recorded" and step == "cutover"):
            test_kill.proceed(dsn, (command,))
    assert errors == []
    test_kill.finish_and_check(dsn, connection, command)
    named = connection.execute("SELECT indexname FROM pg_indexes WHERE tablename = 'kb_p1' ORDER BY 1").fetchall()
    assert named == [("kb_p1_embedding_idx",), ("kb_p1_pkey",)]
