"""The command line: parse, call, print. `main` is the one place that prints errors and decides the exit code.

Nothing heavy is imported before a command runs: `revector --help` needs neither NumPy nor psycopg.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote, unquote, urlsplit

import typer
import typer.core

from revector import __version__, report
from revector.errors import (
    GateFailed,
    Interrupted,
    NotReady,
    PauseBudgetMissed,
    Refused,
    Resumable,
    RevectorError,
    UsageError,
)

if TYPE_CHECKING:
    from revector.db import PauseLimits
    from revector.embed import Embedder
    from revector.maintenance import Versions
    from revector.migration import Migration, Preview, Result
    from revector.moment import Moment
    from revector.plan import Request
    from revector.settings import Settings
    from revector.terminal import Terminal
    from revector.work import Observation

#: What the program's own help ends with: a table of settings, and of exit codes.
_SETTINGS = (
    ("DATABASE_URL", "the database; absent: libpq's PGHOST, PGSERVICE ..."),
    ("EMBEDDING_MODEL", "what --to means by default; absent: all-mpnet-base-v2"),
    ("EMBEDDING_DIMENSION", "the dimension expected of it; absent: the model's own"),
    ("OPENAI_BASE_URL", "where openai:NAME models answer; any compatible server"),
    ("OPENAI_API_KEY", "the key for it"),
)
_EXIT_CODES = (
    ("0", "done"),
    ("1", "a check failed, or an allowance was exceeded"),
    ("2", "wrong usage or configuration, a rejected key or password"),
    ("3", "refused by the state or by the database; nothing was changed"),
    ("4", "stopped half-way; the same command goes on where it stopped"),
    ("70", "a defect of revector"),
)


class _Command(typer.core.TyperCommand):
    """A command whose help is ours: plain text of 80 columns, the same on every terminal."""

    def get_help(self, ctx: Any) -> str:
        """The help as text."""
        options = [p for p in self.get_params(ctx) if p.param_type_name == "option"]
        panels = dict.fromkeys(getattr(p, "rich_help_panel", None) or "Options" for p in options)
        rows = {panel: [_option(p) for p in options if (getattr(p, "rich_help_panel", None) or "Options") == panel]
                for panel in panels}  # fmt: skip
        rows["Options"] = rows.pop("Options")
        arguments = [
            (str(p.metavar), str(getattr(p, "help", ""))) for p in self.params if p.param_type_name == "argument"
        ]
        usage = " ".join([ctx.command_path, "[OPTIONS]", *(name for name, _ in arguments)])
        return report.help_page(usage, self.help or "", {"Arguments": arguments, **rows})


class _Program(typer.core.TyperGroup):
    """The program's own help: the commands in the order of the work."""

    def get_help(self, ctx: Any) -> str:
        """The help as text."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            panel = str(getattr(command, "rich_help_panel", None))
            panels.setdefault(panel, []).append((name, (command.help or "").partition("\n")[0]))
        panels["Options"] = [_option(p) for p in self.get_params(ctx) if p.param_type_name == "option"]
        panels["Settings, from the environment or .env"] = list(_SETTINGS)
        panels["Exit codes"] = list(_EXIT_CODES)
        return report.help_page("revector [OPTIONS] COMMAND ...", self.help or "", panels)


def _option(parameter: Any) -> tuple[str, str]:
    """`-v, --verbose` or `--from MODEL`, and its meaning."""
    flags = sorted(parameter.opts, key=len)
    value = "" if parameter.is_flag else f" {parameter.metavar}"
    return ", ".join(flags) + value, str(parameter.help or "")


app = typer.Typer(
    cls=_Program,
    help="Change the embedding model behind a live PostgreSQL + pgvector table.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

START, FORWARD, STEER, BACK, LOOK, REMOVE = "Start", "Forward", "Steer what is running", "Back", "Look", "Remove"
PAUSE = "The short locks"
MODELS, INDEX, CONSENTS, CUTOVER, MONEY = (
    "Models and columns",
    "New index",
    "Consents, recorded with the plan",
    "Cutover",
    "Money",
)


class Index(StrEnum):
    """What the candidate's vector index is to be."""

    same = "same"
    hnsw = "hnsw"
    ivfflat = "ivfflat"


class NewIndex(StrEnum):
    """What a new table's vector index is to be."""

    hnsw = "hnsw"
    ivfflat = "ivfflat"


# -- arguments and options that several commands take ------------------------------------------------------------------

