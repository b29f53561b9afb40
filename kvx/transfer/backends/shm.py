"""Copies between two processes of one host: the owner of the target copies out of the source.

A shared `MemoryRegion` is mapped once by each peer, sealed against writing; private memory is read
with process_vm_readv where the kernel lets us. Nobody ever writes memory of somebody else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.transfer.backends.native import NativeBackend
from kvx.transfer.core import Way

if TYPE_CHECKING:
    from kvx.transfer.backend import PeerCard


def assess(peer: PeerCard) -> str:
    """Return why memory of a peer cannot be copied on this host."""
    if not peer.is_same_host:
        return f"{peer.name} runs on another host"
    if peer.is_same_process:
        return f"{peer.name} is in this process: that is local"
    if not peer.is_unix:
        return (
            f"{peer.name} is connected over TCP; memory is passed over a unix socket, which needs "
            "the same user, the same file system and unix = true on both sides"
        )
    return ""


def backend() -> NativeBackend:
    """Return the backend."""
    return NativeBackend("shm", 20, Way.PULL, assess)
