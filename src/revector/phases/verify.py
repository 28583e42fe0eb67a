"""Check that the candidate is correct: complete, sane, reproducible, indexed.

Lock: ACCESS SHARE. A crash leaves nothing; every check is made again. Each check has a figure, and can fail.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from psycopg import sql

from revector.db import block, raw
from revector.errors import GateFailed
from revector.partitions import index_parts
from revector.plan import Generation, TargetIndex
from revector.work import Outcome, Progress, Work

#: Seconds between two looks at pending rows: what is pending in both is stuck.
LOOK_AGAIN = 10.0
_SAMPLE: Final = 100
_QUERIES: Final = 20
_BLOCKS: Final = 512
#: A table of fewer rows may be searched exactly: the planner is right to.
_MUST_USE_INDEX: Final = 10_000
#: Share of different texts with a vector of their own, at or below which the model says the same of everything.
_COLLAPSED: Final = 0.5
OPERATORS: Final = {"cosine": "<=>", "l2": "<->", "ip": "<#>", "l1": "<+>"}


@dataclass(frozen=True, slots=True)
class Check:
    """One check with its figure."""

    name: str
    figure: str
    passed: bool


def run(work: Work) -> Outcome:
    """Make every check; VERIFIED is proven when all pass. Raises `GateFailed` naming those that do not."""
    generation = work.plan.new
    sample = _sample(work, generation)
    checks = [
        *_totals(work, generation),
        _reproduced(work, generation, sample),
        _not_collapsed(sample),
        *_indexes(work, generation, sample),
        _windowed(work, generation),
    ]
    figures = {c.name: c.figure for c in checks}
    failed = [c for c in checks if not c.passed]
    if failed:
        work.ledger.record("verify", {"failed": [c.name for c in failed], **figures})
        why, hint = f"Nothing changed; {work.plan.old.model.model} still answers.", f"revector run {work.plan.argument}"
        if work.plan.source is not None and any(c.name == "reproduced" for c in failed):
            source, table = work.plan.source.name, work.plan.argument
            why = f"{source} has vectors that were stale when it was made; the same command alone fails again. {why}"
            hint = f"embed all rows, and renew those: revector restore {table} --refresh\nor give it up: revector abort {table}"
        raise GateFailed("verify: " + "; ".join(f"{c.name}: {c.figure}" for c in failed), why=why, hint=hint)
    for check in checks:
        work.note(f"{check.name}: {check.figure}")
    with work.step("verify", stage="VERIFIED") as told:
        told |= figures
    return Outcome(f"{len(checks)} checks passed", figures)


def _parts(work: Work, generation: Generation) -> dict[str, sql.Composable]:
    return {
        "table": work.table,
        "column": sql.Identifier(work.column(generation) or generation.column),
        "text": raw(work.plan.text_sql),
    }


def _pending(work: Work, generation: Generation) -> set[tuple[int, str, int]]:
    rows = work.control.rows(
        block("phases/verify", "pending", **_parts(work, generation)),
        migration=work.ledger.migration,
        generation=generation.number,
    )
    return {(row.tableoid, row.tid, row.hash) for row in rows}


def _totals(work: Work, generation: Generation) -> list[Check]:
    stuck = _pending(work, generation)
    seen = time.monotonic()
    # A row that others lock again and again is free at some moment: it is asked for until the second look.
    while stuck and time.monotonic() - seen < LOOK_AGAIN:
        work.check_stop()
        time.sleep(min(LOOK_AGAIN, 0.2))
        work.catch_up([generation.number])
        stuck &= _pending(work, generation)
    schema = sql.Identifier(work.plan.vector_schema)
    norm = sql.Identifier("vector_norm" if work.plan.column_type == "vector" else "l2_norm")
    row = work.control.row(
        block(
            "phases/verify",
            "totals",
            schema=schema,
            norm=norm,
            inside=raw(work.plan.inside),
            **_parts(work, generation),
        )
    )
    assert row is not None
    refused = len(work.refused(generation))
    return [
        Check(
            "complete",
            f"{row.vectors:,} of {row.rows:,} rows have a vector, {len(stuck)} stuck pending",
            # A column without a single vector finds nothing, whatever was allowed.
            not stuck and not (refused and not row.vectors),
        ),
        Check(
            "refused",
            f"{refused} texts refused by the model, {work.allow_failed} allowed",
            refused <= work.allow_failed,
        ),
        # pgvector itself refuses NaN and infinity on input; a zero vector it takes.
        Check("zero", f"{row.zero} zero vectors", row.zero == 0),
    ]


def _sample(work: Work, generation: Generation) -> Sequence[Any]:
    rows = work.control.value(
        "SELECT coalesce(sum(greatest(reltuples, 0)), 0) FROM pg_class WHERE oid = ANY (%(t)s::oid[])",
        t=[leaf.oid for leaf in work.leaves()],
    )
    large = rows > 50_000
    percent = min(100.0, 300.0 * _SAMPLE / rows) if rows else 100.0
    statement = block(
        "phases/verify", "sample", method=sql.SQL("SYSTEM" if large else "BERNOULLI"), **_parts(work, generation)
    )
    seed = int(time.time())
    return work.control.rows(statement, percent=percent, seed=seed, limit=_SAMPLE) or work.control.rows(
        statement, percent=100.0, seed=seed, limit=_SAMPLE
    )


def _vectors(sample: Sequence[Any]) -> NDArray[np.float32]:
    return np.array([row.vector for row in sample], dtype=np.float32)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms == 0, 1, norms), dtype=np.float32)


def _reproduced(work: Work, generation: Generation, sample: Sequence[Any]) -> Check:
    """Re-embed the sample and compare with what the table holds."""
    if not sample:
        return Check("reproduced", "no rows to embed again", True)
    embedder, threshold = work.models[generation.number](), work.plan.verify_threshold
    fresh, _ = embedder.encode_isolating([row.text for row in sample], batch_size=work.batch_size)
    cosines = np.sum(_unit(_vectors(sample)) * _unit(np.nan_to_num(fresh)), axis=1)
    same = int((cosines >= threshold).sum())
    figure = f"{same} of {len(sample)} sampled rows embed to their vector again (lowest cosine {cosines.min():.5f})"
    return Check("reproduced", figure, bool(cosines.min() >= threshold))


def _not_collapsed(sample: Sequence[Any]) -> Check:
    """Different texts must not all have the same vector."""
    chosen = list({row.text: row for row in sample}.values())
    if len(chosen) < 10:
        return Check("distinct", f"{len(chosen)} different texts in the sample: too few to tell", True)
    unit = _unit(_vectors(chosen))
    different = len(np.unique(np.round(unit, 5), axis=0))
    n = len(unit)
    mean = float((np.square(unit.sum(axis=0)).sum() - np.square(unit).sum()) / (n * (n - 1)))
    figure = f"{different} different vectors of {n} different texts (mean cosine {mean:.3f})"
    return Check("distinct", figure, different > _COLLAPSED * n)


def _indexes(work: Work, generation: Generation, sample: Sequence[Any]) -> list[Check]:
    checks: list[Check] = []
    for target in work.plan.indexes:
        valid = bool(work.control.value(block("phases/verify", "index"), table=work.plan.table_oid, name=target.name))
        checks.append(Check(f"index {target.name}", "valid" if valid else "missing or INVALID", valid))
        if valid and sample and not target.outside:
            checks += _used(work, generation, target, _vectors(sample[:_QUERIES]))
    return checks


def _used(work: Work, generation: Generation, target: TargetIndex, queries: NDArray[np.float32]) -> list[Check]:
    plan = work.plan
    operator = next((o for k, o in OPERATORS.items() if f"_{k}_ops" in target.opclass), "<=>")
    parts = {
        **_parts(work, generation),
        "schema": sql.Identifier(plan.vector_schema),
        "operator": raw(operator),
        "type": raw(target.key_type or plan.vector_sql_type(generation)),
        "key": raw(target.key(sql.Identifier("t", work.column(generation) or generation.column).as_string(None))),
        "where": sql.SQL("WHERE {}").format(raw(target.predicate)) if target.predicate else sql.SQL(""),
    }
    texts = ["[" + ",".join(f"{x:.7g}" for x in q) + "]" for q in queries.tolist()]
    # Of two indexes that serve the same search the planner takes either.
    twins = [
        _names(work, t.name) for t in plan.indexes if (t.opclass, t.predicate) == (target.opclass, target.predicate)
    ]
    uses = {}
    for label, setting in (("when asked to", "enable_seqscan"), ("plainly", "jit")):
        with work.control.transaction():
            work.control.execute("SELECT set_config(%(s)s, 'off', true)", s=setting)
            explained = work.control.value(block("phases/verify", "explain", **parts), vector=texts[0])
            # Of a partitioned table every partition that is searched must be so through its part; the index's own
            # condition may rule the others out.
            searched, read = _relations_of(explained), _indexes_of(explained)
            uses[label] = all(not names.isdisjoint(read) for names in _by_leaf(work, twins, searched))
    rows = _count(work)
    found = {}
    for label, settings in (("index", ("enable_seqscan",)), ("exact", ("enable_indexscan", "enable_bitmapscan"))):
        with work.control.transaction():
            for setting in settings:
                work.control.execute("SELECT set_config(%(s)s, 'off', true)", s=setting)
            # A pending row has no distance; it sorts last, where fewer than ten rows have one.
            answers = [work.control.rows(block("phases/verify", "search", **parts), vector=t) for t in texts]
            found[label] = [[r.distance for r in answer if r.distance is not None] for answer in answers]
    recalls = [
        sum(d <= exact[-1] + 1e-6 * max(1.0, abs(exact[-1])) for d in got) / len(exact)
        for got, exact in zip(found["index"], found["exact"], strict=True)
        if exact
    ]
    recall = float(np.mean(np.minimum(recalls, 1.0))) if recalls else 1.0
    plain = "uses it" if uses["plainly"] else "prefers an exact scan"
    figure = f"a search {plain}; recall@10 against exact search {recall:.3f} over {len(texts)} queries"
    return [
        Check(f"index {target.name} answers", figure,
              uses["when asked to"] and (uses["plainly"] or rows <= _MUST_USE_INDEX)),
    ]  # fmt: skip


def _names(work: Work, index: str) -> dict[int, str]:
    """Leaf -> the name of this index there; a plain table is its own leaf."""
    oid = work.control.value(block("phases/verify", "index_oid"), table=work.plan.table_oid, name=index)
    here = index_parts(work.control, oid) if oid is not None else {}
    return {leaf.oid: here[leaf.oid].name for leaf in work.leaves() if leaf.oid in here}


def _by_leaf(work: Work, twins: Sequence[dict[int, str]], searched: set[tuple[str, str]]) -> list[set[str]]:
    """The index names that serve each of the leaves which are searched."""
    leaves = [leaf.oid for leaf in work.leaves() if (leaf.schema, leaf.name) in searched]
    return [{names[leaf] for names in twins if leaf in names} for leaf in leaves]


def _relations_of(explained: Any) -> set[tuple[str, str]]:
    """Schema and name of the relations that a plan reads."""
    if isinstance(explained, list):
        return set().union(*map(_relations_of, explained))
    if isinstance(explained, dict):
        named = {(explained["Schema"], explained["Relation Name"])} if "Relation Name" in explained else set()
        return named.union(*map(_relations_of, explained.values()))
    return set()


def _indexes_of(explained: Any) -> set[str]:
    """The names of the indexes that a plan reads."""
    if isinstance(explained, list):
        return set().union(*map(_indexes_of, explained))
    if isinstance(explained, dict):
        named = {explained["Index Name"]} if "Index Name" in explained else set()
        return named.union(*map(_indexes_of, explained.values()))
    return set()


def _count(work: Work) -> int:
    return int(
        work.control.value(
            sql.SQL("SELECT count(*) FROM (SELECT FROM {} LIMIT {}) AS t").format(
                work.table, sql.Literal(_MUST_USE_INDEX + 1)
            )
        )
    )


def _windowed(work: Work, generation: Generation) -> Check:
    """Count the texts of which the model reads only the beginning; known, not wrong."""
    embedder = work.models[generation.number]()
    window = embedder.max_tokens()
    if window is None:
        return Check("length", "the model has no window", True)
    longer = 0
    for leaf in work.leaves():
        blocks = int(work.control.value(block("phases/verify", "blocks"), table=leaf.oid))
        for lo in range(0, blocks, _BLOCKS):
            work.check_stop()
            rows = work.control.rows(
                block("phases/verify", "long_texts", table=leaf.identifier, text=raw(work.plan.text_sql)),
                lo=f"({lo},0)",
                hi=f"({lo + _BLOCKS},0)",
                window=window,
            )
            longer += int((embedder.count_tokens([r.text for r in rows]) > window).sum()) if rows else 0
            work.observe(Progress("verify: lengths", min(lo + _BLOCKS, blocks), blocks, "blocks"))
    return Check("length", f"{longer:,} texts are longer than the model's window of {window} tokens", True)
