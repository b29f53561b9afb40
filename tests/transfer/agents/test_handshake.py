"""The handshake, without any network: who gets in, and everything that must not."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.errors import UsageError
from kvx.transfer.agents import handshake as module
from kvx.transfer.agents.handshake import (
    HANDSHAKE_BYTES_MAX,
    Handshake,
    Introduction,
    Refusal,
    Step,
    Why,
)
from kvx.transfer.agents.identity import Identity
from kvx.transfer.agents.key import SharedKey

KEY = SharedKey("correct horse battery")
A, B = Identity("a", 11, 1), Identity("b", 22, 2)


def sides(
    dialler_key: SharedKey | None = KEY,
    accepter_key: SharedKey | None = KEY,
    *,
    is_local: bool = False,
    **dialler: object,
) -> tuple[Handshake, Handshake]:
    return (
        Handshake(A, dialler_key, is_dialler=True, is_local=is_local, **dialler),
        Handshake(B, accepter_key, is_dialler=False, is_local=is_local),
    )


def run(one: Handshake, other: Handshake) -> tuple[list[bytes], Step, Step]:
    """Carry messages to and fro until one side is silent; return them and the last steps."""
    sent, steps = [one.begin()], {True: Step(), False: Step()}
    is_dialler = False
    while sent[-1] is not None:
        step = (one if is_dialler else other).receive(sent[-1])
        steps[is_dialler] = step
        if step.reply is None:
            break
        sent.append(step.reply)
        is_dialler = not is_dialler
    return sent, steps[True], steps[False]


def test_both_prove_themselves() -> None:
    one, other = sides(lane=3)
    sent, dialler, accepter = run(one, other)
    assert len(sent) == 4
    assert (dialler.peer, accepter.peer) == (B, A)
    assert other.lane == 3
    assert one.is_over
    assert other.is_over
    assert all(len(message) < 256 for message in sent)


def test_without_keys_within_the_host_only() -> None:
    _, dialler, accepter = run(*sides(None, None, is_local=True))
    assert (dialler.peer, accepter.peer) == (B, A)
    _, dialler, accepter = run(*sides(None, None, is_local=False))
    assert dialler.peer is accepter.peer is None
    assert accepter.refusal is not None
    assert accepter.refusal.why is Why.KEY
    assert "one host only" in accepter.refusal.text


@pytest.mark.parametrize("keys", [(KEY, None), (None, KEY), (KEY, SharedKey(b"x" * 16))])
def test_other_keys_are_refused_and_nothing_is_told_of_them(
    keys: tuple[SharedKey | None, SharedKey | None],
) -> None:
    sent, dialler, accepter = run(*sides(*keys, is_local=True))
    assert dialler.peer is accepter.peer is None
    refusal = accepter.refusal or dialler.refusal
    assert refusal is not None
    assert refusal.why is Why.KEY
    assert ("has none" in refusal.text) == (None in keys)
    assert b"horse" not in b"".join(sent)
    assert b"xxxx" not in b"".join(sent)


def test_a_proof_is_worth_nothing_elsewhere() -> None:
    """Replayed into a second handshake with the same dialler's first message."""
    (hello, _, proof, _), _, _ = run(*sides())
    fresh = Handshake(B, KEY, is_dialler=False, is_local=False)
    fresh.receive(hello)
    step = fresh.receive(proof)
    assert step.peer is None
    assert step.refusal is not None
    assert step.refusal.why is Why.KEY


def test_a_replayed_welcome_convinces_nobody() -> None:
    (_, challenge, _, welcome), _, _ = run(*sides())
    fresh = Handshake(A, KEY, is_dialler=True, is_local=False)
    fresh.begin()
    assert fresh.receive(challenge).refusal is None
    assert fresh.receive(welcome).peer is None


def test_a_reflected_proof_is_refused() -> None:
    """A stranger that has no key sends the dialler's own proof back to it as a welcome."""
    one = Handshake(A, KEY, is_dialler=True, is_local=False)
    one.begin()
    stranger = Handshake(B, KEY, is_dialler=False, is_local=False, nonce=b"n" * 32)
    challenge = module._encode(module.Challenge(B, b"n" * 32, has_key=True))
    assert stranger.claimed is None
    proof = module._decode(one.receive(challenge).reply or b"")
    assert isinstance(proof, module.Proof)
    step = one.receive(module._encode(module.Welcome(proof.mac)))
    assert step.peer is None
    assert step.refusal is not None
    assert step.refusal.why is Why.KEY


def test_an_agent_is_not_its_own_peer() -> None:
    one = Handshake(A, KEY, is_dialler=True, is_local=False)
    itself = Handshake(A, KEY, is_dialler=False, is_local=False)
    step = itself.receive(one.begin())
    assert step.refusal == Refusal(Why.SELF, "an agent cannot be its own peer")
    hello = one._hello
    said = module._decode(hello)
    assert isinstance(said, module.Hello)
    mirrored = Handshake(B, KEY, is_dialler=False, is_local=False, nonce=said.nonce)
    refused = mirrored.receive(hello).refusal
    assert refused is not None
    assert refused.why is Why.SELF


