"""`KvxConnector`: vLLM's offloading connector, with kvx below it and failures that end well."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.request import RequestStatus

from kvx_vllm.facts import EngineFacts
from kvx_vllm.manager import KvxManager
from kvx_vllm.rank_cache import RankAddress
from kvx_vllm.settings import check_engine
from kvx_vllm.spec import made_for
from kvx_vllm.specs import KvxMetadata, KvxWorkerMetadata
from kvx_vllm.worker import KvxWorker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

# Ends of a request after which its whole prompt has been computed.
# For so long a step in which nothing is computed waits for loads: short beside any step that does,
# long beside asking again.
_HELP_S = 0.002
_COMPLETE = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class KvxConnector(OffloadingConnector):
    """Keeps blocks of vLLM's KV cache in kvx's tiers.

    vLLM's offloading framework decides what to load and store when, for every kind of KV cache
    group; kvx finds, keeps and moves the blocks. What cannot be loaded is computed.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        """Open what the role needs.

        Raises:
            kvx.ConfigError: A setting is wrong; says which, and what to write.
        """
        check_engine(vllm_config)
        _name_spec(vllm_config)
        with made_for(EngineFacts(vllm_config, kv_cache_config)):
            super().__init__(vllm_config, role, kv_cache_config)
            self._has_groups = len(kv_cache_config.kv_cache_groups) > 1

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Ask for blocks that are one run of bytes; any layout works.

        But not of MLA: some of its backends say that they take any layout, and fail with this one.
        Its runs are long as they are.
        """
        if vllm_config.model_config.use_mla:
            return super().get_required_kvcache_layout(vllm_config)
        return "BLHNC"

    def get_handshake_metadata(self) -> RankAddress | None:
        """Return where the scheduler asks this rank; None where it is in this process."""
        return self._worker.address

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: Mapping[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Take where all ranks can be asked.

        Raises:
            kvx.UnavailableError: One cannot be reached from here.
        """
        told = [one for one in metadata.values() if isinstance(one, RankAddress)]
        self._manager.meet_ranks({one.rank: Path(one.path) for one in told})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """Register the metrics, in a process that has no connector otherwise."""
        _name_spec(vllm_config)
        return super().build_prom_metrics(
            vllm_config, metric_types, labelnames, per_engine_labelvalues
        )

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return how many tokens can be loaded; None while that is not known."""
        self._manager.begin_lookup(request.request_id, request.block_hashes, num_computed_tokens)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KvxMetadata:
        """Return what the workers load and store."""
        meta = super().build_connector_meta(scheduler_output)
        is_idle = not scheduler_output.total_num_scheduled_tokens
        return KvxMetadata(meta.load_jobs, meta.store_jobs, meta.jobs_to_flush, is_idle)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Begin what the scheduler asked for; where there is nothing to compute, help with it."""
        super().start_load_kv(forward_context, **kwargs)
        if isinstance(self._connector_metadata, KvxMetadata) and self._connector_metadata.is_idle:
            self._worker.help(_HELP_S)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return what has ended; where there are several groups, requests whose load failed."""
        results = super().get_transfer_results(finished_req_ids)
        if self._has_groups:
            bad = {one.req_id for one in self._worker.peek_failures()}
            results.failed_recving = bad & results.finished_recving
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the engine's blocks that have to be computed."""
        bad = self._worker.take_bad_blocks()
        return set() if self._has_groups else bad

    def build_connector_worker_meta(self) -> KvxWorkerMetadata | None:
        """Return what has ended, what could not be loaded, and what the rank tells."""
        meta = super().build_connector_worker_meta()
        if self.connector_worker is None:
            return None
        failures = self._worker.take_failures()
        told = self._worker.telling.take()
        if meta is None and not failures and told is None:
            return None
        meta = meta or OffloadingWorkerMetadata()
        return KvxWorkerMetadata(meta.completed_jobs, meta.transfer_stats, failures, told)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take what the workers said."""
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, KvxWorkerMetadata):
            self._manager.note_failures(meta.failures)
            if meta.told is not None:
                self._manager.note_told(meta.told)
            self._store_anew({one.req_id for one in meta.failures})
        super().update_connector_output(connector_output)

    def _store_anew(self, req_ids: set[str]) -> None:
        """Let requests store what they compute in place of what could not be loaded.

        vLLM takes for stored what it has begun to load. Their block tables are empty until they are
        scheduled, so none that was given back meanwhile can be stored.
        """
        for req_id in req_ids:
            status = self.scheduler._req_status.get(req_id)  # noqa: SLF001 - it offers no other way
            for group in () if status is None else status.group_states:
                group.next_stored_chunk_idx = 0

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Say what became of its prompt, in the response; of a prefill, where its blocks are."""
        is_delayed, params = super().request_finished(request, block_ids)
        return is_delayed, self._told(request, params)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Say what became of its prompt, in the response; of a prefill, where its blocks are."""
        is_delayed, params = super().request_finished_all_groups(request, block_ids)
        return is_delayed, self._told(request, params)

    def _told(self, request: Request, params: dict[str, Any] | None) -> dict[str, Any] | None:
        told = self._manager.told(request.request_id)
        found = {**(params or {}), **({} if told is None else {"kvx": told})}
        if request.status in _COMPLETE:
            found |= self._manager.issue_reference(
                request.request_id, request.block_hashes, request.num_prompt_tokens
            )
        return found or None

    @property
    def _manager(self) -> KvxManager:
        manager = self.scheduler.manager
        assert isinstance(manager, KvxManager)
        return manager

    @property
    def _worker(self) -> KvxWorker:
        assert self.connector_worker is not None
        worker = self.connector_worker.worker
        assert isinstance(worker, KvxWorker)
        return worker


def _name_spec(config: VllmConfig) -> None:
    """Tell vLLM's framework what it makes manager and worker by, and whose metrics there are."""
    config.kv_transfer_config.kv_connector_extra_config |= {
        "spec_name": "KvxSpec",
        "spec_module_path": "kvx_vllm.spec",
    }
