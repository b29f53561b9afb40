"""Block hashes as callers give them and as the native core wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NewType

import numpy as np

from kvx.errors import UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

BlockKey = NewType("BlockKey", bytes)
"""16 bytes that name a block in every tier; see `Namespace.keys`."""

HASH_BYTES_MAX = 128


def as_hash_array(hashes: Sequence[bytes] | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return block hashes as an (n, k) uint8 array, n >= 1, 1 <= k <= 128; no copy of an array.

    Args:
        hashes: Bytes of equal length, or an (n, k) uint8 array.

    Raises:
        UsageError: No hashes, lengths that differ, or another shape or dtype.
    """
    if isinstance(hashes, np.ndarray):
        array = hashes
    else:
        try:
            lengths = {len(one) for one in hashes}
            joined = b"".join(hashes)
        except TypeError as error:
            raise UsageError(f"hashes must be a list of bytes, or an array: {error}") from None
        if len(lengths) != 1:
            raise UsageError(
                "no hashes were given" if not lengths else f"hashes of lengths {sorted(lengths)}"
            )
        array = np.frombuffer(joined, np.uint8).reshape(len(hashes), -1)
    if array.dtype != np.uint8 or array.ndim != 2 or len(array) == 0:  # noqa: PLR2004
        raise UsageError(
            f"hashes must be (n, k) uint8 with n >= 1, not {array.shape} {array.dtype}"
        )
    if not 1 <= array.shape[1] <= HASH_BYTES_MAX:
        raise UsageError(f"a hash has 1 to {HASH_BYTES_MAX} bytes, not {array.shape[1]}")
    return np.ascontiguousarray(array)
