"""What `kvx doctor` says of GPUs, for drivers and devices made up here."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvx.cli import doctor
from kvx.cli.gpu import LIBRARY, gpu_findings
from kvx.cli.main import main
from kvx.errors import UnavailableError
from kvx.transfer.calibration import METHODS, SHAPE, Calibration

if TYPE_CHECKING:
    from pathlib import Path

    from kvx.cli.finding import Finding

H100 = {
    "ordinal": 0,
    "name": "NVIDIA H100",
    "uuid": "0123456789abcdef" * 2,
    "pci_bus_id": "0000:17:00.0",
    "total_bytes": 80 << 30,
    "compute_major": 9,
    "compute_minor": 0,
    "multiprocessors": 132,
    "copy_engines": 3,
    "numa_node": 1,
    "driver_version": 13000,
    "has_batch_copy": True,
    "has_exportable_memory": True,
    "has_stream_values": True,
    "is_emulated": False,
    "kernels": "fatbin",
}


def findings(tmp_path: Path, *devices: dict[str, object]) -> dict[str, Finding]:
    asked = []

    def list_devices(library: str) -> list[dict[str, object]]:
        asked.append(library)
        return list(devices)

    found = {one.subject: one for one in gpu_findings(list_devices, tmp_path)}
    assert asked == [LIBRARY]
    for one in found.values():
        assert one.found
        assert one.is_good or one.remedy, one
    return found


def test_a_device_and_what_it_offers(tmp_path: Path) -> None:
    found = findings(tmp_path, H100)
    assert found["GPU"].found == "1 device(s), driver for CUDA 13.0"
    assert found["GPU 0"].found == (
        "NVIDIA H100, 80.0 GiB, compute 9.0, 3 copy engine(s), NUMA node 1, 0000:17:00.0"
    )
    assert found["GPU 0 batch copies"].is_good
    assert found["GPU 0 exportable memory"].is_good
    assert found["GPU 0 kernels"].found == "fatbin"
    assert found["GPU 0 copies"].found.splitlines() == [
        "H2D: staged up to 24KiB, batch from 28KiB",
        "D2H: staged up to 24KiB, batch from 28KiB",
        "D2D: batch",
        "by published numbers of an H100",
    ]
    assert not found["GPU 0 copies"].is_good


def test_an_old_driver_and_no_kernels(tmp_path: Path) -> None:
    old = H100 | {
        "driver_version": 12040, "has_batch_copy": False, "has_exportable_memory": False,
        "numa_node": -1, "copy_engines": 0, "kernels": "no nvcc when kvx was built",
    }  # fmt: skip
    found = findings(tmp_path, old)
    assert not any(one.is_good for one in found.values())
    assert "CUDA 12.4" in found["GPU"].found
    assert "NUMA node unknown" in found["GPU 0"].found
    assert found["GPU 0 kernels"].found == "no nvcc when kvx was built"
    assert "staged" not in found["GPU 0 copies"].found
    assert "batch" not in found["GPU 0 copies"].found


def test_a_calibration_that_was_kept(tmp_path: Path) -> None:
    gb_s = np.zeros(SHAPE)
    gb_s[:, METHODS.index("rows")] = 40
    made = Calibration(H100["uuid"], 13000, datetime.now(UTC), gb_s, np.full(3, 50.0))
    made.save(tmp_path)
    found = findings(tmp_path, H100, H100 | {"ordinal": 1, "uuid": "f" * 32})
    assert found["GPU 0 copies"].is_good
    assert found["GPU 0 copies"].found.splitlines() == [
        "H2D: rows", "D2H: rows", "D2D: rows",
        f"by what was measured on {made.measured_at:%Y-%m-%d %H:%M}",
    ]  # fmt: skip
    assert "published" in found["GPU 1 copies"].found


def test_kernels_that_nobody_looked_for(tmp_path: Path) -> None:
    """A list of devices does not load kernels; staging is shown as it will be when they load."""
    found = findings(tmp_path, H100 | {"kernels": ""})
    assert "not looked for" in found["GPU 0 kernels"].found
    assert "staged" in found["GPU 0 copies"].found


def test_a_driver_without_devices(tmp_path: Path) -> None:
    assert "no device" in findings(tmp_path)["GPU"].found


def test_no_driver(tmp_path: Path) -> None:
    def list_devices(library: str) -> list[dict[str, object]]:
        raise UnavailableError(f"{library}: cannot open shared object file")

    (only,) = gpu_findings(list_devices, tmp_path)
    assert only.subject == "GPU"
    assert not only.is_good
    assert "libcuda.so.1: cannot open" in only.found
    assert only.remedy


def test_doctor_with_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "list_devices", lambda _library: [H100])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["doctor", "--json", "--path", str(tmp_path)]) == 0
    by_subject = {one["subject"]: one for one in json.loads(capsys.readouterr().out)}
    assert "NVIDIA H100" in by_subject["GPU 0"]["found"]
    assert main(["doctor", "--path", str(tmp_path)]) == 0
    assert "H2D: staged up" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists(), "looking changes nothing"
