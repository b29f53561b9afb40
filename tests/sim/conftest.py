"""Fixtures of the simulated world."""

from tests.sim.cuda_fixture import loaded_driver, simulated_driver

__all__ = ["loaded_driver", "simulated_driver"]
