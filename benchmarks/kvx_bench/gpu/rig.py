"""A device to measure, memory on both sides of its link, and copies that are checked."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from kvx_bench.copying import prefaulted
from kvx_bench.gpu.link import read_link
from kvx_bench.row import GB, timed
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvx_bench.case import Options
    from kvx_bench.row import Sample

DIRECTIONS = ("h2d", "d2h")
METHODS: tuple[str, ...] = _core.copy_methods()
SIZES = tuple(4096 << i for i in range(11))
# No copy here takes a second on a device that works.
_PATIENCE_S = 60.0
_CLEARED = 0


def size_name(num_bytes: int) -> str:
    """Return "4KiB" or "2MiB"."""
    return f"{num_bytes >> 20}MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10}KiB"


def forcing(*methods: str) -> npt.NDArray[np.float64]:
    """Return a calibration in which these methods alone have rates: no other is planned then."""
    gb_s = np.zeros((len(_core.copy_directions()), len(METHODS), len(SIZES)))
    gb_s[:, [METHODS.index(method) for method in methods]] = 1.0
    return gb_s


@dataclass(frozen=True, slots=True)
class Runs:
    """A list to copy: slots of the host one after the other, blocks of the device anywhere.

    Attributes:
        run_bytes: Of each run.
        places: (n,) of each block on the device, in runs; every second one, so that none touch.
    """

    run_bytes: int
    places: npt.NDArray[np.int64]

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return self.run_bytes * len(self.places)

    def half(self, number: int) -> Runs:
        """Return every second run, the first of which is `number`."""
        return Runs(self.run_bytes, self.places[number::2])


def paged(run_bytes: int, total_bytes: int, *, is_even: bool = False) -> Runs:
    """Return a list as a paged cache makes it; `is_even`: at equal strides, as rows need it."""
    order = 2 * np.arange(total_bytes // run_bytes)
    return Runs(
        run_bytes, order if is_even else np.random.default_rng(run_bytes).permutation(order)
    )


class GpuRig:
    """A device with `2 * total_bytes` of memory, a pattern as large on the host, and a target.

    Attributes:
        device: What is measured.
        info: What it says of itself.
        total_bytes: Of each list that is copied.
    """

    def __init__(self, options: Options) -> None:
        self.device = _core.open_cuda_device(options.driver)
        self.info = self.device.info()
        self.total_bytes = (8 if options.is_quick else 128) << 20
        self._made = contextlib.ExitStack()
        self._pinned: list[npt.NDArray[np.uint8]] = []
        self._memory = self.device.allocate(2 * self.total_bytes)
        self._made.callback(self._memory.close)
        self._stream = self.device.create_stream()
        self._made.callback(self.device.destroy_stream, self._stream)
        self._pattern = self.pinned(2 * self.total_bytes)
        self._pattern[:] = np.random.default_rng(1).integers(0, 256, len(self._pattern), np.uint8)
        self._target = self.pinned(2 * self.total_bytes)
        self._plain = self._made.enter_context(
            self.copies(sm="never", calibration=forcing("single"))
        )

    def __enter__(self) -> Self:
        """Nothing but the rig."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Give everything back."""
        self._made.close()

    @property
    def link_gb_per_s(self) -> float | None:
        """What the link's wires carry one way; None where nobody tells."""
        link = read_link(str(self.info["pci_bus_id"]))
        return link.gb_per_s if link else None

    @property
    def device_address(self) -> int:
        """Address of the device's memory."""
        return self._memory.address

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Return (num_bytes,) prefaulted pinned memory that lives as long as this."""
        array = prefaulted(num_bytes)
        pinned = self.device.pin(array.ctypes.data, num_bytes)
        self._made.callback(pinned.close)
        # Memory must not go before it is unpinned.
        self._pinned.append(array)
        assert pinned.wait(_PATIENCE_S), "pinning ends"
        return array

    @contextlib.contextmanager
    def copies(self, **options: object) -> Iterator[_core.Copies]:
        """Open copies with options of `_core.Copies`; no copy may be left in the driver."""
        made = _core.Copies(self.device, **options)  # type: ignore[arg-type]
        try:
            yield made
        finally:
            assert made.close(_PATIENCE_S) == 0, "every copy has ended"

    def why_not(self, method: str) -> str:
        """Return why a method is not there; empty when it is."""
        if method == "batch" and not self.info["has_batch_copy"]:
            return "this driver has no batch copies"
        if method != "staged":
            return ""
        # Copies that may use kernels look for them.
        with self.copies(sm="auto"):
            kernels = str(self.device.info()["kernels"])
        return "" if kernels in {"fatbin", "nvrtc"} else f"no kernels: {kernels}"

    def submit(self, copies: _core.Copies, direction: str, runs: Runs, *, first: int = 0) -> int:
        """Begin to copy a list; the host's slots begin at run `first`. Returns the ticket."""
        slots, blocks = self._addresses(direction, runs, first)
        targets, sources = (blocks, slots) if direction == "h2d" else (slots, blocks)
        sizes = np.full(len(slots), runs.run_bytes, np.uint64)
        return copies.submit(direction, targets, sources, sizes)

    def offload_table(self, runs: Runs, first: int) -> npt.NDArray[np.uint64]:
        """Return (n, 3) target, source and bytes of a list to offload, in pinned memory."""
        slots, blocks = self._addresses("d2h", runs, first)
        table = self.pinned(24 * len(slots)).view(np.uint64).reshape(-1, 3)
        table[:] = np.stack([slots, blocks, np.full(len(slots), runs.run_bytes, np.uint64)], axis=1)
        return table

    def _addresses(
        self, direction: str, runs: Runs, first: int
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Return where the runs lie on the host and on the device."""
        host = self._pattern if direction == "h2d" else self._target
        size = np.uint64(runs.run_bytes)
        slots = np.arange(first, first + len(runs.places), dtype=np.uint64)
        return (
            np.uint64(host.ctypes.data) + slots * size,
            np.uint64(self.device_address) + runs.places.astype(np.uint64) * size,
        )

    def finish(self, copies: _core.Copies, ticket: int) -> None:
        """Wait for a list.

        Raises:
            RuntimeError: It did not arrive.
        """
        code = copies.wait(ticket, _PATIENCE_S)
        if code != 0:
            raise RuntimeError(f"a copy ended with code {code}; health: {self.device.health()!r}")

    def copy(self, copies: _core.Copies, direction: str, runs: Runs) -> Sample:
        """Time a list from submit to the end of the wait."""
        return timed(lambda: self.finish(copies, self.submit(copies, direction, runs)))

    def plain(self, direction: str, num_bytes: int) -> Sample:
        """Time one contiguous copy, which is what a list is measured against."""
        return self.copy(self._plain, direction, Runs(num_bytes, np.zeros(1, np.int64)))

    def plain_gb_per_s(self, direction: str, num_bytes: int, repeats: int) -> float:
        """Return the median rate of plain copies."""
        samples = [self.plain(direction, num_bytes) for _ in range(repeats + 1)][1:]
        return num_bytes / GB / statistics.median(sample.wall_s for sample in samples)

    def prepare(self, direction: str) -> None:
        """Put the pattern at the source and nothing at the target."""
        if direction == "h2d":
            self.device.fill(self.device_address, _CLEARED, 2 * self.total_bytes, self._stream)
            self.device.stream_synchronize(self._stream)
        else:
            self.plain("h2d", 2 * self.total_bytes)
            self._target[:] = _CLEARED

    def check(self, direction: str, runs: Runs, *, first: int = 0) -> None:
        """Compare every byte of a list at its target with the pattern."""
        size, count = runs.run_bytes, len(runs.places)
        if direction == "h2d":
            self.plain("d2h", 2 * self.total_bytes)
        slots = (self._pattern if direction == "h2d" else self._target).reshape(-1, size)
        blocks = (self._target if direction == "h2d" else self._pattern).reshape(-1, size)
        is_same = np.array_equal(slots[first : first + count], blocks[runs.places])
        assert is_same, f"{direction} of {count} x {size} bytes: what arrived is what was sent"
