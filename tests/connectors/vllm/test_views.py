"""vLLM's KV caches as blocks of kvx: every way in which it lays groups and layers out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor

import kvx
from kvx_vllm.rank_cache import views_of

BLOCKS, PAGE = 8, 8192


def caches(tensors: list[torch.Tensor], *groups: list[tuple[int, int]]) -> CanonicalKVCaches:
    """Return what vLLM gives: of each group, places among the tensors and bytes of a page."""
    return CanonicalKVCaches(
        tensors=[CanonicalKVCacheTensor(one, one.shape[1]) for one in tensors],
        group_data_refs=[[CanonicalKVCacheRef(*ref) for ref in refs] for refs in groups],
    )


def pages(num_bytes: int = PAGE) -> torch.Tensor:
    """Return memory for one layer, a page a block, all bytes different from block to block."""
    found = torch.zeros((BLOCKS, num_bytes), dtype=torch.int8)
    found[:] = torch.arange(BLOCKS, dtype=torch.int8)[:, None]
    return found


@pytest.fixture
def cache() -> Iterator[kvx.TieredCache]:
    with kvx.TieredCache.open({"tiers": [{"kind": "dram", "capacity": "4MiB"}]}) as opened:
        yield opened


def space_of(cache: kvx.TieredCache, name: str, sizes: tuple[int, ...]) -> kvx.CacheSpace:
    return cache.namespace(model=name, dtype="int8", block_bytes=sum(sizes))


def test_layers_of_different_sizes(cache: kvx.TieredCache) -> None:
    """As in a group of layers of one kind whose pages differ: an indexer beside latents."""
    layers = [pages(), pages(4096), pages(12288)]
    ((sizes, view, is_on_device),) = views_of(caches(layers, [(0, PAGE), (1, 4096), (2, 12288)]))
    assert (sizes, is_on_device, view.num_blocks) == ((PAGE, 4096, 12288), False, BLOCKS)
    space = space_of(cache, "sizes", sizes)
    space.offload([b"k" * 32], view.slots([3])).wait()
    assert space.onboard([b"k" * 32], view.slots([5])).wait().num_blocks == 1
    for layer in layers:
        assert (layer[5] == 3).all()
        assert (layer[4] == 4).all()


def test_pages_that_are_padded() -> None:
    ((sizes, view, _),) = views_of(caches([pages()], [(0, PAGE - 256)]))
    assert sizes == (PAGE - 256,)
    assert view.planes[0].tolist()[1:] == [PAGE, PAGE - 256]


def test_groups_that_lie_over_the_same_bytes(cache: kvx.TieredCache) -> None:
    """Hybrid models: a block belongs to one group at a time, and all share the pool."""
    layers = [pages(), pages()]
    found = views_of(caches(layers, [(0, PAGE), (1, PAGE)], [(0, PAGE), (1, PAGE)], [(0, PAGE)]))
    assert [sizes for sizes, _, _ in found] == [(PAGE, PAGE), (PAGE, PAGE), (PAGE,)]
    for number, (sizes, view, _) in enumerate(found):
        space = space_of(cache, f"group {number}", sizes)
        space.offload([b"k" * 32], view.slots([number + 1])).wait()
        assert space.onboard([b"k" * 32], view.slots([6])).wait().num_blocks == 1
        assert (layers[0][6] == number + 1).all()


def test_layers_of_a_group_that_share_a_page(cache: kvx.TieredCache) -> None:
    """Layers that use the KV of others: one run, of the longest of their pages."""
    layers = [pages(), pages()]
    ((sizes, view, _),) = views_of(caches(layers, [(0, 4096), (1, PAGE), (0, PAGE)]))
    assert sizes == (PAGE, PAGE)
    assert view.overlapping is None
    space = space_of(cache, "shared", sizes)
    space.offload([b"k" * 32], view.slots([2])).wait()
    assert space.onboard([b"k" * 32], view.slots([7])).wait().num_blocks == 1


def test_a_packed_block_is_one_run() -> None:
    packed = torch.zeros((BLOCKS, 5 * PAGE), dtype=torch.int8)
    found = views_of(caches([packed], [(0, 5 * PAGE)], [(0, 5 * PAGE)]))
    assert [sizes for sizes, _, _ in found] == [(5 * PAGE,)] * 2


def test_layers_side_by_side_in_each_block() -> None:
    backing = torch.zeros((BLOCKS, 3 * PAGE), dtype=torch.int8)
    layers = [backing[:, first * PAGE : (first + 1) * PAGE] for first in range(3)]
    ((_, view, _),) = views_of(caches(layers, [(0, PAGE), (1, PAGE), (2, PAGE)]))
    assert view.overlapping is None


@pytest.mark.parametrize("num_bytes", [2048, 65 << 20])
def test_blocks_that_kvx_does_not_keep(num_bytes: int) -> None:
    memory = torch.empty((1, num_bytes), dtype=torch.int8)
    with pytest.raises(kvx.ConfigError) as caught:
        views_of(caches([memory], [(0, num_bytes)]))
    said = f"group 0 cannot be kept: block_bytes is {num_bytes}; 4096 to 67108864 fit; give vLLM"
    assert said in str(caught.value)


def test_layers_that_cross_are_refused_at_the_start() -> None:
    backing = torch.zeros((BLOCKS, 2 * PAGE), dtype=torch.int8)
    layers = [backing[:, :PAGE], backing[:, 4096 : 4096 + PAGE]]
    with pytest.raises(kvx.ConfigError, match="layers 0 and 1 of KV cache group 0 share bytes"):
        views_of(caches(layers, [(0, PAGE), (1, PAGE)]))
