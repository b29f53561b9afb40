"""Bytes that transfers are checked by."""

import numpy as np
import pytest

from kvx_bench.transfer.pattern import CLEARED, Difference, Pattern

# Whole words, and not.
SIZES = [1, 7, 8, 4096, 5000]


def filled(block_bytes: int, iteration: int, batch: int = 5) -> np.ndarray:
    blocks = np.full((batch, block_bytes), 0xEE, np.uint8)
    Pattern(block_bytes, iteration).fill(blocks)
    return blocks


@pytest.mark.parametrize("size", SIZES)
def test_what_was_filled_is_found_right(size: int) -> None:
    assert Pattern(size, 3).first_difference(filled(size, 3)) is None
    assert not filled(size, CLEARED).any()


@pytest.mark.parametrize(("block", "offset"), [(0, 0), (4, 4095), (2, 17)])
def test_one_flipped_bit_is_named_with_its_place(block: int, offset: int) -> None:
    blocks = filled(4096, 9)
    expected = int(blocks[block, offset])
    blocks[block, offset] ^= 1
    found = Pattern(4096, 9).first_difference(blocks)
    assert found == Difference(block, offset, expected, expected ^ 1)
    assert str(found).startswith(f"block {block} has 0x{expected ^ 1:02x} at offset {offset},")


def test_every_block_and_iteration_has_other_bytes() -> None:
    rows = np.concatenate([filled(64, iteration, 300) for iteration in range(4)])
    assert len(np.unique(rows, axis=0)) == 4 * 300


def test_blocks_in_each_others_places_are_noticed() -> None:
    blocks = filled(64, 1)
    blocks[[1, 2]] = blocks[[2, 1]]
    found = Pattern(64, 1).first_difference(blocks)
    assert found is not None
    assert found.block == 1
    assert Pattern(64, 2).first_difference(filled(64, 1)) is not None