Table = Annotated[
    str, typer.Argument(metavar="TABLE", help="The table: its exact name, or schema.name.", show_default=False)
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show every recorded step and every changing statement.")
]
Json = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="The model. Default: EMBEDDING_MODEL.", show_default=False),
]
NewLists = Annotated[
    int, typer.Option("--lists", min=1, max=32768, metavar="N", help="Lists of an IVFFlat index. Default: 100.")
]
From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="MODEL",
        show_default=False,
        help="The model of the present vectors. Default: the one on record.",
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="MODEL",
        show_default=False,
        rich_help_panel=MODELS,
        help="The model to upgrade to. Default: EMBEDDING_MODEL.",
    ),
]
TextOption = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="EXPR",
        show_default=False,
        rich_help_panel=MODELS,
        help="What is embedded: SQL over one row. Default: content.",
    ),
]
Where = Annotated[
    str | None,
    typer.Option(
        "--where",
        metavar="EXPR",
        show_default=False,
        rich_help_panel=MODELS,
        help="Only these rows: an SQL condition over one row. Default: all.",
    ),
]
Vector = Annotated[
    str | None,
    typer.Option(
        "--vector",
        metavar="COLUMN",
        show_default=False,
        rich_help_panel=MODELS,
        help="The vector column. Default: embedding.",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="COLUMN",
        show_default=False,
        rich_help_panel=MODELS,
        help="A unique key. Default: the primary key, if any.",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size", min=1, metavar="N", show_default=False, help="Most texts in one encoder call. Default: 50."
    ),
]
IndexOption = Annotated[
    Index | None,
    typer.Option(
        "--index",
        metavar="KIND",
        show_default=False,
        rich_help_panel=INDEX,
        help="same, hnsw or ivfflat. Default: HNSW as it is; IVFFlat, or no index, becomes HNSW; same keeps IVFFlat.",
    ),
]
M = Annotated[
    int | None,
    typer.Option(
        "--m",
        min=2,
        max=100,
        metavar="N",
        show_default=False,
        rich_help_panel=INDEX,
        help="HNSW: links a node, 2 to 100. Default: 16, or that of the present index.",
    ),
]
EfConstruction = Annotated[
    int | None,
    typer.Option(
        "--ef-construction",
        min=4,
        max=1000,
        metavar="N",
        show_default=False,
        rich_help_panel=INDEX,
        help="HNSW: 4 to 1000, at least twice m. Default: 64, or that of the present index.",
    ),
]
Lists = Annotated[
    int | None,
    typer.Option(
        "--lists",
        min=1,
        max=32768,
        metavar="N",
        show_default=False,
        rich_help_panel=INDEX,
        help="IVFFlat: 1 to 32768. Default: 100, or that of the present index.",
    ),
]
Backup = Annotated[bool, typer.Option("--backup", help="First copy key and old vectors to TABLE_backup_DIM.")]
AcceptTriggers = Annotated[
    bool,
    typer.Option(
        "--accept-triggers", rich_help_panel=CONSENTS, help="Writing vectors may fire the table's own triggers."
    ),
]
IncludeNull = Annotated[
    bool, typer.Option("--include-null", rich_help_panel=CONSENTS, help="Rows that have no vector today get one too.")
]
PerMillion = Annotated[
    float | None,
    typer.Option(
        "--price-per-million-tokens",
        min=0,
        metavar="X",
        show_default=False,
        rich_help_panel=MONEY,
        help="Say what the tokens cost.",
    ),
]
PerHour = Annotated[
    float | None,
    typer.Option(
        "--price-per-hour",
        min=0,
        metavar="X",
        show_default=False,
        rich_help_panel=MONEY,
        help="Say what the machine's time costs.",
    ),
]
MaxRequests = Annotated[
    int | None,
    typer.Option(
        "--max-requests-per-minute",
        min=1,
        metavar="N",
        show_default=False,
        rich_help_panel=MONEY,
        help="Of each openai: model, all workers together. Default: no limit.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens-per-minute",
        min=1,
        metavar="N",
        show_default=False,
        rich_help_panel=MONEY,
        help="Of each openai: model, all workers together. Default: no limit.",
    ),
]
MaxCost = Annotated[
    float | None,
    typer.Option(
        "--max-cost",
        min=0,
        metavar="AMOUNT",
        show_default=False,
        rich_help_panel=MONEY,
        help="What the whole migration may spend on openai: models; wants a price.",
    ),
]
AllowFailed = Annotated[
    int, typer.Option("--allow-failed", min=0, metavar="N", help="Texts that the model may refuse. Default: 0.")
]
AllowPending = Annotated[
    int,
    typer.Option(
        "--allow-pending",
        min=0,
        metavar="N",
        rich_help_panel=CUTOVER,
        help="Rows that may be written between catch-up and swap. Default: 1000.",
    ),
]
MaxRows = Annotated[
    float | None,
    typer.Option(
        "--max-rows-per-second",
        min=0.01,
        metavar="N",
        show_default=False,
        help="Write no faster; tune changes it while this works. Default: no limit.",
    ),
]
Follow = Annotated[
    bool,
    typer.Option(
        "--follow",
        rich_help_panel=CUTOVER,
        help="Start a follower before the swap, and stay in the foreground with it.",
    ),
]
WithoutFollower = Annotated[
    bool,
    typer.Option(
        "--without-follower",
        rich_help_panel=CUTOVER,
        help="Consent: no follower; rows edited after the swap lose their vectors.",
    ),
]
WritersStopped = Annotated[
    bool,
    typer.Option(
        "--bare-writers-stopped",
        rich_help_panel=CUTOVER,
        help="Consent, asked when both dimensions are equal: nobody uses the other model.",
    ),
]


MaxPause = Annotated[
    int,
    typer.Option(
        "--max-pause-ms",
        min=10,
        max=10_000,
        metavar="N",
        rich_help_panel=PAUSE,
        help="Longest wait + hold of one attempt at a lock, 10 to 10000. Default: 200.",
    ),
]
Attempts = Annotated[
    int,
    typer.Option(
        "--attempts",
        min=1,
        max=100,
        metavar="N",
        rich_help_panel=PAUSE,
        help="Attempts at a lock, less than 400 ms apart, 1 to 100. Default: 5.",
    ),
]
At = Annotated[
    str | None,
    typer.Option(
        "--at",
        metavar="TIME",
        show_default=False,
        rich_help_panel=PAUSE,
        help="Swap not before HH:MM today, or an ISO time; all else is done before.",
    ),
]
WhenFile = Annotated[
    Path | None,
    typer.Option(
        "--when-file",
        metavar="PATH",
        show_default=False,
        rich_help_panel=PAUSE,
        help="Swap when this file exists; all else is done before.",
    ),
]


Check = Annotated[
    bool,
    typer.Option(
        "--check",
        rich_help_panel=CUTOVER,
        help="Change nothing; count the rows that search would miss. Exit 1 if any.",
    ),
]


@app.callback(invoke_without_command=True)
def _program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Versions of program, ledger, server and pgvector.")
    ] = False,
) -> None:
    if version:
        _say(report.versions(__version__, _versions()))
    elif context.invoked_subcommand is None:
        _say(context.get_help())


# -- start -------------------------------------------------------------------------------------------------------------


@app.command(cls=_Command, rich_help_panel=START)
def demo(
    from_: Annotated[
        str, typer.Option("--from", metavar="MODEL", help="The model to start with. Default: bundled:static.")
    ] = "bundled:static",
    to: Annotated[
        str, typer.Option("--to", metavar="MODEL", help="The model to upgrade to. Default: bundled:minilm-768.")
    ] = "bundled:minilm-768",
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, metavar="N", show_default=False, help="Load only so many documents.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server up, and say how to connect.")] = False,
    verbose: Verbose = False,
) -> None:
    """See it work: a real upgrade under load, on a server of its own.

    Changes nothing of yours: the server and its table go when the demo ends.

    Example: revector demo --rows 500
    """
    from revector.demo import run_demo

    settings = _settings()
    with _terminal(verbose) as terminal:
        _stop.gentle = True
        run_demo(settings, from_=from_, to=to, rows=rows, keep=keep, print_=terminal.say, observe=terminal, stop=_stop)


@app.command(cls=_Command, rich_help_panel=START)
def schema(
    model: Model = None,
    index: Annotated[
        NewIndex, typer.Option("--index", metavar="KIND", help="hnsw or ivfflat. Default: hnsw.")
    ] = NewIndex.hnsw,
    lists: NewLists = 100,
    verbose: Verbose = False,
) -> None:
    """Print the DDL of a knowledge base for a model.

    Changes nothing, and needs no database.

    Example: revector schema --model bundled:minilm | psql
    """
    from revector.knowledge_base import ddl

    with _terminal(verbose) as terminal:
        embedder = _wanted(model)
        dimension = embedder.get_embedding_dimension()
        if verbose:
            terminal.note(f"{embedder.spec} gives {dimension} dimensions")
        terminal.say(ddl(dimension, index.value, lists).rstrip())


