"""The way to one life of a peer: what it can be asked for, and what is under way with it."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from kvx.buffers import MemoryKind
from kvx.errors import UnavailableError, UsageError
from kvx.transfer.agents import descriptors
from kvx.transfer.backends.device.active import Active
from kvx.transfer.backends.device.outgoing import Outgoing
from kvx.transfer.backends.device.plan import PullPlan
from kvx.transfer.codes import Code
from kvx.transfer.core import OPAQUE_REGIONS, LeaseRef
from kvx_ext import _core

if TYPE_CHECKING:
    from kvx.transfer.backend import LinkPlan, LinkRequest, PeerCard
    from kvx.transfer.backends.cuda_ipc.endpoint import CudaIpcEndpoint
    from kvx.transfer.backends.device.job import DeviceJob
    from kvx.transfer.backends.device.messages import Card

# Leases that the owner has agreed to; one that was pushed out is asked for again.
_AGREED_MAX = 4096


class CudaIpcChannel:
    """See `kvx.transfer.backend.Channel`. Thread-safe."""

    def __init__(self, endpoint: CudaIpcEndpoint, peer: PeerCard, card: Card) -> None:
        """Lead to a peer; raises UnavailableError when it cannot be seen on this host."""
        self.peer = peer.name
        self.life = peer.incarnation
        self._endpoint = endpoint
        self._card = peer
        self._devices = {region: card.devices[place] for region, place in card.regions}
        self._sight = endpoint.host.sight(peer.name)
        self._lock = threading.Lock()
        self._agreed: OrderedDict[LeaseRef, None] = OrderedDict()
        self._is_up = True

    def submit(self, request: LinkRequest) -> DeviceJob:
        """Begin a transfer."""
        if not self._is_up:
            raise UnavailableError(f"the way to {self.peer} is closed")
        return self._write(request) if request.is_write else self._read(request)

    def objection(
        self, plan: LinkPlan, *, is_write: bool, patience_s: float,  # noqa: ARG002 - asks nobody
    ) -> str:  # fmt: skip
        """Return why this plan has to go another way; see `Selective`."""
        is_remote_device = plan.remote_region >= OPAQUE_REGIONS
        is_local_device = plan.memory.kind is MemoryKind.DEVICE
        if not is_remote_device and not is_local_device:
            return "both sides are host memory"
        if is_write and not is_local_device:
            return "what is to be written is host memory"
        if not is_write and not is_remote_device:
            return "what is to be read is host memory"
        uuid = self._devices.get(plan.remote_region)
        if not is_local_device or uuid is None:
            return ""
        return self._endpoint.reach(plan.memory.device_ordinal, uuid)

    def is_up(self) -> bool:
        """Return whether it can be used now."""
        return self._is_up

    def close(self, timeout_s: float) -> None:  # noqa: ARG002 - nothing here is waited for
        """End what runs over it: what devices have begun lands, and quiesces then."""
        self._is_up = False
        self._endpoint.lose(self.peer, self.life, is_dead=self.is_dead())

    def is_dead(self) -> bool:
        """Return whether the peer's process has exited."""
        return self._sight.look(0, 0) == Code.PEER_LOST

    def _read(self, request: LinkRequest) -> DeviceJob:
        plan = request.plan
        _check_target(plan)
        job = self._endpoint.new_job(descriptors.totals(plan.local), request.deadline_s)
        pull = PullPlan(
            plan.memory, plan.local, plan.remote, plan.checksums, plan.keys, request.lease,
            self._sight, plan.after, reads_back=self._endpoint.host.verifies_device,
        )  # fmt: skip
        self._endpoint.pull(
            Active(job, plan.memory, self.peer, self.life), pull, region=plan.remote_region,
            must_ask=not self._has_agreed(request.lease),
            was_allowed=functools.partial(self._note_agreed, request.lease),
            note=request.note,
        )  # fmt: skip
        return job

    def _write(self, request: LinkRequest) -> DeviceJob:
        plan = request.plan
        write = self._endpoint.writes.make(request, self._card)
        if plan.after is None:
            self._endpoint.writes.begin(write)
        else:
            self._begin_after(write, plan.after, plan.memory.device_ordinal)
        return write.job

    def _begin_after(self, write: Outgoing, mark: _core.StreamMark, ordinal: int) -> None:
        """Begin when the producer's stream has come so far: the receiver cannot wait for it."""

        def reached(code: Code) -> None:
            if code is not Code.OK:
                write.job.end(code, f"device {ordinal} failed before the blocks were made")
            self._endpoint.writes.begin(write)

        desk = self._endpoint.desks.at(ordinal)
        desk.do(lambda: desk.when(mark, reached))

    def _has_agreed(self, lease: LeaseRef) -> bool:
        with self._lock:
            return lease in self._agreed

    def _note_agreed(self, lease: LeaseRef) -> None:
        with self._lock:
            self._agreed[lease] = None
            while len(self._agreed) > _AGREED_MAX:
                self._agreed.popitem(last=False)


def _check_target(plan: LinkPlan) -> None:
    block = _core.find_overlap(plan.local)
    if block >= 0:
        raise UsageError(
            f"local block {block} overlaps another one: a device copies them in any order"
        )
