"""What the NIXL backend does around NIXL, on bindings that do what a test wants."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from kvx.buffers import MemoryKind
from kvx.errors import PeerLost, UnavailableError, UsageError
from kvx.transfer.backend import Memory
from kvx.transfer.backends.nixl import messages
from kvx.transfer.backends.nixl.bindings import Progress
from kvx.transfer.codes import Code
from kvx.transfer.core import LeaseRef
from kvx_ext import _core
from tests.transfer.backends.fake_nixl import (
    NixlError,
    NotFoundError,
    RemoteDisconnectError,
    Request,
)
from tests.transfer.backends.nixl_rig import (
    ALL,
    READ,
    Lease,
    pattern,
    plan_of,
    request_of,
)
from tests.transfer.backends.nixl_scene import BLOCKS, SIZE, Scene, eventually

FIRST = np.arange(1, dtype=np.uint32)


def test_a_plan_is_prepared_once(scene: Scene) -> None:
    plan, lease = scene.plan(), scene.lease()
    for _ in range(3):
        scene.target[:] = 0
        job = scene.channel.submit(request_of(plan, lease))
        assert job.wait(5.0)
        assert job.state() == "done"
        assert (scene.target == pattern(SIZE, 1)).all()
    assert scene.fabric.counts == {"connect": 1, "prepare": 2, "request": 9, "post": 27}
    agent = scene.fabric.agents[scene.here.endpoint.life]
    assert agent.config.syncMode == "strict"
    assert agent.config.pthrDelay == 50_000
    scene.channel.close(1.0)
    assert eventually(lambda: not agent.things)


def test_memory_stays_quarantined_until_nixl_is_through(scene: Scene) -> None:
    scene.fabric.is_held = True
    job = scene.channel.submit(request_of(scene.plan(), scene.lease(), deadline_s=0.05))
    assert job.wait(2.0)
    assert job.state() == "timed_out"
    assert not job.wait_quiesced(0.1)
    assert scene.here.endpoint.quarantine()[0][:4] == (job.id, "there", False, job.bytes)
    assert not scene.here.endpoint.unregister(scene.memory, 0.0)
    scene.fabric.release()
    assert job.wait_quiesced(2.0)
    # Two batches were under way when the time was up, and no more were posted.
    assert np.count_nonzero(scene.target.reshape(8, -1).any(axis=1)) == 2
    assert scene.here.endpoint.quarantine() == []


def test_a_request_that_nixl_has_lost_sight_of_is_no_end(scene: Scene) -> None:
    scene.fabric.is_held = True
    job = scene.channel.submit(request_of(scene.plan(), scene.lease(), deadline_s=0.05))
    scene.fabric.fails_with = NotFoundError
    assert job.wait(2.0)
    assert not job.wait_quiesced(0.2)
    scene.fabric.fails_with = None
    scene.fabric.release()
    assert job.wait_quiesced(2.0)
    assert not Progress.UNKNOWN.is_end


@pytest.mark.parametrize(
    ("error", "code"), [(RemoteDisconnectError, Code.PEER_LOST), (NixlError, Code.UNAVAILABLE)]
)
def test_what_nixl_reports_becomes_a_code(scene: Scene, error: type, code: Code) -> None:
    scene.fabric.is_held = True
    job = scene.channel.submit(request_of(scene.plan(), scene.lease()))
    scene.fabric.fails_with = error
    assert job.wait(2.0)
    assert set(job.codes().tolist()) == {code}
    assert job.is_lost() == (code is Code.PEER_LOST)
    assert job.wait_quiesced(2.0)
    assert scene.channel.is_up() == (code is not Code.PEER_LOST)
    scene.fabric.fails_with = None
    scene.fabric.held.clear()


def test_a_lost_peer_is_forgotten_only_when_nothing_is_under_way(scene: Scene) -> None:
    agent = scene.fabric.agents[scene.here.endpoint.life]
    scene.fabric.is_held = True
    job = scene.channel.submit(request_of(scene.plan(), scene.lease()))
    assert eventually(lambda: len(scene.fabric.held) == 2)
    scene.here.lost("there", 2, True)
    assert job.wait(1.0)
    assert job.is_lost()
    assert not job.is_quiesced()
    assert agent.peers
    with pytest.raises(PeerLost, match="its agent is gone"):
        scene.channel.submit(request_of(scene.plan(), scene.lease()))
    scene.fabric.release()
    assert job.wait_quiesced(2.0)
    assert eventually(lambda: not agent.peers)


def test_a_write_holds_its_lease_while_it_may_arrive(scene: Scene) -> None:
    lease = scene.lease()
    scene.fabric.is_held = True
    job = scene.channel.submit(
        request_of(scene.plan(), lease, is_write=True, deadline_s=0.1, note=b"never")
    )
    assert job.wait(2.0)
    assert job.state() == "timed_out"
    time.sleep(0.05)
    assert scene.there.leases[lease].uses == 1
    assert scene.there.endpoint.held_writes() == 1
    scene.fabric.release()
    assert job.wait_quiesced(2.0)
    assert eventually(lambda: scene.there.leases[lease].uses == 0)
    assert scene.there.notes == []


def test_what_a_dead_writer_held_is_let_go(scene: Scene) -> None:
    lease = scene.lease()
    scene.fabric.is_held = True
    scene.channel.submit(request_of(scene.plan(), lease, is_write=True))
    assert eventually(lambda: len(scene.fabric.held) == 2)
    scene.there.lost("here", 1, False)  # not to be reached is not to be dead
    assert scene.there.leases[lease].uses == 1
    scene.there.lost("here", 9, True)  # another life
    assert scene.there.leases[lease].uses == 1
    scene.there.lost("here", 1, True)
    assert scene.there.leases[lease].uses == 0


def test_written_bytes_that_are_not_what_was_sent_are_corrupt(scene: Scene) -> None:
    scene.target[:] = pattern(SIZE, 5)
    arrived = scene.there.memories[scene.region]

    def damage(request: Request) -> None:
        if any(target == arrived.ctypes.data + 3 * 4096 for _, target, _ in request.pairs):
            arrived[3 * 4096 + 9] ^= 1

    scene.fabric.after_move = damage
    job = scene.channel.submit(request_of(scene.plan(), scene.lease(), is_write=True, note=b"no"))
    assert job.wait(5.0)
    assert job.codes().tolist() == [Code.OK] * 3 + [Code.CORRUPT] + [Code.OK] * 12
    assert scene.there.notes == []


def test_read_bytes_are_compared_by_the_owner_when_nothing_is_expected(scene: Scene) -> None:
    def damage(request: Request) -> None:
        if any(target == scene.memory.address + 4096 for target, _, _ in request.pairs):
            scene.target[4096] ^= 1

    scene.fabric.after_move = damage
    job = scene.channel.submit(request_of(scene.plan(), scene.lease()))
    assert job.wait(5.0)
    assert job.codes().tolist() == [Code.OK, Code.CORRUPT] + [Code.OK] * 14


def test_a_range_lease_is_checked_within_its_range(scene: Scene) -> None:
    lease = scene.there.grant(scene.region, [(4096, 0, 1, 16384)], ALL)
    inside = plan_of(scene.memory, [(0, 0, 1, 512)], scene.region, [(5000, 1024, 2, 256)])
    job = scene.channel.submit(request_of(inside, lease))
    assert job.wait(5.0)
    assert job.state() == "done"
    for row in ((4000, 0, 1, 512), (20_000, 0, 1, 512)):
        outside = plan_of(scene.memory, [(0, 0, 1, 512)], scene.region, [row])
        job = scene.channel.submit(request_of(outside, lease))
        assert job.wait(5.0)
        assert job.codes().tolist() == [Code.USAGE]


def test_deadlines_hold_while_nixl_copies_for_others(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks ends what is due, though the thread that should is busy."""
    busy = threading.Event()
    agent = scene.fabric.agents[scene.here.endpoint.life]
    posts = agent.postXferReq

    def slow(number: int, note: str) -> int:
        busy.wait(2.0)
        return posts(number, note)

    monkeypatch.setattr(agent, "postXferReq", slow)
    job = scene.channel.submit(request_of(scene.plan(), scene.lease(), deadline_s=0.05))
    begun = time.monotonic()
    assert job.wait(1.0)
    assert time.monotonic() - begun < 0.5
    assert job.state() == "timed_out"
    assert not job.is_quiesced()
    busy.set()
    assert job.wait_quiesced(2.0)


