"""Blocks that the cache of another process of this host holds, beside a plain streaming copy."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import kvx
from kvx_bench.copying import prefaulted, streaming_copy
from kvx_bench.row import Row, paired, throughput_row, timed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    import numpy.typing as npt

    from kvx_bench.case import Options
    from kvx_bench.row import Sample

_SIZES = {"2MiB": 2 << 20, "64KiB": 64 << 10}
_SLACK_BYTES = 64 << 20
_DEADLINE_S = 60.0
_MEET_S = 30.0
_KEY = "a key for the benchmark"


@dataclass(frozen=True, slots=True)
class _Owner:
    """What the other process holds, and where it listens."""

    num_blocks: int
    block_bytes: int
    directory: str

    def address(self, way: str) -> str:
        return f"unix:{self.directory}/owner.sock" if way == "shm" else "tcp://127.0.0.1:0"


class PeerCase:
    """Onboard of whole batches from the DRAM of a peer on this host."""

    name = "peer"
    description = "onboard from the cache of another process"

    def why_not(self, _options: Options) -> str:
        """It runs everywhere."""
        return ""

    def run(self, options: Options) -> Iterator[Row]:
        """256 MiB in blocks of two sizes, over shared memory and over TCP."""
        total_bytes = (64 << 20) if options.is_quick else (256 << 20)
        target, spare = prefaulted(total_bytes, fill=0), prefaulted(total_bytes, fill=3)
        for name, block_bytes in _SIZES.items():
            for way in ("shm", "tcp"):
                rows = target.reshape(-1, block_bytes)
                with tempfile.TemporaryDirectory() as directory:
                    owner = _Owner(len(rows), block_bytes, directory)
                    pairs = _measure(owner, way, rows, spare, options)
                yield throughput_row(
                    f"peer.get.{name}.{way}", total_bytes, pairs,
                    note="cold DRAM here, verified twice; limit: a streaming copy",
                )  # fmt: skip


def _measure(
    owner: _Owner,
    way: str,
    target: npt.NDArray[np.uint8],
    spare: npt.NDArray[np.uint8],
    options: Options,
) -> list[tuple[Sample, Sample]]:
    with (
        _other_process(owner, way) as address,
        kvx.Agent("reader", key=_KEY) as agent,
        kvx.TieredCache.open(_config(owner, options.threads, [address]), agent=agent) as cache,
    ):
        space = _space(cache, owner)
        hashes = _hashes(owner)
        end = time.monotonic() + _MEET_S
        # A cache tells nobody what it learns of its peers: to ask it again is the only way to see.
        while space.match(hashes).num_blocks < len(hashes):
            assert time.monotonic() < end, "the other cache never said what it holds"
            time.sleep(0.01)

        def get() -> Sample:
            cache.clear()
            return timed(onboard)

        def onboard() -> None:
            result = space.onboard(hashes, target, deadline_s=_DEADLINE_S).wait()
            assert result.num_blocks == len(hashes), "the peer has all of it"

        def copy() -> Sample:
            return timed(lambda: streaming_copy(spare, target.reshape(-1), options.threads))

        pairs = paired(get, copy, repeats=options.repeats)
        assert (target == _rows(owner)).all(), "what came is what the owner stored"
        return pairs


@contextlib.contextmanager
def _other_process(owner: _Owner, way: str) -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_own, args=(owner, way, theirs), daemon=True)
    process.start()
    try:
        assert ours.poll(_MEET_S), "the other process does not start"
        yield ours.recv()
    finally:
        ours.send("end")
        process.join(_MEET_S)


def _own(owner: _Owner, way: str, line: Connection) -> None:
    """Hold blocks, and serve them until told to end."""
    with (
        kvx.Agent("owner", key=_KEY, listen=owner.address(way)) as agent,
        kvx.TieredCache.open(_config(owner, 1, []), agent=agent) as cache,
    ):
        _space(cache, owner).offload(_hashes(owner), _rows(owner)).wait(_MEET_S)
        line.send(agent.addresses[0])
        line.recv()


def _config(owner: _Owner, threads: int, peers: list[str]) -> dict[str, object]:
    held_bytes = owner.num_blocks * owner.block_bytes
    return {
        "tiers": [
            # A quarter of it is lent at a time.
            {"kind": "dram", "capacity": 2 * held_bytes + _SLACK_BYTES, "prefault": "eager"},
            {"kind": "peer", "peers": peers, "deadline_s": _DEADLINE_S, "max_in_flight": "1GiB"},
        ],
        "copy_threads": threads,
    }


def _space(cache: kvx.TieredCache, owner: _Owner) -> kvx.CacheSpace:
    return cache.namespace(model="bench", dtype="uint8", block_bytes=owner.block_bytes)


def _hashes(owner: _Owner) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (owner.num_blocks, 32), dtype=np.uint8)


def _rows(owner: _Owner) -> npt.NDArray[np.uint8]:
    """Return the blocks of the owner: the same in both processes."""
    rows = np.empty((owner.num_blocks, owner.block_bytes), np.uint8)
    rows[:] = np.random.default_rng(2).integers(0, 256, owner.block_bytes, dtype=np.uint8)
    rows[:, :8] = np.arange(owner.num_blocks, dtype="<u8")[:, None].view(np.uint8)
    return rows
