"""Chooses the next token from logits: greedy, or drawn by temperature and top-p from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvx_server.engine.errors import DamagedCacheError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token; higher values flatten the distribution.
        top_p: Only the likeliest tokens that together reach this probability can be drawn.
        seed: Equal seeds and equal logits give equal tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A value is out of its range.
        """
        if not (0.0 <= self.temperature < float("inf")):
            message = f"temperature must be 0 or more, found {self.temperature}"
            raise ValueError(message)
        if not 0.0 < self.top_p <= 1.0:
            message = f"top_p must be above 0 and at most 1, found {self.top_p}"
            raise ValueError(message)
        if self.seed < 0:
            message = f"seed must be 0 or more, found {self.seed}"
            raise ValueError(message)


class Sampler:
    """Draws the tokens of one sequence; one random number per token unless it is greedy."""

    def __init__(self, sampling: Sampling) -> None:
        """Seed the generator."""
        self._sampling = sampling
        self._generator = np.random.default_rng(sampling.seed)

    def next_token(self, logits: NDArray[np.float32]) -> int:
        """Return the chosen token.

        Args:
            logits: (vocab_size,) float32.

        Raises:
            DamagedCacheError: A logit is not finite.
        """
        if not np.isfinite(logits).all():
            message = "the logits are not finite: the KV cache holds damaged values"
            raise DamagedCacheError(message)
        if self._sampling.temperature == 0.0:
            return int(np.argmax(logits))
        tokens, probabilities = candidates(logits, self._sampling)
        bounds = np.cumsum(probabilities)
        drawn = np.searchsorted(bounds, self._generator.random() * bounds[-1], side="right")
        # Rounding may put the drawn number on the last bound itself.
        return int(tokens[min(int(drawn), len(tokens) - 1)])


def candidates(
    logits: NDArray[np.float32], sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the tokens that can be drawn and their probabilities, likeliest first.

    Args:
        logits: (vocab_size,) float32, finite.
        sampling: Temperature, above 0, and top-p.

    Returns:
        tokens: (n,) int64; probabilities: (n,) float64, adding up to 1.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    # Stable, so that equal logits are ordered by token on every machine.
    order = np.argsort(-weights, kind="stable")
    ordered = weights[order] / weights.sum()
    before = np.cumsum(ordered) - ordered
    count = max(1, int(np.count_nonzero(before < sampling.top_p)))
    kept = ordered[:count]
    return order[:count], kept / kept.sum()
