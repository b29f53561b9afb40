"""Stuck hardware: transfers end on time, their memory stays theirs, and close has a bound."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvx
from kvx.errors import TransferCancelled, TransferTimeout
from kvx.transfer.handle import TransferState
from tests.cache import on_device
from tests.cache.conftest import BLOCK_BYTES, Opener, make_blocks, make_hashes, open_space
from tests.cache.faults import (
    DRAM_BLOCKS,
    check_target,
    flood,
    injected,
    onboard,
    put_on_nvme,
    sample,
    wait_until,
)
from tests.sim.stalls import LATE_S, MachineStalls

if TYPE_CHECKING:
    import numpy.typing as npt

COUNT = 100
TRANSFERS = 200
# The simulated GPU is a dozen threads on the same CPUs; its arrays are made while the clock runs.
LATE_ON_SIMULATOR_S = 0.5
LASTING = {"failures": 100_000}
Moving = kvx.Transfer[kvx.TransferResult]


def allowed_late_s() -> float:
    """Return how late a transfer may end where this test's blocks lie."""
    return LATE_ON_SIMULATOR_S if on_device.is_in_use() else LATE_S


class Stopwatch:
    """Notes how much later than its deadline each transfer ended, whoever ended it.

    How long the machine stood still meanwhile does not count.
    """

    def __init__(self) -> None:
        """Start with no transfer."""
        self._late_s: list[float] = []
        self._stalls = MachineStalls()

    def watch(self, transfer: Moving, deadline_s: float) -> Moving:
        """Note the end of a transfer that was just started."""
        due = time.monotonic() + deadline_s
        transfer.add_done_callback(lambda: self._late_s.append(time.monotonic() - due))
        return transfer

    def late_s_p99(self) -> float:
        """Return the 99th percentile; every transfer must have ended."""
        assert len(self._late_s) == TRANSFERS
        late_s = float(np.quantile(self._late_s, 0.99))
        return late_s - self._stalls.stop()


def all_time_out(transfers: list[Moving]) -> None:
    for transfer in transfers:
        with pytest.raises(TransferTimeout):
            transfer.wait()
        assert transfer.poll() is TransferState.TIMED_OUT
        assert transfer.result is not None
        expected = (kvx.MissReason.DEADLINE, kvx.MissReason.NO_ROOM)
        assert np.isin(transfer.result.reasons, expected).all()


@pytest.mark.parametrize("ignores_cancel", [False, True])
@pytest.mark.parametrize("has_waiter", [False, True])
def test_stuck_reads_end_on_time(
    open_cache: Opener, ignores_cancel: bool, has_waiter: bool
) -> None:
    """200 transfers, more than DRAM has slots, with deadlines from 50 to 300 ms."""
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults, breaker=LASTING))
    put_on_nvme(cache, space, COUNT)
    failpoints.set("read", "hang", ignores_cancel=ignores_cancel)
    targets = np.full((TRANSFERS, 1, BLOCK_BYTES), 7, np.uint8)
    watch, rng, transfers = Stopwatch(), random.Random(1), []
    for number in range(TRANSFERS):
        deadline_s = rng.uniform(0.05, 0.3)
        row = make_hashes(1, first=number % COUNT)
        transfer = space.onboard(row, targets[number], deadline_s=deadline_s)
        transfers.append(watch.watch(transfer, deadline_s))
    if not has_waiter:
        wait_until(lambda: all(one.poll() is not TransferState.PENDING for one in transfers))
    all_time_out(transfers)
    assert watch.late_s_p99() <= allowed_late_s()
    if ignores_cancel:
        assert sample(cache, "kvx_quarantined_bytes") > 0
        assert cache.stats()["dram"]["reserved"] > 0
    # What the hardware delivers late must not reach memory that is the caller's again.
    targets[:] = 9
    failpoints.clear()
    wait_until(lambda: sample(cache, "kvx_unsettled_jobs") == 0)
    assert (targets == 9).all()
    assert sample(cache, "kvx_quarantined_bytes") == 0
    assert cache.stats()["dram"]["reserved"] == 0
    assert cache.stats()["nvme"]["pinned"] == 0
    assert onboard(space, make_hashes(COUNT)).num_blocks == COUNT
    cache.check_integrity()


def test_timers_that_come_back_at_once_hold_up_no_transfer(open_cache: Opener) -> None:
    """Hundreds of operations that wait for room look for it again and again."""
    space = open_space(cache := open_cache(has_nvme=False))
    reactor = cache._shared.reactor
    is_over = False

    def again() -> None:
        if not is_over:
            reactor.call_later(0.0, again)

    again()
    transfer = space.offload(make_hashes(1), make_blocks(1))
    try:
        wait_until(lambda: transfer.poll() is TransferState.DONE, timeout_s=2.0)
    finally:
        is_over = True


