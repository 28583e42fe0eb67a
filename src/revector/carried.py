"""What hangs on the live vector column and goes with its name: secondary indexes, CHECKs, rights and settings.

PostgreSQL ties these to the attribute, not to its name: a rename would leave them on the old column. Indexes and CHECKs
get a twin on the candidate, and the names change hands at cutover; rights and settings are given to both columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql

from revector.catalog import Column, Dependent, Index, Table
from revector.db import Session, block, raw
from revector.embed.spec import Identity

_STORAGE: Final = {"p": "PLAIN", "e": "EXTERNAL", "x": "EXTENDED", "m": "MAIN"}
_COMPRESSION: Final = {"p": "pglz", "l": "lz4"}
#: Bytes of a row that PostgreSQL moves out of line from on; a PLAIN value never is moved, and a page takes 8,160.
_PLAIN_LIMIT: Final = 2000
#: Strings, quoted names, words, and everything else one by one, as PostgreSQL deparses an expression.
_TOKEN: Final = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|[^\W\d][\w$]*|.""", re.DOTALL)
#: A cast to a type with its dimension: what holds for the old model only.
_OF_ONE_DIMENSION: Final = re.compile(r"::[\w.\"]*\b(?:vector|halfvec|sparsevec|bit)\"?\(\d+\)")


@dataclass(frozen=True, slots=True)
class Twin:
    """A secondary index that involves the vector column, to be built again on the candidate."""

    live_name: str
    #: What follows USING, `{column}` in the vector column's place.
    using: str
    #: (number, target) of its columns that have a statistics target of their own.
    statistics: tuple[tuple[int, int], ...] = ()

    def on(self, column: str) -> str:
        """What follows USING, for the column of this quoted name."""
        return self.using.replace("{column}", column)


@dataclass(frozen=True, slots=True)
class Check:
    """A CHECK that reads the vector column alone, to be put on the candidate as well."""

    name: str
    #: The condition, `{column}` in the vector column's place.
    condition: str
    #: Whether it is known to hold for every row.
    valid: bool
    #: Whether the server looks at it at all (PostgreSQL 18).
    enforced: bool = True

    def on(self, column: str) -> str:
        """The condition for the column of this quoted name."""
        return self.condition.replace("{column}", column)


@dataclass(frozen=True, slots=True)
class Carried:
    """Everything that goes with the name of the vector column."""

    twins: tuple[Twin, ...] = ()
    checks: tuple[Check, ...] = ()
    #: Statements that give the candidate what is set on the live column; `{table}` and `{column}` stand for the names.
    settings: tuple[str, ...] = ()
    #: In words, for the plan.
    told: tuple[str, ...] = ()
    #: (what, remedy) of what was found and cannot be carried as it is, though it does no harm.
    left: tuple[tuple[str, str], ...] = ()

    def settings_on(self, table: sql.Composable, column: str) -> list[sql.Composable]:
        """The statements, for one column."""
        name = sql.Identifier(column).as_string(None)
        return [raw(s.replace("{table}", table.as_string(None)).replace("{column}", name)) for s in self.settings]


def carried_from_json(told: Mapping[str, Any] | None) -> Carried:
    """The inverse of `asdict`."""
    if told is None:
        return NOTHING_CARRIED
    return Carried(
        tuple(
            Twin(**{**t, "statistics": tuple((number, target) for number, target in t.get("statistics", ()))})
            for t in told["twins"]
        ),
        tuple(Check(**c) for c in told["checks"]),
        tuple(told["settings"]),
        tuple(told["told"]),
        tuple((str(a), str(b)) for a, b in told["left"]),
    )


def templated(expression: str, column: str) -> str:
    """An expression as PostgreSQL deparses it, with `{column}` wherever it reads that column."""
    tokens, told, before = _TOKEN.findall(expression), [], ""
    for number, token in enumerate(tokens):
        name = token[1:-1].replace('""', '"') if token.startswith('"') else token
        after = next((t for t in tokens[number + 1 :] if not t.isspace()), "")
        reads = name == column and not token.startswith("'") and before not in (".", ":") and after not in ("(", ".")
        told.append("{column}" if reads else token)
        before = token
    return "".join(told)


def conditions(predicate: str) -> frozenset[str]:
    """What a predicate as PostgreSQL deparses it asks for, however many parentheses are round it."""
    told = _TOKEN.findall(predicate)
    while told and _pair(told) == len(told):
        told = told[1:-1]
    parts: list[list[str]] = [[]]
    depth = 0
    for this in told:
        depth += (this == "(") - (this == ")")
        if this == "AND" and depth == 0:
            parts.append([])
        else:
            parts[-1].append(this)
    if len(parts) == 1:
        return frozenset({"".join(told)})
    return frozenset().union(*(conditions("".join(part).strip()) for part in parts))


def _pair(tokens: Sequence[str]) -> int:
    """How many tokens it is from the parenthesis at the beginning to its own closing one; 0: none begins."""
    depth = 0
    for number, this in enumerate(tokens, 1):
        depth += (this == "(") - (this == ")")
        if depth == 0:
            return number if number > 1 else 0
    return 0


