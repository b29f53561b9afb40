"""Agents around NIXL endpoints, for tests: leases as a dictionary, messages over a pipe.

One is here, the other in a process of its own that does what it is told by `RemoteRig`.
"""

from __future__ import annotations

import builtins
import itertools
import mmap
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from kvx.errors import PeerLost, StaleReference, UnavailableError, UsageError
from kvx.transfer.agents.identity import host_identity
from kvx.transfer.backend import BackendHost, LinkPlan, LinkRequest, Memory, PeerCard, PeerSight
from kvx.transfer.backends.nixl import NixlBackend, NixlOptions
from kvx.transfer.core import LeaseRef

READ, WRITE, REMOTE_WRITE = 1, 2, 4
ALL = READ | WRITE | REMOTE_WRITE
HUGE = 2 << 20


def new_array(size_bytes: int) -> npt.NDArray[np.uint8]:
    """Return populated memory on huge pages where there are any."""
    mapped = mmap.mmap(-1, size_bytes + HUGE)
    mapped.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapped, np.uint8)
    start = -whole.ctypes.data % HUGE
    array = whole[start : start + size_bytes]
    array[:] = 0
    return array


def pattern(size_bytes: int, seed: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8)


def _no_sight(peer: str) -> PeerSight:
    raise UnavailableError(f"{peer} is not connected over a unix socket")


class Lease:
    def __init__(self, region: int, blocks: npt.NDArray[np.int64], rights: int) -> None:
        self.region, self.blocks, self.rights = region, blocks, rights
        self.is_revoked = False
        self.uses = 0

    def is_live(self) -> bool:
        return not self.is_revoked

    def end(self) -> None:
        self.uses -= 1


class Rig:
    """An agent, as far as a backend can see it."""

    def __init__(
        self, name: str, incarnation: int, pipe: Connection, options: NixlOptions, **made_by: Any
    ) -> None:
        self.name, self.incarnation, self.pipe = name, incarnation, pipe
        self.leases: dict[LeaseRef, Lease] = {}
        self.notes: list[tuple[str, bytes]] = []
        self.ended: list[int] = []
        self.memories: dict[int, npt.NDArray[np.uint8]] = {}
        self.is_mute = False  # messages are lost
        self.is_cut_off = False  # there is no connection
        self.lost: Callable[[str, int, bool], None] = lambda *_: None
        self._numbers = itertools.count(1)
        self._sending = threading.Lock()
        self._takes: Callable[[str, bytes], None] = lambda *_: None
        host = BackendHost(
            agent=name,
            incarnation=incarnation,
            core=None,
            send=self.send,
            on_message=self._on_message,
            ended=self.ended.append,
            card_changed=lambda: None,
            use_lease=self.use_lease,
            deliver=lambda peer, note: self.notes.append((peer, note)),
            on_lost=self._on_lost,
            number_of=lambda _peer: 1,
            sight=_no_sight,
            verifies_device=False,
            peer_objection=lambda _peer, _region, _patience_s: "",
        )
        opening = made_by.get("opening") or NixlBackend(options).open
        self.endpoint = opening(host)
        self.listen()

    def listen(self) -> None:
        """Take messages from the pipe of now."""
        self._thread = threading.Thread(target=self._listen, args=(self.pipe,), daemon=True)
        self._thread.start()

    def hang_up(self) -> None:
        """Close the pipe, whose other end is closed or has hung up; nobody must be reading it."""
        self._thread.join(5.0)
        self.pipe.close()

    def _on_message(self, takes: Callable[[str, bytes], None]) -> None:
        self._takes = takes

    def _on_lost(self, lost: Callable[[str, int, bool], None]) -> None:
        self.lost = lost

    def send(self, peer: str, payload: bytes) -> None:
        if self.is_cut_off:
            raise PeerLost("cut off", peer=peer)
        try:
            with self._sending:
                if not self.is_mute:
                    self.pipe.send_bytes(
                        peer.encode() + b"\0" + self.name.encode() + b"\0" + payload
                    )
        except OSError as error:
            raise PeerLost(str(error), peer=peer) from error

    def _listen(self, pipe: Connection) -> None:
        while True:
            try:
                data = pipe.recv_bytes()
            except (EOFError, OSError):
                return
            if not data:  # the other end hangs up
                return
            _, sender, payload = data.split(b"\0", 2)
            if not self.is_mute:
                self._takes(sender.decode(), payload)

    def use_lease(self, peer: str, ref: LeaseRef, rights: int) -> Lease:
        lease = self.leases.get(ref)
        if lease is None or not lease.is_live():
            raise StaleReference(f"{peer} names a lease that has ended")
        if lease.rights & rights != rights:
            raise UsageError(f"the lease of {peer} does not give {rights}")
        lease.uses += 1
        return lease

    def memory(self, size_bytes: int, region: int | None = None) -> Memory:
        """Register new memory."""
        number = next(self._numbers) if region is None else region
        array = self.memories[number] = new_array(size_bytes)
        memory = Memory(number, array.ctypes.data, size_bytes, owner=array)
        self.endpoint.register(memory)
        return memory

    def card(self) -> PeerCard:
        """Return what others know of it."""
        here = host_identity()
        card = self.endpoint.card()
        return PeerCard(self.name, self.incarnation, 1, here, True, False, True, card)

    def grant(self, region: int, blocks: list[tuple[int, ...]], rights: int) -> LeaseRef:
        ref = LeaseRef(next(self._numbers), 0, next(self._numbers))
        self.leases[ref] = Lease(region, np.array(blocks, np.int64).reshape(-1, 4), rights)
        return ref


