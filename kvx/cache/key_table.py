"""A bounded map from keys to numbers, in the native index; the longest untouched go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvx_ext import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    Keys = npt.NDArray[np.uint8]
    Mask = npt.NDArray[np.bool_]

_SLOTS_FIRST = 1024
_DROPPED = 3  # as kvx_ext/include/kvx/miss_history.h numbers it; there is no history here


class KeyTable:
    """Up to `keys_max` keys with a uint64 each. Thread-safe; 16-byte keys as (n, 16) uint8."""

    def __init__(self, keys_max: int) -> None:
        """Start empty; memory is taken as keys come."""
        self._keys_max = keys_max
        self._index = _core.BlockIndex(_core.EvictionPolicy.LRU)
        self._index.add_slots(0, min(_SLOTS_FIRST, keys_max))

    def __len__(self) -> int:
        """Return the number of keys."""
        return self._index.num_slots - self._index.num_free

    def add(self, keys: Keys, values: npt.NDArray[np.uint64] | None = None) -> Keys:
        """Add keys, with zeros by default; those that are there keep what they have.

        Returns:
            The (m, 16) keys that had to go.
        """
        while self._index.num_free < len(keys) and self._index.num_slots < self._keys_max:
            more = min(self._index.num_slots, self._keys_max - self._index.num_slots)
            self._index.add_slots(self._index.num_slots, more)
        numbers = np.zeros(len(keys), np.uint64) if values is None else values
        gone = [np.zeros((0, 16), np.uint8)]
        # At most as many as there is room for, or those of one batch would be refused.
        for start in range(0, len(keys), _SLOTS_FIRST):
            some = slice(start, start + _SLOTS_FIRST)
            gone.append(self._index.insert(keys[some], numbers[some], 0, 0, 0)[3])
        return np.concatenate(gone)

    def put(self, keys: Keys, values: npt.NDArray[np.uint64]) -> Keys:
        """Add keys, or give those that are there other values; returns those that had to go."""
        self.remove(keys)
        return self.add(keys, values)

    def remove(self, keys: Keys) -> None:
        """Remove keys; those that are not there do no harm."""
        self._index.remove(keys, _DROPPED)

    def has(self, keys: Keys) -> Mask:
        """Return which keys are there, (n,) bool."""
        return self._index.inspect(keys, 0).astype(np.bool_)

    def get(self, keys: Keys) -> tuple[Mask, npt.NDArray[np.uint64]]:
        """Return which keys are there, (n,) bool, and their values; touches them."""
        mask, _, _, values = self._index.lookup(keys, 0, touch=True, pin=False)
        return mask, values
