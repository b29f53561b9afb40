"""Hashes come as bytes or arrays and leave as one contiguous array."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.block import HASH_BYTES_MAX, as_hash_array
from kvx.errors import UsageError


@given(st.integers(1, HASH_BYTES_MAX).flatmap(lambda k: st.lists(st.binary(min_size=k, max_size=k), min_size=1, max_size=8)))  # fmt: skip  # noqa: E501
def test_bytes_become_rows(hashes: list[bytes]) -> None:
    array = as_hash_array(hashes)
    assert array.dtype == np.uint8
    assert array.shape == (len(hashes), len(hashes[0]))
    assert [row.tobytes() for row in array] == hashes
    assert array.flags.c_contiguous


def test_an_array_is_not_copied_but_a_strided_one_is() -> None:
    array = np.arange(64, dtype=np.uint8).reshape(2, 32)
    assert as_hash_array(array) is array
    half = as_hash_array(array[:, ::2])
    assert half.flags.c_contiguous
    assert (half == array[:, ::2]).all()


@pytest.mark.parametrize(
    ("hashes", "part"),
    [
        ([], "no hashes were given"),
        ([b"a", b"bc"], r"lengths \[1, 2\]"),
        ([b"", b""], "1 to 128 bytes, not 0"),
        ([bytes(129)], "1 to 128 bytes, not 129"),
        (np.zeros((0, 8), np.uint8), r"n >= 1, not \(0, 8\)"),
        (np.zeros((2, 0), np.uint8), "1 to 128 bytes, not 0"),
        (np.zeros((2, 129), np.uint8), "not 129"),
        (np.zeros(8, np.uint8), r"not \(8,\) uint8"),
        (np.zeros((2, 8), np.int8), r"not \(2, 8\) int8"),
        (np.zeros((2, 8, 1), np.uint8), r"not \(2, 8, 1\)"),
        ("abc", "bytes"),
        (["ab", "cd"], "bytes"),
        (b"abc", "bytes"),
        ([1, 2], "bytes"),
        (None, "list of bytes"),
        (7, "bytes"),
    ],
)
def test_what_is_refused(hashes: object, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        as_hash_array(hashes)  # type: ignore[arg-type]
