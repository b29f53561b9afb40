"""This agent's end of cuda-staged."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

import numpy as np

from kvx.buffers import MemoryKind
from kvx.errors import UsageError
from kvx.transfer.agents.native import NativeMaker
from kvx.transfer.backends.cuda_staged.buffers import Buffers
from kvx.transfer.backends.cuda_staged.carry import Carry, CarryPlan
from kvx.transfer.backends.cuda_staged.channel import CudaStagedChannel
from kvx.transfer.backends.device import messages
from kvx.transfer.backends.device.clerk import Clerk
from kvx.transfer.backends.device.endpoint import DeviceEnd
from kvx.transfer.core import Way

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.transfer.backend import BackendHost, Memory, PeerCard
    from kvx.transfer.backends.device.active import Active
    from kvx.transfer.backends.device.plan import PullPlan
    from kvx.transfer.core import LinkJob

# One transfer each; a peer that is frozen, or a device that hangs, keeps one busy.
_THREADS_MAX = 32


class CudaStagedEndpoint(DeviceEnd):
    """An end whose bytes go through host memory, and from there as the core takes them."""

    def __init__(self, host: BackendHost) -> None:
        """Open it; no device is touched yet."""
        name = f"kvx-staged-{host.agent}"
        super().__init__(host, name)
        self._buffers = Buffers(host.core)
        self._carriers = Clerk(f"{name}-carrier", threads_max=_THREADS_MAX)
        self._listen()

    def register(self, memory: Memory) -> None:
        """Get ready to move this memory; raises KvxError when it is none of a device here."""
        if memory.kind is MemoryKind.DEVICE:
            self.desks.at(memory.device_ordinal).device.check_address(memory.address)
        super().register(memory)

    def card(self) -> bytes:
        """Return that we are here."""
        return messages.encode(messages.Card(messages.VERSION, [], []))

    def connect(self, peer: PeerCard, timeout_s: float) -> CudaStagedChannel:  # noqa: ARG002 - no waiting
        """Return the way to a peer."""
        return CudaStagedChannel(self, peer)

    # What follows is for the parts of the endpoint.

    def carry(self, active: Active, plan: CarryPlan, *, note: bytes = b"") -> None:
        """Carry blocks between a device and a peer; the job is told of all that happens."""
        desk = self.desks.at(plan.memory.device_ordinal)
        carry = Carry(active.job, plan, desk, self._buffers)
        self.jobs.enter(active)
        self._carriers.do(functools.partial(self._run, carry, active, note))

    def pull_for(self, active: Active, plan: PullPlan, region: int, first: int) -> None:
        """Do a write of a peer: read its memory, verified as always, and send it to the device."""
        if plan.target.kind is not MemoryKind.DEVICE:
            raise UsageError("what is staged goes into device memory")
        core, number = self.host.core, self.host.number_of(active.peer)
        way = Way.STREAM if core.can_pull(number, region) else Way.PULL

        def submit(
            own: int, places: npt.NDArray[np.int64], start: int, stop: int, left_s: float
        ) -> LinkJob:
            native = NativeMaker().plan(
                core, region=own, local=places, remote_region=region,
                remote=plan.remote[start:stop],
                indices=np.arange(first + start, first + stop, dtype=np.uint32),
                checksums=None, keys=None if plan.keys is None else plan.keys[start:stop],
            )  # fmt: skip
            return core.submit(
                is_write=False, way=int(way), peer=number, lease=plan.lease, plan=native,
                deadline_s=left_s, note=b"",
            )  # fmt: skip

        self.carry(
            active,
            CarryPlan(plan.target, plan.local, False, submit, plan.after, plan.may_write),  # noqa: FBT003 - a record
        )

    def _leave(self, end: float) -> None:
        """Let the carriers end, and give host memory back."""
        self._carriers.close(max(0.1, end - time.monotonic()))
        self._buffers.close()

    def _run(self, carry: Carry, active: Active, note: bytes) -> None:
        carry.run()
        if note and active.job.state() == "done":
            self.try_send(active.peer, messages.Note(note))