def read_carried(session: Session, table: Table, column: Column, new: Identity, vector_schema: str) -> Carried:
    """What of the live column's can be carried to a column for the new model."""
    twins = [twin for index in table.indexes if (twin := twin_of(index, column)) is not None]
    own = sql.Identifier(vector_schema, column.type_name).as_string(None)
    checks = [
        Check(row.name, templated(row.expression, column.name), row.valid, row.enforced)
        for row in session.rows(block("carried", "checks"), table=table.oid, column=column.number)
        if row.columns == 1 and not row.alone and _accepts(session, row.expression, column, new, own)
    ]
    settings, told, left = _settings(session, table, column, new)
    carried = [i for i in table.indexes if i.covers_only(column) or i.name in {twin.live_name for twin in twins}]
    left += [
        (
            f"tablespace {index.tablespace} of index {index.name}: this role may not create there",
            sql.SQL(
                "GRANT CREATE ON TABLESPACE {0} to it first, or move the index after finalize: ALTER INDEX {1} SET TABLESPACE {0}"
            )
            .format(sql.Identifier(index.tablespace or ""), sql.Identifier(index.name))
            .as_string(None),
        )
        for index in carried
        if not index.placeable
    ]
    told = [
        *(f"index {twin.live_name}" for twin in twins),
        *(f"CHECK {check.name}" for check in checks),
        *told,
    ]
    return Carried(tuple(twins), tuple(checks), tuple(settings), tuple(told), tuple(left))


def twin_of(index: Index, column: Column) -> Twin | None:
    """The secondary index for the candidate; None: it does not involve the column, or cannot be carried."""
    using = index.definition.partition(" USING ")[2]
    template = templated(using, column.name)
    if template == using or not index.valid or index.covers_only(column):
        return None
    if index.unique or index.excludes or index.method in ("hnsw", "ivfflat") or _OF_ONE_DIMENSION.search(using):
        return None
    # Its definition does not say where it lies.
    tail = f" WHERE {index.predicate}" if index.predicate else ""
    head = templated(using.removesuffix(tail), column.name)
    return Twin(index.name, f"{head}{placed(index)}{templated(tail, column.name)}", index.statistics)


def placed(index: Index) -> str:
    """The clause that puts another index where this one lies."""
    if index.tablespace is None or not index.placeable:
        return ""
    return f" TABLESPACE {sql.Identifier(index.tablespace).as_string(None)}"


def _accepts(session: Session, expression: str, column: Column, new: Identity, own: str) -> bool:
    """Whether the CHECK lets a vector be NULL while it is pending, and takes the new model's vectors."""
    statement = block(
        "carried", "accepts", expression=raw(expression), type=raw(own), column=sql.Identifier(column.name)
    )
    values = [None, *("[" + ",".join(map(str, probe)) + "]" for probe in new.probes)]
    try:
        # What a function of the user's says no with is up to the user: any error of the statement means no.
        with session.transaction():
            return all(session.value(statement, vector=value) for value in values)
    except psycopg.OperationalError:
        raise
    except psycopg.Error:
        return False


def set_on(session: Session, table: int, column: int) -> frozenset[str]:
    """What is set on one column, in words."""
    row = session.row(block("carried", "settings"), table=table, column=column)
    told = [
        f"{g.privilege} for {g.grantee}" for g in session.rows(block("carried", "grants"), table=table, column=column)
    ]
    if row is not None:
        told += [f"statistics target {row.statistics}"] if row.statistics is not None else []
        told += [f"STORAGE {_STORAGE[row.storage]}"] if row.storage else []
        told += [f"COMPRESSION {_COMPRESSION[row.compression]}"] if row.compression else []
        told += row.options
    return frozenset(told)


def set_in_parts(session: Session, table: Table, column: Column) -> tuple[Dependent, ...]:
    """What single partitions have set on their vector column: nothing that is set on the table spreads it to them."""
    tables = [part.oid for part in table.partitions.parts] if table.partitions else []
    if not tables:
        return ()
    # These two an ALTER TABLE of the whole sets in every partition.
    spread = {s for s in set_on(session, table.oid, column.number) if s.startswith(("statistics target", "STORAGE"))}
    found = [
        (row.partition, told)
        for row in session.rows(block("carried", "part_columns"), tables=tables, column=column.name)
        for told in sorted(set_on(session, row.oid, row.number) - spread)
    ]
    found += [
        (row.partition, row.told)
        for row in session.rows(block("carried", "set_in_parts"), tables=tables, column=column.name)
    ]
    return tuple(
        Dependent(f"{told} of partition {partition}", f"unset it in {partition}, and set it there again after finalize")
        for partition, told in found
    )


def _settings(
    session: Session, table: Table, column: Column, new: Identity
) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    statements, told, left = [], [], []
    alter = "ALTER TABLE {table} ALTER COLUMN {column} SET "
    row = session.row(block("carried", "settings"), table=table.oid, column=column.number)
    assert row is not None
    if row.statistics is not None:
        statements.append(f"{alter}STATISTICS {row.statistics}")
        told.append(f"statistics target {row.statistics}")
    if row.storage:
        size = 8 + new.dimension * (4 if column.type_name == "vector" else 2)
        if row.storage == "p" and size > _PLAIN_LIMIT:
            left.append(
                (
                    f"STORAGE PLAIN of {column.name}: a vector of {size:,} bytes in each row might not fit its page",
                    "the new column is EXTERNAL; after finalize, if you are sure: ALTER TABLE ... SET STORAGE PLAIN",
                )
            )
        else:
            statements.append(f"{alter}STORAGE {_STORAGE[row.storage]}")
            told.append(f"STORAGE {_STORAGE[row.storage]}")
    if row.compression:
        statements.append(f"{alter}COMPRESSION {_COMPRESSION[row.compression]}")
        told.append(f"COMPRESSION {_COMPRESSION[row.compression]}")
    if row.options:
        statements.append(f"{alter}({', '.join(row.options)})")
        told.append(", ".join(row.options))
    for grant in session.rows(block("carried", "grants"), table=table.oid, column=column.number):
        option = " WITH GRANT OPTION" if grant.grantable else ""
        statements.append(f"GRANT {grant.privilege} ({{column}}) ON {{table}} TO {grant.grantee}{option}")
        told.append(f"{grant.privilege} for {grant.grantee}")
    return statements, told, left


NOTHING_CARRIED: Final = Carried()
