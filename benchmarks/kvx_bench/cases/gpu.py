"""Copies between host and GPU, and what they cost everybody else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.errors import UnavailableError
from kvx_bench.gpu.fragments import fragment_rows
from kvx_bench.gpu.interference import interference_rows
from kvx_bench.gpu.overheads import latency_row, pinning_rows, submission_row
from kvx_bench.gpu.plain import plain_rows
from kvx_bench.gpu.rig import GpuRig
from kvx_bench.gpu.torch_peer import torch_rows
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvx_bench.case import Options
    from kvx_bench.row import Row


class GpuCase:
    """Lists of fragments as a paged cache makes them: every byte is compared behind every row.

    `gpu.plain` are the limits: one large copy each way, both ways, on the device. `gpu.h2d` and
    `gpu.d2h` copy 128 MiB in fragments of 4 KiB to 4 MiB by one method alone (batch, rows, single,
    staged), then as the planner chooses by what was just measured, with and without kernels; their
    limit is a plain copy of as many bytes, measured in turn with them. A copy that may not use SMs
    and launches a kernel ends the run. `gpu.latency`, `gpu.submit` and `gpu.pin` are what is paid
    beside the bytes. `gpu.torch` is the same work with torch alone, `gpu.interference` how much
    slower a prefill's and a decode's product are beside each way to offload.
    """

    name = "gpu"
    description = "copies between host and GPU: by method and fragment, and beside a model's work"

    def why_not(self, options: Options) -> str:
        """It needs a driver and a device."""
        try:
            devices = _core.list_cuda_devices(options.driver)
        except UnavailableError as error:
            return str(error)
        return "" if devices else "the driver sees no device"

    def run(self, options: Options) -> Iterator[Row]:
        """Under 5 minutes on a GPU; the first one there is."""
        with GpuRig(options) as rig:
            yield from plain_rows(rig, options)
            yield from fragment_rows(rig, options)
            yield latency_row(rig, options)
            yield submission_row(rig, options)
            yield from pinning_rows(rig, options)
            yield from torch_rows(rig, options)
            yield from interference_rows(rig, options)
            health = rig.device.health()
            assert not health, health
