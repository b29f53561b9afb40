"""An initiator and a target: what arrives is looked at, and what is wrong is found."""

from collections.abc import Iterator

import pytest

from kvx.errors import CapacityError, StaleReference, UsageError
from kvx_bench.transfer.baselines.work import Work
from kvx_bench.transfer.pair.initiator import Initiator
from kvx_bench.transfer.pair.opening import PairOptions, open_pair
from kvx_bench.transfer.pair.pair import Course, Pair
from kvx_bench.transfer.pair.target import Target
from kvx_bench.transfer.pattern import Difference
from tests.benchmarks.transfer.rig import BACKEND, pair_here

NUM_BYTES = 1 << 20
WORKS = [Work(is_write, size, batch) for is_write in (False, True) for size, batch in
         ((4096, 1), (4096, 100), (5000, 33))]  # fmt: skip


@pytest.fixture(scope="module")
def here() -> Iterator[tuple[Pair, Initiator, Target]]:
    with pair_here(NUM_BYTES) as made:
        yield made


@pytest.mark.parametrize("work", WORKS, ids=str)
@pytest.mark.parametrize("has_checksums", [False, True])
def test_every_byte_arrives(
    here: tuple[Pair, Initiator, Target], work: Work, has_checksums: bool
) -> None:
    pair = here[0]
    for iteration in range(2):
        found, burst, prepare_s = pair.checked(Course(BACKEND, work, has_checksums), iteration)
        assert found is None
        assert len(burst.wall_s) == len(burst.post_s) == 1
        assert 0 < burst.post_s[0] <= burst.wall_s[0]
        assert prepare_s > 0


@pytest.mark.parametrize("is_write", [False, True])
def test_a_byte_that_did_not_arrive_is_found_where_it_is(
    here: tuple[Pair, Initiator, Target], is_write: bool
) -> None:
    pair, initiator, target = here
    work = Work(is_write, 4096, 16)
    pair.fill(work, 1)
    with pair.begin(Course(BACKEND, work)):
        pass
    assert pair.look(work, 1) is None
    memory = (target if is_write else initiator).memory.load()
    memory[5 * 4096 + 77] ^= 0x10
    expected = int(memory[5 * 4096 + 77]) ^ 0x10
    assert pair.look(work, 1) == Difference(5, 77, expected, expected ^ 0x10)


def test_what_was_there_before_does_not_count_as_arrived(
    here: tuple[Pair, Initiator, Target],
) -> None:
    pair, work = here[0], Work(is_write=False, block_bytes=4096, batch=4)
    assert pair.checked(Course(BACKEND, work), 5)[0] is None
    pair.fill(work, 6)
    found = pair.look(work, 6)
    assert found is not None
    assert (found.block, found.found) == (0, 0)


def test_bursts_end_by_number_and_by_time(here: tuple[Pair, Initiator, Target]) -> None:
    pair, work = here[0], Work(is_write=False, block_bytes=4096, batch=4)
    with pair.begin(Course(BACKEND, work)) as begun:
        assert len(begun.burst(7).wall_s) == 7
        assert len(begun.burst(7, 0.0).wall_s) == 1


def test_a_lease_is_given_back(here: tuple[Pair, Initiator, Target]) -> None:
    pair, initiator, target = here
    work = Work(is_write=False, block_bytes=4096, batch=4)
    with pair.begin(Course(BACKEND, work)) as begun:
        token = begun.token
        assert target._leases
    assert not target._leases
    assert not initiator._courses
    with pytest.raises(StaleReference):
        pair.initiator.ask(do="prepare", token=token, **Course(BACKEND, work).shape())


def test_submitting_is_timed_anew_and_prepared(here: tuple[Pair, Initiator, Target]) -> None:
    anew, prepared = here[0].posts(Work(is_write=False, block_bytes=64, batch=1000), BACKEND, 3)
    assert len(anew) == len(prepared) == 3
    assert min(anew + prepared) > 0


def test_no_more_memory_is_lent_than_allowed() -> None:
    with pair_here(4096) as (_, _, target):
        target._bytes_max = 8192
        with pytest.raises(CapacityError, match="--memory-max"):
            target.answer({"do": "map", "num_bytes": 8193, "kind": "host"})
        target.answer({"do": "map", "num_bytes": 8192, "kind": "host"})
        with pytest.raises(UsageError, match="cannot dance"):
            target.answer({"do": "dance"})


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_two_processes_of_this_host(backend: str) -> None:
    with open_pair(backend, PairOptions(copy_threads=1)) as pair:
        pair.map(NUM_BYTES)
        for work in (WORKS[1], WORKS[4]):
            course = Course(backend, work, has_checksums=True)
            assert pair.checked(course, 1)[0] is None
            with pair.begin(course) as begun:
                sample = begun.once()
            assert sample.wall_s > 0
            assert sample.cpu_s > 0
