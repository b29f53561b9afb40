"""Every kernel, launched on a device, against its NumPy reference: bit for bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from kvx.errors import UnavailableError, UsageError
from kvx.transfer import relayout
from kvx_ext import _core
from tests.gpu.rig import Gpu, address_of, random_bytes

CTAS = [1, 5]
KINDS = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32}


@pytest.fixture
def kernels(gpu: Gpu) -> _core.Kernels:
    """Load them."""
    return _core.Kernels(gpu.device)


def taken(gpu: Gpu, address: int, like: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Return what lies at an address, with the shape and type of `like`."""
    data = np.frombuffer(gpu.read(address, like.nbytes), like.dtype)
    return data.reshape(like.shape)


def assert_same_bytes(one: npt.NDArray[np.generic], other: npt.NDArray[np.generic]) -> None:
    assert one.shape == other.shape
    assert one.tobytes() == other.tobytes()


def filled(shape: tuple[int, ...], dtype: type, seed: int) -> npt.NDArray[np.generic]:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return random_bytes(size, seed).view(dtype).reshape(shape)


def test_kernels_say_where_they_are_from(kernels: _core.Kernels, gpu: Gpu) -> None:
    assert kernels.origin in {"fatbin", "nvrtc"}
    assert gpu.device.info()["kernels"] == kernels.origin


@pytest.mark.parametrize("ctas", CTAS)
@pytest.mark.parametrize("is_table_pinned", [False, True])
def test_fragments(gpu: Gpu, kernels: _core.Kernels, ctas: int, is_table_pinned: bool) -> None:
    rng = np.random.default_rng(ctas)
    source = random_bytes(1 << 20, 7)
    target = np.zeros(2 << 20, np.uint8)
    sizes = rng.integers(1, 9000, 100)
    source_starts = rng.integers(0, len(source) - 9000, 100)
    target_starts = np.cumsum(sizes + rng.integers(0, 40, 100)) - sizes
    expected = target.copy()
    for to, at, size in zip(target_starts, source_starts, sizes, strict=True):
        expected[to : to + size] = source[at : at + size]
    source_at, target_at = gpu.placed(source), gpu.placed(target)
    table = np.stack([target_at + target_starts, source_at + source_starts, sizes], axis=1)
    table = table.astype(np.uint64)
    if is_table_pinned:
        pinned = gpu.host(table.nbytes)
        pinned[:] = table.reshape(-1).view(np.uint8)
        table_at = address_of(pinned)
    else:
        table_at = gpu.placed(table)
    stream, before = gpu.stream(), kernels.launches
    kernels.copy_fragments(stream, table_at, len(table), int(sizes.max()), ctas)
    gpu.device.stream_synchronize(stream)
    assert kernels.launches == before + 1
    assert_same_bytes(taken(gpu, target_at, target), expected)


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_fragments_straight_over_the_link(gpu: Gpu, kernels: _core.Kernels, direction: str) -> None:
    """A kernel reads and writes pinned host memory at the host's own addresses."""
    size, count = 6144, 32
    data = random_bytes(size * count, 8)
    host = gpu.host(size * count)
    memory = gpu.memory(2 * size * count)
    places = np.random.default_rng(9).permutation(count)
    hosts = np.uint64(address_of(host)) + (np.arange(count) * size).astype(np.uint64)
    devices = np.uint64(memory.address) + (places * 2 * size).astype(np.uint64)
    paged = np.zeros((2 * count, size), np.uint8)
    if direction == "h2d":
        host[:] = data
        gpu.write(memory.address, paged)
    else:
        paged[2 * places] = data.reshape(count, size)
        gpu.write(memory.address, paged)
    targets, sources = (devices, hosts) if direction == "h2d" else (hosts, devices)
    table_at = gpu.placed(np.stack([targets, sources, np.full(count, size, np.uint64)], axis=1))
    stream = gpu.stream()
    kernels.copy_fragments(stream, table_at, count, size, 4)
    gpu.device.stream_synchronize(stream)
    if direction == "h2d":
        paged[2 * places] = data.reshape(count, size)
        assert_same_bytes(taken(gpu, memory.address, paged), paged)
    else:
        assert_same_bytes(host, data)


