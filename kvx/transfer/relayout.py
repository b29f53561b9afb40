"""Blocks rearranged and quantised on the CPU, in NumPy.

What the GPU's kernels do, bit for bit, and what runs where there is no GPU. Every function returns
new contiguous arrays and leaves its arguments alone, but for `poison`. All may block for as long as
a pass over the bytes takes, and are safe to call from several threads.

Orders of a block's last axes are named as engines name them: ``NHD`` is (tokens, heads, head_dim),
``HND`` is (heads, tokens, head_dim).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvx.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

HeadOrder = Literal["NHD", "HND"]
WideKind = Literal["float16", "bfloat16", "float32"]

FP8_MAX = 448.0
"""The largest finite value of e4m3fn."""

POISON = 0xFF
"""A byte that repeated is not-a-number in every float format of a KV cache."""

# The smallest normal float32. A subnormal scale has lost bits, and is zero to a CPU that flushes.
_SCALE_MIN = np.float32(2.0**-126)

_SIGN = np.uint32(0x8000_0000)
_INFINITY = np.uint32(0x7F80_0000)  # above it, without the sign, lies not-a-number
_QUIET_NAN = np.uint32(0x7FC0_0000)
# The largest finite value of each format, as the bits of a float32.
_WIDE_MAX = {"float16": 0x477F_E000, "bfloat16": 0x7F7F_0000, "float32": 0x7F7F_FFFF}
_BLOCK_DIMS = 3


def permute_tokens_heads(blocks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Turn NHD into HND, or HND into NHD.

    Args:
        blocks: (..., tokens, heads, head_dim) or (..., heads, tokens, head_dim), any dtype, host.

    Returns:
        The same with the two axes exchanged.

    Raises:
        UsageError: There are fewer than three axes.
    """
    _check_dims(blocks)
    return np.ascontiguousarray(blocks.swapaxes(-3, -2))


