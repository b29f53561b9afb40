"""`KvxSpec`: what vLLM's offloading framework builds manager and worker by."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_offload.base import OffloadingSpec

import kvx
from kvx_vllm.facts import EngineFacts
from kvx_vllm.manager import KvxManager
from kvx_vllm.metrics import definitions
from kvx_vllm.pd.handoff import Handoff
from kvx_vllm.rank_cache import RankCache, config_of_rank, rank_cache_here, views_of
from kvx_vllm.ranks import OneRankHere
from kvx_vllm.settings import Settings
from kvx_vllm.telling import RankTelling
from kvx_vllm.worker import KvxWorker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingMetricMetadata
    from vllm.v1.kv_offload.config import OffloadingConfig

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
        """Return the scheduler's half; the workers are there already."""
        engine_id, is_one = self.config.engine_id, self.config.parallel.world_size == 1
        handoff = Handoff(rank_cache_here(engine_id, 0) if is_one else None, self._settings)
        return KvxManager(self.config, self._settings, OneRankHere(engine_id), handoff)

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
        except BaseException:
            cache.close(timeout_s=1.0)
            raise
        has_events = self.kv_events_config.enable_kv_cache_events
        telling = RankTelling(rank_cache, parallel.rank, has_events=has_events)
        return KvxWorker(rank_cache, self._settings, telling)
