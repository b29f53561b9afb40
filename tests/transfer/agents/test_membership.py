"""Who is connected with whom, and how it is doing, on fake cores with a clock set by hand."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from kvx.errors import UsageError
from kvx.transfer.agents.dialler import Attempt
from kvx.transfer.agents.messages import OwnCard, encode
from kvx.transfer.agents.peer_state import (
    PeerChanged,
    PeerDown,
    PeerRestarted,
    PeerState,
    PeerUp,
)
from tests.transfer.agents.fake_core import FakeNetwork

if TYPE_CHECKING:
    from kvx.transfer.agents.parts import AgentParts

KEY = "0123456789abcdef"
LOCAL = "tcp://127.0.0.1:0"


def state(agent: AgentParts, name: str) -> PeerState | None:
    record = agent.roster.current(name)
    return None if record is None else record.state


def lanes(agent: AgentParts, name: str) -> list[tuple[int, bool]]:
    record = agent.roster.current(name)
    assert record is not None
    return sorted((lane.number, lane.is_dialled) for lane in record.lanes.values())


def join(network: FakeNetwork, one: AgentParts, other: AgentParts) -> None:
    one.dialler.wish(other.listeners.addresses[0])
    network.advance(0.2)
    assert state(one, other.identity.name) is PeerState.UP


def told(agent: AgentParts, kind: type) -> list[object]:
    return [event for event in agent.events.take() if isinstance(event, kind)]


@pytest.fixture
def network() -> FakeNetwork:
    return FakeNetwork()


def test_both_sides_are_up_and_told_once(network: FakeNetwork) -> None:
    one, other = network.open("a", key=KEY), network.open("b", key=KEY, listen=LOCAL)
    join(network, one, other)
    assert state(other, "a") is PeerState.UP
    assert told(one, PeerUp) == [PeerUp("b", other.identity.incarnation)]
    assert told(other, PeerUp) == [PeerUp("a", one.identity.incarnation)]
    assert lanes(one, "b") == [(0, True), (1, True)]
    assert lanes(other, "a") == [(0, False), (1, False)]


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("keyed", [True, False])
def test_crossing_dials_leave_the_one_of_the_smaller(
    network: FakeNetwork, names: tuple[str, str], keyed: bool
) -> None:
    key = KEY if keyed else None
    one, other = (network.open(name, key=key, listen=LOCAL) for name in names)
    for agent, peer in ((one, other), (other, one)):
        with agent.roster.changed:
            agent.discovery.take(peer.issuer.card, peer.issuer.data)
            agent.dialler.wish(peer.identity.name, peer.identity.name)
    for agent in (one, other):
        agent.dialler.dial(agent.membership.is_connected)
    network.advance(2.0)
    smaller, larger = sorted((one, other), key=lambda agent: agent.identity.rank)
    assert lanes(smaller, larger.identity.name) == [(0, True), (1, True)]
    assert lanes(larger, smaller.identity.name) == [(0, False), (1, False)]
    assert len(told(smaller, PeerUp)) == len(told(larger, PeerUp)) == 1
    assert one.core.cut == other.core.cut == []


def test_crossing_dials_by_address_settle_on_one(network: FakeNetwork) -> None:
    one = network.open("a", key=KEY, listen=LOCAL, connections=1)
    other = network.open("b", key=KEY, listen=LOCAL, connections=1)
    for agent, peer in ((one, other), (other, one)):
        agent.dialler.wish(peer.listeners.addresses[0])
        agent.dialler.dial(agent.membership.is_connected)
    network.advance(2.0)
    assert state(one, "b") is state(other, "a") is PeerState.UP
    assert one.core.cut == other.core.cut == []
    assert len(lanes(one, "b")) == len(lanes(other, "a")) == 1
    assert len(told(one, PeerUp)) == len(told(other, PeerUp)) == 1


def test_who_can_be_reached_from_one_side_only_is_not_kept_waiting(network: FakeNetwork) -> None:
    """The smaller one's dial is swallowed by a firewall; the larger one's gets through."""
    one = network.open("a", key=KEY, listen=LOCAL)
    other = network.open("b", key=KEY, listen=LOCAL)
    with one.roster.changed:
        one.discovery.take(other.issuer.card, other.issuer.data)
        wish = one.dialler.wish("b", "b")
    wish.connection = network.cores[0].add("10.0.0.1:1", is_unix=False).number
    one.dialler._attempts[wish.connection] = Attempt(wish, "10.0.0.1:1", 0, False, network.now)
    other.dialler.wish(one.listeners.addresses[0])
    network.advance(0.5)
    assert state(other, "a") is None
    network.advance(2.5)
    assert state(one, "b") is state(other, "a") is PeerState.UP


def test_dialling_who_is_connected_already_changes_nothing(network: FakeNetwork) -> None:
    one = network.open("a", key=KEY, listen=LOCAL, connections=1)
    other = network.open("b", key=KEY, listen=LOCAL, connections=1)
    join(network, one, other)
    for agent, address in ((other, one.listeners.addresses[0]), (one, "tcp://127.0.0.1:7777")):
        network.listeners["127.0.0.1:7777"] = network.cores[1]
        wish = agent.dialler.wish(address)
        network.advance(0.5)
        assert wish.name in ("a", "b")
        assert wish.due == float("inf")
    assert lanes(one, "b") == [(0, True)]
    assert lanes(other, "a") == [(0, False)]
    assert one.core.cut == other.core.cut == []
    assert one.core.refused == ["the two agents are connected already"]


def test_the_card_of_somebody_else_is_not_taken(network: FakeNetwork) -> None:
    one, other = network.open("a", key=KEY), network.open("b", key=KEY, listen=LOCAL)
    third = network.open("c", key=KEY)
    join(network, one, other)
    record = one.roster.current("b")
    assert record is not None
    one.core.send_message(next(iter(record.lanes)), encode(OwnCard(third.issuer.data)))
    network.settle()
    assert any("the card of c, another agent" in reason for reason in other.core.cut)


@pytest.mark.parametrize(
    ("health", "expected"),
    [
        ({"heard_ago_s": 9.0, "answered_ago_s": 4.0}, PeerState.FROZEN),
        ({"heard_ago_s": 0.1, "answered_ago_s": 9.0}, PeerState.UP),
        (
            {"heard_ago_s": 9.0, "answered_ago_s": 9.0, "unacknowledged": 3, "retransmits": 2},
            PeerState.HALF_OPEN,
        ),
        ({"heard_ago_s": 99.0, "answered_ago_s": 31.0}, PeerState.LOST),
    ],
)
def test_silence_is_judged(
    network: FakeNetwork, health: dict[str, object], expected: PeerState
) -> None:
    one, other = network.open("a", key=KEY), network.open("b", key=KEY, listen=LOCAL)
    join(network, one, other)
    one.events.take()
    network.listeners.clear()
    for connection in one.core.connections.values():
        connection.health.update(health)
    network.advance(0.5)
    assert state(one, "b") is expected
    if expected is not PeerState.UP:
        assert told(one, PeerChanged)[0] == PeerChanged(
            "b", other.identity.incarnation, PeerState.UP, expected
        )
    if expected is PeerState.FROZEN:
        for connection in one.core.connections.values():
            connection.health.clear()
        network.advance(0.5)
        assert state(one, "b") is PeerState.UP


def test_a_lost_peer_is_dialled_with_growing_waits(network: FakeNetwork) -> None:
    one = network.open("a", key=KEY, redial_s=0.2, redial_max_s=2.0)
    other = network.open("b", key=KEY, listen=LOCAL)
    join(network, one, other)
    network.dials.clear()
    network.die(other)
    network.advance(15.0)
    assert [type(event) for event in told(one, PeerDown)] == [PeerDown]
    times = [float(at) for _, at in network.dials]
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert waits[0] < 0.6
    assert all(0.9 <= wait <= 2.2 for wait in waits[4:])
    assert len(waits) < 25


def test_a_restarted_peer_is_fenced_and_joined_anew(network: FakeNetwork) -> None:
    one = network.open("a", key=KEY)
    other = network.open("b", key=KEY, listen="tcp://127.0.0.1:7000")
    join(network, one, other)
    former = one.roster.current("b")
    one.events.take()
    network.die(other)
    network.advance(0.1)
    later = network.open("b", key=KEY, listen="tcp://127.0.0.1:7000")
    network.advance(5.0)
    present = one.roster.current("b")
    assert former is not None
    assert present is not None
    assert former.state is PeerState.FENCED
    assert present.state is PeerState.UP
    assert present.number != former.number
    assert present.identity.incarnation == later.identity.incarnation
    assert told(one, PeerRestarted) == [
        PeerRestarted("b", later.identity.incarnation, other.identity.incarnation)
    ]


def test_a_restart_is_noticed_while_the_old_connection_seems_to_stand(
    network: FakeNetwork,
) -> None:
    one = network.open("a", key=KEY, listen=LOCAL)
    other = network.open("b", key=KEY, listen=LOCAL)
    join(network, one, other)
    former = one.roster.current("b")
    network.agents.remove(other)  # frozen for ever; nothing tells
    later = network.open("b", key=KEY, listen=LOCAL)
    later.dialler.wish(one.listeners.addresses[0])
    network.advance(1.0)
    assert former is not None
    assert former.state is PeerState.FENCED
    assert not former.lanes
    assert state(one, "b") is PeerState.UP


def test_a_former_life_cannot_come_back(network: FakeNetwork) -> None:
    one = network.open("a", key=KEY, listen=LOCAL)
    present = network.open("b", key=KEY)
    join(network, present, one)
    former = network.open("b", key=KEY, started_ns=1)
    former.dialler.wish(one.listeners.addresses[0])
    network.advance(1.0)
    record = one.roster.current("b")
    assert record is not None
    assert record.identity.incarnation == present.identity.incarnation
    assert record.state is PeerState.UP
    assert any("later b" in reason for reason in one.core.refused)


def test_different_keys_are_refused_without_a_trace_of_them(network: FakeNetwork) -> None:
    one, other = network.open("a", key=KEY), network.open("b", key=KEY[::-1], listen=LOCAL)
    wish = one.dialler.wish(other.listeners.addresses[0])
    network.advance(0.1)
    assert wish.refusal is not None
    assert wish.refusal.is_theirs
    assert "different keys" in wish.refusal.text
    assert KEY not in wish.refusal.text
    assert state(one, "b") is state(other, "a") is None


def test_a_flood_of_names_is_bounded(network: FakeNetwork) -> None:
    one = network.open("hub", key=KEY, listen=LOCAL, peers_max=3)
    for number in range(5):
        agent = network.open(f"spoke-{number}", key=KEY)
        agent.dialler.wish(one.listeners.addresses[0])
        network.advance(0.1)
    assert len(one.roster.all()) == 3


def test_who_sends_no_message_is_cut_off(network: FakeNetwork) -> None:
    one, other = network.open("a", key=KEY), network.open("b", key=KEY, listen=LOCAL)
    join(network, one, other)
    record = one.roster.current("b")
    assert record is not None
    for connection in list(record.lanes):
        one.core.send_message(connection, b"\xc1 no msgpack")
    network.settle()
    assert any("malformed" in reason for reason in other.core.refused)


def test_a_peer_says_what_it_can_copy(network: FakeNetwork) -> None:
    one, other = network.open("a"), network.open("b")
    one.core.listen_unix("/a")
    other.core.pulls = {1: "", 2: "the kernel does not let us"}
    other.dialler.wish("unix:/a")
    network.advance(0.2)
    number = one.roster.number_of("b")
    assert "has not said" in one.conversation.objection(number, 1)
    with one.roster.changed:
        one.conversation.add_region(1)
        one.conversation.add_region(2)
    network.settle()
    assert one.conversation.objection(number, 1) == ""
    assert "kernel" in one.conversation.objection(number, 2)


def test_a_number_given_out_before_its_peer_comes_is_its_own(network: FakeNetwork) -> None:
    one, other = network.open("a", key=KEY), network.open("b", key=KEY, listen=LOCAL)
    number = one.roster.number_of("b")
    assert one.roster.number_of("b") == number
    join(network, one, other)
    record = one.roster.current("b")
    assert record is not None
    assert record.number == number


def test_goodbye_is_the_reason(network: FakeNetwork) -> None:
    one, other = network.open("a", key=KEY), network.open("b", key=KEY, listen=LOCAL)
    join(network, one, other)
    other.close(1.0)
    network.advance(0.1)
    assert state(one, "b") is PeerState.LOST
    (down,) = told(one, PeerDown)
    assert down.reason == "it said: it was closed"


def test_listening_beyond_the_host_needs_a_key(network: FakeNetwork) -> None:
    with pytest.raises(UsageError, match=r"0\.0\.0\.0:7000 can be reached.*key=secrets"):
        network.open("a", listen="tcp://0.0.0.0:7000")
    network.open("a", listen="tcp://0.0.0.0:7000", key=KEY)
    network.open("b", listen="tcp://[::1]:7000")
