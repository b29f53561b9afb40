"""The scheduler's half over ranks that answer as the test says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key

import kvx
from kvx_vllm import manager as module
from kvx_vllm.manager import KvxManager
from kvx_vllm.pd.handoff import Handoff
from kvx_vllm.settings import Settings
from kvx_vllm.specs import LoadFailure

HIT, MISS, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.RETRY
SETTINGS = Settings.of({"config": {"tiers": [{"kind": "dram", "capacity": "1MiB"}]}})
HASHES = [bytes([number]) * 32 for number in range(8)]
NONE, DRAM = kvx.TierKind.NONE, kvx.TierKind.DRAM


class Bench:
    """A manager of two groups, of 32 and of 64 tokens a block; hashes are of 32 tokens."""

    def __init__(self) -> None:
        self.held: list[kvx.TierKind] = [DRAM] * len(HASHES)
        self.is_final = True
        self.life = 0
        self.asked: list[tuple[int, int, int]] = []
        groups = [
            SimpleNamespace(group_id=number, tokens_per_block=tokens)
            for number, tokens in ((0, 32), (3, 64))
        ]
        config = SimpleNamespace(
            groups=groups, cache=SimpleNamespace(tokens_per_hash=32),
            parallel=SimpleNamespace(world_size=1),
        )  # fmt: skip
        self.manager = KvxManager(config, SETTINGS, self, Handoff(None, SETTINGS))  # type: ignore[arg-type]
        self.context = ReqContext("r")
        self.manager.on_new_request(self.context)
        for number, group in enumerate(groups):
            per_block = group.tokens_per_block // 32
            for place, one in enumerate(HASHES[per_block - 1 :: per_block]):
                key = make_offload_key(one, group.group_id)  # type: ignore[arg-type]
                end = (place + 1) * group.tokens_per_block
                self.context.set_offload_key_position(key, end)
            del number

    def locate(self, group: int, hashes: list[bytes], first: int) -> kvx.Location:
        """Stand in for the ranks."""
        self.asked.append((group, len(hashes), first))
        tiers = np.array(self.held[first : len(hashes)], np.uint8)
        return kvx.Location(tiers, kvx.MissReason.EVICTED, self.is_final)

    def begin(self, num_computed: int = 0) -> None:
        self.manager.begin_lookup("r", HASHES, num_computed)

    def find(self, place: int, group: int = 0) -> LookupResult:
        key = make_offload_key(HASHES[place], group)  # type: ignore[arg-type]
        return self.manager.lookup(key, self.context)


def test_ranks_are_asked_once_for_a_group() -> None:
    bench = Bench()
    bench.held[5] = NONE
    bench.begin(64)
    assert [bench.find(place) for place in range(2, 8)] == [HIT, HIT, HIT, MISS, HIT, HIT]
    assert [bench.find(place, group=3) for place in (3, 5, 7)] == [HIT, HIT, HIT]
    assert bench.asked == [(0, 8, 2), (1, 4, 1)]
    assert bench.find(0) is MISS, "the engine has it: nobody should ask"


def test_a_producer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, handoff = Bench(), Handoff(None, SETTINGS)
    monkeypatch.setattr(bench.manager, "_handoff", handoff)
    bench.held[4:] = [NONE, kvx.TierKind.PEER, NONE, NONE]
    bench.begin(64)
    assert [bench.find(place) for place in range(2, 8)] == [HIT, HIT, MISS, HIT, MISS, MISS]
    # It has not said yet what it holds; what a peer has may be evicted there until it has.
    monkeypatch.setattr(handoff, "is_pending", lambda _: True)
    monkeypatch.setattr(handoff, "expects", lambda *_: True)
    assert [bench.find(place) for place in range(2, 8)] == [HIT, HIT, RETRY, RETRY, RETRY, RETRY]
    # It holds number 6 of group 0, and number 3 of the other one.
    held = {(0, 6), (1, 3)}
    monkeypatch.setattr(handoff, "is_pending", lambda _: False)
    monkeypatch.setattr(handoff, "expects", lambda _, *block: block in held)
    assert [bench.find(place) for place in range(2, 8)] == [HIT, HIT, MISS, HIT, RETRY, MISS]
    bench.held[3] = NONE
    bench.begin(64)
    assert [bench.find(place, group=3) for place in (3, 5, 7)] == [HIT, HIT, RETRY]


def test_what_failed_is_not_found_again_by_the_same_request() -> None:
    bench = Bench()
    bench.begin()
    assert bench.find(0) is HIT
    bench.manager.note_failures([LoadFailure("r", 0, [HASHES[0]], ["corrupt"])])
    bench.begin()
    assert bench.find(0) is MISS
    assert bench.find(1) is HIT
    other = ReqContext("other")
    bench.manager.on_new_request(other)
    bench.manager.begin_lookup("other", HASHES, 0)
    key = make_offload_key(HASHES[0], 0)  # type: ignore[arg-type]
    other.set_offload_key_position(key, 32)
    assert bench.manager.lookup(key, other) is HIT


def test_a_group_forgets_only_its_own_failures() -> None:
    bench = Bench()
    bench.manager.note_failures([LoadFailure("r", 1, [HASHES[1]], ["corrupt"])])
    bench.begin()
    assert bench.find(1, group=3) is MISS
    assert bench.find(1) is HIT


def test_failures_of_requests_that_are_gone() -> None:
    bench = Bench()
    bench.manager.on_request_finished(bench.context)
    bench.manager.note_failures([LoadFailure("r", 0, [HASHES[0]], ["corrupt"])])
    bench.begin()
    assert not bench.manager._requests


def test_s3_is_waited_for_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, clock = Bench(), [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    bench.is_final, bench.held[3:] = False, [NONE] * 5
    bench.begin()
    assert [bench.find(place) for place in (2, 3)] == [HIT, RETRY]
    clock[0] += SETTINGS.lookup_deadline_s / 2
    bench.begin()
    assert bench.find(3) is RETRY
    clock[0] += SETTINGS.lookup_deadline_s
    bench.begin()
    assert [bench.find(place) for place in (2, 3)] == [HIT, MISS]


def test_partial_tails_are_neither_found_nor_stored() -> None:
    bench = Bench()
    bench.begin()
    tail = make_offload_key(b"tail" * 8, 3)  # type: ignore[arg-type]
    bench.context.set_offload_key_position(tail, 96)  # one and a half blocks
    assert bench.manager.lookup(tail, bench.context) is MISS
    whole = make_offload_key(HASHES[1], 3)  # type: ignore[arg-type]
    stored = bench.manager.prepare_store([whole, tail], bench.context)
    assert stored.keys_to_store == [whole]
    assert [run.hashes for run in runs_of(stored.store_spec)] == [[HASHES[1]]]


def test_stores_are_cut_where_a_block_lacks() -> None:
    bench = Bench()
    bench.begin()
    keys: list[Any] = [make_offload_key(HASHES[place], 0) for place in (0, 1, 3)]  # type: ignore[arg-type]
    keys.append(make_offload_key(HASHES[1], 3))  # type: ignore[arg-type]
    runs = runs_of(bench.manager.prepare_store(keys, bench.context).store_spec)
    assert [(run.group, run.hashes) for run in runs] == [
        (0, HASHES[:2]),
        (0, [HASHES[3]]),
        (1, [HASHES[1]]),
    ]


def runs_of(spec: Any) -> Any:
    return spec.runs
