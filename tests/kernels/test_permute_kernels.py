"""Layouts and resharding on the GPU's own code, against NumPy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.transfer import relayout
from tests.kernels.test_copy_kernels import grids, random_bytes
from tests.sim.kernels import AccessRefused, Dim3, Gpu, Permute, Reshard

DTYPES = [np.uint8, np.float16, np.float32, np.complex128]
Grid = tuple[Dim3, Dim3]


def filled(shape: tuple[int, ...], dtype: type, seed: int) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return random_bytes(size, seed).view(dtype).reshape(shape)


def run_permute(
    target: np.ndarray,
    source: np.ndarray,
    axes: tuple[int, ...],
    grid: Grid,
    *,
    offset: int = 0,
    run_axes: int = 1,
) -> None:
    """Write `source.transpose(axes)` to `target`; the last `run_axes` axes stay where they are."""
    gpu = Gpu()
    outer = source.ndim - run_axes
    strides = source.transpose(axes).strides[:outer]
    spare = 5 - outer
    parameters = Permute(
        target=gpu.place(target, offset=offset),
        source=gpu.place(source, offset=offset, is_writable=False),
        sizes=(*target.shape[:outer], *([1] * spare)),
        target_strides=(*target.strides[:outer], *([0] * spare)),
        source_strides=(*strides, *([0] * spare)),
        run_bytes=int(np.prod(target.shape[outer:])) * target.itemsize,
    )
    gpu.run("kvx_permute", parameters, grid=grid[0], block=grid[1])


def assert_same_bytes(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape
    assert one.tobytes() == other.tobytes()


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(*[st.integers(1, 5)] * 4, st.sampled_from([1, 3, 8, 20])),
    st.sampled_from(DTYPES),
    grids,
    st.sampled_from([0, 16, 4, 2]),
)
def test_tokens_and_heads(shape: tuple[int, ...], dtype: type, grid: Grid, offset: int) -> None:
    source = filled(shape, dtype, 1)
    expected = relayout.permute_tokens_heads(source)
    target = np.zeros_like(expected)
    run_permute(target, source, (0, 1, 3, 2, 4), grid, offset=offset)
    assert_same_bytes(target, expected)
    assert_same_bytes(relayout.permute_tokens_heads(expected), source)


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.just(2), st.integers(1, 6), st.integers(1, 90)),
    st.sampled_from(DTYPES),
    grids,
)
def test_layer_first_and_block_first(shape: tuple[int, ...], dtype: type, grid: Grid) -> None:
    layers = filled(shape, dtype, 2)
    blocks = relayout.to_block_first(layers)
    target = np.zeros_like(blocks)
    run_permute(target, layers, (2, 0, 1, 3), grid)
    assert_same_bytes(target, blocks)
    back = np.zeros_like(layers)
    run_permute(back, blocks, (1, 2, 0, 3), grid)
    assert_same_bytes(back, relayout.to_layer_first(blocks))
    assert_same_bytes(back, layers)


@settings(max_examples=80, deadline=None)
@given(
    st.permutations(range(5)),
    st.tuples(*[st.integers(1, 4)] * 5, st.integers(1, 24)),
    st.sampled_from(DTYPES),
    grids,
    st.integers(0, 16),
)
def test_any_five_dimensions(
    axes: list[int], shape: tuple[int, ...], dtype: type, grid: Grid, offset: int
) -> None:
    source = filled(shape, dtype, 3)
    expected = np.ascontiguousarray(source.transpose(*axes, 5))
    target = np.zeros_like(expected)
    run_permute(target, source, (*axes, 5), grid, offset=offset)
    assert_same_bytes(target, expected)


@settings(max_examples=60, deadline=None)
@given(st.data(), grids, st.booleans())
def test_blocks_are_picked_by_number(data: st.DataObject, grid: Grid, is_scatter: bool) -> None:
    numbers = data.draw(st.lists(st.integers(0, 9), unique=True, min_size=1, max_size=10))
    cache, dense = (
        filled((10, 3, 4, 16), np.uint8, 4),
        filled((len(numbers), 4, 3, 16), np.uint8, 5),
    )
    expected_cache, expected_dense = cache.copy(), dense.copy()
    if is_scatter:
        expected_cache[numbers] = relayout.permute_tokens_heads(dense)
    else:
        expected_dense = relayout.permute_tokens_heads(cache[numbers])
    gpu = Gpu()
    ids = gpu.place(np.array(numbers, np.int64), is_writable=False)
    paged = {"address": gpu.place(cache), "ids": ids, "strides": (192, 64, 16, 0, 0)}
    plain = {"address": gpu.place(dense), "ids": 0, "strides": (192, 16, 48, 0, 0)}
    source, target = (plain, paged) if is_scatter else (paged, plain)
    parameters = Permute(
        target=target["address"],
        source=source["address"],
        target_ids=target["ids"],
        source_ids=source["ids"],
        target_strides=target["strides"],
        source_strides=source["strides"],
        sizes=(len(numbers), 3, 4, 1, 1),
        run_bytes=16,
    )
    gpu.run("kvx_permute", parameters, grid=grid[0], block=grid[1])
    np.testing.assert_array_equal(cache, expected_cache)
    np.testing.assert_array_equal(dense, expected_dense)


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(1, 6))
def test_rows_may_lie_apart_and_backwards(grid: Grid, rows: int) -> None:
    source, target = filled((rows, 64), np.uint8, 6), filled((rows, 96), np.uint8, 7)
    expected = target.copy()
    expected[::-1, :48] = source[:, :48]
    gpu = Gpu()
    parameters = Permute(
        target=gpu.place(target) + (rows - 1) * 96,
        source=gpu.place(source, is_writable=False),
        target_strides=(-96,),
        source_strides=(64,),
        sizes=(rows, 1, 1, 1, 1),
        run_bytes=48,
    )
    gpu.run("kvx_permute", parameters, grid=grid[0], block=grid[1])
    np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("empty", range(6))
def test_an_empty_dimension_moves_nothing(empty: int) -> None:
    sizes = tuple(0 if d == empty else 2 for d in range(5))
    Gpu().run("kvx_permute", Permute(sizes=sizes, run_bytes=0 if empty == 5 else 4))


def test_a_size_too_large_is_refused() -> None:
    source = filled((4, 16), np.uint8, 8)
    gpu = Gpu()
    parameters = Permute(
        target=gpu.place(np.zeros((4, 16), np.uint8)),
        source=gpu.place(source),
        target_strides=(16,),
        source_strides=(16,),
        sizes=(5, 1, 1, 1, 1),
        run_bytes=16,
    )
    with pytest.raises(AccessRefused):
        gpu.run("kvx_permute", parameters)


def reshard(
    whole: np.ndarray, parts: list[np.ndarray], *, order: str, is_merge: bool, grid: Grid
) -> None:
    gpu = Gpu()
    blocks, planes, second, third, dim = parts[0].shape
    rows = planes * (second if order == "NHD" else 1)
    run = (third if order == "NHD" else second * third) * dim
    parameters = Reshard(
        whole=gpu.place(whole, offset=8, is_writable=is_merge),
        parts=tuple(gpu.place(part, offset=8, is_writable=not is_merge) for part in parts),
        whole_block_stride=whole.strides[0],
        part_block_stride=parts[0].strides[0],
        blocks=blocks,
        rows=rows,
        part_count=len(parts),
        run_bytes=run * whole.itemsize,
        is_merge=is_merge,
    )
    gpu.run("kvx_reshard", parameters, grid=grid[0], block=grid[1])


@settings(max_examples=120, deadline=None)
@given(
    order=st.sampled_from(["NHD", "HND"]),
    parts=st.sampled_from([1, 2, 3, 4, 8, 16]),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 5), st.integers(1, 3)),
    dim=st.sampled_from([1, 5, 16]),
    dtype=st.sampled_from(DTYPES),
    grid=grids,
)
def test_heads_are_split_and_merged(
    *,
    order: str,
    parts: int,
    sizes: tuple[int, int, int, int],
    dim: int,
    dtype: type,
    grid: Grid,
) -> None:
    blocks, planes, tokens, heads_each = sizes
    heads = parts * heads_each
    inner = (tokens, heads) if order == "NHD" else (heads, tokens)
    whole = filled((blocks, planes, *inner, dim), dtype, 9)
    expected = relayout.split_heads(whole, parts, order=order)
    made = [np.zeros_like(part) for part in expected]
    reshard(whole, made, order=order, is_merge=False, grid=grid)
    for one, other in zip(made, expected, strict=True):
        assert_same_bytes(one, other)
    merged = np.zeros_like(whole)
    reshard(merged, expected, order=order, is_merge=True, grid=grid)
    assert_same_bytes(merged, whole)
    assert_same_bytes(relayout.merge_heads(expected, order=order), whole)
    assert all(one is not other for one, other in pairwise(expected))