def permute(
    gpu: Gpu,
    kernels: _core.Kernels,
    source: npt.NDArray[np.generic],
    axes: tuple[int, ...],
    ctas: int,
) -> npt.NDArray[np.generic]:
    """Return `source.transpose(axes)`, made by the kernel; the last axis stays where it is."""
    target = np.zeros_like(np.ascontiguousarray(source.transpose(axes)))
    target_at, source_at = gpu.placed(target), gpu.placed(source)
    stream = gpu.stream()
    kernels.permute(
        stream, target_at, source_at, sizes=target.shape[:-1],
        target_strides=target.strides[:-1], source_strides=source.transpose(axes).strides[:-1],
        run_bytes=target.shape[-1] * target.itemsize, ctas=ctas,
    )  # fmt: skip
    gpu.device.stream_synchronize(stream)
    return taken(gpu, target_at, target)


@pytest.mark.parametrize("ctas", CTAS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_tokens_and_heads(gpu: Gpu, kernels: _core.Kernels, dtype: type, ctas: int) -> None:
    source = filled((3, 2, 16, 5, 24), dtype, 1)
    made = permute(gpu, kernels, source, (0, 1, 3, 2, 4), ctas)
    assert_same_bytes(made, relayout.permute_tokens_heads(source))


@pytest.mark.parametrize("ctas", CTAS)
def test_layer_first_and_block_first(gpu: Gpu, kernels: _core.Kernels, ctas: int) -> None:
    layers = filled((4, 2, 6, 640), np.float16, 2)
    blocks = permute(gpu, kernels, layers, (2, 0, 1, 3), ctas)
    assert_same_bytes(blocks, relayout.to_block_first(layers))
    back = permute(gpu, kernels, blocks, (1, 2, 0, 3), ctas)
    assert_same_bytes(back, relayout.to_layer_first(blocks))


@pytest.mark.parametrize("is_scatter", [False, True])
def test_blocks_are_picked_by_number(gpu: Gpu, kernels: _core.Kernels, is_scatter: bool) -> None:
    numbers = np.array([7, 0, 3, 9], np.int64)
    cache, dense = filled((10, 384), np.uint8, 3), filled((4, 384), np.uint8, 4)
    cache_at, dense_at, numbers_at = gpu.placed(cache), gpu.placed(dense), gpu.placed(numbers)
    target, source = (cache_at, dense_at) if is_scatter else (dense_at, cache_at)
    ids = {"target_ids" if is_scatter else "source_ids": numbers_at}
    stream = gpu.stream()
    kernels.permute(
        stream, target, source, sizes=[4], target_strides=[384], source_strides=[384],
        run_bytes=384, **ids,
    )  # fmt: skip
    gpu.device.stream_synchronize(stream)
    if is_scatter:
        cache[numbers] = dense
        assert_same_bytes(taken(gpu, cache_at, cache), cache)
    else:
        assert_same_bytes(taken(gpu, dense_at, dense), cache[numbers])


@pytest.mark.parametrize("ctas", CTAS)
@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_heads_are_split_and_merged(
    gpu: Gpu, kernels: _core.Kernels, parts: int, order: relayout.HeadOrder, ctas: int
) -> None:
    tokens, heads, dim, planes, blocks = 16, 8, 40, 2, 3
    inner = (tokens, heads) if order == "NHD" else (heads, tokens)
    whole = filled((blocks, planes, *inner, dim), np.float16, 5)
    expected = relayout.split_heads(whole, parts, order=order)
    places = [gpu.placed(np.zeros_like(part)) for part in expected]
    whole_at, merged_at = gpu.placed(whole), gpu.placed(np.zeros_like(whole))
    rows = planes * (tokens if order == "NHD" else 1)
    facts = {
        "whole_block_stride": whole.strides[0],
        "part_block_stride": expected[0].strides[0],
        "blocks": blocks,
        "rows": rows,
        "run_bytes": whole.strides[0] // rows // parts,
        "ctas": ctas,
    }
    stream = gpu.stream()
    kernels.reshard(stream, whole_at, places, is_merge=False, **facts)
    kernels.reshard(stream, merged_at, places, is_merge=True, **facts)
    gpu.device.stream_synchronize(stream)
    for place, part in zip(places, expected, strict=True):
        assert_same_bytes(taken(gpu, place, part), part)
    assert_same_bytes(taken(gpu, merged_at, whole), relayout.merge_heads(expected, order=order))


def special(shape: tuple[int, ...], kind: str, seed: int) -> npt.NDArray[np.generic]:
    """Return any bit patterns, so infinities, not-a-numbers and subnormals too; a head of zeros."""
    bits = filled(shape, KINDS[kind], seed)
    bits[0, :, 0] = 0
    return bits if kind == "bfloat16" else bits.view(kind)


@pytest.mark.parametrize("ctas", CTAS)
@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_fp8(
    gpu: Gpu, kernels: _core.Kernels, kind: relayout.WideKind, order: relayout.HeadOrder, ctas: int
) -> None:
    wide = special((3, 4, 5, 72), kind, 6)
    items, scales = relayout.quantise_fp8(wide, order=order)
    back = relayout.dequantise_fp8(items, scales, kind=kind, order=order)
    axes = (0, 1, 2) if order == "NHD" else (0, 2, 1)
    blocks, tokens, heads = (wide.shape[axis] for axis in axes)
    wide_at, back_at = gpu.placed(wide), gpu.placed(np.zeros_like(back))
    items_at, scales_at = gpu.placed(np.zeros_like(items)), gpu.placed(np.zeros_like(scales))
    partials_at = gpu.memory(_core.Kernels.partials_bytes(blocks, heads)).address
    facts = {
        "shape": [blocks, tokens, heads, wide.shape[3]],
        "wide_strides": [wide.strides[axis] for axis in axes],
        "narrow_strides": [items.strides[axis] for axis in axes],
        "kind": kind,
        "ctas": ctas,
    }
    stream = gpu.stream()
    kernels.quantise_fp8(stream, wide_at, items_at, scales_at, partials_at, **facts)
    kernels.dequantise_fp8(stream, back_at, items_at, scales_at, **facts)
    gpu.device.stream_synchronize(stream)
    assert_same_bytes(taken(gpu, scales_at, scales), scales)
    assert_same_bytes(taken(gpu, items_at, items), items)
    assert_same_bytes(taken(gpu, back_at, back), back)


@pytest.mark.parametrize("ctas", CTAS)
def test_poison(gpu: Gpu, kernels: _core.Kernels, ctas: int) -> None:
    data = random_bytes(100_003, 10)
    address, stream = gpu.placed(data), gpu.stream()
    kernels.poison(stream, address + 17, 90_001, ctas)
    gpu.device.stream_synchronize(stream)
    relayout.poison(data[17 : 17 + 90_001])
    assert_same_bytes(taken(gpu, address, data), data)


def test_what_a_launch_refuses(gpu: Gpu, kernels: _core.Kernels) -> None:
    stream = gpu.stream()
    with pytest.raises(UsageError):
        kernels.poison(0, 4096, 16)
    with pytest.raises(UsageError):
        kernels.poison(stream, 4096, 16, 0)
    with pytest.raises(UsageError):
        kernels.permute(
            stream, 0, 0, sizes=[1] * 6, target_strides=[], source_strides=[], run_bytes=4
        )
    with pytest.raises(UsageError):
        kernels.dequantise_fp8(
            stream, 0, 0, 0, shape=[1, 1, 1, 1], wide_strides=[], narrow_strides=[], kind="int8"
        )


def test_the_emulation_has_no_kernels() -> None:
    with pytest.raises(UnavailableError):
        _core.Kernels(_core.open_emulated_device(1 << 20))
