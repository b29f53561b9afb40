"""Lease tokens and descriptors: round trips, sizes, and everything a liar could put into them."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.errors import IncompatibleError, UsageError
from kvx.transfer.agents import descriptors, lease_token
from kvx.transfer.agents.key import SharedKey
from kvx.transfer.agents.lease_token import RemoteLease, Rights
from kvx.transfer.agents.sealed import Kind, seal
from kvx.transfer.core import LeaseRef

KEY = SharedKey(b"k" * 16)
WORD = (1 << 64) - 1


def lease(rows: object = None, **changes: object) -> RemoteLease:
    plain = RemoteLease(
        "prefill-0", 5, LeaseRef(WORD, 7, 9), 3, 1 << 30, Rights.READ, 30.0, "",
        descriptors.blocks(range(4), 4096) if rows is None else descriptors.as_rows(rows),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def body_of(granted: RemoteLease) -> dict[str, object]:
    body: dict[str, object] = msgspec.msgpack.decode(granted.encode()[6:])
    return body


def token_of(body: dict[str, object]) -> bytes:
    return seal(Kind.LEASE, msgspec.msgpack.encode(body), None)


@pytest.mark.parametrize("key", [None, KEY])
def test_a_token_comes_back_as_it_was(key: SharedKey | None) -> None:
    granted = lease(
        peer="decode-0", checksums=np.arange(4, dtype=np.uint64) << np.uint64(60),
        keys=np.arange(64, dtype=np.uint8).reshape(4, 16), rights=Rights.READ | Rights.WRITE,
    )  # fmt: skip
    found = RemoteLease.decode(granted.encode(key), key)
    for one in dataclasses.fields(RemoteLease):
        value, other = getattr(granted, one.name), getattr(found, one.name)
        assert np.array_equal(value, other), one.name
    assert found.size_bytes == 4 * 4096
    assert not found.is_range


ROWS = st.tuples(
    st.integers(0, 1 << 20), st.integers(64, 128), st.integers(1, 4), st.integers(1, 64)
)


@given(st.lists(ROWS, min_size=1, max_size=20))
def test_any_rows_come_back(rows: list[tuple[int, int, int, int]]) -> None:
    found = RemoteLease.decode(lease(rows).encode())
    assert found.blocks.tolist() == [list(row) for row in rows]


def test_equal_blocks_take_four_bytes_each() -> None:
    ids = np.random.default_rng(1).permutation(100_000)
    granted = lease(descriptors.blocks(ids, 4096), region_bytes=100_000 * 4096)
    token = granted.encode(KEY)
    assert len(token) < 4 * 100_000 + 400
    assert (RemoteLease.decode(token, KEY).blocks == granted.blocks).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"region_bytes": 4 * 4096 - 1}, "does not fit"),
        ({"region_bytes": 0}, "malformed"),
        ({"region_bytes": 1 << 62}, "malformed"),
        ({"agent": "../x"}, "malformed"),
        ({"peer": "a b"}, "malformed"),
        ({"incarnation": 0}, "malformed"),
        ({"generation": 0}, "malformed"),
        ({"slot": 1 << 32}, "malformed"),
        ({"rights": 8}, "malformed"),
        ({"rights": 0}, "malformed"),
        ({"ttl_s": 0.0}, "malformed"),
        ({"ttl_s": float("nan")}, "malformed"),
        ({"ttl_s": 1e9}, "malformed"),
        ({"checksums": b"1234567"}, "8 each"),
        ({"checksums": bytes(24)}, "3 checksums for 4 blocks"),
        ({"keys": bytes(16)}, "1 keys for 4 blocks"),
        ({"more": 1}, "malformed"),
        ({"blocks": {"type": "raw", "rows": bytes(31)}}, "32 each"),
        ({"blocks": {"type": "raw", "rows": b""}}, "no blocks"),
        ({"blocks": {"type": "other"}}, "malformed"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        RemoteLease.decode(token_of(body_of(lease()) | changes))


HUGE = (1 << 63) - 1


@pytest.mark.parametrize(
    "row",
    [
        (HUGE, 1, 1, 1), (-1, 1, 1, 1), (0, HUGE, HUGE, 1), (0, 1, 1, HUGE), (0, 0, 1, 0),
        (0, 1, 0, 1), (0, 1, -1, 1), (0, 8, 2, 9), (0, -8, 2, 8), (1 << 30, 1, 1, 1),
        (0, 1 << 29, 3, 1 << 29), (-HUGE - 1, -HUGE - 1, -HUGE - 1, -HUGE - 1), (0, 0, 2, 1),
    ],
)  # fmt: skip
def test_rows_that_would_overflow_are_refused(row: tuple[int, ...]) -> None:
    body = body_of(lease())
    body["blocks"] = {"type": "raw", "rows": np.array([row], "<i8").tobytes()}
    with pytest.raises(UsageError, match="descriptor 0"):
        RemoteLease.decode(token_of(body))


@pytest.mark.parametrize("name", ["base", "unit", "stride", "count", "row_bytes"])
def test_equal_blocks_that_would_overflow_are_refused(name: str) -> None:
    body = body_of(lease())
    body["blocks"][name] = HUGE  # type: ignore[index]
    with pytest.raises(UsageError, match=r"beyond any memory|does not fit"):
        RemoteLease.decode(token_of(body))


def test_signatures_and_sizes() -> None:
    with pytest.raises(IncompatibleError, match="not signed"):
        RemoteLease.decode(lease().encode(), KEY)
    forged = bytearray(lease().encode(KEY))
    forged[-1] ^= 1
    with pytest.raises(IncompatibleError, match="altered"):
        RemoteLease.decode(bytes(forged), KEY)
    with pytest.raises(UsageError, match="at most"):
        RemoteLease.decode(bytes(lease_token.TOKEN_BYTES_MAX + 1))
    with pytest.raises(UsageError, match="no lease"):
        RemoteLease.decode(b"kvxc" + lease().encode()[4:])


@given(st.lists(st.tuples(*[st.integers(-4, 40)] * 4), min_size=1, max_size=5), st.integers(1, 64))
def test_rows_are_judged_as_a_simple_model_does(
    rows: list[tuple[int, int, int, int]], size: int
) -> None:
    def fits(offset: int, stride: int, count: int, row: int) -> bool:
        if offset < 0 or count < 1 or row < 1 or (count > 1 and stride < row):
            return False
        return offset + (count - 1) * stride + row <= size

    expected = next((place for place, row in enumerate(rows) if not fits(*row)), None)
    said = descriptors.objection(descriptors.as_rows(rows), size)
    assert said.startswith(f"descriptor {expected} ") if expected is not None else said == ""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: descriptors.blocks([0.5], 1), "whole numbers"),
        (lambda: descriptors.blocks([-1], 1), "negative"),
        (lambda: descriptors.blocks([1 << 62], 4096), "beyond any memory"),
        (lambda: descriptors.blocks([0], 0), "1 byte or more"),
        (lambda: descriptors.contiguous([0, 1], [1]), "2 offsets but 1 sizes"),
        (lambda: descriptors.strided([0], -1, 1, 1), "stride = -1"),
        (lambda: descriptors.strided([0], 1, True, 1), "count = True"),
        (lambda: descriptors.as_rows([[1, 2, 3]]), "of offset, stride"),
        (lambda: descriptors.as_int64(np.array([1 << 63], np.uint64), "ids"), "beyond any memory"),
    ],
)
def test_wrong_arguments_say_so(call: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()
