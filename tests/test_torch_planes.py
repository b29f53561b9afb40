"""PyTorch tensors as planes; types that NumPy lacks included. kvx itself never imports torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import kvx
from kvx.buffers import describe
from kvx.layout import BlockView, KVLayout
from tests.cache.conftest import make_hashes

torch = pytest.importorskip("torch", reason="tests/requirements-models.txt is not installed")

LAYERS, HEADS, DIM, TOKENS, NUM_BLOCKS = 3, 2, 64, 8, 12
LAYOUT = KVLayout.of_model(
    "layer_first", num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, block_tokens=TOKENS,
    item_bytes=2,
)  # fmt: skip


def paged_cache(seed: int) -> list[Any]:
    """Return a (2, blocks, tokens, heads, dim) bfloat16 tensor for each layer."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, NUM_BLOCKS, TOKENS, HEADS, DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.bfloat16) for _ in range(LAYERS)]


def in_three_ways(layers: list[Any]) -> list[list[object]]:
    pairs = [(layer[0], layer[1]) for layer in layers]
    return [layers, pairs, [plane for pair in pairs for plane in pair]]


@pytest.mark.parametrize("way", range(3))
def test_blocks_move_between_torch_caches(way: int) -> None:
    source, target = paged_cache(1), paged_cache(2)
    expected = [layer.clone() for layer in target]
    sources, targets = [5, 0, 11], [2, 3, 7]
    for layer, other in zip(expected, source, strict=True):
        layer[:, targets] = other[:, sources]
    config = {"tiers": [{"kind": "dram", "capacity": "1MiB"}]}
    with kvx.TieredCache.open(config) as cache:
        space = cache.namespace(
            model="m", dtype="bfloat16", block_bytes=LAYOUT.block_bytes, layout=LAYOUT.fingerprint
        )
        hashes = make_hashes(3)
        space.offload(hashes, BlockView(LAYOUT, in_three_ways(source)[way]).slots(sources)).wait()
        view = BlockView(LAYOUT, in_three_ways(target)[way])
        assert space.onboard(hashes, view.slots(targets)).wait().num_blocks == 3
        rows = torch.zeros((3, LAYOUT.block_bytes // 2), dtype=torch.bfloat16)
        assert space.onboard(hashes, rows).wait().num_blocks == 3
    assert all(torch.equal(a, b) for a, b in zip(target, expected, strict=True))
    first = torch.cat([layer[side, 5].flatten() for layer in source for side in range(2)])
    assert torch.equal(rows[0], first)


@pytest.mark.parametrize(
    "name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16", "complex64", "bool", "int64"]
)
def test_every_dtype_is_bytes(name: str) -> None:
    tensor = torch.zeros((6, 4, 8)).to(getattr(torch, name))[::2, :3]
    found = describe(tensor)
    item_bytes = tensor.element_size()
    assert found.address == tensor.data_ptr()
    assert found.shape == tuple(tensor.shape)
    assert found.strides_bytes == tuple(stride * item_bytes for stride in tensor.stride())
    assert found.item_bytes == item_bytes
    assert found.is_writable
    assert found.kind is kvx.MemoryKind.HOST


def test_a_tensor_without_elements() -> None:
    assert describe(torch.zeros((0, 8))).shape == (0, 8)
    assert BlockView.of_blocks(torch.zeros((0, 8))).num_blocks == 0


def test_a_tensor_that_needs_gradients_says_so() -> None:
    with pytest.raises(kvx.UsageError, match="grad"):
        describe(torch.zeros((2, 8), requires_grad=True))


def test_the_storage_outlives_its_tensor() -> None:
    tensor = torch.full((4, 4096), 7, dtype=torch.uint8)
    view = BlockView.of_blocks(tensor)
    del tensor
    torch.zeros((4, 4096), dtype=torch.uint8)  # would take the place of storage that was freed
    config = {"tiers": [{"kind": "dram", "capacity": "1MiB"}]}
    with kvx.TieredCache.open(config) as cache:
        space = cache.namespace(model="m", dtype="u8", block_bytes=4096)
        space.offload(make_hashes(4), view.slots(range(4))).wait()
        rows = torch.zeros((4, 4096), dtype=torch.uint8)
        space.onboard(make_hashes(4), rows).wait()
    assert bool((rows == 7).all())


def test_kvx_does_not_import_torch() -> None:
    code = "import sys, kvx; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