class Orders:
    """What `RemoteRig.do` can ask for, by name."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig

    def memory(self, size_bytes: int) -> int:
        return self.rig.memory(size_bytes).region

    def fill(self, region: int, seed: int) -> None:
        self.rig.memories[region][:] = pattern(len(self.rig.memories[region]), seed)

    def poke(self, region: int, offset: int, value: int) -> None:
        self.rig.memories[region][offset] = value

    def bytes(self, region: int) -> bytes:
        return self.rig.memories[region].tobytes()

    def grant(self, region: int, blocks: list[tuple[int, ...]], rights: int) -> tuple[int, ...]:
        return tuple(self.rig.grant(region, blocks, rights))

    def revoke(self, *lease: int) -> None:
        self.rig.leases[LeaseRef(*lease)].is_revoked = True

    def uses(self, *lease: int) -> int:
        return self.rig.leases[LeaseRef(*lease)].uses

    def notes(self) -> list[tuple[str, builtins.bytes]]:
        return self.rig.notes

    def connect(self, card: PeerCard) -> None:
        self.rig.endpoint.connect(card, 5.0)

    def mute(self) -> None:
        self.rig.is_mute = True

    def unregister(self, region: int, timeout_s: float) -> bool:
        memory = self.rig.endpoint._registry.get(region)
        return self.rig.endpoint.unregister(memory, timeout_s)

    def cpu(self) -> float:
        return time.process_time()


def serve(
    name: str, incarnation: int, pipe: Connection, orders: Connection, options: NixlOptions
) -> None:
    """Be the other process."""
    rig = Rig(name, incarnation, pipe, options)
    orders.send(rig.card())
    while True:
        try:
            command, arguments = orders.recv()
        except EOFError:
            os._exit(0)
        orders.send(getattr(Orders(rig), command)(*arguments))


class RemoteRig:
    """An agent in a process of its own."""

    def __init__(
        self, name: str, incarnation: int, options: NixlOptions, environment: dict[str, str]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, self.incarnation = name, incarnation
        self.pipe, pipe = context.Pipe()
        self.orders, orders = context.Pipe()
        before = {key: os.environ.get(key) for key in environment}
        os.environ.update(environment)
        self.process = context.Process(
            target=serve, args=(name, incarnation, pipe, orders, options), daemon=True
        )
        self.process.start()
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
        pipe.close()
        orders.close()
        self.card: PeerCard = self.orders.recv()

    def do(self, command: str, *arguments: object) -> Any:
        self.orders.send((command, arguments))
        return self.orders.recv()

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)
        time.sleep(0.05)

    def thaw(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.orders.close()


def plan_of(
    memory: Memory,
    local: Any,
    region: int,
    remote: Any,
    **columns: Any,
) -> LinkPlan:
    """Make a plan without a native side."""
    return LinkPlan(
        memory=memory,
        local=np.array(local, np.int64).reshape(-1, 4),
        remote_region=region,
        remote=np.array(remote, np.int64).reshape(-1, 4),
        indices=columns.get("indices"),
        checksums=columns.get("checksums"),
        keys=columns.get("keys"),
        native=None,
    )


def request_of(plan: LinkPlan, lease: LeaseRef, **options: Any) -> LinkRequest:
    """Ask for a read, unless told otherwise."""
    return LinkRequest(
        is_write=options.get("is_write", False),
        plan=plan,
        lease=lease,
        deadline_s=options.get("deadline_s", 10.0),
        note=options.get("note", b""),
    )


def blocks_of(count: int, block_bytes: int) -> list[tuple[int, ...]]:
    """Return `count` contiguous blocks from offset 0 on."""
    return [(number * block_bytes, 0, 1, block_bytes) for number in range(count)]
