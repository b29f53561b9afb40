"""How agents and registrations begin and end, and who may connect."""

from __future__ import annotations

import gc
import threading
import time
import warnings

import numpy as np
import pytest

import kvx
from tests.transfer.agents.pairs import BYTES, KEY, Pair


def drop(held: list[object]) -> None:
    held.clear()
    gc.collect()


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