def test_messages_out_of_turn_are_refused() -> None:
    sent, _, _ = run(*sides())
    for message in sent[1:]:
        other = Handshake(B, KEY, is_dialler=False, is_local=False)
        assert other.receive(message).refusal is not None
    for message in (sent[0], sent[2], sent[3]):
        one = Handshake(A, KEY, is_dialler=True, is_local=False)
        one.begin()
        assert one.receive(message).refusal is not None
    one, other = sides()
    run(one, other)
    assert other.receive(sent[2]).refusal is not None


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", Why.PROTOCOL),
        (b"GET / HTTP/1.1\r\n\r\n", Why.PROTOCOL),
        (b"kvxh", Why.PROTOCOL),
        (b"kvxh\x01", Why.PROTOCOL),
        (b"kvxh\x01\xc1", Why.PROTOCOL),
        (b"kvxh\x02" + b"\x80", Why.VERSION),
        (b"kvxh\x01" + b"\x00" * HANDSHAKE_BYTES_MAX, Why.PROTOCOL),
        (
            b"kvxh\x01" + msgspec.msgpack.encode({"type": "proof", "mac": b"", "more": 1}),
            Why.PROTOCOL,
        ),
        (b"kvxh\x01" + msgspec.msgpack.encode({"type": "welcome", "mac": b"x" * 33}), Why.PROTOCOL),
    ],
)
def test_garbage_is_refused(payload: bytes, why: Why) -> None:
    step = Handshake(B, KEY, is_dialler=False, is_local=False).receive(payload)
    assert step.peer is None
    assert step.refusal is not None
    assert step.refusal.why is why


def test_every_changed_bit_of_a_handshake_ends_it() -> None:
    """Whatever is changed on the way, the two never both believe in the connection."""
    reference, _, _ = run(*sides())
    for turn in range(4):
        for place in range(len(reference[turn])):
            one, other = sides()
            both = [other, one]
            message: bytes | None = one.begin()
            last: dict[int, Step] = {}
            for number in range(4):
                if message is None:
                    break
                if number == turn:
                    at = min(place, len(message) - 1)
                    message = message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]
                last[number % 2] = both[number % 2].receive(message)
                message = last[number % 2].reply
            is_believed = [1 in last and last[1].peer == B, 0 in last and last[0].peer == A]
            assert not all(is_believed), (turn, place)


def test_the_name_that_was_dialled_answers() -> None:
    _, dialler, accepter = run(*sides(expected="c"))
    assert dialler.peer is None
    assert accepter.refusal is not None
    assert accepter.refusal.why is Why.NAME
    _, dialler, _ = run(*sides(expected="b"))
    assert dialler.peer == B


def test_the_judge_may_refuse_but_not_admit() -> None:
    asked: list[Introduction] = []

    def judge(claim: Introduction) -> Refusal:
        asked.append(claim)
        return Refusal(Why.DUPLICATE, "twice")

    one = Handshake(A, KEY, is_dialler=True, is_local=False, lane=2)
    other = Handshake(B, KEY, is_dialler=False, is_local=False, judge=judge)
    step = other.receive(one.begin())
    assert asked == [Introduction(A, 2, is_dialler=True)]
    assert step.refusal == Refusal(Why.DUPLICATE, "twice")
    heard = one.receive(step.reply or b"")
    assert heard.refusal == Refusal(Why.DUPLICATE, "twice", is_theirs=True)
    assert heard.reply is None


def test_foreign_text_cannot_play_with_a_terminal() -> None:
    one = Handshake(A, KEY, is_dialler=True, is_local=False)
    one.begin()
    step = one.receive(module._encode(module.Refused(Why.KEY, "\x1b[2Jno\n")))
    assert step.refusal is not None
    assert step.refusal.text == "?[2Jno?"


@given(st.lists(st.binary(max_size=300), max_size=6), st.booleans())
def test_no_bytes_break_it_and_none_get_in(payloads: list[bytes], is_dialler: bool) -> None:
    one = Handshake(A, KEY, is_dialler=is_dialler, is_local=False)
    if is_dialler:
        one.begin()
    for payload in payloads:
        for prefix in (b"", b"kvxh\x01"):
            assert one.receive(prefix + payload).peer is None


def test_a_key_is_long_enough_and_never_shown() -> None:
    with pytest.raises(UsageError, match="has 15 bytes, at least 16"):
        SharedKey("x" * 15)
    key = SharedKey("the secret itself")
    assert "secret" not in repr(key) + str(key)
    with pytest.raises(TypeError, match="not written"):
        key.__reduce__()
    assert key.sign(b"a", b"bc") != key.sign(b"a", b"b", b"c") != key.sign(b"ab", b"c")
