"""`KvxSpec`: what vLLM's offloading framework builds manager and worker by."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.kv_offload.base import OffloadingSpec

import kvx
from kvx_vllm.facts import EngineFacts
from kvx_vllm.manager import KvxManager
from kvx_vllm.metrics import definitions
from kvx_vllm.pd.handoff import Handoff
from kvx_vllm.rank_cache import RankCache, config_of_rank, rank_cache_here, views_of
from kvx_vllm.rank_server import socket_path
from kvx_vllm.ranks import ONE_MACHINE, OneRankHere, RanksElsewhere
from kvx_vllm.settings import Settings
from kvx_vllm.telling import RankTelling
from kvx_vllm.worker import KvxWorker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingMetricMetadata
    from vllm.v1.kv_offload.config import OffloadingConfig

    from kvx_vllm.ranks import Ranks

_log = init_logger("vllm.kvx")  # vLLM shows what is said below its own name
_engine: ContextVar[EngineFacts] = ContextVar("the engine whose connector is being made")


@contextlib.contextmanager
def made_for(facts: EngineFacts) -> Iterator[None]:
    """Let specs that are made meanwhile know their engine; vLLM tells them only a part of it."""
    token = _engine.set(facts)
    try:
        yield
    finally:
        _engine.reset(token)


class KvxSpec(OffloadingSpec):
    """Makes the scheduler's and the worker's half."""

    def __init__(self, config: OffloadingConfig) -> None:
        """Read the settings.

        Raises:
            kvx.ConfigError: They are wrong, or another connector asks for this spec.
        """
        super().__init__(config)
        try:
            self._facts = _engine.get()
        except LookupError:
            raise kvx.ConfigError(
                'KvxSpec works under its own connector: write "kv_connector": "KvxConnector"'
            ) from None
        self._settings = Settings.of(config.extra_config)

    @classmethod
    def build_metric_definitions(
        cls,
        extra_config: dict[str, Any],  # noqa: ARG003 - vLLM's
    ) -> dict[str, OffloadingMetricMetadata]:
        """Return the metrics."""
        return definitions()

    def get_manager(self) -> KvxManager:
        """Return the scheduler's half; the workers are there already.

        Raises:
            kvx.ConfigError: They cannot be asked: some run on other machines.
        """
        ranks = self._ranks()
        is_here = isinstance(ranks, OneRankHere)
        rank = rank_cache_here(self.config.engine_id, 0) if is_here else None
        handoff = Handoff(rank, self._settings)
        return KvxManager(self.config, self._settings, ranks, handoff)

    def get_worker(self, kv_caches: CanonicalKVCaches) -> KvxWorker:
        """Open the cache of this rank and return the worker's half."""
        parallel = self.config.parallel
        cache = kvx.TieredCache.open(config_of_rank(self._settings, parallel))
        try:
            groups = [
                (
                    self._facts.namespace(self.config, place, sizes, self._settings.revision),
                    view,
                    is_on_device,
                )
                for place, (sizes, view, is_on_device) in enumerate(views_of(kv_caches))
            ]
            rank_cache = RankCache((self.config.engine_id, parallel.rank), cache, groups)
            if self._facts.config.parallel_config.distributed_executor_backend != "uni":
                rank_cache.serve()
        except BaseException:
            cache.close(timeout_s=1.0)
            raise
        for place, group in enumerate(rank_cache.groups):
            _log.info(
                "kvx: rank %d keeps KV cache group %d in blocks of %d tokens and %d bytes, "
                "namespace %s",
                parallel.rank, place, group.space.namespace.block_tokens, group.space.block_bytes,
                group.space.namespace.public_id.hex(),
            )  # fmt: skip
        has_events = self.kv_events_config.enable_kv_cache_events
        telling = RankTelling(rank_cache, parallel.rank, has_events=has_events)
        return KvxWorker(rank_cache, self._settings, telling)

    def _ranks(self) -> Ranks:
        parallel = self._facts.config.parallel_config
        here = rank_cache_here(self.config.engine_id, 0)
        if here is not None and parallel.world_size == 1:
            return OneRankHere(here)
        if parallel.nnodes_within_dp > 1:
            raise kvx.ConfigError(
                f"this engine spans {parallel.nnodes_within_dp} nodes; {ONE_MACHINE}"
            )
        if parallel.distributed_executor_backend == "external_launcher":
            raise kvx.ConfigError(
                "--distributed-executor-backend external_launcher gives every rank a scheduler; "
                "they could disagree on what kvx holds: use mp"
            )
        paths = [socket_path(self.config.engine_id, rank) for rank in range(parallel.world_size)]
        return RanksElsewhere(paths, self._settings.lookup_deadline_s)