def test_a_plan_nixl_refuses_raises_at_once(scene: Scene) -> None:
    unregistered = Memory(99, 4096, 4096)
    with pytest.raises(UsageError, match="not registered"):
        scene.channel.submit(
            request_of(plan_of(unregistered, BLOCKS[:1], scene.region, BLOCKS[:1]), scene.lease())
        )
    unlike = plan_of(scene.memory, BLOCKS[:2], scene.region, [BLOCKS[0], (0, 0, 1, 5)])
    with pytest.raises(UsageError, match="block 1 has other bytes"):
        scene.channel.submit(request_of(unlike, scene.lease()))
    with pytest.raises(UnavailableError, match="cannot register"):
        scene.here.endpoint.register(Memory(98, 4096, 4096, MemoryKind.DEVICE, 0))
    assert not scene.channel._courses


def test_peers_that_do_not_fit_are_told_apart(scene: Scene) -> None:
    card = scene.there.card()
    assess = scene.here.endpoint.assess
    assert assess(card) == ""
    assert assess(replace(card, card=None)) == "there has no NIXL"
    assert "malformed" in assess(replace(card, card=b"\xff"))
    for version, nixl, plugins, why in (
        (9, "1.5.1", ["UCX"], "version 9"),
        (messages.VERSION, "1.4.0", ["UCX"], "has NIXL 1.4.0"),
        (messages.VERSION, "1.5.9", ["LIBFABRIC"], "has started LIBFABRIC"),
    ):
        other = messages.encode(messages.Card(version, nixl, plugins))
        assert why in assess(replace(card, card=other))
    with pytest.raises(UnavailableError, match="calls itself there"):
        scene.here.endpoint.connect(replace(card, incarnation=77), 1.0)


