"""The calibration of a device as a cache makes it: on the simulated GPU, in memory of its own."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

import kvx
from kvx.errors import TransferError
from kvx.transfer.calibration import DIRECTIONS
from kvx.transfer.device_rates import calibration_for
from kvx_ext import _core
from tests.sim.cuda_driver import Engine
from tests.sim.cuda_fixture import loaded_driver, simulated_driver

if TYPE_CHECKING:
    from pathlib import Path

    from tests.sim.cuda_driver import SimulatedDriver

__all__ = ["loaded_driver", "simulated_driver"]


@pytest.mark.parametrize("sm", ["auto", "never"])
def test_it_is_measured_once_and_kept(
    simulated_driver: SimulatedDriver, tmp_path: Path, sm: str
) -> None:
    done: list[tuple[str, int, int]] = []
    with closing(_core.open_cuda_device(str(simulated_driver.path))) as device:
        first = calibration_for(device, tmp_path, sm=sm, progress=lambda *step: done.append(step))
        assert done[0][0] == "calibrate"
        # The simulator runs kernels on one CPU: with them the budget may be over before that.
        assert sm == "auto" or first.plain_gb_s[DIRECTIONS.index("h2d")] > 0
        assert sm == "auto" or simulated_driver.count("launches") == 0
        done.clear()
        again = calibration_for(device, tmp_path, sm=sm, progress=lambda *step: done.append(step))
    assert not done
    assert (again.gb_s == first.gb_s).all()
    assert simulated_driver.count("live_allocations") == 0
    assert simulated_driver.count("live_registrations") == 0


def test_a_device_that_stands_still_keeps_the_memory(
    simulated_driver: SimulatedDriver, tmp_path: Path
) -> None:
    simulated_driver.freeze(Engine.HOST_TO_DEVICE)
    with closing(_core.open_cuda_device(str(simulated_driver.path))) as device:
        with pytest.raises(TransferError, match="did not end"):
            calibration_for(device, tmp_path)
        assert simulated_driver.count("live_allocations") > 0
        assert simulated_driver.count("live_registrations") > 0
        simulated_driver.thaw(Engine.HOST_TO_DEVICE)


def test_a_cache_calibrates_by_itself(
    simulated_driver: SimulatedDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvx.cache.device.cache_directory", lambda: tmp_path)
    tiers = [{"kind": "hbm", "capacity": "1MiB", "emulation": "never"},
             {"kind": "dram", "capacity": "2MiB"}]  # fmt: skip
    said: list[str] = []
    config = {"tiers": tiers, "gpu": {"driver": str(simulated_driver.path)}}
    with kvx.TieredCache.open(config, progress=lambda what, *_: said.append(what)):
        assert "calibrate" in said
    assert len(list(tmp_path.iterdir())) == 1
