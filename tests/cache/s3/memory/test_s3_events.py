"""Objects that are stored and go are in the cache's events."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx import AllBlocksCleared, BlockRemoved
from tests.cache.conftest import make_hashes
from tests.cache.s3.memory.conftest import WIDTH
from tests.cache.s3.memory.test_tier import bring, store

if TYPE_CHECKING:
    import kvx
    from tests.cache.s3.memory.conftest import Opener
    from tests.cache.s3.memory_store import Bucket

COUNT = 2 * WIDTH


def said(cache: kvx.TieredCache) -> list[tuple[str, set[bytes]]]:
    """Return what was said of S3: "stored" or why removed, and the keys."""
    found = []
    for event in cache.events.replay(1):
        if isinstance(event, AllBlocksCleared) or event.tier != "s3":
            continue
        keys = {event.keys[at : at + 16] for at in range(0, len(event.keys), 16)}
        found.append((event.reason if isinstance(event, BlockRemoved) else "stored", keys))
    return found


def test_a_group_is_announced_when_it_is_stored_and_withdrawn_when_dropped(
    open_s3_cache: Opener,
) -> None:
    cache, space = open_s3_cache()
    store(cache, space, COUNT)
    keys = [key.tobytes() for key in space.namespace.keys(make_hashes(COUNT))]
    groups = [set(keys[:WIDTH]), set(keys[WIDTH:])]
    stored = said(cache)
    assert sorted(kind for kind, _ in stored) == ["stored", "stored"]
    assert all(group in [keys for _, keys in stored] for group in groups)
    space.drop(make_hashes(1))  # one block takes its whole object with it
    assert said(cache)[2:] == [("dropped", groups[0])]


def test_an_object_that_others_deleted_is_withdrawn_when_that_is_seen(
    bucket: Bucket, open_s3_cache: Opener
) -> None:
    cache, space = open_s3_cache()
    store(cache, space, COUNT)
    cache.clear()
    bucket.objects.clear()
    assert bring(space, COUNT).num_blocks == 0
    assert {kind for kind, _ in said(cache)[2:]} == {"evicted"}
