"""One line of `kvx doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes:
        subject: What.
        is_good: Whether kvx can use it at its best.
        found: What there is.
        remedy: How to get the rest; empty when nothing is to be done.
    """

    subject: str
    is_good: bool
    found: str
    remedy: str = ""
