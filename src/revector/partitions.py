"""Where the rows of a table are: the leaves of a partitioned table; a plain table is the one leaf of itself.

A `ctid` means something in one leaf only, so whatever locates rows by it names its leaf. Attribute numbers may differ
from leaf to leaf, names may not: a column is resolved on the table and read under that name in every leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from revector.db import Session, block


class Detached(Exception):
    """The leaf was detached or dropped meanwhile: its rows are no longer the table's."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One relation that holds rows of the table."""

    oid: int
    schema: str
    name: str

    @property
    def identifier(self) -> sql.Identifier:
        """Schema and name, quoted."""
        return sql.Identifier(self.schema, self.name)


@dataclass(frozen=True, slots=True)
class Part:
    """One relation below a partitioned table."""

    oid: int
    #: OID of the relation that it is a partition of.
    parent: int
    schema: str
    name: str
    #: `r`: a leaf; `p`: partitioned itself; `f`: foreign.
    kind: str
    estimated_rows: float
    heap_bytes: int
    total_bytes: int

    @property
    def identifier(self) -> sql.Identifier:
        """Schema and name, quoted."""
        return sql.Identifier(self.schema, self.name)


@dataclass(frozen=True, slots=True)
class IndexPart:
    """The part of an index that is on one relation."""

    relation: int
    oid: int
    schema: str
    name: str
    valid: bool

    @property
    def identifier(self) -> sql.Identifier:
        """Schema and name, quoted."""
        return sql.Identifier(self.schema, self.name)


@dataclass(frozen=True, slots=True)
class Partitions:
    """What a plan needs to know of a partitioned table."""

    #: Parents before their partitions.
    parts: tuple[Part, ...]
    #: The columns that decide where a row belongs, at every level.
    key: tuple[str, ...]
    #: (column, partition) where a generated column is computed otherwise than in the table.
    differing: tuple[tuple[str, str], ...]

    @property
    def leaves(self) -> tuple[Part, ...]:
        """The parts that hold rows."""
        return tuple(part for part in self.parts if part.kind != "p")


@dataclass(frozen=True, slots=True)
class Own:
    """Something that is tied to the vector column in one partition alone."""

    partition: str
    description: str
    is_index: bool


def leaves(session: Session, table: int) -> tuple[Leaf, ...]:
    """The leaves by OID, by the names that they have now; none when the table is gone or has no partition yet."""
    found = session.rows(block("partitions", "leaves"), table=table)
    return tuple(Leaf(row.oid, row.schema, row.name) for row in found)


def below(session: Session, table: int) -> tuple[Part, ...]:
    """Everything below a partitioned table, parents before their partitions; nothing for a plain one."""
    found = session.rows(block("partitions", "below"), table=table)
    return tuple(Part(**row._asdict()) for row in found)


def read_partitions(session: Session, table: int) -> Partitions:
    """The tree of a partitioned table."""
    parts = below(session, table)
    tables = [table, *(part.oid for part in parts)]
    return Partitions(
        parts,
        tuple(row.name for row in session.rows(block("partitions", "key"), tables=tables)),
        tuple(
            (row.name, row.partition)
            for row in session.rows(block("partitions", "differing"), table=table, tables=tables[1:])
        ),
    )


def parent_name(session: Session, table: int) -> str | None:
    """The partitioned table that this partition belongs to, its schema before its name; None: it is no partition."""
    name = session.value(block("partitions", "parent"), table=table)
    return str(name) if name is not None else None


def own_objects(session: Session, table: int, column: str) -> tuple[Own, ...]:
    """What partitions tie to their vector column alone, and publications that name them: no rename would carry it."""
    tables = [part.oid for part in below(session, table)]
    if not tables:
        return ()
    found = session.rows(block("partitions", "own"), tables=tables, column=column)
    published = session.rows(block("partitions", "published"), tables=tables)
    return (
        *(Own(row.partition, row.description, row.is_index) for row in found),
        *(Own(row.partition, f"publication {row.name}", False) for row in published),
    )


def strict(session: Session, table: int, column: str) -> tuple[tuple[int, str], ...]:
    """(OID, name of the constraint) of the partitions whose NOT NULL has a name of its own, or is their own."""
    tables = [part.oid for part in below(session, table)]
    found = session.rows(block("partitions", "strict"), table=table, tables=tables, column=column) if tables else ()
    return tuple((row.oid, row.name) for row in found)


def not_null_in(session: Session, table: int, columns: Sequence[str]) -> tuple[Leaf, str] | None:
    """The table, or else a partition of it, in which one of these columns is NOT NULL, and that column."""
    tables = [table, *(part.oid for part in below(session, table))]
    row = session.row(block("partitions", "not_null_in"), tables=tables, columns=list(columns))
    return (Leaf(row.oid, row.schema, row.name), row.column) if row is not None else None


def index_parts(session: Session, index: int) -> dict[int, IndexPart]:
    """Relation -> the part of an index that is on it, the whole's own relation included."""
    found = session.rows(block("partitions", "index_parts"), index=index)
    return {row.relation: IndexPart(**row._asdict()) for row in found}


def built_otherwise(session: Session, index: int) -> tuple[tuple[str, str], ...]:
    """(partition, options) where an attached part of an index was built with other options than the index has."""
    return tuple(
        (row.partition, row.options) for row in session.rows(block("partitions", "index_options"), index=index)
    )
