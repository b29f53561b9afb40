"""The engine's operations agree with one another and refuse what they cannot do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from kvx_server.engine import BlocksExhausted, Engine, FinishReason, Sampling


def test_decode_continues_like_prefill(engine: Engine, text_tokens: list[int]) -> None:
    block_ids = engine.allocator.allocate(8)
    other_ids = engine.allocator.allocate(8)
    engine.prefill(text_tokens[:90], 0, block_ids)
    for position in range(90, 110):
        decoded = engine.decode(text_tokens[position], position, block_ids)
        prefilled = engine.prefill(text_tokens[: position + 1], 0, other_ids)
        np.testing.assert_allclose(decoded, prefilled, atol=1e-3)


def test_block_size_and_dtype_change_only_noise(
    load_engine: Callable[..., Engine], text_tokens: list[int]
) -> None:
    logits = []
    for block_tokens, kv_dtype in (
        (16, "float32"),
        (64, "float32"),
        (7, "float32"),
        (16, "float16"),
    ):
        engine = load_engine(num_blocks=300, block_tokens=block_tokens, kv_dtype=kv_dtype)
        block_ids = engine.allocator.allocate(engine.cache.num_blocks_for(500))
        logits.append(engine.prefill(text_tokens[:500], 0, block_ids))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-3)
    np.testing.assert_allclose(logits[2], logits[0], atol=1e-3)
    np.testing.assert_allclose(logits[3], logits[0], atol=0.1)


def test_progress_counts_tokens_in_the_cache(engine: Engine, text_tokens: list[int]) -> None:
    seen: list[int] = []
    engine.prefill(text_tokens[:50], 16, list(range(4)), on_progress=seen.append)
    assert seen == [32, 48, 50]


def test_block_hashes_are_chained(engine: Engine) -> None:
    tokens = list(range(40))
    first, second = engine.block_hashes(tokens)
    words = np.arange(40, dtype="<u4")
    assert first == hashlib.sha256(bytes(32) + words[:16].tobytes()).digest()
    assert second == hashlib.sha256(first + words[16:32].tobytes()).digest()
    assert engine.block_hashes(tokens[:32]) == [first, second]
    assert engine.block_hashes([9, *tokens[1:]])[1] != second
    assert engine.block_hashes(tokens[:15]) == []


def test_generate_reports_tokens_as_they_come(engine: Engine, text_tokens: list[int]) -> None:
    seen: list[int] = []
    result = engine.generate(text_tokens[:100], 10, stop_tokens=(), on_token=seen.append)
    assert tuple(seen) == result.tokens
    assert result.finish_reason is FinishReason.LENGTH
    assert (result.num_prompt_tokens, result.num_prefill_tokens) == (100, 100)
    assert 0 <= result.load_s < result.ttft_s
    assert result.decode_s > 0


def test_generate_stops_before_the_stop_token(engine: Engine, text_tokens: list[int]) -> None:
    free = engine.generate(text_tokens[:100], 20, stop_tokens=())
    stop = free.tokens[7]
    stopped = engine.generate(text_tokens[:100], 20, stop_tokens=[stop])
    assert stopped.tokens == free.tokens[: free.tokens.index(stop)]
    assert stopped.finish_reason is FinishReason.STOP


def test_generate_samples_from_a_seed(engine: Engine, text_tokens: list[int]) -> None:
    def sample(seed: int) -> tuple[int, ...]:
        sampling = Sampling(temperature=1.0, top_p=0.95, seed=seed)
        return engine.generate(text_tokens[:100], 30, sampling=sampling).tokens

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_generate_gives_blocks_back_when_it_fails(engine: Engine, text_tokens: list[int]) -> None:
    def fail(_token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(text_tokens[:100], 10, stop_tokens=(), on_token=fail)
    assert engine.allocator.num_free == 64


def test_generate_uses_the_whole_context(engine: Engine, text_tokens: list[int]) -> None:
    result = engine.generate(text_tokens[: engine.context_tokens - 3], 3, stop_tokens=())
    assert len(result.tokens) == 3
    with pytest.raises(ValueError, match="found 4 after a prompt of 1021"):
        engine.generate(text_tokens[: engine.context_tokens - 3], 4)


def test_generate_refuses(engine: Engine, text_tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        engine.generate(text_tokens[:10], 0)
    with pytest.raises(ValueError, match="1 to 1024 tokens"):
        engine.generate([], 5)
    engine.allocator.allocate(60)
    with pytest.raises(BlocksExhausted) as caught:
        engine.generate(text_tokens[:100], 10)
    assert (caught.value.needed, caught.value.available) == (7, 4)


def test_generate_refuses_a_prefix_cache_that_overstates(engine: Engine) -> None:
    class Liar:
        def load(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> int:
            del block_ids
            return len(hashes) + 1

        def save(self, hashes: Sequence[bytes], block_ids: Sequence[int]) -> None:
            raise NotImplementedError

    with pytest.raises(ValueError, match="filled 7 of 6 blocks"):
        engine.generate([1] * 100, 5, prefix_cache=Liar())


@pytest.mark.parametrize(
    ("tokens", "num_cached", "block_ids", "reason"),
    [
        ([], 0, [0], "1 to 1024 tokens"),
        ([1] * 1025, 0, list(range(64)), "1 to 1024 tokens"),
        ([258], 0, [0], "tokens are 0 to 257"),
        ([-1], 0, [0], "tokens are 0 to 257"),
        ([1] * 17, 0, [0], "do not cover"),
        ([1], 0, [64], "blocks are 0 to 63"),
        ([1], 0, [-1], "blocks are 0 to 63"),
        ([1], 2, [0], "2 cached tokens"),
        ([1], -1, [0], "-1 cached tokens"),
    ],
)
def test_prefill_refuses(
    engine: Engine, tokens: list[int], num_cached: int, block_ids: list[int], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        engine.prefill(tokens, num_cached, block_ids)


@pytest.mark.parametrize(
    ("token", "position", "block_ids"),
    [(300, 0, [0]), (1, 16, [0]), (1, -1, [0]), (1, 1024, list(range(65)))],
)
def test_decode_refuses(engine: Engine, token: int, position: int, block_ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"tokens|blocks"):
        engine.decode(token, position, block_ids)


def test_load_refuses(load_engine: Callable[..., Engine]) -> None:
    with pytest.raises(ValueError, match="step_blocks"):
        load_engine(num_blocks=4, step_blocks=0)
    with pytest.raises(ValueError, match="positive"):
        load_engine(num_blocks=4, block_tokens=0)
