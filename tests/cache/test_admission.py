"""Which blocks are written: by frequency that ages, and within a budget that no day exceeds."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.cache.admission import Admission
from kvx.tier_config import AdmissionConfig

DAY_S = 86_400.0
BLOCK_BYTES = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now_s = 12_345.6

    def __call__(self) -> float:
        return self.now_s


def make_keys(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)


def test_without_a_configuration_everything_is_written() -> None:
    assert Admission(None).accept(make_keys(100), BLOCK_BYTES).all()
    assert Admission(AdmissionConfig()).accept(make_keys(100), BLOCK_BYTES).all()
    assert Admission(None).accept(make_keys(0), BLOCK_BYTES).tolist() == []


@pytest.mark.parametrize("min_frequency", [2, 3, 15])
def test_a_block_is_written_when_it_was_offered_often_enough(min_frequency: int) -> None:
    admission = Admission(AdmissionConfig(min_frequency=min_frequency))
    keys = make_keys(50)
    for _ in range(min_frequency - 1):
        assert not admission.accept(keys, BLOCK_BYTES).any()
    assert admission.accept(keys, BLOCK_BYTES).all()
    assert admission.accept(keys, BLOCK_BYTES).all()


def test_strangers_are_rarely_taken_for_friends() -> None:
    """Collisions in the sketch admit few blocks that were never offered."""
    admission = Admission(AdmissionConfig(min_frequency=2))
    admission.accept(make_keys(10_000), BLOCK_BYTES)
    assert admission.accept(make_keys(10_000, seed=1), BLOCK_BYTES).mean() < 0.01


def test_frequencies_age() -> None:
    """What was popular once is forgotten after enough others."""
    admission = Admission(AdmissionConfig(min_frequency=4))
    old = make_keys(1)
    for _ in range(4):
        admission.accept(old, BLOCK_BYTES)
    flood = 8 << 16
    for seed in range(1, 9):
        admission.accept(make_keys(flood // 4, seed), BLOCK_BYTES)
    # Two halvings leave 1 of 4 and what collisions add.
    assert admission._counts.mean() < 8
    assert admission._counts.max() <= 15
    fresh = Admission(AdmissionConfig(min_frequency=4))
    for _ in range(4):
        fresh.accept(old, BLOCK_BYTES)
    fresh._num_counted = flood
    fresh.accept(make_keys(1, seed=99), BLOCK_BYTES)
    assert not fresh.accept(old, BLOCK_BYTES).any()


def test_many_at_once_do_not_wrap_a_counter() -> None:
    admission = Admission(AdmissionConfig(min_frequency=2))
    same = np.repeat(make_keys(1), 256, axis=0)
    admission.accept(same, BLOCK_BYTES)
    assert admission.accept(same[:1], BLOCK_BYTES).all()


def test_earlier_blocks_go_first_when_the_budget_ends() -> None:
    admission = Admission(AdmissionConfig(bytes_per_day=10 * BLOCK_BYTES), Clock())
    assert admission.accept(make_keys(7), BLOCK_BYTES).sum() == 7
    assert admission.accept(make_keys(7), BLOCK_BYTES).tolist() == [True] * 3 + [False] * 4
    assert not admission.accept(make_keys(7), BLOCK_BYTES).any()


def test_what_is_too_rare_costs_no_budget() -> None:
    config = AdmissionConfig(min_frequency=2, bytes_per_day=10 * BLOCK_BYTES)
    admission = Admission(config, Clock())
    for seed in range(5):
        assert not admission.accept(make_keys(8, seed), BLOCK_BYTES).any()
    assert admission.accept(make_keys(8, 0), BLOCK_BYTES).all()


@pytest.mark.parametrize("demand", [1.1, 3.0, 50.0])
def test_the_budget_of_a_day_is_used_and_held(demand: float) -> None:
    """Over a simulated week under more demand than budget: within 2 % of it, and never above it."""
    clock = Clock()
    per_day = 20_000 * BLOCK_BYTES
    admission = Admission(AdmissionConfig(bytes_per_day=per_day), clock)
    step_s = 60.0
    offered = int(per_day * demand / BLOCK_BYTES / (DAY_S / step_s))
    keys = make_keys(offered)
    window: deque[int] = deque(maxlen=int(DAY_S / step_s))
    fullest, total = 0, 0
    for _ in range(7 * int(DAY_S / step_s)):
        clock.now_s += step_s
        written = int(admission.accept(keys, BLOCK_BYTES).sum()) * BLOCK_BYTES
        window.append(written)
        total += written
        fullest = max(fullest, sum(window))
    assert 0.98 * per_day <= fullest <= per_day
    # The first burst may come at once: seven days then hold seven or almost eight of them.
    assert total / 7 >= 0.98 * per_day
    assert total <= 7 * per_day


def test_the_first_day_has_no_second_helping() -> None:
    """A burst takes the budget; it is back a day later, not before."""
    clock = Clock()
    admission = Admission(AdmissionConfig(bytes_per_day=10 * BLOCK_BYTES), clock)
    assert admission.accept(make_keys(20), BLOCK_BYTES).sum() == 10
    clock.now_s += DAY_S - 1
    assert admission.accept(make_keys(20), BLOCK_BYTES).sum() == 0
    clock.now_s += 1800
    assert admission.accept(make_keys(20), BLOCK_BYTES).sum() == 10


@given(st.lists(st.tuples(st.floats(0, 2 * DAY_S), st.integers(0, 30)), max_size=30))
def test_no_window_of_24_hours_exceeds_the_budget(steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    admission = Admission(AdmissionConfig(bytes_per_day=25 * BLOCK_BYTES), clock)
    written: list[tuple[float, int]] = []
    for pause_s, offered in steps:
        clock.now_s += pause_s
        count = int(admission.accept(make_keys(offered), BLOCK_BYTES).sum())
        written.append((clock.now_s, count))
        day = [n for at_s, n in written if at_s > clock.now_s - DAY_S]
        assert sum(day) <= 25
        longer = [n for at_s, n in written if at_s > clock.now_s - DAY_S - 1800]
        assert count == offered or sum(longer) >= 25


def test_a_clock_that_steps_back_does_no_harm() -> None:
    clock = Clock()
    admission = Admission(AdmissionConfig(bytes_per_day=10 * BLOCK_BYTES), clock)
    admission.accept(make_keys(4), BLOCK_BYTES)
    clock.now_s -= 5000
    assert admission.accept(make_keys(20), BLOCK_BYTES).sum() == 6
