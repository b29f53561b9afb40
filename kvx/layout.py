"""How a block lies in an engine's memory, and views of that memory by block number.

The canonical form of a block is its planes' runs one after the other; tiers hold nothing else. A
plane is one (base, stride, bytes) run: block `b` of it lies at ``base + b * stride``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from kvx.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

# In this order for good: another order or another name would empty every cache on disk.
_FINGERPRINTED = (
    "order",
    "block_bytes",
    "num_layers",
    "num_kv_heads",
    "head_dim",
    "block_tokens",
    "item_bytes",
)

Order = Literal["opaque", "block_first", "layer_first"]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of a block; compare by value.

    Attributes:
        order: ``block_first``: a block is one run. ``layer_first``: one run for every layer's keys
            and one for its values. ``opaque``: one run of bytes that kvx knows nothing about.
        block_bytes: Canonical bytes of a block.
        num_layers: Layers of this rank; 0 when opaque.
        num_kv_heads: KV heads of this rank; 0 when opaque.
        head_dim: Elements of a head; 0 when opaque.
        block_tokens: Tokens of a block; 0 when opaque.
        item_bytes: Bytes of an element; 0 when opaque.
    """

    order: Order
    block_bytes: int
    num_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    block_tokens: int = 0
    item_bytes: int = 0

    @classmethod
    def opaque(cls, block_bytes: int) -> Self:
        """Return the layout of blocks that are plain runs of bytes."""
        return cls("opaque", block_bytes)

    @classmethod
    def of_model(
        cls,
        order: Order,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        block_tokens: int,
        item_bytes: int,
    ) -> Self:
        """Return the layout of a model's blocks.

        Raises:
            UsageError: A number is not positive.
        """
        numbers = (num_layers, num_kv_heads, head_dim, block_tokens, item_bytes)
        if min(numbers) < 1:
            raise UsageError(f"the numbers of a layout must be positive, not {numbers}")
        block_bytes = 2 * num_layers * num_kv_heads * head_dim * block_tokens * item_bytes
        return cls(order, block_bytes, *numbers)

    @property
    def num_planes(self) -> int:
        """Number of runs a block lies in."""
        return 2 * self.num_layers if self.order == "layer_first" else 1

    @property
    def plane_bytes(self) -> int:
        """Bytes of one run."""
        return self.block_bytes // self.num_planes

    @property
    def fingerprint(self) -> str:
        """What goes into a namespace, so that layouts never mix."""
        facts = "|".join(str(getattr(self, name)) for name in _FINGERPRINTED)
        return hashlib.blake2b(facts.encode(), digest_size=8, person=b"kvx layout 1").hexdigest()


