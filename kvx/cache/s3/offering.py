"""Which blocks of an offload make groups that can be stored as objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvx.block import as_hash_array
from kvx.cache.reasons import MissReason

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.result import TransferResult
    from kvx.cache.s3.tier import S3Tier
    from kvx.cache.space import CacheSpace, Hashes
    from kvx.transfer.handle import Transfer


def offer_groups(
    tier: S3Tier,
    space: CacheSpace,
    transfer: Transfer[TransferResult],
    keys: npt.NDArray[np.uint8],
    prefix: Hashes,
) -> None:
    """Offer the groups that an offload completes, once its blocks are there.

    Args:
        tier: Takes them.
        space: Their namespace.
        transfer: The offload.
        keys: (n, 16) uint8 of its blocks.
        prefix: Hashes of the blocks before them in the prompt.
    """
    width = tier.config.blocks_per_object
    num_before = len(prefix)
    # Only the group that the offload goes on with: those before it are whole.
    open_hashes = prefix[num_before - num_before % width :]
    if len(open_hashes):
        keys = np.concatenate([space.namespace.keys(as_hash_array(open_hashes)), keys])
    first_block = num_before - len(open_hashes)
    num_groups = len(keys) // width
    if num_groups == 0:
        return
    groups = keys[: num_groups * width].reshape(-1, width, 16)

    def offer() -> None:
        result = transfer.result
        assert result is not None, "it has ended"
        has_arrived = np.ones(num_groups * width, np.bool_)
        is_hit = (result.reasons == MissReason.HIT)[: num_groups * width - len(open_hashes)]
        has_arrived[len(open_hashes) :] = is_hit
        whole = np.flatnonzero(has_arrived.reshape(-1, width).all(axis=1))
        tier.writing.offer(space.namespace_id, first_block + whole * width, groups[whole])

    transfer.add_done_callback(offer)
