"""The KV cache: one array of fixed-size blocks, and who owns which block.

    blocks: (num_blocks, num_layers, 2, block_tokens, num_kv_heads, head_dim), C-contiguous
                                     ^ keys at 0, values at 1

A block holds the keys and values of `block_tokens` consecutive tokens for all layers, so it is one
contiguous run of bytes and can be moved elsewhere and back with one copy. A sequence is a list of
block ids, its block table: token p lies in block `block_ids[p // block_tokens]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvx_server.engine.errors import BlocksExhausted

KvDtype: TypeAlias = Literal["float32", "float16"]
_ACCEPTED_DTYPES = ("float32", "float16")


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What one block holds."""

    num_layers: int
    block_tokens: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: KvDtype

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: A size is not positive or the dtype is not accepted.
        """
        if min(self.dimensions) < 1:
            message = f"every size of a block must be positive, found {self.dimensions}"
            raise ValueError(message)
        if self.kv_dtype not in _ACCEPTED_DTYPES:
            message = f"kv_dtype must be one of {_ACCEPTED_DTYPES}, found {self.kv_dtype!r}"
            raise ValueError(message)

    @property
    def dimensions(self) -> tuple[int, int, int, int, int]:
        """(num_layers, 2, block_tokens, num_kv_heads, head_dim)."""
        return (self.num_layers, 2, self.block_tokens, self.num_kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return math.prod(self.dimensions) * np.dtype(self.kv_dtype).itemsize


class PagedKvCache:
    """Keys and values of many sequences in blocks of one array; not thread-safe.

    Attributes:
        shape: What one block holds.
        blocks: The array drawn above.
        block_bytes_view: (num_blocks, block_bytes) uint8, the same memory.
    """

    def __init__(
        self, shape: BlockShape, num_blocks: int, *, storage: NDArray[np.uint8] | None = None
    ) -> None:
        """Lay blocks over the given memory, or over zeroed memory of its own.

        Args:
            shape: What one block holds.
            num_blocks: How many blocks.
            storage: (at least num_blocks * block_bytes,) uint8, contiguous and writable, aligned
                to the element; memory shared with other processes or registered for transfers.

        Raises:
            ValueError: There is no block, or the storage does not fit.
        """
        if num_blocks < 1:
            message = f"num_blocks must be at least 1, found {num_blocks}"
            raise ValueError(message)
        needed_bytes = num_blocks * shape.block_bytes
        memory = np.zeros(needed_bytes, dtype=np.uint8) if storage is None else storage
        _check_storage(memory, needed_bytes, np.dtype(shape.kv_dtype).alignment)
        self.shape = shape
        self.block_bytes_view: NDArray[np.uint8] = memory[:needed_bytes].reshape(num_blocks, -1)
        self.blocks: NDArray[np.floating] = self.block_bytes_view.view(shape.kv_dtype).reshape(
            num_blocks, *shape.dimensions
        )

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks a sequence of `num_tokens` tokens takes."""
        return -(-num_tokens // self.shape.block_tokens)

    def extend(
        self,
        layer: int,
        block_ids: Sequence[int],
        position: int,
        key_values: NDArray[np.float32],
        num_stored: int,
    ) -> NDArray[np.float32]:
        """Store new keys and values of one layer and return all that these tokens attend to.

        New values are returned as the cache rounds them, so it makes no difference later whether a
        token was computed in this call or lies in a block that was filled by someone else.

        Args:
            layer: Which layer.
            block_ids: Block table of the sequence; covers `position + num_stored` tokens.
            position: Absolute position of the first new token.
            key_values: (2, num_new, num_kv_heads, head_dim) float32.
            num_stored: How many of the new tokens are real; the rest pads and is not stored.

        Returns:
            (2, position + num_new, num_kv_heads, head_dim) float32.
        """
        block_tokens = self.shape.block_tokens
        rounded = key_values.astype(self.blocks.dtype)
        positions = np.arange(position, position + num_stored)
        owners = np.asarray(block_ids)[positions // block_tokens]
        offsets = positions % block_tokens
        for half in (0, 1):
            self.blocks[owners, layer, half, offsets] = rounded[half, :num_stored]
        context = np.empty((2, position + rounded.shape[1], *rounded.shape[2:]), dtype=np.float32)
        context[:, position:] = rounded
        self._gather(layer, block_ids, context[:, :position])
        return context

    def _gather(self, layer: int, block_ids: Sequence[int], target: NDArray[np.float32]) -> None:
        block_tokens = self.shape.block_tokens
        num_full, num_rest = divmod(target.shape[1], block_tokens)
        if num_full:
            full = target[:, : num_full * block_tokens]
            full = full.reshape(2, num_full, block_tokens, *target.shape[2:])
            full[:] = self.blocks[list(block_ids[:num_full]), layer].swapaxes(0, 1)
        if num_rest:
            rest = self.blocks[block_ids[num_full], layer, :, :num_rest]
            target[:, num_full * block_tokens :] = rest


class BlockAllocator:
    """Hands out block ids, each to one owner at a time; not thread-safe."""

    def __init__(self, num_blocks: int) -> None:
        """Start with every block free."""
        # The last id is handed out first, so the list is kept in falling order.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = [True] * num_blocks

    @property
    def num_free(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; their content is whatever was there before.

        Raises:
            BlocksExhausted: Fewer are free; none was taken.
        """
        if count > len(self._free):
            raise BlocksExhausted(needed=count, available=len(self._free))
        taken = [self._free.pop() for _ in range(count)]
        for block_id in taken:
            self._is_free[block_id] = False
        return taken

    def free(self, block_ids: Sequence[int]) -> None:
        """Give blocks back.

        Raises:
            ValueError: A block is unknown, already free or given twice; none was taken back.
        """
        unique = set(block_ids)
        if len(unique) != len(block_ids):
            message = f"a block was given back twice in {list(block_ids)}"
            raise ValueError(message)
        for block_id in unique:
            if not 0 <= block_id < len(self._is_free) or self._is_free[block_id]:
                message = f"block {block_id} was not allocated"
                raise ValueError(message)
        for block_id in block_ids:
            self._is_free[block_id] = True
        self._free.extend(reversed(block_ids))


def _check_storage(memory: NDArray[np.uint8], needed_bytes: int, alignment: int) -> None:
    if memory.dtype != np.uint8 or memory.ndim != 1 or memory.size < needed_bytes:
        message = (
            f"storage must be one-dimensional uint8 of at least {needed_bytes} bytes, "
            f"found {memory.dtype} {memory.shape}"
        )
        raise ValueError(message)
    if not (memory.flags.c_contiguous and memory.flags.writeable):
        message = "storage must be contiguous and writable"
        raise ValueError(message)
    if memory.ctypes.data % alignment:
        message = f"storage must start at a multiple of {alignment} bytes"
        raise ValueError(message)
