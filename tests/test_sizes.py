"""Sizes are read exactly, written back exactly, and refused when two meanings are possible."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx import sizes
from kvx.errors import UsageError

UNITS = {
    "": 1, "B": 1, "kB": 1000, "KiB": 1024, "MB": 1000**2, "MiB": 1024**2, "GB": 1000**3,
    "GiB": 1024**3, "TB": 1000**4, "TiB": 1024**4, "PB": 1000**5, "PiB": 1024**5,
}  # fmt: skip


@given(st.integers(0, 2**80))
def test_every_size_survives_being_written(size_bytes: int) -> None:
    text = sizes.format_bytes(size_bytes)
    assert sizes.parse_bytes(text) == size_bytes
    assert sizes.parse_bytes(size_bytes) == size_bytes


@given(
    st.decimals(0, 10_000, places=3, allow_nan=False),
    st.sampled_from(sorted(UNITS)),
    st.sampled_from(["", " ", "  "]),
    st.booleans(),
)
def test_fractions_are_exact_or_refused(
    number: object,
    unit: str,
    space: str,
    is_lower: bool,
) -> None:
    text = f" {number}{space}{unit.lower() if is_lower else unit} "
    exact = Fraction(str(number)) * UNITS[unit]
    if exact.denominator == 1:
        assert sizes.parse_bytes(text) == exact
    else:
        with pytest.raises(UsageError, match="whole number of bytes"):
            sizes.parse_bytes(text)


@pytest.mark.parametrize(
    "value",
    [
        "8G",
        "1k",
        "GiB",
        "",
        " ",
        "-1",
        "-1GiB",
        "1e9",
        "1.GiB",
        ".5GiB",
        "1,5GiB",
        "8 Gi B",
        "0x10",
    ],
)
def test_text_that_is_no_size_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="accepted") as error:
        sizes.parse_bytes(value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [-1, True, 1.5, None, [1]])
def test_values_that_are_no_size_are_refused(value: object) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        sizes.parse_bytes(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0"), (1, "1"), (1023, "1023"), (1024, "1KiB"), (8 << 30, "8GiB"), (4097, "4097"),
     (1536 << 20, "1536MiB"), (3 << 50, "3PiB"), (10**9, "1000000000")],
)  # fmt: skip
def test_spelling(size_bytes: int, text: str) -> None:
    assert sizes.format_bytes(size_bytes) == text
