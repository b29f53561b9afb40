"""Sizes as they are asked for."""

import pytest

from kvx.errors import UsageError
from kvx_bench.transfer.sizes import parse_size, parse_sizes, size_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096", 4096), ("64KiB", 64 << 10), (" 2mib ", 2 << 20), ("1GiB", 1 << 30), ("7B", 7)],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "0", "KiB", "-1", "4KB", "1.5MiB", "4 KiB x"])
def test_what_is_no_size_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(UsageError, match="say 4096, 64KiB or 2MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4KiB", (4096,)),
        ("2MiB,4KiB,2MiB", (2 << 20, 4096)),
        ("4KiB..64KiB", (4096, 16384, 65536)),
        ("4KiB..5KiB", (4096, 5120)),
        ("4KiB..4KiB", (4096,)),
        ("1B,16KiB..64KiB", (1, 16384, 65536)),
    ],
)
def test_lists_and_ranges(text: str, expected: tuple[int, ...]) -> None:
    assert parse_sizes(text) == expected


def test_a_range_that_runs_downwards_is_refused() -> None:
    with pytest.raises(UsageError, match=r"64KiB\.\.4KiB runs downwards"):
        parse_sizes("64KiB..4KiB")


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(4096, "4KiB"), (2 << 20, "2MiB"), (1 << 30, "1GiB"), (5000, "5000B"), (1536, "1536B")],
)
def test_names_say_the_size(num_bytes: int, expected: str) -> None:
    assert size_name(num_bytes) == expected
    assert parse_size(expected) == num_bytes
