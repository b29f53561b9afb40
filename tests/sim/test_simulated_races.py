"""What the simulated CUDA driver convicts of, each beside the sequence that is sound.

Every sound sequence leaves no conviction: the fixture asserts it at the end of each test.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from tests.sim.cuda_calls import (
    ANY,
    DURING_CALL,
    GRANULARITY,
    STREAM,
    DriverCalls,
    DriverError,
    until,
)
from tests.sim.cuda_driver import Engine, SimulatedDriver

KIB = 1 << 10
SLOT = 4 * KIB
NUM_SLOTS = 8


class Bench:
    """A device and a host arena of a few slots, two streams, and the driver's opinion."""

    def __init__(self, driver: SimulatedDriver) -> None:
        self.driver = driver
        self.calls = DriverCalls(driver)
        self.device = self.calls.allocate(NUM_SLOTS * SLOT)
        self.memory = self.calls.pinned(NUM_SLOTS * SLOT)
        self.host = self.memory.address
        self.streams = [self.calls.stream(), self.calls.stream()]

    def onboard(self, slot: int, stream: int = 0, *, order: int = STREAM) -> None:
        """Copy a slot from the host to the device, in a batch of two pieces."""
        start, half = slot * SLOT, SLOT // 2
        pieces = [(self.device + at, self.host + at, half) for at in (start, start + half)]
        self.calls.copy_batch(pieces, self.streams[stream], order=order)

    def offload(self, slot: int, stream: int = 0) -> None:
        at = slot * SLOT
        self.calls.copy(self.host + at, self.device + at, SLOT, self.streams[stream])

    def order(self, first: int, then: int) -> None:
        """Make a stream wait for what the other one has by now."""
        self.calls.wait_event(self.streams[then], self.calls.record(self.streams[first]))

    def touch(self, slot: int, *, is_write: bool) -> None:
        self.driver.host_access(self.host + slot * SLOT, SLOT, is_write=is_write)

    def finish(self) -> list[str]:
        """Wait for everything; what it came to."""
        for stream in self.streams:
            self.calls.synchronize(stream)
        return self.driver.take_convictions()


