"""A cache in a process of its own that is told what to do: the other side in tests of peers."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self, cast

import numpy as np

import kvx
from kvx.transfer.owner import freeze
from tests.cache.conftest import make_blocks, make_hashes, open_space

BLOCK_BYTES = 16 << 10
KEY = "a key for the tests of peers"
REPLY_S = 30.0
# Agents that notice within a second that somebody is gone.
QUICK = {"ping_s": 0.05, "suspect_after_s": 1.0, "lost_after_s": 3.0, "redial_s": 0.05}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a cache is built.

    Attributes:
        name: Of its agent.
        peers: Whom it seeks.
        dram_blocks: Blocks that DRAM holds.
        nvme: Directory of an NVMe tier; None for none.
        listen: Addresses besides the socket file.
        settings: Further settings of the peer tier.
        config: Further settings of the cache.
        is_own_agent: Whether the cache makes its agent itself.
    """

    name: str
    peers: tuple[str, ...] = ()
    dram_blocks: int = 128
    nvme: Path | None = None
    listen: tuple[str, ...] = ()
    settings: dict[str, object] = dataclasses.field(default_factory=dict)
    config: dict[str, object] = dataclasses.field(default_factory=dict)
    is_own_agent: bool = False

    @contextlib.contextmanager
    def opened(self) -> Iterator[kvx.TieredCache]:
        """Open the cache, and its agent; both are closed in the end."""
        with contextlib.ExitStack() as stack:
            agent = None
            if not self.is_own_agent:
                made = kvx.Agent(self.name, listen=self.listen or None, key=KEY, config=QUICK)
                agent = stack.enter_context(made)
            yield stack.enter_context(self._open(agent))

    def _open(self, agent: kvx.Agent | None) -> kvx.TieredCache:
        tiers: list[dict[str, object]] = [
            {"kind": "dram", "capacity": self.dram_blocks * BLOCK_BYTES, "prefault": "never"}
        ]
        if self.nvme is not None:
            tiers.append(
                {
                    "kind": "nvme", "path": str(self.nvme), "capacity": "32MiB", "extent": "4MiB",
                    "durability": "none", "rewarm": False,
                }
            )  # fmt: skip
        tier = {"kind": "peer", "peers": list(self.peers), "publish_s": 0.01}
        if agent is None:
            tier |= {"name": self.name, "key": KEY, "listen": list(self.listen)}
        tiers.append({**tier, **self.settings})
        return kvx.TieredCache.open(
            {"tiers": tiers, "copy_threads": 1, **self.config}, agent=agent
        )  # fmt: skip


