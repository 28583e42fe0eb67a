"""Outcomes -> text and JSON. Pure: it prints nothing, asks nobody, and holds no driver's types."""

from __future__ import annotations

import inspect
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from revector.errors import RevectorError
    from revector.knowledge_base import Loaded, Registered
    from revector.ledger import Event, MigrationRow
    from revector.maintenance import Versions
    from revector.migration import Exposed, Known, Missing, Preview, Result, Side, Status
    from revector.plan import Finding, Request, TargetIndex
    from revector.rehearsal import Rehearsed
    from revector.search import SearchResult
    from revector.spending import Spent
    from revector.throttle import Tuning

#: What fits a terminal that nobody has widened.
WIDTH: Final = 80
FORMAT: Final = 1


# -- small words -------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for size, unit, smaller, name in ((60, "min", 1, "s"), (3600, "h", 60, "min"), (86400, "d", 3600, "h")):
        if whole < size * (60 if unit == "min" else 24 if unit == "h" else 10**9):
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {name}" if rest else "")
    raise AssertionError


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `2:05:00`."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, whole = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"


def size(number: float) -> str:
    """`512 B`, `12.3 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    raise AssertionError


def figure(value: object) -> str:
    """One figure of an event or outcome."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {figure(v)}" for name, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(figure, value)) or "none"
    return str(value)


def paragraph(text: str, indent: str = "", width: int = WIDTH, *, hang: str | None = None) -> str:
    """Wrapped at words; what has no blanks (a name, a path) stays whole."""
    return textwrap.fill(
        " ".join(text.split()),
        width,
        initial_indent=indent,
        subsequent_indent=indent if hang is None else hang,
        break_long_words=False,
        break_on_hyphens=False,
    )


def error(told: RevectorError, width: int | None = None) -> str:
    """`refused: what`, why indented, and a `next:` line for each hint; commands are never wrapped."""
    lines = [f"{told.label}: {told}"]
    if told.why:
        why = " ".join(told.why.split())
        lines.append(paragraph(why, "  ", width) if width else f"  {why}")
    return "\n".join([*lines, *_nexts(told.hint, "  ")])


def _nexts(hint: str, indent: str) -> list[str]:
    """A `next:` line for each line of a hint; "or ...", "then: ..." and indented ones go on with the line above."""
    hints = filter(None, hint.splitlines())
    return [f"{indent}{'      ' if hint.startswith(('or ', 'then', ' ')) else 'next: '}{hint}" for hint in hints]


