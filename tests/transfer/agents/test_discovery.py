"""How agents find each other: the shared directory, gossip, static peers, a mesh."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from kvx.errors import StorageError, UnavailableError
from kvx.transfer.agents.address import TcpAddress, UnixAddress
from kvx.transfer.agents.dialler import routes
from kvx.transfer.agents.directory import CardDirectory
from kvx.transfer.agents.gossip import CardBook
from kvx.transfer.agents.identity import HostIdentity, Identity, host_identity
from kvx.transfer.agents.key import SharedKey
from kvx.transfer.agents.metadata import AgentCard, encode_card
from kvx.transfer.agents.peer_state import PeerState
from kvx.transfer.agents.sockets import private_directory, remove_stale, socket_directory
from tests.transfer.agents.fake_core import START, FakeNetwork

if TYPE_CHECKING:
    from kvx.transfer.agents.parts import AgentParts

KEY = SharedKey(b"k" * 16)
TEXT_KEY = "k" * 16
LOCAL = "tcp://127.0.0.1:0"
NOW = int(START * 1e9)
ELSEWHERE = HostIdentity("other-boot", 1, 2, 3, 4, 5)


def card(
    name: str = "a", *, sequence: int = 1, started_ns: int = 1, issued_ns: int = NOW,
    host: HostIdentity = ELSEWHERE, addresses: tuple[str, ...] = ("tcp://10.0.0.1:1",),
) -> AgentCard:  # fmt: skip
    identity = Identity(name, started_ns * 1000 + 1, started_ns)
    return AgentCard(identity, sequence, issued_ns, addresses, host, {})


def directory(path: Path, key: SharedKey | None = KEY) -> CardDirectory:
    return CardDirectory(path, key, forget_after_s=60.0)


def files(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir())


def names(found: list[tuple[AgentCard, bytes]]) -> list[str]:
    return [one.name for one, _ in found]


def test_cards_are_found_once_and_again_when_they_change(tmp_path: Path) -> None:
    path = tmp_path / "cards"
    writer, reader = directory(path), directory(path)
    writer.publish("a", encode_card(card(), KEY))
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((path / "a.card").stat().st_mode) == 0o600
    assert names(reader.scan(NOW, 10)) == ["a"]
    assert reader.scan(NOW, 10) == []
    writer.publish("a", encode_card(card(sequence=2), KEY))
    assert [one.sequence for one, _ in reader.scan(NOW, 10)] == [2]
    assert files(path) == ["a.card"]


def test_the_dead_and_the_outdated_are_removed(tmp_path: Path) -> None:
    shared = directory(tmp_path)
    dead = msgspec.structs.replace(host_identity(), pid_started=1)
    shared.publish("dead", encode_card(card("dead", host=dead), KEY))
    shared.publish("old", encode_card(card("old", issued_ns=NOW - int(61e9)), KEY))
    shared.publish("alive", encode_card(card("alive", host=host_identity()), KEY))
    assert names(shared.scan(NOW, 10)) == ["alive"]
    assert files(tmp_path) == ["alive.card"]


def test_what_is_no_card_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = directory(tmp_path)
    (tmp_path / "garbage.card").write_bytes(b"garbage")
    (tmp_path / "large.card").write_bytes(bytes(70_000))
    (tmp_path / "unsigned.card").write_bytes(encode_card(card("unsigned"), None))
    (tmp_path / "renamed.card").write_bytes(encode_card(card("a"), KEY))
    (tmp_path / "link.card").symlink_to("/etc/passwd")
    (tmp_path / "dir.card").mkdir()
    os.mkfifo(tmp_path / "pipe.card")
    assert shared.scan(NOW, 100) == []
    assert "passed over" in caplog.text


def test_only_the_own_card_is_withdrawn(tmp_path: Path) -> None:
    shared, mine = directory(tmp_path), card()
    shared.publish("a", encode_card(card(started_ns=5), KEY))
    shared.withdraw("a", mine.identity.incarnation)
    assert files(tmp_path) == ["a.card"]
    shared.publish("a", encode_card(mine, KEY))
    shared.withdraw("a", mine.identity.incarnation)
    assert files(tmp_path) == []


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        directory(tmp_path / "file" / "below")


def test_the_book_takes_newer_cards_only() -> None:
    book = CardBook("me", KEY, cards_max=2, forget_after_s=60.0)
    signed = [encode_card(one, KEY) for one in (card(sequence=2), card(sequence=1), card("me"))]
    assert [known.card.sequence for known in book.hear(signed, NOW)] == [2]
    assert book.hear([encode_card(card(started_ns=0, sequence=9), KEY)], NOW) == []
    assert book.hear([encode_card(card("b"), None), b"garbage"], NOW) == []
    assert book.hear([encode_card(card("b", issued_ns=NOW - int(61e9)), KEY)], NOW) == []
    assert book.hear([encode_card(card("b", issued_ns=NOW + int(900e9)), KEY)], NOW) == []
    assert len(book.hear([encode_card(card(name), KEY) for name in "bcd"], NOW)) == 1
    book.forget({"a"}, NOW + int(61e9))
    assert book.names() == ["a"]


def open_three(network: FakeNetwork, **config: object) -> list[AgentParts]:
    hub = network.open("hub", key=TEXT_KEY, listen=LOCAL, **config)
    spokes = [
        network.open(f"spoke-{n}", key=TEXT_KEY, listen=LOCAL, peers=hub.listeners.addresses,
                     **config)
        for n in range(2)
    ]  # fmt: skip
    network.advance(1.0)
    return [hub, *spokes]


def test_gossip_brings_cards_of_those_never_met() -> None:
    network = FakeNetwork()
    _, one, other = open_three(network)
    assert one.book.names() == ["hub", "spoke-1"]
    assert one.roster.current("spoke-1") is None
    with one.roster.changed:
        one.dialler.wish("spoke-1", "spoke-1")
    network.advance(0.5)
    record = one.roster.current("spoke-1")
    assert record is not None
    assert record.state is PeerState.UP
    assert other.roster.current("spoke-0") is not None


def test_news_travels_along_a_chain() -> None:
    network = FakeNetwork()
    chain = [network.open("a-0", key=TEXT_KEY, listen=LOCAL)]
    for number in range(1, 4):
        peers = chain[-1].listeners.addresses
        chain.append(network.open(f"a-{number}", key=TEXT_KEY, listen=LOCAL, peers=peers))
        network.advance(0.5)
    assert chain[0].book.names() == ["a-1", "a-2", "a-3"]


def test_without_gossip_nothing_is_passed_on() -> None:
    _, one, _ = open_three(FakeNetwork(), gossip=False)
    assert one.book.names() == ["hub"]


def test_a_mesh_connects_everybody() -> None:
    network = FakeNetwork()
    _, one, other = open_three(network, mesh=True)
    network.advance(2.0)
    for agent, name in ((one, "spoke-1"), (other, "spoke-0")):
        record = agent.roster.current(name)
        assert record is not None
        assert record.state is PeerState.UP


def test_a_new_life_is_known_by_gossip_before_it_is_met() -> None:
    network = FakeNetwork()
    hub, one, other = open_three(network)
    network.die(other)
    network.advance(0.5)
    later = network.open("spoke-1", key=TEXT_KEY, listen=LOCAL, peers=hub.listeners.addresses)
    network.advance(2.0)
    known = one.book.get("spoke-1")
    assert known is not None
    assert known.identity.incarnation == later.identity.incarnation


def test_cards_are_renewed_before_others_forget_them() -> None:
    network = FakeNetwork()
    _, one, _ = open_three(network, forget_after_s=3.0)
    network.advance(10.0)
    assert one.book.names() == ["hub", "spoke-1"]


def test_a_static_list_may_name_the_agent_itself() -> None:
    network = FakeNetwork()
    listen = "tcp://127.0.0.1:7100"
    one = network.open("a", key=TEXT_KEY, listen=listen, peers=[listen])
    network.advance(1.0)
    assert one.roster.all() == []
    assert len(network.dials) <= 2


def test_agents_in_one_directory_find_each_other(tmp_path: Path) -> None:
    network = FakeNetwork()
    one, other = (
        network.open(name, key=TEXT_KEY, listen=LOCAL, directory=tmp_path) for name in "ab"
    )
    network.advance(1.0)
    with one.roster.changed:
        one.dialler.wish("b", "b")
    network.advance(0.5)
    assert one.roster.current("b") is not None
    other.close(1.0)
    assert files(tmp_path) == ["a.card"]


def test_the_way_to_a_card_depends_on_where_one_stands(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        here = host_identity()
        there = msgspec.structs.replace(here, pid=here.pid + 1)
        told = (f"unix:{path}", "tcp://10.0.0.1:1", "tcp://127.0.0.1:1")
        same_host = card(host=there, addresses=told)
        unix, tcp, loop = UnixAddress(str(path)), TcpAddress("10.0.0.1", 1), (
            TcpAddress("127.0.0.1", 1)
        )  # fmt: skip
        assert routes(same_host, here, is_unix_first=True) == [unix, tcp, loop]
        assert routes(same_host, here, is_unix_first=False) == [tcp, loop, unix]
        assert routes(card(addresses=told), here, is_unix_first=True) == [tcp]
        other_user = msgspec.structs.replace(there, uid=there.uid + 1, net_namespace=1)
        assert routes(card(host=other_user, addresses=told), here, is_unix_first=True) == [tcp]
    path.unlink()
    assert routes(same_host, here, is_unix_first=True) == [tcp, loop]


def test_socket_files_lie_in_a_private_directory(tmp_path: Path) -> None:
    path = private_directory(tmp_path / "run" / "kvx")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(0o755)
    with pytest.raises(UnavailableError, match="mode 0700"):
        private_directory(path)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(UnavailableError, match="mode 0700"):
        private_directory(tmp_path / "link")


def test_stale_socket_files_are_removed(tmp_path: Path) -> None:
    stale, alive, foreign = (
        tmp_path / name for name in ("0" * 16 + ".sock", "1" * 16 + ".sock", "mine.sock")
    )
    for path in (stale, foreign):
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(str(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(alive))
        listener.listen()
        remove_stale(tmp_path)
        assert files(tmp_path) == [alive.name, foreign.name]


def test_sockets_of_one_kind_have_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    directory = socket_directory("engine")
    assert directory == tmp_path / "kvx" / "engine"
    assert stat.S_IMODE(directory.stat().st_mode) == stat.S_IMODE(directory.parent.stat().st_mode)
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(directory / ("0" * 16 + ".sock")))
    assert files(socket_directory("engine")) == []
    directory.parent.chmod(0o755)
    with pytest.raises(UnavailableError, match="XDG_RUNTIME_DIR"):
        socket_directory("engine")
