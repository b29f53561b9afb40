"""The worker over transfers that end as the test says: what vLLM is told, and when."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from vllm.v1.kv_offload.base import GPULoadStoreSpec

import kvx
from kvx_vllm.settings import Settings
from kvx_vllm.specs import KvxBlocks, Run
from kvx_vllm.telling import RankTelling
from kvx_vllm.worker import KvxWorker

REASON = kvx.MissReason
SETTINGS = Settings.of({"config": {"tiers": [{"kind": "dram", "capacity": "1MiB"}]}})
HASHES = [bytes([number]) * 32 for number in range(6)]


@dataclass
class Played:
    """A transfer whose end the test brings about."""

    num_blocks: int
    state: kvx.TransferState = kvx.TransferState.PENDING
    has_quiesced: bool = False
    reasons: dict[int, kvx.MissReason] = field(default_factory=dict)
    was_cancelled: bool = False
    waits_s: list[float] = field(default_factory=list)

    def poll(self) -> kvx.TransferState:
        return self.state

    def wait_quiesced(self, timeout_s: float) -> bool:  # noqa: ARG002 - as Transfer
        return self.has_quiesced

    def cancel(self) -> bool:
        self.was_cancelled = True
        self.state, self.has_quiesced = kvx.TransferState.CANCELLED, True
        return True

    @property
    def result(self) -> kvx.TransferResult:
        reasons = np.zeros(self.num_blocks, np.uint8)
        for row, reason in self.reasons.items():
            reasons[row] = reason
        return kvx.TransferResult(reasons, np.zeros_like(reasons), 4096, 0.0)

    def wait(self, timeout_s: float | None = None) -> kvx.TransferResult:
        if self.state is kvx.TransferState.PENDING:
            assert timeout_s is not None, "the test would wait for ever"
            self.waits_s.append(timeout_s)
            time.sleep(timeout_s)
        if self.state is kvx.TransferState.DONE:
            return self.result
        raise kvx.TransferTimeout("the test says so")


class Bench:
    """A worker over two groups in host memory, of 8 blocks each."""

    def __init__(self) -> None:
        self.begun: list[Played] = []
        self.memory = [np.full((8, 4096), 255, np.uint8) for _ in range(2)]
        self.asked: list[tuple[list[bytes], list[int]]] = []
        groups = [self._group(memory) for memory in self.memory]
        cache: Any = SimpleNamespace(groups=groups, begin_life=lambda _: True)
        self.worker = KvxWorker(cache, SETTINGS, Mock(RankTelling))

    def _group(self, memory: Any) -> Any:
        def begin(hashes: list[bytes], blocks: kvx.BlockSelection, **_: object) -> Played:
            self.asked.append((hashes, blocks.ids.tolist()))
            self.begun.append(Played(len(hashes)))
            return self.begun[-1]

        space = SimpleNamespace(onboard=begin, offload=begin)
        view = kvx.BlockView.of_blocks(memory)
        return SimpleNamespace(space=space, view=view, is_on_device=False)

    def load(self, runs: list[Run], ids: list[int]) -> None:
        """Begin job 7 of request r."""
        self.worker.submit_load(7, KvxBlocks("r", runs), engine_blocks(ids))


def engine_blocks(ids: list[int]) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(ids, group_sizes=[len(ids)], block_indices=[0])


def test_a_late_load_is_not_over_before_its_memory_is_at_rest() -> None:
    bench = Bench()
    bench.load([Run(0, HASHES[:3])], [4, 5, 6])
    (late,) = bench.begun
    assert bench.worker.get_finished() == []
    late.state, late.reasons = kvx.TransferState.TIMED_OUT, {1: REASON.DEADLINE}
    assert bench.worker.get_finished() == [], "bytes may still be on their way"
    assert bench.worker.take_bad_blocks() == set()
    late.has_quiesced = True
    (result,) = bench.worker.get_finished()
    assert (result.job_id, result.success) == (7, True)
    assert bench.worker.take_bad_blocks() == {5}
    assert bench.worker.take_bad_blocks() == set()
    (failure,) = bench.worker.take_failures()
    assert (failure.req_id, failure.hashes, failure.reasons) == ("r", [HASHES[1]], ["deadline"])


def test_idle_steps_help_loads_for_a_while() -> None:
    bench = Bench()
    bench.load([Run(0, HASHES[:1]), Run(1, HASHES[1:3])], [1, 2, 3])
    store = KvxBlocks("r", [Run(0, HASHES[3:4])])
    bench.worker.submit_store(8, engine_blocks([4]), store)
    bench.worker.help(0.002)
    first, second, stored = bench.begun
    assert 0 < first.waits_s[0] <= 0.002
    assert second.waits_s == [0.0], "the time was up"
    assert stored.waits_s == [], "nobody waits for a store"
    first.state = kvx.TransferState.TIMED_OUT
    bench.worker.help(0.001)  # how it ended is said elsewhere


def test_what_was_not_filled_is_zeroed_and_nothing_else() -> None:
    bench = Bench()
    bench.load([Run(1, HASHES[:3])], [4, 5, 6])
    (part,) = bench.begun
    part.state, part.has_quiesced = kvx.TransferState.DONE, True
    part.reasons = {0: REASON.CORRUPT, 2: REASON.EVICTED}
    bench.worker.get_finished()
    assert (bench.memory[0] == 255).all()
    zeroed = (bench.memory[1] == 0).all(axis=1)
    assert np.flatnonzero(zeroed).tolist() == [4, 6]
    assert (bench.memory[1][~zeroed] == 255).all()


def test_a_job_is_over_when_all_its_parts_are() -> None:
    bench = Bench()
    bench.load([Run(0, HASHES[:2]), Run(1, HASHES[2:4])], [1, 2, 3, 4])
    assert bench.asked == [(HASHES[:2], [1, 2]), (HASHES[2:4], [3, 4])]
    for part in bench.begun:
        assert bench.worker.get_finished() == []
        part.state, part.has_quiesced = kvx.TransferState.DONE, True
    (result,) = bench.worker.get_finished()
    assert result.transfer_size == 2 * 4096


def test_the_null_block_is_not_touched() -> None:
    bench = Bench()
    bench.load([Run(0, HASHES[:4]), Run(1, HASHES[4:])], [0, 0, 3, 4, 0, 0])
    assert bench.asked == [(HASHES[2:4], [3, 4])]


def test_a_store_is_given_up_when_its_blocks_are_wanted_back() -> None:
    bench = Bench()
    for job_id in (1, 2, 3):
        blocks = KvxBlocks("r", [Run(0, [HASHES[job_id]])])
        bench.worker.submit_store(job_id, engine_blocks([job_id]), blocks)
    bench.worker.wait({1, 2})
    assert [one.was_cancelled for one in bench.begun] == [True, True, False]
    assert [one.job_id for one in bench.worker.get_finished()] == [1, 2]
    assert bench.worker.take_bad_blocks() == set(), "nobody computes what was only to be stored"


@pytest.mark.parametrize("is_load", [True, False])
def test_a_job_that_cannot_begin_ends_as_a_miss(is_load: bool) -> None:
    bench = Bench()

    def refuse(*_: object, **__: object) -> None:
        raise kvx.UnavailableError("the device is gone")

    for group in bench.worker._rank_cache.groups:
        group.space.onboard = group.space.offload = refuse  # type: ignore[assignment]
    blocks = KvxBlocks("r", [Run(0, HASHES[:2])])
    submit = bench.worker.submit_load if is_load else bench.worker.submit_store
    engine = engine_blocks([1, 2])
    assert submit(3, blocks, engine) if is_load else submit(3, engine, blocks)  # type: ignore[arg-type]
    (result,) = bench.worker.get_finished()
    assert result.success
    assert bench.worker.take_bad_blocks() == ({1, 2} if is_load else set())
    failures = bench.worker.take_failures()
    assert [one.reasons for one in failures] == ([["tier_down"] * 2] if is_load else [])
