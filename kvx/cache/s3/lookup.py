"""How long a prefix of a prompt is stored as objects, asked with few requests.

Whoever asks does not wait for the network: `match` says what is known, and whether that is final.
Two that ask for the same prompt share one search.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.s3.search import PrefixSearch
from kvx.cache.s3.store import ObjectError, ObjectFault

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvx.cache.s3.tier import S3Tier

    Keys = npt.NDArray[np.uint8]

_log = logging.getLogger(__name__)


class Lookups:
    """The searches of one tier that are under way. Thread-safe."""

    def __init__(self, tier: S3Tier) -> None:
        """Have none."""
        self._tier = tier
        self._lock = threading.Lock()
        self._under_way: dict[bytes, threading.Event] = {}

    def ensure(self, namespace_id: int, keys: Keys, num_held: int, wait_s: float) -> bool:
        """See `S3Tier.look_up`."""
        tier = self._tier
        width = tier.config.blocks_per_object
        groups = keys[: len(keys) // width * width].reshape(-1, width, 16)
        last_keys = groups[:, -1]
        # Of a group that is held in part already the object may be of use for the rest.
        begin = num_held // width
        unknown = ~tier.known.has(last_keys[begin:])
        if not unknown.any() or not tier.is_up():
            return True
        begin += int(np.flatnonzero(unknown)[0])
        if tier.known.is_absent([last_keys[begin].tobytes()])[0]:
            return True
        over = self._begin(namespace_id, groups, begin)
        return over.wait(wait_s) if wait_s > 0 else over.is_set()

    def _begin(self, namespace_id: int, groups: Keys, begin: int) -> threading.Event:
        name = groups[-1, -1].tobytes()
        with self._lock:
            over = self._under_way.get(name)
            if over is not None:
                return over
            over = self._under_way[name] = threading.Event()
        self._tier.loop.spawn(self._search(namespace_id, groups, begin, name))
        return over

    async def _search(self, namespace_id: int, groups: Keys, begin: int, name: bytes) -> None:
        try:
            await self._find(namespace_id, groups, begin)
        finally:
            with self._lock:
                over = self._under_way.pop(name)
            over.set()

    async def _find(self, namespace_id: int, groups: Keys, begin: int) -> None:
        tier = self._tier
        search = PrefixSearch(begin, len(groups))
        ends_at = tier.ends_at()
        while not search.is_over:
            probes = search.probes()
            answers = await asyncio.gather(
                *(self._is_stored(namespace_id, groups[group, -1], ends_at) for group in probes)
            )
            for group, is_stored in zip(probes, answers, strict=True):
                if is_stored is None:
                    # The service does not say: what was found so far stands, the rest is open.
                    tier.instruments.note_lookup("failed")
                    tier.known.add(groups[begin : search.num_stored])
                    return
                search.note(group, is_stored=is_stored)
        tier.known.add(groups[begin : search.num_stored])
        if search.num_stored < len(groups):
            tier.known.note_absent(groups[search.num_stored, -1].tobytes())
        tier.instruments.note_lookup("found" if search.num_stored > begin else "absent")

    async def _is_stored(
        self, namespace_id: int, last_key: npt.NDArray[np.uint8], ends_at: float
    ) -> bool | None:
        """Return whether an object is there as it should be; None when the service does not say."""
        tier = self._tier
        name = tier.name_of(namespace_id, last_key.tobytes())
        try:
            facts = await tier.effort.call(
                "head", lambda: tier.store.head(name), ends_at=ends_at, may_hedge=True
            )
        except ObjectError as error:
            if error.fault is ObjectFault.MISSING:
                return False
            _log.debug("whether an object is there is not known: %s", error)
            return None
        size_bytes = tier.shape_of(namespace_id).object_bytes
        if facts.size_bytes != size_bytes:
            _log.warning(
                "%s has %d bytes instead of %d: it is left alone; kvx gc deletes what is damaged",
                name, facts.size_bytes, size_bytes,
            )  # fmt: skip
        return facts.size_bytes == size_bytes
