"""Buckets in memory with objects in them, and what looks at them."""

from __future__ import annotations

from kvx.cache.breaker import Breaker
from kvx.cache.s3.effort import Effort
from kvx.cache.s3.instruments import S3Instruments
from kvx.cache.s3.inventory import Inventory
from kvx.config import BreakerConfig
from kvx.metrics import Registry
from tests.cache.s3.groups import NOW_S, Group, with_crc
from tests.cache.s3.memory_store import Bucket


def inventory_of(store: object, **settings: object) -> Inventory:
    """Return what looks at a store, `kvx` being the prefix."""
    effort = Effort(
        Breaker(BreakerConfig(failures=100)), S3Instruments(Registry()), max_in_flight=16
    )
    return Inventory(store, effort, prefix="kvx", **settings)  # type: ignore[arg-type]


def put(bucket: Bucket, name: str, body: bytes, *, modified_s: float = NOW_S) -> None:
    """Put an object into a bucket."""
    bucket.objects[name] = (body, modified_s)


def put_group(bucket: Bucket, group: Group, **settings: float) -> str:
    """Put a group into a bucket; returns its name."""
    put(bucket, group.name(), group.encode().tobytes(), **settings)
    return group.name()


def of_version(version: int) -> bytes:
    """Return an object as a later kvx might write it: only how it begins is known."""
    body = Group().encode().tobytes()
    return with_crc(body[:8] + version.to_bytes(4, "little") + body[12:120]) + b"whatever follows"
