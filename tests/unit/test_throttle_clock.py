"""The throttle's arithmetic, on a clock of the test's own."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest

from revector import throttle
from revector.throttle import BLOCKED, LAG, PAUSED, RATE, Standbys, Throttle, Tuning


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throttle.time, "sleep", clock.sleep)
    return clock


def never() -> bool:
    return False


def test_no_limit_no_wait(clock: Clock) -> None:
    free = Throttle(now=clock)
    assert free.wait() == (0.0, "") and free.most() is None and free.hold(never) and free.figures() == {}


@pytest.mark.parametrize(("rate", "rows"), [(500, 100), (500, 3), (10, 2), (0.5, 1)])
def test_a_rate_is_kept_exactly(clock: Clock, rate: float, rows: int) -> None:
    limited = Throttle(Tuning(max_rows_per_second=rate), now=clock)
    began, written = clock.time, 0
    for _ in range(40):
        assert limited.hold(never)
        written += rows
        limited.wrote(rows)
        assert written - rows <= rate * (clock.time - began) + 1e-6, "faster than the rate"
    limited.hold(never)
    assert clock.time - began == pytest.approx(written / rate, rel=0.02)
    assert limited.figures()[RATE] == pytest.approx(clock.time - began, abs=0.2)


def test_one_write_is_at_most_a_fifth_of_a_second_of_the_rate(clock: Clock) -> None:
    assert Throttle(Tuning(max_rows_per_second=500), now=clock).most() == 100
    assert Throttle(Tuning(max_rows_per_second=2), now=clock).most() == 1


def test_a_rate_that_is_raised_counts_at_once(clock: Clock) -> None:
    limited = Throttle(Tuning(max_rows_per_second=1), now=clock)
    limited.wrote(100)
    assert limited.wait() == (100.0, RATE)
    limited.tuning = Tuning(max_rows_per_second=1000)
    assert limited.wait()[0] == pytest.approx(0.1)
    limited.tuning = Tuning()
    assert limited.wait() == (0.0, "")


def test_a_pause_holds_everybody_but_the_urgent(clock: Clock) -> None:
    paused = Throttle(Tuning(paused=True), now=clock)
    assert paused.wait()[1] == PAUSED and paused.wait(urgent=True) == (0.0, "")
    told: list[str] = []

    def stop() -> bool:
        if clock.time > 1005:
            paused.tuning = Tuning()
        return False

    assert paused.hold(stop, told.append) and told == [PAUSED, ""]
    assert 5 <= paused.figures()[PAUSED] <= 5.3
    paused.tuning = Tuning(paused=True)
    assert not paused.hold(lambda: True), "a wait ends when we are asked to stop"


def test_pauses_double_while_somebody_waits_for_us_and_shrink_again(clock: Clock) -> None:
    polite = Throttle(now=clock)
    polite.wrote(64)
    waits = []
    for _ in range(8):
        polite.blocked("process 7 for 120 ms")
        waits.append(round(polite.wait()[0], 2))
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0] and polite.wait()[1] == BLOCKED
    assert polite.most() == 1 and polite.words(BLOCKED) == f"{BLOCKED}: process 7 for 120 ms"
    for _ in range(20):
        polite.blocked("")
    clock.time += 6
    assert polite.wait() == (0.0, "") and polite.most() is None


def test_lag_stops_writing_and_half_of_it_lets_it_go_on(clock: Clock) -> None:
    late = Throttle(now=clock)
    for seconds, waits in ((9.9, False), (10.1, True), (6.0, True), (4.9, False), (6.0, False)):
        late.lag(seconds, "replica")
        assert (late.wait()[1] == LAG) is waits, seconds
    late.lag(11, "replica")
    assert late.words(LAG) == f"{LAG}: replica is 11 s late" and late.wait(urgent=True) == (0.0, "")
    late.tuning = Tuning(max_lag=0)
    late.lag(1000, "delayed on purpose")
    assert late.wait() == (0.0, "")


Row = namedtuple("Row", "pid name state lag place head")


def row(**given: Any) -> Row:
    return Row(**{"pid": 1, "name": "replica", "state": "streaming", "lag": None, "place": 100, "head": 100, **given})


def test_a_replay_that_stands_still_grows_late_though_the_server_does_not_say_so(clock: Clock) -> None:
    seen = Standbys(now=clock)
    assert seen.lag([row()]) == (0.0, "")
    for _ in range(8):
        clock.time += 2
        late = seen.lag([row(head=200), row(pid=2, name="other", place=200, head=200)])
    assert late == (14.0, "replica")
    clock.time += 2
    assert seen.lag([row(head=300, place=200)]) == (0.0, ""), "what it has not replayed yet is new"
    assert seen.lag([row(head=300, place=200, lag=33.0)]) == (33.0, "replica"), "the server's own figure counts too"
    assert seen.lag([row(head=300, place=300, lag=33.0)]) == (0.0, ""), "an old figure of one that has everything"
    assert seen.lag([]) == (0.0, "") and not seen.hidden


def test_columns_without_the_right_to_see_them(clock: Clock) -> None:
    seen = Standbys(now=clock)
    assert seen.lag([row(state=None, place=None)]) == (0.0, "") and seen.hidden


def test_the_ledger_holds_what_is_set_and_nothing_else() -> None:
    assert Tuning().to_json() == {} and Tuning(paused=True, max_cost=0.0).to_json() == {"paused": True, "max_cost": 0.0}
    assert Tuning.from_json({"paused": True, "max_lag": 3, "from_a_newer_program": 1}) == Tuning(paused=True, max_lag=3)
