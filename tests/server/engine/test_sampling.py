"""Sampling repeats from its seed, and top-p cuts where it says."""

from __future__ import annotations

import numpy as np
import pytest

from kvx_server.engine.errors import DamagedCacheError
from kvx_server.engine.sampling import Sampler, Sampling, candidates

_LOGITS = np.log(np.array([0.1, 0.4, 0.3, 0.15, 0.05], dtype=np.float32))


def _draw(sampling: Sampling, count: int) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.next_token(_LOGITS) for _ in range(count)]


def test_greedy_takes_the_likeliest() -> None:
    assert _draw(Sampling(), 3) == [1, 1, 1]


def test_seed_repeats() -> None:
    first = _draw(Sampling(temperature=1.0, seed=7), 50)
    assert first == _draw(Sampling(temperature=1.0, seed=7), 50)
    assert first != _draw(Sampling(temperature=1.0, seed=8), 50)


def test_draws_follow_the_distribution() -> None:
    drawn = np.bincount(_draw(Sampling(temperature=1.0), 4000), minlength=5) / 4000
    np.testing.assert_allclose(drawn, np.exp(_LOGITS), atol=0.03)


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [
        (1e-9, [1]),
        (0.39, [1]),
        (0.41, [1, 2]),
        (0.69, [1, 2]),
        (0.8, [1, 2, 3]),
        (1.0, [1, 2, 3, 0, 4]),
    ],
)
def test_top_p(top_p: float, tokens: list[int]) -> None:
    kept, probabilities = candidates(_LOGITS, Sampling(temperature=1.0, top_p=top_p))
    assert kept.tolist() == tokens
    assert probabilities.sum() == pytest.approx(1.0)
    drawn = _draw(Sampling(temperature=1.0, top_p=top_p), 300)
    assert set(drawn) <= set(tokens)


def test_low_temperature_is_nearly_greedy() -> None:
    assert set(_draw(Sampling(temperature=0.01), 100)) == {1}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_logits_that_are_not_finite(value: float) -> None:
    logits = _LOGITS.copy()
    logits[2] = value
    with pytest.raises(DamagedCacheError):
        Sampler(Sampling()).next_token(logits)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_refuses_values(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)
