"""Two endpoints of the NIXL backend in this process, on bindings that do what a test wants."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from typing import NamedTuple

import numpy as np

from kvx.transfer.backend import BackendHost, LinkPlan, Memory
from kvx.transfer.backends.nixl import NixlOptions
from kvx.transfer.backends.nixl.channel import NixlChannel
from kvx.transfer.backends.nixl.endpoint import NixlEndpoint
from kvx.transfer.core import LeaseRef
from tests.transfer.backends.fake_nixl import Fabric, FakeAgent
from tests.transfer.backends.nixl_rig import ALL, Rig, blocks_of, pattern, plan_of

OPTIONS = NixlOptions(batch_bytes=8192, batches_in_flight_max=2)
SIZE = 64 << 10
BLOCKS = blocks_of(16, 4096)


class Scene(NamedTuple):
    fabric: Fabric
    here: Rig
    there: Rig
    channel: NixlChannel
    memory: Memory
    region: int

    def lease(self, rights: int = ALL) -> LeaseRef:
        return self.there.grant(self.region, BLOCKS, rights)

    def plan(self, **columns: object) -> LinkPlan:
        columns = {"indices": np.arange(16, dtype=np.uint32)} | columns
        return plan_of(self.memory, BLOCKS, self.region, BLOCKS, **columns)

    @property
    def target(self) -> np.ndarray:
        return self.here.memories[self.memory.region]

    @property
    def source(self) -> Memory:
        found = self.there.endpoint._registry.get(self.region)
        assert found is not None, "it is registered"
        return found

    def agent(self, rig: Rig) -> FakeAgent:
        return self.fabric.agents[rig.endpoint.life]

    def disconnect(self) -> None:
        """Lose the agents' connection, though both live on."""
        self.here.is_cut_off = self.there.is_cut_off = True
        self.here.lost("there", 2, False)
        self.there.lost("here", 1, False)


@contextmanager
def open_scene() -> Iterator[Scene]:
    """Yield two endpoints that are connected; NIXL must have been used as it wants to be."""
    fabric = Fabric()

    def opening(host: BackendHost) -> NixlEndpoint:
        return NixlEndpoint(host, OPTIONS, fabric.bindings(), "1.5.1")

    one, other = Pipe()
    here = Rig("here", 1, one, OPTIONS, opening=opening)
    there = Rig("there", 2, other, OPTIONS, opening=opening)
    memory = here.memory(SIZE)
    source = there.memory(SIZE)
    there.memories[source.region][:] = pattern(SIZE, 1)
    channel = here.endpoint.connect(there.card(), 5.0)
    yield Scene(fabric, here, there, channel, memory, source.region)
    fabric.release()
    for rig in (here, there):
        rig.endpoint.close(1.0)
    one.send_bytes(b"")
    other.send_bytes(b"")
    here.hang_up()
    there.hang_up()
    assert fabric.violations == []


def eventually(is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5.0
    while not is_so() and time.monotonic() < end:
        time.sleep(0.002)
    return is_so()
