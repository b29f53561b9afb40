"""Blocks that only peers have, for one onboard: asked for, read into DRAM slots, and handed on.

    ask the peer for a lease -> reserve slots here -> read under it, verified -> release -> commit

A window of blocks goes to each peer at a time, several are under way. What a peer does not bring is
looked for at the next one that has it. Bytes only ever land in slots that are reserved for them,
and count once they match the checksum that the owner took when the block was stored.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.inbound import Inbound
from kvx.cache.operation import REASON_OF_CODE
from kvx.cache.peer.messages import KEYS_MAX
from kvx.cache.reactor import Step
from kvx.cache.reasons import MissReason
from kvx.cache.result import TierKind
from kvx.errors import KvxError, PeerLost, StaleReference, TransferTimeout, UsageError
from kvx.transfer.codes import Code

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.onboard import Onboard
    from kvx.cache.peer.asking import LeaseAsk, PeerRead
    from kvx.cache.peer.messages import Grant
    from kvx.cache.peer.source import Source
    from kvx.cache.peer.tier import PeerTier
    from kvx.transfer.agents.lease_token import RemoteLease

    Rows = npt.NDArray[np.int64]
    Mask = npt.NDArray[np.bool_]

_log = logging.getLogger(__name__)
# So small that a slow link brings one within the deadline of a peer.
_WINDOW_BYTES = 16 << 20
_SOURCES_MAX = 64
_ROOM_S = 0.005
# What an owner says of blocks that it may well have a moment later.
_BUSY = (int(MissReason.NO_ROOM), int(MissReason.IN_FLIGHT))


class PeerFetches:
    """What one onboard fetches from peers."""

    def __init__(self, operation: Onboard, tier: PeerTier) -> None:
        """Have fetched nothing."""
        self._operation = operation
        self._tier = tier
        self._shared = operation.shared
        self._block_bytes = operation.block_bytes
        # Who was asked for a row in vain, a bit each.
        self._tried = np.zeros(len(operation.keys), np.uint64)
        self._bits: dict[int, np.uint64] = {}
        # No room was found: peers are not asked in vain again before this time.
        self._not_before = 0.0

    def launch(self, rows: Rows) -> Rows:
        """Ask peers for rows that they hold; returns those that nobody has.

        REQUIRES: the operation's lock is held.
        """

        def is_open(source: Source) -> Mask:
            open_rows: Mask = (self._tried[rows] & self._bit(source)) == 0
            return open_rows

        if time.monotonic() < self._not_before:
            held = self._tier.holds(self._operation.keys[rows])
            self._operation.postpone(rows[held])
            return rows[~held]
        rest = np.ones(len(rows), np.bool_)
        keys = self._operation.keys[rows]
        for source, places in self._tier.choose(keys, self._block_bytes, is_open):
            rest[places] = False
            self._launch_from(source, rows[places])
        return rows[rest]

    def _bit(self, source: Source) -> np.uint64:
        place = min(len(self._bits), _SOURCES_MAX - 1)
        return self._bits.setdefault(source.ordinal, np.uint64(1 << place))

    def _launch_from(self, source: Source, rows: Rows) -> None:
        window = max(1, min(_WINDOW_BYTES // self._block_bytes, KEYS_MAX))
        count = self._tier.take_budget(min(len(rows), window), self._block_bytes)
        self._operation.postpone(rows[count:])
        if count:
            self._ask(source, rows[:count])

    def _ask(self, source: Source, rows: Rows) -> None:
        operation = self._operation
        source.add_load(len(rows) * self._block_bytes)
        operation.tiers[rows] = TierKind.PEER
        ask = self._tier.new_ask(source, len(rows), operation.remaining_s())
        step = Step(ask, settle=lambda _: self._settle_ask(ask, rows), give_up=operation.give_up)
        operation.add_fetch(step)
        self._shared.reactor.adopt(step)
        self._tier.send(ask, operation.keys[rows], self._block_bytes)

    def _settle_ask(self, ask: LeaseAsk, rows: Rows) -> None:
        if ask.grant is None:
            self._note_source(ask, is_failure=ask.code != Code.CANCELLED)
            self._fail(ask.source, rows, REASON_OF_CODE[ask.codes()])
        else:
            self._take_answer(ask, rows, ask.grant)
        self._operation.step_over(ask)

    def _take_answer(self, ask: LeaseAsk, rows: Rows, grant: Grant) -> None:
        """Let go of what the peer does not lend, and read the rest."""
        source = ask.source
        reasons = np.frombuffer(grant.reasons, np.uint8)
        if len(reasons) != len(rows):
            reasons = np.full(len(rows), int(MissReason.TIER_DOWN), np.uint8)
        granted = reasons == MissReason.HIT
        is_busy = np.isin(reasons, _BUSY)
        is_gone = ~granted & ~is_busy
        if is_gone.any():
            source.replica.forget(self._operation.keys[rows[is_gone]])
        # Why it is missing there says nothing about why it is missing here.
        self._fail(source, rows[is_gone], np.zeros(int(is_gone.sum()), np.uint8))
        # Who lends some of it lends the rest when those are back.
        self._fail(source, rows[is_busy], reasons[is_busy], may_retry=bool(granted.any()))
        rows = rows[granted]
        if not len(rows):
            return
        if self._operation.is_over:
            self._tier.release(ask, 0)
            self._unload(source, len(rows))
            return
        try:
            lease = source.peer.lease(grant.token)
            checksums = check_lease(lease, self._operation.keys[rows], self._block_bytes)
            inbound, indices = self._reserve(source, rows, grant.ttls_s)
        except KvxError as error:
            self._refuse(ask, rows, error)
            return
        if not len(indices):
            self._tier.release(ask, 0)
            return
        try:
            self._begin_read(ask, inbound, lease, indices, checksums[indices])
        except KvxError as error:
            inbound.give_back(self._operation)
            self._refuse(ask, inbound.rows, error)

    def _reserve(self, source: Source, rows: Rows, packed_ttls_s: bytes) -> tuple[Inbound, Rows]:
        """Reserve slots for leased rows, that expire when the owner's do.

        Rows without one are looked at again: there is no room, or they have just arrived in DRAM.

        Returns:
            The rows with a slot, and their places among all.
        """
        expiries_s = np.zeros(len(rows), np.int64)
        ttls_s = np.frombuffer(packed_ttls_s, "<u4").astype(np.int64)
        if packed_ttls_s and len(ttls_s) == len(rows):
            now_s = self._shared.now_ms() // 1000
            expiries_s = np.where(ttls_s > 0, now_s + ttls_s, 0)
        inbound, has_slot = Inbound.reserve(self._operation, rows, expiries_s)
        left = rows[~has_slot]
        if len(left):
            self._not_before = time.monotonic() + _ROOM_S
            self._unload(source, len(left))
            self._operation.look_again(left, np.zeros(len(left), np.uint8))
        return inbound, np.flatnonzero(has_slot)

    def _begin_read(
        self,
        ask: LeaseAsk,
        inbound: Inbound,
        lease: RemoteLease,
        indices: Rows,
        checksums: npt.NDArray[np.uint64],
    ) -> None:
        addresses = self._operation.pool.addresses(inbound.slots)
        read = self._tier.read(ask, lease, indices, addresses, self._block_bytes)
        step = Step(
            read,
            settle=lambda _: self._settle_read(read, ask, inbound, checksums),
            give_up=lambda _: self._late(read),
            keep=self._shared.dram,
        )
        self._operation.add_fetch(step)
        self._shared.reactor.adopt(step)
        read.tell(self._shared.reactor.ended)

    def _refuse(self, ask: LeaseAsk, rows: Rows, error: KvxError) -> None:
        """Let rows go that cannot be read although they were leased."""
        if not isinstance(error, PeerLost | StaleReference | TransferTimeout):
            _log.warning("blocks of %s are not read: %s", ask.source.name, error)
        self._tier.release(ask, 0)
        reason = {StaleReference: MissReason.STALE, TransferTimeout: MissReason.DEADLINE}.get(
            type(error), MissReason.TIER_DOWN
        )
        self._fail(ask.source, rows, np.full(len(rows), int(reason), np.uint8))

    def _late(self, read: PeerRead) -> None:
        """A read was ended and a thread is still at its memory: settled when that has let go."""
        if read.state() == "cancelled" or self._operation.remaining_s() <= 0:
            self._operation.give_up(read)
        else:
            self._shared.reactor.call_later(
                self._operation.remaining_s(), self._operation.pump
            )  # fmt: skip

    def _settle_read(
        self, read: PeerRead, ask: LeaseAsk, inbound: Inbound, checksums: npt.NDArray[np.uint64]
    ) -> None:
        codes = read.codes()
        arrived = codes == Code.OK
        reasons = REASON_OF_CODE[codes]
        damaged = self._operation.keys[inbound.rows[codes == Code.CORRUPT]]
        self._tier.release(ask, int(arrived.sum()), damaged)
        if len(damaged):
            ask.source.replica.forget(damaged)
            self._shared.instruments.note_corrupt(TierKind.PEER, len(damaged))
        is_failure = bool(np.isin(reasons, (MissReason.TIER_DOWN, MissReason.DEADLINE)).any())
        self._note_source(ask, is_failure=is_failure)
        missed, came = inbound.only(~arrived), inbound.only(arrived)
        missed.give_back(self._operation)
        self._fail(ask.source, missed.rows, reasons[~arrived])
        self._unload(ask.source, len(came.rows))
        self._tier.instruments.note_read(ask.source.name, len(came.rows), self._block_bytes)
        came.hand_on(self._operation, checksums[arrived], TierKind.PEER)
        self._operation.step_over(read)

    def _fail(
        self,
        source: Source,
        rows: Rows,
        reasons: npt.NDArray[np.uint8],
        *,
        may_retry: bool = False,
    ) -> None:
        """Have rows looked for elsewhere; reason 0 is none in particular."""
        if not len(rows):
            return
        self._unload(source, len(rows))
        if not may_retry:
            self._tried[rows] |= self._bit(source)
            for reason in np.unique(reasons):
                self._tier.instruments.note_failed(
                    source.name,
                    MissReason(int(reason)) or MissReason.EVICTED,
                    int((reasons == reason).sum()),
                )
        self._operation.look_elsewhere(rows, reasons)

    def _unload(self, source: Source, count: int) -> None:
        source.add_load(-count * self._block_bytes)
        self._tier.give_budget(count, self._block_bytes)

    def _note_source(self, ask: LeaseAsk, *, is_failure: bool) -> None:
        """Tell the peer's breaker; a caller in a hurry says nothing about the peer."""
        if not is_failure:
            ask.source.breaker.success()
        elif ask.is_patient or ask.code == Code.PEER_LOST:
            ask.source.breaker.failure()


def check_lease(
    lease: RemoteLease, keys: npt.NDArray[np.uint8], block_bytes: int
) -> npt.NDArray[np.uint64]:
    """Return the checksums of a lease that is on exactly these blocks.

    Raises:
        UsageError: It is on something else.
    """
    sizes = lease.blocks[:, 2] * lease.blocks[:, 3]
    is_right = len(lease) == len(keys) and bool((sizes == block_bytes).all())
    if not is_right or lease.keys is None or not np.array_equal(lease.keys, keys):
        raise UsageError(f"{lease.agent} leased other blocks than it was asked for")
    if lease.checksums is None:
        raise UsageError(f"{lease.agent} leased blocks without their checksums")
    return lease.checksums
