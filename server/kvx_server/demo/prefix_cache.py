"""The engine's prefix cache on a kvx cache: the whole of what an embedder has to write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

import kvx

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvx_server.engine.engine import Engine


class KvxPrefixCache:
    """Loads and saves blocks of an engine's paged KV cache.

    Attributes:
        tokens_by_tier: Tokens of the last `load` by the tier that served them.
        last_reason: Why the last `load` ended where it did; HIT when it had everything.
    """

    def __init__(self, engine: Engine, space: kvx.CacheSpace) -> None:
        """Connect an engine to a namespace of a cache; the block sizes must agree."""
        self._space = space
        self._view = kvx.BlockView.of_blocks(engine.block_bytes_view)
        self._block_tokens = engine.cache.shape.block_tokens
        self.tokens_by_tier: dict[str, int] = {}
        self.last_reason = kvx.MissReason.HIT

    def load(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> int:
        """Fill the leading blocks that the cache has; returns how many."""
        match = self._space.match(list(hashes))
        self.last_reason = match.reason
        self.tokens_by_tier = {}
        if match.num_blocks == 0:
            return 0
        target = self._view.slots(np.array(block_ids[: match.num_blocks], np.int64))
        result = self._space.onboard(list(hashes[: match.num_blocks]), target).wait()
        served = result.tiers[: result.prefix_blocks]
        for tier in np.unique(served).tolist():
            name = kvx.TierKind(tier).name
            self.tokens_by_tier[name] = int((served == tier).sum()) * self._block_tokens
        if result.prefix_blocks < match.num_blocks:
            self.last_reason = kvx.MissReason(int(result.reasons[result.prefix_blocks]))
        return result.prefix_blocks

    def save(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """Store blocks; they are in DRAM when this returns and on their way to NVMe."""
        source = self._view.slots(np.array(block_ids, np.int64))
        self._space.offload(list(hashes), source).wait()


class Scrambling:
    """What happens without checksums: the KV of every loaded block is shifted a little."""

    def __init__(self, inner: KvxPrefixCache, engine: Engine) -> None:
        """Load with `inner`, then damage what it loaded."""
        self._inner = inner
        self._engine = engine

    @property
    def tokens_by_tier(self) -> dict[str, int]:
        """As of `KvxPrefixCache`."""
        return self._inner.tokens_by_tier

    @property
    def last_reason(self) -> kvx.MissReason:
        """As of `KvxPrefixCache`."""
        return self._inner.last_reason

    def load(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> int:
        """Fill the leading blocks with KV that is one element off."""
        loaded = self._inner.load(hashes, block_ids)
        for block in block_ids[:loaded]:
            values = self._engine.cache.blocks[block]
            values[:] = np.roll(values, 1)
        return loaded

    def save(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """Keep nothing: what is computed from damaged KV is damaged."""
