"""The event log: numbers without gaps, replay, snapshots, listeners, and the bytes on the wire."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvx
from kvx.cache.events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    EventLog,
    decode_event,
    encode_event,
)
from kvx.cache.reasons import MissReason
from kvx.errors import StaleReference
from tests.cache.conftest import BLOCK_BYTES, make_blocks, make_hashes, open_space

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

NAMESPACE = bytes(range(16))
ONE = bytes(range(16, 32))
TWO = bytes(range(32, 48))


def make_keys(*keys: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)


def apply(held: dict[str, set[bytes]], event: Event) -> None:
    """Do to a subscriber's picture of the cache what an event says."""
    if isinstance(event, AllBlocksCleared):
        held.clear()
        return
    keys = {event.keys[at : at + 16] for at in range(0, len(event.keys), 16)}
    if isinstance(event, BlockStored):
        held.setdefault(event.tier, set()).update(keys)
    else:
        held.setdefault(event.tier, set()).difference_update(keys)


def as_sets(held: dict[str, npt.NDArray[np.uint8]]) -> dict[str, set[bytes]]:
    return {tier: {key.tobytes() for key in keys} for tier, keys in held.items() if len(keys)}


def without_empty(held: dict[str, set[bytes]]) -> dict[str, set[bytes]]:
    return {tier: keys for tier, keys in held.items() if keys}


def publish(log: EventLog, count: int) -> None:
    for _ in range(count):
        log.cleared()


def test_numbers_go_up_by_one() -> None:
    log = EventLog(10)
    assert log.last_sequence == 0
    assert log.replay(1) == []
    log.stored(make_keys(ONE, TWO), "dram", NAMESPACE)
    log.removed(make_keys(TWO), "dram", MissReason.EVICTED)
    log.cleared()
    assert log.last_sequence == 3
    assert log.replay(1) == [
        BlockStored(1, "dram", NAMESPACE, ONE + TWO),
        BlockRemoved(2, "dram", "evicted", TWO),
        AllBlocksCleared(3),
    ]
    assert log.replay(3) == [AllBlocksCleared(3)]
    assert log.replay(4) == []


def test_what_is_forgotten_is_a_stale_reference() -> None:
    log = EventLog(3)
    for _ in range(5):
        log.cleared()
    assert [event.sequence for event in log.replay(3)] == [3, 4, 5]
    with pytest.raises(StaleReference, match="from 2 on were asked for, the oldest kept is 3"):
        log.replay(2)
    with pytest.raises(StaleReference, match="snapshot"):
        log.replay(0)


def test_a_number_from_before_a_restart_is_stale_too() -> None:
    """A subscriber that knows of event 1000 must not believe it missed nothing."""
    log = EventLog(3)
    log.cleared()
    assert log.replay(2) == []
    with pytest.raises(StaleReference, match="the next will be 2"):
        log.replay(1000)


@given(st.integers(1, 8), st.integers(0, 20), st.integers(-2, 25))
def test_replay_against_a_list(capacity: int, count: int, start: int) -> None:
    log = EventLog(capacity)
    for _ in range(count):
        log.cleared()
    kept = list(range(max(1, count - capacity + 1), count + 1))
    if start == count + 1 or start in kept:
        assert [event.sequence for event in log.replay(start)] == [n for n in kept if n >= start]
    else:
        with pytest.raises(StaleReference):
            log.replay(start)


def test_listeners_hear_until_they_end() -> None:
    log = EventLog(10)
    heard: list[int] = []
    end = log.subscribe(lambda event: heard.append(event.sequence))
    log.cleared()
    log.cleared()
    end()
    end()
    log.cleared()
    assert heard == [1, 2]


def test_a_listener_may_replay_and_end_itself() -> None:
    log = EventLog(10)
    ends: list[Callable[[], None]] = []

    def listener(event: Event) -> None:
        assert log.replay(event.sequence) == [event]
        ends[0]()

    ends.append(log.subscribe(listener))
    log.cleared()
    log.cleared()
    assert log.last_sequence == 2


def test_a_failing_listener_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(10)
    heard: list[Event] = []

    def fail(event: Event) -> None:
        raise RuntimeError(f"no room for {event.sequence}")

    log.subscribe(fail)
    log.subscribe(heard.append)
    with caplog.at_level(logging.ERROR):
        log.cleared()
    assert heard == [AllBlocksCleared(1)]
    assert "no room for 1" in caplog.text


