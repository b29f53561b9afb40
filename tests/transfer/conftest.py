"""Engines for the tests of the native transfer engine."""

from collections.abc import Iterator

import pytest

from kvx_ext import _core
from tests.transfer.slots import EngineMaker


@pytest.fixture
def make_engine() -> Iterator[EngineMaker]:
    """Make engines that are closed when the test ends."""
    made: list[_core.Engine] = []

    def make(**options: object) -> _core.Engine:
        made.append(_core.Engine(**options))
        return made[-1]

    yield make
    for engine in made:
        engine.close(1.0)


@pytest.fixture(params=["posix", "io_uring"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that works here."""
    name: str = request.param
    if name == "io_uring" and (why := _core.probe_io_uring()):
        pytest.skip(f"io_uring: {why}")
    return name


@pytest.fixture
def engine(make_engine: EngineMaker) -> _core.Engine:
    """Make an engine without faults."""
    return make_engine(copy_threads=2)
