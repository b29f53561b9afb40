"""What a cache does by itself: expire, write records, save heat, re-warm, and in the end close.

Knows the parts of the cache but not the cache, so a forgotten cache can be freed: then `forget`
closes it, with a warning.
"""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx.cache.reasons import MissReason
from kvx.cache.rewarm import Rewarm

if TYPE_CHECKING:
    from kvx.cache.shared import Shared

_log = logging.getLogger(__name__)
_SWEEP_S = 1.0
_SWEEP_BLOCKS_MAX = 10_000
_HEAT_EVERY_S = 30.0
_FLUSH_SHARE = 0.8
_FORGOTTEN_TIMEOUT_S = 1.0
# Of the time that closing may take: for peers to end, and for their agent.
_PEERS_SHARE = 0.1
# For what was offered to S3.
_S3_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class CloseReport:
    """What `close` had to leave behind.

    Attributes:
        unflushed_blocks: Blocks that were only in DRAM and are gone.
        abandoned_jobs: Jobs whose bytes the hardware had not let go of.
        abandoned_bytes: Their bytes; that memory is never freed.
        unstored_blocks: Blocks that were on their way to S3; other tiers may hold them.
    """

    unflushed_blocks: int
    abandoned_jobs: int
    abandoned_bytes: int
    unstored_blocks: int = 0


class Upkeep:
    """The background work of one cache, on its reactor's thread.

    Attributes:
        rewarm: The pass that warms DRAM after opening; None when there is none.
        is_open: False once `close` has begun to close the parts.
    """

    def __init__(self, shared: Shared) -> None:
        """Make it; `start` begins."""
        self._shared = shared
        self._since_heat_s = 0.0
        self.rewarm: Rewarm | None = None
        self.is_open = True

    def start(self) -> None:
        """Begin to sweep, and to re-warm where that is wanted."""
        nvme = self._shared.nvme
        if nvme is not None and nvme.config.rewarm:
            self.rewarm = Rewarm(self._shared, nvme)
            self.rewarm.start()
        self._shared.reactor.call_later(_SWEEP_S, self._sweep)

    def close(self, timeout_s: float) -> CloseReport:
        """Flush, drain and close the parts within a bound; calling it twice does no harm."""
        if not self.is_open:
            return CloseReport(0, 0, 0)
        end = time.monotonic() + timeout_s
        shared = self._shared
        if self.rewarm is not None:
            self.rewarm.stop()
        peers = shared.peers
        if peers is not None and not peers.stop(timeout_s * _PEERS_SHARE):
            _log.warning("peers were still reading when the cache was closed")
        unstored = shared.s3.stop(timeout_s * _S3_SHARE) if shared.s3 is not None else 0
        unflushed = 0
        if shared.flusher is not None and shared.nvme is not None:
            is_flushed = shared.flusher.flush(max(0.0, timeout_s * _FLUSH_SHARE))
            unflushed = 0 if is_flushed else shared.flusher.num_dirty
            shared.nvme.save_heat()
            shared.flusher.write_records()
            shared.flusher.flush(max(0.0, end - time.monotonic()))
        self.is_open = False
        left = shared.engine.close(max(0.1, end - time.monotonic()))
        shared.reactor.close(max(0.1, end - time.monotonic()))
        if shared.s3 is not None:
            shared.s3.close(max(0.1, end - time.monotonic()))
        is_abandoned = left["abandoned_jobs"] > 0
        if peers is not None and not peers.close(max(0.1, min(timeout_s * _PEERS_SHARE, 1.0))):
            is_abandoned = True
        if shared.hbm is not None:
            shared.hbm.close(is_abandoned=is_abandoned)
        shared.device.close(is_abandoned=is_abandoned)
        shared.dram.close(is_abandoned=is_abandoned)
        if shared.nvme is not None:
            shared.nvme.close()
        report = CloseReport(unflushed, left["abandoned_jobs"], left["abandoned_bytes"], unstored)
        if report != CloseReport(0, 0, 0):
            _log.warning("closed the cache, leaving behind: %s", report)
        return report

    def forget(self) -> None:
        """Close a cache that nobody holds any more, and say so."""
        if self.is_open:
            warnings.warn("a TieredCache was not closed", ResourceWarning, stacklevel=2)
            self.close(_FORGOTTEN_TIMEOUT_S)

    def _sweep(self) -> None:
        """Expire what is due, write changed records, and save heat now and then."""
        if not self.is_open:
            return
        shared = self._shared
        for tier, pool in shared.pools():
            with shared.events.changing():
                keys = pool.index.expire(shared.now_ms(), _SWEEP_BLOCKS_MAX)
                if len(keys):
                    shared.events.removed(keys, tier.name.lower(), MissReason.EXPIRED)
        self._since_heat_s += _SWEEP_S
        if shared.nvme is not None and shared.flusher is not None:
            if self._since_heat_s >= _HEAT_EVERY_S:
                self._since_heat_s = 0.0
                shared.nvme.save_heat()
            shared.flusher.write_records()
        shared.reactor.call_later(_SWEEP_S, self._sweep)