class PeerProcess:
    """The parent's handle of such a process. A context manager; leaving it kills the process."""

    def __init__(self, plan: Plan) -> None:
        """Start it, and wait until its cache is open."""
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(plan, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.addresses = list(map(str, cast("list[str]", self._reply())))

    @property
    def unix(self) -> str:
        """Its socket file."""
        return next(one for one in self.addresses if one.startswith("unix:"))

    @property
    def tcp(self) -> str:
        """Its TCP address."""
        return next(one for one in self.addresses if one.startswith("tcp:"))

    def ask(self, verb: str, *arguments: object) -> object:
        """Have it do something, and return what it says."""
        self.tell(verb, *arguments)
        return self._reply()

    def tell(self, verb: str, *arguments: object) -> None:
        """Have it do something; `hear` returns what it says."""
        self._line.send((verb, *arguments))

    def hear(self) -> object:
        """Return what it says to the last `tell`."""
        return self._reply()

    def signal(self, number: int) -> None:
        """Send it a signal; after SIGSTOP every thread of it stands still."""
        assert self.process.pid is not None
        if number == signal.SIGSTOP:
            freeze(self.process.pid)
        else:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        if self.process.is_alive():
            self.signal(signal.SIGCONT)
            self.process.kill()
        self.process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._line.close()

    def _reply(self) -> object:
        assert self._line.poll(REPLY_S), "the process does not answer"
        reply = self._line.recv()
        if isinstance(reply, BaseException):
            raise reply
        return reply


def _serve(plan: Plan, line: Connection) -> None:
    with plan.opened() as cache:
        peers = cache._shared.peers
        assert peers is not None
        line.send(list(peers.agent.addresses))
        actor = _Actor(cache)
        while True:
            try:
                verb, *arguments = line.recv()
            except EOFError:
                return
            try:
                line.send(getattr(actor, verb)(*arguments))
            except Exception as error:  # noqa: BLE001 - the parent raises it
                line.send(error)
            if verb == "close":
                return


class _Actor:
    """What the process can be told to do."""

    def __init__(self, cache: kvx.TieredCache) -> None:
        self._cache = cache
        self._space = open_space(cache)

    def store(self, first: int, count: int, ttl_s: int = 0) -> int:
        """Offload blocks; returns how many are there."""
        source = make_blocks(count, first=first)
        transfer = self._space.offload(make_hashes(count, first=first), source, ttl_s=ttl_s)
        return transfer.wait(REPLY_S).num_blocks

    def onboard(self, first: int, count: int, deadline_s: float = 10.0) -> tuple[list[int], int]:
        """Onboard blocks; returns their reasons, and how many have wrong bytes."""
        target = np.zeros((count, BLOCK_BYTES), np.uint8)
        transfer = self._space.onboard(
            make_hashes(count, first=first), target, deadline_s=deadline_s
        )
        with contextlib.suppress(kvx.TransferTimeout):
            transfer.wait(REPLY_S)
        assert transfer.wait_quiesced(REPLY_S)
        result = transfer.result
        assert result is not None
        right = (target == make_blocks(count, first=first)).all(axis=1)
        wrong = int(((result.reasons == 0) & ~right).sum())
        return result.reasons.tolist(), wrong

    def drop(self, first: int, count: int) -> int:
        """Drop blocks."""
        return self._space.drop(make_hashes(count, first=first))

    def clear(self) -> int:
        """Forget everything."""
        return self._cache.clear()

    def flush(self) -> bool:
        """Write all to NVMe."""
        return self._cache.flush(REPLY_S)

    def forget_dram(self) -> None:
        """Leave blocks in NVMe alone, as if DRAM had needed the room."""
        for pool in self._cache._shared.dram.pools.values():
            keys = pool.index.snapshot()["keys"]
            self._cache._shared.remove(
                pool, kvx.TierKind.DRAM, keys, kvx.MissReason.EVICTED
            )  # fmt: skip

    def damage(self, block: int) -> None:
        """Flip a bit of a block where it lies in DRAM."""
        with self._space.lease(make_hashes(1, first=block)) as lease:
            at = ctypes.c_uint8.from_address(int(lease.addresses[0]) + 77)
            at.value ^= 4

    def storm(self, seed: int, duration_s: float, num_blocks: int) -> tuple[int, int]:
        """Store, onboard, drop and clear at random; returns (operations, blocks with wrong bytes).

        What is told meanwhile waits until it is over.
        """
        dice, end = random.Random(seed), time.monotonic() + duration_s
        count, wrong = 0, 0
        while time.monotonic() < end:
            size = dice.randint(1, 12)
            first = dice.randrange(num_blocks - size)
            what = dice.random()
            if what < 0.6:
                self.store(first, size, dice.choice([0, 0, 1]))
            elif what < 0.9:
                wrong += self.onboard(first, size, dice.choice([0.05, 5.0]))[1]
            elif what < 0.99:
                self.drop(first, size)
            else:
                self.clear()
            count += 1
        return count, wrong

    def held(self, first: int, count: int) -> int:
        """Return the length of the prefix that is here."""
        return self._space.match(make_hashes(count, first=first)).num_blocks

    def listeners(self) -> int:
        """Return how many peers are told what is here."""
        peers = self._cache._shared.peers
        assert peers is not None
        return peers.num_listeners

    def lent_bytes(self) -> int:
        """Return what is lent now."""
        peers = self._cache._shared.peers
        assert peers is not None
        return peers.lent_bytes

    def num_held(self) -> int:
        """Return how many blocks DRAM and NVMe hold between them."""
        held = self._cache.snapshot()
        return sum(len(held.get(tier, ())) for tier in ("dram", "nvme"))

    def pinned(self) -> int:
        """Return how many blocks in DRAM are pinned."""
        pools = self._cache._shared.dram.pools.values()
        return sum(pool.index.stats()["pinned"] for pool in pools)

    def metrics(self) -> str:
        """Return the metrics as text."""
        return self._cache.metrics.render()

    def check(self) -> None:
        """Verify the invariants."""
        self._cache.check_integrity()

    def close(self) -> str:
        """Close the cache."""
        return str(self._cache.close(5.0))
