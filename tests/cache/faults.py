"""What fault tests have in common: metrics read back, floods, and waiting for a condition."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

import kvx
from kvx.cache.assembly import FaultInjection
from kvx_ext import _core
from tests.cache.conftest import BLOCK_BYTES, make_blocks, make_hashes

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

DRAM_BLOCKS = (2 << 20) // BLOCK_BYTES
FLOOD_FIRST = 1_000_000


def injected() -> tuple[_core.Failpoints, FaultInjection]:
    """Return failpoints without rules, and what to open a cache with."""
    failpoints = _core.Failpoints()
    return failpoints, FaultInjection(failpoints)


def sample(cache: kvx.TieredCache, name: str, **labels: str) -> float:
    """Return the value of one metric; 0 where it was never counted."""
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    wanted = f"{name}{{{inside}}} " if labels else f"{name} "
    for line in cache.metrics.render().splitlines():
        if line.startswith(wanted):
            return float(line.removeprefix(wanted))
    return 0.0


def flood(space: kvx.CacheSpace, count: int = 2 * DRAM_BLOCKS, *, first: int = FLOOD_FIRST) -> None:
    """Push everything else out of DRAM."""
    for start in range(first, first + count, 64):
        blocks = make_blocks(64, first=start, block_bytes=space.block_bytes)
        space.offload(make_hashes(64, first=start), blocks).wait()


def put_on_nvme(cache: kvx.TieredCache, space: kvx.CacheSpace, count: int) -> None:
    """Store blocks 0 to count and let only NVMe hold them."""
    blocks = make_blocks(count, block_bytes=space.block_bytes)
    space.offload(make_hashes(count), blocks).wait()
    assert cache.flush(10.0)
    flood(space)
    assert cache.flush(10.0)
    match = space.match(make_hashes(count))
    assert match.blocks_in(kvx.TierKind.NVME) == count


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.001)


def onboard(
    space: kvx.CacheSpace, hashes: npt.NDArray[np.uint8], *, first: int = 0
) -> kvx.TransferResult:
    """Onboard blocks `first` onwards; require right bytes where served, none where missed."""
    target = np.full((len(hashes), space.block_bytes), 7, np.uint8)
    result = space.onboard(hashes, target).wait()
    check_target(space, result, target, first=first)
    return result


def check_target(
    space: kvx.CacheSpace,
    result: kvx.TransferResult,
    target: npt.NDArray[np.uint8],
    *,
    first: int = 0,
) -> None:
    """Require right bytes where served, and untouched or poisoned ones where missed."""
    wanted = make_blocks(len(target), first=first, block_bytes=space.block_bytes)
    served = result.reasons == kvx.MissReason.HIT
    assert (target[served] == wanted[served]).all(), "wrong bytes were served"
    missed = target[~served]
    honest = (missed == 7).all(axis=1) | (missed == 0xFF).all(axis=1)
    assert honest.all(), "a miss left bytes behind"
