"""cuda-ipc between two processes: what every backend must hold to, and what arrives where."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvx.errors import CorruptBlock, StaleReference, UnavailableError, UsageError
from kvx.transfer import conformance
from kvx.transfer.codes import Code
from kvx.transfer.conformance import WRITE, Rig
from kvx.transfer.owner import pattern
from tests.gpu.ipc_rig import BLOCK_BYTES, NUM_BLOCKS, endpoint_of, moves_both_ways, open_ipc
from tests.gpu.rig import Gpu

LAST = conformance.ends_when_the_owner_dies


@pytest.fixture(params=["plain", "exportable"])
def memory_kind(request: pytest.FixtureRequest, gpu: Gpu) -> str:
    if request.param == "exportable" and not gpu.device.info()["has_exportable_memory"]:
        pytest.skip("this device has no exportable memory")
    return str(request.param)


@pytest.fixture
def rig(gpu: Gpu, memory_kind: str) -> Iterator[Rig]:
    with open_ipc(gpu, here=memory_kind, there=memory_kind) as opened:
        yield opened


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_conformance(gpu: Gpu, check: conformance.Check) -> None:
    # What a device copies to a device is not checksummed, unless that is asked for.
    with open_ipc(gpu, config={"verify_device": True}) as rig:
        check(rig)


def test_it_is_the_way_that_is_taken(rig: Rig) -> None:
    transfer = rig.agent.read(rig.local(), rig.peer.blocks(lease=rig.lease()))
    assert transfer.wait().backend == "cuda-ipc"
    assert (rig.blocks == pattern(1, NUM_BLOCKS, BLOCK_BYTES)).all()
    write = rig.agent.write(rig.local(), rig.peer.blocks(lease=rig.lease(rights=WRITE)))
    assert write.wait().backend == "cuda-ipc"


def test_blocks_of_a_device_are_read_into_host_memory(gpu: Gpu, memory_kind: str) -> None:
    with open_ipc(gpu, here="host", there=memory_kind) as rig:
        token = rig.lease(has_checksums=True)
        expected = pattern(1, NUM_BLOCKS, BLOCK_BYTES)
        rng = np.random.default_rng(5)
        for _ in range(3):
            ours = rng.permutation(NUM_BLOCKS)[:33]
            theirs = rng.permutation(NUM_BLOCKS)[:33]
            rig.blocks[:] = 0
            result = rig.agent.read(rig.local(ours), rig.peer.blocks(theirs, lease=token)).wait()
            assert (rig.blocks[ours] == expected[theirs]).all()
            assert not rig.blocks[np.setdiff1d(np.arange(NUM_BLOCKS), ours)].any()
            assert result.checksums.all()


def test_damaged_blocks_are_found_in_host_memory_and_poisoned(gpu: Gpu) -> None:
    with open_ipc(gpu, here="host") as rig:
        token = rig.lease(has_checksums=True)
        rig.ask("spoil", 5)
        transfer = rig.agent.read(rig.local(), rig.peer.blocks(lease=token))
        with pytest.raises(CorruptBlock):
            transfer.wait()
        result = transfer.result
        assert result is not None
        assert np.flatnonzero(result.codes).tolist() == [5]
        assert result.blocks_done == NUM_BLOCKS - 1
        assert (rig.blocks[5] == 0xFF).all()
        rest = np.arange(NUM_BLOCKS) != 5
        assert (rig.blocks[rest] == pattern(1, NUM_BLOCKS, BLOCK_BYTES)[rest]).all()


def test_damage_on_the_way_to_a_device_is_not_seen_unless_it_is_asked_for(gpu: Gpu) -> None:
    with open_ipc(gpu) as rig:
        token = rig.lease(has_checksums=True)
        rig.ask("spoil", 5)
        # The fence of the lease is all that guards it, as the guide says.
        rig.agent.read(rig.local(), rig.peer.blocks(lease=token)).wait()


@pytest.mark.parametrize("there", ["plain", "host"])
def test_a_device_writes_what_the_peer_copies(gpu: Gpu, memory_kind: str, there: str) -> None:
    with open_ipc(gpu, here=memory_kind, there=there) as rig:
        token = rig.lease(rights=WRITE)
        rig.blocks[:] = pattern(7, NUM_BLOCKS, BLOCK_BYTES)
        ours, theirs = np.arange(40), np.random.default_rng(3).permutation(NUM_BLOCKS)[:40]
        result = rig.agent.write(rig.local(ours), rig.peer.blocks(theirs, lease=token)).wait()
        assert result.backend == "cuda-ipc"
        for mine, its in zip(ours, theirs, strict=True):
            assert rig.ask("content", int(its)) == rig.blocks[int(mine)].tobytes()
        assert bool(result.checksums.all()) is (there == "host")


def test_a_write_stays_within_its_lease(rig: Rig) -> None:
    token = rig.ask("lease", [0, 1], rights=WRITE)[1]
    before = rig.ask("content", 2)
    rig.blocks[:] = 9
    remote = rig.peer.blocks(lease=token)
    forged = type(remote)(remote.peer, remote.lease, remote.rows, np.array([0, 7], np.uint32))
    with pytest.raises(UsageError, match="has 2 blocks only"):
        rig.agent.write(rig.local([0, 1]), forged).wait()
    shifted = remote.rows.copy()
    shifted[:, 0] += 2 * BLOCK_BYTES
    forged = type(remote)(remote.peer, remote.lease, shifted, None)
    with pytest.raises(UsageError, match="named by number"):
        rig.agent.write(rig.local([0, 1]), forged).wait()
    assert rig.ask("content", 2) == before


def test_targets_that_overlap_are_refused(rig: Rig) -> None:
    remote = rig.peer.blocks([0, 1], lease=rig.lease())
    with pytest.raises(UsageError, match="local block 1 overlaps"):
        rig.agent.read(rig.registration.descriptors([0, 100], [BLOCK_BYTES] * 2), remote)


def test_many_windows_and_many_messages(gpu: Gpu) -> None:
    # 10,000 blocks are more than one message names, 40 MB more than one window.
    with open_ipc(gpu, num_blocks=10_000) as rig:
        moves_both_ways(rig, 10_000)


def test_memory_is_mapped_once_and_let_go(rig: Rig) -> None:
    remote = rig.peer.blocks(lease=rig.lease())
    for _ in range(3):
        rig.agent.read(rig.local(), remote).wait()
    assert endpoint_of(rig)._imports.count() == 1
    assert rig.ask("may_be_mapped") == 1
    # The owner's registration goes only when nobody has it mapped.
    rig.ask("deregister", 5.0)
    assert endpoint_of(rig)._imports.count() == 0
    with pytest.raises(StaleReference):
        rig.agent.read(rig.local(), remote).wait()


def test_two_registrations_of_one_allocation(gpu: Gpu, memory_kind: str) -> None:
    with open_ipc(gpu, there=memory_kind, num_blocks=4, block_bytes=1 << 20) as rig:
        token = rig.ask("lease_part", 1 << 20, 2 << 20)
        rig.agent.read(
            rig.registration.descriptors([0], [2 << 20]), rig.peer.blocks(lease=token)
        ).wait()
        expected = pattern(1, 4, 1 << 20)[1:3].reshape(-1)
        assert (rig.blocks.reshape(-1)[: 2 << 20] == expected).all()
        whole = rig.peer.descriptors([0], [1 << 20], lease=rig.ask("lease")[1])
        rig.agent.read(rig.registration.descriptors([0], [1 << 20]), whole).wait()
        assert (rig.blocks[0] == pattern(1, 4, 1 << 20)[0]).all()


def test_host_memory_takes_other_ways(gpu: Gpu) -> None:
    with open_ipc(gpu, here="host", there="host") as rig:
        transfer = rig.agent.read(rig.local(), rig.peer.blocks(lease=rig.lease()))
        assert transfer.wait().backend == "shm"
        with pytest.raises(UnavailableError, match="both sides are host memory"):
            rig.agent.read(rig.local(), rig.peer.blocks(lease=rig.lease()), backend="cuda-ipc")


def test_codes_tell_which_blocks_arrived(gpu: Gpu) -> None:
    with open_ipc(gpu, here="host") as rig:
        number, token = rig.ask("lease", [0, 1, 2])
        remote = rig.peer.blocks(lease=token)
        rig.agent.read(rig.local([0, 1, 2]), remote).wait()
        rig.ask("revoke", number)
        rig.blocks[:] = 9
        transfer = rig.agent.read(rig.local([0, 1, 2]), remote)
        with pytest.raises(StaleReference):
            transfer.wait()
        assert transfer.result is not None
        assert (transfer.result.codes == Code.STALE).all()
        assert (rig.blocks == 9).all(), "it was copied although the lease had ended"
