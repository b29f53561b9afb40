"""Blocks hold what was stored in them, in bytes that can be moved."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kvx_server.engine.errors import BlocksExhausted
from kvx_server.engine.paged_cache import BlockAllocator, BlockShape, KvDtype, PagedKvCache

_SHAPE = BlockShape(num_layers=2, block_tokens=4, num_kv_heads=3, head_dim=2, kv_dtype="float32")


def _key_values(num_tokens: int, seed: int = 0) -> NDArray[np.float32]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((2, num_tokens, 3, 2)).astype(np.float32)


@pytest.mark.parametrize("kv_dtype", ["float32", "float16"])
@pytest.mark.parametrize("runs", [[11], [4, 4, 3], [1] * 11, [3, 5, 3]])
def test_context_is_what_was_stored(kv_dtype: KvDtype, runs: list[int]) -> None:
    shape = BlockShape(2, 4, 3, 2, kv_dtype)
    cache = PagedKvCache(shape, num_blocks=8)
    block_ids = [6, 1, 3]
    everything = _key_values(11)
    position = 0
    for run in runs:
        new = everything[:, position : position + run]
        context = cache.extend(1, block_ids, position, new, run)
        position += run
        expected = everything[:, :position].astype(kv_dtype).astype(np.float32)
        np.testing.assert_array_equal(context, expected)
    assert not cache.blocks[:, 0].any(), "the other layer is untouched"
    assert not cache.blocks[[0, 2, 4, 5, 7]].any(), "other blocks are untouched"


def test_padding_is_returned_and_not_stored() -> None:
    cache = PagedKvCache(_SHAPE, num_blocks=2)
    new = _key_values(8)
    context = cache.extend(0, [1], 0, new, 3)
    np.testing.assert_array_equal(context, new)
    assert not cache.blocks[0].any()
    assert not cache.blocks[1, :, :, 3:].any()


def test_block_is_one_run_of_bytes_in_given_storage() -> None:
    block_bytes = _SHAPE.block_bytes
    assert block_bytes == 2 * 2 * 4 * 3 * 2 * 4
    storage = np.zeros(3 * block_bytes + 5, dtype=np.uint8)
    cache = PagedKvCache(_SHAPE, num_blocks=3, storage=storage)
    cache.extend(0, [2], 0, _key_values(4), 4)
    assert cache.block_bytes_view.shape == (3, block_bytes)
    assert np.shares_memory(storage, cache.block_bytes_view)
    assert storage[2 * block_bytes : 3 * block_bytes].tobytes() == cache.blocks[2].tobytes()
    # Bytes moved to another block are the same keys and values there.
    cache.block_bytes_view[0] = cache.block_bytes_view[2]
    context = cache.extend(0, [0, 1], 4, _key_values(1, seed=1), 1)
    np.testing.assert_array_equal(context[:, :4], _key_values(4))


@pytest.mark.parametrize(
    "storage",
    [
        np.zeros(10, dtype=np.uint8),
        np.zeros(1000, dtype=np.int8),
        np.zeros((10, 100), dtype=np.uint8),
        np.zeros(2000, dtype=np.uint8)[::2],
        np.zeros(1001, dtype=np.uint8)[1:],
        np.frombuffer(bytes(1000), dtype=np.uint8),
    ],
    ids=["short", "int8", "2d", "strided", "unaligned", "read-only"],
)
def test_refuses_storage(storage: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="storage must"):
        PagedKvCache(_SHAPE, num_blocks=2, storage=storage)


def test_refuses_bad_shape() -> None:
    with pytest.raises(ValueError, match="positive"):
        BlockShape(2, 0, 3, 2, "float32")
    with pytest.raises(ValueError, match="kv_dtype"):
        BlockShape(2, 4, 3, 2, "int8")
    with pytest.raises(ValueError, match="num_blocks"):
        PagedKvCache(_SHAPE, num_blocks=0)


def test_allocator_against_a_set() -> None:
    generator = np.random.default_rng(0)
    allocator = BlockAllocator(20)
    held: list[int] = []
    for _ in range(500):
        if generator.random() < 0.5:
            count = int(generator.integers(0, 6))
            if count > allocator.num_free:
                with pytest.raises(BlocksExhausted) as caught:
                    allocator.allocate(count)
                assert (caught.value.needed, caught.value.available) == (count, 20 - len(held))
                continue
            held += allocator.allocate(count)
        else:
            generator.shuffle(held)
            count = int(generator.integers(0, len(held) + 1))
            allocator.free(held[:count])
            held = held[count:]
        assert len(set(held)) == len(held)
        assert allocator.num_free == 20 - len(held)


@pytest.mark.parametrize("wrong", [[0, 0], [3], [-1], [4]])
def test_allocator_refuses(wrong: list[int]) -> None:
    allocator = BlockAllocator(4)
    assert allocator.allocate(3) == [0, 1, 2]
    with pytest.raises(ValueError, match="block"):
        allocator.free(wrong)
    assert allocator.num_free == 1
