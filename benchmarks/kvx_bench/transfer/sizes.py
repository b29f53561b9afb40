"""Sizes as they are asked for and shown: "4KiB", "64KiB,2MiB", "4KiB..64MiB"."""

from __future__ import annotations

import re

from kvx.errors import UsageError

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_NAMES = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def parse_size(text: str) -> int:
    """Return the bytes of "64KiB" or "65536".

    Raises:
        UsageError: It is no size, or none above 0.
    """
    found = re.fullmatch(r"\s*(\d+)\s*([KMG]iB|B|)\s*", text, re.IGNORECASE)
    size = int(found[1]) * _UNITS[found[2].upper()] if found else 0
    if size <= 0:
        raise UsageError(f"{text!r} is no size; say 4096, 64KiB or 2MiB")
    return size


def parse_sizes(text: str) -> tuple[int, ...]:
    """Return every size of a list; A..B is A, 4 x A and so on, and B.

    Raises:
        UsageError: One of them is no size, or a range runs downwards.
    """
    sizes: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        sizes += _between(parse_size(first), parse_size(last)) if dots else [parse_size(first)]
    return tuple(dict.fromkeys(sizes))


def size_name(num_bytes: int) -> str:
    """Return "4KiB" or "2MiB"; what is no whole number of those stays in bytes."""
    for unit, unit_bytes in _NAMES:
        if num_bytes >= unit_bytes and num_bytes % unit_bytes == 0:
            return f"{num_bytes // unit_bytes}{unit}"
    return f"{num_bytes}B"


def _between(first: int, last: int) -> list[int]:
    if last < first:
        raise UsageError(f"the range {size_name(first)}..{size_name(last)} runs downwards")
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 4
    return [*sizes, last]
