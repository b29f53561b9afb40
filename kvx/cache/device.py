"""The device of one cache: opened once, attached to its engine, with the DRAM tier pinned to it.

Opened at the start for an HBM tier, else when the cache first meets blocks in device memory: a
cache that never does costs nothing of it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvx.buffers import MemoryKind, stream_handle
from kvx.config import cache_directory
from kvx.errors import TransferError, UnavailableError, UsageError
from kvx.tier_config import Emulation
from kvx.transfer.device_rates import calibration_for
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvx.config import GpuConfig
    from kvx.layout import BlockView
    from kvx.tier_config import HbmTierConfig
    from kvx.transfer.memory import MemoryRegion

_log = logging.getLogger(__name__)


def open_device(config: GpuConfig, tier: HbmTierConfig | None) -> _core.Device:
    """Open the GPU, or host memory that plays one where the tier's `emulation` says so.

    Args:
        config: Which device.
        tier: The HBM tier it is for; None where device memory itself was met.

    Raises:
        UnavailableError: There is no such device, and nothing may stand in for it.
    """
    if tier is not None and tier.emulation is Emulation.ALWAYS:
        return _core.open_emulated_device(tier.capacity_bytes)
    try:
        return _core.open_cuda_device(config.driver, config.ordinal)
    except UnavailableError as error:
        if tier is None or tier.emulation is Emulation.NEVER:
            raise
        _log.warning("the HBM tier lives in host memory, which plays a GPU: %s", error)
        return _core.open_emulated_device(tier.capacity_bytes)


class DeviceLink:
    """What ties a device to the engine of one cache.

    Attributes:
        device: The device.
        is_emulated: Whether host memory plays it.
        ordinal: As the driver counts; -1 for the emulation.
    """

    def __init__(
        self,
        device: _core.Device,
        config: GpuConfig,
        engine: _core.Engine,
        dram: MemoryRegion,
        *,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Attach `device` to the engine and start pinning the DRAM tier's memory.

        Args:
            device: The device; stays open with this link.
            config: How it is used.
            engine: The cache's engine.
            dram: The DRAM tier's memory.
            progress: Called with (what, done, total) while copies are timed.

        Raises:
            CapacityError: The device has no memory left for staging.
        """
        self.device = device
        info = device.info()
        self.is_emulated = bool(info["is_emulated"])
        self.ordinal = int(str(info["ordinal"]))
        calibration = None
        if config.calibrate and not self.is_emulated:
            calibration = calibration_for(
                device, cache_directory(), sm=config.sm.value, progress=progress
            )
        engine.attach_device(
            device,
            sm=config.sm.value,
            ctas=config.ctas,
            staging_bytes=config.staging_bytes,
            calibration=None if calibration is None else calibration.gb_s,
            plain=None if calibration is None else calibration.plain_gb_s,
        )
        self._pinned = device.pin(dram.address, dram.size_bytes)

    @property
    def pinned_bytes(self) -> int:
        """How much of the DRAM tier's memory the device may copy at full speed by now."""
        return self._pinned.pinned_bytes

    def close(self, *, is_abandoned: bool) -> None:
        """Unpin the memory, unless the hardware still holds some of it: then it stays pinned."""
        if is_abandoned:
            _ABANDONED.append(self)
        else:
            self._pinned.close()
            self.device.close()


