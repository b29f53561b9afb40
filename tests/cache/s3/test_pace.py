"""What is usual is exact over the last calls; slow is what is far from the best of late."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from kvx.cache.s3.pace import Pace


@given(st.lists(st.floats(0, 10), max_size=300), st.sampled_from((0.0, 0.5, 0.95, 1.0)))
def test_quantiles_are_those_of_the_last_calls(samples: list[float], share: float) -> None:
    pace = Pace()
    for number, seconds in enumerate(samples):
        pace.note(seconds, float(number))
    recent = sorted(samples[-128:])
    if len(samples) < 20:
        assert pace.quantile(share) is None
    else:
        found = pace.quantile(share)
        assert found == recent[min(len(recent) - 1, int(share * len(recent)))]


def test_older_calls_are_forgotten() -> None:
    pace, rng = Pace(), random.Random(1)
    samples = [rng.random() for _ in range(500)]
    for number, seconds in enumerate(samples):
        pace.note(seconds, float(number))
    recent = sorted(samples[-128:])
    assert [pace.quantile(rank / 128) for rank in range(128)] == recent


def shows_slow(pace: Pace, seconds: float, now_s: float) -> bool:
    return sum(pace.note(seconds, now_s) for _ in range(16)) > 0


def test_slow_is_eight_times_the_best_and_a_tenth_of_a_second() -> None:
    pace = Pace()
    assert not shows_slow(pace, 0.001, 0.0)
    assert not shows_slow(pace, 0.1, 1.0)
    assert shows_slow(pace, 0.11, 2.0)
    other = Pace()
    assert not shows_slow(other, 0.1, 0.0)
    assert not shows_slow(other, 0.79, 1.0)
    assert shows_slow(other, 0.81, 2.0)


def test_single_slow_calls_do_not_count() -> None:
    pace = Pace()
    shows_slow(pace, 0.01, 0.0)
    assert sum(pace.note(5.0 if number % 4 == 0 else 0.01, 1.0) for number in range(64)) == 0


def test_what_is_slow_for_long_is_usual() -> None:
    pace = Pace()
    shows_slow(pace, 0.01, 0.0)
    seen = [shows_slow(pace, 1.0, float(now_s)) for now_s in range(1, 100, 10)]
    assert seen[0]
    assert not any(seen[7:])
