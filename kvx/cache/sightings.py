"""Which namespace a block hash was last stored under: to tell a mismatch from a cold cache.

The most common reason for "no hits at all" is that two engines disagree about model, dtype, layout,
salt or hash scheme: the same prompts then live under other keys. This table remembers hashes
without their namespace, so that such a miss can be named. It is a hint for explanations only:
bounded, lossy, and never consulted for data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.reasons import MissReason

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.namespace import Namespace

_ROWS = 1 << 16
_NOBODY = -1


class Sightings:
    """A direct-mapped table from hash to the number of the namespace that stored it last."""

    def __init__(self) -> None:
        """Start empty; takes 768 KiB."""
        self._tags = np.zeros(_ROWS, np.uint64)
        self._namespaces = np.full(_ROWS, _NOBODY, np.int32)
        self._known: dict[int, Namespace] = {}

    def add_namespace(self, namespace_id: int, namespace: Namespace) -> None:
        """Remember what a number stands for."""
        self._known[namespace_id] = namespace

    def note(self, hashes: npt.NDArray[np.uint8], namespace_id: int) -> None:
        """Remember that (n, k) uint8 hashes were stored under a namespace."""
        tags = _tags(hashes)
        rows = (tags % np.uint64(_ROWS)).astype(np.int64)
        self._tags[rows] = tags
        self._namespaces[rows] = namespace_id

    def explain(self, hashes: npt.NDArray[np.uint8], namespace_id: int) -> npt.NDArray[np.uint8]:
        """Return (n,) uint8: SALT or NAMESPACE_MISMATCH where seen elsewhere, else NEVER_STORED.

        What another tenant stored is not told: that would answer "has anyone asked this before".
        """
        tags = _tags(hashes)
        rows = (tags % np.uint64(_ROWS)).astype(np.int64)
        seen = np.where(self._tags[rows] == tags, self._namespaces[rows], _NOBODY)
        reasons = np.full(len(hashes), MissReason.NEVER_STORED, np.uint8)
        asking = self._known.get(namespace_id)
        for other_id in np.unique(seen).tolist():
            other = self._known.get(other_id)
            if other is None or asking is None or other_id == namespace_id:
                continue
            if other.tenant == asking.tenant:
                is_salt = other.without_salt() == asking.without_salt()
                reasons[seen == other_id] = (
                    MissReason.SALT if is_salt else MissReason.NAMESPACE_MISMATCH
                )
        return reasons


def _tags(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return 64 bits of each hash; engines' hashes are digests already."""
    width = min(8, hashes.shape[1])
    padded = np.zeros((len(hashes), 8), np.uint8)
    padded[:, :width] = hashes[:, -width:]
    return padded.view(np.uint64)[:, 0]
