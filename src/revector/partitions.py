"""Where the rows of a table are: the leaves of a partitioned table; a plain table is the one leaf of itself.

A `ctid` means something in one leaf only, so whatever locates rows by it names its leaf. Attribute numbers may differ
from leaf to leaf, names may not: a column is resolved on the table and read under that name in every leaf.
"""

from __future__ import annotations

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


def leaves(session: Session, table: int) -> tuple[Leaf, ...]:
    """The leaves by OID, by the names that they have now; none when the table is gone or has no partition yet."""
    return tuple(
        Leaf(row.oid, row.schema, row.name) for row in session.rows(block("partitions", "leaves"), table=table)
    )
