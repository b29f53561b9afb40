"""When the memory of whoever uses a cache is theirs again: after the last copy, whatever hangs.

What disks and the network still do after the end of a transfer is done to slots, which the cache
keeps until it is over.
"""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

import kvx
from kvx.cache.peer.asking import PeerRead
from kvx.cache.s3.reading import ObjectRead
from kvx.errors import KvxError, TransferCancelled, TransferTimeout
from kvx.transfer.handle import TransferState
from tests.cache.conftest import BLOCK_BYTES, Opener, make_blocks, make_hashes, open_space
from tests.cache.faults import injected, onboard, put_on_nvme, sample, wait_until

if TYPE_CHECKING:
    from kvx.transfer.agents.transfers import LinkTransfer

COUNT = 24
LONG_S = 10.0
on_host = pytest.mark.parametrize("gpu", ["host"], indirect=True)


@pytest.mark.parametrize("is_cancelled", [False, True])
@pytest.mark.parametrize("arriving", [0, 5])
def test_a_read_that_hangs_for_ever_lets_go_of_its_target(
    open_cache: Opener, is_cancelled: bool, arriving: int
) -> None:
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults, breaker={"failures": 1000}))
    put_on_nvme(cache, space, COUNT)
    failpoints.set("read", "hang", after=arriving, ignores_cancel=True)
    target = np.full((COUNT, BLOCK_BYTES), 7, np.uint8)
    deadline_s = 60.0 if is_cancelled else 0.1
    transfer = space.onboard(make_hashes(COUNT), target, deadline_s=deadline_s)
    assert not transfer.wait_quiesced(0.02)
    wait_until(lambda: failpoints.hits().get("hang", 0) > 0)
    if is_cancelled:
        assert transfer.cancel()
    with pytest.raises(TransferCancelled if is_cancelled else TransferTimeout):
        transfer.wait(LONG_S)
    assert transfer.wait_quiesced(LONG_S)
    assert transfer.wait_quiesced(0.0)
    assert sample(cache, "kvx_quarantined_bytes") > 0
    assert cache.stats()["dram"]["reserved"] > 0
    target[:] = 9  # somebody else's by now
    failpoints.clear()
    wait_until(lambda: sample(cache, "kvx_unsettled_jobs") == 0)
    assert (target == 9).all()
    assert sample(cache, "kvx_quarantined_bytes") == 0
    stats = cache.stats()
    assert (stats["dram"]["reserved"], stats["nvme"]["pinned"]) == (0, 0)
    assert onboard(space, make_hashes(COUNT)).num_blocks == COUNT
    cache.check_integrity()


@on_host
@pytest.mark.parametrize("verb", ["onboard", "offload"])
def test_a_copy_that_hangs_keeps_the_memory(open_cache: Opener, verb: str) -> None:
    failpoints, faults = injected()
    space = open_space(cache := open_cache(has_nvme=False, faults=faults))
    blocks = make_blocks(COUNT)
    if verb == "onboard":
        space.offload(make_hashes(COUNT), blocks).wait()
        blocks[:] = 7
    failpoints.set("copy", "hang", count=1)
    move = space.onboard if verb == "onboard" else space.offload
    transfer = move(make_hashes(COUNT), blocks, deadline_s=0.1)
    with pytest.raises(TransferTimeout):
        transfer.wait()
    assert not transfer.wait_quiesced(0.05)
    found: list[bool] = []
    waiter = threading.Thread(target=lambda: found.append(transfer.wait_quiesced(LONG_S)))
    waiter.start()
    failpoints.clear()
    waiter.join()
    assert found == [True]
    before = blocks.copy()
    wait_until(lambda: sample(cache, "kvx_unsettled_jobs") == 0)
    assert (blocks == before).all()
    assert cache.stats()["dram"]["reserved"] == 0


def test_many_that_end_while_they_are_copied(open_cache: Opener) -> None:
    """Each target is given away as soon as it is at rest; reads and copies of it are late."""
    failpoints, faults = injected()
    space = open_space(cache := open_cache(faults=faults, breaker={"failures": 1000}))
    put_on_nvme(cache, space, 100)
    failpoints.set("read", "delay", probability=0.3, seed=1, delay_s=0.004)
    failpoints.set("copy", "delay", probability=0.3, seed=2, delay_s=0.002)
    rng = random.Random("at rest")
    targets, num_early = [], 0
    for number in range(150):
        first = rng.randrange(100 - COUNT)
        target = np.full((COUNT, BLOCK_BYTES), 7, np.uint8)
        is_cancelled = number % 2 == 0
        deadline_s = 60.0 if is_cancelled else rng.uniform(0.001, 0.01)
        transfer = space.onboard(make_hashes(COUNT, first=first), target, deadline_s=deadline_s)
        if is_cancelled:
            transfer.wait_finished(rng.uniform(0.0, 0.01))
            transfer.cancel()
        try:
            transfer.wait(LONG_S)
        except KvxError:
            num_early += 1
        assert transfer.wait_quiesced(LONG_S)
        target[:] = 9
        targets.append(target)
        space.drop(make_hashes(4, first=first))
        space.offload(make_hashes(4, first=first), make_blocks(4, first=first)).wait()
    assert num_early > 0
    wait_until(lambda: sample(cache, "kvx_unsettled_jobs") == 0)
    assert all((target == 9).all() for target in targets)
    failpoints.clear()
    assert cache.flush(LONG_S)
    assert cache.stats()["dram"]["reserved"] == 0
    cache.check_integrity()


def test_what_an_object_still_brings_goes_into_slots() -> None:
    read = ObjectRead(1, lambda _: None, lambda _: None)
    assert not read.wait_at_rest(0.0)
    assert read.begin_landing()
    assert read.cancel()
    assert read.wait_at_rest(0.0)
    assert not read.is_quiesced(), "its slots are still being written"


def test_what_a_peer_still_brings_goes_into_slots() -> None:
    transfer: kvx.Transfer[object] = kvx.Transfer(
        SimpleNamespace(drive=lambda _: None, wait_quiesced=lambda _: False),  # type: ignore[arg-type]
        "a read whose thread is stuck",
    )
    read = PeerRead(cast("LinkTransfer", transfer), 1)
    assert not read.wait_at_rest(0.0)
    transfer.complete(None, TransferTimeout("its time is over"))
    assert transfer.poll() is TransferState.TIMED_OUT
    assert read.wait_at_rest(0.0)
    assert not read.is_quiesced(), "its slots are still being written"
