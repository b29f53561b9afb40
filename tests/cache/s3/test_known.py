"""What is remembered of objects, what of a bucket's bytes, and how a prefix is searched."""

from __future__ import annotations

import functools
import hashlib
import math
import random

import numpy as np
import pytest

from kvx.cache.s3.known import KnownObjects
from kvx.cache.s3.ledger import Ledger
from kvx.cache.s3.search import PROBES, PrefixSearch
from kvx.cache.s3.store import ObjectFacts

WIDTH = 4


@functools.cache
def keys_of(group: int) -> np.ndarray:
    """Return the (WIDTH, 16) keys of a group, different for each."""
    digests = [
        hashlib.blake2b(f"{group}/{place}".encode(), digest_size=16).digest()
        for place in range(WIDTH)
    ]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(WIDTH, 16)


@pytest.mark.parametrize("stored", [0, 1, 2, 5, 63, 64, 200, 1000])
@pytest.mark.parametrize("total", [1, 2, 64, 65, 1000])
def test_a_search_finds_the_length_in_few_rounds(stored: int, total: int) -> None:
    stored = min(stored, total)
    search = PrefixSearch(0, total)
    rounds = 0
    while not search.is_over:
        probes = search.probes()
        assert 0 < len(probes) <= PROBES
        assert probes[0] == search.num_stored, "the first in doubt is always asked for"
        for group in probes:
            search.note(group, is_stored=group < stored)
        rounds += 1
    assert search.num_stored == stored
    assert rounds <= 1 + math.ceil(math.log(total, PROBES - 1))


def test_a_search_ends_whatever_it_is_told() -> None:
    for seed in range(200):
        chance = random.Random(seed)
        search = PrefixSearch(chance.randrange(5), 5 + chance.randrange(300))
        for _ in range(100):
            if search.is_over:
                break
            for group in search.probes():
                search.note(group, is_stored=chance.random() < 0.6)
        assert search.is_over, f"seed {seed}"


def test_known_objects_against_a_model() -> None:
    for seed in range(20):
        chance = random.Random(seed)
        now = [0.0]
        known = KnownObjects(WIDTH, 1 << 12, 10.0, clock=lambda now=now: now[0])
        stored: set[int] = set()
        absent: dict[int, float] = {}
        for _ in range(300):
            group = chance.randrange(40)
            match chance.randrange(5):
                case 0 | 1:
                    known.add(keys_of(group)[None])
                    stored.add(group)
                    absent.pop(group, None)
                case 2:
                    place = chance.randrange(WIDTH)
                    gone = known.forget(keys_of(group)[place : place + 1])
                    assert gone == ([keys_of(group)[-1].tobytes()] if group in stored else [])
                    stored.discard(group)
                case 3:
                    known.note_absent(keys_of(group)[-1].tobytes())
                    absent[group] = now[0] + 10.0
                case 4:
                    now[0] += chance.random() * 5
            every = np.concatenate([keys_of(one) for one in range(40)])
            found = known.find(every)
            assert found.mask.tolist() == [one // WIDTH in stored for one in range(160)], seed
            for row in np.flatnonzero(found.mask).tolist():
                assert found.places[row] == row % WIDTH
                held = known.keys_of(int(found.groups[row]))
                assert (held == keys_of(row // WIDTH)).all()
            last = [keys_of(one)[-1].tobytes() for one in range(40)]
            assert known.is_absent(last) == [absent.get(one, 0.0) > now[0] for one in range(40)]


def test_known_objects_are_bounded_and_the_oldest_go() -> None:
    known = KnownObjects(WIDTH, 1000, 10.0)
    for group in range(3000):
        known.add(keys_of(group)[None])
    has = known.has(np.stack([keys_of(group)[-1] for group in range(3000)]))
    assert len(known) <= 1000
    assert has[-500:].all()
    assert not has[:1500].any()


def facts(name: str, size: int, at: float) -> ObjectFacts:
    return ObjectFacts(name, size, at)


def test_a_ledger_lets_the_coldest_go_down_to_its_low_water() -> None:
    ledger = Ledger(1000, 0, is_touched=True)
    for number in range(12):
        ledger.stored(f"o{number}", 100, float(number))
    ledger.used("o0")
    due = ledger.due(100.0, 100)
    assert due == ["o1", "o2", "o3"], "down to 95 % of 1000 bytes"
    ledger.forget(due)
    assert ledger.used_bytes == 900
    assert ledger.due(100.0, 100) == []


def test_a_ledger_lets_expired_objects_go() -> None:
    ledger = Ledger(None, 10, is_touched=True)
    ledger.listed([facts("old", 5, 100.0), facts("new", 5, 108.0)])
    assert ledger.due(112.0, 10) == ["old"]
    ledger.stored("old", 5, 111.0)
    assert ledger.due(112.0, 10) == []


def test_a_ledger_follows_a_listing() -> None:
    ledger = Ledger(10_000, 0, is_touched=True)
    ledger.stored("ours", 10, 50.0)
    ledger.listed([facts("b", 10, 20.0), facts("a", 10, 10.0)])
    ledger.sort()
    ledger.capacity_bytes = 15
    assert ledger.due(99.0, 10) == ["a", "b"]
    ledger.keep_only({"b"}, before_s=40.0)
    assert ledger.used_bytes == 20, "what is stored after the listing began stays"
    ledger.keep_only(set(), before_s=60.0)
    assert (len(ledger), ledger.used_bytes) == (0, 0)


def test_a_ledger_without_bounds_remembers_nothing() -> None:
    ledger = Ledger(None, 0, is_touched=True)
    ledger.stored("one", 10, 1.0)
    assert not ledger.is_kept
    assert len(ledger) == 0
