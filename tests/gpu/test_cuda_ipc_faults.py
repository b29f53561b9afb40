"""cuda-ipc when something fails in the middle: engines hang, peers die, leases end."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest

from kvx.errors import (
    CorruptBlock,
    KvxError,
    PeerLost,
    StaleReference,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from kvx.transfer.agents.lease_token import RemoteLease
from kvx.transfer.agents.outcome import LinkOutcome
from kvx.transfer.conformance import KEY, WRITE, Rig
from kvx.transfer.core import LeaseRef
from kvx.transfer.owner import OwnerProcess, pattern
from tests.gpu.ipc_owner import DeviceOwner
from tests.gpu.ipc_rig import BLOCK_BYTES, NUM_BLOCKS, endpoint_of, open_ipc
from tests.gpu.rig import Gpu
from tests.sim.cuda_driver import Engine, SimulatedDriver
from tests.sim.stalls import LATE_S
from tests.waiting import eventually

PATIENCE_S = 10.0
ECC_ERROR = 214
OUT_OF_MEMORY = 2


def mapped(rig: Rig) -> int:
    return int(endpoint_of(rig)._imports.count())


def read_some(rig: Rig, count: int = 8, **named: Any) -> Any:
    remote = rig.peer.blocks(np.arange(count), lease=rig.lease())
    return rig.agent.read(rig.local(np.arange(count)), remote, **named)


def write_held_up(rig: Rig, **named: Any) -> Any:
    """Begin a write that the receiver's device does not get done until it is thawed."""
    rig.write_one()
    token = rig.lease(rights=WRITE)
    rig.ask("freeze_engine", int(Engine.ON_DEVICE))
    return rig.agent.write(rig.local(), rig.peer.blocks(lease=token), **named)


@pytest.mark.parametrize("here", ["host", "plain"])
@pytest.mark.parametrize("way", ["deadline", "cancel"])
def test_what_a_device_has_begun_is_quarantined(
    sim: Gpu, driver: SimulatedDriver, here: str, way: str
) -> None:
    with open_ipc(sim, here=here) as rig:
        read_some(rig).wait()
        rig.blocks[:] = 0
        driver.freeze(Engine.DEVICE_TO_HOST if here == "host" else Engine.ON_DEVICE)
        began = time.monotonic()
        transfer = read_some(rig, deadline_s=0.3)
        if way == "cancel":
            time.sleep(0.1)
            transfer.cancel()
        with pytest.raises(TransferCancelled if way == "cancel" else TransferTimeout):
            transfer.wait()
        assert time.monotonic() - began < 0.4 + LATE_S
        assert transfer.outcome is LinkOutcome.QUARANTINED
        assert [one.size_bytes for one in rig.agent.quarantine] == [8 * BLOCK_BYTES]
        with pytest.raises(TransferTimeout, match="still in use by backend cuda-ipc"):
            rig.registration.close(0.2)
        driver.thaw(Engine.DEVICE_TO_HOST if here == "host" else Engine.ON_DEVICE)
        assert transfer.wait_quiesced(PATIENCE_S)
        assert not rig.agent.quarantine
        rig.blocks[:] = 3
        time.sleep(0.05)
        assert (rig.blocks == 3).all()
        rig.registration.close(PATIENCE_S)


def test_a_write_is_quarantined_while_the_receivers_device_hangs(sim: Gpu) -> None:
    with open_ipc(sim) as rig:
        transfer = write_held_up(rig, deadline_s=0.3)
        with pytest.raises(TransferTimeout):
            transfer.wait()
        assert transfer.outcome is LinkOutcome.QUARANTINED
        assert [one.is_write for one in rig.agent.quarantine] == [True]
        rig.ask("thaw_engine", int(Engine.ON_DEVICE))
        assert transfer.wait_quiesced(PATIENCE_S)


def test_a_write_whose_receiver_was_lost_and_came_back(sim: Gpu) -> None:
    with open_ipc(sim) as rig:
        transfer = write_held_up(rig)
        time.sleep(0.1)
        rig.peer.close()
        with pytest.raises(PeerLost):
            transfer.wait()
        assert transfer.outcome is LinkOutcome.QUARANTINED
        rig.agent.connect(rig.ask("card"))
        rig.ask("thaw_engine", int(Engine.ON_DEVICE))
        assert transfer.wait_quiesced(PATIENCE_S), "it was not asked again"


