"""Sizes, times, spans and names as people read and write them."""

from __future__ import annotations

import argparse
import re
import time

_SPAN = re.compile(r"(\d+(?:\.\d+)?)([smhdw]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def size(num_bytes: float) -> str:
    """Return a size in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:  # noqa: PLR2004 - the factor between the units
            return f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def when(time_s: float | None) -> str:
    """Return a Unix time in this machine's zone."""
    return "never" if time_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def seconds(text: str) -> float:
    """Return the seconds of an option such as ``30d``, ``12h``, ``90m`` or ``45``."""
    found = _SPAN.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no span of time; 45, 90m, 12h, 30d, 2w are")
    return float(found[1]) * _SECONDS[found[2]]


def printable(text: str) -> str:
    """Return a text that somebody else has chosen without what would steer a terminal."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
