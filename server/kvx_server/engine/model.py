"""The forward pass of a Llama: one run of tokens at a time, attending to a paged KV cache.

The same code computes prefill (many tokens) and decode (one token). What it computes for a token
depends on the tokens up to it, on its absolute position and on the shape of the run it is in, and
on nothing else; `prefill.py` keeps that shape fixed, which makes results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvx_server.engine.config import ModelConfig
from kvx_server.engine.paged_cache import PagedKvCache
from kvx_server.engine.rope import Rope
from kvx_server.engine.weights import LayerWeights, Weights


class LlamaModel:
    """Computes hidden states and logits; holds no state of any sequence."""

    def __init__(self, config: ModelConfig, weights: Weights, rope: Rope) -> None:
        """Keep the parts; `rope` must cover every position that will be asked for."""
        self.config = config
        self._weights = weights
        self._rope = rope

    def forward(
        self,
        tokens: NDArray[np.int64],
        *,
        position: int,
        cache: PagedKvCache,
        block_ids: Sequence[int],
        num_stored: int,
    ) -> NDArray[np.float32]:
        """Compute a run of tokens and store their keys and values in the cache.

        Args:
            tokens: (num_tokens,) int64; those after `num_stored` are padding.
            position: Absolute position of the first token; everything before it is in the cache.
            cache: Where keys and values are.
            block_ids: Block table of the sequence.
            num_stored: How many leading tokens are real.

        Returns:
            (num_tokens, hidden_size) float32, before the final norm; rows of padding mean nothing.
        """
        # Damaged KV values may overflow; sampling finds out, warnings on the way add nothing.
        with np.errstate(over="ignore", invalid="ignore"):
            hidden = self._weights.embedding[tokens]
            for index, layer in enumerate(self._weights.layers):
                normed = self._norm(hidden, layer.attention_norm)
                queries, key_values = self._project(normed, layer, position)
                context = cache.extend(index, block_ids, position, key_values, num_stored)
                mixed = attend(queries, context, position)
                hidden = hidden + mixed @ layer.attention_output.T
                hidden = hidden + _mlp(self._norm(hidden, layer.mlp_norm), layer)
        return hidden

    def logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of the token that follows one hidden state.

        Args:
            hidden: (hidden_size,) float32, a row of what `forward` returned.

        Returns:
            (vocab_size,) float32.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            output: NDArray[np.float32] = self._weights.head @ self._norm(
                hidden, self._weights.norm
            )
        return output

    def _norm(
        self, hidden: NDArray[np.float32], weight: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Divide rows by their root mean square (https://arxiv.org/abs/1910.07467)."""
        square = np.mean(hidden * hidden, axis=-1, keepdims=True)
        scale = np.float32(1.0) / np.sqrt(square + np.float32(self.config.rms_norm_eps))
        normed: NDArray[np.float32] = hidden * scale * weight
        return normed

    def _project(
        self, normed: NDArray[np.float32], layer: LayerWeights, position: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return rotated queries, and keys (rotated) stacked on values."""
        config = self.config
        heads = (normed @ layer.query_key_value.T).reshape(len(normed), -1, config.head_dim)
        num_rotated = config.num_heads + config.num_kv_heads
        rotated = self._rope.rotate(heads[:, :num_rotated], position)
        keys, values = rotated[:, config.num_heads :], heads[:, num_rotated:]
        return rotated[:, : config.num_heads], np.stack([keys, values])


def attend(
    queries: NDArray[np.float32], context: NDArray[np.float32], position: int
) -> NDArray[np.float32]:
    """Mix values by causal attention; query heads share key-value heads in equal groups.

    Args:
        queries: (num_new, num_heads, head_dim) float32.
        context: (2, position + num_new, num_kv_heads, head_dim) float32, keys then values.
        position: Absolute position of the first query.

    Returns:
        (num_new, num_heads * head_dim) float32.
    """
    num_new, num_heads, head_dim = queries.shape
    num_kv_heads = context.shape[2]
    # One matrix product per key-value head: the queries of its group stand below one another.
    grouped = queries.reshape(num_new, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
    grouped = grouped.reshape(num_kv_heads, -1, head_dim) * np.float32(head_dim**-0.5)
    keys, values = context[0].transpose(1, 2, 0), context[1].transpose(1, 0, 2)
    scores = (grouped @ keys).reshape(num_heads, num_new, -1)
    if num_new > 1:
        scores[..., position:] += np.triu(np.full((num_new, num_new), -np.inf, np.float32), 1)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    totals = scores.sum(axis=-1, keepdims=True)
    mixed = (scores.reshape(num_kv_heads, -1, scores.shape[-1]) @ values).reshape(
        num_heads, num_new, head_dim
    )
    mixed /= totals
    output: NDArray[np.float32] = mixed.transpose(1, 0, 2).reshape(num_new, -1)
    return output


def _mlp(normed: NDArray[np.float32], layer: LayerWeights) -> NDArray[np.float32]:
    gate, up = np.split(normed @ layer.gate_up.T, 2, axis=-1)
    output: NDArray[np.float32] = (gate / (1.0 + np.exp(-gate)) * up) @ layer.down.T
    return output
