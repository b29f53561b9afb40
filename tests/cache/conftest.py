"""Small caches for tests, and blocks whose bytes tell which block they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvx
from kvx.cache.assembly import FaultInjection
from tests.cache import on_device
from tests.sim.cuda_fixture import loaded_driver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from tests.sim.cuda_driver import SimulatedDriver

__all__ = ["loaded_driver"]

BLOCK_BYTES = 16 << 10

Opener = Callable[..., kvx.TieredCache]


def make_hashes(count: int, *, first: int = 0) -> npt.NDArray[np.uint8]:
    """Return (count, 32) uint8 hashes, different for different numbers."""
    numbers = np.arange(first, first + count, dtype=np.uint64)
    hashes = np.zeros((count, 4), np.uint64)
    hashes[:, 0] = numbers * np.uint64(0x9E3779B97F4A7C15)
    hashes[:, 3] = numbers
    return hashes.view(np.uint8)


def make_blocks(
    count: int, *, first: int = 0, block_bytes: int = BLOCK_BYTES
) -> npt.NDArray[np.uint8]:
    """Return (count, block_bytes) uint8 blocks; number `first + i` always has the same bytes."""
    blocks = np.empty((count, block_bytes), np.uint8)
    for row in range(count):
        blocks[row] = np.random.default_rng(first + row).integers(0, 256, block_bytes, np.uint8)
    return blocks


@pytest.fixture(params=["host", "device, seed 1", "device, seed 2"])
def gpu(request: pytest.FixtureRequest) -> Iterator[on_device.Gpu | None]:
    """Hand out where the blocks of this test lie: None for host memory, else the simulated GPU.

    The seed decides in which order the copies of a batch are made.
    """
    if request.param == "host":
        yield None
        return
    # Never set back: what an earlier test left to the garbage collector would be freed twice.
    driver: SimulatedDriver = request.getfixturevalue("loaded_driver")
    driver.set_shuffle_seed(int(request.param[-1]))
    with on_device.use(driver) as made:
        yield made
    convictions = driver.convictions()
    driver.clear_convictions()
    assert not convictions, "\n".join(convictions)


@pytest.fixture
def open_cache(tmp_path: Path, gpu: on_device.Gpu | None) -> Iterator[Opener]:
    """Open caches of 2 MiB DRAM, over NVMe unless `has_nvme` is False; closed after the test.

    With a GPU they have 1 MiB of HBM, too, unless `has_hbm` is False, and `open_space` puts blocks
    into device memory. Without one they have HBM where `hbm` is given, played by host memory.
    """
    opened: list[kvx.TieredCache] = []

    def opener(
        *,
        has_nvme: bool = True,
        has_hbm: bool = True,
        hbm: dict[str, object] | None = None,
        dram: dict[str, object] | None = None,
        nvme: dict[str, object] | None = None,
        faults: FaultInjection | None = None,
        clock: Callable[[], float] = time.time,
        **settings: object,
    ) -> kvx.TieredCache:
        tiers: list[dict[str, object]] = [{"kind": "dram", "capacity": "2MiB", **(dram or {})}]
        if has_hbm and (gpu is not None or hbm is not None):
            emulation = "always" if gpu is None else "never"
            device_tier = {"kind": "hbm", "capacity": "1MiB", "emulation": emulation}
            tiers.insert(0, {**device_tier, **(hbm or {})})
        if gpu is not None:
            settings.setdefault("gpu", {"driver": str(gpu.driver.path), "calibrate": False})
        if has_nvme:
            tier = {
                "kind": "nvme",
                "path": str(tmp_path / "tier"),
                "capacity": "16MiB",
                "extent": "4MiB",
                "durability": "none",
                "rewarm": False,
            }
            tiers.append({**tier, **(nvme or {})})
        cache = kvx.TieredCache.open({"tiers": tiers, **settings}, faults=faults, clock=clock)
        opened.append(cache)
        return cache

    yield opener
    for cache in opened:
        cache.close(timeout_s=2.0)


@pytest.fixture(scope="module")
def runtime_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep socket files of agents apart; processes that are spawned inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        yield


def open_space(
    cache: kvx.TieredCache, *, block_bytes: int = BLOCK_BYTES, tenant: str = "", **facts: object
) -> kvx.CacheSpace:
    """Open a namespace of a test model, its blocks in device memory if the test is run on it."""
    space = cache.namespace(
        model="test", dtype="float16", block_bytes=block_bytes, tenant=tenant, **facts
    )
    return on_device.wrapped(space)
