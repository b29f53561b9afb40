"""The references that this engine gave out: what they promise, until when, and who claimed them.

Invariant: what is held is bounded in number, bytes and time. A lease ends by itself in the cache's
index, so blocks are not held for longer when the engine does nothing that would look at the clock.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

import kvx
from kvx_vllm.pd.messages import Claim, Done, Verdict, Word
from kvx_vllm.pd.reference import ID_BYTES, GroupBlocks, Reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_log = logging.getLogger(__name__)
REFERENCES_MAX = 1024
# Ids that are over, to say what became of them.
_OVER_MAX = 1 << 16
_MOMENT_S = 0.001


@dataclass(slots=True)
class Run:
    """Blocks in a row that are here.

    Attributes:
        space: Of their group, at the time.
        group: Place of it.
        begin: Place of the first one in the prompt.
        hashes: Of them.
        lease: What keeps them; None where there was no room for that.
    """

    space: kvx.CacheSpace
    group: int
    begin: int
    hashes: list[bytes]
    lease: kvx.Lease | None = None


@dataclass(slots=True)
class Issued:
    """A reference that may still be claimed.

    Attributes:
        id: Of the reference.
        end_s: When it ends, of the monotonic clock.
        chains: The hashes of its blocks, for each group.
        spaces: Where these are, at the time.
        is_stored: Whether all stores have ended; only then is it known what is held.
        runs: What was stored of it.
        held_bytes: Bytes of the blocks that are kept.
        claim: Number of the claim, and the peer that made it.
    """

    id: bytes
    end_s: float
    chains: list[list[bytes]]
    spaces: list[kvx.CacheSpace]
    is_stored: bool = False
    runs: list[Run] = field(default_factory=list)
    held_bytes: int = 0
    claim: tuple[int, str] | None = None


@dataclass(slots=True)
class Storing:
    """A request whose blocks are on their way into the cache.

    Attributes:
        keys: Those that are under way.
        issued: Its reference; None before there is one.
        is_finished: Whether no more stores will begin.
    """

    keys: set[bytes] = field(default_factory=set)
    issued: Issued | None = None
    is_finished: bool = False


class Producer:
    """Gives out references, and answers for them. Thread-safe."""

    def __init__(
        self,
        spaces: Callable[[], list[kvx.CacheSpace]],
        agent: kvx.Agent,
        key: kvx.SharedKey,
        *,
        lease_s: float,
        held_bytes_max: int,
    ) -> None:
        """Have given out none.

        Args:
            spaces: Returns the present space of each KV cache group.
            agent: What the cache is connected through.
            key: Its key.
            lease_s: Seconds that a reference is good for.
            held_bytes_max: Most bytes that are kept from being evicted for references.
        """
        self._spaces = spaces
        self._agent = agent
        self._key = key
        self._lease_s = lease_s
        self._held_bytes_max = held_bytes_max
        self._lock = threading.Lock()
        self._storing: dict[str, Storing] = {}
        self._issued: OrderedDict[bytes, Issued] = OrderedDict()
        self._over: OrderedDict[bytes, Verdict] = OrderedDict()
        self._held_bytes = 0
        self.say: Callable[[str, Word], bool] = lambda *_: False
        self.counts: Counter[str] = Counter()

    @property
    def held_bytes(self) -> int:
        """Bytes that are kept for references."""
        return self._held_bytes

    # What the scheduler does, on its thread.

    def begin(self, req_id: str) -> None:
        """Watch the stores of a request."""
        with self._lock:
            self._storing[req_id] = Storing()

    def storing(self, req_id: str, keys: Iterable[bytes]) -> None:
        """Note blocks that are on their way into the cache."""
        with self._lock:
            if req_id in self._storing:
                self._storing[req_id].keys.update(keys)

    def stored(self, req_id: str, keys: Iterable[bytes]) -> None:
        """Note that stores have ended, well or not."""
        with self._lock:
            request = self._storing.get(req_id)
            if request is None:
                return
            request.keys.difference_update(keys)
            answer = self._settle(req_id, request)
        self._tell(answer)

    def issue(self, req_id: str, chains: Sequence[Sequence[bytes]]) -> dict[str, Any]:
        """Return the parameters that a decode engine needs; empty when the request is not watched.

        Args:
            req_id: Of the request; its last stores may still be on their way.
            chains: The hashes of its prompt, for each group.
        """
        with self._lock:
            request = self._storing.get(req_id)
            if request is None:
                return {}
            self._sweep()
            spaces = self._spaces()
            request.issued = issued = Issued(
                secrets.token_bytes(ID_BYTES), time.monotonic() + self._lease_s,
                [list(chain) for chain in chains], spaces,
            )  # fmt: skip
            self._issued[issued.id] = issued
            while len(self._issued) > REFERENCES_MAX:
                self._end(next(iter(self._issued.values())), Verdict.EXPIRED, "displaced")
            self.counts["issued"] += 1
        groups = [
            GroupBlocks(space.namespace.public_id, len(chain), chain[-1] if chain else b"")
            for space, chain in zip(spaces, issued.chains, strict=True)
        ]
        return Reference(
            id=issued.id, agent=self._agent.name, incarnation=f"{self._agent.incarnation:x}",
            card=self._agent.export(), groups=groups,
            expires_at_ms=int((time.time() + self._lease_s) * 1000),
        ).signed(self._key).to_params()  # fmt: skip

    def finished(self, req_id: str) -> None:
        """Note that no further stores of a request will begin."""
        with self._lock:
            request = self._storing.get(req_id)
            if request is None:
                return
            request.is_finished = True
            answer = self._settle(req_id, request)
        self._tell(answer)

    # What decode engines do, on the agent's thread.

    def claimed(self, peer: str, claim: Claim) -> None:
        """Answer a claim, now or once the blocks are stored."""
        with self._lock:
            self._sweep()
            verdict, held = self._judge(peer, claim)
        if verdict is not None:
            self._tell((peer, Word(claim.number, verdict, held)))

    def done(self, peer: str, done: Done) -> None:
        """Let the blocks of a reference go; only who claimed it can say so."""
        with self._lock:
            issued = self._issued.get(done.id)
            if issued is not None and issued.claim is not None and issued.claim[1] == peer:
                self._end(issued, Verdict.CONSUMED, "released")

    def reset(self) -> None:
        """Let everything go: what was stored is not to be found any more."""
        with self._lock:
            for issued in list(self._issued.values()):
                self._end(issued, Verdict.STALE, "stale")
            # vLLM forgets the stores that are under way: nobody tells when they have ended.
            self._storing.clear()

    def _judge(self, peer: str, claim: Claim) -> tuple[Verdict | None, list[bytes]]:
        """Return the answer to a claim; no verdict while it is not known."""
        issued = self._issued.get(claim.id)
        if issued is None:
            return self._over.get(claim.id, Verdict.UNKNOWN), []
        if issued.claim is not None:
            return Verdict.CONSUMED, []
        issued.claim = (claim.number, peer)
        stored = [len(chain) for chain in issued.chains]
        if len(claim.num_blocks) != len(stored) or any(
            wanted > there for wanted, there in zip(claim.num_blocks, stored, strict=True)
        ):
            self._end(issued, Verdict.CONSUMED, "out_of_range")
            return Verdict.OUT_OF_RANGE, []
        return self._ready(issued) if issued.is_stored else (None, [])

    def _settle(self, req_id: str, request: Storing) -> tuple[str, Word] | None:
        """Hold what was stored, once all stores have ended; returns what its claimant is told."""
        if request.keys or not request.is_finished:
            return None
        del self._storing[req_id]
        issued = request.issued
        if issued is None or issued.id not in self._issued:
            return None  # it was aborted, or has taken too long
        self._hold(issued)
        issued.is_stored = True
        if issued.claim is None:
            return None
        number, peer = issued.claim
        return peer, Word(number, *self._ready(issued))

    def _tell(self, answer: tuple[str, Word] | None) -> None:
        """Send an answer. REQUIRES: the lock is not held; the agent has one of its own."""
        if answer is not None:
            self.say(*answer)

    def _hold(self, issued: Issued) -> None:
        """Keep the blocks of a reference from being evicted, as far as there is room for that."""
        expires_s = max(_MOMENT_S, issued.end_s - time.monotonic())
        for group, (space, chain) in enumerate(zip(issued.spaces, issued.chains, strict=True)):
            begin = 0
            # A lease is on blocks in a row; what was not stored is stepped over.
            while begin < len(chain):
                lease = space.lease(chain[begin:], expires_s=expires_s)
                count = len(lease)
                run = Run(space, group, begin, chain[begin : begin + count], lease)
                begin += count + 1
                if count and self._held_bytes + count * space.block_bytes <= self._held_bytes_max:
                    issued.held_bytes += count * space.block_bytes
                    self._held_bytes += count * space.block_bytes
                else:
                    self.counts["not_held"] += count
                    lease.release()
                    run.lease = None
                if count:
                    issued.runs.append(run)

    def _ready(self, issued: Issued) -> tuple[Verdict, list[bytes]]:
        """Return whether what is kept is still there, and which blocks are, a bit each."""
        held = [np.zeros(len(chain), np.bool_) for chain in issued.chains]
        for run in issued.runs:
            with run.space.lease(run.hashes, expires_s=_MOMENT_S) as found:
                count = len(found)
            if count < len(run.hashes) and run.lease is not None:
                _log.warning(
                    "reference %s is stale: %d of %d blocks were dropped since",
                    issued.id.hex()[:8], len(run.hashes) - count, len(run.hashes),
                )  # fmt: skip
                self._end(issued, Verdict.STALE, "stale")
                return Verdict.STALE, []
            held[run.group][run.begin : run.begin + count] = True
        return Verdict.READY, [np.packbits(bits).tobytes() for bits in held]

    def _sweep(self) -> None:
        """End what has expired; all live equally long, so these come first."""
        now_s = time.monotonic()
        while self._issued and next(iter(self._issued.values())).end_s <= now_s:
            issued = next(iter(self._issued.values()))
            verdict = Verdict.EXPIRED if issued.claim is None else Verdict.CONSUMED
            self._end(issued, verdict, "expired")

    def _end(self, issued: Issued, verdict: Verdict, why: str) -> None:
        del self._issued[issued.id]
        self._over[issued.id] = verdict
        if len(self._over) > _OVER_MAX:
            self._over.popitem(last=False)
        self._held_bytes -= issued.held_bytes
        for run in issued.runs:
            if run.lease is not None:
                run.lease.release()
        issued.runs.clear()
        self.counts[why] += 1
