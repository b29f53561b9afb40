"""What an engine would do with torch alone: gather and copy down, or block by block."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from kvx_bench.case import DRIVER
from kvx_bench.gpu.rig import paged, size_name
from kvx_bench.row import GB, Row, Sample, paired, throughput_row, timed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvx_bench.case import Options
    from kvx_bench.gpu.rig import GpuRig

_BLOCK_BYTES = 64 << 10


def why_no_torch(options: Options) -> str:
    """Return why there is no torch for this GPU; empty where there is."""
    if options.driver != DRIVER:
        return "torch uses the driver of the system only"
    try:
        torch = import_module("torch")
    except ImportError as error:
        return f"torch: {error}"
    return "" if torch.cuda.is_available() else "torch is here, without CUDA"


def torch_rows(rig: GpuRig, options: Options) -> Iterator[Row]:
    """The offloading of the same list of blocks, and pinned memory as torch makes it."""
    if reason := why_no_torch(options):
        yield Row("gpu.torch", note=f"not here: {reason}")
        return
    peer = _TorchPeer(rig, options.repeats)
    yield peer.row("select-to-cpu", peer.select_to_cpu, "index_select, then .to('cpu')")
    yield peer.row(
        "select-to-pinned", peer.select_to_pinned, "index_select, copied to pinned memory"
    )
    yield peer.row(
        "each-block", peer.each_block, "a copy_(non_blocking=True) a block, to pinned memory"
    )
    yield _pinning_row(options)


class _TorchPeer:
    """Blocks in a tensor of torch's own, picked by number."""

    def __init__(self, rig: GpuRig, repeats: int) -> None:
        self._torch: Any = import_module("torch")
        self._rig = rig
        self._repeats = repeats
        self._places = paged(_BLOCK_BYTES, rig.total_bytes).places
        pattern = np.random.default_rng(2).integers(
            0, 256, (2 * len(self._places), _BLOCK_BYTES), np.uint8
        )
        self._expected = pattern[self._places]
        self._blocks = self._torch.from_numpy(pattern).cuda()
        self._numbers = self._torch.from_numpy(self._places).cuda()
        self._pinned = self._torch.empty(
            self._expected.shape, dtype=self._torch.uint8, pin_memory=True
        )

    def row(self, name: str, offload: Callable[[], Any], note: str) -> Row:
        """Measure one way, and compare what it brought."""
        num_bytes = self._expected.nbytes
        pairs = paired(
            lambda: self._timed(offload),
            lambda: self._rig.plain("d2h", num_bytes),
            repeats=self._repeats,
        )
        self._pinned.zero_()
        is_same = np.array_equal(offload().numpy(), self._expected)
        assert is_same, f"{name}: what arrived is what was sent"
        key = f"gpu.torch.d2h.{size_name(_BLOCK_BYTES)}.{name}"
        return throughput_row(key, num_bytes, pairs, note=note)

    def _timed(self, offload: Callable[[], Any]) -> Sample:
        self._torch.cuda.synchronize()
        return timed(offload)

    def select_to_cpu(self) -> Any:
        """Gather on the device, then one copy to pageable memory."""
        return self._blocks.index_select(0, self._numbers).to("cpu")

    def select_to_pinned(self) -> Any:
        """Gather on the device, then one copy to pinned memory."""
        self._pinned.copy_(self._blocks.index_select(0, self._numbers), non_blocking=True)
        self._torch.cuda.synchronize()
        return self._pinned

    def each_block(self) -> Any:
        """One copy a block."""
        for slot, place in enumerate(self._places.tolist()):
            self._pinned[slot].copy_(self._blocks[place], non_blocking=True)
        self._torch.cuda.synchronize()
        return self._pinned


def _pinning_row(options: Options) -> Row:
    """Once: torch keeps pinned memory, so that a second time would cost nothing."""
    torch: Any = import_module("torch")
    num_bytes = (256 << 20) if options.is_quick else 4 << 30
    kept: list[Any] = []
    sample = timed(lambda: kept.append(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)))
    assert kept[0].is_pinned(), "torch says so"
    return Row(
        f"gpu.torch.pin.{size_name(num_bytes)}",
        gb_per_s=num_bytes / GB / sample.wall_s,
        cpu_s_per_gb=sample.cpu_s / (num_bytes / GB),
        note=f"{sample.wall_s / (num_bytes / 2**30):.3f} s/GiB, populating the pages included; "
        "beside gpu.pin",
    )
