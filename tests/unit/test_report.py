"""Outcomes as text: small words, errors, and the words of a plan that a reader decides by."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from revector import report
from revector.errors import Refused
from revector.ledger import Event, Stage
from revector.migration import Alert, Result, Side, Status
from revector.plan import Consents, Finding, Request
from revector.search import Hit, SearchResult


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0.0 s"), (9.94, "9.9 s"), (12.4, "12 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"),
        (7500, "2 h 5 min"), (86399, "23 h 59 min"), (273600, "3 d 4 h"), (9e6, "104 d 4 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, told: str) -> None:
    assert report.duration(seconds) == told


@pytest.mark.parametrize(("seconds", "told"), [(0, "0:00"), (7.4, "0:07"), (750, "12:30"), (7500, "2:05:00")])
def test_clocks(seconds: float, told: str) -> None:
    assert report.clock(seconds) == told


@pytest.mark.parametrize(
    ("number", "told"), [(0, "0 B"), (1023, "1,023 B"), (2048, "2.0 KiB"), (5 * 2**40, "5,120.0 GiB")]
)
def test_sizes(number: float, told: str) -> None:
    assert report.size(number) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (True, "yes"), (None, "none"), (12345, "12,345"), (0.5, "0.5"), (3.0, "3"), (1234.5678, "1,234.568"),
        ("x", "x"), ([], "none"), (["a", 1], "a, 1"), ({"1": 0, "2": 7}, "1: 0, 2: 7"),
    ],
)  # fmt: skip
def test_figures(value: object, told: str) -> None:
    assert report.figure(value) == told


def test_an_error_says_what_why_and_what_next() -> None:
    refused = Refused(
        "kb: no", why="Because of this. Nothing was changed.", hint="revector a kb\nor that\nrevector b kb"
    )
    assert report.error(refused) == (
        "refused: kb: no\n  Because of this. Nothing was changed.\n  next: revector a kb\n        or that\n  next: revector b kb"
    )
    assert report.error(Refused("kb: no")) == "refused: kb: no"
    long = Refused("x", why="word " * 30, hint="revector " + "y" * 90)
    lines = report.error(long, 60).splitlines()
    assert all(len(line) <= 60 for line in lines[:-1]) and lines[-1] == "  next: revector " + "y" * 90


def test_the_run_command_repeats_what_the_plan_was_asked() -> None:
    assert report.run_command("kb", Request()) == "revector run kb"
    asked = Request(
        to="b", from_="a", text="title || ' ' || content", batch_size=7, index="hnsw", m=8, backup=True,
        consents=Consents(include_null=True),
    )  # fmt: skip
    assert report.run_command("Weird Table", asked) == (
        "revector run 'Weird Table' --from a --to b --text 'title || '\"'\"' '\"'\"' || content' --batch-size 7"
        " --index hnsw --m 8 --backup --include-null"
    )


def preview(*, old: int = 384, new: int = 768, method: str = "ivfflat", findings: tuple[Finding, ...] = ()) -> Any:
    """Only what the words are made of."""
    column = SimpleNamespace(name="embedding")
    index = SimpleNamespace(
        name="kb_idx", method=method, parameters=(("lists", "9"),), covers_only=lambda c: c is column
    )

    def side(name: str, dimension: int) -> Any:
        return SimpleNamespace(model=SimpleNamespace(model=name, dimension=dimension, revision=""))

    target = SimpleNamespace(
        method="hnsw", opclass='"public"."vector_cosine_ops"', live_name="kb_idx", describe=lambda: "hnsw (m=16)"
    )
    plan = SimpleNamespace(
        old=side("old-model", old),
        new=side("new-model", new),
        column="embedding",
        backup=None,
        indexes=(target,),
        argument="kb",
    )
    estimate = SimpleNamespace(
        rows=1000, tokens=200_000, rate=5.0, backfill_seconds=200.0, index_seconds=3.0, verify_seconds=40.0,
        bytes_before=2**20, bytes_added=2**20, hot_share=0.875,
    )  # fmt: skip
    draft = SimpleNamespace(findings=findings, blockers=[f for f in findings if f.ok is False])
    facts = SimpleNamespace(
        table=SimpleNamespace(indexes=(index,)), column=column, downloads=None, measured=SimpleNamespace(texts=64)
    )
    statements = (("expand", "ALTER TABLE kb\n  ADD COLUMN x"), ("expand", "B"), ("index", "C;"))
    return SimpleNamespace(plan=plan, estimate=estimate, draft=draft, facts=facts, statements=statements, batch_size=50)


def test_a_plan_tells_what_a_reader_decides_by() -> None:
    text = report.preview(preview(), table="kb", following="revector run kb", per_million=0.02, per_hour=36)
    assert text.startswith("Plan for kb: old-model -> new-model. Nothing was changed.\n")
    assert text.endswith("\n\nnext: revector run kb")
    for told in (
        "  models         old-model (384 dimensions) -> new-model (768 dimensions)",
        "  rows           1,000, about 200,000 tokens; batch size 50",
        "  speed          5.0 rows/s of new-model, measured here on 64 of your rows",
        "  time: backfill 3 min 20 s",
        "  time in all    about 4 min 3 s",
        "  storage        1.0 MiB -> about 2.0 MiB until finalize",
        "  money          less than 0.01 for 200,000 tokens",
        "  money          about 2.43 for 4 min 3 s",
        "  kb_idx is ivfflat (lists=9) and becomes hnsw (m=16), cosine distance; --index",
        "  -- expand\n  ALTER TABLE kb\n    ADD COLUMN x;\n  B;\n\n  -- index\n  C;",
    ):
        assert told in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "22000" in text and "--bare-writers-stopped" not in text


def test_equal_dimensions_are_told_to_be_the_more_dangerous() -> None:
    text = report.preview(preview(new=384), table="kb", following="revector run kb")
    assert "wrong results and no error" in text and "--bare-writers-stopped" in text and "22000" not in text
    assert "money" not in text


def test_findings_are_numbered_and_marked() -> None:
    findings = (
        Finding("server", "PostgreSQL 18"),
        Finding("length", "a long text " * 10, None, "It is cut.", "cut it yourself"),
        Finding("rights", "none", False, "They are needed.", "GRANT them"),
    )
    text = report.preview(preview(findings=findings), table="kb", following="revector run kb")
    assert "   1 ✓ server        PostgreSQL 18\n" in text
    assert "   2 ! length        a long text a long text" in text
    assert "                     remedy: cut it yourself\n" in text
    assert "   3 ✗ rights        none\n                     They are needed.\n" in text
    assert text.endswith("Blocked: 1 precondition is not met (✗ above).")
    told = report.preview_json(preview(findings=findings), table="kb", following="revector run kb")
    assert told["blocked"] and told["next"] is None and told["format"] == 1
    assert [f["ok"] for f in told["findings"]] == [True, None, False]


def test_an_index_that_stays_hnsw_is_built_again() -> None:
    text = report.preview(preview(method="hnsw"), table="kb", following="revector run kb")
    assert "built again for the new vectors as" in text and "--index same" not in text


def result(stage: Stage, **figures: object) -> Result:
    return Result(
        "kb", "cutover", stage, "new", "new answers; the pause was 3 ms", f"revector next-of-{stage} kb", figures
    )


def test_outcomes_name_the_next_command_and_the_way_back() -> None:
    told = report.result(result(Stage.CUT_OVER, pause_ms=3.1, pending={"1": 0}), seconds=2)
    assert told == (
        "kb is CUT_OVER; new answers.\n  the pause was 3 ms; 2.0 s in all\n  pause_ms  3.1\nnext: revector next-of-CUT_OVER kb\n"
        "      (the only step without a way back; until then:)\nback: revector rollback kb"
    )
    assert report.result(result(Stage.SERVED), seconds=2).endswith("\nback: revector abort kb")
    assert "pause_ms" not in report.result(result(Stage.CUT_OVER, pause_ms=3.1), seconds=2, figures=False)


def status(**more: Any) -> Status:
    given: dict[str, Any] = {
        "table": "kb", "stage": Stage.SERVED, "closing": None, "live": Side("embedding", "old-model", 384, 0),
        "other": Side("embedding_g2", "new", 768, 1234, "candidate"), "rows": 5000, "blank": 0, "failed": 0, "followers": 1,
        "next": "revector cutover kb",
    }  # fmt: skip
    return Status(**{**given, **more})


def test_status_in_words() -> None:
    assert report.status(status(blank=3, backup=("kb_backup_384", 2**20, 7500.0))) == (
        "kb: SERVED\n"
        "  live       embedding     old-model    384-d  0 pending\n"
        "  candidate  embedding_g2  new          768-d  1,234 pending\n"
        "  rows       5,000 (3 blank or without text)\n"
        "  followers  1 alive\n"
        "  backup     kb_backup_384, 1.0 MiB, made 2 h 5 min ago\n"
        "next: revector cutover kb"
    )
    assert "  followers  none: edited rows stay without vectors; revector follow kb\n" in report.status(
        status(followers=0)
    )
    closing = report.status(status(closing="finalize", next="revector finalize kb"))
    assert closing.startswith("kb: SERVED, finalize has begun\n") and "must be completed" in closing
    unknown = status(stage=None, live=None, other=None, next="revector plan kb --from MODEL --to MODEL")
    assert report.status(unknown).startswith("kb: revector does not know this table; it has 5,000 rows\n")
    registered = status(stage=None, other=None)
    assert report.status(registered).startswith("kb: no migration yet\n  live ") and "followers" not in report.status(
        registered
    )
    assert report.statuses([]).startswith("revector knows no table in this database yet.\n")


def test_an_alert_has_its_remedy_below_it_and_before_the_next_command() -> None:
    """A remedy may be several statements; no command of the migration comes before it."""
    alert = Alert(
        "trigger",
        "the trigger is missing: edits may be missed.",
        "CREATE ...;\nmake them pending:\n  UPDATE ...;\nthen again",
    )
    told = report.status(status(alerts=(alert,)))
    assert told.endswith(
        "  ALERT      the trigger is missing: edits may be missed.\n"
        "             next: CREATE ...;\n"
        "             next: make them pending:\n"
        "                     UPDATE ...;\n"
        "                   then again\n"
        "then: revector cutover kb"
    )


def test_events_in_words() -> None:
    when = datetime(2026, 5, 4, 10, 11, 12, tzinfo=UTC)
    log = [
        Event(1, when, "ann", "expand", {}, 1),
        Event(2, when, "ann", "backfill", {"rows": 20000, "hot": 1}, 1),
        Event(3, when, "bob", "verify", {"failed": []}, 1),
    ]
    assert report.events(log).splitlines() == [
        "2026-05-04 (UTC+0000), ann",
        "  10:11:12  expand",
        "  10:11:12  backfill              rows 20,000, hot 1",
        "2026-05-04 (UTC+0000), bob",
        "  10:11:12  verify                failed none",
    ]
    assert report.events([]) == "no events"
    assert report.events_json("kb", log)["events"][0] == {
        "id": 1, "at": "2026-05-04T10:11:12+00:00", "who": "ann", "step": "expand", "figures": {}, "migration": 1
    }  # fmt: skip


def test_hits_in_words() -> None:
    first = Hit(id="a", title="T", text="T\nwords", distance=0.1, score=0.9)
    second = Hit(id="b", title="U", text="x " * 90, distance=0.2, score=0.8)
    found = SearchResult(generation=2, model="new", hits=(first, second), milliseconds=12.3, repeated=True)
    lines = report.hits(found).splitlines()
    assert lines[0] == "  1  0.900  a" and lines[2] == "  2  0.800  b  U"
    assert lines[1] == "            T words" and len(lines[3]) <= 80
    assert lines[4] == "2 hits by new in 12 ms (a cutover came between; asked again)"
    assert (
        report.hits(SearchResult(generation=None, model="m", hits=(), milliseconds=1.0, repeated=False))
        == "0 hits by m in 1 ms"
    )
