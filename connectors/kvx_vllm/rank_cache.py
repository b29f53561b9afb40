"""The kvx cache of one rank of an engine: opened by its worker, asked by its scheduler."""

from __future__ import annotations

import logging
import threading
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import kvx
from kvx.namespace import BLOCK_BYTES_MAX, BLOCK_BYTES_MIN

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from vllm.v1.kv_offload.base import CanonicalKVCaches
    from vllm.v1.kv_offload.config import OffloadingParallelConfig

    from kvx_vllm.settings import Settings

_log = logging.getLogger(__name__)
_CLOSE_S = 10.0
# Of this process, by engine and rank. A scheduler that runs where its worker does asks it directly.
_here: dict[tuple[str, int], RankCache] = {}
_here_lock = threading.Lock()


@dataclass(slots=True)
class GroupCache:
    """One KV cache group of a rank.

    Attributes:
        facts: Of its namespace.
        view: The engine's blocks.
        space: Where they are kept.
        is_on_device: Whether copies are ordered by a CUDA stream.
    """

    facts: dict[str, Any]
    view: kvx.BlockView
    space: kvx.CacheSpace
    is_on_device: bool


class RankCache:
    """The tiers of one rank, and its groups in them. Thread-safe."""

    def __init__(
        self,
        engine: tuple[str, int],
        cache: kvx.TieredCache,
        groups: Sequence[tuple[dict[str, Any], kvx.BlockView, bool]],
    ) -> None:
        """Take over an open cache.

        Args:
            engine: The engine's id, and the rank.
            cache: Closed with this.
            groups: Facts of the namespace, the engine's memory, whether that is a device's.
        """
        self._engine = engine
        self.cache = cache
        self.groups = [
            GroupCache(facts, view, cache.namespace(**facts), is_on_device)
            for facts, view, is_on_device in groups
        ]
        with _here_lock:
            _here[engine] = self

    def locate(self, group: int, hashes: Sequence[bytes], first: int) -> kvx.Location:
        """Return where the blocks of a prompt from `first` on are, for one group."""
        return self.groups[group].space.locate(list(hashes), first=first)

    def reset(self) -> None:
        """Let nothing be found that was stored before, here, in a bucket, or at peers.

        Whoever resets has mostly changed the weights; what is still on its way in must not be
        found either. So blocks live under another namespace from now on, of this life alone.
        """
        life = uuid.uuid4().hex
        for group in self.groups:
            group.facts["revision"] = f"{group.facts['revision'].split('#')[0]}#{life}"
            group.space = self.cache.namespace(**group.facts)
        self.cache.clear()
        _log.info("the cache was reset: blocks stored from now on are lost with this engine")

    def close(self) -> None:
        """Close the cache within a bound."""
        with _here_lock:
            _here.pop(self._engine, None)
        report = self.cache.close(timeout_s=_CLOSE_S)
        _log.info("kvx cache closed: %s", report)


def rank_cache_here(engine_id: str, rank: int) -> RankCache | None:
    """Return the cache of a rank that runs in this process; None when it runs elsewhere."""
    with _here_lock:
        return _here.get((engine_id, rank))


def views_of(caches: CanonicalKVCaches) -> list[tuple[tuple[int, ...], kvx.BlockView, bool]]:
    """Return plane sizes, blocks, and whether they are a device's, of each group.

    Groups may lie over the same bytes: their blocks have different numbers. Layers of one group
    that do are one run.

    Args:
        caches: vLLM's view of its KV: (num_blocks, page) int8 tensors.

    Raises:
        kvx.ConfigError: Blocks are too small or too large, or runs of one group cross.
    """
    found = []
    for place, refs in enumerate(caches.group_data_refs):
        bytes_of: dict[int, int] = {}
        for ref in refs:
            page = max(ref.page_size_bytes, bytes_of.get(ref.tensor_idx, 0))
            bytes_of[ref.tensor_idx] = page
        planes: list[torch.Tensor] = [
            caches.tensors[index].tensor[:, :size] for index, size in bytes_of.items()
        ]
        sizes = tuple(bytes_of.values())
        view = kvx.BlockView(kvx.KVLayout.of_planes(sizes), planes)
        _check_blocks(place, view)
        found.append((sizes, view, planes[0].is_cuda))
    return found


def _check_blocks(group: int, view: kvx.BlockView) -> None:
    size = view.layout.block_bytes
    if not BLOCK_BYTES_MIN <= size <= BLOCK_BYTES_MAX:
        change = "larger" if size < BLOCK_BYTES_MIN else "smaller"
        raise kvx.ConfigError(
            f"blocks of KV cache group {group} have {size} bytes, and kvx keeps blocks of "
            f"{BLOCK_BYTES_MIN} to {BLOCK_BYTES_MAX}: give vLLM a {change} --block-size"
        )
    if view.overlapping is not None:
        one, other = view.overlapping
        raise kvx.ConfigError(
            f"layers {one} and {other} of KV cache group {group} share bytes in part, which kvx "
            "cannot keep apart: leave the connector out for this model, and tell us of it"
        )


def config_of_rank(settings: Settings, parallel: OffloadingParallelConfig) -> kvx.CacheConfig:
    """Return the configuration of one rank: its share of memory, a directory of its own."""
    if parallel.world_size == 1 and parallel.data_parallel_size == 1:
        return settings.cache
    label = f"dp{parallel.data_parallel_index}-rank{parallel.rank}"
    return settings.cache.of_rank(label, parallel.world_size)