@app.command(cls=_Command, rich_help_panel=START)
def init(
    table: Table,
    model: Model = None,
    index: Annotated[
        NewIndex, typer.Option("--index", metavar="KIND", help="hnsw or ivfflat. Default: hnsw.")
    ] = NewIndex.hnsw,
    lists: NewLists = 100,
    verbose: Verbose = False,
) -> None:
    """Create a knowledge base and register its live model.

    Changes: creates the table, its index and the ledger (schema revector), in one transaction.

    Example: revector init knowledge_base --model bundled:minilm
    """
    from revector.db import Database
    from revector.knowledge_base import init

    with _terminal(verbose) as terminal:
        made = init(Database(_settings()), _wanted(model), table, index=index.value, lists=lists)
        terminal.say(report.registered(made, table))


@app.command(cls=_Command, rich_help_panel=START)
def load(
    table: Table,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON lines (.jsonl, .jsonl.gz): _id, title, text, metadata.")
    ],
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, metavar="N", help="Most texts in one encoder call. Default: 50.")
    ] = 50,
    verbose: Verbose = False,
) -> None:
    """Load documents with the live model's vectors.

    Changes: inserts rows; a row of the same id is replaced. What is loaded before an error stays.

    Example: revector load knowledge_base documents.jsonl.gz
    """
    from revector.db import Database
    from revector.knowledge_base import load
    from revector.work import embedder_for

    settings = _settings()
    with _terminal(verbose) as terminal:
        _stop.gentle = True
        done = load(
            Database(settings),
            lambda identity: embedder_for(identity, settings),
            table,
            file,
            batch_size=batch_size,
            observe=terminal,
            stop=_stop,
        )
        done.require_all()
        terminal.say(report.loaded(done, table))


# -- forward -----------------------------------------------------------------------------------------------------------


