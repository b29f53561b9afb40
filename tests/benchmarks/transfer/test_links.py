"""Links of a machine: read from the kernel's files, and measured between simulated GPUs."""

from pathlib import Path

import numpy as np
import pytest

from kvx_bench.transfer.links import link_lines, peer_gb_per_s, rdma_ports
from kvx_bench.transfer.pair.memory import DeviceMemory
from kvx_ext import _core
from tests.sim.cuda_driver import LIBRARY, SimulatedDriver

NUM_BYTES = 1 << 20


def port(root: Path, device: str, number: str, **facts: str) -> None:
    directory = root / device / "ports" / number
    directory.mkdir(parents=True)
    for name, text in facts.items():
        (directory / name).write_text(text + "\n")


def test_ports_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_0", "1", state="4: ACTIVE", rate="400 Gb/sec (4X NDR)",
         link_layer="InfiniBand")  # fmt: skip
    port(tmp_path, "rxe0", "1", state="1: DOWN")
    assert [one.device for one in rdma_ports(tmp_path)] == ["mlx5_0", "rxe0"]
    lines = link_lines("libnone.so", tmp_path)
    assert lines[0] == "RDMA: mlx5_0 port 1, InfiniBand, ACTIVE, 400 Gb/sec (4X NDR)"
    assert lines[1] == "RDMA: rxe0 port 1, unknown, DOWN, unknown"


def test_what_is_not_here_is_said_with_the_reason(tmp_path: Path) -> None:
    rdma, gpu = link_lines("libnone.so", tmp_path)
    assert rdma == f"RDMA: not here because the kernel lists no device in {tmp_path}"
    assert gpu.startswith("GPU: not here because there is no CUDA driver: libnone.so")


def test_one_gpu_has_nobody_to_copy_to(tmp_path: Path, simulated_driver: SimulatedDriver) -> None:
    simulated_driver.set_devices(1)
    *_, last = link_lines(str(LIBRARY), tmp_path)
    assert last == "GPU to GPU: not here because there is 1 GPU, it takes two"


def test_every_two_gpus_are_measured(tmp_path: Path, simulated_driver: SimulatedDriver) -> None:
    simulated_driver.set_devices(2)
    lines = link_lines(str(LIBRARY), tmp_path, peer_bytes=NUM_BYTES)
    assert [line.partition(":")[0] for line in lines[-2:]] == ["GPU 0 to GPU 1", "GPU 1 to GPU 0"]
    assert all(line.endswith(" GB/s") for line in lines[-2:]), lines
    assert peer_gb_per_s(str(LIBRARY), 0, 1, NUM_BYTES) > 0


@pytest.mark.parametrize("is_emulated", [True, False])
def test_device_memory_is_filled_and_looked_at(
    is_emulated: bool, simulated_driver: SimulatedDriver
) -> None:
    assert simulated_driver.convictions() == []
    device = (
        _core.open_emulated_device(4 << 20) if is_emulated else _core.open_cuda_device(str(LIBRARY))
    )
    memory = DeviceMemory(NUM_BYTES, device)
    content = np.random.default_rng(3).integers(0, 256, NUM_BYTES, np.uint8)
    memory.load()[:] = content
    memory.store(content)
    memory._host.load()[:] = 0
    assert (memory.load() == content).all()
    interface = memory.__cuda_array_interface__
    assert interface["shape"] == (NUM_BYTES,)
    memory.close()
