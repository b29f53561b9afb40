"""The native engine: right bytes, honest codes, and news of both."""

import asyncio
import errno
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.errors import UsageError
from kvx_ext import _core
from tests.transfer.slots import (
    CORRUPT,
    LONG_S,
    OK,
    SHORT,
    STORAGE,
    EngineMaker,
    Slots,
    expect,
    keys_of,
    planes_of,
    some_bytes,
)

BLOCK = 64 << 10


def crc64_reference(data: bytes, state: int) -> int:
    """Bit by bit: CRC-64/NVME's reflected polynomial on a bare register."""
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x9A6C9329AC4BC9B5 if state & 1 else 0)
    return state


def spread(value: int) -> int:
    """SplitMix64's finaliser."""
    mask = (1 << 64) - 1
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
    return value ^ (value >> 31)


def checksum_reference(key: bytes, block: bytes) -> int:
    """Compute a block's checksum the slow way."""
    low, high = (int.from_bytes(key[i : i + 8], "little") for i in (0, 8))
    return crc64_reference(block, spread(low ^ spread(high ^ spread(len(block)))))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_gather_and_scatter_agree_with_numpy(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=5))
    stored, count = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 30))
    arrays = [
        rng.integers(0, 256, (stored, size + data.draw(st.integers(0, 9))), dtype=np.uint8)
        for size in sizes
    ]
    planes = np.array(
        [[a.ctypes.data, a.strides[0], s] for a, s in zip(arrays, sizes, strict=True)],
        dtype=np.int64,
    )
    ids = rng.integers(0, stored, count)
    keys = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    slots = Slots(count, sum(sizes))
    wanted = np.concatenate([a[ids, :s] for a, s in zip(arrays, sizes, strict=True)], axis=1)
    with _core.Engine(copy_threads=2) as engine:
        job = engine.copy_in(planes, ids, slots.addresses, keys, LONG_S)
        expect(job, "done", OK)
        assert (slots.data == wanted).all(), seed
        sums = job.checksums()
        for i in range(min(count, 3)):
            assert sums[i] == checksum_reference(keys[i].tobytes(), wanted[i].tobytes()), seed

        places = rng.permutation(count)
        targets = [np.full((count, a.shape[1]), 0x11, dtype=np.uint8) for a in arrays]
        planes_out = planes.copy()
        planes_out[:, 0] = [t.ctypes.data for t in targets]
        expect(
            engine.copy_out(slots.addresses, keys, sums, planes_out, places, LONG_S),
            "done",
            OK,
        )
        for target, array, size in zip(targets, arrays, sizes, strict=True):
            assert (target[places, :size] == array[ids, :size]).all(), seed
            assert (target[:, size:] == 0x11).all(), "bytes between the runs were touched"


def test_corrupt_blocks_are_named_and_poisoned_and_stop_no_other(
    engine: _core.Engine,
) -> None:
    source, keys = some_bytes(64, BLOCK), keys_of(64)
    slots, target = Slots(64, BLOCK), np.zeros((64, BLOCK), dtype=np.uint8)
    ids = np.arange(64)
    job = engine.copy_in(planes_of(source), ids, slots.addresses, keys, LONG_S)
    expect(job, "done", OK)
    sums = job.checksums()
    slots.data[5, 100] ^= 4
    for check in (
        engine.verify(slots.addresses, BLOCK, keys, sums, LONG_S),
        engine.copy_out(slots.addresses, keys, sums, planes_of(target), ids, LONG_S),
    ):
        expect(check, "failed", OK, CORRUPT)
        assert check.codes().nonzero()[0].tolist() == [5]
        assert (check.blocks_done, check.bytes_done) == (63, 63 * BLOCK)
        assert check.checksums()[5] != sums[5]
    assert (target[5] == 0xFF).all()
    target[5] = source[5]
    assert (target == source).all()
    swapped = keys[::-1].copy()
    expect(engine.verify(slots.addresses, BLOCK, swapped, sums, LONG_S), "failed", CORRUPT)