def test_large_blocks_are_verified_beside(sim: Gpu) -> None:
    with open_ipc(sim, here="host", num_blocks=12, block_bytes=8 << 20) as rig:
        ids = list(range(12))
        token = rig.ask("lease", ids, has_checksums=True)[1]
        rig.ask("spoil", 7)
        transfer = rig.agent.read(
            rig.registration.blocks(ids, 8 << 20), rig.peer.blocks(lease=token)
        )
        with pytest.raises(CorruptBlock):
            transfer.wait()
        assert transfer.result is not None
        assert np.flatnonzero(transfer.result.codes).tolist() == [7]
        assert (rig.blocks[7] == 0xFF).all()
        good = [block for block in ids if block != 7]
        assert (rig.blocks[good] == pattern(1, 12, 8 << 20)[good]).all()


def test_a_cancelled_write_waits_for_the_receivers_word(sim: Gpu) -> None:
    with open_ipc(sim) as rig:
        transfer = write_held_up(rig)
        time.sleep(0.1)
        began = time.monotonic()
        transfer.cancel()
        with pytest.raises(TransferCancelled):
            transfer.wait()
        assert time.monotonic() - began < 1.0
        assert transfer.outcome is LinkOutcome.QUARANTINED
        rig.ask("thaw_engine", int(Engine.ON_DEVICE))
        assert transfer.wait_quiesced(PATIENCE_S)


def test_the_owner_is_killed_while_we_copy(sim: Gpu, driver: SimulatedDriver) -> None:
    with open_ipc(sim, here="host") as rig:
        assert rig.process is not None
        read_some(rig).wait()
        driver.freeze(Engine.DEVICE_TO_HOST)
        transfer = read_some(rig, deadline_s=PATIENCE_S)
        time.sleep(0.05)
        rig.process.kill()
        with pytest.raises(PeerLost):
            transfer.wait()
        # What a copy may still read stays mapped, and nothing longer than that.
        assert transfer.outcome is LinkOutcome.QUARANTINED
        assert mapped(rig) == 1
        driver.thaw(Engine.DEVICE_TO_HOST)
        assert transfer.wait_quiesced(PATIENCE_S)
        assert eventually(lambda: mapped(rig) == 0), "memory of a dead peer is still mapped"


def test_a_frozen_owner_does_not_hold_up_what_it_has_leased(sim: Gpu) -> None:
    with open_ipc(sim, here="host") as rig:
        assert rig.process is not None
        known, unknown = rig.lease(), rig.lease()
        remote = rig.peer.blocks(lease=known)
        rig.agent.read(rig.local(), remote).wait()
        rig.blocks[:] = 0
        rig.process.freeze()
        try:
            rig.agent.read(rig.local(), remote).wait()
            assert (rig.blocks == pattern(1, NUM_BLOCKS, BLOCK_BYTES)).all()
            # It has to be asked about a lease that is new.
            began = time.monotonic()
            transfer = rig.agent.read(rig.local(), rig.peer.blocks(lease=unknown), deadline_s=0.3)
            with pytest.raises(TransferTimeout):
                transfer.wait()
            assert time.monotonic() - began < 0.4 + LATE_S
            assert transfer.outcome is LinkOutcome.TIMED_OUT
        finally:
            rig.process.thaw()


def test_memory_is_not_given_up_while_a_peer_copies_from_it(
    sim: Gpu, driver: SimulatedDriver
) -> None:
    with open_ipc(sim, here="host") as rig:
        read_some(rig).wait()
        driver.freeze(Engine.DEVICE_TO_HOST)
        transfer = read_some(rig, deadline_s=PATIENCE_S)
        time.sleep(0.05)
        with pytest.raises(TransferTimeout, match="still in use by backend cuda-ipc"):
            rig.ask("deregister", 0.3)
        driver.thaw(Engine.DEVICE_TO_HOST)
        rig.ask("deregister", PATIENCE_S)
        with pytest.raises(StaleReference):
            transfer.wait()
        assert (rig.blocks[:8] == 0xFF).all()
        assert mapped(rig) == 0


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_a_reader_that_dies_or_freezes_while_it_copies(sim: Gpu, how: str) -> None:
    with open_ipc(sim) as rig:
        process = rig.process
        assert process is not None
        lease = rig.registration.lease(rig.local())
        assert eventually(lambda: "initiator" in rig.ask("peers")), "it does not know us"
        rig.ask("begin", "initiator", lease.token, deadline_s=PATIENCE_S)
        assert rig.ask("end", PATIENCE_S) == NUM_BLOCKS
        rig.ask("freeze_engine", int(Engine.ON_DEVICE))
        rig.ask("begin", "initiator", lease.token, deadline_s=PATIENCE_S)
        time.sleep(0.05)
        if how == "kill":
            process.kill()
            # Whoever is dead has nothing mapped: nothing is left to wait for.
            rig.registration.close(PATIENCE_S)
            return
        process.freeze()
        try:
            with pytest.raises(TransferTimeout, match="still in use by backend cuda-ipc"):
                rig.registration.close(0.3)
        finally:
            process.thaw()
        rig.ask("thaw_engine", int(Engine.ON_DEVICE))
        rig.registration.close(PATIENCE_S)
        with pytest.raises(KvxError):
            rig.ask("end", PATIENCE_S)
        assert rig.ask("mapped") == 0


