"""Rotary position embeddings, plain and with the scaling of Llama 3.

Source: RoFormer (https://arxiv.org/abs/2104.09864), with the halves layout of Hugging Face: element
i turns together with element i + head_dim / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvx_server.engine.config import Llama3Scaling, ModelConfig


@dataclass(frozen=True, slots=True)
class Rope:
    """Cosines and sines of every position, made once.

    Attributes:
        cosines: (context_tokens, head_dim / 2) float32.
        sines: (context_tokens, head_dim / 2) float32.
    """

    cosines: NDArray[np.float32]
    sines: NDArray[np.float32]

    @classmethod
    def build(cls, config: ModelConfig, context_tokens: int) -> Rope:
        """Make the tables for positions 0 to `context_tokens - 1`."""
        positions = np.arange(context_tokens, dtype=np.float32)
        angles = np.outer(positions, frequencies(config))
        return cls(np.cos(angles), np.sin(angles))

    def rotate(self, heads: NDArray[np.float32], position: int) -> NDArray[np.float32]:
        """Return heads turned by their positions.

        Args:
            heads: (tokens, num_heads, head_dim) float32.
            position: Absolute position of the first token.
        """
        end = position + heads.shape[0]
        cosines = self.cosines[position:end, np.newaxis]
        sines = self.sines[position:end, np.newaxis]
        half = heads.shape[-1] // 2
        first, second = heads[..., :half], heads[..., half:]
        turned = np.empty_like(heads)
        turned[..., :half] = first * cosines - second * sines
        turned[..., half:] = second * cosines + first * sines
        return turned


def frequencies(config: ModelConfig) -> NDArray[np.float32]:
    """Return the angle per position of each pair of elements, (head_dim / 2,) float32."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain = (np.float32(1.0) / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    return plain if config.rope_scaling is None else _llama3(plain, config.rope_scaling)


def _llama3(plain: NDArray[np.float32], scaling: Llama3Scaling) -> NDArray[np.float32]:
    """Slow the low frequencies, keep the high ones, and blend those between."""
    turns = scaling.original_tokens * plain / (2 * math.pi)
    width = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((turns - scaling.low_freq_factor) / width, 0.0, 1.0)
    blended: NDArray[np.float32] = kept * plain + (1.0 - kept) * plain / scaling.factor
    return blended.astype(np.float32)
