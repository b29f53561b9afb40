"""A peer as a source of blocks: what it holds, whether it is to be asked, and how busy it is."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.breaker import Breaker
from kvx.cache.peer.choice import Candidate
from kvx.cache.peer.replica import Replica
from kvx.cache.result import TierKind
from kvx.transfer.agents.peer_state import PeerState

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.config import BreakerConfig
    from kvx.transfer.agents.peer import Peer


class Source:
    """One life of a peer.

    Attributes:
        ordinal: Number of the source in this cache, never used again.
        peer: The peer.
        replica: What it told us it holds.
        breaker: Leaves it alone for a while after failures in a row.
        is_near: Whether it runs on this host.
        is_resyncing: Whether all it holds was asked for anew and has not begun to come.
    """

    def __init__(
        self, ordinal: int, peer: Peer, config: BreakerConfig, *, known_blocks_max: int
    ) -> None:
        """Know nothing of it yet."""
        self.ordinal = ordinal
        self.peer = peer
        self.replica = Replica(known_blocks_max)
        self.breaker = Breaker(config)
        self.is_near = any(bool(one["is_unix"]) for one in peer.connections())
        self.is_resyncing = False
        self._lock = threading.Lock()
        self._load_bytes = 0

    @property
    def name(self) -> str:
        """Name of the peer."""
        return self.peer.name

    @property
    def objection(self) -> str:
        """Why it is not to be asked now; empty when it is."""
        if self.peer.state is not PeerState.UP:
            return f"it is {self.peer.state.value}"
        return "" if self.breaker.allow() else "it failed several times in a row"

    @property
    def load_bytes(self) -> int:
        """Bytes on their way from it."""
        return self._load_bytes

    def add_load(self, size_bytes: int) -> None:
        """Note that bytes have been asked of it, or, negative, that they have come or will not."""
        with self._lock:
            self._load_bytes += size_bytes

    def holds(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Return which of (n, 16) uint8 keys it holds, in whatever tier."""
        held = self.replica.holds(TierKind.DRAM, keys)
        if not held.all():
            held |= self.replica.holds(TierKind.NVME, keys)
        return held

    def candidate(self, keys: npt.NDArray[np.uint8], is_open: npt.NDArray[np.bool_]) -> Candidate:
        """Return what it is for those blocks for which it may be asked, (n,) bool."""
        warm = self.replica.holds(TierKind.DRAM, keys) & is_open
        cold = self.replica.holds(TierKind.NVME, keys) & is_open
        return Candidate(warm, cold, self.is_near, self._load_bytes)