def test_a_lease_for_reading_is_not_held(scene: Scene) -> None:
    lease = scene.lease(READ)
    sums = _core.row_checksums(pattern(SIZE, 1), np.array(BLOCKS, np.int64))
    job = scene.channel.submit(request_of(scene.plan(checksums=sums), lease))
    assert job.wait(5.0)
    assert job.state() == "done"
    assert scene.there.leases[lease].uses == 0
    scene.there.leases[lease].is_revoked = True
    job = scene.channel.submit(request_of(scene.plan(checksums=sums), lease))
    assert job.wait(5.0)
    assert set(job.codes().tolist()) == {Code.STALE}


def test_a_read_is_compared_with_what_was_expected(scene: Scene) -> None:
    sums = _core.row_checksums(pattern(SIZE, 1), np.array(BLOCKS, np.int64))
    scene.there.memories[scene.region][7 * 4096] ^= 1
    job = scene.channel.submit(request_of(scene.plan(checksums=sums), scene.lease(), note=b"no"))
    assert job.wait(5.0)
    assert np.flatnonzero(job.codes() == Code.CORRUPT).tolist() == [7]
    assert job.blocks_done == 15
    assert job.state() == "failed"


def test_a_block_outside_the_region_of_the_peer_is_never_asked_for(scene: Scene) -> None:
    small = scene.there.memory(4096).region
    assert eventually(lambda: small in scene.channel._regions)
    plan = plan_of(scene.memory, BLOCKS[1:2], small, BLOCKS[1:2])
    with pytest.raises(UsageError, match="remote block 0"):
        scene.channel.submit(request_of(plan, scene.lease()))


def test_a_peer_writes_only_where_it_was_given_the_right(scene: Scene) -> None:
    plan = scene.plan()
    for rights in (READ, READ | 2):
        job = scene.channel.submit(request_of(plan, scene.lease(rights), is_write=True))
        assert job.wait(5.0)
        assert set(job.codes().tolist()) == {Code.USAGE}
    assert (scene.there.memories[scene.region] == pattern(SIZE, 1)).all()


def test_a_lease_that_ends_during_a_write_makes_it_stale(scene: Scene) -> None:
    lease = scene.lease()
    scene.fabric.is_held = True
    job = scene.channel.submit(request_of(scene.plan(), lease, is_write=True, note=b"no"))
    assert eventually(lambda: len(scene.fabric.held) == 2)
    scene.there.leases[lease].is_revoked = True
    scene.fabric.release()
    assert job.wait(5.0)
    assert set(job.codes().tolist()) == {Code.STALE}
    assert scene.there.leases[lease].uses == 0
    assert scene.there.notes == []


@pytest.mark.parametrize("is_write", [False, True])
def test_numbers_of_64_bits_arrive_whole(scene: Scene, *, is_write: bool) -> None:
    """Leases are named by 64 random bits, and jobs by more than 32."""
    lease = LeaseRef((1 << 64) - 1, (1 << 32) - 1, (1 << 63) + 5)
    scene.there.leases[lease] = Lease(scene.region, np.array(BLOCKS, np.int64), ALL)
    scene.here.endpoint._numbers = itertools.count((1 << 63) - 1)
    scene.target[:] = pattern(SIZE, 8)
    job = scene.channel.submit(request_of(scene.plan(), lease, is_write=is_write, note=b"came"))
    assert job.wait(5.0)
    assert job.state() == "done"
    assert job.id == (1 << 63) - 1
    assert eventually(lambda: scene.there.notes == [("here", b"came")])
    assert scene.there.leases[lease].uses == 0


def test_a_small_transfer_is_moved_by_whoever_submits_it(scene: Scene) -> None:
    plan = plan_of(scene.memory, BLOCKS[:1], scene.region, BLOCKS[:1], indices=FIRST)
    job = scene.channel.submit(request_of(plan, scene.lease()))
    assert (scene.target[:4096] == pattern(SIZE, 1)[:4096]).all()
    assert job.wait(5.0)
    assert job.state() == "done"


@pytest.mark.parametrize("is_write", [False, True])
def test_a_small_transfer_is_verified_too(scene: Scene, *, is_write: bool) -> None:
    """Its check travels with the word that it has moved."""
    arrived = scene.there.memories[scene.region] if is_write else scene.target

    def damage(_: Request) -> None:
        arrived[77] ^= 1

    scene.fabric.after_move = damage
    plan = plan_of(scene.memory, BLOCKS[:1], scene.region, BLOCKS[:1], indices=FIRST)
    job = scene.channel.submit(request_of(plan, scene.lease(), is_write=is_write, note=b"no"))
    assert job.wait(5.0)
    assert job.codes().tolist() == [Code.CORRUPT]
    assert scene.there.notes == []
