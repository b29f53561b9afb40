"""Blocks of peers for an engine on the simulated GPU, and within one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

import kvx
from tests.cache.engine_memory import fetch, held, plain_space, store
from tests.cache.on_device import Gpu
from tests.cache.test_layers import HASHES, LAYOUT, NUM_BLOCKS, ROWS, Planes
from tests.waiting import eventually

pytestmark = [
    pytest.mark.usefixtures("runtime_directory"),
    pytest.mark.parametrize("gpu", ["device, seed 1"], indirect=True),
]

DRAM = {"kind": "dram", "capacity": "2MiB"}
PEER = {"kind": "peer", "publish_s": 0.005}


@contextlib.contextmanager
def two(gpu: Gpu | None) -> Iterator[tuple[kvx.TieredCache, kvx.TieredCache]]:
    """Open a cache without a GPU, and one with HBM that reads from it."""
    assert gpu is not None
    hbm = {"kind": "hbm", "capacity": "1MiB", "emulation": "never"}
    device = {"driver": str(gpu.driver.path), "calibrate": False}
    with (
        kvx.Agent("a") as one,
        kvx.Agent("b") as other,
        kvx.TieredCache.open({"tiers": [DRAM, PEER]}, agent=one) as owner,
        kvx.TieredCache.open(
            {"tiers": [hbm, DRAM, {**PEER, "peers": [one.addresses[0]]}], "gpu": device},
            agent=other,
        ) as reader,
    ):
        yield owner, reader


def test_blocks_of_a_peer_reach_the_device_and_hbm(gpu: Gpu | None) -> None:
    with two(gpu) as (owner, reader):
        store(plain_space(owner), None, 16)
        space = plain_space(reader)
        hashes = np.concatenate([space.namespace.keys(HASHES)])
        assert eventually(lambda: reader.stats()["peer"]["known_blocks"] == 16)
        result = fetch(space, gpu, 16)
        assert result.num_blocks == 16
        assert (result.tiers == kvx.TierKind.PEER).all()
        assert {key.tobytes() for key in hashes} <= held(reader, "hbm")
        assert (fetch(space, gpu, 16).tiers == kvx.TierKind.HBM).all()


def test_layers_of_blocks_that_some_tiers_and_a_peer_have(gpu: Gpu | None) -> None:
    assert gpu is not None
    with two(gpu) as (owner, reader):
        facts = {"block_bytes": LAYOUT.block_bytes}
        theirs, ours = plain_space(owner, **facts), plain_space(reader, **facts)
        theirs.offload(HASHES, ROWS).wait()
        assert eventually(lambda: reader.stats()["peer"]["known_blocks"] == NUM_BLOCKS)
        # Every second one is in DRAM already, and nowhere else.
        ours.prefetch(HASHES[::2]).wait()
        planes = Planes(gpu)
        transfer = ours.onboard(HASHES, planes.blocks, is_layerwise=True)
        for layer in range(LAYOUT.num_layers):
            assert transfer.wait_layer(layer) == NUM_BLOCKS
            got: npt.NDArray[np.uint8] = planes.read_layer(layer)
            width = got.shape[1]
            assert (got == ROWS[:, layer * width : (layer + 1) * width]).all()
        result = transfer.wait()
        assert result.tiers.tolist() == [kvx.TierKind.DRAM, kvx.TierKind.PEER] * (NUM_BLOCKS // 2)
        assert (planes.read() == ROWS).all()


def test_a_shared_agent_may_be_closed_first(gpu: Gpu | None) -> None:
    assert gpu is not None
    agent = kvx.Agent("a")
    with kvx.TieredCache.open({"tiers": [DRAM, PEER]}, agent=agent) as cache:
        store(plain_space(cache), None, 4)
        agent.close()
        assert fetch(plain_space(cache), None, 5).num_blocks == 4
