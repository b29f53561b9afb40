"""The S3 tier of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvx.cache.s3.keyring import Keyring
from kvx.cache.s3.obstore_store import open_store
from kvx.cache.s3.seal import Sealer
from kvx.cache.s3.tier import S3Tier
from kvx.config import seal_keys
from kvx.tier_config import S3TierConfig

if TYPE_CHECKING:
    from kvx.cache.s3.store import ObjectStore
    from kvx.cache.shared import Shared
    from kvx.config import CacheConfig


def open_s3(shared: Shared, config: CacheConfig, bucket: ObjectStore | None) -> S3Tier | None:
    """Return the S3 tier of a configuration; None without one.

    Args:
        shared: The cache.
        config: Its configuration.
        bucket: What to use instead of the bucket that is named; None for none.

    Raises:
        UnavailableError: The packages it needs are not installed.
        ConfigError: A key for sealing is missing or malformed.
    """
    found = config.tier(S3TierConfig)
    if found is None:
        return None
    keyring = open_keyring(found)
    return S3Tier(shared, found, config.breaker, bucket or open_store(found), keyring)


def open_keyring(config: S3TierConfig) -> Keyring:
    """Return which key seals whose objects.

    Raises:
        ConfigError: A key is missing or malformed, or two tenants have the same; none is shown.
        UnavailableError: There is a key, and the package `cryptography` is not here.
    """
    return Keyring({tenant: Sealer(key) for tenant, key in seal_keys(config).items()})
