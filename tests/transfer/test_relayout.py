"""Arguments and round trips; the bits are held against the kernels in tests/kernels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvx.errors import UsageError
from kvx.transfer import relayout

BLOCKS = np.arange(2 * 3 * 4 * 8, dtype=np.float32).reshape(2, 3, 4, 8)
FP8, SCALES = relayout.quantise_fp8(BLOCKS)


def test_axes_move_where_they_should() -> None:
    permuted = relayout.permute_tokens_heads(BLOCKS)
    assert permuted.shape == (2, 4, 3, 8)
    assert permuted[1, 2, 0, 5] == BLOCKS[1, 0, 2, 5]
    assert permuted.flags.c_contiguous
    layers = np.arange(3 * 2 * 5 * 7).reshape(3, 2, 5, 7)
    blocks = relayout.to_block_first(layers)
    assert blocks.shape == (5, 3, 2, 7)
    assert blocks[4, 1, 0, 6] == layers[1, 0, 4, 6]
    assert blocks.flags.c_contiguous
    np.testing.assert_array_equal(relayout.to_layer_first(blocks), layers)


def test_each_rank_gets_neighbouring_heads() -> None:
    first, second = relayout.split_heads(BLOCKS, 2)
    np.testing.assert_array_equal(first, BLOCKS[:, :, :2])
    np.testing.assert_array_equal(second, BLOCKS[:, :, 2:])
    np.testing.assert_array_equal(relayout.merge_heads([first, second]), BLOCKS)
    heads_first = relayout.permute_tokens_heads(BLOCKS)
    parts = relayout.split_heads(heads_first, 4, order="HND")
    np.testing.assert_array_equal(parts[3], heads_first[:, 3:])
    np.testing.assert_array_equal(relayout.merge_heads(parts, order="HND"), heads_first)


def test_a_scale_belongs_to_a_block_and_head() -> None:
    values = np.zeros((2, 3, 4, 8), np.float16)
    values[1, 2, 3, 4] = -224
    values[1, 0, 3, 0] = 112
    items, scales = relayout.quantise_fp8(values)
    expected = np.ones((2, 4), np.float32)
    expected[1, 3] = 0.5
    np.testing.assert_array_equal(scales, expected)
    assert items[1, 2, 3, 4] == 0xFE  # -448
    np.testing.assert_array_equal(relayout.dequantise_fp8(items, scales, kind="float16"), values)
    turned = relayout.quantise_fp8(relayout.permute_tokens_heads(values), order="HND")
    np.testing.assert_array_equal(turned[1], scales)
    np.testing.assert_array_equal(turned[0], relayout.permute_tokens_heads(items))


def test_more_axes_are_more_blocks() -> None:
    values = BLOCKS.reshape(1, 2, 3, 4, 8)
    items, scales = relayout.quantise_fp8(values)
    np.testing.assert_array_equal(items[0], FP8)
    np.testing.assert_array_equal(scales[0], SCALES)
    empty = relayout.quantise_fp8(BLOCKS[:0])
    assert empty[0].shape == (0, 3, 4, 8)
    assert empty[1].shape == (0, 4)
    no_tokens = relayout.quantise_fp8(BLOCKS[:, :0])
    np.testing.assert_array_equal(no_tokens[1], np.ones((2, 4), np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint16, np.uint8])
def test_poison_is_not_a_number(dtype: type) -> None:
    memory = np.zeros((3, 5), dtype)
    relayout.poison(memory)
    assert set(memory.tobytes()) == {0xFF}
    assert dtype in {np.uint16, np.uint8} or np.isnan(memory).all()


def read_only() -> np.ndarray:
    memory = np.zeros(8)
    memory.flags.writeable = False
    return memory


@pytest.mark.parametrize(
    "call",
    [
        lambda: relayout.permute_tokens_heads(BLOCKS[0, 0]),
        lambda: relayout.to_block_first(BLOCKS[0, 0]),
        lambda: relayout.to_layer_first(BLOCKS[0, 0]),
        lambda: relayout.split_heads(BLOCKS, 3),
        lambda: relayout.split_heads(BLOCKS, 0),
        lambda: relayout.split_heads(BLOCKS, 2, order="DHN"),
        lambda: relayout.merge_heads([]),
        lambda: relayout.merge_heads([BLOCKS, BLOCKS[:1]]),
        lambda: relayout.merge_heads([BLOCKS, BLOCKS.astype(np.float16)]),
        lambda: relayout.quantise_fp8(BLOCKS.astype(np.float64)),
        lambda: relayout.quantise_fp8(BLOCKS, order="nhd"),
        lambda: relayout.dequantise_fp8(FP8, SCALES, kind="float64"),
        lambda: relayout.dequantise_fp8(FP8, SCALES[:, :3], kind="float32"),
        lambda: relayout.dequantise_fp8(FP8, SCALES.astype(float), kind="float32"),
        lambda: relayout.dequantise_fp8(FP8.view(np.int8), SCALES, kind="float32"),
        lambda: relayout.poison(np.zeros((4, 4))[:, :2]),
        lambda: relayout.poison(read_only()),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        call()
