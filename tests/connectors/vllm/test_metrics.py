"""What LLM.get_metrics says, and what ranks tell for it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvx
from kvx_vllm import metrics
from kvx_vllm.metrics import RankMeter, Tally
from kvx_vllm.specs import KvxWorkerMetadata, LoadFailure
from kvx_vllm.telling import Served, Told
from tests.connectors.vllm.below import Below, hashes_of, prompt_of, store, whole
from tests.connectors.vllm.engine import answer, open_engine, settle

CAPACITY = {"dram": 8 << 20, "nvme": 64 << 20}


@pytest.fixture(scope="module")
def below(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Below]:
    tiers = [
        {"kind": "dram", "capacity": CAPACITY["dram"]},
        {"kind": "nvme", "path": str(tmp_path_factory.mktemp("nvme")), "capacity": "64MiB"},
    ]
    with (
        pytest.MonkeyPatch.context() as patch,
        open_engine(tiny_llama, {"tiers": tiers}) as llm,
    ):
        patch.setattr(metrics, "LEVELS_EVERY_S", 0.0)
        yield Below.of(llm)


def numbers(llm: Any) -> dict[tuple[str, ...], float]:
    """Return kvx's metrics of an engine: (name without vllm:kvx_, labels by name...)."""
    found = {}
    for one in llm.get_metrics():
        if not one.name.startswith("vllm:kvx_"):
            continue
        labels = {key: value for key, value in one.labels.items() if key not in _OF_VLLM}
        value = one.count if hasattr(one, "count") else one.value
        name = one.name.removeprefix("vllm:kvx_")
        found[name, *(labels[key] for key in sorted(labels))] = value
    return found


_OF_VLLM = ("model_name", "engine")


def grown(
    after: dict[tuple[str, ...], float], before: dict[tuple[str, ...], float]
) -> dict[Any, float]:
    """Return by how much counters and histograms have grown."""
    return {
        key: value - before.get(key, 0)
        for key, value in after.items()
        if value != before.get(key, 0) and not key[0].startswith(("tier_", "in_flight"))
    }


def test_a_miss_a_hit_and_their_bytes(below: Below) -> None:
    prompt = prompt_of("metrics")
    num_bytes = len(hashes_of(below.llm, prompt)) * below.rank.groups[0].space.block_bytes
    before = numbers(below.llm)
    store(below.llm, prompt)
    stored = numbers(below.llm)
    told = grown(stored, before)
    # Written below when its turn comes, records included.
    told.pop(("bytes", "store", "nvme"), 0)
    assert told == {
        ("misses", "never_stored"): 1,
        ("bytes", "store", "dram"): num_bytes,
        ("store_seconds",): 1,
    }
    assert answer(below.llm, prompt)[1] == whole(prompt)
    settle(below.llm)
    loaded = grown(numbers(below.llm), stored)
    loaded.pop(("bytes", "store", "nvme"), 0)
    assert loaded == {
        ("hit_tokens", "dram"): whole(prompt),
        ("bytes", "load", "dram"): num_bytes,
        ("load_seconds",): 1,
    }


def test_a_failed_load_is_counted_by_reason(below: Below) -> None:
    prompt = prompt_of("metrics, damaged")
    store(below.llm, prompt)
    hashes = hashes_of(below.llm, prompt)
    below.push_down()
    damage_below(below)
    before = numbers(below.llm)
    answer(below.llm, prompt)
    settle(below.llm)
    after = grown(numbers(below.llm), before)
    assert after["load_failures", "corrupt"] == len(hashes)
    assert after["misses", "corrupt"] == 1
    assert ("hit_tokens", "nvme") not in after


def damage_below(below: Below) -> None:
    """Overwrite all that the NVMe tier holds, behind its back."""
    tiers: Any = below.rank.cache.config.tiers
    for extent in Path(tiers[1].path).rglob("*.kvx"):
        data = bytearray(extent.read_bytes())
        data[1 << 16 :] = bytes(len(data) - (1 << 16))
        extent.write_bytes(data)


def test_levels_say_what_tiers_hold(below: Below) -> None:
    store(below.llm, prompt_of("levels"))
    assert below.rank.cache.flush(10.0)
    answer(below.llm, prompt_of("levels, one step more"), max_tokens=3)
    now, stats = numbers(below.llm), below.rank.cache.stats()
    for tier, capacity in CAPACITY.items():
        assert now["tier_capacity_bytes", "0", tier] == capacity
        assert 0 < now["tier_held_bytes", "0", tier] <= stats[tier]["held_bytes"] <= capacity
    assert now["tier_breaker", "0", "nvme"] == 0
    assert now["quarantined_bytes", "0"] == 0
    settle(below.llm)
    answer(below.llm, prompt_of("levels, at rest", 20), max_tokens=3)
    now = numbers(below.llm)
    assert now["in_flight_bytes", "load", "0"] == now["in_flight_bytes", "store", "0"] == 0


