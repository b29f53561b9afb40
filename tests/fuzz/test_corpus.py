"""The fuzzer's corpus still passes its targets, and reaches both what is accepted and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvx.errors import KvxError
from kvx.transfer.agents import messages
from kvx.transfer.agents.lease_token import RemoteLease
from kvx.transfer.agents.metadata import decode_card
from tests.fuzz.targets import TARGETS, object_part

CORPUS = Path(__file__).parent / "corpus"


def samples(target: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_passes(target: str) -> None:
    found = samples(target)
    assert len(found) >= 5
    for data in found:
        TARGETS[target](data)
        for place in range(len(data)):
            TARGETS[target](data[:place] + bytes([data[place] ^ 0x81]) + data[place + 1 :])
            TARGETS[target](data[:place])


@pytest.mark.parametrize(
    ("target", "decode"),
    [
        ("card", lambda data: decode_card(data, None)),
        ("lease", RemoteLease.decode),
        ("message", messages.decode),
    ],
)
def test_some_of_the_corpus_is_accepted(target: str, decode: Callable[[bytes], object]) -> None:
    assert any(is_accepted(decode, data) for data in samples(target))


def test_every_part_of_an_object_is_accepted() -> None:
    names = {"plain", "sealed"}
    parts = {f"{name}_{part}" for name in names for part in ("header", "footer", "frame")}
    for part in parts:
        assert object_part((CORPUS / "object" / part).read_bytes()), part


def is_accepted(decode: Callable[[bytes], object], data: bytes) -> bool:
    try:
        decode(data)
    except KvxError:
        return False
    return True
