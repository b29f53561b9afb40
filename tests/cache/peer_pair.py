"""A cache here that reads from one in another process, and what tests ask of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

import kvx
from kvx.cache.peer.tier import PeerTier
from tests.cache.conftest import make_blocks, make_hashes, open_space
from tests.cache.peer_process import BLOCK_BYTES, PeerProcess, Plan

LOCAL = "tcp://127.0.0.1:0"


def held(space: kvx.CacheSpace, count: int, *, first: int = 0) -> int:
    return space.match(make_hashes(count, first=first)).num_blocks


def bring(
    space: kvx.CacheSpace, count: int, *, first: int = 0, deadline_s: float = 10.0
) -> kvx.TransferResult:
    """Onboard blocks; none that counts as arrived may have wrong bytes."""
    target = np.zeros((count, BLOCK_BYTES), np.uint8)
    result = space.onboard(make_hashes(count, first=first), target, deadline_s=deadline_s).wait()
    check(result, target, first)
    return result


def check(result: kvx.TransferResult, target: npt.NDArray[np.uint8], first: int = 0) -> None:
    arrived = result.reasons == kvx.MissReason.HIT
    assert (target[arrived] == make_blocks(len(target), first=first)[arrived]).all()


def tier_of(cache: kvx.TieredCache) -> PeerTier:
    tier = cache._shared.peers
    assert tier is not None
    return tier


def metric(cache_text: str, line: str) -> float:
    found = [one for one in cache_text.splitlines() if one.startswith(line + " ")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


@contextlib.contextmanager
def pair(
    owner: Plan | None = None, reader: Plan | None = None, *, way: str = "unix"
) -> Iterator[tuple[PeerProcess, kvx.TieredCache, kvx.CacheSpace]]:
    """Start a cache in another process, and one here that reads from it."""
    with PeerProcess(owner or Plan("a", listen=(LOCAL,))) as a:
        plan = reader or Plan("b")
        address = a.unix if way == "unix" else a.tcp
        with dataclasses.replace(plan, peers=(address,)).opened() as cache:
            yield a, cache, open_space(cache)
