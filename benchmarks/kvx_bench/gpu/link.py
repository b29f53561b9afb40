"""The PCIe link of a device, as the kernel tells: what it is and what it can carry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_DEVICES = Path("/sys/bus/pci/devices")
# GT/s of a lane: the generation, and the share of bits that is not spent on encoding.
_GENERATIONS = {
    2.5: (1, 8 / 10),
    5.0: (2, 8 / 10),
    8.0: (3, 128 / 130),
    16.0: (4, 128 / 130),
    32.0: (5, 128 / 130),
    64.0: (6, 242 / 256),
}


@dataclass(frozen=True, slots=True)
class Link:
    """A link at its best; an idle device may have slowed it down.

    Attributes:
        generation: Of PCIe.
        width: Lanes.
        gb_per_s: What its wires carry one way, headers of packets included.
    """

    generation: int
    width: int
    gb_per_s: float

    def __str__(self) -> str:
        """Return "PCIe 5 x16"."""
        return f"PCIe {self.generation} x{self.width}"


def read_link(pci_bus_id: str, devices: Path = _DEVICES) -> Link | None:
    """Return the link of a device; None where the kernel does not tell, as in many containers."""
    directory = devices / pci_bus_id.lower()
    try:
        speed = float((directory / "max_link_speed").read_text().split()[0])
        width = int((directory / "max_link_width").read_text())
    except (OSError, ValueError, IndexError):
        return None
    if speed not in _GENERATIONS or width <= 0:
        return None
    generation, payload = _GENERATIONS[speed]
    return Link(generation, width, speed * width / 8 * payload)