class BlockView:
    """An engine's paged KV cache, block by block. Keeps the memory alive; copies nothing."""

    def __init__(self, layout: KVLayout, planes: Sequence[npt.NDArray[np.uint8]]) -> None:
        """View planes of host memory.

        Args:
            layout: How a block lies in them.
            planes: `layout.num_planes` arrays, each (num_blocks, plane bytes) uint8 whose rows are
                contiguous; the stride between rows may be larger. Keys and values alternate layer
                by layer when layer-first.

        Raises:
            UsageError: Number, shape, dtype or strides do not fit the layout.
        """
        if len(planes) != layout.num_planes:
            raise UsageError(f"{layout.num_planes} planes are needed, {len(planes)} were given")
        self.layout = layout
        self._planes = [_checked(plane, layout.plane_bytes) for plane in planes]
        self.num_blocks = min(len(plane) for plane in self._planes)
        self.planes = np.array(
            [(plane.ctypes.data, plane.strides[0], layout.plane_bytes) for plane in self._planes],
            np.int64,
        )
        # Looked at once, since an engine makes a view once and selects from it for ever.
        self._overlapping = _overlapping(self.planes, self.num_blocks)

    @classmethod
    def of_blocks(cls, blocks: npt.NDArray[np.uint8]) -> Self:
        """View an (n, block_bytes) uint8 array whose rows are contiguous.

        Raises:
            UsageError: It has another shape or dtype.
        """
        if not isinstance(blocks, np.ndarray) or blocks.ndim != 2:  # noqa: PLR2004
            raise UsageError(
                f"blocks must be an (n, block_bytes) uint8 array, not {_shown(blocks)}"
            )
        return cls(KVLayout.opaque(blocks.shape[1]), [blocks])

    def slots(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> BlockSelection:
        """Select blocks by number, in the order given.

        Raises:
            UsageError: A number is not one of a block.
        """
        numbers = np.array(ids)  # a copy: the selection outlives what the caller does to `ids`
        if numbers.ndim != 1:
            raise UsageError(f"block ids must be one-dimensional, not {numbers.shape}")
        if len(numbers) and numbers.dtype.kind not in "iu":
            raise UsageError(f"block ids must be whole numbers, not {numbers.dtype}")
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.num_blocks:
            raise UsageError(
                f"block ids {numbers.min()} to {numbers.max()}; there are {self.num_blocks} blocks"
            )
        return BlockSelection(self, numbers.astype(np.int64))

    @property
    def is_writable(self) -> bool:
        """Whether blocks may be onboarded to it."""
        return all(plane.flags.writeable for plane in self._planes)

    @property
    def overlapping(self) -> tuple[int, int] | None:
        """Two planes that share bytes; None where none do."""
        return self._overlapping


@dataclass(frozen=True, slots=True)
class BlockSelection:
    """Blocks of a view, as source or target of a transfer; made by `BlockView.slots`.

    Attributes:
        view: Where they lie.
        ids: (n,) int64 block numbers.
    """

    view: BlockView
    ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.ids)

    def only(self, rows: npt.NDArray[np.int64]) -> BlockSelection:
        """Return the blocks at these places of the selection."""
        return BlockSelection(self.view, self.ids[rows])

    @property
    def planes(self) -> npt.NDArray[np.int64]:
        """(P, 3) int64 rows of base address, stride and bytes."""
        return self.view.planes

    @property
    def block_bytes(self) -> int:
        """Canonical bytes of one block."""
        return self.view.layout.block_bytes

    def check_writable(self) -> None:
        """Refuse what cannot be a target.

        Raises:
            UsageError: The memory is read-only, planes share bytes, or a block stands in the
                selection twice.
        """
        if not self.view.is_writable:
            raise UsageError("the target is read-only; pass writable memory")
        if self.view.overlapping is not None:
            one, other = self.view.overlapping
            raise UsageError(f"planes {one} and {other} of the target share bytes")
        is_ascending = bool((self.ids[1:] > self.ids[:-1]).all())
        if not is_ascending and len(np.unique(self.ids)) != len(self.ids):
            raise UsageError("a target block is named twice; each may be written once")


def _overlapping(planes: npt.NDArray[np.int64], num_blocks: int) -> tuple[int, int] | None:
    if not num_blocks:
        return None
    bases, strides, sizes = planes.T
    order = np.argsort(bases)
    ends = bases + strides * (num_blocks - 1) + sizes
    if (ends[order][:-1] <= bases[order][1:]).all():
        return None
    # Extents that cross need not share bytes: layers lie side by side within each block of one
    # allocation. Only then is every run looked at.
    starts = (bases[:, None] + strides[:, None] * np.arange(num_blocks)).ravel()
    by_start = np.argsort(starts, kind="stable")
    stops = starts + np.repeat(sizes, num_blocks)
    crossed = stops[by_start][:-1] > starts[by_start][1:]
    if not crossed.any():
        return None
    one, other = by_start[int(np.argmax(crossed)) :][:2] // num_blocks
    return int(one), int(other)


def _checked(plane: npt.NDArray[np.uint8], plane_bytes: int) -> npt.NDArray[np.uint8]:
    if not isinstance(plane, np.ndarray) or plane.dtype != np.uint8 or plane.ndim != 2:  # noqa: PLR2004
        raise UsageError(f"a plane must be a (num_blocks, bytes) uint8 array, not {_shown(plane)}")
    if plane.shape[1] != plane_bytes:
        raise UsageError(f"a plane has {plane.shape[1]} bytes a block, {plane_bytes} are needed")
    if plane.strides[1] != 1 or plane.strides[0] < plane_bytes:
        raise UsageError(f"the rows of a plane must be contiguous; its strides are {plane.strides}")
    return plane


def _shown(value: object) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return type(value).__name__ if shape is None else f"{shape} {dtype}"
