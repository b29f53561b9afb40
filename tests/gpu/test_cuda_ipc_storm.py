"""cuda-ipc under random loads: whatever ends how, what counts is right, and all comes to rest."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from kvx.errors import KvxError
from kvx.transfer.conformance import WRITE
from kvx.transfer.memory import MemoryRegion
from kvx.transfer.owner import pattern
from tests.gpu.ipc_rig import BLOCK_BYTES, NUM_BLOCKS, endpoint_of, open_ipc
from tests.gpu.rig import Gpu
from tests.sim.cuda_driver import Engine, SimulatedDriver

ROUNDS = 60
HALF = NUM_BLOCKS // 2
PATIENCE_S = 20.0


class Storm:
    """Reads the first half of the owner's blocks, writes the second one."""

    def __init__(self, rig: Any, seed: int) -> None:
        self.rig = rig
        self.rng = np.random.default_rng(seed)
        self.expected = pattern(1, NUM_BLOCKS, BLOCK_BYTES)
        self.region = MemoryRegion(NUM_BLOCKS * BLOCK_BYTES)
        size = NUM_BLOCKS * BLOCK_BYTES
        self.host = self.region.array()[:size].reshape(NUM_BLOCKS, BLOCK_BYTES)
        self.registration = rig.agent.register(self.region)
        self.under_way: list[tuple[Any, str, np.ndarray, np.ndarray]] = []
        self.ends: dict[str, int] = {}

    def lease(self, ids: np.ndarray, *, is_write: bool) -> tuple[int, bytes]:
        found: tuple[int, bytes] = (
            self.rig.ask("lease", ids.tolist(), rights=WRITE)
            if is_write
            else self.rig.ask("lease", ids.tolist(), has_checksums=True)
        )
        return found

    def step(self) -> None:
        """Begin something, and perhaps spoil it."""
        rng, count = self.rng, int(self.rng.integers(1, 12))
        kind = str(rng.choice(["host", "device", "write"]))
        theirs = rng.permutation(HALF)[:count] + (HALF if kind == "write" else 0)
        ours = rng.permutation(HALF)[:count] + (HALF if kind == "write" else 0)
        number, token = self.lease(theirs, is_write=kind == "write")
        remote = self.rig.peer.blocks(lease=token)
        deadline_s = float(rng.choice([0.001, 0.01, PATIENCE_S], p=[0.15, 0.15, 0.7]))
        registration = self.registration if kind == "host" else self.rig.registration
        local = registration.blocks(ours, BLOCK_BYTES)
        call = self.rig.agent.write if kind == "write" else self.rig.agent.read
        transfer = call(local, remote, deadline_s=deadline_s)
        self.under_way.append((transfer, kind, ours, theirs))
        fate = rng.random()
        if fate < 0.15:
            transfer.cancel()
        elif fate < 0.3:
            try:
                self.rig.ask("revoke", number, 5.0)
            except KvxError:
                self.ends["not revoked"] = self.ends.get("not revoked", 0) + 1
        if len(self.under_way) > int(rng.integers(1, 6)):
            self.finish()

    def finish(self) -> None:
        """See everything through and look at what counts."""
        for transfer, kind, ours, theirs in self.under_way:
            try:
                transfer.wait(PATIENCE_S)
            except KvxError as error:
                name = type(error).__name__
                self.ends[name] = self.ends.get(name, 0) + 1
            else:
                self.ends[kind] = self.ends.get(kind, 0) + 1
            assert transfer.wait_quiesced(PATIENCE_S), f"{kind} never quiesced"
            del ours, theirs
        # Only what nobody has written since is what its transfer left.
        last: dict[tuple[bool, int], int] = {}
        for place, (_, kind, ours, theirs) in enumerate(self.under_way):
            for block in theirs if kind == "write" else ours:
                last[kind == "host", int(block)] = place
        for place, one in enumerate(self.under_way):
            self.check(place, one, last)
        self.under_way.clear()

    def check(
        self, place: int, begun: tuple[Any, str, np.ndarray, np.ndarray],
        last: dict[tuple[bool, int], int],
    ) -> None:  # fmt: skip
        """Hold the blocks that arrived against what they should be, where they still are."""
        transfer, kind, ours, theirs = begun
        codes = transfer.result.codes
        for mine, its, code in zip(ours.tolist(), theirs.tolist(), codes, strict=True):
            key = (kind == "host", its if kind == "write" else mine)
            others = sum(self.names(one, key) for one in self.under_way)
            if code != 0 or last[key] != place or others > 1:
                continue
            if kind == "write":
                assert self.rig.ask("content", its) == self.rig.blocks[mine].tobytes()
            elif kind == "host":
                assert (self.host[mine] == self.expected[its]).all()
            else:
                assert (self.rig.blocks[mine] == self.expected[its]).all()

    def names(self, one: tuple[Any, str, np.ndarray, np.ndarray], key: tuple[bool, int]) -> bool:
        _, kind, ours, theirs = one
        named = theirs if kind == "write" else ours
        return (kind == "host") == key[0] and key[1] in named


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_storm(sim: Gpu, simulated_driver: SimulatedDriver, seed: int) -> None:
    rng = np.random.default_rng(seed)
    simulated_driver.set_shuffle_seed(seed)
    with open_ipc(sim) as rig:
        for engine in Engine:
            simulated_driver.set_latency(engine, float(rng.choice([0, 1e-4, 3e-3])))
            rig.ask("steer", "set_latency", engine, float(rng.choice([0, 1e-4, 3e-3])))
        rig.blocks[:] = pattern(9, NUM_BLOCKS, BLOCK_BYTES)
        storm = Storm(rig, seed)
        for _ in range(ROUNDS):
            storm.step()
        storm.finish()
        # The seed is in the test's name.
        assert min(storm.ends.get(kind, 0) for kind in ("host", "device", "write")) > 0, storm.ends
        assert not rig.agent.quarantine
        storm.registration.close()
        rig.ask("deregister", PATIENCE_S)
        end = time.monotonic() + PATIENCE_S
        while endpoint_of(rig)._imports.count():
            assert time.monotonic() < end, "it is still mapped"
            time.sleep(0.01)
