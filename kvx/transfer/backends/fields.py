"""What messages of several backends carry: numbers, texts and leases, with their limits. Pure."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from kvx.transfer.core import LeaseRef

TEXT_MAX: Final = 512

Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Small = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_MAX)]
# Leases are named by 64 random bits, so half of them lie above what `le` can say; msgpack has no
# wider numbers.
_Word = Annotated[int, msgspec.Meta(ge=0)]
Lease = tuple[_Word, Small, _Word]


def numbers_of(lease: LeaseRef) -> Lease:
    """Return a lease as messages name it."""
    return lease.id, lease.slot, lease.generation


def lease_of(numbers: Lease) -> LeaseRef:
    """Return the lease that a message names."""
    return LeaseRef(*numbers)


def text_of(error: object) -> str:
    """Return what a message can carry of an error's text."""
    return str(error)[:TEXT_MAX]
