"""The fixture of tests that run on the simulated CUDA driver; import it into a `conftest.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sim.cuda_driver import SimulatedDriver, why_not


@pytest.fixture(scope="session")
def loaded_driver() -> SimulatedDriver:
    """Build and load it once."""
    if (why := why_not()) is not None:
        pytest.skip(f"simulated CUDA driver: {why}")
    return SimulatedDriver()


@pytest.fixture
def simulated_driver(loaded_driver: SimulatedDriver) -> Iterator[SimulatedDriver]:
    """Hand out a fresh driver; a test that leaves convictions behind fails."""
    loaded_driver.reset()
    yield loaded_driver
    convictions = loaded_driver.convictions()
    loaded_driver.reset()
    assert not convictions, "\n".join(convictions)
