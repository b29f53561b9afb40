"""Moves blocks between the engine's KV cache and kvx, in the worker's process."""

from __future__ import annotations

import ctypes
import logging
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadingWorker, TransferResult

import kvx
from kvx_vllm.jobs import Job, Part
from kvx_vllm.specs import KvxBlocks, LoadFailure

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvx_vllm.rank_cache import GroupCache, RankAddress, RankCache
    from kvx_vllm.settings import Settings
    from kvx_vllm.specs import Run
    from kvx_vllm.telling import RankTelling

_log = logging.getLogger(__name__)
_NULL_BLOCK = 0
_QUIESCE_S = 1.0
# What the whole engine may stand still for, when it wants blocks back that are being stored.
_FLUSH_S = 0.5


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

    @property
    def address(self) -> RankAddress | None:
        """Where the scheduler asks this rank; None where it is in this process."""
        return self._rank_cache.address

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: KvxBlocks) -> bool:
        """Begin to copy blocks of the engine into the cache."""
        job = Job(dst_spec, is_load=False)
        if self._rank_cache.begin_life(dst_spec.life):
            self._submit(job_id, job, src_spec)
        else:
            self._jobs[job_id] = job  # of KV from before a reset: nothing to do
        return True

    def submit_load(self, job_id: int, src_spec: KvxBlocks, dst_spec: GPULoadStoreSpec) -> bool:
        """Begin to copy blocks of the cache into the engine."""
        self._rank_cache.begin_life(src_spec.life)
        self._submit(job_id, Job(src_spec, is_load=True), dst_spec)
        return True

    def get_finished(self) -> list[TransferResult]:
        """Return the jobs that have ended and touch the engine's memory no more."""
        over = [job_id for job_id, job in self._jobs.items() if _is_over(job)]
        return [self._finish(job_id, self._jobs.pop(job_id)) for job_id in over]

    def help(self, seconds: float) -> None:
        """Wait for loads a while, which copies for them: their requests are all there is to do."""
        until_s = time.monotonic() + seconds
        for job in self._jobs.values():
            for transfer in job.transfers if job.is_load else ():
                _outcome(transfer, max(0.0, until_s - time.monotonic()))

    def wait(self, job_ids: set[int]) -> None:
        """Wait until jobs leave the engine's memory alone: it is about to be used again.

        Loads end by their deadline. A store is not worth that long: it is given up before.
        """
        until_s = time.monotonic() + _FLUSH_S
        for job_id in job_ids & self._jobs.keys():
            job = self._jobs[job_id]
            for transfer in job.transfers:
                if not job.is_load:
                    _give_up_after(transfer, max(0.0, until_s - time.monotonic()))
                _outcome(transfer)
                transfer.wait_quiesced(_QUIESCE_S)

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

    def _submit(self, job_id: int, job: Job, engine: GPULoadStoreSpec) -> None:
        self._jobs[job_id] = job
        for run, ids, hashes in _aligned(engine, job.blocks):
            transfer = None
            try:
                transfer = self._begin(run, ids, hashes, is_load=job.is_load)
            except kvx.KvxError as error:
                verb = "loading" if job.is_load else "storing"
                _log.warning("%s %d blocks could not begin: %s", verb, len(hashes), error)
            job.parts.append(Part(run, ids, hashes, transfer))
        self.telling.began(job.direction, job.parts)

    def _begin(
        self, run: Run, ids: npt.NDArray[np.int64], hashes: list[bytes], *, is_load: bool
    ) -> kvx.Transfer[kvx.TransferResult]:
        group = self._rank_cache.groups[run.group]
        blocks, after = group.view.slots(ids), _stream(group)
        if is_load:
            deadline_s = self._settings.load_deadline_s
            return group.space.onboard(hashes, blocks, deadline_s=deadline_s, after=after)
        deadline_s = self._settings.store_deadline_s
        return group.space.offload(
            hashes, blocks, prefix=run.prefix, deadline_s=deadline_s, after=after
        )

    def _finish(self, job_id: int, job: Job) -> TransferResult:
        num_bytes = 0
        for part in job.parts:
            result = _outcome(part.transfer)
            if result is not None:
                num_bytes += result.bytes_done
                self.telling.moved(job, part, result)
            if job.is_load:
                self._note_missing(job.blocks.req_id, part, result)
        seconds = time.monotonic() - job.began_s
        self.telling.ended(job.direction, job.parts, seconds)
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
        _clean(self._rank_cache.groups[part.run.group], part.block_ids[missed])
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


def _clean(group: GroupCache, block_ids: npt.NDArray[np.int64]) -> None:
    """Zero blocks of host memory that were not filled.

    kvx leaves NaN where wrong bytes had been on their way. Attention multiplies what lies behind
    the end of a prompt by 0: NaN stays NaN, in the answer of whoever is given the block next.
    Device memory is left as it was by kvx itself.
    """
    if group.is_on_device:
        return
    for base, stride, size in group.view.planes.tolist():
        for block in block_ids.tolist():
            ctypes.memset(base + block * stride, 0, size)


def _stream(group: GroupCache) -> object:
    """Return the stream that the engine computes on; None in host memory."""
    return torch.cuda.current_stream().cuda_stream if group.is_on_device else None


def _is_over(job: Job) -> bool:
    return all(
        transfer.poll() is not kvx.TransferState.PENDING and transfer.wait_quiesced(0.0)
        for transfer in job.transfers
    )


def _give_up_after(transfer: kvx.Transfer[kvx.TransferResult], timeout_s: float) -> None:
    """Cancel a transfer that does not end in time."""
    try:
        transfer.wait(timeout_s)
    except kvx.KvxError as error:
        if transfer.cancel():
            _log.warning("blocks are wanted back before they are stored: %s", error)


def _outcome(
    transfer: kvx.Transfer[kvx.TransferResult] | None, timeout_s: float | None = None
) -> kvx.TransferResult | None:
    """Return what became of the blocks, however the transfer ended; None if that is not known."""
    if transfer is None:
        return None
    try:
        return transfer.wait(timeout_s)
    except kvx.KvxError as error:
        _log.debug("a transfer has not arrived: %s", error)
        return transfer.result
