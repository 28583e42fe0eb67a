"""What the models behind an address may be asked and may cost: counted in the ledger, shared by every worker.

Each request is counted and committed *before* it is sent, so what is paid for is on record whatever happens to its
answer, and two workers cannot pass a limit together. Requests are spread evenly: after one of n tokens the next waits
60 n / (limit - n) seconds, so that no minute holds more than the limit. Tokens are estimated before a request (four
bytes of UTF-8 each, times the most that one of these has cost so far), and corrected to what the server says afterwards.
A budget is therefore passed at most by the requests under way at that moment, one a worker, and only as far as they take
more than estimated: whatever they cost is counted before the next one.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from revector.db import Database, Session, block
from revector.errors import BudgetSpent, Interrupted, UsageError
from revector.throttle import Tuning

#: Seconds between two looks while a limit holds a request back: it may be changed meanwhile.
_LOOK: Final = 0.5
#: One request takes at most this part of the tokens of a minute, where it has several texts.
_SHARE: Final = 10
#: Requests estimated at fewer tokens tell nothing of a text's density: what a server adds to each text outweighs it.
_TELLING: Final = 20


#: Field of `Tuning` -> the option that sets it.
MONEY: Final = {
    "requests_per_minute": "--max-requests-per-minute",
    "tokens_per_minute": "--max-tokens-per-minute",
    "price": "--price-per-million-tokens",
    "max_cost": "--max-cost",
}


@dataclass(frozen=True, slots=True)
class Spent:
    """What a migration has asked of models behind an address so far."""

    tokens: int
    requests: int
    #: In the currency of the price; None: no price was given.
    cost: float | None
    max_cost: float | None


def pause(amount: float, limit: float | None) -> float:
    """Seconds from one request to the next, so that no minute holds more than the limit of such requests."""
    if limit is None:
        return 0.0
    return 60 * amount / (limit - amount) if 2 * amount <= limit else 60.0 * max(1.0, amount / limit)


class Purse:
    """The accounts of one migration, as one process uses them. Close it: it holds a session from its first use on."""

    def __init__(
        self,
        database: Database,
        migration: int,
        argument: str,
        *,
        stop: Callable[[], bool] = lambda: False,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.database, self.migration, self.argument = database, migration, argument
        self.stop, self.note = stop, note
        self._session: Session | None = None
        self._lock = threading.Lock()
        self._told = ""

    def close(self) -> None:
        """Close the session."""
        with self._lock:
            if self._session is not None:
                self._session.close()
                self._session = None

    def account(self, generation: int, model: str) -> Account:
        """The account of one generation's model."""
        return Account(self, generation, model)

    def session(self) -> Session:
        """The session; the caller holds the lock."""
        if self._session is None or self._session.connection.closed:
            self._session = self.database.connect("money")
        return self._session

    def tell(self, reason: str) -> None:
        """Say once what holds requests back."""
        if reason and reason != self._told:
            self.note(f"held back by {reason}; it goes on by itself")
        self._told = reason or self._told


class Account:
    """What one model of a migration is asked; a provider calls `before`, and what that returns, around each request."""

    def __init__(self, purse: Purse, generation: int, model: str) -> None:
        self.purse, self.generation, self.model = purse, generation, model
        self._entered = False
        #: Tokens that one request of several texts should not pass; None: no limit.
        self.most: int | None = None

    def before(self, tokens: int) -> Callable[[int | None], None]:
        """Count a request of about so many tokens, once the limits allow it; call the result with what it has cost.

        Raises `BudgetSpent` when it would pass the budget, `Interrupted` when asked to stop while it waits.
        """
        while not callable(taken := self._take(tokens)):
            deadline = time.monotonic() + min(taken, _LOOK)
            while (left := deadline - time.monotonic()) > 0:
                if self.purse.stop():
                    raise Interrupted
                time.sleep(min(left, 0.1))
        return taken

    def _settle(self, estimated: int, counted: int, actual: int | None) -> None:
        """Correct what was counted for a request estimated at so many tokens; None: not known, so it stands."""
        if actual is None:
            return
        density = actual / estimated if estimated >= _TELLING else 0.0
        with self.purse._lock:
            self.purse.session().execute(
                block("spending", "correct"), more=actual - counted, density=density, **self._key
            )

    @property
    def _key(self) -> dict[str, int]:
        return {"migration": self.purse.migration, "generation": self.generation}

    def _take(self, estimated: int) -> Callable[[int | None], None] | float:
        """Count the request and return what settles it, or return the seconds to wait first."""
        with self.purse._lock:
            session = self.purse.session()
            with session.transaction():
                if not self._entered:
                    session.execute(block("spending", "enter"), **self._key)
                rows = session.rows(block("spending", "look"), migration=self.purse.migration)
                own = next(row for row in rows if row.generation == self.generation)
                limits = Tuning.from_json(own.limits)
                self.most = limits.tokens_per_minute and max(limits.tokens_per_minute // _SHARE, 1)
                tokens = math.ceil(estimated * own.density)
                self._check(limits, sum(row.tokens for row in rows), tokens)
                waits = (
                    (own.requests_wait, limits.requests_per_minute, "requests a minute"),
                    (own.tokens_wait, limits.tokens_per_minute, "tokens a minute"),
                )
                wait, limit, what = max(((w or 0.0) if limit else 0.0, limit or 0, what) for w, limit, what in waits)
                if wait <= 0:
                    session.execute(
                        block("spending", "take"),
                        tokens=tokens,
                        tokens_pause=pause(tokens, limits.tokens_per_minute),
                        requests_pause=pause(1, limits.requests_per_minute),
                        **self._key,
                    )
        # Only now is it committed; a refusal above takes it back.
        self._entered = True
        if wait > 1:
            self.purse.tell(f"the limit of {limit:,} {what} for {self.model}")
        return wait if wait > 0 else partial(self._settle, estimated, tokens)

    def _check(self, limits: Tuning, spent: int, tokens: int) -> None:
        if limits.max_cost is None or not limits.price:
            return
        before, more = spent * limits.price / 1e6, tokens * limits.price / 1e6
        if before + more <= limits.max_cost:
            return
        raise BudgetSpent(
            f"{self.model}: the next request would cost {more:,.4g}, and {before:,.4g} of {limits.max_cost:,.4g} are spent",
            why=f"{spent:,} tokens so far, at {limits.price:,g} a million. It was not sent; what is done is kept.",
            hint=f"allow more: revector tune {self.purse.argument} --max-cost {_more(before + more)}",
        )


def check_price(limits: Tuning, changes: Mapping[str, float | None], argument: str) -> None:
    """Raise `UsageError` when there would be a budget and no price to count it with."""
    after = {"price": limits.price, "max_cost": limits.max_cost} | {k: v for k, v in changes.items() if k in MONEY}
    if after["max_cost"] is not None and not after["price"]:
        raise UsageError(
            "--max-cost needs a price above 0 to count with",
            why="Without one nobody can tell what a token costs. Nothing was changed.",
            hint=f"add --price-per-million-tokens X, or: revector tune {argument} --max-cost none",
        )


def _more(cost: float) -> str:
    """Half as much again, in two digits."""
    return f"{float(f'{1.5 * cost:.2g}'):g}"


def spent(session: Session, migration: int, limits: Tuning) -> Spent | None:
    """What a migration has spent; None: nothing was asked of a model behind an address."""
    row = session.row(block("spending", "spent"), migration=migration)
    if row is None or not row.requests:
        return None
    cost = None if limits.price is None else row.tokens * limits.price / 1e6
    return Spent(row.tokens, row.requests, cost, limits.max_cost)
