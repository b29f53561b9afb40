"""The simulated CUDA driver for the tests of links."""

from tests.sim.cuda_fixture import loaded_driver, simulated_driver

__all__ = ["loaded_driver", "simulated_driver"]
