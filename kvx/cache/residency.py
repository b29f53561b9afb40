"""Which tier holds which block; looked up, never moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.result import TierKind

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.pool import Pool
    from kvx.cache.s3.tier import S3Tier
    from kvx.cache.shared import Shared

    Keys = npt.NDArray[np.uint8]
    Tiers = npt.NDArray[np.uint8]


def find_prefix(
    shared: Shared, s3: S3Tier | None, block_bytes: int, keys: Keys, tiers: Tiers
) -> int:
    """Fill `tiers` along the longest prefix that the tiers hold between them; return its length.

    Args:
        shared: The tiers.
        s3: The S3 tier if it takes such blocks.
        block_bytes: Of the blocks.
        keys: (n, 16) uint8.
        tiers: (n,) uint8 zeros.
    """
    pools = _pools(shared, block_bytes)
    # Mostly all of it is in the highest tier that has any: a match is cheaper than lookups.
    length = pools[0][1].index.match(keys, shared.now_ms(), touch=False, pin=False)[0]
    tiers[:length] = pools[0][0]
    if length == len(keys) or (len(pools) == 1 and not shared.peers and s3 is None):
        return length
    rest = tiers[length:]
    _fill(shared, s3, pools, keys[length:], rest)
    missing = (rest == TierKind.NONE).nonzero()[0]
    return length + (int(missing[0]) if len(missing) else len(rest))


def find_all(shared: Shared, s3: S3Tier | None, block_bytes: int, keys: Keys) -> Tiers:
    """Return (n,) uint8, the highest `TierKind` that holds each block, NONE for those not held."""
    tiers = np.zeros(len(keys), np.uint8)
    _fill(shared, s3, _pools(shared, block_bytes), keys, tiers)
    return tiers


def _pools(shared: Shared, block_bytes: int) -> list[tuple[TierKind, Pool]]:
    pools = shared.pools_of(block_bytes)
    if shared.nvme is not None and not shared.nvme.is_up():
        pools = [(tier, pool) for tier, pool in pools if tier is not TierKind.NVME]
    return pools


def _fill(
    shared: Shared, s3: S3Tier | None, pools: list[tuple[TierKind, Pool]], keys: Keys, tiers: Tiers
) -> None:
    now_ms = shared.now_ms()
    for tier, pool in reversed(pools):
        tiers[pool.find(keys, now_ms).mask] = tier
    if shared.peers is not None:
        absent = np.flatnonzero(tiers == TierKind.NONE)
        tiers[absent[shared.peers.holds(keys[absent])]] = TierKind.PEER
    if s3 is not None:
        absent = np.flatnonzero(tiers == TierKind.NONE)
        tiers[absent[s3.holds(keys[absent])]] = TierKind.S3
