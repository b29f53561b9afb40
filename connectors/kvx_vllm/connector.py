"""`KvxConnector`: vLLM's offloading connector, with kvx below it and failures that end well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.request import RequestStatus

from kvx_vllm.facts import EngineFacts
from kvx_vllm.manager import KvxManager
from kvx_vllm.settings import Settings, check_engine
from kvx_vllm.spec import made_for
from kvx_vllm.specs import KvxWorkerMetadata
from kvx_vllm.worker import KvxWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

# Ends of a request after which its whole prompt has been computed.
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
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        Settings.of(extra)
        extra |= {"spec_name": "KvxSpec", "spec_module_path": "kvx_vllm.spec"}
        with made_for(EngineFacts(vllm_config, kv_cache_config)):
            super().__init__(vllm_config, role, kv_cache_config)
            self._has_groups = len(kv_cache_config.kv_cache_groups) > 1

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:  # noqa: ARG003 - vLLM's
        """Ask for blocks that are one run of bytes; any layout works."""
        return "BLHNC"

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return how many tokens can be loaded; None while that is not known."""
        self._manager.begin_lookup(request.request_id, request.block_hashes, num_computed_tokens)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Return what the response carries: for a prefill, a reference to its blocks."""
        return self._with_reference(request, super().request_finished(request, block_ids))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`, for several groups."""
        found = super().request_finished_all_groups(request, block_ids)
        return self._with_reference(request, found)

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
        """Return what has ended, and what could not be loaded."""
        meta = super().build_connector_worker_meta()
        failures = self._worker.take_failures() if self.connector_worker is not None else []
        if meta is None and not failures:
            return None
        if meta is None:
            return KvxWorkerMetadata(failures=failures)
        return KvxWorkerMetadata(meta.completed_jobs, meta.transfer_stats, failures)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take what the workers said."""
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, KvxWorkerMetadata):
            self._manager.note_failures(meta.failures)
        super().update_connector_output(connector_output)

    def _with_reference(
        self, request: Request, found: tuple[bool, dict[str, Any] | None]
    ) -> tuple[bool, dict[str, Any] | None]:
        is_delayed, params = found
        if request.status not in _COMPLETE:
            return is_delayed, params
        reference = self._manager.issue_reference(
            request.request_id, request.block_hashes, request.num_prompt_tokens
        )
        return is_delayed, params if reference is None else {**(params or {}), **reference}

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