@app.command(cls=_Command, rich_help_panel=FORWARD)
def plan(
    table: Table,
    from_: From = None,
    to: To = None,
    text: TextOption = None,
    where: Where = None,
    vector: Vector = None,
    key: Key = None,
    batch_size: BatchSize = None,
    index: IndexOption = None,
    m: M = None,
    ef_construction: EfConstruction = None,
    lists: Lists = None,
    backup: Backup = False,
    accept_triggers: AcceptTriggers = False,
    include_null: IncludeNull = False,
    per_million: PerMillion = None,
    per_hour: PerHour = None,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Try the short DDL and one INSERT, UPDATE, SELECT; all is rolled back."),
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a run would do: findings, time, storage, every statement.

    Changes nothing. Exit code 3 when a precondition is not met. A rehearsal holds the table for some milliseconds, at
    most for a second.

    Example: revector plan knowledge_base --from all-MiniLM-L6-v2 --to all-mpnet-base-v2
    """
    request = _request(
        from_,
        to,
        text,
        where,
        vector,
        key,
        batch_size,
        index,
        m,
        ef_construction,
        lists,
        backup,
        accept_triggers,
        include_null,
    )
    _plan(table, request, verbose, as_json=as_json, per_million=per_million, per_hour=per_hour, rehearsed=rehearse)


@app.command(cls=_Command, rich_help_panel=FORWARD)
def run(
    context: typer.Context,
    table: Table,
    from_: From = None,
    to: To = None,
    text: TextOption = None,
    where: Where = None,
    vector: Vector = None,
    key: Key = None,
    batch_size: BatchSize = None,
    index: IndexOption = None,
    m: M = None,
    ef_construction: EfConstruction = None,
    lists: Lists = None,
    backup: Backup = False,
    accept_triggers: AcceptTriggers = False,
    include_null: IncludeNull = False,
    allow_failed: AllowFailed = 0,
    max_rows_per_second: MaxRows = None,
    per_million: PerMillion = None,
    max_cost: MaxCost = None,
    max_requests_per_minute: MaxRequests = None,
    max_tokens_per_minute: MaxTokens = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan, as the command plan does.")] = False,
    cutover: Annotated[
        bool,
        typer.Option("--cutover", rich_help_panel=CUTOVER, help="Go on to the cutover once everything is verified."),
    ] = False,
    follow: Follow = False,
    without_follower: WithoutFollower = False,
    bare_writers_stopped: WritersStopped = False,
    allow_pending: AllowPending = 1000,
    max_pause_ms: MaxPause = 200,
    attempts: Attempts = 5,
    at: At = None,
    when_file: WhenFile = None,
    verbose: Verbose = False,
) -> None:
    """Fill, index and verify the new vectors; stop before the cutover.

    Changes: adds a column, a trigger and indexes to the table, and the ledger (schema revector). Readers see no
    difference. Safe to repeat: it goes on where it stopped, and omitted options are those of the open migration.

    Example: revector run knowledge_base --to all-mpnet-base-v2
    """
    request = _request(
        from_,
        to,
        text,
        where,
        vector,
        key,
        batch_size,
        index,
        m,
        ef_construction,
        lists,
        backup,
        accept_triggers,
        include_null,
    )
    if not cutover:
        _only_with_cutover(context)
    _not_both(follow, without_follower)
    limits, when = _limits(max_pause_ms, attempts), _moment(at, when_file)
    if dry_run:
        _plan(table, request, verbose, per_million=per_million, idle=_said(context, but=_PLANNED))
        return
    with _steering(table, verbose) as (migration, terminal):
        began = time.monotonic()
        done = migration.run(
            request,
            allow_failed=allow_failed,
            cutover=cutover,
            follow=follow,
            without_follower=without_follower,
            bare_writers_stopped=bare_writers_stopped,
            allow_pending=allow_pending,
            limits=limits,
            when=when,
            tuning=_tuning(max_rows_per_second, per_million, max_cost, max_requests_per_minute, max_tokens_per_minute),
        )
        _done(migration, terminal, done, began, follow=follow)


@app.command(cls=_Command, rich_help_panel=FORWARD)
def follow(
    context: typer.Context,
    table: Table,
    once: Annotated[bool, typer.Option("--once", help="Fill what is pending now, and end.")] = False,
    health_every: Annotated[
        int,
        typer.Option("--health-every", min=1, metavar="SECONDS", help="Between two health lines. Default: 60."),
    ] = 60,
    max_rows_per_second: MaxRows = None,
    verbose: Verbose = False,
) -> None:
    """Keep both models' vectors fresh while rows are written.

    Changes: fills missing vectors of the open migration. One follower is active, others stand by and take over. It
    waits for a server or a model that is away, and writes a health line to its log. Ctrl-C and SIGTERM end it with
    exit code 0; it ends by itself when the migration is finalized or aborted.

    Example: revector follow knowledge_base
    """
    from revector.follow import Follower
    from revector.migration import Migration

    if once and _said(context, of=("health_every",)):
        raise UsageError(
            "--once writes no health lines, so --health-every would do nothing",
            hint=f"leave it out: revector follow {shlex.quote(table)} --once",
        )
    settings = _settings()
    with _terminal(verbose) as terminal:
        with Migration.open(settings, table=table, observe=terminal, stop=_stop, steer=False) as migration:
            _check_followable(migration)
            if given := _given(max_rows_per_second=max_rows_per_second):
                migration.tune(given)
            oid = migration.oid
        _stop.gentle = True
        follower = Follower(settings, oid, observe=terminal, stop=_stop, health_every=health_every)
        if once:
            terminal.say(f"{follower.once():,} rows filled")
            return
        terminal.note(f"following {table}; Ctrl-C ends it")
        filled = follower.run()
        terminal.say(f"following ended; {filled:,} rows filled")


@app.command(cls=_Command, rich_help_panel=FORWARD)
def expose(
    table: Table,
    from_: From = None,
    text: TextOption = None,
    vector: Vector = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Make the views anew, after the table or its grants have changed.")
    ] = False,
    drop: Annotated[bool, typer.Option("--drop", help="Drop the views; their users then have the bare table.")] = False,
    follow: Follow = False,
    without_follower: WithoutFollower = False,
    max_pause_ms: MaxPause = 200,
    attempts: Attempts = 5,
    verbose: Verbose = False,
) -> None:
    """Give each model a view schema, so that both versions work at once.

    Changes: creates schema rv_TABLE_gN with a view of the table for each generation, and copies the table's grants.
    Before VERIFIED the live generation alone gets one; from VERIFIED on both, and both are kept fresh from then on.

    Example: revector expose knowledge_base
    """
    from revector.phases.expose import LIMITS

    _not_both(follow, without_follower)
    if drop and (refresh or follow or without_follower or from_ or text or vector):
        raise UsageError("--drop stands alone", hint=f"revector expose {shlex.quote(table)} --drop")
    limits = _limits(max_pause_ms, attempts)
    with _steering(table, verbose) as (migration, terminal):
        if drop:
            terminal.say(report.exposed(migration.unexpose(limits=limits)))
            return
        done = migration.expose(
            from_=from_,
            text=text,
            vector=vector,
            refresh=refresh,
            follow=follow,
            without_follower=without_follower,
            limits=limits,
        )
        terminal.say(report.exposed(done, LIMITS if done.figures["made"] and not refresh else ()))
        if follow and str(done.stage) in ("SERVED", "CUT_OVER"):
            _stay(migration, terminal, done.table)


@app.command(cls=_Command, rich_help_panel=FORWARD)
def cutover(
    context: typer.Context,
    table: Table,
    follow: Follow = False,
    without_follower: WithoutFollower = False,
    bare_writers_stopped: WritersStopped = False,
    refresh_old: Annotated[
        bool,
        typer.Option(
            "--refresh-old",
            rich_help_panel=CUTOVER,
            help="Consent: renew old vectors that are stale, so that rollback is right.",
        ),
    ] = False,
    allow_failed: AllowFailed = 0,
    allow_pending: AllowPending = 1000,
    max_pause_ms: MaxPause = 200,
    attempts: Attempts = 5,
    at: At = None,
    when_file: WhenFile = None,
    check: Check = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Let the new model answer; the pause is milliseconds.

    Changes: the two vector columns swap names; NOT NULL is relaxed until finalize. Wants a live follower, and prints
    the measured pause.

    Example: revector cutover knowledge_base
    """
    _not_both(follow, without_follower)
    if check or as_json:
        _check_missing(context, table, "cutover", verbose, as_json=as_json, check=check)
        return
    limits, when = _limits(max_pause_ms, attempts), _moment(at, when_file)
    with _steering(table, verbose) as (migration, terminal):
        began = time.monotonic()
        done = migration.cutover(
            follow=follow,
            without_follower=without_follower,
            bare_writers_stopped=bare_writers_stopped,
            refresh_old=refresh_old,
            allow_failed=allow_failed,
            allow_pending=allow_pending,
            limits=limits,
            when=when,
        )
        _done(migration, terminal, done, began, follow=follow)


@app.command(cls=_Command, rich_help_panel=FORWARD)
def finalize(
    table: Table,
    drop_backup: Annotated[bool, typer.Option("--drop-backup", help="Drop the backup table too.")] = False,
    allow_failed: AllowFailed = 0,
    max_pause_ms: MaxPause = 200,
    attempts: Attempts = 5,
    quiet_for: Annotated[
        str,
        typer.Option(
            "--quiet-for",
            metavar="SPAN",
            help="Refuse while the old side wrote within 0, 30s, 10m, 1h, 2d. Default: 1h.",
        ),
    ] = "1h",
    verbose: Verbose = False,
) -> None:
    """Drop the old vectors: the only step without a way back.

    Changes: drops the old column, its indexes and the trigger; gives NOT NULL back; the migration is closed.

    Example: revector finalize knowledge_base
    """
    from revector.moment import parse_span

    quiet = parse_span(quiet_for, "--quiet-for")
    with _steering(table, verbose) as (migration, terminal):
        began = time.monotonic()
        done = migration.finalize(
            allow_failed=allow_failed,
            drop_backup=drop_backup,
            quiet_for=quiet,
            limits=_limits(max_pause_ms, attempts),
        )
        _done(migration, terminal, done, began)


# -- back --------------------------------------------------------------------------------------------------------------


@app.command(cls=_Command, rich_help_panel=BACK)
def abort(table: Table, max_pause_ms: MaxPause = 200, attempts: Attempts = 5, verbose: Verbose = False) -> None:
    """Give the migration up; the table is as it was.

    Changes: drops the new column, its indexes and the trigger. The vectors computed so far are lost.

    Example: revector abort knowledge_base
    """
    with _steering(table, verbose) as (migration, terminal):
        began = time.monotonic()
        _done(migration, terminal, migration.abort(limits=_limits(max_pause_ms, attempts)), began)


@app.command(cls=_Command, rich_help_panel=BACK)
def rollback(
    context: typer.Context,
    table: Table,
    follow: Follow = False,
    without_follower: WithoutFollower = False,
    bare_writers_stopped: WritersStopped = False,
    allow_pending: AllowPending = 1000,
    max_pause_ms: MaxPause = 200,
    attempts: Attempts = 5,
    at: At = None,
    when_file: WhenFile = None,
    check: Check = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Let the old model answer again; no write since is lost.

    Changes: the two vector columns swap names again. Wants a live follower, as cutover does.

    Example: revector rollback knowledge_base
    """
    _not_both(follow, without_follower)
    if check or as_json:
        _check_missing(context, table, "rollback", verbose, as_json=as_json, check=check)
        return
    limits, when = _limits(max_pause_ms, attempts), _moment(at, when_file)
    with _steering(table, verbose) as (migration, terminal):
        began = time.monotonic()
        done = migration.rollback(
            follow=follow,
            without_follower=without_follower,
            bare_writers_stopped=bare_writers_stopped,
            allow_pending=allow_pending,
            limits=limits,
            when=when,
        )
        _done(migration, terminal, done, began, follow=follow)


@app.command(cls=_Command, rich_help_panel=BACK)
def restore(
    table: Table,
    vector: Vector = None,
    batch_size: BatchSize = None,
    backup: Backup = False,
    refresh: Annotated[
        bool,
        typer.Option("--refresh", help="Embed all rows; renew what is not its text's vector. For a stale backup."),
    ] = False,
    accept_triggers: AcceptTriggers = False,
    include_null: IncludeNull = False,
    allow_failed: AllowFailed = 0,
    max_rows_per_second: MaxRows = None,
    per_million: PerMillion = None,
    max_cost: MaxCost = None,
    max_requests_per_minute: MaxRequests = None,
    max_tokens_per_minute: MaxTokens = None,
    max_pause_ms: MaxPause = 200,
    attempts: Attempts = 5,
    verbose: Verbose = False,
) -> None:
    """Go back after finalize, with the vectors of a backup table.

    Changes: as run does, with the old model as the new one: unchanged rows take their vectors from the backup that
    `run --backup` made, the others are embedded. It stops before the cutover. Safe to repeat.

    Example: revector restore knowledge_base
    """
    from revector.plan import Consents

    with _steering(table, verbose) as (migration, terminal):
        began = time.monotonic()
        done = migration.restore(
            vector=vector,
            batch_size=batch_size,
            backup=backup,
            refresh=refresh,
            consents=Consents(accept_triggers=accept_triggers, include_null=include_null),
            allow_failed=allow_failed,
            limits=_limits(max_pause_ms, attempts),
            tuning=_tuning(max_rows_per_second, per_million, max_cost, max_requests_per_minute, max_tokens_per_minute),
        )
        _done(migration, terminal, done, began)


# -- look --------------------------------------------------------------------------------------------------------------


# -- steer what is running -----------------------------------------------------------------------------------------------


@app.command(cls=_Command, rich_help_panel=STEER)
def pause(table: Table, verbose: Verbose = False) -> None:
    """Let the backfill wait, from another terminal.

    Changes: run stops writing and embedding within two seconds, holds no transaction, and waits for resume; so does a
    follower before SERVED. From SERVED on there is nothing to pause: without the follower, rows that are written would
    vanish from search.

    Example: revector pause knowledge_base
    """
    with _looking(table, verbose) as (migration, terminal):
        terminal.say(report.steered(table, migration.pause()))


@app.command(cls=_Command, rich_help_panel=STEER)
def resume(table: Table, verbose: Verbose = False) -> None:
    """Lift the pause.

    Changes: a run that waits goes on within two seconds. It starts no work of its own.

    Example: revector resume knowledge_base
    """
    with _looking(table, verbose) as (migration, terminal):
        terminal.say(report.steered(table, migration.resume()))


@app.command(cls=_Command, rich_help_panel=STEER)
def tune(
    table: Table,
    max_rows_per_second: Annotated[
        str | None,
        typer.Option(
            "--max-rows-per-second",
            metavar="N",
            show_default=False,
            help="Rows that run, and the follower, each write; none: no limit.",
        ),
    ] = None,
    batch_size: BatchSize = None,
    max_lag: Annotated[
        str | None,
        typer.Option(
            "--max-lag",
            metavar="SECONDS",
            show_default=False,
            help="How late a standby may be before run waits; none: do not look. Default: 10.",
        ),
    ] = None,
    max_requests_per_minute: Annotated[
        str | None,
        typer.Option(
            "--max-requests-per-minute",
            metavar="N",
            show_default=False,
            rich_help_panel=MONEY,
            help="Of each openai: model, all workers together; none: no limit.",
        ),
    ] = None,
    max_tokens_per_minute: Annotated[
        str | None,
        typer.Option(
            "--max-tokens-per-minute",
            metavar="N",
            show_default=False,
            rich_help_panel=MONEY,
            help="The same in tokens; none: no limit.",
        ),
    ] = None,
    max_cost: Annotated[
        str | None,
        typer.Option(
            "--max-cost",
            metavar="AMOUNT",
            show_default=False,
            rich_help_panel=MONEY,
            help="What the whole migration may spend; none: no limit.",
        ),
    ] = None,
    per_million: PerMillion = None,
    verbose: Verbose = False,
) -> None:
    """Change the limits of a migration, also while it works.

    Changes: what is remembered of the migration; a run or follower acts on it within two seconds.

    Example: revector tune knowledge_base --max-rows-per-second 200
    """
    changes: dict[str, float | None] = {}
    for name, field, given in (
        ("max_rows_per_second", "max_rows_per_second", max_rows_per_second),
        ("max_lag", "max_lag", max_lag),
        ("max_requests_per_minute", "requests_per_minute", max_requests_per_minute),
        ("max_tokens_per_minute", "tokens_per_minute", max_tokens_per_minute),
        ("max_cost", "max_cost", max_cost),
    ):
        if given is not None:
            value = _limit(name, given)
            changes[field] = int(max(value, 1)) if value is not None and field.endswith("_minute") else value
    changes |= _given(price=per_million)
    if max_lag is not None and changes["max_lag"] is None:
        changes["max_lag"] = 0.0
    if not changes and batch_size is None:
        raise UsageError("tune: nothing to change was given", hint="revector tune --help")
    with _looking(table, verbose) as (migration, terminal):
        terminal.say(report.steered(table, migration.tune(changes, batch_size=batch_size)))


@app.command(cls=_Command, rich_help_panel=LOOK)
def status(
    table: Annotated[
        str | None,
        typer.Argument(
            metavar="[TABLE]", help="The table. Default: every table that revector knows.", show_default=False
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="For a monitor: exit with 1 when there is an alert; scan no table.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what is true now: which model answers, what is pending.

    Changes nothing. The last line is the exact next command. An ALERT, red on a terminal, comes first: nobody fills rows
    that search misses, a follower is in trouble, the trigger is silenced, or somebody writes with the wrong model. What a
    large table would have to be read for is estimated, and marked with "about".

    Example: revector status knowledge_base --json
    """
    from revector.db import Database
    from revector.maintenance import known_tables
    from revector.migration import Migration

    settings = _settings()
    with _terminal(verbose) as terminal:
        found = []
        for name in [table] if table is not None else known_tables(Database(settings)):
            with Migration.open(settings, table=name, observe=terminal, steer=False) as migration:
                found.append(migration.status(check=check))
        if as_json and table is not None:
            terminal.say(json.dumps(found[0].to_json(), ensure_ascii=False))
        elif as_json:
            terminal.say(json.dumps({"format": 1, "tables": [s.to_json() for s in found]}, ensure_ascii=False))
        else:
            terminal.say(report.statuses(found), alarming="  ALERT ")
        alerts = [(s.table, alert) for s in found for alert in s.alerts]
        if check and alerts:
            raise GateFailed(
                "; ".join(f"{name}: {alert.what}" for name, alert in alerts),
                hint="\n".join(dict.fromkeys(alert.next for _, alert in alerts)),
            )


@app.command(cls=_Command, rich_help_panel=LOOK)
def events(table: Table, as_json: Json = False, verbose: Verbose = False) -> None:
    """List every step taken: who, when, and its figures.

    Changes nothing.

    Example: revector events knowledge_base
    """
    from revector.migration import Migration

    with (
        _terminal(verbose) as terminal,
        Migration.open(_settings(), table=table, observe=terminal, steer=False) as migration,
    ):
        log = migration.events()
        terminal.say(_json(report.events_json(table, log)) if as_json else report.events(log))


@app.command(cls=_Command, rich_help_panel=LOOK)
def search(
    table: Table,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for.")],
    k: Annotated[int, typer.Option("-k", min=1, metavar="N", help="How many rows. Default: 10.")] = 10,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", show_default=False, help="The model, on a table that revector does not know."
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            "--where", metavar="EXPR", show_default=False, help="Only these rows, where each filter has its own model."
        ),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Search with the live model, whichever that is at the moment.

    Changes nothing. A cutover during the search is not seen.

    Example: revector search knowledge_base "how do I reset my password" -k 5
    """
    from revector.db import Database
    from revector.search import Searcher

    settings = _settings()
    with (
        _terminal(verbose) as terminal,
        Searcher(Database(settings), settings, table, model=model, where=where) as searcher,
    ):
        found = searcher.search(text, k)
        terminal.say(_json(report.hits_json(table, found)) if as_json else report.hits(found))


# -- remove ------------------------------------------------------------------------------------------------------------


@app.command(cls=_Command, rich_help_panel=REMOVE)
def uninstall(verbose: Verbose = False) -> None:
    """Remove the ledger; refused while a migration is open.

    Changes: drops schema revector, and with it what is known about live models. Your tables are not touched.

    Example: revector uninstall
    """
    from revector.db import Database
    from revector.maintenance import uninstall

    with _terminal(verbose) as terminal:
        gone = uninstall(Database(_settings()))
        terminal.say("schema revector is gone" if gone else "this database has no ledger: nothing to remove")


# -- what commands share -----------------------------------------------------------------------------------------------


class _Stop:
    """What Ctrl-C and SIGTERM do: the first asks to stop at the next safe point, the second ends at once."""

    def __init__(self) -> None:
        self.asked = False
        #: Whether the running command looks at `asked`; until it does, the first signal interrupts what is being done.
        self.gentle = False
        #: Whether a signal has interrupted what was being done.
        self.interrupted = False

    def __call__(self) -> bool:
        return self.asked

    def check(self) -> None:
        """Raise `KeyboardInterrupt` again, if somebody has swallowed it."""
        if self.interrupted:
            raise KeyboardInterrupt

    def listen(self) -> None:
        """Hear both signals from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        # os.write: a signal may come in the middle of a write to the same stream.
        if self.asked:
            show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
            _tell(show_cursor + b"\nstopped at once; the same command goes on where it stopped\n")
            os._exit(Interrupted.exit_code)
        self.asked = True
        if not self.gentle:
            self.interrupted = True
            raise KeyboardInterrupt
        _tell(b"\nstopping at the next safe point (again: at once)\n")


def _tell(message: bytes) -> None:
    with suppress(OSError):
        os.write(2, message)


_stop = _Stop()
#: What ended a thread of ours; the command's exit code is then its own.
_died: list[BaseException] = []


def _settings() -> Settings:
    from revector.settings import Settings

    return Settings.load()


def _wanted(model: str | None) -> Embedder:
    """The model named, else the one of the settings."""
    from revector.embed import Embedder

    settings = _settings()
    own = model in (None, settings.embedding_model)
    return Embedder(
        model or settings.embedding_model, dimension=settings.embedding_dimension if own else None, settings=settings
    )


@contextmanager
def _terminal(verbose: bool) -> Iterator[Terminal]:
    from revector.terminal import Terminal

    with Terminal(verbose=verbose) as terminal:
        yield terminal


@contextmanager
def _steering(table: str, verbose: bool) -> Iterator[tuple[Migration, Terminal]]:
    """The table's migration with its lock; an interruption says how far it is."""
    from revector.db import Database
    from revector.maintenance import standing
    from revector.migration import Migration
    from revector.work import Effect, Phase

    settings = _settings()
    with _terminal(verbose) as terminal:

        def observe(seen: Observation) -> None:
            if isinstance(seen, Effect) or (isinstance(seen, Phase) and seen.number > 1):
                _stop.gentle = True
            terminal(seen)

        with Migration.open(settings, table=table, observe=observe, stop=_stop) as migration:
            try:
                row = migration.latest()
                # The preconditions of a new migration only read: there, Ctrl-C need not wait for a safe point.
                _stop.gentle = row is not None and not row.stage.closed
                yield migration, terminal
            except Interrupted as error:
                with suppress(Exception):  # the server may be away, and the first error is the one that counts
                    error.why = f"{error.why} {standing(Database(settings), migration.oid)}".strip()
                raise


@contextmanager
def _looking(table: str, verbose: bool) -> Iterator[tuple[Migration, Terminal]]:
    """The table's migration without its lock, which a running command holds."""
    from revector.migration import Migration

    with (
        _terminal(verbose) as terminal,
        Migration.open(_settings(), table=table, observe=terminal, steer=False) as migration,
    ):
        yield migration, terminal


def _given(**options: float | None) -> dict[str, float | None]:
    """Limits that the command line names."""
    return {name: value for name, value in options.items() if value is not None}


def _tuning(
    max_rows_per_second: float | None,
    per_million: float | None,
    max_cost: float | None,
    max_requests_per_minute: int | None,
    max_tokens_per_minute: int | None,
) -> dict[str, float | None]:
    """What a command that opens a migration sets at once of what `tune` can change."""
    return _given(
        max_rows_per_second=max_rows_per_second,
        price=per_million,
        max_cost=max_cost,
        requests_per_minute=max_requests_per_minute,
        tokens_per_minute=max_tokens_per_minute,
    )


def _limit(name: str, given: str) -> float | None:
    """A positive number, or None for the word none."""
    if given.strip().lower() == "none":
        return None
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        flag = "--" + name.replace("_", "-")
        raise UsageError(f"{flag} {given}: a number above 0, or none", hint=f"{flag} 200, or {flag} none")
    return value


def _done(migration: Migration, terminal: Terminal, done: Result, began: float, *, follow: bool = False) -> None:
    """Print a command's outcome; with `--follow`, stay."""
    # On a terminal the figures have just gone by as notes.
    shown = sys.stdout.isatty() and sys.stderr.isatty() and done.command == "run" and str(done.stage) == "VERIFIED"
    terminal.say(report.result(done, seconds=time.monotonic() - began, figures=not shown))
    if follow:
        _stay(migration, terminal, done.table)


def _stay(migration: Migration, terminal: Terminal, table: str) -> None:
    """Follow until told to stop."""
    terminal.note(f"following {table}; Ctrl-C ends it")
    filled = migration.follow_on()
    if _died:
        raise _died[0]
    terminal.say(f"following ended; {filled:,} rows filled")


def _check_followable(migration: Migration) -> None:
    """Refuse to follow what has nothing to follow, naming the command that comes first."""
    from revector.follow import managed

    row, table = migration.latest(), shlex.quote(migration.name)
    if row is None or not managed(row):
        state = (
            "no migration is open"
            if row is None or row.stage.closed
            else f"the migration is at {row.closing or row.stage}"
        )
        verb = "plan" if row is None else row.next
        raise Refused(
            f"{migration.name}: {state}, so there is nothing to follow",
            why="A follower fills the vectors of an open migration, from EXPANDED on. Nothing was changed.",
            hint=f"revector {verb} {table}" + (" --to MODEL" if verb == "plan" else ""),
        )


def _plan(
    table: str,
    request: Request,
    verbose: bool,
    *,
    as_json: bool = False,
    per_million: float | None = None,
    per_hour: float | None = None,
    rehearsed: bool = False,
    idle: Sequence[str] = (),
) -> None:
    from revector.migration import Migration

    with (
        _terminal(verbose) as terminal,
        Migration.open(_settings(), table=table, observe=terminal, steer=False) as migration,
    ):
        if idle:
            terminal.note(f"a dry run makes nothing of {', '.join(idle)}: the run does")
        shown: Preview = migration.preview(request)
        row = migration.latest()
        following = report.run_command(table, request)
        if row is not None and not row.stage.closed:
            following = f"revector {row.next} {shlex.quote(table)}"
        given: dict[str, Any] = {
            "table": table,
            "following": following,
            "per_million": per_million,
            "per_hour": per_hour,
        }
        done = migration.rehearse(shown.draft) if rehearsed and not shown.draft.blockers else None
        if rehearsed and done is None:
            terminal.note("--rehearse: nothing was tried, for preconditions are not met")
        if as_json:
            told = report.preview_json(shown, **given)
            terminal.say(_json(told | ({"rehearsal": report.rehearsed_json(done)} if done else {})))
        else:
            terminal.say(report.preview(shown, **given) + (f"\n{report.rehearsed(done)}" if done else ""))
    if count := len(shown.draft.blockers):
        raise Refused(
            f"{table}: {count} precondition{'s are' if count > 1 else ' is'} not met",
            why="Each is listed in the plan with its remedy. Nothing was changed.",
            hint=f"when they are met: {report.run_command(table, request)}",
        )


def _request(
    from_: str | None,
    to: str | None,
    text: str | None,
    where: str | None,
    vector: str | None,
    key: str | None,
    batch_size: int | None,
    index: Index | None,
    m: int | None,
    ef_construction: int | None,
    lists: int | None,
    backup: bool,
    accept_triggers: bool,
    include_null: bool,
) -> Request:
    """What was asked for; options that contradict each other are refused."""
    if lists is not None and index not in (Index.ivfflat, Index.same):
        raise UsageError(
            "--lists is for IVFFlat, and the new index would be HNSW", hint="add --index ivfflat, or --index same"
        )
    if index is Index.ivfflat and (m is not None or ef_construction is not None):
        raise UsageError("--m and --ef-construction are for HNSW, not for --index ivfflat", hint="leave them out")
    if m is not None and ef_construction is not None and ef_construction < 2 * m:
        raise UsageError(
            f"--ef-construction {ef_construction} is less than twice --m {m}",
            why="pgvector refuses such an HNSW index.",
            hint=f"--ef-construction {2 * m}, or a smaller --m",
        )
    from revector.plan import Consents, Request

    return Request(
        to=to,
        from_=from_,
        text=text,
        where=where,
        vector=vector,
        key=key,
        batch_size=batch_size,
        index=index.value if index else None,
        m=m,
        ef_construction=ef_construction,
        lists=lists,
        backup=backup or None,
        consents=Consents(accept_triggers=accept_triggers, include_null=include_null),
    )


def _check_missing(
    context: typer.Context,
    table: str,
    command: Literal["cutover", "rollback"],
    verbose: bool,
    *,
    as_json: bool,
    check: bool,
) -> None:
    """What search would miss after a swap now; an error when it is anything."""
    from revector.migration import Migration

    if not check:
        raise UsageError("--json: only with --check", hint="add --check, or look at status --json")
    if idle := _said(context, but=("check", "as_json", "verbose")):
        raise UsageError(
            f"--check swaps nothing, so {', '.join(idle)} would do nothing",
            hint=f"leave it out: revector {command} {shlex.quote(table)} --check",
        )
    with (
        _terminal(verbose) as terminal,
        Migration.open(_settings(), table=table, observe=terminal, steer=False) as migration,
    ):
        found = migration.missing(command)
        terminal.say(_json(found.to_json()) if as_json else report.missing(found))
    if found.rows:
        name = shlex.quote(table)
        raise GateFailed(
            f"{table}: search would miss {found.rows:,} {'row' if found.rows == 1 else 'rows'} after {command}",
            why="Nothing was changed.",
            hint=f"fill what can be filled: revector follow {name} --once\nthen: revector {command} {name} --check",
        )


def _limits(max_pause_ms: int, attempts: int) -> PauseLimits:
    from revector.db import PauseLimits

    return PauseLimits(max_pause_ms, attempts)


def _moment(at: str | None, when_file: Path | None) -> Moment:
    """When the swap may happen; a time that is past is refused before anything is done."""
    from datetime import datetime

    from revector.moment import Moment, parse_time

    return Moment(None if at is None else parse_time(at, datetime.now().astimezone()), when_file)


#: What a dry run of `run` shows, or does itself.
_PLANNED = (
    "from_", "to", "text", "where", "vector", "key", "batch_size", "index", "m", "ef_construction", "lists", "backup",
    "accept_triggers", "include_null", "per_million", "dry_run", "verbose",
)  # fmt: skip
#: What is of the swap alone.
_OF_CUTOVER = ("follow", "without_follower", "bare_writers_stopped", "allow_pending", "at", "when_file")


def _said(context: typer.Context, *, but: Sequence[str] = (), of: Sequence[str] | None = None) -> list[str]:
    """The options that the command line names, those that are a default's words as well; `but` and `of` choose."""
    return [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.param_type_name == "option"
        and parameter.name not in but
        and (of is None or parameter.name in of)
        and (source := context.get_parameter_source(str(parameter.name))) is not None
        and source.name == "COMMANDLINE"
    ]


def _only_with_cutover(context: typer.Context) -> None:
    given = _said(context, of=_OF_CUTOVER)
    if given:
        raise UsageError(
            f"{', '.join(given)}: only with --cutover", hint="add --cutover, or leave it to the command cutover"
        )


def _not_both(follow: bool, without_follower: bool) -> None:
    if follow and without_follower:
        raise UsageError("--follow and --without-follower contradict each other", hint="give one of them")


def _versions() -> Versions | None:
    """The database's versions; None when there is no database to ask."""
    try:
        from revector.db import Database
        from revector.maintenance import versions

        return versions(Database(_settings()))
    except RevectorError:
        return None


def _json(told: dict[str, Any]) -> str:
    return json.dumps(told, ensure_ascii=False)


def _say(text: str) -> None:
    from revector.terminal import write

    write(sys.stdout, text + "\n")


# -- errors and exit codes ---------------------------------------------------------------------------------------------


def main() -> None:
    """The entry point: run one command, print its error if it has one, and exit with its code."""
    code = _main(sys.argv[1:])
    # It is over: a Ctrl-C that comes while the interpreter shuts down must not change the exit code.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _main(arguments: Sequence[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    threading.excepthook = lambda args: _died.append(args.exc_value or RuntimeError(str(args.exc_type)))
    _stop.listen()
    again = f"the same command again: {shlex.join(['revector', *arguments])}"
    try:
        code = typer.main.get_command(app).main(list(arguments), prog_name="revector", standalone_mode=False)
        if _died:
            raise _died[0]
        _stop.check()
        return code if isinstance(code, int) else 0
    except (Resumable, NotReady) as error:
        if not error.hint or error.hint.startswith("the same command again"):
            error.hint = again
            if isinstance(error, PauseBudgetMissed) and error.fits_ms:
                error.hint = f"the same command with a budget that fits: {_with_budget(arguments, error.fits_ms)}"
        return _fail(error)
    except RevectorError as error:
        return _fail(error)
    except BaseException as error:
        if _stop.interrupted:  # Typer has its own idea of what Ctrl-C becomes
            return _fail(Interrupted(why="Nothing is lost.", hint=again))
        if not isinstance(error, Exception):
            raise
        if hasattr(error, "format_message"):  # Click's own errors, wherever this version of Typer keeps them
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "revector"
            return _fail(UsageError(error.format_message(), hint=f"{command} --help"))
        return _defect(error, arguments)


def _with_budget(arguments: Sequence[str], budget_ms: int) -> str:
    """The same command with this `--max-pause-ms` in the place of one that it may have had."""
    kept = [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if "--max-pause-ms" not in (before, word) and not word.startswith("--max-pause-ms=")
    ]
    # Behind the command's name: what follows a `--` is no option.
    place = next(number for number, word in enumerate(kept, 1) if not word.startswith("-"))
    return shlex.join(["revector", *kept[:place], "--max-pause-ms", str(budget_ms), *kept[place:]])


def _fail(error: RevectorError) -> int:
    width = min(shutil.get_terminal_size().columns, 100) if sys.stderr.isatty() else None
    _complain(_scrubbed(report.error(error, width)))
    return error.exit_code


def _defect(error: BaseException, arguments: Sequence[str]) -> int:
    """One line on the screen, the rest in a file of which only this user can read."""
    told = "".join(traceback.format_exception(error))
    head = f"revector {__version__}, Python {sys.version.split()[0]}, {sys.platform}\n{shlex.join(['revector', *arguments])}\n\n"
    try:
        handle, path = tempfile.mkstemp(prefix="revector-defect-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(_scrubbed(head + told))
        where = f"the details are in {path}"
    except OSError as lost:
        where = f"the details could not be written: {lost}"
    _complain(f"defect: this is an error of revector itself ({type(error).__name__}); {where}")
    return RevectorError.exit_code


def _complain(text: str) -> None:
    try:
        from revector.terminal import write

        write(sys.stderr, text + "\n")
    except ImportError:  # half an installation
        print(text, file=sys.stderr)


def _scrubbed(text: str) -> str:
    """Without the secrets that the environment holds, and without the password of any address."""
    secrets = {os.environ.get("PGPASSWORD", ""), os.environ.get("OPENAI_API_KEY", "")}
    addresses = [os.environ.get("DATABASE_URL", "")]
    with suppress(Exception):  # unusable settings hold no secret that a session could have used
        settings = _settings()
        secrets.add(settings.openai_api_key.get_secret_value())
        addresses.append(settings.database_url.get_secret_value())
    for address in addresses:
        secrets |= _passwords(address)
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return re.sub(r"(\w+://[^\s:/@]*:)[^\s@]+@", r"\1***@", text)


def _passwords(address: str) -> set[str]:
    found = {
        match[1] or match[2] for match in re.finditer(r"password\s*=\s*(?:'((?:[^'\\]|\\.)*)'|([^\s&]+))", address)
    }
    with suppress(ValueError):
        found.add(urlsplit(address).password or "")
    return found | {unquote(f) for f in found} | {quote(f, safe="") for f in found}


if __name__ == "__main__":
    main()
