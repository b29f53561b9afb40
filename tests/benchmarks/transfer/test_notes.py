"""Requests as notifications: split, put together again, and what is no message."""

import struct

import pytest

from kvx_bench.transfer.pair.notes import Assembler, split


@pytest.mark.parametrize("size", [0, 1, 40_000, 49_152, 200_000])
def test_messages_come_back_whole_in_any_order(size: int) -> None:
    message = {"do": "lease", "token": "x" * size}
    parts = list(split(7, message))
    assert max(map(len, parts)) <= 64 << 10
    for order in (parts, parts[::-1]):
        assembler = Assembler()
        found = [assembler.take(part) for part in order]
        assert found[:-1] == [None] * (len(parts) - 1)
        assert found[-1] == (7, message)


def test_a_later_message_ends_the_wait_for_an_earlier_one() -> None:
    first, second = (list(split(n, {"x": "y" * size})) for n, size in ((1, 120_000), (2, 60_000)))
    assembler = Assembler()
    assert assembler.take(first[2]) is None
    assert assembler.take(second[0]) is None
    assert assembler.take(second[1]) == (2, {"x": "y" * 60_000})


@pytest.mark.parametrize(
    "payload", [b"", b"short", struct.pack("<QII", 1, 1, 1), struct.pack("<QII", 1, 0, 1 << 31)]
)
def test_what_is_no_part_is_passed_over(payload: bytes) -> None:
    assert Assembler().take(payload) is None