@pytest.mark.parametrize("verb", ["onboard", "offload"])
def test_stuck_copies_end_on_time(open_cache: Opener, verb: str) -> None:
    """Copies cannot be cancelled: their memory is quarantined, then nothing moves any more."""
    failpoints, faults = injected()
    space = open_space(cache := open_cache(has_nvme=False, has_hbm=False, faults=faults))
    held, given = make_hashes(COUNT), make_blocks(COUNT)
    if verb == "onboard":
        space.offload(held, given).wait()
    failpoints.set("copy", "hang")
    memory = [given[i % COUNT][None].copy() for i in range(TRANSFERS)]
    watch, transfers = Stopwatch(), []
    for number in range(TRANSFERS):
        row = number % COUNT
        call = space.onboard if verb == "onboard" else space.offload
        # Offloads of one hash would only find each other in flight.
        hashes = held[row : row + 1] if verb == "onboard" else make_hashes(1, first=1000 + number)
        transfers.append(watch.watch(call(hashes, memory[number], deadline_s=0.1), 0.1))
    if verb == "onboard":
        all_time_out(transfers)
    else:
        _judge_offloads(transfers)
    assert watch.late_s_p99() <= allowed_late_s()
    assert sample(cache, "kvx_quarantined_bytes") > 0
    failpoints.clear()
    wait_until(lambda: sample(cache, "kvx_unsettled_jobs") == 0)
    assert sample(cache, "kvx_quarantined_bytes") == 0
    snapshot = [block.copy() for block in memory]
    flood(space)
    assert all((a == b).all() for a, b in zip(memory, snapshot, strict=True))
    stats = cache.stats()["dram"]
    assert (stats["reserved"], stats["pinned"], stats["doomed"]) == (0, 0, 0)
    cache.check_integrity()


def _judge_offloads(transfers: list[Moving]) -> None:
    """More offloads than slots: those that got one time out, the others had no room."""
    num_late = 0
    for transfer in transfers:
        try:
            assert (transfer.wait().reasons == kvx.MissReason.NO_ROOM).all()
        except TransferTimeout:
            num_late += 1
    # A slow machine starts the last ones when the first have given their slots back.
    assert num_late >= DRAM_BLOCKS


def test_slots_are_reused_only_after_the_bytes_have_stopped(open_cache: Opener) -> None:
    """A flood goes around the slots that a stuck read may still write into."""
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults, breaker=LASTING))
    put_on_nvme(cache, space, COUNT)
    failpoints.set("read", "hang", ignores_cancel=True)
    target = np.zeros((30, BLOCK_BYTES), np.uint8)
    all_time_out([space.onboard(make_hashes(30), target, deadline_s=0.05)])
    stuck = cache.stats()["dram"]["reserved"]
    assert stuck > 0
    flood(space, first=50_000)
    assert cache.stats()["dram"]["reserved"] == stuck
    target[:] = 9
    failpoints.clear()
    wait_until(lambda: sample(cache, "kvx_unsettled_jobs") == 0)
    assert (target == 9).all(), "reads that arrive one by one must not go on to the caller"
    newest = make_hashes(64, first=50_000 + 2 * DRAM_BLOCKS - 64)
    result = onboard(space, newest, first=50_000 + 2 * DRAM_BLOCKS - 64)
    assert result.num_blocks == 64
    assert cache.stats()["dram"]["reserved"] == 0
    cache.check_integrity()


def test_stuck_writes_hold_up_nobody_but_flush(open_cache: Opener) -> None:
    """Offloads go on until DRAM is full of dirty blocks; then they, too, end on time."""
    failpoints, faults = injected()
    nvme = {"deadline_s": 0.2, "durability": "batch"}
    space = open_space(cache := open_cache(faults=faults, nvme=nvme, breaker=LASTING))
    failpoints.set("write", "hang", ignores_cancel=True)
    assert space.offload(make_hashes(COUNT), make_blocks(COUNT)).wait().num_blocks == COUNT
    assert onboard(space, make_hashes(COUNT)).num_blocks == COUNT
    began = time.monotonic()
    assert not cache.flush(0.3)
    assert time.monotonic() - began < 0.3 + allowed_late_s()
    watch, transfers = Stopwatch(), []
    for number in range(TRANSFERS):
        blocks = make_blocks(1, first=2000 + number)
        transfer = space.offload(make_hashes(1, first=2000 + number), blocks, deadline_s=0.2)
        transfers.append(watch.watch(transfer, 0.2))
    num_late = 0
    for transfer in transfers:
        try:
            transfer.wait()
        except TransferTimeout:
            num_late += 1
    assert num_late >= TRANSFERS - (DRAM_BLOCKS - COUNT)
    assert watch.late_s_p99() <= allowed_late_s()
    failpoints.clear()
    assert cache.flush(10.0)
    assert onboard(space, make_hashes(COUNT)).num_blocks == COUNT
    assert cache.stats()["dram"]["pinned"] == 0
    cache.check_integrity()


