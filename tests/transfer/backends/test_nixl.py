"""NIXL over UCX between two processes: what moves, and what happens when a peer does not."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from kvx.errors import PeerLost, TransferTimeout, UsageError
from kvx.transfer.backend import LinkPlan, Memory
from kvx.transfer.backends.nixl import NixlBackend, NixlOptions
from kvx.transfer.backends.nixl.channel import NixlChannel
from kvx.transfer.backends.nixl.job import NixlJob
from kvx.transfer.codes import Code
from kvx.transfer.core import LeaseRef
from kvx_ext import _core
from tests.transfer.backends.nixl_rig import (
    ALL,
    READ,
    WRITE,
    RemoteRig,
    Rig,
    blocks_of,
    pattern,
    plan_of,
    request_of,
)

OPTIONS = NixlOptions(batch_bytes=1 << 20)
WHY_NOT = NixlBackend(OPTIONS).availability()
pytestmark = [
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the spawning of processes
]
SIZE = 32 << 20
# Over tcp the bytes come from the peer's process: what a frozen one does to real networks. On one
# host UCX copies out of it without its help.
TCP = {"UCX_TLS": "tcp"}
HERE: dict[str, str] = {}
TASKS = Path("/proc/self/task")


class Pair(NamedTuple):
    here: Rig
    there: RemoteRig


PairMaker = Callable[..., Pair]


@pytest.fixture
def make_pair() -> Iterator[PairMaker]:
    remotes: list[RemoteRig] = []
    rigs: list[Rig] = []

    def make(environment: dict[str, str]) -> Pair:
        there = RemoteRig("there", 7, OPTIONS, environment)
        remotes.append(there)
        os.environ.update(environment)
        try:
            rigs.append(Rig("here", 5, there.pipe, OPTIONS))
        finally:
            for key in environment:
                del os.environ[key]
        return Pair(rigs[-1], there)

    yield make
    for remote in remotes:
        remote.stop()
    for rig in rigs:
        rig.lost("there", 7, True)
        rig.endpoint.close(1.0)
        rig.hang_up()


def filled(pair: Pair, seed: int = 1) -> int:
    region: int = pair.there.do("memory", SIZE)
    pair.there.do("fill", region, seed)
    return region


def leased(pair: Pair, region: int, blocks: list[tuple[int, ...]], rights: int = ALL) -> LeaseRef:
    return LeaseRef(*pair.there.do("grant", region, blocks, rights))


class Stage(NamedTuple):
    """Blocks that a peer has leased, as many here, and the way between them."""

    memory: Memory
    channel: NixlChannel
    region: int
    blocks: list[tuple[int, ...]]
    lease: LeaseRef
    plan: LinkPlan

    def submit(self, **options: Any) -> NixlJob:
        """Begin to move all of them."""
        return self.channel.submit(request_of(self.plan, self.lease, **options))


def staged(pair: Pair, count: int, block_bytes: int) -> Stage:
    region = filled(pair)
    memory = pair.here.memory(SIZE)
    channel = pair.here.endpoint.connect(pair.there.card, 5.0)
    blocks = blocks_of(count, block_bytes)
    plan = plan_of(memory, blocks, region, blocks, indices=counted(count))
    return Stage(memory, channel, region, blocks, leased(pair, region, blocks), plan)


def counted(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint32)


@pytest.mark.parametrize("environment", [HERE, TCP], ids=["default", "tcp"])
def test_what_is_read_is_verified(make_pair: PairMaker, environment: dict[str, str]) -> None:
    pair = make_pair(environment)
    region = filled(pair)
    memory = pair.here.memory(SIZE)
    channel = pair.here.endpoint.connect(pair.there.card, 5.0)
    # Eight rows of 8 KiB here, two of 32 KiB there, and the other way round.
    local = [(i << 17, 16384, 8, 8192) if i % 2 else (i << 17, 0, 1, 65536) for i in range(64)]
    remote = [(i << 18, 65536, 2, 32768) for i in reversed(range(64))]
    source = pattern(SIZE, 1)
    keys = pattern(64 * 16, 2).reshape(-1, 16)
    sums = _core.row_checksums(source, np.array(remote, np.int64), keys)
    lease = leased(pair, region, remote)
    plan = plan_of(memory, local, region, remote, indices=counted(64), checksums=sums, keys=keys)
    for _ in range(3):  # the second time with what was prepared the first time
        pair.here.memories[memory.region][:] = 0
        job = channel.submit(request_of(plan, lease, note=b"read"))
        assert job.wait(10.0)
        assert job.state() == "done"
        assert job.is_quiesced()
        assert job.checksums().tolist() == sums.tolist()
        assert job.blocks_done == 64
        assert job.bytes_done == job.bytes == 64 << 16
    expected = np.zeros(SIZE, np.uint8)
    for (at, _, count, size), (begin, stride, rows, row) in zip(local, remote, strict=True):
        canonical = np.concatenate([source[begin + n * stride :][:row] for n in range(rows)])
        for n in range(count):
            expected[at + n * 16384 :][:size] = canonical[n * size : (n + 1) * size]
    assert (pair.here.memories[memory.region] == expected).all()
    assert pair.there.do("notes") == [("here", b"read")] * 3


@pytest.mark.parametrize("environment", [HERE, TCP], ids=["default", "tcp"])
def test_what_is_written_is_verified(make_pair: PairMaker, environment: dict[str, str]) -> None:
    pair = make_pair(environment)
    region = filled(pair)
    memory = pair.here.memory(SIZE)
    pair.here.memories[memory.region][:] = pattern(SIZE, 3)
    channel = pair.here.endpoint.connect(pair.there.card, 5.0)
    blocks = blocks_of(16, SIZE // 16)
    lease = leased(pair, region, blocks)
    plan = plan_of(memory, blocks, region, blocks[::-1], indices=counted(16)[::-1].copy())
    job = channel.submit(request_of(plan, lease, is_write=True, note=b"written"))
    assert job.wait(10.0)
    assert job.state() == "done"
    halves = pattern(SIZE, 3).reshape(16, -1)[::-1]
    assert pair.there.do("bytes", region) == halves.tobytes()
    assert pair.there.do("notes") == [("here", b"written")]
    assert pair.there.do("uses", *lease) == 0


def test_a_block_with_another_checksum_is_corrupt(make_pair: PairMaker) -> None:
    pair = make_pair(HERE)
    stage = staged(pair, 32, 65536)
    sums = _core.row_checksums(pattern(SIZE, 1), np.array(stage.blocks, np.int64))
    pair.there.do("poke", stage.region, 5 * 65536 + 77, int(pattern(SIZE, 1)[5 * 65536 + 77]) ^ 1)
    plan = dataclasses.replace(stage.plan, checksums=sums)
    job = stage.channel.submit(request_of(plan, stage.lease, note=b"never"))
    assert job.wait(5.0)
    assert job.state() == "failed"
    assert np.flatnonzero(job.codes() == Code.CORRUPT).tolist() == [5]
    assert job.blocks_done == 31
    # Without expected checksums the owner compares with the bytes that are there: all is well.
    job = stage.submit()
    assert job.wait(5.0)
    assert job.state() == "done"


def test_a_lease_must_be_live_and_allow_it(make_pair: PairMaker) -> None:
    pair = make_pair(HERE)
    region = filled(pair)
    memory = pair.here.memory(SIZE)
    channel = pair.here.endpoint.connect(pair.there.card, 5.0)
    blocks = blocks_of(8, 65536)
    plan = plan_of(memory, blocks, region, blocks, indices=counted(8))

    def codes(lease: LeaseRef, *, is_write: bool) -> set[int]:
        job = channel.submit(request_of(plan, lease, is_write=is_write, note=b"never"))
        assert job.wait(5.0)
        return set(job.codes().tolist())

    live = leased(pair, region, blocks)
    assert codes(live, is_write=False) == {Code.OK}
    pair.there.do("revoke", *live)
    assert codes(live, is_write=False) == {Code.STALE}
    assert codes(live, is_write=True) == {Code.STALE}
    # To be written by the owner is another right than to be written by the peer itself.
    assert codes(leased(pair, region, blocks, READ | WRITE), is_write=True) == {Code.USAGE}
    assert codes(leased(pair, region, blocks, WRITE), is_write=False) == {Code.USAGE}
    assert pair.there.do("bytes", region) == pattern(SIZE, 1).tobytes()
    assert pair.there.do("notes") == [("here", b"never")]


def test_a_frozen_peer_ends_in_a_deadline_and_quarantine(make_pair: PairMaker) -> None:
    pair = make_pair(TCP)
    stage = staged(pair, 32, 1 << 20)
    array = pair.here.memories[stage.memory.region]
    pair.there.freeze()
    job = stage.submit(deadline_s=0.3)
    begun = time.monotonic()
    assert job.wait(2.0)
    assert time.monotonic() - begun < 0.5
    assert job.state() == "timed_out"
    assert set(job.codes().tolist()) == {Code.TIMEOUT}
    assert not job.wait_quiesced(0.3)
    assert pair.here.endpoint.quarantine()[0][:4] == (job.id, "there", False, job.bytes)
    assert not pair.here.endpoint.unregister(stage.memory, 0.05)
    array[:] = 0
    pair.there.thaw()
    assert job.wait_quiesced(5.0)
    # It is written late: had the memory been given away, somebody else's bytes would be gone.
    assert array.any()
    assert pair.here.endpoint.quarantine() == []
    array[:] = 0
    time.sleep(0.3)
    assert not array.any()
    assert job.state() == "timed_out"
    assert pair.here.endpoint.unregister(stage.memory, 2.0)


def test_a_write_holds_its_lease_until_it_has_stopped(make_pair: PairMaker) -> None:
    pair = make_pair(TCP)
    stage = staged(pair, 32, 1 << 20)
    job = stage.submit(is_write=True, deadline_s=5.0)
    while not pair.there.do("uses", *stage.lease):
        assert not job.is_terminal()
    pair.there.do("revoke", *stage.lease)
    assert job.wait(6.0)
    assert job.codes()[0] in {Code.STALE, Code.OK}
    assert job.wait_quiesced(5.0)
    end = time.monotonic() + 2.0
    while pair.there.do("uses", *stage.lease) and time.monotonic() < end:
        time.sleep(0.01)
    assert pair.there.do("uses", *stage.lease) == 0


@pytest.mark.parametrize("environment", [HERE, TCP], ids=["default", "tcp"])
def test_an_owner_that_does_not_confirm_means_no_data(
    make_pair: PairMaker, environment: dict[str, str]
) -> None:
    pair = make_pair(environment)
    stage = staged(pair, 4, 65536)
    pair.there.do("mute")
    job = stage.submit(deadline_s=0.3)
    assert job.wait(2.0)
    assert job.state() == "timed_out"
    assert job.blocks_done == 0
    assert job.wait_quiesced(2.0)


def test_a_killed_peer_is_lost_at_once_and_may_come_back(make_pair: PairMaker) -> None:
    pair = make_pair(TCP)
    stage = staged(pair, 32, 1 << 20)
    endpoint = pair.here.endpoint
    pair.there.freeze()
    job = stage.submit()
    time.sleep(0.1)
    pair.there.kill()
    killed = time.monotonic()
    assert job.wait(5.0)
    assert time.monotonic() - killed < 0.5
    assert set(job.codes().tolist()) == {Code.PEER_LOST}
    assert job.is_lost()
    assert job.wait_quiesced(2.0)
    assert not stage.channel.is_up()
    with pytest.raises(PeerLost):
        stage.submit()
    pair.here.lost("there", 7, True)
    # The same name, another life, at other addresses.
    again = RemoteRig("there", 8, OPTIONS, TCP)
    try:
        pair.here.hang_up()
        pair.here.pipe = again.pipe
        pair.here.listen()
        region = again.do("memory", SIZE)
        again.do("fill", region, 4)
        lease = LeaseRef(*again.do("grant", region, stage.blocks, ALL))
        channel = endpoint.connect(again.card, 5.0)
        plan = plan_of(stage.memory, stage.blocks, region, stage.blocks, indices=counted(32))
        job = channel.submit(request_of(plan, lease))
        assert job.wait(5.0)
        assert job.state() == "done"
        assert (pair.here.memories[stage.memory.region] == pattern(SIZE, 4)).all()
    finally:
        again.stop()
        pair.here.lost("there", 8, True)


def test_cancelling_ends_at_once_and_quiesces_later(make_pair: PairMaker) -> None:
    pair = make_pair(TCP)
    stage = staged(pair, 32, 1 << 20)
    pair.there.freeze()
    job = stage.submit()
    time.sleep(0.1)
    assert not job.watch()
    assert job.cancel()
    assert not job.cancel()
    assert job.state() == "cancelled"
    assert pair.here.ended == [job.id]
    assert not job.wait_quiesced(0.1)
    pair.there.thaw()
    assert job.wait_quiesced(5.0)


def test_memory_that_is_registered_later_is_found(make_pair: PairMaker) -> None:
    pair = make_pair(HERE)
    memory = pair.here.memory(1 << 20)
    channel = pair.here.endpoint.connect(pair.there.card, 5.0)
    blocks = blocks_of(2, 65536)
    region = filled(pair)
    lease = leased(pair, region, blocks)
    plan = plan_of(memory, blocks, region, blocks, indices=counted(2))
    job = channel.submit(request_of(plan, lease))
    assert job.wait(5.0)
    assert job.state() == "done"
    nowhere = plan_of(memory, blocks, 999, blocks, indices=counted(2))
    job = channel.submit(request_of(nowhere, lease))
    assert job.wait(5.0)
    assert set(job.codes().tolist()) == {Code.STALE}
    outside = plan_of(memory, blocks, region, [(SIZE - 1, 0, 1, 65536)] * 2, indices=counted(2))
    with pytest.raises(UsageError, match="does not lie within"):
        channel.submit(request_of(outside, lease))


def test_memory_is_kept_while_a_peer_may_touch_it(make_pair: PairMaker) -> None:
    pair = make_pair(TCP)
    region = filled(pair)
    memory = pair.here.memory(SIZE)
    pair.here.endpoint.connect(pair.there.card, 5.0)
    assert pair.here.endpoint.unregister(memory, 0.0)  # nobody has asked where it is
    memory = pair.here.memory(SIZE)
    pair.there.do("connect", pair.here.card())
    pair.there.freeze()
    assert not pair.here.endpoint.unregister(memory, 0.2)
    pair.there.thaw()
    assert pair.here.endpoint.unregister(memory, 5.0)
    assert pair.there.do("unregister", region, 5.0)
    other = pair.here.memory(SIZE)
    pair.there.kill()
    assert not pair.here.endpoint.unregister(other, 0.1)
    pair.here.lost("there", 7, True)
    assert pair.here.endpoint.unregister(other, 0.1)


def test_nothing_spins(make_pair: PairMaker) -> None:
    threads = len(list(TASKS.iterdir()))
    pair = make_pair(TCP)
    filled(pair)
    pair.here.memory(SIZE)
    pair.here.endpoint.connect(pair.there.card, 5.0)
    time.sleep(0.3)
    before, before_there = time.process_time(), pair.there.do("cpu")
    time.sleep(2.0)
    # NIXL left alone takes half a core, so a tenth of that is far from either.
    assert time.process_time() - before < 0.1
    assert pair.there.do("cpu") - before_there < 0.1
    pair.here.endpoint.close(2.0)
    time.sleep(0.2)
    assert len(list(TASKS.iterdir())) <= threads + 1  # the one that reads the pipe


def test_a_peer_that_says_nothing_is_not_waited_for(make_pair: PairMaker) -> None:
    pair = make_pair(HERE)
    pair.there.do("mute")
    with pytest.raises(TransferTimeout, match="did not answer"):
        pair.here.endpoint.connect(pair.there.card, 0.2)