class DeviceAccess:
    """The way to the device of a cache, which is opened when somebody first asks for it."""

    def __init__(self, open_link: Callable[[], DeviceLink]) -> None:
        """Remember how to open it."""
        self._open_link = open_link
        self._lock = threading.Lock()
        self._link: DeviceLink | None = None
        self._checked: weakref.WeakSet[BlockView] = weakref.WeakSet()
        self._has_warned = False

    @property
    def pinned_bytes(self) -> int:
        """How much of the DRAM tier's memory is pinned; 0 as long as nobody needed the device."""
        return 0 if self._link is None else self._link.pinned_bytes

    def link(self) -> DeviceLink:
        """Return the link, opening the device first.

        Raises:
            UnavailableError: There is no such device.
            CapacityError: It has no memory left.
        """
        with self._lock:
            if self._link is None:
                self._link = self._open_link()
            return self._link

    def link_for(self, blocks: BlockView) -> DeviceLink | None:
        """Return the link that moves these blocks; None for host memory.

        Raises:
            UsageError: They lie on another device than the cache's.
            UnavailableError: The device cannot be opened.
        """
        if blocks.kind is not MemoryKind.DEVICE:
            return None
        link = self.link()
        if link.ordinal != blocks.device_ordinal:
            raise UsageError(
                f"the blocks lie on device {blocks.device_ordinal}, the cache works with device "
                f"{link.ordinal}; set `ordinal` of `gpu`"
            )
        if blocks not in self._checked:
            _check_planes(link.device, blocks)
            self._checked.add(blocks)
        return link

    def way_for(self, blocks: BlockView, after: object, *, is_layerwise: bool = False) -> DeviceWay:
        """Return how a transfer gets at these blocks.

        Args:
            blocks: The engine's memory.
            after: A stream whose work so far the copies wait for; None for none.
            is_layerwise: Whether layers are to arrive one after the other.

        Raises:
            UsageError: A stream or layers were given for host memory, or the layout has none.
            UnavailableError: The device cannot be opened.
        """
        layers = _layers_of(blocks) if is_layerwise else 1
        try:
            link = self.link_for(blocks)
            mark = None if link is None or after is None else link.device.mark(stream_handle(after))
        except TransferError as error:
            return self._no_way(error)
        is_emulated = self._link is not None and self._link.is_emulated
        if link is None:
            if after is not None:
                raise UsageError("streams and layers are for blocks in device memory")
            return DeviceWay(None, None, reaches_hbm=is_emulated)
        return DeviceWay(
            link, mark, reaches_hbm=True, layers=layers, layer_planes=2 if is_layerwise else 0
        )

    def _no_way(self, error: TransferError) -> DeviceWay:
        """Answer for a device that failed: a miss is a value, so only the log says more."""
        if not self._has_warned:
            self._has_warned = True
            _log.warning("blocks in device memory are out of reach: %s", error)
        return DeviceWay(None, None, reaches_hbm=False, is_down=True)

    def close(self, *, is_abandoned: bool) -> None:
        """Close the link if there is one."""
        if self._link is not None:
            self._link.close(is_abandoned=is_abandoned)


def _layers_of(blocks: BlockView) -> int:
    """Return how many layers can arrive one after the other.

    Raises:
        UsageError: The blocks are in host memory, or the layout has no layers.
    """
    if blocks.kind is not MemoryKind.DEVICE:
        raise UsageError("streams and layers are for blocks in device memory")
    if blocks.layout.order != "layer_first":
        raise UsageError(f"a {blocks.layout.order} layout has no layers that arrive one by one")
    return blocks.layout.num_layers


def _check_planes(device: _core.Device, blocks: BlockView) -> None:
    """Refuse planes that are not wholly in the device's memory.

    Raises:
        UsageError: Names the plane.
    """
    for number, (base, stride, row_bytes) in enumerate(blocks.planes.tolist()):
        needed_bytes = stride * (blocks.num_blocks - 1) + row_bytes if blocks.num_blocks else 0
        there_bytes = device.check_address(base)
        if there_bytes < needed_bytes:
            raise UsageError(
                f"plane {number} has {needed_bytes} bytes from {base:#x} on, the device's memory "
                f"there ends after {there_bytes}"
            )


@dataclass(frozen=True, slots=True)
class DeviceWay:
    """How one transfer gets at the engine's blocks.

    Attributes:
        link: The device that moves them; None where they are in host memory.
        mark: A point in the engine's stream that copies wait for; None for none.
        reaches_hbm: Whether a copy between the blocks and HBM slots is possible.
        layers: How many layers the transfer tells apart; 1 for none.
        layer_planes: Planes of such a layer; 0 where there is one.
        is_down: Whether the device failed, so that nothing can be moved.
    """

    link: DeviceLink | None
    mark: _core.StreamMark | None
    reaches_hbm: bool
    layers: int = 1
    layer_planes: int = 0
    is_down: bool = False


HOST_WAY = DeviceWay(None, None, reaches_hbm=False)

# Links whose device may still copy: unpinning under it would fault.
_ABANDONED: list[DeviceLink] = []
