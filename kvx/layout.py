"""How a block lies in an engine's memory, and views of that memory by block number.

The canonical form of a block is its planes' runs one after the other; tiers hold nothing else. A
plane is one (base, stride, bytes) run: block `b` of it lies at ``base + b * stride``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from kvx.buffers import Buffer, describe
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

Order = Literal["opaque", "block_first", "layer_first", "planes"]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of a block; compare by value.

    Attributes:
        order: ``block_first``: a block is one run. ``layer_first``: one run for every layer's keys
            and one for its values. ``opaque``: one run of bytes that kvx knows nothing about.
            ``planes``: several such runs, each of its own size.
        block_bytes: Canonical bytes of a block.
        num_layers: Layers of this rank; 0 when opaque.
        num_kv_heads: KV heads of this rank; 0 when opaque.
        head_dim: Elements of a head; 0 when opaque.
        block_tokens: Tokens of a block; 0 when opaque.
        item_bytes: Bytes of an element; 0 when opaque.
        plane_sizes: Bytes of each run, where they are told one by one.
    """

    order: Order
    block_bytes: int
    num_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    block_tokens: int = 0
    item_bytes: int = 0
    plane_sizes: tuple[int, ...] = ()

    @classmethod
    def opaque(cls, block_bytes: int) -> Self:
        """Return the layout of blocks that are plain runs of bytes."""
        return cls("opaque", block_bytes)

    @classmethod
    def of_planes(cls, sizes: Sequence[int]) -> Self:
        """Return the layout of blocks that lie in runs of these many bytes, in this order.

        Raises:
            UsageError: There is none, or one is not positive.
        """
        if not sizes or min(sizes) < 1:
            raise UsageError(f"planes need positive sizes, not {tuple(sizes)}")
        return cls("planes", sum(sizes), plane_sizes=tuple(sizes))

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
        return len(self.bytes_of_planes)

    @property
    def bytes_of_planes(self) -> tuple[int, ...]:
        """Bytes of each run."""
        if self.order == "planes":
            return self.plane_sizes
        count = 2 * self.num_layers if self.order == "layer_first" else 1
        return (self.block_bytes // count,) * count

    @property
    def fingerprint(self) -> str:
        """What goes into a namespace, so that layouts never mix."""
        facts = "|".join(str(getattr(self, name)) for name in _FINGERPRINTED)
        facts += "".join(f"|{size}" for size in self.plane_sizes)
        return hashlib.blake2b(facts.encode(), digest_size=8, person=b"kvx layout 1").hexdigest()


class BlockView:
    """An engine's paged KV cache, block by block. Keeps the memory alive; copies nothing.

    Attributes:
        layout: How a block lies in it.
        num_blocks: Blocks that every plane has.
        planes: (P, 3) int64 rows of base address, stride and bytes.
        kind: Where it lies: all planes in host memory, or all on one device.
        device_ordinal: Number of that device; -1 for host memory.
        is_writable: Whether blocks may be onboarded to it.
    """

    def __init__(self, layout: KVLayout, planes: Sequence[object]) -> None:
        """View planes of an engine's memory.

        Args:
            layout: How a block lies in them.
            planes: `layout.num_planes` buffers, each (num_blocks, ...) of any dtype, the bytes of
                its plane a row; rows are contiguous, the stride between them may be larger. NumPy
                arrays, PyTorch tensors, and whatever `kvx.buffers.describe` reads. Keys and values
                alternate layer by layer when layer-first; there a layer may also be one
                (2, num_blocks, ...) buffer, or a pair of buffers.

        Raises:
            UsageError: Number, shape, strides or place of the planes do not fit.
        """
        self.layout = layout
        self._planes = [
            _checked(plane, size)
            for plane, size in zip(_flat(layout, planes), layout.bytes_of_planes, strict=True)
        ]
        places = {(plane.kind, plane.device_ordinal) for plane in self._planes}
        if len(places) > 1:
            raise UsageError(f"planes must lie on one device, not on {sorted(places)}")
        self.kind, self.device_ordinal = places.pop()
        self.is_writable = all(plane.is_writable for plane in self._planes)
        self.num_blocks = min(plane.shape[0] for plane in self._planes)
        self.planes = np.array(
            [(plane.address, plane.strides_bytes[0], plane.row_bytes) for plane in self._planes],
            np.int64,
        )
        # Looked at once, since an engine makes a view once and selects from it for ever.
        self._overlapping = _overlapping(self.planes, self.num_blocks)

    @classmethod
    def of_blocks(cls, blocks: object) -> Self:
        """View an (n, ...) buffer of any dtype, a block a row, whose rows are contiguous.

        Raises:
            UsageError: It is no buffer, or has another shape.
        """
        found = _described(blocks, "blocks")
        return cls(KVLayout.opaque(found.row_bytes), [found])

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


def _flat(layout: KVLayout, planes: Sequence[object]) -> list[object]:
    """Return one entry a plane, where a layer may have given its two as one."""
    given = list(planes)
    is_by_layer = layout.order == "layer_first" and len(given) == layout.num_layers
    found = [one for layer in given for one in _halves(layer)] if is_by_layer else given
    if len(found) != layout.num_planes:
        by_layer = f" (or {layout.num_layers} pairs)" if layout.order == "layer_first" else ""
        raise UsageError(
            f"{layout.num_planes} planes{by_layer} are needed, {len(given)} were given"
        )
    return found


def _halves(layer: object) -> Sequence[object]:
    if isinstance(layer, tuple | list):
        return layer
    both = describe(layer)
    is_pair = len(both.shape) > 2 and both.shape[0] == 2  # noqa: PLR2004
    return [both.part(0), both.part(1)] if is_pair else [layer]


def _checked(plane: object, plane_bytes: int) -> Buffer:
    found = _described(plane, "a plane")
    if found.row_bytes != plane_bytes:
        raise UsageError(f"a plane has {found.row_bytes} bytes a block, {plane_bytes} are needed")
    if found.shape[0] == 1:  # its stride means nothing, and producers put anything there
        found = replace(found, strides_bytes=(plane_bytes, *found.strides_bytes[1:]))
    if not found.has_contiguous_rows or found.strides_bytes[0] < plane_bytes:
        raise UsageError(
            f"the rows of a plane must be contiguous; its strides are {found.strides_bytes} bytes"
        )
    return found


def _described(memory: object, name: str) -> Buffer:
    found = describe(memory)
    if len(found.shape) < 2:  # noqa: PLR2004
        raise UsageError(
            f"{name} must be a (num_blocks, ...) buffer such as (n, bytes) uint8, not "
            f"{type(memory).__name__} of shape {found.shape}"
        )
    return found