def test_write_then_read_back_over_each_backend(
    make_engine: EngineMaker, backend: str, tmp_path: Path
) -> None:
    engine = make_engine(backend=backend)
    assert backend in engine.backend_name
    count, block_bytes, io_bytes = 40, 60_000, 61_440
    slots, back, keys = Slots(count, io_bytes), Slots(count, io_bytes), keys_of(count)
    source, target = (
        some_bytes(count, block_bytes),
        np.zeros((count, block_bytes), dtype=np.uint8),
    )
    ids = np.arange(count)
    job = engine.copy_in(planes_of(source), ids, slots.addresses, keys, LONG_S)
    expect(job, "done", OK)
    sums = job.checksums()
    files = [engine.open_file(str(tmp_path / name), create=True)[0] for name in "ab"]
    fds = np.array([files[i % 2] for i in range(count)], dtype=np.int32)
    offsets = np.arange(count, dtype=np.int64) * io_bytes
    lengths = np.full(count, io_bytes)
    write = engine.write(fds, offsets, slots.addresses, lengths, np.array(files, np.int32), LONG_S)
    expect(write, "done", OK)
    assert write.bytes_done == count * io_bytes

    read = (fds, offsets, back.addresses, block_bytes, io_bytes, keys, sums)
    expect(engine.read(*read, None, None, LONG_S), "done", OK)
    assert (back.data[:, :block_bytes] == source).all()
    job = engine.read(*read, planes_of(target), ids, LONG_S)
    expect(job, "done", OK)
    assert (target == source).all()
    assert (job.checksums() == sums).all()

    wrong = sums.copy()
    wrong[7] += 1
    offsets[3] = 1 << 40
    job = engine.read(fds, offsets, *read[2:6], wrong, planes_of(target), ids, LONG_S)
    expect(job, "failed", OK, CORRUPT, SHORT)
    assert (job.codes()[7], job.codes()[3]) == (CORRUPT, SHORT)
    assert (target[7] == 0xFF).all()
    for fd in files:
        engine.close_file(fd)


def test_a_failing_device_reports_errno_and_a_failed_sync_fails_its_file(
    make_engine: EngineMaker, backend: str, tmp_path: Path
) -> None:
    faults = _core.Failpoints()
    engine = make_engine(backend=backend, failpoints=faults)
    slots = Slots(8, 4096)
    files = [engine.open_file(str(tmp_path / name), create=True)[0] for name in "ab"]
    fds = np.array([files[0]] * 4 + [files[1]] * 4, dtype=np.int32)
    offsets, lengths = np.arange(8, dtype=np.int64) * 4096, np.full(8, 4096)
    none = np.array([], dtype=np.int32)
    faults.set("write", "eio", after=3, count=1)
    job = engine.write(fds, offsets, slots.addresses, lengths, none, LONG_S)
    expect(job, "failed", OK, STORAGE)
    assert sorted(job.errnos().tolist()) == [0] * 7 + [errno.EIO]
    faults.clear()
    faults.set("sync", "eio", count=1)
    syncs = np.array(files[:1], dtype=np.int32)
    job = engine.write(fds, offsets, slots.addresses, lengths, syncs, LONG_S)
    expect(job, "failed", OK, STORAGE)
    assert job.codes().tolist() == [STORAGE] * 4 + [OK] * 4
    with pytest.raises(OSError, match="fdatasync"):
        job.raise_if_sync_failed()
    for fd in files:
        engine.close_file(fd)


def test_a_flip_in_a_copy_is_caught_by_the_next_check(make_engine: EngineMaker) -> None:
    faults = _core.Failpoints()
    engine = make_engine(failpoints=faults)
    slots, source, keys = Slots(4, 4096), some_bytes(4, 4096), keys_of(4)
    faults.set("copy", "flip", count=1)
    job = engine.copy_in(planes_of(source), np.arange(4), slots.addresses, keys, LONG_S)
    expect(job, "done", OK)
    check = engine.verify(slots.addresses, 4096, keys, job.checksums(), LONG_S)
    expect(check, "failed", OK, CORRUPT)
    assert faults.hits()["flip"] == 1


