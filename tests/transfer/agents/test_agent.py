"""The agent's own interface, with both agents in this process."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

import kvx
from kvx.buffers import Buffer, MemoryKind
from kvx.transfer.agents.registration import Registration

KEY = "a key for the tests"
BLOCKS, BYTES = 32, 4096


@dataclass
class Pair:
    one: kvx.Agent
    other: kvx.Agent
    peer: kvx.Peer
    mine: np.ndarray
    theirs: np.ndarray
    here: Registration
    there: Registration

    def remote(self, ids: object = None, **terms: object) -> kvx.RemoteBlocks:
        return self.peer.blocks(ids, lease=self.lease(**terms).token)

    def lease(self, **terms: object) -> kvx.BlockLease:
        return self.there.lease(self.there.blocks(range(BLOCKS)), **terms)

    def local(self, ids: object = None) -> kvx.Descriptors:
        return self.here.blocks(range(BLOCKS) if ids is None else ids)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with kvx.Agent("one", key=KEY) as one, kvx.Agent("other", key=KEY) as other:
        mine = np.zeros((BLOCKS, BYTES), np.uint8)
        theirs = np.random.default_rng(3).integers(0, 256, (BLOCKS, BYTES), dtype=np.uint8)
        yield Pair(
            one, other, one.connect(other.export()), mine, theirs, one.register(mine),
            other.register(theirs),
        )  # fmt: skip


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


def drop(held: list[object]) -> None:
    held.clear()
    gc.collect()


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


def test_a_registration_is_let_go_when_nobody_uses_it(pair: Pair) -> None:
    lease = pair.lease()
    remote = pair.peer.blocks(lease=lease.token)
    pair.other.deregister(pair.there)
    assert not pair.there.is_open
    with pytest.raises(kvx.StaleReference):
        pair.one.read(pair.local(), remote).wait()
    with pytest.raises(kvx.UsageError, match="registration is closed"):
        pair.there.blocks([0])
    pair.there.close()


def test_memory_stays_alive_for_as_long_as_it_is_registered() -> None:
    with kvx.Agent("one", key=KEY) as one, kvx.Agent("other", key=KEY) as other:
        source = np.full((1, BYTES), 7, np.uint8)
        registration = other.register(source)
        token = registration.lease().token
        del source, registration
        gc.collect()
        junk = [np.full((1, BYTES), 9, np.uint8) for _ in range(64)]
        target = np.zeros(BYTES, np.uint8)
        peer = one.connect(other.export())
        here = one.register(target)
        remote = peer.descriptors([0], [BYTES], lease=token)
        one.read(here.descriptors([0], [BYTES]), remote).wait()
        assert (target == 7).all()
        assert len(junk) == 64


def test_closing_with_transfers_under_way(pair: Pair) -> None:
    transfers = [pair.one.read(pair.local(), pair.remote(), backend="tcp") for _ in range(50)]
    called = threading.Event()
    transfers[-1].add_done_callback(called.set)
    began = time.monotonic()
    pair.one.close(2.0)
    assert time.monotonic() - began < 4.0
    assert called.wait(5.0)
    for transfer in transfers:
        assert transfer.poll() in (
            kvx.TransferState.DONE, kvx.TransferState.CANCELLED, kvx.TransferState.FAILED
        )  # fmt: skip
        assert transfer.error is None or isinstance(transfer.error, kvx.TransferError)
    with pytest.raises(kvx.UsageError, match="agent one is closed"):
        pair.one.export()
    assert pair.one.close() == kvx.AgentCloseReport(0, 0, 0)


def test_a_forgotten_agent_says_so_and_closes() -> None:
    agent = kvx.Agent("forgotten", key=KEY)
    thread = agent._parts.loop._thread
    path = agent._parts.listeners._path
    held = [agent]
    del agent
    with pytest.warns(ResourceWarning, match="agent forgotten was never closed"):
        drop(held)
    thread.join(5)
    assert not thread.is_alive()
    assert path is not None
    assert not path.exists()


def test_a_failure_that_nobody_looked_at_is_told(pair: Pair) -> None:
    remote = pair.remote()
    pair.other.deregister(pair.there)
    transfer = pair.one.read(pair.local(), remote, backend="tcp")
    transfer._drive.job.wait(5.0)
    held = [transfer]
    del transfer
    with pytest.warns(ResourceWarning, match="nobody looked at the failure of the read from"):
        drop(held)


def test_keys_and_addresses() -> None:
    with pytest.raises(kvx.UsageError, match=r"tcp://0\.0\.0\.0:0 can be reached.*no key"):
        kvx.Agent("x", listen="tcp://0.0.0.0:0")
    with pytest.raises(kvx.UsageError, match="has 5 bytes, at least 16"):
        kvx.Agent("x", key="short")
    with kvx.Agent("x", listen=["tcp://0.0.0.0:0", "tcp://[::1]:0"], key=KEY) as agent:
        tcp = [address for address in agent.addresses if address.startswith("tcp")]
        assert not any("//0." in address for address in tcp)
        assert KEY not in repr(vars(agent)) + repr(agent.config) + repr(agent)
    with kvx.Agent("x", config={"unix": False}) as agent:
        assert agent.addresses == ()
    with kvx.Agent("x", key=KEY, listen="tcp://127.0.0.1:0") as one:
        taken = next(address for address in one.addresses if address.startswith("tcp"))
        with pytest.raises(kvx.KvxError):
            kvx.Agent("y", key=KEY, listen=taken)


@pytest.mark.parametrize("keys", [(KEY, None), (KEY, KEY[::-1]), (None, KEY)])
def test_connecting_with_other_keys_fails_at_once(keys: tuple[str | None, str | None]) -> None:
    listen = "tcp://127.0.0.1:0"
    with kvx.Agent("one", key=keys[0]) as one, kvx.Agent("o", key=keys[1], listen=listen) as other:
        began = time.monotonic()
        with pytest.raises(kvx.IncompatibleError, match="key") as raised:
            one.connect(other.addresses[0], timeout_s=10)
        assert time.monotonic() - began < 5
        assert KEY not in str(raised.value)
        with pytest.raises(kvx.IncompatibleError, match=r"signed|key"):
            one.import_peer(other.export())
        assert other.peers == {}


def test_connecting_with_nobody_takes_its_time_and_no_more() -> None:
    with kvx.Agent("one", key=KEY) as one:
        began = time.monotonic()
        with pytest.raises(kvx.TransferTimeout, match=r"refused.*is it running"):
            one.connect("tcp://127.0.0.1:9", timeout_s=0.4)
        with pytest.raises(kvx.TransferTimeout, match="no address of nobody is known"):
            one.connect("nobody", timeout_s=0.2)
        assert time.monotonic() - began < 2
        with pytest.raises(kvx.UsageError, match="is no address"):
            one.connect("tcp:bad")


def test_a_peer_that_starts_later_is_waited_for() -> None:
    listen = "tcp://127.0.0.1:0"
    with kvx.Agent("probe", listen=listen, key=KEY, config={"unix": False}) as probe:
        address = probe.addresses[0]
    found: list[kvx.Peer] = []
    with kvx.Agent("one", key=KEY) as one:
        thread = threading.Thread(target=lambda: found.append(one.connect(address, timeout_s=10)))
        thread.start()
        time.sleep(0.3)
        with kvx.Agent("late", listen=address, key=KEY):
            thread.join(10)
            assert [peer.name for peer in found] == ["late"]


def test_old_cards_and_own_cards_are_refused(pair: Pair) -> None:
    old = pair.other.export()
    with pair.other._parts.roster.changed:
        pair.other._parts.discovery.announce()
    new = pair.other.export()
    pair.one.import_peer(new)
    with pytest.raises(kvx.UsageError, match="is an old one"):
        pair.one.import_peer(old)
    with pytest.raises(kvx.UsageError, match="name of this agent"):
        pair.one.import_peer(pair.one.export())
    info = pair.one.import_peer(new)
    assert (info.name, info.incarnation, info.is_same_host) == (
        "other", pair.other.incarnation, True,
    )  # fmt: skip


def test_a_restart_in_this_process_fences_the_former_life(pair: Pair) -> None:
    remote = pair.remote()
    pair.other.close()
    with kvx.Agent("other", key=KEY) as later:
        peer = pair.one.connect(later.export())
        assert peer != pair.peer
        assert peer.state is kvx.PeerState.UP
        assert pair.peer.state is kvx.PeerState.FENCED
        with pytest.raises(kvx.StaleReference, match="other was restarted"):
            pair.one.read(pair.local(), remote)
        assert any(isinstance(event, kvx.PeerRestarted) for event in pair.one.events())


def test_a_closed_peer_is_not_dialled_again(pair: Pair) -> None:
    pair.peer.close()
    time.sleep(0.5)
    assert pair.peer.state is kvx.PeerState.LOST
    assert pair.peer.reason == "closed on this side"
    assert pair.one.connect("other").state is kvx.PeerState.UP


def test_nothing_is_left_running() -> None:
    before = threading.active_count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            with kvx.Agent("one", key=KEY) as one, kvx.Agent("other", key=KEY) as other:
                one.connect(other.export())
    assert threading.active_count() == before
