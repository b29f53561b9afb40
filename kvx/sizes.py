"""Byte sizes as people write them: `parse_bytes("8GiB")` and back.

`KiB`, `MiB`, `GiB`, `TiB` count in 1024, `kB`, `MB`, `GB`, `TB` in 1000; case does not matter, so
`gb` is 1000**3 and `gib` 1024**3, and a bare letter is refused because both are meant by it.
"""

import re

from kvx.errors import UsageError

ACCEPTED = 'a number of bytes or a size such as 4096, "512MB", "8GiB" or "1.5TiB"'

_UNITS: dict[str, int] = {"": 1, "b": 1} | {
    f"{prefix}{word}": base**power
    for word, base in (("ib", 1024), ("b", 1000))
    for power, prefix in enumerate("kmgtp", start=1)
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: int | str) -> int:
    """Return `value` as whole bytes.

    Args:
        value: Bytes as an int, or a number with a unit ("100 GiB").

    Raises:
        UsageError: Not a size, negative, or not a whole number of bytes.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise UsageError(f"{value!r} is not a size; accepted: {ACCEPTED}")
    whole, _, fraction = found[1].partition(".")
    # In integers, because a float loses bytes above 8 PiB.
    scale: int = 10 ** len(fraction)
    scaled, rest = divmod(int(whole + fraction) * unit, scale)
    if rest:
        raise UsageError(f"{value!r} is not a whole number of bytes")
    return scaled


def format_bytes(size_bytes: int) -> str:
    """Return the shortest exact spelling: "8GiB", or "4097" where no unit divides it."""
    for prefix in "PTGMK":
        unit = _UNITS[f"{prefix.lower()}ib"]
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit}{prefix}iB"
    return str(size_bytes)
