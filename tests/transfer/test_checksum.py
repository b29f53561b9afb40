"""Every checksum kernel against CRC-64/NVME computed bit by bit, copies included."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.errors import UsageError
from kvx_ext import _core

KERNELS = _core.checksum_kernels()
ALL_ONES = (1 << 64) - 1
POLYNOMIAL = 0x9A6C9329AC4BC9B5
# Around the strides of the kernels: 16, 64, 128, 256 and 512 bytes.
EDGES = sorted({max(0, size + off) for size in (16, 64, 128, 256, 512, 1024) for off in (-1, 0, 1)})


def register(data: bytes, state: int = 0) -> int:
    """Continue the bare register over `data`, a bit at a time."""
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (POLYNOMIAL if state & 1 else 0)
    return state


def spread(value: int) -> int:
    """Return the finaliser of SplitMix64."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & ALL_ONES
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & ALL_ONES
    return value ^ (value >> 31)


def seed(key: bytes, block_bytes: int) -> int:
    """Return the register that a block's checksum starts from; docs/formats/keys.md."""
    low, high = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    return spread(low ^ spread(high ^ spread(block_bytes)))


def array(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_published_check_value(kernel: str) -> None:
    assert _core.crc64(array(b"123456789"), ALL_ONES, kernel) ^ ALL_ONES == 0xAE8B14860A799888


def test_there_is_always_a_portable_kernel() -> None:
    assert KERNELS[-1] == "portable"
    assert len(set(KERNELS)) == len(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
@given(st.binary(max_size=700), st.integers(0, ALL_ONES))
def test_every_kernel_agrees_with_the_bits(kernel: str, data: bytes, state: int) -> None:
    assert _core.crc64(array(data), state, kernel) == register(data, state)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", EDGES)
def test_sizes_around_the_strides(kernel: str, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    assert _core.crc64(array(data), 123, kernel) == register(data, 123)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("is_streaming", [True, False])
@given(st.integers(0, 3000), st.tuples(st.integers(0, 70), st.integers(0, 70)))
def test_copies_are_whole_stay_inside_and_checksum(
    kernel: str, is_streaming: bool, size: int, offsets: tuple[int, int]
) -> None:
    source_at, target_at = offsets
    state = size * 0x9E3779B97F4A7C15 & ALL_ONES
    source = np.random.default_rng(size).integers(0, 256, size + source_at, np.uint8)[source_at:]
    whole = np.full(size + target_at + 64, 0xA5, np.uint8)
    target = whole[target_at : target_at + size]
    found = _core.copy_with_crc64(target, source, state, is_streaming, kernel)
    assert found == _core.crc64(source, state, "portable")
    assert (target == source).all()
    assert (whole[:target_at] == 0xA5).all()
    assert (whole[target_at + size :] == 0xA5).all()
    whole[:] = 0xA5
    _core.copy_only(target, source, is_streaming, kernel)
    assert (target == source).all()
    assert (whole[:target_at] == 0xA5).all()
    assert (whole[target_at + size :] == 0xA5).all()


@given(st.binary(max_size=300), st.integers(0, 300))
def test_a_checksum_continues_where_it_stopped(data: bytes, cut: int) -> None:
    first = _core.crc64(array(data[:cut]), 77)
    assert _core.crc64(array(data[cut:]), first) == _core.crc64(array(data), 77)


@given(st.integers(1, 4), st.integers(1, 400), st.integers(0, 2**32))
def test_checksums_of_blocks_are_seeded_with_key_and_length(
    count: int, block_bytes: int, number: int
) -> None:
    rng = np.random.default_rng(number)
    blocks = rng.integers(0, 256, (count, block_bytes), np.uint8)
    keys = rng.integers(0, 256, (count, 16), np.uint8)
    wanted = [
        register(block.tobytes(), seed(key.tobytes(), block_bytes))
        for block, key in zip(blocks, keys, strict=True)
    ]
    assert _core.block_checksums(blocks, keys).tolist() == wanted


def test_a_block_of_zeros_has_a_checksum_of_its_own() -> None:
    """Without a seed a hole of a file would be right for every key."""
    zeros = np.zeros((2, 4096), np.uint8)
    keys = np.arange(32, dtype=np.uint8).reshape(2, 16)
    first, second = _core.block_checksums(zeros, keys).tolist()
    assert len({first, second, 0}) == 3
    assert _core.block_checksums(zeros[:1, :2048].copy(), keys[:1]).tolist() != [first]


def test_any_flipped_bit_is_seen() -> None:
    block = np.random.default_rng(0).integers(0, 256, (1, 512), np.uint8)
    key = np.zeros((1, 16), np.uint8)
    right = _core.block_checksums(block, key)[0]
    for bit in range(0, 4096, 5):
        damaged = block.copy()
        damaged[0, bit // 8] ^= 1 << (bit % 8)
        assert _core.block_checksums(damaged, key)[0] != right


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="2 blocks but 1 keys"):
        _core.block_checksums(np.zeros((2, 8), np.uint8), np.zeros((1, 16), np.uint8))
    with pytest.raises(UsageError, match="target has 3 bytes, source 4"):
        _core.copy_only(np.zeros(3, np.uint8), np.zeros(4, np.uint8))
    with pytest.raises(UsageError, match='no checksum kernel "abacus"'):
        _core.crc64(np.zeros(4, np.uint8), 0, "abacus")


@given(st.data())
def test_rows_are_checked_where_they_lie(data: st.DataObject) -> None:
    memory = np.frombuffer(data.draw(st.binary(min_size=64, max_size=300)), np.uint8)
    rows, canonical = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        size = data.draw(st.integers(1, 8))
        count = data.draw(st.integers(1, 4))
        stride = data.draw(st.integers(size, 12))
        offset = data.draw(st.integers(0, len(memory) - (count - 1) * stride - size))
        rows.append((offset, stride, count, size))
        starts = range(offset, offset + count * stride, stride)
        canonical.append(b"".join(memory[at : at + size].tobytes() for at in starts))
    keys = np.frombuffer(
        data.draw(st.binary(min_size=16 * len(rows), max_size=16 * len(rows))), np.uint8
    )
    sums = _core.row_checksums(memory, np.array(rows, np.int64), keys.reshape(-1, 16))
    expected = [
        register(block, seed(key.tobytes(), len(block)))
        for block, key in zip(canonical, keys.reshape(-1, 16), strict=True)
    ]
    assert sums.tolist() == expected
    unkeyed = _core.row_checksums(memory, np.array(rows, np.int64))
    assert unkeyed.tolist() == [register(block, seed(bytes(16), len(block))) for block in canonical]


@pytest.mark.parametrize(
    "row",
    [
        (-1, 0, 1, 4),
        (0, 0, 1, 65),
        (60, 0, 1, 5),
        (0, 8, 0, 4),
        (0, 3, 2, 4),
        (0, 1 << 62, 3, 1 << 62),
        (0, 0, 1, 0),
    ],
)
def test_rows_outside_the_memory_are_refused(row: tuple[int, ...]) -> None:
    memory = np.zeros(64, np.uint8)
    with pytest.raises(UsageError, match="block 1 does not lie within the 64 bytes"):
        _core.row_checksums(memory, np.array([(0, 0, 1, 64), row], np.int64))
    with pytest.raises(UsageError, match="as many keys"):
        _core.row_checksums(
            memory, np.array([(0, 0, 1, 64)], np.int64), np.zeros((2, 16), np.uint8)
        )
