"""What the peer tier counts, under the names that `cache.metrics` renders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.cache.reasons import MissReason

if TYPE_CHECKING:
    from kvx.metrics import Registry


class PeerInstruments:
    """Counters by peer. Thread-safe."""

    def __init__(self, registry: Registry) -> None:
        """Register everything under `kvx_peer_`."""
        self._read_blocks = registry.counter(
            "kvx_peer_read_blocks_total", "Blocks that were read from peers", ("peer",)
        )
        self._read_bytes = registry.counter(
            "kvx_peer_read_bytes_total", "Bytes that were read from peers", ("peer",)
        )
        self._served_blocks = registry.counter(
            "kvx_peer_served_blocks_total", "Blocks that peers say they have read here", ("peer",)
        )
        self._served_bytes = registry.counter(
            "kvx_peer_served_bytes_total", "Their bytes", ("peer",)
        )
        self._failures = registry.counter(
            "kvx_peer_failures_total",
            "Blocks that a peer was asked for and that did not come, by reason",
            ("peer", "reason"),
        )
        self._resyncs = registry.counter(
            "kvx_peer_resyncs_total", "Times that what a peer holds was asked for anew", ("peer",)
        )

    def note_read(self, peer: str, blocks: int, block_bytes: int) -> None:
        """Count blocks that arrived."""
        if blocks:
            self._read_blocks.add(blocks, (peer,))
            self._read_bytes.add(blocks * block_bytes, (peer,))

    def note_served(self, peer: str, blocks: int, block_bytes: int) -> None:
        """Count blocks that a peer has read."""
        if blocks:
            self._served_blocks.add(blocks, (peer,))
            self._served_bytes.add(blocks * block_bytes, (peer,))

    def note_failed(self, peer: str, reason: MissReason, blocks: int) -> None:
        """Count blocks that a peer did not bring."""
        if blocks:
            self._failures.add(blocks, (peer, reason.name.lower()))

    def note_resync(self, peer: str) -> None:
        """Count that changes were missed."""
        self._resyncs.add(1, (peer,))
