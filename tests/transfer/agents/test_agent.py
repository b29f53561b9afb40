"""The agent's own interface, with both agents in this process."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

import kvx
from kvx.buffers import Buffer, MemoryKind
from tests.transfer.agents.pairs import BLOCKS, BYTES, KEY, Pair


def test_the_first_screen(pair: Pair) -> None:
    result = pair.one.read(pair.local([0, 1]), pair.remote([4, 7])).wait()
    assert (pair.mine[:2] == pair.theirs[[4, 7]]).all()
    assert (result.blocks_done, result.bytes_done, result.backend) == (2, 2 * BYTES, "local")
    assert result.codes.tolist() == [0, 0]
    assert result.elapsed_s > 0
    assert pair.peer.state is kvx.PeerState.UP
    assert pair.one.peers == {"other": pair.peer}
    assert pair.other.peers["one"].incarnation == pair.one.incarnation
    assert pair.peer.connections()[0]["is_unix"]


def test_explain_says_what_is_taken_and_why(pair: Pair) -> None:
    explanation = pair.one.explain(pair.peer)
    assert explanation.chosen is not None
    assert explanation.chosen.backend == "local"
    lines = str(explanation).splitlines()
    assert lines[:3] == ["to other:", "  local: chosen", "  tcp: possible; local is preferred"]
    assert "  shm: not here because other is in this process: that is local" in lines
    with pytest.raises(kvx.UsageError, match="is no peer; met were other"):
        pair.one.explain("nobody")


def test_a_lease_for_one_peer_is_for_nobody_else(pair: Pair) -> None:
    with kvx.Agent("third", key=KEY) as third:
        peer = third.connect(pair.other.export())
        token = pair.lease(peer=pair.other.peers["one"]).token
        pair.one.read(pair.local(), pair.peer.blocks(lease=token)).wait()
        with pytest.raises(kvx.UsageError, match="the lease is for one only, and this is third"):
            peer.blocks(lease=token)
        ahead = pair.there.lease(peer="fourth").token
        with kvx.Agent("fourth", key=KEY) as fourth:
            buffer = fourth.register(np.zeros(16, np.uint8))
            late = fourth.connect(pair.other.export())
            remote = late.descriptors([0], [16], lease=ahead)
            fourth.read(buffer.descriptors([0], [16]), remote, backend="tcp").wait()


def test_leases_end_and_are_renewed(pair: Pair) -> None:
    lease = pair.lease(ttl_s=0.3)
    remote = pair.peer.blocks(lease=lease.token)
    lease.renew(20.0)
    time.sleep(0.4)
    pair.one.read(pair.local(), remote).wait()
    assert 19.0 < lease.remaining_s <= 20.0
    lease.revoke()
    assert lease.remaining_s == 0
    for backend in ("local", "tcp"):
        with pytest.raises(kvx.StaleReference, match="ask other for a new one"):
            pair.one.read(pair.local(), remote, backend=backend).wait()
    with pytest.raises(kvx.StaleReference, match="grant a new one"):
        lease.renew(5.0)
    with pair.lease() as inside:
        token = inside.token
    with pytest.raises(kvx.StaleReference):
        pair.one.read(pair.local(), pair.peer.blocks(lease=token)).wait()


def test_checksums_are_kept_and_found_wrong(pair: Pair) -> None:
    remote = pair.remote(checksums="compute")
    first = pair.one.read(pair.local(), remote).wait()
    again = pair.one.read(pair.local(), pair.remote(), backend="tcp").wait()
    assert (first.checksums == again.checksums).all()
    pair.theirs[3, 17] ^= 4
    for backend in ("local", "tcp"):
        transfer = pair.one.read(pair.local(), remote, backend=backend)
        with pytest.raises(kvx.CorruptBlock, match="block 3 of 32") as raised:
            transfer.wait()
        assert raised.value.key == "3"
        assert transfer.result is not None
        assert transfer.result.blocks_done < BLOCKS


def test_checksums_of_strided_blocks_are_those_of_their_bytes(pair: Pair) -> None:
    keys = np.random.default_rng(1).integers(0, 256, (4, 16), dtype=np.uint8)
    shaped = pair.there.strided([0, 8192, 16384, 24576], 1024, 4, 256)
    token = pair.there.lease(shaped, checksums="compute", keys=keys).token
    for backend in ("local", "tcp"):
        local = pair.here.descriptors(np.arange(4) * 1024, [1024] * 4)
        pair.one.read(local, pair.peer.blocks(lease=token), backend=backend).wait()
    flat = pair.theirs.reshape(-1)
    assert (pair.mine.reshape(-1)[:256] == flat[:256]).all()
    assert (pair.mine.reshape(-1)[256:512] == flat[1024:1280]).all()


def test_wrong_arguments_do_nothing(pair: Pair) -> None:
    remote, writable = pair.remote(), pair.remote(rights=kvx.Rights.WRITE)
    for call, said in [
        (lambda: pair.one.read(pair.local([1]), remote), "1 local blocks but 32 remote"),
        (lambda: pair.one.write(pair.local(), remote), "does not allow to write"),
        (lambda: pair.one.read(pair.local(), writable), "does not allow to read"),
        (lambda: pair.one.read(pair.local(), remote, deadline_s=0), "needs time"),
        (lambda: pair.one.read(pair.local(), remote, notify=bytes(70_000)), "at most 65536"),
        (lambda: pair.one.read(pair.local(), remote, backend="warp"), "'warp'; here are local"),
        (lambda: pair.here.blocks([BLOCKS]), "does not fit"),
        (lambda: pair.here.blocks([-1]), "negative"),
        (lambda: pair.peer.blocks([BLOCKS], lease=pair.lease().token), "32 blocks"),
        (lambda: pair.peer.descriptors([0], [1], lease=pair.lease().token), "by number"),
        (lambda: pair.lease(ttl_s=0), "ttl_s = 0"),
        (lambda: pair.lease(rights=kvx.Rights.WRITE, checksums="compute"), "stay right"),
        (lambda: pair.lease(checksums="crc"), "'compute'"),
        (lambda: pair.lease(checksums=np.zeros(3, np.uint64)), r"\(32,\) uint64"),
        (lambda: pair.lease(keys=np.zeros((32, 8), np.uint8)), r"\(32, 16\) uint8"),
        (lambda: pair.there.lease(pair.local()), "another registration"),
        (lambda: pair.one.register(np.zeros((4, 4), np.uint8)[:, :2]), "it has gaps"),
        (lambda: pair.one.register(np.zeros(0, np.uint8)), "no bytes"),
        (lambda: pair.one.register(7), "no memory that kvx can read"),
        (lambda: pair.one.read(pair.here.rows([[0, 1, 1, 5000]]), pair.remote([0])), "5000 bytes"),
    ]:
        with pytest.raises(kvx.UsageError, match=said):
            call()  # type: ignore[no-untyped-call]
    assert not pair.mine.any()


def test_parts_must_lie_within_the_range(pair: Pair) -> None:
    token = pair.there.lease(pair.there.descriptors([100], [50])).token
    pair.peer.descriptors([100, 149], [50, 1], lease=token)
    for offset, size in ((99, 1), (149, 2), (0, 10)):
        with pytest.raises(kvx.UsageError, match="is on bytes 100 to 150"):
            pair.peer.descriptors([offset], [size], lease=token)


def test_device_memory_is_refused_with_a_way_out(pair: Pair) -> None:
    device = Buffer(4096, (4, 64), (64, 1), 1, True, MemoryKind.DEVICE, 0, None)
    with pytest.raises(kvx.UsageError, match=r"no backend takes.*device.*kvx\.MemoryRegion"):
        pair.one.register(device)


def test_read_only_memory_can_be_leased_but_not_read_into(pair: Pair) -> None:
    fixed = np.arange(BYTES, dtype=np.uint16)
    fixed.flags.writeable = False
    there = pair.other.register(fixed)
    token = there.lease().token
    with pytest.raises(kvx.UsageError, match="read-only"):
        there.lease(rights=kvx.Rights.WRITE)
    remote = pair.peer.descriptors([0], [BYTES], lease=token)
    pair.one.read(pair.local([0]), remote).wait()
    assert (pair.mine[0] == fixed.view(np.uint8)[:BYTES]).all()
    here = pair.one.register(bytes(BYTES))
    with pytest.raises(kvx.UsageError, match="read-only"):
        pair.one.read(here.descriptors([0], [BYTES]), remote)


def test_notifications_come_with_their_sender(pair: Pair) -> None:
    pair.one.notify(pair.peer, b"hello")
    assert pair.other.notifications(5.0) == [kvx.Notification("one", b"hello")]
    pair.one.read(pair.local(), pair.remote(), notify=b"taken").wait()
    assert pair.other.notifications(5.0) == [kvx.Notification("one", b"taken")]
    with pytest.raises(kvx.UsageError):
        pair.one.notify(pair.peer, bytes(70_000))


def test_peer_events_reach_callbacks_and_readers(pair: Pair) -> None:
    seen: list[object] = []
    pair.one.on_event(lambda _: 1 / 0)
    pair.one.on_event(seen.append)
    pair.one.events()
    waiting = pair.one.iter_events()
    pair.other.close()
    down = next(event for event in waiting if isinstance(event, kvx.PeerDown))
    assert (down.name, down.reason) == ("other", "it said: it was closed")
    assert down in seen
    assert pair.peer.state is kvx.PeerState.LOST
    with pytest.raises(kvx.PeerLost, match="other is lost"):
        pair.one.read(pair.local([0]), kvx.RemoteBlocks(
            pair.peer, kvx.RemoteLease.decode(pair_token(pair), KEY), np.zeros((1, 4), np.int64),
            None,
        ))  # fmt: skip


def pair_token(pair: Pair) -> bytes:
    lease = kvx.RemoteLease(
        "other", pair.peer.incarnation, (1, 1, 1), 1, BYTES, kvx.Rights.READ, 1.0, "",
        np.array([[0, BYTES, 1, BYTES]], np.int64),
    )  # fmt: skip
    return lease.encode(KEY)


async def test_transfers_are_awaited(pair: Pair) -> None:
    transfers = [pair.one.read(pair.local(), pair.remote(), backend="tcp") for _ in range(20)]
    results = await asyncio.gather(*transfers)
    assert {result.blocks_done for result in results} == {BLOCKS}


def test_polling_alone_brings_a_transfer_to_its_end(pair: Pair) -> None:
    transfer = pair.one.read(pair.local(), pair.remote(), backend="tcp")
    end = time.monotonic() + 5
    while transfer.poll() is kvx.TransferState.PENDING and time.monotonic() < end:
        time.sleep(0.001)
    assert transfer.outcome is kvx.LinkOutcome.DONE
    assert transfer.wait_layer(0) == BLOCKS
    assert not transfer.cancel()
    with pytest.raises(kvx.UsageError, match="layer 0 only"):
        transfer.wait_layer(1)
    with pytest.raises(kvx.UsageError, match="on the CPU"):
        transfer.wait_on_stream(12345)


def test_metrics_count_what_was_done(pair: Pair) -> None:
    pair.one.read(pair.local(), pair.remote()).wait()
    pair.one.read(pair.local(), pair.remote(), backend="tcp")  # dropped at once
    deadline = time.monotonic() + 5
    while pair.one.stats()["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    text = pair.one.metrics.render()
    assert 'kvx_agent_transfers_total{verb="read",backend="local",state="done"} 1' in text
    assert f'kvx_agent_bytes_total{{verb="read",backend="local"}} {BLOCKS * BYTES}' in text
    assert "kvx_agent_peers_up 1" in text
    assert "kvx_agent_quarantined 0" in text
    assert pair.one.stats()["reads"] == 2
