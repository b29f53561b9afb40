"""What `kvx doctor` says of the S3 tier: whether the bucket answers, and what is allowed in it."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING

from kvx.cache.s3.names import root
from kvx.cache.s3.obstore_store import open_store
from kvx.cache.s3.opening import open_keyring
from kvx.cache.s3.store import ObjectError, ObjectFault
from kvx.cli.finding import Finding
from kvx.errors import KvxError
from kvx.tier_config import S3TierConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvx.cache.s3.store import ObjectStore
    from kvx.config import CacheConfig

_PROBE_BYTES = 4096


def s3_findings(config: CacheConfig | None) -> Iterator[Finding]:
    """Yield what the S3 tier of a configuration would meet; one small object comes and goes."""
    tier = None if config is None else config.tier(S3TierConfig)
    if tier is None:
        yield Finding(
            "S3 tier", is_good=True, found="not configured",
            remedy="a tier of kind s3, and --config: says whether its bucket can be used",
        )  # fmt: skip
        return
    yield _keys(tier)
    subject = f"S3 bucket {tier.bucket}"
    try:
        yield Finding(subject, is_good=True, found=asyncio.run(_try(open_store(tier), tier)))
    except KvxError as error:
        yield Finding(subject, is_good=False, found=str(error))


def _keys(tier: S3TierConfig) -> Finding:
    try:
        is_sealing = open_keyring(tier).is_sealing
    except KvxError as error:
        return Finding("S3 sealing", is_good=False, found=str(error))
    if not is_sealing:
        return Finding("S3 sealing", is_good=True, found="off: objects are stored as they are")
    has_default = tier.seal_key_file is not None or bool(tier.seal_key_env)
    others = "one for all others" if has_default else "tenants without one are refused"
    return Finding(
        "S3 sealing", is_good=True, found=f"{len(tier.seal_keys)} tenants have keys; {others}"
    )


async def _try(store: ObjectStore, tier: S3TierConfig) -> str:
    """Use the bucket as a cache does; returns what was found."""
    name = f"{root(tier.prefix)}doctor/{secrets.token_hex(8)}"
    body = secrets.token_bytes(_PROBE_BYTES)
    try:
        async with asyncio.timeout(tier.deadline_s):
            begun = time.monotonic()
            try:
                await store.head(name)
            except ObjectError as error:
                if error.fault is not ObjectFault.MISSING:
                    raise
            took_ms = (time.monotonic() - begun) * 1e3
            if tier.is_read_only:
                return f"answers in {took_ms:.1f} ms; read only, as configured"
            await store.put(name, memoryview(body), only_if_absent=True)
            is_refused = await _is_second_refused(store, name, body)
            is_whole = bytes(await store.get(name, 0, _PROBE_BYTES)) == body
            await store.delete([name])
    except TimeoutError:
        raise ObjectError(
            f"{tier.bucket} does not answer within deadline_s = {tier.deadline_s} s; look at the "
            "endpoint and the network",
            fault=ObjectFault.TIMEOUT,
        ) from None
    finally:
        await store.close()
    if not is_whole:
        raise ObjectError("an object came back with other bytes", fault=ObjectFault.PROTOCOL)
    once = "" if is_refused else "; it ignores If-None-Match, so machines store some objects twice"
    return f"answers in {took_ms:.1f} ms; reading, storing and deleting work{once}"


async def _is_second_refused(store: ObjectStore, name: str, body: bytes) -> bool:
    try:
        await store.put(name, memoryview(body), only_if_absent=True)
    except ObjectError as error:
        return error.fault is ObjectFault.CONFLICT
    return False
