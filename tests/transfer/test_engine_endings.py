"""Every job ends: at its deadline, by cancel, by close; and its memory is free only later."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvx.errors import TransferCancelled
from kvx_ext import _core
from tests.sim.stalls import LATE_S, MachineStalls
from tests.transfer.slots import (
    CANCELLED,
    LONG_S,
    OK,
    SKIPPED,
    TIMEOUT,
    EngineMaker,
    Slots,
    expect,
    keys_of,
    planes_of,
    some_bytes,
)


def test_a_deadline_ends_a_hung_copy_and_quarantines_its_memory(
    make_engine: EngineMaker,
) -> None:
    faults = _core.Failpoints()
    engine = make_engine(copy_threads=1, failpoints=faults)
    faults.set("copy", "hang", after=2, count=1)
    slots, source = Slots(8, 4096), some_bytes(8, 4096)
    job = engine.copy_in(
        planes_of(source), np.arange(8), slots.addresses, keys_of(8), deadline_s=0.1
    )
    assert job.wait(LONG_S)
    assert job.state() == "timed_out"
    assert 0.1 <= job.elapsed_s < 0.1 + LATE_S
    assert job.codes().tolist() == [OK, OK, TIMEOUT] + [SKIPPED] * 5
    assert not job.is_quiesced()
    assert (engine.quarantined_jobs(), engine.quarantined_bytes()) == (1, 8 * 4096)
    assert engine.next_completions(9, LONG_S)[1].tolist() == [1]
    faults.clear()
    assert job.wait_quiesced(LONG_S)
    assert engine.next_completions(9, LONG_S)[1].tolist() == [2]
    assert (engine.quarantined_jobs(), engine.quarantined_bytes()) == (0, 0)
    assert job.codes().tolist() == [OK, OK, TIMEOUT] + [SKIPPED] * 5
    # The stuck copy ended late, which the quarantine is for; nothing after it was begun.
    assert (slots.data[3:] == 0xA5).all()


@pytest.mark.parametrize("ending", ["deadline", "cancel"])
@pytest.mark.parametrize("target", ["read", "write", "sync"])
def test_hung_io_ends_in_time_and_writes_nothing_after_quiesced(
    make_engine: EngineMaker, backend: str, tmp_path: Path, target: str, ending: str
) -> None:
    faults = _core.Failpoints()
    engine = make_engine(backend=backend, failpoints=faults)
    fd, _ = engine.open_file(str(tmp_path / "f"), create=True)
    slots, fds = Slots(16, 4096), np.full(16, fd, dtype=np.int32)
    offsets, lengths = np.arange(16, dtype=np.int64) * 4096, np.full(16, 4096)
    sync = np.array([fd], dtype=np.int32)
    expect(engine.write(fds, offsets, slots.addresses, lengths, sync, LONG_S), "done")
    faults.set(target, "hang", after=0 if target == "sync" else 8, ignores_cancel=True)
    deadline_s = 0.1 if ending == "deadline" else LONG_S
    slots.data[:] = 0xA5
    if target == "read":
        sums = np.zeros(16, dtype=np.uint64)
        keys = keys_of(16)
        job = engine.read(
            fds,
            offsets,
            slots.addresses,
            4096,
            4096,
            keys,
            sums,
            None,
            None,
            deadline_s,
        )
    else:
        job = engine.write(fds, offsets, slots.addresses, lengths, sync, deadline_s)
    if ending == "cancel":
        assert not job.wait(0.05)
        assert job.cancel()
    assert job.wait(LONG_S)
    assert job.state() == ("timed_out" if ending == "deadline" else "cancelled")
    assert not job.cancel()
    assert not job.is_quiesced()
    assert engine.quarantined_bytes() == 16 * 4096
    faults.clear()
    assert job.wait_quiesced(LONG_S)
    slots.data[:] = 0x5A
    assert engine.close(5.0)["abandoned_jobs"] == 0
    assert (slots.data == 0x5A).all()
    engine.close_file(fd)


def test_a_thousand_hung_deadlines_are_met_within_100_ms(
    make_engine: EngineMaker, tmp_path: Path
) -> None:
    faults = _core.Failpoints()
    engine = make_engine(failpoints=faults)
    fd, _ = engine.open_file(str(tmp_path / "f"), create=True)
    slots = Slots(1, 4096)
    faults.set("write", "hang", ignores_cancel=True)
    fds, zero, length = (
        np.array([fd], np.int32),
        np.zeros(1, np.int64),
        np.array([4096]),
    )
    stalls = MachineStalls()
    wanted = np.random.default_rng(7).uniform(0.02, 0.5, 1000)
    jobs = [
        engine.write(fds, zero, slots.addresses, length, np.array([], np.int32), s) for s in wanted
    ]
    for job in jobs:
        expect(job, "timed_out", TIMEOUT)
    late_s = np.array([job.elapsed_s for job in jobs]) - wanted
    assert late_s.min() > -0.001  # two clocks are read
    assert np.percentile(late_s, 99) - stalls.stop() < LATE_S
    assert engine.quarantined_jobs() == 1000
    faults.clear()
    assert all(job.wait_quiesced(LONG_S) for job in jobs)
    assert engine.quarantined_jobs() == 0
    engine.close_file(fd)


def test_giving_up_a_huge_job_delays_no_other_deadline(
    make_engine: EngineMaker, backend: str, tmp_path: Path
) -> None:
    faults = _core.Failpoints()
    engine = make_engine(backend=backend, failpoints=faults)
    fd, _ = engine.open_file(str(tmp_path / "f"), create=True)
    slots, count = Slots(1, 4096), 30_000
    faults.set("write", "hang")
    fds, offsets = np.full(count, fd, np.int32), np.zeros(count, np.int64)
    addresses, lengths = np.repeat(slots.addresses, count), np.full(count, 4096)
    none = np.array([], np.int32)
    huge = engine.write(fds, offsets, addresses, lengths, none, 0.1)
    small = engine.write(fds[:1], offsets[:1], addresses[:1], lengths[:1], none, 0.11)
    expect(small, "timed_out", TIMEOUT)
    assert small.elapsed_s < 0.11 + LATE_S
    expect(huge, "timed_out", TIMEOUT)
    assert huge.wait_quiesced(LONG_S)
    engine.close_file(fd)


def test_cancel_of_a_queued_a_running_and_an_ended_job(
    make_engine: EngineMaker,
) -> None:
    faults = _core.Failpoints()
    engine = make_engine(copy_threads=1, failpoints=faults)
    slots, source, keys = Slots(2, 4096), some_bytes(2, 4096), keys_of(2)
    faults.set("copy", "hang", after=1, count=1)
    submit = (planes_of(source), np.arange(2), slots.addresses, keys, LONG_S)
    running = engine.copy_in(*submit)
    assert not running.wait(0.05)
    queued = engine.copy_in(*submit)
    assert queued.cancel()
    assert queued.is_quiesced()
    assert queued.codes().tolist() == [SKIPPED, SKIPPED]
    assert running.cancel()
    assert running.codes().tolist() == [OK, CANCELLED]
    assert not running.is_quiesced()
    assert not running.cancel()
    faults.clear()
    assert running.wait_quiesced(LONG_S)
    ended = engine.copy_in(*submit)
    expect(ended, "done", OK)
    assert not ended.cancel()
    assert ended.state() == "done"


@pytest.mark.parametrize("target", ["copy", "write"])
def test_close_is_bounded_and_reports_what_it_abandoned(
    make_engine: EngineMaker, backend: str, tmp_path: Path, target: str
) -> None:
    faults = _core.Failpoints()
    engine = make_engine(backend=backend, copy_threads=1, failpoints=faults)
    fd, _ = engine.open_file(str(tmp_path / "f"), create=True)
    slots, source = Slots(4, 4096), some_bytes(4, 4096)
    faults.set(target, "hang", count=1, ignores_cancel=True)
    if target == "copy":
        job = engine.copy_in(planes_of(source), np.arange(4), slots.addresses, keys_of(4), LONG_S)
    else:
        offsets, lengths = np.arange(4, dtype=np.int64) * 4096, np.full(4, 4096)
        none = np.array([], dtype=np.int32)
        job = engine.write(
            np.full(4, fd, np.int32), offsets, slots.addresses, lengths, none, LONG_S
        )
    closed_in_s = seconds(lambda: engine.close(0.3))
    assert 0.25 < closed_in_s < 0.4 + LATE_S
    assert engine.close(9.0) == {
        "cancelled_jobs": 1, "abandoned_jobs": 1, "abandoned_bytes": 4 * 4096,
    }  # fmt: skip
    assert job.state() == "cancelled"
    assert not job.is_quiesced()
    with pytest.raises(TransferCancelled):
        engine.copy_in(planes_of(source), np.arange(4), slots.addresses, keys_of(4), LONG_S)
    faults.clear()
    if target == "copy":
        assert job.wait_quiesced(LONG_S), "a stuck copy that ends after close is still noticed"
    engine.close_file(fd)


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    begun = time.monotonic()
    call()
    return time.monotonic() - begun


def test_close_lets_a_running_job_end_by_itself(make_engine: EngineMaker) -> None:
    faults = _core.Failpoints()
    engine = make_engine(failpoints=faults)
    faults.set("copy", "delay", delay_s=0.05, count=2)
    slots, source = Slots(4, 4096), some_bytes(4, 4096)
    job = engine.copy_in(planes_of(source), np.arange(4), slots.addresses, keys_of(4), LONG_S)
    assert engine.close(4.0) == {
        "cancelled_jobs": 0,
        "abandoned_jobs": 0,
        "abandoned_bytes": 0,
    }
    assert job.state() == "done"
    assert (slots.data == source).all()


def test_an_engine_that_is_not_closed_warns_and_its_jobs_stay_usable() -> None:
    engine = _core.Engine()
    slots, source = Slots(2, 64), some_bytes(2, 64)
    job = engine.copy_in(planes_of(source), np.arange(2), slots.addresses, keys_of(2), LONG_S)
    with pytest.warns(ResourceWarning, match="not closed"):
        del engine
    assert job.wait(1.0)
    assert job.is_quiesced()
    assert not job.cancel()
    assert len(job.codes()) == 2
