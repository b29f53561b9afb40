"""The breaker opens, probes and closes by an injected clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.cache.breaker import Breaker, BreakerState, Passage
from kvx.config import BreakerConfig

CONFIG = BreakerConfig(failures=3, reset_s=5.0)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(CONFIG, clock)


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        breaker.failure()


def test_it_opens_after_failures_in_a_row(breaker: Breaker) -> None:
    fail(breaker, 2)
    assert breaker.allow()
    breaker.failure()
    assert not breaker.allow()


def test_a_success_in_between_starts_the_count_again(breaker: Breaker) -> None:
    for _ in range(5):
        fail(breaker, 2)
        breaker.success()
    assert breaker.allow()


def test_it_lets_a_probe_through_after_the_reset_time(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now_s += 4.999
    assert not breaker.allow()
    clock.now_s += 0.001
    assert breaker.allow()


def test_a_failed_probe_opens_it_at_once(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now_s += 5
    assert breaker.allow()
    breaker.failure()
    assert not breaker.allow()
    clock.now_s += 5
    assert breaker.allow()


def test_a_good_probe_closes_it_and_forgets(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 7)
    clock.now_s += 5
    breaker.success()
    fail(breaker, 2)
    assert breaker.allow()


def test_half_open_one_enters_at_a_time(breaker: Breaker, clock: Clock) -> None:
    assert breaker.enter() is Passage.FREE
    fail(breaker, 3)
    assert breaker.enter() is Passage.REFUSED
    clock.now_s += 5
    assert [breaker.enter() for _ in range(3)] == [Passage.PROBE, Passage.REFUSED, Passage.REFUSED]
    assert breaker.allow()


def test_after_a_good_probe_all_enter(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now_s += 5
    assert breaker.enter() is Passage.PROBE
    breaker.success()
    breaker.end_probe()
    assert [breaker.enter() for _ in range(2)] == [Passage.FREE, Passage.FREE]


def test_after_a_failed_probe_none_enters_until_the_reset_time(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, 3)
    clock.now_s += 5
    assert breaker.enter() is Passage.PROBE
    breaker.failure()
    breaker.end_probe()
    assert breaker.enter() is Passage.REFUSED
    assert breaker.wait_s == 5
    clock.now_s += 5
    assert breaker.enter() is Passage.PROBE


def test_a_probe_that_says_nothing_leaves_its_place_to_the_next(
    breaker: Breaker, clock: Clock
) -> None:
    fail(breaker, 3)
    clock.now_s += 5
    assert breaker.enter() is Passage.PROBE
    breaker.end_probe()
    assert breaker.enter() is Passage.PROBE


def test_its_state_is_told(breaker: Breaker, clock: Clock) -> None:
    assert (breaker.state, breaker.wait_s) == (BreakerState.CLOSED, 0)
    fail(breaker, 3)
    assert (breaker.state, breaker.wait_s) == (BreakerState.OPEN, 5)
    clock.now_s += 6
    assert (breaker.state, breaker.wait_s) == (BreakerState.HALF_OPEN, 0)


@given(
    st.integers(1, 5),
    st.lists(st.sampled_from(["failure", "success"]) | st.floats(0, 10), max_size=40),
)
def test_against_a_model(failures: int, steps: list[str | float]) -> None:
    """Open for `reset_s` after a failure that was the last of enough, or that met an open one."""
    clock = Clock()
    breaker = Breaker(BreakerConfig(failures=failures, reset_s=5.0), clock)
    in_a_row, opened_at_s = 0, None
    for step in steps:
        if isinstance(step, float):
            clock.now_s += step
        elif step == "success":
            breaker.success()
            in_a_row, opened_at_s = 0, None
        else:
            breaker.failure()
            in_a_row += 1
            if in_a_row >= failures or opened_at_s is not None:
                opened_at_s = clock.now_s
        assert breaker.allow() == (opened_at_s is None or clock.now_s >= opened_at_s + 5.0)