def test_a_lease_that_ends_under_a_copy(sim: Gpu, driver: SimulatedDriver) -> None:
    with open_ipc(sim, here="host") as rig:
        number, token = rig.ask("lease", list(range(8)))
        remote = rig.peer.blocks(lease=token)
        rig.agent.read(rig.local(np.arange(8)), remote).wait()
        driver.freeze(Engine.DEVICE_TO_HOST)
        transfer = rig.agent.read(rig.local(np.arange(8)), remote)
        time.sleep(0.05)
        rig.ask("revoke", number)
        driver.thaw(Engine.DEVICE_TO_HOST)
        with pytest.raises(StaleReference):
            transfer.wait()
        assert (rig.blocks[:8] == 0xFF).all(), "bytes of an ended lease were left"


@pytest.mark.parametrize("is_known", [False, True])
def test_a_lease_of_another_generation(sim: Gpu, is_known: bool) -> None:
    with open_ipc(sim) as rig:
        lease = RemoteLease.decode(rig.lease(), KEY)
        ref = LeaseRef(lease.ref.id, lease.ref.slot, lease.ref.generation + 1)
        forged = dataclasses.replace(lease, ref=ref)
        if is_known:
            # As if the owner had once agreed to it: the page alone has to tell.
            read_some(rig).wait()
            rig.peer.record.channels["cuda-ipc"]._note_agreed(ref)  # type: ignore[attr-defined]
        transfer = rig.agent.read(rig.local(), rig.peer.blocks(lease=forged))
        with pytest.raises(StaleReference):
            transfer.wait()


def test_a_restarted_owner_is_another_one(sim: Gpu) -> None:
    with open_ipc(sim) as rig:
        read_some(rig).wait()
        remote = rig.peer.blocks(lease=rig.lease())
        assert rig.process is not None
        rig.process.kill()
        with pytest.raises(PeerLost):
            rig.agent.read(rig.local(), remote, deadline_s=1.0).wait()
        assert eventually(lambda: mapped(rig) == 0), "memory of a former life is still mapped"
        with OwnerProcess(kind=DeviceOwner, key=KEY) as again:
            again.ask("fill", 6)
            peer = rig.agent.connect(again.ask("card"))
            with pytest.raises(StaleReference):
                peer.blocks(lease=remote.lease)
            token = again.ask("lease", list(range(NUM_BLOCKS)))[1]
            rig.agent.read(rig.local(), peer.blocks(lease=token)).wait()
            assert (rig.blocks == pattern(6, NUM_BLOCKS, BLOCK_BYTES)).all()
            assert mapped(rig) == 1


def test_a_device_that_fails(sim: Gpu) -> None:
    with open_ipc(sim) as rig:
        rig.write_one()
        token = rig.lease(rights=WRITE)
        rig.ask("steer", "fail_context", ECC_ERROR)
        remote = rig.peer.blocks(lease=token)
        with pytest.raises(TransferError, match=r"device 0 failed a copy: .*ECC") as caught:
            rig.agent.write(rig.local(), remote, deadline_s=PATIENCE_S).wait()
        assert not isinstance(caught.value, TransferTimeout)


def test_memory_that_cannot_be_mapped(sim: Gpu, driver: SimulatedDriver) -> None:
    with open_ipc(sim, here="host") as rig:
        driver.inject("cuIpcOpenMemHandle", OUT_OF_MEMORY)
        with pytest.raises(KvxError, match=r"out of memory|OUT_OF_MEMORY"):
            read_some(rig).wait()
        read_some(rig).wait()


def test_an_agent_that_closes_waits_for_its_readers(sim: Gpu) -> None:
    with open_ipc(sim) as rig:
        lease = rig.registration.lease(rig.local())
        assert eventually(lambda: "initiator" in rig.ask("peers")), "it does not know us"
        rig.ask("begin", "initiator", lease.token, deadline_s=PATIENCE_S)
        assert rig.ask("end", PATIENCE_S) == NUM_BLOCKS
        rig.ask("freeze_engine", int(Engine.ON_DEVICE))
        rig.ask("begin", "initiator", lease.token, deadline_s=PATIENCE_S)
        time.sleep(0.05)
        endpoint = endpoint_of(rig)
        rig.agent.close(0.5)
        assert endpoint.exports.all(), "it did not wait"
        rig.ask("thaw_engine", int(Engine.ON_DEVICE))
        assert eventually(lambda: rig.ask("mapped") == 0), "the reader keeps it mapped"
        (left,) = endpoint.exports.all()
        assert not endpoint.exports.importers(left.memory.region)
