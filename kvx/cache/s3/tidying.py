"""What keeps a bucket within its bounds: objects that expire or are too many are deleted.

Only what is known goes: what was listed at the start and every ten minutes since, and what was
stored by this cache. Whoever shares a bucket between machines lets one of them do this, or all of
them with the same settings: deleting what is gone does no harm.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from kvx.cache.reasons import MissReason
from kvx.cache.s3.names import parse_name, root
from kvx.cache.s3.store import DELETE_BATCH_MAX, ObjectError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvx.cache.s3.names import ObjectName
    from kvx.cache.s3.store import ObjectFacts
    from kvx.cache.s3.tier import S3Tier

_log = logging.getLogger(__name__)
_TURN_S = 1.0
_LIST_EVERY_S = 600.0


class Tidying:
    """The housekeeping of one tier, on its loop."""

    def __init__(self, tier: S3Tier) -> None:
        """Have seen nothing."""
        self._tier = tier
        self._listed_at = -_LIST_EVERY_S

    async def run(self) -> None:
        """Tidy now and then, for as long as the loop runs."""
        tier = self._tier
        if not tier.ledger.is_kept or tier.config.is_read_only:
            return
        while True:
            if time.monotonic() - self._listed_at >= _LIST_EVERY_S and await self._list():
                self._listed_at = time.monotonic()
            names = tier.ledger.due(time.time(), DELETE_BATCH_MAX)
            if names:
                await self.delete(names, "evicted")
            if len(names) < DELETE_BATCH_MAX:
                await asyncio.sleep(_TURN_S)

    async def delete(self, names: list[str], reason: str) -> None:
        """Delete objects, and forget them; what the ledger keeps is tried again if that fails."""
        tier = self._tier
        for start in range(0, len(names), DELETE_BATCH_MAX):
            batch = names[start : start + DELETE_BATCH_MAX]
            self._forget(batch, reason)
            try:
                await tier.effort.call(
                    "delete",
                    lambda batch=batch: tier.store.delete(batch),  # type: ignore[misc]
                    ends_at=tier.ends_at(),
                )
            except ObjectError as error:
                _log.warning("%d objects are not deleted for now: %s", len(batch), error)
                return
            tier.ledger.forget(batch)
            tier.instruments.note_deleted(reason, len(batch))

    def _forget(self, names: Sequence[str], reason: str) -> None:
        """Serve nothing from objects that are about to go."""
        for name in names:
            parsed = parse_name(self._tier.config.prefix, name)
            if parsed is not None and self._is_as_ours(parsed):
                key = np.frombuffer(parsed.last_key, np.uint8)[None]
                self._tier.forget(key, MissReason.named(reason))
                self._tier.known.note_absent(parsed.last_key)

    def _is_as_ours(self, name: ObjectName) -> bool:
        tier = self._tier
        is_as_wide = name.num_blocks == tier.config.blocks_per_object
        return is_as_wide and tier.keyring.makes(name.seal_id)

    async def _list(self) -> bool:
        """Take all objects under the prefix into the ledger; False when that did not work."""
        tier = self._tier
        began_s, last = time.time(), ""
        is_first = len(tier.ledger) == 0
        names: set[str] = set()
        try:
            while page := await self._page(last):
                last = page[-1].name
                ours = [one for one in page if parse_name(tier.config.prefix, one.name) is not None]
                names.update(one.name for one in ours)
                tier.ledger.listed(ours)
                if len(names) > tier.config.known_objects_max:
                    _log.warning(
                        "more than %d objects: the rest is not counted; raise known_objects_max",
                        tier.config.known_objects_max,
                    )
                    break
            else:
                tier.ledger.keep_only(names, began_s - tier.config.deadline_s)
        except ObjectError as error:
            _log.warning("the objects in %s are not counted for now: %s", tier.config.bucket, error)
            return False
        if is_first:
            tier.ledger.sort()
        return True

    async def _page(self, after: str) -> Sequence[ObjectFacts]:
        tier = self._tier
        prefix = root(tier.config.prefix)

        async def first_page() -> Sequence[ObjectFacts]:
            async for page in tier.store.list(prefix, after=after):
                return page
            return []

        return await tier.effort.call("list", first_page, ends_at=tier.ends_at())
