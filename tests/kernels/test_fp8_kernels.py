"""FP8 on the GPU's own code, against NumPy and ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.transfer import relayout
from tests.kernels.test_copy_kernels import grids
from tests.sim.kernels import Dim3, Gpu, Quantise

KINDS = ["float16", "bfloat16", "float32"]
BITS = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32}
LARGEST = {"float16": 65504.0, "bfloat16": 255 * 2.0**120, "float32": np.finfo(np.float32).max}
ONE_GRID: tuple[Dim3, Dim3] = ((2, 1, 1), (96, 1, 1))
FP8 = ml_dtypes.float8_e4m3fn


def typed(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return what kvx takes: bfloat16 stays bits."""
    return bits if kind == "bfloat16" else bits.view(kind)


def as_float32(bits: np.ndarray, kind: str) -> np.ndarray:
    wide = bits.view(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    with np.errstate(invalid="ignore"):
        return wide.astype(np.float32)


def parameters_of(
    gpu: Gpu,
    wide: np.ndarray,
    narrow: np.ndarray,
    scales: np.ndarray,
    *,
    kind: str,
    order: str,
    offset: int,
) -> Quantise:
    blocks, first, second, dim = wide.shape
    tokens, heads = (first, second) if order == "NHD" else (second, first)
    axes = (0, 1, 2) if order == "NHD" else (0, 2, 1)
    partials = np.full((blocks, heads, 32), np.nan, np.float32)
    return Quantise(
        wide=gpu.place(wide, offset=offset),
        narrow=gpu.place(narrow, offset=offset),
        scales=gpu.place(scales),
        partials=gpu.place(partials),
        wide_strides=tuple(wide.strides[axis] for axis in axes),
        narrow_strides=tuple(narrow.strides[axis] for axis in axes),
        blocks=blocks,
        tokens=tokens,
        heads=heads,
        dim=dim,
        wide_kind=KINDS.index(kind),
    )


def run_quantise(
    bits: np.ndarray,
    *,
    kind: str,
    order: str = "NHD",
    grid: tuple[Dim3, Dim3] = ONE_GRID,
    offset: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    gpu = Gpu()
    heads = bits.shape[2 if order == "NHD" else 1]
    narrow = np.zeros(bits.shape, np.uint8)
    scales = np.zeros((len(bits), heads), np.float32)
    parameters = parameters_of(gpu, bits, narrow, scales, kind=kind, order=order, offset=offset)
    for name in ("kvx_amax", "kvx_scale", "kvx_quantise_fp8"):
        gpu.run(name, parameters, grid=grid[0], block=grid[1])
    return narrow, scales


def run_dequantise(
    items: np.ndarray,
    scales: np.ndarray,
    *,
    kind: str,
    order: str = "NHD",
    grid: tuple[Dim3, Dim3] = ONE_GRID,
    offset: int = 0,
) -> np.ndarray:
    gpu = Gpu()
    wide = np.zeros(items.shape, BITS[kind])
    parameters = parameters_of(gpu, wide, items, scales, kind=kind, order=order, offset=offset)
    gpu.run("kvx_dequantise_fp8", parameters, grid=grid[0], block=grid[1])
    return wide


def expected_scales(values: np.ndarray) -> np.ndarray:
    """Return scales of (blocks, tokens, heads, dim) float32, written out in another way."""
    finite = np.where(np.isfinite(values), np.abs(values), 0)
    amax = finite.max(axis=(1, 3)).astype(np.float32)
    scales = np.maximum(amax / np.float32(448), np.finfo(np.float32).tiny)
    return np.where(amax == 0, np.float32(1), scales)


def ml_quantised(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.clip(values / scales[:, None, :, None], -448, 448)
        scaled = np.where(np.isnan(values), values, scaled)
        return scaled.astype(FP8).view(np.uint8)


def check_exact(bits: np.ndarray, kind: str) -> None:
    values = as_float32(bits, kind)
    items, scales = run_quantise(bits, kind=kind)
    np.testing.assert_array_equal(scales, expected_scales(values))
    np.testing.assert_array_equal(items, ml_quantised(values, scales))
    reference = relayout.quantise_fp8(typed(bits, kind))
    np.testing.assert_array_equal(reference[0], items)
    np.testing.assert_array_equal(reference[1], scales)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_every_16_bit_value(kind: str) -> None:
    # As one block under one scale, in rows of like magnitude under their own, and as powers of two
    # apart from a scale of 1 (the 448.0 in each row), where the rounding is that of e4m3fn itself.
    every = np.arange(65536, dtype=np.uint16)
    check_exact(every.reshape(1, 64, 8, 128), kind)
    check_exact(every.reshape(64, 8, 1, 128), kind)
    check_exact(np.sort(every & 0x7FFF).reshape(256, 1, 2, 128), kind)
    limit = np.array(448, np.float16 if kind == "float16" else ml_dtypes.bfloat16)
    capped = every[np.abs(as_float32(every, kind)) <= 448]
    rows = np.full((len(capped) // 127 + 1, 1, 1, 128), limit.view(np.uint16))
    rows[:, 0, 0, 1:].flat[: len(capped)] = capped
    assert (run_quantise(rows, kind=kind)[1] == 1).all()
    check_exact(rows, kind)


@pytest.mark.parametrize("seed", range(4))
def test_random_float32(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (64, 4, 4, 128), np.uint32)
    # Blocks of every magnitude, from subnormal to the largest, some with specials among them.
    exponents = rng.integers(0, 255, (64, 1, 1, 1)).astype(np.uint32)
    near = (exponents - rng.integers(0, 12, bits.shape).astype(np.uint32)) & np.uint32(0xFF)
    bits = (bits & np.uint32(0x807F_FFFF)) | np.minimum(near, 254) << np.uint32(23)
    specials = np.array([0, 2**31, 0x7F80_0000, 0xFF80_0000, 0x7FC0_0000, 0xFFC0_0001], np.uint32)
    is_special = rng.random(bits.shape) < 0.01
    bits[is_special] = rng.choice(specials, int(is_special.sum()))
    check_exact(bits, "float32")


def test_halfway_cases_of_float32() -> None:
    # Every midpoint of two neighbours of e4m3fn, and the float32 on either side of it.
    every = np.sort(np.arange(127, dtype=np.uint8).view(FP8).astype(np.float32))
    middles = (every[1:] + every[:-1]) / np.float32(2)
    values = np.concatenate(
        [middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(500))]
    )
    rows = np.full((1, 1, 1, 2 * len(values) + 1), 448, np.float32)
    rows[0, 0, 0, 1:] = np.concatenate([values, -values])
    check_exact(rows.view(np.uint32), "float32")


def test_zero_tiny_and_special_blocks() -> None:
    rows = np.zeros((5, 1, 1, 8), np.float32)
    rows[1] = 1e-45  # the smallest there is: amax / 448 would be zero
    rows[2] = np.inf
    rows[3] = np.nan
    rows[4, ..., :3] = (np.finfo(np.float32).max, -np.inf, -np.nan)
    items, scales = run_quantise(rows.view(np.uint32), kind="float32")
    tiny, largest = np.finfo(np.float32).tiny, np.finfo(np.float32).max / np.float32(448)
    assert scales[:, 0].tolist() == [1, tiny, 1, 1, largest]
    assert items[:, 0, 0, :3].tolist() == [
        [0, 0, 0],
        [0, 0, 0],
        [0x7E] * 3,
        [0x7F] * 3,
        [0x7E, 0xFE, 0xFF],
    ]
    check_exact(rows.view(np.uint32), "float32")
    # 448 * scale rounds beyond the largest float32 for some scales; it must not become infinite.
    back = run_dequantise(items[4:], scales[4:], kind="float32").view(np.float32)
    assert np.isfinite(back[0, 0, 0, :2]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_fp8_value_under_many_scales(kind: str) -> None:
    scales = np.float32(2.0) ** np.arange(-149, 128, 3, dtype=np.float32)
    rng = np.random.default_rng(5)
    scales = np.concatenate([scales, rng.lognormal(0, 9, 60), [0, np.inf, -1.5, np.nan]])
    scales = scales.astype(np.float32)[:, None]
    items = np.broadcast_to(np.arange(256, dtype=np.uint8), (len(scales), 1, 1, 256)).copy()
    made = run_dequantise(items, scales, kind=kind)
    reference = relayout.dequantise_fp8(items, scales, kind=kind)
    np.testing.assert_array_equal(made, reference.view(BITS[kind]))

    wide = ml_dtypes.bfloat16 if kind == "bfloat16" else np.dtype(kind).type
    with np.errstate(over="ignore", invalid="ignore"):
        products = items.view(FP8).astype(np.float32) * scales[:, None, None]
        limit = np.float32(LARGEST[kind])
        expected = np.clip(products, -limit, limit).astype(wide)
    is_nan = np.isnan(products)
    np.testing.assert_array_equal(made[~is_nan], expected.view(BITS[kind])[~is_nan])
    assert np.isnan(made.view(wide).astype(np.float32)[is_nan]).all()


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    order=st.sampled_from(["NHD", "HND"]),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4)),
    dim=st.sampled_from([1, 3, 8, 16, 20, 64]),
    grid=grids,
    offset=st.sampled_from([0, 4, 8]),
    seed=st.integers(0, 2**32),
)
def test_shapes_orders_and_grids(
    *,
    kind: str,
    order: str,
    sizes: tuple[int, int, int],
    dim: int,
    grid: tuple[Dim3, Dim3],
    offset: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 10 ** rng.uniform(-3, 3), (*sizes, dim)).astype(np.float32)
    wide = values.astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    bits = wide.view(BITS[kind])
    items, scales = run_quantise(bits, kind=kind, order=order, grid=grid, offset=offset)
    expected = relayout.quantise_fp8(typed(bits, kind), order=order)
    np.testing.assert_array_equal(items, expected[0])
    np.testing.assert_array_equal(scales, expected[1])

    back = run_dequantise(items, scales, kind=kind, order=order, grid=grid, offset=offset)
    reference = relayout.dequantise_fp8(items, scales, kind=kind, order=order)
    np.testing.assert_array_equal(back, reference.view(BITS[kind]))
    # Three bits of mantissa: within a sixteenth, or within the smallest step of the scale.
    spread = scales[:, None, :, None] if order == "NHD" else scales[:, :, None, None]
    error = np.abs(as_float32(back, kind) - wide.astype(np.float32))
    assert (error <= np.maximum(np.abs(values) * 0.07, spread * 2.0**-9)).all()