def test_ten_thousand_tiny_jobs_from_four_threads(engine: _core.Engine) -> None:
    each = 2500
    source, keys = some_bytes(4, 512), keys_of(4)
    slots = Slots(4, 512)
    ids: list[set[int]] = [set() for _ in range(4)]

    def submit(thread: int) -> None:
        row = slice(thread, thread + 1)
        job = None
        for _ in range(each):
            job = engine.copy_in(
                planes_of(source),
                np.array([thread]),
                slots.addresses[row],
                keys[row],
                LONG_S,
            )
            ids[thread].add(job.id)
        assert job is not None
        assert job.wait(LONG_S)

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    seen: dict[int, int] = {}
    while len(seen) < 4 * each or min(seen.values()) < 3:
        done, flags = engine.next_completions(256, LONG_S)
        assert len(done), "completions stopped coming"
        for job_id, flag in zip(done.tolist(), flags.tolist(), strict=True):
            assert not seen.get(job_id, 0) & flag, "announced twice"
            seen[job_id] = seen.get(job_id, 0) | flag
    for thread in threads:
        thread.join()
    assert set().union(*ids) == set(seen)
    assert (slots.data == source).all()
    stats = engine.stats()
    assert (stats["copy_in"]["jobs"], stats["jobs_done"], stats["jobs_running"]) == (
        4 * each, 4 * each, 0,
    )  # fmt: skip


def test_the_eventfd_wakes_asyncio(engine: _core.Engine) -> None:
    slots, source = Slots(4, 4096), some_bytes(4, 4096)

    async def run() -> int:
        loop = asyncio.get_running_loop()
        for _ in range(20):
            arrived: asyncio.Future[tuple[np.ndarray, np.ndarray]] = loop.create_future()
            loop.add_reader(
                engine.fileno(),
                lambda f=arrived: f.set_result(engine.next_completions(9, 0.0)),
            )
            job = engine.copy_in(
                planes_of(source), np.arange(4), slots.addresses, keys_of(4), LONG_S
            )
            ids, flags = await asyncio.wait_for(arrived, LONG_S)
            loop.remove_reader(engine.fileno())
            assert ids.tolist() == [job.id]
            assert flags.tolist() == [3]
        return 20

    assert asyncio.run(run()) == 20


def test_an_empty_batch_is_done_and_a_passed_deadline_times_out(
    engine: _core.Engine,
) -> None:
    empty = np.zeros(0, dtype=np.int64)
    source = some_bytes(1, 64)
    slots = Slots(1, 64)
    job = engine.copy_in(planes_of(source), empty, empty, keys_of(0), LONG_S)
    assert (job.state(), job.is_quiesced()) == ("done", True)
    job = engine.copy_in(planes_of(source), np.zeros(1, np.int64), slots.addresses, keys_of(1), 0.0)
    assert (job.state(), job.is_quiesced()) == ("timed_out", True)
    assert (slots.data == 0xA5).all()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"addresses": np.array([0, 1])}, "addresses"),
        ({"ids": np.array([0, -1])}, "ids"),
        ({"ids": np.array([0])}, "ids"),
        ({"keys": keys_of(3)}, "keys"),
        ({"planes": np.array([[0, 64, 64]])}, "planes"),
        ({"planes": np.array([[64, 64, 0]])}, "planes"),
        ({"planes": np.array([[64, 63, 64]])}, "planes"),
        ({"planes": np.zeros((0, 3), dtype=np.int64)}, "planes"),
        ({"deadline_s": float("nan")}, "deadline_s"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_done(
    engine: _core.Engine, change: dict[str, object], names: str
) -> None:
    source, slots = some_bytes(2, 64), Slots(2, 64)
    arguments: dict[str, object] = {
        "planes": planes_of(source), "ids": np.arange(2), "addresses": slots.addresses,
        "keys": keys_of(2), "deadline_s": LONG_S,
    }  # fmt: skip
    with pytest.raises(UsageError, match=names):
        engine.copy_in(**{**arguments, **change})
    with pytest.raises(TypeError):
        engine.copy_in(**{**arguments, "ids": np.arange(2, dtype=np.int32)})
    assert engine.stats()["copy_in"]["jobs"] == 0
    assert (slots.data == 0xA5).all()
