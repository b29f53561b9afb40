"""How far a transfer with device memory has come, layer by layer, before it is over.

Invariant: a layer counts as arrived only when every block of the transfer has been verified or has
become a miss, so what is built on it is never taken back. Therefore, once somebody watches layers,
a block that proves damaged is a miss and no other tier is asked for it.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from kvx.cache.operation import PENDING
from kvx.cache.reasons import MissReason
from kvx.errors import UsageError
from kvx.transfer.codes import Code
from kvx_ext import _core

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvx.cache.device import DeviceLink
    from kvx.cache.reactor import MovingJob

_SLICE_S = 0.05


class Arrival:
    """The layers of one transfer. Thread-safe."""

    def __init__(self, link: DeviceLink, layers: int, *, is_watched: bool) -> None:
        """Make it for a transfer that is about to launch its jobs.

        Args:
            link: The device.
            layers: How many there are; 1 when blocks arrive whole.
            is_watched: Whether layers are wanted from the beginning.
        """
        self.progress = _core.LayerProgress(layers, link.device)
        self.layers = layers
        self._lock = threading.Lock()
        self._jobs: list[tuple[MovingJob, npt.NDArray[np.int64]]] = []
        self._is_watched = is_watched
        self._is_launched = False
        self._is_sealed = False

    def reopen(self) -> bool:
        """Expect more jobs; False when layers have been promised and none may come any more."""
        with self._lock:
            if not self._is_sealed:
                self._is_launched = False
            return not self._is_sealed

    def add(self, job: MovingJob, rows: npt.NDArray[np.int64]) -> None:
        """Take in a job that brings some rows of the transfer."""
        with self._lock:
            self._jobs.append((job, rows))

    def all_launched(self) -> None:
        """No row waits for its job."""
        with self._lock:
            self._is_launched = True
            self._seal_if_due()

    def finish(self) -> None:
        """Let everybody go on: the transfer is over."""
        self.progress.finish()

    def wait(self, layer: int, remaining_s: float, timeout_s: float | None) -> bool:
        """Wait until a layer has arrived or the transfer is over; False when time is up.

        Raises:
            UsageError: There is no such layer.
        """
        self._watch(layer)
        end = time.monotonic() + min(
            remaining_s, remaining_s if timeout_s is None else max(0.0, timeout_s)
        )
        while not self.progress.wait(layer + 1, min(_SLICE_S, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                return False
        return True

    def wait_on(self, stream: int, layer: int | None) -> None:
        """Make a stream wait; see `Transfer.wait_on_stream`."""
        last = self.layers - 1 if layer is None else layer
        self._watch(last)
        self.progress.wait_on(stream, last + 1)

    def prefix_blocks(self, reasons: npt.NDArray[np.uint8]) -> int:
        """Return how many leading blocks are not known to be missing by now."""
        missed = (reasons != MissReason.HIT) & (reasons != PENDING)
        with self._lock:
            for job, rows in self._jobs:
                missed[rows] |= job.codes() > Code.OK
        found = missed.nonzero()[0]
        return int(found[0]) if len(found) else len(reasons)

    def _watch(self, layer: int) -> None:
        if not 0 <= layer < self.layers:
            raise UsageError(
                f"there is no layer {layer}: the transfer has {self.layers}; ask for layers with "
                "is_layerwise, of a layer-first layout"
            )
        with self._lock:
            self._is_watched = True
            self._seal_if_due()

    def _seal_if_due(self) -> None:
        if self._is_watched and self._is_launched:
            self._is_sealed = True
            self.progress.seal()