def test_a_change_is_told_when_it_is_over() -> None:
    """Events are numbered inside the step and delivered behind it, where listeners may do more."""
    log = EventLog(10)
    heard: list[int] = []

    def listener(event: Event) -> None:
        heard.append(event.sequence)
        with log.changing():
            pass

    log.subscribe(listener)
    with log.changing():
        log.cleared()
        log.cleared()
        assert log.last_sequence == 2
        assert heard == []
    assert heard == [1, 2]
    log.cleared()
    assert heard == [1, 2, 3]


def test_threads_share_the_numbers() -> None:
    log = EventLog(10_000)
    heard: list[int] = []
    log.subscribe(lambda event: heard.append(event.sequence))
    threads = [threading.Thread(target=lambda: publish(log, 500)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.sequence for event in log.replay(1)] == list(range(1, 2001))
    assert sorted(heard) == list(range(1, 2001))


@pytest.mark.parametrize(
    ("event", "wire"),
    [
        (
            BlockStored(7, "dram", NAMESPACE, ONE + TWO),
            b"\x95\xabBlockStored\x07\xa4dram\xc4\x10" + NAMESPACE + b"\xc4\x20" + ONE + TWO,
        ),
        (
            BlockRemoved(300, "nvme", "evicted", ONE),
            b"\x95\xacBlockRemoved\xcd\x01\x2c\xa4nvme\xa7evicted\xc4\x10" + ONE,
        ),
        (AllBlocksCleared(1 << 32), b"\x92\xb0AllBlocksCleared\xcf\0\0\0\x01\0\0\0\0"),
    ],
)
def test_golden_bytes(event: Event, wire: bytes) -> None:
    """Subscribers are other programs: these are the bytes of docs/formats/events.md."""
    assert encode_event(event) == wire
    assert decode_event(wire) == event


@pytest.mark.parametrize("data", [b"", b"\x90", b"\x91\xa1x", b"\x92\xabBlockStored\x07", b"\xc0"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_event(data)


def test_a_later_version_may_append_fields() -> None:
    """Decoders ignore what comes behind the fields they know."""
    assert decode_event(b"\x93\xb0AllBlocksCleared\x05\xa3new") == AllBlocksCleared(5)


def test_snapshot_and_replay_follow_a_cache(open_cache: Callable[..., kvx.TieredCache]) -> None:
    """Whoever starts from any snapshot and replays has the cache's own picture of itself."""
    cache = open_cache(has_hbm=False)
    space = open_space(cache)
    assert cache.events.snapshot().sequence == 0
    snapshots = []
    for start in range(0, 400, 80):
        space.offload(make_hashes(80, first=start), make_blocks(80, first=start)).wait()
        snapshots.append(cache.events.snapshot())
        space.drop(make_hashes(5, first=start))
    assert cache.flush(10.0)
    target = np.zeros((60, BLOCK_BYTES), np.uint8)
    space.onboard(make_hashes(60, first=100), target).wait()
    wanted = as_sets(cache.snapshot())
    assert set(wanted) == {"dram", "nvme"}
    for snapshot in snapshots:
        held = as_sets(snapshot.keys)
        for event in cache.events.replay(snapshot.sequence + 1):
            apply(held, event)
        assert without_empty(held) == wanted
    cache.clear()
    apply(held, cache.events.replay(cache.events.last_sequence)[0])
    assert without_empty(held) == as_sets(cache.events.snapshot().keys) == {}


def test_events_name_the_namespace(open_cache: Callable[..., kvx.TieredCache]) -> None:
    cache = open_cache(has_nvme=False, has_hbm=False)
    space = open_space(cache)
    heard: list[Event] = []
    cache.events.subscribe(heard.append)
    space.offload(make_hashes(2), make_blocks(2)).wait()
    (stored,) = heard
    assert isinstance(stored, BlockStored)
    assert stored.namespace == space.namespace.public_id
    assert stored.keys == space.namespace.keys(make_hashes(2)).tobytes()


def test_blocks_arrive_although_a_listener_fails(
    open_cache: Callable[..., kvx.TieredCache],
) -> None:
    cache = open_cache(has_nvme=False, has_hbm=False)

    def fail(event: Event) -> None:
        raise RuntimeError(event.sequence)

    cache.events.subscribe(fail)
    result = open_space(cache).offload(make_hashes(2), make_blocks(2)).wait(timeout_s=5)
    assert result.num_blocks == 2
