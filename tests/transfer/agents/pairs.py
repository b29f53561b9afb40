"""Two connected agents of this process, each with registered blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

import kvx

KEY = "a key for the tests"
BLOCKS, BYTES = 32, 4096


@dataclass
class Pair:
    one: kvx.Agent
    other: kvx.Agent
    peer: kvx.Peer
    mine: np.ndarray
    theirs: np.ndarray
    here: kvx.Registration
    there: kvx.Registration

    def remote(self, ids: object = None, **terms: object) -> kvx.RemoteBlocks:
        return self.peer.blocks(ids, lease=self.lease(**terms).token)

    def lease(self, **terms: object) -> kvx.BlockLease:
        return self.there.lease(self.there.blocks(range(BLOCKS)), **terms)

    def local(self, ids: object = None) -> kvx.Descriptors:
        return self.here.blocks(range(BLOCKS) if ids is None else ids)


@contextmanager
def open_pair() -> Iterator[Pair]:
    with kvx.Agent("one", key=KEY) as one, kvx.Agent("other", key=KEY) as other:
        mine = np.zeros((BLOCKS, BYTES), np.uint8)
        theirs = np.random.default_rng(3).integers(0, 256, (BLOCKS, BYTES), dtype=np.uint8)
        yield Pair(
            one, other, one.connect(other.export()), mine, theirs, one.register(mine),
            other.register(theirs),
        )  # fmt: skip