@pytest.mark.filterwarnings("ignore:nobody looked at the failure")
def test_close_has_a_bound_and_says_what_it_left(open_cache: Opener) -> None:
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults, breaker=LASTING))
    put_on_nvme(cache, space, COUNT)
    failpoints.set("read", "hang", ignores_cancel=True)
    target = np.zeros((10, BLOCK_BYTES), np.uint8)
    all_time_out([space.onboard(make_hashes(10), target, deadline_s=0.05)])
    pending = space.onboard(make_hashes(10, first=20), np.zeros_like(target), deadline_s=30.0)
    began = time.monotonic()
    report = cache.close(timeout_s=0.5)
    assert time.monotonic() - began < 0.5 + 1.0
    assert report.abandoned_jobs == 2
    assert report.abandoned_bytes >= 10 * BLOCK_BYTES
    with pytest.raises(TransferCancelled):
        pending.wait(timeout_s=1.0)
    failpoints.clear()


def test_close_lets_go_of_what_can_be_cancelled(open_cache: Opener) -> None:
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults, breaker=LASTING))
    put_on_nvme(cache, space, COUNT)
    failpoints.set("read", "hang")
    pending = space.onboard(make_hashes(10), np.zeros((10, BLOCK_BYTES), np.uint8))
    assert cache.close(timeout_s=0.5) == kvx.CloseReport(0, 0, 0)
    with pytest.raises(TransferCancelled):
        pending.wait(timeout_s=1.0)


def test_cancel_tells_the_truth(open_cache: Opener) -> None:
    """Cancelled at random moments: the answer of cancel fits the outcome, the bytes the result."""
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults))
    put_on_nvme(cache, space, COUNT)
    failpoints.set("any", "delay", probability=0.5, seed=1, delay_s=0.002)
    rng = random.Random("cancel")
    endings = {True: 0, False: 0}
    for number in range(150):
        first = rng.randrange(COUNT - 10)
        target = np.full((10, BLOCK_BYTES), 7, np.uint8)
        transfer = space.onboard(make_hashes(10, first=first), target)
        if number % 3:
            _wait_a_little(transfer, rng.uniform(0.0, 0.006))
        was_pending = transfer.cancel()
        try:
            result = transfer.wait()
            assert result.num_blocks == 10
            assert transfer.poll() is TransferState.DONE
        except TransferCancelled:
            assert was_pending, "cancel said that the transfer had ended already"
            assert transfer.poll() is TransferState.CANCELLED
            assert transfer.result is not None
            result = transfer.result
        endings[transfer.poll() is TransferState.CANCELLED] += 1
        assert not transfer.cancel()
        wait_until(lambda: sample(cache, "kvx_unsettled_jobs") == 0)
        assert transfer.wait_quiesced(5.0)
        _check_arrived(space, result, target, first)
        space.drop(make_hashes(5, first=first))
        space.offload(
            make_hashes(5, first=first), make_blocks(5, first=first)
        ).wait()  # keeps both tiers busy
    assert min(endings.values()) > 0, endings
    assert cache.flush(10.0)
    assert cache.stats()["dram"]["pinned"] == 0
    assert cache.stats()["dram"]["reserved"] == 0


def _wait_a_little(transfer: Moving, timeout_s: float) -> None:
    """Wait without caring for the outcome; the caller looks at it."""
    transfer.wait_finished(timeout_s)


def _check_arrived(
    space: kvx.CacheSpace, result: kvx.TransferResult, target: npt.NDArray[np.uint8], first: int
) -> None:
    """Require the bytes of what the result says arrived; a cancelled block may hold them, too."""
    if result.num_blocks == len(target):
        check_target(space, result, target, first=first)
        return
    wanted = make_blocks(len(target), first=first)
    served = result.reasons == kvx.MissReason.HIT
    assert (target[served] == wanted[served]).all()


@pytest.mark.parametrize("deadline_s", [0.1, 1.05])
def test_reads_that_hang_for_ever_open_the_breaker(open_cache: Opener, deadline_s: float) -> None:
    """They never settle; but who hurries them says nothing about the device."""
    failpoints, faults = injected()
    breaker = {"failures": 2, "reset_s": 60.0}
    space = open_space(cache := open_cache(faults=faults, breaker=breaker))
    put_on_nvme(cache, space, COUNT)
    nvme = cache._shared.nvme
    assert nvme is not None
    failpoints.set("read", "hang", ignores_cancel=True)
    targets = np.zeros((2, 1, BLOCK_BYTES), np.uint8)
    all_time_out(
        [
            space.onboard(make_hashes(1, first=row), targets[row], deadline_s=deadline_s)
            for row in range(2)
        ]
    )
    is_open = deadline_s > 1.0
    wait_until(lambda: nvme.is_up() is not is_open)
    reason = space.match(make_hashes(1, first=5)).reason
    assert reason is (kvx.MissReason.TIER_DOWN if is_open else kvx.MissReason.HIT)
    failpoints.clear()
    wait_until(lambda: sample(cache, "kvx_unsettled_jobs") == 0)
    assert nvme.is_up() is not is_open, "what settles late is told once"
