"""The outcome codes of the native core, as `kvx_ext/include/kvx/status.h` numbers them."""

import enum


class Code(enum.IntEnum):
    """How one block of a native job ended."""

    OK = 0
    USAGE = 1
    CAPACITY = 2
    UNAVAILABLE = 3
    STORAGE = 4
    SHORT = 5
    CORRUPT = 6
    STALE = 7
    TIMEOUT = 8
    CANCELLED = 9
    SKIPPED = 10
    DEVICE = 11
    PEER_LOST = 12
