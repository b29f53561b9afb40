"""The kvx cache of one rank of an engine: opened by its worker, asked by its scheduler."""

from __future__ import annotations

import logging
import threading
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata

import kvx
from kvx_vllm.rank_server import RankServer, socket_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from vllm.v1.kv_offload.base import CanonicalKVCaches
    from vllm.v1.kv_offload.config import OffloadingParallelConfig

    from kvx_vllm.settings import Settings

_log = logging.getLogger(__name__)
# vLLM gives its workers 5 seconds to end.
_CLOSE_S = 4.0
# Of this process, by engine and rank. A scheduler that runs where its worker does asks it directly.
_here: dict[tuple[str, int], RankCache] = {}
_here_lock = threading.Lock()


@dataclass
class RankAddress(KVConnectorHandshakeMetadata):
    """Where a rank can be asked; told to the scheduler once, at start.

    Attributes:
        rank: Which.
        path: Of the socket it listens on.
    """

    rank: int
    path: str


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
        self._life = 0
        self._life_lock = threading.Lock()
        self._server: RankServer | None = None
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

    def begin_life(self, life: int) -> bool:
        """Let nothing be found that was stored in an earlier life of the engine.

        The scheduler counts lives; whatever it says to a rank names one, and the first that names a
        new one resets the rank, by whichever way it came.

        Args:
            life: One more after every reset.

        Returns:
            False where a later one has begun: what belongs to this one is void.
        """
        with self._life_lock:
            if life > self._life:
                self._reset()
                self._life = life
            return life == self._life

    def serve(self) -> None:
        """Let a scheduler in another process ask.

        Raises:
            kvx.ConfigError: Another engine has the same id.
        """
        self._server = RankServer(socket_path(*self._engine), self)

    @property
    def address(self) -> RankAddress | None:
        """Where a scheduler in another process asks; None where it is in this one."""
        if self._server is None:
            return None
        return RankAddress(self._engine[1], str(self._server.path))

    def close(self) -> None:
        """Close the cache within a bound."""
        with _here_lock:
            _here.pop(self._engine, None)
        if self._server is not None:
            self._server.close()
        report = self.cache.close(timeout_s=_CLOSE_S)
        _log.info("kvx cache closed: %s", report)

    def _reset(self) -> None:
        """Take other namespaces, of this life alone, and let go of what is in the old ones.

        Whoever resets has mostly changed the weights: what a bucket or a peer holds, and what is
        still on its way in, must not be found either.
        """
        life = uuid.uuid4().hex
        for group in self.groups:
            group.facts["revision"] = f"{group.facts['revision'].split('#')[0]}#{life}"
            group.space = self.cache.namespace(**group.facts)
        self.cache.clear()
        _log.info("the cache was reset: blocks stored from now on are lost with this engine")


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
    try:
        kvx.Namespace("any", "any", view.layout.block_bytes)
    except kvx.UsageError as error:
        raise kvx.ConfigError(
            f"blocks of KV cache group {group} cannot be kept: {error}; "
            "give vLLM another --block-size"
        ) from None
    if view.overlapping is not None:
        one, other = view.overlapping
        raise kvx.ConfigError(
            f"layers {one} and {other} of KV cache group {group} share bytes in part, which kvx "
            "cannot keep apart: leave the connector out for this model, and tell us of it"
        )


def config_of_rank(settings: Settings, parallel: OffloadingParallelConfig) -> kvx.CacheConfig:
    """Return the configuration of one rank: its share of memory, a directory of its own.

    The directory above those of the ranks is made, if it is not there.
    """
    if parallel.world_size == 1 and parallel.data_parallel_size == 1:
        return settings.cache
    label = f"dp{parallel.data_parallel_index}-rank{parallel.rank}"
    config = settings.cache.of_rank(label, parallel.world_size)
    for tier in config.tiers:
        path = getattr(tier, "path", None)
        if path is not None:  # as one rank alone would make its own
            path.parent.mkdir(mode=0o700, exist_ok=True)
    return config
