"""What the models behind an address may be asked and may cost: counted in the ledger, shared by every worker.

Each request is counted and committed *before* it is sent, so what is paid for is on record whatever happens to its
answer, and two workers cannot pass a limit together. Requests are spread evenly, so that no minute holds more than the
limit, whatever their sizes (`pause` says why). Tokens are estimated before a request (four
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
from datetime import datetime
from functools import partial
from typing import Final

from revector.db import Database, Session, block
from revector.errors import BudgetSpent, Interrupted, UsageError
from revector.throttle import Tuning

#: Seconds between two looks while a limit holds a request back: it may be changed meanwhile.
_LOOK: Final = 0.5
#: One request takes at most this part of the tokens of a minute, where it has several texts.
_SHARE: Final = 0.1
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


def pause(amount: float, limit: float | None, share: float) -> tuple[float, float]:
    """Seconds that a request waits beyond the pause of the one before, and its own pause, so that a minute holds `limit`.

    Pauses last 1/v for each token, with v = (limit - share) / 60, and a request of more than `share` first waits 1/v for
    each token above. So from a request on to a later one of n tokens there is 1/v for each token of all of them but
    the last `share`: within a minute that is less than 60 v + share = limit. Nothing is in one minute with what was sent a
    minute before, so no wait beforehand is longer.
    """
    if limit is None:
        return 0.0, 0.0
    each = 60 / (limit - share)
    return min(60.0, each * max(0.0, amount - share)), each * amount


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
        while True:
            wait, settle = self._take(tokens)
            deadline = time.monotonic() + (min(wait, _LOOK) if settle is None else wait)
            while (left := deadline - time.monotonic()) > 0:
                if self.purse.stop():
                    if settle is not None:
                        settle(0)
                    raise Interrupted
                time.sleep(min(left, 0.1))
            if settle is not None:
                return settle

    def _settle(self, estimated: int, counted: int, each: float, pause_ends: datetime, actual: int | None) -> None:
        """Correct what was counted, and the pause of `each` second a token; None: not known, so both stand.

        The pause becomes longer always, and shorter only while it is still this request's: others have begun at its end.
        """
        if actual is None:
            return
        more = actual - counted
        density = actual / estimated if estimated >= _TELLING else 0.0
        with self.purse._lock:
            self.purse.session().execute(
                block("spending", "correct"),
                more=more,
                pause=more * each,
                pause_ends=pause_ends,
                density=density,
                **self._key,
            )

    @property
    def _key(self) -> dict[str, int]:
        return {"migration": self.purse.migration, "generation": self.generation}

    def _take(self, estimated: int) -> tuple[float, Callable[[int | None], None] | None]:
        """Seconds to wait, and what settles the request if it is counted; None: it is not, ask again after the wait.

        A large request is counted before its wait, which holds back all others: asking again, it would never find the
        limit free for long enough beside those who send small ones.
        """
        with self.purse._lock:
            session = self.purse.session()
            with session.transaction():
                if not self._entered:
                    session.execute(block("spending", "enter"), **self._key)
                rows = session.rows(block("spending", "look"), migration=self.purse.migration)
                own = next(row for row in rows if row.generation == self.generation)
                limits = Tuning.from_json(own.limits)
                share = _SHARE * (limits.tokens_per_minute or 0)
                self.most = max(int(share / own.density), 1) if share else None
                tokens = max(math.ceil(estimated * own.density), 1)
                lead, tokens_pause = pause(tokens, limits.tokens_per_minute, share)
                # Idle time counts; where nothing was sent, there is nothing to wait for.
                lead = max(lead + (-lead if own.tokens_wait is None else min(own.tokens_wait, 0.0)), 0.0)
                self._check(limits, sum(row.tokens for row in rows), tokens)
                waits = (
                    (own.requests_wait, limits.requests_per_minute, "requests a minute"),
                    (own.tokens_wait, limits.tokens_per_minute, "tokens a minute"),
                )
                wait, limit, what = max(((w or 0.0) if limit else 0.0, limit or 0, what) for w, limit, what in waits)
                settle = None
                if wait <= 0:
                    wait, limit, what = lead, limits.tokens_per_minute or 0, "tokens a minute"
                    pause_ends = session.value(
                        block("spending", "take"),
                        tokens=tokens,
                        tokens_pause=lead + tokens_pause,
                        # Where one request a minute is allowed, the pause is a minute.
                        requests_pause=lead + 60 / max((limits.requests_per_minute or math.inf) - 1, 1),
                        **self._key,
                    )
                    settle = partial(self._settle, estimated, tokens, tokens_pause / tokens, pause_ends)
        # Only now is it committed; a refusal above takes it back.
        self._entered = True
        if wait > 1:
            self.purse.tell(f"the limit of {limit:,} {what} for {self.model}")
        return wait, settle

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
