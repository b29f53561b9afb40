"""Names for full blocks of tokens: equal names mean equal tokens from the start of the sequence.

    hash(block n) = sha256(hash(block n - 1) + tokens of block n as little-endian uint32)

The block before the first is 32 zero bytes. Which model, dtype or tenant the KV belongs to is not
part of the name; whoever stores blocks keeps those apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_ROOT = bytes(32)


def block_hashes(tokens: Sequence[int], block_tokens: int) -> list[bytes]:
    """Return the hash of every full block, 32 bytes each; a partial tail has none."""
    words = np.asarray(tokens, dtype="<u4")
    hashes: list[bytes] = []
    parent = _ROOT
    for start in range(0, len(words) - block_tokens + 1, block_tokens):
        parent = hashlib.sha256(parent + words[start : start + block_tokens].tobytes()).digest()
        hashes.append(parent)
    return hashes
