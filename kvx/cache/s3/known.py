"""Which groups of blocks are known to be stored as objects, and which are known not to be.

It may be wrong at any time: another machine stores and deletes, too. What is said to be there and
is not costs a request and is forgotten; what is said not to be there is asked for again later.
Bounded: those that became known first are forgotten first.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.key_table import KeyTable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Keys = npt.NDArray[np.uint8]
    Mask = npt.NDArray[np.bool_]

_GROUPS_FIRST = 256


@dataclass(frozen=True, slots=True)
class Places:
    """Where blocks lie in objects; arrays over the keys asked for.

    Attributes:
        mask: (n,) bool, whether an object is known to hold the block.
        groups: (n,) int64 number of its group; nonsense where there is none.
        places: (n,) int64 place in the group.
    """

    mask: Mask
    groups: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]


class KnownObjects:
    """A cache's memory of objects. Thread-safe."""

    def __init__(
        self,
        blocks_per_object: int,
        objects_max: int,
        absent_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start empty; memory is taken as objects become known."""
        self._width = blocks_per_object
        self._objects_max = objects_max
        self._absent_s = absent_s
        self._clock = clock
        self._lock = threading.Lock()
        # Block key -> group * width + place. A stale entry is told by the keys of its group.
        self._blocks = KeyTable(objects_max * blocks_per_object)
        self._keys = np.zeros((_GROUPS_FIRST, blocks_per_object, 16), np.uint8)
        self._is_stored = np.zeros(_GROUPS_FIRST, np.bool_)
        self._next = 0  # groups are reused in turn
        self._absent: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of groups that are known to be stored."""
        return int(self._is_stored.sum())

    def add(self, keys: npt.NDArray[np.uint8]) -> None:
        """Note that objects hold groups of blocks: (g, blocks_per_object, 16) uint8 keys."""
        fresh = ~self.has(keys[:, -1])
        with self._lock:
            for group_keys in keys:
                self._absent.pop(group_keys[-1].tobytes(), None)
            for group_keys in keys[fresh]:
                group = self._take_group()
                self._keys[group] = group_keys
                self._is_stored[group] = True
                first = np.uint64(group * self._width)
                self._blocks.put(group_keys, first + np.arange(self._width, dtype=np.uint64))

    def find(self, keys: Keys) -> Places:
        """Return where blocks lie, for (n, 16) uint8 keys."""
        mask, values = self._blocks.get(keys)
        groups = (values // np.uint64(self._width)).astype(np.int64)
        places = (values % np.uint64(self._width)).astype(np.int64)
        groups[~mask] = 0
        mask &= (self._keys[groups, places] == keys).all(axis=1)
        mask &= self._is_stored[groups]
        return Places(mask, groups, places)

    def has(self, last_keys: Keys) -> Mask:
        """Return which groups are known to be stored, by the (g, 16) keys of their last blocks."""
        found = self.find(last_keys)
        is_last: Mask = found.places == self._width - 1
        return found.mask & is_last

    def keys_of(self, group: int) -> Keys:
        """Return the keys of a group that was just found, (blocks_per_object, 16) uint8."""
        keys: Keys = self._keys[group]
        return keys.copy()

    def beside(self, keys: Keys) -> Keys:
        """Return the keys of all blocks in the objects that hold some of these, (m, 16) uint8."""
        found = self.find(keys)
        groups = np.unique(found.groups[found.mask])
        beside: Keys = self._keys[groups].reshape(-1, 16)
        return beside

    def forget(self, keys: Keys) -> list[bytes]:
        """Forget the objects that hold blocks; returns the last keys of their groups."""
        found = self.find(keys)
        groups = np.unique(found.groups[found.mask]).tolist()
        with self._lock:
            names = [self._keys[group, -1].tobytes() for group in groups]
            for group in groups:
                self._blocks.remove(self._keys[group])
                self._is_stored[group] = False
        return names

    def note_absent(self, last_key: bytes) -> None:
        """Remember for a while that an object is not there."""
        with self._lock:
            self._absent[last_key] = self._clock() + self._absent_s
            self._absent.move_to_end(last_key)
            while len(self._absent) > self._objects_max:
                self._absent.popitem(last=False)

    def is_absent(self, last_keys: Sequence[bytes]) -> list[bool]:
        """Return of which groups the objects were found to be absent not long ago."""
        now = self._clock()
        with self._lock:
            return [self._absent.get(key, 0.0) > now for key in last_keys]

    def _take_group(self) -> int:
        """Return the number of a group to overwrite."""
        if self._next == len(self._keys):
            if self._next < self._objects_max:
                more = min(len(self._keys), self._objects_max - len(self._keys))
                self._keys = np.concatenate(
                    [self._keys, np.zeros((more, self._width, 16), np.uint8)]
                )
                self._is_stored = np.append(self._is_stored, np.zeros(more, np.bool_))
            else:
                self._next = 0
        group, self._next = self._next, self._next + 1
        return group
