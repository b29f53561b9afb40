"""How NIXL endpoints part: what each waits for, and what it is told over NIXL's connection."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from kvx.errors import PeerLost, UnavailableError
from kvx.transfer.backends.nixl import messages
from kvx.transfer.codes import Code
from tests.transfer.backends.nixl_rig import request_of
from tests.transfer.backends.nixl_scene import Scene, eventually


def test_closing_keeps_what_nixl_may_touch(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    agent = scene.agent(scene.here)
    scene.fabric.is_held = True
    job = scene.channel.submit(request_of(scene.plan(), scene.lease()))
    assert eventually(lambda: len(scene.fabric.held) == 2)
    scene.here.endpoint.close(0.1)
    assert job.state() == "cancelled"
    assert "may touch memory of here" in caplog.text
    assert len(agent.registered) == 1
    with pytest.raises(UnavailableError, match="closed"):
        scene.here.endpoint.connect(scene.there.card(), 0.1)
    scene.fabric.release()
    assert scene.here.endpoint.pump.wait_ended(5.0)
    assert not agent.registered
    assert not agent.peers


def test_an_owner_learns_that_a_reader_has_closed(scene: Scene) -> None:
    scene.here.is_cut_off = True
    scene.there.lost("here", 1, False)
    assert not scene.there.endpoint.unregister(scene.source, 0.1)
    scene.here.endpoint.close(5.0)
    assert scene.there.endpoint.unregister(scene.source, 5.0)


def test_an_owner_learns_that_a_reader_who_is_cut_off_reads_nothing(scene: Scene) -> None:
    scene.disconnect()
    assert scene.there.endpoint.unregister(scene.source, 5.0)


def test_what_was_said_before_a_hello_is_not_said_of_it(scene: Scene) -> None:
    scene.disconnect()
    there = scene.agent(scene.there)
    assert eventually(lambda: not scene.there.endpoint._registry.is_told("here.0000000000000001"))
    scene.here.is_cut_off = scene.there.is_cut_off = False
    old = messages.encode(messages.Left(scene.here.endpoint.life, 1))
    scene.here.endpoint.connect(scene.there.card(), 5.0)
    scene.agent(scene.here).genNotif(scene.there.endpoint.life, old, [])
    scene.there.is_cut_off = True
    scene.there.lost("here", 1, False)
    assert eventually(lambda: not there.notices)
    assert not scene.there.endpoint.unregister(scene.source, 0.1)


@pytest.mark.parametrize("is_write", [False, True])
def test_an_owner_waits_for_what_a_closed_agent_has_under_way(
    scene: Scene, *, is_write: bool
) -> None:
    lease = scene.lease()
    scene.fabric.is_held = True
    scene.channel.submit(request_of(scene.plan(), lease, is_write=is_write))
    assert eventually(lambda: len(scene.fabric.held) == 2)
    scene.disconnect()
    scene.here.endpoint.close(0.1)
    assert not scene.there.endpoint.unregister(scene.source, 0.1)
    assert scene.there.leases[lease].uses == is_write
    scene.fabric.release()
    assert scene.there.endpoint.unregister(scene.source, 5.0)
    assert eventually(lambda: scene.there.leases[lease].uses == 0)


def test_a_writer_that_is_cut_off_says_when_it_has_ended(scene: Scene) -> None:
    lease = scene.lease()
    scene.fabric.is_held = True
    job = scene.channel.submit(request_of(scene.plan(), lease, is_write=True))
    assert eventually(lambda: len(scene.fabric.held) == 2)
    scene.disconnect()
    assert job.wait(2.0)
    assert scene.there.leases[lease].uses == 1
    scene.fabric.release()
    assert eventually(lambda: scene.there.leases[lease].uses == 0)


def test_a_closed_owner_waits_for_writers_and_not_for_readers(scene: Scene) -> None:
    agent = scene.agent(scene.there)
    lease = scene.lease()
    scene.fabric.is_held = True
    scene.channel.submit(request_of(scene.plan(), lease, is_write=True))
    assert eventually(lambda: len(scene.fabric.held) == 2)
    scene.disconnect()
    scene.there.endpoint.close(0.1)
    assert agent.registered
    scene.fabric.release()
    assert scene.there.endpoint.pump.wait_ended(5.0)
    assert not agent.registered


def test_a_closed_owner_is_not_held_up_by_readers(scene: Scene) -> None:
    scene.fabric.is_held = True
    scene.channel.submit(request_of(scene.plan(), scene.lease()))
    assert eventually(lambda: len(scene.fabric.held) == 2)
    scene.disconnect()
    scene.there.endpoint.close(5.0)
    assert not scene.agent(scene.there).registered


def test_who_cannot_be_told_of_memory_is_not_waited_for(scene: Scene) -> None:
    scene.disconnect()
    memory = scene.there.memory(4096)
    assert scene.there.endpoint.unregister(memory, 0.0)


def test_who_was_away_is_asked_again_to_forget(scene: Scene) -> None:
    scene.there.is_cut_off = True
    asked = threading.Timer(0.05, setattr, (scene.there, "is_cut_off", False))
    asked.start()
    assert scene.there.endpoint.unregister(scene.source, 5.0)


def test_only_endings_are_whispered(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.there.is_cut_off = True
    scene.there.lost("here", 1, False)
    here = scene.agent(scene.here)
    left = messages.Left(scene.there.endpoint.life, 99)  # of somebody else
    for said in (b"\xff", messages.encode(left), messages.encode(messages.Forgotten(1))):
        here.genNotif(scene.there.endpoint.life, said, [])
    assert eventually(lambda: caplog.text.count("whispered") == 3)
    assert not scene.there.endpoint.unregister(scene.source, 0.0)


def test_an_end_that_could_not_be_told_is_told_later(scene: Scene) -> None:
    lease = scene.lease()
    scene.fabric.is_held = True
    job = scene.channel.submit(request_of(scene.plan(), lease, is_write=True))
    assert eventually(lambda: len(scene.fabric.held) == 2)
    sends, scene.here.endpoint._host = (
        scene.here.endpoint._host,
        replace(scene.here.endpoint._host, send=lambda *_: (_ for _ in ()).throw(PeerLost("gone"))),
    )
    scene.here.lost("there", 2, False)
    scene.fabric.release()
    assert job.wait_quiesced(2.0)
    assert scene.there.leases[lease].uses == 1
    scene.here.endpoint._host = sends
    scene.here.endpoint.connect(scene.there.card(), 5.0)
    assert eventually(lambda: scene.there.leases[lease].uses == 0)


def test_memory_is_given_back_once_every_peer_has_forgotten_it(scene: Scene) -> None:
    source = scene.source
    scene.fabric.is_held = True
    job = scene.channel.submit(request_of(scene.plan(), scene.lease(), deadline_s=0.05))
    assert job.wait(2.0)
    assert not scene.there.endpoint.unregister(source, 0.1)
    scene.fabric.release()
    assert scene.there.endpoint.unregister(source, 2.0)
    job = scene.channel.submit(request_of(scene.plan(), scene.lease()))
    assert job.wait(2.0)
    assert set(job.codes().tolist()) == {Code.STALE}
