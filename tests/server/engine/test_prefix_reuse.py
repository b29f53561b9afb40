"""KV bytes, logits and tokens are the same bit for bit, computed or loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from kvx_server.engine import DamagedCacheError, Engine

_PROMPT_TOKENS = 300


class DictionaryPrefixCache:
    """Blocks in a dictionary, and a record of what was asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.blocks: dict[bytes, NDArray[np.uint8]] = {}
        self.saved: list[list[bytes]] = []

    def load(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> int:
        count = 0
        for block_hash, block_id in zip(hashes, block_ids, strict=True):
            if block_hash not in self.blocks:
                break
            self.engine.block_bytes_view[block_id] = self.blocks[block_hash]
            count += 1
        return count

    def save(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> None:
        self.saved.append(list(hashes))
        for block_hash, block_id in zip(hashes, block_ids, strict=True):
            self.blocks[block_hash] = self.engine.block_bytes_view[block_id].copy()


@pytest.fixture
def prefix_cache(engine: Engine) -> DictionaryPrefixCache:
    return DictionaryPrefixCache(engine)


@pytest.mark.parametrize("step_blocks", [1, 3])
@pytest.mark.parametrize("kv_dtype", ["float32", "float16"])
def test_bits_do_not_depend_on_what_was_cached(
    load_engine: Callable[..., Engine], text_tokens: list[int], kv_dtype: str, step_blocks: int
) -> None:
    engine = load_engine(num_blocks=40, block_tokens=16, kv_dtype=kv_dtype, step_blocks=step_blocks)
    prompt = text_tokens[:_PROMPT_TOKENS]
    cold_ids, warm_ids = engine.allocator.allocate(19), engine.allocator.allocate(19)
    cold = engine.prefill(prompt, 0, cold_ids)
    full = _PROMPT_TOKENS // 16
    for num_cached_blocks in range(full + 1):
        engine.block_bytes_view[warm_ids] = 0xAB
        engine.block_bytes_view[warm_ids[:num_cached_blocks]] = engine.block_bytes_view[
            cold_ids[:num_cached_blocks]
        ]
        warm = engine.prefill(prompt, num_cached_blocks * 16, warm_ids)
        assert warm.tobytes() == cold.tobytes()
        assert (
            engine.block_bytes_view[warm_ids[:full]].tobytes()
            == engine.block_bytes_view[cold_ids[:full]].tobytes()
        )


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 255])
def test_bits_do_not_depend_on_what_follows(
    engine: Engine, text_tokens: list[int], length: int
) -> None:
    """Blocks of a short prompt serve a longer one that starts with it."""
    short_ids, long_ids = engine.allocator.allocate(16), engine.allocator.allocate(16)
    engine.prefill(text_tokens[:length], 0, short_ids)
    engine.prefill(text_tokens[:256], 0, long_ids)
    full = length // 16
    short = engine.cache.blocks[short_ids[:full]]
    assert short.tobytes() == engine.cache.blocks[long_ids[:full]].tobytes()
    # The tail is not full, but what is in it is the same too.
    rest = length - full * 16
    tails = engine.cache.blocks[[short_ids[full], long_ids[full]]] if rest else None
    if tails is not None:
        assert tails[0][:, :, :rest].tobytes() == tails[1][:, :, :rest].tobytes()


def test_generated_tokens_are_the_same(
    engine: Engine, prefix_cache: DictionaryPrefixCache, text_tokens: list[int]
) -> None:
    prompt = text_tokens[:_PROMPT_TOKENS]
    cold = engine.generate(prompt, 60, stop_tokens=())
    first = engine.generate(prompt, 60, stop_tokens=(), prefix_cache=prefix_cache)
    second = engine.generate(prompt, 60, stop_tokens=(), prefix_cache=prefix_cache)
    longer = engine.generate(prompt + text_tokens[:50], 60, prefix_cache=prefix_cache)
    assert cold.tokens == first.tokens == second.tokens
    reused = [result.num_reused_tokens for result in (cold, first, second, longer)]
    assert reused == [0, 0, 288, 288]
    assert second.num_prefill_tokens == _PROMPT_TOKENS - 288
    # Only blocks that were not loaded are offered again.
    assert [len(hashes) for hashes in prefix_cache.saved] == [18, 3]


def test_fully_cached_prompt_computes_its_last_step(
    engine: Engine, prefix_cache: DictionaryPrefixCache, text_tokens: list[int]
) -> None:
    prompt = text_tokens[:64]
    cold = engine.generate(prompt, 5, prefix_cache=prefix_cache)
    warm = engine.generate(prompt, 5, prefix_cache=prefix_cache)
    assert warm.tokens == cold.tokens
    assert (warm.num_reused_tokens, warm.num_prefill_tokens) == (48, 16)


def test_corrupted_blocks_change_the_continuation(
    engine: Engine, prefix_cache: DictionaryPrefixCache, text_tokens: list[int]
) -> None:
    prompt = text_tokens[:_PROMPT_TOKENS]
    cold = engine.generate(prompt, 60, stop_tokens=(), prefix_cache=prefix_cache)
    # Whole values in the wrong places. (Blocks in another order would change nothing: attention
    # sums over them, and keys carry their positions.)
    for block in prefix_cache.blocks.values():
        block[:] = np.roll(block, 20)
    damaged = engine.generate(prompt, 60, stop_tokens=(), prefix_cache=prefix_cache)
    assert damaged.num_reused_tokens == 288
    assert damaged.tokens != cold.tokens


def test_blocks_of_another_prompt_change_the_continuation(
    engine: Engine, prefix_cache: DictionaryPrefixCache, text_tokens: list[int]
) -> None:
    prompt, other = text_tokens[:_PROMPT_TOKENS], text_tokens[-_PROMPT_TOKENS:]
    cold = engine.generate(prompt, 60, stop_tokens=(), prefix_cache=prefix_cache)
    engine.generate(other, 1, prefix_cache=prefix_cache)
    for right, wrong in zip(engine.block_hashes(prompt), engine.block_hashes(other), strict=True):
        prefix_cache.blocks[right] = prefix_cache.blocks[wrong]
    mixed_up = engine.generate(prompt, 60, stop_tokens=(), prefix_cache=prefix_cache)
    assert mixed_up.num_reused_tokens == 288
    assert mixed_up.tokens != cold.tokens


def test_values_that_are_not_finite_are_an_error(
    engine: Engine, prefix_cache: DictionaryPrefixCache, text_tokens: list[int]
) -> None:
    prompt = text_tokens[:_PROMPT_TOKENS]
    engine.generate(prompt, 1, prefix_cache=prefix_cache)
    damaged = prefix_cache.blocks[engine.block_hashes(prompt)[2]]
    damaged.view(np.float32)[100] = np.nan
    with pytest.raises(DamagedCacheError):
        engine.generate(prompt, 1, prefix_cache=prefix_cache)
    assert engine.allocator.num_free == engine.cache.num_blocks
