"""The block index at a million keys: insert, insert with eviction, prefix match, memory."""

from __future__ import annotations

import statistics
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from kvx_bench.row import Row, percentiles_us
from kvx_ext import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from kvx_bench.case import Options

_BATCH = 512
_NOW_MS = 1


class IndexCase:
    """Batches of 512 keys, one thread, LRU; the limit is an OrderedDict doing the same."""

    name = "index"
    description = "the block index at a million keys"

    def why_not(self, _options: Options) -> str:
        """It runs everywhere."""
        return ""

    def run(self, options: Options) -> Iterator[Row]:
        """Each operation on a fresh index, medians over repeats."""
        num_keys = 1 << 18 if options.is_quick else 1_000_000
        keys = np.random.default_rng(1).integers(0, 256, (2 * num_keys, 16), dtype=np.uint8)
        inserts: list[list[float]] = []
        evictions: list[list[float]] = []
        for _ in range(options.repeats):
            index = _new_index(num_keys)
            inserts.append(_insert_all(index, keys[:num_keys]))
            bytes_per_key = index.stats()["memory_bytes"] / num_keys
            evictions.append(_insert_all(index, keys[num_keys:]))
        note = f"{bytes_per_key:.1f} bytes a key"
        yield _row("index.insert", num_keys, inserts, _ordered_dict_rate(keys[:num_keys]), note)
        yield _row("index.insert-evict", num_keys, evictions, None, "at capacity, LRU")
        yield from _matches(index, keys[num_keys:], options)


def _matches(
    index: _core.BlockIndex, keys: npt.NDArray[np.uint8], options: Options
) -> Iterator[Row]:
    whole = len(keys) // _BATCH * _BATCH
    requests = keys[:whole].reshape(-1, _BATCH, 16)
    order = np.random.default_rng(2).permutation(len(requests))
    lengths = np.full(16, _BATCH, np.int64)

    def many(rows: npt.NDArray[np.int64]) -> None:
        counts = index.match_many(
            np.ascontiguousarray(requests[rows]).reshape(-1, 16), lengths[: len(rows)], _NOW_MS
        )
        assert (counts == _BATCH).all(), "every prefix is there"

    rounds = options.repeats
    calls = np.split(order[: len(order) // 16 * 16], len(order) // 16)
    batched = [_each(calls, many) for _ in range(rounds)]
    yield _row(
        "index.match", len(calls) * 16 * _BATCH, batched, None,
        "512-key prefixes in random order, 16 a call",
    )  # fmt: skip
    for is_touch, variant in ((False, "one"), (True, "one-touch")):

        def one(row: int, *, touch: bool = is_touch) -> None:
            index.match(requests[row], _NOW_MS, touch=touch, pin=False)

        runs = [_each(order.tolist(), one) for _ in range(rounds)]
        yield _row(f"index.match.{variant}", whole, runs, None, "one 512-key prefix a call")


def _new_index(num_keys: int) -> _core.BlockIndex:
    index = _core.BlockIndex(_core.EvictionPolicy.LRU, None)
    index.add_slots(0, num_keys)
    return index


def _insert(index: _core.BlockIndex, keys: npt.NDArray[np.uint8]) -> None:
    index.insert(keys, np.zeros(len(keys), np.uint64), 0, 0, _NOW_MS)


def _insert_all(index: _core.BlockIndex, keys: npt.NDArray[np.uint8]) -> list[float]:
    batches = [keys[at : at + _BATCH] for at in range(0, len(keys), _BATCH)]
    return _each(batches, lambda batch: _insert(index, batch))


def _each(items: list, work: Callable[..., None]) -> list[float]:  # type: ignore[type-arg]
    times = []
    for item in items:
        began = time.perf_counter()
        work(item)
        times.append(time.perf_counter() - began)
    return times


def _row(key: str, num_keys: int, runs: list[list[float]], limit: float | None, note: str) -> Row:
    seconds = statistics.median(sum(run) for run in runs)
    p50_us, p99_us = percentiles_us([one for run in runs for one in run])
    rate = num_keys / seconds
    return Row(
        key,
        per_s=rate,
        limit=limit,
        ratio=None if limit is None else rate / limit,
        p50_us=p50_us,
        p99_us=p99_us,
        note=note,
    )


def _ordered_dict_rate(keys: npt.NDArray[np.uint8]) -> float:
    """Return inserts a second of the plain Python structure one would use instead."""
    as_bytes = [key.tobytes() for key in keys]
    table: OrderedDict[bytes, int] = OrderedDict()
    began = time.perf_counter()
    for slot, key in enumerate(as_bytes):
        table[key] = slot
    return len(keys) / (time.perf_counter() - began)
