"""Moves blocks between the engine's KV cache and kvx, in the worker's process."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadingWorker, TransferResult

import kvx
from kvx_vllm.specs import KvxBlocks, LoadFailure

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvx_vllm.rank_cache import GroupCache, RankCache
    from kvx_vllm.settings import Settings
    from kvx_vllm.specs import Run
    from kvx_vllm.telling import RankTelling

_log = logging.getLogger(__name__)
_NULL_BLOCK = 0
_QUIESCE_S = 1.0


@dataclass(slots=True)
class Part:
    """One transfer of a job.

    Attributes:
        run: What it moves.
        block_ids: The engine's blocks.
        hashes: Theirs.
        transfer: kvx's.
    """

    run: Run
    block_ids: npt.NDArray[np.int64]
    hashes: list[bytes]
    transfer: kvx.Transfer[kvx.TransferResult]


@dataclass(slots=True)
class Job:
    """A load or a store that vLLM waits for.

    Attributes:
        blocks: What was asked for.
        is_load: Which of the two.
        began_s: When, of the monotonic clock.
        parts: Its transfers.
    """

    blocks: KvxBlocks
    is_load: bool
    began_s: float = field(default_factory=time.monotonic)
    parts: list[Part] = field(default_factory=list)


class KvxWorker(OffloadingWorker):
    """Runs loads and stores; none of them fails vLLM, what did not arrive is told apart."""

    def __init__(self, rank_cache: RankCache, settings: Settings, telling: RankTelling) -> None:
        """Have nothing under way; the cache is closed with the worker."""
        self.telling = telling
        self._rank_cache = rank_cache
        self._settings = settings
        self._jobs: dict[int, Job] = {}
        self._bad_blocks: set[int] = set()
        self._failed: list[LoadFailure] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: KvxBlocks) -> bool:
        """Begin to copy blocks of the engine into the cache."""
        self._jobs[job_id] = job = Job(dst_spec, is_load=False)
        for run, ids, hashes in _aligned(src_spec, dst_spec):
            group = self._rank_cache.groups[run.group]
            transfer = group.space.offload(
                hashes, group.view.slots(ids), prefix=run.prefix,
                deadline_s=self._settings.store_deadline_s, after=_stream(group),
            )  # fmt: skip
            job.parts.append(Part(run, ids, hashes, transfer))
        self.telling.began("store", job.parts)
        return True

    def submit_load(self, job_id: int, src_spec: KvxBlocks, dst_spec: GPULoadStoreSpec) -> bool:
        """Begin to copy blocks of the cache into the engine."""
        self._jobs[job_id] = job = Job(src_spec, is_load=True)
        for run, ids, hashes in _aligned(dst_spec, src_spec):
            group = self._rank_cache.groups[run.group]
            transfer = group.space.onboard(
                hashes, group.view.slots(ids),
                deadline_s=self._settings.load_deadline_s, after=_stream(group),
            )  # fmt: skip
            job.parts.append(Part(run, ids, hashes, transfer))
        self.telling.began("load", job.parts)
        return True

    def get_finished(self) -> list[TransferResult]:
        """Return the jobs that have ended and touch the engine's memory no more."""
        over = [job_id for job_id, job in self._jobs.items() if _is_over(job)]
        return [self._finish(job_id, self._jobs.pop(job_id)) for job_id in over]

    def wait(self, job_ids: set[int]) -> None:
        """Wait for jobs; each ends by its deadline."""
        for job_id in job_ids & self._jobs.keys():
            for part in self._jobs[job_id].parts:
                _outcome(part.transfer)
                part.transfer.wait_quiesced(_QUIESCE_S)

    def take_bad_blocks(self) -> set[int]:
        """Return the engine's blocks that were not filled since the last call."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def peek_failures(self) -> list[LoadFailure]:
        """Return what could not be loaded since `take_failures` was called."""
        return self._failed

    def take_failures(self) -> list[LoadFailure]:
        """Return what could not be loaded since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def shutdown(self) -> None:
        """Close the cache."""
        self._rank_cache.close()

    def _finish(self, job_id: int, job: Job) -> TransferResult:
        num_bytes = 0
        direction = "load" if job.is_load else "store"
        for part in job.parts:
            result = _outcome(part.transfer)
            if result is not None:
                num_bytes += result.bytes_done
                self.telling.moved(direction, part, result)
            if job.is_load:
                self._note_missing(job.blocks.req_id, part, result)
        seconds = time.monotonic() - job.began_s
        self.telling.ended(direction, job.parts, seconds)
        return TransferResult(job_id, True, num_bytes, seconds)  # noqa: FBT003 - vLLM's

    def _note_missing(self, req_id: str, part: Part, result: kvx.TransferResult | None) -> None:
        """Note the blocks that have to be computed, and that they are not to be tried again."""
        if result is None:
            reasons = np.full(len(part.hashes), kvx.MissReason.TIER_DOWN, np.uint8)
        else:
            reasons = result.reasons
        missed = np.flatnonzero(reasons != kvx.MissReason.HIT)
        if not len(missed):
            return
        self._bad_blocks.update(part.block_ids[missed].tolist())
        names = [kvx.MissReason(int(reasons[row])).name.lower() for row in missed]
        hashes = [part.hashes[row] for row in missed]
        self._failed.append(LoadFailure(req_id, part.run.group, hashes, names))
        _log.warning(
            "%d of %d blocks of request %s could not be loaded (%s): vLLM computes them",
            len(missed), len(reasons), req_id, ", ".join(sorted(set(names))),
        )  # fmt: skip


def _aligned(
    engine: GPULoadStoreSpec, blocks: KvxBlocks
) -> Iterator[tuple[Run, npt.NDArray[np.int64], list[bytes]]]:
    """Yield each run with the engine's blocks and their hashes; without the null block."""
    ids = engine.block_ids.astype(np.int64)
    num_hashes = sum(len(run.hashes) for run in blocks.runs)
    assert len(ids) == num_hashes, f"vLLM gave {len(ids)} blocks for {num_hashes} hashes"
    begin = 0
    for run in blocks.runs:
        of_run = ids[begin : begin + len(run.hashes)]
        begin += len(run.hashes)
        real = np.flatnonzero(of_run != _NULL_BLOCK)
        if len(real) == len(of_run):
            yield run, of_run, run.hashes
        elif len(real):
            yield run, of_run[real], [run.hashes[row] for row in real]


def _stream(group: GroupCache) -> object:
    """Return the stream that the engine computes on; None in host memory."""
    return torch.cuda.current_stream().cuda_stream if group.is_on_device else None


def _is_over(job: Job) -> bool:
    return all(
        part.transfer.poll() is not kvx.TransferState.PENDING and part.transfer.wait_quiesced(0.0)
        for part in job.parts
    )


def _outcome(transfer: kvx.Transfer[kvx.TransferResult]) -> kvx.TransferResult | None:
    """Return what became of the blocks, however the transfer ended; None if that is not known."""
    try:
        return transfer.wait()
    except kvx.KvxError as error:
        _log.debug("a transfer ended early: %s", error)
        return transfer.result
