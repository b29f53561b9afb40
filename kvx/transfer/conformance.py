"""What every backend must hold to, as named checks: `run("tcp", CHECKS[0])` raises when one fails.

    for check in conformance.CHECKS:
        conformance.run("mine", check)

A rig is an agent here and an owner of blocks, in this process or in another one, that are connected
over one backend. Checks raise AssertionError, with what was expected in its text.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvx.errors import (
    CorruptBlock,
    KvxError,
    PeerLost,
    StaleReference,
    TransferCancelled,
    TransferTimeout,
    UsageError,
)
from kvx.transfer.agents.agent import Agent
from kvx.transfer.agents.lease_token import RemoteLease, Rights
from kvx.transfer.agents.outcome import LinkOutcome
from kvx.transfer.agents.registration import Descriptors, Registration
from kvx.transfer.memory import MemoryRegion
from kvx.transfer.owner import Owner, OwnerProcess, pattern

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.transfer.agents.peer import Peer

NUM_BLOCKS = 64
BLOCK_BYTES = 4096
KEY = b"the key of conformance checks"
READ, WRITE = int(Rights.READ), int(Rights.WRITE)
# What a deadline may be missed by, on a machine that does other things, too.
_LATE_S = 0.5
_GRACE_S = 5.0


@dataclass(slots=True)
class Rig:
    """An agent here, and an owner of blocks to read from and write to.

    Attributes:
        agent: The initiator.
        registration: Its memory, as large as the owner's.
        blocks: (NUM_BLOCKS, BLOCK_BYTES) uint8, that memory.
        peer: The owner's agent as the initiator sees it.
        process: The owner's; None when it is this one.
        held: Calls a method of the owner by name.
        backend: The way under check.
    """

    agent: Agent
    registration: Registration
    blocks: npt.NDArray[np.uint8]
    peer: Peer
    process: OwnerProcess | None
    held: Callable[..., Any]
    backend: str

    def ask(self, method: str, *arguments: object, **named: object) -> Any:
        """Call a method of the owner."""
        return self.held(method, *arguments, **named)

    def local(self, ids: object = None) -> Descriptors:
        """Return blocks of the initiator."""
        num_blocks, block_bytes = self.blocks.shape
        return self.registration.blocks(range(num_blocks) if ids is None else ids, block_bytes)

    def lease(self, **terms: object) -> bytes:
        """Return the token of a lease on all blocks."""
        token: bytes = self.ask("lease", list(range(NUM_BLOCKS)), **terms)[1]
        return token

    def write_one(self) -> None:
        """Write one block, verified: so the way stands and is known to take writes."""
        token = self.lease(rights=WRITE)
        self.agent.write(
            self.local([0]), self.peer.blocks([0], lease=token), backend=self.backend
        ).wait(_GRACE_S)


@contextlib.contextmanager
def open_rig(
    backend: str,
    *,
    is_process: bool,
    config: Mapping[str, object] | None = None,
    listen: str | None = None,
    num_blocks: int = NUM_BLOCKS,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[Rig]:
    """Open a rig and close it again.

    Args:
        backend: The way under check.
        is_process: Whether the owner has a process of its own.
        config: Of both agents; by default it allows this backend only.
        listen: Where the owner listens besides its socket file.
        num_blocks: Blocks of each side.
        block_bytes: Their size.
    """
    terms = {"backends": [backend]} if config is None else dict(config)
    options: dict[str, Any] = {
        "key": KEY, "listen": listen, "config": terms, "num_blocks": num_blocks,
        "block_bytes": block_bytes,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(OwnerProcess(**options)) if is_process else None
        held = _owner_here(stack, options) if process is None else process.ask
        agent = stack.enter_context(Agent("initiator", key=KEY, config=terms))
        region = MemoryRegion(num_blocks * block_bytes, is_shared=True)
        blocks = region.array()[: num_blocks * block_bytes].reshape(num_blocks, block_bytes)
        peer = agent.connect(held("card"))
        rig = Rig(agent, agent.register(region), blocks, peer, process, held, backend)
        rig.ask("fill", 1)
        yield rig


def _owner_here(stack: contextlib.ExitStack, options: dict[str, Any]) -> Callable[..., Any]:
    owner = Owner(**options)
    stack.callback(owner.close)
    return lambda method, *arguments, **named: getattr(owner, method)(*arguments, **named)


def rig_of(backend: str) -> contextlib.AbstractContextManager[Rig]:
    """Return the rig that shows most of a backend of kvx, or of another one by its name."""
    listen = "tcp://127.0.0.1:0" if backend not in ("local", "shm") else None
    return open_rig(backend, is_process=backend != "local", listen=listen)


def reads_what_was_leased(rig: Rig) -> None:
    """Blocks arrive where they were asked for, whatever their order, and nothing else changes."""
    expected, token = pattern(1, NUM_BLOCKS, BLOCK_BYTES), rig.lease()
    theirs = np.random.default_rng(7).permutation(NUM_BLOCKS)[:40]
    ours = np.random.default_rng(8).permutation(NUM_BLOCKS)[:40]
    rig.blocks[:] = 0
    transfer = rig.agent.read(
        rig.local(ours), rig.peer.blocks(theirs, lease=token), backend=rig.backend
    )
    result = transfer.wait()
    assert (result.blocks_done, result.bytes_done) == (40, 40 * BLOCK_BYTES), result
    assert result.backend == rig.backend, result
    assert (rig.blocks[ours] == expected[theirs]).all(), "other bytes than the owner's"
    rest = np.setdiff1d(np.arange(NUM_BLOCKS), ours)
    assert not rig.blocks[rest].any(), "blocks that were not asked for have changed"


def writes_before_it_tells(rig: Rig) -> None:
    """The note of a write comes when its bytes are there, not before."""
    rig.write_one()
    token = rig.lease(rights=WRITE)
    rig.blocks[:] = pattern(2, NUM_BLOCKS, BLOCK_BYTES)
    rig.agent.write(
        rig.local(), rig.peer.blocks(lease=token), notify=b"written", backend=rig.backend
    ).wait()
    assert ("initiator", b"written") in rig.ask("notifications", _GRACE_S), "nobody was told"
    for block in range(NUM_BLOCKS):
        assert rig.ask("content", block) == rig.blocks[block].tobytes(), f"block {block}"


def moves_strided_blocks(rig: Rig) -> None:
    """Rows at a stride on one side become other rows on the other, in the same order."""
    rows = [(block * BLOCK_BYTES, 1024, 4, 256) for block in range(8)]
    token = rig.ask("lease_rows", rows, rights=READ)
    rig.blocks[:] = 0
    local = rig.registration.strided(np.arange(8) * BLOCK_BYTES, 2048, 2, 512)
    rig.agent.read(local, rig.peer.blocks(lease=token), backend=rig.backend).wait()
    theirs = pattern(1, NUM_BLOCKS, BLOCK_BYTES)[:8].reshape(8, 4, 1024)[:, :, :256]
    ours = rig.blocks[:8].reshape(8, 2, 2048)[:, :, :512]
    assert (ours.reshape(8, -1) == theirs.reshape(8, -1)).all(), "rows are in other places"


def takes_parts_of_a_range(rig: Rig) -> None:
    """A lease on all memory lets any part of it be named."""
    token = rig.ask("lease")[1]
    remote = rig.peer.descriptors([100, 9000], [50, 4096], lease=token)
    rig.agent.read(
        rig.registration.descriptors([0, 50], [50, 4096]), remote, backend=rig.backend
    ).wait()
    flat = pattern(1, NUM_BLOCKS, BLOCK_BYTES).reshape(-1)
    assert (rig.blocks.reshape(-1)[:50] == flat[100:150]).all(), "the first part"
    assert (rig.blocks.reshape(-1)[50:4146] == flat[9000:13096]).all(), "the second part"


def repeats_what_was_prepared(rig: Rig) -> None:
    """A prepared transfer does the same each time, with the bytes that are there then."""
    prepared = rig.agent.prepare(rig.local(), rig.peer.blocks(lease=rig.lease()))
    for seed in (3, 4, 5):
        rig.ask("fill", seed)
        prepared.read(backend=rig.backend).wait()
        assert (rig.blocks == pattern(seed, NUM_BLOCKS, BLOCK_BYTES)).all(), f"round {seed}"


def finds_changed_bytes(rig: Rig) -> None:
    """A block whose bytes are not those that were leased does not count; the others do."""
    token = rig.lease(has_checksums=True)
    rig.ask("spoil", 5)
    transfer = rig.agent.read(rig.local(), rig.peer.blocks(lease=token), backend=rig.backend)
    _expect(CorruptBlock, transfer)
    result = transfer.result
    assert result is not None, "an ended transfer has a result"
    assert result.blocks_done < NUM_BLOCKS, "a damaged block was counted"
    assert result.codes[5] != 0, "the damaged block counts as arrived"


def refuses_a_revoked_lease(rig: Rig) -> None:
    """Nothing is read under a lease that was revoked."""
    number, token = rig.ask("lease", [0, 1])
    remote = rig.peer.blocks(lease=token)
    rig.ask("revoke", number)
    _expect(StaleReference, rig.agent.read(rig.local([0, 1]), remote, backend=rig.backend))


def refuses_an_expired_lease(rig: Rig) -> None:
    """Nothing is read under a lease whose time is over, unless it was renewed."""
    _, token = rig.ask("lease", [0], ttl_s=0.2)
    renewed, other = rig.ask("lease", [1], ttl_s=0.2)
    rig.ask("renew", renewed, 30.0)
    time.sleep(0.4)  # only time ends a lease
    remote = rig.peer.blocks(lease=token)
    _expect(StaleReference, rig.agent.read(rig.local([0]), remote, backend=rig.backend))
    rig.agent.read(rig.local([0]), rig.peer.blocks(lease=other), backend=rig.backend).wait()


def refuses_a_reused_slot(rig: Rig) -> None:
    """A lease is not taken for the next one that has its place."""
    number, token = rig.ask("lease", [0])
    rig.ask("revoke", number)
    for _ in range(4):
        rig.ask("lease", [1])
    remote = rig.peer.blocks(lease=token)
    _expect(StaleReference, rig.agent.read(rig.local([0]), remote, backend=rig.backend))


def refuses_who_it_is_not_for(rig: Rig) -> None:
    """A lease for somebody else is of no use, also to who pretends not to know."""
    token = rig.lease(peer="somebody-else", rights=READ | WRITE)
    lease = dataclasses.replace(RemoteLease.decode(token, KEY), peer="")
    remote = rig.peer.blocks([0], lease=lease)
    # A way that copies out of shared memory is kept from this by the owner for writes only: whoever
    # may map memory can look at it.
    _expect(UsageError, rig.agent.write(rig.local([0]), remote, backend=rig.backend))


def refuses_what_is_not_allowed(rig: Rig) -> None:
    """A lease for reading cannot be written under, also by who changes the token."""
    before = rig.ask("content", 3)
    lease = dataclasses.replace(RemoteLease.decode(rig.lease(), KEY), rights=Rights(3))
    rig.blocks[3] = 9
    remote = rig.peer.blocks([3], lease=lease)
    _expect(UsageError, rig.agent.write(rig.local([3]), remote, backend=rig.backend))
    assert rig.ask("content", 3) == before, "the owner's memory was written"


def ends_when_the_owner_dies(rig: Rig) -> None:
    """Nothing waits for a peer that is gone."""
    if rig.process is None:
        return
    token = rig.lease(rights=WRITE)
    rig.process.kill()
    began = time.monotonic()
    try:
        transfer = rig.agent.write(
            rig.local(), rig.peer.blocks(lease=token), deadline_s=2.0, backend=rig.backend
        )
        transfer.wait()
    except (PeerLost, TransferTimeout):
        pass
    else:
        raise AssertionError("a write to a dead peer was done")
    assert time.monotonic() - began < 2.0 + _LATE_S, "it waited longer than its deadline"


def ends_when_the_owner_freezes(rig: Rig) -> None:
    """A frozen peer costs a transfer its deadline, and no more."""
    if rig.process is None:
        return
    token = rig.lease(rights=WRITE)
    rig.write_one()
    rig.process.freeze()
    try:
        began = time.monotonic()
        transfer = rig.agent.write(
            rig.local(), rig.peer.blocks(lease=token), deadline_s=0.5, backend=rig.backend
        )
        _expect(TransferTimeout, transfer)
        assert time.monotonic() - began < 0.5 + _LATE_S, "it waited longer than its deadline"
        assert transfer.outcome is LinkOutcome.QUARANTINED, transfer.outcome
        assert [one for one in rig.agent.quarantine if one.is_write], "it is not in quarantine"
    finally:
        rig.process.thaw()
    assert transfer.wait_quiesced(_GRACE_S), "it did not quiesce when the peer went on"


def writes_nothing_late(rig: Rig) -> None:
    """Memory of a read that has quiesced, whatever its end, stays as it is."""
    remote, seen = rig.peer.blocks(lease=rig.lease()), set()
    for place, deadline_s in enumerate((0.00002, 0.0001, 0.0005, 0.002, 1.0)):
        transfer = rig.agent.read(rig.local(), remote, deadline_s=deadline_s, backend=rig.backend)
        if place % 2:
            transfer.cancel()
        try:
            transfer.wait()
        except (TransferTimeout, TransferCancelled) as error:
            seen.add(type(error))
        assert transfer.wait_quiesced(_GRACE_S), "it did not quiesce"
        rig.blocks[:] = place
        time.sleep(0.05)  # for what must not happen: nobody would tell
        assert (rig.blocks == place).all(), f"written after its end, deadline {deadline_s}"


def can_be_awaited(rig: Rig) -> None:
    """A transfer wakes the event loop that awaits it, and calls back."""
    remote, calls = rig.peer.blocks(lease=rig.lease()), []

    async def all_of_them() -> None:
        transfers = [rig.agent.read(rig.local(), remote, backend=rig.backend) for _ in range(8)]
        transfers[0].add_done_callback(lambda: calls.append(1))
        for transfer in transfers:
            result = await asyncio.wait_for(transfer, _GRACE_S)
            assert result.blocks_done == NUM_BLOCKS, result

    asyncio.run(all_of_them())
    assert calls == [1], calls


def _expect(error: type[KvxError], transfer: Any) -> None:
    try:
        transfer.wait(_GRACE_S)
    except error:
        return
    except KvxError as other:
        raise AssertionError(f"{error.__name__} was expected, not {other!r}") from other
    raise AssertionError(f"{error.__name__} was expected, and all was done")


Check = Callable[[Rig], None]
CHECKS: tuple[Check, ...] = (
    reads_what_was_leased,
    writes_before_it_tells,
    moves_strided_blocks,
    takes_parts_of_a_range,
    repeats_what_was_prepared,
    finds_changed_bytes,
    refuses_a_revoked_lease,
    refuses_an_expired_lease,
    refuses_a_reused_slot,
    refuses_who_it_is_not_for,
    refuses_what_is_not_allowed,
    ends_when_the_owner_freezes,
    writes_nothing_late,
    can_be_awaited,
    ends_when_the_owner_dies,
)


def run(backend: str, check: Check) -> None:
    """Run one check of a backend in a rig of its own."""
    with rig_of(backend) as rig:
        check(rig)