def test_an_open_breaker_is_seen(below: Below) -> None:
    shared: Any = below.rank.cache._shared
    breaker = shared.nvme.breaker
    for _ in range(100):
        breaker.failure()
    answer(below.llm, prompt_of("breaker", 20), max_tokens=3)
    assert numbers(below.llm)["tier_breaker", "0", "nvme"] == 2
    breaker.success()
    answer(below.llm, prompt_of("breaker", 20), max_tokens=3)
    assert numbers(below.llm)["tier_breaker", "0", "nvme"] == 0


def test_every_metric_is_defined_as_it_is_told() -> None:
    meter = RankMeter(lambda: _STATS, rank=3)
    meter.began("load", 100)
    meter.moved("load", _result(kvx.TierKind.NVME, kvx.TierKind.DRAM), block_bytes=50)
    tally = meter.take()
    assert tally is not None
    assert tally.bytes_moved == {("nvme", "load"): 50, ("dram", "load"): 50}
    assert tally.levels[metrics.IN_FLIGHT, ("load", "3")] == 100
    assert tally.levels[metrics.BREAKER, ("s3", "3")] == 1
    gathered = metrics.Meter()
    gathered.note_tally(tally)
    gathered.note_prompt({"dram": 3, "s3": 0}, kvx.MissReason.EVICTED)
    gathered.note_failures(["deadline"])
    stats = gathered.take()
    assert stats is not None
    defined = metrics.definitions()
    for name, by_labels in stats.data["data"].items():
        for labels in by_labels:
            assert len(labels) == len(defined[name].labelnames), name
    assert gathered.take() is None


def test_bytes_written_below_are_counted_records_included(below: Below) -> None:
    assert below.rank.cache.flush(10.0)
    before = numbers(below.llm)
    store(below.llm, prompt_of("written below"))
    assert below.rank.cache.flush(10.0)
    answer(below.llm, prompt_of("one step more", 20), max_tokens=3)
    written = numbers(below.llm)["bytes", "store", "nvme"] - before["bytes", "store", "nvme"]
    num_bytes = 9 * below.rank.groups[0].space.block_bytes
    assert num_bytes < written < num_bytes + (64 << 10)


def test_what_lower_tiers_wrote_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LEVELS_EVERY_S", 1.0)
    stats = {**_STATS, "s3": {**_STATS["s3"], "stored_bytes": 10}}
    times = iter([10.0, 10.5, 20.0])
    meter = RankMeter(lambda: stats, rank=0, clock=lambda: next(times))
    stats["s3"] = {**_STATS["s3"], "stored_bytes": 25}
    first = meter.take()
    assert first is not None
    assert first.bytes_moved == {("s3", "store"): 15}
    assert meter.take() is None, "levels are read now and then"
    last = meter.take()
    assert last is not None
    assert not last.bytes_moved


def test_what_two_ranks_tell_arrives_together() -> None:
    def said(rank: int) -> KvxWorkerMetadata:
        tally = Tally()
        tally.bytes_moved["dram", "load"] = 5
        tally.seconds["load"] = [0.5 + rank]
        tally.levels[metrics.HELD, ("dram", str(rank))] = 7
        diverted = [Served("r", 0, b"h", kvx.TierKind.NVME)]
        failures = [LoadFailure("r", 0, [b"h"], ["corrupt"])]
        return KvxWorkerMetadata({1: 1}, failures=failures, told=Told(tally, diverted))

    sent = [pickle.loads(pickle.dumps(said(rank))) for rank in (0, 1)]  # noqa: S301 - our own
    both = sent[0].aggregate(sent[1])
    assert both.completed_jobs == {1: 2}
    assert len(both.failures) == len(both.told.diverted) == 2
    assert both.told.tally.bytes_moved == {("dram", "load"): 10}
    assert both.told.tally.seconds == {"load": [0.5, 1.5]}
    assert len(both.told.tally.levels) == 2
    silent = KvxWorkerMetadata().aggregate(said(1))
    assert silent.told is not None
    assert silent.told.tally.bytes_moved == {("dram", "load"): 5}


_STATS: dict[str, dict[str, Any]] = {
    "engine": {"write": {"bytes": 0}, "quarantined_bytes": 0},
    "dram": {"held_bytes": 1, "capacity_bytes": 2},
    "s3": {"used_bytes": 1, "pending_bytes": 3, "stored_bytes": 10, "breaker": "half_open"},
}


def _result(*tiers: kvx.TierKind) -> kvx.TransferResult:
    return kvx.TransferResult(
        np.zeros(len(tiers), np.uint8), np.array(tiers, np.uint8), len(tiers) * 50, 0.1
    )