def help_page(usage: str, text: str, panels: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """A command's help: usage, what it does and changes, an example, and its options panel by panel."""
    lines = [f"usage: {usage}", ""]
    for part in inspect.cleandoc(text).split("\n\n"):
        head, colon, example = part.partition("Example: ")
        lines += [f"Example:\n  {example}" if colon and not head else paragraph(part), ""]
    for title, rows in panels.items():
        if not rows:
            continue
        lines.append(title)
        # A flag that is longer than the column stands on a line of its own.
        column = min(max(len(name) for name, _ in rows), 22) + 4
        for name, told in rows:
            hang = " " * column
            if len(name) + 4 <= column:
                lines.append(paragraph(told, f"  {name:<{column - 2}}", hang=hang))
            else:
                lines += [f"  {name}", paragraph(told, hang)]
        lines.append("")
    return "\n".join(lines).rstrip()


# -- plan --------------------------------------------------------------------------------------------------------------


def run_command(table: str, request: Request) -> str:
    """The `run` that does what this `plan` showed."""
    words = ["revector", "run", table]
    for flag, value in (
        ("--from", request.from_),
        ("--to", request.to),
        ("--text", request.text),
        ("--where", request.where),
        ("--vector", request.vector),
        ("--key", request.key),
        ("--batch-size", request.batch_size),
        ("--index", request.index),
        ("--m", request.m),
        ("--ef-construction", request.ef_construction),
        ("--lists", request.lists),
    ):
        if value is not None:
            words += [flag, str(value)]
    words += [flag for flag, given in (
        ("--backup", request.backup),
        ("--accept-triggers", request.consents.accept_triggers),
        ("--include-null", request.consents.include_null),
    ) if given]  # fmt: skip
    return shlex.join(words)


def preview(
    shown: Preview, *, table: str, following: str, per_million: float | None = None, per_hour: float | None = None
) -> str:
    """The whole plan; at most 80 columns but for SQL and commands."""
    parts = [
        f"Plan for {table}: {shown.plan.old.model.model} -> {shown.plan.new.model.model}. Nothing was changed.",
        "Preconditions\n" + "\n".join(_finding(n, f) for n, f in enumerate(shown.draft.findings, 1)),
        _facts(shown, per_million, per_hour),
        _index_words(shown),
        _cutover_words(shown),
        _statements(shown),
    ]
    blockers = len(shown.draft.blockers)
    if blockers:
        parts.append(f"Blocked: {blockers} precondition{'s are' if blockers > 1 else ' is'} not met (✗ above).")
    else:
        parts.append(f"next: {following}")
    return "\n\n".join(parts)


def preview_json(
    shown: Preview, *, table: str, following: str, per_million: float | None = None, per_hour: float | None = None
) -> dict[str, Any]:
    """The plan for programs: format 1; keys are added, never renamed."""
    plan, estimate = shown.plan, shown.estimate

    def model(side: Any) -> dict[str, Any]:
        return {"model": side.model.model, "revision": side.model.revision, "dimension": side.model.dimension}

    return {
        "format": FORMAT,
        "table": table,
        "blocked": bool(shown.draft.blockers),
        "findings": [
            {"number": n, "title": f.title, "finding": f.finding, "ok": f.ok, "why": f.why, "remedy": f.remedy}
            for n, f in enumerate(shown.draft.findings, 1)
        ],
        "from": model(plan.old),
        "to": model(plan.new),
        "download": shown.facts.downloads,
        "batch_size": shown.batch_size,
        "rows": estimate.rows,
        "tokens": estimate.tokens,
        "rows_per_second": estimate.rate,
        "seconds": {
            "backfill": estimate.backfill_seconds,
            "index": estimate.index_seconds,
            "verify": estimate.verify_seconds,
        },
        "bytes": {"before": estimate.bytes_before, "added": estimate.bytes_added},
        "hot_share": estimate.hot_share,
        "indexes": [i.describe() for i in plan.indexes],
        "cost": {
            "tokens": None if per_million is None else estimate.tokens / 1e6 * per_million,
            "hours": None if per_hour is None else _seconds(shown) / 3600 * per_hour,
        },
        "statements": [{"phase": phase, "sql": statement} for phase, statement in shown.statements],
        "next": None if shown.draft.blockers else following,
    }


def _finding(number: int, found: Finding) -> str:
    mark = {True: "✓", None: "!", False: "✗"}[found.ok]
    indent = " " * 21
    lines = [paragraph(found.finding, f"{number:>4} {mark} {found.title:<14}", hang=indent)]
    if found.ok is not True:
        if found.why:
            lines.append(paragraph(found.why, indent))
        if found.remedy:
            lines.append(paragraph(f"remedy: {found.remedy}", indent, hang=indent + "  "))
    return "\n".join(lines)


def _seconds(shown: Preview) -> float:
    estimate = shown.estimate
    return (estimate.backfill_seconds or 0.0) + estimate.index_seconds + estimate.verify_seconds


def _facts(shown: Preview, per_million: float | None, per_hour: float | None) -> str:
    plan, estimate = shown.plan, shown.estimate
    old, new = plan.old.model, plan.new.model
    after = estimate.bytes_before + estimate.bytes_added
    rows: list[tuple[str, str]] = [
        ("models", f"{old.model} ({_dimensions(old.dimension)}) -> {new.model} ({_dimensions(new.dimension)})"),
        ("rows", f"{estimate.rows:,}, about {estimate.tokens:,} tokens; batch size {shown.batch_size}"),
        ("speed", "not measured: there is no text yet" if estimate.rate is None else
         f"{_rate(estimate.rate)} rows/s of {new.model}, measured here on {shown.facts.measured.texts} of your rows"),
    ]  # fmt: skip
    if plan.backup:
        rows.append(("time: backup", f"one copy of key and vectors to {plan.backup}, at disk speed"))
    rows += [
        ("time: expand", "under 1 s; one lock of at most 200 ms an attempt"),
        ("time: backfill", "unknown" if estimate.backfill_seconds is None else duration(estimate.backfill_seconds)),
        ("time: index", duration(estimate.index_seconds)),
        ("time: verify", duration(estimate.verify_seconds)),
        ("time: cutover", "milliseconds; one lock of at most 200 ms an attempt"),
        ("time in all", f"about {duration(_seconds(shown))}"),
        ("storage", f"{size(estimate.bytes_before)} -> about {size(after)} until finalize"),
        ("HOT updates", f"about {estimate.hot_share:.0%} expected; only the others also write to every index"),
    ]
    if per_million is not None:
        rows.append(("money", f"{_money(estimate.tokens / 1e6 * per_million)} for {estimate.tokens:,} tokens"))
    if per_hour is not None:
        rows.append(("money", f"{_money(_seconds(shown) / 3600 * per_hour)} for {duration(_seconds(shown))}"))
    return "What it takes\n" + "\n".join(paragraph(told, f"  {name:<15}", hang=" " * 17) for name, told in rows)


def _dimensions(number: int) -> str:
    return f"{number} dimensions" if number != 1 else "1 dimension"


def _money(amount: float) -> str:
    return f"about {amount:,.2f}" if amount >= 0.01 or not amount else "less than 0.01"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"


def _index_words(shown: Preview) -> str:
    plan, facts = shown.plan, shown.facts
    live = {i.name: i for i in facts.table.indexes if i.covers_only(facts.column)}
    lines = []
    for target in plan.indexes:
        before = live.get(target.live_name)
        now = target.describe() + f", {_metric(target)}"
        if before is None:
            lines.append(f"{plan.column} has no vector index that is valid: {now} is built")
            continue
        given = ", ".join(f"{name}={value}" for name, value in before.parameters) or "default parameters"
        was = f"{before.method} ({given})"
        if before.method == target.method:
            lines.append(f"{before.name} is {was}: built again for the new vectors as {now}")
        elif target.method == "hnsw":
            lines.append(f"{before.name} is {was} and becomes {now}; --index same keeps IVFFlat")
        else:
            lines.append(f"{before.name} is {was} and becomes {now}")
    lines.append("built CONCURRENTLY: reads and writes go on meanwhile")
    return "Indexes\n" + "\n".join(paragraph(line, "  ", hang="    ") for line in lines)


def _metric(target: TargetIndex) -> str:
    name = target.opclass.rsplit(".", 1)[-1].strip('"')
    return next((words for key, words in (
        ("cosine", "cosine distance"), ("_l2", "Euclidean distance"), ("_ip", "inner product"), ("_l1", "L1 distance"),
    ) if key in name), name)  # fmt: skip


def _cutover_words(shown: Preview) -> str:
    plan = shown.plan
    old, new = plan.old.model, plan.new.model
    if old.dimension != new.dimension:
        bare = (
            f"{plan.column} then holds {new.dimension} dimensions. A program that still searches or writes the bare"
            f' table with {old.model} gets an error: 22000, "different vector dimensions {new.dimension} and'
            f' {old.dimension}" or "expected {new.dimension} dimensions, not {old.dimension}". Have the version'
            f" that embeds with {new.model} ready."
        )
    else:
        bare = (
            f"both models have {new.dimension} dimensions, so a program that still searches or writes the bare table"
            f" with {old.model} gets wrong results and no error. Stop or upgrade it first; cutover asks for"
            " --bare-writers-stopped."
        )
    order = (
        f"From expand on the table has one column more, and after finalize {plan.column} is its last one: SELECT *,"
        " INSERT and COPY without a column list see another order, and a prepared SELECT * fails once (0A000)."
    )
    both = (
        "Both versions of a program can work at once, before and after it, each with its own model:"
        f" revector expose {plan.argument}."
    )
    back = "rollback takes milliseconds as well and loses no write, until finalize drops the old vectors."
    return "What cutover will mean\n" + "\n".join(paragraph(p, "  - ", hang="    ") for p in (bare, both, order, back))


def _statements(shown: Preview) -> str:
    lines = ["Statements, in the order of execution"]
    phase = ""
    for name, statement in shown.statements:
        if name != phase:
            lines.append(f"\n  -- {name}")
            phase = name
        lines.append(textwrap.indent(statement.strip().removesuffix(";") + ";", "  "))
    return "\n".join(lines)


# -- outcomes ----------------------------------------------------------------------------------------------------------


def result(done: Result, *, seconds: float, figures: bool = True) -> str:
    """What is true now, the figures, and the next command."""
    table = shlex.quote(done.table)
    head = f"{done.answering} answers"
    lines = [f"{done.table} is {done.stage}; {head}."]
    lines.append(f"  {done.summary.removeprefix(head + '; ')}; {duration(seconds)} in all")
    told = {name: value for name, value in done.figures.items() if not _is_nothing(value)}
    if figures and told:
        width = max(map(len, told))
        lines += [
            paragraph(figure(value), f"  {name:<{width}}  ", hang=" " * (width + 4)) for name, value in told.items()
        ]
    if done.next:
        lines.append(f"next: {done.next}")
    if str(done.stage) == "VERIFIED":
        lines.append(f"      (it wants a follower: revector follow {table} in another terminal, or --follow)")
        lines.append(f"back: revector abort {table}")
    elif str(done.stage) == "SERVED":
        lines.append(f"back: revector abort {table}")
    elif done.command == "finalize" and "backup" in done.figures:
        lines.append(f"back: revector restore {table} (takes the old vectors from {done.figures['backup']})")
    elif str(done.stage) == "CUT_OVER":
        lines.append("      (the only step without a way back; until then:)")
        lines.append(f"back: revector rollback {table}")
    return "\n".join(lines)


def exposed(done: Exposed, limits: Sequence[tuple[str, str]] = ()) -> str:
    """The views that are there, how a session uses each, and what they cannot do."""
    lines = [f"{done.table}: {done.summary}."]
    for model, path, answers in done.sides:
        lines += [
            f"  {model}" + (", with which the bare name answers too" if answers else ", by its view alone"),
            f"    set        search_path={path}",
            f"    or, behind a pooler, for a role of its own: ALTER ROLE ... SET search_path = {path};",
        ]
    if done.sides and limits:
        lines.append("A view is read and written as the table is. What it cannot do, and the way round:")
        lines += [paragraph(f"{cannot}: {instead}", "  - ", hang="    ") for cannot, instead in limits]
    return "\n".join([*lines, f"next: {done.next}"])


def _is_nothing(value: object) -> bool:
    """Not worth a line: nothing, or a count by generation in which every count is 0."""
    return value in (None, []) or (isinstance(value, Mapping) and not any(value.values()))


def status(now: Status) -> str:
    """One table's state."""
    if now.stage is None and now.live is None:
        has = "" if now.rows is None else f"; it has {_counted(now.rows, now.known)} rows"
        return f"{now.table}: revector does not know this table{has}\nnext: {now.next}"
    head = f"{now.table}: {now.stage or 'no migration yet'}" + (f", {now.closing} has begun" if now.closing else "")
    rows: list[tuple[str, str]] = []
    columns = [(side.role, side) for side in (now.live, now.other) if side is not None]
    width = [max(len(getattr(side, name)) for _, side in columns) if columns else 0 for name in ("column", "model")]
    rows += [(role, _side(side, width, now.rows)) for role, side in columns]
    odd = [f"{count:,} {what}" for count, what in (
        (now.blank, "blank or without text"), (now.failed, "refused by the model"),
    ) if count]  # fmt: skip
    if now.rows is not None:
        rows.append(("rows", _counted(now.rows, now.known) + (f" ({', '.join(odd)})" if odd else "")))
    if now.other is not None:
        rows.append(("followers", _followers(now)))
    rows += [("view", f"search_path={side.search_path}  ({role})") for role, side in columns if side.search_path]
    if now.written is not None:
        written, share, expected = now.written
        hoped = "" if expected is None else f", {expected:.0%} expected"
        rows.append(("backfill", f"{written:,} rows written, {share:.0%} of the updates HOT{hoped}"))
    if told := tuning(now.tuning):
        rows.append(("limits", told))
    if now.tuning.paused and str(now.stage) not in ("SERVED", "CUT_OVER"):
        rows.append(("paused", f"nothing is written until: revector resume {shlex.quote(now.table)}"))
    if now.backup is not None:
        name, bytes_, age = now.backup
        rows.append(("backup", f"{name}, {size(bytes_)}, made {duration(age)} ago"))
    if now.closing:
        rows.append(("closing", f"writes are not guarded any more: {now.closing} must be completed"))
    if now.spent is not None:
        rows.append(("spent", _spent(now.spent)))
    rows += [("ALERT", "\n".join([alert.what, *_nexts(alert.next, " " * 13)])) for alert in now.alerts]
    if now.rows is None and not now.alerts:
        rows.append(("alerts", "none"))
    # What an alert asks for comes first.
    following = f"{'then' if now.alerts else 'next'}: {now.next}"
    return "\n".join([head, *(f"  {name:<11}{told}" for name, told in rows), following])


def _spent(spent: Spent) -> str:
    cost = "" if spent.cost is None else f", {spent.cost:,.4g}"
    of = "" if spent.cost is None or spent.max_cost is None else f" of {spent.max_cost:,.4g}"
    return f"{spent.tokens:,} tokens in {spent.requests:,} requests{cost}{of}"


def _followers(now: Status) -> str:
    """How many live, what they have done, and who stands by or is in trouble."""
    active = [f for f in now.vigil if f.active]
    standing = sum(not f.active and not f.trouble for f in now.vigil)
    parts = [f"{now.followers} alive" if now.followers else _no_follower(now)]
    parts += [
        f"{f.filled:,} rows filled" + (f", the oldest waits {f.oldest:.0f} s" if f.oldest >= 1 else "") for f in active
    ]
    parts += [f"{standing} standing by"] * bool(standing)
    return "; ".join(parts)


def tuning(limits: Tuning) -> str:
    """The limits that are set, in one line; empty when there are none."""
    told = (
        ("{:,g} rows/s", limits.max_rows_per_second),
        ("standbys may be {:g} s late", limits.max_lag or None),
        ("standbys are not looked at", 0 if limits.max_lag == 0 else None),
        ("{:,} tokens/min", limits.tokens_per_minute),
        ("{:,} requests/min", limits.requests_per_minute),
        ("{:,g} for a million tokens", limits.price),
        ("{:,.2f} in all", limits.max_cost),
    )
    return ", ".join(words.format(value) for words, value in told if value is not None)


def steered(table: str, row: MigrationRow) -> str:
    """What pause, resume or tune has left in force."""
    name = shlex.quote(table)
    state = "paused" if row.limits.paused else "not paused"
    lines = [f"{table}: {state}; {tuning(row.limits) or 'no limits'}; batch size {row.batch_size}"]
    if row.limits.paused:
        lines += ["  run waits within two seconds, with no transaction open", f"next: revector resume {name}"]
    else:
        lines += ["  a command that is running follows within two seconds; this one starts no work"]
        lines += [f"next: revector status {name}"]
    return "\n".join(lines)


def _counted(number: int, known: Known) -> str:
    return f"{number:,}" if known == "exact" else f"{known} {number:,}"


def _side(side: Side, width: Sequence[int], rows: int | None) -> str:
    of = f" of {rows:,}" if side.known == "about" and rows is not None else ""
    pending = "" if side.pending is None else f"  {_counted(side.pending, side.known)}{of} pending"
    seen = [
        f"{what} {duration(age)} ago"
        for what, age in (("written", side.written), ("read", side.read))
        if age is not None
    ]
    told = f"  {', '.join(seen)}" if seen else ""
    return f"{side.column:<{width[0]}}  {side.model:<{width[1]}}  {side.dimension:>5}-d{pending}{told}"


def _no_follower(now: Status) -> str:
    if str(now.stage) in ("SERVED", "CUT_OVER"):
        return f"none: edited rows stay without vectors; revector follow {shlex.quote(now.table)}"
    return "none"


def rehearsed(done: Rehearsed) -> str:
    """What a rehearsal has shown."""
    head = f"rehearsal: everything went well; the table was held for {done.total_ms:,.0f} ms, and all was rolled back"
    if not done.tried:
        head += "\n  INSERT, UPDATE and SELECT were not tried: no row has a text and a vector"
    for verb, error in done.failing:
        head += f"\n  {verb} was not rehearsed: it fails on this table as it is: {error}"
    width = max(len(part) for part, _ in done.parts)
    return "\n".join([head, *(f"  {part:<{width}}  {ms:>7.1f} ms" for part, ms in done.parts)])


def rehearsed_json(done: Rehearsed) -> dict[str, Any]:
    """The same for programs."""
    parts = [{"part": part, "ms": round(ms, 1)} for part, ms in done.parts]
    failing = [{"verb": verb, "error": error} for verb, error in done.failing]
    return {"held_ms": round(done.total_ms, 1), "tried": done.tried, "failing": failing, "parts": parts}


def missing(found: Missing) -> str:
    """What search would miss after a swap that came now."""
    table = shlex.quote(found.table)
    head = f"{found.table}: after {found.command} {found.model} answers, and search misses"
    if not found.rows:
        return f"{head} no row.\nnext: revector {found.command} {table}"
    rows = [(told, count) for told, count in (
        ("wait for the follower", found.waiting), (f"refused by {found.model}", found.refused),
        ("have no text to embed", found.without_text), ("outside --where", found.outside),
    ) if count]  # fmt: skip
    width = max(len(told) for told, _ in rows)
    lines = [
        f"{head} {found.rows:,} {'row' if found.rows == 1 else 'rows'}.",
        *(f"  {t:<{width}}  {n:,}" for t, n in rows),
    ]
    return "\n".join([*lines, f"  {'followers alive':<{width}}  {found.followers}"])


def statuses(all_of_them: Sequence[Status]) -> str:
    """Every table that the ledger knows."""
    if not all_of_them:
        return "revector knows no table in this database yet.\nnext: revector plan TABLE --from MODEL --to MODEL"
    return "\n\n".join(map(status, all_of_them))


def events(log: Iterable[Event]) -> str:
    """Every step with its figures; a heading whenever day or role change. The statements are in the JSON."""
    lines: list[str] = []
    heading = ""
    for event in log:
        new = f"{event.at:%Y-%m-%d} (UTC{event.at:%z}), {event.who}"
        if new != heading:
            heading = new
            lines.append(heading)
        told = ", ".join(f"{name} {figure(value)}" for name, value in event.figures.items() if name != "statements")
        step = f"  {event.at:%H:%M:%S}  {event.step:<22}"
        lines.append(paragraph(told, step, hang=" " * len(step)) if told else step.rstrip())
    return "\n".join(lines) or "no events"


def events_json(table: str, log: Iterable[Event]) -> dict[str, Any]:
    """The events for programs: format 1."""
    return {
        "format": FORMAT,
        "table": table,
        "events": [
            {"id": e.id, "at": e.at.isoformat(), "who": e.who, "step": e.step, "figures": e.figures, "migration": e.migration}
            for e in log
        ],
    }  # fmt: skip


def hits(found: SearchResult) -> str:
    """The rows found, best first."""
    lines = []
    for number, hit in enumerate(found.hits, 1):
        title = "" if not hit.title or hit.text.startswith(hit.title) else f"  {hit.title}"
        lines.append(f"{number:>3}  {hit.score:.3f}  {hit.id}{title}")
        lines.append(textwrap.shorten(hit.text, WIDTH - 12, placeholder=" ...").join((" " * 12, "")))
    lines.append(
        f"{len(found.hits)} hit{'' if len(found.hits) == 1 else 's'} by {found.model} in {found.milliseconds:.0f} ms"
        + (" (a cutover came between; asked again)" if found.repeated else "")
    )
    return "\n".join(lines)


def hits_json(table: str, found: SearchResult) -> dict[str, Any]:
    """The rows found, for programs: format 1."""
    return {
        "format": FORMAT,
        "table": table,
        "model": found.model,
        "generation": found.generation,
        "milliseconds": round(found.milliseconds, 1),
        "repeated": found.repeated,
        "hits": [
            {"id": h.id, "title": h.title, "text": h.text, "distance": h.distance, "score": h.score} for h in found.hits
        ],
    }


def registered(made: Registered, table: str) -> str:
    """What `init` created."""
    when = "" if made.index_built else ", built at the end of the first load"
    return "\n".join([
        f"{made.schema}.{made.table} is created; {made.model} ({_dimensions(made.dimension)}) is its live model.",
        f"  index {made.index}{when}",
        *(["  extension vector was created in this database"] if made.extension_created else []),
        f"next: revector load {shlex.quote(table)} FILE.jsonl",
    ])  # fmt: skip


def loaded(done: Loaded, table: str) -> str:
    """What `load` wrote."""
    speed = f" ({_rate(done.rows / done.seconds)} rows/s)" if done.seconds > 0 and done.rows else ""
    return "\n".join([
        f"{done.rows:,} rows loaded into {table} with {done.model} in {duration(done.seconds)}{speed}.",
        *([f"  {done.replaced:,} of them replaced a row of the same id"] if done.replaced else []),
        *([f"  index {done.index} is built"] if done.index else []),
        f"next: revector search {shlex.quote(table)} 'what you are looking for'",
    ])  # fmt: skip


def versions(program: str, found: Versions | None) -> str:
    """`--version`, with what the database has when there is one."""
    if found is None:
        return f"revector {program}"
    ledger = "none yet" if found.ledger is None else f"version {found.ledger}"
    if found.ledger is not None and found.ledger > found.known_ledger:
        ledger += f" (this program knows {found.known_ledger}: upgrade it)"
    return "\n".join([
        f"revector {program}",
        f"ledger     {ledger}",
        f"PostgreSQL {found.server}",
        f"pgvector   {found.pgvector or 'not installed in this database'}",
    ])  # fmt: skip
