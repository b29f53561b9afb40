"""The staged way to one life of a peer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.buffers import MemoryKind
from kvx.errors import UnavailableError, UsageError
from kvx.transfer.agents import descriptors
from kvx.transfer.agents.native import NativeMaker
from kvx.transfer.backends.cuda_staged.carry import CarryPlan
from kvx.transfer.backends.device.active import Active
from kvx.transfer.backends.device.job import DeviceJob
from kvx.transfer.core import OPAQUE_REGIONS, Way
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvx.transfer.backend import LinkPlan, LinkRequest, PeerCard
    from kvx.transfer.backends.cuda_staged.endpoint import CudaStagedEndpoint
    from kvx.transfer.core import LinkCore, LinkJob

_STAGED = "have its owner lease it with staged=True, and read that"


class CudaStagedChannel:
    """See `kvx.transfer.backend.Channel`. Thread-safe."""

    def __init__(self, endpoint: CudaStagedEndpoint, peer: PeerCard) -> None:
        """Lead to a peer."""
        self._endpoint = endpoint
        self._peer = peer
        self._is_up = True

    def submit(self, request: LinkRequest) -> DeviceJob:
        """Begin a transfer."""
        if not self._is_up:
            raise UnavailableError(f"the way to {self._peer.name} is closed")
        if request.plan.memory.kind is MemoryKind.HOST:
            write = self._endpoint.writes.make(request, self._peer)
            self._endpoint.writes.begin(write)
            return write.job
        return self._carry(request)

    def objection(
        self, plan: LinkPlan, *, is_write: bool, patience_s: float,  # noqa: ARG002 - asks nobody
    ) -> str:  # fmt: skip
        """Return why this plan has to go another way; see `Selective`."""
        is_remote_device = plan.remote_region >= OPAQUE_REGIONS
        if plan.memory.kind is MemoryKind.DEVICE:
            return f"both sides are device memory: {_STAGED}" if is_remote_device else ""
        if not is_remote_device:
            return "both sides are host memory"
        if not is_write:
            return f"the memory is a device's: {_STAGED}"
        if self._peer.card is None:
            return f"{self._peer.name} has no cuda-staged: see agent.explain there"
        return ""

    def is_up(self) -> bool:
        """Return whether it can be used now."""
        return self._is_up

    def close(self, timeout_s: float) -> None:  # noqa: ARG002 - nothing here is waited for
        """End what runs over it."""
        self._is_up = False
        self._endpoint.lose(self._peer.name, self._peer.incarnation, is_dead=False)

    def _carry(self, request: LinkRequest) -> DeviceJob:
        plan, core = request.plan, self._endpoint.host.core
        if not request.is_write and _core.find_overlap(plan.local) >= 0:
            raise UsageError("two local blocks overlap: a device copies them in any order")
        if request.note and self._peer.card is None:
            raise UsageError(f"notify: {self._peer.name} has no cuda-staged to hear it")
        way = way_to(core, self._peer, plan.remote_region, is_write=request.is_write)

        def submit(
            region: int, places: npt.NDArray[np.int64], start: int, stop: int, left_s: float
        ) -> LinkJob:
            part = slice(start, stop)
            native = NativeMaker().plan(
                core, region=region, local=places, remote_region=plan.remote_region,
                remote=plan.remote[part],
                indices=None if plan.indices is None else plan.indices[part],
                checksums=None if plan.checksums is None else plan.checksums[part],
                keys=None if plan.keys is None else plan.keys[part],
            )  # fmt: skip
            return core.submit(
                is_write=request.is_write, way=int(way), peer=self._peer.number,
                lease=request.lease, plan=native, deadline_s=left_s, note=b"",
            )  # fmt: skip

        job = self._endpoint.new_job(descriptors.totals(plan.local), request.deadline_s)
        carry = CarryPlan(plan.memory, plan.local, request.is_write, submit, plan.after)
        active = Active(
            job, plan.memory, self._peer.name, self._peer.incarnation, is_write=request.is_write
        )
        self._endpoint.carry(active, carry, note=request.note)
        return job


def way_to(core: LinkCore, peer: PeerCard, region: int, *, is_write: bool) -> Way:
    """Return how the core moves bytes from or to a region of a peer."""
    can_copy = peer.is_unix and not is_write and not core.can_pull(peer.number, region)
    return Way.PULL if can_copy else Way.STREAM
