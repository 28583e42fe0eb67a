"""Everything that revector refuses or fails with.

    RevectorError                 70  a defect of ours, if it reaches the user unnamed
    ├── GateFailed                 1  a gate or verify failed, or an allowance was exceeded
    │   └── InputRefused           1  the model refuses one text (isolated and ledgered by the backfill)
    ├── UsageError                 2  wrong usage or configuration
    │   ├── ModelUnavailable       2  no such model, or what it needs is not installed
    │   ├── KeyRejected            2  the provider or the database rejected the credentials
    │   ├── DimensionMismatch      2  a dimension is not the one that was asked for
    │   └── ExpressionRefused      2  a --text expression that revector cannot use
    ├── Refused                    3  refused by state or database; nothing was changed
    │   ├── Closing                3  the migration is being closed; workers and followers end
    │   ├── NotReady               3  rows are pending, or somebody changed something, at the moment of a short lock
    │   ├── LedgerUnreadable       3  the ledger belongs to a role that this one is no member of
    │   ├── ModelChanged           3  a different model answers behind the same name
    │   └── Busy                   3  another command steers this table
    └── Resumable                  4  stopped half-way; the same command goes on where it stopped
        ├── Interrupted            4  Ctrl-C or SIGTERM
        ├── Outage                 4  the model's provider does not answer
        ├── ServerLost             4  the database cannot be reached, or was lost
        ├── BudgetSpent            4  the next request would cost more than was allowed
        └── PauseBudgetMissed      4  no lock, or not all work under it, within the pause budget

The docstring of a class is its default message. Each error says what (`str(error)`), why (`error.why`)
and the exact next command (`error.hint`); `cli.py` is the one place that prints them.
"""

from __future__ import annotations

from typing import ClassVar


class RevectorError(Exception):
    """revector failed in a way it has no name for."""

    exit_code: ClassVar[int] = 70
    #: The word that stands before the message on a terminal.
    label: ClassVar[str] = "defect"

    def __init__(self, what: str | None = None, *, why: str = "", hint: str = "") -> None:
        super().__init__(what or (type(self).__doc__ or "").strip())
        #: Why it is so, and what is true now: whole sentences.
        self.why = why
        #: The exact next command (or commands, one a line).
        self.hint = hint


class GateFailed(RevectorError):
    """A check did not pass."""

    exit_code = 1
    label = "failed"


class InputRefused(GateFailed):
    """The model refuses this text."""

    def __init__(self, what: str | None = None, *, kind: str, why: str = "", hint: str = "") -> None:
        super().__init__(what, why=why, hint=hint)
        #: `blank`, `too_long`, `refused`, `not_finite` or `zero`.
        self.kind = kind


class UsageError(RevectorError):
    """The command or the configuration is wrong."""

    exit_code = 2
    label = "error"


class ModelUnavailable(UsageError):
    """The model cannot be loaded."""


class KeyRejected(UsageError):
    """The credentials were rejected."""


class DimensionMismatch(UsageError):
    """The model's dimension is not the one asked for."""

    def __init__(self, model: str, actual: int, expected: int, *, why: str = "", hint: str = "") -> None:
        super().__init__(f"{model} gives {actual} dimensions, not the {expected} asked for", why=why, hint=hint)
        self.model = model
        self.actual = actual
        self.expected = expected


class ExpressionRefused(UsageError):
    """The expression cannot be used."""


class Refused(RevectorError):
    """Refused; nothing was changed."""

    exit_code = 3
    label = "refused"


class NotReady(Refused):
    """What a short lock's own checks look at is not ready for it; nothing was changed."""


class LedgerUnreadable(Refused):
    """This role may not read revector's ledger."""


class Closing(Refused):
    """The migration is being closed; nothing more is written."""


class ModelChanged(Refused):
    """A different model answers behind the same name."""


class Busy(Refused):
    """Another revector command is at work on this table."""


class Resumable(RevectorError):
    """Stopped half-way; the same command goes on where it stopped."""

    exit_code = 4
    label = "stopped"


class Interrupted(Resumable):
    """Interrupted; the same command goes on where it stopped."""


class Outage(Resumable):
    """The model's provider does not answer."""


class ServerLost(Resumable):
    """The database cannot be reached."""


class BudgetSpent(Resumable):
    """The money that was allowed is spent."""


class PauseBudgetMissed(Resumable):
    """The lock was not to be had within the pause budget."""

    def __init__(self, what: str | None = None, *, why: str = "", hint: str = "", fits_ms: int | None = None) -> None:
        super().__init__(what, why=why, hint=hint)
        #: The lock was had, and the work under it needs a budget like this; None: the lock was not had.
        self.fits_ms = fits_ms
