"""Copies and poison on the GPU's own code; see tests/sim/kernels.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.transfer import relayout
from tests.sim.kernels import AccessRefused, Dim3, Gpu

# Of one thread, of fewer than a team has, of a last team that is short, of all three dimensions.
GRIDS: list[tuple[Dim3, Dim3]] = [
    ((1, 1, 1), (1, 1, 1)),
    ((1, 1, 1), (7, 1, 1)),
    ((1, 1, 1), (45, 1, 1)),
    ((4, 1, 1), (512, 1, 1)),
    ((2, 3, 2), (8, 2, 4)),
]
grids = st.sampled_from(GRIDS)


def random_bytes(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@st.composite
def fragment_tables(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Draw (n, 3) target, source and bytes within two buffers, and the sizes of those."""
    sizes = draw(
        st.lists(
            st.one_of(st.integers(0, 70), st.integers(0, 3000), st.sampled_from([8192, 20000])),
            min_size=1,
            max_size=8,
        )
    )
    rows, target, source = [], 0, 0
    for size in sizes:
        target += draw(st.integers(0, 20))
        source += draw(st.integers(0, 20))
        rows.append((target, source, size))
        target += size
        source += size
    shuffled = draw(st.permutations(rows))
    return np.array(shuffled, np.uint64), target, source


@settings(max_examples=150, deadline=None)
@given(
    table=fragment_tables(),
    grid=grids,
    target_offset=st.integers(0, 17),
    source_offset=st.integers(0, 17),
    fragment_bytes_max=st.sampled_from([0, 1, 8192, 8193, 100_000]),
    seed=st.integers(0, 2**32),
)
def test_fragments_are_copied_and_nothing_else(
    *,
    table: tuple[np.ndarray, int, int],
    grid: tuple[Dim3, Dim3],
    target_offset: int,
    source_offset: int,
    fragment_bytes_max: int,
    seed: int,
) -> None:
    fragments, target_bytes, source_bytes = table
    source = random_bytes(source_bytes + 1, seed)
    target = random_bytes(target_bytes + 1, seed + 1)
    expected = target.copy()
    for to, at, size in fragments.astype(int):
        expected[to : to + size] = source[at : at + size]

    gpu = Gpu()
    bases = [
        gpu.place(target, offset=target_offset),
        gpu.place(source, offset=source_offset, is_writable=False),
        0,
    ]
    addressed = fragments + np.array(bases, np.uint64)
    where = gpu.place(addressed, is_writable=False)
    gpu.run(
        "kvx_copy_fragments",
        where,
        len(addressed),
        fragment_bytes_max,
        grid=grid[0],
        block=grid[1],
    )
    np.testing.assert_array_equal(target, expected)


def run_copy(target_shift: int, source_shift: int, size: int) -> None:
    gpu = Gpu()
    target, source = random_bytes(4096, 1), random_bytes(4096, 2)
    to, at = gpu.place(target), gpu.place(source, is_writable=False)
    table = np.array([[to + target_shift, at + source_shift, size]], np.uint64)
    gpu.run("kvx_copy_fragments", gpu.place(table), 1, size)


@pytest.mark.parametrize(
    ("target_shift", "source_shift", "size", "is_write"),
    [
        (0, 16, 4096, False),
        (0, 4096, 1, False),
        (16, 0, 4096, True),
        (-1, 0, 16, True),
        (4081, 4081, 16, False),
    ],
)
def test_what_leaves_a_buffer_is_refused(
    target_shift: int, source_shift: int, size: int, *, is_write: bool
) -> None:
    run_copy(0, 0, 4096)
    with pytest.raises(AccessRefused) as refused:
        run_copy(target_shift, source_shift, size)
    assert refused.value.is_write == is_write


def test_a_source_is_not_written() -> None:
    gpu = Gpu()
    memory = gpu.place(random_bytes(64, 1), is_writable=False)
    with pytest.raises(AccessRefused, match="write"):
        gpu.run("kvx_poison", memory, 64)


def test_a_misaligned_table_is_refused() -> None:
    table = np.zeros(4, np.uint64)
    gpu = Gpu()
    at = gpu.place(table)
    gpu.run("kvx_copy_fragments", at + 8, 1, 1)
    with pytest.raises(AccessRefused):
        gpu.run("kvx_copy_fragments", at + 4, 1, 1)


def test_no_fragments_touch_nothing() -> None:
    Gpu().run("kvx_copy_fragments", 0, 0, 0)
    Gpu().run("kvx_poison", 0, 0)


@settings(max_examples=100, deadline=None)
@given(grids, st.integers(0, 40), st.integers(0, 2000))
def test_poison(grid: tuple[Dim3, Dim3], begin: int, size: int) -> None:
    memory = random_bytes(begin + size + 40, size)
    expected = memory.copy()
    relayout.poison(expected[begin : begin + size])
    gpu = Gpu()
    gpu.run("kvx_poison", gpu.place(memory) + begin, size, grid=grid[0], block=grid[1])
    np.testing.assert_array_equal(memory, expected)
    assert (expected[begin : begin + size] == 0xFF).all()
