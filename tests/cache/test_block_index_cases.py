"""The native block index in single situations: order, recovery, memory, history, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from kvx.errors import UsageError
from kvx_ext import _core
from tests.cache.block_index_model import POLICY

NUM_KEYS = 24
KEYS = np.random.default_rng(7).integers(0, 256, (NUM_KEYS, 16), dtype=np.uint8)
NUMBER_OF = {key.tobytes(): number for number, key in enumerate(KEYS)}
REASON = _core.RemovalReason


def numbers(keys: np.ndarray) -> list[int]:
    """Turn rows of keys back into their numbers."""
    return [NUMBER_OF[key.tobytes()] for key in keys]


def filled(policy: _core.EvictionPolicy, count: int) -> _core.BlockIndex:
    """An index of `count` slots that holds the first keys."""
    index = _core.BlockIndex(policy, None)
    index.add_slots(0, count)
    index.insert(KEYS[:count], np.zeros(count, np.uint64), 0, 0, 0)
    return index


def test_an_index_without_slots_knows_of_nothing() -> None:
    index = _core.BlockIndex(POLICY.LRU, None)
    assert not index.inspect(KEYS, 0).any()
    assert not index.lookup(KEYS, 0, True, True)[0].any()
    assert index.match(KEYS, 0, True, True)[0] == 0
    assert len(index.remove(KEYS, 3)[0]) == 0
    index.check_integrity()


def test_the_head_of_a_prefix_outlives_its_tail() -> None:
    index = filled(POLICY.LRU, 4)
    *_, evicted = index.insert(KEYS[4:6], np.zeros(2, np.uint64), 0, 0, 0)
    assert numbers(evicted) == [3, 2]


def test_restore_brings_back_order_frequencies_and_places() -> None:
    source = filled(POLICY.LFU, 8)
    source.lookup(KEYS[[5, 2, 5]], 0, True, False)
    saved = source.snapshot()
    index = _core.BlockIndex(POLICY.LFU, None)
    index.add_slots(0, 8)
    names = ("keys", "slots", "generations", "checksums", "freqs", "expiry_s", "owners")
    assert index.restore(*(saved[name] for name in names)).all()
    assert not index.restore(*(saved[name] for name in names)).any()
    index.check_integrity()
    again = index.snapshot()
    for name in (*names, "pins", "dirty"):
        assert again[name].tolist() == saved[name].tolist(), name


@pytest.mark.parametrize("policy", list(POLICY))
def test_a_million_slots_cost_at_most_64_bytes_each(
    policy: _core.EvictionPolicy,
) -> None:
    count = 1_000_000
    keys = np.random.default_rng(3).integers(0, 256, (count, 16), dtype=np.uint8)
    index = _core.BlockIndex(policy, None)
    index.add_slots(0, count)
    for at in range(0, count, 4096):
        batch = keys[at : at + 4096]
        index.insert(batch, np.zeros(len(batch), np.uint64), 0, 0, 0)
    stats = index.stats()
    assert stats["committed"] == count
    assert stats["memory_bytes"] / count <= 64
    index.check_integrity()


def test_history_is_right_for_the_last_half_of_its_capacity() -> None:
    history = _core.MissHistory(20_000)
    index = _core.BlockIndex(POLICY.FIFO, history)
    index.add_slots(0, 100)
    keys = np.random.default_rng(5).integers(0, 256, (60_100, 16), dtype=np.uint8)
    for at in range(0, len(keys), 100):
        index.insert(keys[at : at + 100], np.zeros(100, np.uint64), 0, 0, 0)
    remembered = history.why(keys[-100 - history.capacity // 2 : -100]) == int(REASON.EVICTED)
    assert remembered.mean() >= 0.99
    never = np.random.default_rng(6).integers(0, 256, (20_000, 16), dtype=np.uint8)
    assert (history.why(never) == int(REASON.NEVER_STORED)).mean() >= 0.9999


def test_long_runs_of_the_hash_map_survive_insertion_and_removal() -> None:
    # 60 keys whose hashes share their upper half: one home bucket, distances beyond the 4 bits
    # that a bucket holds.
    count = 60
    inverse = pow(0x9E3779B97F4A7C15, -1, 1 << 64)
    low = [((7 << 32 | i) * inverse) % (1 << 64) for i in range(count)]
    keys = np.zeros((count, 16), np.uint8)
    keys[:, :8] = np.array(low, np.uint64)[:, None].view(np.uint8)
    index = _core.BlockIndex(POLICY.LRU, None)
    index.add_slots(0, 64)
    rng = np.random.default_rng(9)
    for _ in range(50):
        index.insert(keys[rng.permutation(count)], np.zeros(count, np.uint64), 0, 0, 0)
        index.check_integrity()
        gone = rng.permutation(count)[:30]
        index.remove(keys[gone], int(REASON.DROPPED))
        index.check_integrity()
        found, *_ = index.lookup(keys, 0, False, False)
        assert set(np.flatnonzero(~found).tolist()) == set(gone.tolist())


def test_wrong_arguments_are_refused() -> None:
    index = filled(POLICY.LRU, 4)
    with pytest.raises(UsageError, match="in the pool already"):
        index.add_slots(3, 2)
    with pytest.raises(UsageError, match="numbered"):
        index.add_slots(-1, 1)
    with pytest.raises(UsageError, match="not in the pool"):
        index.retire_slots(2, 5)
    with pytest.raises(UsageError, match="rows"):
        index.insert(KEYS[:2], np.zeros(3, np.uint64), 0, 0, 0)
    with pytest.raises(UsageError, match="add up"):
        index.match_many(KEYS[:2], np.array([3], np.int64), 0)
    with pytest.raises(UsageError, match="no prefix"):
        index.match_many(KEYS[:2], np.array([1], np.int64), 0)
    with pytest.raises(UsageError, match="reason"):
        index.remove(KEYS[:1], 0)
    with pytest.raises(UsageError, match="1 to 2"):
        _core.MissHistory(0)


def test_pins_saturate_without_harm() -> None:
    index = filled(POLICY.LRU, 2)
    _, slots, generations, _ = index.match(KEYS[:1], 0, False, False)
    many = 65535
    assert index.pin(np.repeat(slots, many), np.repeat(generations, many)).all()
    assert not index.pin(slots, generations).any()
    with pytest.raises(UsageError, match="65535 pins"):
        index.match(KEYS[:1], 0, False, True)
    index.check_integrity()
