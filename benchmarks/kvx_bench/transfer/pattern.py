"""Bytes to check transfers by: every block has its own, and others in every iteration."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_WORD_BYTES = 8
_SEED = 2026
# Odd, so that no two blocks and iterations below 2**32 are given the same words.
_STEP = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
CLEARED = -1


@dataclass(frozen=True, slots=True)
class Difference:
    """The first byte that is not what it should be.

    Attributes:
        block: Where.
        offset: In the block.
        expected: What should be there.
        found: What is there.
    """

    block: int
    offset: int
    expected: int
    found: int

    def __str__(self) -> str:
        """Say it all."""
        return (
            f"block {self.block} has 0x{self.found:02x} at offset {self.offset}, where "
            f"0x{self.expected:02x} was sent"
        )

    def plain(self) -> dict[str, Any]:
        """Return it as JSON can carry it."""
        return asdict(self)


class Pattern:
    """What blocks of one size hold in one iteration."""

    def __init__(self, block_bytes: int, iteration: int) -> None:
        """Iteration `CLEARED` is zeros: what a target holds before anything came."""
        words = -(-block_bytes // _WORD_BYTES)
        self._base = np.random.default_rng(_SEED).integers(0, 1 << 64, words, dtype=np.uint64)
        self._iteration = iteration
        self._block_bytes = block_bytes

    def block(self, number: int) -> npt.NDArray[np.uint8]:
        """Return (block_bytes,) uint8 of a block."""
        if self._iteration == CLEARED:
            return np.zeros(self._block_bytes, np.uint8)
        step = np.uint64((((self._iteration << 32) + number) * _STEP) & _MASK)
        return (self._base + step).view(np.uint8)[: self._block_bytes]

    def fill(self, blocks: npt.NDArray[np.uint8]) -> None:
        """Write (n, block_bytes) uint8."""
        for number, block in enumerate(blocks):
            block[:] = self.block(number)

    def first_difference(self, blocks: npt.NDArray[np.uint8]) -> Difference | None:
        """Return where (n, block_bytes) uint8 are not as `fill` leaves them; None: nowhere."""
        for number, block in enumerate(blocks):
            expected = self.block(number)
            if not np.array_equal(block, expected):
                offset = int(np.flatnonzero(block != expected)[0])
                return Difference(number, offset, int(expected[offset]), int(block[offset]))
        return None
