"""The plan is a pure function of request and facts: every blocker, every name, every index choice."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from revector.catalog import Column, Dependent, Index, Server, Table, Text, Trigger
from revector.embed.spec import Identity
from revector.errors import Refused
from revector.partitions import Part, Partitions
from revector.plan import (
    Consents,
    Counts,
    Facts,
    Measured,
    Plan,
    Request,
    cut_name,
    differs,
    draft,
    estimate,
    hot_share,
    own_name,
)


def identity(model: str, dimension: int) -> Identity:
    return Identity(model, "", dimension, "", "", True, ((1.0, 0.0),))


COLUMN = Column(3, "embedding", "public.vector(384)", "vector", "b", 384, False, "", "", None, None)
PART = Part(20000, 16384, "public", "kb_p0", "r", 100.0, 8192, 8192)
IVFFLAT = Index(90, "kb_idx", "ivfflat", True, (3,), "public.vector_l2_ops", (("lists", "100"),), None, None, 8192, "")
HNSW = Index(91, "kb_hnsw", "hnsw", True, (3,), "public.vector_cosine_ops", (("m", "24"),), None, None, 8192, "")


def facts(**changes: Any) -> Facts:
    server = Server("18.4", 180004, "db", False, "0.8.5", "public", True, True, False, True, True, "me")
    table = Table(
        16384, "public", "kb", "r", "p", 1000, 8_192_000, 9_000_000, False, False, True, True, "me", False, False,
        (COLUMN,), ("id",), (frozenset({"id"}),), (), (), (),
    )  # fmt: skip
    text = Text("content", "content", (("content", "text"),))
    made = Facts(
        server, table, text, COLUMN, identity("old", 384), identity("new", 768), 2, 1,
        Counts(1000, 0, 0, 0, 0, 500_000), Measured(64, 30.0, 120.0, 0, 256, (1.0,) * 10, 0.3), (), (), (), (), None,
    )  # fmt: skip
    for name in (
        "kind",
        "persistence",
        "owned",
        "indexes",
        "triggers",
        "forces_row_security",
        "may_index",
        "has_children",
        "update_rules",
        "partitions",
        "parent",
    ):
        if name in changes:
            made = replace(made, table=replace(made.table, **{name: changes.pop(name)}))
    for name in ("may_create_schema", "may_use_temp", "may_be_replica", "bypasses_rls"):
        if name in changes:
            made = replace(made, server=replace(made.server, **{name: changes.pop(name)}))
    return replace(made, **changes)


def blockers(request: Request = Request(), **changes: Any) -> list[str]:  # noqa: B008 - a frozen value
    return [f.title for f in draft(request, facts(**changes)).blockers]


def test_a_plain_table_has_no_blocker() -> None:
    assert blockers() == []


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"kind": "v"}, "table"),
        ({"kind": "f"}, "table"),
        ({"parent": "public.whole"}, "table"),
        ({"partitions": Partitions((replace(PART, kind="f"),), ("tenant",), ())}, "table"),
        ({"partitions": Partitions((PART,), ("tenant",), (("body", "kb_p0"),))}, "table"),
        ({"persistence": "t"}, "table"),
        ({"has_children": True}, "table"),
        ({"owned": False}, "rights"),
        ({"may_create_schema": False}, "rights"),
        ({"may_use_temp": False}, "rights"),
        ({"may_index": False}, "rights"),
        ({"forces_row_security": True, "bypasses_rls": False}, "rights"),
        ({"old": identity("old", 512)}, "dimensions"),
        ({"new": identity("new", 3072)}, "index"),
        ({"counts": Counts(1000, 0, 0, 5, 5, 1)}, "vectors"),
        ({"counts": Counts(1000, 3, 0, 0, 0, 1), "column": replace(COLUMN, not_null=True)}, "vectors"),
        ({"measured": Measured(64, 30.0, 1.0, 0, None, (0.1,) * 10, 0.1)}, "old model"),
        ({"taken": ("column embedding_g2",)}, "names"),
        ({"dependents": (Dependent("view v", "drop it"),)}, "dependents"),
        ({"triggers": (Trigger(1, "~~last", "O", 7, ()),)}, "triggers"),
        ({"triggers": (Trigger(1, "touch", "O", 19, ()),), "may_be_replica": False}, "triggers"),
        ({"update_rules": ("r",), "may_be_replica": False}, "triggers"),
    ],
)
def test_each_blocker_is_named(changes: dict[str, Any], title: str) -> None:
    """Each thing that would lose something is refused before anything is changed, and says how to get on."""
    found = draft(Request(), facts(**changes)).blockers
    assert [f.title for f in found] == [title]
    assert found[0].why and found[0].remedy


def test_blank_texts_block_a_not_null_column_only_where_the_model_refuses_them() -> None:
    column, counts = replace(COLUMN, not_null=True), Counts(1000, 0, 2, 0, 0, 1)
    measured = Measured(64, 30.0, 1.0, 0, None, (1.0,) * 10, 0.1)
    assert blockers(column=column, counts=counts, measured=measured) == []
    assert blockers(column=column, counts=counts, measured=replace(measured, refuses_blank=True)) == ["vectors"]


def test_our_own_trigger_is_not_one_of_the_tables() -> None:
    """A plan that is read while its migration is open counts as before it."""
    there = (Trigger(1, "touch", "O", 19, ()), Trigger(2, "~rv_kb_g2", "A", 23, ()))
    found = {f.title: f for f in draft(Request(), facts(triggers=there)).findings}
    assert found["triggers"].finding.startswith("1 of the table's own")


def test_consents_lift_their_blockers() -> None:
    assert blockers(Request(consents=Consents(include_null=True)), counts=Counts(1000, 0, 0, 5, 5, 1)) == []
    touching = {"triggers": (Trigger(1, "touch", "O", 19, ()),), "may_be_replica": False}
    assert blockers(Request(consents=Consents(accept_triggers=True)), **touching) == []


@pytest.mark.parametrize(
    ("request_", "live", "expected"),
    [
        (Request(), (), [("hnsw", (("m", "16"), ("ef_construction", "64")))]),
        (Request(), (IVFFLAT,), [("hnsw", (("m", "16"), ("ef_construction", "64")))]),
        (Request(index="same"), (IVFFLAT,), [("ivfflat", (("lists", "100"),))]),
        (Request(index="same", lists=50), (IVFFLAT,), [("ivfflat", (("lists", "50"),))]),
        (Request(index="ivfflat"), (HNSW,), [("ivfflat", (("lists", "100"),))]),
        (Request(), (HNSW,), [("hnsw", (("m", "24"),))]),
        (Request(m=8), (HNSW,), [("hnsw", (("m", "8"),))]),
        (
            Request(),
            (HNSW, replace(HNSW, oid=92, name="l2", opclass="public.vector_l2_ops")),
            [("hnsw", (("m", "24"),))] * 2,
        ),
        (Request(), (replace(HNSW, valid=False),), [("hnsw", (("m", "16"), ("ef_construction", "64")))]),
    ],
)
def test_target_indexes(request_: Request, live: tuple[Index, ...], expected: list[tuple[str, Any]]) -> None:
    """HNSW is rebuilt as it is; IVFFlat, or none, becomes HNSW unless asked otherwise; the operator class stays."""
    plan = draft(request_, facts(indexes=live)).plan
    assert [(i.method, i.parameters) for i in plan.indexes] == expected
    if live and live[0].valid:
        assert plan.indexes[0].opclass == live[0].opclass
        assert plan.indexes[0].live_name == live[0].name


def test_json_round_trip_and_newer_format() -> None:
    plan = draft(Request(backup=True), facts(indexes=(HNSW,))).plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    with pytest.raises(Refused, match="format 2"):
        Plan.from_json({**plan.to_json(), "format": 2})


def test_fingerprint_covers_what_vectors_depend_on_and_nothing_else() -> None:
    plan = draft(Request(), facts()).plan
    changed = [replace(plan, text_sql="title"), replace(plan, new=replace(plan.new, model=identity("other", 768)))]
    assert len({plan.fingerprint(), *(p.fingerprint() for p in changed)}) == 3
    assert replace(plan, backup="b", consents=Consents(True, True)).fingerprint() == plan.fingerprint()


def test_options_of_an_open_migration() -> None:
    """An omitted option takes the plan's value; one that differs is told."""
    plan = draft(Request(to="new"), facts()).plan
    assert differs(plan, Request()) == []
    assert differs(plan, Request(to="new", text="content", index="hnsw", m=16)) == []
    assert differs(plan, Request(to="else", text="title", m=8)) == ["--to else", "--text title", "--m 8"]


def test_names_fit_into_63_bytes_and_stay_different() -> None:
    long = "ü" * 31
    assert own_name("public", "kb", 2) == "rv_kb_g2"
    assert own_name("app", "kb", 2) == "rv_app__kb_g2"
    names = {
        own_name("public", long, 2),
        own_name("public", long, 3),
        own_name("public", long[:-1] + "o", 2),
        cut_name(long, "_g2"),
    }
    assert len(names) == 4
    assert all(len(name.encode()) <= 63 for name in names)
    plan = draft(Request(), facts()).plan
    assert plan.trigger.encode() > b"zzz"


def test_estimate_and_hot_share() -> None:
    """The share is the one of the formula; measured at 8 rows a page with a toasted candidate: 87.5 %."""
    assert hot_share(1000, 20, 8) == pytest.approx(0.855, abs=0.01)
    told = estimate(draft(Request(), facts()).plan, facts())
    assert told.rows == 1000
    assert told.tokens == 120_000
    assert told.backfill_seconds == pytest.approx(1000 / 30)
    assert told.bytes_added > 1000 * 768 * 4
