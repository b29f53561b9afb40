"""The bytes of handshakes, cards and tokens are what docs/formats/agents.md says."""

from __future__ import annotations

import hashlib
import hmac

import msgspec
import numpy as np
import pytest

from kvx.transfer.agents import messages
from kvx.transfer.agents.handshake import Handshake
from kvx.transfer.agents.identity import HostIdentity, Identity
from kvx.transfer.agents.key import SharedKey
from kvx.transfer.agents.lease_token import RemoteLease, Rights
from kvx.transfer.agents.metadata import AgentCard, encode_card
from kvx.transfer.core import LeaseRef

SECRET = b"golden golden golden"
KEY = SharedKey(SECRET)
A, B = Identity("a", 11, 1), Identity("b", 22, 2)


def mac(*parts: bytes) -> bytes:
    joined = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hmac.new(SECRET, joined, hashlib.sha256).digest()


def plain(data: bytes) -> object:
    return msgspec.msgpack.decode(data)


def test_handshake() -> None:
    one = Handshake(A, KEY, is_dialler=True, is_local=False, lane=1, nonce=b"1" * 32)
    other = Handshake(B, KEY, is_dialler=False, is_local=False, nonce=b"2" * 32)
    hello = one.begin()
    challenge = other.receive(hello).reply or b""
    proof = one.receive(challenge).reply or b""
    welcome = other.receive(proof).reply or b""
    assert {message[:5] for message in (hello, challenge, proof, welcome)} == {b"kvxh\x01"}
    assert plain(hello[5:]) == {
        "type": "hello", "identity": ["a", 11, 1], "nonce": b"1" * 32, "has_key": True,
        "lane": 1, "expected": None,
    }  # fmt: skip
    assert plain(challenge[5:]) == {
        "type": "challenge", "identity": ["b", 22, 2], "nonce": b"2" * 32, "has_key": True,
    }  # fmt: skip
    assert plain(proof[5:]) == {
        "type": "proof", "mac": mac(b"kvx handshake 1 dialler", hello, challenge),
    }  # fmt: skip
    assert plain(welcome[5:]) == {
        "type": "welcome", "mac": mac(b"kvx handshake 1 accepter", hello, challenge),
    }  # fmt: skip


def test_card() -> None:
    host = HostIdentity("boot", 1, 2, 3, 4, 5)
    card = AgentCard(A, 3, 4, ("tcp://h:1",), host, {"tcp": b"x"})
    unsigned, signed = encode_card(card, None), encode_card(card, KEY)
    assert unsigned[:6] == b"kvxc\x01\x00"
    assert plain(unsigned[6:]) == {
        "identity": ["a", 11, 1], "sequence": 3, "issued_ns": 4, "addresses": ["tcp://h:1"],
        "host": ["boot", 1, 2, 3, 4, 5], "backends": {"tcp": b"x"},
    }  # fmt: skip
    prefix = b"kvxc\x01\x01"
    assert signed == prefix + mac(b"kvxc", prefix, unsigned[6:]) + unsigned[6:]


@pytest.mark.parametrize(
    ("rows", "blocks"),
    [
        (
            [[4096 * n, 4096, 1, 4096] for n in (5, 3)],
            {"type": "equal", "base": 12288, "unit": 8192, "stride": 4096, "count": 1,
             "row_bytes": 4096, "ids": bytes([1, 0, 0, 0, 0, 0, 0, 0])},
        ),
        (
            [[0, 8, 2, 4], [100, 1, 1, 1]],
            {"type": "raw", "rows": np.array([[0, 8, 2, 4], [100, 1, 1, 1]], "<i8").tobytes()},
        ),
    ],
)  # fmt: skip
def test_lease_token(rows: list[list[int]], blocks: dict[str, object]) -> None:
    lease = RemoteLease(
        "p", 5, LeaseRef(1, 2, 3), 4, 1 << 20, Rights.READ, 30.0, "q", np.array(rows, np.int64),
        np.array([1, 2], np.uint64),
    )  # fmt: skip
    token = lease.encode()
    assert token[:6] == b"kvxl\x01\x00"
    assert plain(token[6:]) == {
        "agent": "p", "incarnation": 5, "lease": 1, "slot": 2, "generation": 3, "region": 4,
        "region_bytes": 1 << 20, "rights": 1, "ttl_s": 30.0, "peer": "q", "blocks": blocks,
        "checksums": bytes([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]), "keys": b"",
    }  # fmt: skip


def test_messages() -> None:
    for message, expected in [
        (messages.OwnCard(b"x"), {"type": "card", "card": b"x"}),
        (messages.KnownCards([b"x"]), {"type": "known", "cards": [b"x"]}),
        (messages.Regions([7]), {"type": "regions", "regions": [7]}),
        (messages.Reach({7: "no"}), {"type": "reach", "objections": {7: "no"}}),
        (messages.Goodbye("r"), {"type": "goodbye", "reason": "r"}),
        (messages.BackendWord("n", b"y"), {"type": "backend", "backend": "n", "payload": b"y"}),
    ]:
        encoded = messages.encode(message)
        assert msgspec.msgpack.Decoder(dict, strict=False).decode(encoded) == expected
