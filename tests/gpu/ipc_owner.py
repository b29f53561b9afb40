"""The other process of the cuda-ipc tests: an agent whose blocks lie on a device."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from kvx.errors import KvxError
from kvx.transfer.agents.agent import Agent
from kvx.transfer.agents.lease_token import Rights
from kvx.transfer.memory import MemoryRegion
from kvx.transfer.owner import Owner
from kvx_ext import _core
from tests.gpu.device_blocks import DeviceBlocks
from tests.gpu.rig import REAL_LIBRARY
from tests.sim.cuda_driver import Engine, SimulatedDriver

NOT_SUPPORTED = 801


class Part:
    """A part of device memory, as any library would hand it over."""

    def __init__(self, memory: _core.DeviceMemory, offset: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (memory.address + offset, False),
            "strides": None, "version": 3,
        }  # fmt: skip
        self.device = memory.device
        self._memory = memory


class DeviceOwner(Owner):
    """An `Owner` of blocks in device or host memory, which also steers its simulated driver."""

    def __init__(
        self,
        name: str = "owner",
        *,
        num_blocks: int = 64,
        block_bytes: int = 4096,
        key: bytes | None = None,
        config: Mapping[str, object] | None = None,
        listen: str | None = None,
        where: str = "plain",
        is_real: bool = False,
        devices: int = 1,
        ordinal: int = 0,
        fails: str = "",
    ) -> None:
        """Open a device and an agent.

        Args:
            name: Of the agent.
            num_blocks: How many.
            block_bytes: Their size.
            key: Of the agent.
            config: Of the agent.
            listen: Where the agent listens besides.
            where: ``plain``, ``exportable`` or ``host``.
            is_real: Whether the device is one.
            devices: How many the simulated driver has.
            ordinal: Which of them.
            fails: Entry point that fails when the blocks are registered.
        """
        self._driver = None if is_real else SimulatedDriver()
        if self._driver is not None:
            self._driver.set_devices(devices)
        library = REAL_LIBRARY if self._driver is None else str(self._driver.path)
        self.device = _core.open_cuda_device(library, ordinal)
        self.agent = Agent(name, listen=listen, key=key, config=config)
        self._made = contextlib.ExitStack()
        self._block_bytes = block_bytes
        self._leases = {}
        if where == "host":
            size = num_blocks * block_bytes
            region = MemoryRegion(size, is_shared=True)
            self.blocks = region.array()[:size].reshape(num_blocks, block_bytes)
            self.registration = self.agent.register(region)
            return
        blocks = DeviceBlocks(
            self.device, self._driver, num_blocks=num_blocks, block_bytes=block_bytes,
            is_exportable=where == "exportable",
        )  # fmt: skip
        self._made.callback(blocks.close)
        self.blocks = blocks  # type: ignore[assignment]
        if self._driver is not None and fails:
            self._driver.inject(fails, NOT_SUPPORTED)
        self.registration = self.agent.register(blocks.memory)

    def lease_after(self, ids: list[int], stream: int, *, rights: int = int(Rights.READ)) -> bytes:
        """Lease blocks to be used behind what is in a stream; returns the token."""
        blocks = self.registration.blocks(ids, self._block_bytes, after=stream)
        lease = self.registration.lease(blocks, rights=Rights(rights))
        self._leases[lease.id] = lease
        return lease.token

    def begin(self, peer: str, token: bytes, *, is_write: bool = False, deadline_s: float) -> None:
        """Begin to read or write as many blocks as a lease has, the first ones here."""
        remote = self.agent.peers[peer].blocks(lease=token)
        local = self.registration.blocks(list(range(len(remote))), self._block_bytes)
        call = self.agent.write if is_write else self.agent.read
        self._transfer = call(local, remote, deadline_s=deadline_s)

    def end(self, timeout_s: float) -> int:
        """Wait for what was begun; returns the number of blocks that arrived."""
        return int(self._transfer.wait(timeout_s).blocks_done)

    def lease_part(self, offset: int, size: int) -> bytes:
        """Register a part of the blocks' memory by its address, and lease it all."""
        part = Part(self.blocks.memory, offset, size)  # type: ignore[attr-defined]
        registration = self.agent.register(part)
        self._made.callback(registration.close)
        lease = registration.lease()
        self._leases[lease.id] = lease
        return lease.token

    def lease_staged(
        self, ids: list[int] | None, *, rights: int = int(Rights.READ), **terms: Any
    ) -> bytes:
        """Lease a copy of blocks in host memory; returns the token."""
        blocks = None if ids is None else self.registration.blocks(ids, self._block_bytes)
        lease = self.registration.lease(blocks, staged=True, rights=Rights(rights), **terms)
        self._leases[lease.id] = lease
        return lease.token

    def revoke_last(self) -> None:
        """End the lease that was granted last."""
        list(self._leases.values())[-1].revoke(5.0)

    def make_stream(self) -> int:
        """Make a stream."""
        stream = self.device.create_stream()
        self._made.callback(self.device.destroy_stream, stream)
        return stream

    def fill_in_stream(self, stream: int, value: int) -> None:
        """Put a fill of all blocks into a stream."""
        size = self.blocks.shape[0] * self.blocks.shape[1]
        self.device.fill(self.blocks.memory.address, value, size, stream)  # type: ignore[attr-defined]

    def deregister(self, timeout_s: float) -> None:
        """Close the registration."""
        self.registration.close(timeout_s)

    def steer(self, setting: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of the simulated driver."""
        assert self._driver is not None, "a real driver is not steered"
        return getattr(self._driver, setting)(*arguments, **named)

    def freeze_engine(self, engine: int) -> None:
        """Keep copies of an engine from ending."""
        self.steer("freeze", Engine(engine))

    def thaw_engine(self, engine: int) -> None:
        """Let them end."""
        self.steer("thaw", Engine(engine))

    def mapped(self) -> int:
        """Return how much memory of others is mapped here."""
        return int(self._endpoint()._imports.count())

    def may_be_mapped(self) -> int:
        """Return how many others may have memory of ours mapped."""
        endpoint = self._endpoint()
        exports = endpoint.exports.all()
        return sum(len(endpoint.exports.importers(one.memory.region)) for one in exports)

    def close(self) -> None:
        """Close the agent and free the blocks."""
        for engine in Engine if self._driver is not None else ():
            self.steer("thaw", engine)  # a test that fails must not wait for it for ever
        self.agent.close(2.0)
        self._made.close()
        convictions = [] if self._driver is None else self._driver.convictions()
        if convictions:
            raise KvxError("\n".join(convictions))

    def _endpoint(self) -> Any:
        return self.agent._parts.ways._endpoints["cuda-ipc"]
