"""`kvx bench gpu` from the command line, and that it notices what it is there to notice."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvx_bench import command
from kvx_bench.case import Options
from kvx_bench.gpu import fragments, interference
from kvx_bench.gpu.link import Link, read_link
from kvx_bench.gpu.rig import SIZES, GpuRig, forcing, paged
from kvx_ext import _core
from tests.gpu.rig import Gpu


@pytest.fixture
def rig(gpu: Gpu, tmp_path: Path) -> Iterator[GpuRig]:
    """Make a small one."""
    with GpuRig(Options(is_quick=True, path=tmp_path, threads=1, driver=gpu.library)) as made:
        yield made
    # pytest keeps what a fixture yielded, and nothing may be left in the driver.
    vars(made).clear()


@pytest.mark.filterwarnings("default")  # what torch warns of on a real one is its own affair
def test_one_command_measures_everything(
    gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fragments, "SIZES", SIZES[::5])
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    report = tmp_path / "report.json"
    asked = f"gpu --quick --driver {gpu.library} --json {report} --path {tmp_path}"
    assert command.run(parser.parse_args(asked.split())) == 0
    found = json.loads(report.read_text())
    assert found["machine"]["gpus"][0]["name"] == gpu.device.info()["name"]
    rows = {row["key"]: row for row in found["rows"]}
    ways = ("batch", "rows", "single", "staged", "planner-auto", "planner-never")
    measured = [
        f"gpu.{direction}.{size}.{way}"
        for direction in ("h2d", "d2h")
        for size in ("4KiB", "128KiB", "4MiB")
        for way in ways
    ]
    for key in measured:
        row = rows[key]
        assert row["gb_per_s"] > 0
        assert row["limit"] > 0
        assert row["ratio"] > 0
        assert row["cpu_s_per_gb"] is not None
        assert ("0 kernels" in row["note"]) or key.endswith(("staged", "auto")), key
    others = {key.split(".")[1] for key in rows} - {"h2d", "d2h"}
    assert others == {"plain", "latency", "submit", "pin", "torch", "interference"}


def test_without_a_driver_it_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    asked = f"gpu --quick --driver /nowhere/libcuda.so.1 --path {tmp_path}"
    assert command.run(parser.parse_args(asked.split())) == 1
    assert "/nowhere/libcuda.so.1" in capsys.readouterr().out


@pytest.mark.parametrize("direction", ["h2d", "d2h"])
def test_a_wrong_byte_ends_the_run(rig: GpuRig, direction: str) -> None:
    runs = paged(4096, rig.total_bytes)
    rig.prepare(direction)
    with pytest.raises(AssertionError, match="what arrived"):
        rig.check(direction, runs)
    with rig.copies() as copies:
        rig.copy(copies, direction, runs)
    rig.check(direction, runs)
    rig._pattern[4096 * int(runs.places[0]) if direction == "d2h" else 0] ^= 1
    with pytest.raises(AssertionError, match="what arrived"):
        rig.check(direction, runs)


class _Launching:
    """Copies that break their word."""

    def __init__(self, copies: _core.Copies) -> None:
        self.submit, self.wait, self._copies = copies.submit, copies.wait, copies
        self._launched = 0

    def stats(self) -> dict[str, int]:
        self._launched += 1
        return self._copies.stats() | {"kernels_launched": self._launched}


def test_a_kernel_that_may_not_be_ends_the_run(rig: GpuRig) -> None:
    bench = fragments._Bench(rig, "d2h", 1)
    with (
        rig.copies(sm="never", calibration=forcing("single")) as copies,
        pytest.raises(AssertionError, match="sm=never"),
    ):
        next(bench.planned(_Launching(copies), "never"))


def test_every_way_to_offload_offloads(rig: GpuRig) -> None:
    """What the model's products are measured beside, for machines without a model."""
    names = []
    for name, open_mover in interference._movers(rig):
        rig.prepare("d2h")
        with open_mover() as mover:
            measured = interference._beside(_Pause(), mover, 0.02)
            mover.check()
        assert measured.product_us == 7.0
        names.append(name.split(".")[0])
    assert names == ["copy-engine"] * 2 + ["staged", "kernel"] * 3


class _Pause:
    """A product that leaves the GPU alone."""

    def median_us(self, window_s: float) -> float:
        interference.time.sleep(window_s)
        return 7.0


def test_the_link_is_what_the_kernel_tells(tmp_path: Path) -> None:
    device = tmp_path / "0000:3d:00.0"
    device.mkdir()
    (device / "max_link_speed").write_text("32.0 GT/s PCIe\n")
    (device / "max_link_width").write_text("16\n")
    link = read_link("0000:3D:00.0", tmp_path)
    assert link == Link(5, 16, pytest.approx(63.0, abs=0.1))
    assert str(link) == "PCIe 5 x16"
    (device / "max_link_speed").write_text("Unknown\n")
    assert read_link("0000:3d:00.0", tmp_path) is None
    assert read_link("0000:00:00.0", tmp_path) is None
