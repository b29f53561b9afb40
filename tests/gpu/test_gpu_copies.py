"""Copies by every method and size of run: the bytes arrive, nothing beside them is touched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from kvx_ext import _core
from tests.gpu.rig import (
    SIZES,
    Addresses,
    Bytes,
    Gpu,
    address_of,
    copy_runs,
    forcing,
    one,
    random_bytes,
)

MIB = 1 << 20
HOST_BYTES = 8 * MIB
DEVICE_BYTES = 2 * HOST_BYTES
CALL_BYTES = 4 * MIB
# Where they lie in host memory, where in the device's, and how long they are.
Runs = tuple[Addresses, Addresses, Addresses]


@dataclass(slots=True)
class Ends:
    """Host and device memory with something to copy in both."""

    gpu: Gpu
    host: Bytes
    memory: _core.DeviceMemory

    def check(
        self,
        copies: _core.Copies,
        direction: str,
        runs: Runs,
        seed: int,
    ) -> None:
        """Copy runs between the ends and compare all bytes of the target."""
        host_starts, device_starts, sizes = runs
        self.host[:] = random_bytes(HOST_BYTES, seed)
        inner = random_bytes(DEVICE_BYTES, seed + 1)
        self.gpu.write(self.memory.address, inner)
        expected = inner.copy() if direction == "h2d" else self.host.copy()
        for at, on, size in zip(
            host_starts.tolist(), device_starts.tolist(), sizes.tolist(), strict=True
        ):
            if direction == "h2d":
                expected[on : on + size] = self.host[at : at + size]
            else:
                expected[at : at + size] = inner[on : on + size]
        hosts = host_starts + np.uint64(address_of(self.host))
        devices = device_starts + np.uint64(self.memory.address)
        targets, sources = (devices, hosts) if direction == "h2d" else (hosts, devices)
        copy_runs(copies, direction, targets, sources, sizes)
        if direction == "h2d":
            arrived = np.frombuffer(self.gpu.read(self.memory.address, DEVICE_BYTES), np.uint8)
        else:
            arrived = self.host
        np.testing.assert_array_equal(arrived, expected)


@pytest.fixture
def ends(gpu: Gpu) -> Ends:
    """Make both."""
    return Ends(gpu, gpu.host(HOST_BYTES), gpu.memory(DEVICE_BYTES))


def is_there(gpu: Gpu, method: str) -> bool:
    return method != "batch" or bool(gpu.device.info()["has_batch_copy"])


def paged(size: int, *, is_even: bool) -> Runs:
    """Return runs that touch on the host alone: as the slots of a tier lie, and engine's blocks."""
    count = max(2, min(64, CALL_BYTES // size))
    order = np.arange(count)
    places = order if is_even else np.random.default_rng(size).permutation(count)
    return (
        (order * size).astype(np.uint64),
        (places * 2 * size).astype(np.uint64),
        np.full(count, size, np.uint64),
    )


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
@pytest.mark.parametrize("method", ["batch", "rows", "single"])
def test_copy_engines_alone(ends: Ends, method: str, direction: str) -> None:
    if not is_there(ends.gpu, method):
        pytest.skip("this driver has no batch copies")
    copies = ends.gpu.copies(sm="never", calibration=forcing(method))
    for seed, size in enumerate(SIZES):
        before = copies.stats()[f"runs_{method}"]
        runs = paged(size, is_even=method == "rows")
        ends.check(copies, direction, runs, seed=seed)
        assert copies.stats()[f"runs_{method}"] - before == len(runs[2])
    stats = copies.stats()
    assert stats["kernels_launched"] == 0
    assert stats["pageable_bytes"] == 0
    assert stats["in_flight"] == 0


@pytest.mark.parametrize("ctas", [1, 4, 64])
@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_by_way_of_staging_memory(ends: Ends, direction: str, ctas: int) -> None:
    copies = ends.gpu.copies(sm="auto", ctas=ctas, calibration=forcing("staged"))
    for seed, size in enumerate(SIZES[:: 1 if ctas == 4 else 4]):
        before = copies.stats()
        runs = paged(size, is_even=False)
        ends.check(copies, direction, runs, seed=seed)
        after = copies.stats()
        assert after["runs_staged"] - before["runs_staged"] == len(runs[2])
        assert after["kernels_launched"] > before["kernels_launched"]
    assert ends.gpu.device.info()["kernels"] in {"fatbin", "nvrtc"}


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_never_means_no_kernel(ends: Ends, direction: str) -> None:
    """Whatever the calibration would like."""
    copies = ends.gpu.copies(sm="never", calibration=forcing("staged"))
    ends.check(copies, direction, paged(4096, is_even=False), seed=1)
    assert copies.stats()["kernels_launched"] == 0
    assert copies.stats()["runs_staged"] == 0


@pytest.mark.parametrize("sm", ["auto", "never"])
@pytest.mark.parametrize("direction", ["h2d", "d2h"])
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_lists_of_any_runs(ends: Ends, direction: str, sm: str, seed: int) -> None:
    """Sizes from 1 byte, at any address, in any order, planned by published numbers."""
    rng = np.random.default_rng(seed)
    count = 500
    sizes = np.where(rng.random(count) < 0.5, 8192, rng.integers(1, 40_000, count))
    sizes = sizes[np.cumsum(sizes) < HOST_BYTES - count * 64]
    gaps = rng.integers(0, 2, (2, len(sizes))) * rng.integers(1, 64, (2, len(sizes)))
    host_starts, device_starts = (np.cumsum(sizes + gap) - sizes for gap in gaps)
    order = rng.permutation(len(sizes)) if seed % 2 else np.arange(len(sizes))
    parts = (part[order].astype(np.uint64) for part in (host_starts, device_starts, sizes))
    copies = ends.gpu.copies(sm=sm)
    ends.check(copies, direction, (next(parts), next(parts), next(parts)), seed=seed)
    assert sm == "auto" or copies.stats()["kernels_launched"] == 0
    assert copies.stats()[f"bytes_{direction}"] == sizes.sum()


@pytest.mark.parametrize("method", ["batch", "rows", "single"])
def test_within_the_device(gpu: Gpu, method: str) -> None:
    if not is_there(gpu, method):
        pytest.skip("this driver has no batch copies")
    copies = gpu.copies(sm="never", calibration=forcing(method))
    memory = gpu.memory(DEVICE_BYTES + HOST_BYTES)
    for seed, size in enumerate(SIZES[::2]):
        close, apart, sizes = paged(size, is_even=method == "rows")
        data = random_bytes(memory.bytes, seed)
        gpu.write(memory.address, data)
        expected = data.copy()
        for at, on in zip(close.tolist(), apart.tolist(), strict=True):
            expected[DEVICE_BYTES + at : DEVICE_BYTES + at + size] = data[on : on + size]
        base = np.uint64(memory.address)
        copy_runs(copies, "d2d", base + np.uint64(DEVICE_BYTES) + close, base + apart, sizes)
        assert gpu.read(memory.address, memory.bytes) == expected.tobytes()
    assert copies.stats()["kernels_launched"] == 0


def test_both_ways_at_once(ends: Ends) -> None:
    copies = ends.gpu.copies()
    host, memory, half = ends.host, ends.memory, HOST_BYTES // 2
    host[:] = random_bytes(HOST_BYTES, 5)
    sent = host[:half].tobytes()
    inner = random_bytes(half, 6)
    ends.gpu.write(memory.address + half, inner)
    tickets = [
        copies.submit("h2d", one(memory.address), one(address_of(host)), one(half)),
        copies.submit("d2h", one(address_of(host) + half), one(memory.address + half), one(half)),
    ]
    assert [copies.wait(ticket, 30.0) for ticket in tickets] == [0, 0]
    assert ends.gpu.read(memory.address, half) == sent
    np.testing.assert_array_equal(host[half:], inner)
