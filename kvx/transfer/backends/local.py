"""Copies between two agents of one process: straight from memory to memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.transfer.backends.native import NativeBackend
from kvx.transfer.core import Way

if TYPE_CHECKING:
    from kvx.transfer.backend import PeerCard


def assess(peer: PeerCard) -> str:
    """Return why a peer cannot be copied from within this process."""
    if not peer.is_same_process:
        return f"{peer.name} is another process"
    if not peer.is_unix:
        return f"{peer.name} is connected over TCP, which passes no memory"
    return ""


def backend() -> NativeBackend:
    """Return the backend."""
    return NativeBackend("local", 10, Way.PULL, assess)
