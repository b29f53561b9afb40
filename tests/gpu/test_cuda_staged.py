"""cuda-staged between two processes: device memory where only host memory can be moved."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from kvx.errors import (
    CorruptBlock,
    StaleReference,
    TransferError,
    TransferTimeout,
    UnavailableError,
    UsageError,
)
from kvx.transfer import conformance
from kvx.transfer.agents.outcome import LinkOutcome
from kvx.transfer.conformance import WRITE
from kvx.transfer.handle import TransferState
from kvx.transfer.owner import pattern
from tests.gpu.ipc_rig import BLOCK_BYTES, NUM_BLOCKS, moves_both_ways, open_ipc
from tests.gpu.rig import Gpu
from tests.sim.cuda_driver import Engine, SimulatedDriver
from tests.sim.stalls import LATE_S

PATIENCE_S = 10.0
ECC_ERROR = 214
# Two agents that share no more than a network.
FAR: dict[str, Any] = {"config": {"unix": False}, "listen": "tcp://127.0.0.1:0"}
NEAR: dict[str, Any] = {}


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_conformance(gpu: Gpu, check: conformance.Check) -> None:
    with open_ipc(gpu, there="host", backend="cuda-staged", **FAR) as rig:
        check(rig)


@pytest.mark.parametrize("where", [FAR, NEAR], ids=["far", "near"])
def test_a_device_reads_host_memory_of_a_peer(gpu: Gpu, where: dict[str, Any]) -> None:
    with open_ipc(gpu, there="host", **where) as rig:
        remote = rig.peer.blocks(lease=rig.lease(has_checksums=True))
        result = rig.agent.read(rig.local(), remote, notify=b"read").wait()
        assert result.backend == "cuda-staged"
        assert result.checksums.all()
        assert (rig.blocks == pattern(1, NUM_BLOCKS, BLOCK_BYTES)).all()
        assert ("initiator", b"read") in rig.ask("notifications", 5.0)


@pytest.mark.parametrize("where", [FAR, NEAR], ids=["far", "near"])
def test_host_memory_is_written_to_a_device_of_a_peer(gpu: Gpu, where: dict[str, Any]) -> None:
    with open_ipc(gpu, here="host", **where) as rig:
        token = rig.lease(rights=WRITE)
        rig.blocks[:] = pattern(7, NUM_BLOCKS, BLOCK_BYTES)
        theirs = np.random.default_rng(3).permutation(NUM_BLOCKS)[:40]
        result = rig.agent.write(
            rig.local(np.arange(40)), rig.peer.blocks(theirs, lease=token), notify=b"written"
        ).wait()
        assert result.backend == "cuda-staged"
        # All of it is on the device when the note comes.
        assert ("initiator", b"written") in rig.ask("notifications", 5.0)
        for mine, its in enumerate(theirs.tolist()):
            assert rig.ask("content", its) == rig.blocks[mine].tobytes()


def test_a_device_writes_host_memory_of_a_peer(gpu: Gpu) -> None:
    with open_ipc(gpu, there="host", **FAR) as rig:
        token = rig.lease(rights=WRITE)
        rig.blocks[:] = pattern(7, NUM_BLOCKS, BLOCK_BYTES)
        result = rig.agent.write(rig.local(), rig.peer.blocks(lease=token)).wait()
        assert result.backend == "cuda-staged"
        for block in range(NUM_BLOCKS):
            assert rig.ask("content", block) == rig.blocks[block].tobytes()


@pytest.mark.parametrize("here", ["host", "plain"])
@pytest.mark.parametrize("has_checksums", [False, True])
def test_a_staged_lease_is_read_from_far_away(gpu: Gpu, here: str, has_checksums: bool) -> None:
    with open_ipc(gpu, here=here, **FAR) as rig:
        ids = [5, 3, 60]
        checksums = "compute" if has_checksums else None
        token = rig.ask("lease_staged", ids, checksums=checksums)
        # What is leased is what was there then.
        rig.ask("fill", 2)
        rig.agent.read(rig.local([0, 1, 2]), rig.peer.blocks(lease=token)).wait()
        assert (rig.blocks[:3] == pattern(1, NUM_BLOCKS, BLOCK_BYTES)[ids]).all()


def test_a_staged_lease_of_all_is_a_range(gpu: Gpu) -> None:
    with open_ipc(gpu, here="host", **FAR) as rig:
        remote = rig.peer.descriptors([100], [9000], lease=rig.ask("lease_staged", None))
        rig.agent.read(rig.registration.descriptors([0], [9000]), remote).wait()
        expected = pattern(1, NUM_BLOCKS, BLOCK_BYTES).reshape(-1)[100:9100]
        assert (rig.blocks.reshape(-1)[:9000] == expected).all()


def test_the_memory_of_a_staged_lease_goes_with_it(sim: Gpu) -> None:
    with open_ipc(sim, here="host", **FAR) as rig:
        before = rig.ask("stats")["regions"]
        token = rig.ask("lease_staged", [0])
        assert rig.ask("stats")["regions"] == before + 1
        rig.ask("revoke_last")
        assert rig.ask("stats")["regions"] == before
        with pytest.raises(StaleReference):
            rig.agent.read(rig.local([0]), rig.peer.blocks(lease=token)).wait()
        # Nor does it stay when nobody revokes it.
        for _ in range(3):
            rig.ask("lease_staged", [1], ttl_s=0.05)
            time.sleep(0.1)
        assert rig.ask("stats")["regions"] == before + 1
        rig.ask("deregister", 5.0)
        assert rig.ask("stats")["regions"] == 0


def test_damaged_blocks_never_reach_the_device(gpu: Gpu) -> None:
    with open_ipc(gpu, there="host", **FAR) as rig:
        token = rig.lease(has_checksums=True)
        rig.ask("spoil", 5)
        rig.blocks[:] = 9
        transfer = rig.agent.read(rig.local(), rig.peer.blocks(lease=token))
        with pytest.raises(CorruptBlock):
            transfer.wait()
        content = rig.blocks.array()  # type: ignore[attr-defined]
        assert (content[5] == 9).all()
        assert transfer.result is not None
        arrived = transfer.result.codes == 0
        assert (content[arrived] == pattern(1, NUM_BLOCKS, BLOCK_BYTES)[arrived]).all()


def test_many_windows(gpu: Gpu) -> None:
    with open_ipc(gpu, there="host", num_blocks=10_000, **FAR) as rig:
        moves_both_ways(rig, 10_000)


def test_blocks_larger_than_a_window(gpu: Gpu) -> None:
    with open_ipc(gpu, there="host", num_blocks=3, block_bytes=12 << 20, **FAR) as rig:
        local = rig.registration.blocks([0, 1, 2], 12 << 20)
        token = rig.ask("lease", [2, 0, 1])[1]
        rig.agent.read(local, rig.peer.blocks(lease=token)).wait()
        assert (rig.blocks == pattern(1, 3, 12 << 20)[[2, 0, 1]]).all()


def test_a_device_that_hangs_is_quarantined(sim: Gpu, driver: SimulatedDriver) -> None:
    with open_ipc(sim, there="host", **FAR) as rig:
        remote = rig.peer.blocks(lease=rig.lease())
        driver.freeze(Engine.HOST_TO_DEVICE)
        began = time.monotonic()
        transfer = rig.agent.read(rig.local(), remote, deadline_s=0.3)
        with pytest.raises(TransferTimeout):
            transfer.wait()
        assert time.monotonic() - began < 0.4 + LATE_S
        assert transfer.outcome is LinkOutcome.QUARANTINED
        with pytest.raises(TransferTimeout, match="still in use by backend cuda-staged"):
            rig.registration.close(0.2)
        driver.thaw(Engine.HOST_TO_DEVICE)
        assert transfer.wait_quiesced(PATIENCE_S)
        rig.registration.close(PATIENCE_S)


def test_a_receivers_device_that_hangs(sim: Gpu) -> None:
    with open_ipc(sim, here="host", **FAR) as rig:
        number, token = rig.ask("lease", [0, 1], rights=WRITE)
        rig.ask("freeze_engine", int(Engine.HOST_TO_DEVICE))
        transfer = rig.agent.write(
            rig.local([0, 1]), rig.peer.blocks(lease=token), deadline_s=0.3, notify=b"no"
        )
        with pytest.raises(TransferTimeout):
            transfer.wait()
        assert transfer.outcome is LinkOutcome.QUARANTINED
        with pytest.raises(TransferTimeout, match="still in use"):
            rig.ask("revoke", number, 0.2)
        rig.ask("thaw_engine", int(Engine.HOST_TO_DEVICE))
        assert transfer.wait_quiesced(PATIENCE_S)
        rig.ask("revoke", number, 5.0)
        assert not rig.ask("notifications"), "it was told although it was late"


def test_a_receivers_device_that_fails(sim: Gpu) -> None:
    with open_ipc(sim, here="host", **FAR) as rig:
        remote = rig.peer.blocks([0, 1], lease=rig.lease(rights=WRITE))
        rig.agent.write(rig.local([0, 1]), remote).wait()
        rig.ask("steer", "fail_context", ECC_ERROR)
        with pytest.raises(TransferError, match="device 0 failed a copy") as caught:
            rig.agent.write(rig.local([0, 1]), remote, notify=b"no").wait()
        assert caught.value.bytes_done == 0
        assert not rig.ask("notifications", 0.1), "it was told although nothing arrived"


def test_writes_wait_for_the_stream_of_their_target(sim: Gpu) -> None:
    with open_ipc(sim, here="host", **FAR) as rig:
        stream = rig.ask("make_stream")
        rig.ask("freeze_engine", int(Engine.ON_DEVICE))
        rig.ask("fill_in_stream", stream, 0x42)
        token = rig.ask("lease_after", [0], stream, rights=WRITE)
        rig.blocks[0] = 7
        transfer = rig.agent.write(rig.local([0]), rig.peer.blocks(lease=token))
        time.sleep(0.2)
        assert transfer.poll() is TransferState.PENDING
        rig.ask("thaw_engine", int(Engine.ON_DEVICE))
        transfer.wait()
        assert rig.ask("content", 0) == bytes([7]) * BLOCK_BYTES


def test_it_says_which_way_out_there_is(gpu: Gpu) -> None:
    with open_ipc(gpu, here="host", **FAR) as rig:
        remote = rig.peer.blocks(lease=rig.lease())
        with pytest.raises(UnavailableError, match="staged=True"):
            rig.agent.read(rig.local(), remote)
    with open_ipc(gpu, **FAR) as rig:
        with pytest.raises(UnavailableError, match="staged=True"):
            rig.agent.write(rig.local(), rig.peer.blocks(lease=rig.lease(rights=WRITE)))
        with pytest.raises(UsageError, match="what they write is staged by itself"):
            rig.ask("lease_staged", [0], rights=WRITE)