def to_block_first(layers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Bring all layers of a block together.

    Args:
        layers: (num_layers, 2, num_blocks, ...) any dtype, host: keys and values of each layer.

    Returns:
        (num_blocks, num_layers, 2, ...).

    Raises:
        UsageError: There are fewer than three axes.
    """
    _check_dims(layers)
    return np.ascontiguousarray(np.moveaxis(layers, 2, 0))


def to_layer_first(blocks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Bring all blocks of a layer together; undoes `to_block_first`.

    Args:
        blocks: (num_blocks, num_layers, 2, ...) any dtype, host.

    Returns:
        (num_layers, 2, num_blocks, ...).

    Raises:
        UsageError: There are fewer than three axes.
    """
    _check_dims(blocks)
    return np.ascontiguousarray(np.moveaxis(blocks, 0, 2))


def split_heads(
    blocks: npt.NDArray[Any], parts: int, *, order: HeadOrder = "NHD"
) -> list[npt.NDArray[Any]]:
    """Split the blocks of one rank into those of `parts` ranks, each with its share of the heads.

    Args:
        blocks: (..., tokens, heads, head_dim) if NHD, (..., heads, tokens, head_dim) if HND; any
            dtype, host.
        parts: Ranks to split into; divides the number of heads.
        order: Which of the two it is.

    Returns:
        `parts` arrays of the same shape but for heads / parts heads, in the order of the ranks.

    Raises:
        UsageError: The heads cannot be split evenly, or there are fewer than three axes.
    """
    _check_dims(blocks)
    axis = _head_axis(order)
    heads = blocks.shape[axis]
    if parts < 1 or heads % parts:
        raise UsageError(f"{heads} heads cannot be split among {parts} ranks evenly")
    return [np.ascontiguousarray(part) for part in np.split(blocks, parts, axis=axis)]


def merge_heads(parts: Sequence[npt.NDArray[Any]], *, order: HeadOrder = "NHD") -> npt.NDArray[Any]:
    """Merge the blocks of several ranks into those of one; undoes `split_heads`.

    Args:
        parts: Arrays of one shape and dtype, in the order of the ranks, host.
        order: Order of their axes.

    Returns:
        One array with the heads of all.

    Raises:
        UsageError: There are none, their shapes or dtypes differ, or they have fewer than three
            axes.
    """
    if len({(part.shape, part.dtype) for part in parts}) != 1:
        raise UsageError("parts must be at least one and agree in shape and dtype")
    _check_dims(parts[0])
    return np.ascontiguousarray(np.concatenate(parts, axis=_head_axis(order)))


def quantise_fp8(
    values: npt.NDArray[Any], *, order: HeadOrder = "NHD"
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Quantise blocks to FP8 (e4m3fn) with one scale for each block and head.

    The scale is the largest finite magnitude / 448, at least the smallest normal float32, and 1
    where all is zero. A value is divided by it and rounded to the nearest, ties to even; what is
    beyond 448, infinity among it, becomes 448. Not-a-number stays that, with its sign.

    Args:
        values: (..., tokens, heads, head_dim) if NHD, (..., heads, tokens, head_dim) if HND, host;
            float16, float32, or uint16 holding the bits of bfloat16. The leading axes are blocks:
            keys and values get scales of their own where an axis tells them apart.
        order: Which of the two it is.

    Returns:
        uint8 of the same shape holding e4m3fn, and (..., heads) float32 scales.

    Raises:
        UsageError: The dtype is another, or there are fewer than three axes.
    """
    _check_dims(values)
    wide = _widened(values)
    token_axis = _token_axis(order)
    magnitudes = np.abs(wide)
    magnitudes[~np.isfinite(wide)] = 0
    amax = magnitudes.max(axis=(token_axis, -1), initial=np.float32(0))
    scales = np.maximum(amax / np.float32(FP8_MAX), _SCALE_MIN)
    scales[amax == 0] = 1
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.where(np.isnan(wide), wide, wide / _spread(scales, order))
    return _fp8_of(scaled), scales


def dequantise_fp8(
    items: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    *,
    kind: WideKind,
    order: HeadOrder = "NHD",
) -> npt.NDArray[Any]:
    """Turn FP8 (e4m3fn) back into wide values; undoes `quantise_fp8` but for the rounding.

    Args:
        items: Shape as of `quantise_fp8`, uint8, host.
        scales: (..., heads) float32, host.
        kind: What to make of them.
        order: Order of the axes.

    Returns:
        items * scales in float32, rounded to `kind` to the nearest, ties to even; a finite product
        that is too large becomes the largest finite value. bfloat16 is given as its bits, uint16.

    Raises:
        UsageError: A dtype is another, or the shapes do not fit.
    """
    _check_dims(items)
    shape = (*items.shape[:-3], items.shape[_head_axis(order)])
    if items.dtype != np.uint8 or scales.dtype != np.float32 or scales.shape != shape:
        raise UsageError(
            f"items must be uint8 and scales {shape} float32, not {items.dtype} and "
            f"{scales.shape} {scales.dtype}"
        )
    if kind not in _WIDE_MAX:
        raise UsageError(f"kind must be one of {', '.join(_WIDE_MAX)}, not {kind!r}")
    with np.errstate(over="ignore", invalid="ignore"):
        products = _float_of_fp8(items) * _spread(scales, order)
    return _narrowed(products, np.signbit(_float_of_fp8(items)), kind)


def poison(memory: npt.NDArray[Any]) -> None:
    """Overwrite memory in place, so that use of a block before it was written shows.

    Args:
        memory: Any shape and dtype, contiguous, writable, host.

    Raises:
        UsageError: It is read-only or not contiguous.
    """
    if not memory.flags.c_contiguous or not memory.flags.writeable:
        raise UsageError("memory to poison must be contiguous and writable")
    memory.reshape(-1).view(np.uint8).fill(POISON)


def _check_dims(blocks: npt.NDArray[Any]) -> None:
    if blocks.ndim < _BLOCK_DIMS:
        raise UsageError(f"at least {_BLOCK_DIMS} axes are needed; the shape is {blocks.shape}")


def _head_axis(order: HeadOrder) -> int:
    if order not in {"NHD", "HND"}:
        raise UsageError(f"order must be NHD or HND, not {order!r}")
    return -2 if order == "NHD" else -3


def _token_axis(order: HeadOrder) -> int:
    return -5 - _head_axis(order)  # the two are -3 and -2


def _spread(scales: npt.NDArray[np.float32], order: HeadOrder) -> npt.NDArray[np.float32]:
    """Give scales the axes of the blocks that they are multiplied with."""
    return np.expand_dims(scales, (_token_axis(order), -1))


def _widened(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if values.dtype not in {np.dtype(np.float16), np.dtype(np.float32)}:
        raise UsageError(f"float16, float32 or uint16 (bfloat16) is needed, not {values.dtype}")
    return values.astype(np.float32)


def _narrowed(
    products: npt.NDArray[np.float32], signs: npt.NDArray[np.bool_], kind: WideKind
) -> npt.NDArray[Any]:
    is_nan = np.isnan(products)
    bits = np.ascontiguousarray(products).view(np.uint32)
    magnitude: npt.NDArray[np.uint32] = np.minimum(bits & ~_SIGN, np.uint32(_WIDE_MAX[kind]))
    # Each sign has one not-a-number: what arithmetic makes of the rest differs between machines.
    magnitude[is_nan] = _QUIET_NAN
    sign = np.where(is_nan, signs, bits & _SIGN != 0).astype(np.uint32) << np.uint32(31)
    if kind == "bfloat16":
        return (_rounded(magnitude, 16) | sign >> np.uint32(16)).astype(np.uint16)
    values = (magnitude | sign).view(np.float32)
    return values.astype(np.float16) if kind == "float16" else values


def _rounded(magnitude: npt.NDArray[np.uint32], drop: int) -> npt.NDArray[np.uint32]:
    """Drop the lowest bits. A carry into the exponent is the right result."""
    half = np.uint32((1 << (drop - 1)) - 1)
    is_odd = (magnitude >> np.uint32(drop)) & np.uint32(1)
    return (magnitude + half + is_odd) >> np.uint32(drop)


def _fp8_of(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    magnitude = bits & ~_SIGN
    normal = _rounded(magnitude - np.uint32(120 << 23), 20)
    # Below 2^-6, subnormal. Beside 2^14 the last bit is worth 2^-9, so the sum does the rounding.
    with np.errstate(invalid="ignore"):
        sums = magnitude.view(np.float32) + np.float32(16384)
    result: npt.NDArray[np.uint32] = np.where(
        magnitude >= np.uint32(0x3C80_0000), normal, sums.view(np.uint32) - np.uint32(0x4680_0000)
    )
    result[magnitude >= np.uint32(0x43E0_0000)] = 0x7E  # 448 and above
    result[magnitude > _INFINITY] = 0x7F
    return (result | (bits & _SIGN) >> np.uint32(24)).astype(np.uint8)


def _float_of_fp8(items: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Look the values up: there are 256."""
    codes = np.arange(256, dtype=np.uint32)
    magnitude = codes & np.uint32(0x7F)
    normal = (magnitude << np.uint32(20)) + np.uint32(120 << 23)
    subnormal = (magnitude.astype(np.float32) * np.float32(2.0**-9)).view(np.uint32)
    bits: npt.NDArray[np.uint32] = np.where(magnitude >= np.uint32(8), normal, subnormal)
    bits[magnitude == np.uint32(0x7F)] = _QUIET_NAN
    values = (bits | (codes & np.uint32(0x80)) << np.uint32(24)).view(np.float32)
    return values[items]
