"""Layouts and views: an engine's planes against plain numpy, and what a view refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvx
from kvx.errors import UsageError
from kvx.layout import BlockView, KVLayout
from tests.cache.conftest import make_blocks, make_hashes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

LAYERS, HEADS, DIM, TOKENS = 3, 2, 64, 16
NUM_BLOCKS = 24
# Hashes nobody used before: the same hash always means the same bytes.
_fresh = itertools.count(step=NUM_BLOCKS)
LAYOUT = KVLayout.of_model(
    "layer_first",
    num_layers=LAYERS,
    num_kv_heads=HEADS,
    head_dim=DIM,
    block_tokens=TOKENS,
    item_bytes=2,
)


@pytest.fixture(scope="module")
def space() -> Iterator[kvx.CacheSpace]:
    config = {"tiers": [{"kind": "dram", "capacity": "4MiB"}]}
    with kvx.TieredCache.open(config) as cache:
        yield cache.namespace(
            model="m", dtype="float16", block_bytes=LAYOUT.block_bytes, layout=LAYOUT.fingerprint
        )


def paged_cache(seed: int) -> npt.NDArray[np.float16]:
    """Return (layers, 2, blocks, heads, tokens, dim): an engine's layer-first KV cache."""
    shape = (LAYERS, 2, NUM_BLOCKS, HEADS, TOKENS, DIM)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def planes_of(cache: npt.NDArray[np.float16]) -> list[npt.NDArray[np.uint8]]:
    return [
        cache[layer, side].reshape(NUM_BLOCKS, -1).view(np.uint8)
        for layer in range(LAYERS)
        for side in range(2)
    ]


def canonical(cache: npt.NDArray[np.float16], block: int) -> bytes:
    return b"".join(
        cache[layer, side, block].tobytes() for layer in range(LAYERS) for side in range(2)
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, max_size=NUM_BLOCKS, unique=True),
    st.integers(0, 2**20),
)
def test_blocks_move_between_any_slots(
    space: kvx.CacheSpace, sources: list[int], seed: int
) -> None:
    """Blocks offloaded from some slots arrive in others, and nothing else changes."""
    source, target = paged_cache(seed), paged_cache(seed + 1)
    before = target.copy()
    targets = np.random.default_rng(seed).permutation(NUM_BLOCKS)[: len(sources)].tolist()
    hashes = make_hashes(len(sources), first=next(_fresh))
    space.offload(hashes, BlockView(LAYOUT, planes_of(source)).slots(sources)).wait()
    view = BlockView(LAYOUT, planes_of(target))
    assert space.onboard(hashes, view.slots(targets)).wait().num_blocks == len(sources)
    before[:, :, targets] = source[:, :, sources]
    assert (target.view(np.uint16) == before.view(np.uint16)).all()


def test_the_canonical_form_is_the_planes_one_after_the_other(space: kvx.CacheSpace) -> None:
    cache = paged_cache(5)
    hashes = make_hashes(4, first=1 << 40)
    space.offload(hashes, BlockView(LAYOUT, planes_of(cache)).slots([7, 0, 23, 7])).wait()
    blocks = np.zeros((4, LAYOUT.block_bytes), np.uint8)
    assert space.onboard(hashes, blocks).wait().num_blocks == 4
    assert [row.tobytes() for row in blocks] == [canonical(cache, i) for i in (7, 0, 23, 7)]


def test_rows_may_lie_apart(space: kvx.CacheSpace) -> None:
    """The stride between blocks may be larger than a block: what lies between stays."""
    blocks = make_blocks(5, block_bytes=LAYOUT.block_bytes)
    wide = np.full((5, LAYOUT.block_bytes + 192), 7, np.uint8)
    hashes = make_hashes(5, first=1 << 41)
    space.offload(hashes, blocks).wait()
    space.onboard(hashes, wide[:, 64 : 64 + LAYOUT.block_bytes]).wait()
    assert (wide[:, 64 : 64 + LAYOUT.block_bytes] == blocks).all()
    assert (wide[:, :64] == 7).all()
    assert (wide[:, 64 + LAYOUT.block_bytes :] == 7).all()


def test_arithmetic_of_a_layout() -> None:
    assert LAYOUT.block_bytes == 2 * LAYERS * HEADS * DIM * TOKENS * 2
    assert LAYOUT.bytes_of_planes == (LAYOUT.block_bytes // 6,) * 6
    block_first = replace(LAYOUT, order="block_first")
    assert block_first.bytes_of_planes == (LAYOUT.block_bytes,)
    opaque = KVLayout.opaque(5000)
    assert opaque.bytes_of_planes == (5000,)


def test_fingerprints_tell_layouts_apart() -> None:
    """They are in the keys of stored blocks, so they must not change either."""
    names = ("num_layers", "num_kv_heads", "head_dim", "block_tokens", "item_bytes", "block_bytes")
    layouts = [LAYOUT, replace(LAYOUT, order="block_first"), KVLayout.opaque(LAYOUT.block_bytes)]
    layouts += [replace(LAYOUT, **{name: getattr(LAYOUT, name) + 1}) for name in names]
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)
    assert replace(LAYOUT).fingerprint == LAYOUT.fingerprint == "12552e15e1d11975"


@pytest.mark.parametrize(
    "name", ["num_layers", "num_kv_heads", "head_dim", "block_tokens", "item_bytes"]
)
def test_numbers_of_a_layout_are_positive(name: str) -> None:
    numbers = dict.fromkeys(
        ("num_layers", "num_kv_heads", "head_dim", "block_tokens", "item_bytes"), 1
    )
    with pytest.raises(UsageError, match="must be positive"):
        KVLayout.of_model("layer_first", **{**numbers, name: 0})