@pytest.fixture(params=range(3))
def bench(simulated_driver: SimulatedDriver, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Three orders within batches."""
    simulated_driver.set_shuffle_seed(request.param)
    yield Bench(simulated_driver)
    # Whatever a test still has frozen.
    for engine in Engine:
        simulated_driver.thaw(engine)


@pytest.mark.parametrize("is_sound", [True, False])
def test_streams_must_wait_for_each_other(bench: Bench, is_sound: bool) -> None:
    bench.onboard(0, stream=0)
    if is_sound:
        bench.order(first=0, then=1)
    bench.offload(0, stream=1)
    assert bench.finish() == ([] if is_sound else ["race"])


@pytest.mark.parametrize("is_sound", [True, False])
def test_an_event_covers_only_what_came_before_it(bench: Bench, is_sound: bool) -> None:
    event = bench.calls.event()
    bench.onboard(0, stream=0)
    bench.calls.call("cuEventRecord", event, bench.streams[0])
    bench.onboard(1, stream=0)
    bench.calls.wait_event(bench.streams[1], event)
    bench.offload(0 if is_sound else 1, stream=1)
    assert bench.finish() == ([] if is_sound else ["race"])


def test_order_is_passed_on(bench: Bench) -> None:
    bench.streams.append(bench.calls.stream())
    bench.onboard(0, stream=0)
    bench.order(first=0, then=1)
    bench.order(first=1, then=2)
    bench.offload(0, stream=2)
    assert bench.finish() == []


@pytest.mark.parametrize(
    ("order", "expected"), [(STREAM, []), (ANY, ["race"]), (DURING_CALL, ["race"])]
)
def test_an_early_read_is_before_what_the_stream_waits_for(
    bench: Bench, order: int, expected: list[str]
) -> None:
    bench.offload(0, stream=0)
    bench.order(first=0, then=1)
    bench.onboard(0, stream=1, order=order)
    assert bench.finish() == expected


@pytest.mark.parametrize(("order", "expected"), [(STREAM, []), (ANY, ["race"])])
def test_an_early_read_is_not_even_after_its_own_stream(
    bench: Bench, order: int, expected: list[str]
) -> None:
    bench.offload(0)
    until(lambda: bench.driver.count("bytes_d2h") >= SLOT)
    bench.onboard(0, order=order)
    assert bench.finish() == expected


@pytest.mark.parametrize("order", [STREAM, DURING_CALL, ANY])
def test_a_final_source_may_be_read_early(bench: Bench, order: int) -> None:
    bench.offload(0)
    bench.calls.synchronize(bench.streams[0])
    bench.onboard(0, order=order)
    assert bench.finish() == []


@pytest.mark.parametrize("order", [STREAM, DURING_CALL, ANY])
def test_a_source_stays_until_the_copy_has_read_it(bench: Bench, order: int) -> None:
    bench.touch(0, is_write=True)
    bench.onboard(0, order=order)
    bench.touch(0, is_write=True)
    assert bench.finish() == ([] if order == DURING_CALL else ["race"])


@pytest.mark.parametrize("how", ["nothing", "stream", "event", "query", "stream query"])
def test_the_host_reads_when_it_knows(bench: Bench, how: str) -> None:
    bench.offload(0)
    event = bench.calls.record(bench.streams[0])
    if how == "stream":
        bench.calls.synchronize(bench.streams[0])
    elif how == "event":
        bench.calls.call("cuEventSynchronize", event)
    elif how == "query":
        until(lambda: bench.calls.is_ready("cuEventQuery", event))
    elif how == "stream query":
        until(lambda: bench.calls.is_ready("cuStreamQuery", bench.streams[0]))
    bench.touch(0, is_write=False)
    assert bench.finish() == (["race"] if how == "nothing" else [])


def test_the_host_reads_beside_a_copy_that_reads(bench: Bench) -> None:
    bench.onboard(0)
    bench.touch(0, is_write=False)
    bench.touch(1, is_write=True)
    assert bench.finish() == []


@pytest.mark.parametrize("side", ["host", "device"])
@pytest.mark.parametrize("is_sound", [True, False])
def test_a_slot_is_not_taken_before_it_was_read(bench: Bench, side: str, is_sound: bool) -> None:
    other = bench.calls.allocate(SLOT)
    reader = (other, bench.host) if side == "host" else (bench.host + SLOT, bench.device)
    writer = (bench.host, bench.device + SLOT) if side == "host" else (bench.device, other)
    bench.calls.copy(*reader, SLOT, bench.streams[0])
    if is_sound:
        bench.order(first=0, then=1)
    bench.calls.copy(*writer, SLOT, bench.streams[1])
    assert bench.finish() == ([] if is_sound else ["race"])


def test_copies_of_one_batch_have_no_order(bench: Bench) -> None:
    overlapping = [(bench.device, bench.host, 64), (bench.device + 32, bench.host + 64, 64)]
    bench.calls.copy_batch(overlapping, bench.streams[0])
    assert bench.finish() == ["race"]
    bench.calls.copy(bench.device, bench.host, 64, bench.streams[0])
    bench.calls.copy(bench.device + 32, bench.host + 64, 64, bench.streams[0])
    assert bench.finish() == []


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_word_orders_what_lies_around_it(bench: Bench, is_announced: bool) -> None:
    words = bench.calls.pinned(SLOT)
    # The stream waits for the host, the host for the stream.
    bench.calls.wait_value(bench.streams[0], words.address, 1)
    bench.onboard(0)
    bench.offload(0)
    bench.calls.write_value(bench.streams[0], words.address + 4, 1)
    bench.touch(0, is_write=True)
    words.data[0] = 1
    until(lambda: words.data[4] == 1)
    if is_announced:
        bench.driver.host_access(words.address + 4, 4, is_write=False)
    bench.touch(0, is_write=False)
    assert bench.finish() == ([] if is_announced else ["race"])


@pytest.mark.parametrize("is_announced", [True, False])
@pytest.mark.parametrize("is_sound", [True, False])
def test_a_stream_is_released_by_who_knows(
    bench: Bench, is_sound: bool, is_announced: bool
) -> None:
    words = bench.calls.pinned(SLOT)
    bench.onboard(0)
    bench.calls.wait_value(bench.streams[1], words.address, 1)
    bench.offload(0, stream=1)
    if is_sound:
        bench.calls.synchronize(bench.streams[0])
    if is_announced:
        bench.driver.host_access(words.address, 4, is_write=True)
    words.data[0] = 1
    # What the host learns from now on comes too late, if it has said when it wrote.
    bench.calls.synchronize(bench.streams[0 if is_announced else 1])
    assert bench.finish() == ([] if is_sound else ["race"])


@pytest.mark.parametrize("kind", ["allocation", "registration", "mapping"])
@pytest.mark.parametrize("is_sound", [True, False])
def test_memory_in_use_is_not_let_go(bench: Bench, kind: str, is_sound: bool) -> None:
    calls, stream = bench.calls, bench.streams[0]
    device, host = bench.device, bench.host
    if kind == "mapping":
        device = calls.number("cuMemAddressReserve", GRANULARITY, 0, 0, 0)
        calls.call("cuMemMap", device, GRANULARITY, 0, calls.create_memory(), 0)
        calls.set_access(device)
    bench.driver.freeze(Engine.HOST_TO_DEVICE)
    calls.copy(device, host, SLOT, stream)
    if is_sound:
        bench.driver.thaw(Engine.HOST_TO_DEVICE)
        calls.synchronize(stream)
    # The call waits for the copy: the memory outlives it.
    timer = threading.Timer(0.02, bench.driver.thaw, [Engine.HOST_TO_DEVICE])
    timer.start()
    if kind == "allocation":
        calls.call("cuMemFree", device)
    elif kind == "mapping":
        calls.call("cuMemUnmap", device, GRANULARITY)
    else:
        calls.call("cuMemHostUnregister", host)
    assert is_sound or calls.is_ready("cuStreamQuery", stream)
    timer.join()
    assert bench.finish() == ([] if is_sound else ["free_in_flight"])


def test_a_copy_that_ended_unseen_may_still_run(bench: Bench) -> None:
    bench.calls.copy(bench.device, bench.host, SLOT, bench.streams[0])
    until(lambda: bench.driver.count("bytes_h2d") >= SLOT)
    bench.calls.call("cuMemFree", bench.device)
    assert bench.finish() == ["free_in_flight"]


def test_the_null_stream_is_not_used(bench: Bench) -> None:
    bench.calls.copy(bench.device, bench.host, SLOT, 0)
    bench.calls.synchronize(0)
    assert bench.driver.take_convictions() == ["null_stream"]
    bench.driver.reset()


def test_a_copy_stays_within_a_registration(bench: Bench) -> None:
    memory = bench.calls.pinned(SLOT)
    bench.calls.call("cuMemHostUnregister", memory.address)
    for at in (0, SLOT // 2):
        bench.calls.register(memory.address + at, SLOT // 2)
        bench.calls.copy(bench.device + at, memory.address + at, SLOT // 2, bench.streams[0])
    with pytest.raises(DriverError) as caught:
        bench.calls.copy(bench.device, memory.address, SLOT, bench.streams[0])
    assert caught.value.result == 1
    assert bench.finish() == ["spans_registrations"]


@pytest.mark.parametrize("wrong", ["past the end", "freed", "nowhere", "no access", "host nowhere"])
def test_a_wrong_address_ends_the_context(bench: Bench, wrong: str) -> None:
    calls = bench.calls
    target, source = bench.device, bench.host
    if wrong == "past the end":
        target += NUM_SLOTS * SLOT - 1
    elif wrong == "freed":
        calls.call("cuMemFree", target)
    elif wrong == "nowhere":
        target += 1 << 30
    elif wrong == "host nowhere":
        source = 4096
    else:
        target = calls.number("cuMemAddressReserve", GRANULARITY, 0, 0, 0)
        calls.call("cuMemMap", target, GRANULARITY, 0, calls.create_memory(), 0)
    for _ in range(2):
        assert calls.result("cuMemcpyAsync", target, source, 64, bench.streams[0]) == 700
    expected = "no_access" if wrong == "no access" else "illegal_address"
    assert bench.driver.take_convictions() == [expected]


def test_a_conviction_names_both(bench: Bench) -> None:
    bench.onboard(0)
    # Not back to the host slot, which would be a second race, and one of the two is reported.
    bench.calls.copy(bench.host + SLOT, bench.device, SLOT // 2, bench.streams[1])
    for stream in bench.streams:
        bench.calls.synchronize(stream)
    (text,) = bench.driver.convictions()
    bench.driver.clear_convictions()
    parts = ("cuMemcpyBatchAsync", "cuMemcpyAsync", "on stream", f"{bench.device:#x}", "writes")
    assert all(part in text for part in parts), text


def test_random_sound_work_is_not_convicted(simulated_driver: SimulatedDriver) -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    simulated_driver.set_shuffle_seed(seed)
    bench = Bench(simulated_driver)
    calls = bench.calls
    bench.streams += [calls.stream() for _ in range(2)]
    # The last operation on each slot, as an event; whoever comes next waits for it one way or
    # another.
    events: dict[int, int] = {}
    for _ in range(400):
        slot, stream = rng.randrange(NUM_SLOTS), rng.randrange(len(bench.streams))
        action = rng.choice(["onboard", "offload", "host"])
        if slot in events and (action == "host" or rng.random() < 0.2):
            calls.call("cuEventSynchronize", events[slot])
        elif slot in events:
            calls.wait_event(bench.streams[stream], events[slot])
        if action == "host":
            bench.touch(slot, is_write=rng.random() < 0.5)
            continue
        getattr(bench, action)(slot, stream)
        old = events.get(slot)
        events[slot] = calls.record(bench.streams[stream])
        if old is not None:
            calls.call("cuEventDestroy", old)
    convictions = simulated_driver.convictions()
    assert bench.finish() == [], f"seed {seed}: {convictions}"
    assert simulated_driver.count("tracked_accesses") < 1000


def crowd(bench: Bench) -> None:
    """Make so many copies that the driver forgets what it may; each in a place of its own."""
    for i in range(1000):
        at = SLOT + 16 * i
        bench.calls.copy(bench.device + at, bench.host + at, 8, bench.streams[0])
        bench.calls.synchronize(bench.streams[0])


def test_what_everybody_knows_is_forgotten(bench: Bench) -> None:
    crowd(bench)
    assert bench.driver.count("tracked_accesses") < 1000


def test_what_the_host_does_not_know_is_kept(bench: Bench) -> None:
    bench.offload(0, stream=1)
    crowd(bench)
    bench.touch(0, is_write=False)
    assert bench.finish() == ["race"]


def test_what_a_queued_copy_does_not_know_is_kept(bench: Bench) -> None:
    bench.driver.freeze(Engine.DEVICE_TO_HOST)
    bench.offload(7, stream=1)
    bench.offload(0, stream=1)
    bench.onboard(0)
    crowd(bench)
    bench.driver.thaw(Engine.DEVICE_TO_HOST)
    assert bench.finish() == ["race"]


def test_a_read_does_not_hide_the_write_before_it(bench: Bench) -> None:
    bench.streams.append(bench.calls.stream())
    bench.onboard(0)
    bench.order(first=0, then=1)
    bench.calls.copy(bench.host + SLOT, bench.device, SLOT, bench.streams[1])
    until(lambda: bench.driver.count("bytes_d2h") >= SLOT)
    bench.calls.copy(bench.host + 2 * SLOT, bench.device, SLOT, bench.streams[2])
    assert bench.finish() == ["race"]
