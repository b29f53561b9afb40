"""The device of these tests: simulated everywhere, real where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvx_ext import _core
from tests.gpu.rig import REAL_LIBRARY, Gpu, on_real, on_simulated, why_no_real_gpu
from tests.sim.cuda_driver import Engine, SimulatedDriver
from tests.sim.cuda_fixture import loaded_driver, simulated_driver

__all__ = ["loaded_driver", "simulated_driver"]


@pytest.fixture(scope="session")
def real_device() -> _core.Device:
    """Open it once: a context takes long to make."""
    if why := why_no_real_gpu():
        pytest.skip(f"real GPU: {why}")
    return _core.open_cuda_device(REAL_LIBRARY)


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """Hand out a device, in good health before and after."""
    if request.param == "simulated":
        with on_simulated(request.getfixturevalue("simulated_driver")) as simulated:
            yield simulated
    else:
        with on_real(request.getfixturevalue("real_device")) as real:
            yield real


@pytest.fixture
def sim(simulated_driver: SimulatedDriver) -> Iterator[Gpu]:
    """Hand out a simulated device, for what no real one does on demand."""
    with on_simulated(simulated_driver) as simulated:
        yield simulated


@pytest.fixture
def driver(simulated_driver: SimulatedDriver) -> Iterator[SimulatedDriver]:
    """Hand out the driver behind it; its engines go on afterwards."""
    yield simulated_driver
    for engine in Engine:
        simulated_driver.thaw(engine)
