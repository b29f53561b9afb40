"""Cards and control messages: round trips, signatures, editions, limits."""

from __future__ import annotations

import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.errors import CapacityError, IncompatibleError, UsageError
from kvx.transfer.agents import messages
from kvx.transfer.agents.identity import HostIdentity, Identity, host_identity, new_identity
from kvx.transfer.agents.key import SharedKey
from kvx.transfer.agents.metadata import (
    CARD_BYTES_MAX,
    AgentCard,
    decode_card,
    encode_card,
)

KEY, OTHER = SharedKey(b"k" * 16), SharedKey(b"o" * 16)
HOST = HostIdentity("boot", 1, 2, 3, 4, 5)


def card(sequence: int = 1, **changes: object) -> AgentCard:
    identity = Identity("a", 7, 100)
    plain = AgentCard(identity, sequence, 0, ("tcp://10.0.0.1:7000",), HOST, {"tcp": b"x"})
    return msgspec.structs.replace(plain, **changes)


@pytest.mark.parametrize("key", [None, KEY])
def test_a_card_comes_back_as_it_was(key: SharedKey | None) -> None:
    data = encode_card(card(), key)
    assert decode_card(data, key) == card()
    assert data[:4] == b"kvxc"


@pytest.mark.parametrize(
    ("made_with", "read_with", "said"),
    [
        (KEY, OTHER, "made with another key"),
        (None, KEY, "not signed"),
        (KEY, None, "has no key"),
    ],
)
def test_a_card_of_another_key_is_refused(
    made_with: SharedKey | None, read_with: SharedKey | None, said: str
) -> None:
    with pytest.raises(IncompatibleError, match=said):
        decode_card(encode_card(card(), made_with), read_with)


def test_every_changed_bit_of_a_signed_card_is_found() -> None:
    data = encode_card(card(), KEY)
    for place in range(len(data)):
        for bit in range(8):
            forged = bytearray(data)
            forged[place] ^= 1 << bit
            with pytest.raises((UsageError, IncompatibleError)):
                decode_card(bytes(forged), KEY)


def test_later_versions_and_large_ones_are_refused() -> None:
    data = encode_card(card(), None)
    with pytest.raises(IncompatibleError, match="version 9"):
        decode_card(data[:4] + b"\x09" + data[5:], None)
    with pytest.raises(UsageError, match="at most 65536"):
        decode_card(data + bytes(CARD_BYTES_MAX), None)
    big = card(backends={f"b{n}": bytes(16 << 10) for n in range(5)})
    with pytest.raises(CapacityError, match="backend b0 takes 16384"):
        encode_card(big, KEY)


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": Identity("../etc", 7, 1)},
        {"identity": Identity("a", 0, 1)},
        {"identity": Identity("", 7, 1)},
        {"sequence": -1},
        {"addresses": ("x",) * 17},
        {"backends": {"UPPER": b""}},
        {"backends": {"a": bytes(17 << 10)}},
    ],
)
def test_values_out_of_bounds_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="malformed"):
        decode_card(encode_card(card(**changes), None), None)


@given(st.binary(max_size=400))
def test_no_bytes_break_the_decoders(data: bytes) -> None:
    for key in (None, KEY):
        for prefix in (b"", b"kvxc\x01\x00", b"kvxc\x01\x01"):
            with pytest.raises((UsageError, IncompatibleError)):
                decode_card(prefix + data, key)
    try:
        decoded = messages.decode(data)
    except UsageError:
        return
    assert messages.decode(messages.encode(decoded)) == decoded


def test_a_later_life_and_a_later_edition_are_newer() -> None:
    assert card(2).is_newer(card(1))
    assert not card(1).is_newer(card(1))
    later = card(1, identity=Identity("a", 3, 101))
    assert later.is_newer(card(9))
    assert not card(9).is_newer(later)


@pytest.mark.parametrize(
    "message",
    [
        messages.OwnCard(b"x"),
        messages.KnownCards([b"x", b"y"]),
        messages.Regions([1, 2]),
        messages.Reach({1: "", 2: "no"}),
        messages.Goodbye("closed"),
        messages.BackendWord("nixl", b"\x00"),
    ],
)
def test_messages_come_back(message: messages.Message) -> None:
    assert messages.decode(messages.encode(message)) == message
    with pytest.raises(UsageError, match="malformed"):
        messages.decode(messages.encode(message)[:-1])


def test_messages_have_limits() -> None:
    for message in (
        messages.KnownCards([b""] * (messages.CARDS_MAX + 1)),
        messages.Regions([1] * (messages.REGIONS_MAX + 1)),
        messages.Goodbye("x" * 513),
        messages.OwnCard(bytes(CARD_BYTES_MAX + 1)),
    ):
        with pytest.raises(UsageError, match="malformed"):
            messages.decode(messages.encode(message))
    with pytest.raises(UsageError, match="at most"):
        messages.decode(bytes(9 << 20))


def test_the_living_and_the_dead() -> None:
    here = host_identity()
    assert not here.is_dead()
    assert here.is_same_process(host_identity())
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert msgspec.structs.replace(here, pid=pid).is_dead()
    assert msgspec.structs.replace(here, pid_started=here.pid_started + 1).is_dead()
    assert not msgspec.structs.replace(here, pid=pid, boot_id="elsewhere").is_dead()
    assert not msgspec.structs.replace(here, pid=pid, uid=here.uid + 1).is_dead()


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "a b", "x" * 65, "ä"])
def test_names_are_file_names(name: str) -> None:
    with pytest.raises(UsageError, match="no name of an agent"):
        new_identity(name)


def test_two_lives_differ() -> None:
    one, other = new_identity("a"), new_identity("a")
    assert one.incarnation != other.incarnation
    assert other.is_newer(one)