def test_planes_are_addresses_strides_and_bytes() -> None:
    cache = paged_cache(0)
    planes = planes_of(cache)
    view = BlockView(LAYOUT, planes)
    wanted = [(plane.ctypes.data, plane.strides[0], LAYOUT.bytes_of_planes[0]) for plane in planes]
    assert view.planes.tolist() == [list(row) for row in wanted]
    assert view.num_blocks == NUM_BLOCKS
    shorter = [planes[0][:10], *planes[1:]]
    assert BlockView(LAYOUT, shorter).num_blocks == 10


def read_only(plane: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    frozen = plane.copy()
    frozen.flags.writeable = False
    return frozen


ROWS = np.zeros((4, 64), np.uint8)
TWO = KVLayout("layer_first", 128, num_layers=1)


@pytest.mark.parametrize(
    ("planes", "part"),
    [
        ([ROWS], r"2 planes \(or 1 pairs\) are needed, 1 were given"),
        ([ROWS] * 3, r"2 planes \(or 1 pairs\) are needed, 3 were given"),
        ([ROWS, ROWS[:, :63]], "a plane has 63 bytes a block, 64 are needed"),
        ([ROWS, ROWS.view(np.int16)[:, :16]], "a plane has 32 bytes a block, 64 are needed"),
        ([ROWS, ROWS.reshape(-1)], r"not ndarray of shape \(256,\)"),
        ([ROWS, ROWS.tobytes()], r"not bytes of shape \(256,\)"),
        ([ROWS, 7], "int: no memory"),
        ([ROWS, np.zeros((4, 128), np.uint8)[:, ::2]], "contiguous; its strides are"),
        ([ROWS, np.asfortranarray(ROWS)], "contiguous; its strides are"),
        ([ROWS, np.broadcast_to(ROWS[0], (4, 64))], "contiguous; its strides are"),
        ([ROWS, ROWS[::-1]], "contiguous; its strides are"),
    ],
)
def test_planes_that_do_not_fit(planes: Sequence[npt.NDArray[np.uint8]], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        BlockView(TWO, planes)


@pytest.mark.parametrize(
    ("blocks", "part"),
    [
        (None, "NoneType: no memory"),
        (b"bytes", "blocks must be a"),
        (np.zeros(64, np.uint8), "blocks must be a"),
        (np.zeros((2, 2), object), "holds references"),
        ([[1, 2]], "list: no memory"),
    ],
)
def test_blocks_that_are_no_blocks(blocks: object, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        BlockView.of_blocks(blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        ([4], "4 to 4; there are 4 blocks"),
        ([0, -1], "-1 to 0; there are 4"),
        ([[0, 1]], "one-dimensional"),
        (2, "one-dimensional"),
        ([2**63], "there are 4 blocks"),
        ([0.5], "whole numbers, not float64"),
        (["a"], "whole numbers"),
    ],
)
def test_numbers_that_name_no_block(ids: object, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        BlockView.of_blocks(ROWS).slots(ids)  # type: ignore[arg-type]


def test_a_selection_keeps_its_order_and_its_own_numbers() -> None:
    ids = np.array([3, 1, 1], np.int64)
    selection = BlockView.of_blocks(ROWS).slots(ids)
    assert len(selection) == 3
    assert selection.block_bytes == 64
    ids[:] = 0
    assert selection.ids.tolist() == [3, 1, 1]
    assert len(BlockView.of_blocks(ROWS).slots([])) == 0


def test_a_target_is_writable_and_names_each_block_once() -> None:
    view = BlockView.of_blocks(ROWS.copy())
    view.slots([2, 0]).check_writable()
    with pytest.raises(UsageError, match="named twice"):
        view.slots([2, 0, 2]).check_writable()
    half_frozen = BlockView(TWO, [ROWS, read_only(ROWS)])
    assert not half_frozen.is_writable
    with pytest.raises(UsageError, match="read-only"):
        half_frozen.slots([0]).check_writable()


@given(st.data())
def test_planes_that_share_bytes_are_no_target(data: st.DataObject) -> None:
    """Against sets of bytes: two planes anywhere in one small allocation."""
    memory = np.zeros(4096, np.uint8)
    num_blocks = data.draw(st.integers(1, 3))
    layout = KVLayout("layer_first", 200, num_layers=1)
    planes, taken = [], []
    for _ in range(2):
        start, stride = data.draw(st.integers(0, 900)), data.draw(st.integers(100, 500))
        planes.append(
            np.lib.stride_tricks.as_strided(memory[start:], (num_blocks, 100), (stride, 1))
        )
        taken.append({start + stride * b + i for b in range(num_blocks) for i in range(100)})
    selection = BlockView(layout, planes).slots([0])
    if taken[0] & taken[1]:
        with pytest.raises(UsageError, match="share bytes"):
            selection.check_writable()
    else:
        selection.check_writable()


def test_planes_of_different_sizes() -> None:
    memory = np.arange(4 * 700, dtype=np.uint8).reshape(4, 700)
    layout = KVLayout.of_planes([300, 400])
    view = BlockView(layout, [memory[:, :300], memory[:, 300:]])
    assert (layout.block_bytes, layout.num_planes, view.num_blocks) == (700, 2, 4)
    assert view.planes[:, 2].tolist() == [300, 400]
    assert layout.fingerprint != KVLayout.of_planes([400, 300]).fingerprint
    with pytest.raises(UsageError, match="300 bytes a block, 400 are needed"):
        BlockView(KVLayout.of_planes([400, 300]), [memory[:, :300], memory[:, 300:]])
    for sizes in ([], [4, 0]):
        with pytest.raises(UsageError, match="positive sizes"):
            KVLayout.of_planes(sizes)
